"""Several models as one: what they have to share, and the mean of their answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from models_zoo.cards import LengthPolicy, ModelCard
from models_zoo.decoding import probabilities_of
from models_zoo.errors import CardError, DataError
from models_zoo.labels import check_labels

__all__ = ["Mean", "check_members", "common_policy", "fit_weights", "mean_scores", "normalised_weights"]

_MOST_STEPS = 5000
_STILL = 1e-7
_LEAST_WEIGHT = 1e-3

Mean: TypeAlias = Literal["logits", "probabilities"]
"""What is averaged: logits, whose mean is then activated as a single model's would be, or probabilities."""


def check_members(cards: Sequence[ModelCard], mean: Mean) -> None:
    """Check that models can answer together.

    Args:
        cards: of the members.
        mean: what is to be averaged.

    Raises:
        CardError: no member; clip scores missing, or of a kind that cannot be averaged so; other labels (the first
            that differs is named), another task or another sample rate than the first member's.
    """
    if not cards:
        raise CardError("an ensemble needs at least one member", field="members")
    first = cards[0]
    for card in cards:
        output = card.clip_output()
        if output is None:
            raise CardError(f"{card.name!r} has no clip scores to take the mean of", field="outputs")
        if mean == "logits" and output.kind != "logit":
            raise CardError(
                f"{card.name!r} answers with a {output.kind}; a mean of logits needs logits: take the mean of "
                "probabilities",
                field="outputs",
            )
        rates = [None if one.frontend is None else one.sample_rate for one in (card, first)]
        pairs = (("task", card.task, first.task), ("frontend.sample_rate", rates[0], rates[1]))
        for field, got, expected in pairs:
            if got != expected:
                raise CardError(
                    f"{field}: {card.name!r} has {got}, {first.name!r} has {expected}; members share it", field=field
                )
        if (card.labels is None) != (first.labels is None):
            raise CardError(
                f"labels: one of {card.name!r} and {first.name!r} has labels, the other none; members share them",
                field="labels",
            )
        if card.labels is not None and first.labels is not None:
            check_labels(
                card.labels,
                first.labels,
                given=repr(card.name),
                expected=repr(first.name),
                advice="members answer for the same classes in the same order",
            )


def common_policy(cards: Sequence[ModelCard]) -> LengthPolicy:
    """Return the length policy of an ensemble: clips that every member takes as they are.

    The longest minimum, the shortest maximum, the least common multiple; a rule for other clips stands where all
    members have the same one, otherwise such clips are errors.
    """
    policies = [card.length_policy for card in cards]
    if all(policy == policies[0] for policy in policies):
        return policies[0]
    multiple = math.lcm(*(policy.multiple_of for policy in policies))
    longest = [policy.max for policy in policies if policy.max is not None]
    shared = LengthPolicy(
        min=-(-max(card.min_samples for card in cards) // multiple) * multiple,
        max=min(longest) // multiple * multiple if longest else None,
        multiple_of=multiple,
    )
    rules = {field: {getattr(policy, field) for policy in policies} for field in ("short", "long", "uneven")}
    return shared.replace(**{field: values.pop() for field, values in rules.items() if len(values) == 1})


def normalised_weights(weights: Sequence[float] | None, members: int) -> tuple[float, ...]:
    """Return one weight per member, summing to 1; equal ones for None.

    Raises:
        CardError: not as many as members, not positive, or not finite.
    """
    if weights is None:
        return (1 / members,) * members
    if len(weights) != members:
        raise CardError(f"weights: got {len(weights)} for {members} members; give one each", field="weights")
    if not all(isinstance(weight, (int, float)) and 0 < weight < math.inf for weight in weights):
        raise CardError(f"weights: got {list(weights)}; expected finite numbers above 0", field="weights")
    total = math.fsum(weights)
    return tuple(weight / total for weight in weights)


def fit_weights(answers: ArrayLike, targets: ArrayLike) -> tuple[float, ...]:
    """Return the weights, summing to 1, with which the mean of the members' probabilities is nearest to the targets.

    Nearest by the KL divergence, which has one minimum over weights; found by expectation maximisation, as the shares
    of a mixture whose parts are known. A member that is of no use gets a thousandth, since every member has a weight.

    Args:
        answers: ``(members, clips, classes)`` probabilities that sum to one over the classes.
        targets: ``(clips, classes)``, what they should be, summing to one: distributions, or one-hot.

    Raises:
        DataError: other shapes.
    """
    given, wanted = np.asarray(answers, np.float64), np.asarray(targets, np.float64)
    if given.ndim != 3 or given.shape[1:] != wanted.shape or not given.size:
        raise DataError(
            f"got answers {given.shape} and targets {wanted.shape}; expected (members, clips, classes) and "
            "(clips, classes)"
        )
    weights = np.full(len(given), 1 / len(given))
    tiny = float(np.finfo(np.float32).tiny)
    for _ in range(_MOST_STEPS):
        shares = weights[:, None, None] * given
        better = (wanted * shares / np.maximum(shares.sum(axis=0), tiny)).sum(axis=(1, 2)) / wanted.sum()
        moved = float(np.abs(better - weights).max())
        weights = better
        if moved < _STILL:
            break
    return normalised_weights(np.maximum(weights, _LEAST_WEIGHT).tolist(), len(weights))


def mean_scores(
    scores: Sequence[NDArray[np.float32]],
    cards: Sequence[ModelCard],
    weights: Sequence[float],
    mean: Mean,
    *,
    frames: bool = False,
) -> NDArray[np.float32]:
    """Return the weighted mean of the members' clip scores, ``(batch, num_classes)`` float32, or of their frame scores.

    Args:
        scores: of each member, as its graph returned them; ``(batch, ..., num_classes)``.
        cards: of the members.
        weights: summing to 1.
        mean: of ``logits`` as they are, or of ``probabilities``.
        frames: they are frame scores.
    """
    if mean == "probabilities":
        outputs = [card.frame_output() if frames else card.clip_output() for card in cards]
        scores = [
            probabilities_of(one, task=card.task, kind=output.kind if output else None)
            for one, card, output in zip(scores, cards, outputs, strict=True)
        ]
    total = sum(weight * np.asarray(one, np.float64) for weight, one in zip(weights, scores, strict=True))
    return np.asarray(total, np.float32)
