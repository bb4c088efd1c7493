"""Retrieval: the published figures, what counts as found, and input that says nothing."""

from __future__ import annotations

import numpy as np
import pytest

from models_zoo.errors import DataError
from models_zoo.retrieval import cosine_similarity, first_ranks, retrieval_metrics


@pytest.mark.contracts
def test_figures_are_the_published_ones(contracts):
    golden = np.load(contracts / "cav_mae" / "golden_tiny.npz")
    rng = np.random.default_rng(61)
    audio = rng.standard_normal((40, 16)).astype(np.float32)
    image = (audio * 0.45 + rng.standard_normal((40, 16))).astype(np.float32)
    for name, sides in (("a2v", (audio, image)), ("v2a", (image, audio))):
        figures = retrieval_metrics(cosine_similarity(*sides))
        assert list(figures) == ["recall_at_1", "recall_at_5", "recall_at_10", "median_rank"]
        assert list(figures.values()) == pytest.approx(list(golden[f"retr.{name}"]), abs=1e-12)


def test_ranks_count_what_is_more_similar():
    similarity = np.array([[0.9, 0.1, 0.5], [0.3, 0.2, 0.1], [0.7, 0.7, 0.7]])
    assert first_ranks(similarity).tolist() == [0, 1, 0]
    assert retrieval_metrics(similarity)["recall_at_1"] == pytest.approx(2 / 3)
    assert retrieval_metrics(similarity)["median_rank"] == 1


def test_any_relevant_item_will_do():
    similarity = np.array([[0.9, 0.8, 0.1, 0.2]])
    assert first_ranks(similarity, [[False, False, True, True]]).tolist() == [2]
    assert first_ranks(similarity, [[False, True, True, True]]).tolist() == [1]


def test_length_is_no_matter():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((3, 4)), rng.standard_normal((5, 4))
    assert np.allclose(cosine_similarity(a * 1e6, b), cosine_similarity(a, b * 1e-6))
    assert np.abs(cosine_similarity(a, a).diagonal() - 1).max() < 1e-12


@pytest.mark.parametrize(
    ("queries", "gallery", "said"),
    [
        (np.ones((2, 3)), np.ones((2, 4)), "3 and 4"),
        (np.ones(3), np.ones((2, 3)), r"queries: got shape \(3,\)"),
        (np.ones((1, 3)), np.zeros((1, 3)), "gallery: embedding 0"),
        (np.full((1, 3), np.nan), np.ones((1, 3)), "queries: embedding 0"),
    ],
)
def test_embeddings_that_point_nowhere_are_refused(queries, gallery, said):
    with pytest.raises(DataError, match=said):
        cosine_similarity(queries, gallery)


@pytest.mark.parametrize(
    ("similarity", "relevant", "said"),
    [
        (np.ones((2, 3)), None, "as many items"),
        (np.ones((2, 3)), np.ones((3, 2)), r"\(3, 2\)"),
        (np.ones((2, 3)), [[True] * 3, [False] * 3], "query 1"),
    ],
)
def test_questions_without_an_answer_are_refused(similarity, relevant, said):
    with pytest.raises(DataError, match=said):
        first_ranks(similarity, relevant)
