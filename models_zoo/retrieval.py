"""How well things find each other by their embeddings."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from models_zoo.errors import DataError

__all__ = ["cosine_similarity", "first_ranks", "retrieval_metrics"]


def cosine_similarity(queries: ArrayLike, gallery: ArrayLike) -> NDArray[np.float64]:
    """Return ``(num_queries, num_items)`` in [-1, 1] of ``(num_queries, size)`` and ``(num_items, size)`` embeddings.

    Raises:
        DataError: other shapes, or an embedding of zeros, which points nowhere.
    """
    sides = []
    for name, values in (("queries", queries), ("gallery", gallery)):
        vectors = np.asarray(values, np.float64)
        if vectors.ndim != 2 or not vectors.size:
            raise DataError(f"{name}: got shape {vectors.shape}; expected (number, size), at least one")
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        nowhere = np.flatnonzero(~(lengths[:, 0] > 0))
        if nowhere.size:
            raise DataError(f"{name}: embedding {nowhere[0]} is zero or not finite; it points nowhere")
        sides.append(vectors / lengths)
    if sides[0].shape[1] != sides[1].shape[1]:
        raise DataError(f"got embeddings of {sides[0].shape[1]} and {sides[1].shape[1]} numbers; expected one model's")
    return np.asarray(sides[0] @ sides[1].T, np.float64)


def first_ranks(similarity: ArrayLike, relevant: ArrayLike | None = None) -> NDArray[np.int64]:
    """Return ``(num_queries,)``: how many items are more similar to a query than the best of those it looks for.

    Args:
        similarity: ``(num_queries, num_items)``.
        relevant: ``(num_queries, num_items)`` bool, what a query looks for; None where query i looks for item i.

    Raises:
        DataError: other shapes, or a query that looks for nothing.
    """
    scores = np.asarray(similarity, np.float64)
    if scores.ndim != 2 or not scores.size or (relevant is None and scores.shape[0] != scores.shape[1]):
        raise DataError(
            f"similarity: got shape {scores.shape}; expected (num_queries, num_items), as many items as queries where "
            "nothing says what is relevant"
        )
    wanted = np.eye(len(scores), dtype=bool) if relevant is None else np.asarray(relevant, bool)
    if wanted.shape != scores.shape:
        raise DataError(f"relevant: got shape {wanted.shape}; expected that of the similarity, {scores.shape}")
    idle = np.flatnonzero(~wanted.any(axis=1))
    if idle.size:
        raise DataError(f"query {idle[0]} looks for nothing in the gallery; leave it out")
    best = np.where(wanted, scores, -np.inf).max(axis=1, keepdims=True)
    return np.asarray((scores > best).sum(axis=1), np.int64)


def retrieval_metrics(similarity: ArrayLike, relevant: ArrayLike | None = None) -> dict[str, float]:
    """Return ``recall_at_1``, ``recall_at_5``, ``recall_at_10`` (shares of the queries) and ``median_rank``, from 1.

    Args and Raises: as :func:`first_ranks`.

    Source: YuanGongND/cav-mae ``src/retrieval.py``, which looks for the own pair alone and counts a query twice where
    two similarities are the same to the last bit.
    """
    ranks = first_ranks(similarity, relevant)
    recalls = {f"recall_at_{k}": float((ranks < k).mean()) for k in (1, 5, 10)}
    return {**recalls, "median_rank": float(np.median(ranks)) + 1}
