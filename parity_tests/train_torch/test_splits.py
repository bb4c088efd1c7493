"""No split leaks: nothing that was recorded once, or by one speaker, is on two sides, whatever the data looks like.

The tables are random, and the sides are compared here, not by the library's own check.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from models_zoo.dataset import Dataset, Record
from models_zoo.errors import DataError
from train_torch.data import split_dataset

CLASSES = ("bell", "cat", "dog", "owl")
SPLITS = ("train", "validation", "test")


def random_table(seed, *, declared=False, absent=False, by="recording"):
    """Return a few hundred rows: several stretches per file, several files per recording, recordings per speaker."""
    rng = np.random.default_rng(seed)
    records = []
    speakers = rng.integers(8, 14)
    for recording in range(60):
        speaker, side = int(rng.integers(speakers)), ("train", "train", "test")[int(rng.integers(3))]
        for cut in range(int(rng.integers(1, 4))):
            for stretch in range(int(rng.integers(1, 4))):
                # Every class in every hundred rows, so that each can be learned on any side.
                label = CLASSES[len(records) % 4]
                records.append(
                    Record(
                        Path(f"/clips/{recording}_{cut}.wav"),
                        (label,),
                        split=side if declared else None,
                        speaker=f"speaker {speaker}",
                        fold=str(recording % 5 + 1),
                        recording=f"take {recording}" if by == "recording" else None,
                        absent=tuple(c for c in CLASSES if c != label and rng.random() < 0.5) if absent else None,
                        onset=float(stretch),
                        offset=stretch + 1.0,
                    )
                )
    order = rng.permutation(len(records))
    return Dataset(tuple(records[i] for i in order), CLASSES, Path("/clips"))


def sides_of(dataset, attribute):
    """Return split -> the files, recordings, speakers or folds in it."""
    return {name: {getattr(r, attribute) for r in dataset.records if r.split == name} for name in SPLITS}


def shared(dataset, attribute, first="train", second="test"):
    sides = sides_of(dataset, attribute)
    return sides[first] & sides[second]


def assert_disjoint(dataset, *attributes):
    for attribute in attributes:
        for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
            assert not shared(dataset, attribute, first, second), (attribute, first, second)


@pytest.mark.parametrize("seed", range(25))
def test_split_by_file(seed):
    table = random_table(seed, absent=seed % 2 == 1)
    split = split_dataset(table, seed=seed)
    assert all(sides_of(split, "file").values())
    assert_disjoint(split, "file", "recording")
    assert set.union(*sides_of(split, "file").values()) == {record.file for record in table.records}
    assert len(split) == len({record.file for record in table.records})
    assert shared(split, "speaker"), "only what was asked for is kept together"
    assert split == split_dataset(table, seed=seed)


@pytest.mark.parametrize("seed", range(25))
def test_files_of_one_recording_part_where_nothing_says_that_they_are_one(seed):
    split = split_dataset(random_table(seed, by=None), seed=seed)
    assert_disjoint(split, "file")
    takes = [{file.name.split("_")[0] for file in sides_of(split, "file")[side]} for side in ("train", "test")]
    assert takes[0] & takes[1], "the property above would hold without looking at recordings"


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("by", ["speaker", "fold"])
def test_split_by_group(by, seed):
    table = random_table(seed)
    split = split_dataset(table, split_by=by, seed=seed)
    assert all(sides_of(split, by).values())
    assert_disjoint(split, "file", "recording", by)


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("validate_by", [None, "file", "fold"])
def test_held_out_groups(validate_by, seed):
    table = random_table(seed, declared=True)
    held = sorted({record.speaker for record in table.records})[seed % 3]
    others = replace(
        table, records=tuple(record for record in table.records if record.speaker == held or record.split == "train")
    )
    split = split_dataset(others, split_by="speaker", hold_out=(held,), validate_by=validate_by, seed=seed)
    assert sides_of(split, "speaker")["test"] == {held}
    assert_disjoint(split, "file", "recording")
    assert not shared(split, "speaker", "train", "test")
    assert not shared(split, "speaker", "validation", "test")
    if validate_by == "fold":
        assert not shared(split, "fold", "train", "validation")
    if validate_by is None:
        assert not shared(split, "speaker", "train", "validation")


@pytest.mark.parametrize("seed", range(25))
def test_declared_test_stays_and_validation_comes_from_training(seed):
    table = random_table(seed, declared=True)
    split = split_dataset(table, seed=seed)
    before, after = sides_of(table, "file"), sides_of(split, "file")
    assert after["test"] == before["test"]
    assert after["train"] | after["validation"] == before["train"]
    assert after["validation"]
    assert_disjoint(split, "file", "recording")


@pytest.mark.parametrize("seed", range(25))
def test_thinning_leaves_the_other_splits_and_moves_nothing(seed):
    records = tuple(
        Record(Path(f"/clips/{i}.wav"), (CLASSES[i % 4],), speaker=f"s{i // 4 % 9}", recording=f"t{i // 3}")
        for i in range(360)
    )
    split = split_dataset(Dataset(records, CLASSES, Path("/clips")), seed=seed)
    thin = split.thinned(6.0, seed=seed)
    assert_disjoint(thin, "file", "recording")
    before, after = sides_of(split, "file"), sides_of(thin, "file")
    assert after["train"] < before["train"]
    assert (after["validation"], after["test"]) == (before["validation"], before["test"])


def test_a_torn_declaration_is_refused():
    records = [
        Record(Path(f"/clips/{i}.wav"), (CLASSES[i % 2],), split=SPLITS[i % 3], speaker=f"s{i}", recording=f"t{i}")
        for i in range(30)
    ]
    whole = Dataset(tuple(records), CLASSES[:2], Path("/clips"))
    assert split_dataset(whole) == whole
    for field in ("recording", "file"):
        torn = [*records[:-1], replace(records[-1], **{field: getattr(records[0], field)})]
        with pytest.raises(DataError, match="more than one split"):
            replace(whole, records=tuple(torn)).check_disjoint()
    torn = replace(whole, records=(*records[:-1], replace(records[-1], recording="t0")))
    with pytest.raises(DataError, match="'recording t0' in"):
        split_dataset(torn)


def test_test_speakers_are_kept_from_training_even_where_validation_is_by_file():
    records = [
        Record(
            Path(f"/clips/{i}.wav"), (CLASSES[i % 2],), split="train" if i % 3 else "validation", speaker=f"s{i % 4}"
        )
        for i in range(40)
    ]
    whole = Dataset(tuple(records), CLASSES[:2], Path("/clips"))
    with pytest.raises(DataError, match=r"speaker s\d' in \['train', 'validation'\]"):
        split_dataset(whole, split_by="speaker", hold_out=("s1",))
    split = split_dataset(whole, split_by="speaker", hold_out=("s1",), validate_by="file")
    assert not shared(split, "speaker", "train", "test")
    assert shared(split, "speaker", "train", "validation"), "as asked for"


# Classes


def table_of(*rows):
    """Return records of (label or labels, split)."""
    records = tuple(
        Record(Path(f"/clips/{i}.wav"), (labels,) if isinstance(labels, str) else labels, split=split)
        for i, (labels, split) in enumerate(rows)
    )
    labels = tuple(sorted({label for record in records for label in record.labels}))
    return Dataset(records, labels, Path("/clips"))


def test_a_class_that_training_does_not_know_is_refused():
    rows = [("cat", "train"), ("dog", "train"), ("cat", "validation"), ("owl", "test"), ("cat", "test")]
    with pytest.raises(DataError, match=r"1 classes in 'test' are unknown to the training split.*'owl'"):
        split_dataset(table_of(*rows))
    rows = [*rows, ("bell", "validation")]
    with pytest.raises(DataError, match=r"2 classes in 'test' and 'validation'.*'bell', 'owl'"):
        split_dataset(table_of(*rows))
    assert split_dataset(table_of(*rows, ("owl", "train"), (("bell", "dog"), "train")))


def test_a_class_without_clips_is_refused():
    dataset = table_of(("cat", "train"), ("dog", "train"), ("cat", "validation"))
    with pytest.raises(DataError, match="1 classes have no recording: 'owl'"):
        split_dataset(replace(dataset, labels=("cat", "dog", "owl")))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_last_clip_of_a_class_stays_in_training(count):
    """Whatever the seed: a class with one file is not moved to another side, and one with two keeps one."""
    for seed in range(40):
        rows = [("cat", "train")] * 30 + [("dog", "train")] * 30 + [("owl", "train")] * count
        split = split_dataset(table_of(*rows), val_fraction=0.4, seed=seed)
        assert split.select("train").class_counts()["owl"] >= 1
        anew = split_dataset(table_of(*[(label, None) for label, _ in rows]), val_fraction=0.4, seed=seed)
        assert anew.select("train").class_counts()["owl"] >= 1
        assert anew.select("test").class_counts()["cat"] == 6


def test_a_group_that_has_a_class_to_itself_cannot_be_held_out():
    records = tuple(
        Record(Path(f"/clips/{i}.wav"), ("owl" if speaker == "ann" else CLASSES[i % 2],), speaker=speaker)
        for i, speaker in enumerate(["ann", "bob", "cy", "di"] * 5)
    )
    dataset = Dataset(records, ("bell", "cat", "owl"), Path("/clips"))
    with pytest.raises(DataError, match="'owl'"):
        split_dataset(dataset, split_by="speaker", hold_out=("ann",))
