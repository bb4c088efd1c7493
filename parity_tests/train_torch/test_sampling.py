"""Drawing clips by class, by weights or in turn: as published, the same draw for the same seed and epoch anywhere."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models_zoo.dataset import Dataset, Record, read_dataset
from models_zoo.errors import DataError, SpecError
from models_zoo.soundscapes import write_soundscapes
from parity_tests.networks import card_of
from train_torch import data as module
from train_torch.data import ClipData, ClipDataModule, TrainingBatches
from train_torch.models import create_model
from train_torch.recipes import Augmentation, Recipe, SamplingRecipe
from train_torch.sampling import sampling_weights


def clips(*labels, absent=None):
    """Return training records with these labels (``a;b`` for two) and no file behind them."""
    records = tuple(
        Record(Path(f"/clips/{i}.wav"), tuple(filter(None, text.split(";"))), split="train", absent=absent)
        for i, text in enumerate(labels)
    )
    return Dataset(records, tuple(sorted({label for record in records for label in record.labels})), Path("/clips"))


class Clips:
    """As much of ``ClipData`` as the order of batches needs."""

    def __init__(self, dataset, recipe):
        self.dataset, self.recipe = dataset, recipe
        self.lengths = [32000] * len(dataset)
        self.spec = type("spec", (), {"sample_rate": 32000})
        policy = type("policy", (), {"multiple_of": 1, "max": None})
        self.card = type("card", (), {"min_samples": 1, "length_policy": policy})

    def __len__(self):
        return len(self.dataset)


def batches(dataset, clips_per_epoch, *, offset=100.0, seed=0, batch_size=2):
    sampling = None if clips_per_epoch is None else SamplingRecipe(clips_per_epoch=clips_per_epoch, offset=offset)
    return TrainingBatches(Clips(dataset, Recipe(batch_size=batch_size, seed=seed, sampling=sampling)))


def drawn(sampler, epoch):
    sampler.set_epoch(epoch)
    return [index for request in sampler for index in request.indices]


def test_weights_are_the_published_sums():
    dataset = clips(*["dog"] * 300, *["cat"] * 40, *["dog;cat;owl"] * 10)
    weights = sampling_weights(dataset, SamplingRecipe(clips_per_epoch=100))
    dog, cat, owl = 1000 / (100 + 310), 1000 / (100 + 50), 1000 / (100 + 10)
    np.testing.assert_allclose(weights[[0, 300, 340]], [dog, cat, dog + cat + owl], rtol=1e-12)
    assert len(np.unique(weights)) == 3
    even = sampling_weights(dataset, SamplingRecipe(clips_per_epoch=100, offset=0.0))
    np.testing.assert_allclose(even[[0, 300]], [1000 / 310, 1000 / 50], rtol=1e-12)


def test_drawn_without_replacement_as_many_as_asked_for():
    dataset = clips(*["dog"] * 90, *["cat"] * 10)
    sampler = batches(dataset, 40, batch_size=4)
    assert len(sampler) == 10
    seen = set()
    for epoch in range(30):
        indices = drawn(sampler, epoch)
        assert len(indices) == len(set(indices)) == 40
        seen.update(indices)
    assert seen == set(range(100))


def test_frequencies_follow_the_weights():
    """Two clips of 100 per epoch: the first is drawn exactly by weight, the second nearly; 3 sigma of 4000 draws."""
    dataset = clips(*["dog"] * 90, *["cat"] * 10)
    sampler = batches(dataset, 2, offset=10.0)
    weights = sampling_weights(dataset, SamplingRecipe(clips_per_epoch=2, offset=10.0))
    share = weights[90:].sum() / weights.sum()
    indices = [index for epoch in range(2000) for index in drawn(sampler, epoch)]
    rare = np.mean(np.array(indices) >= 90)
    assert share > 0.3, "a tenth of the clips"
    assert abs(rare - share) < 3 * np.sqrt(share * (1 - share) / 4000) + 0.01
    plain = batches(dataset, None)
    assert sum(index >= 90 for index in drawn(plain, 0)) == 10


def test_rare_clips_do_not_gather_in_the_first_batches_drawn():
    dataset = clips(*["dog"] * 90, *["cat"] * 10)
    sampler = batches(dataset, 50, offset=0.0, batch_size=10)
    squares = []
    for epoch in range(300):
        sampler.set_epoch(epoch)
        squares += [sum(index >= 90 for index in request.indices) ** 2 for request in sampler]
    # Ten rare clips dealt at random over five batches: 2 each, variance 1.47. In the order they are drawn: 6.9.
    assert 5.0 < np.mean(squares) < 6.0


def test_chance_follows_from_seed_and_epoch_alone():
    dataset = clips(*["dog"] * 60, *["cat"] * 20)
    first, again, other = batches(dataset, 40), batches(dataset, 40), batches(dataset, 40, seed=1)
    drawn(first, 0)
    np.random.default_rng().random()
    assert drawn(first, 3) == drawn(again, 3)
    assert drawn(first, 3) != drawn(first, 4)
    assert drawn(first, 3) != drawn(other, 3)


def test_processes_share_one_draw(monkeypatch):
    dataset = clips(*["dog"] * 60, *["cat"] * 20)
    whole = [request.indices for request in batches(dataset, 48)]
    parts = []
    for rank in range(3):
        monkeypatch.setattr(module, "_share", lambda rank=rank: (rank, 3))
        sampler = batches(dataset, 48)
        parts.append([request.indices for request in sampler])
        assert len(parts[-1]) == len(sampler) == 8
    assert [part for row in zip(*parts, strict=True) for part in row] == whole


def test_a_clip_without_a_label_is_never_drawn():
    dataset = replace(clips(*["dog"] * 8, "", absent=("dog",)), labels=("dog",))
    assert sampling_weights(dataset, SamplingRecipe(clips_per_epoch=8))[-1] == 0
    assert 8 not in {index for epoch in range(20) for index in drawn(batches(dataset, 4), epoch)}
    with pytest.raises(DataError, match=r"9; .* has 8 training clips with a label"):
        batches(dataset, 9)


def test_more_clips_than_there_are_is_refused_before_any_is_read():
    dataset = clips(*["dog"] * 8)
    recipe = Recipe(sampling=SamplingRecipe(clips_per_epoch=100))
    with pytest.raises(DataError, match=r"clips_per_epoch: got 100.*has 8 training clips"):
        ClipDataModule(dataset, None, recipe)
    with pytest.raises(SpecError, match="clips_per_epoch"):
        SamplingRecipe(clips_per_epoch=0)


# Class by class


ANIMALS = ("dog;cat", *["dog"] * 7, *["cat"] * 3, "owl", "owl")


def by_class(kind="balanced", labels=ANIMALS, *, clips_per_epoch=24, batch_size=6, seed=0):
    sampling = SamplingRecipe(kind=kind, clips_per_epoch=clips_per_epoch)
    return TrainingBatches(Clips(clips(*labels), Recipe(batch_size=batch_size, seed=seed, sampling=sampling)))


def stream(sampler, epochs):
    return [index for epoch in range(epochs) for index in drawn(sampler, epoch)]


def members(label):
    return {i for i, text in enumerate(ANIMALS) if label in text.split(";")}


def test_every_class_gives_one_clip_before_any_gives_another():
    indices = stream(by_class(), 7)
    rounds = [indices[start : start + 3] for start in range(0, len(indices), 3)]
    orders = set()
    for given in rounds:
        kinds = [[label for label in ("cat", "dog", "owl") if index in members(label)] for index in given]
        assert any(sorted(pick) == ["cat", "dog", "owl"] for pick in itertools.product(*kinds)), given
        orders.add(tuple(kind[0] for kind in kinds))
    assert len(orders) > 3, "in random order"
    # 56 draws of each class: both owls 28 times, 3 cats and the one that is a dog too 14 times each, ...
    counts = np.bincount(indices, minlength=13)
    assert set(counts[11:]) == {28}
    assert set(counts[8:11]) == {14}
    assert set(counts[1:8]) == {7}
    assert counts[0] == 21, "in the lists of both its classes"


def test_the_clips_of_a_class_come_in_turn():
    owls = [index for index in stream(by_class(), 7) if index in (11, 12)]
    pairs = [tuple(owls[start : start + 2]) for start in range(0, 56, 2)]
    assert set(pairs) == {(11, 12), (12, 11)}, "each once before any comes again, in an order of chance"


def test_rare_classes_may_be_drawn_more_often_than_they_have_clips():
    assert len(drawn(by_class(clips_per_epoch=600), 0)) == 600


def test_draws_go_on_from_epoch_to_epoch_and_follow_from_the_seed():
    short, long = by_class(clips_per_epoch=12), by_class(clips_per_epoch=36)
    assert stream(short, 6) == stream(long, 2)
    assert drawn(by_class(clips_per_epoch=12), 4) == stream(short, 5)[48:], "begun there"
    assert stream(by_class(seed=1), 2) != stream(by_class(), 2)


def test_balanced_and_plain_batches_alternate():
    sampler = by_class("alternating", clips_per_epoch=18)  # an odd number of batches
    indices = stream(sampler, 26)
    batches_ = [indices[start : start + 6] for start in range(0, len(indices), 6)]
    balanced, plain = (list(itertools.chain(*batches_[first::2])) for first in (0, 1))
    assert balanced == stream(by_class(), 20)[: len(balanced)], "the draws of a run that is balanced throughout"
    everything = sorted(range(13))
    for start in range(0, len(plain) - 12, 13):
        assert sorted(plain[start : start + 13]) == everything, "every clip once before any comes again"
    assert sum(index >= 11 for index in balanced) > 1.8 * sum(index >= 11 for index in plain)


@pytest.mark.parametrize("kind", ["balanced", "alternating"])
def test_processes_of_a_step_draw_alike_and_share_the_clips(monkeypatch, kind):
    parts = []
    for rank in range(2):
        monkeypatch.setattr(module, "_share", lambda rank=rank: (rank, 2))
        parts.append([list(request.indices) for request in by_class(kind, clips_per_epoch=48)])
    monkeypatch.undo()
    assert len(parts[0]) == len(parts[1]) == 4
    alone = [list(request.indices) for request in by_class("balanced", clips_per_epoch=48)]
    if kind == "balanced":
        assert [part for row in zip(*parts, strict=True) for part in row] == alone
    else:
        assert [parts[0][0], parts[1][0], parts[0][2], parts[1][2]] == alone[:4]
        assert parts[0][1] != parts[1][1]


def test_a_clip_that_comes_again_is_changed_anew(tmp_path):
    write_soundscapes(tmp_path, num_clips=4, seed=1, seconds=0.5, classes=("buzz", "tone"))
    model = create_model("mn01", num_classes=2)
    sampling = SamplingRecipe(kind="balanced", clips_per_epoch=16)
    recipe = Recipe(batch_size=16, seconds=0.2, sampling=sampling, augmentation=Augmentation(gain_db=(-6.0, 6.0)))
    data = ClipData(read_dataset(tmp_path).by_file(), card_of(model, "mn01"), recipe)
    (request,) = TrainingBatches(data)
    assert sorted(request.takes) == sorted(take for count in np.bincount(request.indices) for take in range(count)), (
        "counted by clip"
    )
    rows = data[request].waveform
    assert len(torch.unique(rows, dim=0)) == 16
    assert torch.equal(rows, data[request].waveform)


def test_a_class_without_clips_cannot_be_drawn():
    dataset = replace(clips(*["dog"] * 8), labels=("cat", "dog"))
    recipe = Recipe(sampling=SamplingRecipe(kind="alternating", clips_per_epoch=8))
    with pytest.raises(DataError, match="needs a training clip of every class; none of 'cat'"):
        ClipDataModule(dataset, None, recipe)


def test_sorted_batches_cannot_be_drawn_class_by_class():
    with pytest.raises(SpecError, match="sort_batches: got 4 with balanced sampling") as caught:
        Recipe(sort_batches=4, sampling=SamplingRecipe(kind="balanced", clips_per_epoch=8))
    assert caught.value.field == "sort_batches"


# Pairs


PAIRS = Augmentation(mixup_alpha=1.0, mixup_pairs=True)


def test_batches_to_be_mixed_in_pairs_are_even():
    sampler = TrainingBatches(Clips(clips(*["dog"] * 7), Recipe(batch_size=8, augmentation=PAIRS)))
    left_out = set()
    for epoch in range(20):
        indices = drawn(sampler, epoch)
        assert len(set(indices)) == 6
        left_out |= set(range(7)) - set(indices)
    assert len(left_out) > 3, "another one each time"
    assert len(drawn(TrainingBatches(Clips(clips(*["dog"] * 7), Recipe(batch_size=8))), 0)) == 7


def test_pairs_that_cannot_be_are_refused():
    with pytest.raises(SpecError, match="batch_size: got 9; clips are mixed in pairs") as caught:
        Recipe(batch_size=9, augmentation=PAIRS)
    assert caught.value.field == "batch_size"
    with pytest.raises(SpecError, match="mixup_pairs: got it with mixup_alpha 0") as caught:
        Augmentation(mixup_pairs=True)
    assert caught.value.field == "mixup_pairs"
    with pytest.raises(DataError, match="got 1 training clip; mixing pairs needs at least 2"):
        ClipDataModule(clips("dog"), None, Recipe(augmentation=PAIRS))


@pytest.mark.parametrize("field", ["seconds", "crop_seconds_min"])
def test_crops_shorter_than_the_network_takes_are_refused(field):
    model = create_model("wavegram_logmel_cnn14", num_classes=2, width=0.05)
    card = card_of(model, "wavegram_logmel_cnn14")
    with pytest.raises(SpecError, match=rf"{field}: got 0.25 s, 8000 samples; .* at least 10240 .*0.320 s") as caught:
        ClipDataModule(clips("dog", "cat"), card, Recipe(**{"seconds": 1.0, field: 0.25}))
    assert caught.value.field == field


def test_training_crops_of_a_wavegram_network_are_multiples():
    model = create_model("wavegram_logmel_cnn14", num_classes=2, width=0.05)
    data = Clips(clips(*["dog"] * 8), Recipe(batch_size=2, seconds=0.9, crop_seconds_min=0.33))
    data.card = card_of(model, "wavegram_logmel_cnn14")
    lengths = [request.num_samples for epoch in range(5) for request in _in_epoch(TrainingBatches(data), epoch)]
    assert len(set(lengths)) > 10
    assert all(length % 640 == 0 and 10240 <= length <= 29440 for length in lengths)


def _in_epoch(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)
