"""Mixtures of words: made of the recordings they say, in the shares they say, never clipped, never across splits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from models_zoo.audio import load_audio
from models_zoo.dataset import read_dataset
from models_zoo.errors import DataError, OutputExistsError
from models_zoo.mixtures import count_clipped, mix, write_mixtures
from models_zoo.presets import get_frontend
from parity_tests.models_zoo.recordings import rows_of

RATE = 16000
MRMS = get_frontend("mrms")
PITCHES = {"low": 500, "middle": 1000, "high": 2000}


def word(pitch: float, take: int, *, level: float = 0.3) -> np.ndarray:
    """A tone of 0.1 to 0.3 s; the takes of a word differ in length and level."""
    time = np.arange(1600 + 400 * take) / RATE
    return level / (1 + take) * np.sin(2 * np.pi * pitch * time)


def write_words(root: Path, *, splits: bool = True, takes: int = 12, rate: int = RATE) -> Path:
    rows = []
    for label, pitch in PITCHES.items():
        for take in range(takes):
            name = f"{label}_{take}.wav"
            (root / "audio").mkdir(parents=True, exist_ok=True)
            soundfile.write(root / "audio" / name, word(pitch * RATE / rate, take), rate, subtype="FLOAT")
            rows.append((f"audio/{name}", label, *(("test" if take < 2 else "train",) if splits else ())))
    header = ("file", "label", "split")[: 2 + splits]
    (root / "metadata.csv").write_text("\n".join(",".join(row) for row in (header, *rows)))
    return root


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def mixtures(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtures")
    table = write_mixtures(words, folder, MRMS, num_clips=60, seed=5)
    assert table == folder / "metadata.csv"
    return folder


def test_the_table_is_a_data_set_of_distributions(mixtures: Path) -> None:
    dataset = read_dataset(mixtures)
    assert dataset.labels == tuple(sorted(PITCHES))
    distributions = dataset.distributions()
    np.testing.assert_allclose(distributions.sum(axis=1), 1, atol=1e-6)
    assert set((distributions > 0).sum(axis=1)) == {2, 3}
    assert distributions[distributions > 0].min() >= 0.0999
    assert distributions.max() > 0.75
    counts = {split: len(dataset.select(split)) for split in ("train", "validation", "test")}
    assert counts == {"train": 42, "validation": 6, "test": 12}


def test_clips_are_made_of_their_own_split_alone(words: Path, mixtures: Path) -> None:
    declared = {row["file"]: row["split"] for row in rows_of(words)}
    used: dict[str, set[str]] = {"train": set(), "validation": set(), "test": set()}
    for row in rows_of(mixtures):
        sources = row["sources"].split(";")
        used[row["split"]].update(sources)
        assert [source.split("/")[1].split("_")[0] for source in sources] == row["label"].split(";")
        assert len(set(row["label"].split(";"))) == len(sources), "a word overlaps itself"
    assert {declared[source] for source in used["test"]} == {"test"}
    assert {declared[source] for source in used["train"] | used["validation"]} == {"train"}
    assert all(used.values())
    assert not used["train"] & used["validation"]


def test_the_shares_can_be_heard(mixtures: Path) -> None:
    """The words are tones at different pitches: their energies in the spectrum give the weights back."""
    for row in rows_of(mixtures)[:12]:
        clip = load_audio(mixtures / row["file"], MRMS)
        assert clip.shape == (RATE,)
        spectrum = np.abs(np.fft.rfft(clip)) ** 2
        heard = []
        for label, source in zip(row["label"].split(";"), row["sources"].split(";"), strict=True):
            take = int(source.rsplit("_")[1].split(".")[0])
            around = slice(PITCHES[label] - 120, PITCHES[label] + 120)
            heard.append(np.sqrt(spectrum[around].sum() / (1600 + 400 * take)))
        weights = [float(weight) for weight in row["weights"].split(";")]
        np.testing.assert_allclose(np.array(heard) / sum(heard), weights, atol=0.02)


def test_no_clip_is_clipped_and_their_levels_differ(mixtures: Path) -> None:
    peaks = [np.abs(soundfile.read(mixtures / row["file"])[0]).max() for row in rows_of(mixtures)]
    assert max(peaks) < 0.9
    assert min(peaks) > 0.2
    assert np.std(peaks) > 0.1
    assert soundfile.info(mixtures / "audio" / "00000.wav").subtype == "PCM_16"


def test_a_clip_depends_on_the_seed_and_its_number_alone(words: Path, mixtures: Path, tmp_path: Path) -> None:
    write_mixtures(words, tmp_path / "same", MRMS, num_clips=10, seed=5)
    write_mixtures(words, tmp_path / "other", MRMS, num_clips=10, seed=6)
    assert rows_of(tmp_path / "same") == rows_of(mixtures)[:10]
    assert rows_of(tmp_path / "other") != rows_of(mixtures)[:10]
    for row in rows_of(tmp_path / "same"):
        assert (tmp_path / "same" / row["file"]).read_bytes() == (mixtures / row["file"]).read_bytes()


def test_recordings_at_another_rate_without_splits(tmp_path: Path) -> None:
    write_words(tmp_path / "words", splits=False, takes=14, rate=8000)
    write_mixtures(tmp_path / "words", tmp_path / "out", MRMS, num_clips=30, seconds=0.5, words=(1, 2))
    dataset = read_dataset(tmp_path / "out")
    assert {len(record.labels) for record in dataset.records} == {1, 2}
    assert load_audio(dataset.records[0].file, MRMS).size == RATE // 2
    used: dict[str, set[str]] = {"train": set(), "validation": set(), "test": set()}
    for row in rows_of(tmp_path / "out"):
        used[row["split"]].update(row["sources"].split(";"))
    assert not used["train"] & used["validation"] | used["train"] & used["test"] | used["validation"] & used["test"]


def test_an_earlier_folder_is_kept_unless_told_otherwise(words: Path, tmp_path: Path) -> None:
    write_mixtures(words, tmp_path, MRMS, num_clips=10)
    with pytest.raises(OutputExistsError):
        write_mixtures(words, tmp_path, MRMS, num_clips=10)
    write_mixtures(words, tmp_path, MRMS, num_clips=10, force=True)


@pytest.mark.parametrize(
    "arguments",
    [{"num_clips": 9}, {"seconds": 0.05}, {"words": (0, 2)}, {"words": (3, 2)}, {"words": (2, 11)}],
)
def test_impossible_arguments(words: Path, tmp_path: Path, arguments: dict[str, object]) -> None:
    with pytest.raises(DataError, match="expected at least 10 clips"):
        write_mixtures(words, tmp_path, MRMS, **{"num_clips": 10, **arguments})
    with pytest.raises(DataError, match="seed: got -1"):
        write_mixtures(words, tmp_path, MRMS, num_clips=10, seed=-1)
    assert not list(tmp_path.iterdir())


def test_more_words_than_there_are(words: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="of 3 classes; mixtures of 4 words"):
        write_mixtures(words, tmp_path, MRMS, num_clips=10, words=(2, 4))


@pytest.mark.parametrize(
    ("damage", "message"),
    [(lambda wave: np.clip(8 * wave, -1, 1), "clipped samples"), (lambda wave: 0 * wave, "is silent")],
)
def test_recordings_without_a_level_are_refused(tmp_path: Path, damage, message: str) -> None:
    write_words(tmp_path / "words")
    soundfile.write(tmp_path / "words" / "audio" / "low_5.wav", damage(word(500, 0)), RATE, subtype="PCM_16")
    with pytest.raises(DataError, match=rf"low_5\.wav: .*{message}"):
        write_mixtures(tmp_path / "words", tmp_path / "out", MRMS, num_clips=10)


def test_recordings_of_several_words_are_refused(tmp_path: Path) -> None:
    write_words(tmp_path)
    table = (tmp_path / "metadata.csv").read_text().replace("low_3.wav,low,", "low_3.wav,low;high,")
    (tmp_path / "metadata.csv").write_text(table)
    with pytest.raises(DataError, match="several labels"):
        write_mixtures(tmp_path, tmp_path / "out", MRMS, num_clips=10)


def test_mix_levels_its_parts_and_loses_what_is_beyond_the_end() -> None:
    tones = [np.sin(np.arange(400) * pitch).astype(np.float32) * level for pitch, level in ((0.2, 0.9), (0.9, 0.01))]
    clip = mix(tones, [0.75, 0.25], [0, 600], 800)
    assert clip.dtype == np.float32
    assert np.abs(clip).max() == pytest.approx(0.5)
    assert np.std(clip[:400]) / np.std(clip[600:]) == pytest.approx(3, rel=0.01)
    assert not clip[400:600].any()
    with pytest.raises(DataError, match="silent"):
        mix([np.zeros(10, np.float32)], [1.0], [0], 20)


def test_clipping_is_a_flat_top_not_a_peak() -> None:
    wave = np.sin(2 * np.pi * np.arange(1000) / 100).astype(np.float32)
    assert count_clipped(wave * 0.9) == 0
    assert count_clipped(np.array([0, 1, 0, -1, 0])) == 0
    assert count_clipped(np.array([0, 1, 1, 1, 0, -1, -1, -1, -1])) == 7
    assert count_clipped(np.clip(1.5 * wave, -1, 1)) > 300
    assert count_clipped(np.zeros(0)) == 0
