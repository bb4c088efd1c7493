from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import norm
from sklearn import metrics as sklearn

from models_zoo.errors import DataError
from models_zoo.metrics import (
    accuracy,
    average_precision,
    balanced_accuracy,
    confusion_matrix,
    d_prime,
    mean_and_interval,
    mean_average_precision,
    mean_roc_auc,
    roc_auc,
)


@pytest.mark.parametrize("seed", range(20))
def test_decisions_as_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_classes = int(rng.integers(2, 9))
    targets = rng.integers(0, num_classes, 50)
    targets[:num_classes] = np.arange(num_classes)
    predictions = np.where(rng.random(50) < 0.5, targets, rng.integers(0, num_classes, 50))
    assert accuracy(targets, predictions) == pytest.approx(sklearn.accuracy_score(targets, predictions), abs=1e-15)
    expected = sklearn.balanced_accuracy_score(targets, predictions)
    assert balanced_accuracy(targets, predictions) == pytest.approx(expected, abs=1e-15)
    np.testing.assert_array_equal(
        confusion_matrix(targets, predictions, num_classes),
        sklearn.confusion_matrix(targets, predictions, labels=range(num_classes)),
    )


@pytest.mark.parametrize("levels", [2, 5, 1000], ids="{} score levels".format)
@pytest.mark.parametrize("seed", range(10))
def test_rankings_as_scikit_learn_with_ties(seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    targets = rng.random((40, 6)) < rng.uniform(0.1, 0.6, 6)
    targets[0], targets[1] = True, False
    scores = rng.integers(0, levels, (40, 6)) / levels + 0.2 * (targets * (levels > 10))
    expected = [sklearn.average_precision_score(targets[:, i], scores[:, i]) for i in range(6)]
    np.testing.assert_allclose(average_precision(targets, scores), expected, rtol=0, atol=1e-13)
    assert mean_average_precision(targets, scores) == pytest.approx(
        sklearn.average_precision_score(targets, scores, average="macro"), abs=1e-13
    )
    expected = [sklearn.roc_auc_score(targets[:, i], scores[:, i]) for i in range(6)]
    np.testing.assert_allclose(roc_auc(targets, scores), expected, rtol=0, atol=1e-13)
    assert mean_roc_auc(targets, scores) == pytest.approx(sklearn.roc_auc_score(targets, scores), abs=1e-13)


@pytest.mark.parametrize("seed", range(10))
def test_unknown_labels_count_neither_for_nor_against(seed: int) -> None:
    """A class is ranked over its known clips, as scikit-learn ranks it with weights of 0 and 1."""
    rng = np.random.default_rng(seed)
    targets, scores, known = rng.random((40, 5)) < 0.4, rng.integers(0, 9, (40, 5)) / 9, rng.random((40, 5)) < 0.6
    known[0], known[1], targets[0], targets[1] = True, True, True, False
    wild, shuffled = targets ^ ~known, np.where(known, scores, rng.random((40, 5)))
    for metric, expected in ((average_precision, sklearn.average_precision_score), (roc_auc, sklearn.roc_auc_score)):
        weighted = [expected(targets[:, i], scores[:, i], sample_weight=known[:, i]) for i in range(5)]
        np.testing.assert_allclose(metric(targets, scores, known), weighted, rtol=0, atol=1e-13)
        np.testing.assert_array_equal(metric(targets, scores, known), metric(wild, shuffled, known))
        assert not np.allclose(metric(targets, scores), metric(targets, scores, known))
        np.testing.assert_array_equal(metric(targets, scores), metric(targets, scores, np.ones_like(known)))
    assert mean_average_precision(targets, scores, known) == average_precision(targets, scores, known).mean()
    assert mean_roc_auc(targets, scores, known) == roc_auc(targets, scores, known).mean()
    known[:, 2] = False
    assert np.isnan(average_precision(targets, scores, known)[2])
    for wrong in (known[:5], known.astype(float)):
        with pytest.raises(DataError, match="expected booleans"):
            average_precision(targets, scores, wrong)


def test_class_indices_are_one_hot_targets() -> None:
    rng = np.random.default_rng(0)
    targets, scores = rng.integers(0, 4, 30), rng.random((30, 4))
    np.testing.assert_array_equal(average_precision(targets, scores), average_precision(np.eye(4)[targets], scores))
    np.testing.assert_array_equal(roc_auc(targets, scores), roc_auc(np.eye(4)[targets], scores))


def test_classes_nobody_can_be_right_about_are_nan_and_left_out() -> None:
    targets = np.array([[1, 0, 1], [0, 0, 1], [1, 0, 1]])
    scores = np.array([[0.9, 0.2, 0.5], [0.1, 0.3, 0.4], [0.8, 0.1, 0.3]])
    np.testing.assert_array_equal(average_precision(targets, scores), [1, math.nan, 1])
    np.testing.assert_array_equal(roc_auc(targets, scores), [1, math.nan, math.nan])
    assert mean_average_precision(targets, scores) == 1
    assert mean_roc_auc(targets, scores) == 1
    assert math.isnan(mean_roc_auc(targets[:, 1:], scores[:, 1:]))
    assert math.isnan(mean_average_precision(targets[:, 1:2], scores[:, 1:2]))


def test_all_scores_equal() -> None:
    targets = np.array([[1], [0], [0], [1], [0]])
    assert average_precision(targets, np.zeros((5, 1))).tolist() == [0.4]
    assert roc_auc(targets, np.zeros((5, 1))).tolist() == [0.5]


def test_absent_classes_do_not_count_in_balanced_accuracy() -> None:
    assert balanced_accuracy([0, 0, 2, 2], [0, 1, 2, 2]) == 0.75
    assert confusion_matrix([0, 0, 2, 2], [0, 1, 2, 2], 4).sum(axis=1).tolist() == [2, 0, 2, 0]


def test_d_prime() -> None:
    auc = np.array([0.0, 0.5, 0.7, 0.973, 1.0, math.nan])
    np.testing.assert_allclose(d_prime(auc), math.sqrt(2) * norm.ppf(auc), rtol=1e-12)
    assert float(d_prime(0.973)) == pytest.approx(2.725, abs=1e-3)


@pytest.mark.parametrize(
    ("targets", "predictions"),
    [([], []), ([0, 1], [0]), ([[0, 1]], [[0, 1]]), ([0.5, 1], [0, 1]), ([0, -1], [0, 1]), ([True, False], [0, 1])],
)
def test_decisions_that_are_refused(targets: list[float], predictions: list[float]) -> None:
    with pytest.raises(DataError):
        accuracy(targets, predictions)
    with pytest.raises(DataError):
        confusion_matrix(targets, predictions, 2)


def test_rankings_that_are_refused() -> None:
    scores = np.zeros((3, 2))
    for targets in (np.zeros((3, 3)), np.full((3, 2), 0.5), [0, 1], [0, 1, 2], [-1, 0, 1], np.zeros((2, 3, 2))):
        with pytest.raises(DataError):
            average_precision(targets, scores)
    for bad in (np.full((3, 2), math.nan), np.zeros(3), np.full((3, 2), math.inf)):
        with pytest.raises(DataError):
            roc_auc(np.zeros((3, 2)), bad)
    with pytest.raises(DataError, match="class index 5"):
        confusion_matrix([0, 5], [0, 1], 5)


def test_the_interval_of_a_mean() -> None:
    values = np.random.default_rng(3).normal(0.3, 1.0, 400)
    mean, low, high = mean_and_interval(values)
    half = 1.96 * values.std() / 20
    assert mean == values.mean()
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.1 * half)
    assert mean_and_interval(values) == (mean, low, high)
    assert mean_and_interval(values, confidence=0.5)[1] > low
    # Of clips like these, 95 % of such intervals hold the true mean.
    rng = np.random.default_rng(0)
    drawn = [mean_and_interval(rng.normal(0.3, 1.0, 60), resamples=400, seed=i) for i in range(200)]
    assert 0.9 <= np.mean([low <= 0.3 <= high for _, low, high in drawn]) <= 0.99


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan], [[1.0, 2.0], [0.0, 1.0]]])
def test_intervals_that_are_refused(values: list[float]) -> None:
    with pytest.raises(DataError):
        mean_and_interval(values)
