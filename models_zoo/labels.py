"""Published label sets: which class has which index.

Source: AudioSet, Google, ``class_labels_indices.csv`` (research.google.com/audioset), licence CC BY 4.0; the rows are
unchanged.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from models_zoo.errors import CardError, UnknownNameError

__all__ = ["Label", "check_labels", "get_labels", "label_names", "list_label_sets"]

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


def check_labels(
    labels: Sequence[str],
    wanted: Sequence[str],
    *,
    given: str,
    expected: str,
    advice: str = "a model's labels are fixed when it is trained: correct the file, or leave it out",
) -> None:
    """Check that two label lists are the same, in the same order.

    Args:
        labels: what came.
        wanted: what was expected.
        given, expected: where the two come from, for the message.
        advice: what to do about it.

    Raises:
        CardError: they are not; names the first index at which they differ.
    """
    if list(labels) == list(wanted):
        return
    index = next(
        (i for i, pair in enumerate(zip(labels, wanted, strict=False)) if pair[0] != pair[1]),
        min(len(labels), len(wanted)),
    )
    here, there = (repr(names[index]) if index < len(names) else "nothing" for names in (labels, wanted))
    same = "the same names in another order" if sorted(labels) == sorted(wanted) else f"{len(labels)} labels"
    raise CardError(
        f"labels: {given} ({same}) first disagrees with {expected} ({len(wanted)} labels) at index {index} (line "
        f"{index + 1}): {here}, not {there}; {advice}",
        field="labels",
    )
