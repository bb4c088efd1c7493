"""Drawing clips by class: published weights, no clip twice, the same draw for the same seed and epoch anywhere."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from models_zoo.dataset import Dataset, Record
from models_zoo.errors import DataError, SpecError
from train_torch import data as module
from train_torch.data import ClipDataModule, TrainingBatches, sampling_weights
from train_torch.recipes import Recipe, SamplingRecipe


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
