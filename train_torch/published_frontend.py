"""The front end inside a published file: compared with ours, then left out.

PANNs files hold what their front end computes with: the DFT as convolution kernels, with the window in them, and the
mel matrix. None of it was learned, and our modules have no such parameters, but they say which front end the weights
were trained behind. A file whose front end is not the card's is refused.
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
from models_zoo.specs import FrontendSpec

__all__ = ["TOLERANCE", "without_frontend"]

TOLERANCE = 1e-6
"""Largest difference allowed, relative to the largest entry: of the DFT kernels 3e-8 is the rounding of the published
ones, of the mel matrix 0."""

_REAL = "spectrogram_extractor.stft.conv_real.weight"
_IMAGINARY = "spectrogram_extractor.stft.conv_imag.weight"
_MEL = "logmel_extractor.melW"


def without_frontend(path: Path, state: Mapping[str, Tensor], card: ModelCard) -> dict[str, Tensor]:
    """Return ``state`` without the tensors of a front end, once they are seen to be those of ``card.frontend``.

    Args:
        path: of the file, for the message.
        state: tensors by name; those of a front end may be missing, one by one or all.
        card: of the file.

    Raises:
        CheckpointError: they are those of another front end.
    """
    kept = {key: tensor for key, tensor in state.items() if not key.endswith((_REAL, _IMAGINARY, _MEL))}
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
    }
