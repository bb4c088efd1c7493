"""PANNs from the file to the answer: two inputs, frame scores, and lengths that production must not let through."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile

from export.exporter import export_onnx
from infer_tf import TFAudioClassifier
from models_zoo.audio import load_audio
from models_zoo.errors import ClipLengthError
from models_zoo.soundscapes import CLASSES, write_soundscapes
from parity_tests.networks import card_of, lively
from parity_tests.parity import TorchPath, run_parity
from parity_tests.tolerances import LOGITS, PROBABILITIES
from train_torch.checkpoint import save_checkpoint

RATE = 32_000


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recordings")
    write_soundscapes(folder, num_clips=4, seed=5, seconds=0.9)
    return folder


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    """Return a function that gives checkpoint and graph of a lively network, made once each."""
    made = {}

    def deploy(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model = lively(name, num_classes=len(CLASSES), width=0.125)
            task = "single_label" if name.startswith("transfer") else "multi_label"
            card = card_of(model, name, task=task, labels=CLASSES)
            save_checkpoint(folder / "m.safetensors", model, card)
            short = card.replace(length_policy=card.length_policy.replace(max=64_000))
            export_onnx(model, short, folder / "m.onnx")
            made[name] = folder / "m.safetensors", folder / "m.onnx"
        return made[name]

    return deploy


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cnn14_decisionlevelmax", "wavegram_logmel_cnn14"])
def test_every_seam_agrees_from_the_file(deployed, recordings, name):
    checkpoint, onnx = deployed(name)
    report = run_parity(onnx, checkpoint, recordings, progress=False)
    assert report.passed, f"\n{report}"
    assert (report.num_clips, report.changed) == (4, [])


@pytest.mark.parametrize("name", ["transfer_cnn14", "wavegram_cnn14", "cnn14_decisionlevelatt"])
def test_production_answers_like_torch_from_the_file(deployed, recordings, name):
    checkpoint, onnx = deployed(name)
    research = TorchPath(checkpoint)
    with TFAudioClassifier(onnx, threads=1) as classifier:
        for file in sorted(recordings.rglob("*.wav")):
            expected, found = research.predict(load_audio(file, research.spec)), classifier.predict(file)
            np.testing.assert_allclose(found.probabilities, expected.probabilities, rtol=0, atol=PROBABILITIES)
            if found.embedding is not None:
                np.testing.assert_allclose(found.embedding, expected.embedding, rtol=0, atol=LOGITS)


@pytest.mark.parametrize("name", ["cnn14_decisionlevelmax", "cnn14_decisionlevelatt"])
def test_frame_scores_reach_the_prediction(deployed, name):
    checkpoint, onnx = deployed(name)
    waveform = np.random.default_rng(0).normal(0, 0.1, 33_333).astype(np.float32)
    waveform[:16_000] *= 0.01
    with TFAudioClassifier(onnx, threads=1) as classifier:
        answer = classifier.predict(waveform)
        windows = list(classifier.predict_windows(waveform, window=0.5, hop=0.25))
    expected = TorchPath(checkpoint).predict(waveform)
    assert answer.frame_probabilities.shape == (len(CLASSES), 105)
    np.testing.assert_allclose(answer.frame_probabilities, expected.frame_probabilities, rtol=0, atol=PROBABILITIES)
    np.testing.assert_allclose(answer.frame_times, np.arange(105) * 0.01)
    assert answer.frame_probabilities.std(axis=1).max() > 0.01
    assert (answer.probabilities <= answer.frame_probabilities.max(axis=1) + 1e-6).all()
    assert [window.frame_times[0] for window in windows] == pytest.approx([window.start for window in windows])


@pytest.mark.parametrize("name", ["cnn10", "cnn14_decisionlevelmax", "wavegram_cnn14", "wavegram_logmel_cnn14"])
def test_clips_below_the_minimum_never_reach_onnxruntime(deployed, tmp_path, monkeypatch, name):
    _, onnx = deployed(name)
    with TFAudioClassifier(onnx, threads=1) as classifier:
        shortest = classifier.card.min_samples
        assert shortest > classifier.card.frontend.min_samples, "the network's own minimum"
        classifier.predict(np.zeros(shortest, np.float32))
        monkeypatch.setattr(classifier._members, "run", lambda _: pytest.fail("reached the graph"))
        soundfile.write(tmp_path / "short.wav", np.zeros(shortest - 1, np.float32), RATE)
        short = np.zeros(shortest - 1, np.float32)
        for refused in (
            lambda: classifier.predict(short),
            lambda: classifier.predict(tmp_path / "short.wav"),
            lambda: classifier.predict([short, short]),
            lambda: classifier.embed(short) if classifier.card.embedding_output() else classifier.predict(short),
            lambda: list(classifier.predict_windows(short, window=1.0)),
            lambda: classifier.predict_windows(np.zeros(RATE, np.float32), window=shortest / RATE - 1e-4),
        ):
            with pytest.raises(ClipLengthError, match=f"at least {shortest} samples") as caught:
                refused()
            assert caught.value.code == "too_short"


def test_a_wavegram_s_clips_are_cropped_to_multiples(deployed):
    _, onnx = deployed("wavegram_logmel_cnn14")
    noise = np.random.default_rng(1).normal(0, 0.1, 20_000).astype(np.float32)
    with TFAudioClassifier(onnx, threads=1) as classifier:
        whole = classifier.predict(noise[:11_520])
        for num_samples in (11_521, 11_839, 11_840, 12_159):
            cropped = classifier.predict(noise[:num_samples])
            np.testing.assert_array_equal(cropped.probabilities, whole.probabilities)
        other = classifier.predict(noise[:12_160])
        assert np.abs(other.logits - whole.logits).max() > 1e-3
        answers = classifier.predict([noise[:11_520], noise, noise[:12_000]])
        np.testing.assert_allclose(answers[2].logits, whole.logits, atol=1e-5)
        with pytest.raises(ClipLengthError, match="multiple of 640"):
            classifier.predict_windows(noise, window=0.37)


def test_a_model_of_waveforms_reads_recordings_like_any_other(deployed, tmp_path):
    """Another rate and two channels: the front end on its card says how to read, and makes no features."""
    _, onnx = deployed("wavegram_cnn14")
    noise = np.random.default_rng(2).normal(0, 0.1, (16_000, 2)).astype(np.float32)
    soundfile.write(tmp_path / "stereo.wav", noise, 16_000, subtype="FLOAT")
    with TFAudioClassifier(onnx, threads=1) as classifier:
        assert [part.source for part in classifier.card.inputs] == ["waveform"]
        from_file = classifier.predict(tmp_path / "stereo.wav")
        from_array = classifier.predict(noise.mean(axis=1), sample_rate=16_000)
        assert from_file.end == pytest.approx(1.0)
        np.testing.assert_allclose(from_file.logits, from_array.logits, atol=1e-4)
