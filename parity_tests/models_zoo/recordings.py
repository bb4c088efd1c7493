"""Recordings for tests, made on the spot."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

CODINGS = (
    ("WAV", "PCM_U8"),
    ("WAV", "PCM_16"),
    ("WAV", "PCM_24"),
    ("WAV", "PCM_32"),
    ("WAV", "FLOAT"),
    ("WAV", "DOUBLE"),
    ("WAV", "ULAW"),
    ("WAV", "IMA_ADPCM"),
    ("WAVEX", "PCM_16"),
    ("RF64", "PCM_16"),
    ("W64", "PCM_24"),
    ("AIFF", "PCM_16"),
    ("AIFF", "FLOAT"),
    ("AU", "PCM_16"),
    ("CAF", "PCM_16"),
    ("CAF", "ALAC_16"),
    ("FLAC", "PCM_16"),
    ("FLAC", "PCM_24"),
    ("OGG", "VORBIS"),
    ("OGG", "OPUS"),
    ("MP3", "MPEG_LAYER_III"),
)
"""Container and coding of every kind of file that is read."""


def signal(num_samples: int, channels: int = 1, seed: int = 0) -> NDArray[np.float32]:
    """Return a tone in noise: ``(num_samples,)``, or ``(num_samples, channels)`` for more than one channel."""
    rng = np.random.default_rng(seed)
    tone = 0.3 * np.sin(np.arange(num_samples) * 0.05)[:, None] / (1 + np.arange(channels))
    waveform = (tone + 0.05 * rng.standard_normal((num_samples, channels))).astype(np.float32)
    return waveform[:, 0] if channels == 1 else waveform


def encoded(
    waveform: NDArray[np.float32], container: str, coding: str, sample_rate: int = 32000, **how: object
) -> bytes:
    """Return the bytes of a file."""
    file = io.BytesIO()
    soundfile.write(file, waveform, sample_rate, format=container, subtype=coding, **how)
    return file.getvalue()


def rows_of(folder: Path) -> list[dict[str, str]]:
    """Return the rows of a folder's ``metadata.csv``."""
    with open(folder / "metadata.csv", newline="") as stream:
        return list(csv.DictReader(stream))
