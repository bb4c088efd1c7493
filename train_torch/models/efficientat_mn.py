"""The MN family of EfficientAT: MobileNetV3-Large read as a spectrogram network, at any width.

Source: Schmid et al., "Efficient Large-Scale Audio Tagging via Transformer-to-CNN Knowledge Distillation"
(arXiv 2211.04772), fschmid56/EfficientAT ``models/mn``. Parameter names and shapes are the published ones, so that
published files load strictly. Differences: axes are averaged instead of squeezed away, so ranks never depend on the
batch or the class count and any length exports; squeeze-excitation over frequency works (the published code fails).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from models_zoo.errors import CardError, ClipLengthError
from models_zoo.schema import Declaration
from train_torch.models.mobilenet import (
    InvertedResidual,
    Strides,
    blocks,
    check_features,
    conv_norm,
    initialise,
    interface,
    make_divisible,
    mlp_head,
)

__all__ = ["MN", "MNOptions"]


class MNOptions(Declaration):
    """What can be chosen about an MN network.

    Attributes:
        num_classes: scores per clip; 0 builds no head and returns the embedding alone.
        width: factor on every channel count (0.4 for ``mn04``).
        n_mels: mel bands of the features.
        num_frames: frames of the features; only (and always) for a network whose ``se_dims`` contain ``t``.
        strides: of the four blocks that reduce time and frequency.
        reduced_tail: halve the last stages.
        dilated: dilate the last three blocks, which then keep stride 1.
        head: ``mlp``, ``fully_convolutional`` or ``multihead_attention_pooling``.
        num_heads: attention heads of ``multihead_attention_pooling``.
        se_dims: axes with squeeze-excitation, any of ``c`` (channels), ``f`` (frequency), ``t`` (time) once, in the
            order of the parameters; or ``none``.
        se_agg: how several squeeze-excitation branches become one.
        se_ratio: an excited axis is squeezed by this factor.
        dropout: probability before the last layer of the ``mlp`` head.
    """

    error: ClassVar[type[CardError]] = CardError

    num_classes: int = Field(default=527, ge=0)
    width: float = Field(default=1.0, gt=0)
    n_mels: int = Field(default=128, ge=1)
    num_frames: int | None = Field(default=None, ge=1)
    strides: Strides = (2, 2, 2, 2)
    reduced_tail: bool = False
    dilated: bool = False
    head: Literal["mlp", "fully_convolutional", "multihead_attention_pooling"] = "mlp"
    num_heads: int = Field(default=4, ge=1)
    se_dims: str = "c"
    se_agg: Literal["max", "avg", "add", "min"] = "max"
    se_ratio: int = Field(default=4, ge=1)
    dropout: float = Field(default=0.2, ge=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.se_dims != "none" and (
            not self.se_dims or set(self.se_dims) - set("cft") or len(set(self.se_dims)) != len(self.se_dims)
        ):
            raise CardError(
                f"se_dims: got {self.se_dims!r}; expected 'none', or each of c, f, t at most once, e.g. 'cf'",
                field="se_dims",
            )
        if self.excites_time != (self.num_frames is not None):
            raise CardError(
                f"num_frames: got {self.num_frames} with se_dims {self.se_dims!r}; squeeze-excitation over time ('t') "
                "needs the number of frames, and ties the network to it; without 't' leave num_frames out",
                field="num_frames",
            )
        return self

    @property
    def excites_time(self) -> bool:
        """Whether squeeze-excitation over time ties the network to one clip length."""
        return self.se_dims != "none" and "t" in self.se_dims


class _SqueezeExcitation(nn.Module):
    """Scales one axis of ``(batch, channels, mel, time)`` by a gate computed from its means."""

    def __init__(self, axis: int, size: int, ratio: int) -> None:
        super().__init__()
        squeezed = make_divisible(size // ratio)
        self.others = [other for other in (1, 2, 3) if other != axis]
        self.fc1 = nn.Linear(size, squeezed)
        self.fc2 = nn.Linear(squeezed, size)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.fc2(torch.relu(self.fc1(x.mean(self.others)))))
        for axis in self.others:
            gate = gate.unsqueeze(axis)
        return x * gate


_MERGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "max": torch.maximum,
    "min": torch.minimum,
    "add": torch.add,
    "avg": torch.add,
}


class _ConcurrentExcitation(nn.Module):
    """Squeeze-excitation over several axes at once, merged elementwise; a single branch is returned as it is."""

    def __init__(self, sizes: dict[str, int], options: MNOptions) -> None:
        super().__init__()
        self.conc_se_layers = nn.ModuleList(
            _SqueezeExcitation("cft".index(axis) + 1, sizes[axis], options.se_ratio) for axis in options.se_dims
        )
        self.merge = _MERGES[options.se_agg]
        self.divisor = len(self.conc_se_layers) if options.se_agg == "avg" else 1

    def forward(self, x: Tensor) -> Tensor:
        merged = reduce(self.merge, [branch(x) for branch in self.conc_se_layers])
        return merged if self.divisor == 1 else merged / self.divisor


class _AttentionPooling(nn.Module):
    """Scores per frame, averaged over time with learned sigmoid attention, several heads.

    Source: Gong et al., "PSLA" (arXiv 2102.01243), as in the published ``attention_pooling.py``: sigmoid, clamped to
    [1e-7, 1 - 1e-7], over its sum. Computed here as a softmax of logarithms: onnxruntime's sigmoid is off by up to
    1e-7, which is nothing to a gate and everything to small weights that are divided by their sum.
    """

    def __init__(self, inputs: int, num_classes: int, num_heads: int) -> None:
        super().__init__()
        self.shape = (-1, num_heads, num_classes)
        self.head_weight = nn.Parameter(torch.full((1, num_heads, 1), 1 / num_heads))
        self.subspace_proj = nn.Linear(inputs, 2 * num_heads * num_classes)

    def forward(self, x: Tensor) -> Tensor:
        sequence = x.mean(2).transpose(1, 2)  # (batch, time, channels)
        attention, values = self.subspace_proj(sequence).chunk(2, -1)  # each (batch, time, heads * classes)
        log_sigmoid = -functional.softplus(-attention)
        attention = log_sigmoid.clamp(math.log(1e-7), math.log1p(-1e-7)).softmax(1)
        pooled = (attention * values).sum(1).reshape(self.shape)
        return (pooled * self.head_weight).sum(1)


class MN(nn.Module):
    """MobileNetV3-Large for log-mel features.

    Attributes:
        inputs: ``features`` ``(batch, n_mels, time)`` float32, the front end's layout ``b m t``.
        outputs: ``logits`` ``(batch, num_classes)`` (absent with 0 classes) and ``embedding`` ``(batch, channels)``,
            the mean of the last feature map.
        options: JSON-ready dict that rebuilds the network through ``create_model``.
        class_keys: state_dict entries that belong to one class count, i.e. that fine-tuning to others replaces.
    """

    system: ClassVar[str] = "efficientat"
    layout: ClassVar[str] = "b m t"
    head_prefix: ClassVar[str] = "classifier."
    exporter: ClassVar[Literal["torchscript", "dynamo"]] = "torchscript"
    exporter_reason: ClassVar[str] = (
        "mn10 exports in 1.3 s (dynamo: 25 s); both graphs run within 3 % of each other in onnxruntime"
    )

    def __init__(self, options: MNOptions) -> None:
        super().__init__()
        self.declared = options
        self.options = options.to_dict()

        rows = blocks(options.width, options.strides, reduced_tail=options.reduced_tail, dilated=options.dilated)
        sizes = {"f": -(-options.n_mels // 2), "t": -(-(options.num_frames or 1) // 2)}
        layers: list[nn.Module] = [conv_norm(1, rows[0].inputs, nn.Hardswish, kernel=3, stride=2)]
        for row in rows:
            sizes = {"c": row.expanded, "f": -(-sizes["f"] // row.step), "t": -(-sizes["t"] // row.step)}
            excited = row.excite and options.se_dims != "none"
            layers.append(InvertedResidual(row, _ConcurrentExcitation(sizes, options) if excited else None))
        last = 6 * rows[-1].outputs
        layers.append(conv_norm(rows[-1].outputs, last, nn.Hardswish))
        self.features = nn.Sequential(*layers)
        self._add_head(last)
        initialise(self)
        self.inputs, self.outputs = interface(options.n_mels, options.num_classes, last, num_frames=options.num_frames)

    def _add_head(self, last: int) -> None:
        options = self.declared
        self.classifier: nn.Module | None = None
        self.class_keys: tuple[str, ...] = ()
        if not options.num_classes:
            return
        if options.head == "mlp":
            hidden = make_divisible(1280 // (2 if options.reduced_tail else 1) * options.width)
            self.classifier = mlp_head(last, hidden, options.num_classes, options.dropout)
            belongs = "classifier.5."
        elif options.head == "fully_convolutional":
            conv = nn.Conv2d(last, options.num_classes, 1, bias=False)
            self.classifier = nn.Sequential(conv, nn.BatchNorm2d(options.num_classes))
            belongs = "classifier."
        else:
            self.classifier = _AttentionPooling(last, options.num_classes, options.num_heads)
            belongs = "classifier.subspace_proj."
        self.class_keys = tuple(key for key in self.state_dict() if key.startswith(belongs))

    def _check_frames(self, features: Tensor) -> None:
        options = self.declared
        if options.num_frames is not None and features.shape[2] != options.num_frames:
            raise ClipLengthError(
                f"features: got {features.shape[2]} frames; this model's squeeze-excitation over time takes exactly "
                f"{options.num_frames}; use clips of that length or se_dims without 't'",
                code="too_short" if features.shape[2] < options.num_frames else "too_long",
            )

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Return ``{"logits": (batch, num_classes), "embedding": (batch, channels)}``, float32, logits unbounded.

        Args:
            features: ``(batch, n_mels, time)`` float32, normalised log-mel.

        Raises:
            SpecError: the features have another rank or mel count.
            ClipLengthError: the network is tied to another number of frames.
        """
        check_features(features, self.declared.n_mels)
        if not torch.jit.is_tracing():
            self._check_frames(features)
        feature_map = self.features(features.unsqueeze(1))  # (batch, channels, mel / 32, time / 32)
        embedding = feature_map.mean((2, 3))
        if self.classifier is None:
            return {"embedding": embedding}
        if self.declared.head == "mlp":
            logits = self.classifier(embedding)
        elif self.declared.head == "fully_convolutional":
            logits = self.classifier(feature_map).mean((2, 3))
        else:
            logits = self.classifier(feature_map)
        return {"logits": logits, "embedding": embedding}
