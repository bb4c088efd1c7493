"""A training step mixes clips and their labels by one draw, and hands the front end what the recipe says."""

import pytest
import torch

from parity_tests.networks import card_of
from train_torch import classifier as module
from train_torch.classifier import Classifier
from train_torch.data import Batch
from train_torch.frontend import MixStyle
from train_torch.models import create_model
from train_torch.recipes import Augmentation, Recipe

COUNT = 12


@pytest.fixture
def step(monkeypatch):
    """Return a function: augmentation -> (waveforms at the front end, its mixing, targets at the loss).

    Clip i is of class i and sounds only in its own two samples (+1 and -1, so its mean is 0): a mix can be read off.
    """
    clips = torch.zeros(COUNT, 6400)
    for i in range(COUNT):
        clips[i, 2 * i], clips[i, 2 * i + 1] = 1.0, -1.0
    seen = {}

    def outputs(self, waveform, mixing=None, plain=None, image=None):
        seen.update(waveform=waveform, mixing=mixing)
        return torch.zeros(len(waveform), COUNT, requires_grad=True), torch.zeros(len(waveform), 8)

    def loss(logits, targets, *_, **__):
        seen.update(targets=targets)
        return logits.sum()

    def run(settings, seed=0):
        model = create_model("mn01", num_classes=COUNT)
        classifier = Classifier(model, card_of(model, "mn01"), Recipe(augmentation=settings, seed=seed))
        classifier.log = lambda *_, **__: None
        monkeypatch.setattr(Classifier, "outputs", outputs)
        monkeypatch.setattr(module, "clip_loss", loss)
        classifier.training_step(Batch(clips, torch.eye(COUNT), torch.arange(COUNT)), 0)
        return seen["waveform"], seen["mixing"], seen["targets"]

    return run


def shares(waveform):
    """Return ``(batch, COUNT)``, how much of each clip is in a waveform."""
    return waveform[:, 0 : 2 * COUNT : 2]


def test_without_mixing_clips_and_labels_are_their_own(step):
    waveform, mixing, targets = step(Augmentation())
    assert mixing is None
    assert torch.equal(shares(waveform), torch.eye(COUNT))
    assert torch.equal(targets, torch.eye(COUNT))


def test_mixup_mixes_labels_with_the_draw_the_front_end_gets(step):
    waveform, mixing, targets = step(Augmentation(mixup_alpha=0.3))
    assert torch.equal(shares(waveform), torch.eye(COUNT))
    assert torch.allclose(mixing(torch.eye(COUNT)), targets)
    assert (mixing.weight < 0.999).any()
    assert not torch.equal(targets, torch.eye(COUNT))


def test_mixed_waveforms_have_labels_in_the_same_shares(step):
    waveform, mixing, targets = step(Augmentation(mix_probability=0.5))
    assert mixing is None
    assert torch.allclose(shares(waveform), targets, atol=1e-6)
    assert 1 <= int((targets.max(dim=1).values < 1).sum()) < COUNT


def test_both_mixings_compose(step):
    waveform, mixing, targets = step(Augmentation(mix_probability=0.5, mixup_alpha=0.3))
    assert torch.allclose(mixing(shares(waveform)), targets, atol=1e-6)
    assert int((targets > 0).sum(dim=1).max()) > 2


def test_mixed_waveforms_are_brought_to_mean_zero_first(monkeypatch):
    called = []
    monkeypatch.setattr(module, "mix_waveforms", lambda mixing, waveform: called.append(mixing) or waveform)
    model = create_model("mn01", num_classes=2)
    recipe = Recipe(augmentation=Augmentation(mix_probability=1.0))
    classifier = Classifier(model, card_of(model, "mn01"), recipe)
    classifier.log = lambda *_, **__: None
    classifier.training_step(Batch(torch.randn(4, 6400), torch.eye(2)[[0, 1, 0, 1]], torch.arange(4)), 0)
    assert len(called) == 1


def test_the_front_end_gets_the_recipes_mixstyle():
    model = create_model("mn01", num_classes=2)
    settings = Augmentation(mixstyle_probability=0.4, mixstyle_alpha=0.3)
    classifier = Classifier(model, card_of(model, "mn01"), Recipe(augmentation=settings))
    assert classifier.frontend.mixstyle == MixStyle(0.4, 0.3)
    assert Classifier(model, card_of(model, "mn01"), Recipe()).frontend.mixstyle is None
