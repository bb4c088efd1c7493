"""OnnxSession: what it refuses to load, what it refuses to run, and what it returns."""

from __future__ import annotations

import json
import os
import sys
import types
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from infer_tf.modelfile import _CHILDREN, _TENSOR_DATA_LOCATION, _TENSOR_EXTERNAL_DATA, check_model_bytes
from infer_tf.session import OnnxSession
from models_zoo.cards import CARD_KEY, labels_sha256
from models_zoo.errors import ClosedError, DeviceError, ModelFileError, UnknownNameError, WaveformError
from parity_tests.infer_tf.tiny import LABELS, tiny_card, tiny_model, tiny_proto, with_metadata


def external(location: str = "weights.bin") -> bytes:
    proto = tiny_proto()
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location
    return with_metadata(proto, {CARD_KEY: tiny_card().to_json()})


def external_in_a_constant() -> bytes:
    """A reference hidden in a node's attribute, inside the branch of an If, without data_location."""
    hidden = numpy_helper.from_array(np.zeros(4, np.float32))
    entry = hidden.external_data.add()
    entry.key, entry.value = "location", "weights.bin"
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=hidden)],
        "branch",
        [],
        [helper.make_tensor_value_info("c", TensorProto.FLOAT, [4])],
    )
    proto = tiny_proto()
    proto.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    proto.graph.node.append(helper.make_node("If", ["yes"], ["unused"], then_branch=branch, else_branch=branch))
    return with_metadata(proto, {CARD_KEY: tiny_card().to_json()})


def card_with(**changes: object) -> bytes:
    return with_metadata(tiny_proto(), {CARD_KEY: tiny_card(**changes).to_json()})


def outputs(name: str = "logits", axes: tuple[str, ...] = ("batch", "classes")) -> list[dict[str, object]]:
    return [
        {"name": name, "role": "clip", "kind": "logit", "axes": list(axes)},
        {"name": "embedding", "role": "embedding", "axes": ["batch", "8"]},
    ]


def inputs(name: str = "features", dtype: str = "float32", axes: tuple[str, ...] = ("batch", "128", "time")) -> object:
    return [{"name": name, "dtype": dtype, "axes": list(axes), "source": "frontend"}]


def raw_card(old: str, new: str) -> bytes:
    text = tiny_card().to_json()
    assert old in text
    return with_metadata(tiny_proto(), {CARD_KEY: text.replace(old, new, 1)})


def with_frontend(**changes: object) -> bytes:
    card = tiny_card().to_dict()
    for name, value in changes.items():
        card["frontend"][name] = {**card["frontend"][name], **value} if isinstance(value, dict) else value
    return with_metadata(tiny_proto(), {CARD_KEY: json.dumps(card)})


BAD_MODELS: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "is empty"),
    "text": (lambda: b"hello, this is no model\n" * 20, "is not an ONNX file"),
    "zeros": (lambda: bytes(1000), "is not an ONNX file"),
    "wav": (lambda: b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(40), "is not an ONNX file"),
    "json": (lambda: tiny_card().to_json().encode(), "is not an ONNX file"),
    "truncated by a byte": (lambda: tiny_model()[:-1], "damaged or truncated"),
    "truncated in half": (lambda: tiny_model()[: len(tiny_model()) // 2], "damaged or truncated"),
    "truncated header": (lambda: tiny_model()[:4], "is not an ONNX file|damaged or truncated"),
    "trailing bytes": (lambda: tiny_model() + b"\xff" * 7, "damaged or truncated"),
    "no card": (lambda: with_metadata(tiny_proto(), {"other": "thing"}), "holds no model card.*pt2onnx"),
    "card is not JSON": (lambda: with_metadata(tiny_proto(), {CARD_KEY: "{"}), "card inside .* is not valid"),
    "card of other fields": (lambda: with_metadata(tiny_proto(), {CARD_KEY: '{"nom": 1}'}), "is not valid"),
    "external data": (external, "external data"),
    "external data elsewhere": (lambda: external("/etc/passwd"), "external data"),
    "external data in memory": (lambda: external("*/_ORT_MEM_ADDR_/*"), "external data"),
    "external data hidden": (external_in_a_constant, "external data"),
    "input of another name": (lambda: card_with(inputs=inputs(name="x")), r"inputs are \['x'\]"),
    "input of another type": (lambda: card_with(inputs=inputs(dtype="int64")), "int64 in the card, float32"),
    "input of another rank": (lambda: card_with(inputs=inputs(axes=("batch", "time"))), "input 'features' has axes"),
    "input of another size": (lambda: card_with(inputs=inputs(axes=("batch", "64", "time"))), "'64'"),
    "time fixed by tracing": (lambda: tiny_model(axes=("batch", 128, 100)), "100"),
    "batch fixed by tracing": (lambda: tiny_model(axes=(1, 128, "time")), "input 'features' has axes"),
    "front end of other bands": (lambda: with_frontend(mel={"n_mels": 64}), r"frontend makes \(1, 64, 2\)"),
    "front end of another layout": (lambda: with_frontend(layout="b t m"), r"frontend makes \(1, 2, 128\)"),
    "front end of another rank": (lambda: with_frontend(layout="b 1 m t"), r"frontend makes \(1, 1, 128, 2\)"),
    "front end without a frame": (lambda: with_frontend(samples=10), "no clip is long enough"),
    "front end of terabytes": (lambda: with_frontend(framing={"n_fft": 1 << 40}), "n_fft"),
    "axis in other digits": (lambda: raw_card('"128"', '"\u00b2"'), "axes"),
    "waveform for a graph of features": (
        lambda: raw_card('"source":"frontend"', '"source":"waveform"'),
        r"waveform makes \(1, 514\)",
    ),
    "output of another name": (lambda: card_with(outputs=outputs("scores")), "outputs are"),
    "output missing in the card": (lambda: card_with(outputs=outputs()[:1]), "outputs are"),
    "output of another rank": (lambda: card_with(outputs=outputs(axes=("batch", "2", "3"))), "output 'logits'"),
    "output of another size": (lambda: card_with(outputs=outputs(axes=("batch", "4"))), "output 'logits'"),
    "more labels than classes": (lambda: tiny_model(classes=2), "3 labels, output 'logits' has 2 classes"),
    "fewer labels than classes": (lambda: tiny_model(classes=7), "3 labels, output 'logits' has 7 classes"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_bad_model_is_refused_with_the_reason(case, tmp_path):
    make, message = BAD_MODELS[case]
    with pytest.raises(ModelFileError, match=message):
        OnnxSession(make())
    path = tmp_path / "bad.onnx"
    path.write_bytes(make())
    with pytest.raises(ModelFileError, match=message) as caught:
        OnnxSession(path)
    assert str(path) in str(caught.value)


def test_external_weights_are_refused_even_where_they_lie_beside_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    onnx.save_model(tiny_proto(), "outside.onnx", save_as_external_data=True, size_threshold=0, location="outside.bin")
    assert (tmp_path / "outside.bin").exists()
    with pytest.raises(ModelFileError, match="external data"):
        OnnxSession("outside.onnx")


def test_the_search_for_external_data_knows_every_way_to_a_tensor():
    names = {
        "ModelProto": "model",
        "TrainingInfoProto": "training",
        "FunctionProto": "function",
        "GraphProto": "graph",
        "NodeProto": "node",
        "AttributeProto": "attribute",
        "SparseTensorProto": "sparse",
        "TensorProto": "tensor",
    }
    messages = onnx.ModelProto.DESCRIPTOR.file.message_types_by_name

    def leads_to_a_tensor(name: str, seen: frozenset[str] = frozenset()) -> bool:
        inside = {field.message_type.name for field in messages[name].fields if field.message_type} - {name} - seen
        known = {inner for inner in inside if inner in messages}
        return name == "TensorProto" or any(leads_to_a_tensor(inner, seen | {name}) for inner in known)

    found = {
        short: {
            field.number: names[field.message_type.name]
            for field in messages[name].fields
            if field.message_type and field.message_type.name in messages and leads_to_a_tensor(field.message_type.name)
        }
        for name, short in names.items()
    }
    assert found == _CHILDREN
    fields = onnx.TensorProto.DESCRIPTOR.fields_by_name
    assert fields["external_data"].number == _TENSOR_EXTERNAL_DATA
    assert fields["data_location"].number == _TENSOR_DATA_LOCATION


def test_every_truncation_of_a_model_is_refused():
    data = tiny_model()
    end_of_fields = {len(data)}
    for length in range(len(data)):
        try:
            check_model_bytes(data[:length], "the model")
        except ModelFileError:
            continue
        end_of_fields.add(length)
    # What passes was cut exactly between two of the outermost fields: a whole message, only without its card or opset.
    assert len(end_of_fields) <= 4
    for length in end_of_fields - {len(data)}:
        with pytest.raises(ModelFileError):
            OnnxSession(data[:length])


def test_random_damage_is_a_typed_error_or_a_working_model():
    data = bytearray(tiny_model())
    rng = np.random.default_rng(3)
    refused = 0
    for _ in range(150):
        damaged = bytearray(data)
        for position in rng.integers(0, 400, 3):
            damaged[position] = rng.integers(0, 256)
        try:
            OnnxSession(bytes(damaged), threads=1)
        except ModelFileError:
            refused += 1
    assert refused > 75


@pytest.mark.parametrize(
    ("model", "message"),
    [("missing.onnx", "does not exist"), (".", "is a folder"), ("a\0b.onnx", "cannot be read")],
)
def test_a_path_that_is_no_file(model, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelFileError, match=message):
        OnnxSession(model)


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", True, 10**6])
def test_bad_threads(threads):
    with pytest.raises(DeviceError, match="threads: got"):
        OnnxSession(tiny_model(), threads=threads)


def test_unknown_device_suggests_the_known_ones():
    with pytest.raises(UnknownNameError, match="cuda"):
        OnnxSession(tiny_model(), device="cuda:0")
    with pytest.raises(UnknownNameError):
        OnnxSession(tiny_model(), device="tpu")


def fake_runtime(monkeypatch: pytest.MonkeyPatch, available: list[str], active: list[str]) -> types.ModuleType:
    class Session:
        def __init__(self, data, options, providers):
            fake.asked_for = providers

        def disable_fallback(self):
            pass

        def get_providers(self):
            return active

    fake = types.ModuleType("onnxruntime")
    fake.__version__ = "1.31.0"
    fake.SessionOptions = types.SimpleNamespace
    fake.get_available_providers = lambda: available
    fake.InferenceSession = Session
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    return fake


def test_cuda_that_is_not_installed_is_an_error_that_says_what_is(monkeypatch):
    fake_runtime(monkeypatch, ["CPUExecutionProvider"], ["CPUExecutionProvider"])
    with pytest.raises(DeviceError, match=r"has only CPUExecutionProvider; install crossfade\[infer-gpu\]"):
        OnnxSession(tiny_model(), device="cuda")


def test_cuda_that_falls_back_to_the_cpu_is_an_error(monkeypatch):
    fake = fake_runtime(monkeypatch, ["CUDAExecutionProvider", "CPUExecutionProvider"], ["CPUExecutionProvider"])
    with pytest.raises(DeviceError, match="fell back to the CPU"):
        OnnxSession(tiny_model(), device="cuda")
    (name, options), _ = fake.asked_for
    assert name == "CUDAExecutionProvider"
    assert options["use_tf32"] == "0"


def test_missing_runtime_names_the_extra(monkeypatch):
    from models_zoo.errors import MissingDependencyError

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"crossfade\[infer\]"):
        OnnxSession(tiny_model())


def test_run_gives_what_the_graph_computes_by_name():
    session = OnnxSession(tiny_model(), threads=1)
    features = np.random.default_rng(0).standard_normal((5, 128, 17)).astype(np.float32)
    found = session.run({"features": features})
    project, classify = (numpy_helper.to_array(tensor) for tensor in tiny_proto().graph.initializer)
    embedding = features.astype(np.float64).mean(axis=2) @ project
    assert list(found) == ["logits", "embedding"]
    np.testing.assert_allclose(found["embedding"], embedding, atol=1e-5)
    np.testing.assert_allclose(found["logits"], embedding @ classify, atol=1e-5)
    assert session.card.labels == LABELS
    assert session.card.labels_sha256 == labels_sha256(LABELS)


@pytest.mark.parametrize(
    ("fed", "code"),
    [
        ({}, "type"),
        ({"waveform": np.zeros((1, 128, 5), np.float32)}, "type"),
        ({"features": np.zeros((1, 128, 5), np.float64)}, "dtype"),
        ({"features": np.zeros((128, 5), np.float32)}, "rank"),
        ({"features": np.zeros((1, 64, 5), np.float32)}, "type"),
    ],
)
def test_bad_feeds(fed, code):
    with pytest.raises(WaveformError) as caught:
        OnnxSession(tiny_model(), threads=1).run(fed)
    assert caught.value.code == code


def test_nan_and_infinity_in_an_output_are_errors():
    session = OnnxSession(tiny_model(), threads=1)
    for value in (np.nan, np.inf):
        with pytest.raises(ModelFileError, match="NaN or infinity"):
            session.run({"features": np.full((1, 128, 5), value, np.float32)})


def test_minus_infinity_is_a_legal_log_probability():
    declared = outputs()
    declared[0]["kind"] = "log_probability"
    proto = tiny_proto()
    proto.graph.node.append(helper.make_node("Log", ["never"], ["logits"]))
    proto.graph.node[-2].output[0] = "raw"
    proto.graph.node.insert(3, helper.make_node("Clip", ["raw", "zero", "zero"], ["never"]))
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(0), "zero"))
    session = OnnxSession(with_metadata(proto, {CARD_KEY: tiny_card(outputs=declared).to_json()}), threads=1)
    assert np.isneginf(session.run({"features": np.ones((1, 128, 5), np.float32)})["logits"]).all()


def test_a_closed_session_says_so():
    session = OnnxSession(tiny_model(), threads=1)
    session.close()
    session.close()
    with pytest.raises(ClosedError, match="closed"):
        session.run({"features": np.zeros((1, 128, 5), np.float32)})


def test_a_session_inherited_through_a_fork_says_so(monkeypatch):
    session = OnnxSession(tiny_model(), threads=1)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(DeviceError, match="forked"):
        session.run({"features": np.zeros((1, 128, 5), np.float32)})
