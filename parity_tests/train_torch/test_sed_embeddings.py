"""Embeddings as a second input in training: stored ones, those of an encoder, and networks that listen to them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from export.exporter import export_checkpoint
from infer_tf import TFAudioClassifier
from models_zoo.errors import CardError, DataError, ModelFileError, SpecError
from parity_tests.infer_tf.tiny import TOKEN_SIZE, encoder_card, write_encoder
from parity_tests.train_torch.test_sed import GROUPS, RATE, TINY, learner_of, scenes
from train_torch.__main__ import main
from train_torch.checkpoint import load_checkpoint
from train_torch.models.crnn import CRNN
from train_torch.sed import MeanTeacher, fit_sed
from train_torch.sed_data import SceneBatch, SceneData, read_scenes
from train_torch.sed_embeddings import open_embeddings
from train_torch.sed_evaluation import evaluate_scenes

__all__ = ["scenes"]

LABELS = ("cat", "dog")
TOKENS = 10
FUSED = TINY.replace(model_options={**TINY.model_options, "fusion": "pool1d", "embedding_size": TOKEN_SIZE})


@pytest.fixture(scope="module")
def noises(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """Clips of the same noise, in which only the tokens know where the two classes are, and these tokens by name."""
    folder = tmp_path_factory.mktemp("noises")
    rng = np.random.default_rng(0)
    noise = 0.1 * rng.standard_normal(RATE)
    rows, tokens = ["file,label,onset,offset,split,part"], {}
    for split, count in (("train", 24), ("validation", 8), ("test", 8)):
        for index in range(count):
            name = f"{split}{index}.wav"
            soundfile.write(folder / name, noise, RATE)
            tokens[name] = np.zeros((2, TOKENS), np.float32)
            label, onset = LABELS[index % 2], int(rng.integers(0, 6))
            rows.append(f"{name},{label},{onset / 10},{(onset + 4) / 10},{split},strong")
            tokens[name][index % 2, onset : onset + 4] = 1.0
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    return folder, tokens


LEARNS = TINY.replace(
    model_options={**TINY.model_options, "fusion": "pool1d", "embedding_size": 2, "attention": "time"},
    groups=(GROUPS[0].replace(size=8),),
    consistency=0.0,
    weak_from_strong=True,
    mixup_probability=0.5,
    mixup_embeddings="same",
    bn_momentum=0.1,
    epochs=1,
    steps_per_epoch=60,
    warmup_epochs=0.1,
    lr=0.02,
)


def test_a_network_learns_what_only_the_tokens_know(noises: tuple[Path, dict], tmp_path: Path) -> None:
    folder, tokens = noises
    np.savez(tmp_path / "tokens.npz", **tokens)
    report = fit_sed([folder], tmp_path / "run", LEARNS, embeddings=tmp_path / "tokens.npz", progress=False)
    assert report["test"]["student"]["weak_f1"] == 1
    assert report["test"]["student"]["intersection_f1"] > 0.9
    card = load_checkpoint(tmp_path / "run" / "model.safetensors").card
    assert card.provenance["embeddings"] == "tokens.npz"
    assert [(part.name, part.axes) for part in card.inputs][1] == ("embeddings", ("batch", "2", "tokens"))


@pytest.mark.parametrize("fusion", ["global", "frame", "interpolate", "pool1d"])
def test_every_fusion_trains(scenes: Path, fusion: str) -> None:
    """A step's gradients reach what the tokens pass through, and other tokens give another loss."""
    recipe = TINY.replace(model_options={**TINY.model_options, "fusion": fusion, "embedding_size": 3})
    learner, module = learner_of(scenes, recipe)
    learner._steps = lambda epochs: epochs * 2
    learner.log = lambda *_, **__: None
    batch = next(iter(module.train_dataloader()))
    shape = (6, 3) if fusion == "global" else (6, 3, 7)
    losses = []
    for seed in (0, 1):
        tokens = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        learner.zero_grad()
        loss = learner.training_step(replace(batch, embeddings=tokens), 0)
        loss.backward()
        losses.append(float(loss.detach()))
    assert losses[0] != losses[1]
    network = learner.student
    assert isinstance(network, CRNN)
    assert network.cat_tf.weight.grad[:, network.declared.filters[-1] :].abs().max() > 0


@pytest.mark.parametrize("kind", ["none", "same", "second"])
@pytest.mark.parametrize("labels", ["soft", "hard"])
def test_embeddings_are_mixed_as_asked(scenes: Path, kind: str, labels: str) -> None:
    """Clips and tokens that hold their own number say what they were mixed of."""
    recipe = TINY.replace(
        mixup_embeddings=kind, mixup=labels, mixup_alpha=5.0, groups=(GROUPS[0].replace(size=5), GROUPS[2])
    )
    learner = MeanTeacher(*_learner_parts(scenes, recipe))
    numbers = torch.eye(7)
    targets = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 1], [0, 0, 0], [0, 1, 1], [0, 0, 0], [0, 0, 0]]).float()
    batch = SceneBatch(
        numbers[:, None, None, :], targets[:, :, None], targets, torch.ones(7, 3).bool(), torch.arange(7), numbers
    )
    mixed = learner._augmented(batch, np.random.default_rng(4))
    of_features, of_tokens = mixed.mel[:, 0, 0], mixed.embeddings
    assert (of_features[:5] - torch.eye(7)[:5]).abs().max() > 0.1
    torch.testing.assert_close(of_features[5:], numbers[5:])  # the unlabelled ones
    torch.testing.assert_close(of_tokens[5:], numbers[5:])
    if kind == "none":
        torch.testing.assert_close(of_tokens, numbers)
    elif kind == "same":
        torch.testing.assert_close(of_tokens, of_features)
    else:
        assert (of_tokens - of_features).abs().max() > 0.1
    expected = of_features @ targets
    if kind == "second":
        expected = of_tokens @ expected
    if labels == "hard":
        expected = (expected > 0).float()
    torch.testing.assert_close(mixed.weak, expected)
    torch.testing.assert_close(mixed.strong[:, :, 0], expected)


def _learner_parts(scenes: Path, recipe) -> tuple:
    learner, _ = learner_of(scenes)
    return learner.student, learner.card, recipe


def test_an_encoder_in_training_and_in_service(scenes: Path, tmp_path: Path) -> None:
    """The same tokens on both sides: scores served with the encoder are those of the trained network."""
    encoder = write_encoder(tmp_path / "encoder.onnx")
    report = fit_sed([scenes], tmp_path / "run", FUSED.replace(epochs=1), embeddings=encoder, progress=False)
    assert set(report["test"]) == {"student", "teacher"}
    loaded = load_checkpoint(tmp_path / "run" / "model.safetensors")
    assert loaded.card.provenance["embeddings"] == "encoder.onnx"
    data = SceneData(read_scenes([scenes]).select("test"), loaded.card, FUSED, embedder=open_embeddings(encoder, RATE))
    trained = evaluate_scenes(loaded.model, data)
    export_checkpoint(tmp_path / "run" / "model.safetensors", tmp_path / "model.onnx")
    with TFAudioClassifier(tmp_path / "model.onnx", threads=1, encoder=encoder) as served:
        for row, name in enumerate(data.files):
            says = served.predict(scenes / name)
            np.testing.assert_allclose(says.probabilities, trained.weak[row], atol=1e-4)
            np.testing.assert_allclose(says.frame_probabilities[:, :16], trained.strong[name][:, :16], atol=1e-4)


def test_embeddings_are_stored_in_a_file_or_a_folder(tmp_path: Path) -> None:
    tokens = np.arange(6, dtype=np.float64).reshape(2, 3)
    np.savez(tmp_path / "all.npz", **{"strong/0.wav": tokens})
    (tmp_path / "folder" / "strong").mkdir(parents=True)
    np.save(tmp_path / "folder" / "strong" / "0.npy", tokens)
    for path in (tmp_path / "all.npz", tmp_path / "folder"):
        found = open_embeddings(path, RATE)("strong/0.wav", np.zeros(4, np.float32))
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, tokens)
        with pytest.raises(DataError, match=r"strong.1\.(wav|npy): no embeddings"):
            open_embeddings(path, RATE)("strong/1.wav", np.zeros(4, np.float32))


@pytest.mark.parametrize("wrong", [np.zeros((1, 2, 3)), np.zeros((2, 0)), np.array([[1, 2]]), np.full((2, 2), np.nan)])
def test_what_is_no_embedding_is_refused(tmp_path: Path, wrong: np.ndarray) -> None:
    np.savez(tmp_path / "all.npz", a=wrong)
    with pytest.raises(DataError, match=r"all.npz: a: got .*; expected finite floats"):
        open_embeddings(tmp_path / "all.npz", RATE)("a", np.zeros(4, np.float32))


def test_sources_of_embeddings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("tokens")
    write_encoder(tmp_path / "high.onnx", encoder_card(frontend="efficientat"))
    for name, error, message in (
        ("missing.npz", DataError, "no such file or folder"),
        ("missing.onnx", ModelFileError, "no such file"),
        ("one.npy", DataError, "holds one array"),
        ("text.npz", DataError, "cannot be read as .npz"),
        ("high.onnx", CardError, "hears 32000 Hz, the detector 16000 Hz"),
    ):
        with pytest.raises(error, match=message):
            open_embeddings(tmp_path / name, RATE)


def test_embeddings_and_models_that_do_not_go_together(
    noises: tuple[Path, dict], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder, tokens = noises
    np.savez(tmp_path / "tokens.npz", **tokens)
    with pytest.raises(SpecError, match="takes none; choose a fusion"):
        fit_sed([folder], tmp_path / "run", TINY, embeddings=tmp_path / "tokens.npz", progress=False)
    with pytest.raises(SpecError, match="give an encoder or stored ones"):
        fit_sed([folder], tmp_path / "run", LEARNS, progress=False)
    with pytest.raises(SpecError, match="would stay behind"):
        shifted = LEARNS.replace(frame_shift=3.0)
        fit_sed([folder], tmp_path / "run", shifted, embeddings=tmp_path / "tokens.npz", progress=False)
    with pytest.raises(DataError, match=r"longer than 0\.5 s and would be cropped"):
        short = LEARNS.replace(seconds=0.5)
        fit_sed([folder], tmp_path / "run", short, embeddings=tmp_path / "tokens.npz", progress=False)
    np.savez(tmp_path / "uneven.npz", **{**tokens, "train3.wav": np.zeros((2, 4))})
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(LEARNS.to_dict()))
    command = ["fit-sed", "--data", str(folder), "--out", str(tmp_path / "run"), "--recipe", str(recipe), "--quiet"]
    assert main([*command, "--embeddings", str(tmp_path / "uneven.npz")]) == 2
    assert "train3.wav has embeddings of shape (2, 4), train0.wav of (2, 10)" in capsys.readouterr().err
    assert not (tmp_path / "run" / "model.safetensors").exists()
