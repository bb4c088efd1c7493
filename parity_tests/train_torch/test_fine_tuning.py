"""Fine-tuning runs from checkpoint to checkpoint: what is frozen, sampled and scheduled, and the published recipes."""

import csv
import json

import pytest
import torch

from models_zoo.cards import LengthPolicy
from models_zoo.errors import CheckpointError, DataError, SpecError
from models_zoo.soundscapes import write_soundscapes
from parity_tests.networks import card_of, lively
from train_torch import train
from train_torch.__main__ import main
from train_torch.checkpoint import load_checkpoint, save_checkpoint
from train_torch.optim import published_factor
from train_torch.recipes import Augmentation, Recipe, SamplingRecipe, TemperatureSchedule, get_recipe, list_recipes
from train_torch.train import fit

CLASSES = ("buzz", "clicks", "tone")
TINY = Recipe(model="mn01", frontend="efficientat", epochs=2, batch_size=6, lr=3e-3, seconds=0.3, seed=3)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Thirty clips of three sounds, split 18 / 6 / 6."""
    folder = tmp_path_factory.mktemp("sounds")
    write_soundscapes(folder, num_clips=30, seed=1, seconds=0.5, classes=CLASSES)
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A checkpoint of another task with statistics of its own."""
    path = tmp_path_factory.mktemp("start") / "start.safetensors"
    model = lively("mn01", num_classes=5)
    save_checkpoint(path, model, card_of(model, "mn01"))
    return path


def rows_of(path):
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


# Freezing


def test_a_frozen_part_leaves_the_run_as_it_entered(sounds, start, tmp_path):
    recipe = TINY.replace(freeze=("features.0", "features.1", "features.2"), bn_momentum=0.5)
    fit(sounds, tmp_path / "run", recipe, init=start, progress=False)
    before, after = load_checkpoint(start), load_checkpoint(tmp_path / "run" / "last.safetensors")
    moved = 0
    for key, value in before.model.state_dict().items():
        if key.startswith(("features.0.", "features.1.", "features.2.")):
            assert torch.equal(value, after.model.state_dict()[key]), key
        elif "running" in key:
            assert not torch.equal(value, after.model.state_dict()[key]), key
            moved += 1
    assert moved > 50
    prefixes = ("features.0.", "features.1.", "features.2.")
    entries = sum(key.startswith(prefixes) for key in before.model.state_dict())
    assert after.card.provenance["frozen"] == {"prefixes": list(recipe.freeze), "entries": entries}
    assert after.card.provenance["recipe"]["freeze"] == list(recipe.freeze)
    state = torch.load(tmp_path / "run" / "state.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    parameters = [key for key, _ in after.model.named_parameters()]
    assert len(state) == sum(not key.startswith(prefixes) for key in parameters) < len(parameters)


def test_the_command_line_freezes_and_decays(sounds, start, tmp_path):
    (tmp_path / "recipe.json").write_text(TINY.replace(epochs=1).to_json())
    options = ["fit", "--data", str(sounds), "--out", str(tmp_path / "run"), "--init", str(start), "--quiet"]
    options += ["--recipe", str(tmp_path / "recipe.json"), "--layer-decay", "0.8"]
    assert main([*options, "--freeze", "features.0", "features.3"]) == 0
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert recipe["freeze"] == ["features.0", "features.3"]
    assert recipe["layer_decay"] == 0.8
    groups = torch.load(tmp_path / "run" / "state.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"]
    assert [group["initial_lr"] for group in groups] == pytest.approx(
        [3e-3 * 0.8**distance for distance in range(18) if 17 - distance not in (0, 3)]
    )
    before, after = load_checkpoint(start), load_checkpoint(tmp_path / "run" / "last.safetensors")
    key = "features.3.block.0.1.running_var"
    assert torch.equal(before.model.state_dict()[key], after.model.state_dict()[key])


def test_impossible_wishes_are_refused_before_any_clip_is_read(sounds, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "ClipDataModule", None)
    for changes, field in (
        ({"freeze": ("feature",)}, "freeze"),
        ({"temperature_schedule": TemperatureSchedule()}, "temperature_schedule"),
    ):
        with pytest.raises(SpecError) as caught:
            fit(sounds, tmp_path / "run", TINY.replace(**changes), progress=False)
        assert caught.value.field == field
    with pytest.raises(CheckpointError, match="--init"):
        fit(sounds, tmp_path / "run", get_recipe("finetune"), progress=False)
    assert main(["fit", "--recipe", "finetune", "--data", str(sounds), "--out", str(tmp_path / "run"), "--quiet"]) == 2
    assert "--init" in capsys.readouterr().err
    assert not (tmp_path / "run" / "model.safetensors").exists()


# Schedules


def test_the_published_schedule_and_sampling_in_a_run(sounds, start, tmp_path):
    recipe = TINY.replace(
        epochs=6,
        schedule="published",
        warmup_epochs=2,
        ramp_down_start=3,
        ramp_down_epochs=2,
        sampling=SamplingRecipe(clips_per_epoch=12),
    )
    fit(sounds, tmp_path / "run", recipe, init=start, progress=False)
    rates = [float(row["lr"]) for row in rows_of(tmp_path / "run" / "metrics.csv")]
    assert rates == pytest.approx([3e-3 * published_factor(epoch, recipe) for epoch in range(6)])
    assert torch.load(tmp_path / "run" / "state.ckpt", weights_only=True)["global_step"] == 6 * 2
    with pytest.raises(DataError, match="clips_per_epoch: got 100"):
        fit(sounds, tmp_path / "b", recipe.replace(sampling=SamplingRecipe(clips_per_epoch=100)), progress=False)


COOLING = Recipe(
    model="dymn04",
    frontend="efficientat_mels40",
    epochs=3,
    batch_size=6,
    seconds=0.3,
    lr=1e-3,
    temperature_schedule=TemperatureSchedule(start=4.0, step=1.5, slope=0.1),
)


def test_every_card_states_the_temperature_of_its_epoch_also_after_a_kill(sounds, tmp_path, monkeypatch):
    seen = []
    step = train.Classifier.training_step

    def noted(self, *arguments):
        seen.append((self.current_epoch, self.model.temperature))
        if killed and len(seen) == 5:
            raise RuntimeError("killed")
        return step(self, *arguments)

    monkeypatch.setattr(train.Classifier, "training_step", noted)
    killed = False
    report = fit(sounds, tmp_path / "whole", COOLING, progress=False, name="cool")
    at = COOLING.temperature_schedule.at
    assert [at(epoch) for epoch in range(3)] == [4.0, 2.5, 1.0]
    assert seen == [(epoch, at(epoch)) for epoch in range(3) for _ in range(3)]
    last, best = (load_checkpoint(tmp_path / "whole" / f"{name}.safetensors") for name in ("last", "model"))
    assert last.card.options["temperature"] == last.model.temperature == 1.0
    assert best.card.options["temperature"] == best.model.temperature == at(report["best_epoch"])

    killed = True
    seen.clear()
    with pytest.raises(RuntimeError, match="killed"):
        fit(sounds, tmp_path / "cut", COOLING, progress=False, name="cool")
    killed = False
    seen.clear()
    fit(sounds, tmp_path / "cut", COOLING, progress=False, resume=True, name="cool")
    assert seen[0] == (1, 2.5)
    for name in ("last", "model"):
        resumed, whole = (load_checkpoint(tmp_path / run / f"{name}.safetensors") for run in ("cut", "whole"))
        assert resumed.card == whole.card
        assert all(
            torch.equal(a, b)
            for a, b in zip(resumed.model.state_dict().values(), whole.model.state_dict().values(), strict=True)
        )

    # Killed after the last epoch, before the last checkpoint: no epoch is left that would set the temperature.
    for name in ("last.safetensors", "report.json"):
        (tmp_path / "cut" / name).unlink()
    seen.clear()
    assert fit(sounds, tmp_path / "cut", COOLING, progress=False, resume=True, name="cool")["epochs"] == 3
    assert seen == []
    assert load_checkpoint(tmp_path / "cut" / "last.safetensors").card.options["temperature"] == 1.0


def test_fine_tuning_a_dymn_keeps_its_temperature(sounds, tmp_path):
    model = lively("dymn04", num_classes=5, n_mels=40, temperature=1.0)
    save_checkpoint(tmp_path / "start.safetensors", model, card_of(model, "dymn04"))
    recipe = get_recipe("finetune").replace(epochs=1, seconds=0.3, batch_size=6)
    fit(sounds, tmp_path / "run", recipe, init=tmp_path / "start.safetensors", progress=False)
    assert load_checkpoint(tmp_path / "run" / "last.safetensors").card.options["temperature"] == 1.0


def test_a_start_brings_its_rule_for_short_clips_unless_the_recipe_has_one(sounds, start, tmp_path):
    recipe = TINY.replace(epochs=1, short="repeat")
    fit(sounds, tmp_path / "its", recipe, init=start, progress=False)
    assert load_checkpoint(tmp_path / "its" / "last.safetensors").card.length_policy == LengthPolicy()
    fit(sounds, tmp_path / "own", recipe.replace(min_seconds=0.7), init=start, progress=False)
    policy = load_checkpoint(tmp_path / "own" / "last.safetensors").card.length_policy
    assert policy == LengthPolicy(min=22400, short="repeat")


@pytest.mark.parametrize("option", [("--model", "mn04"), ("--frontend", "efficientat_mels64")])
def test_a_start_leaves_nothing_to_say_about_the_network(sounds, start, tmp_path, capsys, option):
    options = ["--data", str(sounds), "--out", str(tmp_path / "run"), "--init", str(start), *option]
    assert main(["fit", *options]) == 2
    assert f"error: {' '.join(option)}: a checkpoint to start from" in capsys.readouterr().err


# Recipes


TABLE = {
    "finetune_esc50": ("single_label", 128, 6e-5),
    "finetune_esc50_dymn": ("single_label", 64, 4e-5),
    "finetune_fsd50k": ("multi_label", 64, 7e-5),
    "finetune_fsd50k_dymn": ("multi_label", 32, 4e-5),
    "finetune_openmic": ("multi_label", 64, 1e-5),
    "finetune_openmic_dymn": ("multi_label", 32, 2e-5),
    "finetune_dcase20": ("single_label", 64, 8e-4),
    "finetune_dcase20_dymn": ("single_label", 32, 3e-4),
}


@pytest.mark.parametrize("name", TABLE)
def test_fine_tuning_recipes_are_the_published_table(name):
    recipe, (task, batch, rate) = get_recipe(name), TABLE[name]
    assert (recipe.task, recipe.batch_size, recipe.lr) == (task, batch, rate)
    assert (recipe.optimizer, recipe.weight_decay, recipe.epochs, recipe.fine_tuning) == ("adam", 0.0, 80, True)
    schedule = (recipe.schedule, recipe.warmup_epochs, recipe.ramp_down_start, recipe.ramp_down_epochs, recipe.final_lr)
    assert schedule == ("published", 10, 10, 65, 0.01)
    settings, style = recipe.augmentation, 0.4 if "dcase20" in name else 0.0
    assert (settings.gain_db, settings.gain_step_db, settings.clip) == ((-12.0, 11.0), 1.0, False)
    assert (settings.roll_seconds * 32000, settings.mix_probability) == (4000, 0.5)
    assert (settings.mixstyle_probability, settings.mixup_alpha) == (style, 0.0 if style else 0.3)
    assert (settings.mel_jitter, settings.masks, settings.share) == ((10, 2000), None, 1.0)
    assert recipe.seconds == (5.0 if "esc50" in name else 10.0)
    assert (recipe.freeze, recipe.layer_decay, recipe.temperature_schedule, recipe.sampling) == ((), None, None, None)
    assert recipe.model == ("dymn10" if name.endswith("dymn") else "mn10")


def test_audioset_recipes_are_the_published_ones():
    for name, model, rate in (("audioset", "mn10", 8e-4), ("audioset_dymn", "dymn10", 1e-3)):
        recipe = get_recipe(name)
        assert (recipe.model, recipe.lr, recipe.batch_size, recipe.epochs) == (model, rate, 120, 200)
        assert (recipe.optimizer, recipe.weight_decay, recipe.task) == ("adam", 0.0, "multi_label")
        assert (recipe.warmup_epochs, recipe.ramp_down_start, recipe.ramp_down_epochs) == (8, 80, 95)
        assert recipe.sampling == SamplingRecipe(clips_per_epoch=100_000, offset=100.0)
        assert recipe.augmentation == Augmentation(mixup_alpha=0.3, mel_jitter=(10, 2000))
        assert (recipe.distillation.weight, recipe.distillation.missing) == (0.9, "labels")
    assert get_recipe("audioset").temperature_schedule is None
    assert get_recipe("audioset_dymn").temperature_schedule == TemperatureSchedule(start=30.0, step=1.0, slope=0.02)


@pytest.mark.parametrize(
    "name", [name for name in list_recipes() if name.startswith("finetune") and "dymn" not in name]
)
def test_every_fine_tuning_recipe_trains(name, sounds, start, tmp_path):
    recipe = get_recipe(name).replace(epochs=1, batch_size=6, seconds=0.3)
    report = fit(sounds, tmp_path / "run", recipe, init=start, progress=False)
    assert report["epochs"] == 1
    card = load_checkpoint(tmp_path / "run" / "model.safetensors").card
    assert card.task == recipe.task
    assert card.provenance["initialised_from"]["name"] == "example"
