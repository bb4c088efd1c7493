"""Winograd's form: the answers of the convolution it replaces, where it is used, and that verification looks at it."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from export import pt2onnx, winograd
from export.exporter import export_onnx
from export.verify import example_inputs
from export.winograd import LEAST_CHANNELS, rewrite_convolutions
from models_zoo.cards import CONVOLUTIONS_KEY
from models_zoo.errors import VerificationError
from parity_tests.networks import card_of, lively
from parity_tests.tolerances import LOGITS, WINOGRAD
from train_torch.checkpoint import save_checkpoint

PLAIN = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [1, 1], "dilations": [1, 1], "group": 1}


def graph_of(inputs=LEAST_CHANNELS, outputs=LEAST_CHANNELS, *, mel=8, bias=True, **attributes):
    """Return a model of one convolution of ``(batch, inputs, time, mel)``, its weight and its bias."""
    attributes = {**PLAIN, **attributes}
    shape = (outputs, inputs // attributes["group"], *attributes["kernel_shape"])
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal(shape) / np.prod(shape[1:]) ** 0.5).astype(np.float32)
    tensors = {"weight": weight, "bias": rng.standard_normal(outputs).astype(np.float32)}
    given = ["weight", "bias"] if bias else ["weight"]
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", *given], ["y"], **attributes)],
        "one convolution",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", inputs, "time", mel])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", outputs, "frames", None])],
        [numpy_helper.from_array(tensors[name], name) for name in given],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), *tensors.values()


def session_of(model):
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def kernels(path):
    """Return how many convolutions of each kernel an exported file holds."""
    graph = onnx.load(path).graph
    shapes = {tensor.name: tuple(tensor.dims[2:]) for tensor in graph.initializer}
    held = [shapes[node.input[1]] for node in graph.node if node.op_type == "Conv"]
    return {kernel: held.count(kernel) for kernel in set(held)}


@pytest.mark.parametrize(
    ("inputs", "outputs", "mel", "bias", "products"),
    [
        (128, 128, 2, True, 12),
        (128, 160, 3, True, 16),
        (144, 128, 8, False, 16),
        (128, 256, 1, True, 16),
        (128, 128, "mel", True, 16),
    ],
)
def test_it_answers_like_the_convolution(inputs, outputs, mel, bias, products):
    model, weight, added = graph_of(inputs, outputs, mel=mel, bias=bias)
    assert rewrite_convolutions(model) == 1
    onnx.checker.check_model(model, full_check=True)
    assert [products * outputs, inputs, 1, 1] in [list(tensor.dims) for tensor in model.graph.initializer]
    assert "weight" not in {tensor.name for tensor in model.graph.initializer}
    session = session_of(model)
    for batch, time in ((1, 1), (1, 2), (3, 7), (2, 12)):
        for columns in (mel,) if isinstance(mel, int) else (2, 5):
            x = np.random.default_rng(time).standard_normal((batch, inputs, time, columns)).astype(np.float32)
            found = session.run(None, {"x": x})[0]
            expected = torch.nn.functional.conv2d(
                torch.from_numpy(x).double(),
                torch.from_numpy(weight).double(),
                torch.from_numpy(added).double() if bias else None,
                padding=1,
            ).numpy()
            assert found.shape == expected.shape
            np.testing.assert_allclose(found, expected, rtol=0, atol=WINOGRAD)


def test_a_bias_that_another_layer_has_as_well():
    """torch stores equal tensors once, and gives the second layer a copy."""
    model = graph_of()[0]
    model.graph.node[0].input[2] = "copied"
    model.graph.node.insert(0, helper.make_node("Identity", ["bias"], ["copied"]))
    x = np.random.default_rng(0).standard_normal((1, LEAST_CHANNELS, 5, 8)).astype(np.float32)
    expected = session_of(model).run(None, {"x": x})[0]
    assert rewrite_convolutions(model) == 1
    np.testing.assert_allclose(session_of(model).run(None, {"x": x})[0], expected, rtol=0, atol=WINOGRAD)


@pytest.mark.parametrize(
    "changed",
    [
        {"inputs": LEAST_CHANNELS - 16},
        {"outputs": LEAST_CHANNELS - 16},
        {"inputs": LEAST_CHANNELS + 8},
        {"outputs": LEAST_CHANNELS + 8},
        {"strides": [2, 1]},
        {"dilations": [2, 1], "pads": [2, 1, 2, 1]},
        {"pads": [0, 0, 0, 0]},
        {"inputs": 2 * LEAST_CHANNELS, "group": 2},
        {"kernel_shape": [1, 3], "pads": [0, 1, 0, 1]},
    ],
    ids=str,
)
def test_other_convolutions_stay(changed):
    model = graph_of(**changed)[0]
    before = model.SerializeToString(deterministic=True)
    assert rewrite_convolutions(model) == 0
    assert model.SerializeToString(deterministic=True) == before


@pytest.fixture(scope="module")
def example():
    model = lively("cnn14", num_classes=3, width=0.125)  # 128 channels in its fifth block, 256 in its sixth
    card = card_of(model, "cnn14")
    return model, card.replace(length_policy=card.length_policy.replace(max=12_000))


@pytest.fixture(scope="module")
def rewritten(example, tmp_path_factory):
    path = tmp_path_factory.mktemp("rewritten") / "model.onnx"
    export_onnx(*example, path)
    return path


def test_an_export_holds_it(rewritten):
    # The fifth block's second convolution is over four mel bands, both of the sixth's over two.
    assert kernels(rewritten) == {(3, 3): 9, (2, 2): 16 + 12 + 12, (1, 1): 3}
    assert {entry.key: entry.value for entry in onnx.load(rewritten).metadata_props}[CONVOLUTIONS_KEY] == (
        "winograd (3 of them)"
    )


def test_an_export_without_it(example, rewritten, tmp_path, capsys):
    """Through the command, which is given the choice."""
    model, card = example
    save_checkpoint(tmp_path / "model.safetensors", model, card)
    command = [str(tmp_path / "model.safetensors"), "-o", str(tmp_path / "model.onnx"), "--convolutions", "direct"]
    assert pt2onnx.main(command) == 0, capsys.readouterr().err
    assert kernels(tmp_path / "model.onnx") == {(3, 3): 12}
    held = {entry.key: entry.value for entry in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert held[CONVOLUTIONS_KEY] == "direct"

    inputs = {name: value.numpy() for name, value in example_inputs(card, 12_000, 2).items()}
    direct, fast = (
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, inputs)
        for path in (tmp_path / "model.onnx", rewritten)
    )
    for one, other in zip(direct, fast, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=LOGITS * max(1.0, one.std()))


def test_verification_sees_a_wrong_form(example, tmp_path, monkeypatch):
    long = winograd._LONG
    wrong = dataclasses.replace(long, weights=long.weights * np.array([[1, 1, 0.999]]))
    monkeypatch.setattr(winograd, "_LONG", wrong)
    with pytest.raises(VerificationError, match="departs from the model"):
        export_onnx(*example, tmp_path / "model.onnx")
    assert os.listdir(tmp_path) == []
