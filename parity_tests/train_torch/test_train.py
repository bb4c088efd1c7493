"""Training runs from the data folder to the finished checkpoint, killed, resumed, stopped early and refused."""

import csv
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from models_zoo.audio import load_audio
from models_zoo.decoding import probabilities_of
from models_zoo.errors import (
    CheckpointError,
    DataError,
    DeviceError,
    MissingDependencyError,
    OutputExistsError,
    OutputWriteError,
    SpecError,
)
from models_zoo.soundscapes import write_soundscapes
from train_torch import train
from train_torch.__main__ import main
from train_torch.checkpoint import load_checkpoint
from train_torch.evaluation import evaluate
from train_torch.frontend import TorchFrontend
from train_torch.recipes import Augmentation, DistillationRecipe, Recipe, get_recipe
from train_torch.train import fit

TINY = Recipe(
    model="mn01",
    frontend="efficientat_mels40",
    seed=3,
    epochs=2,
    batch_size=8,
    lr=3e-3,
    warmup_epochs=1,
    seconds=0.5,
    label_smoothing=0.1,
    bn_momentum=0.1,
    augmentation=Augmentation(
        speed=(0.9, 1.1),
        mix_probability=0.3,
        mixup_alpha=0.3,
        mel_jitter=(10, 2000),
        masks=(4, 4),
        noise_probability=0.3,
    ),
)
CLASSES = ("buzz", "clicks", "tone")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Thirty clips of three sounds, split 18 / 6 / 6."""
    folder = tmp_path_factory.mktemp("sounds")
    write_soundscapes(folder, num_clips=30, seed=1, seconds=0.5, classes=CLASSES)
    return folder


@pytest.fixture(scope="module")
def trained(sounds, tmp_path_factory):
    """A finished three-epoch run, its report, and torch's random state right after it."""
    out = tmp_path_factory.mktemp("runs") / "Tiny Sounds"
    report = fit(sounds, out, TINY.replace(epochs=3), progress=False)
    return out, report, torch.get_rng_state()


def rows_of(path):
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def left_behind(folder):
    return [path.name for path in Path(folder).rglob("*") if "partial" in path.name or "tmp" in path.name]


def test_a_run_folder_is_complete(trained, sounds):
    out, report, _ = trained
    assert sorted(path.name for path in out.iterdir()) == sorted({*train.OWN_FILES} - {"best.safetensors"})
    rows = rows_of(out / "metrics.csv")
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert {"lr", "train_loss", "val_loss", "val_accuracy", "seconds"} <= set(rows[0])
    assert json.loads((out / "report.json").read_text()) == report
    assert {row["split"] for row in rows_of(out / "split.csv")} == {"train", "validation", "test"}
    assert len(rows_of(out / "split.csv")) == 30
    for name in ("learning_curves", "confusion_validation", "confusion_test"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not left_behind(out)


def test_the_card_says_what_was_trained_and_measured(trained):
    out, report, _ = trained
    best, last = (load_checkpoint(out / f"{name}.safetensors").card for name in ("model", "last"))
    assert best.name == "tiny-sounds"
    assert best.labels == CLASSES
    assert best.task == "single_label"
    assert best.frontend.mel.n_mels == 40
    assert best.metrics["test_accuracy"] == report["test"]["metrics"]["accuracy"]
    assert best.provenance["recipe"] == TINY.replace(epochs=3).to_dict()
    assert best.provenance["clips"] == {"train": 18, "validation": 6, "test": 6}
    assert best.provenance["split_sha256"] == hashlib.sha256((out / "split.csv").read_bytes()).hexdigest()
    assert best.provenance["versions"]["torch"] == torch.__version__
    assert best.provenance["epoch"] == report["best_epoch"]
    assert last.provenance["epoch"] == 2
    final = rows_of(out / "metrics.csv")[-1]
    assert last.metrics["validation_accuracy"] == pytest.approx(float(final["val_accuracy"]), abs=1e-6)


def test_evaluate_agrees_with_the_report_and_with_a_loop_by_hand(trained, sounds):
    out, report, _ = trained
    evaluation = evaluate(out / "model.safetensors", sounds, split="test", progress=False)
    assert evaluation.to_dict() == report["test"]
    loaded = load_checkpoint(out / "model.safetensors")
    frontend = TorchFrontend(loaded.card.frontend).eval()
    for file, probabilities in zip(evaluation.files, evaluation.probabilities, strict=True):
        waveform = torch.from_numpy(load_audio(sounds / file, loaded.card.frontend))
        with torch.inference_mode():
            logits = loaded.model(features=frontend(waveform[None]))["logits"].numpy()
        expected = probabilities_of(logits, task="single_label", kind="logit")[0]
        assert np.abs(expected - probabilities).max() < 1e-5


def test_training_learns(sounds, tmp_path):
    recipe = TINY.replace(epochs=14, augmentation=Augmentation(), batch_size=6, bn_momentum=0.3)
    fit(sounds, tmp_path / "run", recipe, progress=False)
    losses = [float(row["train_loss"]) for row in rows_of(tmp_path / "run" / "metrics.csv")]
    assert losses[-1] < 0.75 * losses[0]
    learned = evaluate(tmp_path / "run" / "last.safetensors", sounds, split="train", progress=False)
    assert learned.metrics()["accuracy"] > 0.8


def test_the_class_counts_come_before_the_first_epoch(sounds, tmp_path, caplog, monkeypatch):
    def stop(*_):
        raise RuntimeError("first step")

    monkeypatch.setattr(train.Classifier, "training_step", stop)
    caplog.set_level("INFO", logger="train_torch")
    with pytest.raises(RuntimeError, match="first step"):
        fit(sounds, tmp_path / "run", TINY, progress=False)
    assert ["buzz", "6", "2", "2"] in [line.split() for line in caplog.text.splitlines()]


@pytest.mark.parametrize("killed_at", [3, 4], ids=["within an epoch", "between epochs"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(trained, sounds, tmp_path, monkeypatch, killed_at):
    reference, _, random_state = trained
    out, recipe = tmp_path / "Tiny Sounds", TINY.replace(epochs=3)
    step, steps = train.Classifier.training_step, []

    def killed(self, *arguments):
        if len(steps) == killed_at:
            raise RuntimeError("killed")
        steps.append(self.global_step)
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train.Classifier, "training_step", killed)
        with pytest.raises(RuntimeError, match="killed"):
            fit(sounds, out, recipe, progress=False)
    assert not (out / "last.safetensors").exists()
    torch.manual_seed(123456)
    fit(sounds, out, recipe, progress=False, resume=True)
    assert torch.equal(torch.get_rng_state(), random_state)
    for name in ("model", "last"):
        whole, resumed = (load_checkpoint(folder / f"{name}.safetensors") for folder in (reference, out))
        assert whole.card == resumed.card
        for key, value in whole.model.state_dict().items():
            assert torch.equal(value, resumed.model.state_dict()[key]), (name, key)
    for name in ("split.csv", "recipe.json"):
        assert (reference / name).read_bytes() == (out / name).read_bytes()
    histories = [
        [{key: row[key] for key in row if key != "seconds"} for row in rows_of(folder / "metrics.csv")]
        for folder in (reference, out)
    ]
    assert histories[0] == histories[1]
    states = [torch.load(folder / "state.ckpt", weights_only=True) for folder in (reference, out)]
    moments = [state["optimizer_states"][0]["state"] for state in states]
    assert all(torch.equal(moments[0][key]["exp_avg_sq"], moments[1][key]["exp_avg_sq"]) for key in moments[0])


def test_a_finished_run_is_left_alone_by_resume(trained, sounds):
    out, report, _ = trained
    before = (out / "model.safetensors").stat().st_mtime_ns
    assert fit(sounds, out, TINY.replace(epochs=3), progress=False, resume=True) == report
    assert (out / "model.safetensors").stat().st_mtime_ns == before


def test_a_run_folder_is_refused_unless_told(trained, sounds):
    out, _, _ = trained
    with pytest.raises(OutputExistsError, match=r"--resume.*--force"):
        fit(sounds, out, TINY, progress=False)
    with pytest.raises(DataError, match="different: epochs, lr"):
        fit(sounds, out, TINY.replace(lr=1.0), progress=False, resume=True)


def test_early_stopping(sounds, tmp_path):
    recipe = TINY.replace(epochs=20, lr=1e-12, patience=2, augmentation=Augmentation(), bn_momentum=1e-9)
    report = fit(sounds, tmp_path / "run", recipe, progress=False, test=False)
    assert report["epochs"] < 8
    assert "test" not in report


def test_several_labels_per_clip(tmp_path):
    write_soundscapes(tmp_path / "sounds", num_clips=30, seed=1, seconds=0.6, classes=CLASSES, events_per_clip=2)
    with pytest.raises(DataError, match="multi_label"):
        fit(tmp_path / "sounds", tmp_path / "run", TINY, progress=False)
    report = fit(tmp_path / "sounds", tmp_path / "run", TINY.replace(task="multi_label"), progress=False)
    assert set(report["test"]["metrics"]) == {"mean_average_precision", "mean_roc_auc", "d_prime", "loss"}
    assert 0 <= report["test"]["metrics"]["mean_average_precision"] <= 1
    assert load_checkpoint(tmp_path / "run" / "model.safetensors").card.task == "multi_label"
    assert not (tmp_path / "run" / "confusion_test.png").exists()
    evaluation = evaluate(tmp_path / "run" / "model.safetensors", tmp_path / "sounds", split="test", progress=False)
    assert evaluation.to_dict() == report["test"]
    assert "average_precision" in evaluation.table()


def test_fine_tuning_replaces_the_head_and_says_so(trained, sounds, tmp_path, caplog):
    out, _, _ = trained
    caplog.set_level("INFO", logger="train_torch")
    write_soundscapes(tmp_path / "sounds", num_clips=20, seed=2, seconds=0.5, classes=("bell", "buzz"))
    recipe = TINY.replace(epochs=1, frontend="efficientat", lr=1e-9, augmentation=Augmentation(), bn_momentum=1e-9)
    fit(tmp_path / "sounds", tmp_path / "run", recipe, init=out / "model.safetensors", progress=False)
    assert "replaced: classifier.5.weight, classifier.5.bias" in caplog.text
    before, after = load_checkpoint(out / "model.safetensors"), load_checkpoint(tmp_path / "run" / "model.safetensors")
    assert after.card.labels == ("bell", "buzz")
    assert after.card.frontend == before.card.frontend
    origin = after.card.provenance["initialised_from"]
    assert origin == {
        "name": "tiny-sounds",
        "sha256": before.sha256,
        "replaced": ["classifier.5.weight", "classifier.5.bias"],
    }
    for key, value in before.model.state_dict().items():
        if key not in origin["replaced"] and "num_batches" not in key:
            assert torch.allclose(value, after.model.state_dict()[key], atol=1e-6), key


def test_fine_tuning_a_published_file(sounds, tmp_path):
    from train_torch.models import create_model

    torch.save(create_model("mn04_as").state_dict(), tmp_path / "mn04_as_mAP_432.pt")
    recipe = TINY.replace(epochs=1)
    report = fit(
        sounds, tmp_path / "run", recipe, init=tmp_path / "mn04_as_mAP_432.pt", init_card="mn04_as", progress=False
    )
    assert report["epochs"] == 1
    card = load_checkpoint(tmp_path / "run" / "model.safetensors").card
    assert card.provenance["initialised_from"]["name"] == "mn04_as"
    assert card.labels == CLASSES
    (tmp_path / "mn04_as_mAP_432.pt").rename(tmp_path / "mine.pt")
    with pytest.raises(CheckpointError, match="no card"):
        fit(sounds, tmp_path / "other", recipe, init=tmp_path / "mine.pt", progress=False)


def test_held_out_speakers_are_scored_alone(sounds, tmp_path):
    rows = rows_of(sounds / "metadata.csv")
    lines = ["file,label,speaker"] + [f"{row['file']},{row['label']},{'ab'[i % 2]}" for i, row in enumerate(rows)]
    (sounds / "spoken.csv").write_text("\n".join(lines) + "\n")
    report = fit(
        sounds / "spoken.csv",
        tmp_path / "run",
        TINY.replace(epochs=1),
        split_by="speaker",
        hold_out=("b",),
        validate_by="file",
        progress=False,
    )
    assert report["test"]["clips"] == 15
    assert load_checkpoint(tmp_path / "run" / "model.safetensors").card.provenance["held_out"] == ["b"]
    best = tmp_path / "run" / "model.safetensors"
    scored = evaluate(best, sounds / "spoken.csv", split_by="speaker", hold_out=("b",), progress=False)
    assert scored.to_dict() == report["test"]


def test_mixed_precision_trains(sounds, tmp_path):
    report = fit(sounds, tmp_path / "run", TINY.replace(epochs=1, precision="bf16-mixed"), progress=False)
    assert report["epochs"] == 1
    state = load_checkpoint(tmp_path / "run" / "model.safetensors").model.state_dict()
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize("name", ["state.ckpt", "model.safetensors", "split.csv"])
def test_a_full_disk_leaves_nothing_half_written(sounds, tmp_path, monkeypatch, name):
    replace = os.replace

    def full(source, target):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputWriteError, match="No space left"):
        fit(sounds, tmp_path / "run", TINY, progress=False)
    assert not (tmp_path / "run" / name).exists()
    assert not left_behind(tmp_path)


def test_asking_for_what_is_not_there(sounds, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="cuda"):
        fit(sounds, tmp_path / "run", TINY, device="cuda", progress=False)
    with pytest.raises(DeviceError, match="--devices 1 to"):
        fit(sounds, tmp_path / "run", TINY, device="cpu", devices=10_000, progress=False)
    monkeypatch.setitem(sys.modules, "lightning.pytorch.loggers", None)
    with pytest.raises(MissingDependencyError, match="tensorboard"):
        fit(sounds, tmp_path / "run", TINY, tensorboard=True, progress=False)
    assert not (tmp_path / "run").exists()


def test_a_diverged_training_keeps_its_last_good_state(sounds, tmp_path, monkeypatch):
    outputs = train.Classifier.outputs

    def diverging(self, *arguments, **fields):
        scores, embedding = outputs(self, *arguments, **fields)
        return scores * (1.0 if self.training or self.global_step <= 2 else float("nan")), embedding

    monkeypatch.setattr(train.Classifier, "outputs", diverging)
    with pytest.raises(CheckpointError, match="diverged"):
        fit(sounds, tmp_path / "run", TINY, progress=False)
    assert torch.load(tmp_path / "run" / "state.ckpt", weights_only=True)["epoch"] == 0
    load_checkpoint(tmp_path / "run" / "model.safetensors")
    assert not (tmp_path / "run" / "last.safetensors").exists()


def test_clips_with_unknown_labels_are_not_scored(trained, tmp_path):
    out, _, _ = trained
    write_soundscapes(tmp_path, num_clips=4, seconds=0.5, classes=("bell", "buzz"))
    with pytest.raises(DataError, match="bell"):
        evaluate(out / "model.safetensors", tmp_path, progress=False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fit", "--data", "{tmp}/none", "--out", "{tmp}/run"], "no such folder"),
        (["fit", "--data", "{sounds}", "--out", "{tmp}/run", "--model", "mn4"], "did you mean"),
        (["fit", "--data", "{sounds}", "--out", "{tmp}/run", "--recipe", "digit"], "did you mean 'digits'"),
        (["fit", "--data", "{sounds}", "--out", "{tmp}/run", "--lr", "-1"], "lr"),
        (["fit", "--data", "{sounds}", "--out", "{tmp}/run", "--set", "epochs"], "--set epochs: expected FIELD=VALUE"),
        (
            ["fit", "--data", "{sounds}", "--out", "{tmp}/run", "--set", "loss.beta=1"],
            "Recipe.loss.beta: unknown field",
        ),
        (["fit", "--data", "{sounds}", "--out", "{tmp}/run", "--set", "lr.peak=1"], "--set lr.peak=1: expected FIELD"),
        (["fit", "--data", "{sounds}", "--out", "{tmp}/run", "--set", "lr=fast"], "Recipe.lr: got 'fast'"),
        (["fit", "--data", "{sounds}", "--out", "{tmp}/run", "--hold-out", "zoe"], "'speaker' or 'fold'"),
        (["fit", "--data", "{sounds}", "--out", "{tmp}/run", "--init", "{tmp}/x.safetensors"], "no such checkpoint"),
        (["evaluate", "{tmp}/x.safetensors", "--data", "{sounds}"], "no such checkpoint"),
        (["soundscapes", "--out", "{tmp}/s", "--clips", "0"], "at least 1 clip"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_two(arguments, said, sounds, tmp_path, capsys):
    quiet = ["--quiet"] if arguments[0] == "fit" else []
    code = main([part.format(tmp=tmp_path, sounds=sounds) for part in arguments] + quiet)
    error = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert error[-1].startswith("error: ")
    assert said in error[-1]
    assert sum(line.startswith("error") for line in error) == 1
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_the_command_line_evaluates_and_lists(trained, sounds, capsys):
    out, report, _ = trained
    options = ["evaluate", str(out / "model.safetensors"), "--data", str(sounds), "--quiet"]
    assert main([*options, "--split", "test", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == report["test"]
    assert main(options) == 0
    printed = capsys.readouterr().out
    assert "30 clips" in printed
    assert "balanced_accuracy" in printed
    assert "recall" in printed
    assert main(["recipes", "digits"]) == 0
    assert Recipe.from_json(capsys.readouterr().out) == get_recipe("digits")
    assert main(["recipes"]) == 0
    assert "instruments" in capsys.readouterr().out


def test_any_field_of_a_recipe_can_be_set(sounds, tmp_path):
    fields = ["loss.class_balanced=0.9999", "augmentation.gain_db=[-6, 6]", "task=single_label", "sampling={}"]
    arguments = ["--data", str(sounds), "--out", str(tmp_path / "run"), "--model", "mn01", "--epochs", "1", "--quiet"]
    assert main(["fit", *arguments, "--set", *fields, "sampling.clips_per_epoch=8"]) == 0
    used = Recipe.from_json((tmp_path / "run" / "recipe.json").read_text())
    assert used.loss.class_balanced == 0.9999
    assert used.augmentation.gain_db == (-6, 6)
    assert used.sampling.clips_per_epoch == 8
    assert (used.model, used.epochs) == ("mn01", 1)


def test_a_run_is_replaced_only_when_the_next_one_can_begin(sounds, tmp_path, monkeypatch):
    run = tmp_path / "run"
    fit(sounds, run, TINY.replace(epochs=1), progress=False)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    for data, recipe, error in (
        (tmp_path / "nothing", TINY, DataError),
        (sounds, TINY.replace(freeze=("nothing",)), SpecError),
        (sounds, TINY.replace(distillation=DistillationRecipe()), DataError),
    ):
        with pytest.raises(error):
            fit(data, run, recipe, progress=False, force=True)
        assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    fit(sounds, run, TINY.replace(epochs=1, seed=4), init=run / "model.safetensors", progress=False, force=True)
    assert (run / "model.safetensors").read_bytes() != before["model.safetensors"]


def command(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


def test_sigterm_stops_between_steps_and_the_run_resumes(sounds, tmp_path):
    (tmp_path / "recipe.json").write_text(TINY.replace(epochs=300, augmentation=Augmentation()).to_json())
    recipe, run = str(tmp_path / "recipe.json"), str(tmp_path / "run")
    options = ["--recipe", recipe, "--data", str(sounds), "--out", run, "--quiet", "--threads", "1"]
    process = command("-m", "train_torch", "fit", *options)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "state.ckpt").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "--resume" in error.splitlines()[-1]
    assert "Traceback" not in error
    assert not left_behind(tmp_path)
    state = torch.load(tmp_path / "run" / "state.ckpt", weights_only=True)
    assert len(rows_of(tmp_path / "run" / "metrics.csv")) >= state["epoch"] + 1
    load_checkpoint(tmp_path / "run" / "model.safetensors")


def test_training_imports_no_tensorflow(sounds, tmp_path):
    script = (
        "import sys, json\n"
        "from train_torch.__main__ import main\n"
        "assert not {'torch', 'lightning', 'matplotlib'} & set(sys.modules)\n"
        "code = main(sys.argv[1:])\n"
        "print(json.dumps([code, sorted({'tensorflow', 'tensorboard', 'keras'} & set(sys.modules))]))\n"
    )
    options = ["fit", "--data", str(sounds), "--out", str(tmp_path / "run"), "--model", "mn01", "--epochs", "1"]
    process = command("-c", script, *options, "--batch-size", "8", "--quiet", "--threads", "1")
    printed, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert json.loads(printed.splitlines()[-1]) == [0, []]


@pytest.mark.slow
def test_two_processes_train_one_model(sounds, tmp_path):
    run = tmp_path / "run"
    options = ["--data", str(sounds), "--out", str(run), "--model", "mn01", "--frontend", "efficientat_mels40"]
    process = command(
        "-m", "train_torch", "fit", *options, "--epochs", "2", "--batch-size", "4", "--quiet", "--threads", "1",
        "--device", "cpu", "--devices", "2",
    )  # fmt: skip
    printed, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    assert printed.count("test accuracy") == 1
    assert error.count("noise_burst") == 0
    assert error.count("clicks") == 1
    assert sorted(path.name for path in run.iterdir()) == sorted({*train.OWN_FILES} - {"best.safetensors"})
    assert [row["epoch"] for row in rows_of(run / "metrics.csv")] == ["0", "1"]
    state = torch.load(run / "state.ckpt", weights_only=True)
    assert state["global_step"] == 4  # 18 clips are four batches of 4, two for each process and epoch
    assert not left_behind(run)
