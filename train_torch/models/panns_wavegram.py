"""The PANNs that read the waveform: Wavegram_Cnn14, and Wavegram_Logmel_Cnn14, which takes log-mel as well.

Source: see :mod:`train_torch.models.panns`. A wavegram is a map like a spectrogram's, learned from the waveform by
convolutions of stride 5 * 4 * 4 * 4 * 2 = 640 samples. Beside log-mel, whose first block leaves one position for two
frames of 320 samples, the two maps are equally long for ``L`` samples iff ``L % 640`` is at most 319 or at least 636
(from 10,236 samples on); multiples of 640 are the simple rule.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from models_zoo.cards import LengthPolicy, ModelInput
from models_zoo.errors import ClipLengthError, WaveformError
from train_torch.models.panns import ConvBlock, PannsOptions, TaggingHead, scaled, xavier

__all__ = ["WavegramCnn14", "WavegramLogmelCnn14", "WavegramOptions"]

_STRIDE = 640
_MEL_POSITIONS = 32
"""Positions a wavegram has where a spectrogram has mel bands: 64 of them, halved once."""


class WavegramOptions(PannsOptions):
    """What can be chosen about a wavegram network; its map has 32 positions, those of 64 mel bands halved."""

    n_mels: Literal[64] = 64


class _PreBlock(nn.Module):
    """Two convolutions along the waveform, the second dilated, then the largest of four."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(inputs, outputs, 3, padding=1, bias=False)
        self.conv2 = nn.Conv1d(outputs, outputs, 3, padding=2, dilation=2, bias=False)
        self.bn1 = nn.BatchNorm1d(outputs)
        self.bn2 = nn.BatchNorm1d(outputs)
        xavier(self.conv1, self.conv2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return functional.max_pool1d(x, 4)


class WavegramCnn14(TaggingHead):
    """A Cnn14 whose first block reads the waveform.

    ``bn0`` and ``conv_block1`` are in the published file and unused, as in the published code.

    Attributes:
        inputs: ``waveform`` ``(batch, samples)`` float32 in [-1, 1].
        length_policy: shortest clip in samples.
    """

    published_frontend: ClassVar[bool] = False
    min_frames: ClassVar[int] = 1
    length_policy: ClassVar[LengthPolicy] = LengthPolicy(min=10_236)
    joined: ClassVar[int] = 1
    masked_at: ClassVar[tuple[str, ...]] = ()
    mixed_at: ClassVar[tuple[str, ...]] = ("pre_block4",)

    def __init__(self, options: WavegramOptions) -> None:
        super().__init__(options)
        self.inputs = (ModelInput(name="waveform", axes=("batch", "samples"), source="waveform"),)
        width = options.width
        first = scaled(64, width)
        planes = scaled(4, width)
        deep = planes * _MEL_POSITIONS
        self.pre_conv0 = nn.Conv1d(1, first, 11, 5, 5, bias=False)
        self.pre_bn0 = nn.BatchNorm1d(first)
        self.pre_block1 = _PreBlock(first, first)
        self.pre_block2 = _PreBlock(first, deep)
        self.pre_block3 = _PreBlock(deep, deep)
        self.pre_block4 = ConvBlock(planes, first)
        xavier(self.pre_conv0)
        self.bn0 = nn.BatchNorm2d(options.n_mels)
        self.conv_block1 = ConvBlock(1, first)
        inputs = first * self.joined
        for index, channels in enumerate((128, 256, 512, 1024, 2048), 2):
            outputs = scaled(channels, width)
            self.add_module(f"conv_block{index}", ConvBlock(inputs, outputs))
            inputs = outputs
        if self.joined == 1:
            self.bn0.requires_grad_(False)
            self.conv_block1.requires_grad_(False)
        self._add_head(inputs, inputs)

    def wavegram(self, waveform: Tensor) -> Tensor:
        """Return the wavegram ``(batch, 64 * width, samples / 640, 32)`` of ``(batch, samples)``.

        Raises:
            WaveformError: the waveform has other axes.
            ClipLengthError: it is shorter than ``length_policy`` says.
        """
        if not torch.jit.is_tracing():
            self._check_waveform(waveform)
        x = torch.relu(self.pre_bn0(self.pre_conv0(waveform.unsqueeze(1))))
        x = self.pre_block3(self.pre_block2(self.pre_block1(x)))
        x = x.unflatten(1, (-1, _MEL_POSITIONS)).transpose(2, 3)
        return self.pre_block4(x, (2, 1))

    def _check_waveform(self, waveform: Tensor) -> None:
        if waveform.ndim != 2:
            raise WaveformError(f"waveform: got shape {tuple(waveform.shape)}; expected (batch, samples)", code="rank")
        shortest = self.length_policy.min
        if shortest is not None and waveform.shape[1] < shortest:
            raise ClipLengthError(
                f"waveform: got {waveform.shape[1]} samples; this model needs at least {shortest}, as its pools halve "
                "what is left of them; use a longer clip",
                code="too_short",
            )

    def _deep(self, x: Tensor) -> Tensor:
        """Return the last map of the first ``(batch, channels, time / 2, 32)``."""
        x = self._drop(x)
        for index in range(2, 7):
            x = self._drop(self.get_submodule(f"conv_block{index}")(x, (1, 1) if index == 6 else (2, 2)))
        return x

    def feature_map(self, waveform: Tensor) -> Tensor:
        """Return the map ``(batch, channels, samples / 10240, 2)`` of a waveform."""
        return self._deep(self.wavegram(waveform))

    def forward(self, waveform: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Return ``{"logits": (batch, num_classes), "embedding": (batch, size)}``, float32, logits unbounded.

        Args:
            waveform: ``(batch, samples)`` float32 in [-1, 1] at 32 kHz.

        Raises:
            WaveformError: the waveform has other axes.
            ClipLengthError: it is too short.
        """
        return self._tagged(self.feature_map(waveform))


class WavegramLogmelCnn14(WavegramCnn14):
    """A Cnn14 whose second block reads the first blocks of both log-mel and waveform, in this order.

    Attributes:
        inputs: ``features`` ``(batch, 1, time, 64)`` and the ``waveform`` ``(batch, samples)`` they were made of.
        length_policy: legal clips in samples: multiples of 640, others cropped to one. The maintainer calls the model
            fixed to 10 s; it is not.
    """

    published_frontend: ClassVar[bool] = True
    min_frames: ClassVar[int] = 32
    length_policy: ClassVar[LengthPolicy] = LengthPolicy(min=16 * _STRIDE, multiple_of=_STRIDE, uneven="crop")
    joined: ClassVar[int] = 2
    masked_at: ClassVar[tuple[str, ...]] = ("bn0",)
    mixed_at: ClassVar[tuple[str, ...]] = ("bn0", "pre_block4")

    def __init__(self, options: WavegramOptions) -> None:
        super().__init__(options)
        features = ModelInput(name="features", axes=("batch", "1", "time", str(options.n_mels)), source="frontend")
        self.inputs = (features, *self.inputs)

    def feature_map(self, features: Tensor, waveform: Tensor) -> Tensor:  # type: ignore[override]
        """Return the map ``(batch, channels, samples / 10240, 2)`` of features and the waveform they were made of."""
        of_waveform = self.wavegram(waveform)
        of_features = self.conv_block1(self._normalised(features))
        if not torch.jit.is_tracing() and of_features.shape[2] != of_waveform.shape[2]:
            raise ClipLengthError(
                f"waveform: {waveform.shape[1]} samples become {of_waveform.shape[2]} positions, their "
                f"{features.shape[2]} frames {of_features.shape[2]}; this model needs as many of both: cut clips to a "
                f"multiple of {_STRIDE} samples, as the card's length_policy does, before the front end",
                code="multiple",
            )
        return self._deep(torch.cat([of_features, of_waveform], 1))

    def forward(self, features: Tensor, waveform: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Return ``{"logits": (batch, num_classes), "embedding": (batch, size)}``, float32, logits unbounded.

        Args:
            features: ``(batch, 1, time, 64)`` float32, log-mel in dB.
            waveform: ``(batch, samples)`` float32 in [-1, 1] at 32 kHz, which the features were made of.

        Raises:
            SpecError, WaveformError: features or waveform have other axes.
            ClipLengthError: too short, or a length for which the two maps do not match.
        """
        return self._tagged(self.feature_map(features, waveform))
