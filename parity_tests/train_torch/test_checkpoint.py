"""Checkpoints: exact round trips, exact replacement, and a typed refusal of everything else."""

from __future__ import annotations

import hashlib
import json
import os
import pickle

import pytest
import safetensors.torch
import torch

from models_zoo.cards import CARD_KEY, CheckpointSource
from models_zoo.errors import CardError, CheckpointError, OutputExistsError, OutputWriteError, UnknownNameError
from models_zoo.registry import get_card
from parity_tests.networks import card_of, contract_entry, contract_state, lively, noise_features
from train_torch.checkpoint import load_checkpoint, save_checkpoint
from train_torch.models import check_card, create_model

FEATURES = noise_features(2, 60)


@pytest.fixture(scope="module")
def example():
    """A lively three-class model and its card."""
    model = lively("mn01", num_classes=3)
    return model, card_of(model, "mn01", thresholds={"class 1": 0.4}, metrics={"accuracy": 0.9})


@pytest.fixture
def saved(example, tmp_path):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, *example)
    return path


def published(path, model, *, half=False):
    """Write a plain state_dict, as the published files are."""
    state = model.state_dict()
    if half:
        state = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    torch.save(state, path)
    return path


def same_weights(first, second, keys=None):
    first, second = first.state_dict(), second.state_dict()
    return all(torch.equal(first[key], second[key]) for key in keys or first)


def test_round_trip(example, saved):
    model, card = example
    loaded = load_checkpoint(saved)
    assert loaded.card == card
    assert loaded.replaced == ()
    assert loaded.sha256 == hashlib.sha256(saved.read_bytes()).hexdigest()
    assert not loaded.model.training
    assert list(loaded.model.state_dict()) == list(model.state_dict())
    assert same_weights(loaded.model, model)
    assert model(features=FEATURES)["logits"].std() > 0.1
    assert torch.equal(loaded.model(features=FEATURES)["logits"], model(features=FEATURES)["logits"])


def test_a_checkpoint_names_what_it_writes(saved, tmp_path):
    assert os.listdir(tmp_path) == ["model.safetensors"]
    with safetensors.safe_open(saved, framework="pt") as file:
        assert json.loads(file.metadata()[CARD_KEY])["name"] == "example"


def test_writing_twice_gives_the_same_bytes(example, saved, tmp_path):
    save_checkpoint(tmp_path / "again.safetensors", *example)
    assert (tmp_path / "again.safetensors").read_bytes() == saved.read_bytes()


def test_refuses_to_overwrite(example, saved):
    before = saved.read_bytes()
    with pytest.raises(OutputExistsError):
        save_checkpoint(saved, *example)
    assert saved.read_bytes() == before
    save_checkpoint(saved, *example, force=True)


def test_a_full_disk_leaves_nothing(example, tmp_path, monkeypatch):
    def full(path, data):
        with open(path, "wb") as file:
            file.write(data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OutputWriteError, match="No space left"):
        save_checkpoint(tmp_path / "model.safetensors", *example)
    assert os.listdir(tmp_path) == []


def test_saving_checks_the_card(example, tmp_path):
    model, card = example
    with pytest.raises(CardError):
        save_checkpoint(tmp_path / "m.safetensors", create_model("mn02", 3), card)
    with pytest.raises(CheckpointError, match=r"\.safetensors"):
        save_checkpoint(tmp_path / "m.pt", model, card)
    assert os.listdir(tmp_path) == []


def test_other_classes_replace_exactly_the_last_layer(example, saved):
    model, card = example
    loaded = load_checkpoint(saved, labels=["x", "y"])
    assert loaded.replaced == ("classifier.5.weight", "classifier.5.bias")
    kept = [key for key in model.state_dict() if key not in loaded.replaced]
    assert same_weights(loaded.model, model, kept)
    assert loaded.model(features=FEATURES)["logits"].shape == (2, 2)
    assert loaded.card.labels == ("x", "y")
    assert (loaded.card.metrics, loaded.card.thresholds) == ({}, None)
    assert loaded.card.provenance["initialised_from"] == {"name": card.name, "sha256": loaded.sha256}
    check_card(loaded.model, loaded.card)


@pytest.mark.parametrize(
    ("head", "replaced"),
    [
        (
            "fully_convolutional",
            {"0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"},
        ),
        ("multihead_attention_pooling", {"subspace_proj.weight", "subspace_proj.bias"}),
    ],
)
def test_every_head_names_what_was_replaced(tmp_path, head, replaced):
    model = lively("mn01", num_classes=3, head=head)
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, model, card_of(model, "mn01"))
    loaded = load_checkpoint(path, num_classes=4)
    assert set(loaded.replaced) == {f"classifier.{key}" for key in replaced}
    assert loaded.card.labels is None
    assert loaded.model(features=FEATURES)["logits"].shape == (2, 4)


def test_the_same_count_keeps_every_weight(example, saved):
    model, card = example
    loaded = load_checkpoint(saved, labels=["x", "y", "z"])
    assert loaded.replaced == ()
    assert same_weights(loaded.model, model)
    assert (loaded.card.labels, loaded.card.thresholds) == (("x", "y", "z"), None)
    assert load_checkpoint(saved, num_classes=3).card == card


def test_the_head_can_be_left_out_and_added(example, saved, tmp_path):
    model, _ = example
    bare = load_checkpoint(saved, num_classes=0)
    assert {key.split(".")[0] for key in bare.replaced} == {"classifier"}
    assert list(bare.model(features=FEATURES)) == ["embedding"]
    assert torch.equal(bare.model(features=FEATURES)["embedding"], model(features=FEATURES)["embedding"])
    path = tmp_path / "bare.safetensors"
    save_checkpoint(path, bare.model, bare.card.replace(task="embedding"))
    headed = load_checkpoint(path, num_classes=6)
    assert {key.split(".")[0] for key in headed.replaced} == {"classifier"}
    assert len(headed.replaced) == 4
    assert same_weights(headed.model, model, [key for key in model.state_dict() if key.startswith("features")])


def test_labels_and_count_must_agree(saved):
    with pytest.raises(CardError, match="got 2 for num_classes 3"):
        load_checkpoint(saved, labels=["x", "y"], num_classes=3)


def test_published_file(tmp_path):
    model = lively("mn01")
    loaded = load_checkpoint(published(tmp_path / "mn01_as_mAP_298.pt", model), "mn01_as")
    assert same_weights(loaded.model, model)
    assert loaded.card == get_card("mn01_as")
    assert len(loaded.card.labels) == 527


@pytest.mark.contracts
@pytest.mark.parametrize(("variant", "card"), [("mn04_as", "mn04_as"), ("mn10_as_fc_s2211", "mn10_as_fc_s2211")])
def test_published_keys(contracts, tmp_path, variant, card):
    entry = contract_entry(contracts, variant)
    state = contract_state(contracts, entry)
    torch.save(state, tmp_path / "m.pt")
    loaded = load_checkpoint(tmp_path / "m.pt", card)
    assert loaded.replaced == ()
    assert all(torch.equal(value, state[key]) for key, value in loaded.model.state_dict().items())


def test_published_half_precision_becomes_float32(tmp_path):
    model = lively("mn01")
    loaded = load_checkpoint(published(tmp_path / "m.pt", model, half=True), "mn01_as")
    assert {value.dtype for value in loaded.model.state_dict().values()} == {torch.float32, torch.int64}
    torch.testing.assert_close(loaded.model.classifier[5].weight, model.classifier[5].weight, rtol=1e-3, atol=1e-5)


def test_pictures_lend_the_network_but_not_their_head(tmp_path):
    path = published(tmp_path / "mn01_im.pt", lively("mn01", num_classes=1000))
    assert load_checkpoint(path, "mn01_im").card.task == "embedding"
    loaded = load_checkpoint(path, "mn01_im", num_classes=20)
    assert loaded.replaced == ("classifier.5.weight", "classifier.5.bias")


def test_published_file_fine_tuned_by_someone(tmp_path):
    """A head with the count asked for is kept, whatever the card says."""
    model = lively("mn01", num_classes=20)
    path = published(tmp_path / "m.pt", model)
    with pytest.raises(CheckpointError, match=r"classifier\.5\.weight \[20, 128\].*\[527, 128\].*pass num_classes"):
        load_checkpoint(path, "mn01_as")
    loaded = load_checkpoint(path, "mn01_as", num_classes=20)
    assert loaded.replaced == ()
    assert same_weights(loaded.model, model)
    assert (loaded.card.labels, loaded.card.metrics) == (None, {})


def test_container_and_prefix(tmp_path):
    model = lively("mn01", num_classes=3)
    state = {f"net.{key}": value for key, value in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "m.ckpt")
    source = CheckpointSource(file="m.ckpt", url="https://example.org/m.ckpt", prefix="net.", container="state_dict")
    card = card_of(model, "mn01", checkpoint=source)
    assert same_weights(load_checkpoint(tmp_path / "m.ckpt", card).model, model)
    with pytest.raises(CheckpointError, match="no entry 'weights'"):
        load_checkpoint(tmp_path / "m.ckpt", card.replace(checkpoint=source.replace(container="weights")))


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
def test_a_stated_hash_is_checked(tmp_path, algorithm):
    model = lively("mn01", num_classes=3)
    path = published(tmp_path / "m.pt", model)
    digest = hashlib.new(algorithm, path.read_bytes()).hexdigest()
    source = CheckpointSource(file="m.pt", url="https://example.org/m.pt", **{algorithm: digest})
    card = card_of(model, "mn01", checkpoint=source)
    assert load_checkpoint(path, card).replaced == ()
    wrong = card.replace(checkpoint=source.replace(**{algorithm: digest[::-1]}))
    with pytest.raises(CheckpointError, match=f"{algorithm} is {digest}, not {digest[::-1]}; download it again"):
        load_checkpoint(path, wrong)


def test_every_misfit_is_listed(example, tmp_path):
    model, card = example
    state = model.state_dict()
    state["features.0.0.bias"] = torch.zeros(8)
    del state["features.3.block.0.0.weight"]
    state["classifier.2.weight"] = torch.zeros(4, 4)
    state["features.0.1.weight"] = torch.zeros(8, dtype=torch.int64)
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "m.pt", card)
    message = str(caught.value)
    assert "missing: features.3.block.0.0.weight;" in message
    assert "unexpected: features.0.0.bias;" in message
    assert "classifier.2.weight [4, 4] torch.float32 for [128, 96] torch.float32" in message
    assert "features.0.1.weight [8] torch.int64 for [8] torch.float32" in message


def test_another_width_is_refused(tmp_path):
    path = published(tmp_path / "m.pt", create_model("mn02"))
    with pytest.raises(CheckpointError, match="does not fit 'mn01_as'"):
        load_checkpoint(path, "mn01_as")
    with pytest.raises(CheckpointError, match="does not fit 'mn01_as'"):
        load_checkpoint(path, "mn01_as", num_classes=3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(example, saved, tmp_path, value):
    _, card = example
    model = load_checkpoint(saved).model
    with torch.no_grad():
        model.classifier[2].bias[1] = value
    with pytest.raises(CheckpointError, match=r"NaN or infinite weights in classifier\.2\.bias"):
        save_checkpoint(tmp_path / "broken.safetensors", model, card)
    with pytest.raises(CheckpointError, match=r"NaN or infinite weights in classifier\.2\.bias"):
        load_checkpoint(published(tmp_path / "broken.pt", model), card)


class Malicious:
    """Runs a command when unpickled by a plain unpickler."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (torch.save, r"holds more than tensors: \w+\.system; .* could run code, so it is refused"),
        (lambda value, path: path.write_bytes(pickle.dumps(value)), "could run code, so it is refused"),
    ],
)
def test_a_malicious_pickle_does_not_run(tmp_path, write, says):
    witness = tmp_path / "it-ran"
    path = tmp_path / "model.pt"
    write({"features.0.0.weight": Malicious(f"touch {witness}")}, path)
    pickle_bytes = pickle.dumps(Malicious(f"touch {witness}"))
    with pytest.raises(CheckpointError, match=says) as caught:
        load_checkpoint(path, "mn01_as")
    assert "weights_only" not in str(caught.value), "no advice to load it all the same"
    assert not witness.exists()
    pickle.loads(pickle_bytes)
    assert witness.exists(), "the trap itself does not work, so the test proves nothing"


def test_only_tensors_by_name(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="holds a Tensor; expected a state_dict"):
        load_checkpoint(tmp_path / "m.pt", "mn01_as")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"  \n", "is empty"),
        (b"<!DOCTYPE html><html>Not Found</html>", "is a web page"),
        (b"\0" * 1000, "refused|not an intact"),
        (b"PK\x03\x04 no zip at all", "refused|not an intact"),
        (bytes(range(256)) * 10, "refused|not an intact"),
    ],
)
def test_files_that_are_no_checkpoint(tmp_path, suffix, content, message):
    path = tmp_path / f"m{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path, "mn01_as")


@pytest.mark.parametrize("keep", [7, 8, 100, 5000, -1])
def test_truncated_files(saved, tmp_path, keep):
    short = tmp_path / "short.safetensors"
    short.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="not an intact safetensors file"):
        load_checkpoint(short)
    torch.save(create_model("mn01", 3).state_dict(), tmp_path / "m.pt")
    short = tmp_path / "short.pt"
    short.write_bytes((tmp_path / "m.pt").read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(short, "mn01_as")


def wrapped_in(kind, model):
    """Return what training code leaves behind: the weights of ``model``, wrapped."""
    state = model.state_dict()
    if kind == "DataParallel":
        return torch.nn.DataParallel(model).state_dict()
    if kind == "compiled DataParallel":
        return {f"_orig_mod.module.{key}": value for key, value in state.items()}
    if kind == "averaged":
        return torch.optim.swa_utils.AveragedModel(model).state_dict()
    optimizer = torch.optim.Adam(model.parameters())
    everything = {"epoch": 3, "optimizer": optimizer.state_dict(), "best": 0.5, "lr": torch.tensor(0.1), "ema": {}}
    if kind == "model among other things":
        return everything | {"model": state}
    assert kind == "Lightning"
    return everything | {"state_dict": {f"net.{key}": value for key, value in state.items()}, "callbacks": {}}


@pytest.mark.parametrize(
    "kind", ["DataParallel", "compiled DataParallel", "averaged", "model among other things", "Lightning"]
)
def test_wrappers_are_taken_off(tmp_path, kind):
    model = lively("mn01", num_classes=3)
    torch.save(wrapped_in(kind, model), tmp_path / "m.pt")
    loaded = load_checkpoint(tmp_path / "m.pt", card_of(model, "mn01"))
    assert same_weights(loaded.model, model)
    assert loaded.replaced == ()


def test_one_of_several_sets_of_weights(tmp_path):
    plain, averaged = lively("mn01", num_classes=3), lively("mn01", num_classes=3, seed=1)
    torch.save({"model": plain.state_dict(), "ema": averaged.state_dict(), "epoch": 3}, tmp_path / "m.pt")
    card = card_of(plain, "mn01")
    with pytest.raises(CheckpointError, match="several sets of weights: model, ema; say which: container='model'"):
        load_checkpoint(tmp_path / "m.pt", card)
    assert same_weights(load_checkpoint(tmp_path / "m.pt", card, container="ema").model, averaged)
    torch.save({"epoch": 3, "optimizer": {"state": {}}}, tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="holds none; not tensors: epoch, optimizer"):
        load_checkpoint(tmp_path / "none.pt", card)


def test_a_network_that_is_no_wrapper_keeps_its_names(tmp_path):
    """Every entry of a network without a head begins with ``features.``, which is no wrapper's."""
    bare = create_model("mn01", num_classes=0)
    assert {key.partition(".")[0] for key in bare.state_dict()} == {"features"}
    torch.save(bare.state_dict(), tmp_path / "m.pt")
    assert load_checkpoint(tmp_path / "m.pt", "mn01_im").replaced == ()


@pytest.mark.parametrize(
    ("name", "options", "card", "says"),
    [
        ("mn04", {}, "mn10_as", "is mn04 with width 0.4, head 'mlp', 527 classes (cards like that: .*mn04_as.*); the "
         "card is mn10 with width 1.0, head 'mlp', 527 classes"),
        ("mn04", {"num_classes": 20}, "mn10_as", "is mn04 with width 0.4, head 'mlp', 20 classes"),
        ("mn10", {"head": "fully_convolutional"}, "mn10_as", "is mn10 with width 1.0, head 'fully_convolutional', 527 "
         "classes (cards like that: mn10_as_fc, .*); the card is mn10 with width 1.0, head 'mlp'"),
        ("mn10", {"head": "multihead_attention_pooling", "num_classes": 7}, "mn10_as_fc",
         "is mn10 with width 1.0, head 'multihead_attention_pooling', 7 classes; the card is mn10"),
        ("mn04", {"reduced_tail": True}, "mn04_as", "width 0.4, reduced_tail True, head 'mlp', 527 classes; the card "
         "is mn04 with width 0.4, reduced_tail False"),
        ("dymn04", {}, "mn04_as", "is dymn04 with width 0.4, 527 classes.*; the card is mn04"),
        ("dymn04", {}, "dymn10_as", "is dymn04 with width 0.4, 527 classes (cards like that: dymn04_as, dymn04_im); "
         "the card is dymn10 with width 1.0"),
        ("dymn04", {"use_dy_blocks": "replace_se"}, "mn04_as", "is dymn04 with width 0.4, use_dy_blocks 'replace_se'"),
        ("mn", {"width": 0.3}, "mn10_as", "names of mn\\d\\d's, but the shapes of no width here; the card is mn10"),
        ("mn04", {"num_classes": 0}, "mn10_im", "is mn04 with width 0.4, head 'mlp', no classes"),
        ("mn04", {}, "mn10_im", "is mn04 .*; the card is mn10 with width 1.0, head 'mlp', no classes"),
    ],
)  # fmt: skip
def test_a_misfit_says_what_the_file_looks_like(tmp_path, name, options, card, says):
    torch.save(create_model(name, **options).state_dict(), tmp_path / "m.pt")
    pattern = says.replace("(cards", r"\(cards").replace(");", r"\);")
    with pytest.raises(CheckpointError, match=pattern):
        load_checkpoint(tmp_path / "m.pt", card)


def test_a_stranger_looks_like_nothing(tmp_path):
    torch.save({"encoder.weight": torch.zeros(3), "decoder.weight": torch.zeros(3)}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="its entries are those of no architecture here; the card is mn10"):
        load_checkpoint(tmp_path / "m.pt", "mn10_as")


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (lambda weight: weight.to_sparse(), "torch.sparse_coo"),
        (lambda weight: weight.to("meta"), "meta"),
        (lambda weight: weight.to(torch.complex64), "torch.complex64"),
    ],
)
def test_tensors_of_another_kind_are_named(tmp_path, broken, says):
    state = create_model("mn01").state_dict()
    torch.save({**state, "features.0.0.weight": broken(state["features.0.0.weight"])}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=rf"other shape or type: features\.0\.0\.weight .*{says}"):
        load_checkpoint(tmp_path / "m.pt", "mn01_as")


@pytest.mark.parametrize(("content", "says"), [({}, "it is empty"), ({1: torch.zeros(2)}, "not tensors: 1")])
def test_a_dict_that_names_no_tensor(tmp_path, content, says):
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=says):
        load_checkpoint(tmp_path / "m.pt", "mn01_as")


def test_the_card_follows_the_head_in_what_it_costs(saved, example):
    _, card = example
    wide = load_checkpoint(saved, labels=[f"label {index}" for index in range(10)]).card
    hidden = 128
    assert wide.parameters == card.parameters + 7 * (hidden + 1)
    assert wide.macs == card.macs + 7 * hidden


def test_missing_files(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "nothing.safetensors")
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(CheckpointError, match="cannot read"):
        load_checkpoint(tmp_path / "folder.pt", "mn01_as")
    with pytest.raises(CheckpointError, match="cannot tell what"):
        load_checkpoint(tmp_path / "model.onnx")


def test_files_without_a_card(example, tmp_path):
    model, card = example
    path = tmp_path / "bare.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    with pytest.raises(CheckpointError, match="holds no card"):
        load_checkpoint(path)
    assert same_weights(load_checkpoint(path, card).model, model)
    with pytest.raises(CheckpointError, match="holds no card"):
        load_checkpoint(published(tmp_path / "m.pt", model))
    with pytest.raises(UnknownNameError, match="'mn01_as'"):
        load_checkpoint(tmp_path / "m.pt", "mn01_sa")


def test_a_second_card_must_be_the_same(example, saved):
    _, card = example
    assert load_checkpoint(saved, card).card == card
    with pytest.raises(CheckpointError, match="holds its own card, 'example'"):
        load_checkpoint(saved, "mn01_as")


def test_a_card_with_other_tensors(example, tmp_path):
    _, card = example
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(3)}, path, {CARD_KEY: card.to_json()})
    with pytest.raises(CheckpointError, match=r"missing: features\.0\.0\.weight.*unexpected: weight"):
        load_checkpoint(path)


@pytest.mark.parametrize("text", ["", "not json", "{}", '{"name": "x", "colour": "red"}'])
def test_a_card_that_cannot_be_read(example, tmp_path, text):
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file(example[0].state_dict(), path, {CARD_KEY: text})
    with pytest.raises(CheckpointError, match="card that cannot be read"):
        load_checkpoint(path)
