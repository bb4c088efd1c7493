"""The losses: against the published values, against loops by hand, and in a training step."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from models_zoo.errors import DataError, SpecError
from parity_tests import tolerances
from parity_tests.networks import card_of
from train_torch.classifier import Classifier
from train_torch.data import Batch
from train_torch.losses import balancing_weights, clip_loss, supcon_loss
from train_torch.models import create_model
from train_torch.recipes import Augmentation, LossRecipe, Recipe

COUNTS = {"common": 100, "middling": 20, "rare": 4}


@pytest.fixture
def golden(contracts):
    with np.load(contracts / "efficientat" / "golden_losses.npz") as stored:
        values = dict(stored)
    counts = {str(i): int(count) for i, count in enumerate(values["samples_per_class"])}
    targets = functional.one_hot(torch.from_numpy(values["labels"]), len(counts)).float()
    return values, counts, targets


@pytest.fixture
def batch():
    """Random logits, one-hot targets of uneven classes, and embeddings."""
    generator = torch.Generator().manual_seed(3)
    targets = torch.eye(3)[[0, 0, 0, 1, 1, 2, 0, 1]]
    return torch.randn(8, 3, generator=generator), targets, torch.randn(8, 16, generator=generator)


@pytest.mark.contracts
def test_class_balanced_loss_has_the_published_value(golden):
    values, counts, targets = golden
    weights = balancing_weights(counts, float(values["beta"]))
    assert weights.sum().item() == pytest.approx(len(counts), rel=1e-6)
    worst = np.abs(weights.numpy() / values["class_weights"] - 1).max()
    assert worst <= tolerances.LOSSES
    loss = clip_loss(torch.from_numpy(values["logits"]), targets, "single_label", class_weights=weights)
    assert loss.item() == pytest.approx(float(values["cb_loss"]), rel=tolerances.LOSSES)


@pytest.mark.contracts
def test_contrastive_loss_and_the_weighted_sum_have_the_published_values(golden):
    values, counts, targets = golden
    temperature = float(values["supcon_temperature"])
    supcon = supcon_loss(torch.from_numpy(values["features"]), targets, "single_label", temperature=temperature)
    assert supcon.item() == pytest.approx(float(values["supcon_loss"]), rel=tolerances.LOSSES)
    weights = balancing_weights(counts, float(values["beta"]))
    main = clip_loss(torch.from_numpy(values["logits"]), targets, "single_label", class_weights=weights)
    assert (0.8 * main + 0.2 * supcon).item() == pytest.approx(float(values["combined"]), rel=tolerances.LOSSES)


def test_weights_follow_the_effective_number():
    weights = balancing_weights(COUNTS, 0.9)
    expected = np.array([0.1 / (1 - 0.9**count) for count in COUNTS.values()])
    assert weights.numpy() == pytest.approx(3 * expected / expected.sum(), rel=1e-6)
    assert torch.equal(balancing_weights(COUNTS, 0.0), torch.ones(3))
    assert weights[2] > weights[1] > weights[0]


def test_a_class_without_clips_has_no_weight():
    with pytest.raises(DataError, match="none of 'rare'"):
        balancing_weights({**COUNTS, "rare": 0}, 0.9999)


def test_balanced_loss_is_a_plain_mean_over_clips(batch):
    logits, targets, _ = batch
    weights = torch.tensor([0.2, 0.8, 2.0])
    classes = targets.argmax(dim=1)
    each = functional.cross_entropy(logits, classes, reduction="none", label_smoothing=0.1)
    by_hand = sum(weights[c] * loss for c, loss in zip(classes, each, strict=True)) / 8
    assert clip_loss(
        logits, targets, "single_label", label_smoothing=0.1, class_weights=weights
    ).item() == pytest.approx(by_hand.item(), rel=1e-6)


def test_without_weights_the_loss_is_cross_entropy(batch):
    logits, targets, _ = batch
    expected = functional.cross_entropy(logits, targets, label_smoothing=0.1)
    assert clip_loss(logits, targets, "single_label", label_smoothing=0.1).item() == pytest.approx(
        expected.item(), rel=1e-6
    )


@pytest.mark.parametrize("task", ["single_label", "multi_label"])
def test_a_mixed_clip_costs_what_its_parts_cost(batch, task):
    logits, targets, _ = batch
    weights, other = torch.tensor([0.2, 0.8, 2.0]), targets.roll(1, dims=0)
    mixed = clip_loss(logits, 0.7 * targets + 0.3 * other, task, label_smoothing=0.1, class_weights=weights)
    parts = [clip_loss(logits, part, task, label_smoothing=0.1, class_weights=weights) for part in (targets, other)]
    assert mixed.item() == pytest.approx(0.7 * parts[0].item() + 0.3 * parts[1].item(), rel=1e-6)


def test_several_labels_weigh_class_by_class(batch):
    logits, targets, _ = batch
    weights = torch.tensor([0.2, 0.8, 2.0])
    each = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    assert clip_loss(logits, targets, "multi_label", class_weights=weights).item() == pytest.approx(
        (each * weights).mean().item(), rel=1e-6
    )


def test_contrastive_loss_by_hand(batch):
    _, targets, embedding = batch
    classes = targets.argmax(dim=1).tolist()
    unit = functional.normalize(embedding.double(), dim=1)
    similarity = (unit @ unit.T / 0.1).tolist()
    total = 0.0
    for i in range(8):
        positives = [p for p in range(8) if p != i and classes[p] == classes[i]]
        denominator = sum(math.exp(similarity[i][a]) for a in range(8) if a != i) + 1e-12
        if positives:
            total -= sum(similarity[i][p] - math.log(denominator) for p in positives) / len(positives)
    loss = supcon_loss(embedding, targets, "single_label", temperature=0.1)
    assert loss.item() == pytest.approx(total / 8, rel=1e-5)  # class 2 has one clip: no positive, still counted


def test_contrastive_loss_without_any_positive_is_zero():
    embedding = torch.randn(3, 4, requires_grad=True)
    loss = supcon_loss(embedding, torch.eye(3), "single_label")
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(embedding.grad, torch.zeros(3, 4))


@pytest.mark.parametrize("case", ["one clip", "zeros", "tiny temperature"])
def test_contrastive_loss_stays_finite_at_the_edges(case):
    embedding = torch.randn(1 if case == "one clip" else 6, 4)
    embedding = (embedding * (case != "zeros")).requires_grad_()
    targets = torch.eye(2)[torch.arange(len(embedding)) % 2]
    loss = supcon_loss(embedding, targets, "single_label", temperature=1e-3 if case == "tiny temperature" else 0.07)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(embedding.grad).all()


def test_the_louder_part_names_a_mixed_clip(batch):
    _, targets, embedding = batch
    mixed = 0.6 * targets + 0.4 * targets.roll(3, dims=0)
    assert torch.equal(supcon_loss(embedding, mixed, "single_label"), supcon_loss(embedding, targets, "single_label"))


def test_sharing_one_class_of_several_makes_a_pair():
    embedding = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.2]])
    targets = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [0.4, 0.0, 0.0]])
    # Clips 0 and 1 share class 1; clip 2 has nothing at one half or more, so it is nobody's positive.
    pair = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert torch.equal(supcon_loss(embedding, targets, "multi_label"), supcon_loss(embedding, pair, "single_label"))


def test_contrastive_loss_is_float32_under_autocast(batch):
    _, targets, embedding = batch
    plain = supcon_loss(embedding, targets, "single_label")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = supcon_loss(embedding, targets, "single_label")
    assert mixed.dtype == torch.float32
    assert torch.equal(plain, mixed)


def test_gradients_are_those_of_the_formulas():
    generator = torch.Generator().manual_seed(1)
    targets = torch.eye(3)[[0, 1, 0, 2, 1, 0]]
    # The losses compute in float32, so derivatives are compared with wide differences.
    embedding = torch.randn(6, 5, generator=generator).requires_grad_()
    logits = torch.randn(6, 3, generator=generator).requires_grad_()
    weights = torch.tensor([0.5, 1.0, 1.5])
    for values, loss in (
        (embedding, lambda x: supcon_loss(x, targets, "single_label", temperature=0.5)),
        (logits, lambda x: clip_loss(x, targets, "single_label", class_weights=weights)),
    ):
        (gradient,) = torch.autograd.grad(loss(values), values)
        step = 1e-2
        for place in ((0, 0), (2, 1), (5, 2)):
            moved = torch.zeros_like(values)
            moved[place] = step
            slope = (loss(values + moved) - loss(values - moved)).item() / (2 * step)
            assert gradient[place].item() == pytest.approx(slope, abs=tolerances.LOSS_SLOPE)


def test_contrast_pulls_a_class_together():
    embedding = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.eye(3)[torch.arange(12) % 3]
    optimizer = torch.optim.Adam([embedding], lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        supcon_loss(embedding, targets, "single_label").backward()
        optimizer.step()
    unit = functional.normalize(embedding.detach(), dim=1)
    same = (targets @ targets.T).bool()
    similarity = unit @ unit.T
    assert similarity[same].min() > similarity[~same].max() + 0.5


def step_gradient(recipe, *, counts=COUNTS):
    """Return the gradient of the first and the last layer after one training step."""
    torch.manual_seed(0)
    model = create_model("mn01", num_classes=3)
    card = card_of(model, "mn01")
    classifier = Classifier(model, card, recipe, class_counts=counts)
    classifier.log = lambda *_, **__: None
    # A fresh network answers alike to everything; random statistics of the head make the losses differ.
    torch.nn.init.normal_(model.classifier[5].weight, generator=torch.Generator().manual_seed(1))
    waveform = torch.randn(6, 6400, generator=torch.Generator().manual_seed(2)) * 0.1
    batch = Batch(waveform, torch.eye(3)[[0, 0, 0, 1, 1, 2]], torch.arange(6))
    classifier.training_step(batch, 0).backward()
    return next(iter(model.parameters())).grad.clone(), model.classifier[5].weight.grad.clone()


def test_the_recipe_switches_the_losses_on_in_a_step():
    plain = Recipe(augmentation=Augmentation())
    stem, head = step_gradient(plain)
    for gradient, again in zip((stem, head), step_gradient(plain), strict=True):
        assert torch.equal(gradient, again)
    balanced = step_gradient(plain.replace(loss=LossRecipe(class_balanced=0.9999)))
    assert not torch.allclose(head, balanced[1], rtol=0.05)
    contrast = step_gradient(plain.replace(loss=LossRecipe(supcon=0.2)))
    # The head sees only the cross-entropy, with four fifths of its weight; what is before the embedding sees both.
    assert torch.allclose(contrast[1], 0.8 * head, rtol=1e-3, atol=1e-6)
    assert not torch.allclose(contrast[0], 0.8 * stem, rtol=0.05)
    other = step_gradient(plain.replace(loss=LossRecipe(supcon=0.2, supcon_temperature=0.5)))
    assert not torch.allclose(contrast[0], other[0], rtol=0.05)


def test_a_balanced_step_needs_every_class():
    recipe = Recipe(loss=LossRecipe(class_balanced=0.9999))
    with pytest.raises(DataError, match="needs training clips of every class"):
        step_gradient(recipe, counts={**COUNTS, "common": 0})


@pytest.mark.parametrize(
    "fields", [{"class_balanced": 1.0}, {"supcon": 1.0}, {"supcon": -0.1}, {"supcon_temperature": 0.0}]
)
def test_impossible_losses_are_refused(fields):
    with pytest.raises(SpecError) as caught:
        LossRecipe(**fields)
    assert caught.value.field == next(iter(fields))
