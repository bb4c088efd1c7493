"""The shipped pairs-cavmae on freshly made pairs: what its card says, and both paths alike."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from infer_tf import TFAudioClassifier
from models_zoo.dataset import read_dataset
from models_zoo.pairs import write_pairs
from models_zoo.registry import get_card, shipped_model
from parity_tests.parity import run_parity
from train_torch.checkpoint import load_checkpoint
from train_torch.recipes import Recipe, get_recipe
from train_torch.retrieval import Retrieval

NAME = "pairs-cavmae"


@pytest.fixture(scope="module")
def pairs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 200 test recordings of the digits with pictures the model has not seen; a few others, to have every split."""
    source, folder = data / "fsdd", tmp_path_factory.mktemp("pairs")
    with open(source / "metadata.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    kept = [row for row in rows if row["split"] == "test"] + [row for row in rows if row["split"] == "train"][::80]
    (folder / "audio").symlink_to(source / "audio")
    with open(folder / "metadata.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerows([("file", "label", "split"), *((row["file"], row["label"], row["split"]) for row in kept)])
    write_pairs(folder / "pairs", data=folder, size=64, seed=7)
    return folder / "pairs"


def test_it_came_from_its_committed_recipe() -> None:
    card, recipe = get_card(NAME), get_recipe("pairs_pretrain")
    assert Recipe.from_dict(card.provenance["recipe"]) == recipe
    assert card.license == recipe.license != ""
    assert card.task == "embedding"
    assert shipped_model(NAME).stat().st_size < 4_000_000
    begun = get_recipe("pairs_pictures")
    assert card.provenance["initialised_from"]["name"] == "pairs-pictures"
    assert begun.model_options["mode"] == "videoonly"


@pytest.mark.real_data
def test_sounds_and_pictures_of_a_digit_find_each_other(pairs: Path) -> None:
    """At least five times chance in both directions, and what the card says within what 200 pairs leave open."""
    dataset = read_dataset(pairs).select("test")
    with TFAudioClassifier(NAME) as classifier:
        audio = np.stack([classifier.embed_audio(record.file) for record in dataset.records])
        image = np.stack([classifier.embed_image(record.image) for record in dataset.records])
    files = tuple(dataset.name_of(record) for record in dataset.records)
    measured = Retrieval(files, dataset.multi_hot(), audio, image).metrics()
    assert len(files) == 200
    for name in ("audio_to_image_recall_at_1", "image_to_audio_recall_at_1"):
        assert measured[name] >= 5 * measured["chance_at_1"]
        assert measured[name] == pytest.approx(get_card(NAME).metrics[f"test_{name}"], abs=0.12)


@pytest.mark.real_data
def test_both_paths_agree_on_pairs(pairs: Path) -> None:
    onnx = shipped_model(NAME)
    report = run_parity(onnx, onnx.with_suffix(".safetensors"), pairs, split="test", limit=60, progress=False)
    print(report)
    assert report.passed, f"\n{report}"
    assert report.num_clips == 60
    assert load_checkpoint(onnx.with_suffix(".safetensors")).card == get_card(NAME)
