"""The MN family of EfficientAT: MobileNetV3-Large read as a spectrogram network, at any width.

Source: Schmid et al., "Efficient Large-Scale Audio Tagging via Transformer-to-CNN Knowledge Distillation"
(arXiv 2211.04772), fschmid56/EfficientAT ``models/mn``. Parameter names and shapes are the published ones, so that
published files load strictly. Differences: axes are averaged instead of squeezed away, so ranks never depend on the
batch or the class count and any length exports; squeeze-excitation over frequency works (the published code fails).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial, reduce
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field, Strict, model_validator
from torch import Tensor, nn
from torch.nn import functional

from models_zoo.cards import ModelInput, ModelOutput
from models_zoo.errors import CardError, ClipLengthError, SpecError
from models_zoo.schema import Declaration

__all__ = ["MN", "MNOptions"]

Stride = Literal[1, 2]

_BackboneNorm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)
"""BatchNorm of the backbone; the fully convolutional head keeps torch's own 1e-5 and 0.1."""


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
    strides: Annotated[tuple[Stride, Stride, Stride, Stride], Strict(False)] = (2, 2, 2, 2)
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


class _Block(NamedTuple):
    """One row of the published table, before scaling; ``excite``: squeeze-excitation, ``hard``: hardswish not ReLU."""

    kernel: int
    expanded: int
    out: int
    excite: bool
    hard: bool
    stride: int
    dilation: int


def _blocks(options: MNOptions) -> list[_Block]:
    """Return the fifteen rows (arXiv 1905.02244, table 1, with the strides and the tail made options)."""
    s0, s1, s2, s3 = options.strides
    tail = 2 if options.reduced_tail else 1
    dilation = 2 if options.dilated else 1
    return [
        _Block(3, 16, 16, False, False, 1, 1),
        _Block(3, 64, 24, False, False, s0, 1),
        _Block(3, 72, 24, False, False, 1, 1),
        _Block(5, 72, 40, True, False, s1, 1),
        _Block(5, 120, 40, True, False, 1, 1),
        _Block(5, 120, 40, True, False, 1, 1),
        _Block(3, 240, 80, False, True, s2, 1),
        _Block(3, 200, 80, False, True, 1, 1),
        _Block(3, 184, 80, False, True, 1, 1),
        _Block(3, 184, 80, False, True, 1, 1),
        _Block(3, 480, 112, True, True, 1, 1),
        _Block(3, 672, 112, True, True, 1, 1),
        _Block(5, 672, 160 // tail, True, True, s3, dilation),
        _Block(5, 960 // tail, 160 // tail, True, True, 1, dilation),
        _Block(5, 960 // tail, 160 // tail, True, True, 1, dilation),
    ]


def _make_divisible(value: float, divisor: int = 8) -> int:
    """Return ``value`` rounded to a multiple of ``divisor``, at least one, never below 0.9 of it."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def _conv_norm(
    inputs: int,
    outputs: int,
    activation: Callable[[], nn.Module] | None,
    *,
    kernel: int = 1,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
) -> nn.Sequential:
    """Return convolution, norm and activation; ``ceil(n / stride)`` positions come out of n."""
    padding = (kernel - 1) // 2 * dilation
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False)
    return nn.Sequential(conv, _BackboneNorm(outputs), *([] if activation is None else [activation()]))


class _SqueezeExcitation(nn.Module):
    """Scales one axis of ``(batch, channels, mel, time)`` by a gate computed from its means."""

    def __init__(self, axis: int, size: int, ratio: int) -> None:
        super().__init__()
        squeezed = _make_divisible(size // ratio)
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


class _InvertedResidual(nn.Module):
    """Expand, depthwise convolution, squeeze-excitation, project; with a bypass where shapes allow."""

    def __init__(
        self, inputs: int, row: _Block, expanded: int, outputs: int, sizes: dict[str, int], options: MNOptions
    ):
        super().__init__()
        activation = nn.Hardswish if row.hard else nn.ReLU
        # A dilated block keeps its resolution, yet the published rule for the bypass looks at the undilated stride.
        self.bypass = row.stride == 1 and inputs == outputs
        layers: list[nn.Module] = []
        if expanded != inputs:
            layers.append(_conv_norm(inputs, expanded, activation))
        layers.append(
            _conv_norm(
                expanded,
                expanded,
                activation,
                kernel=row.kernel,
                stride=1 if row.dilation > 1 else row.stride,
                dilation=row.dilation,
                groups=expanded,
            )
        )
        if row.excite and options.se_dims != "none":
            layers.append(_ConcurrentExcitation(sizes, options))
        layers.append(_conv_norm(expanded, outputs, None))
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.bypass else self.block(x)


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

        channels = _make_divisible(16 * options.width)
        stem = _conv_norm(1, channels, nn.Hardswish, kernel=3, stride=2)
        sizes = {"f": -(-options.n_mels // 2), "t": -(-(options.num_frames or 1) // 2)}
        layers: list[nn.Module] = [stem]
        for row in _blocks(options):
            stride = 1 if row.dilation > 1 else row.stride
            expanded, outputs = _make_divisible(row.expanded * options.width), _make_divisible(row.out * options.width)
            sizes = {"c": expanded, "f": -(-sizes["f"] // stride), "t": -(-sizes["t"] // stride)}
            layers.append(_InvertedResidual(channels, row, expanded, outputs, sizes, options))
            channels = outputs
        last = 6 * channels
        layers.append(_conv_norm(channels, last, nn.Hardswish))
        self.features = nn.Sequential(*layers)
        self._add_head(last)
        self._initialise()

        time = "time" if options.num_frames is None else str(options.num_frames)
        embedding = ModelOutput(name="embedding", role="embedding", axes=("batch", str(last)))
        logits = ModelOutput(name="logits", role="clip", kind="logit", axes=("batch", str(options.num_classes)))
        self.inputs = (ModelInput(name="features", axes=("batch", str(options.n_mels), time), source="frontend"),)
        self.outputs = (logits, embedding) if options.num_classes else (embedding,)

    def _add_head(self, last: int) -> None:
        options = self.declared
        self.classifier: nn.Module | None = None
        self.class_keys: tuple[str, ...] = ()
        if not options.num_classes:
            return
        if options.head == "mlp":
            hidden = _make_divisible(1280 // (2 if options.reduced_tail else 1) * options.width)
            self.classifier = nn.Sequential(
                nn.Identity(),  # pools in the published code; here the embedding is that mean
                nn.Identity(),  # flattens in the published code
                nn.Linear(last, hidden),
                nn.Hardswish(),
                nn.Dropout(options.dropout),
                nn.Linear(hidden, options.num_classes),
            )
            belongs = "classifier.5."
        elif options.head == "fully_convolutional":
            conv = nn.Conv2d(last, options.num_classes, 1, bias=False)
            self.classifier = nn.Sequential(conv, nn.BatchNorm2d(options.num_classes))
            belongs = "classifier."
        else:
            self.classifier = _AttentionPooling(last, options.num_classes, options.num_heads)
            belongs = "classifier.subspace_proj."
        self.class_keys = tuple(key for key in self.state_dict() if key.startswith(belongs))

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)

    def _check(self, features: Tensor) -> None:
        options = self.declared
        if features.ndim != 3:
            raise SpecError(
                f"features: got {features.ndim} axes, {tuple(features.shape)}; expected (batch, {options.n_mels}, "
                "time) as the front end returns them; the model adds the channel axis itself",
                field="layout",
            )
        if features.shape[1] != options.n_mels:
            raise SpecError(
                f"features: got {features.shape[1]} mel bands; this model was built for {options.n_mels}; use the "
                "front end it was trained with, or build it with that n_mels",
                field="mel.n_mels",
            )
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
        if not torch.jit.is_tracing():
            self._check(features)
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
