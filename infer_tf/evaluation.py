"""How well a deployed model does on labelled recordings, from the file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from infer_tf.classifier import TFAudioClassifier
from models_zoo import metrics
from models_zoo.audio import load_audio
from models_zoo.dataset import Dataset, Record
from models_zoo.errors import DataError, ModelFileError, WaveformError

__all__ = ["Report", "evaluate", "report_lines"]


@dataclass(frozen=True, eq=False)
class Report:
    """Measures of a model on a set of recordings.

    Attributes:
        labels: the card's class names.
        num_clips: recordings scored.
        measures: name -> value; ``accuracy`` and ``balanced_accuracy`` where every recording has one label. Of a model
            of distributions ``kl_divergence``, and ``kl_divergence_uniform``: what it would be if every answer were
            that all classes are alike.
        per_class: per label its number of recordings (``clips``), ``average_precision``, ``auc`` and, with one label
            per recording, ``recall`` and ``precision``; NaN where a class has none. Of a model of distributions the
            recordings it has a share in, its ``mean_weight``, and the ``mean_answer``.
        confusion: ``(num_classes, num_classes)`` counts, rows the truth, or None with several labels.
    """

    labels: tuple[str, ...]
    num_clips: int
    measures: dict[str, float]
    per_class: dict[str, dict[str, float]]
    confusion: NDArray[np.int64] | None

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


def evaluate(classifier: TFAudioClassifier, dataset: Dataset) -> Report:
    """Return the measures of ``classifier`` on labelled recordings.

    Recordings are read from their files as in production; a labelled stretch (onset, offset) is cut out first. Labels
    that the data leaves unknown (column ``absent``) count neither for nor against the model. A progress bar is shown
    on standard error where that is a terminal.

    Raises:
        DataError: the data has labels the model does not have, or no recordings; or, for a model of distributions,
            recordings of several labels without weights.
        AudioDecodeError, WaveformError: a recording cannot be scored; the message names it.
    """
    labels = _matching_labels(classifier, dataset)
    dataset = dataset.with_labels(labels)
    distributed = classifier.card.task == "label_distribution"
    targets = dataset.distributions() if distributed else dataset.multi_hot().astype(np.int64)
    known = dataset.known()
    scores = np.stack(
        [
            _probabilities(classifier, record)
            for record in tqdm(dataset.records, unit="file", file=sys.stderr, disable=None)
        ]
    )
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
    confusion = None
    if known is None and (targets.sum(axis=1) == 1).all():
        truth, answers = targets.argmax(axis=1), scores.argmax(axis=1)
        confusion = metrics.confusion_matrix(truth, answers, len(labels))
        measures = {
            "accuracy": metrics.accuracy(truth, answers),
            "balanced_accuracy": metrics.balanced_accuracy(truth, answers),
            **measures,
        }
        for i, label in enumerate(labels):
            right, asked, answered = confusion[i, i], confusion[i].sum(), confusion[:, i].sum()
            per_class[label]["recall"] = right / asked if asked else float("nan")
            per_class[label]["precision"] = right / answered if answered else float("nan")
    return Report(labels, len(dataset), measures, per_class, confusion)


def _distribution_report(labels: tuple[str, ...], targets: NDArray[Any], scores: NDArray[np.float32]) -> Report:
    uniform = np.full(targets.shape, 1 / len(labels))
    measures = {
        "kl_divergence": float(metrics.kl_divergence(targets, scores).mean()),
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
    return Report(labels, len(targets), measures, per_class, None)


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


def _probabilities(classifier: TFAudioClassifier, record: Record) -> NDArray[np.float32]:
    clip = _clip(classifier, record)
    try:
        return cast(NDArray[np.float32], classifier.predict(clip).probabilities)
    except (ModelFileError, WaveformError) as error:
        error.args = (f"{record.file}: {error}",)
        raise


def report_lines(report: Report) -> Iterator[str]:
    """Yield the lines of a table of ``report`` for people."""
    width = max(18, *map(len, report.measures))
    for name, value in report.measures.items():
        yield f"{name:<{width}} {value:.4f}"
    columns = ["clips", "recall", "precision", "average_precision", "auc", "mean_weight", "mean_answer"]
    columns = [column for column in columns if column in next(iter(report.per_class.values()))]
    width = max(len("class"), *(len(label) for label in report.labels))
    yield ""
    yield "  ".join([f"{'class':<{width}}", *columns])
    for label, row in report.per_class.items():
        cells = [f"{row['clips']:.0f}" if name == "clips" else f"{row[name]:.4f}" for name in columns]
        yield "  ".join([f"{label:<{width}}", *(f"{c:>{len(n)}}" for c, n in zip(cells, columns, strict=True))])
