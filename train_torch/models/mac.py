"""MAC: a VGG-like network of pre-activated convolutions for multi-resolution mel spectrograms (MRMS).

Source: a public notebook on the classification of overlapped speech (Dacon, 30 words), which published code and no
weights. Parameter names and shapes are its own, so that a state_dict of it loads strictly. Difference: the global
maximum is written as a maximum over the two axes, which gives the same bits and which both ONNX exporters know.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from models_zoo.cards import ModelInput, ModelOutput
from models_zoo.errors import CardError, ClipLengthError, SpecError
from models_zoo.schema import Declaration

__all__ = ["MAC", "MACOptions"]

_SMALLEST = 32
"""Fewest mel bands and frames: one strided convolution and four pools leave one of 32."""


class MACOptions(Declaration):
    """What can be chosen about a MAC network.

    Attributes:
        num_classes: log-probabilities per clip; 0 builds no head and returns the embedding alone.
        pooling: of the four 2x2 pools and of the last one over everything. Both kinds have the same keys and shapes,
            so no checkpoint tells them apart, and a card must state it.
        n_mels: mel bands of the features.
        num_windows: windows of the front end, the channels of the features.
        width: channels of the first stage; all others are multiples of it.
        dropout: probability within the head.
    """

    error: ClassVar[type[CardError]] = CardError
    card_facts: ClassVar[tuple[str, ...]] = ("pooling",)

    num_classes: int = Field(default=30, ge=0)
    pooling: Literal["avg", "max"] = Field(default="avg", description="'avg' or 'max', as it was trained")
    n_mels: int = Field(default=160, ge=_SMALLEST)
    num_windows: int = Field(default=4, ge=1)
    width: int = Field(default=24, ge=1)
    dropout: float = Field(default=0.25, ge=0, lt=1)


class _Convolution(nn.Module):
    """Norm, activation, convolution, in this order; positions stay."""

    def __init__(self, kernel: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(functional.leaky_relu(self.bn(x), 0.1))


def _stage(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        _Convolution(1, inputs, outputs),
        _Convolution(3, outputs, outputs),
        _Convolution(1, outputs, outputs),
        _Convolution(3, outputs, outputs),
    )


class MAC(nn.Module):
    """Multi-resolution audio classifier.

    Attributes:
        inputs: ``features`` ``(batch, num_windows, n_mels, time)`` float32, the front end's layout ``b c m t``.
        outputs: ``log_probabilities`` ``(batch, num_classes)`` (absent with 0 classes), which sum to one as
            probabilities, and ``embedding`` ``(batch, channels)``, the last feature map pooled.
        options: JSON-ready dict that rebuilds the network through ``create_model``.
        class_keys: state_dict entries that belong to one class count, i.e. that fine-tuning to others replaces.
        min_frames: fewest frames; below, a pool has nothing left to pool.
    """

    system: ClassVar[str] = "mrms_mac"
    layout: ClassVar[str] = "b c m t"
    head_prefix: ClassVar[str] = "dense."
    min_frames: ClassVar[int] = _SMALLEST
    exporter: ClassVar[Literal["torchscript", "dynamo"]] = "torchscript"
    exporter_reason: ClassVar[str] = (
        "exports in 0.3 s (dynamo: 6 s); both graphs stay within 8e-6 of the model and run equally fast in onnxruntime"
    )

    def __init__(self, options: MACOptions) -> None:
        super().__init__()
        self.declared = options
        self.options = options.to_dict()
        first, *widths = (options.width * factor for factor in (2, 1, 2, 4, 6, 8))
        self.initialize = nn.Conv2d(options.num_windows, first, 6, stride=2, padding=2)
        self.lg_0, self.lg_1, self.lg_2, self.lg_3, self.lg_4 = map(_stage, [first, *widths], widths)
        last = 2 * widths[-1]
        self.finalize = nn.Sequential(_Convolution(1, widths[-1], last))
        self.dense: nn.Sequential | None = None
        if options.num_classes:
            self.dense = nn.Sequential(
                nn.Linear(last, widths[-1]),
                nn.Dropout(options.dropout),
                nn.BatchNorm1d(widths[-1]),
                nn.LeakyReLU(0.25),
                nn.Linear(widths[-1], options.num_classes),
            )
        self.class_keys = tuple(key for key in self.state_dict() if key.startswith("dense.4."))
        axes = ("batch", str(options.num_windows), str(options.n_mels), "time")
        self.inputs = (ModelInput(name="features", axes=axes, source="frontend"),)
        scores = ModelOutput(
            name="log_probabilities", role="clip", kind="log_probability", axes=("batch", str(options.num_classes))
        )
        pooled = ModelOutput(name="embedding", role="embedding", axes=("batch", str(last)))
        self.outputs = (scores, pooled) if options.num_classes else (pooled,)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Return ``{"log_probabilities": (batch, num_classes), "embedding": (batch, channels)}``, float32.

        Args:
            features: ``(batch, num_windows, n_mels, time)`` float32, normalised log-mel of each window.

        Raises:
            SpecError: the features have another rank, or other windows or mel bands.
            ClipLengthError: fewer than 32 frames.
        """
        if not torch.jit.is_tracing() and not torch.compiler.is_compiling():
            self._check(features)
        pool = functional.avg_pool2d if self.declared.pooling == "avg" else functional.max_pool2d
        x = self.initialize(features)
        for stage in (self.lg_0, self.lg_1, self.lg_2, self.lg_3):
            x = pool(stage(x), 2)
        x = self.finalize(self.lg_4(x))  # (batch, channels, mel / 32, time / 32)
        embedding = x.mean((2, 3)) if self.declared.pooling == "avg" else x.amax((2, 3))
        if self.dense is None:
            return {"embedding": embedding}
        scores = self.dense(embedding)
        if scores.dtype in (torch.bfloat16, torch.float16):
            scores = scores.float()  # under autocast: probabilities of eight bits miss 1 in sum by several thousandths
        return {"log_probabilities": scores.log_softmax(1), "embedding": embedding}

    def _check(self, features: Tensor) -> None:
        options = self.declared
        expected = f"(batch, {options.num_windows}, {options.n_mels}, time)"
        if features.ndim != 4 or tuple(features.shape[1:3]) != (options.num_windows, options.n_mels):
            field = "layout" if features.ndim != 4 else "mel.n_mels"
            raise SpecError(
                f"features: got shape {tuple(features.shape)}; this model was built for {expected}; use the front end "
                "it was trained with",
                field="windows" if field != "layout" and features.shape[1] != options.num_windows else field,
            )
        if features.shape[3] < self.min_frames:
            raise ClipLengthError(
                f"features: got {features.shape[3]} frames; this model needs at least {self.min_frames}; use longer "
                "clips, or fill them (the card's length_policy)",
                code="too_short",
            )
