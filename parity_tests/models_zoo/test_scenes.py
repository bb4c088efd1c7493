"""Scenes: events where the table says they are, at the ratio asked for, and nothing across splits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from models_zoo.audio import load_audio
from models_zoo.dataset import read_dataset
from models_zoo.errors import DataError, OutputExistsError, SpecError, UnknownNameError
from models_zoo.presets import get_frontend
from models_zoo.scenes import SceneSettings, trimmed, write_scenes
from models_zoo.soundscapes import CLASSES
from parity_tests.models_zoo.recordings import rows_of
from train_torch.__main__ import main

RATE = 16000
DCASE = get_frontend("dcase_2024")
PITCHES = {"low": 500, "middle": 1000, "high": 2000}
COUNTS = {"strong": 12, "weak": 6, "unlabelled": 6, "validation": 6, "test": 12}
SETTINGS = SceneSettings(seconds=2.0, events=(1, 4), event_seconds=(0.1, 0.6), max_polyphony=2)


def tone(pitch: float, seconds: float) -> np.ndarray:
    return 0.3 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * RATE)) / RATE)


def write_tones(root: Path, takes: int = 12) -> Path:
    """Recordings of three classes, silence before and after them, two of twelve for test."""
    (root / "audio").mkdir(parents=True)
    rows = ["file,label,split"]
    for label, pitch in PITCHES.items():
        for take in range(takes):
            sound = np.concatenate([np.zeros(800), tone(pitch, 0.2 + 0.05 * take), np.zeros(1600)])
            soundfile.write(root / "audio" / f"{label}_{take}.wav", sound, RATE)
            rows.append(f"audio/{label}_{take}.wav,{label},{'test' if take < 2 else 'train'}")
    (root / "metadata.csv").write_text("\n".join(rows))
    return root


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tones(tmp_path_factory.mktemp("sources") / "tones")


@pytest.fixture(scope="module")
def scenes(tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    table = write_scenes(folder, DCASE, counts=COUNTS, data=[tones], settings=SETTINGS, seed=3)
    assert table == folder / "metadata.csv"
    return folder


def test_the_table_says_of_every_part_what_is_known(scenes: Path) -> None:
    dataset = read_dataset(scenes)
    files = dataset.by_file()
    assert dataset.labels == tuple(sorted(PITCHES))
    found = [(record.split, record.part) for record in files.records]
    assert {kind: found.count(kind) for kind in set(found)} == {
        ("train", "strong"): 12,
        ("train", "weak"): 6,
        ("train", "unlabelled"): 6,
        ("validation", "strong"): 6,
        ("test", "strong"): 12,
    }
    assert not dataset.overlapping()
    for record in files.records:
        waveform = load_audio(record.file, DCASE)
        assert waveform.size == 2 * RATE
        assert np.abs(waveform).max() < 0.96


def test_events_sound_where_they_are_said_to_and_nowhere_else(scenes: Path) -> None:
    dataset = read_dataset(scenes)
    checked = 0
    for name, events in dataset.events().items():
        waveform = load_audio(dataset.root / name, DCASE)
        time = np.arange(waveform.size) / RATE
        for label, pitch in PITCHES.items():
            # The level of the pitch in windows of 20 ms: 20 dB and more between sound and no sound.
            carrier = waveform * np.exp(-2j * np.pi * pitch * time)
            level = np.abs(carrier[: waveform.size // 320 * 320].reshape(-1, 320).mean(axis=1))
            middle = (np.arange(level.size) + 0.5) * 0.02
            inside = np.zeros(level.size, bool)
            around = np.zeros(level.size, bool)
            for other, onset, offset in events:
                if other == label:
                    inside |= (middle > onset + 0.02) & (middle < offset - 0.02)
                    around |= (middle > onset - 0.02) & (middle < offset + 0.02)
            if inside.any():
                checked += 1
                others = [event for event in events if event[0] != label]
                assert level[inside].min() > (1.5 if others else 2) * np.median(level[~around])
    assert checked > 30


def test_scenes_are_made_of_their_own_split_alone(tones: Path, scenes: Path) -> None:
    declared = {f"tones/{row['file']}": row["split"] for row in rows_of(tones)}
    used: dict[str, set[str]] = {"train": set(), "validation": set(), "test": set()}
    for row in rows_of(scenes):
        used[row["split"]].update(source for source in row["sources"].split(";") if source)
    assert {declared[source] for source in used["test"]} == {"test"}
    assert {declared[source] for source in used["train"] | used["validation"]} == {"train"}
    assert used["train"]
    assert not used["train"] & used["validation"]


def test_events_stand_above_the_background_as_asked(tones: Path, tmp_path: Path) -> None:
    settings = SceneSettings(seconds=2.0, events=(1, 1), event_seconds=(0.4, 0.6), snr_db=(20, 20))
    write_scenes(tmp_path, DCASE, counts={"test": 6}, data=[tones], settings=settings)
    dataset = read_dataset(tmp_path)
    for name, ((_, onset, offset),) in dataset.events().items():
        waveform = load_audio(dataset.root / name, DCASE)
        first, last = round(onset * RATE), round(offset * RATE)
        outside = np.delete(waveform, slice(first, last))
        ratio = 10 * np.log10((waveform[first:last] ** 2).mean() / (outside**2).mean())
        assert ratio == pytest.approx(10 * np.log10(100 + 1), abs=1.0)


def test_no_more_events_sound_at_once_than_allowed(tones: Path, tmp_path: Path) -> None:
    crowded = SceneSettings(seconds=1.0, events=(6, 6), event_seconds=(0.3, 0.4), max_polyphony=2)
    write_scenes(tmp_path / "two", DCASE, counts={"test": 8}, data=[tones], settings=crowded)
    alone = crowded.replace(max_polyphony=1)
    write_scenes(tmp_path / "one", DCASE, counts={"test": 8}, data=[tones], settings=alone)
    for folder, limit in (("two", 2), ("one", 1)):
        scenes = read_dataset(tmp_path / folder).events().values()
        assert max(sum(a <= at < b for _, a, b in events) for events in scenes for _, at, _ in events) == limit


def test_a_scene_does_not_depend_on_how_many_there_are(tones: Path, scenes: Path, tmp_path: Path) -> None:
    write_scenes(tmp_path, DCASE, counts={"strong": 2, "test": 1}, data=[tones], settings=SETTINGS, seed=3)
    for name in ("strong/00001.wav", "test/00000.wav"):
        assert (tmp_path / name).read_bytes() == (scenes / name).read_bytes()
    write_scenes(tmp_path, DCASE, counts={"test": 1}, data=[tones], settings=SETTINGS, seed=4, force=True)
    assert (tmp_path / "test/00000.wav").read_bytes() != (scenes / "test/00000.wav").read_bytes()


def test_recordings_as_background(tones: Path, tmp_path: Path) -> None:
    empty = SETTINGS.replace(events=(0, 0))
    write_scenes(tmp_path, DCASE, counts={"test": 4}, data=[tones], background=tones, settings=empty)
    for row in rows_of(tmp_path):
        assert (row["label"], row["part"]) == ("", "strong")
        label, take = row["sources"].removeprefix("audio/").removesuffix(".wav").split("_")
        assert int(take) < 2, "not a test recording"
        spectrum = np.abs(np.fft.rfft(load_audio(tmp_path / row["file"], DCASE)))
        assert spectrum.argmax() / 2 == pytest.approx(PITCHES[label], rel=0.02)


def test_some_of_the_classes(tones: Path, tmp_path: Path) -> None:
    write_scenes(tmp_path, DCASE, counts={"test": 8}, data=[tones], classes=["low", "high"], settings=SETTINGS)
    assert read_dataset(tmp_path).labels == ("high", "low")
    with pytest.raises(UnknownNameError, match="'hi'"):
        write_scenes(tmp_path / "none", DCASE, counts={"test": 1}, data=[tones], classes=["hi"])


def test_silence_around_a_sound_is_no_part_of_it() -> None:
    sound = np.concatenate([np.zeros(800), tone(1000, 0.2), np.full(1600, 1e-4)]).astype(np.float32)
    assert abs(trimmed(sound, RATE).size - 3200) <= 320
    assert trimmed(np.zeros(1600, np.float32), RATE).size == 1600


def test_the_command_makes_scenes_of_built_in_sounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    none = ["--strong", "0", "--weak", "0", "--unlabelled", "2", "--validation", "0"]
    arguments = [
        "scenes",
        "--out",
        str(tmp_path),
        *none,
        "--test",
        "12",
        "--seconds",
        "1",
        "--event-seconds",
        "0.2",
        "0.5",
    ]
    assert main([*arguments, "--events", "2", "3", "--quiet"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "metadata.csv")
    dataset = read_dataset(tmp_path)
    assert set(dataset.labels) <= set(CLASSES)
    assert len(dataset.by_file().records) == 14
    assert main([*arguments, "--quiet"]) == 2
    assert "exists" in capsys.readouterr().err


def test_what_cannot_be_made(tones: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one above 0"):
        write_scenes(tmp_path, DCASE, counts={"test": 0})
    with pytest.raises(DataError, match="expected numbers of strong"):
        write_scenes(tmp_path, DCASE, counts={"strongest": 1})
    with pytest.raises(SpecError, match="snr_db"):
        SceneSettings(snr_db=(10, 5))
    with pytest.raises(SpecError, match="no longer ones"):
        SceneSettings(seconds=2)
    (tmp_path / "metadata.csv").write_text("x")
    with pytest.raises(OutputExistsError):
        write_scenes(tmp_path, DCASE, counts={"test": 1})


def test_a_class_without_recordings_in_a_split_is_refused(tmp_path: Path) -> None:
    root = write_tones(tmp_path / "tones")
    table = root / "metadata.csv"
    table.write_text("\n".join(line for line in table.read_text().split("\n") if not line.endswith("high,test")))
    with pytest.raises(DataError, match="'test' has no recording of high"):
        write_scenes(tmp_path / "out", DCASE, counts={"test": 1}, data=[root])
    with pytest.raises(DataError, match="seed: got -1"):
        write_scenes(tmp_path / "out", DCASE, counts={"test": 1}, data=[root], seed=-1)
