"""Label distributions: the loss, the published augmentation and optimiser, and a run from mixtures to deployment."""

from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile
import torch

from export.exporter import export_checkpoint
from models_zoo.cards import ModelCard
from models_zoo.dataset import read_dataset
from models_zoo.errors import CheckpointError, DataError, SpecError
from models_zoo.metrics import kl_divergence
from models_zoo.mixtures import write_mixtures
from models_zoo.presets import get_frontend
from parity_tests.models_zoo.test_mixtures import write_words
from parity_tests.networks import card_of
from train_torch import frontend as frontend_module
from train_torch.__main__ import main
from train_torch.augment import draw_light_mixing
from train_torch.checkpoint import load_checkpoint
from train_torch.classifier import Classifier, selected_by
from train_torch.data import Batch
from train_torch.evaluation import evaluate
from train_torch.frontend import Mixing, Shift, SpecMasks, TorchFrontend
from train_torch.losses import clip_loss
from train_torch.models import create_model
from train_torch.optim import configure, factor_at
from train_torch.recipes import Augmentation, Recipe, get_recipe
from train_torch.train import fit

MRMS = get_frontend("mrms")
PUBLISHED = get_recipe("mac")
TINY = PUBLISHED.replace(
    epochs=2, batch_size=8, precision="32-true", min_seconds=0.5, short="zero", model_options={"width": 2}
)


# The loss


def test_the_loss_is_the_divergence_by_its_definition():
    rng = np.random.default_rng(0)
    targets = rng.dirichlet(np.full(5, 0.4), 7)
    targets[0], targets[1] = [1, 0, 0, 0, 0], [0, 0.5, 0, 0.5, 0]
    logits = rng.standard_normal((7, 5))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = np.mean(
        [
            sum(y * (np.log(y) - np.log(p)) for y, p in zip(*pair, strict=True) if y)
            for pair in zip(targets, probabilities, strict=True)
        ]
    )
    given = torch.tensor(logits, requires_grad=True), torch.tensor(targets, dtype=torch.float32)
    loss = clip_loss(*given, "label_distribution")
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert kl_divergence(targets, probabilities).mean() == pytest.approx(expected, rel=1e-9)
    loss.backward()
    gradient = given[0].grad
    np.testing.assert_allclose(gradient.numpy(), (probabilities - targets) / 7, atol=1e-6)
    # Log-probabilities are their own log-softmax.
    assert float(clip_loss(torch.tensor(np.log(probabilities)), given[1], "label_distribution")) == pytest.approx(
        expected, rel=1e-5
    )
    right = torch.tensor(targets, dtype=torch.float32)
    assert float(clip_loss(right.clamp(min=1e-30).log(), right, "label_distribution")) == pytest.approx(0, abs=1e-6)


def test_smoothing_spreads_the_target():
    targets, logits = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.3, -0.2]])
    smoothed = clip_loss(logits, targets, "label_distribution", label_smoothing=0.2)
    assert float(smoothed) == pytest.approx(float(clip_loss(logits, torch.tensor([[0.9, 0.1]]), "label_distribution")))


# The published augmentation


def clips(count=6, frames=50):
    return torch.randn(count, 100 * frames, generator=torch.Generator().manual_seed(0)) * 0.1


def test_masks_on_finished_features_are_zeros_in_all_windows():
    plain = TorchFrontend(MRMS).eval()(clips())
    torch.manual_seed(3)
    masks = SpecMasks(32, 12, num_time=2, at="features")
    widths, stripes = set(), set()
    for _ in range(40):
        masked = TorchFrontend(MRMS, masks=masks).train()(clips())
        changed = masked != plain
        assert not masked[changed].any()
        assert (changed == changed[:, :1]).all(), "windows differ"
        for clip in changed[:, 0]:
            widths.add(int(clip.all(dim=1).sum()))
            times = clip.all(dim=0).int()
            stripes.add(int((torch.diff(times, prepend=torch.zeros(1, dtype=torch.int32)) == 1).sum()))
    assert (min(widths), max(widths)) == (0, 31)
    assert stripes == {0, 1, 2}
    assert torch.equal(TorchFrontend(MRMS, masks=masks).eval()(clips()), plain)


def test_masks_stay_where_efficientat_has_them():
    """On the log, before normalisation, unless the recipe says features."""
    frontend = TorchFrontend(get_frontend("efficientat"), masks=SpecMasks(48, 20)).train()
    torch.manual_seed(0)
    features = frontend(torch.randn(4, 32000))
    assert torch.isclose(features, torch.tensor(0.9)).any()
    assert not (features == 0).any()


def test_shifts_move_mel_and_time_as_published():
    plain = TorchFrontend(MRMS).eval()(clips())
    framed = torch.nn.functional.pad(plain, (32, 32, 32, 32))
    torch.manual_seed(0)
    seen = set()
    for _ in range(60):
        shifted = TorchFrontend(MRMS, shift=Shift(32, 32)).train()(clips())
        for clip, whole in zip(shifted, framed, strict=True):
            row = whole[0].unfold(0, 160, 1).unfold(1, 50, 1)  # every crop there is
            places = torch.nonzero((row[:, :, ::20] == clip[0, ::20]).all(dim=3).all(dim=2))
            assert len(places) == 1
            i, j = places[0].tolist()
            assert torch.equal(whole[:, i : i + 160, j : j + 50], clip), "windows are shifted alike"
            seen.add((i, j))
    offsets = np.array(sorted(seen))
    assert offsets.min() <= 1
    assert 62 <= offsets.max() <= 63
    assert len(set(offsets[:, 0])) > 55
    assert abs(np.corrcoef(offsets.T)[0, 1]) < 0.2, "mel and time are drawn alike"


def test_the_other_clip_of_a_mix_is_neither_masked_nor_shifted():
    plain = TorchFrontend(MRMS).eval()(clips())
    hidden = TorchFrontend(MRMS, masks=SpecMasks(159, 49, at="features"), shift=Shift(8, 8)).train()
    mixing = Mixing(torch.tensor([1, 2, 3, 4, 5, 0]), torch.full((6,), 0.75), plain=True)
    torch.manual_seed(1)
    alone = hidden(clips())
    torch.manual_seed(1)
    torch.testing.assert_close(hidden(clips(), mixing), 0.75 * alone + 0.25 * plain[mixing.permutation])


def test_mixing_weights_are_the_published_ones():
    mixing = draw_light_mixing(8000, np.random.default_rng(0), weights=(0.05, 0.25), probability=0.75)
    other = 1 - mixing.weight.numpy()
    mixed = other[other > 1e-6]
    assert len(mixed) / 8000 == pytest.approx(0.75, abs=0.02)
    assert (mixed.min(), mixed.max()) == pytest.approx((0.05, 0.25), abs=1e-3)
    assert mixed.mean() == pytest.approx(0.15, abs=2e-3)
    assert np.histogram(mixed, 4)[0] / len(mixed) == pytest.approx(0.25, abs=0.02)
    assert mixing.plain
    assert len(set(mixing.permutation.tolist())) < 8000, "with replacement"


def test_a_step_mixes_labels_as_features(monkeypatch):
    seen = {}
    model = create_model("mac_avg", num_classes=4, width=2)
    settings = PUBLISHED.augmentation
    recipe = TINY.replace(augmentation=settings)
    classifier = Classifier(model, card_of(model, "mac_avg", task="label_distribution"), recipe)
    front = classifier.frontend
    assert front.masks == SpecMasks(32, 12, num_time=2, at="features")
    assert (front.shift, front.mix_at) == (Shift(32, 32), "features")
    classifier.log = lambda *_, **__: None
    forward = TorchFrontend.forward
    monkeypatch.setattr(
        TorchFrontend,
        "forward",
        lambda self, x, mixing=None, plain=None: (seen.update(mixing=mixing), forward(self, x, mixing, plain))[1],
    )
    monkeypatch.setattr(
        "train_torch.classifier.clip_loss",
        lambda logits, targets, *_, **__: (seen.update(targets=targets), logits.sum())[1],
    )
    targets = torch.eye(4)[torch.arange(12) % 4]
    classifier.training_step(Batch(clips(12), targets, torch.arange(12)), 0)
    assert seen["mixing"].plain
    assert torch.allclose(seen["mixing"](targets), seen["targets"])
    assert 0 < int((seen["targets"].max(dim=1).values < 1).sum()) < 12


# The recipe


def test_the_recipe_is_the_published_one():
    recipe = PUBLISHED
    assert (recipe.epochs, recipe.batch_size, recipe.precision, recipe.label_smoothing) == (200, 128, "16-mixed", 0)
    model = create_model("mac_avg", num_classes=2, width=2)
    made = configure(model, recipe, 2000)
    optimizer = made["optimizer"]
    assert isinstance(optimizer, torch.optim.SGD)
    (group,) = optimizer.param_groups
    assert (group["momentum"], group["nesterov"], group["weight_decay"], group["lr"]) == (0.9, False, 1e-4, 0.2)
    assert len(group["params"]) == len(list(model.parameters()))
    for step in (0, 3, 500, 1000, 1999):
        published = 0.005 + 0.5 * (0.2 - 0.005) * (1 + np.cos(np.pi * (step / 10) / 200))
        assert 0.2 * factor_at(step, recipe, 2000) == pytest.approx(published, rel=1e-9)
    assert selected_by(recipe) == "kl_divergence"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"task": "label_distribution", "loss": {"class_balanced": 0.9}}, "loss.class_balanced"),
        ({"augmentation": {"mixup_weights": [0.3, 0.1]}}, "augmentation.mixup_weights"),
        ({"augmentation": {"mixup_weights": [0.1, 1.1]}}, "augmentation.mixup_weights"),
        ({"augmentation": {"mixup_weights": [0.1, 0.2], "mixup_alpha": 0.3}}, "augmentation.mixup_weights"),
        ({"augmentation": {"mixup_weights": [0.1, 0.2], "mixup_at": "mel"}}, "augmentation.mixup_weights"),
        ({"momentum": 1.0}, "momentum"),
    ],
)
def test_recipes_that_make_no_sense(fields, field):
    with pytest.raises(SpecError) as caught:
        Recipe.from_dict(fields)
    assert caught.value.field == field


def test_a_shift_to_nowhere_is_refused():
    with pytest.raises(SpecError, match="shift"):
        Shift(-1, 3)


# From mixtures to a deployed model


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributions")
    write_words(folder / "words")
    write_mixtures(folder / "words", folder / "data", MRMS, num_clips=40, seed=1, seconds=0.5)
    return folder / "data"


@pytest.fixture(scope="module")
def run(mixtures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, fit(mixtures, folder, TINY, progress=False)


def test_a_run_reports_the_divergence(run, mixtures):
    folder, report = run
    values = report["test"]["metrics"]
    assert set(values) == {"kl_divergence", "kl_divergence_uniform", "loss"}
    assert values["kl_divergence"] == pytest.approx(values["loss"], abs=1e-5)
    truth = read_dataset(mixtures).select("test").distributions()
    assert values["kl_divergence_uniform"] == pytest.approx(kl_divergence(truth, np.full(truth.shape, 1 / 3)).mean())
    rows = report["test"]["classes"]
    assert sum(row["mean_weight"] for row in rows) == pytest.approx(1)
    assert sum(row["mean_answer"] for row in rows) == pytest.approx(1, abs=1e-5)
    assert [row["clips"] for row in rows] == list((truth > 0).sum(axis=0))
    scored = evaluate(folder / "model.safetensors", mixtures, split="test", progress=False)
    assert scored.to_dict() == report["test"]
    assert scored.headline == "kl_divergence"
    assert "mean_weight" in scored.table()
    card = load_checkpoint(folder / "model.safetensors").card
    assert (card.task, card.options["pooling"], card.options["width"]) == ("label_distribution", "avg", 2)
    assert card.length_policy.min == 8000


def test_the_best_epoch_is_that_of_the_least_divergence(run):
    folder, report = run
    rows = (folder / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("val_kl_divergence")
    values = [float(row.split(",")[column]) for row in rows[1:]]
    assert report["best_epoch"] == int(np.argmin(values))


def test_the_deployed_model_scores_alike(run, mixtures, tmp_path, capsys):
    from infer_tf.cli import main as crossfade

    folder, report = run
    card, _ = export_checkpoint(folder / "model.safetensors", tmp_path / "model.onnx")
    assert isinstance(card, ModelCard)
    assert crossfade(["evaluate", str(tmp_path / "model.onnx"), "--data", str(mixtures), "--json"]) == 0
    measures = json.loads(capsys.readouterr().out)
    assert measures["measures"]["kl_divergence"] == pytest.approx(report["test"]["metrics"]["kl_divergence"], abs=1e-4)
    assert measures["measures"]["kl_divergence_uniform"] == pytest.approx(
        report["test"]["metrics"]["kl_divergence_uniform"], abs=1e-6
    )
    assert sum(row["mean_answer"] for row in measures["per_class"].values()) == pytest.approx(1, abs=1e-5)
    assert measures["confusion"] is None
    assert crossfade(["evaluate", str(tmp_path / "model.onnx"), "--data", str(mixtures)]) == 0
    table = capsys.readouterr().out
    assert "kl_divergence_uniform" in table
    assert "mean_answer" in table


def test_recordings_of_one_word_are_distributions_too(run, mixtures):
    folder, _ = run
    alone = evaluate(folder / "model.safetensors", mixtures.parent / "words", split="test", progress=False)
    np.testing.assert_array_equal(alone.targets.max(axis=1), 1)


def table_with(folder, mixtures, change):
    """Copy the mixtures with a changed table."""
    (folder / "audio").mkdir(parents=True)
    for clip in (mixtures / "audio").iterdir():
        (folder / "audio" / clip.name).write_bytes(clip.read_bytes())
    (folder / "metadata.csv").write_text(change((mixtures / "metadata.csv").read_text()))
    return folder


def test_data_without_weights_is_refused_before_anything_is_read(mixtures, tmp_path):
    data = table_with(tmp_path / "data", mixtures, lambda text: text.replace("label,weights,", "label,shares,"))
    with pytest.raises(DataError, match="add the column 'weights'"):
        fit(data, tmp_path / "run", TINY, progress=False)
    assert not list((tmp_path / "run").rglob("*"))


def test_data_with_weights_is_no_data_of_single_labels(mixtures, tmp_path):
    with pytest.raises(DataError, match="label_distribution, where the column 'weights'"):
        fit(mixtures, tmp_path / "run", TINY.replace(task="single_label"), progress=False)


def test_mixtures_that_were_clipped_are_refused(mixtures, tmp_path):
    data = table_with(tmp_path / "data", mixtures, str)
    clip, rate = soundfile.read(data / "audio" / "00003.wav")
    soundfile.write(data / "audio" / "00003.wav", np.clip(8 * clip, -1, 1), rate, subtype="PCM_16")
    with pytest.raises(DataError, match=r"00003\.wav: \d+ clipped samples.*weights"):
        fit(data, tmp_path / "run", TINY, progress=False)


def test_a_model_that_says_nothing_about_clips_is_not_evaluated(mixtures, tmp_path):
    from train_torch.checkpoint import save_checkpoint

    model = create_model("mac_avg", num_classes=0, width=2)
    save_checkpoint(tmp_path / "m.safetensors", model, card_of(model, "mac_avg"))
    with pytest.raises((CheckpointError, DataError, SpecError, ValueError)):
        evaluate(tmp_path / "m.safetensors", mixtures, progress=False)


def test_the_command_line_makes_mixtures(mixtures, tmp_path, capsys):
    words = mixtures.parent / "words"
    arguments = ["mixtures", "--data", str(words), "--out", str(tmp_path / "out"), "--clips", "10", "--seconds", "0.5"]
    assert main([*arguments, "--seed", "1", "--quiet"]) == 0
    shown = capsys.readouterr()
    assert shown.out.strip() == str(tmp_path / "out" / "metadata.csv")
    assert shown.err == ""
    made = (tmp_path / "out" / "metadata.csv").read_text().splitlines()
    assert made == (mixtures / "metadata.csv").read_text().splitlines()[:11]
    assert main(arguments) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0
    assert "mixing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "pooling"), [("digits_mac", "max"), ("digits_mac_avg", "avg"), ("digits_mac_max", "max")]
)
def test_the_recipes_for_digits_build_small_models(name, pooling):
    recipe = get_recipe(name)
    model = create_model(recipe.model, num_classes=10, **recipe.model_options)
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    assert model.options["pooling"] == pooling
    assert recipe.license.startswith("CC BY")
    assert Augmentation.from_dict(recipe.augmentation.to_dict()) == recipe.augmentation
    assert frontend_module.Shift(*recipe.augmentation.shift)
