"""The shipped models measure what their cards say, and came from the committed recipes."""

import onnxruntime
import pytest
import torch

from models_zoo.audio import load_audio
from models_zoo.dataset import read_dataset
from models_zoo.decoding import legal_segments
from models_zoo.metrics import kl_divergence
from models_zoo.mixtures import write_mixtures
from models_zoo.registry import get_card, shipped_model
from train_torch.checkpoint import load_checkpoint
from train_torch.evaluation import evaluate
from train_torch.frontend import TorchFrontend
from train_torch.recipes import Recipe, get_recipe
from train_torch.recipes.sed import SedRecipe

SHIPPED = {
    "digits-mn": ("digits", "fsdd", 0.97),
    "instruments-mn": ("instruments", "instruments", 0.70),
    "instruments-panns": ("instruments_panns", "instruments", 0.70),
}
RECIPES = {"digits-mac": "digits_mac", **{name: recipe for name, (recipe, _, _) in SHIPPED.items()}}


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_model_came_from_its_committed_recipe(name):
    card, recipe = get_card(name), get_recipe(RECIPES[name])
    assert Recipe.from_dict(card.provenance["recipe"]) == recipe
    assert card.provenance["seed"] == recipe.seed
    assert card.license == recipe.license != ""
    assert card.training_data
    assert card.provenance["clips"]["test"] in (200, 50, 1200)


def test_the_shipped_detector_came_from_its_committed_recipe():
    card, recipe = get_card("scenes-crnn"), get_recipe("scenes_crnn_many")
    assert SedRecipe.from_dict(card.provenance["recipe"]) == recipe
    assert card.provenance["seed"] == recipe.seed
    assert card.license == recipe.license == "CC BY-SA 4.0"
    assert card.training_data
    assert card.provenance["training_clips"] == {"strong": 800, "weak": 400, "unlabelled": 600}
    assert {"test_psds1", "test_psds2", "test_collar_f1", "test_weak_f1"} <= set(card.metrics)


@pytest.mark.real_data
@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_measures_what_its_card_says(name, data):
    _, folder, bar = SHIPPED[name]
    card = get_card(name)
    session = onnxruntime.InferenceSession(shipped_model(name), providers=["CPUExecutionProvider"])
    frontend = TorchFrontend(card.frontend).eval()
    records = read_dataset(data / folder).select("test").records
    right = 0
    for record in records:
        clip = torch.from_numpy(legal_segments(load_audio(record.file, card.frontend), card))
        logits = session.run(["logits"], {"features": frontend(clip).numpy()})[0]
        right += card.labels[int(logits[0].argmax())] == record.labels[0]
    assert right / len(records) == pytest.approx(card.metrics["test_accuracy"])
    assert right / len(records) >= bar


@pytest.mark.real_data
def test_the_shipped_checkpoint_is_the_shipped_model(data):
    path = shipped_model("digits-mn").with_suffix(".safetensors")
    assert load_checkpoint(path).card == get_card("digits-mn")
    evaluation = evaluate(path, data / "fsdd", split="test", progress=False)
    assert evaluation.metrics()["accuracy"] == pytest.approx(get_card("digits-mn").metrics["test_accuracy"])


@pytest.mark.real_data
def test_the_shipped_mac_measures_what_its_card_says(data, tmp_path):
    """On the first 60 test mixtures of the 1,200 of its card, within what chance leaves."""
    path, card = shipped_model("digits-mac").with_suffix(".safetensors"), get_card("digits-mac")
    assert (card.task, card.options["pooling"], card.architecture) == ("label_distribution", "max", "mac_max")
    assert "--seed 2026" in card.provenance["data"]
    write_mixtures(data / "fsdd", tmp_path, card.frontend, num_clips=300, seed=2026)
    evaluation = evaluate(path, tmp_path, split="test", progress=False)
    divergence = kl_divergence(evaluation.targets, evaluation.probabilities)
    error = divergence.std() / len(divergence) ** 0.5
    assert len(divergence) == 60
    assert divergence.mean() == pytest.approx(card.metrics["test_kl_divergence"], abs=3 * error)
    assert error < 0.1
    assert divergence.mean() < evaluation.metrics()["kl_divergence_uniform"] / 2
