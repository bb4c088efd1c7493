"""What a CRNN is made of: convolutions with their gates, the recurrent part, and the joining of embeddings.

Source: DCASE-REPO/DESED_task ``desed_task/nnet/{CNN,RNN,CRNN}.py``; parameter names and shapes are the published ones.
Differences: the gates' linear maps over channels are computed as 1x1 convolutions, which are the same products without
moving axes; embeddings are joined by arithmetic that both eager torch and an exported graph follow at every length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["BidirectionalGRU", "ConvolutionalPart", "nearest_tokens", "pooled_tokens"]


class _Gate(nn.Module):
    """A linear map over channels and a sigmoid; the base of both kinds of gated activations."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, channels)

    def mapped(self, x: Tensor) -> Tensor:
        """Return the linear map of ``(batch, channels, time, mel)``."""
        return functional.conv2d(x, self.linear.weight[:, :, None, None], self.linear.bias)


class _GatedLinearUnit(_Gate):
    """(W x + b) * sigmoid(x), as published: the usual unit halves its width and gates by what it has mapped."""

    def forward(self, x: Tensor) -> Tensor:
        return self.mapped(x) * torch.sigmoid(x)


class _ContextGate(_Gate):
    """x * sigmoid(W x + b)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.mapped(x))


class ConvolutionalPart(nn.Module):
    """Blocks of convolution, norm, activation, dropout and mean over a pool.

    Args:
        filters: channels of each block.
        kernels, strides, paddings: of each block's convolution, both axes alike.
        pools: (time, mel) of each block.
        activation: ``glu``, ``cg``, ``relu`` or ``leakyrelu``.
        normalization: ``batch``, ``layer`` or ``none``.
        dropout: probability after an activation.
    """

    def __init__(
        self,
        filters: Sequence[int],
        kernels: Sequence[int],
        strides: Sequence[int],
        paddings: Sequence[int],
        pools: Sequence[tuple[int, int]],
        *,
        activation: str,
        normalization: str,
        dropout: float,
    ) -> None:
        super().__init__()
        self.cnn = nn.Sequential()
        inputs = 1
        for index, outputs in enumerate(filters):
            self.cnn.add_module(
                f"conv{index}", nn.Conv2d(inputs, outputs, kernels[index], strides[index], paddings[index])
            )
            if normalization == "batch":
                # A momentum of 0.99 in torch's sense: the running statistics are almost those of the last batch.
                self.cnn.add_module(f"batchnorm{index}", nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.99))
            elif normalization == "layer":
                self.cnn.add_module(f"layernorm{index}", nn.GroupNorm(1, outputs))
            if activation == "glu":
                self.cnn.add_module(f"glu{index}", _GatedLinearUnit(outputs))
            elif activation == "cg":
                self.cnn.add_module(f"cg{index}", _ContextGate(outputs))
            else:
                self.cnn.add_module(f"relu{index}", nn.ReLU() if activation == "relu" else nn.LeakyReLU(0.2))
            self.cnn.add_module(f"dropout{index}", nn.Dropout(dropout))
            self.cnn.add_module(f"pooling{index}", nn.AvgPool2d(pools[index]))
            inputs = outputs
        self._pools = tuple(pools)

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """Return ``(batch, channels, frames, mel)`` of ``(batch, 1, time, n_mels)``.

        Args:
            x: features.
            kept: ``(batch,)`` output frames to keep, or None for all. What lies behind them is set to 0 before every
                convolution, which is what a convolution sees behind the end of a clip.
        """
        if kept is None:
            return self.cnn(x)
        remaining = 1
        for pool, _ in self._pools:
            remaining *= pool
        blocks = iter(self._pools)
        for layer in self.cnn:
            if isinstance(layer, nn.Conv2d):
                positions = torch.arange(x.shape[2], device=x.device)
                x = x * (positions < kept[:, None] * remaining)[:, None, :, None]
                remaining //= next(blocks)[0]
            x = layer(x)
        return x


class BidirectionalGRU(nn.Module):
    """A GRU in both directions, ``(batch, frames, inputs)`` to ``(batch, frames, 2 * size)``."""

    def __init__(self, inputs: int, size: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.rnn = nn.GRU(
            inputs,
            size,
            layers,
            batch_first=True,
            dropout=dropout if layers > 1 else 0.0,  # there is nothing between the layers of one
            bidirectional=True,
        )

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """Return the states; with ``kept``, those of a sequence that ends after so many frames, 0 behind it."""
        if kept is None:
            states, _ = self.rnn(x)
            return states
        packed = nn.utils.rnn.pack_padded_sequence(x, kept.cpu(), batch_first=True, enforce_sorted=False)
        states, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=x.shape[1])
        return states


def nearest_tokens(embeddings: Tensor, frames: Tensor) -> Tensor:
    """Return ``(batch, frames, size)``: to each frame the token in whose span its middle lies.

    Token floor((2 i + 1) N / (2 T)) for frame i of T: torch's ``nearest-exact``, in whole numbers.

    Args:
        embeddings: ``(batch, size, tokens)``.
        frames: ``(batch, frames, ...)``, whose second axis is to be matched.
    """
    count, tokens = frames.shape[1], embeddings.shape[2]
    index = ((2 * torch.arange(count, device=embeddings.device) + 1) * tokens) // (2 * count)
    return embeddings.index_select(2, index).transpose(1, 2)


def pooled_tokens(embeddings: Tensor, frames: Tensor) -> Tensor:
    """Return ``(batch, frames, size)``: to each frame the mean of tokens floor(i N / T) to ceil((i + 1) N / T) - 1.

    Adaptive average pooling. No exporter can express it for a length that is not known; a graph multiplies by the
    matrix of the means instead, which differs by rounding.

    Args:
        embeddings: ``(batch, size, tokens)``.
        frames: ``(batch, frames, ...)``, whose second axis is to be matched.
    """
    count, tokens = frames.shape[1], embeddings.shape[2]
    if not torch.jit.is_tracing():
        return functional.adaptive_avg_pool1d(embeddings, count).transpose(1, 2)
    frame = torch.arange(count, device=embeddings.device)[:, None]
    token = torch.arange(tokens, device=embeddings.device)[None, :]
    first, beyond = (frame * tokens) // count, ((frame + 1) * tokens + count - 1) // count
    inside = ((token >= first) & (token < beyond)).to(embeddings.dtype)
    return torch.matmul(inside / (beyond - first), embeddings.transpose(1, 2))
