"""TFAudioClassifier: every way in gives the same answer, and nothing else changes it."""

from __future__ import annotations

import io
import itertools
import math
import multiprocessing
import os
import pickle
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile

from infer_tf import TFAudioClassifier
from infer_tf.session import OnnxSession
from models_zoo import registry
from models_zoo.audio import load_audio
from models_zoo.decoding import decode, probabilities_of
from models_zoo.errors import (
    AudioDecodeError,
    ClipLengthError,
    ClosedError,
    DeviceError,
    ModelFileError,
    UnknownNameError,
    WaveformError,
)
from models_zoo.prediction import Prediction, average_predictions
from parity_tests.infer_tf.conftest import RATE, noise
from parity_tests.infer_tf.tiny import LABELS, tiny_card, tiny_model, tiny_proto, with_metadata, write_tiny

BATCH_TOLERANCE = 1e-5  # a matrix product of several rows may sum in another order than one of a single row


def same(one: Prediction, other: Prediction, tolerance: float = 0.0) -> None:
    assert one.labels == other.labels
    assert (one.start, one.end) == (other.start, other.end)
    np.testing.assert_allclose(one.probabilities, other.probabilities, rtol=0, atol=tolerance)
    np.testing.assert_allclose(one.embedding, other.embedding, rtol=0, atol=tolerance * 10)


def test_the_card_shows(classifier):
    assert classifier.labels == LABELS
    assert classifier.sample_rate == RATE
    assert classifier.card.name == "tiny"


def test_a_prediction_is_what_the_parts_give(classifier, model_path):
    waveform = noise(0.7)
    features = classifier.frontend.features(waveform[None])
    outputs = OnnxSession(model_path, threads=1).run({"features": features})
    found = classifier.predict(waveform)
    np.testing.assert_array_equal(found.logits, outputs["logits"][0])
    np.testing.assert_array_equal(found.embedding, outputs["embedding"][0])
    expected = probabilities_of(outputs["logits"][0], task="single_label", kind="logit")
    np.testing.assert_array_equal(found.probabilities, expected)
    assert (found.start, found.end) == (0.0, 0.7)
    assert 0.4 < found.probabilities.max() < 0.999, "an answer that could change"


def test_every_way_in_gives_the_same_answer(classifier, wav):
    path = wav(seconds=0.5, rate=44100)
    data = path.read_bytes()
    expected = classifier.predict(load_audio(path, classifier.frontend.spec))
    with path.open("rb") as stream:
        ways = [str(path), path, data, bytearray(data), io.BytesIO(data), stream]
        for way in ways:
            same(classifier.predict(way), expected)
    samples, rate = soundfile.read(path, dtype="float32")
    same(classifier.predict(samples, sample_rate=rate), expected)
    same(classifier.predict(soundfile.read(path, dtype="int16")[0], sample_rate=rate), expected)
    same(classifier.predict(np.stack([samples, samples]), sample_rate=rate, channels_first=True), expected)


def test_a_batch_never_changes_an_answer(classifier, wav):
    clips = [noise(seconds, seed) for seed, seconds in enumerate([0.5, 0.3, 0.5, 0.017, 1.1, 0.3, 0.5, 0.3])]
    several = [*clips, str(wav(seconds=0.5)), wav("b.wav", seconds=0.25).read_bytes()]
    together = classifier.predict(several)
    assert len(together) == len(several)
    for one, clip in zip(together, several, strict=True):
        same(one, classifier.predict(clip), BATCH_TOLERANCE)
    for one, other in zip(classifier.embed(several), together, strict=True):
        np.testing.assert_allclose(one, other.embedding, rtol=0, atol=1e-5)


def test_a_batch_larger_than_is_scored_at_once_keeps_its_order(classifier, monkeypatch):
    monkeypatch.setattr("infer_tf.classifier._BATCH_SECONDS", 0.11)
    sizes: list[int] = []
    features = classifier.frontend.features
    monkeypatch.setattr(classifier.frontend, "features", lambda x: sizes.append(x.size) or features(x))
    clips = [noise(0.02 + 0.01 * (seed % 4), seed) for seed in range(40)]
    together = classifier.predict(clips)
    assert max(sizes) <= 0.11 * RATE
    assert len(sizes) < 40
    for one, clip in zip(together, clips, strict=True):
        same(one, classifier.predict(clip), BATCH_TOLERANCE)


def test_a_two_dimensional_array_is_a_batch(classifier):
    clips = np.stack([noise(0.2, seed) for seed in range(3)])
    for one, clip in zip(classifier.predict(clips), clips, strict=True):
        same(one, classifier.predict(clip), BATCH_TOLERANCE)
    assert len(classifier.predict(clips[:1])) == 1
    assert classifier.predict([]) == []


@pytest.mark.parametrize(
    ("source", "options", "code"),
    [
        (np.zeros(0, np.float32), {}, "empty"),
        (np.zeros((2, 3, 4), np.float32), {}, "rank"),
        (np.float32(1), {}, "rank"),
        (np.full(RATE, np.nan, np.float32), {}, "non_finite"),
        (np.full(RATE, np.inf), {}, "non_finite"),
        (np.zeros(RATE, np.complex64), {}, "dtype"),
        (np.array(["a"] * 600), {}, "dtype"),
        ([noise(0.1), np.zeros((2, 3200), np.float32)], {}, "rank"),
        (noise(0.1), {"sample_rate": "44100"}, "sample_rate"),
        (noise(0.1), {"sample_rate": 0}, "sample_rate"),
        (noise(0.1), {"sample_rate": 44100.5}, "sample_rate"),
        ("some.wav", {"sample_rate": 44100}, "sample_rate"),
        (noise(0.016), {}, "too_short"),
        ([noise(0.1), noise(0.016)], {}, "too_short"),
    ],
)
def test_arrays_that_are_no_waveforms(classifier, source, options, code):
    for verb in (classifier.predict, classifier.embed):
        with pytest.raises(WaveformError) as caught:
            verb(source, **options)
        assert caught.value.code == code


def test_an_error_in_a_batch_says_which_clip(classifier, tmp_path):
    for bad in (noise(0.016), np.full(RATE, np.nan), tmp_path / "missing.wav"):
        with pytest.raises((WaveformError, AudioDecodeError), match=r"^clip 2 \(counted from 0\): "):
            classifier.predict([noise(0.1), noise(0.1), bad, noise(0.1)])
    with pytest.raises(ClipLengthError, match=r"^clip 0"):
        classifier.predict(np.zeros((2, 100), np.float32))


@pytest.mark.parametrize("source", [None, 5, {"a": 1}, object(), [1.0, 2.0]])
def test_things_that_are_no_recordings(classifier, source):
    with pytest.raises((AudioDecodeError, WaveformError), match="expected"):
        classifier.predict(source)


def test_a_clip_shorter_than_legal_is_filled_only_where_the_card_says_so(classifier, tmp_path):
    with pytest.raises(ClipLengthError, match=r"400 samples \(0.0125 s\); model 'tiny' needs at least 514"):
        classifier.predict(noise(1)[:400])
    for rule in ("zero", "repeat"):
        path = write_tiny(tmp_path / f"{rule}.onnx", tiny_card(length_policy={"short": rule, "min": 1000}), scale=3.0)
        with TFAudioClassifier(path, threads=1) as padding:
            clip = noise(1)[:700]
            filled = np.pad(clip, (0, 300)) if rule == "zero" else np.concatenate([clip, clip[:300]])
            found = padding.predict(clip)
            np.testing.assert_array_equal(found.probabilities, classifier.predict(filled).probabilities)
            assert found.end == 700 / RATE


def test_a_long_clip_is_averaged_over_windows_where_the_card_says_so(classifier, tmp_path):
    path = write_tiny(tmp_path / "w.onnx", tiny_card(length_policy={"long": "windows", "max": 8000}), scale=3.0)
    clip = noise(0.6)
    with TFAudioClassifier(path, threads=1) as windowed:
        found = windowed.predict([clip, clip[:8000]])
        starts = [0, 8000, 11200]
        parts = [classifier.predict(clip[start : start + 8000]).probabilities for start in starts]
        np.testing.assert_allclose(found[0].probabilities, np.mean(parts, axis=0), atol=BATCH_TOLERANCE)
        assert found[0].end == 0.6
        same(found[1], classifier.predict(clip[:8000]), BATCH_TOLERANCE)


@pytest.mark.parametrize("length", [0.3, 0.5, 0.75, 1.0, 1.01, 1.24999, 1.7, 3.3])
@pytest.mark.parametrize(("window", "hop"), [(0.5, 0.25), (0.5, 0.5), (0.4, 0.7), (1.0, 0.125)])
def test_windows_lie_on_the_hop_and_the_last_ends_with_the_recording(classifier, wav, length, window, hop):
    path = wav(seconds=length)
    waveform = load_audio(path, classifier.frontend.spec)
    found = list(classifier.predict_windows(path, window, hop))
    size, total = round(window * RATE), len(waveform)
    assert found[0].start == 0
    assert found[-1].end == total / RATE
    for index, one in enumerate(found):
        start, end = round(one.start * RATE), round(one.end * RATE)
        assert end - start == min(size, total)
        assert index == len(found) - 1 or start == index * round(hop * RATE)
        if index in (0, len(found) // 2, len(found) - 1):
            expected = classifier.predict(waveform[start:end])
            np.testing.assert_array_equal(one.probabilities, expected.probabilities)
    starts = [one.start for one in found]
    assert starts == sorted(set(starts))
    assert all(after - before <= hop + 1e-9 for before, after in itertools.pairwise(starts))
    again = list(classifier.predict_windows(waveform, window, hop))
    assert [one.start for one in again] == starts
    np.testing.assert_array_equal(again[-1].probabilities, found[-1].probabilities)


def test_one_window_is_the_whole_prediction(classifier, wav):
    path = wav(seconds=0.8, rate=22050)
    (only,) = classifier.predict_windows(path)
    same(only, classifier.predict(path))


@pytest.mark.parametrize(
    ("window", "hop", "kind", "code"),
    [
        (0.016, 1, ClipLengthError, "too_short"),
        (0, 1, WaveformError, "range"),
        (-1, 1, WaveformError, "range"),
        (1, 0, WaveformError, "range"),
        (1, 1e-9, WaveformError, "range"),
        (math.nan, 1, WaveformError, "range"),
        (1, math.inf, WaveformError, "range"),
        (1e308, 1, WaveformError, "range"),
        (1, 10**400, WaveformError, "range"),
        ("1", 1, WaveformError, "range"),
        (True, 1, WaveformError, "range"),
    ],
)
def test_bad_windows_are_refused_before_anything_is_read(classifier, window, hop, kind, code):
    with pytest.raises(kind) as caught:
        classifier.predict_windows("there is no such file.wav", window, hop)
    assert caught.value.code == code


def test_windows_have_no_duration_cap_and_need_no_memory_for_the_whole(model_path, tmp_path):
    path = tmp_path / "long.flac"
    with soundfile.SoundFile(path, "w", RATE, 1) as stream:
        for _ in range(20):
            stream.write(np.zeros(60 * RATE, np.float32))
    with TFAudioClassifier(model_path, threads=1, max_seconds=30) as short:
        with pytest.raises(AudioDecodeError, match="max_seconds") as caught:
            short.predict(path)
        assert caught.value.code == "too_long"
        answers = short.predict_windows(path, 5.0, 5.0)
        for _ in range(20):
            next(answers)
        before = psutil.Process().memory_info().rss
        count = 20 + sum(1 for _ in answers)
        grown = psutil.Process().memory_info().rss - before
        average = short.predict_average(path, 5.0, 5.0)
        grown_again = psutil.Process().memory_info().rss - before
    assert count == 240
    assert (average.start, average.end) == (0, 1200)
    assert max(grown, grown_again) < 30e6, "1200 s of samples alone are 154 MB"


def test_the_average_is_the_mean_over_the_windows(classifier, wav):
    path = wav(seconds=1.3)
    windows = list(classifier.predict_windows(path, 0.5, 0.25))
    assert [one.end for one in windows] == [0.5, 0.75, 1.0, 1.25, 1.3], "the last window ends with the recording"
    assert np.std([one.probabilities for one in windows], axis=0).max() > 0.01
    average = classifier.predict_average(path, 0.5, 0.25)
    for name in ("probabilities", "embedding"):
        mean = np.mean([getattr(one, name) for one in windows], axis=0, dtype=np.float64)
        np.testing.assert_allclose(getattr(average, name), mean, rtol=1e-6, err_msg="every window counts once")
        assert getattr(average, name).dtype == np.float32
    assert (average.labels, average.start, average.end, average.logits) == (classifier.labels, 0, 1.3, None)
    waveform = load_audio(path, classifier.frontend.spec)
    same(classifier.predict_average(waveform, 0.5, 0.25), average)
    same(classifier.predict_average(path, 5.0, 1.0), classifier.predict(path))
    with pytest.raises(ClipLengthError):
        classifier.predict_average(path, 0.01, 1.0)


def test_an_average_of_nothing_is_an_error():
    with pytest.raises(WaveformError, match="needs at least one"):
        average_predictions([])


def test_embeddings_per_window(classifier, wav):
    path = wav(seconds=1.2)
    found = list(classifier.embed_windows(path, 0.5, 0.25))
    windows = list(classifier.predict_windows(path, 0.5, 0.25))
    assert [(start, end) for start, end, _ in found] == [(one.start, one.end) for one in windows]
    for (start, end, embedding), one in zip(found, windows, strict=True):
        np.testing.assert_array_equal(embedding, one.embedding)
        waveform = load_audio(path, classifier.frontend.spec)[round(start * RATE) : round(end * RATE)]
        np.testing.assert_array_equal(embedding, classifier.embed(waveform))
    with pytest.raises(WaveformError):
        classifier.embed_windows(path, 0.5, 0)


def test_embed(classifier, tmp_path):
    clip = noise(0.3)
    found = classifier.embed(clip)
    assert found.shape == (8,)
    np.testing.assert_array_equal(found, classifier.predict(clip).embedding)
    declared = tiny_card().outputs[0].to_dict()
    proto = tiny_proto()
    del proto.graph.output[1]
    path = tmp_path / "scores.onnx"
    path.write_bytes(with_metadata(proto, {"crossfade.card": tiny_card(outputs=[declared]).to_json()}))
    with TFAudioClassifier(path, threads=1) as scores:
        assert scores.predict(clip).embedding is None
        with pytest.raises(ModelFileError, match="no embedding output; its outputs: logits"):
            scores.embed(clip)
        with pytest.raises(ModelFileError, match="no embedding output"):
            scores.embed_windows(clip)
        assert scores.predict_average(noise(1.0), 0.5, 0.5).embedding is None


def test_a_bare_embedding_model_embeds_and_does_not_predict(classifier, tmp_path):
    card = tiny_card(task="embedding", labels=None, outputs=[tiny_card().outputs[1].to_dict()])
    proto = tiny_proto()
    del proto.graph.output[0]
    path = tmp_path / "embedding.onnx"
    path.write_bytes(with_metadata(proto, {"crossfade.card": card.to_json()}))
    with TFAudioClassifier(path, threads=1) as bare:
        np.testing.assert_allclose(bare.embed(noise(0.3)), classifier.embed(noise(0.3)), atol=1e-5)
        for refused in (bare.predict, bare.predict_windows):
            with pytest.raises(ModelFileError, match="use embed"):
                refused(noise(0.3))
        found = [embedding for _, _, embedding in bare.embed_windows(noise(1.0), 0.5, 0.5)]
        expected = [embedding for _, _, embedding in classifier.embed_windows(noise(1.0), 0.5, 0.5)]
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_an_unlabelled_model_numbers_its_classes(tmp_path):
    with TFAudioClassifier(write_tiny(tmp_path / "bare.onnx", tiny_card(labels=None)), threads=1) as bare:
        assert bare.labels == ("class 0", "class 1", "class 2")
        assert bare.predict(noise(0.1)).labels == bare.labels


def test_a_model_that_hears_nothing_is_refused(tmp_path):
    card = tiny_card(inputs=[{"name": "features", "axes": ["batch", "128", "time"], "source": "encoder"}])
    with pytest.raises(ModelFileError, match="no input of it comes from either"):
        TFAudioClassifier(write_tiny(tmp_path / "e.onnx", card))
    with pytest.raises(ModelFileError, match="expected the path"):
        TFAudioClassifier(tiny_model())


def test_samples_beyond_any_range_are_an_error_not_an_answer(classifier):
    with pytest.raises((ModelFileError, WaveformError)):
        classifier.predict(np.full(RATE, 1e30, np.float32) * noise(1))


def test_an_array_that_cannot_be_read_is_a_typed_error(classifier):
    class Tensor:
        def __array__(self, *arguments, **options):
            raise RuntimeError("requires grad; use detach()")

    for source in (Tensor(), [Tensor()]):
        with pytest.raises(WaveformError, match=r"Tensor.*use detach"):
            classifier.predict(source)


def test_warmup_and_close(model_path):
    built = TFAudioClassifier(model_path, threads=1)
    built.warmup()
    built.warmup(seconds=0.1)
    built.warmup(seconds=np.float32(0.1))
    for seconds in (0, -1, math.nan, 1e308, 10**400, "1", True):
        with pytest.raises(WaveformError, match="seconds: got"):
            built.warmup(seconds=seconds)
    built.close()
    built.close()
    for use in (built.predict, built.embed, built.predict_windows):
        with pytest.raises(ClosedError, match="is closed"):
            use(noise(0.1))
    with pytest.raises(ClosedError):
        built.warmup()


@pytest.mark.parametrize("value", [0, -1, math.nan, "60", True, None])
def test_bad_max_seconds(model_path, value):
    with pytest.raises(WaveformError, match="max_seconds: got"):
        TFAudioClassifier(model_path, max_seconds=value)


def test_pickles_by_path(model_path, monkeypatch):
    monkeypatch.chdir(model_path.parent)
    with TFAudioClassifier(model_path.name, threads=1, max_seconds=7) as built:
        data = pickle.dumps(built)
        expected = built.predict(noise(0.2))
    assert len(data) < 1000
    monkeypatch.chdir("/")
    with pickle.loads(data) as again:
        same(again.predict(noise(0.2)), expected)
        assert again.max_seconds == 7


def test_shipped_models_load_by_name(model_path, monkeypatch, tmp_path):
    (tmp_path / "tiny-one.onnx").write_bytes(model_path.read_bytes())
    monkeypatch.setattr(registry, "_WEIGHTS", tmp_path)
    with TFAudioClassifier("tiny-one", threads=1) as built, pickle.loads(pickle.dumps(built)) as again:
        assert again.paths == built.paths
    with pytest.raises(UnknownNameError, match="did you mean 'tiny-one'"):
        TFAudioClassifier("tiny-won")
    with pytest.raises(ModelFileError, match=r"do not ship.*pt2onnx"):
        TFAudioClassifier("mn10_as")
    with pytest.raises(ModelFileError, match="does not exist"):
        TFAudioClassifier("tiny-one.onnx")
    monkeypatch.chdir(tmp_path)
    Path("tiny-two").mkdir()
    with pytest.raises(ModelFileError, match="is a folder"):
        TFAudioClassifier("tiny-two")


def test_thirty_two_threads_get_the_answers_they_get_alone(classifier):
    clips = [noise(0.05 + 0.013 * seed, seed) for seed in range(16)]
    alone = [classifier.predict(clip) for clip in clips]
    together = threading.Barrier(32)

    def work(worker: int) -> None:
        together.wait()
        for step in range(16):
            index = (worker + step) % len(clips)
            same(classifier.predict(clips[index]), alone[index])

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(work, range(32)))


def in_a_fork(action) -> str:
    """Return what ``action`` returns in a forked child, or how the child died."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            text = action()
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writing, text.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        text = stream.read().decode()
    _, status = os.waitpid(child, 0)
    return text or f"died with status {status}"


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # that is what is tested
def test_a_fork_after_use_is_an_error_not_a_hang(classifier, model_path):
    classifier.predict(noise(0.1))
    inherited = in_a_fork(lambda: str(classifier.predict(noise(0.1)).label))
    assert inherited.startswith(DeviceError.__name__)
    built_anew = in_a_fork(lambda: str(TFAudioClassifier(model_path, threads=1).predict(noise(0.1)).label))
    assert built_anew.startswith(DeviceError.__name__)
    assert "spawn" in built_anew


@pytest.mark.slow
def test_classifiers_travel_to_spawned_workers(classifier, model_path):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(classifier.predict, [noise(0.1)]).label == classifier.predict(noise(0.1)).label


@pytest.mark.slow
def test_memory_stays_flat_over_thousands_of_lengths(classifier):
    rng = np.random.default_rng(0)
    samples = noise(1.0)
    process = psutil.Process()
    for count in range(5000):
        if count == 1000:
            before = process.memory_info().rss
        classifier.predict(samples[: rng.integers(600, len(samples))])
    assert process.memory_info().rss - before <= 20e6


def test_multi_label_scores_are_sigmoids(tmp_path):
    path = write_tiny(tmp_path / "multi.onnx", tiny_card(task="multi_label"), scale=3.0)
    with TFAudioClassifier(path, threads=1) as multi:
        found = multi.predict(noise(0.2))
    np.testing.assert_allclose(found.probabilities, 1 / (1 + np.exp(-found.logits.astype(np.float64))), atol=1e-6)
    again = decode(multi.card, {"logits": found.logits[None], "embedding": found.embedding[None]})
    np.testing.assert_array_equal(again.probabilities, found.probabilities)
