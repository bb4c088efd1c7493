"""Several models measured together: the mean of their answers against each of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile

from infer_tf.cli import main
from models_zoo.metrics import kl_divergence, mean_and_interval
from parity_tests.infer_tf.tiny import LABELS, tiny_card, write_tiny

RATE = 32000
WEIGHTS = ("0.2;0.8", "1.0;0.0", "0.5;0.5", "0.7;0.3", "0.05;0.95", "0.4;0.6")


@pytest.fixture
def run(capsys):
    """Return a function that runs the command and returns its code, stdout and stderr."""

    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


def write_data(folder, column, cells):
    """Write one clip of noise per cell, and its table."""
    folder.mkdir()
    rows = [f"file,label,{column}split"]
    for seed, cell in enumerate(cells):
        noise = np.random.default_rng(seed).standard_normal(9600) * 0.02 * (seed + 1)
        soundfile.write(folder / f"{seed}.wav", noise, RATE, subtype="FLOAT")
        rows.append(f"{seed}.wav,{cell},test")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    return folder


def models_of(folder, task, count=3):
    folder.mkdir()
    for seed in range(count):
        write_tiny(folder / f"{seed}.onnx", tiny_card(name=f"m{seed}", task=task), seed=seed, scale=0.3)
    return folder


def probabilities(run, model, data):
    code, out, err = run("predict", model, *(data / f"{seed}.wav" for seed in range(6)), "--json", "--top", 3)
    assert code == 0, err
    rows = []
    for line in out.splitlines():
        top = {row["label"]: row["probability"] for row in json.loads(line)["top"]}
        rows.append([top[label] for label in LABELS])
    return np.array(rows)


def test_the_mean_of_distributions_against_the_best_member(run, tmp_path):
    data = write_data(tmp_path / "data", "weights,", [f"hum;clap,{weights}" for weights in WEIGHTS])
    models = models_of(tmp_path / "models", "label_distribution")
    code, out, err = run("evaluate", models, "--data", data, "--members", "--json")
    assert code == 0, err
    report = json.loads(out)
    targets = np.array([[*map(float, reversed(weights.split(";"))), 0.0] for weights in WEIGHTS])
    answers = [probabilities(run, models / f"{seed}.onnx", data) for seed in range(3)]
    each = [kl_divergence(targets, answer) for answer in answers]
    together = kl_divergence(targets, np.mean(answers, axis=0))
    comparison = report["comparison"]
    assert report["measures"]["kl_divergence"] == pytest.approx(together.mean(), abs=1e-5)
    measured = [member["measures"]["kl_divergence"] for member in comparison["members"]]
    assert measured == pytest.approx([values.mean() for values in each], abs=1e-5)
    best = int(np.argmin(measured))
    assert comparison["best_member"] == str(models / f"{best}.onnx")
    difference = comparison["difference"]
    assert difference["measure"] == "kl_divergence"
    expected = mean_and_interval(together - each[best])
    assert (difference["mean"], difference["low"], difference["high"]) == pytest.approx(expected, abs=1e-5)

    code, out, _ = run("evaluate", *sorted(models.iterdir()), "--data", data, "--members")
    assert code == 0
    assert f"mean of these 3{' ' * (len(str(models / '0.onnx')) - 15)}" in out
    assert f"mean minus best member ({models / f'{best}.onnx'}): {expected[0]:+.4f}, 95 % interval" in out


def test_the_mean_of_decisions_against_the_best_member(run, tmp_path):
    labels = ("clap", "hum", "clap", "whistle", "hum", "clap")
    data = write_data(tmp_path / "data", "", labels)
    models = models_of(tmp_path / "models", "single_label")
    code, out, err = run("evaluate", models, "--data", data, "--members", "--json")
    assert code == 0, err
    comparison = json.loads(out)["comparison"]
    truth = np.array([LABELS.index(label) for label in labels])
    answers = [probabilities(run, models / f"{seed}.onnx", data) for seed in range(3)]
    right = [(answer.argmax(axis=1) == truth).astype(float) for answer in answers]
    together = (np.mean(answers, axis=0).argmax(axis=1) == truth).astype(float)
    assert [member["measures"]["accuracy"] for member in comparison["members"]] == [r.mean() for r in right]
    best = int(np.argmax([r.mean() for r in right]))
    assert comparison["difference"]["mean"] == pytest.approx(together.mean() - right[best].mean())


def test_several_models_are_their_mean_without_members(run, tmp_path):
    data = write_data(tmp_path / "data", "weights,", [f"hum;clap,{weights}" for weights in WEIGHTS])
    models = models_of(tmp_path / "models", "label_distribution", 2)
    code, out, _ = run("evaluate", models / "0.onnx", models / "1.onnx", "--data", data, "--json")
    assert code == 0
    report = json.loads(out)
    assert report["model"] == "mean-of-2"
    assert "comparison" not in report


def test_weights_are_fitted_to_one_split_and_used_on_another(run, tmp_path):
    data = write_data(tmp_path / "data", "weights,", [f"hum;clap,{weights}" for weights in WEIGHTS])
    models = models_of(tmp_path / "models", "label_distribution")
    code, out, err = run("evaluate", models, "--data", data, "--fit-weights")
    assert code == 0, err
    weights = np.array([float(part) for part in out.split(",")])
    assert weights.sum() == pytest.approx(1, abs=2e-4)

    answers = np.stack([probabilities(run, path, data) for path in sorted(models.iterdir())])
    targets = np.array([[float(part) for part in reversed(each.split(";"))] + [0.0] for each in WEIGHTS])
    targets = targets[:, [("clap", "hum").index(label) if label in ("clap", "hum") else 2 for label in LABELS]]

    def divergence(weights):
        return kl_divergence(targets, np.tensordot(weights, answers, 1)).mean()

    best = divergence(weights)
    assert best < divergence(np.full(3, 1 / 3))
    for towards in np.eye(3):  # no other weights are better, but for the thousandth that each member keeps
        assert best <= divergence(0.98 * weights / weights.sum() + 0.02 * towards) + 1e-4
    code, out, _ = run("evaluate", models, "--data", data, "--weights", ",".join(map(str, weights)), "--json")
    assert code == 0
    assert json.loads(out)["measures"]["kl_divergence"] == pytest.approx(best, abs=1e-5)


def test_comparisons_that_are_refused(run, tmp_path):
    data = write_data(tmp_path / "data", "", ["clap"] * 3 + ["hum;clap"] * 3)
    models = models_of(tmp_path / "models", "multi_label", 2)
    other = write_tiny(tmp_path / "other.onnx", tiny_card(name="other", task="single_label"))
    renamed = write_tiny(tmp_path / "renamed.onnx", tiny_card(task="multi_label", labels=["clap", "hiss", "whistle"]))
    for arguments, message in (
        ((models, "--members"), "recordings of several labels have none"),
        ((models / "0.onnx", "--members"), "give two or more, or a folder"),
        ((models / "0.onnx", "--fit-weights"), "give two or more, or a folder"),
        ((models, "--fit-weights"), "the task of 'mean-of-2' is multi_label"),
        ((models, "--weights", "1,2,3"), "got 3 for 2 members"),
        ((models / "0.onnx", other), "task: 'other' has single_label, 'm0' has multi_label"),
        ((models / "0.onnx", renamed), "at index 1 (line 2): 'hiss', not 'hum'"),
    ):
        code, out, err = run("evaluate", *arguments, "--data", data)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1
        assert message in err, err
