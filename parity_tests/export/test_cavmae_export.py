"""Export of CAV-MAE: every mode, padded and of free length, against torch at other lengths and batches than traced."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch

from export import pt2onnx
from export.exporter import export_onnx
from infer_tf.session import OnnxSession
from models_zoo.errors import VerificationError, WaveformError
from models_zoo.images import ImageSpec
from models_zoo.presets import get_frontend
from parity_tests.tolerances import LOGITS
from train_torch.checkpoint import save_checkpoint
from train_torch.models import create_model, new_card

PUBLISHED = get_frontend("cav_mae")
SMALL = {"n_mels": 32, "audio_length": 256, "image_size": 48}


def network(name, seed=0, **options):
    """Return a small network whose tokens are alive, and its card."""
    torch.manual_seed(seed)
    model = create_model(name, embed_dim=24, num_heads=3, **options).eval()
    declared = model.declared
    frames = None if declared.dynamic_time else PUBLISHED.frames.replace(count=declared.audio_length)
    frontend = PUBLISHED.replace(mel=PUBLISHED.mel.replace(n_mels=declared.n_mels), frames=frames)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.ndim > 1:
                parameter.mul_(1.5)
    needed = [part.source for part in model.inputs]
    card = new_card(
        "example",
        name,
        model=model,
        frontend=frontend if "frontend" in needed else None,
        image=ImageSpec(size=declared.image_size) if "image" in needed else None,
        task="embedding" if name == "cavmae" or not options["num_classes"] else "multi_label",
        labels=None,
    )
    return model, card


CASES = {
    "audio, padded": ("cavmaeft_audio", {**SMALL, "num_classes": 5}),
    "audio, free": ("cavmaeft_audio", {"num_classes": 5, "dynamic_time": True}),
    "pictures": ("cavmaeft", {**SMALL, "num_classes": 5, "mode": "videoonly"}),
    "both, padded": ("cavmaeft", {**SMALL, "num_classes": 5}),
    "both, free": ("cavmaeft", {**SMALL, "num_classes": 5, "dynamic_time": True}),
    "sound of both": ("cavmaeft", {**SMALL, "num_classes": 5, "mode": "missingaudioonly", "dynamic_time": True}),
    "towers": (
        "cavmae",
        {**SMALL, "dynamic_time": True, "decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_graphs_answer_as_torch(case, tmp_path):
    name, options = CASES[case]
    model, card = network(name, **options)
    path = tmp_path / "model.onnx"
    verification = export_onnx(model, card, path)
    assert verification.worst <= LOGITS
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    free = options.get("dynamic_time", False)
    shapes = {part.name: part.shape for part in session.get_inputs()}
    for part in card.inputs:
        expected = ["batch", *part.axes[1:]]
        assert [str(axis) for axis in shapes[part.name]] == expected
        assert ("time" in expected) == (free and part.name == "features")
    rng = np.random.default_rng(1)
    declared = model.declared
    most, side = declared.audio_length, declared.image_size
    lengths = [frames for frames in (16, 208, 333, 512) if frames < most] if free else []
    for frames, batch in [*zip(lengths, (5, 1, 2, 1), strict=False), (most, 1), (most, 5)]:
        given = {"features": (batch, frames, declared.n_mels), "image": (batch, 3, side, side)}
        fed = {part.name: rng.standard_normal(given[part.name]).astype(np.float32) for part in card.inputs}
        got = session.run(None, fed)
        with torch.no_grad():
            expected = model(**{key: torch.from_numpy(value) for key, value in fed.items()})
        for output, actual in zip(card.outputs, got, strict=True):
            reference = expected[output.name].numpy()
            assert actual.shape == reference.shape
            assert np.abs(actual - reference).max() <= LOGITS * max(1.0, reference.std())


@pytest.mark.parametrize("free", [False, True])
def test_a_tower_is_asked_alone(free, tmp_path):
    name, options = CASES["towers"]
    model, card = network(name, **{**options, "dynamic_time": free})
    export_onnx(model, card, tmp_path / "towers.onnx")
    session = OnnxSession(tmp_path / "towers.onnx", threads=1)
    rng = np.random.default_rng(0)
    fed = {"features": (3, 256, 32), "image": (3, 3, 48, 48)}
    fed = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in fed.items()}
    both = session.run(fed)
    for side, needed in (("audio_embedding", "features"), ("image_embedding", "image")):
        alone = session.run({needed: fed[needed]}, [side])
        assert list(alone) == [side]
        assert np.array_equal(alone[side], both[side])
    with pytest.raises(WaveformError, match=r"\['features', 'image'\]; expected \['image'\]"):
        session.run(fed, ["image_embedding"])


def test_a_graph_that_needs_more_than_its_card_says_is_refused(tmp_path):
    name, options = CASES["towers"]
    model, card = network(name, **options)
    model.outputs = tuple(part.replace(needs=("image",)) for part in model.outputs)
    with pytest.raises(VerificationError, match=r"audio_embedding of image alone: the graph returns shape \(0, 24\)"):
        export_onnx(model, card.replace(outputs=model.outputs), tmp_path / "towers.onnx")
    assert not (tmp_path / "towers.onnx").exists()


def test_a_network_of_pictures_alone_from_the_command_line(tmp_path, capsys):
    name, options = CASES["pictures"]
    save_checkpoint(tmp_path / "model.safetensors", *network(name, **options))
    assert pt2onnx.main([str(tmp_path / "model.safetensors"), "-o", str(tmp_path / "model.onnx")]) == 0
    assert "cases: batches 1, 2" in capsys.readouterr().out


def test_a_network_of_both_exported_for_one_of_them(tmp_path, capsys):
    name, options = CASES["both, padded"]
    model, card = network(name, **options)
    save_checkpoint(tmp_path / "model.safetensors", model, card)
    command = [str(tmp_path / "model.safetensors"), "-o", str(tmp_path / "model.onnx"), "--mode", "missingaudioonly"]
    assert pt2onnx.main(command) == 0
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert [part.name for part in session.get_inputs()] == ["features"]
    features = np.random.default_rng(0).standard_normal((2, 256, 32)).astype(np.float32)
    model.set_mode("missingaudioonly")
    with torch.no_grad():
        expected = model(features=torch.from_numpy(features))["logits"].numpy()
    assert np.abs(session.run(["logits"], {"features": features})[0] - expected).max() <= LOGITS
