"""Windows and mel matrices: the float32 tables every implementation of a front end loads.

Tables of the published front ends ship as arrays (``tables/``), made by ``parity_tests/make_tables.py`` with the
very functions the published code calls, and are bit-equal to them. Other parameters use the NumPy recipes below,
which agree with those functions within 3e-7 (windows) and 5e-5 of the largest weight (mel matrices).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

from models_zoo.specs import FrontendSpec, Mel, Window

__all__ = [
    "AnalysisTables",
    "analysis_tables",
    "mel_blocks",
    "mel_key",
    "mel_matrix",
    "mel_recipe",
    "window_array",
    "window_key",
    "window_recipe",
]


def window_key(window: Window) -> str:
    """Return the name of a window among the shipped tables."""
    return f"{window.shape}-{window.win_length}-{'periodic' if window.periodic else 'symmetric'}"


def mel_key(mel: Mel, n_fft: int, sample_rate: int) -> str:
    """Return the name of a mel matrix among the shipped tables."""
    norm = "area" if mel.area_norm else "peak"
    return f"{mel.scale}-{mel.linear_in}-{norm}-{mel.n_mels}-{mel.f_min!r}-{mel.f_max!r}-{n_fft}-{sample_rate}"


@functools.cache
def _shipped(name: str) -> dict[str, NDArray[np.float32]]:
    with (files("models_zoo") / "tables" / name).open("rb") as stream, np.load(stream, allow_pickle=False) as tables:
        arrays = {key: tables[key] for key in tables.files}
    for array in arrays.values():
        array.setflags(write=False)
    return arrays


def window_array(window: Window) -> NDArray[np.float32]:
    """Return the window, ``(win_length,)`` float32 in [0, 1], read-only.

    Source: torch.hann_window, torch.hamming_window and scipy.signal.get_window where shipped; Kaldi's
    feature-window.cc for the povey exponent.
    """
    table = _shipped("windows.npz").get(window_key(window))
    return table if table is not None else window_recipe(window)


def window_recipe(window: Window) -> NDArray[np.float32]:
    """Return the window computed in float64 and rounded, whether or not a table ships for it."""
    steps = window.win_length if window.periodic else window.win_length - 1
    cosine = np.cos(2 * np.pi * np.arange(window.win_length) / steps)
    hann = 0.5 - 0.5 * cosine
    values = {"hann": hann, "hamming": 0.54 - 0.46 * cosine, "povey": np.maximum(hann, 0.0) ** 0.85}[window.shape]
    return _frozen(values)


def mel_matrix(mel: Mel, n_fft: int, sample_rate: int) -> NDArray[np.float32]:
    """Return the mel filters, ``(n_fft // 2 + 1, n_mels)`` float32, non-negative, read-only.

    Source: torchaudio.compliance.kaldi.get_mel_banks (linear in mel), torchaudio.functional.melscale_fbanks
    (HTK, linear in Hz), librosa.filters.mel (Slaney), tf.signal.linear_to_mel_weight_matrix (YAMNet, VGGish).
    """
    table = _shipped("mels.npz").get(mel_key(mel, n_fft, sample_rate))
    return table if table is not None else mel_recipe(mel, n_fft, sample_rate)


def mel_recipe(mel: Mel, n_fft: int, sample_rate: int) -> NDArray[np.float32]:
    """Return the mel filters computed in float64 and rounded, whether or not a table ships for them."""
    to_mel, to_hz = (_htk_mel, _htk_hz) if mel.scale == "htk" else (_slaney_mel, _slaney_hz)
    low, high = to_mel(np.array([mel.f_min, mel.f_max]))
    edges_mel = np.linspace(low, high, mel.n_mels + 2, dtype=np.float64)
    edges_hz = to_hz(edges_mel)
    frequencies = np.arange(n_fft // 2 + 1, dtype=np.float64) * (sample_rate / n_fft)
    if mel.linear_in == "mel":
        points, edges = to_mel(frequencies), edges_mel
    else:
        points, edges = frequencies, edges_hz
    rising = (points[:, None] - edges[None, :-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[None, 2:] - points[:, None]) / (edges[2:] - edges[1:-1])
    weights = np.maximum(np.minimum(rising, falling), 0.0)
    if mel.area_norm:
        weights *= 2.0 / (edges_hz[2:] - edges_hz[:-2])
    return _frozen(weights)


def _frozen(values: NDArray[np.float64]) -> NDArray[np.float32]:
    array = values.astype(np.float32)
    array.setflags(write=False)
    return array


def _htk_mel(hz: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(1127.0 * np.log1p(hz / 700.0))


def _htk_hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(700.0 * np.expm1(mel / 1127.0))


# Slaney's Auditory Toolbox: 3 mel per 200 Hz up to 1 kHz, then 27 steps per factor of 6.4.
_SLANEY_LINEAR = 200.0 / 3.0
_SLANEY_KNEE_HZ = 1000.0
_SLANEY_KNEE_MEL = _SLANEY_KNEE_HZ / _SLANEY_LINEAR
_SLANEY_STEP = np.log(6.4) / 27.0


def _slaney_mel(hz: NDArray[np.float64]) -> NDArray[np.float64]:
    above = _SLANEY_KNEE_MEL + np.log(np.maximum(hz, _SLANEY_KNEE_HZ) / _SLANEY_KNEE_HZ) / _SLANEY_STEP
    return np.where(hz < _SLANEY_KNEE_HZ, hz / _SLANEY_LINEAR, above)


def _slaney_hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    above = _SLANEY_KNEE_HZ * np.exp(_SLANEY_STEP * (np.maximum(mel, _SLANEY_KNEE_MEL) - _SLANEY_KNEE_MEL))
    return np.where(mel < _SLANEY_KNEE_MEL, mel * _SLANEY_LINEAR, above)


@dataclass(frozen=True, eq=False)
class AnalysisTables:
    """The constants of one spec, shared by the NumPy, torch and TensorFlow implementations.

    Attributes:
        windows: one ``(win_length,)`` float32 array per window.
        offsets: per window, where its samples begin inside the span of a frame. Only magnitudes are used, so a
            frame is cut as ``win_length`` samples and zero-extended to ``n_fft`` on the right wherever the window
            sits: same magnitudes, less memory moved.
        bins: FFT bins the mel matrix uses, as a slice; the others never reach the output.
        mel: ``(bins, n_mels)`` float32, the rows of the mel matrix in ``bins``.
        ramp: ``(n_mels,)`` float32 added last by the affine, or None.
    """

    windows: tuple[NDArray[np.float32], ...]
    offsets: tuple[int, ...]
    bins: slice
    mel: NDArray[np.float32]
    ramp: NDArray[np.float32] | None


def analysis_tables(spec: FrontendSpec) -> AnalysisTables:
    """Return the constants of ``spec``."""
    matrix = mel_matrix(spec.mel, spec.framing.n_fft, spec.sample_rate)
    bins = _used_bins(matrix)
    centred = spec.framing.placement == "centred"
    ramp = None
    if spec.affine is not None and spec.affine.ramp is not None:
        ramp = np.linspace(*spec.affine.ramp, spec.mel.n_mels).astype(np.float32)
    return AnalysisTables(
        windows=tuple(window_array(window) for window in spec.windows),
        offsets=tuple((spec.span - window.win_length) // 2 if centred else 0 for window in spec.windows),
        bins=bins,
        mel=np.ascontiguousarray(matrix[bins]),
        ramp=ramp,
    )


def mel_blocks(matrix: NDArray[np.float32], width: int = 32) -> list[tuple[slice, NDArray[np.float32]]]:
    """Return a mel matrix as blocks of ``width`` filters, in order, without the bins that are 0 for all of a block.

    ``concatenate([spectrum[..., bins] @ block for bins, block in mel_blocks(matrix)])`` is ``spectrum @ matrix`` in a
    fraction of the products: a triangle spans few bins.

    Args:
        matrix: ``(bins, n_mels)`` float32.
        width: filters per block; fewer leave out more zeros and make products too thin to be fast.
    """
    blocks = []
    for start in range(0, matrix.shape[1], width):
        block = matrix[:, start : start + width]
        bins = _used_bins(block)
        blocks.append((bins, np.ascontiguousarray(block[bins])))
    return blocks


def _used_bins(matrix: NDArray[np.float32]) -> slice:
    """Return the range of FFT bins with a weight in ``matrix``; one bin where there is none at all."""
    used = np.flatnonzero(matrix.any(axis=1))
    return slice(int(used[0]), int(used[-1]) + 1) if used.size else slice(0, 1)
