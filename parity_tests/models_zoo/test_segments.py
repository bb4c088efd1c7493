"""Windows and clips, joined."""

from __future__ import annotations

import json

import numpy as np
import pytest

from models_zoo.errors import DataError, WaveformError
from models_zoo.events import FrameGrid
from models_zoo.prediction import Event
from models_zoo.segments import ScoreJoiner, join_events, merge_events, segment_scores

GRID = FrameGrid(16000, 1024)


@pytest.fixture(scope="module")
def golden(contracts):
    folder = contracts / "dcase_crnn"
    return dict(np.load(folder / "golden_decode.npz")) | json.loads((folder / "golden_decode.json").read_text())


@pytest.mark.contracts
def test_published_segments_of_long_recordings(golden):
    clips = {str(name): scores.T for name, scores in zip(golden["lf_keys"], golden["lf_in"], strict=True)}
    found = segment_scores(clips, golden["longform_durations"], GRID)
    assert sorted(found) == ["f1", "f2"]
    for name, scores in found.items():
        expected = golden[f"lf_out_{name}"]
        np.testing.assert_allclose(scores.T, expected[:, 2:], rtol=0, atol=1e-12)
        assert scores.shape[1] == len(expected)


@pytest.mark.contracts
def test_published_merging_of_clips_annotations(golden):
    clips = {name: [Event(row[2], row[0], row[1]) for row in rows] for name, rows in golden["merge_input"].items()}
    for name, events in join_events(clips).items():
        found = sorted((event.onset, event.offset, event.label) for event in events)
        assert found == sorted(tuple(row) for row in golden["merge_output"][name])


@pytest.mark.parametrize("name", ["f1", "f1-100", "f1-a-200", "f1-300-200", "f1--200"])
def test_clips_are_named_after_their_place(name):
    with pytest.raises(DataError, match="recording-onset"):
        join_events({name: []})


def test_clips_lie_in_their_recording():
    scores = np.zeros((1, 156))
    with pytest.raises(DataError, match="'f1' has no duration"):
        segment_scores({"f1-0-1000": scores}, {}, GRID)
    with pytest.raises(DataError, match=r"'f1' is 9\.0 s long"):
        segment_scores({"f1-1000-2000": scores}, {"f1": 9.0}, GRID)


def test_events_that_overlap_or_touch_are_one():
    events = [
        Event("a", 3, 4, 0.9),
        Event("a", 1, 2, 0.5),
        Event("b", 1.5, 3),
        Event("a", 2, 2.5, 0.7),
        Event("a", 0, 0.5),
    ]
    assert merge_events(events) == (
        Event("a", 0, 0.5),
        Event("a", 1, 2.5, 0.7),
        Event("b", 1.5, 3),
        Event("a", 3, 4, 0.9),
    )
    assert merge_events([]) == ()


def test_one_window_is_left_as_it_is():
    scores = np.random.default_rng(0).random((3, 157)).astype(np.float32)
    joiner = ScoreJoiner()
    joiner.add(0, scores)
    found = np.concatenate([joiner.release(50), joiner.release(50), joiner.release(1000)], axis=1)
    np.testing.assert_array_equal(found, scores)


def test_windows_are_cross_faded():
    """Two windows of ten frames, five apart: the first fades out as the second fades in."""
    joiner = ScoreJoiner()
    joiner.add(0, np.zeros((1, 10), np.float32))
    first = joiner.release(5)
    joiner.add(5, np.ones((1, 10), np.float32))
    overlap, rest = joiner.release(10), joiner.release(15)
    np.testing.assert_array_equal(first, np.zeros((1, 5)))
    np.testing.assert_allclose(overlap[0], np.arange(1, 6) / 6, atol=1e-6)
    np.testing.assert_array_equal(rest, np.ones((1, 5)))


def test_released_frames_stay_as_they_are():
    joiner = ScoreJoiner()
    joiner.add(0, np.zeros((1, 6), np.float32))
    joiner.release(4)
    joiner.add(2, np.ones((1, 6), np.float32))  # frames 2 to 7; 2 and 3 are gone
    found = joiner.release(8)
    # In frame 4 the first window weighs 2 and the second 3, in frame 5 it is 1 and 3.
    np.testing.assert_allclose(found, [[3 / 5, 3 / 4, 1, 1]], atol=1e-6)


def test_windows_leave_no_gap():
    joiner = ScoreJoiner()
    joiner.add(0, np.zeros((1, 4), np.float32))
    joiner.add(5, np.zeros((1, 4), np.float32))
    with pytest.raises(WaveformError, match="frame 4 lies in no window"):
        joiner.release(9)
