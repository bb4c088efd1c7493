"""What the PANNs families share: their blocks, how a clip's map becomes scores, and how much of a clip they need.

Source: Kong et al., "PANNs: Large-Scale Pretrained Audio Neural Networks for Audio Pattern Recognition"
(arXiv 1912.10211), qiuqiangkong/audioset_tagging_cnn ``pytorch/models.py``. Parameter names and shapes are the
published ones, so that published files load strictly. Differences: features come from our front end, so the published
files' own DFT kernels and mel matrix are no parameters here (:mod:`train_torch.published_frontend` compares them with
ours); the published sigmoid is left to the decoder, so scores are logits; a clip that is too short is refused by name.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from models_zoo.cards import ModelInput, ModelOutput
from models_zoo.errors import CardError, ClipLengthError, SpecError
from models_zoo.schema import Declaration

__all__ = ["Conv5x5Block", "ConvBlock", "PannsNetwork", "PannsOptions", "TaggingHead", "scaled", "xavier"]


class PannsOptions(Declaration):
    """What can be chosen about a PANNs network.

    Attributes:
        num_classes: scores per clip; 0 builds no head and returns the embedding alone.
        width: factor on every channel count; 1 is the published network.
        n_mels: mel bands of the features.
        dropout: probability after a block of convolutions.
        head_dropout: probability before and after ``fc1``.
    """

    error: ClassVar[type[CardError]] = CardError

    num_classes: int = Field(default=527, ge=0)
    width: float = Field(default=1.0, gt=0)
    n_mels: int = Field(default=64, ge=32)
    dropout: float = Field(default=0.2, ge=0, lt=1)
    head_dropout: float = Field(default=0.5, ge=0, lt=1)


def scaled(channels: int, width: float) -> int:
    """Return ``channels`` times ``width``, rounded, at least 1."""
    return max(1, round(channels * width))


def xavier(*layers: nn.Conv1d | nn.Conv2d | nn.Linear) -> None:
    """Initialise convolutions and linear layers as the published code does: Xavier uniform, biases 0."""
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


class ConvBlock(nn.Module):
    """Two 3x3 convolutions, each with norm and ReLU, then a mean over ``pool``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        xavier(self.conv1, self.conv2)

    def forward(self, x: Tensor, pool: tuple[int, int] = (2, 2)) -> Tensor:
        """Return ``(batch, out, time / pool[0], mel / pool[1])`` of ``(batch, in, time, mel)``, rounded down."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return x if pool == (1, 1) else functional.avg_pool2d(x, pool)


class Conv5x5Block(nn.Module):
    """One 5x5 convolution with norm and ReLU, then a mean over ``pool``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 5, padding=2, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        xavier(self.conv1)

    def forward(self, x: Tensor, pool: tuple[int, int] = (2, 2)) -> Tensor:
        """Return ``(batch, out, time / pool[0], mel / pool[1])`` of ``(batch, in, time, mel)``, rounded down."""
        return functional.avg_pool2d(torch.relu(self.bn1(self.conv1(x))), pool)


class PannsNetwork(nn.Module):
    """What every network of the system has in common.

    Attributes:
        masked_at, mixed_at: parts behind which training recipes mask and mix, see
            :class:`train_torch.network_hooks.NetworkHooks`.
        inputs: ``features`` ``(batch, 1, time, n_mels)`` float32, the front end's layout ``b 1 t m``.
        options: JSON-ready dict that rebuilds the network through ``create_model``.
        class_keys: state_dict entries that belong to one class count, i.e. that fine-tuning to others replaces.
        min_frames: fewest frames of features; with fewer a pool would have nothing to take the mean of.
        published_frontend: published files hold their DFT kernels and mel matrix.
    """

    system: ClassVar[str] = "panns"
    layout: ClassVar[str] = "b 1 t m"
    min_frames: ClassVar[int] = 32
    head_prefix: ClassVar[str] = "fc_audioset."
    published_frontend: ClassVar[bool] = True
    masked_at: ClassVar[tuple[str, ...]] = ("bn0",)
    mixed_at: ClassVar[tuple[str, ...]] = ("bn0",)
    exporter: ClassVar[Literal["torchscript", "dynamo"]] = "torchscript"
    exporter_reason: ClassVar[str] = (
        "dynamo freezes the time axis of a decision-level model at the example's without an error, and cannot relate "
        "the two inputs of a wavegram model (torch 2.11); both graphs run equally fast"
    )

    inputs: tuple[ModelInput, ...]
    outputs: tuple[ModelOutput, ...]
    class_keys: tuple[str, ...]

    def __init__(self, options: PannsOptions) -> None:
        super().__init__()
        self.declared = options
        self.inputs = (
            ModelInput(name="features", axes=("batch", "1", "time", str(options.n_mels)), source="frontend"),
        )

    @property
    def options(self) -> dict[str, Any]:
        """JSON-ready dict that rebuilds the network through ``create_model``."""
        return self.declared.to_dict()

    def _find_class_keys(self) -> None:
        self.class_keys = tuple(key for key in self.state_dict() if key.startswith(self.head_prefix))

    def _drop(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.declared.dropout, self.training)

    def _drop_head(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.declared.head_dropout, self.training)

    def _normalised(self, features: Tensor) -> Tensor:
        """Return ``features`` normalised per mel band, ``(batch, 1, time, n_mels)``.

        Raises:
            SpecError: the features have other axes.
            ClipLengthError: fewer frames than ``min_frames``.
        """
        if not torch.jit.is_tracing():
            self._check_features(features)
        # BatchNorm counts axis 1 as its channels; the published code normalises mel bands by swapping them there.
        return self.bn0(features.transpose(1, 3)).transpose(1, 3)

    def _check_features(self, features: Tensor) -> None:
        n_mels = self.declared.n_mels
        if features.ndim != 4 or features.shape[1] != 1:
            raise SpecError(
                f"features: got shape {tuple(features.shape)}; expected (batch, 1, time, {n_mels}) as the front end "
                "returns them",
                field="layout",
            )
        if features.shape[3] != n_mels:
            raise SpecError(
                f"features: got {features.shape[3]} mel bands; this model was built for {n_mels}; use the front end "
                "it was trained with, or build it with that n_mels",
                field="mel.n_mels",
            )
        if features.shape[2] < self.min_frames:
            raise ClipLengthError(
                f"features: got {features.shape[2]} frames; this model needs at least {self.min_frames}, as its pools "
                "halve them; use a longer clip",
                code="too_short",
            )


class TaggingHead(PannsNetwork):
    """A network that pools its map over the whole clip, and tags the clip.

    Attributes:
        outputs: ``logits`` ``(batch, num_classes)`` (absent with 0 classes) and ``embedding`` ``(batch, size)``, not
            negative. In training the embedding returned is dropped out, but not the one the scores come from.
    """

    drops_before_embedding: ClassVar[bool] = True

    def _add_head(self, channels: int, embedding: int) -> None:
        """Add the layers behind the map; called last, so that parameters come in the published order."""
        options = self.declared
        self.fc1 = nn.Linear(channels, embedding)
        xavier(self.fc1)
        mean = ModelOutput(name="embedding", role="embedding", axes=("batch", str(embedding)))
        self.outputs = (mean,)
        self.fc_audioset: nn.Module | None = None
        if options.num_classes:
            self.fc_audioset = nn.Linear(embedding, options.num_classes)
            xavier(self.fc_audioset)
            axes = ("batch", str(options.num_classes))
            self.outputs = (ModelOutput(name="logits", role="clip", kind="logit", axes=axes), mean)
        self._find_class_keys()

    @abstractmethod
    def feature_map(self, **inputs: Tensor) -> Tensor:
        """Return the map ``(batch, channels, time, mel)`` of the network's inputs."""

    def _tagged(self, feature_map: Tensor) -> dict[str, Tensor]:
        """Return the outputs for a map ``(batch, channels, time, mel)``."""
        over_time = feature_map.mean(3)
        pooled = over_time.amax(2) + over_time.mean(2)
        if self.drops_before_embedding:
            pooled = self._drop_head(pooled)
        embedding = torch.relu(self.fc1(pooled))
        returned = self._drop_head(embedding)
        if self.fc_audioset is None:
            return {"embedding": returned}
        return {"logits": self.fc_audioset(embedding), "embedding": returned}

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Return ``{"logits": (batch, num_classes), "embedding": (batch, size)}``, float32, logits unbounded.

        Args:
            features: ``(batch, 1, time, n_mels)`` float32, log-mel in dB.

        Raises:
            SpecError: the features have other axes.
            ClipLengthError: fewer frames than ``min_frames``.
        """
        return self._tagged(self.feature_map(features=features))
