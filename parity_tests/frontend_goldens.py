"""The published front ends' recorded outputs, as cases: a spec, a waveform, and what the published code gave."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models_zoo.presets import get_frontend
from models_zoo.specs import FrontendSpec

_Array = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class GoldenCase:
    """One recorded output.

    Attributes:
        name: system and case.
        system: key of ``tolerances.GOLDEN_FEATURES``.
        spec: the front end.
        waveform: ``(batch, num_samples)`` float32.
        expected: what the published code returned, after ``select``.
        select: picks what was recorded out of whole features.
    """

    name: str
    system: str
    spec: FrontendSpec
    waveform: NDArray[np.float32]
    expected: _Array
    select: Callable[[_Array], _Array] = lambda features: features


def _noise(seed: int, count: int, gain: float = 0.1) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(count) * gain).astype(np.float32)


def _impulse(count: int, position: int) -> NDArray[np.float32]:
    waveform = np.zeros(count, np.float32)
    waveform[position] = 1.0
    return waveform


def _efficientat(folder: Path) -> Iterator[GoldenCase]:
    metro = np.load(folder / "waveform.npz")["metro32k"].astype(np.float32) / np.float32(32768)
    second = metro[96000:128000]
    batch3 = np.stack([metro[:20001], _noise(12, 20001, 0.3), metro[200000:220001]])
    waveforms = {
        "full10s": metro,
        "crop2s": metro[96000:160000],
        "odd33333": metro[100000:133333],
        "min514": metro[5000:5514],
        "silence": np.zeros(32000, np.float32),
        "impulse": _impulse(32000, 16000),
        "noise": _noise(11, 32000),
        "square": np.where(np.arange(32000) % 72 < 36, 1.0, -1.0).astype(np.float32),
        "batch3": batch3,
    }
    default = get_frontend("efficientat")
    for file in ("golden_frontend.npz", "golden_frontend_long.npz"):
        for key, expected in np.load(folder / file).items():
            kind, _, case = key.partition("|")
            if kind != "feat":
                continue
            if case in waveforms:
                spec = default
            elif case.startswith("fmin"):
                f_min, f_max = (float(part[4:]) for part in case.split("_"))
                spec = default.replace(mel=default.mel.replace(f_min=f_min, f_max=f_max))
            else:
                spec = get_frontend(f"efficientat_{case}")
            waveform = np.atleast_2d(waveforms.get(case, second))
            yield GoldenCase(f"efficientat-{case}", "efficientat", spec, waveform, expected)


def _panns(folder: Path) -> Iterator[GoldenCase]:
    goldens = np.load(folder / "frontend.npz")
    wave = goldens["wave_i16"].astype(np.float32) / np.float32(32768)
    for key in goldens:
        if not key.startswith("logmel_"):
            continue
        rate, case = key.removeprefix("logmel_").split("/")
        words = case.split("_")
        if words[0] == "real":
            step = int(words[2].removeprefix("dec")) if len(words) > 2 else 1
            waveform = wave[: int(words[1])][::step][None]
        elif words[0] == "silence":
            waveform = np.zeros((1, int(words[1])), np.float32)
        elif words[0] == "impulse":
            waveform = _impulse(int(words[1]), int(words[3]))[None]
        else:
            shape = (int(words[1].removeprefix("b")), int(words[2]))
            waveform = (np.random.default_rng(shape[1]).standard_normal(shape) * 0.1).astype(np.float32)
        spec = get_frontend(f"panns_{rate}")
        yield GoldenCase(f"panns-{rate}-{case}", "panns", spec, waveform, goldens[key][:, None])


def _dcase(folder: Path) -> Iterator[GoldenCase]:
    goldens = np.load(folder / "golden_features.npz")
    clip, speech = (goldens[f"{name}_int16"].astype(np.float32) / np.float32(32768) for name in ("clip", "speech"))
    duration = 20001 / 16000
    time = np.arange(20001) / 16000
    waveforms = {
        "noise": _noise(101, 16000),
        "noise_odd": _noise(102, 20001, 0.02),
        "noise_10s": _noise(103, 160000),
        "loud_noise": _noise(104, 8192, 3.0),
        "impulse": _impulse(8000, 4000),
        "silence": np.zeros(8000, np.float32),
        "chirp": (0.5 * np.sin(2 * np.pi * (200 * time + 0.5 * (6000 / duration) * time**2))).astype(np.float32),
        "clip": clip,
        "speech": speech,
        "clip_padded_10s": np.pad(clip, (0, 160000 - clip.size)),
    }
    spec = get_frontend("dcase_2024")
    older = get_frontend("dcase_2023")
    for name, waveform in waveforms.items():
        index, scaled = goldens[f"{name}_idx"], goldens[f"{name}_scaled"]
        select = _frames(index, axis=2)
        yield GoldenCase(f"dcase_2024-{name}", "dcase", spec, waveform[None], scaled[None], select)
        yield GoldenCase(f"dcase_2023-{name}", "dcase", older, waveform[None], (scaled[None] + 1) / 2, select)


def _frames(index: Any, axis: int) -> Callable[[_Array], _Array]:
    return lambda features: np.take(features, index, axis=axis)


def _cav_mae(folder: Path) -> Iterator[GoldenCase]:
    goldens = np.load(folder / "golden_frontend.npz")
    spec = get_frontend("cav_mae")
    # Recorded before the fixed 1,024 frames and before the affine; compared in the spec's output units.
    unfixed = spec.replace(frames=None)
    scaled = {key: (goldens[key] + 5.081) / 4.4849 for key in goldens if key.startswith("fbank_")}
    real = goldens["real_int16"].astype(np.float32) / np.float32(32768)
    sine = (0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)).astype(np.float32)
    waveforms = {f"noise_{n}": _noise(1000 + n, n) for n in (400, 559, 560, 16000, 33333)}
    waveforms |= {"impulse_8000": _impulse(8000, 4000), "silence_16000": np.zeros(16000, np.float32)}
    waveforms |= {"sine440_16000": sine, "real": real}
    for name, waveform in waveforms.items():
        yield GoldenCase(f"cav_mae-{name}", "cav_mae", unfixed, waveform[None], scaled[f"fbank_{name}"][None])
    rows = _frames(np.arange(400, 424), axis=1)
    yield GoldenCase("cav_mae-norm_real", "cav_mae", spec, real[None], goldens["norm_real"][None], rows)
    rows = _frames(np.arange(1020, 1024), axis=1)
    expected = scaled["fbank_long_170000_last4"][None]
    yield GoldenCase("cav_mae-long_170000", "cav_mae", spec, _noise(77, 170000)[None], expected, rows)
    rows = _frames(np.array([0, 1, 499, 996, 997]), axis=1)
    expected = scaled["fbank_10s_160000_rows"][None]
    yield GoldenCase("cav_mae-10s_160000", "cav_mae", unfixed, _noise(78, 160000)[None], expected, rows)


def _mrms(folder: Path) -> Iterator[GoldenCase]:
    spec = get_frontend("mrms")
    speech = np.load(folder / "speech.npz")["speech_16k_float32"]
    waveforms = {
        "speech_16000": np.pad(speech, (0, 16000 - speech.size)),
        "speech_natural": speech,
        "silence_16000": np.zeros(16000, np.float32),
        "impulse_16000": _impulse(16000, 8000),
        "noise_12345": _noise(14, 12345),
        "noise_16000_every8": _noise(11, 16000),
        "noise_8000_every8": _noise(12, 8000),
        "noise_24000_every8": _noise(13, 24000),
    }
    for file in ("golden_features_speech.npz", "golden_features_other.npz"):
        for key, expected in np.load(folder / file).items():
            name = key.removeprefix("feat_")
            step = 8 if name.endswith("every8") else 1
            every = _every(step)
            yield GoldenCase(f"mrms-{name}", "mrms", spec, waveforms[name][None], expected[None], every)


def _every(step: int) -> Callable[[_Array], _Array]:
    return lambda features: features[..., ::step]


def golden_cases(contracts: Path) -> list[GoldenCase]:
    """Return every recorded front-end output under ``contracts``, five systems with their variants."""
    return [
        *_efficientat(contracts / "efficientat"),
        *_panns(contracts / "panns"),
        *_dcase(contracts / "dcase_crnn"),
        *_cav_mae(contracts / "cav_mae"),
        *_mrms(contracts / "mrms_mac"),
    ]
