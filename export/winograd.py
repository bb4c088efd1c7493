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
"""Fewest channels, in and out, of a convolution that is rewritten: from here on it is faster at every length of clip
and size of batch, and with 64 the sums cost what the products save."""


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
    ``LEAST_CHANNELS`` or more.
    """
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    sizes = _sizes(model)
    nodes: list[onnx.NodeProto] = []
    tensors: dict[str, onnx.TensorProto] = {}
    rewritten = 0
    for node in graph.node:
        if not _is_rewritten(node, weights):
            nodes.append(node)
            continue
        rows, columns = (_PAIR if size == 2 else _LONG for size in sizes.get(node.input[0]) or (0, 0))
        nodes += _winograd(node, numpy_helper.to_array(weights[node.input[1]]), rows, columns, tensors)
        rewritten += 1
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.initializer[:]
    graph.initializer.extend([*kept, *tensors.values()])
    return rewritten


def _is_rewritten(node: onnx.NodeProto, weights: dict[str, onnx.TensorProto]) -> bool:
    if node.op_type != "Conv" or node.input[1] not in weights:
        return False
    given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    outputs, inputs, *kernel = weights[node.input[1]].dims
    return (
        kernel == [3, 3]
        and min(inputs, outputs) >= LEAST_CHANNELS
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

    products = np.einsum("ia,jb,ocab->ijoc", rows.weights, columns.weights, weight.astype(np.float64))
    channels = weight.shape[1]
    multiplied = np.empty((len(rows.sums), len(columns.sums)), object)
    for i, j in np.ndindex(multiplied.shape):
        row, column = rows.sums[i], columns.sums[j]
        taps = np.broadcast_to(np.outer(row.taps, column.taps).astype(np.float32), (channels, 1, 2, 2))
        summed = value(
            f"sum_{i}_{j}",
            "Conv",
            [node.input[0], constant(f"winograd/{channels} x {row.taps} x {column.taps}", taps)],
            group=channels,
            kernel_shape=[2, 2],
            strides=[2, 2],
            dilations=[row.dilation, column.dilation],
            pads=[row.before, column.before, row.after, column.after],
        )
        product = constant(f"{name}/weight_{i}_{j}", products[i, j, :, :, None, None].astype(np.float32))
        bias = [each for each in node.input[2:] if (i, j) == (rows.bias, columns.bias)]
        multiplied[i, j] = value(f"product_{i}_{j}", "Conv", [summed, product, *bias], kernel_shape=[1, 1])

    def combined(suffix: str, signs: NDArray[np.int64], values: NDArray[np.object_]) -> str:
        total = ""
        for position, (sign, each) in enumerate(zip(signs, values, strict=True)):
            if sign and total:
                total = value(f"{suffix}_{position}", "Add" if sign > 0 else "Sub", [total, each])
            elif sign:
                total = each  # the first is never subtracted
        return total

    outputs = []
    for row_of_tile, row_signs in enumerate(rows.outputs):
        halves = [combined(f"half_{row_of_tile}_{j}", row_signs, multiplied[:, j]) for j in range(multiplied.shape[1])]
        for column_of_tile, signs in enumerate(columns.outputs):
            outputs.append(combined(f"output_{row_of_tile}_{column_of_tile}", signs, np.array(halves, object)))
    tiles = value("tiles", "Concat", outputs, axis=1)
    whole = value("whole", "DepthToSpace", [tiles], blocksize=2, mode="DCR")
    # An axis of odd size has a row or column too many.
    size = value("size", "Shape", [node.input[0]], start=2)
    cut = [constant("winograd/start", np.zeros(2, np.int64)), size, constant("winograd/axes", np.array([2, 3]))]
    nodes.append(helper.make_node("Slice", [whole, *cut], [name], name=node.name))
    return nodes
