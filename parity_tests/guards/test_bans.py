"""The two bans where both frameworks are installed: no torch in production, no TensorFlow in training and export."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from models_zoo.soundscapes import write_soundscapes
from parity_tests.without import Hiding, make_unimportable

ROOT = Path(__file__).resolve().parents[2]
TORCH = ("torch", "torchaudio", "lightning", "sklearn", "librosa")
TENSORFLOW = ("tensorflow", "keras", "tensorboard")
HEAVY = (*TORCH, *TENSORFLOW, "onnx", "onnxruntime", "matplotlib")


def python(*arguments: str) -> str:
    """Run Python from the checkout; return its standard output."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def python_without(packages: tuple[str, ...], *command: str) -> str:
    return python("-m", "parity_tests.without", *packages, "--", *command)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with ``sounds/``, ``run/model.safetensors`` and ``model.onnx``, made without TensorFlow."""
    folder = tmp_path_factory.mktemp("bans")
    write_soundscapes(folder / "sounds", num_clips=50, seconds=0.5, seed=3)
    fit = ["fit", "--model", "mn01", "--data", str(folder / "sounds"), "--out", str(folder / "run")]
    python_without(TENSORFLOW, "train_torch", *fit, "--epochs", "1", "--batch-size", "10", "--quiet", "--threads", "1")
    checkpoint = folder / "run" / "model.safetensors"
    python_without(TENSORFLOW, "export.pt2onnx", str(checkpoint), "-o", str(folder / "model.onnx"))
    return folder


def test_training_and_export_run_without_tensorflow(trained):
    assert (trained / "run" / "model.safetensors").stat().st_size > 100_000
    assert (trained / "model.onnx").stat().st_size > 100_000


def test_production_runs_without_torch(trained):
    clip = trained / "sounds" / "audio" / "00010.wav"
    printed = python_without(TORCH, "infer_tf.cli", "predict", str(trained / "model.onnx"), str(clip), "--json")
    assert clip.name in printed
    assert '"probability"' in printed


def test_export_script_runs_by_path(trained):
    """``python export/pt2onnx.py`` puts export/ first on the path; it must behave as the module does."""
    printed = python(str(ROOT / "export" / "pt2onnx.py"), "--help")
    assert "checkpoint" in printed.lower()


IMPORTED = "import json, sys; {}; print(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"


@pytest.mark.parametrize(
    ("code", "banned"),
    [
        ("import models_zoo", HEAVY),
        ("import models_zoo.registry, models_zoo.presets, models_zoo.audio, models_zoo.decoding", HEAVY),
        ("import infer_tf", HEAVY),
        ("import infer_tf.cli", HEAVY),
        ("import infer_tf; infer_tf.TFAudioClassifier; infer_tf.OnnxSession", (*TORCH, "matplotlib", "onnx")),
        ("import train_torch, train_torch.models, train_torch.checkpoint, train_torch.train", TENSORFLOW),
        ("import export.exporter, export.verify", TENSORFLOW),
    ],
)
def test_imports_stay_light(code, banned):
    imported = json.loads(python("-c", IMPORTED.format(code)).splitlines()[-1])
    assert not set(imported) & set(banned)


def test_help_imports_no_framework():
    for module in ("infer_tf.cli", "train_torch", "export.pt2onnx", "parity_tests"):
        python_without(("torch", "tensorflow", "matplotlib", "onnxruntime"), module, "--help")


def test_hidden_packages_look_as_if_they_were_not_installed():
    finder = Hiding(PathFinder, frozenset(["torch"]))
    assert finder.find_spec("torch") is None
    assert finder.find_spec("torch.nn", None) is None
    assert finder.find_spec("torchaudio") is not None
    code = "from parity_tests.without import make_unimportable; make_unimportable('torch'); import torchaudio"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "ModuleNotFoundError: No module named 'torch'" in done.stderr


def test_unimportable_refuses_what_is_imported_already():
    with pytest.raises(RuntimeError, match="already imported"):
        make_unimportable("json")
