"""How good timed events are: the metrics of sound event detection.

:func:`intersection_f1` and :func:`clip_f1` choose the best epoch of a training run and need NumPy alone.
:func:`detection_metrics` gives the published figures (PSDS1, PSDS2, collar, intersection and segment F1, mean partial
AUC) through ``sed_scores_eval``, which the extra ``sed`` installs. :class:`SceneScores` has both of what any path, in
training or in production, answered to clips.

A class without an event in the annotations is left out of every mean: nobody can be right about it. A class that has
events of which none is found has F1 0, as in ``sed_scores_eval``; ``psds_eval`` leaves it out of its macro average.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from models_zoo.dataset import Dataset
from models_zoo.errors import DataError, MissingDependencyError
from models_zoo.events import EventOptions, FrameGrid, decode_events, filter_scores

__all__ = [
    "METRICS",
    "WITHOUT_EXTRA",
    "Answer",
    "SceneScores",
    "clip_f1",
    "detection_metrics",
    "has_sed_extra",
    "intersection_f1",
]

Events = Mapping[str, Sequence[tuple[str, float, float]]]
"""File -> (label, onset, offset in seconds) of its events; a file without events has an empty sequence."""

METRICS = (
    "psds1",
    "psds2",
    "collar_f1",
    "intersection_f1",
    "segment_f1",
    "segment_best_f1",
    "segment_auc",
    "segment_pauc",
)
"""What :func:`detection_metrics` returns."""

WITHOUT_EXTRA = "note: PSDS and other metrics of events need the extra sed: pip install 'crossfade[sed]'"
"""What to tell where :func:`has_sed_extra` says no."""

_PSDS: dict[str, dict[str, Any]] = {
    "psds1": {"dtc_threshold": 0.7, "gtc_threshold": 0.7, "cttc_threshold": None, "alpha_ct": 0.0, "alpha_st": 1.0},
    "psds2": {"dtc_threshold": 0.1, "gtc_threshold": 0.1, "cttc_threshold": 0.3, "alpha_ct": 0.5, "alpha_st": 1.0},
}


def has_sed_extra() -> bool:
    """Whether :func:`detection_metrics` can run: ``sed_scores_eval`` is there, with the pandas it works with."""
    try:
        _library()
    except MissingDependencyError:
        return False
    return True


def clip_f1(targets: ArrayLike, scores: ArrayLike, *, threshold: ArrayLike = 0.5) -> float:
    """Return the macro F1 of clip labels: the mean over the classes that occur.

    Args:
        targets: ``(num_clips, num_classes)`` of 0 and 1.
        scores: the same shape; a class is found where its score is above ``threshold``.
        threshold: one number, or one per class.

    Raises:
        DataError: shapes that do not fit.
    """
    return _mean(_clip_f1_of_classes(targets, scores, threshold))


def _clip_f1_of_classes(targets: ArrayLike, scores: ArrayLike, threshold: ArrayLike) -> NDArray[np.float64]:
    """Return ``(num_classes,)`` F1; nan for a class that does not occur."""
    true, answers = np.asarray(targets) > 0, np.asarray(scores)
    if true.ndim != 2 or true.shape != answers.shape:
        raise DataError(f"got targets {true.shape} and scores {answers.shape}; expected (num_clips, num_classes)")
    found = answers > np.asarray(threshold)
    hits, total = (true & found).sum(axis=0), true.sum(axis=0) + found.sum(axis=0)
    return np.where(true.any(axis=0), 2 * hits / np.maximum(total, 1), np.nan)


def intersection_f1(truth: Events, detected: Events, *, dtc: float = 0.5, gtc: float = 0.5) -> float:
    """Return the macro F1 of events that are found where enough of them is covered.

    A detection counts if at least ``dtc`` of it lies in events of its class, and is a false alarm otherwise; an event
    is found if at least ``gtc`` of it is covered by detections that count.

    Args:
        truth: the annotations; events of one class do not overlap.
        detected: of the same files, likewise.
        dtc, gtc: the tolerances, in (0, 1].

    Raises:
        DataError: files that are not in both.

    Source: Bilen et al. 2020, without cross triggers; equal to ``sed_scores_eval``'s intersection-based F1.
    """
    return _mean(np.array(list(_intersection_f1_of_classes(truth, detected, dtc, gtc).values()), np.float64))


def _intersection_f1_of_classes(truth: Events, detected: Events, dtc: float, gtc: float) -> dict[str, float]:
    """Return label -> F1 of the classes that have events."""
    if set(truth) != set(detected):
        strangers = sorted(set(truth) ^ set(detected))
        raise DataError(f"annotations and detections are of different files, e.g. {strangers[0]!r}; give both for each")
    counts: dict[str, list[int]] = {label: [0, 0, 0] for events in truth.values() for label, _, _ in events}
    for name, events in truth.items():
        for label in {event[0] for event in (*events, *detected[name])} & set(counts):
            count = counts[label]
            true, found = (_stretches(side, label) for side in (events, detected[name]))
            common = _common(true, found)
            counted = common.sum(axis=0) >= dtc * (found[:, 1] - found[:, 0])
            covered = common[:, counted].sum(axis=1) >= gtc * (true[:, 1] - true[:, 0])
            count[0] += int(covered.sum())
            count[1] += int((~counted).sum())
            count[2] += len(true)
    return {label: 2 * hits / (hits + false + total) for label, (hits, false, total) in counts.items()}


@dataclass(frozen=True, eq=False)
class Answer:
    """What a model answered to one clip.

    Attributes:
        strong: ``(num_classes, frames)`` float32 probabilities, not smoothed; frames beyond the clip do not count.
        weak: ``(num_classes,)`` float32 probabilities.
        seconds: of the clip that were heard; annotations behind them do not count.
    """

    strong: NDArray[np.float32]
    weak: NDArray[np.float32]
    seconds: float


@dataclass(frozen=True, eq=False)
class SceneScores:
    """What a model answered to clips, beside what is known of them.

    Attributes:
        labels: class names in the model's order.
        grid: of the frame scores.
        strong: file -> ``(num_classes, frames)`` float32, of the clips whose events are known.
        truth: the same files -> their events.
        seconds: the same files -> how long they were heard.
        weak: ``(num_clips, num_classes)`` float32, of all clips whose classes are known.
        targets: the same shape, 1 where a clip has a class.
    """

    labels: tuple[str, ...]
    grid: FrameGrid
    strong: dict[str, NDArray[np.float32]]
    truth: dict[str, tuple[tuple[str, float, float], ...]]
    seconds: dict[str, float]
    weak: NDArray[np.float32]
    targets: NDArray[np.float32]

    @classmethod
    def of(cls, dataset: Dataset, answers: Mapping[str, Answer], labels: Sequence[str], grid: FrameGrid) -> Self:
        """Return the answers beside what the data set knows of the files; unlabelled ones are left out.

        Args:
            dataset: with stretches apart.
            answers: file, as ``dataset.name_of`` says it -> answer; of every labelled file.
            labels: class names in the model's order.
            grid: of the frame scores.

        Raises:
            DataError: a label that is not among ``labels``, or a labelled file without an answer.
        """
        column = {label: number for number, label in enumerate(dataset.with_labels(labels).labels)}
        labelled = [record for record in dataset.records if record.part != "unlabelled"]
        targets = {dataset.name_of(record): np.zeros(len(labels), np.float32) for record in labelled}
        if set(targets) - set(answers):
            raise DataError(f"{min(set(targets) - set(answers))}: got no answer; score every labelled clip")
        for record in labelled:
            name = dataset.name_of(record)
            heard = record.onset is None or record.onset < answers[name].seconds
            if heard and record.confidence > 0.5:
                targets[name][[column[label] for label in record.labels]] = 1
        truth = {name: _heard(events, answers[name].seconds) for name, events in dataset.events().items()}
        return cls(
            tuple(labels),
            grid,
            {name: answers[name].strong[:, : grid.offset_frame(answers[name].seconds)] for name in truth},
            truth,
            {name: answers[name].seconds for name in truth},
            np.stack([answers[name].weak for name in targets]) if targets else np.zeros((0, len(labels)), np.float32),
            np.stack(list(targets.values())) if targets else np.zeros((0, len(labels)), np.float32),
        )

    def selection(self, options: EventOptions) -> dict[str, float]:
        """Return ``weak_f1`` and ``intersection_f1``, by which the best epoch is chosen; nan where nothing is known."""
        thresholds = options.per_class("thresholds", self.labels)
        return {
            "weak_f1": clip_f1(self.targets, self.weak, threshold=thresholds),
            "intersection_f1": intersection_f1(self.truth, self._found(options)),
        }

    def metrics(self, options: EventOptions) -> dict[str, float]:
        """Return :meth:`selection` and, where the extra ``sed`` is installed, the published metrics."""
        values = self.selection(options)
        if not has_sed_extra() or not any(self.truth.values()):
            return values
        times = np.arange(max(scores.shape[1] for scores in self.strong.values()) + 1) * self.grid.seconds
        thresholds = dict(zip(self.labels, options.per_class("thresholds", self.labels), strict=True))
        scores = {name: one.T for name, one in self._smoothed(options).items()}
        return values | detection_metrics(scores, times, self.labels, self.truth, self.seconds, threshold=thresholds)

    def per_class(self, options: EventOptions) -> dict[str, dict[str, float]]:
        """Return label -> ``clips`` that have it, ``clip_f1``, its ``events``, those ``found``, and ``event_f1``.

        ``event_f1`` is the class's part in ``intersection_f1``; nan where a class has no clip or no event.
        """
        found = self._found(options)
        thresholds = options.per_class("thresholds", self.labels)
        of_clips = _clip_f1_of_classes(self.targets, self.weak, thresholds)
        of_events = _intersection_f1_of_classes(self.truth, found, 0.5, 0.5)
        return {
            label: {
                "clips": float(self.targets[:, row].sum()),
                "clip_f1": float(of_clips[row]),
                "events": float(_count(self.truth, label)),
                "found": float(_count(found, label)),
                "event_f1": of_events.get(label, float("nan")),
            }
            for row, label in enumerate(self.labels)
        }

    def _smoothed(self, options: EventOptions) -> dict[str, NDArray[np.float32]]:
        """Return strong file -> scores behind the median filters of ``options``."""
        lengths = options.median_frames(self.labels, self.grid)
        return {name: filter_scores(scores, lengths) for name, scores in self.strong.items()}

    def _found(self, options: EventOptions) -> dict[str, list[tuple[str, float, float]]]:
        """Return strong file -> the events found in it."""
        found = {}
        for name, scores in self.strong.items():
            events = decode_events(scores, self.labels, self.grid, options, end=self.seconds[name])
            found[name] = [(event.label, event.onset, event.offset) for event in events]
        return found


def _heard(events: Sequence[tuple[str, float, float]], seconds: float) -> tuple[tuple[str, float, float], ...]:
    """Return the events of the first ``seconds``, cut off there."""
    cut = ((label, onset, min(offset, seconds)) for label, onset, offset in events)
    return tuple(event for event in cut if event[1] < event[2])


def _count(events: Events, label: str) -> int:
    return sum(event[0] == label for of_file in events.values() for event in of_file)


def detection_metrics(
    scores: Mapping[str, ArrayLike],
    timestamps: ArrayLike,
    labels: Sequence[str],
    truth: Events,
    durations: Mapping[str, float],
    *,
    threshold: float | Mapping[str, float] = 0.5,
) -> dict[str, float]:
    """Return the published figures, see :data:`METRICS`.

    psds1 and psds2 are threshold-independent (DTC and GTC 0.7; 0.1 with cross triggers), clips without events left
    out as published; collar F1 takes 0.2 s at onsets and 0.2 s or a fifth of the event at offsets; intersection F1 has
    DTC and GTC 0.5; segments are of 1 s, partial AUC up to a false-positive rate of 0.1. F1 values are macro averages
    at ``threshold``, ``segment_best_f1`` at the best threshold of each class.

    Args:
        scores: file -> ``(frames, classes)`` probabilities, smoothed as events are decoded.
        timestamps: ``(frames + 1,)`` seconds at which frames begin, and the end of the last; of a file with fewer
            frames the first ones.
        labels: of the classes, in order.
        truth: the annotations of the same files.
        durations: file -> seconds.
        threshold: of an active frame; one number, or label -> number.

    Raises:
        MissingDependencyError: the extra ``sed`` is not installed.
        DataError: files or labels that do not fit, or annotations without any event.
    """
    library, frame = _library()
    strangers = sorted({label for events in truth.values() for label, _, _ in events} - set(labels))
    if strangers:
        raise DataError(f"annotations have events of {', '.join(strangers)}; the model's labels: {', '.join(labels)}")
    if set(scores) != set(truth) or set(scores) - set(durations):
        raise DataError("scores, annotations and durations are of different files; give all three for each")
    kept = [label for label in labels if any(event[0] == label for events in truth.values() for event in events)]
    if not kept:
        raise DataError("the annotations hold no event, so nothing can be found; give clips with events")
    columns = [list(labels).index(label) for label in kept]
    times = np.asarray(timestamps, np.float64)
    tables = {
        name: frame(np.asarray(one, np.float64)[:, columns], times[: len(np.asarray(one)) + 1], kept)
        for name, one in scores.items()
    }
    if isinstance(threshold, Mapping):
        threshold = {label: threshold[label] for label in kept}
    events = {name: [(onset, offset, label) for label, onset, offset in of_file] for name, of_file in truth.items()}
    seconds = {name: float(durations[name]) for name in tables}
    some = {name for name, of_file in events.items() if of_file}
    with np.errstate(invalid="ignore", divide="ignore"):  # where a class is always or never there: nan
        return _measured(library, tables, events, seconds, some, threshold)


def _measured(
    library: Any,
    tables: Mapping[str, Any],
    events: Mapping[str, Any],
    seconds: Mapping[str, float],
    some: set[str],
    threshold: float | dict[str, float],
) -> dict[str, float]:
    """Return the metrics of score tables; PSDS of the files ``some``."""
    values = {}
    alone = len({label for of_file in events.values() for _, _, label in of_file}) == 1
    for name, settings in _PSDS.items():
        if alone:  # one class sets off no other, and the library fails on looking for others
            settings = {**settings, "cttc_threshold": None, "alpha_ct": 0.0}
        values[name] = library.intersection_based.psds(
            scores={key: tables[key] for key in some},
            ground_truth={key: events[key] for key in some},
            audio_durations={key: seconds[key] for key in some},
            max_efpr=100.0,
            **settings,
        )[0]
    values["collar_f1"] = library.collar_based.fscore(
        tables, events, threshold=threshold, onset_collar=0.2, offset_collar=0.2, offset_collar_rate=0.2
    )[0]["macro_average"]
    values["intersection_f1"] = library.intersection_based.fscore(
        tables, events, threshold=threshold, dtc_threshold=0.5, gtc_threshold=0.5
    )[0]["macro_average"]
    segments = {"ground_truth": events, "audio_durations": seconds, "segment_length": 1.0}
    values["segment_f1"] = library.segment_based.fscore(tables, threshold=threshold, **segments)[0]["macro_average"]
    values["segment_best_f1"] = library.segment_based.best_fscore(tables, **segments)[0]["macro_average"]
    values["segment_auc"] = library.segment_based.auroc(tables, **segments)[0]["mean"]
    values["segment_pauc"] = library.segment_based.auroc(tables, max_fpr=0.1, **segments)[0]["mean"]
    return {name: float(values[name]) for name in METRICS}


def _library() -> tuple[Any, Any]:
    """Return ``sed_scores_eval`` and its constructor of score tables."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it imports in turn warns, of pkg_resources first
            import pandas
            import sed_scores_eval
            from sed_scores_eval.base_modules.scores import create_score_dataframe
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"metrics of events need {error.name}, which is not installed; say pip install 'crossfade[sed]' (from a "
            "checkout: pip install -e '.[sed]'; it compiles, so it needs a C compiler)"
        ) from error
    if int(pandas.__version__.partition(".")[0]) >= 3:
        raise MissingDependencyError(
            f"metrics of events need pandas below 3, and {pandas.__version__} is installed: sed_scores_eval fails with "
            "it; say pip install 'pandas<3'"
        )
    return sed_scores_eval, create_score_dataframe


def _stretches(events: Sequence[tuple[str, float, float]], label: str) -> NDArray[np.float64]:
    """Return ``(num_events, 2)`` onsets and offsets of one class."""
    return np.array([event[1:3] for event in events if event[0] == label], np.float64).reshape(-1, 2)


def _common(true: NDArray[np.float64], found: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ``(num_true, num_found)`` seconds in which both sound."""
    ends = np.minimum(true[:, None, 1], found[None, :, 1])
    begins = np.maximum(true[:, None, 0], found[None, :, 0])
    return np.asarray(np.maximum(ends - begins, 0.0), np.float64)


def _mean(values: NDArray[np.float64]) -> float:
    """Return the mean of what is not nan; nan where nothing is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
