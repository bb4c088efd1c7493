"""Published label sets: which class has which index.

Source: AudioSet, Google, ``class_labels_indices.csv`` (research.google.com/audioset), licence CC BY 4.0; the rows are
unchanged.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from models_zoo.errors import UnknownNameError

__all__ = ["Label", "get_labels", "label_names", "list_label_sets"]

_FOLDER = Path(__file__).parent / "labels"


@dataclass(frozen=True)
class Label:
    """One class: its index in a model's output, machine identifier (e.g. ``/m/09x0r``) and display name."""

    index: int
    mid: str
    display_name: str


def list_label_sets() -> list[str]:
    """Return the names of the label sets, e.g. ``audioset``."""
    return sorted(path.stem for path in _FOLDER.glob("*.csv"))


@cache
def get_labels(name: str) -> tuple[Label, ...]:
    """Return the classes of a label set in the order of their indices.

    Raises:
        UnknownNameError: no such set.
    """
    if name not in list_label_sets():
        raise UnknownNameError("label set", name, list_label_sets())
    with open(_FOLDER / f"{name}.csv", encoding="utf-8", newline="") as stream:
        return tuple(Label(int(row["index"]), row["mid"], row["display_name"]) for row in csv.DictReader(stream))


def label_names(name: str) -> tuple[str, ...]:
    """Return the display names of a label set in the order of their indices.

    Raises:
        UnknownNameError: no such set.
    """
    return tuple(label.display_name for label in get_labels(name))
