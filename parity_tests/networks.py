"""Networks whose numbers are alive: fresh ones answer with zeros, and zeros agree with any mistake."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models_zoo.cards import ModelCard
from models_zoo.presets import get_frontend
from models_zoo.specs import FrontendSpec
from train_torch.frontend import TorchFrontend
from train_torch.models import create_model, new_card

CONTRACT_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mn04_as": ("mn04_as", {}),
    "mn05_as": ("mn05_as", {}),
    "mn10_as": ("mn10_as", {}),
    "mn20_as": ("mn20_as", {}),
    "mn10_as_fc": ("mn10_as_fc", {}),
    "mn10_as_fc_s2221": ("mn10_as_fc_s2221", {}),
    "mn10_as_fc_s2211": ("mn10_as_fc_s2211", {}),
    "mn10_mha4": ("mn10", {"head": "multihead_attention_pooling"}),
    "mn04_as_20": ("mn04_as", {"num_classes": 20}),
    "mn05_as_20": ("mn05_as", {"num_classes": 20}),
    "mn10_as_20": ("mn10_as", {"num_classes": 20}),
    "mn10_as_fc_20": ("mn10_as_fc", {"num_classes": 20}),
    "mn10_mha4_20": ("mn10", {"head": "multihead_attention_pooling", "num_classes": 20}),
    "dymn04_as": ("dymn04_as", {}),
    "dymn10_as": ("dymn10_as", {}),
    "dymn20_as": ("dymn20_as", {}),
    "dymn04_replace_se_as": ("dymn04_replace_se_as", {}),
    "dymn04_as_20": ("dymn04_as", {"num_classes": 20}),
    "dymn10_as_20": ("dymn10_as", {"num_classes": 20}),
    "dymn20_as_20": ("dymn20_as", {"num_classes": 20}),
}
"""Name in the contracts -> name and options for ``create_model``."""


_PRESETS = {"dcase_crnn": "dcase_2024", "efficientat": "efficientat", "mrms_mac": "mrms", "panns": "panns_32k"}
"""System of a network -> the front end whose features it takes."""


def _frontend(system: str, n_mels: int) -> FrontendSpec:
    frontend = get_frontend(_PRESETS[system])
    return frontend.replace(mel=frontend.mel.replace(n_mels=n_mels))


def noise_features(batch: int, frames: int, n_mels: int = 128, system: str = "efficientat") -> Tensor:
    """Return features of ``system``, of ``frames`` frames, of seeded noise, each clip half as loud as the last."""
    frontend = _frontend(system, n_mels)
    with torch.no_grad():
        return TorchFrontend(frontend).eval()(_noise(batch, frames, frontend))


def noise_inputs(model: nn.Module, batch: int, frames: int) -> dict[str, Tensor]:
    """Return what ``model`` takes, by name, of the same noise; 31 tokens where it takes embeddings, and no masks."""
    frontend = _frontend(model.system, model.declared.n_mels)
    made = {
        "frontend": noise_features(batch, frames, frontend.mel.n_mels, model.system),
        "waveform": _noise(batch, frames, frontend),
    }
    for part in model.inputs:
        if part.source == "encoder":
            shape = (batch, *(int(axis) if axis.isdecimal() else 31 for axis in part.axes[1:]))
            made["encoder"] = torch.randn(shape, generator=torch.Generator().manual_seed(frames))
    return {part.name: made[part.source] for part in model.inputs if part.source != "caller"}


def _noise(batch: int, frames: int, frontend: FrontendSpec) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    noise = torch.randn(batch, frontend.framing.hop_length * frames, generator=generator)
    clips = torch.arange(batch).unsqueeze(1)
    if frontend.statistics is None:
        return noise * 0.5**clips
    # A front end that takes the level out would make all of them alike: they fall by more and more per octave instead.
    bins = torch.fft.rfft(noise)
    return torch.fft.irfft(bins * torch.arange(1, bins.shape[1] + 1) ** (-0.25 * clips), n=noise.shape[1])


def lively(name: str, *, seed: int = 0, **options: Any) -> nn.Module:
    """Return a network in evaluation mode whose norms were fitted to noise, so that clips differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = create_model(name, **options)
        frontend = _frontend(model.system, model.declared.n_mels)
        axes = next((part.axes for part in model.inputs if part.source == "frontend"), None)
        time = "time" if axes is None else axes[frontend.layout.split(" ").index("t")]
        inputs = noise_inputs(model, 8, int(time) if time.isdecimal() else 64)
        norms = [module for module in model.modules() if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))]
        momenta = [norm.momentum for norm in norms]
        # Behind a front end that takes the level out, clips of noise are alike. Norms fitted to them would amplify what
        # tells them apart by a thousand, and rounding with it.
        barely = frontend.statistics is not None
        for norm in norms:
            norm.momentum = 0.1 if barely else 1.0
        with torch.no_grad():
            for key, module in model.named_modules():
                if isinstance(module, nn.Linear) or (barely and isinstance(module, nn.Conv2d)):
                    nn.init.kaiming_normal_(module.weight)
                # A dynamic block's factors grow with its input: unlearned, fifteen of them blow up on unusual clips.
                elif key.endswith("joint_norm"):
                    nn.init.constant_(module.weight, 0.03)
                # A fresh residual block is its bypass, so that nothing in it could go wrong.
                elif isinstance(module, nn.BatchNorm2d) and not module.weight.any():
                    nn.init.ones_(module.weight)
            model.train()(**inputs)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return model.eval()


def card_of(model: nn.Module, architecture: str, **fields: Any) -> ModelCard:
    """Return a card for ``model`` behind its system's front end, with invented labels if it scores classes."""
    count = model.options["num_classes"]
    defaults: dict[str, Any] = {
        "name": "example",
        "task": "single_label" if count else "embedding",
        "labels": [f"class {index}" for index in range(count)] or None,
        "frontend": _frontend(model.system, model.options["n_mels"]),
    }
    return new_card(**{**defaults, **fields}, architecture=architecture, model=model)


def contract_entry(contracts: Path, variant: str) -> dict[str, Any]:
    """Return a variant of the published keys, with what it takes over from its base filled in."""
    variants = json.loads((contracts / "efficientat" / "keys.json").read_text())["variants"]
    entry = variants[variant]
    base = variants[entry.get("base", variant)]
    return {**base, **entry, "keys": {**base["keys"], **entry.get("changed", {})}}


def contract_state(contracts: Path, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights with which the published code's outputs were recorded."""
    module = importlib.util.spec_from_file_location("seeded_weights", contracts / "seeded_weights.py")
    seeded = importlib.util.module_from_spec(module)
    module.loader.exec_module(seeded)
    state = seeded.seeded_state_dict(entry["keys"], entry["fixed"])
    for key, factor in entry.get("scale", {}).items():
        state[key] = state[key] * np.float32(factor)
    return {key: torch.from_numpy(np.asarray(value)) for key, value in state.items()}


def contract_features(contracts: Path, case: str) -> Tensor:
    """Return the input ``(batch, n_mels, time)`` of a recorded case, e.g. ``B3F128T101`` or ``e2e_crop2s``."""
    if case == "e2e_crop2s":
        features = np.load(contracts / "efficientat" / "golden_frontend_long.npz")["feat|crop2s"]
        return torch.from_numpy(features).reshape(1, 128, 200)
    batch, mels, frames = map(int, re.fullmatch(r"B(\d+)F(\d+)T(\d+)", case).groups())
    gains = np.array([1.0, 0.8, 1.25])[:batch, None, None, None]
    noise = np.random.default_rng(frames).standard_normal((batch, 1, mels, frames)) * gains
    return torch.from_numpy(noise.astype(np.float32)[:, 0])
