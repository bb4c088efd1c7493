"""Weights on disk: our own ``.safetensors`` with the card inside, and published ``.pt`` files with a card beside.

Loading is strict. A file whose tensors do not fit its card exactly is refused with the names of those that do not;
only a class count asked for may replace entries, and what it replaced is returned.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from models_zoo.cards import CARD_KEY, ModelCard
from models_zoo.errors import CardError, CheckpointError
from models_zoo.files import replacing
from models_zoo.registry import get_card
from train_torch.models import Model, check_card, create_from_card

__all__ = ["Checkpoint", "load_checkpoint", "save_checkpoint"]

_PUBLISHED_SUFFIXES = (".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model.

    Attributes:
        model: with the weights, on the CPU, in evaluation mode.
        card: what it is; describes ``model``, also where the class count was changed.
        replaced: state_dict entries that were not taken from the file (a head for other classes is initialised afresh)
            or, where the model has no head, entries of the file that were left out. Empty for an exact load.
        sha256: of the file.
    """

    model: nn.Module
    card: ModelCard
    replaced: tuple[str, ...]
    sha256: str


def save_checkpoint(path: str | Path, model: nn.Module, card: ModelCard, *, force: bool = False) -> None:
    """Write the weights of ``model`` and ``card`` as one ``.safetensors`` file, completely or not at all.

    Raises:
        CheckpointError: another suffix, or weights that are not finite.
        CardError: the card does not describe the model.
        OutputExistsError: ``path`` exists and ``force`` is false.
        OutputWriteError: the operating system refused the write.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"cannot save as {path.name}: checkpoints are .safetensors files; use that suffix")
    check_card(model, card)
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    _check_finite(path, state)
    with replacing(path, force=force) as partial:
        partial.write_bytes(safetensors.torch.save(state, {CARD_KEY: card.to_json()}))


def load_checkpoint(
    path: str | Path,
    card: ModelCard | str | None = None,
    *,
    num_classes: int | None = None,
    labels: Sequence[str] | None = None,
) -> Checkpoint:
    """Return the model in a checkpoint file.

    Args:
        path: our own ``.safetensors``, which holds its card; or a published ``.pt``/``.pth`` state_dict.
        card: of a file that holds none: a :class:`ModelCard`, or the name of one in the zoo.
        num_classes: build the head for this many classes. Where the file's head has another count, the entries that
            depend on it start afresh and are named in ``replaced``; where it has this count, all weights are kept.
            0 leaves the head out.
        labels: class names in order; their number stands for ``num_classes``.

    Raises:
        CheckpointError: no such file, not a checkpoint, corrupt, unsafe, without a card, or not fitting it.
        CardError: the card is impossible, or the labels disagree with ``num_classes``.
        UnknownNameError: no card of that name.
    """
    path = Path(path)
    if labels is not None:
        if num_classes not in (None, len(labels)):
            raise CardError(f"labels: got {len(labels)} for num_classes {num_classes}; give as many", field="labels")
        num_classes = len(labels)
    sha256 = _sniff(path)
    given = get_card(card) if isinstance(card, str) else card
    if path.suffix == ".safetensors":
        state, own = _read_safetensors(path)
        if own is not None and given is not None and given != own:
            raise CheckpointError(f"{path} holds its own card, {own.name!r}, which differs from the one given; omit it")
        given = own or given
    else:
        state = _read_published(path, given)
    if given is None:
        raise CheckpointError(
            f"{path} holds no card, so nothing says which model it is; name one: load_checkpoint(path, 'mn10_as') "
            "(--model on the command line)"
        )
    model = create_from_card(given, **({} if num_classes is None else {"num_classes": num_classes}))
    replaced = _load_state(path, model, state, given.name, replace_head=num_classes is not None)
    model.eval()
    if num_classes is not None:
        given = _recount(given, cast(Model, model), labels, replaced, sha256)
    check_card(model, given)
    return Checkpoint(model, given, replaced, sha256)


def _sniff(path: Path) -> str:
    """Return the sha256 of a file that may be a checkpoint."""
    if path.suffix not in (".safetensors", *_PUBLISHED_SUFFIXES):
        raise CheckpointError(
            f"cannot tell what {path} is by its name; expected .safetensors, or {', '.join(_PUBLISHED_SUFFIXES)} for "
            "a published file"
        )
    try:
        with path.open("rb") as file:
            start = file.read(64).lstrip()
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise CheckpointError(f"no such checkpoint: {path}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    if not start:
        raise CheckpointError(f"{path} is empty; download or train it again")
    if start.startswith(b"<"):
        raise CheckpointError(f"{path} is a web page, not weights; the download was refused: fetch the file itself")
    return sha256


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], ModelCard | None]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(CARD_KEY)
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not an intact safetensors file ({error}); copy or train it again") from error
    if text is None:
        return state, None
    try:
        return state, ModelCard.from_json(text)
    except CardError as error:
        raise CheckpointError(f"{path} holds a card that cannot be read: {error}") from error


def _read_published(path: Path, card: ModelCard | None) -> Mapping[Any, Any]:
    source = None if card is None else card.checkpoint
    if source is not None:
        for algorithm, stated in (("sha256", source.sha256), ("md5", source.md5)):
            if stated is not None and _digest(path, algorithm) != stated:
                raise CheckpointError(
                    f"{path} is not the published {source.file}: its {algorithm} is not {stated}; download it again "
                    f"from {source.url}, or give a card without the hash if the file is your own"
                )
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged or hostile pickle fails in any way it likes; whatever it raises, the answer is the same.
    except Exception as error:
        raise CheckpointError(
            f"{path} is damaged, or holds more than tensors; unpickling anything else could run code, so it is refused "
            f"({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}). Get the "
            "file again from its publisher"
        ) from error
    if source is not None and source.container is not None:
        if not isinstance(loaded, Mapping) or source.container not in loaded:
            raise CheckpointError(f"{path} has no entry {source.container!r}, where card {card.name!r} expects weights")
        loaded = loaded[source.container]
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}; expected a state_dict, tensors by name")
    strangers = [str(key) for key, value in loaded.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if strangers:
        raise CheckpointError(
            f"{path} is no plain state_dict; not tensors: {_listed(strangers)}; if the weights lie under one of these, "
            "give a card whose checkpoint.container names it"
        )
    prefix = "" if source is None else source.prefix
    return {key.removeprefix(prefix): value for key, value in loaded.items()}


def _digest(path: Path, algorithm: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


def _load_state(
    path: Path, model: nn.Module, state: Mapping[str, Tensor], name: str, *, replace_head: bool
) -> tuple[str, ...]:
    """Load ``state`` strictly; return the entries that were replaced (or, without a head, left out)."""
    described = cast(Model, model)
    expected = model.state_dict()
    head = [key for key in expected if key.startswith(described.head_prefix)]
    replaced: tuple[str, ...] = ()
    if not head:
        replaced = tuple(key for key in state if key.startswith(described.head_prefix))
        state = {key: value for key, value in state.items() if key not in replaced}
    elif replace_head and not any(key.startswith(described.head_prefix) for key in state):
        replaced = tuple(head)
    elif replace_head and any(key in state and state[key].shape != expected[key].shape for key in described.class_keys):
        replaced = tuple(key for key in described.class_keys if key in state)
    taken = {key: value for key, value in state.items() if key not in replaced}

    def fits(key: str) -> bool:
        same_kind = taken[key].is_floating_point() == expected[key].is_floating_point()
        return same_kind and taken[key].shape == expected[key].shape

    missing = [key for key in expected if key not in taken and key not in replaced]
    unexpected = [key for key in taken if key not in expected]
    misfits = [key for key in taken if key in expected and not fits(key)]
    if missing or unexpected or misfits:
        shapes = [
            f"{key} {list(taken[key].shape)} {taken[key].dtype} for {list(expected[key].shape)} {expected[key].dtype}"
            for key in misfits
        ]
        parts = [("missing", missing), ("unexpected", unexpected), ("other shape or type", shapes)]
        found = "; ".join(f"{what}: {_listed(names)}" for what, names in parts if names)
        only_classes = not missing and not unexpected and set(misfits) <= set(described.class_keys)
        advice = (
            "pass num_classes (or labels) to choose the class count" if only_classes else "use the card it belongs to"
        )
        raise CheckpointError(f"{path} does not fit {name!r}: {found}; {advice}")
    taken = {key: value.to(expected[key].dtype) for key, value in taken.items()}
    _check_finite(path, taken)
    model.load_state_dict({**expected, **taken}, strict=True)
    return replaced


def _check_finite(path: Path, state: Mapping[str, Tensor]) -> None:
    broken = [key for key, tensor in state.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise CheckpointError(
            f"{path}: NaN or infinite weights in {_listed(broken)}; the training diverged or the file is damaged: go "
            "back to an earlier checkpoint"
        )


def _recount(
    card: ModelCard, model: Model, labels: Sequence[str] | None, replaced: Collection[str], sha256: str
) -> ModelCard:
    """Return ``card`` with the head of ``model``; what was measured or decided for the old classes is dropped."""
    same = not replaced and model.outputs == card.outputs
    names = card.labels if labels is None and same else labels
    changes: dict[str, Any] = {"options": model.options, "outputs": model.outputs, "labels": names}
    if names != card.labels:
        changes |= {"thresholds": None, "median_filters": None}
    if not same:
        changes |= {"metrics": {}, "checkpoint": None}
        changes["provenance"] = {**card.provenance, "initialised_from": {"name": card.name, "sha256": sha256}}
    return card.replace(**changes)


def _listed(names: Iterable[str], most: int = 12) -> str:
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
