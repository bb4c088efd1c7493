"""How good scores are: NumPy only, equal to scikit-learn's definitions, ties included.

``targets`` are true class indices, ``(num_clips,)`` integers, or, for the ranking metrics, also ``(num_clips,
num_classes)`` of 0 and 1 where a clip may have several classes. A class nobody can be right or wrong about (no
positive clip; for the AUC also no negative one) has the value nan and is left out of means; a mean of nothing is nan.
``known``, ``(num_clips, num_classes)``, says which labels are known: a class is then ranked over its known clips only.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.special import ndtri, xlogy

from models_zoo.errors import DataError

__all__ = [
    "accuracy",
    "average_precision",
    "balanced_accuracy",
    "confusion_matrix",
    "d_prime",
    "kl_divergence",
    "mean_and_interval",
    "mean_average_precision",
    "mean_roc_auc",
    "roc_auc",
]


def accuracy(targets: ArrayLike, predictions: ArrayLike) -> float:
    """Return the share of clips whose predicted class is the true one.

    Args:
        targets, predictions: ``(num_clips,)`` class indices.

    Raises:
        DataError: not equally many indices, or none.
    """
    true, predicted = _indices(targets, predictions)
    return float(np.mean(true == predicted))


def balanced_accuracy(targets: ArrayLike, predictions: ArrayLike) -> float:
    """Return the mean over the classes in ``targets`` of the share of their clips predicted right.

    Args:
        targets, predictions: ``(num_clips,)`` class indices.

    Raises:
        DataError: not equally many indices, or none.
    """
    true, predicted = _indices(targets, predictions)
    return float(np.mean([np.mean(predicted[true == label] == label) for label in np.unique(true)]))


def confusion_matrix(targets: ArrayLike, predictions: ArrayLike, num_classes: int) -> NDArray[np.int64]:
    """Return ``(num_classes, num_classes)`` counts: row true class, column predicted class.

    Args:
        targets, predictions: ``(num_clips,)`` class indices below ``num_classes``.

    Raises:
        DataError: not equally many indices, none, or one that is no class.
    """
    true, predicted = _indices(targets, predictions)
    highest = int(max(true.max(), predicted.max()))
    if highest >= num_classes:
        raise DataError(f"got class index {highest}; expected indices below num_classes, {num_classes}")
    counts = np.bincount(true * num_classes + predicted, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes).astype(np.int64)


def average_precision(
    targets: ArrayLike, scores: ArrayLike, known: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """Return ``(num_classes,)``: the precision at every threshold, weighted by the recall gained there.

    Equal scores share one threshold. Nan for a class without a positive clip.

    Args:
        targets: see the module.
        scores: ``(num_clips, num_classes)``, higher for more likely.
        known: see the module; None where every label is known.

    Raises:
        DataError: shapes that do not fit, targets other than 0 and 1, scores that are not finite.
    """
    positive, score, clips = _ranking(targets, scores, known)
    return np.array([_average_precision(positive[rows, i], score[rows, i]) for i, rows in enumerate(clips.T)])


def mean_average_precision(targets: ArrayLike, scores: ArrayLike, known: NDArray[np.bool_] | None = None) -> float:
    """Return the mean of :func:`average_precision` over the classes that have it (mAP, macro)."""
    return _mean(average_precision(targets, scores, known))


def roc_auc(targets: ArrayLike, scores: ArrayLike, known: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
    """Return ``(num_classes,)``: the chance that a positive clip scores above a negative one, ties counting half.

    Nan for a class without a positive or without a negative clip.

    Args:
        targets: see the module.
        scores: ``(num_clips, num_classes)``, higher for more likely.
        known: see the module; None where every label is known.

    Raises:
        DataError: shapes that do not fit, targets other than 0 and 1, scores that are not finite.
    """
    positive, score, clips = _ranking(targets, scores, known)
    return np.array([_roc_auc(positive[rows, i], score[rows, i]) for i, rows in enumerate(clips.T)])


def mean_roc_auc(targets: ArrayLike, scores: ArrayLike, known: NDArray[np.bool_] | None = None) -> float:
    """Return the mean of :func:`roc_auc` over the classes that have it."""
    return _mean(roc_auc(targets, scores, known))


def d_prime(auc: ArrayLike) -> NDArray[np.float64]:
    """Return the distance, in standard deviations, of two normal distributions with this AUC: sqrt(2) * ppf(auc).

    Infinite at 0 and 1, nan where ``auc`` is. AudioSet's custom is d' of the mean AUC, not the mean of d'.
    """
    return np.asarray(np.sqrt(2.0) * ndtri(np.asarray(auc, np.float64)), np.float64)


def kl_divergence(targets: ArrayLike, probabilities: ArrayLike) -> NDArray[np.float64]:
    """Return ``(num_clips,)``: how far an answer is from the distribution of its clip, 0 for the distribution itself.

    The Kullback-Leibler divergence, the sum over the classes of y (ln y - ln p) with 0 ln 0 = 0, in nats.
    Probabilities below the smallest normal float32 (1.2e-38) count as that, so that none is infinite.

    Args:
        targets: ``(num_clips, num_classes)``, never negative, each row 1 in sum.
        probabilities: the same shape, in [0, 1].

    Raises:
        DataError: shapes that do not fit, or rows that are no distributions; names the first.
    """
    true, answer = np.asarray(targets, np.float64), np.asarray(probabilities, np.float64)
    if true.ndim != 2 or true.shape != answer.shape or not true.size:
        raise DataError(f"got targets {true.shape} and probabilities {answer.shape}; expected (num_clips, num_classes)")
    for name, rows in (("targets", true), ("probabilities", answer)):
        wrong = np.flatnonzero(~((rows >= 0).all(axis=1) & (np.abs(rows.sum(axis=1) - 1) <= 1e-3)))
        if wrong.size:
            raise DataError(
                f"{name} of clip {wrong[0]}: got {rows[wrong[0]].tolist()}; expected a distribution, never negative, "
                "1 in sum (within 0.001)"
            )
    floor = float(np.finfo(np.float32).tiny)
    return np.asarray((xlogy(true, true) - xlogy(true, np.maximum(answer, floor))).sum(axis=1), np.float64)


def mean_and_interval(
    values: ArrayLike, *, confidence: float = 0.95, resamples: int = 9999, seed: int = 0
) -> tuple[float, float, float]:
    """Return the mean over clips and the (low, high) ends of its bootstrap interval.

    Of paired differences, clip by clip, it says whether one model is better than another on clips like these; it says
    nothing about other seeds of their training.

    Args:
        values: ``(num_clips,)``, one number per clip.
        confidence: share of such intervals that hold the true mean.
        resamples: how many times as many clips are drawn with replacement.
        seed: of the draws.

    Raises:
        DataError: fewer than two values, or one that is not finite.

    Source: scipy.stats.bootstrap, percentile method.
    """
    value = np.asarray(values, np.float64)
    if value.ndim != 1 or value.size < 2 or not np.isfinite(value).all():
        raise DataError(f"got values of shape {value.shape}; expected a finite number per clip, of two clips at least")
    drawn = stats.bootstrap(
        (value,),
        np.mean,
        confidence_level=confidence,
        n_resamples=resamples,
        batch=100,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(value.mean()), float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def _indices(targets: ArrayLike, predictions: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    true, predicted = np.asarray(targets), np.asarray(predictions)
    if true.ndim != 1 or true.shape != predicted.shape or true.size == 0:
        raise DataError(
            f"got targets {true.shape} and predictions {predicted.shape}; expected one index per clip in each"
        )
    for name, values in (("targets", true), ("predictions", predicted)):
        if values.dtype.kind not in "iu" or values.min() < 0:
            raise DataError(f"got {name} of dtype {values.dtype}; expected class indices from 0")
    return true.astype(np.int64), predicted.astype(np.int64)


def _ranking(
    targets: ArrayLike, scores: ArrayLike, known: NDArray[np.bool_] | None
) -> tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.bool_]]:
    true, score = np.asarray(targets), np.asarray(scores, np.float64)
    if score.ndim != 2 or not np.isfinite(score).all():
        raise DataError(f"got scores of shape {score.shape}; expected finite numbers, (num_clips, num_classes)")
    if true.ndim == 1 and true.dtype.kind in "iu":
        if len(true) != len(score) or (true.size and not 0 <= true.min() <= true.max() < score.shape[1]):
            raise DataError(f"got {len(true)} targets for scores {score.shape}; expected one class index per clip")
        true = true[:, None] == np.arange(score.shape[1])
    if true.shape != score.shape or not np.isin(true, (0, 1)).all():
        raise DataError(
            f"got targets of shape {true.shape} for scores {score.shape}; expected 0 and 1 in the same shape"
        )
    if known is None:
        known = np.ones(score.shape, np.bool_)
    if known.shape != score.shape or known.dtype != np.bool_:
        raise DataError(f"got known of shape {known.shape}, {known.dtype}, for scores {score.shape}; expected booleans")
    return true.astype(bool), score, known


def _average_precision(positive: NDArray[np.bool_], score: NDArray[np.float64]) -> float:
    if not positive.any():
        return float("nan")
    order = np.argsort(-score, kind="stable")
    last_of_tie = np.append(np.diff(score[order]) != 0, True)
    hits = np.cumsum(positive[order])[last_of_tie]
    precision = hits / (np.flatnonzero(last_of_tie) + 1)
    return float(np.sum(np.diff(hits, prepend=0) * precision) / positive.sum())


def _roc_auc(positive: NDArray[np.bool_], score: NDArray[np.float64]) -> float:
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if not num_positive or not num_negative:
        return float("nan")
    _, place, counts = np.unique(score, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts - 1) / 2
    above = mean_rank[place][positive].sum() - num_positive * (num_positive + 1) / 2
    return float(above / (num_positive * num_negative))


def _mean(values: NDArray[np.float64]) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else float("nan")
