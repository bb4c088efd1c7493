"""Make ``models_zoo/tables``: the windows and mel matrices of every preset, by the functions the published code calls.

Run ``python -m parity_tests.make_tables`` after adding a preset; it needs the ``parity`` extra. Deterministic.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import librosa
import numpy as np
import tensorflow as tf
import torch
import torchaudio
from numpy.typing import NDArray

from models_zoo.files import replacing
from models_zoo.filterbanks import mel_key, window_key
from models_zoo.presets import get_frontend, list_frontends
from models_zoo.specs import FrontendSpec, Window

TABLES = Path(__file__).resolve().parent.parent / "models_zoo" / "tables"


def published_window(name: str, window: Window) -> NDArray[np.float32]:
    """Return the window ``(win_length,)`` by the function the system ``name`` calls."""
    if name.startswith("panns"):
        return librosa.filters.get_window("hann", window.win_length, fftbins=True).astype(np.float32)
    make = {"hann": torch.hann_window, "hamming": torch.hamming_window}[window.shape]
    return make(window.win_length, periodic=window.periodic).numpy()


def published_mel(name: str, spec: FrontendSpec) -> NDArray[np.float32]:
    """Return the mel matrix ``(n_fft // 2 + 1, n_mels)`` by the function the system ``name`` calls."""
    mel, n_fft, rate = spec.mel, spec.framing.n_fft, spec.sample_rate
    if name in ("yamnet", "vggish"):
        matrix = tf.signal.linear_to_mel_weight_matrix(mel.n_mels, n_fft // 2 + 1, rate, mel.f_min, mel.f_max)
        return np.asarray(matrix)
    if mel.scale == "slaney":
        return librosa.filters.mel(sr=rate, n_fft=n_fft, n_mels=mel.n_mels, fmin=mel.f_min, fmax=mel.f_max).T
    if mel.linear_in == "mel":
        # The warp arguments are inert at factor 1; these are the values the published code passes.
        banks, _ = torchaudio.compliance.kaldi.get_mel_banks(
            mel.n_mels, n_fft, rate, mel.f_min, mel.f_max, vtln_low=100.0, vtln_high=-500.0, vtln_warp_factor=1.0
        )
        return torch.nn.functional.pad(banks, (0, 1)).T.numpy()
    return torchaudio.functional.melscale_fbanks(
        n_fft // 2 + 1, mel.f_min, mel.f_max, mel.n_mels, rate, norm=None, mel_scale="htk"
    ).numpy()


def published_tables() -> tuple[dict[str, NDArray[np.float32]], dict[str, NDArray[np.float32]]]:
    """Return (windows, mel matrices) of every preset under their table names."""
    windows, mels = {}, {}
    for name in list_frontends():
        spec = get_frontend(name)
        windows.update({window_key(window): published_window(name, window) for window in spec.windows})
        mels[mel_key(spec.mel, spec.framing.n_fft, spec.sample_rate)] = np.ascontiguousarray(published_mel(name, spec))
    return windows, mels


def main() -> None:
    """Write both table files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=TABLES, help="folder to write into")
    folder = parser.parse_args().out
    for file, arrays in zip(("windows.npz", "mels.npz"), published_tables(), strict=True):
        with replacing(folder / file, force=True) as path, open(path, "wb") as stream:
            np.savez_compressed(stream, **arrays)


if __name__ == "__main__":
    main()
