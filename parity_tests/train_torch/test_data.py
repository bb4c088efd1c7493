"""Splits that do not leak, and batches that follow from seed, epoch and clip alone."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from models_zoo.audio import load_audio
from models_zoo.cards import LengthPolicy
from models_zoo.dataset import Dataset, Record, read_dataset
from models_zoo.errors import AudioDecodeError, ClipLengthError, DataError
from models_zoo.presets import get_frontend
from train_torch.data import ClipData, EvaluationBatches, TrainingBatches, count_table, evaluation_loader, split_dataset
from train_torch.models import create_model, new_card
from train_torch.recipes import Augmentation, Recipe

RATE = 32000


def table(num_clips=60, *, split=None, speakers=("a", "b", "c"), folds=()):
    """Return records of two classes without any file behind them."""
    records = tuple(
        Record(
            file=Path(f"/clips/{i}.wav"),
            labels=(("dog", "cat")[i % 2],),
            split=split(i) if split else None,
            speaker=speakers[i // 2 % len(speakers)],
            fold=folds[i // 2 % len(folds)] if folds else None,
        )
        for i in range(num_clips)
    )
    return Dataset(records, ("cat", "dog"), Path("/clips"))


def of(dataset, split):
    return {record.file for record in dataset.records if record.split == split}


def test_declared_splits_stay_and_validation_is_carved_from_train():
    declared = table(split=lambda i: "test" if i < 12 else "train")
    split = split_dataset(declared, val_fraction=0.25, seed=5)
    assert of(split, "test") == of(declared, "test")
    assert len(of(split, "validation")) == 12
    assert of(split, "validation") < of(declared, "train")
    assert split == split_dataset(declared, val_fraction=0.25, seed=5)
    assert of(split, "validation") != of(split_dataset(declared, val_fraction=0.25, seed=6), "validation")


def test_a_declared_validation_split_is_kept():
    declared = table(split=lambda i: ("train", "validation", "test")[i % 3])
    assert split_dataset(declared) == declared


def test_undeclared_data_is_split_in_three(caplog):
    caplog.set_level("INFO", logger="train_torch")
    split = split_dataset(table())
    assert {record.split for record in split.records} == {"train", "validation", "test"}
    assert len(of(split, "test")) == 12
    assert "declares no split" in caplog.text


def test_a_held_out_speaker_is_the_test_and_foreign_test_clips_are_left_out(caplog):
    caplog.set_level("INFO", logger="train_torch")
    declared = table(split=lambda i: "test" if i < 12 else "train")
    split = split_dataset(declared, split_by="speaker", hold_out=("b",), validate_by="file")
    assert {record.speaker for record in split.records if record.split == "test"} == {"b"}
    assert len(of(split, "test")) == 20
    assert {record.speaker for record in split.records if record.split == "validation"} == {"a", "c"}
    assert len(split) == 60 - 8
    assert "8 clips that the data declares as test are left out" in caplog.text


def test_groups_are_kept_whole_unless_validation_by_file_is_asked_for():
    split = split_dataset(table(speakers=tuple("abcdef")), split_by="speaker", hold_out=("b",))
    sides = {record.speaker: record.split for record in split.records}
    assert all(sides[record.speaker] == record.split for record in split.records)
    assert sides["b"] == "test"
    assert set(sides.values()) == {"train", "validation", "test"}


def test_split_by_speaker_alone_chooses_speakers():
    split = split_dataset(table(speakers=tuple("abcdef")), split_by="speaker")
    by_split = {name: {r.speaker for r in split.records if r.split == name} for name in ("train", "validation", "test")}
    assert all(by_split.values())
    assert not by_split["train"] & by_split["test"]
    assert not by_split["train"] & by_split["validation"]


@pytest.mark.parametrize(
    ("dataset", "options", "advice"),
    [
        (table(split=lambda i: "test"), {}, "--split-by file"),
        (table(split=lambda i: "train" if i % 2 else None), {}, "--split-by file"),
        (table(4, split=lambda i: "train"), {}, "too few"),
        (table(), {"hold_out": ("a",)}, "'speaker' or 'fold'"),
        (table(), {"hold_out": ("zoe",), "split_by": "speaker"}, "zoe"),
        (table(), {"hold_out": ("a",), "split_by": "fold"}, "fold"),
        (table(), {"hold_out": ("a", "b", "c"), "split_by": "speaker"}, "nothing left to train on"),
    ],
)
def test_data_that_cannot_be_split_says_what_to_do(dataset, options, advice):
    with pytest.raises(DataError, match=advice):
        split_dataset(dataset, **options)


def test_count_table_counts_every_class_in_every_split():
    split = split_dataset(table(split=lambda i: "test" if i < 12 else "train"), val_fraction=0.25)
    rows = [line.split() for line in count_table(split).splitlines()]
    assert rows == [
        ["class", "train", "validation", "test"],
        ["cat", "18", "6", "6"],
        ["dog", "18", "6", "6"],
        ["clips", "36", "12", "12"],
    ]


LENGTHS = (4000, 9000, 9000, 16000, 16000, 40000, 700, 16000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Class folders of noise clips with the lengths above."""
    root = tmp_path_factory.mktemp("clips")
    for i, length in enumerate(LENGTHS):
        path = root / ("cat", "dog")[i % 2] / f"{i}.wav"
        path.parent.mkdir(exist_ok=True)
        noise = np.random.default_rng(i).uniform(-0.5, 0.5, length).astype(np.float32)
        soundfile.write(path, noise, RATE, subtype="FLOAT")
    return root


def clips(folder, *, policy=None, cache_gib=1.0, **fields):
    dataset = read_dataset(folder)
    spec = get_frontend("efficientat_mels40")
    model = create_model("mn01", num_classes=len(dataset.labels), n_mels=40)
    card = new_card(
        "tiny",
        "mn01",
        model=model,
        frontend=spec,
        task="single_label",
        labels=dataset.labels,
        length_policy=policy or LengthPolicy(),
    )
    return ClipData(dataset, card, Recipe(**{"batch_size": 3, **fields}), cache_gib=cache_gib)


@pytest.mark.parametrize("cache_gib", [1.0, 0.0])
def test_evaluation_gives_every_clip_once_as_load_audio_reads_it(folder, cache_gib):
    data = clips(folder, cache_gib=cache_gib)
    seen = []
    for batch in evaluation_loader(data):
        for row, target, index in zip(batch.waveform, batch.targets, batch.index, strict=True):
            record = data.dataset.records[int(index)]
            assert np.array_equal(row.numpy(), load_audio(record.file, data.spec))
            assert data.dataset.labels[int(target.argmax())] == record.labels[0]
            seen.append(int(index))
    assert sorted(seen) == list(range(len(LENGTHS)))
    assert len(EvaluationBatches(data)) == len(set(LENGTHS))


@pytest.mark.parametrize(("short", "tail"), [("zero", lambda clip: np.zeros(500)), ("repeat", lambda clip: clip[:500])])
def test_the_length_policy_fills_short_clips_in_evaluation(folder, short, tail):
    data = clips(folder, policy=LengthPolicy(min=1200, short=short))
    batch = next(iter(evaluation_loader(data)))
    original = load_audio(data.dataset.records[int(batch.index[0])].file, data.spec)
    assert batch.waveform.shape == (1, 1200)
    assert np.array_equal(batch.waveform[0, :700].numpy(), original)
    assert np.array_equal(batch.waveform[0, 700:].numpy(), tail(original).astype(np.float32))


def test_clips_outside_the_policy_are_refused_by_name(folder):
    with pytest.raises(ClipLengthError, match=r"6\.wav"):
        clips(folder, policy=LengthPolicy(min=1200))
    with pytest.raises(ClipLengthError, match=r"5\.wav"):
        clips(folder, policy=LengthPolicy(max=20000))


def test_long_clips_are_scored_in_windows_where_the_policy_cuts_them(folder):
    data = clips(folder, policy=LengthPolicy(max=16000, long="windows"))
    rows = [int(index) for batch in evaluation_loader(data) for index in batch.index]
    longest = data.lengths.index(40000)
    assert rows.count(longest) == 3
    assert len(rows) == len(LENGTHS) + 2


def test_training_batches_follow_from_seed_and_epoch(folder):
    data = clips(folder, seed=3)
    first, second, other = TrainingBatches(data), TrainingBatches(data), TrainingBatches(clips(folder, seed=4))
    orders = []
    for epoch in range(4):
        first.set_epoch(epoch)
        second.set_epoch(epoch)
        other.set_epoch(epoch)
        requests = list(first)
        assert requests == list(second) != list(other)
        assert len(requests) == len(first) == 2
        indices = [index for request in requests for index in request.indices]
        assert len(set(indices)) == len(indices) == 6
        orders.append(tuple(indices))
    assert len(set(orders)) == 4
    assert {index for order in orders for index in order} == set(range(len(LENGTHS)))


def test_a_training_batch_is_a_function_of_its_request(folder):
    settings = Augmentation(speed=(0.8, 1.2), noise_probability=1.0, equalise_db=6.0)
    data, again = (clips(folder, augmentation=settings, seconds=0.4, cache_gib=size) for size in (1.0, 0.0))
    request = next(iter(TrainingBatches(data)))
    assert np.array_equal(data[request].waveform, again[request].waveform)
    later = TrainingBatches(data)
    later.set_epoch(1)
    changed = next(iter(later))
    assert changed.epoch == 1
    assert data[changed].waveform.shape == (3, changed.num_samples)


def test_augmentation_ramps_up(folder):
    settings = Augmentation(gain_db=(-6.0, -6.0), ramp_epochs=9)
    data = clips(folder, augmentation=settings, batch_size=2, seconds=0.02)
    louder = []
    for epoch in (0, 4, 9):
        rms = []
        for repeat in range(30):
            batches = TrainingBatches(data)
            batches.set_epoch(epoch)
            request = next(iter(batches))
            data.recipe = data.recipe.replace(seed=repeat)
            rms.append(data[request].waveform.square().mean(dim=1).sqrt().numpy())
        louder.append(float((np.concatenate(rms) > 0.2).mean()))
    assert louder[0] > 0.75 > louder[1] > 0.25 > louder[2] == 0


def test_batch_length_is_cropped_to_seconds_and_never_illegal(folder):
    for request in TrainingBatches(clips(folder, seconds=0.25)):
        assert request.num_samples <= 8100
    policy = LengthPolicy(min=50000, short="zero")
    assert all(request.num_samples >= 50000 for request in TrainingBatches(clips(folder, policy=policy, seconds=0.25)))


def test_sorted_batches_waste_less(folder):
    def longest(**fields):
        batches = TrainingBatches(clips(folder, batch_size=2, **fields))
        total = 0
        for epoch in range(20):
            batches.set_epoch(epoch)
            total += sum(request.num_samples for request in batches)
        return total

    assert longest(sort_batches=4) < 0.9 * longest()


def test_esc50_is_split_by_its_folds(folder, tmp_path):
    (tmp_path / "meta").mkdir()
    (tmp_path / "audio").mkdir()
    rows = ["filename,fold,target,category,esc10,src_file,take"]
    for i in range(20):
        name = f"{i % 5 + 1}-{i}-A-{i % 2}.wav"
        soundfile.write(tmp_path / "audio" / name, np.zeros(2000, np.float32), RATE)
        rows.append(f"{name},{i % 5 + 1},{i // 5 % 2},{('rain', 'dog')[i // 5 % 2]},False,{i},A")
    (tmp_path / "meta" / "esc50.csv").write_text("\n".join(rows) + "\n")
    split = split_dataset(read_dataset(tmp_path), split_by="fold", hold_out=("2",))
    assert split.labels == ("rain", "dog")
    folds = {name: {r.fold for r in split.records if r.split == name} for name in ("train", "validation", "test")}
    assert folds["test"] == {"2"}
    assert len(folds["train"]) == 3
    assert len(folds["validation"]) == 1


def test_a_file_that_cannot_be_read_is_named_before_training(folder, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.wav").write_bytes(b"RIFF" if name == "b" else (folder / "cat" / "0.wav").read_bytes())
    with pytest.raises(AudioDecodeError, match=r"b.x\.wav"):
        clips(tmp_path)
