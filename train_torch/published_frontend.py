"""The front end inside a published file: compared with ours, then left out.

PANNs files hold what their front end computes with: the DFT as convolution kernels, with the window in them, and the
mel matrix; files of the DCASE baselines hold the window and the mel matrix, and, where the scaler was fitted to a data
set, the means it found. None of it was learned, and our modules have no such parameters, but they say which front end
the weights were trained behind. A file whose front end is not the card's is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from models_zoo.cards import ModelCard
from models_zoo.errors import CheckpointError
from models_zoo.filterbanks import mel_matrix, window_array
from models_zoo.scaling import scaling_affine
from models_zoo.specs import FrontendSpec

__all__ = ["TOLERANCE", "without_frontend"]

TOLERANCE = 1e-6
"""Largest difference allowed, relative to the largest entry: of the DFT kernels 3e-8 is the rounding of the published
ones, of the mel matrix 0."""

_REAL = "spectrogram_extractor.stft.conv_real.weight"
_IMAGINARY = "spectrogram_extractor.stft.conv_imag.weight"
_MEL = "logmel_extractor.melW"
_WINDOW = "mel_spec.spectrogram.window"
_MEL_BANK = "mel_spec.mel_scale.fb"

_TABLES = (_REAL, _IMAGINARY, _MEL, _WINDOW, _MEL_BANK)

_SCALER = ("scaler.mean", "scaler.mean_squared")


def without_frontend(path: Path, state: Mapping[str, Tensor], card: ModelCard) -> dict[str, Tensor]:
    """Return ``state`` without the tensors of a front end, once they are seen to be those of ``card.frontend``.

    Args:
        path: of the file, for the message.
        state: tensors by name; those of a front end may be missing, one by one or all.
        card: of the file.

    Raises:
        CheckpointError: they are those of another front end.
    """
    state = _without_scaler(path, state, card)
    kept = {key: tensor for key, tensor in state.items() if not key.endswith(_TABLES)}
    found = {key: tensor for key, tensor in state.items() if key not in kept}
    if not found or card.frontend is None:
        return kept
    expected = _tables(card.frontend)
    for key, tensor in found.items():
        ours = next(table for name, table in expected.items() if key.endswith(name))
        theirs = tensor.detach().double().numpy()
        if theirs.shape != ours.shape:
            difference = f"its shape is {list(theirs.shape)}, ours {list(ours.shape)}"
        elif not np.abs(theirs - ours).max() <= TOLERANCE * np.abs(ours).max():
            worst = float(np.abs(theirs - ours).max() / np.abs(ours).max())
            difference = f"they differ by {worst:.2g} of the largest entry, more than {TOLERANCE:g}"
        else:
            continue
        spec = card.frontend
        raise CheckpointError(
            f"{path} was not trained behind the front end of card {card.name!r} ({spec.sample_rate} Hz, n_fft "
            f"{spec.framing.n_fft}, {spec.mel.n_mels} mel bands): {key} is another; {difference}; use the card it "
            "belongs to"
        )
    return kept


def _tables(spec: FrontendSpec) -> dict[str, NDArray[np.float64]]:
    """Return what a published file would hold for ``spec``, by the end of its name."""
    n_fft = spec.framing.n_fft
    window = np.zeros(n_fft)
    values = window_array(spec.windows[0])
    first = (n_fft - len(values)) // 2
    window[first : first + len(values)] = values
    # k * n is reduced before the cosine, which keeps the angle small and so exact.
    angles = 2 * np.pi / n_fft * (np.outer(np.arange(n_fft // 2 + 1), np.arange(n_fft)) % n_fft)
    return {
        _REAL: (np.cos(angles) * window)[:, None],
        _IMAGINARY: (-np.sin(angles) * window)[:, None],
        _MEL: mel_matrix(spec.mel, n_fft, spec.sample_rate).astype(np.float64),
        _WINDOW: values.astype(np.float64),
        _MEL_BANK: mel_matrix(spec.mel, n_fft, spec.sample_rate).astype(np.float64),
    }


def _without_scaler(path: Path, state: Mapping[str, Tensor], card: ModelCard) -> dict[str, Tensor]:
    """Return ``state`` without the statistics of a data set, once they are seen to be those of ``card.frontend``.

    The published scaler keeps M, the mean of the data set, and Q, that of the squares, and computes x - M (``mean``) or
    (x - M) / (sqrt(Q - M^2) + eps) (``standard``): an affine of the front end, without statistics of the clip.
    """
    kept = {key: tensor for key, tensor in state.items() if key not in _SCALER}
    if len(kept) == len(state) or card.frontend is None:
        return kept
    if any(key not in state or state[key].numel() != 1 for key in _SCALER):
        raise CheckpointError(
            f"{path} was trained behind a scaler with a value for each mel band (or half of one), which no front end "
            "here describes; scale per band outside, or train with one value for all"
        )
    mean, square = (float(state[key].double()) for key in _SCALER)
    kinds = [scaling_affine(mean, square, kind) for kind in ("mean", "standard")]
    affine = card.frontend.affine
    stated = affine is not None and card.frontend.statistics is None and affine.ramp is None
    if not stated or not any(
        np.allclose((affine.shift, affine.scale), (kind.shift, kind.scale), rtol=TOLERANCE, atol=0) for kind in kinds
    ):
        raise CheckpointError(
            f"{path} was trained behind statistics of its data set, which card {card.name!r} does not state; give its "
            f"front end no statistics and Affine(shift={-mean!r}, scale={kinds[1].scale!r}) where it divided by the "
            "deviation, scale=1.0 where not"
        )
    return kept
