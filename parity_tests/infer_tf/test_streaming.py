"""Events in clips, long recordings and streams: one answer, however the audio arrives."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from infer_tf import TFAudioClassifier
from models_zoo.errors import CardError, ClipLengthError, ClosedError, ModelFileError, UnknownNameError, WaveformError
from models_zoo.events import EventOptions, FrameGrid, decode_events, encode_events
from parity_tests.infer_tf.tiny import EVENT_LABELS, event_card, write_events

RATE = 16000
GRID = FrameGrid(RATE, 1024)
OPTIONS = EventOptions(
    thresholds={"hum": 0.7, "tick": 0.9},
    median_filters={"hum": 7 * 0.064, "whistle": 3 * 0.064},
    min_duration={"tick": 0.2},
    merge_gap={"tick": 0.13, "whistle": 0.07},
)


def scene(seconds: float, seed: int = 0, rate: int = RATE) -> NDArray[np.float32]:
    """Return ``(num_samples,)`` float32 of tones that come and go in noise."""
    rng = np.random.default_rng(seed)
    num_samples = round(seconds * rate)
    stretches = -(-num_samples // (rate // 2))
    pitch = np.repeat(rng.uniform(200, 4000, stretches), rate // 2)[:num_samples]
    level = np.repeat(rng.random(stretches) > 0.5, rate // 2)[:num_samples]
    tones = 0.3 * level * np.sin(2 * np.pi * np.cumsum(pitch) / rate)
    return np.asarray(tones + 0.01 * rng.standard_normal(num_samples), np.float32)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_events(tmp_path_factory.mktemp("events") / "events.onnx")


@pytest.fixture(scope="module")
def events(path: Path) -> Iterator[TFAudioClassifier]:
    with TFAudioClassifier(path, threads=1) as built:
        yield built


def by_hand(classifier, waveform, window, hop, options):
    """Return the events of a recording from its windows, cross-faded in the plainest way."""
    starts = list(range(0, max(1, len(waveform) - window + 1), hop))
    last = (len(waveform) - window) // 1024 * 1024
    if last > starts[-1]:
        starts.append(last)
    frames = -(-len(waveform) // 1024)
    sums, weights = np.zeros((len(EVENT_LABELS), frames + 9)), np.zeros(frames + 9)
    for number, start in enumerate(starts):
        scores = classifier.predict(waveform[start : start + window]).frame_probabilities
        first = start // 1024
        # What an earlier window's successor could no longer change is final.
        final = 0 if number == 0 else min(starts[number - 1] + hop, number * hop) // 1024
        for frame in range(scores.shape[1]):
            if first + frame >= final:
                weight = min(frame + 1, scores.shape[1] - frame)
                sums[:, first + frame] += weight * scores[:, frame].astype(np.float64)
                weights[first + frame] += weight
    count = min(frames, int(np.flatnonzero(weights)[-1]) + 1)
    joined = (sums[:, :count] / weights[:count]).astype(np.float32)
    found = decode_events(joined, classifier.labels, GRID, options, end=len(waveform) / RATE)
    return sorted(found, key=str)


@pytest.mark.parametrize("seconds", [3.0, 3.99, 4.0, 4.01, 5.0, 9.3, 23.456])
def test_joined_windows_are_the_plain_mean_of_their_frames(events, seconds):
    waveform = scene(seconds, seed=round(seconds))
    expected = by_hand(events, waveform, 4 * RATE, 15 * 1024, OPTIONS)
    found = list(events.detect(waveform, window=4.0, hop=1.0, events=OPTIONS))
    assert sorted(found, key=str) == expected
    assert len(found) > seconds


@pytest.mark.parametrize("seconds", [0.3, 2.5, 3.9999, 4.0])
def test_a_recording_within_one_window_is_a_clip(events, seconds):
    waveform = scene(seconds, seed=3)
    found = sorted(events.detect(waveform, window=4.0, hop=1.0, events=OPTIONS), key=str)
    clip = events.predict(waveform, events=OPTIONS)
    assert found == sorted(clip.events, key=str)
    assert clip.events == tuple(sorted(clip.events, key=lambda event: event.onset))
    assert clip.events


def chunks(samples: NDArray[np.float32], largest: int, seed: int = 0) -> Iterator[NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    first = 0
    while first < samples.shape[-1]:
        size = int(rng.integers(0, largest + 1))
        yield samples[..., first : first + size]
        first += size


@pytest.mark.parametrize("largest", [300, 20000, 200000])
def test_chunks_of_any_size_give_the_events_of_the_recording(events, largest):
    waveform = scene(31.7, seed=largest)[: 31 * RATE + largest // 3]
    offline = list(events.detect(waveform, window=4.0, hop=2.0, events=OPTIONS))
    with events.stream(window=4.0, hop=2.0, events=OPTIONS) as stream:
        found = [event for chunk in chunks(waveform, largest) for event in stream.feed(chunk)]
        early = len(found)
        found += stream.close()
    assert found == offline
    assert early > len(found) // 2


def test_chunks_at_another_rate_in_stereo_give_the_events_of_the_file(events, tmp_path):
    stereo = np.stack([scene(13.3, 1, 44100), scene(13.3, 2, 44100)])
    written = (stereo * 32767).astype(np.int16)
    soundfile.write(tmp_path / "stereo.wav", written.T, 44100)
    offline = list(events.detect(tmp_path / "stereo.wav", window=4.0, hop=2.0))
    as_array = list(events.detect(written, window=4.0, hop=2.0, sample_rate=44100, channels_first=True))
    stream = events.stream(window=4.0, hop=2.0, sample_rate=44100, channels_first=True)
    found = [event for chunk in chunks(written, 7000) for event in stream.feed(chunk, sample_rate=44100)]
    assert found + stream.close() == offline == as_array
    assert len(offline) > 10


def test_windows_share_out_the_events_of_the_recording(events):
    for seconds in (3.0, 12.0, 13.7):
        waveform = scene(seconds, seed=5)
        windows = list(events.predict_windows(waveform, window=4.0, hop=1.024, events=OPTIONS))
        assert [event for one in windows for event in one.events] == list(
            events.detect(waveform, window=4.0, hop=1.024, events=OPTIONS)
        )
        assert 0 <= seconds - windows[-1].end < 0.064
        assert all(one.start % 0.064 == pytest.approx(0, abs=1e-9) or one.start * RATE % 1024 == 0 for one in windows)


def test_an_event_that_crosses_seams_is_one(events):
    """A steady sound over several windows: one event per window where they are not joined."""
    waveform = np.tile(scene(0.5, seed=2), 40)
    options = EventOptions(thresholds=0.5, merge_gap=0.5, min_duration=1.0)
    joined = [event for event in events.detect(waveform, window=4.0, hop=2.0, events=options) if event.label == "tick"]
    apart = [
        event
        for first in range(0, len(waveform), 4 * RATE)
        for event in events.predict(waveform[first : first + 4 * RATE], events=options).events
        if event.label == "tick"
    ]
    assert len(joined) == 1 < len(apart)
    assert joined[0].offset - joined[0].onset > 18


def test_events_at_the_end_are_encoded_back_to_their_frames(events):
    for num_samples in (160000, 159744, 160000 + 800, 1024 * 40 + 1000):
        waveform = scene(11)[:num_samples]
        clip = events.predict(waveform, events=EventOptions(thresholds=0.2))
        frames = clip.frame_probabilities.shape[1]
        active = (clip.frame_probabilities > 0.2).astype(np.float32)
        once = [type(event)(event.label, event.onset, event.offset) for event in clip.events]
        np.testing.assert_array_equal(encode_events(once, events.labels, GRID, frames), active)
        assert max(event.offset for event in clip.events) <= num_samples / RATE
        assert active[:, -1].any()


def test_frames_of_padding_hold_no_events(tmp_path):
    policy = {"min": 32000, "short": "zero"}
    with TFAudioClassifier(write_events(tmp_path / "padded.onnx", event_card(length_policy=policy))) as padded:
        clip = padded.predict(scene(0.7), events=EventOptions(thresholds=0.0))
        assert clip.frame_times[-1] > 1.8
        assert {(event.onset, event.offset) for event in clip.events} == {(0.0, 0.7)}
        found = list(padded.detect(scene(0.7), window=4.0, hop=2.0, events=EventOptions(thresholds=0.0)))
        assert found == list(clip.events)


def test_a_cropped_clip_says_how_much_of_it_was_heard(tmp_path):
    policy = {"min": 2 * RATE, "max": 2 * RATE, "short": "zero", "long": "crop"}
    with TFAudioClassifier(write_events(tmp_path / "cropped.onnx", event_card(length_policy=policy))) as cropped:
        answers = cropped.predict([scene(3.0), scene(1.5), scene(2.0)])
        assert [answer.end for answer in answers] == [2.0, 1.5, 2.0]
        assert max(event.offset for event in answers[0].events) <= 2.0


def test_the_axis_named_frames_is_time(events, tmp_path):
    card = event_card(turned=False, outputs=[
        {"name": "strong", "role": "frame", "kind": "probability", "axes": ["batch", "frames", "4"], "hop": 4},
        {"name": "weak", "role": "clip", "kind": "probability", "axes": ["batch", "4"]},
    ])  # fmt: skip
    with TFAudioClassifier(write_events(tmp_path / "upright.onnx", card)) as upright:
        waveform = scene(6)
        assert upright.predict(waveform).events == events.predict(waveform).events
        assert list(upright.detect(waveform, 4.0, 2.0)) == list(events.detect(waveform, 4.0, 2.0))


def test_what_the_card_states_holds_unless_the_caller_says_otherwise(events, tmp_path):
    card = event_card(thresholds={"hum": 0.95}, median_filters={"tick": 0.448})
    waveform = scene(8)
    with TFAudioClassifier(write_events(tmp_path / "stated.onnx", card)) as stated:
        explicit = EventOptions(thresholds={"hum": 0.95}, median_filters={"tick": 0.448})
        assert stated.predict(waveform).events == events.predict(waveform, events=explicit).events
        assert stated.predict(waveform).events != events.predict(waveform).events
        plain = EventOptions(thresholds=0.5, median_filters=0.0)
        assert stated.predict(waveform, events=plain).events == events.predict(waveform).events
        assert list(stated.detect(waveform, 4.0, 2.0)) == list(events.detect(waveform, 4.0, 2.0, events=explicit))


def test_a_batch_never_changes_events(events):
    clips = [scene(seconds, seed) for seed, seconds in enumerate((2.0, 3.0, 2.0, 5.0))]
    together = events.predict(clips, events=OPTIONS)
    assert [one.events for one in together] == [events.predict(clip, events=OPTIONS).events for clip in clips]


def test_a_hop_is_rounded_down_to_whole_frames(events):
    stream = events.stream(window=10.0, hop=5.0, events=EventOptions(median_filters=7 * 0.064, merge_gap=0.2))
    assert (stream.window, stream.hop) == (10.0, 4.992)
    assert stream.latency == pytest.approx(10.0 + 3 * 0.064 + 3 * 0.064)
    assert events.stream(window=10.0, hop=0.07).hop == 0.064


def test_events_are_reported_within_the_latency(events):
    waveform = scene(30, seed=9)
    stream = events.stream(window=2.0, hop=0.5, events=OPTIONS)
    block = RATE // 100
    for first in range(0, len(waveform), block):
        for event in stream.feed(waveform[first : first + block]):
            assert (first + block) / RATE - event.offset <= stream.latency + block / RATE


@pytest.mark.parametrize(("window", "hop"), [(4.0, 4.1), (4.0, 0.05)])
def test_windows_leave_no_gaps(events, window, hop):
    with pytest.raises(WaveformError, match="leave no gaps"):
        events.detect(scene(5), window, hop)


def test_windows_the_model_does_not_take(events, tmp_path):
    with pytest.raises(ClipLengthError, match="needs at least"):
        events.detect(scene(5), 0.01, 0.01)
    fixed = event_card(length_policy={"min": 160000, "max": 160000})
    with TFAudioClassifier(write_events(tmp_path / "fixed.onnx", fixed)) as strict:
        waveform = scene(17)
        assert list(strict.detect(waveform)) == list(events.detect(waveform))
        with pytest.raises(ClipLengthError, match="needs at most"):
            strict.stream(window=10.1)
        with pytest.raises(ClipLengthError, match="needs at least"):
            list(strict.detect(waveform[:150000]))


def test_a_model_that_scores_fewer_frames_than_it_says(tmp_path):
    card = event_card()
    wrong = card.replace(outputs=(card.outputs[0].replace(hop=2), card.outputs[1]))
    model = TFAudioClassifier(write_events(tmp_path / "wrong.onnx", wrong))
    with model, pytest.raises(ModelFileError, match="fewer than lie in a hop"):
        list(model.detect(scene(9), 4.0, 4.0))


def test_chunks_of_nothing_are_fine(events):
    stream = events.stream(window=4.0, hop=2.0)
    assert stream.feed(np.zeros(0, np.float32)) == stream.feed([]) == []
    waveform = scene(9)
    found = [*stream.feed(waveform), *stream.feed(waveform[:0]), *stream.close()]
    assert found == list(events.detect(waveform, 4.0, 2.0))
    assert events.stream().close() == []


@pytest.mark.parametrize("sample_rate", [None, 8000])
def test_refused_chunks_change_nothing(events, sample_rate):
    waveform = scene(13, rate=sample_rate or RATE)
    stream = events.stream(window=4.0, hop=2.0, sample_rate=sample_rate)
    bad = [
        (np.full(5, np.nan), "non_finite"),
        (np.array([0.0, np.inf], np.float32), "non_finite"),
        (np.array(["a"]), "dtype"),
        (np.zeros((2, 100), np.float32), "rank"),
        (np.zeros((2, 0), np.float32), "rank"),
        (np.float32(0.5), "rank"),
        (np.full(5, 1e38, np.float32), "range"),
    ]
    found = []
    for number, chunk in enumerate(np.array_split(waveform, 40)):
        wrong, code = bad[number % len(bad)]
        with pytest.raises(WaveformError) as caught:
            stream.feed(wrong)
        assert caught.value.code == code
        with pytest.raises(WaveformError, match="another stream") as caught:
            stream.feed(chunk, sample_rate=44100)
        assert caught.value.code == "sample_rate"
        found += stream.feed(chunk)
    assert found + stream.close() == list(events.detect(waveform, 4.0, 2.0, sample_rate=sample_rate))


def test_a_window_the_model_failed_on_is_scored_again(path, monkeypatch):
    waveform = scene(16)
    with TFAudioClassifier(path) as classifier:
        expected = list(classifier.detect(waveform, 4.0, 2.0))
        stream = classifier.stream(4.0, 2.0)
        run, calls = stream._windows._run, iter(range(1000))

        def fails_once(segments):
            if next(calls) == 2:
                raise ModelFileError("out of memory")
            return run(segments)

        monkeypatch.setattr(stream._windows, "_run", fails_once)
        with pytest.raises(ModelFileError, match="out of memory"):
            stream.feed(waveform[: 12 * RATE])
        assert stream.feed(waveform[12 * RATE :]) + stream.close() == expected


def test_a_closed_stream_is_closed(events, path):
    stream = events.stream(4.0, 2.0)
    stream.feed(scene(5))
    assert stream.close()
    assert stream.close() == []
    with pytest.raises(ClosedError, match="start another one"):
        stream.feed(scene(1))
    with events.stream() as abandoned:
        abandoned.feed(scene(1))
    with pytest.raises(ClosedError):
        abandoned.feed(scene(1))
    with TFAudioClassifier(path) as classifier:
        orphan = classifier.stream(1.0, 0.5)
    with pytest.raises(ClosedError):
        orphan.feed(scene(2))
    with pytest.raises(ClosedError):
        classifier.stream()


def test_streams_of_one_classifier_are_independent(events):
    one, other = scene(9, 1), scene(9, 2)
    streams = events.stream(4.0, 2.0), events.stream(4.0, 2.0)
    found: tuple[list, list] = [], []
    for first in range(0, len(one), 5000):
        found[0].extend(streams[0].feed(one[first : first + 5000]))
        found[1].extend(streams[1].feed(other[first : first + 5000]))
    for waveform, events_found, stream in zip((one, other), found, streams, strict=True):
        assert events_found + stream.close() == list(events.detect(waveform, 4.0, 2.0))


def test_a_stream_too_short_for_the_model(events):
    stream = events.stream()
    stream.feed(np.zeros(1000, np.float32))
    with pytest.raises(ClipLengthError, match="needs at least"):
        stream.close()


def test_memory_does_not_grow_with_the_recording(events):
    waveform = scene(10)

    def peak(rounds: int) -> int:
        stream = events.stream(1.0, 0.5)
        tracemalloc.start()
        for _ in range(rounds):
            for chunk in np.split(waveform, 5):
                stream.feed(chunk)
        stream.close()
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    peak(1)
    assert peak(8) < peak(1) + 300_000  # 70 s more are 4.5 MB


def test_other_models(model_path, tmp_path):
    with TFAudioClassifier(model_path) as clips:
        assert clips.predict(np.zeros(32000, np.float32)).events is None
        assert "events" not in clips.predict(np.zeros(32000, np.float32)).to_dict()
        with pytest.raises(CardError, match="found by models for event_detection"):
            clips.predict(np.zeros(32000, np.float32), events=EventOptions())
        with pytest.raises(CardError, match="scores no frames"):
            clips.detect(np.zeros(32000, np.float32))
    # A tagger that scores frames finds events where it is asked to.
    with TFAudioClassifier(write_events(tmp_path / "tagger.onnx", event_card(task="multi_label"))) as tagger:
        waveform = scene(6)
        assert tagger.predict(waveform).events is None
        assert list(tagger.detect(waveform, 4.0, 2.0))


def test_events_in_json(events):
    waveform = scene(3)
    found = events.predict(waveform)
    assert found.to_dict()["events"] == [
        {"label": one.label, "onset": one.onset, "offset": one.offset, "probability": one.probability}
        for one in found.events
    ]
    nothing = events.predict(waveform, events=EventOptions(thresholds=1.0))
    assert (nothing.events, nothing.to_dict()["events"]) == ((), [])


def test_options_for_labels_that_are_not_there(events):
    options = EventOptions(min_duration={"hums": 1.0})
    for use in (events.predict, events.predict_windows, events.detect):
        with pytest.raises(UnknownNameError, match="min_duration 'hums'; did you mean 'hum'"):
            use(scene(3), events=options)
    with pytest.raises(UnknownNameError, match="hums"):
        events.stream(events=options)
