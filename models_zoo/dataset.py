"""Labelled recordings in a folder: reading them, splitting them, and proving that no split leaks.

Three layouts are recognised, in this order:

1. ``metadata.csv`` with the columns ``file`` and ``label`` and, if wanted, ``image``, ``weights``, ``split``,
   ``speaker``, ``fold``, ``recording``, ``absent``, ``onset`` and ``offset`` (seconds); other columns are ignored.
   Several labels are separated by ``;``. A file may have several rows where each has its own onset and offset.
2. ESC-50's own: ``meta/esc50.csv`` (``filename``, ``fold``, ``target``, ``category``, and ``src_file`` where it is
   there, which is the recording) beside ``audio/``.
3. A folder of class folders, at choice below folders named after splits: ``dog/1.wav`` or ``train/dog/1.wav``.

Files with the same ``recording`` were cut from one recording, and never part, however the data is split.

Where a table has the column ``absent``, it names the classes that are known not to be in a clip; a class named in
neither column is unknown for that clip, and counts neither in training nor in metrics. Without the column every class
that is not in ``label`` is absent.

Where a table has the column ``weights``, it says how much of a clip each of its labels is: ``0.7;0.3`` beside the label
``three;five``, never negative, one in sum. Without it, only clips of one label have a distribution: all of that label.

Where a table has the column ``image``, it names the picture that belongs to a clip, or several of them, frames of a
video in their order, separated by ``;``; paths are relative to the table.

Where a table has the column ``part``, it says what is known of a clip for event detection: ``strong`` (every event with
its onset and offset; one row without label is a clip without events), ``weak`` (classes, without times) or
``unlabelled`` (nothing). Without it, rows with times are strong and others weak. The column
``confidence`` (above 0, at most 1) says how sure a row with times is: the target in training; an event needs more than
half.
"""

from __future__ import annotations

import csv
import hashlib
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from models_zoo.errors import DataError
from models_zoo.files import replacing

__all__ = ["AUDIO_SUFFIXES", "PARTS", "SPLITS", "Dataset", "Group", "Part", "Record", "read_dataset", "read_split"]

Group = Literal["speaker", "fold"]

Part = Literal["strong", "weak", "unlabelled"]

PARTS: tuple[Part, ...] = ("strong", "weak", "unlabelled")
"""What may be known of a clip for event detection, from most to least."""

SPLITS = ("train", "validation", "test")
"""The split names; ``training``, ``val``, ``valid``, ``eval`` and ``evaluation`` are read as one of them."""

_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "eval": "test",
    "evaluation": "test",
}

AUDIO_SUFFIXES = frozenset(
    {".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".caf", ".w64"}
)
"""Lower-case suffixes of the files taken for recordings in class folders."""


@dataclass(frozen=True)
class Record:
    """One labelled recording, or one labelled stretch of it.

    Attributes:
        file: path of the recording.
        labels: its classes, at least one (or none, where classes are known to be absent, or nothing is known).
        split: ``train``, ``validation``, ``test``, or None where none was declared.
        speaker, fold: groups that must not be torn between splits, or None.
        recording: what it was cut from, or None for the file itself; never torn.
        weights: per label how much of the recording it is, one in sum, or None where that is not said.
        absent: classes known not to be in it, the others being unknown; None where all others are absent.
        onset, offset: the stretch the labels hold for, in seconds, or None for the whole file.
        confidence: of a stretch, in (0, 1].
        part: what is known of the file for event detection; of an ``unlabelled`` one no label is known.
        images: its pictures: none, one, or frames of a video in their order.
    """

    file: Path
    labels: tuple[str, ...]
    split: str | None = None
    speaker: str | None = None
    fold: str | None = None
    recording: str | None = None
    weights: tuple[float, ...] | None = None
    absent: tuple[str, ...] | None = None
    onset: float | None = None
    offset: float | None = None
    part: Part = "weak"
    confidence: float = 1.0
    images: tuple[Path, ...] = ()

    @property
    def image(self) -> Path | None:
        """The one picture to look at where one is wanted: the middle frame (of ten the sixth), or None."""
        return self.images[len(self.images) // 2] if self.images else None


@dataclass(frozen=True)
class Dataset:
    """Labelled recordings and the ordered classes they are labelled with.

    Attributes:
        records: in the order of the table, or sorted by path for class folders.
        labels: all classes, sorted; ESC-50's in the order of its ``target`` column.
        root: folder that file names are written relative to.
    """

    records: tuple[Record, ...]
    labels: tuple[str, ...]
    root: Path

    def __len__(self) -> int:
        return len(self.records)

    def name_of(self, record: Record) -> str:
        """Return the file of ``record`` relative to :attr:`root`, with forward slashes."""
        return record.file.relative_to(self.root).as_posix()

    def select(self, split: str | None = None) -> Dataset:
        """Return the records of one split (all of them for None); the classes stay the same.

        Raises:
            DataError: an unknown split name, or no record belongs to it.
        """
        if split is None:
            return self
        wanted = _split_name(split, "select")
        chosen = tuple(record for record in self.records if record.split == wanted)
        if not chosen:
            present = sorted({str(record.split) for record in self.records})
            raise DataError(
                f"{self.root}: no recording in split {wanted!r}; splits present: {', '.join(present)} "
                "('None': the data declares no split; split it by file, speaker or fold)"
            )
        return replace(self, records=chosen)

    def class_counts(self) -> dict[str, int]:
        """Return label -> number of records with it, in the order of :attr:`labels`, zeros included."""
        counts = dict.fromkeys(self.labels, 0)
        for record in self.records:
            for label in record.labels:
                counts[label] += 1
        return counts

    def multi_hot(self) -> NDArray[np.float32]:
        """Return ``(num_records, num_classes)`` float32, 1 where a record has a class and 0 elsewhere."""
        index = {label: i for i, label in enumerate(self.labels)}
        targets = np.zeros((len(self.records), len(self.labels)), np.float32)
        for row, record in enumerate(self.records):
            targets[row, [index[label] for label in record.labels]] = 1
        return targets

    def distributions(self) -> NDArray[np.float32]:
        """Return ``(num_records, num_classes)`` float32, how much of a record each class is, one in sum.

        Raises:
            DataError: a record has not exactly one label, and no weights.
        """
        index = {label: i for i, label in enumerate(self.labels)}
        targets = np.zeros((len(self.records), len(self.labels)), np.float32)
        for row, record in enumerate(self.records):
            if record.weights is None and (len(record.labels) != 1 or record.absent is not None):
                raise DataError(
                    f"{self.root}: {self.name_of(record)!r} is {';'.join(record.labels) or 'nothing known'}, without "
                    "saying how much of each; add the column 'weights', e.g. 0.7;0.3 for three;five"
                )
            targets[row, [index[label] for label in record.labels]] = record.weights or (1.0,)
        return targets

    def known(self) -> NDArray[np.bool_] | None:
        """Return ``(num_records, num_classes)``, whether a record is known to have or to lack a class; None for all."""
        if all(record.absent is None for record in self.records):
            return None
        index = {label: i for i, label in enumerate(self.labels)}
        known = np.zeros((len(self.records), len(self.labels)), np.bool_)
        for row, record in enumerate(self.records):
            named = self.labels if record.absent is None else record.labels + record.absent
            known[row, [index[label] for label in named]] = True
        return known

    @property
    def is_multi_label(self) -> bool:
        """Whether any record has more than one class, none, or classes that are not known."""
        return any(len(record.labels) != 1 or record.absent is not None for record in self.records)

    @property
    def has_splits(self) -> bool:
        """Whether every record belongs to a split."""
        return all(record.split is not None for record in self.records)

    def with_labels(self, labels: Sequence[str]) -> Dataset:
        """Return the data set with its classes in the order of ``labels``, e.g. a model's.

        Raises:
            DataError: a record has a class that is not in ``labels``.
        """
        strangers = [label for label in self.labels if label not in set(labels)]
        if strangers:
            raise DataError(
                f"{self.root}: {len(strangers)} labels are unknown to the model: {_some(strangers)}; "
                f"the model's {len(labels)} labels: {_some(labels)}"
            )
        return replace(self, labels=tuple(labels))

    def by_file(self) -> Dataset:
        """Return one record per file with all its labels and no onset: clip labels from labelled stretches.

        A class is absent from the file where it is from every stretch, and unknown where one leaves it open. Weights
        hold for whole files, so stretches have none.
        """
        merged: dict[Path, Record] = {}
        for record in self.records:
            before = merged.get(record.file, record)
            labels = tuple(dict.fromkeys(before.labels + record.labels))
            absent = before.absent
            if absent is not None and record.absent is not None:
                absent = tuple(label for label in absent if label in record.absent and label not in labels)
            merged[record.file] = replace(before, labels=labels, absent=absent, onset=None, offset=None)
        return replace(self, records=tuple(merged.values()))

    def events(self) -> dict[str, tuple[tuple[str, float, float], ...]]:
        """Return file, as :meth:`name_of` says it -> (label, onset, offset in seconds) of its events, by onset.

        Only ``strong`` files are in it, those without events too. Events of one class that overlap or touch are one,
        see :meth:`overlapping`; what is half as sure or less is none.
        """
        stretches: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for record in self.records:
            if record.part != "strong":
                continue
            of_file = stretches.setdefault(self.name_of(record), {})
            if record.onset is not None and record.offset is not None and record.confidence > 0.5:
                for label in record.labels:
                    of_file.setdefault(label, []).append((record.onset, record.offset))
        found = {}
        for name, of_file in stretches.items():
            events = [(label, *stretch) for label, several in of_file.items() for stretch in _merged(several)]
            found[name] = tuple(sorted(events, key=lambda event: (event[1], event[2], event[0])))
        return found

    def overlapping(self) -> list[str]:
        """Return the strong files in which events of one class overlap or touch, which :meth:`events` merges."""
        counts: dict[str, int] = defaultdict(int)
        for record in self.records:
            if record.part == "strong" and record.onset is not None and record.confidence > 0.5:
                counts[self.name_of(record)] += len(record.labels)
        return [name for name, events in self.events().items() if len(events) < counts[name]]

    def single_sources(self, *, seed: int = 0) -> Dataset:
        """Return what mixtures and scenes are made of: one record per file, each of one class and in one split.

        Declared splits are kept; otherwise a fifth is ``test``, by file. A missing validation split is carved from
        ``train``.

        Raises:
            DataError: a recording has several labels, or is in two splits.
        """
        dataset = self.by_file()
        if any(len(record.labels) != 1 or record.absent is not None for record in dataset.records):
            raise DataError(
                f"{self.root}: some recordings have several labels, or none; mixtures and scenes are made of "
                "recordings of one"
            )
        if not dataset.has_splits:
            dataset = dataset.split_by_file(test=0.2, seed=seed)
        if not any(record.split == "validation" for record in dataset.records):
            dataset = dataset.carve_validation(0.1, seed=seed)
        dataset.check_disjoint()
        return dataset

    def remarks(self) -> list[str]:
        """Return what is legal but worth knowing before training: one class only, classes absent from a split."""
        remarks = []
        if len(self.labels) == 1:
            remarks.append(f"only one class, {self.labels[0]!r}: any model is right about it")
        for split in SPLITS:
            part = [record for record in self.records if record.split == split]
            absent = set(self.labels) - {label for record in part for label in record.labels}
            if part and absent:
                remarks.append(f"split {split!r} has no recording of {_some(sorted(absent))}")
        return remarks

    def check_trainable(self) -> None:
        """Prove that every class has a recording in the ``train`` split: what has none cannot be learned.

        Raises:
            DataError: a class has no recording at all, or only ones in other splits; the message names both.
        """
        places: dict[str, set[str | None]] = {label: set() for label in self.labels}
        for record in self.records:
            for label in record.labels:
                places[label].add(record.split)
        empty = [label for label, splits in places.items() if not splits]
        if empty:
            raise DataError(
                f"{self.root}: {len(empty)} classes have no recording: {_some(empty)}; add recordings, or take the "
                "classes out"
            )
        strangers = {label: splits for label, splits in places.items() if "train" not in splits}
        if strangers:
            splits = sorted({str(split) for held in strangers.values() for split in held})
            raise DataError(
                f"{self.root}: {len(strangers)} classes in {' and '.join(map(repr, splits))} are unknown to the "
                f"training split, which has no recording of them: {_some(strangers)}; move some there, split the data "
                "otherwise, or take the classes out"
            )

    def with_split(self, splits: Mapping[str, str]) -> Dataset:
        """Return the data set with the split of every file as in ``splits``, keyed as :meth:`name_of`.

        Raises:
            DataError: a file is missing from ``splits``, or ``splits`` names one that is not here.
        """
        names = {self.name_of(record) for record in self.records}
        for kind, difference in (("not in the split", names - set(splits)), ("not in the data", set(splits) - names)):
            if difference:
                raise DataError(f"{self.root}: {len(difference)} files are {kind}: {_some(sorted(difference))}")
        return self._assigned(lambda record: _split_name(splits[self.name_of(record)], self.name_of(record)))

    def split_by_file(self, *, test: float = 0.2, validation: float = 0.0, seed: int = 0) -> Dataset:
        """Return the data set split file by file, the same way for the same ``seed`` on any machine.

        Every class is spread over the splits in the same shares, as far as its number of files allows; the last file
        of a class stays in ``train``. Files of one recording go together.

        Args:
            test, validation: shares of the files (or recordings), each in [0, 1), together below 1.
            seed: another number gives another split.

        Raises:
            DataError: impossible shares, or too few files for them.
        """
        _check_shares(test, validation)
        units: dict[str, list[Record]] = defaultdict(list)
        for record in self.by_file().records:
            units[self.name_of(record) if record.recording is None else f"recording {record.recording}"].append(record)
        order = sorted(units, key=lambda unit: (units[unit][0].labels, _shuffle_key(seed, unit)))
        held = _every_nth(order, test + validation)
        tested = set(_every_nth(held, test / (test + validation) if held else 0.0))
        held = _without_last_of_a_class(held, {u: {c for r in units[u] for c in r.labels} for u in order})
        tested &= set(held)
        wanted = {"test": test > 0, "validation": validation > 0, "train": True}
        sizes = {"test": len(tested), "validation": len(held) - len(tested), "train": len(order) - len(held)}
        empty = [split for split, is_wanted in wanted.items() if is_wanted and not sizes[split]]
        if empty:
            raise DataError(
                f"{self.root}: {len(order)} files are too few for test={test}, validation={validation}: nothing would "
                f"be in {', '.join(empty)}; add recordings or change the shares"
            )
        sides = dict.fromkeys(order, "train") | {unit: "test" if unit in tested else "validation" for unit in held}
        return self.with_split({self.name_of(record): sides[unit] for unit in order for record in units[unit]})

    def split_by_group(
        self,
        by: Group,
        *,
        test: float = 0.2,
        validation: float = 0.0,
        held_out: Iterable[str] | None = None,
        seed: int = 0,
    ) -> Dataset:
        """Return the data set split so that no speaker (or fold) is on two sides.

        Args:
            by: ``speaker`` or ``fold``.
            test, validation: shares of the records aimed at; at least one group each where above 0.
            held_out: the groups to test on; ``test`` and ``seed`` then do not choose them.
            seed: another number gives another split.

        Raises:
            DataError: a record has no group, a group in ``held_out`` is unknown, or none is left to train on.
        """
        _check_shares(test, validation)
        sizes = self._groups(by)
        order = sorted(sizes, key=lambda group: _shuffle_key(seed, group))
        if held_out is not None:
            tested = list(dict.fromkeys(held_out))
            strangers = sorted(set(tested) - set(sizes))
            if strangers:
                raise DataError(f"{self.root}: no {by} called {_some(strangers)}; present: {_some(sorted(sizes))}")
        else:
            tested = _fill(order, sizes, test)
        validated = _fill([group for group in order if group not in tested], sizes, validation)
        if len(tested) + len(validated) >= len(sizes):
            raise DataError(
                f"{self.root}: nothing left to train on: {len(sizes)} {by}s ({_some(sorted(sizes))}), of which "
                f"{len(tested)} test and {len(validated)} validation; hold out fewer"
            )
        sides = dict.fromkeys(tested, "test") | dict.fromkeys(validated, "validation")
        return self._assigned(lambda record: sides.get(str(getattr(record, by)), "train"))

    def leave_one_out(self, by: Group) -> Iterator[tuple[str, Dataset]]:
        """Yield (group, data set with that group as ``test`` and the others as ``train``), in sorted order."""
        for group in sorted(self._groups(by)):
            yield group, self.split_by_group(by, held_out=[group])

    def carve_validation(self, share: float = 0.1, *, by: Literal["file"] | Group = "file", seed: int = 0) -> Dataset:
        """Return the data set with ``share`` of its ``train`` records moved to ``validation``; test stays as it is."""
        train = self.select("train")
        part = (
            train.split_by_file(test=0.0, validation=share, seed=seed)
            if by == "file"
            else train.split_by_group(by, test=0.0, validation=share, seed=seed)
        )
        moved = {record.file for record in part.records if record.split == "validation"}
        return self._assigned(lambda record: "validation" if record.file in moved else record.split)

    def thinned(self, ratio: float, *, seed: int = 0) -> Dataset:
        """Return the data set with its ``train`` records thinned until the classes are imbalanced on purpose.

        The classes are put in an order that follows from ``seed``; their counts then fall geometrically, the first
        having ``ratio`` times as many records as the last, and as many as the scarcest class allows. Which records
        stay follows from ``seed`` and their names. The other splits are untouched.

        Args:
            ratio: most to least frequent class, at least 1 (all classes alike).
            seed: another number gives other rare classes and other records.

        Raises:
            DataError: a record has several classes, a class has no ``train`` record, or a ratio that leaves none.
        """
        train = self.select("train")
        if train.is_multi_label:
            raise DataError(f"{self.root}: only recordings of one class each can be thinned; some have several")
        counts = train.class_counts()
        absent = [label for label, count in counts.items() if not count]
        if absent:
            raise DataError(f"{self.root}: cannot thin the training split: it has no recording of {_some(absent)}")
        order = sorted(self.labels, key=lambda label: _shuffle_key(seed, label))
        shares = {label: ratio ** (-rank / max(len(order) - 1, 1)) for rank, label in enumerate(order)}
        most = min(counts[label] / share for label, share in shares.items())
        sizes = {label: round(most * share) for label, share in shares.items()}
        if ratio < 1 or not all(sizes.values()):
            raise DataError(
                f"{self.root}: got an imbalance of {ratio:g}; expected at least 1, and at most about {2 * most:.0f}: "
                f"the most frequent class would keep {sizes[order[0]]} recordings and the rarest {sizes[order[-1]]}"
            )
        kept = set()
        for label, size in sizes.items():
            files = sorted(
                (self.name_of(r) for r in train.records if label in r.labels), key=lambda n: _shuffle_key(seed, n)
            )
            kept.update(files[:size])
        records = (r for r in self.records if r.split != "train" or self.name_of(r) in kept)
        return replace(self, records=tuple(records))

    def check_disjoint(self, by: Group | None = None) -> None:
        """Prove that no file, no picture, no recording, and no group where ``by`` is given, is on two sides.

        Raises:
            DataError: one is; the message names it and its splits.
        """
        sides: dict[str, set[str | None]] = defaultdict(set)
        for record in self.records:
            sides[self.name_of(record)].add(record.split)
            for image in record.images:
                sides[f"image {image.relative_to(self.root).as_posix()}"].add(record.split)
            if record.recording is not None:
                sides[f"recording {record.recording}"].add(record.split)
            if by is not None:
                sides[f"{by} {getattr(record, by)}"].add(record.split)
        torn = {name: splits for name, splits in sides.items() if len(splits) > 1}
        if torn:
            name, splits = next(iter(torn.items()))
            raise DataError(
                f"{self.root}: {len(torn)} are in more than one split, e.g. {name!r} in {sorted(map(str, splits))}; "
                "a file, picture, recording or group belongs to one split"
            )

    def copies_across_splits(self) -> list[tuple[str, ...]]:
        """Return groups of files with equal bytes that lie in different splits; reads every file once."""
        same: dict[str, dict[str, str | None]] = defaultdict(dict)
        for record in self.by_file().records:
            try:
                with open(record.file, "rb") as stream:
                    digest = hashlib.file_digest(stream, "sha256").hexdigest()
            except OSError as error:
                raise DataError(f"{record.file}: cannot be read: {error.strerror or error}") from error
            same[digest][self.name_of(record)] = record.split
        return [tuple(sorted(files)) for files in same.values() if len(set(files.values())) > 1]

    def write_split(self, path: str | Path, *, force: bool = False) -> None:
        """Write ``file,label,split``, one row per file; read it back with :func:`read_split`.

        Raises:
            DataError: a record has no split, or a file is in two.
            OutputExistsError, OutputWriteError: see :func:`models_zoo.files.replacing`.
        """
        self.check_disjoint()
        if not self.has_splits:
            raise DataError(f"{self.root}: some recordings are in no split; split the data before writing the split")
        with replacing(path, force=force) as partial, open(partial, "w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(("file", "label", "split"))
            for record in self.by_file().records:
                writer.writerow((self.name_of(record), ";".join(record.labels), record.split))

    def _assigned(self, side: Callable[[Record], str | None]) -> Dataset:
        return replace(self, records=tuple(replace(record, split=side(record)) for record in self.records))

    def _groups(self, by: Group) -> dict[str, int]:
        if by not in ("speaker", "fold"):
            raise DataError(f"got a grouping by {by!r}; expected 'speaker' or 'fold'")
        sizes: dict[str, int] = defaultdict(int)
        for record in self.records:
            group = getattr(record, by)
            if group is None:
                raise DataError(
                    f"{self.root}: {self.name_of(record)!r} has no {by}; grouping needs the column {by!r} for every row"
                )
            sizes[group] += 1
        return dict(sizes)


def read_dataset(
    path: str | Path,
    *,
    split_by: Literal["file"] | Group | None = None,
    test: float = 0.2,
    validation: float = 0.0,
    seed: int = 0,
) -> Dataset:
    """Return the labelled recordings of a folder (or of a ``.csv`` table) in one of the layouts above.

    Args:
        path: the folder, or the table itself; file names in it are relative to the table.
        split_by: None keeps the declared splits (none where nothing is declared); ``file``, ``speaker`` or
            ``fold`` replaces them by a seeded split.
        test, validation, seed: of that seeded split.

    Raises:
        DataError: no such folder, nothing recognised in it, missing columns, rows or files; names the row or file.
    """
    path = Path(path)
    if not os.path.exists(path):
        raise DataError(f"{path}: no such folder; give a folder of class folders, or one with a metadata.csv")
    if path.is_file():
        dataset = _read_table(path)
    elif (path / "metadata.csv").is_file():
        dataset = _read_table(path / "metadata.csv")
    elif (path / "meta" / "esc50.csv").is_file():
        dataset = _read_esc50(path)
    else:
        dataset = _read_class_folders(path)
    if split_by is None:
        return dataset
    if split_by == "file":
        return dataset.split_by_file(test=test, validation=validation, seed=seed)
    return dataset.split_by_group(split_by, test=test, validation=validation, seed=seed)


def read_split(path: str | Path) -> dict[str, str]:
    """Return file -> split as :meth:`Dataset.write_split` wrote it, for :meth:`Dataset.with_split`.

    Raises:
        DataError: missing file or columns, an unknown split, or a file listed twice.
    """
    splits: dict[str, str] = {}
    for where, row in _rows(Path(path), ("file", "split")):
        if row["file"] in splits:
            raise DataError(f"{where}: {row['file']!r} is listed twice")
        splits[row["file"]] = _split_name(row["split"], where)
    return splits


def _read_table(path: Path) -> Dataset:
    root = path.parent
    records = []
    for where, row in _rows(path, ("file", "label"), filled=("file",)):
        onset, offset = _stretch(row, where)
        absent = None if "absent" not in row else _split_labels(row["absent"], where) if row["absent"] else ()
        part = _part(row, onset, where)
        if part == "unlabelled":
            absent = ()
        if not row["label"] and not absent and row.get("part", "") in ("", "weak"):
            raise DataError(f"{where}: empty 'label'; every row needs one, or a class that is known to be 'absent'")
        labels = _split_labels(row["label"], where) if row["label"] else ()
        weights = _split_weights(row["weights"], labels, where) if "weights" in row else None
        if weights is not None and (onset is not None or absent is not None):
            raise DataError(f"{where}: 'weights' say what all of a file is made of; leave out onset, offset and absent")
        if set(labels) & set(absent or ()):
            raise DataError(f"{where}: {_some(sorted(set(labels) & set(absent or ())))} is in 'label' and in 'absent'")
        records.append(
            Record(
                file=_inside(root, row["file"], where),
                labels=labels,
                split=_split_name(row["split"], where) if row.get("split") else None,
                speaker=row.get("speaker") or None,
                fold=row.get("fold") or None,
                recording=row.get("recording") or None,
                weights=weights,
                absent=absent,
                onset=onset,
                offset=offset,
                part=part,
                confidence=_confidence(row, onset, where),
                images=_images(root, row.get("image", ""), where),
            )
        )
    return _checked(records, root, path)


def _read_esc50(root: Path) -> Dataset:
    table = root / "meta" / "esc50.csv"
    records = []
    order: dict[str, int] = {}
    for where, row in _rows(table, ("filename", "fold", "target", "category")):
        labels = _split_labels(row["category"], where)
        try:
            target = int(row["target"])
        except ValueError:
            raise DataError(f"{where}: got target {row['target']!r}; expected a class number") from None
        if order.setdefault(labels[0], target) != target:
            raise DataError(f"{where}: {labels[0]!r} has target {target} here and {order[labels[0]]} before")
        file = _inside(root / "audio", row["filename"], where)
        records.append(Record(file, labels, fold=row["fold"] or None, recording=row.get("src_file") or None))
    dataset = _checked(records, root, table)
    return replace(dataset, labels=tuple(sorted(dataset.labels, key=lambda label: (order[label], label))))


def _read_class_folders(root: Path) -> Dataset:
    def recordings(folder: Path) -> list[Path]:
        found = (path for path in folder.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)
        return sorted(
            path
            for path in found
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)
        )

    files = recordings(root)
    if not files:
        raise DataError(
            f"{root}: no recordings found; expected a metadata.csv (file,label), ESC-50's meta/esc50.csv, or class "
            f"folders with files ending in {', '.join(sorted(AUDIO_SUFFIXES))}"
        )
    tops = {file.relative_to(root).parts[0] for file in files}
    depth = 1 if all(top.lower() in _SPLIT_NAMES for top in tops) else 0
    filled = {file.relative_to(root).parts[: depth + 1] for file in files}
    folders = [path for path in root.glob("*/" * depth + "*") if path.is_dir() and not path.name.startswith(".")]
    empty = sorted(str(path.relative_to(root)) for path in folders if path.relative_to(root).parts not in filled)
    if empty:
        raise DataError(
            f"{root}: {len(empty)} class folders hold no recordings: {_some(empty)}; add some, or remove the folders"
        )
    records = []
    for file in files:
        parts = file.relative_to(root).parts
        if len(parts) < depth + 2:
            raise DataError(f"{file}: lies in no class folder; move it into one, or write a metadata.csv (file,label)")
        split = _split_name(parts[0], str(file)) if depth else None
        records.append(Record(file, _split_labels(parts[depth], str(file)), split=split))
    return _checked(records, root, root)


def _rows(
    path: Path, required: tuple[str, ...], *, filled: tuple[str, ...] | None = None
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (``table:line``, row) of a CSV table; header names and values stripped of spaces.

    The columns ``filled`` (by default all that are required) must not be empty in any row.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, skipinitialspace=True, strict=True)
            header = [name.strip().lower() for name in next(reader, [])]
            missing = [name for name in required if name not in header]
            if missing:
                raise DataError(
                    f"{path}: missing column {', '.join(map(repr, missing))}; found {', '.join(map(repr, header))}; "
                    f"expected at least {','.join(required)}, separated by commas"
                )
            if len(set(header)) < len(header):
                raise DataError(f"{path}: a column name appears twice in {','.join(header)}")
            for row in reader:
                if not any(value.strip() for value in row):
                    continue
                where = f"{path}:{reader.line_num}"
                if len(row) != len(header):
                    raise DataError(
                        f"{where}: got {len(row)} values; expected {len(header)} ({','.join(header)}); "
                        "quote values that contain a comma"
                    )
                values = dict(zip(header, (value.strip() for value in row), strict=True))
                empty = [name for name in (required if filled is None else filled) if not values[name]]
                if empty:
                    raise DataError(f"{where}: empty {', '.join(map(repr, empty))}; every row needs one")
                yield where, values
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a CSV table in UTF-8: {error}") from error


def _checked(records: list[Record], root: Path, source: Path) -> Dataset:
    if not records:
        raise DataError(f"{source}: lists no recordings")
    listed = {path for record in records for path in (record.file, *record.images)}
    missing = sorted(path.relative_to(root).as_posix() for path in listed if not path.is_file())
    if missing:
        raise DataError(f"{source}: {len(missing)} listed files are missing: {_some(missing)}")
    rows: dict[Path, list[Record]] = defaultdict(list)
    for record in records:
        rows[record.file].append(record)
    for file, same in rows.items():
        name = file.relative_to(root).as_posix()
        if len(same) > 1 and any(record.onset is None for record in same):
            raise DataError(
                f"{source}: {name!r} has {len(same)} rows; expected one, with several labels separated by ';', "
                "or an onset and offset in each"
            )
        if len({record.part for record in same}) > 1:
            raise DataError(f"{source}: {name!r} has rows of different parts; a file is strong, weak or unlabelled")
        if len({(record.labels, record.onset, record.offset) for record in same}) < len(same):
            raise DataError(f"{source}: {name!r} has the same row twice")
        if len({(record.speaker, record.fold, record.recording, record.images) for record in same}) > 1:
            raise DataError(f"{source}: {name!r} has rows with different speakers, folds, recordings or images")
    labels = tuple(sorted({label for record in records for label in record.labels + (record.absent or ())}))
    dataset = Dataset(tuple(records), labels, root)
    dataset.check_disjoint()
    some, every = any(record.split for record in records), dataset.has_splits
    if some and not every:
        bare = [dataset.name_of(record) for record in records if record.split is None]
        raise DataError(f"{source}: {len(bare)} recordings are in no split while others are: {_some(bare)}")
    return dataset


def _inside(root: Path, name: str, where: str, column: str = "file") -> Path:
    """Return ``root / name``; links are followed, but no name may climb out by itself."""
    parts = PurePosixPath(name).parts
    if Path(name).is_absolute() or ".." in parts or not parts or "\0" in name:
        raise DataError(f"{where}: {column} {name!r} leads out of {root}; expected a path below it")
    return root.joinpath(*parts)


def _images(root: Path, text: str, where: str) -> tuple[Path, ...]:
    names = [name.strip() for name in text.split(";")] if text else []
    if not all(names):
        raise DataError(
            f"{where}: got image {text!r}; expected a path, or several separated by ';', none of them empty"
        )
    return tuple(_inside(root, name, where, "image") for name in names)


def _split_labels(text: str, where: str) -> tuple[str, ...]:
    labels = tuple(label.strip() for label in text.split(";"))
    if not all(labels) or len(set(labels)) < len(labels):
        raise DataError(f"{where}: got label {text!r}; expected distinct names separated by ';', none of them empty")
    return labels


def _split_weights(text: str, labels: tuple[str, ...], where: str) -> tuple[float, ...]:
    """Return a weight per label; what is lost to rounding is shared out, so that they are one in sum."""
    try:
        weights = [float(weight) for weight in text.split(";")]
    except ValueError:
        raise DataError(f"{where}: got weights {text!r}; expected {len(labels)}, numbers separated by ';'") from None
    total = sum(weights)
    # Written so that NaN fails as well.
    if len(weights) != len(labels) or not all(weight >= 0 for weight in weights) or not abs(total - 1) <= 1e-3:
        raise DataError(
            f"{where}: got weights {text!r}, {total:g} in sum, for label {';'.join(labels)!r}; expected {len(labels)}, "
            "separated by ';', none negative, 1 in sum (within 0.001)"
        )
    return tuple(weight / total for weight in weights)


def _split_name(name: str, where: str) -> str:
    try:
        return _SPLIT_NAMES[name.lower()]
    except KeyError:
        raise DataError(f"{where}: unknown split {name!r}; expected one of {', '.join(_SPLIT_NAMES)}") from None


def _stretch(row: Mapping[str, str], where: str) -> tuple[float | None, float | None]:
    texts = row.get("onset", ""), row.get("offset", "")
    if texts == ("", ""):
        return None, None
    try:
        onset, offset = float(texts[0]), float(texts[1])
    except ValueError:
        raise DataError(f"{where}: got onset {texts[0]!r}, offset {texts[1]!r}; expected seconds in both") from None
    if not 0 <= onset < offset < math.inf:
        raise DataError(f"{where}: got onset {onset}, offset {offset}; expected 0 <= onset < offset, in seconds")
    return onset, offset


def _part(row: Mapping[str, str], onset: float | None, where: str) -> Part:
    """Return what is known of the file of a row, stated or from whether it has times."""
    stated = row.get("part", "")
    if not stated:
        return "weak" if onset is None else "strong"
    for part in PARTS:
        if part == stated:
            break
    else:
        raise DataError(f"{where}: got part {stated!r}; expected one of {', '.join(PARTS)}")
    if part == "strong" and (onset is None) == bool(row["label"]):
        raise DataError(
            f"{where}: a strong row is an event, with label, onset and offset; only a clip without events has none of "
            "them"
        )
    if part == "weak" and onset is not None:
        raise DataError(f"{where}: a weak row has no times; call it strong, or leave out onset and offset")
    if part == "unlabelled" and (row["label"] or row.get("absent") or row.get("weights") or onset is not None):
        raise DataError(f"{where}: an unlabelled row says nothing of its clip; call it weak or strong, or empty it")
    return part


def _confidence(row: Mapping[str, str], onset: float | None, where: str) -> float:
    text = row.get("confidence", "")
    if not text:
        return 1.0
    try:
        confidence = float(text)
    except ValueError:
        confidence = math.nan
    if onset is None or not 0 < confidence <= 1:
        raise DataError(
            f"{where}: got confidence {text!r}; expected above 0, at most 1, in a row with onset and offset"
        )
    return confidence


def _merged(stretches: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return (onset, offset) of the union, in order."""
    merged: list[tuple[float, float]] = []
    for onset, offset in sorted(stretches):
        if merged and onset <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], offset)
        else:
            merged.append((onset, offset))
    return merged


def _some(names: Iterable[str], limit: int = 5) -> str:
    names = list(names)
    shown = ", ".join(map(repr, names[:limit]))
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown


def _check_shares(test: float, validation: float) -> None:
    if not (0 <= test < 1 and 0 <= validation < 1 and test + validation < 1):
        raise DataError(f"got test={test}, validation={validation}; expected shares in [0, 1), together below 1")


def _shuffle_key(seed: int, name: str) -> str:
    """A pseudo-random order that depends on nothing but the seed and the name."""
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()


def _every_nth(names: Sequence[str], share: float) -> list[str]:
    """Return ``share`` of ``names``, evenly spaced, so that every run of equal labels gives its part."""
    return [name for i, name in enumerate(names) if math.floor((i + 1) * share + 0.5) > math.floor(i * share + 0.5)]


def _without_last_of_a_class(held: Sequence[str], classes: Mapping[str, set[str]]) -> list[str]:
    """Return ``held`` without the first of those that would leave a class nothing outside of it."""
    outside = {label for name in set(classes) - set(held) for label in classes[name]}
    kept = []
    for name in held:
        if classes[name] <= outside:
            kept.append(name)
        else:
            outside |= classes[name]
    return kept


def _fill(order: Sequence[str], sizes: Mapping[str, int], share: float) -> list[str]:
    """Return the first groups of ``order`` until ``share`` of all records is reached; at least one if share > 0."""
    chosen: list[str] = []
    target = share * sum(sizes.values())
    for group in order if share > 0 else ():
        held = sum(sizes[name] for name in chosen)
        if chosen and held + sizes[group] / 2 > target:
            break
        chosen.append(group)
    return chosen
