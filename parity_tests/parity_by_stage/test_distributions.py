"""Models of label distributions, alone and together: the torch path against production, on mixtures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from export.exporter import export_checkpoint
from models_zoo.cards import LengthPolicy
from models_zoo.dataset import read_dataset
from models_zoo.errors import CardError
from models_zoo.metrics import kl_divergence
from models_zoo.mixtures import write_mixtures
from models_zoo.presets import get_frontend
from parity_tests.__main__ import main
from parity_tests.models_zoo.test_mixtures import write_words
from parity_tests.parity import TorchPath, run_parity
from train_torch.__main__ import main as train
from train_torch.checkpoint import load_checkpoint, save_checkpoint
from train_torch.models import create_model, new_card

MRMS = get_frontend("mrms")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with mixtures, two MAC of different pooling, their exports, and both as one model."""
    folder = tmp_path_factory.mktemp("distributions")
    write_words(folder / "words")
    write_mixtures(folder / "words", folder / "data", MRMS, num_clips=20, seed=4, seconds=0.4)
    labels = read_dataset(folder / "data").labels
    for seed, pooling in enumerate(("avg", "max")):
        torch.manual_seed(seed)
        model = create_model(f"mac_{pooling}", num_classes=len(labels), width=2).eval()
        card = new_card(
            pooling,
            f"mac_{pooling}",
            model=model,
            frontend=MRMS,
            task="label_distribution",
            labels=labels,
            length_policy=LengthPolicy(min=6400, short="zero"),
        )
        save_checkpoint(folder / f"{pooling}.safetensors", model, card)
    singles = [str(folder / "avg.safetensors"), str(folder / "max.safetensors")]
    assert train(["combine", *singles, "-o", str(folder / "both.safetensors")]) == 0
    for name in ("avg", "max", "both"):
        export_checkpoint(folder / f"{name}.safetensors", folder / f"{name}.onnx")
    return folder


def command(folder: Path, onnx: tuple[str, ...], checkpoint: tuple[str, ...]) -> list[str]:
    return [
        "--onnx",
        *(str(folder / f"{name}.onnx") for name in onnx),
        "--checkpoint",
        *(str(folder / f"{name}.safetensors") for name in checkpoint),
        "--data",
        str(folder / "data"),
    ]


@pytest.mark.parametrize(
    ("onnx", "checkpoint"),
    [
        (("max",), ("max",)),
        (("both",), ("both",)),
        (("avg", "max"), ("avg", "max")),
        (("both",), ("avg", "max")),
        (("avg", "max"), ("both",)),
    ],
)
def test_distributions_agree(
    made: Path, onnx: tuple[str, ...], checkpoint: tuple[str, ...], capsys: pytest.CaptureFixture
) -> None:
    assert main([*command(made, onnx, checkpoint), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"]
    assert report["num_clips"] == 20
    assert report["accuracy"] is None
    dataset = read_dataset(made / "data")
    answers = []
    for record in dataset.records:
        waveform = np.asarray(_read(record.file), np.float32)
        answers.append(
            np.mean([TorchPath(path).predict(waveform).probabilities for path in paths(made, checkpoint)], 0)
        )
    expected = kl_divergence(dataset.distributions(), np.stack(answers)).mean()
    assert report["divergence"]["torch"] == pytest.approx(expected, abs=1e-6)
    assert report["divergence"]["production"] == pytest.approx(expected, abs=1e-5)


def _read(file: Path) -> np.ndarray:
    from models_zoo.audio import load_audio

    return load_audio(file, MRMS)


def paths(folder: Path, names: tuple[str, ...]) -> list[Path]:
    return [folder / f"{name}.safetensors" for name in names]


def test_the_other_pooling_is_found_out(made: Path, capsys: pytest.CaptureFixture) -> None:
    """Same keys, same shapes, same answers' form: only the comparison tells."""
    assert main(command(made, ("avg",), ("max",))) == 1
    shown = capsys.readouterr().out
    assert "PARITY FAILED at stage 'probabilities'" in shown
    assert "KL divergence: torch" in shown
    assert main(command(made, ("avg", "max"), ("max",))) == 1


def test_weights_that_nobody_states_have_no_divergence(made: Path, tmp_path: Path) -> None:
    table = (made / "data" / "metadata.csv").read_text().replace("label,weights,", "label,shares,")
    (tmp_path / "audio").symlink_to(made / "data" / "audio")
    (tmp_path / "metadata.csv").write_text(table)
    report = run_parity(made / "avg.onnx", made / "avg.safetensors", tmp_path, limit=2, progress=False)
    assert report.passed
    assert report.divergence is None


def test_checkpoints_that_do_not_go_together_are_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    loaded = load_checkpoint(made / "avg.safetensors")
    other = loaded.card.replace(task="single_label", name="other")
    save_checkpoint(tmp_path / "other.safetensors", loaded.model, other)
    with pytest.raises(CardError, match="task: 'other' has single_label, 'max' has label_distribution"):
        TorchPath([made / "max.safetensors", tmp_path / "other.safetensors"])
    arguments = command(made, ("avg",), ("max",))
    arguments.insert(arguments.index("--data"), str(tmp_path / "other.safetensors"))
    assert main(arguments) == 2
    assert "task: 'other' has single_label" in capsys.readouterr().err
