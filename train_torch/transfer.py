"""Transfer models: a trained network as the base, a new layer on its embedding.

Source: qiuqiangkong/panns_transfer_to_gtzan.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models_zoo.errors import CheckpointError
from train_torch.checkpoint import Checkpoint, load_checkpoint
from train_torch.models import create_model, new_card
from train_torch.models.panns_cnn import Cnn14, TransferCnn14, TransferOptions

__all__ = ["is_transfer", "transferred"]

_TRANSFER = "transfer_cnn14"


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
