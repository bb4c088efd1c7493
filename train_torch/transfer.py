"""Networks that begin with another kind of network: a transfer model on its base, a classifier on pre-trained towers.

Source: qiuqiangkong/panns_transfer_to_gtzan; YuanGongND/cav-mae src/traintest_ft.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import nn

from models_zoo.cards import LengthPolicy
from models_zoo.errors import CheckpointError, SpecError
from train_torch.checkpoint import Checkpoint, load_checkpoint
from train_torch.costs import count_costs
from train_torch.models import create_model, new_card
from train_torch.models.cavmae import CAVMAEFT, Mode
from train_torch.models.cavmae_blocks import TowerOptions, Towers
from train_torch.models.panns_cnn import Cnn14, TransferCnn14, TransferOptions

__all__ = ["fine_tuned_towers", "in_mode", "is_towers", "is_transfer", "take_towers", "transferred"]

_TRANSFER = "transfer_cnn14"

_TOWERS = ("cavmaeft", "cavmaeft_audio")


def is_transfer(architecture: str) -> bool:
    """Return whether an architecture takes another network as its base."""
    return architecture == _TRANSFER


def transferred(
    architecture: str,
    path: str | Path,
    labels: Sequence[str],
    card: str | None = None,
    *,
    checkpoints: str | Path | None = None,
) -> Checkpoint:
    """Return a transfer model whose base is the network in a checkpoint, with a fresh layer for ``labels``.

    A checkpoint that is a transfer model already is loaded as it is, with a fresh layer only where the number of
    classes differs.

    Args:
        architecture: a transfer model's, see :func:`is_transfer`.
        path, card, checkpoints: see :func:`load_checkpoint`.
        labels: class names in order.

    Raises:
        CheckpointError: the checkpoint cannot be loaded, or is no Cnn14 of published form with classes.
    """
    loaded = load_checkpoint(path, card, checkpoints=checkpoints)
    if isinstance(loaded.model, TransferCnn14):
        return load_checkpoint(path, card, labels=labels, checkpoints=checkpoints)
    if not isinstance(loaded.model, Cnn14) or loaded.model.declared.embedding or not loaded.model.declared.num_classes:
        raise CheckpointError(
            f"{path}: {loaded.card.name!r} is a {loaded.card.architecture!r}; the base of a {architecture!r} is a "
            "Cnn14 with classes and an embedding as wide as its last block. To transfer another network, take a recipe "
            "whose model is no transfer model and freeze all but the head (--freeze)"
        )
    base = loaded.model.declared
    options: dict[str, Any] = {
        name: value for name, value in base.to_dict().items() if name in TransferOptions.model_fields
    }
    options |= {"num_classes": len(labels), "base_classes": base.num_classes}
    model = create_model(architecture, **options)
    model.get_submodule("base").load_state_dict(loaded.model.state_dict())
    described = new_card(
        loaded.card.name,
        architecture,
        model=model,
        frontend=loaded.card.frontend,
        task="single_label",
        labels=tuple(labels),
        length_policy=loaded.card.length_policy,
    )
    replaced = tuple(key for key in model.state_dict() if key.startswith(model.head_prefix))
    return Checkpoint(model.eval(), described, replaced, loaded.sha256)


def is_towers(architecture: str) -> bool:
    """Return whether an architecture classifies behind the towers of a pre-trained CAV-MAE."""
    return architecture in _TOWERS


def fine_tuned_towers(
    architecture: str,
    path: str | Path,
    labels: Sequence[str],
    task: str,
    card: str | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    checkpoints: str | Path | None = None,
) -> Checkpoint:
    """Return a CAV-MAE classifier with the towers of a checkpoint, pre-trained or fine-tuned.

    It has a head for ``labels``. Of a pre-trained network the head is fresh, and its decoder stays behind. Of a
    fine-tuned one the head stays where the number of classes is the same and the mode too.

    Args:
        architecture: see :func:`is_towers`.
        path, card, checkpoints: see :func:`load_checkpoint`.
        labels: class names in order.
        task: of the new card.
        options: ``mode`` and others that are no matter of the towers, and ``dynamic_time`` for clips of any length from
            now on. The rest of the towers are the checkpoint's, and may only be said again.

    Raises:
        SpecError: an option of the towers that the checkpoint has otherwise.
        CheckpointError: the checkpoint cannot be loaded, is no CAV-MAE, or lacks the towers the mode needs.
    """
    loaded = load_checkpoint(path, card, checkpoints=checkpoints)
    if not isinstance(loaded.model, Towers):
        raise CheckpointError(
            f"{path}: {loaded.card.name!r} is a {loaded.card.architecture!r}; a {architecture!r} begins with a "
            "pre-trained 'cavmae', or a fine-tuned 'cavmaeft'"
        )
    chosen = dict(options or {})
    towers = {name: getattr(loaded.model.declared, name) for name in TowerOptions.model_fields}
    for name, value in towers.items():
        # Any towers answer to shorter clips; to fill clips up takes a value that a front end without filler has not.
        if chosen.get(name, value) != value and (name, value) != ("dynamic_time", False):
            raise SpecError(
                f"{name}: got {chosen[name]!r}; the towers of {loaded.card.name!r} ({path}) have {value!r}, which "
                "stands; leave it out, or begin with another network",
                field=name,
            )
    model = cast(CAVMAEFT, create_model(architecture, **{**towers, **chosen, "num_classes": len(labels)}))
    fresh, given = model.state_dict(), loaded.model.state_dict()
    same = isinstance(loaded.model, CAVMAEFT) and loaded.model.declared.mode == model.declared.mode
    kept = {
        key: value
        for key, value in given.items()
        if key in fresh and value.shape == fresh[key].shape and (same or not key.startswith(model.head_prefix))
    }
    replaced = tuple(key for key in fresh if key not in kept)
    strangers = [key for key in replaced if not key.startswith(model.head_prefix)]
    if strangers:
        raise CheckpointError(
            f"{path}: {loaded.card.name!r} has no {strangers[0]} and {len(strangers) - 1} more that mode "
            f"{model.declared.mode!r} needs; begin with a network of both modalities, or choose mode 'audioonly'"
        )
    model.load_state_dict({**fresh, **kept}, strict=True)
    needed, frontend = {part.source for part in model.inputs}, loaded.card.frontend
    described = new_card(
        loaded.card.name,
        architecture,
        model=model,
        frontend=model.fitted(frontend) if "frontend" in needed and frontend is not None else None,
        image=loaded.card.image if "image" in needed else None,
        task=task,
        labels=tuple(labels),
        **({"length_policy": loaded.card.length_policy} if "frontend" in needed else {}),
    )
    return Checkpoint(model.eval(), described, replaced, loaded.sha256)


def take_towers(model: nn.Module, loaded: Checkpoint) -> tuple[str, ...]:
    """Give a CAV-MAE to be pre-trained the towers of a classifier; return the entries that keep their own values.

    As published ones begin with a network of pictures: one that was trained on pictures alone leaves sound's own blocks
    as fresh as they were.

    Args:
        model: a network to be pre-trained.
        loaded: a ``cavmaeft`` of the same widths and depths.

    Raises:
        CheckpointError: another network, or towers of other shapes.
    """
    expected, given = model.state_dict(), loaded.model.state_dict()
    if not isinstance(loaded.model, CAVMAEFT):
        raise CheckpointError(
            f"{loaded.card.name!r} is a {loaded.card.architecture!r}; pre-training begins with a 'cavmae', or with the "
            "towers of a 'cavmaeft'"
        )
    shared = {key: value for key, value in given.items() if key in expected}
    misfits = [key for key, value in shared.items() if value.shape != expected[key].shape]
    missing = [key for key in given if key not in expected and not key.startswith(loaded.model.head_prefix)]
    if misfits or missing:
        first = (misfits + missing)[0]
        raise CheckpointError(
            f"{loaded.card.name!r} does not fit: {first} is {list(given[first].shape)}, the model has "
            f"{list(expected[first].shape) if first in expected else 'nothing'}; give both the same widths and depths"
        )
    silent = "blocks_a." if loaded.model.declared.mode == "videoonly" else None
    taken = {key: value for key, value in shared.items() if silent is None or not key.startswith(silent)}
    model.load_state_dict({**expected, **taken}, strict=True)
    return tuple(key for key in expected if key not in taken)


def in_mode(loaded: Checkpoint, mode: Mode) -> Checkpoint:
    """Return a CAV-MAE classifier that is given what ``mode`` says from now on, and the card that says so.

    Of a network trained on both, sound or picture can be left away: ``missingaudioonly``, ``missingvideoonly``.

    Raises:
        CheckpointError: another network, or one whose card does not say how the sound or picture it needs is read.
        CardError: pictures of a network without their parameters.
    """
    model, card = loaded.model, loaded.card
    if not isinstance(model, CAVMAEFT):
        raise CheckpointError(
            f"mode: got {mode!r}; {card.name!r} is a {card.architecture!r}, and a 'cavmaeft' has modes"
        )
    trained = model.declared.mode
    model.set_mode(mode)
    needed = {part.source for part in model.inputs}
    for source, given in (("frontend", card.frontend), ("image", card.image)):
        if source in needed and given is None:
            raise CheckpointError(
                f"mode: got {mode!r}; {card.name!r} was trained as {trained!r}, and its card has no {source}; choose a "
                "mode that needs none"
            )
    policy = card.length_policy if "frontend" in needed else LengthPolicy()
    frontend = card.frontend if "frontend" in needed else None
    described = card.replace(
        options=model.options,
        inputs=model.inputs,
        frontend=frontend,
        image=card.image if "image" in needed else None,
        length_policy=policy,
        metrics={},
        thresholds=None,
        checkpoint=None,
        provenance={**card.provenance, "trained_in_mode": trained},
        **count_costs(model, model.inputs, frontend, policy)._asdict(),
    )
    return Checkpoint(model, described, loaded.replaced, loaded.sha256)
