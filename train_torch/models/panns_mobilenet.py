"""The small PANNs: MobileNetV1 and MobileNetV2.

Source: see :mod:`train_torch.models.panns`. A stride of 2 is a mean over 2x2 between a convolution and its norm; no
convolution here has a stride. MobileNetV2's strides differ from those of the network for images.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from train_torch.models.panns import PannsOptions, TaggingHead, scaled, xavier

__all__ = ["MobileNetV1", "MobileNetV2"]


def _convolution(inputs: int, outputs: int, kernel: int, groups: int = 1) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, kernel, padding=(kernel - 1) // 2, groups=groups, bias=False)
    xavier(layer)
    return layer


def _pooled(inputs: int, outputs: int, stride: int, activation: type[nn.Module], groups: int = 1) -> list[nn.Module]:
    """Return a 3x3 convolution, the mean that is its stride (also over 1x1, which keeps indices), norm, activation."""
    convolution = _convolution(inputs, outputs, 3, groups)
    return [convolution, nn.AvgPool2d(stride), nn.BatchNorm2d(outputs), activation()]


def _pointwise(inputs: int, outputs: int, activation: type[nn.Module] | None) -> list[nn.Module]:
    layers = [_convolution(inputs, outputs, 1), nn.BatchNorm2d(outputs)]
    return layers if activation is None else [*layers, activation()]


class MobileNetV1(TaggingHead):
    """Thirteen pairs of a depthwise and a pointwise convolution."""

    rows: ClassVar[tuple[tuple[int, int], ...]] = (
        *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
        *((512, 1),) * 5,
        *((1024, 2), (1024, 1)),
    )
    """Channels and stride of each pair."""

    def __init__(self, options: PannsOptions) -> None:
        super().__init__(options)
        self.bn0 = nn.BatchNorm2d(options.n_mels)
        inputs = scaled(32, options.width)
        units = [nn.Sequential(*_pooled(1, inputs, 2, nn.ReLU))]
        for channels, stride in self.rows:
            outputs = scaled(channels, options.width)
            depthwise = _pooled(inputs, inputs, stride, nn.ReLU, groups=inputs)
            units.append(nn.Sequential(*depthwise, *_pointwise(inputs, outputs, nn.ReLU)))
            inputs = outputs
        self.features = nn.Sequential(*units)
        self._add_head(inputs, inputs)

    def feature_map(self, features: Tensor) -> Tensor:
        """Return the map ``(batch, channels, time / 32, mel / 32)`` of features."""
        return self.features(self._normalised(features))


class _InvertedResidual(nn.Module):
    """Expand, depthwise convolution, project; with a bypass where shapes allow."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        self.bypass = stride == 1 and inputs == outputs
        hidden = inputs * expansion
        expand = _pointwise(inputs, hidden, nn.ReLU6) if expansion > 1 else []
        depthwise = _pooled(hidden, hidden, stride, nn.ReLU6, groups=hidden)
        self.conv = nn.Sequential(*expand, *depthwise, *_pointwise(hidden, outputs, None))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.bypass else self.conv(x)


class MobileNetV2(TaggingHead):
    """Seventeen inverted residual blocks."""

    rows: ClassVar[tuple[tuple[int, int, int, int], ...]] = (
        *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
        *((6, 96, 3, 2), (6, 160, 3, 1), (6, 320, 1, 1)),
    )
    """Expansion, channels, blocks and the first block's stride of each stage."""

    drops_before_embedding: ClassVar[bool] = False  # the published code has that line commented out

    def __init__(self, options: PannsOptions) -> None:
        super().__init__(options)
        self.bn0 = nn.BatchNorm2d(options.n_mels)
        inputs = scaled(32, options.width)
        units: list[nn.Module] = [nn.Sequential(*_pooled(1, inputs, 2, nn.ReLU6))]
        for expansion, channels, depth, stride in self.rows:
            for position in range(depth):
                outputs = scaled(channels, options.width)
                units.append(_InvertedResidual(inputs, outputs, stride if position == 0 else 1, expansion))
                inputs = outputs
        last = scaled(1280, options.width)
        units.append(nn.Sequential(*_pointwise(inputs, last, nn.ReLU6)))
        self.features = nn.Sequential(*units)
        self._add_head(last, scaled(1024, options.width))

    def feature_map(self, features: Tensor) -> Tensor:
        """Return the map ``(batch, channels, time / 32, mel / 32)`` of features."""
        return self.features(self._normalised(features))
