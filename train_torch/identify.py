"""What a file of weights looks like, judged by its shapes: for saying which card it belongs to.

Nothing here knows a family: every registered architecture is built without memory (on torch's meta device), and the
one whose names and shapes agree best with the file wins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any, Literal, NamedTuple, cast, get_args, get_origin

import torch
from pydantic.fields import FieldInfo
from torch import Tensor

from models_zoo.cards import ModelCard
from models_zoo.errors import CardError
from models_zoo.registry import get_card, list_models
from train_torch.models import Model, create_model, list_architectures

__all__ = ["likeness"]

_CLASSES = 2  # of the networks built for comparison; what depends on it is compared with the class axis left out

_RECOGNISABLE = 0.3  # share of agreeing entries below which naming the nearest architecture would mislead


class _Candidate(NamedTuple):
    architecture: str
    options: dict[str, Any]
    model: Model
    score: float


def likeness(state: Mapping[str, Tensor], model: Model, card: ModelCard) -> str:
    """Return a clause that says what ``state`` is by its shapes, and what ``card`` is.

    Args:
        state: entries of the file.
        model: built as ``card`` says.
        card: which ``state`` does not fit.
    """
    # Names that stand for a width come first, so that they are preferred to the family's where both fit.
    names = sorted(list_architectures(), key=lambda name: not name[-1].isdecimal())
    names = [name for name in names if _scores_classes(name)]
    best = max((_compared(name, {}, state) for name in names), key=lambda found: found.score)
    for _ in range(2):
        if best.score == 1:
            break
        for options in _variations(best):
            try:
                best = max(best, _compared(best.architecture, options, state), key=lambda found: found.score)
            except CardError:  # a combination that the family does not allow
                continue
    wanted = model.options
    fields = type(best.model.declared).model_fields
    differing = {
        key for key, value in best.model.options.items() if value != wanted.get(key, fields[key].get_default())
    }
    named = {"width", "head"} | differing - {"num_classes", *getattr(best.model.declared, "card_facts", ())}
    asked = f"the card is {_description(card.architecture, wanted, named)}, {wanted.get('num_classes') or 'no'} classes"
    if best.score < _RECOGNISABLE:
        same_names = best.model.state_dict().keys() & state.keys()
        if len(same_names) >= _RECOGNISABLE * len(state):
            return f"its entries have the names of {best.architecture}'s, but the shapes of no width here; {asked}"
        return f"its entries are those of no architecture here; {asked}"
    classes = _num_classes(best, state)
    found = _description(best.architecture, best.model.options, named) + f", {classes or 'no'} classes"
    twins = [name for name in names if _is_twin(name, best, state)]
    if twins:
        found += f" (or {', '.join(twins)}, of the same names and shapes)"
    if best.score < 1:
        return f"by its shapes the file is nearest to {found} ({best.score:.0%} of the entries agree); {asked}"
    cards = [name for name in list_models() if _describes(name, best, named)]
    hint = f" (cards like that: {', '.join(cards[:4])}{', ...' if len(cards) > 4 else ''})" if cards else ""
    return f"by its shapes the file is {found}{hint}; {asked}"


def _scores_classes(name: str) -> bool:
    """Return whether an architecture has a number of classes; one that only learns to fill gaps has none."""
    with suppress(CardError):
        _built(name, _CLASSES)
        return True
    return False


def _is_twin(name: str, best: _Candidate, state: Mapping[str, Tensor]) -> bool:
    """Return whether another kind of network, called ``name``, agrees with the file as well as the best does."""
    other = _compared(name, {}, state)
    return other.score >= best.score and type(other.model) is not type(best.model)


def _describes(name: str, found: _Candidate, options: set[str]) -> bool:
    """Return whether the card called ``name`` is of the network found, as far as ``options`` tell."""
    card, fields = get_card(name), type(found.model.declared).model_fields
    return card.architecture == found.architecture and all(
        card.options.get(key, fields[key].default) == found.model.options[key]
        for key in (options | {key for key, field in fields.items() if _choices(field)}) & fields.keys()
        if key != "width"  # follows from the architecture's name
    )


def _choices(field: FieldInfo) -> tuple[Any, ...]:
    """Return the values an option can have where they are few (heads, switches), else none."""
    if get_origin(field.annotation) is Literal:
        return get_args(field.annotation)
    return (True, False) if field.annotation is bool else ()


def _description(architecture: str, options: Mapping[str, Any], named: set[str]) -> str:
    facts = [f"{name} {options[name]!r}" for name in options if name in named]
    return f"{architecture} with {', '.join(facts)}" if facts else architecture


def _variations(candidate: _Candidate) -> Iterator[dict[str, Any]]:
    """Yield options that differ from the candidate's in one choice out of a few (heads, switches)."""
    for name, field in type(candidate.model.declared).model_fields.items():
        for value in _choices(field):
            if value != candidate.model.options[name]:
                yield {**candidate.options, name: value}


def _compared(architecture: str, options: dict[str, Any], state: Mapping[str, Tensor]) -> _Candidate:
    model = _built(architecture, _CLASSES, *options.items())
    if not any(key.startswith(model.head_prefix) for key in state):
        with suppress(CardError):  # some have no form without classes
            model = _built(architecture, 0, *options.items())
    own = {key: _shape(key, tensor, model) for key, tensor in model.state_dict().items()}
    agreeing = sum(key in state and shape == _shape(key, state[key], model) for key, shape in own.items())
    return _Candidate(architecture, options, model, agreeing / len(own.keys() | state.keys()))


@lru_cache(maxsize=64)
def _built(architecture: str, num_classes: int, *options: tuple[str, Any]) -> Model:
    with torch.device("meta"):
        return cast(Model, create_model(architecture, num_classes=num_classes, **dict(options)))


def _shape(key: str, tensor: Tensor, model: Model) -> tuple[int, ...]:
    """Return the shape of an entry, without the first axis where that one counts classes."""
    return tuple(tensor.shape[1:]) if key in model.class_keys else tuple(tensor.shape)


def _num_classes(candidate: _Candidate, state: Mapping[str, Tensor]) -> int | None:
    own = candidate.model.state_dict()
    for key in candidate.model.class_keys:
        if key in state and state[key].ndim and own[key].ndim:
            return state[key].shape[0] * _CLASSES // own[key].shape[0]
    return None
