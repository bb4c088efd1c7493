"""The zoo: cards of published checkpoints, and models that ship with the package."""

from __future__ import annotations

import fnmatch
import json
import re
from pathlib import Path
from urllib.parse import unquote

from models_zoo.cards import ModelCard
from models_zoo.errors import UnknownNameError
from models_zoo.labels import label_names
from models_zoo.presets import get_frontend

__all__ = ["get_card", "list_models", "list_shipped", "published_as", "shipped_checkpoint", "shipped_model"]

_HERE = Path(__file__).parent
_CARDS = _HERE / "cards"
_WEIGHTS = _HERE / "weights"


def list_models(pattern: str = "*") -> list[str]:
    """Return the sorted names of the cards that match ``pattern`` (shell style, e.g. ``"mn10_as*"``)."""
    return fnmatch.filter(sorted(path.stem for path in _CARDS.glob("*.json")), pattern.lower())


def get_card(name: str) -> ModelCard:
    """Return the card called ``name``; ``mn40_as(2)``, the published spelling, is ``mn40_as_2`` here.

    Raises:
        UnknownNameError: no such card; the message suggests near names.
        CardError: the card's file is impossible; names the field.
    """
    name = re.sub(r"\((\d)\)$", r"_\1", name.lower())
    if name not in list_models():
        raise UnknownNameError("model", name, list_models())
    data = json.loads((_CARDS / f"{name}.json").read_text(encoding="utf-8"))
    # A card in the zoo may name a preset and a label set instead of repeating them; a travelling card holds both.
    if isinstance(data.get("frontend"), str):
        data["frontend"] = get_frontend(data["frontend"]).to_dict()
    if isinstance(data.get("labels"), str):
        data["labels"] = list(label_names(data["labels"]))
    return ModelCard.from_dict(data)


def published_as(file: str) -> str | None:
    """Return the name of the card whose published file is called ``file``, or None.

    The mark that browsers add to a second copy, ``mn10_as_mAP_471 (1).pt``, is ignored; without the blank such a mark
    belongs to the published name (``mn40_as_mAP_483(2).pt``). Blanks around a name, which one published file has, are
    ignored too.
    """
    wanted = re.sub(r" \(\d+\)(?=\.[^.]+$)", "", unquote(file)).strip()
    for name in list_models():
        source = json.loads((_CARDS / f"{name}.json").read_text(encoding="utf-8")).get("checkpoint")
        if source is not None and source["file"].strip() == wanted:
            return name
    return None


def list_shipped() -> list[str]:
    """Return the sorted names of the models whose ONNX file ships with the package."""
    return sorted(path.stem for path in _WEIGHTS.glob("*.onnx"))


def shipped_model(name: str) -> Path:
    """Return the ONNX file of a shipped model; its card is inside.

    Raises:
        UnknownNameError: no model of that name ships; the message suggests near names.
    """
    if name not in list_shipped():
        raise UnknownNameError("shipped model", name, list_shipped())
    return _WEIGHTS / f"{name}.onnx"


def shipped_checkpoint(name: str) -> Path | None:
    """Return the checkpoint a shipped model was exported from, or None: the wheel leaves checkpoints out."""
    path = _WEIGHTS / f"{name}.safetensors"
    return path if name in list_shipped() and path.is_file() else None
