"""Export: one file, the model's own answers at every length and batch, or nothing at all."""

from __future__ import annotations

import errno
import json
import os

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from export import exporter, verify
from export.exporter import CHECKPOINT_KEY, EXPORTER_KEY, OPSET_KEY, OPSETS, export_checkpoint, export_onnx
from export.verify import example_inputs, legal_lengths, verify_onnx
from models_zoo.cards import CARD_KEY, VERIFICATION_KEY, LengthPolicy, ModelCard
from models_zoo.errors import (
    CardError,
    CheckpointError,
    DataError,
    ExportError,
    OutputExistsError,
    OutputWriteError,
    VerificationError,
)
from parity_tests.networks import card_of, lively
from parity_tests.tolerances import LOGITS
from train_torch.checkpoint import save_checkpoint

LENGTHS = (514, 834, 3_200, 11_111, 32_000, 64_000, 100_001, 161_803, 320_000, 960_000, 1_920_000)
"""Samples at 32 kHz, from the legal minimum (2 frames) to 60 s."""
BATCHES = (1, 2, 3, 8)
MAC_LENGTHS = (3_200, 3_299, 3_300, 4_801, 8_000, 12_345, 16_000, 64_001, 160_000)
"""Samples at 16 kHz, from the legal minimum (32 frames) to 10 s."""


@pytest.fixture(scope="module")
def example():
    model = lively("mn01", num_classes=3)
    return model, card_of(model, "mn01")


@pytest.fixture(scope="module")
def exported(example, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    export_onnx(*example, path, checkpoint_sha256="ab" * 32)
    return path


def metadata(path):
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("mn04", {}, marks=pytest.mark.slow),
        pytest.param("mn10", {}, marks=pytest.mark.slow),
        pytest.param("dymn04", {"temperature": 1}, marks=pytest.mark.slow),
        pytest.param("dymn10", {"temperature": 1}, marks=pytest.mark.slow),
        ("mn05", {"num_classes": 10}),
        ("mn01", {"num_classes": 1}),
        ("mn04", {"num_classes": 5, "head": "fully_convolutional", "strides": [2, 2, 2, 1]}),
        ("mn04", {"num_classes": 5, "head": "multihead_attention_pooling"}),
        ("mn01", {"num_classes": 5, "se_dims": "cf", "n_mels": 64}),
        ("mn01", {"num_classes": 0, "se_dims": "none", "dilated": True, "reduced_tail": True}),
        ("dymn", {"width": 0.1, "num_classes": 1}),
        ("dymn04", {"use_dy_blocks": "replace_se", "num_classes": 5, "n_mels": 64, "strides": [2, 2, 2, 1]}),
        ("dymn", {"width": 0.1, "num_classes": 0, "num_kernels": 3, "num_pieces": 3, "max_context": 64}),
        ("dymn", {"width": 0.1, "num_classes": 5, "dynamic_conv": False, "coordinate_attention": False}),
        ("dymn", {"width": 0.1, "num_classes": 5, "dynamic_relu": False, "n_mels": 40}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())) or "published",
)
def test_the_graph_answers_like_the_model(tmp_path, name, options):
    model = lively(name, **options)
    card = card_of(model, name)
    path = tmp_path / "model.onnx"
    export_onnx(model, card, path)
    assert os.listdir(tmp_path) == ["model.onnx"]
    whole = name in ("mn04", "dymn04") and options.keys() <= {"temperature"}
    # Every batch size at lengths up to 10 s; minutes are spent on the longest clips one by one.
    for lengths, batches in (
        (LENGTHS[:-2] if whole else LENGTHS[:-2:4], BATCHES),
        (LENGTHS[-2:] if whole else (), (1,)),
    ):
        if lengths:
            done = verify_onnx(path, model, card, lengths=lengths, batches=batches)
            assert (done.lengths, done.batches, done.cases) == (lengths, batches, len(lengths) * len(batches))
            assert done.worst <= LOGITS

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [node.name for node in session.get_outputs()] == [part.name for part in card.outputs]
    features = np.random.default_rng(0).standard_normal((5, model.declared.n_mels, 77)).astype(np.float32)
    together = session.run(None, {"features": features})
    assert together[-1].std() > 0.05, "a dead network agrees with anything"
    alone = session.run(None, {"features": features[3:4]})
    for output, many, one in zip(card.outputs, together, alone, strict=True):
        assert many.shape == (5, int(output.axes[1]))
        np.testing.assert_allclose(many[3:4], one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("mac_avg", {}, marks=pytest.mark.slow),
        pytest.param("mac_max", {}, marks=pytest.mark.slow),
        ("mac_avg", {"width": 6, "num_classes": 5}),
        ("mac_max", {"width": 4, "num_classes": 0}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())) or "published",
)
def test_mac_graphs_answer_like_the_model(tmp_path, name, options):
    model = lively(name, **options)
    lengths = MAC_LENGTHS[::3] if options else MAC_LENGTHS
    card = card_of(model, name, length_policy=LengthPolicy(max=lengths[-1]))
    export_onnx(model, card, tmp_path / "model.onnx")
    done = verify_onnx(tmp_path / "model.onnx", model, card, lengths=lengths, batches=(1, 2, 5))
    assert (done.lengths, done.batches, done.cases) == (lengths, (1, 2, 5), 3 * len(lengths))
    assert done.worst <= LOGITS
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert [node.shape for node in session.get_inputs()] == [["batch", 4, 160, "time"]]
    features = np.random.default_rng(0).standard_normal((5, 4, 160, 77)).astype(np.float32)
    together, alone = (session.run(None, {"features": part}) for part in (features, features[3:4]))
    assert together[0].std() > 0.05, "a dead network agrees with anything"
    for many, one in zip(together, alone, strict=True):
        np.testing.assert_allclose(many[3:4], one, rtol=1e-4, atol=1e-4)


def test_progress_is_shown_when_asked_for(example, tmp_path, capsys, caplog):
    caplog.set_level("INFO", logger="export")
    export_onnx(*example, tmp_path / "quiet.onnx")
    assert (capsys.readouterr().err, caplog.text) == ("", "")
    done = export_onnx(*example, tmp_path / "shown.onnx", progress=True)
    assert "exporting" in caplog.text
    assert f"{done.cases}/{done.cases}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mn01", "dymn"])
def test_a_clip_costs_no_answer_in_any_batch(tmp_path, name):
    """The graph of a whole batch gives each clip what it gives the clip alone."""
    model = lively(name, num_classes=3, **({"width": 0.1} if name == "dymn" else {}))
    export_onnx(model, card_of(model, name), tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    features = np.random.default_rng(0).standard_normal((5, 128, 63)).astype(np.float32)
    together = session.run(["logits"], {"features": features})[0]
    alone = [session.run(["logits"], {"features": features[i : i + 1]})[0][0] for i in range(5)]
    assert np.abs(together - alone).max() <= LOGITS
    assert np.abs(together[0] - together[1]).max() > LOGITS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mn01", {}),
        ("mn01", {"head": "multihead_attention_pooling", "se_dims": "cf", "se_agg": "min"}),
        ("mac_max", {"width": 4}),
    ],
)
def test_dynamo_exports_the_families_too(tmp_path, name, options):
    model = lively(name, num_classes=4, **options)
    card = card_of(model, name, exporter="dynamo", length_policy=LengthPolicy(max=48_000))
    done = export_onnx(model, card, tmp_path / "model.onnx")
    assert done.worst <= LOGITS
    assert os.listdir(tmp_path) == ["model.onnx"]
    assert metadata(tmp_path / "model.onnx")[OPSET_KEY] == "18"
    assert str(os.getcwd()).encode() not in (tmp_path / "model.onnx").read_bytes()


def test_a_network_tied_to_a_length(tmp_path):
    model = lively("mn01", num_classes=3, se_dims="ct", num_frames=100)
    done = export_onnx(model, card_of(model, "mn01"), tmp_path / "model.onnx")
    assert (done.lengths[0], done.lengths[-1]) == (31_681, 32_000)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 128, 100]


def test_the_file_holds_everything(example, exported):
    model, card = example
    held = metadata(exported)
    assert ModelCard.from_json(held[CARD_KEY]) == card
    assert held[CHECKPOINT_KEY] == "ab" * 32
    assert held[OPSET_KEY] == str(OPSETS["torchscript"]) == str(onnx.load(exported).opset_import[0].version)
    assert held[EXPORTER_KEY].startswith("torchscript")
    done = json.loads(held[VERIFICATION_KEY])
    assert done["worst"] <= done["tolerance"] == LOGITS
    assert done["lengths"][0] == card.min_samples == 514
    assert done["lengths"][-1] == 960_000
    assert len(done["lengths"]) >= 3
    assert len(done["batches"]) >= 2
    assert not model.training


def test_nothing_of_this_machine_is_in_the_file(exported):
    content = exported.read_bytes()
    for trace in (os.getcwd(), os.path.dirname(torch.__file__), os.path.expanduser("~"), str(exported.parent)):
        assert trace.encode() not in content


def test_exporting_twice_gives_the_same_bytes(example, exported, tmp_path):
    export_onnx(*example, tmp_path / "again.onnx", checkpoint_sha256="ab" * 32)
    assert (tmp_path / "again.onnx").read_bytes() == exported.read_bytes()


def test_exporting_leaves_the_model_as_it_was(example, tmp_path):
    model, card = example
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    export_onnx(model, card, tmp_path / "model.onnx")
    assert model.training
    model.eval()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_refuses_to_overwrite(example, tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"mine")
    monkeypatch.setattr(exporter, "_export", lambda *_: pytest.fail("exported before looking"))
    with pytest.raises(OutputExistsError, match="--force"):
        export_onnx(*example, path)
    assert path.read_bytes() == b"mine"


def replace_weight(proto):
    """Turn one weight's sign."""
    tensor = next(entry for entry in proto.graph.initializer if entry.name == "model.classifier.5.weight")
    tensor.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(tensor), tensor.name))


def spoil_weight(proto):
    tensor = next(entry for entry in proto.graph.initializer if entry.name == "model.classifier.5.bias")
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.full(3, np.nan, np.float32), tensor.name))


def freeze_batch(proto):
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2


def freeze_time(proto):
    proto.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 531


def rename_axis(proto):
    proto.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "s77"


def swap_outputs(proto):
    first, second = proto.graph.output
    copy = onnx.ValueInfoProto()
    copy.CopyFrom(first)
    first.CopyFrom(second)
    second.CopyFrom(copy)


def drop_output(proto):
    del proto.graph.output[1]


def break_graph(proto):
    proto.graph.node[0].op_type = "NoSuchOperator"


MISTAKES = {
    replace_weight: "departs from the model",
    spoil_weight: "the graph returns NaN",
    freeze_batch: "inputs of the graph",
    freeze_time: "inputs of the graph",
    rename_axis: "inputs of the graph.*s77",
    swap_outputs: "outputs of the graph",
    drop_output: "outputs of the graph",
    break_graph: "onnxruntime cannot load",
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_wrong_graph_is_not_kept(example, tmp_path, monkeypatch, mistake):
    export = exporter._export

    def wrong(*arguments):
        proto, rewritten = export(*arguments)
        mistake(proto)
        return proto, rewritten

    monkeypatch.setattr(exporter, "_export", wrong)
    path = tmp_path / "model.onnx"
    path.write_bytes(b"an earlier, good file")
    with pytest.raises(VerificationError, match=MISTAKES[mistake]):
        export_onnx(*example, path, force=True)
    assert os.listdir(tmp_path) == ["model.onnx"]
    assert path.read_bytes() == b"an earlier, good file"


def test_a_graph_of_fixed_shape_inside_is_found(example, tmp_path):
    """An example batch of 1 is what freezes a graph without an error; the axes may still look free."""
    model, card = example
    inputs = example_inputs(card, 64_000, 2)["features"]

    class Frozen(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, features):
            answer = self.model(features=features.reshape(2, 128, -1))
            return answer["logits"], answer["embedding"]

    with pytest.warns(DeprecationWarning, match="ONNX export|will be removed"):
        torch.onnx.export(
            Frozen().eval(),
            (inputs,),
            tmp_path / "frozen.onnx",
            dynamo=False,
            opset_version=17,
            input_names=["features"],
            output_names=["logits", "embedding"],
            dynamic_axes={
                "features": {0: "batch", 2: "time"},
                "logits": {0: "batch"},
                "embedding": {0: "batch"},
            },
        )
    with pytest.raises(VerificationError):
        verify_onnx(tmp_path / "frozen.onnx", model, card)


def test_external_data_is_refused(example, exported, tmp_path):
    path = tmp_path / "external.onnx"
    onnx.save_model(onnx.load(exported), path, save_as_external_data=True, size_threshold=0, location="weights.bin")
    with pytest.raises(VerificationError, match="second file"):
        verify_onnx(path, *example)


def test_verification_is_against_the_model_given(example, exported):
    _, card = example
    other = lively("mn01", seed=1, num_classes=3)
    with pytest.raises(VerificationError, match="departs from the model"):
        verify_onnx(exported, other, card)


def test_a_card_that_does_not_describe_the_model_is_refused(example, tmp_path):
    _, card = example
    with pytest.raises(CardError):
        export_onnx(lively("mn02", num_classes=3), card, tmp_path / "model.onnx")
    assert os.listdir(tmp_path) == []


def test_what_torch_cannot_export_is_an_export_error(example, tmp_path, monkeypatch):
    def fail(*_arguments):
        raise RuntimeError("Unsupported: aten::something")

    monkeypatch.setattr(exporter, "_with_torchscript", fail)
    with pytest.raises(ExportError, match="aten::something"):
        export_onnx(*example, tmp_path / "model.onnx")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_nothing(example, tmp_path, monkeypatch):
    def full(_proto, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(onnx, "save_model", full)
    with pytest.raises(OutputWriteError, match="No space left"):
        export_onnx(*example, tmp_path / "model.onnx")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (LengthPolicy(), {514, 960_000}),
        (LengthPolicy(min=1_000, multiple_of=320), {1_280, 960_000}),
        (LengthPolicy(max=32_000), {514, 32_000}),
        (LengthPolicy(min=32_000, max=32_000), {32_000, 56_000}),  # longer ones tell a frozen axis from a free one
    ],
)
def test_lengths_keep_to_the_card(example, policy, expected):
    _, card = example
    lengths = legal_lengths(card.replace(length_policy=policy))
    assert {lengths[0], lengths[-1]} == expected
    assert len(lengths) >= min(3, 1 + lengths[-1] - lengths[0])
    assert all(length % policy.multiple_of == 0 for length in lengths)


def test_labels_for_a_published_file(example, tmp_path):
    model = lively("mn01", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    (tmp_path / "labels.txt").write_text("low\nmiddle\nhigh\n", encoding="utf-8")
    card, _ = export_checkpoint(
        tmp_path / "m.pt", tmp_path / "m.onnx", model="mn01_as", name="mine", labels_file=tmp_path / "labels.txt"
    )
    assert card.name == "mine"
    assert ModelCard.from_json(metadata(tmp_path / "m.onnx")[CARD_KEY]).labels == ("low", "middle", "high")


def test_an_untrained_head_is_not_exported(example, tmp_path):
    save_checkpoint(tmp_path / "m.safetensors", *example)
    (tmp_path / "labels.txt").write_text("one\ntwo\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"2 labels given.*untrained head"):
        export_checkpoint(tmp_path / "m.safetensors", tmp_path / "m.onnx", labels_file=tmp_path / "labels.txt")
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read"), (b"", "no lines"), (b"a\n\nb\n", "empty line"), (b"\xff\xfe\x00a", "not UTF-8")],
)
def test_labels_that_cannot_be_used(tmp_path, content, message):
    path = tmp_path / "labels.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        export_checkpoint(tmp_path / "m.safetensors", tmp_path / "m.onnx", labels_file=path)


class _Explosive(torch.nn.Module):
    """Answers loud clips with what float32 cannot hold, as a dynamic network of few epochs does."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, features):
        answers = self.model(features=features)
        loud = (features.mean((1, 2), keepdim=True)[:, 0] > 0).to(features.dtype) * 1e9
        return {name: (answer + loud) - loud for name, answer in answers.items()}


def test_what_float32_cannot_hold_is_known_from_float64():
    model = lively("mn01", num_classes=3)
    features = torch.randn(2, 128, 40, generator=torch.Generator().manual_seed(0))
    for offset, holds in ((-1.0, True), (1.0, False)):
        inputs = {"features": features + offset}
        with torch.no_grad():
            answers = _Explosive(model)(**inputs)
        assert verify._is_reproducible(_Explosive(model), inputs, answers) is holds


def test_a_case_is_repeated_quieter_only_where_the_model_itself_is_off(example, exported, monkeypatch):
    heard = []
    original, difference = verify.example_inputs, verify._difference

    def listen(card, num_samples, batch, *, loudness):
        heard.append(loudness)
        return original(card, num_samples, batch, loudness=loudness)

    monkeypatch.setattr(verify, "example_inputs", listen)
    done = verify_onnx(exported, *example, lengths=[3200], batches=[1])
    assert (heard, done.quieter) == ([0.1], 0)

    far = iter([1.0] * len(example[1].outputs))
    monkeypatch.setattr(verify, "_difference", lambda *args: next(far, None) or difference(*args))
    monkeypatch.setattr(verify, "_is_reproducible", lambda *_: False)
    heard.clear()
    done = verify_onnx(exported, *example, lengths=[3200], batches=[1])
    assert (heard, done.quieter, done.worst <= LOGITS) == ([0.1, 0.01], 1, True)

    monkeypatch.setattr(verify, "_difference", lambda *_: 1.0)
    with pytest.raises(VerificationError, match="departs"):
        verify_onnx(exported, *example, lengths=[3200], batches=[1])
    monkeypatch.setattr(verify, "_is_reproducible", lambda *_: True)
    heard.clear()
    with pytest.raises(VerificationError, match="departs"):
        verify_onnx(exported, *example, lengths=[3200], batches=[1])
    assert heard == [0.1]
