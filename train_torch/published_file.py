"""What lies inside a published file: unpickled without running anything, and the set of weights that is meant.

Lightning writes hyper-parameters, callbacks and optimisers beside the weights, of whatever classes the training used.
None of them is needed, so none is built: torch's restricted unpickler makes inert stand-ins of them. Files of a mean
teacher hold two sets of weights, the student's and the teacher's, which is their average over training.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from models_zoo.errors import CheckpointError

__all__ = ["Weights", "mean_teacher_weights", "unpickled", "without_profile"]

Weights: TypeAlias = Literal["student", "teacher"]

_PREFIXES: dict[str, str] = {"student": "sed_student", "teacher": "sed_teacher"}
"""Whose weights -> before their names in a state_dict, and their entry at the top of the file."""

_LIGHTNING = "pytorch-lightning_version"

_PROFILE = ("total_ops", "total_params")
"""Buffers that the counter thop leaves in the modules it counted."""


class _StandIn:
    """Anything a file says was some object: takes what it is given, and is nothing."""

    def __init__(self, *_: Any) -> None: ...

    def __new__(cls, *_: Any) -> _StandIn:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None: ...


def unpickled(path: Path) -> Any:
    """Return what a ``.pt``, ``.pth`` or ``.ckpt`` file holds; no code that the file names is looked up or run.

    Of a Lightning checkpoint, objects of unknown classes are left out; anywhere else they are a reason to refuse.

    Raises:
        CheckpointError: damaged, or with more in it than tensors and plain values.
    """
    try:
        return _load(path)
    # A damaged or hostile pickle fails in any way it likes; whatever it raises, the answer is the same.
    except Exception as error:
        with suppress(Exception):
            names = get_unsafe_globals_in_checkpoint(path)
            # Only dictionaries proper may be filled, which is how a dictionary of another class is pickled.
            stand_ins = [(dict if name.endswith("Dict") else _StandIn, name) for name in names]
            with safe_globals(list(stand_ins)):
                loaded = _load(path)
            if isinstance(loaded, Mapping) and _LIGHTNING in loaded:
                return loaded
        # torch's own advice, to load it all the same, is for files one trusts.
        stranger = re.search(r"GLOBAL (\S+)", str(error))
        if stranger is not None:
            raise CheckpointError(
                f"{path} holds more than tensors: {stranger[1]}; unpickling that could run code, so it is refused. Get "
                "a state_dict, torch.save(model.state_dict(), ...), from whoever made the file"
            ) from error
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0]
        raise CheckpointError(
            f"{path} is damaged, or holds more than tensors; unpickling anything else could run code, so it is refused "
            f"({type(error).__name__}: {reason}). Get the file again from its publisher"
        ) from error


def _load(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, on how the file was pickled; what is inside is checked later
        return torch.load(path, map_location="cpu", weights_only=True)


def mean_teacher_weights(path: Path, loaded: Any, asked: Weights | None, usual: object) -> Any:
    """Return the student's or the teacher's weights of a mean teacher's file; another file's contents as they are.

    What a state_dict holds besides the two, their front end, stays with the one returned.

    Args:
        path: of the file, for the message.
        loaded: what it holds.
        asked: whose, or None.
        usual: whose the card's figures are of, where it says so.

    Raises:
        CheckpointError: both are there and neither is asked for nor usual, or the one asked for is not there.
    """
    found: dict[str, dict[str, Any]] = {}
    if isinstance(loaded, Mapping):
        state = loaded.get("state_dict", loaded)
        state = state if isinstance(state, Mapping) else {}
        prefixes = tuple(f"{prefix}." for prefix in _PREFIXES.values())
        beside = {key: value for key, value in state.items() if not str(key).startswith(prefixes)}
        for name, prefix in _PREFIXES.items():
            own = {
                key.removeprefix(f"{prefix}."): value
                for key, value in state.items()
                if str(key).startswith(f"{prefix}.")
            }
            if own:
                found[name] = {**own, **beside}
            elif isinstance(loaded.get(prefix), Mapping):
                found[name] = dict(loaded[prefix])
    if not found and asked is None:
        return loaded
    wanted = asked or (usual if len(found) > 1 else next(iter(found)))
    if wanted not in found:
        held = " and ".join(f"a {name}'s" for name in found) or "one set of"
        advice = (
            "leave weights out" if not found else f"say which: weights={next(iter(found))!r} (--weights to pt2onnx)"
        )
        raise CheckpointError(
            f"{path} holds {held} weights" + (f", no {asked}'s" if asked is not None else "") + f"; {advice}"
        )
    return found[wanted]


def without_profile(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``state`` without what a profiler left in it."""
    return {key: value for key, value in state.items() if key.rpartition(".")[2] not in _PROFILE}
