"""Features that come alike in every epoch are computed once, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from models_zoo.mixtures import write_mixtures
from models_zoo.presets import get_frontend
from parity_tests.models_zoo.test_mixtures import write_words
from train_torch.checkpoint import load_checkpoint
from train_torch.data import Batch
from train_torch.feature_cache import FeatureCache
from train_torch.frontend import MelJitter, Mixing, Shift, SpecMasks, TorchFrontend
from train_torch.recipes import Augmentation, get_recipe
from train_torch.train import fit

MRMS = get_frontend("mrms")
LATE = {"masks": SpecMasks(20, 8, at="features"), "shift": Shift(4, 4)}
TINY = get_recipe("mac").replace(
    epochs=3, batch_size=8, precision="32-true", min_seconds=0.5, short="zero", model_options={"width": 1}
)


def batch(*clips, unchanged=True):
    waveform = torch.stack([torch.randn(4000, generator=torch.Generator().manual_seed(clip)) for clip in clips]) * 0.1
    return Batch(waveform, torch.zeros(len(clips), 2), torch.tensor(clips), unchanged=unchanged)


@pytest.fixture
def computed(monkeypatch):
    """How many clips the front end was given."""
    counts = []
    walk = TorchFrontend._walk

    def counting(self, waveform, mixing):
        counts.append(len(waveform))
        return walk(self, waveform, mixing)

    monkeypatch.setattr(TorchFrontend, "_walk", counting)
    return counts


def test_a_clip_is_computed_once_and_changed_anew(computed):
    frontend = TorchFrontend(MRMS, **LATE).train()
    cache = FeatureCache(frontend, 1.0)
    mixing = Mixing(torch.tensor([2, 0, 1]), torch.tensor([0.9, 0.8, 1.0]), plain=True)
    seen = []
    for order in ((5, 6, 7), (7, 5, 6), (5, 6, 7)):
        clips = batch(*order)
        plain = cache.features(clips)
        torch.manual_seed(len(seen))
        fast = frontend(clips.waveform, mixing, plain)
        torch.manual_seed(len(seen))
        torch.testing.assert_close(fast, frontend(clips.waveform, mixing), atol=1e-5, rtol=0)
        seen.append(fast)
    assert computed == [1, 1, 1, 3, 3, 3], "three clips by the cache, and three times those to compare with"
    assert not torch.equal(seen[0], seen[2]), "masks and shifts are drawn once"
    assert torch.equal(cache.features(batch(6))[0], cache.features(batch(5, 6))[1])


def test_validation_has_clips_of_its_own(computed):
    frontend = TorchFrontend(MRMS, **LATE).train()
    cache = FeatureCache(frontend, 1.0)
    cache.features(batch(3))
    frontend.eval()
    other = batch(4)
    clips = Batch(other.waveform, other.targets, torch.tensor([3]), unchanged=True)
    torch.testing.assert_close(frontend(clips.waveform, plain=cache.features(clips)), frontend(clips.waveform))
    assert len(cache) == 2


def test_what_does_not_fit_is_computed_again(computed):
    frontend = TorchFrontend(MRMS).train()
    one = 4 * 160 * 40 * 4
    cache = FeatureCache(frontend, 2.5 * one / 2**30)
    for _ in range(2):
        torch.testing.assert_close(cache.features(batch(1, 2, 3)), frontend.plain(batch(1, 2, 3).waveform))
    assert len(cache) == 2
    assert computed == [1, 1, 1, 3, 1, 3]


@pytest.mark.parametrize(
    ("settings", "gib", "unchanged"),
    [
        (LATE, 0.0, True),
        (LATE, 1.0, False),
        ({"masks": SpecMasks(20, 8, at="log")}, 1.0, True),
        ({"mel_jitter": MelJitter()}, 1.0, True),
        ({"mix_at": "mel"}, 1.0, True),
    ],
)
def test_what_changes_from_epoch_to_epoch_is_not_kept(settings, gib, unchanged):
    frontend = TorchFrontend(MRMS, **settings).train()
    cache = FeatureCache(frontend, gib)
    assert cache.features(batch(1, unchanged=unchanged)) is None
    assert (cache.features(batch(1)) is None) == (settings is not LATE or gib == 0)


@pytest.mark.parametrize(
    "change",
    [
        {"speed": (0.9, 1.1)},
        {"gain_db": (-3.0, 3.0)},
        {"roll_seconds": 0.1},
        {"equalise_db": 3.0},
        {"noise_probability": 0.5},
        {"mix_probability": 0.5},
    ],
)
def test_augmentations_that_change_waveforms(change):
    assert Augmentation.from_dict(change).changes_waveforms
    assert not Augmentation(masks=(3, 3), shift=(2, 2), mixup_weights=(0.1, 0.2)).changes_waveforms


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    write_words(folder / "words")
    write_mixtures(folder / "words", folder / "data", MRMS, num_clips=20, seed=2, seconds=0.5)
    return folder / "data"


def runs_of(recipe, mixtures, folder):
    reports = [
        fit(mixtures, folder / str(gib), recipe, cache_gib=gib, test=False, progress=False) for gib in (0.0, 1.0)
    ]
    weights = [load_checkpoint(folder / str(gib) / "last.safetensors").model.state_dict() for gib in (0.0, 1.0)]
    assert reports[0]["validation"]["metrics"]["loss"] == pytest.approx(
        reports[1]["validation"]["metrics"]["loss"], 1e-3
    )
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], atol=1e-3, rtol=1e-3)


def test_a_run_ends_alike_and_computes_its_clips_once(mixtures, tmp_path, computed, monkeypatch):
    caches, clear = [], FeatureCache.clear
    monkeypatch.setattr(FeatureCache, "clear", lambda self: (caches.append((self, len(self))), clear(self)))
    runs_of(TINY, mixtures, tmp_path)
    # Each epoch one batch of 8 of the 14 training clips, and 2 for validation; 2 to report on.
    without, most = 3 * (8 + 2) + 2, 14 + 2 + 2
    assert without < sum(computed) <= without + most
    assert [kept > 0 for _, kept in caches] == [False, True]
    assert not any(len(cache) for cache, _ in caches), "memory is given back"


def test_crops_are_not_kept(mixtures, tmp_path, computed):
    runs_of(TINY.replace(epochs=2, seconds=0.4, min_seconds=0.35), mixtures, tmp_path)
    without, kept = 2 * (8 + 2) + 2, 2 * 8 + 2 + 2
    assert sum(computed) == without + kept, "validation alone is kept"
