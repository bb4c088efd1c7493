"""Metrics of events: the published values, and what they mean in cases one can check by hand."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models_zoo import sed_metrics
from models_zoo.dataset import Dataset, Record
from models_zoo.errors import DataError, MissingDependencyError
from models_zoo.events import EventOptions, FrameGrid
from models_zoo.sed_metrics import (
    METRICS,
    Answer,
    SceneScores,
    clip_f1,
    detection_metrics,
    has_sed_extra,
    intersection_f1,
)


@pytest.fixture(scope="module")
def golden(contracts: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    folder = contracts / "dcase_crnn"
    with np.load(folder / "golden_decode.npz") as arrays:
        return json.loads((folder / "golden_decode.json").read_text()), dict(arrays)


def truth_of(golden: dict[str, Any]) -> dict[str, list[tuple[str, float, float]]]:
    return {
        name: [(label, onset, offset) for onset, offset, label in events]
        for name, events in golden["ground_truth"].items()
    }


@pytest.mark.contracts
def test_intersection_f1_without_the_library_is_the_published_value(
    golden: tuple[dict[str, Any], dict[str, np.ndarray]],
) -> None:
    stated = golden[0]
    detected = {name: [tuple(event) for event in events] for name, events in stated["events_at_0_5"].items()}
    value = intersection_f1(truth_of(stated), detected)
    assert value == pytest.approx(stated["metrics"]["intersection_f1"], abs=1e-12)


@pytest.mark.contracts
@pytest.mark.sed
def test_the_published_values(golden: tuple[dict[str, Any], dict[str, np.ndarray]]) -> None:
    stated, arrays = golden
    scores = {name: arrays["filtered"][index] for index, name in enumerate(stated["scores_key_order"])}
    values = detection_metrics(scores, arrays["timestamps"], stated["labels"], truth_of(stated), stated["durations"])
    assert tuple(values) == METRICS
    expected = stated["metrics"]
    names = {
        "psds1": "psds1",
        "psds2": "psds2",
        "collar_f1": "collar_f1",
        "intersection_f1": "intersection_f1",
        "segment_best_f1": "segment_bestf1",
        "segment_auc": "mauc",
        "segment_pauc": "mpauc",
    }
    for ours, theirs in names.items():
        assert values[ours] == pytest.approx(expected[theirs], abs=1e-9), ours
    assert values["segment_f1"] == pytest.approx(expected["sed_eval_segment"][0], abs=1e-9)


def test_intersection_f1_by_hand() -> None:
    truth = {"a": [("dog", 0.0, 2.0), ("dog", 4.0, 6.0)], "b": [("cat", 0.0, 1.0)], "c": []}
    right = {"a": [("dog", 0.0, 1.0), ("dog", 4.0, 6.0)], "b": [("cat", 0.5, 1.5)], "c": []}
    assert intersection_f1(truth, truth) == 1
    assert intersection_f1(truth, right) == 1  # halves are enough
    assert intersection_f1(truth, {**right, "a": [("dog", 0.0, 0.9), ("dog", 4, 6)]}) == pytest.approx((2 / 3 + 1) / 2)
    # Less than half of the detection is an event: it does not count, and what it covers is not found.
    assert intersection_f1(truth, {**right, "b": [("cat", 0.4, 1.7)]}) == pytest.approx((1 + 0) / 2)
    assert intersection_f1(truth, {**right, "c": [("cat", 3, 4)]}) == pytest.approx((1 + 2 / 3) / 2)
    # A class that nobody annotated has no say.
    assert intersection_f1(truth, {**right, "c": [("bird", 3, 4)]}) == 1
    assert np.isnan(intersection_f1({"a": []}, {"a": []}))


@pytest.mark.sed
def test_intersection_f1_is_the_librarys_on_random_events() -> None:
    rng = np.random.default_rng(0)
    labels, times = ("x", "y", "z"), np.arange(101) * 0.1
    scores = {f"f{i}": np.repeat((rng.random((10, 3)) > 0.5).astype(float), 10, axis=0) for i in range(6)}
    truth, found = {}, {}
    for name, one in scores.items():
        edges = {label: np.flatnonzero(np.diff(one[:, i], prepend=0, append=0)) * 0.1 for i, label in enumerate(labels)}
        found[name] = [(label, a, b) for label, e in edges.items() for a, b in zip(e[::2], e[1::2], strict=True)]
        begins = rng.uniform(0, 8, 3)
        truth[name] = [(label, begin, begin + rng.uniform(0.3, 2)) for label, begin in zip(labels, begins, strict=True)]
    values = detection_metrics(scores, times, labels, truth, dict.fromkeys(scores, 10.0))
    assert intersection_f1(truth, found) == pytest.approx(values["intersection_f1"], abs=1e-9)
    assert 0 < values["intersection_f1"] < 1


def test_clip_f1_by_hand() -> None:
    targets = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0]])
    scores = np.array([[0.9, 0.1, 0.7], [0.2, 0.6, 0.1], [0.6, 0.7, 0.1]])
    # Class 0: one of two found, one false alarm; class 1 right; class 2 never occurs.
    assert clip_f1(targets, scores) == pytest.approx((0.5 + 1) / 2)
    assert clip_f1(targets, scores, threshold=0.95) == 0
    assert clip_f1(targets, scores, threshold=[0.5, 0.65, 0.5]) == pytest.approx((0.5 + 2 / 3) / 2)
    with pytest.raises(DataError, match="num_clips, num_classes"):
        clip_f1(targets, scores[:2])


GRID = FrameGrid(sample_rate=1000, hop=100)

ROWS = (
    Record(Path("a.wav"), ("cat",), onset=0.2, offset=0.6, part="strong"),
    Record(Path("a.wav"), ("dog",), onset=0.6, offset=0.8, part="strong", confidence=0.4),
    Record(Path("b.wav"), ("dog",), onset=0.3, offset=2.0, part="strong"),
    Record(Path("b.wav"), ("cat",), onset=0.5, offset=0.9, part="strong"),  # behind what is heard
    Record(Path("c.wav"), ("cat", "dog"), part="weak"),
    Record(Path("d.wav"), (), part="unlabelled", absent=()),
)


def scene_scores(*, found: float = 0.9) -> SceneScores:
    """Of four clips of 1 s, of which b was heard for half a second; the answers are the truth and a frame beyond."""
    strong = {name: np.full((2, 11), 0.1, np.float32) for name in "abcd"}
    strong["a"][0, 2:6] = strong["b"][1, 3:] = found
    weak = {"a": (found, 0.1), "b": (0.1, found), "c": (found, found), "d": (found, found)}
    answers = {
        f"{name}.wav": Answer(strong[name], np.array(weak[name], np.float32), 0.5 if name == "b" else 1.0)
        for name in "abcd"
    }
    return SceneScores.of(Dataset(ROWS, ("cat", "dog"), Path()), answers, ("cat", "dog"), GRID)


def test_scenes_are_scored_by_what_is_known_of_them() -> None:
    scores = scene_scores()
    assert scores.truth == {"a.wav": (("cat", 0.2, 0.6),), "b.wav": (("dog", 0.3, 0.5),)}
    assert {name: one.shape[1] for name, one in scores.strong.items()} == {"a.wav": 10, "b.wav": 5}
    np.testing.assert_array_equal(scores.targets, [[1, 0], [0, 1], [1, 1]])  # half sure is no event
    assert scores.selection(EventOptions()) == {"weak_f1": 1, "intersection_f1": 1}
    rows = scores.per_class(EventOptions(thresholds={"cat": 0.95}))
    assert rows == {
        "cat": {"clips": 2, "clip_f1": 0, "events": 1, "found": 0, "event_f1": 0},
        "dog": {"clips": 2, "clip_f1": 1, "events": 1, "found": 1, "event_f1": 1},
    }
    with pytest.raises(DataError, match="got no answer"):
        SceneScores.of(Dataset(ROWS, ("cat", "dog"), Path()), {}, ("cat", "dog"), GRID)


@pytest.mark.sed
def test_scenes_of_unequal_lengths_have_the_published_figures() -> None:
    values = scene_scores().metrics(EventOptions())
    assert set(values) == {"weak_f1", *METRICS}
    assert values["collar_f1"] == values["intersection_f1"] == values["segment_f1"] == 1
    assert values["psds2"] == pytest.approx(1)
    some = scene_scores().metrics(EventOptions(thresholds={"cat": 0.95}))
    assert some["collar_f1"] == some["intersection_f1"] == 0.5


def test_files_must_be_the_same() -> None:
    with pytest.raises(DataError, match="different files"):
        intersection_f1({"a": []}, {"b": []})


@pytest.mark.sed
def test_one_class_alone_is_measured() -> None:
    scores, times = {"a": np.repeat([[0.1], [0.9], [0.2]], 10, axis=0)}, np.arange(31) * 0.1
    values = detection_metrics(scores, times, ["dog"], {"a": [("dog", 1.0, 2.0)]}, {"a": 3.0})
    assert values["psds1"] == pytest.approx(1)
    assert values["psds2"] == pytest.approx(1)


@pytest.mark.sed
def test_what_does_not_fit_is_refused() -> None:
    times = np.arange(5.0)
    with pytest.raises(DataError, match="events of cow"):
        detection_metrics({"a": np.zeros((4, 1))}, times, ["dog"], {"a": [("cow", 0, 1)]}, {"a": 4})
    with pytest.raises(DataError, match="no event"):
        detection_metrics({"a": np.zeros((4, 1))}, times, ["dog"], {"a": []}, {"a": 4})
    with pytest.raises(DataError, match="different files"):
        detection_metrics({"a": np.zeros((4, 1))}, times, ["dog"], {"b": [("dog", 0, 1)]}, {"a": 4})


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "sed_scores_eval":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return plain(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    assert not has_sed_extra()
    with pytest.raises(MissingDependencyError, match=r"crossfade\[sed\]"):
        detection_metrics({}, [], [], {}, {})


@pytest.mark.sed
def test_a_pandas_that_fails_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import pandas

    monkeypatch.setattr(pandas, "__version__", "3.0.1")
    assert not has_sed_extra()
    with pytest.raises(MissingDependencyError, match="pandas below 3"):
        sed_metrics.detection_metrics({}, [], [], {}, {})
