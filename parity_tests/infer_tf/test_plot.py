"""Pictures: every front end's features can be shown, and files are whole or absent."""

from __future__ import annotations

import numpy as np
import pytest

from infer_tf import TFFrontend
from infer_tf.plot import plot_confusion, plot_prediction, spectrogram
from models_zoo.errors import OutputExistsError
from models_zoo.prediction import Prediction
from models_zoo.presets import get_frontend
from parity_tests.infer_tf.conftest import noise


@pytest.mark.parametrize("name", ["efficientat", "panns_32k", "cav_mae", "mrms", "yamnet", "dcase_2023"])
def test_a_spectrogram_is_mel_bands_by_frames(name):
    spec = get_frontend(name)
    waveform = noise(1.5, rate=spec.sample_rate)
    picture = spectrogram(TFFrontend(spec), waveform)
    assert picture.shape[0] == spec.mel.n_mels
    assert 1 <= picture.shape[1] <= spec.num_frames(len(waveform)) * spec.num_patches(len(waveform))
    assert np.isfinite(picture).all()
    if name == "efficientat":
        np.testing.assert_array_equal(picture, TFFrontend(spec).features(waveform[None])[0])


def test_a_long_spectrogram_is_made_of_blocks(monkeypatch):
    monkeypatch.setattr("infer_tf.plot._BLOCK_SECONDS", 0.5)
    frontend = TFFrontend(get_frontend("efficientat"))
    for num_samples in (16_000, 16_100, 16_514, 48_000, 50_000):
        picture = spectrogram(frontend, noise(2)[:num_samples])
        assert abs(picture.shape[1] - frontend.spec.num_frames(num_samples)) <= num_samples // 16_000 + 2


def prediction(start: float, seed: int) -> Prediction:
    values = np.random.default_rng(seed).dirichlet([1, 1, 1]).astype(np.float32)
    return Prediction(("clap", "a $ign of _mathematics_", "whistle" * 10), values, start=start, end=start + 1)


@pytest.mark.parametrize("count", [1, 3])
def test_pictures_are_written_whole_and_not_over_others(count, tmp_path):
    path = tmp_path / "picture.png"
    frontend = TFFrontend(get_frontend("efficientat"))
    predictions = [prediction(0.5 * index, index) for index in range(count)]
    plot_prediction(path, frontend, noise(2), predictions, title="a clip", top=2)
    first = path.read_bytes()
    assert first.startswith(b"\x89PNG")
    with pytest.raises(OutputExistsError):
        plot_prediction(path, frontend, noise(2), predictions, title="a clip")
    plot_prediction(path, frontend, noise(2, 1), predictions, title="another", force=True)
    assert path.read_bytes() != first
    assert list(tmp_path.iterdir()) == [path]


def test_a_confusion_matrix_is_drawn(tmp_path):
    matrix = np.array([[3, 1], [0, 0]])
    plot_confusion(tmp_path / "c.png", matrix, ("clap", "hum"), title="two classes")
    assert (tmp_path / "c.png").stat().st_size > 3000
