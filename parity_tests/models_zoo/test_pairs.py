from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models_zoo import pairs
from models_zoo.dataset import read_dataset
from models_zoo.errors import DataError, OutputExistsError
from models_zoo.pairs import Grid, write_pairs
from models_zoo.pictures import NUM_GLYPHS, render_frames
from models_zoo.soundscapes import write_soundscapes


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten sounds, ten of each, in all three splits."""
    folder = tmp_path_factory.mktemp("sounds")
    write_soundscapes(folder, num_clips=100, sample_rate=16000, seconds=0.5)
    return folder


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metadata.csv", newline="") as stream:
        return list(csv.DictReader(stream))


def test_pictures_follow_from_the_generator_alone() -> None:
    first, again, other = (render_frames(4, 2, 48, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert [picture.tobytes() for picture in first] == [picture.tobytes() for picture in again]
    assert first[0].tobytes() != other[0].tobytes()
    assert first[0].tobytes() != first[1].tobytes()
    assert all(picture.mode == "RGB" and min(picture.size) == 48 <= max(picture.size) <= 60 for picture in first)


def test_glyphs_are_told_apart() -> None:
    shown = [render_frames(glyph, 1, 64, np.random.default_rng(5))[0] for glyph in range(NUM_GLYPHS)]
    arrays = [np.asarray(picture, np.int64) for picture in shown]
    for first in range(NUM_GLYPHS):
        for second in range(first):
            changed = np.abs(arrays[first] - arrays[second]).max(axis=2) > 40
            assert changed.mean() > 0.01, (first, second)


def test_the_glyph_stays_in_the_middle_square() -> None:
    for seed in range(40):
        plain, shown = (
            np.asarray(render_frames(glyph, 1, 64, np.random.default_rng(seed))[0], np.int64) for glyph in (0, 4)
        )
        height, width = np.nonzero(np.abs(plain - shown).max(axis=2) > 30)
        top, left = (plain.shape[0] - 64) / 2, (plain.shape[1] - 64) / 2
        assert top - 1 <= height.min() <= height.max() <= top + 64
        assert left - 1 <= width.min() <= width.max() <= left + 64


@pytest.mark.parametrize("wrong", [(-1, 1, 48), (NUM_GLYPHS, 1, 48), (0, 0, 48), (0, 1, 31)])
def test_pictures_that_are_refused(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(DataError, match="expected one of"):
        render_frames(*wrong, np.random.default_rng(0))


def test_every_clip_gets_a_picture_of_its_label_in_its_split(
    sounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def noted(glyph: int, *rest: object) -> list[Image.Image]:
        drawn.append(glyph)
        return render_frames(glyph, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(pairs, "render_frames", noted)
    source = read_dataset(sounds)
    write_pairs(tmp_path / "a", data=sounds, seed=3, size=32)
    made, rows = read_dataset(tmp_path / "a"), rows_of(tmp_path / "a")
    assert [record.labels for record in made.records] == [record.labels for record in source.records]
    assert [record.split for record in made.records] == [record.split for record in source.records]
    assert [record.file.read_bytes() for record in made.records] == [r.file.read_bytes() for r in source.records]
    assert drawn == [made.labels.index(record.labels[0]) for record in made.records]
    assert [row["source"] for row in rows] == [source.name_of(record) for record in source.records]
    assert len({record.image for record in made.records}) == len(made)
    with Image.open(made.records[0].images[0]) as picture:
        assert picture.format == "JPEG"

    write_pairs(tmp_path / "b", data=sounds, seed=3, size=32)
    for first, second in zip(made.records, read_dataset(tmp_path / "b").records, strict=True):
        assert first.images[0].read_bytes() == second.images[0].read_bytes()
    with pytest.raises(OutputExistsError, match="--force"):
        write_pairs(tmp_path / "b", data=sounds)


def test_ambiguous_pairs_tell_half_of_the_label_each(
    sounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def noted(glyph: int, *rest: object) -> list[Image.Image]:
        drawn.append(glyph)
        return render_frames(0, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(pairs, "render_frames", noted)
    source = read_dataset(sounds)
    write_pairs(tmp_path, data=sounds, seed=3, size=32, ambiguous=True, frames=3, picture_format="png")
    made, grid = read_dataset(tmp_path), Grid(source.labels)
    for record, sound, glyph in zip(made.records, source.records, drawn, strict=True):
        label = record.labels[0]
        assert glyph == grid.row(label)
        assert grid.column(label) == grid.column(sound.labels[0])
        assert len(record.images) == 3
        assert record.images[0].suffix == ".png"
    moved = np.mean([a.labels != b.labels for a, b in zip(made.records, source.records, strict=True)])
    assert moved > 0.5
    assert {record.labels for record in made.records} == {(label,) for label in source.labels}


def test_what_half_a_label_is_worth() -> None:
    grid = Grid(tuple("0123456789"))
    assert (grid.columns, grid.row("5"), grid.column("5")) == (3, 1, 2)
    assert grid.sounding_like("5") == ("2", "5", "8")
    assert grid.ceilings == (0.3, 0.4)
    # (row, column) is one label's own, so that both together tell it.
    assert len({(grid.row(label), grid.column(label)) for label in grid.labels}) == 10


def test_a_machine_without_recordings_makes_pairs_of_built_in_sounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "_BUILT_IN_CLIPS", 50)
    write_pairs(tmp_path, size=32)
    made = read_dataset(tmp_path)
    assert len(made) == 50
    assert len(made.labels) == 10


def test_pairs_that_are_refused(sounds: Path, tmp_path: Path) -> None:
    for wrong in ({"frames": 0}, {"frames": 1.5}, {"size": 31}, {"size": 33.5}, {"picture_format": "gif"}):
        with pytest.raises(DataError, match="at least 1 frame"):
            write_pairs(tmp_path / "x", data=sounds, **wrong)  # type: ignore[arg-type]
    many = tmp_path / "many"
    for label in range(NUM_GLYPHS + 1):
        for take in range(3):
            (many / f"{label:03d}").mkdir(parents=True, exist_ok=True)
            (many / f"{label:03d}" / f"{take}.wav").write_bytes(b"")
    with pytest.raises(DataError, match=f"pictures can tell {NUM_GLYPHS} apart"):
        write_pairs(tmp_path / "x", data=many)
    two = tmp_path / "two"
    for label in ("a", "b"):
        for take in range(10):
            (two / label).mkdir(parents=True, exist_ok=True)
            (two / label / f"{take}.wav").write_bytes(b"")
    with pytest.raises(DataError, match="at least 3"):
        write_pairs(tmp_path / "x", data=two, ambiguous=True)


def test_an_interrupted_run_leaves_no_table_of_the_one_before(
    sounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pairs(tmp_path, data=sounds, size=32)
    monkeypatch.setattr(pairs, "render_frames", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_pairs(tmp_path, data=sounds, size=32, seed=7, ambiguous=True, force=True)
    assert not (tmp_path / "metadata.csv").exists()
