"""Stages 2 to 4: whole models, from the file to the decision. With ``--onnx`` and ``--checkpoint``: yours."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from export.exporter import export_onnx
from infer_tf import OnnxSession, TFAudioClassifier
from models_zoo.cards import LengthPolicy
from models_zoo.dataset import read_dataset
from models_zoo.metrics import kl_divergence
from models_zoo.mixtures import write_mixtures
from models_zoo.presets import get_frontend
from models_zoo.registry import get_card, list_shipped, shipped_model
from models_zoo.scenes import SceneSettings, write_scenes
from models_zoo.soundscapes import CLASSES, write_soundscapes
from parity_tests.__main__ import main
from parity_tests.parity import run_parity
from train_torch.checkpoint import load_checkpoint, save_checkpoint
from train_torch.models import create_model, new_card


@pytest.mark.own_model
def test_your_model_agrees_from_file_to_decision(request: pytest.FixtureRequest) -> None:
    option = request.config.getoption
    report = run_parity(option("--onnx"), option("--checkpoint"), option("--data"), limit=option("--limit"))
    print(report)
    assert report.passed, f"\n{report}"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A small untrained model, its export, and built-in soundscapes."""
    folder = tmp_path_factory.mktemp("models")
    model = create_model("mn01", num_classes=len(CLASSES)).eval()
    card = new_card(
        "tiny", "mn01", model=model, frontend=get_frontend("efficientat"), task="single_label", labels=CLASSES
    )
    checkpoint, onnx, data = folder / "tiny.safetensors", folder / "tiny.onnx", folder / "data"
    save_checkpoint(checkpoint, model, card)
    export_onnx(model, card, onnx)
    write_soundscapes(data, num_clips=12, seed=3, seconds=1.0)
    return checkpoint, onnx, data


def test_an_export_agrees_with_its_checkpoint(exported: tuple[Path, Path, Path], capsys: pytest.CaptureFixture) -> None:
    checkpoint, onnx, data = exported
    arguments = ["--onnx", str(onnx), "--checkpoint", str(checkpoint), "--data", str(data)]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is True
    assert report["num_clips"] == 12
    assert report["changed_decisions"] == []
    assert [stage["stage"] for stage in report["stages"]][-3:] == ["logits", "probabilities", "decisions"]
    assert all(stage["worst"] <= 1 for stage in report["stages"])
    assert main([*arguments, "--limit", "3"]) == 0
    assert "PARITY PASSED" in capsys.readouterr().out


def test_a_wrong_front_end_in_the_card_fails_at_its_stage(exported: tuple[Path, Path, Path], tmp_path: Path) -> None:
    checkpoint, _, data = exported
    loaded = load_checkpoint(checkpoint)
    spec = get_frontend("efficientat")
    wrong = spec.replace(windows=[window.replace(periodic=True) for window in spec.windows])
    onnx = tmp_path / "wrong.onnx"
    export_onnx(loaded.model, loaded.card.replace(frontend=wrong), onnx)
    report = run_parity(onnx, checkpoint, data, progress=False)
    assert not report.passed
    assert report.first_failure is not None
    assert report.first_failure.stage == "windowed"
    assert len(report.first_failure.clips) == 12
    assert "PARITY FAILED at stage 'windowed'" in str(report)


def test_changed_weights_fail_at_the_logits(exported: tuple[Path, Path, Path], tmp_path: Path) -> None:
    checkpoint, onnx, data = exported
    loaded = load_checkpoint(checkpoint)
    loaded.model.classifier[-1].bias.data[0] += 1e-2
    other = tmp_path / "other.safetensors"
    save_checkpoint(other, loaded.model, loaded.card)
    report = run_parity(onnx, other, data, progress=False)
    assert report.first_failure is not None
    assert report.first_failure.stage == "logits"


def test_what_cannot_be_compared_is_no_pass(
    exported: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    checkpoint, onnx, _ = exported
    folder = tmp_path / "data" / "knock"
    folder.mkdir(parents=True)
    soundfile.write(folder / "short.wav", np.zeros(100, np.float32), 32000)
    report = run_parity(onnx, checkpoint, folder.parent, progress=False)
    assert not report.passed
    assert [clip.endswith("short.wav") for clip, _ in report.unreadable] == [True]
    assert main(["--onnx", str(onnx), "--checkpoint", str(checkpoint), "--data", str(tmp_path / "absent")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1


SHIPPED = {
    "digits-mac": "fsdd",
    "digits-mn": "fsdd",
    "instruments-mn": "instruments",
    "instruments-panns": "instruments",
    "pairs-cavmae": "fsdd",
    "scenes-crnn": "fsdd",
}
"""Shipped model -> the recordings below --data it was trained on, some of them."""

OF_MIXTURES = {"digits-mac", "pairs-cavmae", "scenes-crnn"}
"""Those that were trained on mixtures or scenes of them, or on pairs with pictures (test_shipped_pairs.py)."""


def test_every_shipped_model_has_its_recordings_named() -> None:
    assert sorted(SHIPPED) == list_shipped()


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_the_card_in_the_zoo_is_the_one_inside_the_shipped_files(name: str) -> None:
    onnx = shipped_model(name)
    assert get_card(name) == OnnxSession(onnx).card == load_checkpoint(onnx.with_suffix(".safetensors")).card


@pytest.mark.real_data
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(SHIPPED) - OF_MIXTURES))
def test_shipped_models_agree_on_every_real_clip(name: str, data: Path) -> None:
    """Training and test clips alike: not one changed decision, and the test accuracy the card states."""
    onnx = shipped_model(name)
    folder = data / SHIPPED[name]
    report = run_parity(onnx, onnx.with_suffix(".safetensors"), folder, progress=False)
    print(report)
    assert report.passed, f"\n{report}"
    assert report.changed == []
    assert report.num_clips == len(read_dataset(folder).records)


@pytest.mark.real_data
def test_the_shipped_mac_agrees_on_mixtures_of_digits(data: Path, tmp_path: Path) -> None:
    """Test mixtures of the set its card measures (their first 40): the same largest share, and the same divergence."""
    onnx = shipped_model("digits-mac")
    write_mixtures(data / SHIPPED["digits-mac"], tmp_path, get_frontend("mrms"), num_clips=200, seed=2026)
    report = run_parity(onnx, onnx.with_suffix(".safetensors"), tmp_path, split="test", progress=False)
    print(report)
    assert report.passed, f"\n{report}"
    assert report.changed == []
    assert report.num_clips == 40
    assert report.divergence is not None
    assert report.divergence[0] == pytest.approx(report.divergence[1], abs=1e-4)
    truth = read_dataset(tmp_path).select("test").distributions()
    uniform = float(kl_divergence(truth, np.full(truth.shape, 0.1)).mean())
    stated = get_card("digits-mac").metrics
    assert uniform == pytest.approx(stated["test_kl_divergence_uniform"], abs=0.15)
    assert report.divergence[1] < uniform / 2
    assert report.divergence[1] == pytest.approx(stated["test_kl_divergence"], abs=0.25)


@pytest.mark.real_data
def test_the_shipped_detector_agrees_on_scenes(data: Path, tmp_path: Path) -> None:
    """The first 12 of the 200 test scenes that its card measures: the same events, about as good as stated."""
    onnx = shipped_model("scenes-crnn")
    card = get_card("scenes-crnn")
    assert "--events 2 6" in card.provenance["data"]
    assert "--seed 1" in card.provenance["data"]
    write_scenes(
        tmp_path,
        get_frontend("dcase_2024"),
        counts={"test": 12},
        data=[data / "fsdd", data / "instruments"],
        classes=card.labels or (),
        settings=SceneSettings(events=(2, 6)),
        seed=1,
    )
    report = run_parity(onnx, onnx.with_suffix(".safetensors"), tmp_path, split="test", progress=False)
    print(report)
    assert report.passed, f"\n{report}"
    assert report.changed == []
    assert report.num_clips == 12
    assert report.detection is not None
    for name in ("weak_f1", "intersection_f1"):
        assert report.detection[name][1] == pytest.approx(card.metrics[f"test_{name}"], abs=0.15)


@pytest.mark.real_data
@pytest.mark.parametrize(("name", "bar"), [("digits-mn", 0.97), ("instruments-mn", 0.70), ("instruments-panns", 0.70)])
def test_shipped_models_reach_their_bar_on_the_test_split(name: str, bar: float, data: Path) -> None:
    records = read_dataset(data / SHIPPED[name]).select(split="test").records
    with TFAudioClassifier(name) as classifier:
        right = [classifier.predict(record.file).label == record.labels[0] for record in records]
        stated = classifier.card.metrics["test_accuracy"]
    assert len(right) == {"fsdd": 200, "instruments": 50}[SHIPPED[name]]
    assert np.mean(right) == pytest.approx(stated, abs=1e-9)
    assert np.mean(right) >= bar


def test_a_clip_only_production_refuses_fails_the_run(
    exported: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    checkpoint, _, data = exported
    loaded = load_checkpoint(checkpoint)
    strict = loaded.card.replace(length_policy=LengthPolicy(min=64000))
    onnx = tmp_path / "strict.onnx"
    export_onnx(loaded.model, strict, onnx)
    arguments = ["--onnx", str(onnx), "--checkpoint", str(checkpoint), "--data", str(data), "--limit", "2", "--json"]
    assert main(arguments) == 1
    report = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert report["first_failure"] == "decode"
    assert report["stages"][0]["worst"] is None
    assert "production refuses it" in report["stages"][0]["detail"]


@pytest.mark.parametrize("limit", ["0", "-3", "many"])
def test_a_senseless_limit_is_bad_usage(limit: str) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["--onnx", "a", "--checkpoint", "b", "--data", "c", "--limit", limit])
    assert refused.value.code == 2
