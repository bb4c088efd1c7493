"""DyMN on one clip, as onnxruntime likes it: the same function of the same weights, for export only.

With a batch of one, a clip's mixed kernel is an ordinary convolution weight and its activation's coefficients are
ordinary per-channel numbers. The exported file applies this network to one clip of the batch after the other, so a
clip costs the same in any batch. What else differs from ``efficientat_dymn``, all of it exact up to rounding:

- norms are folded into the stored kernels, which is possible because mixing kernels is linear;
- one linear layer per block computes all that follows from its context, temperature included;
- the gate over mel, being positive, is folded into the coefficients of the dynamic activation, whose affine maps then
  are inference BatchNormalizations: one pass over the map each instead of two;
- 5x5 and strided depthwise convolutions are mixed after convolving with each stored kernel, the others before:
  onnxruntime has fast depthwise convolutions for stored weights only, and with a computed one takes 3.6 ns per output
  at 5x5 and 3 to 9 ns with a stride, but 1.3 ns at 3x3 (all four stored kernels together: 1.6 to 4 ns; one thread).
"""

from __future__ import annotations

import copy
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn import functional

from train_torch.models.efficientat_dymn import DyMN, DynamicBlock, DynamicConv, DynamicReLU

__all__ = ["DyMNClip"]


class _ClipConv(nn.Module):
    """A convolution, 1x1 or depthwise, of stored kernels ``(K, out, in / groups, k, k)``, with its norm folded in."""

    def __init__(self, kernels: Tensor, norm: nn.BatchNorm2d, stride: int = 1) -> None:
        super().__init__()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        kernels = kernels * scale[:, None, None, None]
        self.shape = kernels.shape[1:]
        self.stride = stride
        self.padding = (self.shape[-1] - 1) // 2
        self.groups = self.shape[0] if self.shape[-1] > 1 else 1
        self.mixes_after = len(kernels) > 1 and self.groups > 1 and (self.shape[-1] > 3 or stride > 1)
        if self.mixes_after:
            # Shares sum to one, so the first kernel needs none if the others are stored as differences from it.
            kernels = torch.cat([kernels[:1], kernels[1:] - kernels[:1]])
        self.register_buffer("kernels", kernels if self.mixes_after else kernels.flatten(1))
        self.register_buffer("bias", norm.bias - norm.running_mean * scale)

    def forward(self, x: Tensor, shares: Tensor | None = None) -> Tensor:
        """Return the convolution of ``x`` ``(1, in, mel, time)``, kernels mixed in ``shares`` ``(1, K)``."""
        kernels, bias = self.get_buffer("kernels"), self.get_buffer("bias")
        if shares is None:
            return self._convolve(x, kernels[0].reshape(self.shape), bias)
        if not self.mixes_after:
            return self._convolve(x, (shares @ kernels).reshape(self.shape), bias)
        y = self._convolve(x, kernels[0], bias)
        for which, share in enumerate(shares.split(1, 1)[1:], start=1):
            y = y + self._convolve(x, kernels[which], None) * share
        return y

    def _convolve(self, x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        return functional.conv2d(x, kernel, bias, self.stride, self.padding, 1, self.groups)


class _ClipReLU(nn.Module):
    """A dynamic activation and the gate over mel behind it: the largest of M affine maps, each positive factor in."""

    def __init__(self, activation: DynamicReLU, mels: int) -> None:
        super().__init__()
        self.channels, self.num_pieces = activation.channels, activation.num_pieces
        self.rows = self.channels * mels
        shape = (2 * self.num_pieces, 1, 1, 1)
        self.register_buffer("lambdas", activation.lambdas.reshape(shape))
        self.register_buffer("init_v", activation.init_v.reshape(shape))
        self.register_buffer("zero", torch.zeros(self.rows))
        self.register_buffer("one", torch.ones(self.rows))
        self.register_buffer("open", torch.ones(1, self.channels, mels, 1))

    def forward(self, x: Tensor, scores: Tensor, over_mel: Tensor | None) -> Tensor:
        """Return the activation of ``x`` ``(1, channels, mel, time)`` times ``over_mel``.

        Args:
            x: the map.
            scores: ``(1, 2 * M * channels)``, all slopes of the first piece first, the offsets last, halved.
            over_mel: ``(1, channels, mel, 1)``, positive, or None.
        """
        zero, one = self.get_buffer("zero"), self.get_buffer("one")
        # 2 sigmoid(s) - 1 = tanh(s / 2)
        theta = torch.tanh(scores).reshape(2 * self.num_pieces, self.channels, 1, 1)
        coefficients = theta * self.get_buffer("lambdas") + self.get_buffer("init_v")
        coefficients = coefficients * (self.get_buffer("open") if over_mel is None else over_mel)
        parts = coefficients.reshape(-1).split(self.rows)
        slopes, offsets = parts[: self.num_pieces], parts[self.num_pieces :]
        rows = x.reshape(1, self.rows, -1)
        # torch wants an epsilon above zero; 1 + 1e-30 is 1.
        pieces = [
            functional.batch_norm(rows, zero, one, slope, offset, training=False, eps=1e-30)
            for slope, offset in zip(slopes, offsets, strict=True)
        ]
        return reduce(torch.maximum, pieces).reshape(1, self.channels, self.rows // self.channels, -1)


class _ClipBlock(nn.Module):
    """A dynamic block on one clip."""

    def __init__(self, block: DynamicBlock) -> None:
        super().__init__()
        self.bypass = block.bypass
        self.context = block.context_gen
        self.joint = _ClipConv(self.context.joint_conv.weight[None], self.context.joint_norm)
        self.attends = block.attends
        self.expansion = block.exp_act if block.expands else None
        self.channels = self.context.conv_f.out_channels
        self.mels = -(-self.context.mels // self.context.stride)

        heads: list[tuple[Tensor, Tensor]] = []  # weights and biases of all that is computed from the context
        self.convolutions = nn.ModuleList()
        pairs = [(block.exp_conv, block.exp_norm)] if block.expands else []
        for convolution, norm in [*pairs, (block.depth_conv, block.depth_norm), (block.proj_conv, block.proj_norm)]:
            if isinstance(convolution, DynamicConv):
                scores = convolution.residuals[0]
                heads.append((scores.weight / convolution.temperature, scores.bias / convolution.temperature))
                kernels = convolution.weight[0, 0].reshape(-1, *convolution.shape)
                self.convolutions.append(_ClipConv(kernels, norm, convolution.stride))
            else:
                self.convolutions.append(_ClipConv(convolution.module.weight[None], norm, convolution.module.stride[0]))
        self.mixes = bool(heads)
        self.activation: nn.Module = block.depth_act
        if isinstance(block.depth_act, DynamicReLU):
            scores = block.depth_act.coef_net[0]
            order = torch.arange(len(scores.weight)).reshape(self.channels, -1).T.reshape(-1)
            heads.append((scores.weight[order] / 2, scores.bias[order] / 2))
            self.activation = _ClipReLU(block.depth_act, self.mels)
        self.sizes = [len(bias) for _, bias in heads]
        if heads:
            self.register_buffer("weight", torch.cat([weight for weight, _ in heads]))
            self.register_buffer("bias", torch.cat([bias for _, bias in heads]))

    def forward(self, x: Tensor) -> Tensor:
        sequence = torch.cat([x.mean(3), x.mean(2)], 2).unsqueeze(3)
        sequence = functional.hardswish(self.joint(sequence))
        heads: list[Tensor] = []
        if self.sizes:
            weight, bias = self.get_buffer("weight"), self.get_buffer("bias")
            heads = list(functional.linear(sequence.mean((2, 3)), weight, bias).split(self.sizes, 1))
        y = x
        if self.expansion is not None:
            y = self.expansion(self._convolve(0, y, heads))
        y = self._convolve(-2, y, heads)
        over_mel = over_time = None
        if self.attends:
            over_mel, over_time = self.context.gates(sequence)
        if isinstance(self.activation, _ClipReLU):
            y = self.activation(y, heads[-1], over_mel)
        else:
            y = self.activation(y, x)
            y = y if over_mel is None else y * over_mel
        if over_time is not None:
            y = y * over_time
        y = self._convolve(-1, y, heads)
        return x + y if self.bypass else y

    def _convolve(self, which: int, x: Tensor, heads: list[Tensor]) -> Tensor:
        shares = heads[range(len(self.convolutions))[which]].softmax(1) if self.mixes else None
        return self.convolutions[which](x, shares)


class DyMNClip(nn.Module):
    """``model`` as a function of one clip: ``features`` ``(1, n_mels, time)`` to ``model``'s outputs with a batch of 1.

    Evaluation mode only; the weights are copies.
    """

    def __init__(self, model: DyMN) -> None:
        super().__init__()
        model = copy.deepcopy(model)
        self.in_c, self.out_c, self.classifier = model.in_c, model.out_c, model.classifier
        with torch.no_grad():
            self.layers = nn.ModuleList(
                _ClipBlock(layer) if isinstance(layer, DynamicBlock) else layer for layer in model.layers
            )
        self.eval()

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Return what the model returns."""
        x = self.in_c(features.unsqueeze(1))
        for layer in self.layers:
            x = layer(x)
        embedding = self.out_c(x).mean((2, 3))
        if self.classifier is None:
            return {"embedding": embedding}
        return {"logits": self.classifier(embedding), "embedding": embedding}
