from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from models_zoo.dataset import read_dataset
from models_zoo.errors import DataError, OutputExistsError, UnknownNameError
from models_zoo.soundscapes import CLASSES, render, render_clip, write_soundscapes


@pytest.mark.parametrize("label", CLASSES)
@pytest.mark.parametrize("sample_rate", [16000, 32000, 44100])
def test_sounds(label: str, sample_rate: int) -> None:
    peaks = set()
    for seed in range(5):
        sound = render(label, 0.5, sample_rate, np.random.default_rng(seed))
        assert sound.shape == (sample_rate // 2,)
        assert sound.dtype == np.float32
        assert np.abs(sound).max() == pytest.approx(1, abs=1e-6)
        assert np.isfinite(sound).all()
        assert abs(float(sound[0])) < 0.01
        np.testing.assert_array_equal(sound, render(label, 0.5, sample_rate, np.random.default_rng(seed)))
        peaks.add(float(np.abs(np.fft.rfft(sound)).argmax()))
    assert len(peaks) > 1, "no two clips are the same"


def test_sounds_are_where_the_table_says(tmp_path: Path) -> None:
    write_soundscapes(tmp_path, num_clips=20, seed=3)
    for record in read_dataset(tmp_path).records:
        clip, rate = soundfile.read(record.file)
        assert record.onset is not None
        assert record.offset is not None
        inside = clip[round(record.onset * rate) : round(record.offset * rate)]
        outside = np.concatenate([clip[: round(record.onset * rate)], clip[round(record.offset * rate) :]])
        assert inside.std() > 1.8 * outside.std(), record
        assert outside.std() > 1e-5, "never digital silence"


def test_folder(tmp_path: Path) -> None:
    table = write_soundscapes(tmp_path / "one", num_clips=50, seed=1, seconds=1.0, sample_rate=16000)
    dataset = read_dataset(table.parent)
    assert dataset.labels == CLASSES
    assert dataset.class_counts() == dict.fromkeys(CLASSES, 5)
    assert {split: len(dataset.select(split)) for split in ("train", "validation", "test")} == {
        "train": 30,
        "validation": 10,
        "test": 10,
    }
    assert dataset.remarks() == []
    assert dataset.copies_across_splits() == []
    info = soundfile.info(dataset.records[0].file)
    assert (info.samplerate, info.channels, info.frames, info.subtype) == (16000, 1, 16000, "PCM_16")
    same = write_soundscapes(tmp_path / "two", num_clips=12, seed=1, seconds=1.0, sample_rate=16000)
    other = write_soundscapes(tmp_path / "three", num_clips=12, seed=2, seconds=1.0, sample_rate=16000)
    for index in range(12):
        name = f"audio/{index:05d}.wav"
        contents = [(path.parent / name).read_bytes() for path in (table, same, other)]
        assert contents[0] == contents[1] != contents[2]


def test_class_folders(tmp_path: Path) -> None:
    folder = write_soundscapes(tmp_path / "folders", num_clips=50, seed=1, seconds=0.5, class_folders=True)
    table = write_soundscapes(tmp_path / "table", num_clips=50, seed=1, seconds=0.5)
    assert sorted(path.name for path in folder.iterdir()) == ["test", "train", "validation"]
    inside, listed = read_dataset(folder), read_dataset(table.parent)
    assert inside.labels == listed.labels == CLASSES
    found = {record.file.name: (record.labels, record.split, record.file.read_bytes()) for record in inside.records}
    assert found == {
        record.file.name: (record.labels, record.split, record.file.read_bytes()) for record in listed.records
    }
    with pytest.raises(OutputExistsError):
        write_soundscapes(folder, num_clips=1, seconds=0.5, class_folders=True)
    with pytest.raises(DataError, match="a class folder says one class"):
        write_soundscapes(tmp_path / "x", num_clips=1, events_per_clip=2, class_folders=True)


def test_several_events_per_clip(tmp_path: Path) -> None:
    write_soundscapes(tmp_path, num_clips=40, seed=0, seconds=3.0, events_per_clip=3)
    dataset = read_dataset(tmp_path)
    clips = dataset.by_file()
    assert len(clips) == 40
    assert {len(record.labels) for record in clips.records} == {1, 2, 3}
    assert len(dataset) == sum(len(record.labels) for record in clips.records)
    assert all(0 <= record.onset < record.offset <= 3 for record in dataset.records if record.onset is not None)


def test_a_clip_of_no_sound_is_background() -> None:
    clip, events = render_clip([], 1.0, 16000, np.random.default_rng(0))
    assert events == []
    assert 1e-4 < clip.std() < 1e-2


def test_what_is_refused(tmp_path: Path) -> None:
    for wrong in (
        {"num_clips": 0},
        {"num_clips": 1, "seconds": 0.1},
        {"num_clips": 1, "sample_rate": 8000},
        {"num_clips": 1, "events_per_clip": 11},
        {"num_clips": 1, "classes": ()},
        {"num_clips": 1, "seed": -1},
        {"num_clips": 1, "seed": 1.5},
    ):
        with pytest.raises(DataError):
            write_soundscapes(tmp_path, **wrong)  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="'knock'"):
        write_soundscapes(tmp_path, num_clips=1, classes=["knok"])
    with pytest.raises(UnknownNameError):
        render("knok", 1.0, 16000, np.random.default_rng(0))
    assert list(tmp_path.iterdir()) == []
    write_soundscapes(tmp_path, num_clips=2, seconds=0.5)
    with pytest.raises(OutputExistsError):
        write_soundscapes(tmp_path, num_clips=2, seconds=0.5)
    write_soundscapes(tmp_path, num_clips=2, seconds=0.5, force=True)
