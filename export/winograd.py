"""3x3 convolutions of many channels in Winograd's form: fewer than half of the products, and the same answers.

onnxruntime's own convolution of that kind already keeps a core at its peak, so only fewer products make it faster. A
tile of 2x2 outputs is a sum of 16 products of channels instead of 36; where an axis has the size 2, half of what a
tile covers there is padding, and 12 are enough. The sums before and after cost little where channels are many. The
weights of the products are combined here, in float64, and stored: 16/9 or 12/9 as many as the convolution has.

Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (arXiv 1509.09308), F(2x2, 3x3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper, shape_inference

__all__ = ["LEAST_CHANNELS", "Convolutions", "rewrite_convolutions"]

Convolutions = Literal["winograd", "direct"]
"""How a graph computes its convolutions: in Winograd's form where that is faster on a CPU, or all as they are."""

LEAST_CHANNELS = 128
"""Fewest channels, in and out, of a convolution that is rewritten: from here on it is faster whatever the length of the
clip and the size of the batch, and with 64 the sums cost what the products save."""

_BLOCK = 16
"""onnxruntime's fast convolutions of several groups take channels by as many."""


@dataclass(frozen=True)
class _Sum:
    """A sum of two inputs of each tile: the taps, along one axis, of a convolution with a stride of 2.

    The padding suits axes of even and of odd size, whose last tile is half empty.
    """

    taps: tuple[int, int]
    dilation: int = 1
    before: int = 0
    after: int = 1


@dataclass(frozen=True)
class _Axis:
    """How a tile's two outputs along one axis come from products.

    Attributes:
        sums: of the inputs, one per product.
        weights: ``(products, 3)`` float64, of the convolution's weights.
        outputs: ``(2, products)`` of 1, -1 and 0.
        bias: a product that both outputs add.
    """

    sums: tuple[_Sum, ...]
    weights: NDArray[np.float64]
    outputs: NDArray[np.int64]
    bias: int


_LONG = _Axis(
    sums=(_Sum((1, -1), dilation=2, before=1), _Sum((1, 1)), _Sum((-1, 1)), _Sum((1, -1), dilation=2, after=2)),
    weights=np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]),
    outputs=np.array([[1, 1, 1, 0], [0, 1, -1, -1]]),
    bias=1,
)
_PAIR = _Axis(
    sums=(_Sum((1, 1), after=0), _Sum((0, 1), after=0), _Sum((1, 0), after=0)),
    weights=np.array([[0.0, 1.0, 0.0], [0.0, -1.0, 1.0], [1.0, -1.0, 0.0]]),
    outputs=np.array([[1, 1, 0], [1, 0, 1]]),
    bias=0,
)


def rewrite_convolutions(model: onnx.ModelProto) -> int:
    """Rewrite ``model`` in place, and return the number of convolutions that are in Winograd's form now.

    Those are the 3x3 ones over two axes, with a stride of 1, as many outputs as inputs along both axes, one group, and
    ``LEAST_CHANNELS`` or more, by sixteens.
    """
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    # Where two tensors are equal, as the biases of a fresh network are, torch stores one of them.
    copies = [node for node in graph.node if node.op_type == "Identity" and node.input[0] in weights]
    weights.update({node.output[0]: weights[node.input[0]] for node in copies})
    sizes = _sizes(model)
    nodes: list[onnx.NodeProto] = []
    tensors: dict[str, onnx.TensorProto] = {}
    rewritten: list[onnx.NodeProto] = []
    for node in graph.node:
        if not _is_rewritten(node, weights):
            nodes.append(node)
            continue
        rows, columns = (_PAIR if size == 2 else _LONG for size in sizes.get(node.input[0]) or (0, 0))
        weight, bias = (*(numpy_helper.to_array(weights[each]) for each in node.input[1:]), None)[:2]
        nodes += _winograd(node, weight, bias, rows, columns, tensors)
        rewritten.append(node)
    if not rewritten:
        return 0
    idle = {name for node in rewritten for name in node.input} - {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name not in idle]
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.initializer[:]
    graph.initializer.extend([*kept, *tensors.values()])
    return len(rewritten)


def _is_rewritten(node: onnx.NodeProto, weights: dict[str, onnx.TensorProto]) -> bool:
    if node.op_type != "Conv" or not weights.keys() >= set(node.input[1:]):
        return False
    given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    outputs, inputs, *kernel = weights[node.input[1]].dims
    return (
        kernel == [3, 3]
        and min(inputs, outputs) >= LEAST_CHANNELS
        and inputs % _BLOCK == outputs % _BLOCK == 0
        and given.get("auto_pad", b"NOTSET") == b"NOTSET"
        and given.get("group", 1) == 1
        and given.get("pads") == [1, 1, 1, 1]
        and {*given.get("strides", ()), *given.get("dilations", ())} <= {1}
    )


def _sizes(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Return name -> the sizes of the axes behind the second, 0 where a size is free."""
    graph = model.graph
    # Weights become inputs: inference would copy them twice.
    small = [tensor for tensor in graph.initializer if len(tensor.dims) < 2]
    large = [tensor for tensor in graph.initializer if len(tensor.dims) >= 2]
    light = helper.make_graph(
        graph.node,
        graph.name,
        [*graph.input, *(helper.make_tensor_value_info(each.name, each.data_type, each.dims) for each in large)],
        graph.output,
        small,
    )
    inferred = shape_inference.infer_shapes(
        helper.make_model(light, opset_imports=model.opset_import, ir_version=model.ir_version)
    ).graph
    return {
        value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim[2:]]
        for value in (*inferred.input, *inferred.value_info)
    }


def _winograd(
    node: onnx.NodeProto,
    weight: NDArray[np.float32],
    bias: NDArray[np.float32] | None,
    rows: _Axis,
    columns: _Axis,
    tensors: dict[str, onnx.TensorProto],
) -> list[onnx.NodeProto]:
    """Return the nodes in place of ``node``; what they are given besides is added to ``tensors``."""
    nodes: list[onnx.NodeProto] = []
    name = node.output[0]

    def value(suffix: str, operator: str, inputs: list[str], **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, [f"{name}/{suffix}"], **attributes))
        return f"{name}/{suffix}"

    def constant(name: str, array: NDArray[Any]) -> str:
        tensors.setdefault(name, numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    outputs, channels = weight.shape[:2]
    sums = []
    for i, row in enumerate(rows.sums):
        for j, column in enumerate(columns.sums):
            taps = np.broadcast_to(np.outer(row.taps, column.taps).astype(np.float32), (channels, 1, 2, 2))
            taken = [node.input[0], constant(f"winograd/{channels} x {row.taps} x {column.taps}", taps)]
            sums.append(
                value(
                    f"sum_{i}_{j}",
                    "Conv",
                    taken,
                    group=channels,
                    kernel_shape=[2, 2],
                    strides=[2, 2],
                    dilations=[row.dilation, column.dilation],
                    pads=[row.before, column.before, row.after, column.after],
                )
            )
    # As one convolution of many groups, not many of one: their weights are one tensor, and loading leaves no gaps.
    combined = np.einsum("ia,jb,ocab->ijoc", rows.weights, columns.weights, weight.astype(np.float64))
    given = [
        value("sums", "Concat", sums, axis=1),
        constant(f"{name}/weights", combined.reshape(-1, channels, 1, 1).astype(np.float32)),
    ]
    if bias is not None:
        spread = np.zeros((len(rows.sums), len(columns.sums), outputs), np.float32)
        spread[rows.bias, columns.bias] = bias
        given.append(constant(f"{name}/bias", spread.reshape(-1)))
    products = value("products", "Conv", given, group=len(sums), kernel_shape=[1, 1])

    signs = np.kron(rows.outputs, columns.outputs).astype(np.float32)  # (4, products), of the four outputs of a tile
    flat = value("flat", "Reshape", [products, constant(f"winograd/{len(sums)}", np.array([0, len(sums), -1]))])
    tiles = value("tiles", "MatMul", [constant(f"winograd/{signs.shape}", signs), flat])
    shape = [
        constant(f"winograd/4 x {outputs}", np.array([0, 4 * outputs])),
        value("grid", "Shape", [products], start=2),
    ]
    tiles = value("channels", "Reshape", [tiles, value("shape", "Concat", shape, axis=0)])
    whole = value("whole", "DepthToSpace", [tiles], blocksize=2, mode="DCR")
    # An axis of odd size has a row or column too many.
    size = value("size", "Shape", [node.input[0]], start=2)
    cut = [constant("winograd/start", np.zeros(2, np.int64)), size, constant("winograd/axes", np.array([2, 3]))]
    nodes.append(helper.make_node("Slice", [whole, *cut], [name], name=node.name))
    return nodes
