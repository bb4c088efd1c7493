from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from infer_tf import TFAudioClassifier
from parity_tests.infer_tf.tiny import write_tiny

RATE = 32000


def noise(seconds: float, seed: int = 0, rate: int = RATE) -> NDArray[np.float32]:
    """Return ``(num_samples,)`` float32 noise whose colour changes along the clip, so that position matters."""
    rng = np.random.default_rng(seed)
    samples = rng.standard_normal(round(seconds * rate)).astype(np.float32)
    return np.asarray(0.2 * samples * np.linspace(0.01, 1, len(samples)) ** 2, np.float32)


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.onnx", scale=3.0)


@pytest.fixture(scope="session")
def classifier(model_path: Path) -> Iterator[TFAudioClassifier]:
    with TFAudioClassifier(model_path, threads=1) as built:
        yield built


@pytest.fixture
def wav(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a recording of noise and returns its path."""

    def write(name: str = "clip.wav", seconds: float = 1.0, seed: int = 0, rate: int = RATE) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, noise(seconds, seed, rate), rate)
        return path

    return write
