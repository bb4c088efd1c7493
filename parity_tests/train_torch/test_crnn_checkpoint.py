"""Lightning checkpoints of the DCASE baselines, made as the published training leaves them."""

from __future__ import annotations

import argparse
import os
import pathlib

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.data import AttributeDict

from export import pt2onnx
from models_zoo.cards import ModelCard
from models_zoo.errors import CheckpointError
from models_zoo.filterbanks import mel_matrix, window_array
from models_zoo.presets import get_frontend
from models_zoo.specs import Affine
from parity_tests.networks import card_of
from parity_tests.train_torch.test_crnn import FEATURES, answer, small
from train_torch.checkpoint import load_checkpoint, save_checkpoint
from train_torch.models import create_model

FRONTEND = get_frontend("dcase_2023")


class Logger:
    """Something the training had, whose class nobody else has."""

    def __init__(self):
        self.folder = pathlib.Path("exp")


class Command:
    """Runs a command when unpickled by a plain unpickler."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def profiled(model):
    """Return the weights with what thop leaves among them: float64 of shape (1,) on container modules."""
    places = ("", "cnn.", *(f"cnn.cnn.glu{index}." for index in (0, 1)), "rnn.")
    counted = {f"{place}{name}": torch.zeros(1, dtype=torch.float64) for place in places
               for name in ("total_ops", "total_params")}  # fmt: skip
    return {**model.state_dict(), **counted}


def front_end(spec=FRONTEND):
    return {
        "mel_spec.spectrogram.window": torch.tensor(window_array(spec.windows[0])).float(),
        "mel_spec.mel_scale.fb": torch.tensor(mel_matrix(spec.mel, spec.framing.n_fft, spec.sample_rate)).float(),
    }


def lightning_file(path, student, teacher, *, beside=None, **entries):
    """Write a checkpoint as the published training does, with everything it keeps besides weights."""
    beside = front_end() if beside is None else beside
    state = {f"sed_student.{key}": value for key, value in profiled(student).items()}
    state |= {f"sed_teacher.{key}": value for key, value in profiled(teacher).items()}
    hyper_parameters = AttributeDict(
        net={"dropout": 0.5}, path=pathlib.Path("exp/2023"), seed=np.int64(42), rate=np.float64(1e-3),
        logger=Logger(), arguments=argparse.Namespace(gpus=1),
    )  # fmt: skip
    torch.save(
        {
            "epoch": 199,
            "pytorch-lightning_version": "1.9.5",
            "state_dict": {**state, **beside},
            "sed_student": profiled(student),
            "sed_teacher": profiled(teacher),
            "hyper_parameters": hyper_parameters,
            "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.9)}},
            **entries,
        },
        path,
    )
    return path


@pytest.fixture(scope="module")
def pair():
    """A student and a teacher with other weights, and their card."""
    student, teacher = small(), small()
    with torch.no_grad():
        teacher.dense.bias += 0.5
    return student, teacher, card_of(student, "crnn", task="event_detection", frontend=FRONTEND)


def same(model, other):
    return all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


def test_whose_weights_is_chosen(tmp_path, pair):
    student, teacher, card = pair
    path = lightning_file(tmp_path / "epoch=199.ckpt", student, teacher)
    for weights, model in (("student", student), ("teacher", teacher)):
        loaded = load_checkpoint(path, card, weights=weights)
        assert loaded.replaced == ()
        assert same(loaded.model, model)
        torch.testing.assert_close(
            answer(loaded.model, features=FEATURES)["strong"], answer(model, features=FEATURES)["strong"]
        )
    with pytest.raises(
        CheckpointError, match=r"holds a student's and a teacher's weights; say which: weights='student"
    ):
        load_checkpoint(path, card)
    usual = card.replace(provenance={"weights": "teacher"})
    assert same(load_checkpoint(path, usual).model, teacher)
    assert same(load_checkpoint(path, usual, weights="student").model, student)


def test_the_copies_at_the_top_serve_too(tmp_path, pair):
    student, teacher, card = pair
    torch.save({"sed_student": profiled(student), "sed_teacher": profiled(teacher)}, tmp_path / "copies.pt")
    assert same(load_checkpoint(tmp_path / "copies.pt", card, weights="teacher").model, teacher)
    torch.save({f"sed_teacher.{key}": value for key, value in teacher.state_dict().items()}, tmp_path / "one.pt")
    assert same(load_checkpoint(tmp_path / "one.pt", card).model, teacher)
    with pytest.raises(CheckpointError, match="holds a teacher's weights, no student's"):
        load_checkpoint(tmp_path / "one.pt", card, weights="student")


def test_weights_of_a_file_that_holds_one_set(tmp_path, pair):
    student, _, card = pair
    torch.save(student.state_dict(), tmp_path / "one.pt")
    assert same(load_checkpoint(tmp_path / "one.pt", card).model, student)
    save_checkpoint(tmp_path / "ours.safetensors", student, card)
    for name in ("one.pt", "ours.safetensors"):
        with pytest.raises(CheckpointError, match=r"one set of weights.*leave weights"):
            load_checkpoint(tmp_path / name, card if name == "one.pt" else None, weights="student")


def test_everything_else_is_strict(tmp_path, pair):
    student, teacher, card = pair
    extra = lightning_file(tmp_path / "extra.ckpt", student, teacher, beside={"head.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"unexpected: head\.weight"):
        load_checkpoint(extra, card, weights="student")
    fewer = lightning_file(
        tmp_path / "fewer.ckpt", create_model("crnn", **{**student.options, "rnn_layers": 1}), teacher
    )
    with pytest.raises(CheckpointError, match=r"missing: rnn\.rnn\.weight_ih_l1"):
        load_checkpoint(fewer, card, weights="student")


def test_a_file_from_behind_another_front_end_is_refused(tmp_path, pair):
    student, teacher, card = pair
    for change in (
        {"windows": (FRONTEND.windows[0].replace(periodic=True),)},
        {"mel": FRONTEND.mel.replace(f_min=50.0)},
    ):
        other = front_end(FRONTEND.replace(**change))
        path = lightning_file(tmp_path / "other.ckpt", student, teacher, beside=other)
        with pytest.raises(CheckpointError, match=r"not trained behind the front end .* mel_spec\."):
            load_checkpoint(path, card, weights="student")


def scaled_card(card: ModelCard, affine: Affine) -> ModelCard:
    return card.replace(frontend=FRONTEND.replace(statistics=None, affine=affine))


def test_statistics_of_the_data_set_must_be_the_cards(tmp_path, pair):
    """M and Q of the fitted scaler; as an affine of the front end either kind of it is known."""
    student, teacher, card = pair
    fitted = {"scaler.mean": torch.full((1, 1, 1), -20.0), "scaler.mean_squared": torch.full((1, 1, 1), 625.0)}
    path = lightning_file(tmp_path / "fitted.ckpt", student, teacher, beside={**front_end(), **fitted})
    for scale in (1.0, 15.0 + 1e-8):
        loaded = load_checkpoint(path, scaled_card(card, Affine(shift=20.0, scale=scale)), weights="student")
        assert same(loaded.model, student)
    for wrong in (
        card,
        scaled_card(card, Affine(shift=20.1, scale=15.0)),
        scaled_card(card, Affine(shift=20.0, scale=5)),
    ):
        with pytest.raises(CheckpointError, match=r"Affine\(shift=20\.0, scale=15\.0"):
            load_checkpoint(path, wrong, weights="student")
    bands = {key: value.expand(1, 128, 1).clone() for key, value in fitted.items()}
    path = lightning_file(tmp_path / "bands.ckpt", student, teacher, beside={**front_end(), **bands})
    with pytest.raises(CheckpointError, match="a value for each mel band"):
        load_checkpoint(path, card, weights="student")


def test_nothing_the_file_names_is_run(tmp_path, pair):
    student, teacher, card = pair
    witness = tmp_path / "it-ran"
    hostile = lightning_file(tmp_path / "hostile.ckpt", student, teacher, loops=Command(f"touch {witness}"))
    with pytest.raises(CheckpointError, match="could run code, so it is refused"):
        load_checkpoint(hostile, card, weights="student")
    assert not witness.exists()
    torch.load(hostile, weights_only=False)
    assert witness.exists(), "the trap itself does not work, so the test proves nothing"


def test_objects_of_unknown_classes_are_never_built(tmp_path, pair, monkeypatch):
    student, teacher, card = pair
    built = []
    monkeypatch.setattr(Logger, "__setstate__", lambda *given: built.append(given), raising=False)
    path = lightning_file(tmp_path / "epoch=199.ckpt", student, teacher)
    load_checkpoint(path, card, weights="student")
    assert built == []
    torch.load(path, weights_only=False)
    assert len(built) == 1, "a plain unpickler builds it"
    torch.save({**student.state_dict(), "logger": Logger()}, tmp_path / "no-lightning.pt")
    with pytest.raises(CheckpointError, match=r"holds more than tensors: .*Logger"):
        load_checkpoint(tmp_path / "no-lightning.pt", card)


def test_weights_that_are_objects_are_no_weights(tmp_path, pair):
    student, teacher, card = pair
    path = lightning_file(tmp_path / "odd.ckpt", student, teacher, beside={"rnn.rnn.bias_hh_l0": Logger()})
    with pytest.raises(CheckpointError, match="holds"):
        load_checkpoint(path, card, weights="student")


def test_the_command_line_chooses(tmp_path, pair, monkeypatch, capsys):
    student, teacher, _ = pair
    asked = {}

    def export_checkpoint(checkpoint, path, **given):
        asked.update(given)
        raise CheckpointError("seen")

    monkeypatch.setattr("export.exporter.export_checkpoint", export_checkpoint)
    path = lightning_file(tmp_path / "epoch=199.ckpt", student, teacher)
    arguments = [str(path), "--model", "crnn_2023", "-o", str(tmp_path / "m.onnx")]
    assert pt2onnx.main([*arguments, "--weights", "teacher"]) == 2
    assert (asked["weights"], asked["model"]) == ("teacher", "crnn_2023")
    assert pt2onnx.main(arguments) == 2
    assert asked["weights"] is None
    assert "seen" in capsys.readouterr().err


@pytest.mark.contracts
def test_a_published_file_loads_by_its_card(contracts, tmp_path):
    """The full-size network under the names and with the leftovers the contract lists."""
    from parity_tests.crnn_contract import contract_state, keys

    state = contract_state(contracts, "crnn_2023")
    leftovers = keys(contracts)["profiler_leftover_keys"]["keys_for_glu_7_blocks"]
    state |= {key: torch.zeros(1, dtype=torch.float64) for key in leftovers}
    with np.load(contracts / "dcase_crnn" / "golden_features.npz") as stored:
        bank = np.zeros((1025, 128), np.float32)
        bank[stored["fb_rows"], stored["fb_cols"]] = stored["fb_vals"]
        beside = {"mel_spec.spectrogram.window": torch.from_numpy(stored["window"]),
                  "mel_spec.mel_scale.fb": torch.from_numpy(bank)}  # fmt: skip
    both = {f"{prefix}{key}": value for prefix in keys(contracts)["checkpoint_prefixes"]["state_dict"]
            for key, value in state.items()}  # fmt: skip
    torch.save({"state_dict": {**both, **beside}, "pytorch-lightning_version": "1.9.5"}, tmp_path / "epoch=1.ckpt")
    loaded = load_checkpoint(tmp_path / "epoch=1.ckpt", "crnn_2023")
    assert loaded.replaced == ()
    assert loaded.card.name == "crnn_2023"
