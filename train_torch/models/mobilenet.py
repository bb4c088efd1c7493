"""What the EfficientAT families share: the MobileNetV3-Large table, its plain blocks, and the head behind them.

Source: Howard et al., "Searching for MobileNetV3" (arXiv 1905.02244), as in fschmid56/EfficientAT.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Strict
from torch import Tensor, nn

from models_zoo.cards import ModelInput, ModelOutput
from models_zoo.errors import SpecError

__all__ = [
    "BackboneNorm",
    "Block",
    "InvertedResidual",
    "Strides",
    "blocks",
    "check_features",
    "conv_norm",
    "initialise",
    "interface",
    "make_divisible",
    "mlp_head",
]

Stride = Literal[1, 2]
Strides = Annotated[tuple[Stride, Stride, Stride, Stride], Strict(False)]
"""Strides of the four blocks that may reduce time and frequency."""

BackboneNorm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)
"""BatchNorm of the backbone; the fully convolutional head of MN keeps torch's own 1e-5 and 0.1."""


class Block(NamedTuple):
    """One row of the published table, scaled; ``excite``: squeeze-excitation, ``hard``: hardswish not ReLU."""

    kernel: int
    inputs: int
    expanded: int
    outputs: int
    excite: bool
    hard: bool
    stride: int
    dilation: int

    @property
    def step(self) -> int:
        """The stride in effect: a dilated block keeps its resolution."""
        return 1 if self.dilation > 1 else self.stride

    @property
    def bypass(self) -> bool:
        """Whether the input is added to the output; the published rule looks at the undilated stride."""
        return self.stride == 1 and self.inputs == self.outputs

    @property
    def activation(self) -> type[nn.Module]:
        """The row's own activation."""
        return nn.Hardswish if self.hard else nn.ReLU


def blocks(width: float, strides: Strides, *, reduced_tail: bool = False, dilated: bool = False) -> list[Block]:
    """Return the fifteen rows (arXiv 1905.02244, table 1, with the strides and the tail made options)."""
    s0, s1, s2, s3 = strides
    tail = 2 if reduced_tail else 1
    dilation = 2 if dilated else 1
    table = [
        (3, 16, 16, False, False, 1, 1),
        (3, 64, 24, False, False, s0, 1),
        (3, 72, 24, False, False, 1, 1),
        (5, 72, 40, True, False, s1, 1),
        (5, 120, 40, True, False, 1, 1),
        (5, 120, 40, True, False, 1, 1),
        (3, 240, 80, False, True, s2, 1),
        (3, 200, 80, False, True, 1, 1),
        (3, 184, 80, False, True, 1, 1),
        (3, 184, 80, False, True, 1, 1),
        (3, 480, 112, True, True, 1, 1),
        (3, 672, 112, True, True, 1, 1),
        (5, 672, 160 // tail, True, True, s3, dilation),
        (5, 960 // tail, 160 // tail, True, True, 1, dilation),
        (5, 960 // tail, 160 // tail, True, True, 1, dilation),
    ]
    rows: list[Block] = []
    inputs = make_divisible(16 * width)
    for kernel, expanded, outputs, excite, hard, stride, dilate in table:
        scaled = make_divisible(expanded * width), make_divisible(outputs * width)
        rows.append(Block(kernel, inputs, *scaled, excite, hard, stride, dilate))
        inputs = rows[-1].outputs
    return rows


def make_divisible(value: float, divisor: int = 8) -> int:
    """Return ``value`` rounded to a multiple of ``divisor``, at least one, never below 0.9 of it."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def conv_norm(
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
    return nn.Sequential(conv, BackboneNorm(outputs), *([] if activation is None else [activation()]))


class InvertedResidual(nn.Module):
    """Expand, depthwise convolution, excitation if given, project; with a bypass where shapes allow."""

    def __init__(self, row: Block, excitation: nn.Module | None = None) -> None:
        super().__init__()
        self.bypass = row.bypass
        layers: list[nn.Module] = []
        if row.expanded != row.inputs:
            layers.append(conv_norm(row.inputs, row.expanded, row.activation))
        layers.append(
            conv_norm(
                row.expanded,
                row.expanded,
                row.activation,
                kernel=row.kernel,
                stride=row.step,
                dilation=row.dilation,
                groups=row.expanded,
            )
        )
        if excitation is not None:
            layers.append(excitation)
        layers.append(conv_norm(row.expanded, row.outputs, None))
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's map ``(batch, out, mel / stride, time / stride)`` of ``(batch, in, mel, time)``."""
        return x + self.block(x) if self.bypass else self.block(x)


def mlp_head(inputs: int, hidden: int, num_classes: int, dropout: float) -> nn.Sequential:
    """Return the ``mlp`` head on the ``(batch, inputs)`` embedding; its last entry belongs to the class count."""
    return nn.Sequential(
        nn.Identity(),  # pools in the published code; here the embedding is that mean
        nn.Identity(),  # flattens in the published code
        nn.Linear(inputs, hidden),
        nn.Hardswish(),
        nn.Dropout(dropout),
        nn.Linear(hidden, num_classes),
    )


def initialise(model: nn.Module) -> None:
    """Initialise convolutions and linear layers as the published code does; norms are torch's own."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
            nn.init.zeros_(module.bias)


def interface(
    n_mels: int, num_classes: int, embedding: int, *, num_frames: int | None = None
) -> tuple[tuple[ModelInput, ...], tuple[ModelOutput, ...]]:
    """Return the inputs and outputs of the graph: features in, logits (unless 0 classes) and embedding out."""
    time = "time" if num_frames is None else str(num_frames)
    features = ModelInput(name="features", axes=("batch", str(n_mels), time), source="frontend")
    mean = ModelOutput(name="embedding", role="embedding", axes=("batch", str(embedding)))
    logits = ModelOutput(name="logits", role="clip", kind="logit", axes=("batch", str(num_classes)))
    return (features,), ((logits, mean) if num_classes else (mean,))


def check_features(features: Tensor, n_mels: int) -> None:
    """Check the axes of a batch of features; not while tracing, whose shapes are symbols.

    Raises:
        SpecError: another rank or mel count.
    """
    if torch.jit.is_tracing():
        return
    if features.ndim != 3:
        raise SpecError(
            f"features: got {features.ndim} axes, {tuple(features.shape)}; expected (batch, {n_mels}, time) as the "
            "front end returns them; the model adds the channel axis itself",
            field="layout",
        )
    if features.shape[1] != n_mels:
        raise SpecError(
            f"features: got {features.shape[1]} mel bands; this model was built for {n_mels}; use the front end it "
            "was trained with, or build it with that n_mels",
            field="mel.n_mels",
        )
