"""Weights on disk: our own ``.safetensors`` with the card inside, and published ``.pt`` files with a card beside.

Loading is strict. A file whose tensors do not fit its card exactly is refused with the names of those that do not;
only a class count asked for may replace entries, and what it replaced is returned.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from models_zoo.cards import CARD_KEY, ModelCard
from models_zoo.errors import CardError, CheckpointError, UnknownNameError
from models_zoo.files import replacing
from models_zoo.registry import get_card, list_models, published_as, shipped_checkpoint
from train_torch.costs import count_costs
from train_torch.download import fetch_checkpoint
from train_torch.identify import likeness
from train_torch.models import Model, check_card, create_from_card
from train_torch.published_file import Weights, mean_teacher_weights, unpickled, without_profile
from train_torch.published_frontend import without_frontend

__all__ = ["Checkpoint", "load_checkpoint", "save_checkpoint"]

_PUBLISHED_SUFFIXES = (".pt", ".pth", ".ckpt")

_AVERAGED = "n_averaged"
"""What ``torch.optim.swa_utils.AveragedModel`` stores beside the weights."""

_log = logging.getLogger(__name__)


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
    checkpoints: str | Path | None = None,
    container: str | None = None,
    weights: Weights | None = None,
) -> Checkpoint:
    """Return the model in a checkpoint file, or the published model of a name.

    What training code wraps around weights is taken off: ``module.``, ``model.`` and the like before every name
    (``nn.DataParallel``, ``torch.compile``, an averaged model), and a dict that holds one state_dict and other things.

    Args:
        path: our own ``.safetensors``, which holds its card; a published ``.pt``/``.pth`` state_dict; or the name of a
            card, ``mn10_as``, whose published file is then used, downloaded if need be.
        card: of a file that holds none: a :class:`ModelCard`, or the name of one in the zoo. Not needed for a published
            file that still has its name.
        num_classes: build the head for this many classes. Where the file's head has another count, the entries that
            depend on it start afresh and are named in ``replaced``; where it has this count, all weights are kept.
            0 leaves the head out.
        labels: class names in order; their number stands for ``num_classes``.
        checkpoints: folder with published files, see :func:`~train_torch.download.checkpoint_folder`.
        container: which entry of the file to take where it holds several sets of weights, e.g. ``ema``.
        weights: ``student`` or ``teacher``, of a mean teacher's file; None for those the card's figures are of.

    Raises:
        CheckpointError: no such file, not a checkpoint, corrupt, unsafe, without a card, or not fitting it.
        CardError: the card is impossible, or the labels disagree with ``num_classes``.
        UnknownNameError: no card of that name.
        DownloadError, OutputWriteError: see :func:`~train_torch.download.fetch_checkpoint`.
    """
    path, given = _locate(path, get_card(card) if isinstance(card, str) else card, checkpoints)
    if labels is not None:
        if num_classes not in (None, len(labels)):
            raise CardError(f"labels: got {len(labels)} for num_classes {num_classes}; give as many", field="labels")
        num_classes = len(labels)
    sha256 = _sniff(path)
    if path.suffix == ".safetensors":
        if weights is not None:
            raise CheckpointError(f"{path} holds one set of weights; leave weights={weights!r} out")
        state, own = _read_safetensors(path)
        if own is not None and given is not None and given != own:
            raise CheckpointError(f"{path} holds its own card, {own.name!r}, which differs from the one given; omit it")
        given = own or given
    else:
        state = _read_published(path, given, sha256, container, weights)
        if given is not None and "warning" in given.provenance and published_as(path.name) != given.name:
            _log.warning("%s, taken as %r: %s", path, given.name, given.provenance["warning"])
    if given is None:
        raise CheckpointError(
            f"{path} holds no card, so nothing says which model it is; name one: load_checkpoint(path, 'mn10_as') "
            "(--card on the command line, --model for an export)"
        )
    model = create_from_card(given, **({} if num_classes is None else {"num_classes": num_classes}))
    if getattr(model, "published_frontend", False):
        state = without_frontend(path, state, given)
    state = _as_base(_unwrapped(state, model.state_dict()), model)
    replaced = _load_state(path, model, state, given, replace_head=num_classes is not None)
    model.eval()
    if num_classes is not None:
        given = _recount(given, cast(Model, model), labels, replaced, sha256)
    check_card(model, given)
    return Checkpoint(model, given, replaced, sha256)


def _locate(path: str | Path, given: ModelCard | None, checkpoints: str | Path | None) -> tuple[Path, ModelCard | None]:
    """Return the file asked for by path or by a card's name, and its card where that is known before reading it."""
    text = os.fspath(path)
    suffix = Path(text).suffix
    if os.path.isfile(text) or Path(text).name != text or suffix in (".safetensors", *_PUBLISHED_SUFFIXES):
        published = published_as(Path(text).name) if given is None and suffix in _PUBLISHED_SUFFIXES else None
        if published is not None:
            _log.info("%s is the published file of card %r", text, published)
        return Path(text), given if published is None else get_card(published)
    try:
        named = get_card(text)
    except UnknownNameError:
        if suffix or os.path.exists(text):
            return Path(text), given  # refused as a file
        raise UnknownNameError("checkpoint", text, list_models()) from None
    if given is not None and given != named:
        raise CheckpointError(
            f"{text!r} is a published model with a card of its own, which differs from card {given.name!r}; give one "
            "of them, or the path of a file"
        )
    shipped = shipped_checkpoint(named.name)
    return (shipped, None) if shipped is not None else (fetch_checkpoint(named, checkpoints), named)


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


def _read_published(
    path: Path, card: ModelCard | None, sha256: str, container: str | None, weights: Weights | None
) -> Mapping[str, Tensor]:
    source = None if card is None else card.checkpoint
    if source is not None:
        for algorithm, stated in (("sha256", source.sha256), ("md5", source.md5)):
            found = sha256 if algorithm == "sha256" else _md5(path)
            if stated is not None and found != stated:
                raise CheckpointError(
                    f"{path} is not the published {source.file}: its {algorithm} is {found}, not {stated}; download it "
                    f"again from {source.url}, or give a card without the hash if the file is your own"
                )
    usual = None if card is None else card.provenance.get("weights")
    loaded = mean_teacher_weights(path, unpickled(path), weights, usual)
    container = container or (None if source is None else source.container)
    if container is not None:
        if not isinstance(loaded, Mapping) or container not in loaded:
            raise CheckpointError(f"{path} has no entry {container!r}, where its weights are expected")
        loaded = loaded[container]
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}; expected a state_dict, tensors by name")
    if not _is_state(loaded):
        inside = [key for key, value in loaded.items() if isinstance(key, str) and _is_state(value)]
        if len(inside) != 1:
            strangers = [str(key) for key, value in loaded.items() if not isinstance(value, Tensor)]
            strangers = strangers or [repr(key) for key in loaded if not isinstance(key, str)]
            raise CheckpointError(
                f"{path} holds several sets of weights: {_listed(inside)}; say which: container={inside[0]!r}"
                if inside
                else f"{path} is no state_dict and holds none; not tensors: {_listed(strangers) or 'it is empty'}"
            )
        _log.info("%s: taking the weights under %r", path, inside[0])
        loaded = loaded[inside[0]]
    prefix = "" if source is None else source.prefix
    return without_profile({key.removeprefix(prefix): value for key, value in loaded.items()})


def _is_state(value: object) -> bool:
    """Return whether ``value`` is tensors by name, at least one."""
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(key, str) and isinstance(entry, Tensor) for key, entry in value.items())
    )


def _unwrapped(state: Mapping[str, Tensor], expected: Collection[str]) -> Mapping[str, Tensor]:
    """Return ``state`` without what wrappers put before every name (``module.``, ``_orig_mod.``, ``model.``, ...)."""
    names = {key.partition(".")[0] for key in state if key != _AVERAGED}
    while state and not any(key in expected for key in state) and len(names) == 1 and "" not in names:
        if not all("." in key for key in state if key != _AVERAGED):
            break
        state = {key.partition(".")[2]: value for key, value in state.items() if key != _AVERAGED}
        names = {key.partition(".")[0] for key in state}
    return state


def _as_base(state: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
    """Return the entries of a bare network under the names they have in a model that holds one as its base."""
    prefix: str = getattr(model, "base_prefix", "")
    if any(key.startswith(prefix) for key in state):
        return state
    return {prefix + key: value for key, value in state.items()}


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _load_state(
    path: Path, model: nn.Module, state: Mapping[str, Tensor], card: ModelCard, *, replace_head: bool
) -> tuple[str, ...]:
    """Load ``state`` strictly; return the entries that were replaced (or, without a head, left out)."""
    described = cast(Model, model)
    expected = model.state_dict()
    whole = state
    unused: tuple[str, ...] = getattr(model, "unused_prefixes", ())
    state = {key: value for key, value in state.items() if not key.startswith(unused)} if unused else state
    if len(state) < len(whole):
        _log.info("%s: %d entries are of no use to %r and left out", path, len(whole) - len(state), card.name)
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
        dense = taken[key].layout == torch.strided and taken[key].device == expected[key].device
        return same_kind and dense and taken[key].shape == expected[key].shape

    missing = [key for key in expected if key not in taken and key not in replaced]
    unexpected = [key for key in taken if key not in expected]
    misfits = [key for key in taken if key in expected and not fits(key)]
    if missing or unexpected or misfits:
        shapes = [f"{key} {_described(taken[key])} for {_described(expected[key])}" for key in misfits]
        parts = [("missing", missing), ("unexpected", unexpected), ("other shape or type", shapes)]
        found = "; ".join(f"{what}: {_listed(names)}" for what, names in parts if names)
        only_classes = not missing and not unexpected and set(misfits) <= set(described.class_keys)
        if only_classes:
            raise CheckpointError(
                f"{path} does not fit {card.name!r}: {found}; pass num_classes (or labels) to choose the class count"
            )
        raise CheckpointError(
            f"{path} does not fit {card.name!r}: {likeness(whole, described, card)}; {found}; use the card it belongs "
            "to"
        )
    taken = {key: value.to(expected[key].dtype) for key, value in taken.items()}
    _check_finite(path, taken)
    model.load_state_dict({**expected, **taken}, strict=True)
    return replaced


def _described(tensor: Tensor) -> str:
    kind = "" if tensor.layout == torch.strided else f" {tensor.layout}"
    return f"{list(tensor.shape)} {tensor.dtype}{kind}" + ("" if tensor.device.type == "cpu" else f" {tensor.device}")


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
        changes |= count_costs(cast(nn.Module, model), model.inputs, card.frontend, card.length_policy)._asdict()
        changes |= {"metrics": {}, "checkpoint": None}
        changes["provenance"] = {**card.provenance, "initialised_from": {"name": card.name, "sha256": sha256}}
    return card.replace(**changes)


def _listed(names: Iterable[str], most: int = 12) -> str:
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
