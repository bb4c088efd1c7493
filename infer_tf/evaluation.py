"""How well a deployed model does on labelled recordings, from the file."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from infer_tf.classifier import TFAudioClassifier
from models_zoo import metrics
from models_zoo.audio import load_audio
from models_zoo.dataset import Dataset, Record
from models_zoo.ensembles import fit_weights
from models_zoo.errors import DataError, ImageDecodeError, ModelFileError, WaveformError
from models_zoo.events import EventOptions, FrameGrid
from models_zoo.prediction import Prediction
from models_zoo.retrieval import cosine_similarity, retrieval_metrics
from models_zoo.sed_metrics import WITHOUT_EXTRA, Answer, SceneScores, has_sed_extra

__all__ = ["Comparison", "Report", "best_weights", "compare_members", "comparison_lines", "evaluate", "report_lines"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Report:
    """Measures of a model on a set of recordings.

    Attributes:
        labels: the card's class names.
        num_clips: recordings scored.
        measures: name -> value; ``accuracy`` and ``balanced_accuracy`` where every recording has one label. Of a model
            of distributions ``kl_divergence``, and ``kl_divergence_uniform``: what it would be if every answer were
            that all classes are alike. Of one for event detection see
            :meth:`models_zoo.sed_metrics.SceneScores.metrics`.
        per_class: per label its number of recordings (``clips``), ``average_precision``, ``auc`` and, with one label
            per recording, ``recall`` and ``precision``; NaN where a class has none. Of a model of distributions the
            recordings it has a share in, its ``mean_weight``, and the ``mean_answer``. Of one for event detection see
            :meth:`models_zoo.sed_metrics.SceneScores.per_class`.
        confusion: ``(num_classes, num_classes)`` counts, rows the truth, or None with several labels.
        by_clip: (name of a measure that is a mean over recordings, its value for each ``(num_clips,)``), or None.
    """

    labels: tuple[str, ...]
    num_clips: int
    measures: dict[str, float]
    per_class: dict[str, dict[str, float]]
    confusion: NDArray[np.int64] | None
    by_clip: tuple[str, NDArray[np.float64]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data; NaN becomes None."""
        return {
            "num_clips": self.num_clips,
            "measures": {name: _number(value) for name, value in self.measures.items()},
            "per_class": {
                label: {name: _number(value) for name, value in row.items()} for label, row in self.per_class.items()
            },
            "confusion": None if self.confusion is None else self.confusion.tolist(),
        }


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


@dataclass(frozen=True, eq=False)
class Comparison:
    """Several models' mean against each of them, on the same recordings.

    Attributes:
        together: the report of the mean.
        members: path and report of each model, in order.
        best: the member with the best of the measure compared, on these very recordings, which favours it.
        measure: what is compared: ``kl_divergence`` or ``accuracy``.
        difference: (mean, low, high) of the measure, the mean of all minus the best member, with its 95 % interval by
            a paired bootstrap over the recordings.
    """

    together: Report
    members: tuple[tuple[str, Report], ...]
    best: int
    measure: str
    difference: tuple[float, float, float]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {
            "members": [{"model": path, "measures": report.to_dict()["measures"]} for path, report in self.members],
            "best_member": self.members[self.best][0],
            "difference": dict(
                zip(("measure", "mean", "low", "high"), (self.measure, *self.difference), strict=True),
            ),
        }


def compare_members(
    classifier: TFAudioClassifier,
    together: Report,
    dataset: Dataset,
    *,
    device: str = "cpu",
    threads: int | None = None,
) -> Comparison:
    """Return how the mean of several models, already evaluated, does against each of them.

    Args:
        classifier: of several models.
        together: its report on ``dataset``.
        dataset: the same recordings.
        device, threads: for the members, see :class:`TFAudioClassifier`.

    Raises:
        DataError: the recordings have several labels each, which no mean over recordings measures.
        AudioDecodeError, WaveformError: as :func:`evaluate`.
    """
    if together.by_clip is None:
        raise DataError(
            "members are compared by a measure that each recording has a value of, and recordings of several labels "
            "have none; evaluate the models one by one"
        )
    reports = [(os.fspath(path), evaluate(member, dataset)) for path, member in _members(classifier, device, threads)]
    measure, values = together.by_clip
    sign = -1 if measure == "kl_divergence" else 1
    best = max(range(len(reports)), key=lambda i: sign * reports[i][1].measures[measure])
    (_, others) = reports[best][1].by_clip or together.by_clip
    return Comparison(together, tuple(reports), best, measure, metrics.mean_and_interval(values - others))


def best_weights(
    classifier: TFAudioClassifier, dataset: Dataset, *, device: str = "cpu", threads: int | None = None
) -> tuple[float, ...]:
    """Return the weights with which the mean of several models is nearest to the labels of ``dataset``.

    See :func:`models_zoo.ensembles.fit_weights`. Recordings the weights are fitted on say nothing about what they are
    worth: fit on validation recordings, measure on test recordings.

    Args:
        classifier: of several models.
        dataset: recordings of one label each, or with weights of several.
        device, threads: for the members, see :class:`TFAudioClassifier`.

    Raises:
        DataError: the models answer for labels that do not exclude each other, or recordings have several labels
            without weights.
        AudioDecodeError, WaveformError: as :func:`evaluate`.
    """
    if classifier.card.task not in ("single_label", "label_distribution"):
        raise DataError(
            f"weights are fitted to probabilities that sum to one; the task of {classifier.card.name!r} is "
            f"{classifier.card.task}"
        )
    dataset = dataset.with_labels(_matching_labels(classifier, dataset))
    answers = [_scores(member, dataset) for _, member in _members(classifier, device, threads)]
    return fit_weights(np.stack(answers), dataset.distributions())


def _members(
    classifier: TFAudioClassifier, device: str, threads: int | None
) -> Iterator[tuple[Path, TFAudioClassifier]]:
    """Yield each model of a classifier as a classifier of its own, closed when the next one is asked for."""
    for path in classifier.paths:
        with TFAudioClassifier(path, device, threads, max_seconds=classifier.max_seconds) as member:
            yield path, member


def evaluate(classifier: TFAudioClassifier, dataset: Dataset) -> Report:
    """Return the measures of ``classifier`` on labelled recordings.

    Recordings are read from their files as in production; a labelled stretch (onset, offset) is cut out first. Labels
    that the data leaves unknown (column ``absent``) count neither for nor against the model. A progress bar is shown
    on standard error where that is a terminal.

    A model that looks at pictures is given those of the column ``image``, of several the middle one. One that embeds
    sounds and pictures is measured by how well they find each other, in both directions: what is looked for is anything
    with a label in common where every recording has one, else the own other half.

    A model for event detection is scored by what it says of whole files and when: by the events of ``strong`` ones and
    the classes of those and of ``weak`` ones, as far as it hears them.

    Raises:
        DataError: the data has labels the model does not have, or no recordings; or, for a model of distributions,
            recordings of several labels without weights.
        AudioDecodeError, ImageDecodeError, WaveformError: a recording cannot be scored; the message names it.
    """
    if classifier.card.task == "embedding":
        return _retrieval_report(classifier, dataset)
    labels = _matching_labels(classifier, dataset)
    dataset = dataset.with_labels(labels)
    if classifier.card.task == "event_detection":
        return _detection_report(classifier, dataset)
    distributed = classifier.card.task == "label_distribution"
    targets = dataset.distributions() if distributed else dataset.multi_hot().astype(np.int64)
    known = dataset.known()
    scores = _scores(classifier, dataset)
    if distributed:
        return _distribution_report(labels, targets, scores)
    precision = metrics.average_precision(targets, scores, known)
    auc = metrics.roc_auc(targets, scores, known)
    mean_auc = metrics.mean_roc_auc(targets, scores, known)
    measures = {
        "mAP": metrics.mean_average_precision(targets, scores, known),
        "AUC": mean_auc,
        "d_prime": float(metrics.d_prime(mean_auc)),
    }
    per_class = {
        label: {"clips": float(targets[:, i].sum()), "average_precision": float(precision[i]), "auc": float(auc[i])}
        for i, label in enumerate(labels)
    }
    confusion = by_clip = None
    if known is None and (targets.sum(axis=1) == 1).all():
        truth, answers = targets.argmax(axis=1), scores.argmax(axis=1)
        confusion = metrics.confusion_matrix(truth, answers, len(labels))
        by_clip = "accuracy", (truth == answers).astype(np.float64)
        measures = {
            "accuracy": metrics.accuracy(truth, answers),
            "balanced_accuracy": metrics.balanced_accuracy(truth, answers),
            **measures,
        }
        for i, label in enumerate(labels):
            right, asked, answered = confusion[i, i], confusion[i].sum(), confusion[:, i].sum()
            per_class[label]["recall"] = right / asked if asked else float("nan")
            per_class[label]["precision"] = right / answered if answered else float("nan")
    return Report(labels, len(dataset), measures, per_class, confusion, by_clip)


def _retrieval_report(classifier: TFAudioClassifier, dataset: Dataset) -> Report:
    sides: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []
    for record in tqdm(dataset.records, unit="pair", file=sys.stderr, disable=None):
        with _named(record):
            picture = _picture_of(classifier, record)
            sides.append((classifier.embed_audio(_clip(classifier, record)), classifier.embed_image(picture)))
    similarity = cosine_similarity([sound for sound, _ in sides], [picture for _, picture in sides])
    has = dataset.multi_hot().astype(np.int64)
    relevant = has @ has.T > 0 if has.any(axis=1).all() else None
    measures = {
        f"{name}_{measure}": value
        for name, rows in (("audio_to_image", similarity), ("image_to_audio", similarity.T))
        for measure, value in retrieval_metrics(rows, relevant).items()
    }
    measures["chance_at_1"] = 1 / len(sides) if relevant is None else float(relevant.mean())
    return Report(dataset.labels, len(sides), measures, {}, None)


def _detection_report(classifier: TFAudioClassifier, dataset: Dataset) -> Report:
    answers, cut = {}, 0
    files = {record.file: record for record in dataset.records if record.part != "unlabelled"}
    for record in tqdm(files.values(), unit="file", file=sys.stderr, disable=None):
        clip = load_audio(record.file, classifier.frontend.spec, max_seconds=classifier.max_seconds)
        says = _predicted(classifier, record, clip)
        if says.frame_probabilities is None:
            raise DataError(f"{record.file}: is scored in several parts; cut it, or use a model that takes it whole")
        cut += says.end < len(clip) / classifier.sample_rate
        answers[dataset.name_of(record)] = Answer(says.frame_probabilities, says.probabilities, says.end)
    if cut:
        _log.warning(
            "note: model %r takes %g s; of %d longer recordings the rest is not scored",
            classifier.card.name,
            (classifier.card.length_policy.max or 0) / classifier.sample_rate,
            cut,
        )
    scores = SceneScores.of(dataset, answers, classifier.labels, FrameGrid.of(classifier.card))
    if not has_sed_extra():
        _log.warning("%s", WITHOUT_EXTRA)
    options = EventOptions.of(classifier.card)
    return Report(
        classifier.labels, len(scores.targets), scores.metrics(options), scores.per_class(options), confusion=None
    )


def _distribution_report(labels: tuple[str, ...], targets: NDArray[Any], scores: NDArray[np.float32]) -> Report:
    uniform = np.full(targets.shape, 1 / len(labels))
    divergence = metrics.kl_divergence(targets, scores)
    measures = {
        "kl_divergence": float(divergence.mean()),
        "kl_divergence_uniform": float(metrics.kl_divergence(targets, uniform).mean()),
    }
    per_class = {
        label: {
            "clips": float((targets[:, i] > 0).sum()),
            "mean_weight": float(targets[:, i].mean()),
            "mean_answer": float(scores[:, i].mean()),
        }
        for i, label in enumerate(labels)
    }
    return Report(labels, len(targets), measures, per_class, None, ("kl_divergence", divergence))


def _matching_labels(classifier: TFAudioClassifier, dataset: Dataset) -> tuple[str, ...]:
    labels = classifier.labels
    unknown = sorted(set(dataset.labels) - set(labels))
    if unknown:
        unused = sorted(set(labels) - set(dataset.labels))
        raise DataError(
            f"{dataset.root}: labels {_some(unknown)} are not among the {len(labels)} of model "
            f"{classifier.card.name!r}"
            + (f"; labels of the model that the data does not have: {_some(unused)}" if unused else "")
            + "; rename them in the data, or use the model trained on it"
        )
    return labels


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(map(repr, names[:limit])) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _clip(classifier: TFAudioClassifier, record: Record) -> NDArray[np.float32]:
    waveform = load_audio(record.file, classifier.frontend.spec, max_seconds=classifier.max_seconds)
    first = 0 if record.onset is None else round(record.onset * classifier.sample_rate)
    last = len(waveform) if record.offset is None else round(record.offset * classifier.sample_rate)
    if first >= len(waveform):
        raise DataError(f"{record.file}: the labelled stretch begins at {record.onset} s, after the recording's end")
    return waveform[first:last]


def _scores(classifier: TFAudioClassifier, dataset: Dataset) -> NDArray[np.float32]:
    """Return ``(num_clips, num_classes)`` probabilities, showing a bar where standard error is a terminal."""
    records = tqdm(dataset.records, unit="file", file=sys.stderr, disable=None)
    return np.stack([_probabilities(classifier, record) for record in records])


def _probabilities(classifier: TFAudioClassifier, record: Record) -> NDArray[np.float32]:
    hears = any(part.source != "image" for part in classifier.card.inputs)
    return _predicted(classifier, record, _clip(classifier, record) if hears else None).probabilities


def _predicted(classifier: TFAudioClassifier, record: Record, clip: NDArray[np.float32] | None) -> Prediction:
    with _named(record):
        picture = None if classifier.card.image is None else _picture_of(classifier, record)
        return cast(Prediction, classifier.predict(clip, image=picture))


def _picture_of(classifier: TFAudioClassifier, record: Record) -> Path:
    if record.image is None:
        raise DataError(
            f"no picture, which model {classifier.card.name!r} looks at; name it in the column 'image' of metadata.csv"
        )
    return record.image


@contextmanager
def _named(record: Record) -> Iterator[None]:
    """Say in an error which recording it is about."""
    try:
        yield
    except (DataError, ImageDecodeError, ModelFileError, WaveformError) as error:
        if str(record.file) not in str(error):
            error.args = (f"{record.file}: {error}",)
        raise


def report_lines(report: Report) -> Iterator[str]:
    """Yield the lines of a table of ``report`` for people."""
    width = max(18, *map(len, report.measures))
    for name, value in report.measures.items():
        yield f"{name:<{width}} {value:.4f}"
    if not report.per_class:
        return
    columns = ["clips", "recall", "precision", "average_precision", "auc", "mean_weight", "mean_answer"]
    columns += ["clip_f1", "events", "found", "event_f1"]
    columns = [column for column in columns if column in next(iter(report.per_class.values()))]
    width = max(len("class"), *(len(label) for label in report.labels))
    yield ""
    yield "  ".join([f"{'class':<{width}}", *columns])
    for label, row in report.per_class.items():
        cells = [f"{row[name]:.0f}" if name in ("clips", "events", "found") else f"{row[name]:.4f}" for name in columns]
        yield "  ".join([f"{label:<{width}}", *(f"{c:>{len(n)}}" for c, n in zip(cells, columns, strict=True))])


def comparison_lines(comparison: Comparison) -> Iterator[str]:
    """Yield the lines of a table of ``comparison`` for people."""
    names = [*(path for path, _ in comparison.members), f"mean of these {len(comparison.members)}"]
    width = max(map(len, [*names, "model"]))
    yield f"{'model':<{width}}  {comparison.measure}"
    for name, report in zip(names, [*(report for _, report in comparison.members), comparison.together], strict=True):
        yield f"{name:<{width}}  {report.measures[comparison.measure]:>{len(comparison.measure)}.4f}"
    mean, low, high = comparison.difference
    yield ""
    yield (
        f"mean minus best member ({comparison.members[comparison.best][0]}): {mean:+.4f}, "
        f"95 % interval {low:+.4f} to {high:+.4f}"
    )
