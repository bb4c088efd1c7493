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
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models_zoo.cards import LengthPolicy, ModelInput
from models_zoo.specs import FrontendSpec

__all__ = ["CLIP_SECONDS", "Costs", "count_costs"]

CLIP_SECONDS = 10
"""Length of the clip whose multiply-accumulates are counted; the nearest legal one where a model takes no such clip."""


class Costs(NamedTuple):
    """Costs of a network.

    Attributes:
        parameters: trainable numbers; the statistics of norms and other buffers are not among them.
        macs: multiply-accumulates for one clip, or None where an input comes from neither front end nor waveform.
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
    fed = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(**fed)
    return Costs(parameters, counter.get_total_flops() // 2)


def _input_shapes(
    inputs: tuple[ModelInput, ...], frontend: FrontendSpec | None, policy: LengthPolicy
) -> dict[str, tuple[int, ...]] | None:
    if frontend is None or any(part.source not in ("frontend", "waveform") for part in inputs):
        return None
    num_samples = max(CLIP_SECONDS * frontend.sample_rate, policy.min or 1, frontend.min_samples)
    num_samples = min(num_samples, policy.max or num_samples)
    num_samples -= num_samples % policy.multiple_of
    features = frontend.output_shape(num_samples)
    return {part.name: features if part.source == "frontend" else (1, num_samples) for part in inputs}


def _without_weights(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` on the meta device, in evaluation mode, without copying what it holds."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo).eval()
