"""The DCASE contract: weights anyone can make again, the recorded cases, and what a published file holds."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from train_torch.models import create_model

TINY: dict[str, Any] = {"rnn_size": 16, "filters": [8, 16], "pools": [[2, 8], [2, 16]], "num_classes": 4}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "crnn_2023": ("crnn_2023", {}),
    "crnn_2023_beats_pool1d": ("crnn_2023_beats", {}),
    "crnn_2023_beats_interpolate": ("crnn", {"fusion": "interpolate"}),
    "crnn_2023_beats_frame": ("crnn", {"fusion": "frame"}),
    "crnn_2022_global768": ("crnn", {"fusion": "global"}),
    "crnn_2024": ("crnn_2024", {}),
    "tiny_relu_batch_noattention": ("crnn", {**TINY, "activation": "relu", "attention": False}),
    "tiny_leakyrelu_nonorm": (
        "crnn",
        {**TINY, "activation": "leakyrelu", "normalization": "none", "rnn_layers": 1},
    ),
    "tiny_cg_layernorm": ("crnn", {**TINY, "activation": "cg", "normalization": "layer"}),
    "tiny_glu_k5_stride": (
        "crnn",
        {**TINY, "kernels": [5, 3], "paddings": [2, 1], "pools": [[2, 8], [1, 16]], "attention": "legacy"},
    ),
    "tiny_multihead_noattention": ("crnn", {**TINY, "num_classes": 7, "heads": [4, 3], "attention": False}),
    "tiny_onehead_list": ("crnn", {**TINY, "num_classes": 5, "heads": [5]}),
}
"""Name in the contract -> name and options for ``create_model``."""

_DESED = range(10)
_MAESTRO = (3, 4, 8, *range(10, 27))


@cache
def keys(contracts: Path) -> dict[str, Any]:
    """Return what the contract says about variants, cases and files."""
    return json.loads((contracts / "dcase_crnn" / "keys.json").read_text())


@cache
def _seeded(contracts: Path) -> Any:
    module = importlib.util.spec_from_file_location("seeded_weights", contracts / "seeded_weights.py")
    seeded = importlib.util.module_from_spec(module)
    module.loader.exec_module(seeded)
    return seeded


def published_shapes(contracts: Path, variant: str) -> dict[str, list[int]]:
    """Return the published names and shapes of a variant, in their order."""
    described = keys(contracts)["variants"][variant]["keys"]
    return {key: value["shape"] if isinstance(value, dict) else value for key, value in described.items()}


def contract_state(contracts: Path, variant: str) -> dict[str, Tensor]:
    """Return the weights with which the answers of a variant were recorded."""
    state = _seeded(contracts).seeded_state_dict(published_shapes(contracts, variant))
    return {key: torch.from_numpy(np.asarray(value)) for key, value in state.items()}


def contract_model(contracts: Path, variant: str, **options: Any) -> nn.Module:
    """Return the network with the weights its answers were recorded with, in evaluation mode."""
    name, own = VARIANTS[variant]
    model = create_model(name, **{**own, **options})
    model.load_state_dict(contract_state(contracts, variant), strict=True)
    return model.eval()


def cases(contracts: Path, variant: str | None = None) -> list[dict[str, Any]]:
    """Return the recorded cases, of one variant or all."""
    return [case for case in keys(contracts)["golden_cases"] if variant in (None, case["variant"])]


def features(seed: int, batch: int, frames: int) -> Tensor:
    """Return the contract's features ``(batch, 128, frames)``: coarse and fine noise."""
    generator = np.random.default_rng(seed)
    coarse = generator.standard_normal((batch, 8, frames // 8 + 1)).repeat(16, 1).repeat(8, 2)[:, :, :frames]
    fine = generator.standard_normal((batch, 128, frames))
    return torch.from_numpy((0.5 * coarse + 0.25 * fine).astype(np.float32))


def classes_mask(kind: str, batch: int, num_classes: int) -> Tensor:
    """Return ``(batch, num_classes)`` bool, True where a class is valid, as the contract names masks."""
    mask = torch.zeros(batch, num_classes, dtype=torch.bool)
    for sample in range(batch):
        named = ("desed", "maestro")[sample] if kind == "mixed" else kind
        valid = {"half": range(num_classes // 2), "desed": _DESED, "maestro": _MAESTRO}[named]
        mask[sample, list(valid)] = True
    return mask


def pad_mask(batch: int, frames: int) -> Tensor:
    """Return ``(batch, 1, frames)`` bool, True where the contract pads."""
    mask = torch.zeros(batch, 1, frames, dtype=torch.bool)
    for sample in range(batch):
        mask[sample, :, frames - (sample + 1) * max(1, frames // 5) :] = True
    return mask


def case_inputs(case: Mapping[str, Any], num_classes: int) -> dict[str, Tensor]:
    """Return the inputs of a recorded case by name."""
    batch = case["batch"]
    inputs = {"features": features(case["seed"], batch, case["frames"])}
    if case["embeddings"]:
        drawn = np.random.default_rng(case["embeddings_seed"]).standard_normal(case["embeddings"])
        inputs["embeddings"] = torch.from_numpy(drawn.astype(np.float32))
    if case["classes_mask"]:
        inputs["classes_mask"] = classes_mask(case["classes_mask"], batch, num_classes)
    if case["pad_mask"]:
        inputs["pad_mask"] = pad_mask(batch, case["out_frames"])
    return inputs
