"""Labels nobody knows: they move no weight, add nothing to a loss, and change no metric, mixed or not."""

import csv

import numpy as np
import pytest
import torch
from torch.nn import functional

from models_zoo.dataset import read_dataset
from models_zoo.errors import DataError
from models_zoo.soundscapes import write_soundscapes
from parity_tests.networks import card_of
from train_torch.augment import mix_labels
from train_torch.classifier import Classifier
from train_torch.data import Batch, ClipData, evaluation_loader
from train_torch.evaluation import collect, evaluate
from train_torch.frontend import Mixing
from train_torch.losses import clip_loss
from train_torch.models import create_model
from train_torch.recipes import Augmentation, Recipe
from train_torch.train import fit

CLASSES = ("buzz", "clicks", "tone")


def draw(batch=5, classes=4, seed=0):
    """Return logits that want a gradient, targets, and which of them are known (about half, one row not at all)."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, generator=generator, requires_grad=True)
    targets = (torch.rand(batch, classes, generator=generator) < 0.4).float()
    known = (torch.rand(batch, classes, generator=generator) < 0.5).float()
    known[2] = 0
    return logits, targets, known


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 1.0, 2.0, 0.5])], ids=["even", "weighted"])
def test_a_masked_label_contributes_nothing(smoothing, weights):
    logits, targets, known = draw()
    options = {"label_smoothing": smoothing, "class_weights": weights}
    loss = clip_loss(logits, targets, "multi_label", known=known, **options)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.equal(gradient == 0, known == 0)
    lies = torch.where(known > 0, targets, 1 - targets)
    wild = torch.where(known > 0, logits, logits * 100 - 3)
    assert torch.equal(clip_loss(wild, lies, "multi_label", known=known, **options), loss)
    # The same labels as the only ones there are: nothing else in the sum, nothing else in what it is divided by.
    rows = known.bool()
    smooth = targets * (1 - smoothing) + smoothing / 2
    terms = functional.binary_cross_entropy_with_logits(logits, smooth, weight=weights, reduction="none")[rows]
    assert loss.item() == pytest.approx(terms.mean().item(), rel=1e-6)


def test_all_labels_known_is_the_loss_without_a_mask():
    logits, targets, known = draw()
    everything = clip_loss(logits, targets, "multi_label", known=torch.ones_like(known))
    assert everything.item() == pytest.approx(clip_loss(logits, targets, "multi_label").item(), rel=1e-6)


def test_a_batch_of_which_nothing_is_known_teaches_nothing():
    logits, targets, known = draw()
    loss = clip_loss(logits, targets, "multi_label", known=torch.zeros_like(known))
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, logits)[0].any()


def test_a_mix_costs_what_its_known_parts_cost():
    """Known for both clips, for one, for neither: the sum over both clips' own labels, weighted as the clips are."""
    logits, targets, known = draw()
    mixing = Mixing(torch.tensor([3, 0, 1, 4, 2]), torch.tensor([0.9, 0.6, 0.75, 1.0, 0.5]))
    mixed, certain = mix_labels(mixing, targets, known)
    loss = clip_loss(logits, mixed, "multi_label", known=certain)
    total, weight = torch.zeros(()), torch.zeros(())
    for i, (other, own) in enumerate(zip(mixing.permutation.tolist(), mixing.weight, strict=True)):
        for clip, share in ((i, own), (other, 1 - own)):
            for c in range(targets.shape[1]):
                term = functional.binary_cross_entropy_with_logits(logits[i, c], targets[clip, c])
                total = total + share * known[clip, c] * term
                weight = weight + share * known[clip, c]
    assert loss.item() == pytest.approx((total / weight).item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, logits)
    unknown_to_both = (known + known[mixing.permutation] * (mixing.weight < 1).float()[:, None]) == 0
    assert unknown_to_both.any()
    assert torch.equal(gradient == 0, unknown_to_both)
    lies = torch.where(known > 0, targets, 1 - targets)
    assert torch.equal(mix_labels(mixing, lies, known)[0], mixed), "an unknown label leaks through the mix"


def test_mixing_twice_keeps_the_rule():
    _, targets, known = draw()
    first = Mixing(torch.tensor([1, 2, 3, 4, 0]), torch.tensor([0.8, 1.0, 0.7, 0.6, 1.0]))
    second = Mixing(torch.tensor([4, 3, 0, 1, 2]), torch.tensor([0.9, 0.5, 0.6, 0.8, 0.7]))
    mixed, certain = mix_labels(second, *mix_labels(first, targets, known))
    assert torch.allclose(certain, second(first(known)))
    assert torch.allclose(mixed * certain, second(first(targets * known)), atol=1e-6)
    assert mix_labels(second, *mix_labels(first, targets, None))[1] is None


# From the table to the trained model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Thirty clips; of each, its own class is known, and, for every other clip, that one more is absent."""
    root = tmp_path_factory.mktemp("sounds")
    write_soundscapes(root, num_clips=30, seed=1, seconds=0.5, classes=CLASSES)
    with open(root / "metadata.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    lines = ["file,label,absent,split"]
    for i, row in enumerate(rows):
        other = CLASSES[(CLASSES.index(row["label"]) + 1) % 3]
        lines.append(f"{row['file']},{row['label']},{other if i % 2 else ''},{row['split']}")
    (root / "masked.csv").write_text("\n".join(lines) + "\n")
    return root


RECIPE = Recipe(
    model="mn01",
    frontend="efficientat_mels40",
    task="multi_label",
    epochs=2,
    batch_size=8,
    seconds=0.5,
    bn_momentum=0.1,
)


def clip_data(table, recipe=RECIPE):
    dataset = read_dataset(table)
    model = create_model("mn01", num_classes=3, n_mels=40)
    return ClipData(dataset, card_of(model, "mn01", task="multi_label", labels=CLASSES), recipe), model


def test_the_mask_reaches_every_batch(folder):
    data, _ = clip_data(folder / "masked.csv")
    for batch in evaluation_loader(data):
        assert batch.known.dtype == torch.float32
        for index, targets, known in zip(batch.index, batch.targets, batch.known, strict=True):
            record = data.dataset.records[int(index)]
            assert {CLASSES[i] for i in torch.nonzero(targets)[:, 0]} == set(record.labels)
            assert {CLASSES[i] for i in torch.nonzero(known)[:, 0]} == {*record.labels, *record.absent}
    plain, _ = clip_data(folder / "metadata.csv")
    assert all(batch.known is None for batch in evaluation_loader(plain))


@pytest.mark.parametrize(
    "settings",
    [Augmentation(), Augmentation(mixup_alpha=0.3), Augmentation(mix_probability=0.5), None],
    ids=["plain", "mixup", "waveforms mixed", "both"],
)
def test_a_training_step_does_not_see_unknown_labels(folder, settings):
    settings = settings or Augmentation(mixup_alpha=0.3, mix_probability=0.5)
    data, model = clip_data(folder / "masked.csv")
    batch = next(iter(evaluation_loader(data)))
    lies = torch.where(batch.known > 0, batch.targets, 1 - batch.targets)
    losses = []
    for targets, known in ((batch.targets, batch.known), (lies, batch.known), (lies, None)):
        classifier = Classifier(model, data.card, RECIPE.replace(augmentation=settings))
        classifier.log = lambda *_, **__: None
        losses.append(float(classifier.training_step(Batch(batch.waveform, targets, batch.index, known), 0).detach()))
    assert losses[0] == losses[1] != losses[2]


def test_metrics_are_over_known_labels(folder):
    data, _ = clip_data(folder / "masked.csv")
    generator, scored, wild = torch.Generator().manual_seed(0), [], []
    for batch in evaluation_loader(data):
        logits = torch.randn(batch.targets.shape, generator=generator)
        scored.append((batch, logits))
        wild.append((batch, torch.where(batch.known > 0, logits, 9 - 20 * batch.targets)))
    files = tuple(data.dataset.name_of(record) for record in data.dataset.records)
    evaluation, other = (collect(part, data.card, files) for part in (scored, wild))
    assert evaluation.metrics() == other.metrics()
    assert evaluation.per_class() == other.per_class()
    np.testing.assert_array_equal(evaluation.known, data.dataset.known())
    blind = collect([(Batch(b.waveform, b.targets, b.index), logits) for b, logits in scored], data.card, files)
    assert blind.metrics()["mean_average_precision"] != evaluation.metrics()["mean_average_precision"]


def test_training_on_masked_labels_and_its_report(folder, tmp_path):
    report = fit(folder / "masked.csv", tmp_path / "run", RECIPE, progress=False)
    assert set(report["test"]["metrics"]) == {"mean_average_precision", "mean_roc_auc", "d_prime", "loss"}
    model = tmp_path / "run" / "model.safetensors"
    scored = evaluate(model, folder / "masked.csv", split="test", progress=False)
    assert scored.to_dict() == report["test"]
    assert not scored.known.all()
    with pytest.raises(DataError, match="--task multi_label"):
        fit(folder / "masked.csv", tmp_path / "other", RECIPE.replace(task="single_label"), progress=False)
