"""A graph of one clip becomes a graph of any batch."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.compose
from onnx import helper, numpy_helper

from models_zoo.cards import ModelCard, ModelInput, ModelOutput

__all__ = ["clip_by_clip"]

_ONNX_TYPES = {"float32": onnx.TensorProto.FLOAT, "int64": onnx.TensorProto.INT64, "bool": onnx.TensorProto.BOOL}
_AXIS = "clip/batch_axis"


def clip_by_clip(model: onnx.ModelProto, card: ModelCard) -> onnx.ModelProto:
    """Return a graph that applies ``model``, whose batch is fixed at 1, to one clip of its batch after the other.

    The first axis of every input and output on the card is the batch. ONNX's ``Scan`` does the work; the weights lie
    inside its body, where onnxruntime's optimisations reach them.
    """
    body = onnx.compose.add_prefix_graph(model.graph, "clip/")
    taken = [_value(f"clip/one_{part.name}", part, part.axes[1:]) for part in card.inputs]
    given = [_value(f"clip/one_{part.name}", part, part.axes[1:]) for part in card.outputs]
    unsqueezed = [
        helper.make_node("Unsqueeze", [one.name, _AXIS], [f"clip/{part.name}"])
        for one, part in zip(taken, card.inputs, strict=True)
    ]
    squeezed = [
        helper.make_node("Squeeze", [f"clip/{part.name}", _AXIS], [one.name])
        for one, part in zip(given, card.outputs, strict=True)
    ]
    one_clip = helper.make_graph(
        [*unsqueezed, *body.node, *squeezed],
        "one_clip",
        taken,
        given,
        [*body.initializer, numpy_helper.from_array(np.array([0], np.int64), _AXIS)],
    )
    scan = helper.make_node(
        "Scan",
        [part.name for part in card.inputs],
        [part.name for part in card.outputs],
        name="clips",
        body=one_clip,
        num_scan_inputs=len(card.inputs),
    )
    graph = helper.make_graph(
        [scan],
        "batch",
        [_value(part.name, part, part.axes) for part in card.inputs],
        [_value(part.name, part, part.axes) for part in card.outputs],
    )
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _value(name: str, part: ModelInput | ModelOutput, axes: tuple[str, ...]) -> onnx.ValueInfoProto:
    dtype = part.dtype if isinstance(part, ModelInput) else "float32"
    return helper.make_tensor_value_info(
        name, _ONNX_TYPES[dtype], [int(axis) if axis.isdecimal() else axis for axis in axes]
    )
