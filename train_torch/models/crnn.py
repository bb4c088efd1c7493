"""CRNN: the sound-event-detection baselines of DCASE task 4, which say what is heard and when.

Source: DCASE-REPO/DESED_task ``desed_task/nnet/CRNN.py`` as of 2024, recipes 2021 to 2024. Parameter names and shapes
are the published ones, so that published files load strictly. Repaired: several heads with attention and masks,
which the published code cannot build, and fusion with one embedding per clip (``global``), which broke in 2024;
``eval()`` returns the network. Added: a padding mask that really removes padded frames; attention over time.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torchaudio.functional import mask_along_axis_iid

from models_zoo.cards import ModelInput, ModelOutput
from models_zoo.errors import CardError, ClipLengthError, SpecError, WaveformError
from models_zoo.schema import Declaration, Sequence
from train_torch.models.crnn_blocks import BidirectionalGRU, ConvolutionalPart, nearest_tokens, pooled_tokens

__all__ = ["CRNN", "CRNNOptions", "Spans"]

_HIDDEN = -1e30
"""Attention logit of what is masked; less than any other, and, unlike minus infinity, no NaN where all are masked."""

_FRAME_ENCODER = 512
"""Hidden size of the recurrent encoder of ``frame`` fusion; fixed in the published code."""


class Spans(Declaration):
    """What is hidden in training: one span of neighbours per clip, of a random width from a random place on.

    Attributes:
        most: of the width; the next whole number below counts.
        share: of the axis that the width never exceeds either; 0 hides nothing.
    """

    error: ClassVar[type[CardError]] = CardError

    most: int = Field(ge=0)
    share: float = Field(ge=0, le=1)

    def hide(self, x: Tensor, axis: int) -> Tensor:
        """Return ``x`` with its spans along ``axis``, 1 or 2 of three, set to 0."""
        most = min(self.most, int(x.shape[axis] * self.share))
        return mask_along_axis_iid(x, most, 0.0, axis) if most else x


class CRNNOptions(Declaration):
    """What can be chosen about a CRNN.

    Attributes:
        num_classes: classes scored, of all heads together.
        heads: class counts of several heads, in order; empty for one head.
        attention: how frames become a clip: weighted by a softmax over the *classes* of each frame (True and
            ``legacy``, which the published code tells apart in name only), or over the frames of each class
            (``time``), or by the plain mean (False). With the published one, some class has to be attended to in
            frames where nothing sounds, and is learned badly in a small model: its clip score is a mean over them.
        n_mels: mel bands of the features.
        filters, kernels, strides, paddings, pools: of the convolutional blocks, pools as (time, mel); one kernel,
            stride or padding stands for all.
        activation: of the blocks; ``glu`` and ``cg`` are gates.
        normalization: of the blocks; ``layer`` is over channels, time and mel together.
        dropout: probability within the blocks, before the recurrent part where it takes embeddings (or steps are
            dropped), and behind it.
        rnn_type: of the recurrent part.
        rnn_size: hidden size per direction.
        rnn_layers: recurrent layers.
        dropout_recurrent: probability between recurrent layers.
        fusion: how embeddings join the convolutional features: ``none``; one per clip, repeated (``global``); tokens
            encoded to one per clip by a GRU (``frame``); the nearest token (``interpolate``) or the mean of the tokens
            (``pool1d``) of each frame.
        embedding_size: numbers in an embedding.
        masks: optional inputs that an exported graph takes; the module itself takes both always.
        padding: what ``pad_mask`` does. ``published``: only the attention is hidden, after which padded frames still
            weigh as much as a class in doubt, and strong scores stay. ``removed``: a clip answers as it would without
            its padded frames, whose strong scores are 0; only for padding at the end.
        mask_time, mask_mel: frames and mel bands of the features that are set to 0 in training (SpecAugment).
        dropstep: the same for frames of the convolutional features and, apart from them, of what joins them.
        freeze_bn: norms keep their statistics, scales and shifts in training.
        train_cnn: the convolutional part learns.
    """

    error: ClassVar[type[CardError]] = CardError

    num_classes: int = Field(default=10, ge=1)
    heads: Sequence[int] = ()
    attention: bool | Literal["legacy", "time"] = True
    n_mels: int = Field(default=128, ge=1)
    filters: Sequence[int] = (16, 32, 64, 128, 128, 128, 128)
    kernels: Sequence[int] = (3,)
    strides: Sequence[int] = (1,)
    paddings: Sequence[int] = (1,)
    pools: Sequence[Sequence[int]] = ((2, 2), (2, 2), (1, 2), (1, 2), (1, 2), (1, 2), (1, 2))
    activation: Literal["glu", "cg", "relu", "leakyrelu"] = "glu"
    normalization: Literal["batch", "layer", "none"] = "batch"
    dropout: float = Field(default=0.5, ge=0, lt=1)
    rnn_type: Literal["BGRU"] = "BGRU"
    rnn_size: int = Field(default=128, ge=1)
    rnn_layers: int = Field(default=2, ge=1)
    dropout_recurrent: float = Field(default=0.0, ge=0, lt=1)
    fusion: Literal["none", "global", "frame", "interpolate", "pool1d"] = "none"
    embedding_size: int = Field(default=768, ge=1)
    masks: Sequence[Literal["classes_mask", "pad_mask"]] = ()
    padding: Literal["published", "removed"] = "published"
    mask_time: Spans = Spans(most=5, share=0.2)
    mask_mel: Spans = Spans(most=10, share=0.2)
    dropstep: Spans = Spans(most=16, share=0.0)
    freeze_bn: bool = False
    train_cnn: bool = True

    @model_validator(mode="after")
    def _check(self) -> Self:
        blocks = len(self.filters)
        for name, least in (
            ("filters", 1),
            ("kernels", 1),
            ("strides", 1),
            ("paddings", 0),
            ("pools", 1),
            ("heads", 1),
        ):
            values: tuple[Any, ...] = getattr(self, name)
            flat = [number for value in values for number in (value if isinstance(value, tuple) else (value,))]
            if any(number < least for number in flat):
                raise CardError(f"{name}: got {values}; expected numbers of at least {least}", field=name)
            counts = {"filters": {blocks}, "pools": {blocks}, "heads": {len(self.heads)}}.get(name, {1, blocks})
            if len(values) not in counts or not blocks:
                raise CardError(f"{name}: got {len(values)} for {blocks} filters; expected one per block", field=name)
        if any(len(pool) != 2 for pool in self.pools):
            raise CardError(f"pools: got {self.pools}; expected (time, mel) for each block", field="pools")
        if self.heads and sum(self.heads) != self.num_classes:
            raise CardError(
                f"heads: got {self.heads}, {sum(self.heads)} classes together; expected num_classes, "
                f"{self.num_classes}; give both",
                field="heads",
            )
        bands = self.reduced(self.n_mels, axis=1)
        if bands != 1:
            raise CardError(
                f"pools: {self.n_mels} mel bands end as {bands}; the recurrent part takes 1; choose pools along mel "
                "that leave it",
                field="pools",
            )
        if "pad_mask" in self.masks and not self.attention and self.padding == "published":
            raise CardError(
                "masks: 'pad_mask' changes nothing here: as published it hides attention, and this has none; choose "
                "padding 'removed'",
                field="masks",
            )
        shifted = any(stride != 1 or 2 * pad != kernel - 1 for kernel, stride, pad in self.convolutions)
        if self.padding == "removed" and shifted:
            raise CardError(
                "padding: 'removed' needs convolutions that keep every position (stride 1, padding half the kernel)",
                field="padding",
            )
        return self

    @property
    def convolutions(self) -> tuple[tuple[int, int, int], ...]:
        """Kernel, stride and padding of each block."""
        blocks = len(self.filters)
        lists = (
            values * blocks if len(values) == 1 else values for values in (self.kernels, self.strides, self.paddings)
        )
        return tuple(zip(*lists, strict=True))

    def reduced(self, size: int, *, axis: Literal[0, 1]) -> int:
        """Return how many frames (axis 0) or mel bands (axis 1) the blocks leave of ``size``; 0 for none."""
        for (kernel, stride, pad), pool in zip(self.convolutions, self.pools, strict=True):
            size = max(0, (size + 2 * pad - kernel) // stride + 1) // pool[axis]
        return size

    @property
    def hop(self) -> int:
        """Frames of features from one frame of scores to the next."""
        return math.prod(stride for _, stride, _ in self.convolutions) * math.prod(pool[0] for pool in self.pools)


class CRNN(nn.Module):
    """Convolutional recurrent network for sound event detection.

    Attributes:
        inputs: ``features`` ``(batch, n_mels, time)`` float32, the front end's layout ``b m t``; with a fusion
            ``embeddings`` ``(batch, embedding_size, tokens)`` float32, or ``(batch, embedding_size)`` (``global``); and
            the masks of the option ``masks``: ``classes_mask`` ``(batch, num_classes)`` and ``pad_mask``
            ``(batch, 1, frames)``, both bool.
        outputs: ``strong`` ``(batch, num_classes, frames)`` and ``weak`` ``(batch, num_classes)``, probabilities.
        class_keys: state_dict entries that belong to one class count, i.e. that fine-tuning to others replaces.
        min_frames: fewest frames of features; below, a pool has nothing left to pool.
        published_frontend: published files hold the window and mel matrix of their front end.
    """

    system: ClassVar[str] = "dcase_crnn"
    layout: ClassVar[str] = "b m t"
    head_prefix: ClassVar[str] = "dense"
    published_frontend: ClassVar[bool] = True
    exporter: ClassVar[Literal["torchscript", "dynamo"]] = "torchscript"
    exporter_reason: ClassVar[str] = (
        "dynamo cannot capture a GRU behind a pool over a time axis of any length (torch 2.11); torchscript writes "
        "ONNX's own GRU"
    )

    def __init__(self, options: CRNNOptions) -> None:
        super().__init__()
        self.declared = options
        self.min_frames = next(frames for frames in range(1, 1 << 20) if options.reduced(frames, axis=0))
        width, states = options.filters[-1], 2 * options.rnn_size
        kernels, strides, paddings = zip(*options.convolutions, strict=True)
        self.cnn = ConvolutionalPart(
            options.filters,
            kernels,
            strides,
            paddings,
            options.pools,
            activation=options.activation,
            normalization=options.normalization,
            dropout=options.dropout,
        )
        self.rnn = BidirectionalGRU(width, options.rnn_size, options.rnn_layers, options.dropout_recurrent)
        self.dropout = nn.Dropout(options.dropout)
        self.dense = self._head(states)
        self.dense_softmax = self._head(states) if options.attention else None
        if options.fusion == "frame":
            self.frame_embs_encoder = nn.GRU(
                options.embedding_size, _FRAME_ENCODER, batch_first=True, bidirectional=True
            )
        if options.fusion in ("global", "frame"):
            size = options.embedding_size if options.fusion == "global" else 2 * _FRAME_ENCODER
            self.shrink_emb = nn.Sequential(nn.Linear(size, width), nn.LayerNorm(width))
        if options.fusion != "none":
            joined = width if options.fusion in ("global", "frame") else options.embedding_size
            self.cat_tf = nn.Linear(width + joined, width)
        if not options.train_cnn:
            self.cnn.requires_grad_(False)
        self.class_keys = tuple(key for key in self.state_dict() if key.startswith(self.head_prefix))
        self.inputs = _inputs(options)
        classes = str(options.num_classes)
        self.outputs = (
            ModelOutput(
                name="strong", role="frame", kind="probability", axes=("batch", classes, "frames"), hop=options.hop
            ),
            ModelOutput(name="weak", role="clip", kind="probability", axes=("batch", classes)),
        )
        self.train()

    def _head(self, states: int) -> nn.Module:
        counts = self.declared.heads
        if len(counts) > 1:
            return nn.ModuleList(nn.Linear(states, count) for count in counts)
        return nn.Linear(states, self.declared.num_classes)

    @property
    def options(self) -> dict[str, Any]:
        """JSON-ready dict that rebuilds the network through ``create_model``."""
        return self.declared.to_dict()

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; frozen norms stay in evaluation mode. Returns the network."""
        super().train(mode)
        if self.declared.freeze_bn:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval().requires_grad_(False)
        return self

    def forward(
        self,
        features: Tensor,
        embeddings: Tensor | None = None,
        classes_mask: Tensor | None = None,
        pad_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return ``{"strong": (batch, num_classes, frames), "weak": (batch, num_classes)}``, float32 in [0, 1].

        Args:
            features: ``(batch, n_mels, time)`` float32, log-mel in [0, 1] or [-1, 1] as the weights were trained.
            embeddings: ``(batch, embedding_size, tokens)`` float32, or ``(batch, embedding_size)`` where they are
                fused as ``global``; their tokens cover the clip, padding included. None without a fusion.
            classes_mask: ``(batch, num_classes)`` bool, True where a class is valid; others do not share in the
                attention and score 0. None for all.
            pad_mask: ``(batch, 1, frames)`` bool, True where a frame of scores is padding; see the option
                ``padding``. None for none.

        Raises:
            SpecError: the features have another rank or other mel bands.
            ClipLengthError: fewer frames than ``min_frames``.
            WaveformError: embeddings or masks that are missing, not wanted, or of another size or type.
        """
        if not torch.jit.is_tracing():
            self._check(features, embeddings, classes_mask, pad_mask)
        kept = None
        if pad_mask is not None and self.declared.padding == "removed":
            kept = (~pad_mask[:, 0]).sum(1)
        if self.training:
            features = self.declared.mask_mel.hide(self.declared.mask_time.hide(features, 2), 1)
        x = self.cnn(features.transpose(1, 2).unsqueeze(1), kept)  # (batch, channels, frames, 1)
        x = x.squeeze(3).transpose(1, 2)
        x = self.dropout(self.rnn(self._joined(x, embeddings), kept))  # (batch, frames, 2 * rnn_size)
        return self._scores(x, classes_mask, pad_mask)

    def _joined(self, x: Tensor, embeddings: Tensor | None) -> Tensor:
        """Return ``(batch, frames, channels)`` with the embeddings, if any, joined to it."""
        drops = self.training and self.declared.dropstep.share > 0
        if drops:
            x = self.declared.dropstep.hide(x, 1)
        if embeddings is None:
            # As published: without embeddings there is no dropout here, unless steps are dropped.
            return self.dropout(x) if drops else x
        fusion = self.declared.fusion
        if fusion == "interpolate":
            joined = nearest_tokens(embeddings, x)
        elif fusion == "pool1d":
            joined = pooled_tokens(embeddings, x)
        else:
            if fusion == "frame":
                # The last step: the forward direction has heard all tokens, the backward one only the last.
                embeddings = self.frame_embs_encoder(embeddings.transpose(1, 2))[0][:, -1]
            joined = self.shrink_emb(embeddings)[:, None].expand(-1, x.shape[1], -1)
        if drops:
            joined = self.declared.dropstep.hide(joined, 1)
        return self.cat_tf(self.dropout(torch.cat((x, joined), 2)))

    def _scores(self, x: Tensor, classes_mask: Tensor | None, pad_mask: Tensor | None) -> dict[str, Tensor]:
        """Return the outputs for recurrent states ``(batch, frames, 2 * rnn_size)``."""
        removed = None if pad_mask is None or self.declared.padding == "published" else pad_mask.transpose(1, 2)
        strong = torch.cat([torch.sigmoid(head(x)) for head in _heads(self.dense)], 2)  # (batch, frames, classes)
        if self.dense_softmax is not None:
            weights = self._attention(x, classes_mask, pad_mask)
        else:
            weights = torch.ones_like(strong)
        if removed is not None:
            weights, strong = weights.masked_fill(removed, 0.0), strong.masked_fill(removed, 0.0)
        weak = (strong * weights).sum(1) / weights.sum(1)
        strong = strong.transpose(1, 2)
        if classes_mask is not None:
            weak = weak.masked_fill(~classes_mask, 0.0)
            strong = strong.masked_fill(~classes_mask[:, :, None], 0.0)
        return {"strong": strong, "weak": weak}

    def _attention(self, x: Tensor, classes_mask: Tensor | None, pad_mask: Tensor | None) -> Tensor:
        """Return what each frame weighs for each class, ``(batch, frames, classes)``.

        As published, a softmax over the classes of each head, not over time: a frame weighs as much for a class as
        that class stands out in it.
        """
        axis = 1 if self.declared.attention == "time" else 2
        parts, first = [], 0
        for head in _heads(self.dense_softmax):
            logits = head(x)
            if classes_mask is not None:
                own = classes_mask[:, first : first + logits.shape[2]]
                logits = logits.masked_fill(~own[:, None], _HIDDEN)
            if pad_mask is not None:
                logits = logits.masked_fill(pad_mask.transpose(1, 2), _HIDDEN)
            parts.append(logits.softmax(axis).clamp(1e-7, 1.0))
            first += logits.shape[2]
        return torch.cat(parts, 2)

    def _check(
        self, features: Tensor, embeddings: Tensor | None, classes_mask: Tensor | None, pad_mask: Tensor | None
    ) -> None:
        options = self.declared
        if features.ndim != 3:
            raise SpecError(
                f"features: got shape {tuple(features.shape)}; expected (batch, {options.n_mels}, time) as the front "
                "end returns them",
                field="layout",
            )
        batch, mels, time = features.shape
        if mels != options.n_mels:
            raise SpecError(
                f"features: got {mels} mel bands; this model was built for {options.n_mels}; use the front end it was "
                "trained with, or build it with that n_mels",
                field="mel.n_mels",
            )
        if time < self.min_frames:
            raise ClipLengthError(
                f"features: got {time} frames; this model needs at least {self.min_frames}, as its pools shorten them; "
                "use a longer clip",
                code="too_short",
            )
        self._check_embeddings(batch, embeddings)
        frames = options.reduced(time, axis=0)
        for name, mask, shape in (
            ("classes_mask", classes_mask, (batch, options.num_classes)),
            ("pad_mask", pad_mask, (batch, 1, frames)),
        ):
            if mask is not None and mask.dtype != torch.bool:
                raise WaveformError(f"{name}: got {mask.dtype}; expected bool", code="dtype")
            if mask is not None and tuple(mask.shape) != shape:
                raise WaveformError(
                    f"{name}: got shape {tuple(mask.shape)}; expected {shape}, for {options.num_classes} classes and "
                    f"{frames} frames of scores",
                    code="rank",
                )
        if pad_mask is not None and options.padding == "removed":
            ends = pad_mask[:, 0].int()
            if bool(ends[:, 0].any()) or bool((ends.diff(dim=1) < 0).any()):
                raise WaveformError(
                    "pad_mask: padded frames before others; padding is removed at the end of a clip only, and a clip "
                    "has one frame at least",
                    code="range",
                )

    def _check_embeddings(self, batch: int, embeddings: Tensor | None) -> None:
        options = self.declared
        if options.fusion == "none":
            if embeddings is not None:
                raise WaveformError(
                    "embeddings: given to a model without a fusion; build it with fusion='pool1d' or another",
                    code="type",
                )
            return
        if embeddings is None:
            raise WaveformError(
                f"embeddings: missing; this model joins them to its features ({options.fusion}): compute them with the "
                "encoder it was trained with",
                code="type",
            )
        expected = f"({batch}, {options.embedding_size}{'' if options.fusion == 'global' else ', tokens'})"
        rank = 2 if options.fusion == "global" else 3
        if embeddings.ndim != rank or tuple(embeddings.shape[:2]) != (batch, options.embedding_size):
            raise WaveformError(
                f"embeddings: got shape {tuple(embeddings.shape)}; expected {expected}, float32", code="rank"
            )
        if embeddings.numel() == 0:
            raise WaveformError("embeddings: no tokens; expected at least one per clip", code="empty")


def _heads(part: nn.Module | None) -> list[nn.Module]:
    """Return the linear layers of a head, of which there may be several."""
    return list(part) if isinstance(part, nn.ModuleList) else [part] if part is not None else []


def _inputs(options: CRNNOptions) -> tuple[ModelInput, ...]:
    inputs = [ModelInput(name="features", axes=("batch", str(options.n_mels), "time"), source="frontend")]
    if options.fusion != "none":
        axes = ("batch", str(options.embedding_size), *(() if options.fusion == "global" else ("tokens",)))
        inputs.append(ModelInput(name="embeddings", axes=axes, source="encoder"))
    shapes = {"classes_mask": ("batch", str(options.num_classes)), "pad_mask": ("batch", "1", "frames")}
    inputs += [ModelInput(name=name, dtype="bool", axes=shapes[name], source="caller") for name in options.masks]
    return tuple(inputs)
