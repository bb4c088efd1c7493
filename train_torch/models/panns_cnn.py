"""The plain PANNs: Cnn14, Cnn10, Cnn6, the decision-level variants of Cnn14, and the transfer model.

Source: see :mod:`train_torch.models.panns`; the transfer model is qiuqiangkong/panns_transfer_to_gtzan. The weights of
Cnn14, Cnn14DecisionLevelMax and Cnn14DecisionLevelAvg have the same names and shapes: which of them a file belongs to
cannot be seen in it, and the wrong one answers plausibly.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from models_zoo.cards import ModelOutput
from train_torch.models.panns import Conv5x5Block, ConvBlock, PannsNetwork, PannsOptions, TaggingHead, scaled, xavier

__all__ = [
    "Cnn6",
    "Cnn10",
    "Cnn14",
    "Cnn14DecisionLevelAtt",
    "Cnn14DecisionLevelAvg",
    "Cnn14DecisionLevelMax",
    "Cnn14Options",
    "DecisionLevelOptions",
    "TransferCnn14",
    "TransferOptions",
]

_CNN14_CHANNELS = (64, 128, 256, 512, 1024, 2048)


class Cnn14Options(PannsOptions):
    """What can be chosen about a Cnn14.

    Attributes:
        embedding: size of the embedding, published as 2048, 512, 128 and 32; None for as many as the last block's
            channels.
    """

    embedding: int | None = Field(default=None, ge=1)


class DecisionLevelOptions(PannsOptions):
    """What can be chosen about a decision-level network; it has no embedding, so at least one class."""

    num_classes: int = Field(default=527, ge=1)


class TransferOptions(PannsOptions):
    """What can be chosen about a transfer model.

    Attributes:
        num_classes: classes it was transferred to.
        base_classes: classes of the network it was transferred from; that head stays in the file, unused.
    """

    num_classes: int = Field(default=50, ge=1)
    base_classes: int = Field(default=527, ge=1)


class _Blocks(PannsNetwork):
    """Blocks of convolutions, the time and mel axes halved after each, except after the sixth."""

    channels: ClassVar[tuple[int, ...]] = _CNN14_CHANNELS
    block: ClassVar[type[ConvBlock] | type[Conv5x5Block]] = ConvBlock

    def __init__(self, options: PannsOptions) -> None:
        super().__init__(options)
        self.bn0 = nn.BatchNorm2d(options.n_mels)
        inputs = 1
        for index, channels in enumerate(self.channels, 1):
            outputs = scaled(channels, options.width)
            self.add_module(f"conv_block{index}", self.block(inputs, outputs))
            inputs = outputs
        self.last_channels = inputs

    def feature_map(self, features: Tensor) -> Tensor:
        """Return the map ``(batch, channels, time / 32, mel / 32)`` of features, ``/ 16`` with four blocks."""
        x = self._normalised(features)
        for index in range(1, len(self.channels) + 1):
            x = self._drop(self.get_submodule(f"conv_block{index}")(x, (1, 1) if index == 6 else (2, 2)))
        return x


class Cnn14(_Blocks, TaggingHead):
    """Six blocks of two 3x3 convolutions."""

    def __init__(self, options: Cnn14Options) -> None:
        super().__init__(options)
        self._add_head(self.last_channels, options.embedding or self.last_channels)


class Cnn10(_Blocks, TaggingHead):
    """Four blocks of two 3x3 convolutions."""

    min_frames: ClassVar[int] = 16
    channels: ClassVar[tuple[int, ...]] = _CNN14_CHANNELS[:4]

    def __init__(self, options: PannsOptions) -> None:
        super().__init__(options)
        self._add_head(self.last_channels, self.last_channels)


class Cnn6(Cnn10):
    """Four blocks of one 5x5 convolution."""

    block: ClassVar[type[ConvBlock] | type[Conv5x5Block]] = Conv5x5Block


class _DecisionLevel(_Blocks):
    """A Cnn14 that scores segments of 32 frames, and makes the clip's scores from theirs.

    Attributes:
        outputs: clip scores ``(batch, num_classes)`` and frame scores ``(batch, time, num_classes)``, one per frame of
            the features: a segment's scores are repeated for its 32 frames, the last ones to the end of the clip.
    """

    segment: ClassVar[int] = 32
    kind: ClassVar[str] = "probability"

    def __init__(self, options: DecisionLevelOptions) -> None:
        super().__init__(options)
        self.fc1 = nn.Linear(self.last_channels, self.last_channels)
        xavier(self.fc1)
        self._add_classes()
        self._find_class_keys()
        name = "logits" if self.kind == "logit" else "probabilities"
        classes = str(options.num_classes)
        self.outputs = (
            ModelOutput(name=name, role="clip", kind=self.kind, axes=("batch", classes)),
            ModelOutput(name=f"frame_{name}", role="frame", kind=self.kind, axes=("batch", "time", classes)),
        )

    def _add_classes(self) -> None:
        self.fc_audioset = nn.Linear(self.last_channels, self.declared.num_classes)
        xavier(self.fc_audioset)

    @abstractmethod
    def _scores(self, segments: Tensor) -> tuple[Tensor, Tensor]:
        """Return clip scores ``(batch, classes)`` and segment scores ``(batch, segments, classes)``.

        Args:
            segments: ``(batch, segments, channels)``, not negative.
        """

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Return clip scores ``(batch, num_classes)`` and frame scores ``(batch, time, num_classes)`` by name.

        Args:
            features: ``(batch, 1, time, n_mels)`` float32, log-mel in dB.

        Raises:
            SpecError: the features have other axes.
            ClipLengthError: fewer frames than ``min_frames``.
        """
        over_time = self.feature_map(features).mean(3)
        # Zeros beyond the ends count in the mean: the published one is always over three.
        smoothed = functional.max_pool1d(over_time, 3, 1, 1) + functional.avg_pool1d(over_time, 3, 1, 1)
        segments = torch.relu(self.fc1(self._drop_head(smoothed).transpose(1, 2)))
        clip, scores = self._scores(self._drop_head(segments))
        frames = torch.arange(features.shape[2], device=features.device) // self.segment
        repeated = scores[:, frames.clamp(max=scores.shape[1] - 1)]
        return dict(zip((output.name for output in self.outputs), (clip, repeated), strict=True))


class Cnn14DecisionLevelMax(_DecisionLevel):
    """A clip has what its most certain segment has."""

    kind: ClassVar[str] = "logit"

    def _scores(self, segments: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.fc_audioset(segments)
        return logits.amax(1), logits


class Cnn14DecisionLevelAvg(_DecisionLevel):
    """A clip's probabilities are the means of its segments'; that is no sigmoid of a mean."""

    def _scores(self, segments: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = torch.sigmoid(self.fc_audioset(segments))
        return probabilities.mean(1), probabilities


class _Attention(nn.Module):
    """Segment probabilities, averaged with learned weights; ``bn_att`` is in the published files and unused."""

    def __init__(self, inputs: int, num_classes: int) -> None:
        super().__init__()
        self.att = nn.Conv1d(inputs, num_classes, 1)
        self.cla = nn.Conv1d(inputs, num_classes, 1)
        self.bn_att = nn.BatchNorm1d(num_classes).requires_grad_(False)
        xavier(self.att, self.cla)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights = self.att(x).clamp(-10, 10).softmax(-1)
        probabilities = torch.sigmoid(self.cla(x))
        return (weights * probabilities).sum(-1), probabilities


class Cnn14DecisionLevelAtt(_DecisionLevel):
    """A clip's probabilities are its segments', averaged with weights of each class's own."""

    head_prefix: ClassVar[str] = "att_block."

    def _add_classes(self) -> None:
        self.att_block = _Attention(self.last_channels, self.declared.num_classes)

    def _scores(self, segments: Tensor) -> tuple[Tensor, Tensor]:
        clip, probabilities = self.att_block(segments.transpose(1, 2))
        return clip, probabilities.transpose(1, 2)


class TransferCnn14(PannsNetwork):
    """A Cnn14 with a linear layer for other classes on its embedding.

    A file of a bare Cnn14 is taken as its ``base``. Freezing ``base.`` trains the new layer alone.

    Attributes:
        outputs: ``log_probabilities`` ``(batch, num_classes)`` and the base's ``embedding`` ``(batch, channels)``.
    """

    head_prefix: ClassVar[str] = "fc_transfer."
    base_prefix: ClassVar[str] = "base."
    masked_at: ClassVar[tuple[str, ...]] = ("base.bn0",)
    mixed_at: ClassVar[tuple[str, ...]] = ("base.bn0",)

    def __init__(self, options: TransferOptions) -> None:
        super().__init__(options)
        shared = {name: getattr(options, name) for name in PannsOptions.model_fields}
        self.base = Cnn14(Cnn14Options(**{**shared, "num_classes": options.base_classes}))
        self.base.fc_audioset.requires_grad_(False)  # unused
        self.fc_transfer = nn.Linear(self.base.last_channels, options.num_classes)
        xavier(self.fc_transfer)
        self._find_class_keys()
        self.inputs = self.base.inputs
        axes = ("batch", str(options.num_classes))
        clip = ModelOutput(name="log_probabilities", role="clip", kind="log_probability", axes=axes)
        self.outputs = (clip, self.base.outputs[-1])

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Return ``{"log_probabilities": (batch, num_classes), "embedding": (batch, channels)}``, float32.

        Args:
            features: ``(batch, 1, time, n_mels)`` float32, log-mel in dB.

        Raises:
            SpecError: the features have other axes.
            ClipLengthError: fewer frames than ``min_frames``.
        """
        embedding = self.base(features=features)["embedding"]
        return {"log_probabilities": self.fc_transfer(embedding).log_softmax(-1), "embedding": embedding}
