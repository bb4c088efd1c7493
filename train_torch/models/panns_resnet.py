"""The residual PANNs: ResNet22, ResNet38 and ResNet54.

Source: see :mod:`train_torch.models.panns`. A stride of 2 is a mean over 2x2 before the first convolution, in the
branch as in the shortcut; no convolution here has a stride.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from train_torch.models.panns import ConvBlock, PannsOptions, TaggingHead, scaled, xavier

__all__ = ["ResNet22", "ResNet38", "ResNet54"]

_DROPOUT = 0.1  # between the convolutions of a block, as published


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    expansion: ClassVar[int] = 1

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(inputs, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        xavier(self.conv1, self.conv2)
        nn.init.zeros_(self.bn2.weight)  # a fresh block is its shortcut
        self.downsample = _shortcut(inputs, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = functional.avg_pool2d(x, 2) if self.stride == 2 else x
        out = functional.dropout(torch.relu(self.bn1(self.conv1(out))), _DROPOUT, self.training)
        return torch.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class _Bottleneck(nn.Module):
    """A 3x3 convolution between 1x1 ones that narrow and widen, beside a shortcut."""

    expansion: ClassVar[int] = 4

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        outputs = channels * self.expansion
        self.conv1 = nn.Conv2d(inputs, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        xavier(self.conv1, self.conv2, self.conv3)
        nn.init.zeros_(self.bn3.weight)  # a fresh block is its shortcut
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = functional.avg_pool2d(x, 2) if self.stride == 2 else x
        out = torch.relu(self.bn1(self.conv1(out)))
        out = functional.dropout(torch.relu(self.bn2(self.conv2(out))), _DROPOUT, self.training)
        return torch.relu(self.bn3(self.conv3(out)) + self.downsample(x))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Return the shortcut; the published one has its convolution at index 1 behind a mean, at index 0 without."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    convolution = nn.Conv2d(inputs, outputs, 1, bias=False)
    xavier(convolution)
    return nn.Sequential(*([nn.AvgPool2d(2)] if stride == 2 else []), convolution, nn.BatchNorm2d(outputs))


class _Stages(nn.Module):
    """Four stages of residual blocks; the last three halve time and mel."""

    def __init__(
        self, inputs: int, block: type[_BasicBlock] | type[_Bottleneck], depths: tuple[int, ...], width: float
    ) -> None:
        super().__init__()
        for index, depth in enumerate(depths, 1):
            channels = scaled(32 * 2**index, width)
            blocks: list[nn.Module] = []
            for position in range(depth):
                blocks.append(block(inputs, channels, 2 if position == 0 and index > 1 else 1))
                inputs = channels * block.expansion
            self.add_module(f"layer{index}", nn.Sequential(*blocks))
        self.last_channels = inputs

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.children():
            x = stage(x)
        return x


class _ResNet(TaggingHead):
    block: ClassVar[type[_BasicBlock] | type[_Bottleneck]] = _BasicBlock
    depths: ClassVar[tuple[int, int, int, int]]

    def __init__(self, options: PannsOptions) -> None:
        super().__init__(options)
        first, last = scaled(64, options.width), scaled(2048, options.width)
        self.bn0 = nn.BatchNorm2d(options.n_mels)
        self.conv_block1 = ConvBlock(1, first)
        self.resnet = _Stages(first, self.block, self.depths, options.width)
        self.conv_block_after1 = ConvBlock(self.resnet.last_channels, last)
        self._add_head(last, last)

    def feature_map(self, features: Tensor) -> Tensor:
        """Return the map ``(batch, channels, time / 32, mel / 32)`` of features."""
        x = self._drop(self.conv_block1(self._normalised(features)))
        x = self._drop(functional.avg_pool2d(self.resnet(x), 2))
        return self._drop(self.conv_block_after1(x, (1, 1)))


class ResNet22(_ResNet):
    """Eight blocks of two convolutions."""

    depths: ClassVar[tuple[int, int, int, int]] = (2, 2, 2, 2)


class ResNet38(_ResNet):
    """Sixteen blocks of two convolutions."""

    depths: ClassVar[tuple[int, int, int, int]] = (3, 4, 6, 3)


class ResNet54(_ResNet):
    """Sixteen bottlenecks."""

    block: ClassVar[type[_BasicBlock] | type[_Bottleneck]] = _Bottleneck
    depths: ClassVar[tuple[int, int, int, int]] = (3, 4, 6, 3)
