"""Comparisons over paired seeds: what the runs of a seed share, the interval, and what is refused."""

import csv
import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats

from models_zoo.dataset import read_dataset
from models_zoo.errors import DataError
from models_zoo.soundscapes import write_soundscapes
from parity_tests.networks import card_of
from train_torch.__main__ import main
from train_torch.checkpoint import load_checkpoint
from train_torch.classifier import Classifier
from train_torch.compare import Comparison, Difference, compare
from train_torch.data import Batch
from train_torch.distill import StoredLogits
from train_torch.models import create_model
from train_torch.recipes import DistillationRecipe, LossRecipe, Recipe
from train_torch.train import fit

CLASSES = ("buzz", "clicks", "tone")
TINY = Recipe(
    model="mn01",
    frontend="efficientat_mels40",
    epochs=1,
    batch_size=6,
    lr=3e-3,
    seconds=0.5,
    imbalance=3.0,
    select="balanced_accuracy",
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Sixty clips of three sounds, split 36 / 12 / 12."""
    folder = tmp_path_factory.mktemp("sounds")
    write_soundscapes(folder, num_clips=60, seed=1, seconds=0.5, classes=CLASSES)
    return folder


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    arms = {"plain": TINY, "balanced": TINY.replace(loss=LossRecipe(class_balanced=0.9999))}
    for name, recipe in arms.items():
        (folder / f"{name}.json").write_text(recipe.to_json())
    return [folder / f"{name}.json" for name in arms]


@pytest.fixture(scope="module")
def compared(recipes, sounds, tmp_path_factory):
    """A finished comparison, its folder, and what each run started from: weights and first batches."""
    out = tmp_path_factory.mktemp("compared")
    step, seen = Classifier.training_step, []

    def watched(self, batch, index):
        if self.global_step == 0:
            weights = {key: value.clone() for key, value in self.model.state_dict().items()}
            seen.append({"recipe": self.card.name, "seed": self.recipe.seed, "weights": weights, "order": []})
        seen[-1]["order"].append(batch.index.tolist())
        return step(self, batch, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classifier, "training_step", watched)
        comparison = compare(recipes, sounds, out, seeds=(1, 2), progress=False)
    return comparison, out, {(run["recipe"], run["seed"]): run for run in seen}


def rows_of(path):
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def test_runs_of_a_seed_share_split_weights_and_order(compared):
    _, out, runs = compared
    assert len(runs) == 4
    for seed in (1, 2):
        first, second = runs["plain", seed], runs["balanced", seed]
        assert first["order"] == second["order"]
        assert len(first["order"]) > 1
        assert all(torch.equal(first["weights"][key], value) for key, value in second["weights"].items())
        splits = [(out / name / f"seed-{seed}" / "split.csv").read_bytes() for name in ("plain", "balanced")]
        assert splits[0] == splits[1]
    assert runs["plain", 1]["order"] != runs["plain", 2]["order"]
    assert any(not torch.equal(runs["plain", 2]["weights"][k], v) for k, v in runs["plain", 1]["weights"].items())
    assert (out / "plain/seed-1/split.csv").read_bytes() != (out / "plain/seed-2/split.csv").read_bytes()


def test_the_recipes_make_the_difference(compared):
    _, out, _ = compared
    first, second = (
        load_checkpoint(out / name / "seed-1" / "last.safetensors").model.state_dict() for name in ("plain", "balanced")
    )
    assert any(not torch.allclose(first[key], second[key]) for key in first)


def test_tables_and_picture_are_written(compared):
    comparison, out, _ = compared
    runs = rows_of(out / "runs.csv")
    assert [(row["recipe"], row["seed"]) for row in runs] == [
        ("plain", "1"), ("balanced", "1"), ("plain", "2"), ("balanced", "2")
    ]  # fmt: skip
    report = json.loads((out / "plain" / "seed-1" / "report.json").read_text())
    assert float(runs[0]["balanced_accuracy"]) == report["test"]["metrics"]["balanced_accuracy"]
    assert float(runs[0]["validation_loss"]) == report["validation"]["metrics"]["loss"]
    assert float(runs[0]["last_train_loss"]) == float(rows_of(out / "plain/seed-1/metrics.csv")[-1]["train_loss"])
    (pair,) = rows_of(out / "comparison.csv")
    assert (pair["baseline"], pair["recipe"]) == ("plain", "balanced")
    by_seed = [float(runs[i + 1]["balanced_accuracy"]) - float(runs[i]["balanced_accuracy"]) for i in (0, 2)]
    assert [float(pair["seed_1"]), float(pair["seed_2"])] == pytest.approx(by_seed)
    assert float(pair["difference"]) == pytest.approx(np.mean(by_seed))
    assert "| `balanced` | `plain` |" in (out / "comparison.md").read_text()
    assert (out / "comparison.md").read_text().strip() == comparison.markdown()
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_recall_of_rare_and_frequent_classes_is_told_apart(compared):
    _, out, _ = compared
    counts = Counter(row["label"] for row in rows_of(out / "plain/seed-2/split.csv") if row["split"] == "train")
    rarest, *_, commonest = sorted(counts, key=counts.get)
    report = json.loads((out / "plain" / "seed-2" / "report.json").read_text())
    recall = {row["label"]: row["recall"] for row in report["test"]["classes"]}
    row = rows_of(out / "runs.csv")[2]
    assert float(row["rare_recall"]) == recall[rarest]
    assert float(row["frequent_recall"]) == recall[commonest]


def test_finished_runs_are_not_repeated(compared, recipes, sounds, monkeypatch):
    comparison, out, _ = compared
    monkeypatch.setattr(Classifier, "training_step", None)
    again = compare(recipes, sounds, out, seeds=(1, 2), metric="loss", progress=False)
    assert again.rows == comparison.rows
    assert again.differences[0].values.tolist() == [
        comparison.rows[i + 1]["loss"] - comparison.rows[i]["loss"] for i in (0, 2)
    ]


def test_an_interrupted_comparison_goes_on(recipes, sounds, tmp_path, compared, monkeypatch):
    step, steps = Classifier.training_step, []

    def killed(self, batch, index):
        steps.append(index)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return step(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", killed)
        with pytest.raises(SystemExit):
            compare(recipes, sounds, tmp_path, seeds=(1, 2), progress=False)
    assert not (tmp_path / "runs.csv").exists()
    rows = compare(recipes, sounds, tmp_path, seeds=(1, 2), progress=False).rows
    timeless = [
        [{key: row[key] for key in row if key != "seconds"} for row in some] for some in (rows, compared[0].rows)
    ]
    assert timeless[0] == timeless[1]


def test_the_interval_is_students_on_the_differences():
    values = np.array([0.02, -0.01, 0.05, 0.03, 0.00])
    difference = Difference("a", "b", values, 0.5, 0.518)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert difference.interval() == pytest.approx((expected.low, expected.high))
    table = Comparison("accuracy", (1, 2, 3, 4, 5), (), (difference,)).markdown()
    assert "| `b` | `a` | 51.8 | 50.0 | +1.8 | -1.2 to +4.8 | +2.0, -1.0, +5.0, +3.0, +0.0 |" in table
    table = Comparison("kl_divergence", (1, 2, 3, 4, 5), (), (difference,)).markdown()
    assert "| 0.5180 | 0.5000 | +0.0180 | -0.0116 to +0.0476 | +0.0200," in table


@pytest.mark.parametrize(
    ("change", "field"),
    [({"imbalance": 2.0}, "imbalance"), ({"split_seed": 4}, "split_seed"), ({"val_fraction": 0.3}, "val_fraction")],
)
def test_recipes_that_cannot_be_paired_are_refused(recipes, sounds, tmp_path, change, field):
    (tmp_path / "other.json").write_text(TINY.replace(**change).to_json())
    with pytest.raises(DataError, match=f"{field}: plain has .* other has"):
        compare([recipes[0], tmp_path / "other.json"], sounds, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_too_little_to_compare_is_refused(recipes, sounds, tmp_path):
    with pytest.raises(DataError, match="at least two of different names"):
        compare([recipes[0], recipes[0]], sounds, tmp_path / "out", progress=False)
    for seeds in ((1,), (1, 1)):
        with pytest.raises(DataError, match="at least two, all different"):
            compare(recipes, sounds, tmp_path / "out", seeds=seeds, progress=False)


def test_an_unknown_metric_names_the_known(compared, recipes, sounds):
    with pytest.raises(DataError, match=r"'recall'.*rare_recall"):
        compare(recipes, sounds, compared[1], seeds=(1, 2), metric="recall", progress=False)


def test_runs_on_other_clips_are_no_pair(recipes, sounds, tmp_path, compared):
    shutil.copytree(compared[1], tmp_path, dirs_exist_ok=True)
    split = tmp_path / "balanced" / "seed-2" / "split.csv"
    split.write_text(split.read_text().replace(",train", ",test", 1))
    with pytest.raises(DataError, match="seed 2: plain and balanced were run on different clips"):
        compare(recipes, sounds, tmp_path, seeds=(1, 2), progress=False)


def test_a_teacher_may_follow_the_seed(recipes, sounds, tmp_path):
    dataset = read_dataset(sounds)
    for seed in (1, 2):
        stored = StoredLogits(tuple(map(dataset.name_of, dataset.records)), seed * dataset.multi_hot(), CLASSES)
        stored.write(tmp_path / f"teacher-{seed}.npz")
    (tmp_path / "distilled.json").write_text(TINY.replace(distillation=DistillationRecipe()).to_json())
    arms = [recipes[0], tmp_path / "distilled.json"]
    compare(
        arms, sounds, tmp_path / "out", seeds=(1, 2), teacher_logits=f"{tmp_path}/teacher-{{seed}}.npz", progress=False
    )
    cards = {
        (name, seed): load_checkpoint(tmp_path / "out" / name / f"seed-{seed}" / "model.safetensors").card
        for name in ("plain", "distilled")
        for seed in (1, 2)
    }
    origins = {key: card.provenance["distilled_from"] for key, card in cards.items()}
    assert origins["plain", 1] is None
    assert origins["distilled", 1]["sha256"] != origins["distilled", 2]["sha256"]


def test_the_command_line_compares(compared, recipes, sounds, capsys, caplog, monkeypatch):
    comparison, out, _ = compared
    monkeypatch.setattr(Classifier, "training_step", None)
    options = ["--data", str(sounds), "--out", str(out), "--seeds", "2", "--quiet"]
    assert main(["compare", "--recipes", *map(str, recipes), *options]) == 0
    assert capsys.readouterr().out.strip() == comparison.markdown()
    assert "run 4 of 4: balanced, seed 2" in caplog.text
    assert main(["compare", "--recipes", str(recipes[0]), *options]) == 2
    assert "at least two" in capsys.readouterr().err


# What imbalance on purpose does to a run


def test_thinning_is_reported_recorded_and_leaves_the_test_alone(sounds, tmp_path, caplog):
    caplog.set_level("INFO", logger="train_torch")
    report = fit(sounds, tmp_path / "run", TINY.replace(seed=5), progress=False)
    counts = {split: Counter() for split in ("train", "validation", "test")}
    for row in rows_of(tmp_path / "run" / "split.csv"):
        counts[row["split"]][row["label"]] += 1
    assert sorted(counts["train"].values()) == [4, 7, 12]
    assert set(counts["validation"].values()) == set(counts["test"].values()) == {4}
    assert report["test"]["clips"] == 12
    card = load_checkpoint(tmp_path / "run" / "model.safetensors").card
    assert card.provenance["training_clips"] == counts["train"]
    assert card.provenance["recipe"]["imbalance"] == 3.0
    for label in CLASSES:
        cells = next(line for line in caplog.text.splitlines() if line.split()[:1] == [label]).split()
        assert cells[1:] == [str(counts["train"][label]), "4", "4"]


def test_a_split_seed_holds_split_and_thinning_while_the_seed_varies(sounds, tmp_path):
    for name, fields in {"a": {"seed": 1}, "b": {"seed": 2}, "c": {"seed": 2, "split_seed": 8}}.items():
        recipe = TINY.replace(**{"split_seed": 7, **fields})
        fit(sounds, tmp_path / name, recipe, progress=False, test=False)
    splits = [(tmp_path / name / "split.csv").read_bytes() for name in "abc"]
    assert splits[0] == splits[1] != splits[2]
    weights = [load_checkpoint(tmp_path / name / "last.safetensors").model.state_dict() for name in "ab"]
    assert any(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize(("select", "expected"), [("accuracy", 0.75), ("balanced_accuracy", 0.5)])
def test_the_best_epoch_goes_by_the_metric_asked_for(select, expected):
    model = create_model("mn01", num_classes=2)
    classifier = Classifier(model, card_of(model, "mn01"), TINY.replace(select=select), ("a", "b", "c", "d"))
    logged = {}
    classifier.log = lambda name, value, **_: logged.update({name: value})
    answers = torch.tensor([[20.0, 0.0]]).expand(4, 2)
    targets = torch.eye(2)[[0, 0, 0, 1]]
    classifier._scored = [(Batch(torch.zeros(4, 1), targets, torch.arange(4)), answers)]
    classifier.on_validation_epoch_end()
    assert logged["val_accuracy"] == 0.75
    assert logged["val_balanced_accuracy"] == 0.5
    assert logged["val_score"] == pytest.approx(expected, abs=1e-3)
