"""A training split made imbalanced on purpose: how many stay, which, and what is left alone."""

from pathlib import Path

import pytest

from models_zoo.dataset import Dataset, Record
from models_zoo.errors import DataError

ROOT = Path("/sounds")


def dataset(per_class, *, others=3, labels="abcde"):
    """Return ``per_class`` training clips of each class (or a number for each) and ``others`` in the other splits."""
    counts = per_class if isinstance(per_class, dict) else dict.fromkeys(labels, per_class)
    records = [
        Record(ROOT / split / label / f"{i}.wav", (label,), split=split)
        for label, count in counts.items()
        for split, number in (("train", count), ("validation", others), ("test", others))
        for i in range(number)
    ]
    return Dataset(tuple(records), tuple(counts), ROOT)


def test_counts_fall_geometrically_to_the_ratio():
    thinned = dataset(160).thinned(16, seed=1)
    assert sorted(thinned.select("train").class_counts().values()) == [10, 20, 40, 80, 160]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_the_other_splits_stay_whole(split):
    before = dataset(160)
    assert before.thinned(16, seed=1).select(split) == before.select(split)


def test_the_seed_decides_which_class_is_rare_and_which_clips_stay():
    whole = dataset(160)
    same, again, other = (whole.thinned(16, seed=seed) for seed in (1, 1, 2))
    assert same == again
    rarest = [min(d.select("train").class_counts().items(), key=lambda pair: pair[1])[0] for d in (same, other)]
    assert rarest[0] != rarest[1]
    kept = [{r.file for r in d.select("train").records} for d in (same, other)]
    assert kept[0] != kept[1]
    assert kept[0] < {r.file for r in whole.records}


def test_a_ratio_of_one_makes_the_classes_alike():
    counts = dataset({"a": 30, "b": 12, "c": 50}).thinned(1.0).select("train").class_counts()
    assert set(counts.values()) == {12}


def test_scarce_classes_bound_the_others_so_that_the_ratio_holds():
    counts = dataset({"a": 100, "b": 100, "c": 10}).thinned(4, seed=0).select("train").class_counts()
    assert max(counts.values()) / min(counts.values()) == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("ratio", [0.5, 1000.0])
def test_impossible_ratios_are_refused(ratio):
    with pytest.raises(DataError, match=f"imbalance of {ratio:g}"):
        dataset(20).thinned(ratio)


def test_classes_that_cannot_be_thinned_are_named():
    with pytest.raises(DataError, match="no recording of 'b'"):
        dataset({"a": 5, "b": 0}).thinned(2)
    several = Dataset((Record(ROOT / "1.wav", ("a", "b"), split="train"),), ("a", "b"), ROOT)
    with pytest.raises(DataError, match="one class each"):
        several.thinned(2)
