"""PANNs train whatever they take and answer: two inputs, frame scores, probabilities, no embedding, a frozen base."""

import csv
import json

import numpy as np
import pytest
import torch
from torch.nn import functional

from models_zoo import metrics
from models_zoo.errors import CheckpointError, SpecError
from models_zoo.soundscapes import write_soundscapes
from parity_tests.networks import card_of, lively
from train_torch.checkpoint import load_checkpoint, save_checkpoint
from train_torch.classifier import Classifier
from train_torch.data import Batch
from train_torch.evaluation import Evaluation, evaluate
from train_torch.losses import clip_loss
from train_torch.models import _ARCHITECTURES, create_model, list_architectures
from train_torch.models.panns import PannsNetwork
from train_torch.optim import configure, factor_at
from train_torch.recipes import Augmentation, DistillationRecipe, LossRecipe, Recipe, SamplingRecipe, get_recipe
from train_torch.train import fit

WIDTH = 0.05
PANNS = [name for name in list_architectures() if issubclass(_ARCHITECTURES[name].build, PannsNetwork)]
PAIRS = Augmentation(mixup_alpha=1.0, mixup_pairs=True, mixup_at="norm")
TINY = Recipe(
    frontend="panns_32k", epochs=1, batch_size=4, optimizer="adam", amsgrad=True, lr=3e-3, seconds=0.5, seed=3
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Sixteen clips of half a second, of two sounds, split 10 / 3 / 3."""
    folder = tmp_path_factory.mktemp("sounds")
    write_soundscapes(folder, num_clips=16, seed=1, seconds=0.5, classes=("buzz", "tone"))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Cnn14 of four classes with statistics of its own."""
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    model = lively("cnn14", num_classes=4, width=WIDTH)
    save_checkpoint(path, model, card_of(model, "cnn14"))
    return path


def classifier_of(name, task, **fields):
    torch.manual_seed(0)
    model = create_model(name, num_classes=3, width=WIDTH)
    classifier = Classifier(model, card_of(model, name, task=task), Recipe(task=task, **fields)).train()
    classifier.log = lambda *_, **__: None
    return classifier


def batch_of(count=4, num_samples=16000):
    waveform = torch.randn(count, num_samples, generator=torch.Generator().manual_seed(1)) * 0.1
    return Batch(waveform, torch.eye(3)[torch.arange(count) % 3], torch.arange(count))


# Architectures


@pytest.mark.parametrize("name", PANNS)
def test_every_architecture_trains_all_of_itself(name):
    """What is left without a gradient is left out of the optimiser, so that distributed training does not wait."""
    task = "single_label" if name == "transfer_cnn14" else "multi_label"
    classifier = classifier_of(name, task, augmentation=PAIRS)
    for parameter in classifier.model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter)
    for key, parameter in classifier.model.named_parameters():
        if key.endswith(("bn2.weight", "bn3.weight")):
            torch.nn.init.ones_(parameter)  # a fresh residual block is its shortcut
    loss = classifier.training_step(batch_of(), 0)
    assert torch.isfinite(loss)
    loss.backward()
    without = {key for key, value in classifier.model.named_parameters() if value.requires_grad and value.grad is None}
    assert not without
    # The attention's weights get one where a clip has several segments.
    still = {key for key, value in classifier.model.named_parameters() if value.requires_grad and not value.grad.any()}
    assert len(still) <= (2 if name == "cnn14_decisionlevelatt" else 0), still


def test_the_waveform_path_learns_and_hears_the_clips_of_the_features():
    classifier = classifier_of("wavegram_logmel_cnn14", "multi_label", augmentation=PAIRS)
    classifier.training_step(batch_of(), 0).backward()
    assert classifier.model.pre_conv0.weight.grad.abs().max() > 0
    given = {}
    classifier.model.register_forward_pre_hook(lambda _, args, inputs: given.update(inputs), with_kwargs=True)
    batch = batch_of()
    classifier.training_step(batch, 0)
    assert torch.equal(given["waveform"], batch.waveform)
    assert torch.equal(given["features"], classifier.frontend(batch.waveform))


@pytest.mark.parametrize("name", ["cnn14_decisionlevelmax", "cnn14_decisionlevelavg", "cnn14_decisionlevelatt"])
def test_frame_models_learn_from_the_clip_scores_as_published(name):
    classifier = classifier_of(name, "multi_label")
    torch.manual_seed(0)
    batch = batch_of(num_samples=32000)
    outputs = classifier.model.eval()(features=classifier.frontend(batch.waveform))
    clip = classifier.card.clip_output()
    probabilities = outputs[clip.name].sigmoid() if clip.kind == "logit" else outputs[clip.name]
    expected = functional.binary_cross_entropy(probabilities, batch.targets)
    assert float(classifier.training_step(batch, 0).detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_probabilities_are_learnt_as_torch_would_have_it():
    scores = torch.tensor([[0.9, 0.2, 0.5], [0.1, 0.7, 0.3]])
    targets = torch.tensor([[1.0, 0.0, 0.3], [0.0, 1.0, 1.0]])
    for task in ("multi_label", "single_label"):
        loss = clip_loss(scores, targets, task, kind="probability")
        assert loss == functional.binary_cross_entropy(scores, targets)
    known = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    each = functional.binary_cross_entropy(scores, targets, reduction="none")
    assert clip_loss(scores, targets, "multi_label", kind="probability", known=known) == pytest.approx(
        float((each * known).sum() / 5)
    )
    weighed = clip_loss(scores, targets, "multi_label", kind="probability", class_weights=torch.tensor([2.0, 1.0, 0.5]))
    assert weighed == pytest.approx(float((each * torch.tensor([2.0, 1.0, 0.5])).mean()))
    smooth = clip_loss(scores, targets, "multi_label", kind="probability", label_smoothing=0.2)
    assert smooth == pytest.approx(float(functional.binary_cross_entropy(scores, targets * 0.8 + 0.1)))


def test_certain_and_wrong_probabilities_cost_a_finite_loss_with_a_finite_gradient():
    logits = torch.tensor([[200.0, -200.0, 3.0]], requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = clip_loss(logits.sigmoid(), torch.tensor([[0.0, 1.0, 1.0]]), "multi_label", kind="probability")
    loss.backward()
    assert float(loss.detach()) == pytest.approx(200 / 3, rel=0.01)
    assert torch.isfinite(logits.grad).all()


def test_log_probabilities_are_learnt_as_their_own_softmax():
    logits, targets = torch.randn(5, 3), torch.eye(3)[[0, 1, 2, 0, 1]]
    direct = -(targets * logits.log_softmax(1)).sum(1).mean()
    assert clip_loss(logits.log_softmax(1), targets, "single_label", kind="log_probability") == pytest.approx(
        float(direct), rel=1e-6
    )


def test_contrast_needs_an_embedding():
    with pytest.raises(SpecError, match=r"loss\.supcon: got 0\.2; .*without an embedding") as caught:
        classifier_of("cnn14_decisionlevelmax", "multi_label", loss=LossRecipe(supcon=0.2))
    assert caught.value.field == "loss.supcon"
    plain, contrasted = (
        classifier_of("cnn6", "single_label", loss=LossRecipe(supcon=share)).training_step(batch_of(6), 0)
        for share in (0.0, 0.5)
    )
    assert plain != contrasted


def test_probabilities_learn_from_no_teacher():
    with pytest.raises(SpecError, match="answers with probabilities") as caught:
        model = create_model("cnn14_decisionlevelatt", num_classes=3, width=WIDTH)
        card = card_of(model, "cnn14_decisionlevelatt", task="multi_label")
        recipe = Recipe(task="multi_label", distillation=DistillationRecipe())
        Classifier(model, card, recipe, teacher=object())
    assert caught.value.field == "distillation"


# The optimiser


def test_amsgrad_keeps_the_greatest_second_moments():
    for optimizer in ("adam", "adamw"):
        for amsgrad in (True, False):
            classifier = classifier_of("cnn6", "single_label", optimizer=optimizer, amsgrad=amsgrad)
            adam = configure(classifier.model, classifier.recipe, 10)["optimizer"]
            classifier.training_step(batch_of(), 0).backward()
            adam.step()
            assert len(adam.state) == len(list(classifier.model.parameters()))
            assert all(("max_exp_avg_sq" in state) is amsgrad for state in adam.state.values())
    with pytest.raises(SpecError, match="SGD has no second moments") as caught:
        Recipe(optimizer="sgd", amsgrad=True)
    assert caught.value.field == "amsgrad"


def test_a_constant_rate_rises_and_stays():
    recipe = Recipe(schedule="constant", warmup_epochs=0, epochs=10)
    assert {factor_at(step, recipe, 100) for step in range(100)} == {1.0}
    rising = recipe.replace(warmup_epochs=1)
    assert [factor_at(step, rising, 100) for step in (0, 4, 9, 10, 99)] == pytest.approx(
        [1 / 11, 5 / 11, 10 / 11, 1, 1]
    )


def test_the_recipe_is_the_published_one():
    recipe = get_recipe("panns_audioset")
    assert (recipe.model, recipe.task, recipe.batch_size, recipe.lr) == ("cnn14", "multi_label", 64, 1e-3)
    assert (recipe.optimizer, recipe.amsgrad, recipe.weight_decay, recipe.schedule) == ("adam", True, 0.0, "constant")
    assert (recipe.sampling.kind, recipe.seconds, recipe.warmup_epochs) == ("balanced", 10.0, 0)
    assert recipe.epochs * recipe.sampling.clips_per_epoch // recipe.batch_size == 600_000
    model = create_model("cnn14", num_classes=2, width=WIDTH)
    adam = configure(model, recipe, 100)["optimizer"].param_groups[0]
    assert (adam["betas"], adam["eps"], adam["lr"]) == ((0.9, 0.999), 1e-8, 1e-3)
    settings = recipe.augmentation
    assert (settings.mixup_alpha, settings.mixup_pairs, settings.mixup_at) == (1.0, True, "norm")
    assert (settings.masks, settings.mel_masks, settings.time_masks, settings.masks_at) == ((8, 64), 2, 2, "norm")
    frozen, whole = get_recipe("panns_transfer"), get_recipe("panns_finetune")
    assert (frozen.freeze, whole.freeze, whole.lr) == (("base",), (), 1e-4)
    assert frozen.fine_tuning
    assert whole.fine_tuning


# Metrics


def test_ranking_is_measured_where_clips_have_one_label_and_several():
    rng = np.random.default_rng(0)
    targets = np.eye(3, dtype=np.float32)[rng.integers(3, size=60)]
    scores = rng.random((60, 3)).astype(np.float32) + 0.5 * targets
    for task in ("single_label", "multi_label"):
        values = Evaluation(task, ("a", "b", "c"), ("x",) * 60, targets, scores / 2, 1.0).metrics()
        auc = metrics.mean_roc_auc(targets, scores)
        assert values["mean_roc_auc"] == pytest.approx(auc)
        assert values["d_prime"] == pytest.approx(float(metrics.d_prime(auc)))
        assert values["mean_average_precision"] == pytest.approx(metrics.mean_average_precision(targets, scores))


def test_metrics_stay_numbers_where_ranking_is_perfect_or_undefined():
    perfect = Evaluation("single_label", ("a", "b"), ("x",) * 4, np.eye(2)[[0, 1, 0, 1]], np.eye(2)[[0, 1, 0, 1]], 0.0)
    assert perfect.metrics()["d_prime"] == pytest.approx(6.722, abs=1e-3)
    alone = Evaluation("single_label", ("a", "b"), ("x",) * 2, np.eye(2)[[0, 0]], np.eye(2)[[0, 1]], 0.0)
    assert set(alone.metrics()) == {"accuracy", "balanced_accuracy", "loss"}


# Runs


@pytest.mark.parametrize(
    ("name", "task"), [("wavegram_logmel_cnn14", "single_label"), ("cnn14_decisionlevelatt", "multi_label")]
)
def test_a_run_from_clips_to_a_checkpoint(sounds, tmp_path, name, task):
    recipe = TINY.replace(
        model=name, model_options={"width": WIDTH}, task=task, min_seconds=0.4, crop_seconds_min=0.4, augmentation=PAIRS
    )
    report = fit(sounds, tmp_path / "run", recipe, progress=False)
    with open(tmp_path / "run" / "metrics.csv", newline="") as stream:
        (row,) = csv.DictReader(stream)
    for metric in ("mean_average_precision", "mean_roc_auc", "d_prime"):
        assert np.isfinite(float(row[f"val_{metric}"]))
        assert float(row[f"val_{metric}"]) == pytest.approx(report["validation"]["metrics"][metric], rel=1e-4)
    loaded = load_checkpoint(tmp_path / "run" / "model.safetensors")
    assert loaded.card.architecture == name
    assert loaded.card.metrics["test_d_prime"] == report["test"]["metrics"]["d_prime"]
    again = evaluate(tmp_path / "run" / "model.safetensors", sounds, split="test", progress=False)
    assert again.metrics()["mean_roc_auc"] == pytest.approx(report["test"]["metrics"]["mean_roc_auc"])


def test_a_resumed_run_draws_masks_and_mixes_as_an_uninterrupted_one(sounds, tmp_path, monkeypatch):
    recipe = TINY.replace(
        model="cnn6",
        model_options={"width": WIDTH},
        epochs=2,
        sampling=SamplingRecipe(kind="alternating", clips_per_epoch=12),
        augmentation=PAIRS.replace(masks=(4, 8), masks_at="norm"),
    )
    fit(sounds, tmp_path / "whole", recipe, progress=False)

    step = Classifier.training_step

    def killed(self, *arguments):
        if self.global_step == 4:  # the second of the second epoch
            raise RuntimeError("killed")
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", killed)
        with pytest.raises(RuntimeError, match="killed"):
            fit(sounds, tmp_path / "killed", recipe, progress=False)
    fit(sounds, tmp_path / "killed", recipe, progress=False, resume=True)
    whole, resumed = (load_checkpoint(tmp_path / run / "last.safetensors").model for run in ("whole", "killed"))
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_a_cnn14_becomes_the_frozen_base_and_is_then_trained_whole(sounds, base, tmp_path):
    frozen = get_recipe("panns_transfer").replace(epochs=1, batch_size=4, seconds=0.5)
    fit(sounds, tmp_path / "frozen", frozen, init=base, progress=False)
    before = load_checkpoint(base)
    first = load_checkpoint(tmp_path / "frozen" / "last.safetensors")
    assert (first.card.architecture, first.card.labels) == ("transfer_cnn14", ("buzz", "tone"))
    assert first.card.options == {
        "num_classes": 2, "base_classes": 4, "width": WIDTH, "n_mels": 64, "dropout": 0.2, "head_dropout": 0.5,
    }  # fmt: skip
    assert first.card.provenance["initialised_from"]["replaced"] == ["fc_transfer.weight", "fc_transfer.bias"]
    assert first.card.provenance["initialised_from"]["sha256"] == before.sha256
    for key, value in before.model.state_dict().items():
        assert torch.equal(first.model.state_dict()[f"base.{key}"], value), key
    fresh = first.model.fc_transfer.bias
    assert fresh.any(), "zeros before training"
    state = torch.load(tmp_path / "frozen" / "state.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    assert len(state) == 2, "of the new layer alone"

    whole = get_recipe("panns_finetune").replace(epochs=1, batch_size=4, seconds=0.5)
    fit(sounds, tmp_path / "whole", whole, init=tmp_path / "frozen" / "model.safetensors", progress=False)
    second = load_checkpoint(tmp_path / "whole" / "last.safetensors")
    assert second.card.provenance["initialised_from"]["replaced"] == []
    start = load_checkpoint(tmp_path / "frozen" / "model.safetensors").model.state_dict()
    for key, value in second.model.state_dict().items():
        if key.startswith("base.fc_audioset.") or key.endswith("num_batches_tracked"):
            continue
        assert not torch.equal(value, start[key]), key
    assert json.loads((tmp_path / "whole" / "report.json").read_text())["epochs"] == 1


def test_only_a_cnn14_is_a_base(sounds, tmp_path):
    for name, options in (("cnn6", {}), ("cnn14", {"embedding": 8})):
        model = lively(name, num_classes=3, width=WIDTH, **options)
        save_checkpoint(tmp_path / f"{name}.safetensors", model, card_of(model, name))
        with pytest.raises(CheckpointError, match=rf"is a '{name}'; the base of a 'transfer_cnn14' is a Cnn14 with"):
            fit(sounds, tmp_path / "run", get_recipe("panns_transfer"), init=tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="give a checkpoint to start from"):
        fit(sounds, tmp_path / "run", get_recipe("panns_transfer"))
