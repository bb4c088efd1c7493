"""Changes made to training waveforms, each from a NumPy generator the caller seeds.

What belongs between the stages of the front end (mel edges, masks, mixup) is a hook of ``TorchFrontend``; this
module holds what happens before it.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import soxr
import torch
from numpy.typing import NDArray
from scipy import fft
from torch import Tensor

from models_zoo.errors import DataError
from train_torch.frontend import Mixing, PairMixing
from train_torch.recipes import Augmentation

__all__ = [
    "augment",
    "change_speed",
    "coloured_noise",
    "draw_light_mixing",
    "draw_mixing",
    "draw_pairs",
    "equalise",
    "fit_length",
    "mix_labels",
    "mix_waveforms",
]

Waveform = NDArray[np.float32]


def change_speed(waveform: Waveform, factor: float) -> Waveform:
    """Return ``waveform`` ``(num_samples,)`` played ``factor`` times as fast: ``(num_samples / factor,)``."""
    return soxr.resample(waveform, factor, 1.0, quality="MQ").astype(np.float32, copy=False)


@functools.lru_cache(maxsize=64)
def _log_bins(num_samples: int) -> Waveform:
    """Return ln(k) of the FFT bins k of a signal, the first two 0, ``(num_samples // 2 + 1,)``."""
    return np.log(np.maximum(np.arange(num_samples // 2 + 1), 1)).astype(np.float32)


def equalise(waveform: Waveform, rng: np.random.Generator, max_db: float, *, bands: int = 6) -> Waveform:
    """Return ``waveform`` through a random smooth response within +-``max_db``, as another microphone would give.

    The response is a straight line in dB between ``bands`` points equally spaced in log frequency from 1/200 of the
    Nyquist frequency up to it.
    """
    bins = _log_bins(waveform.size)
    points = bins[-1] + np.linspace(np.log(0.005), 0.0, bands)
    response = np.interp(bins, points, rng.uniform(-max_db, max_db, bands)).astype(np.float32)
    return fft.irfft(fft.rfft(waveform) * np.exp(response * np.float32(np.log(10) / 20)), n=waveform.size)


def coloured_noise(num_samples: int, rng: np.random.Generator) -> Waveform:
    """Return noise of unit power whose spectrum falls by 0 (white) to 6 dB (brown) per octave, ``(num_samples,)``."""
    bins = _log_bins(num_samples)
    draws = rng.standard_normal(2 * bins.size, dtype=np.float32).view(np.complex64)
    noise = fft.irfft(draws * np.exp(bins * np.float32(-rng.uniform())), n=num_samples)
    return noise / np.float32(max(float(np.sqrt(np.mean(noise**2))), 1e-12))


def fit_length(waveform: Waveform, num_samples: int, rng: np.random.Generator, *, repeat: bool = False) -> Waveform:
    """Return ``num_samples`` samples: a random crop, or the clip at a random place among zeros or its repetitions."""
    if waveform.size >= num_samples:
        start = int(rng.integers(waveform.size - num_samples + 1))
        return waveform[start : start + num_samples]
    if repeat:
        return np.roll(np.resize(waveform, num_samples), int(rng.integers(num_samples)))
    start = int(rng.integers(num_samples - waveform.size + 1))
    return np.pad(waveform, (start, num_samples - waveform.size - start))


def augment(
    waveform: Waveform,
    settings: Augmentation,
    rng: np.random.Generator,
    *,
    sample_rate: int,
    num_samples: int,
    repeat: bool = False,
) -> Waveform:
    """Return a changed training clip of ``num_samples`` samples, clipped to [-1, 1] unless ``settings`` say otherwise.

    Args:
        waveform: ``(any,)`` float32 in [-1, 1] at ``sample_rate`` Hz.
        settings: what to change and how much.
        rng: the only source of chance.
        num_samples: length of the result.
        repeat: fill a short clip with its own repetitions instead of zeros.
    """
    if settings.speed is not None:
        factor = float(np.exp(rng.uniform(*np.log(settings.speed))))
        # Crop what the result needs before resampling; the margin keeps the resampler's edges out of long clips.
        longest = int(num_samples * factor) + 64
        if waveform.size > longest:
            waveform = fit_length(waveform, longest, rng)
        waveform = change_speed(waveform, factor)
    waveform = fit_length(waveform, num_samples, rng, repeat=repeat)
    if settings.roll_seconds:
        farthest = round(settings.roll_seconds * sample_rate)
        waveform = np.roll(waveform, int(rng.integers(-farthest, farthest + 1)))
    if settings.equalise_db:
        waveform = equalise(waveform, rng, settings.equalise_db)
    if settings.gain_db is not None:
        waveform = waveform * np.float32(10 ** (_gain_db(settings.gain_db, settings.gain_step_db, rng) / 20))
    if settings.noise_probability and rng.random() < settings.noise_probability:
        level = float(np.sqrt(np.mean(waveform**2))) * 10 ** (-rng.uniform(*settings.noise_snr_db) / 20)
        waveform = waveform + np.float32(level) * coloured_noise(waveform.size, rng)
    if settings.clip:
        waveform = np.clip(waveform, -1.0, 1.0)
    return waveform.astype(np.float32, copy=False)


def _gain_db(limits: tuple[float, float], step: float | None, rng: np.random.Generator) -> float:
    """Return a gain between ``limits``, both included where it goes by steps."""
    low, high = limits
    if step is None:
        return rng.uniform(low, high)
    return low + step * float(rng.integers(math.floor((high - low) / step + 1e-9) + 1))


def draw_mixing(
    batch: int, rng: np.random.Generator, *, alpha: float, probability: float, device: torch.device | str = "cpu"
) -> Mixing:
    """Return a mixup draw for ``batch`` clips.

    Each clip is mixed with ``probability``, with weight Beta(alpha, alpha) folded to at least one half, so that a
    clip stays the louder part of its own mix.

    Source: EfficientAT helpers/utils.py mixup (alpha 0.3, every clip) and datasets' wavmix (alpha 2, half of them).
    """
    weight = rng.beta(alpha, alpha, batch)
    weight = np.where(rng.random(batch) < probability, np.maximum(weight, 1 - weight), 1.0)
    return Mixing(
        permutation=torch.as_tensor(rng.permutation(batch), device=device),
        weight=torch.as_tensor(weight, dtype=torch.float32, device=device),
    )


def draw_light_mixing(
    batch: int,
    rng: np.random.Generator,
    *,
    weights: tuple[float, float],
    probability: float,
    device: torch.device | str = "cpu",
) -> Mixing:
    """Return a mixup draw for ``batch`` clips in which the other clip is a little of the mix, and as it is.

    Each clip is mixed with ``probability``; the weight of the other is uniform in ``weights``. Any clip of the batch
    is the other one with equal chance, the clip itself included.

    Source: the MRMS notebook (weights 0.05 to 0.25, three quarters of the clips), where the other is any clip of the
    training set; a batch is a random part of it.
    """
    other = np.where(rng.random(batch) < probability, rng.uniform(*weights, batch), 0.0)
    return Mixing(
        permutation=torch.as_tensor(rng.integers(batch, size=batch), device=device),
        weight=torch.as_tensor(1 - other, dtype=torch.float32, device=device),
        plain=True,
    )


def draw_pairs(batch: int, rng: np.random.Generator, *, alpha: float, device: torch.device | str = "cpu") -> PairMixing:
    """Return a mixup draw that makes one clip of two, with Beta(alpha, alpha) for the first of each pair.

    Raises:
        DataError: an odd number of clips.

    Source: PANNs utils/utilities.py Mixup and pytorch/pytorch_utils.py do_mixup (alpha 1).
    """
    if batch % 2:
        raise DataError(f"got {batch} clips to mix in pairs; expected an even number")
    return PairMixing(torch.as_tensor(rng.beta(alpha, alpha, batch // 2), dtype=torch.float32, device=device))


def mix_waveforms(mixing: Mixing, waveform: Tensor) -> Tensor:
    """Return ``waveform`` ``(batch, num_samples)`` with clips added as drawn, each brought to mean zero before.

    A clip that is not mixed (weight 1) stays as it is, its mean included.

    Source: EfficientAT datasets' MixupDataset; YuanGongND/cav-mae src/dataloader.py, which draws Beta(10, 10).
    """
    mixed = mixing(waveform - waveform.mean(dim=1, keepdim=True))
    return torch.where(mixing.weight.view(-1, 1) < 1, mixed, waveform)


def mix_labels(
    mixing: Mixing | PairMixing, targets: Tensor, known: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return ``(batch, num_classes)`` targets mixed with the clips' own weights, and how far each is known.

    Binary cross-entropy is linear in its target, so the loss of a mix is the loss against the one clip's label times
    its weight, plus that against the other's. A label that is unknown for a clip takes that clip's share out of this
    sum and changes nothing else: known for both clips it counts in full, for one of them with that clip's weight, for
    neither not at all.

    Args:
        mixing: the draw with which the clips are mixed.
        targets: in [0, 1].
        known: in [0, 1], None where every label is known, which stays None.

    Source: EfficientAT masks by the louder clip alone and takes the other's unknown labels for absent.
    """
    if known is None:
        return mixing(targets), None
    mixed = mixing(known)
    return torch.where(mixed > 0, mixing(targets * known) / mixed.clamp(min=1e-12), 0.0), mixed
