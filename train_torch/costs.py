"""What a network costs: its parameters, and its multiply-accumulates for a clip of ten seconds.

Counted, not copied: the network is run on torch's meta device, which computes shapes and no numbers, under
``torch.utils.flop_counter``. What counts is the network on features, batch 1, in evaluation mode: one
multiply-accumulate for every product inside a convolution or a matrix product. The front end, norms, activations, gates
and means are left out, as the published figures leave them out.

A dynamic convolution (DyMN) counts as what a batch of one needs: the weighted sum of its K stored kernels (K
multiply-accumulates per kernel entry) and one convolution with that kernel. An export may spend more on it, e.g. K
convolutions where ONNX cannot express one; that is a matter of the graph, not of the network.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from models_zoo.cards import LengthPolicy, ModelInput
from models_zoo.specs import FrontendSpec

__all__ = ["CLIP_SECONDS", "ENCODER_TOKENS", "Costs", "count_costs"]

CLIP_SECONDS = 10
"""Length of the clip whose multiply-accumulates are counted; the nearest legal one where a model takes no such clip."""

ENCODER_TOKENS = 496
"""Tokens of an encoder for that clip: those of BEATs. The encoder itself is not counted."""


class Costs(NamedTuple):
    """Costs of a network.

    Attributes:
        parameters: trainable numbers; the statistics of norms and other buffers are not among them.
        macs: multiply-accumulates for one clip, or None where an input comes from neither front end, waveform nor
            encoder.
    """

    parameters: int
    macs: int | None


def count_costs(
    model: nn.Module,
    inputs: tuple[ModelInput, ...],
    frontend: FrontendSpec | None,
    length_policy: LengthPolicy | None = None,
) -> Costs:
    """Return what ``model`` costs; nothing is computed with its weights, and the model stays as it is.

    Args:
        model: the network; takes ``inputs`` by name.
        inputs: of its card.
        frontend: of its card.
        length_policy: of its card; None for any length.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    shapes = _input_shapes(inputs, frontend, length_policy or LengthPolicy())
    if shapes is None:
        return Costs(parameters, None)
    network = _without_weights(model)
    for module in network.modules():
        if isinstance(module, nn.GRU):
            module.forward = partial(_products_of, module)  # type: ignore[method-assign]
    fed = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(**fed)
    return Costs(parameters, counter.get_total_flops() // 2)


def _input_shapes(
    inputs: tuple[ModelInput, ...], frontend: FrontendSpec | None, policy: LengthPolicy
) -> dict[str, tuple[int, ...]] | None:
    sources = {part.source for part in inputs}
    if "caller" in sources or (frontend is None and sources != {"image"}):
        return None
    shapes: dict[str, tuple[int, ...]] = {
        part.name: (1, *(int(axis) if axis.isdecimal() else ENCODER_TOKENS for axis in part.axes[1:]))
        for part in inputs
        if part.source in ("encoder", "image")
    }
    if frontend is None:
        return shapes
    num_samples = max(CLIP_SECONDS * frontend.sample_rate, policy.min or 1, frontend.min_samples)
    num_samples = min(num_samples, policy.max or num_samples)
    num_samples -= num_samples % policy.multiple_of
    audio = {"frontend": frontend.output_shape(num_samples), "waveform": (1, num_samples)}
    return shapes | {part.name: audio[part.source] for part in inputs if part.source in audio}


def _products_of(gru: nn.GRU, x: Tensor) -> tuple[Tensor, None]:
    """Return states of the right shape for ``(batch, steps, inputs)``, with the products of all steps in one.

    torch computes step after step, which on the meta device takes seconds for what one product tells.
    """
    directions = ["", "_reverse"] if gru.bidirectional else [""]
    for layer in range(gru.num_layers):
        states = x.new_empty((*x.shape[:2], gru.hidden_size))
        for direction in directions:
            functional.linear(x, getattr(gru, f"weight_ih_l{layer}{direction}"))
            functional.linear(states, getattr(gru, f"weight_hh_l{layer}{direction}"))
        x = torch.cat([states] * len(directions), 2)
    return x, None


def _without_weights(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` on the meta device, in evaluation mode, without copying what it holds."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo).eval()
