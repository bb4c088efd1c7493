"""Events from frame scores and back, against the published decoder and by every rule of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
from scipy.ndimage import median_filter

from models_zoo.errors import CardError, UnknownNameError, WaveformError
from models_zoo.events import EventDecoder, EventOptions, FrameGrid, decode_events, encode_events, filter_scores
from models_zoo.prediction import Event
from parity_tests.infer_tf.tiny import tiny_card

GRID = FrameGrid(16000, 1024)
LABELS = ("a", "b", "c")
SEVEN = 7 * 0.064


@pytest.fixture(scope="module")
def golden(contracts):
    folder = contracts / "dcase_crnn"
    return dict(np.load(folder / "golden_decode.npz")) | json.loads((folder / "golden_decode.json").read_text())


def times(events: Iterator[Event]):
    return [(event.label, event.onset, event.offset) for event in events]


@pytest.mark.contracts
def test_published_median_filters(golden):
    for raw, filtered in zip(golden["raw"], golden["filtered"], strict=True):
        np.testing.assert_array_equal(filter_scores(raw.T, [7, 7, 7]), filtered.T)
    np.testing.assert_array_equal(filter_scores(golden["raw"][0].T, [1, 3, 9]), golden["classwise_1_3_9"].T)


@pytest.mark.contracts
def test_published_events(golden):
    options = EventOptions(thresholds=0.5, median_filters=SEVEN)
    for name, raw in zip(golden["scores_key_order"], golden["raw"], strict=True):
        found = decode_events(np.ascontiguousarray(raw.T), LABELS, GRID, options, end=10.0)
        assert sorted(times(found)) == sorted(tuple(event) for event in golden["events_at_0_5"][name])


@pytest.mark.contracts
def test_published_encoding(golden):
    events = [Event(*event) for event in golden["encode_input"]]
    encoded = encode_events(events, LABELS, GRID, GRID.num_frames(160000))
    np.testing.assert_array_equal(encoded, golden["encoded"].T)
    decoded = decode_events(encoded, LABELS, GRID, end=10.0)
    assert sorted(times(decoded)) == sorted(tuple(event) for event in golden["decode_of_encode"])
    assert {event.probability for event in decoded} == {1.0}
    np.testing.assert_array_equal([GRID.time_of(frame) for frame in range(157)], golden["timestamps"])


@pytest.mark.parametrize("grid", [GRID, FrameGrid(32000, 320), FrameGrid(44100, 441), FrameGrid(22050, 1000)])
def test_times_of_events_are_read_back_as_the_same_frames_for_a_day(grid):
    frames = np.unique(np.geomspace(1, 86400 / grid.seconds, 4000).astype(int)).tolist()
    for frame in frames:
        written = float(f"{grid.time_of(frame):.9f}")
        assert grid.onset_frame(grid.time_of(frame)) == grid.offset_frame(grid.time_of(frame)) == frame
        assert grid.onset_frame(written) == grid.offset_frame(written) == frame
        assert grid.onset_frame(grid.time_of(frame) - 1e-4) == frame - 1
        assert grid.offset_frame(grid.time_of(frame) + 1e-4) == frame + 1


def test_encoding_and_decoding_are_each_others_inverse():
    rng = np.random.default_rng(0)
    for _ in range(20):
        active = (median_filter(rng.random((3, 60)), (1, 5)) > 0.5).astype(np.float32)
        events = decode_events(active, LABELS, GRID, end=60 * 0.064)
        np.testing.assert_array_equal(encode_events(events, LABELS, GRID, 60), active)


def test_an_event_in_a_last_frame_that_reaches_beyond_the_clip_ends_with_the_clip():
    scores = np.ones((1, 5), np.float32)
    (event,) = decode_events(scores, ["a"], GRID, end=0.25)
    assert (event.onset, event.offset) == (0.0, 0.25)
    np.testing.assert_array_equal(encode_events([event], ["a"], GRID, 5), [[1, 1, 1, 1, 0]])


def test_soft_labels_are_the_targets_and_the_higher_one_counts():
    events = [Event("a", 0, 0.128, 0.3), Event("a", 0.064, 0.192, 0.6), Event("a", 0.064, 0.128, 0.1)]
    np.testing.assert_array_equal(encode_events(events, ["a"], GRID, 4), np.float32([[0.3, 0.6, 0.6, 0]]))


@pytest.mark.parametrize("times", [(2.0, 1.0), (-1.0, 1.0), (0.0, np.inf), (np.nan, 1.0)])
def test_impossible_times_are_not_encoded(times):
    with pytest.raises(WaveformError, match="0 <= onset <= offset") as caught:
        encode_events([Event("a", *times)], LABELS, GRID, 156)
    assert caught.value.code == "range"


def test_unknown_labels_are_not_encoded():
    with pytest.raises(UnknownNameError, match="'dogs'; did you mean 'dog'"):
        encode_events([Event("dogs", 0, 1)], ["dog", "cat"], GRID, 156)


def scored(*values):
    return np.array([values], np.float32)


def test_a_score_at_the_threshold_is_not_active():
    scores = scored(0.5, 0.5000001, 0.5)
    assert times(decode_events(scores, ["a"], GRID)) == [("a", 0.064, 0.128)]


def test_an_event_vanishes_at_its_probability():
    scores = scored(0.1, 0.6, 0.8, 0.7, 0.1)
    (event,) = decode_events(scores, ["a"], GRID)
    assert event.probability == pytest.approx(0.8)
    assert decode_events(scores, ["a"], GRID, EventOptions(thresholds=event.probability)) == ()


def test_gaps_are_joined_before_short_events_are_dropped():
    scores = scored(1, 0, 1, 0, 0, 1, 0)
    frame = GRID.seconds

    def found(**options):
        return [
            (round(event.onset / frame), round(event.offset / frame))
            for event in decode_events(scores, ["a"], GRID, EventOptions(**options))
        ]

    assert found() == [(0, 1), (2, 3), (5, 6)]
    assert found(merge_gap=frame) == [(0, 3), (5, 6)]
    assert found(merge_gap=2 * frame - 0.001) == [(0, 3), (5, 6)]
    assert found(merge_gap=2 * frame) == [(0, 6)]
    assert found(merge_gap=frame, min_duration=2 * frame) == [(0, 3)]
    assert found(min_duration=frame) == found()
    assert found(min_duration=frame + 0.001) == []


def test_classes_have_numbers_of_their_own():
    scores = np.tile(scored(0.4, 0.9, 0, 0.9, 0.4), (3, 1))
    options = EventOptions(
        thresholds={"a": 0.3, "b": 0.95},
        merge_gap={"c": 0.064},
        median_filters={"a": 3 * 0.064},
        min_duration={"c": 0.15},
    )
    assert times(decode_events(scores, LABELS, GRID, options)) == [("a", 0.0, 0.32), ("c", 0.064, 0.256)]


@pytest.mark.parametrize(("frames", "expected"), [(0, 1), (0.9, 1), (1, 1), (2, 3), (6.99999999, 7), (7, 7), (7.9, 7)])
def test_filters_are_an_odd_number_of_frames(frames, expected):
    options = EventOptions(median_filters=frames * 0.064)
    assert options.median_frames(["a", "b"], GRID) == [expected, expected]


def test_what_a_caller_leaves_out_is_the_cards():
    card = tiny_card(thresholds={"clap": 0.2, "hum": 0.7}, median_filters={"hum": 0.3})
    labels = card.labels
    stated = EventOptions().over(card)
    assert stated == EventOptions.of(card)
    assert stated.per_class("thresholds", labels) == [0.2, 0.7, 0.5]
    assert stated.per_class("median_filters", labels) == [0, 0.3, 0]
    partly = EventOptions(thresholds={"hum": 0.1}, min_duration=1.0).over(card)
    assert partly.per_class("thresholds", labels) == [0.2, 0.1, 0.5]
    assert partly.per_class("min_duration", labels) == [1, 1, 1]
    assert EventOptions(thresholds=0.9).over(card).per_class("thresholds", labels) == [0.9, 0.9, 0.9]
    assert EventOptions(median_filters=0.0).over(card).per_class("median_filters", labels) == [0, 0, 0]
    assert EventOptions(thresholds={"hum": 0.1}).over(tiny_card()).per_class("thresholds", labels) == [0.5, 0.1, 0.5]


def test_impossible_options():
    with pytest.raises(CardError) as caught:
        EventOptions(thresholds={"a": 1.5})
    assert caught.value.field.startswith("thresholds")
    with pytest.raises(CardError, match="merge_gap"):
        EventOptions(merge_gap=-0.1)
    with pytest.raises(UnknownNameError, match="unknown label in thresholds 'A'; did you mean 'a'"):
        decode_events(np.zeros((1, 3), np.float32), ["a"], GRID, EventOptions(thresholds={"A": 0.5}))


def test_a_grid_needs_frame_scores():
    with pytest.raises(CardError, match="scores no frames"):
        FrameGrid.of(tiny_card())


@pytest.mark.parametrize("seed", range(4))
def test_pieces_of_any_size_give_the_same_events(seed):
    rng = np.random.default_rng(seed)
    smooth = median_filter(rng.random((3, 400)), (1, 5), mode="wrap").astype(np.float32)
    options = EventOptions(
        thresholds={"a": 0.6, "b": 0.45, "c": 0.5},
        median_filters={"a": 5 * 0.064, "b": 21 * 0.064},
        min_duration={"a": 0.2, "c": 0.1},
        merge_gap={"b": 0.5, "c": 0.2},
    )
    whole = decode_events(smooth, LABELS, GRID, options)
    assert len(whole) > 20
    # By the book: smooth everything, threshold, join, drop.
    filtered = filter_scores(smooth, options.median_frames(LABELS, GRID))
    expected = []
    for row, label in enumerate(LABELS):
        runs: list[list[int]] = []
        for frame in np.flatnonzero(filtered[row] > options.per_class("thresholds", LABELS)[row]).tolist():
            gap = options.per_class("merge_gap", LABELS)[row]
            if runs and (frame - runs[-1][1]) * 0.064 <= max(gap, 1e-9):
                runs[-1][1] = frame + 1
            else:
                runs.append([frame, frame + 1])
        least = options.per_class("min_duration", LABELS)[row]
        expected += [
            Event(label, GRID.time_of(a), GRID.time_of(b), float(filtered[row, a:b].max()))
            for a, b in runs
            if (b - a) * 0.064 >= least
        ]
    assert sorted(whole, key=str) == sorted(expected, key=str)
    for largest in (1, 7, 300):
        decoder = EventDecoder(LABELS, GRID, options)
        found, first, late = [], 0, []
        while first < 400:
            piece = int(rng.integers(0, largest + 1))
            events = decoder.push(smooth[:, first : first + piece])
            first = min(first + piece, 400)
            late += [first - GRID.offset_frame(event.offset) for event in events]
            found += events
        assert max(late) <= decoder.delay + largest
        found += decoder.finish()
        assert sorted(found, key=str) == sorted(whole, key=str)


def test_filters_longer_than_the_clip():
    scores = np.random.default_rng(0).random((1, 4)).astype(np.float32)
    options = EventOptions(median_filters=31 * 0.064, thresholds=0.2)
    decoder = EventDecoder(["a"], GRID, options)
    pushed = [event for frame in range(4) for event in decoder.push(scores[:, frame : frame + 1])]
    assert tuple(pushed + decoder.finish()) == decode_events(scores, ["a"], GRID, options) != ()


def test_no_frames_have_no_events():
    assert decode_events(np.zeros((2, 0), np.float32), ["a", "b"], GRID, EventOptions(median_filters=1.0)) == ()
