"""The DyMN family of EfficientAT: MobileNetV3-Large whose convolutions, activations and gates follow the clip.

Source: Schmid et al., "Dynamic Convolutional Neural Networks as Efficient Pre-trained Audio Models" (arXiv 2310.15648),
fschmid56/EfficientAT ``models/dymn``. Parameter names and shapes are the published ones, so that published files load
strictly. Differences: axes are averaged instead of pooled adaptively and squeezed away, so ranks never depend on the
batch or the class count; dynamic 1x1 convolutions are matrix products; and a graph with free batch and time can be
exported (``efficientat_dymn_clip``), which the published code cannot.
"""

from __future__ import annotations

from functools import reduce
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from models_zoo.errors import CardError
from models_zoo.schema import Declaration
from train_torch.models.mobilenet import (
    BackboneNorm,
    Block,
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

__all__ = ["DyMN", "DyMNOptions", "DynamicBlock", "DynamicConv", "DynamicReLU"]


class DyMNOptions(Declaration):
    """What can be chosen about a DyMN network.

    Attributes:
        num_classes: scores per clip; 0 builds no head and returns the embedding alone.
        width: factor on every channel count (0.4 for ``dymn04``).
        n_mels: mel bands of the features.
        strides: of the four blocks that reduce time and frequency.
        use_dy_blocks: ``all`` blocks are dynamic, or (``replace_se``) those that have squeeze-excitation in MN, and
            the others are plain.
        temperature: divides the scores of the kernels before their softmax; the higher, the more alike the clips'
            kernels. No checkpoint stores it, so a card must: 1 for ``*_as``, 30 (where training starts) for ``*_im``.
        num_kernels: kernels a dynamic convolution mixes (K).
        num_pieces: affine pieces of the dynamic activation (M).
        context_ratio: the context is smaller than the expanded channels by this factor, ...
        min_context: ... at least this (times ``width``), ...
        max_context: ... and at most this (times ``width``).
        dynamic_conv: False replaces dynamic convolutions by plain ones.
        dynamic_relu: False replaces dynamic activations by the row's own, ReLU or hardswish.
        coordinate_attention: False leaves the gates out. Their weights stay, unused, as in the published code.
        dropout: probability before the last layer of the head.
    """

    error: ClassVar[type[CardError]] = CardError
    card_facts: ClassVar[tuple[str, ...]] = ("temperature",)

    num_classes: int = Field(default=527, ge=0)
    width: float = Field(default=1.0, gt=0)
    n_mels: int = Field(default=128, ge=1)
    strides: Strides = (2, 2, 2, 2)
    use_dy_blocks: Literal["all", "replace_se"] = "all"
    temperature: float = Field(default=30.0, gt=0, description="1 for published *_as files, 30 for *_im")
    num_kernels: int = Field(default=4, ge=1)
    num_pieces: int = Field(default=2, ge=1)
    context_ratio: int = Field(default=4, ge=1)
    min_context: int = Field(default=32, ge=1)
    max_context: int = Field(default=128, ge=1)
    dynamic_conv: bool = True
    dynamic_relu: bool = True
    coordinate_attention: bool = True
    dropout: float = Field(default=0.2, ge=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_context < self.min_context:
            raise CardError(
                f"max_context: got {self.max_context}; expected at least min_context, {self.min_context}",
                field="max_context",
            )
        return self

    def context_size(self, expanded: int) -> int:
        """Return the length of the context vector of a block with this many expanded channels."""
        low = make_divisible(self.min_context * self.width)
        high = make_divisible(self.max_context * self.width)
        return min(max(make_divisible(expanded // self.context_ratio), low), high)


class _Wrapped(nn.Module):
    """A plain module in the place of a dynamic one; its parameters lie below ``module`` in published files."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.module(x)


class DynamicConv(nn.Module):
    """Convolution, 1x1 or depthwise, whose kernel is a mixture of K stored ones, in shares computed from the context.

    ``weight`` is ``(1, 1, K, values of one kernel)`` as published; a kernel is ``(out, in / groups, k, k)``.

    In torch, kernels are mixed and then used once: a training step of dymn10 (16 clips of 2 s, forward and backward,
    one CPU thread) takes 0.74 s, against 1.48 s with K depthwise convolutions mixed afterwards, 1.53 s with K pointwise
    ones, 0.83 s with pointwise convolutions as groups instead of matrix products, and 0.92 s in channels_last.
    """

    def __init__(
        self, inputs: int, outputs: int, context: int, options: DyMNOptions, *, kernel: int = 1, stride: int = 1
    ) -> None:
        super().__init__()
        self.temperature = options.temperature
        self.depthwise = kernel > 1
        self.stride = stride
        self.padding = (kernel - 1) // 2
        self.shape = (outputs, 1 if self.depthwise else inputs, kernel, kernel)
        stored = torch.empty(options.num_kernels, *self.shape)
        for one in stored:
            nn.init.kaiming_normal_(one, mode="fan_out")
        self.weight = nn.Parameter(stored.reshape(1, 1, options.num_kernels, -1))
        self.residuals = nn.Sequential(nn.Linear(context, options.num_kernels))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Return the convolution of ``x`` ``(batch, in, mel, time)`` with each clip's own kernel."""
        shares = (self.residuals(context) / self.temperature).softmax(-1)  # (batch, K)
        return self.depthwise_mixed(x, shares) if self.depthwise else self.pointwise(x, shares)

    def pointwise(self, x: Tensor, shares: Tensor) -> Tensor:
        """Return the 1x1 convolution of ``x`` ``(batch, in, mel, time)`` as one matrix product per clip."""
        kernels = (shares @ self.weight[0, 0]).reshape(-1, *self.shape[:2])
        return (kernels @ x.flatten(2)).reshape(-1, self.shape[0], *x.shape[2:])

    def depthwise_mixed(self, x: Tensor, shares: Tensor) -> Tensor:
        """Return the depthwise convolution with mixed kernels, all clips' channels side by side as groups."""
        batch, channels, mels, frames = x.shape
        kernels = (shares @ self.weight[0, 0]).reshape(batch * channels, *self.shape[1:])
        side_by_side = x.reshape(1, batch * channels, mels, frames)
        y = functional.conv2d(side_by_side, kernels, None, self.stride, self.padding, 1, batch * channels)
        return y.reshape(batch, channels, *y.shape[2:])


class DynamicReLU(nn.Module):
    """The largest of M affine maps per channel, with coefficients computed from the context.

    Source: Chen et al., "Dynamic ReLU" (arXiv 2003.10027), variant B.
    """

    def __init__(self, channels: int, context: int, num_pieces: int) -> None:
        super().__init__()
        self.channels = channels
        self.num_pieces = num_pieces
        self.register_buffer("lambdas", torch.tensor([1.0] * num_pieces + [0.5] * num_pieces))
        self.register_buffer("init_v", torch.tensor([1.0] + [0.0] * (2 * num_pieces - 1)))
        self.coef_net = nn.Sequential(nn.Linear(context, 2 * num_pieces * channels))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Return the activation of ``x`` ``(batch, channels, mel, time)``, with each clip's own coefficients."""
        theta = 2 * torch.sigmoid(self.coef_net(context)) - 1
        coefficients = theta.reshape(-1, self.channels, 1, 1, 2 * self.num_pieces) * self.lambdas + self.init_v
        slopes, offsets = coefficients[..., : self.num_pieces], coefficients[..., self.num_pieces :]
        return reduce(torch.maximum, [x * slopes[..., m] + offsets[..., m] for m in range(self.num_pieces)])


class _Context(nn.Module):
    """What a block knows about its input: one vector, and scores over mel and over time."""

    def __init__(self, row: Block, size: int, mels: int) -> None:
        super().__init__()
        self.mels = mels  # fixed, so that slicing at it is no computation in an exported graph
        self.stride = row.step
        self.joint_conv = nn.Conv2d(row.inputs, size, 1, bias=False)
        self.joint_norm = BackboneNorm(size)
        self.conv_f = nn.Conv2d(size, row.expanded, 1)
        self.conv_t = nn.Conv2d(size, row.expanded, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the vector ``(batch, size)``, and its sequence ``(batch, size, mel + time, 1)``."""
        sequence = torch.cat([x.mean(3), x.mean(2)], 2).unsqueeze(3)
        sequence = functional.hardswish(self.joint_norm(self.joint_conv(sequence)))
        return sequence.mean((2, 3)), sequence

    def gates(self, sequence: Tensor) -> tuple[Tensor, Tensor]:
        """Return factors ``(batch, expanded, mel, 1)`` and ``(batch, expanded, 1, time)`` in (0, 1)."""
        over_mel, over_time = sequence[:, :, : self.mels], sequence[:, :, self.mels :]
        if self.stride > 1:
            # Zeros beyond the ends count: the published mean is always over three.
            over_mel, over_time = (
                functional.avg_pool2d(part, (3, 1), (self.stride, 1), (1, 0), count_include_pad=True)
                for part in (over_mel, over_time)
            )
        over_mel, over_time = self.conv_f(over_mel), self.conv_t(over_time)
        return torch.sigmoid(over_mel), torch.sigmoid(over_time).transpose(2, 3)


class DynamicBlock(nn.Module):
    """Expand, depthwise convolution, dynamic activation, coordinate attention, project; with a bypass as in MN."""

    def __init__(self, row: Block, mels: int, options: DyMNOptions) -> None:
        super().__init__()
        self.bypass = row.bypass
        self.attends = options.coordinate_attention
        context = options.context_size(row.expanded)

        def convolution(inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> nn.Module:
            if options.dynamic_conv:
                return DynamicConv(inputs, outputs, context, options, kernel=kernel, stride=stride)
            groups = outputs if kernel > 1 else 1
            return _Wrapped(nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False))

        self.expands = row.expanded != row.inputs
        if self.expands:
            self.exp_conv = convolution(row.inputs, row.expanded)
            self.exp_norm = BackboneNorm(row.expanded)
            self.exp_act = row.activation()
        self.depth_conv = convolution(row.expanded, row.expanded, row.kernel, row.step)
        self.depth_norm = BackboneNorm(row.expanded)
        self.depth_act = (
            DynamicReLU(row.expanded, context, options.num_pieces)
            if options.dynamic_relu
            else _Wrapped(row.activation())
        )
        self.proj_conv = convolution(row.expanded, row.outputs)
        self.proj_norm = BackboneNorm(row.outputs)
        self.context_gen = _Context(row, context, mels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's map ``(batch, out, mel / stride, time / stride)`` of ``(batch, in, mel, time)``."""
        context, sequence = self.context_gen(x)
        y = self.exp_act(self.exp_norm(self.exp_conv(x, context))) if self.expands else x
        y = self.depth_act(self.depth_norm(self.depth_conv(y, context)), context)
        if self.attends:
            over_mel, over_time = self.context_gen.gates(sequence)
            y = y * over_mel * over_time
        y = self.proj_norm(self.proj_conv(y, context))
        return x + y if self.bypass else y


class DyMN(nn.Module):
    """Dynamic MobileNetV3-Large for log-mel features.

    Attributes:
        inputs: ``features`` ``(batch, n_mels, time)`` float32, the front end's layout ``b m t``.
        outputs: ``logits`` ``(batch, num_classes)`` (absent with 0 classes) and ``embedding`` ``(batch, channels)``,
            the mean of the last feature map.
        options: JSON-ready dict that rebuilds the network through ``create_model``; follows the temperature.
        class_keys: state_dict entries that belong to one class count, i.e. that fine-tuning to others replaces.
    """

    system: ClassVar[str] = "efficientat"
    layout: ClassVar[str] = "b m t"
    children_in_order: ClassVar[tuple[str, ...]] = ("in_c", "layers", "out_c", "classifier")
    head_prefix: ClassVar[str] = "classifier."
    exporter: ClassVar[Literal["torchscript", "dynamo"]] = "torchscript"
    exporter_reason: ClassVar[str] = (
        "dymn10 exports in 2.9 s (dynamo: 19 s); both graphs run within 3 % of each other in onnxruntime"
    )

    def __init__(self, options: DyMNOptions) -> None:
        super().__init__()
        self.declared = options
        rows = blocks(options.width, options.strides)
        mels = -(-options.n_mels // 2)
        self.layers = nn.ModuleList()
        for row in rows:
            dynamic = options.use_dy_blocks == "all" or row.excite
            self.layers.append(DynamicBlock(row, mels, options) if dynamic else InvertedResidual(row))
            mels = -(-mels // row.step)
        last = 6 * rows[-1].outputs
        self.in_c = conv_norm(1, rows[0].inputs, nn.Hardswish, kernel=3, stride=2)
        self.out_c = conv_norm(rows[-1].outputs, last, nn.Hardswish)
        self.classifier: nn.Module | None = None
        if options.num_classes:
            hidden = make_divisible(1280 * options.width)
            self.classifier = mlp_head(last, hidden, options.num_classes, options.dropout)
        self.class_keys = tuple(key for key in self.state_dict() if key.startswith("classifier.5."))
        initialise(self)
        self.inputs, self.outputs = interface(options.n_mels, options.num_classes, last)

    @property
    def options(self) -> dict[str, object]:
        """JSON-ready dict that rebuilds the network through ``create_model``."""
        return self.declared.to_dict()

    @property
    def temperature(self) -> float:
        """What divides the scores of the kernels before their softmax."""
        return self.declared.temperature

    def set_temperature(self, temperature: float) -> None:
        """Set the temperature of every dynamic convolution, and of the options that describe the network.

        Raises:
            CardError: not a positive number.
        """
        self.declared = self.declared.replace(temperature=temperature)
        for module in self.modules():
            if isinstance(module, DynamicConv):
                module.temperature = self.declared.temperature

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Return ``{"logits": (batch, num_classes), "embedding": (batch, channels)}``, float32, logits unbounded.

        Args:
            features: ``(batch, n_mels, time)`` float32, normalised log-mel.

        Raises:
            SpecError: the features have another rank or mel count.
        """
        check_features(features, self.declared.n_mels)
        x = self.in_c(features.unsqueeze(1))  # (batch, channels, mel / 2, time / 2)
        for layer in self.layers:
            x = layer(x)
        embedding = self.out_c(x).mean((2, 3))
        if self.classifier is None:
            return {"embedding": embedding}
        return {"logits": self.classifier(embedding), "embedding": embedding}
