"""Events in files: DCASE's tables, JSON, and label tracks for Audacity."""

from __future__ import annotations

import csv
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from models_zoo.errors import DataError, UnknownNameError
from models_zoo.files import replacing
from models_zoo.prediction import Event
from models_zoo.segments import merge_events

__all__ = ["EVENT_SUFFIXES", "read_events", "write_events"]

_COLUMNS = ("filename", "onset", "offset", "event_label")

_ROUNDING = 0.01
"""Seconds by which an annotated offset may lie beyond the end of its recording: times are rounded."""


def read_events(
    path: str | Path,
    *,
    labels: Sequence[str] | None = None,
    durations: Mapping[str, float] | None = None,
) -> dict[str, tuple[Event, ...]]:
    """Return the events of each recording in a DCASE table, by onset.

    A tab-separated file with the columns ``filename``, ``onset``, ``offset``, ``event_label`` and, if wanted,
    ``confidence`` (1 where it is missing), in any order; others are ignored. A row with a file's name alone says that
    it has no events.

    Events of one class that overlap or touch become one, and a warning says how many did; so it does of a table without
    events.

    Args:
        path: of the table.
        labels: the classes there are, or None for any.
        durations: file name -> seconds, to check times against; files that are not in it are not checked.

    Raises:
        DataError: not such a table, or a row with an unknown label, an offset before its onset, or times beyond the
            recording; the line is named.
    """
    path = Path(path)
    found: dict[str, list[Event]] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, delimiter="\t")
            missing = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                got = ", ".join(reader.fieldnames) if reader.fieldnames else "an empty file"
                raise DataError(f"{path}: got {got}; expected the tab-separated columns {', '.join(_COLUMNS)}")
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                name = (row["filename"] or "").strip()
                if not name:
                    raise DataError(f"{where}: names no file; expected {', '.join(_COLUMNS)}")
                of_file = found.setdefault(name, [])
                if any((row[column] or "").strip() not in ("", "nan", "NaN") for column in _COLUMNS[1:]):
                    of_file.append(_event(row, where, labels, (durations or {}).get(name)))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a tab-separated table in UTF-8: {error}") from None
    merged = {name: merge_events(events) for name, events in found.items()}
    lost = {name: len(events) - len(merged[name]) for name, events in found.items()}
    if not any(found.values()):
        warnings.warn(f"{path} holds no events", stacklevel=2)
    if any(lost.values()):
        first = next(name for name, count in lost.items() if count)
        warnings.warn(
            f"{path}: {sum(lost.values())} events overlap or touch another of their class and were merged with it, "
            f"first in {first}",
            stacklevel=2,
        )
    return merged


def _event(row: Mapping[str, str | None], where: str, labels: Sequence[str] | None, duration: float | None) -> Event:
    onset, offset = (_number(row, column, where) for column in ("onset", "offset"))
    label = (row["event_label"] or "").strip()
    probability = _number(row, "confidence", where) if (row.get("confidence") or "").strip() else 1.0
    if not label or (labels is not None and label not in labels):
        raise DataError(f"{where}: {UnknownNameError('label', label, labels or ())}")
    if not 0 <= onset < offset:
        raise DataError(f"{where}: an event from {onset} to {offset} s; expected 0 <= onset < offset")
    if not 0 <= probability <= 1:
        raise DataError(f"{where}: a confidence of {probability}; expected 0 to 1")
    if duration is not None and (onset >= duration or offset > duration + _ROUNDING):
        raise DataError(
            f"{where}: an event from {onset} to {offset} s in a recording of {duration:g} s; correct the times, or "
            "leave the row out"
        )
    return Event(label, onset, offset if duration is None else min(offset, duration), probability)


def _number(row: Mapping[str, str | None], column: str, where: str) -> float:
    try:
        number = float(row[column] or "")
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{where}: {column} is {row[column]!r}; expected a number")
    return number


def write_events(path: str | Path, events: Mapping[str, Sequence[Event]], *, force: bool = False) -> None:
    """Write the events of recordings; the suffix decides how.

    ``.tsv``: DCASE's columns filename, onset, offset, event_label, a row per event. ``.json``: an object of file name
    -> list of events with their probabilities. ``.txt``: an Audacity label track, of one recording. Seconds are
    written in full, so that they are read back as the same frames.

    Args:
        path: where to.
        events: file name -> its events, also where there are none.
        force: replace an existing file.

    Raises:
        DataError: another suffix, or several recordings for a label track.
        OutputExistsError, OutputWriteError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in _WRITERS:
        raise DataError(f"{path}: expected a file name ending in {', '.join(_WRITERS)}")
    if path.suffix.lower() == ".txt" and len(events) > 1:
        raise DataError(f"{path}: a label track is of one recording, got {len(events)}; write a .tsv or a .json")
    with (
        replacing(path, force=force) as partial,
        # A file's name may hold bytes that are no UTF-8; they are written as they are printed.
        partial.open("w", encoding="utf-8", errors="backslashreplace", newline="") as stream,
    ):
        _WRITERS[path.suffix.lower()](stream, events)


def _write_tsv(stream: IO[str], events: Mapping[str, Sequence[Event]]) -> None:
    writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows((name, one.onset, one.offset, one.label) for name, several in events.items() for one in several)


def _write_json(stream: IO[str], events: Mapping[str, Sequence[Event]]) -> None:
    json.dump({name: [vars(one) for one in several] for name, several in events.items()}, stream, indent=1)
    stream.write("\n")


def _write_audacity(stream: IO[str], events: Mapping[str, Sequence[Event]]) -> None:
    for several in events.values():
        stream.writelines(f"{one.onset}\t{one.offset}\t{' '.join(one.label.split())}\n" for one in several)


_WRITERS: dict[str, Callable[[IO[str], Mapping[str, Sequence[Event]]], None]] = {
    ".tsv": _write_tsv,
    ".json": _write_json,
    ".txt": _write_audacity,
}

EVENT_SUFFIXES = tuple(_WRITERS)
"""Suffixes of the files that :func:`write_events` writes."""
