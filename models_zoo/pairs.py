"""Pairs of sound and picture from labelled recordings: data for audio-visual training, made on any machine.

The picture of a clip shows a glyph that stands for its label, see :mod:`models_zoo.pictures`; everything else about it
is chance. It tells the label and not the clip.

Pairs can be made ambiguous on purpose. Labels then lie in a grid; the picture tells the row alone, the sound the column
alone, and only both together the label: no model of one of them can be right about more than :attr:`Grid.ceilings`.
"""

from __future__ import annotations

import csv
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from models_zoo.dataset import read_dataset
from models_zoo.errors import DataError
from models_zoo.files import check_writable, replacing
from models_zoo.pictures import NUM_GLYPHS, render_frames
from models_zoo.soundscapes import check_seed, write_soundscapes

__all__ = ["Grid", "write_pairs"]

_BUILT_IN_CLIPS = 1000


@dataclass(frozen=True)
class Grid:
    """Labels in rows and columns, as square as it gets; the last row may be short.

    Attributes:
        labels: row after row.
    """

    labels: tuple[str, ...]

    @property
    def columns(self) -> int:
        """How many there are."""
        return max(1, round(math.sqrt(len(self.labels))))

    def row(self, label: str) -> int:
        """Return which row a label is in: what its picture tells."""
        return self.labels.index(label) // self.columns

    def column(self, label: str) -> int:
        """Return which column a label is in: what its sound tells."""
        return self.labels.index(label) % self.columns

    def sounding_like(self, label: str) -> tuple[str, ...]:
        """Return the labels of the same column, the label itself among them."""
        return self.labels[self.column(label) :: self.columns]

    @property
    def ceilings(self) -> tuple[float, float]:
        """Greatest share of right answers by (sound, picture) alone where all labels are equally frequent."""
        rows = math.ceil(len(self.labels) / self.columns)
        return self.columns / len(self.labels), rows / len(self.labels)


def write_pairs(
    folder: str | Path,
    *,
    data: str | Path | None = None,
    seed: int = 0,
    ambiguous: bool = False,
    frames: int = 1,
    size: int = 224,
    picture_format: Literal["jpeg", "png"] = "jpeg",
    force: bool = False,
    progress: bool = False,
) -> Path:
    """Write a pair for every recording, and their ``metadata.csv``; return the path of the table.

    The same arguments give the same pairs. A pair is in the split of its recording: the declared one, or one by file;
    a missing validation split is carved from ``train``.

    Args:
        folder: made if missing; ``audio/`` (copies of the recordings) and ``images/``, both in folders of a hundred
            pairs, and ``metadata.csv`` (file, label, image, split, source, and speaker, fold, recording where they are
            known).
        data: folder or table of recordings with one label each, see :func:`models_zoo.dataset.read_dataset`; None for
            a thousand of the built-in sounds, 1 s long.
        seed: of everything random.
        ambiguous: the picture tells the row of the label in a :class:`Grid` of all labels, the sound its column, and
            neither more: a recording gets any label of its own column.
        frames: pictures per clip: the glyph drifts from one to the next, as in a video.
        size: short side of the pictures in pixels.
        picture_format: of their files.
        force: replace an earlier folder's table, clips and pictures.
        progress: show a bar on standard error.

    Raises:
        DataError: impossible arguments, recordings with several labels, or more labels than there are glyphs.
        OutputExistsError, OutputWriteError: the table exists and ``force`` is false, or a write failed.
    """
    check_seed(seed)
    whole = isinstance(frames, int) and isinstance(size, int)
    if not whole or frames < 1 or size < 32 or picture_format not in ("jpeg", "png"):
        raise DataError(
            f"got frames={frames}, size={size}, picture_format={picture_format!r}; expected whole numbers, at least 1 "
            "frame and 32 pixels, and jpeg or png"
        )
    folder = Path(folder)
    table = folder / "metadata.csv"
    check_writable(table, force=force)
    with _recordings(data, seed) as source:
        dataset = read_dataset(source).single_sources(seed=seed)
        if len(dataset.labels) > NUM_GLYPHS:
            raise DataError(
                f"{dataset.root}: {len(dataset.labels)} labels; pictures can tell {NUM_GLYPHS} apart: take fewer"
            )
        grid = Grid(dataset.labels)
        if ambiguous and min(grid.columns, math.ceil(len(dataset.labels) / grid.columns)) < 2:
            raise DataError(
                f"{dataset.root}: {len(dataset.labels)} labels make no grid in which sound and picture each tell "
                "a part; ambiguous pairs need at least 3"
            )
        # Until the new table is whole there is none: an interrupted run must not leave old labels beside new clips.
        table.unlink(missing_ok=True)
        rows = []
        bar = tqdm(dataset.records, desc="drawing", unit="pair", file=sys.stderr, disable=not progress, leave=False)
        for index, record in enumerate(bar):
            rng = np.random.default_rng([seed, index])
            label = record.labels[0]
            if ambiguous:
                alike = grid.sounding_like(label)
                label = alike[int(rng.integers(len(alike)))]
            glyph = grid.row(label) if ambiguous else dataset.labels.index(label)
            sound = f"audio/{_place(index)}{record.file.suffix.lower()}"
            with replacing(folder / sound, force=force) as partial:
                shutil.copyfile(record.file, partial)
            pictures = render_frames(glyph, frames, size, rng)
            names = _write_pictures(folder, index, pictures, picture_format, force)
            groups = (record.speaker or "", record.fold or "", record.recording or "")
            rows.append((sound, label, ";".join(names), record.split, *groups, dataset.name_of(record)))
    with replacing(table, force=force) as partial, open(partial, "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("file", "label", "image", "split", "speaker", "fold", "recording", "source"))
        writer.writerows(rows)
    return table


@contextmanager
def _recordings(data: str | Path | None, seed: int) -> Iterator[str | Path]:
    """Yield ``data``, or where it is None a folder of built-in sounds that is gone afterwards."""
    if data is not None:
        yield data
        return
    with tempfile.TemporaryDirectory() as made:
        write_soundscapes(made, num_clips=_BUILT_IN_CLIPS, seed=seed, sample_rate=16000, seconds=1.0)
        yield made


def _place(index: int) -> str:
    """Return folder and stem of a pair's files: a hundred pairs to a folder, since every write looks round in it."""
    return f"{index // 100:03d}/{index:05d}"


def _write_pictures(
    folder: Path, index: int, pictures: Sequence[Image.Image], picture_format: str, force: bool
) -> list[str]:
    names = []
    for frame, picture in enumerate(pictures):
        ending = {"jpeg": "jpg", "png": "png"}[picture_format]
        name = f"images/{_place(index)}{f'_{frame}' if len(pictures) > 1 else ''}.{ending}"
        with replacing(folder / name, force=force) as partial:
            picture.save(partial, format=picture_format.upper(), quality=90)  # quality: of JPEG alone
        names.append(name)
    return names
