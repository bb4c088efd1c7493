"""Several networks as one: built, saved, exported and served like any other model."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch

from export.exporter import export_checkpoint
from infer_tf import TFAudioClassifier
from models_zoo.errors import CardError
from models_zoo.presets import get_frontend
from parity_tests.networks import card_of, lively, noise_features
from parity_tests.tolerances import LOGITS, PROBABILITIES
from train_torch.__main__ import main
from train_torch.checkpoint import load_checkpoint, save_checkpoint
from train_torch.models import clip_form, create_model, list_architectures, new_card
from train_torch.models.ensemble import combine

LABELS = ("a", "b", "c")
FEATURES = noise_features(3, 70)


def write(folder, name, architecture, *, seed, labels=LABELS, task="single_label", **options):
    model = lively(architecture, seed=seed, num_classes=len(labels), **options)
    spec = card_of(model, architecture).frontend
    card = new_card(name, architecture, model=model, frontend=spec, task=task, labels=labels)
    save_checkpoint(folder / f"{name}.safetensors", model, card)
    return folder / f"{name}.safetensors"


@pytest.fixture
def paths(tmp_path):
    return [
        write(tmp_path, "one", "mn01", seed=1),
        write(tmp_path, "two", "mn01", seed=2),
        write(tmp_path, "three", "dymn", seed=3, width=0.1, temperature=1.0),
    ]


def answers(path):
    with torch.no_grad():
        return load_checkpoint(path).model(features=FEATURES)["logits"]


@pytest.mark.parametrize("weights", [None, (1, 1, 4)])
@pytest.mark.parametrize("mean", ["logits", "probabilities"])
def test_the_network_answers_with_the_mean(paths, mean, weights):
    network, card = combine(paths, weights=weights, mean=mean)
    with torch.no_grad():
        got = network(features=FEATURES)
    assert set(got) == {mean} == {output.name for output in card.outputs}
    parts = [answers(path) if mean == "logits" else answers(path).softmax(1) for path in paths]
    expected = np.average(torch.stack(parts).numpy(), axis=0, weights=weights)
    np.testing.assert_allclose(got[mean].numpy(), expected, rtol=0, atol=1e-6)
    assert np.abs(got[mean].numpy() - parts[0].numpy()).max() > 1e-3


def test_many_labels_are_averaged_after_the_sigmoid(tmp_path):
    paths = [write(tmp_path, name, "mn01", seed=seed, task="multi_label") for seed, name in enumerate("xy")]
    network, _ = combine(paths)
    with torch.no_grad():
        got = network(features=FEATURES)["probabilities"]
    expected = torch.stack([answers(path).sigmoid() for path in paths]).mean(0)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_one_file_from_the_command_line_to_production(paths, tmp_path, capsys):
    whole = tmp_path / "all.safetensors"
    arguments = ["combine", *map(str, paths), "-o", str(whole), "--weights", "1", "2", "3"]
    assert main(arguments) == 0
    assert main(arguments) == 2  # it exists
    assert "exists" in capsys.readouterr().err
    card, done = export_checkpoint(whole, tmp_path / "all.onnx")
    assert card.name == "all"
    assert [member["name"] for member in card.provenance["members"]] == ["one", "two", "three"]
    assert done.worst <= LOGITS

    singles = []
    for path in paths:
        export_checkpoint(path, path.with_suffix(".onnx"))
        singles.append(path.with_suffix(".onnx"))
    clip = (np.random.default_rng(0).standard_normal(20000) * 0.1).astype(np.float32)
    with (
        TFAudioClassifier(tmp_path / "all.onnx", threads=1) as one_graph,
        TFAudioClassifier(singles, threads=1, weights=(1, 2, 3)) as one_by_one,
    ):
        got, expected = one_graph.predict(clip), one_by_one.predict(clip)
    np.testing.assert_allclose(got.probabilities, expected.probabilities, rtol=0, atol=PROBABILITIES)
    assert got.labels == LABELS


def test_batches_of_a_graph_with_members_of_one_clip(paths, tmp_path):
    """A DyMN among the members is exported for one clip; the ensemble takes any batch all the same."""
    network, card = combine(paths)
    save_checkpoint(tmp_path / "all.safetensors", network, card)
    export_checkpoint(tmp_path / "all.safetensors", tmp_path / "all.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "all.onnx", providers=["CPUExecutionProvider"])
    got = session.run(None, {"features": FEATURES.numpy()})[0]
    with torch.no_grad():
        expected = network(features=FEATURES)["probabilities"].numpy()
    np.testing.assert_allclose(got, expected, rtol=0, atol=LOGITS)
    assert clip_form(network) is not None
    assert clip_form(combine(paths[:2])[0]) is None


def test_the_checkpoint_rebuilds_the_ensemble(paths, tmp_path):
    network, card = combine(paths, weights=(3, 2, 1), mean="logits")
    save_checkpoint(tmp_path / "all.safetensors", network, card)
    again = load_checkpoint(tmp_path / "all.safetensors")
    assert again.card == card
    assert again.replaced == ()
    with torch.no_grad():
        torch.testing.assert_close(again.model(features=FEATURES), network(features=FEATURES), rtol=0, atol=0)
    network.members[2].set_temperature(30.0)
    assert network.options["members"][2]["options"]["temperature"] == 30.0


def test_members_that_do_not_go_together(paths, tmp_path):
    other = write(tmp_path, "other", "mn01", seed=4, labels=("a", "c", "b"))
    with pytest.raises(CardError, match="index 1") as caught:
        combine([paths[0], other])
    assert caught.value.field == "labels"

    many = write(tmp_path, "many", "mn01", seed=4, task="multi_label")
    with pytest.raises(CardError, match="multi_label"):
        combine([paths[0], many])

    model = lively("mn01", num_classes=3)
    card = new_card("fast", "mn01", model=model, frontend=get_frontend("efficientat_hop160"), task="single_label",
                    labels=LABELS)  # fmt: skip
    save_checkpoint(tmp_path / "fast.safetensors", model, card)
    with pytest.raises(CardError, match="as a list") as caught:
        combine([paths[0], tmp_path / "fast.safetensors"])
    assert caught.value.field == "frontend"
    with pytest.raises(CardError) as caught:
        combine(paths, weights=(1, 2))
    assert caught.value.field == "weights"


def test_members_with_other_inputs_or_classes():
    with pytest.raises(CardError, match="scores"):
        create_model("ensemble", members=[{"architecture": "mn01", "options": {"num_classes": n}} for n in (2, 3)])
    with pytest.raises(CardError, match="takes"):
        create_model("ensemble", members=[{"architecture": "mn01", "options": {"n_mels": n}} for n in (64, 128)])
    with pytest.raises(CardError, match="clip scores"):
        create_model("ensemble", members=[{"architecture": "mn01", "options": {"num_classes": 0}}])
    assert "ensemble" not in list_architectures()
