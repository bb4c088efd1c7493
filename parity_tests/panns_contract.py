"""The PANNs contract: weights anyone can make again, the recorded cases, and what a published file holds."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models_zoo.presets import get_frontend
from models_zoo.specs import FrontendSpec
from train_torch.frontend import TorchFrontend
from train_torch.models import create_model

VARIANTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "Cnn14": ("cnn14", {}, "panns_32k"),
    "Cnn14_16k": ("cnn14_16k", {}, "panns_16k"),
    "Cnn14_8k": ("cnn14_8k", {}, "panns_8k"),
    "Cnn14_emb512": ("cnn14_emb512", {}, "panns_32k"),
    "Cnn14_emb128": ("cnn14_emb128", {}, "panns_32k"),
    "Cnn14_emb32": ("cnn14_emb32", {}, "panns_32k"),
    "Cnn14_DecisionLevelMax": ("cnn14_decisionlevelmax", {}, "panns_32k"),
    "Cnn14_DecisionLevelAvg": ("cnn14_decisionlevelavg", {}, "panns_32k"),
    "Cnn14_DecisionLevelAtt": ("cnn14_decisionlevelatt", {}, "panns_32k"),
    "Transfer_Cnn14": ("transfer_cnn14", {"num_classes": 50}, "panns_32k"),
    "Cnn10": ("cnn10", {}, "panns_32k"),
    "Cnn6": ("cnn6", {}, "panns_32k"),
    "ResNet22": ("resnet22", {}, "panns_32k"),
    "ResNet38": ("resnet38", {}, "panns_32k"),
    "ResNet54": ("resnet54", {}, "panns_32k"),
    "MobileNetV1": ("mobilenetv1", {}, "panns_32k"),
    "MobileNetV2": ("mobilenetv2", {}, "panns_32k"),
    "Wavegram_Cnn14": ("wavegram_cnn14", {}, "panns_32k"),
    "Wavegram_Logmel_Cnn14": ("wavegram_logmel_cnn14", {}, "panns_32k"),
}
"""Name in the contract -> name and options for ``create_model``, and front end."""


def entry(contracts: Path, variant: str) -> dict[str, Any]:
    """Return what the contract says about a variant."""
    return _variants(contracts)[variant]


@cache
def _variants(contracts: Path) -> dict[str, Any]:
    return json.loads((contracts / "panns" / "keys.json").read_text())


def learned_shapes(contracts: Path, variant: str) -> dict[str, list[int]]:
    """Return the published names and shapes in their order, without those of the front end."""
    described = entry(contracts, variant)
    return {key: shape for key, shape in described["shapes"].items() if key not in described["fixed"]}


@cache
def _seeded(contracts: Path) -> ModuleType:
    module = importlib.util.spec_from_file_location("seeded_weights", contracts / "seeded_weights.py")
    seeded = importlib.util.module_from_spec(module)
    module.loader.exec_module(seeded)
    return seeded


@cache
def _tensor(contracts: Path, key: str, shape: tuple[int, ...]) -> Tensor:
    """Return a published weight; eight variants share most of theirs, which take seconds to draw."""
    return torch.from_numpy(_seeded(contracts).seeded_array(key, shape))


def forget_weights() -> None:
    """Let go of the weights kept between variants."""
    _tensor.cache_clear()


def contract_model(contracts: Path, variant: str) -> nn.Module:
    """Return the network with the weights its answers were recorded with, in evaluation mode."""
    name, options, _ = VARIANTS[variant]
    with torch.device("meta"):
        model = create_model(name, **options)
    state = {key: _tensor(contracts, key, tuple(shape)) for key, shape in learned_shapes(contracts, variant).items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def cases(contracts: Path, variant: str) -> list[dict[str, Any]]:
    """Return the recorded cases of a variant."""
    index = json.loads((contracts / "panns" / "golden_index.json").read_text())
    return [case for case in index["cases"] if case["variant"] == variant]


def taps(contracts: Path) -> dict[str, dict[str, list[Any]]]:
    """Return, by ``variant/case``, stage -> shape, mean, standard deviation, least and largest value."""
    return json.loads((contracts / "panns" / "golden_index.json").read_text())["taps"]


def case_inputs(contracts: Path, case: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return ``features`` and, where the case has one, the ``waveform`` of a recorded case."""
    waveform = _waveform(contracts, case) if "wave" in case["kind"] else None
    if "logmel" in case["kind"]:
        generator = np.random.default_rng(case.get("mel_seed") or case["seed"])
        shape = (case["batch"], 1, case["frames"], 64)
        features = torch.from_numpy((generator.standard_normal(shape) * 15 - 35).astype(np.float32))
    else:
        with torch.no_grad():
            features = TorchFrontend(get_frontend(VARIANTS[case["variant"]][2])).eval()(waveform)
    return {"features": features} | ({} if waveform is None else {"waveform": waveform})


def _waveform(contracts: Path, case: Mapping[str, Any]) -> Tensor:
    if "real" in case:
        with np.load(contracts / "panns" / "frontend.npz") as arrays:
            recorded = arrays["wave_i16"]
        samples = (recorded[: case["real"]] / 32768).astype(np.float32)[None, :: case["step"]]
        return torch.from_numpy(np.ascontiguousarray(samples))
    generator = np.random.default_rng(case["seed"])
    noise = generator.standard_normal((case["batch"], case["samples"])) * 0.1
    return torch.from_numpy(noise.astype(np.float32))


@contextmanager
def overridden(model: nn.Module, overrides: Mapping[str, float]) -> Iterator[None]:
    """Set entries of the state to constants, exactly those named, for as long as it is entered."""
    state = model.state_dict()
    kept = {key: state[key].clone() for key in overrides}
    for key, value in overrides.items():
        state[key].fill_(value)
    try:
        yield
    finally:
        for key, value in kept.items():
            state[key].copy_(value)


def frozen_tensors(spec: FrontendSpec, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of a front end that a published file holds, in the published code's own float32 steps."""
    n_fft = spec.framing.n_fft
    grid: NDArray[np.float64] = np.outer(np.arange(n_fft), np.arange(n_fft // 2 + 1))
    kernels = np.power(np.exp(-2j * np.pi / n_fft), grid) * np.hanning(n_fft + 1)[:-1, None]
    from librosa.filters import mel

    matrix = mel(
        sr=spec.sample_rate, n_fft=n_fft, n_mels=spec.mel.n_mels, fmin=spec.mel.f_min, fmax=spec.mel.f_max
    ).T.copy()
    tensors = {
        "spectrogram_extractor.stft.conv_real.weight": kernels.real.T[:, None],
        "spectrogram_extractor.stft.conv_imag.weight": kernels.imag.T[:, None],
        "logmel_extractor.melW": matrix,
    }
    return {prefix + key: torch.from_numpy(value.astype(np.float32)) for key, value in tensors.items()}
