"""A look inside an ONNX file before any runtime opens it: is it whole, and does it stand alone?

The production install has no ``onnx`` package, and onnxruntime resolves references to other files (and, in crafted
files, to memory addresses) while it loads. So the few protobuf fields that can hold such a reference are walked
here first; nothing is decoded but field numbers and lengths.

Source: https://protobuf.dev/programming-guides/encoding and the field numbers of ``onnx/onnx.proto``.
"""

from __future__ import annotations

from collections.abc import Iterator

from models_zoo.errors import ModelFileError

__all__ = ["check_model_bytes"]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

# message -> {field number: message inside}; only the paths that lead to a TensorProto.
_CHILDREN: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
_GRAPH, _IR_VERSION = 7, 1
_TENSOR_EXTERNAL_DATA, _TENSOR_DATA_LOCATION = 13, 14


class _MalformedError(Exception):
    """The bytes are no protobuf message."""


def _varint(data: memoryview, position: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while position < end and shift < 70:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise _MalformedError


def _fields(data: memoryview, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield (field number, start, end) of a message's fields; a varint's value stands in place of start."""
    position = start
    while position < end:
        key, position = _varint(data, position, end)
        number, wire = key >> 3, key & 7
        if number == 0:
            raise _MalformedError
        if wire == _VARINT:
            value, position = _varint(data, position, end)
            yield number, value, value
            continue
        if wire == _BYTES:
            length, position = _varint(data, position, end)
        elif wire in (_FIXED64, _FIXED32):
            length = 8 if wire == _FIXED64 else 4
        else:
            raise _MalformedError
        if position + length > end:
            raise _MalformedError
        yield number, position, position + length
        position += length


def _external_tensors(data: memoryview) -> bool:
    """Return whether any tensor of the model keeps its values outside the file."""
    waiting = [("model", 0, len(data))]
    while waiting:
        message, start, end = waiting.pop()
        children = _CHILDREN[message]
        for number, first, last in _fields(data, start, end):
            if message == "tensor" and (
                number == _TENSOR_EXTERNAL_DATA or (number == _TENSOR_DATA_LOCATION and first != 0)
            ):
                return True
            if number in children:
                waiting.append((children[number], first, last))
    return False


def check_model_bytes(data: bytes, name: str) -> None:
    """Refuse bytes that are not one whole, self-contained ONNX model.

    Args:
        data: contents of the file.
        name: how to call it in messages.

    Raises:
        ModelFileError: empty, not an ONNX model, truncated, or with weights in another file.
    """
    if not data:
        raise ModelFileError(f"{name} is empty (0 bytes); expected an ONNX file written by export/pt2onnx.py")
    view = memoryview(data)
    # ModelProto begins with its ir_version, a small varint, whatever wrote it.
    looks_like_onnx = data[0] == _IR_VERSION << 3 and len(data) > 2 and data[1] < 0x80
    try:
        has_graph = any(number == _GRAPH for number, _, _ in _fields(view, 0, len(view)))
        external = _external_tensors(view)
    except _MalformedError:
        if looks_like_onnx:
            raise ModelFileError(
                f"{name} is a damaged or truncated ONNX file ({len(data)} bytes); copy or export it again"
            ) from None
        has_graph = external = False
    if not has_graph:
        raise ModelFileError(f"{name} is not an ONNX file; expected one written by export/pt2onnx.py")
    if external:
        raise ModelFileError(
            f"{name} keeps weights in another file (external data), which is refused: a model is one file; "
            "export it again with export/pt2onnx.py, or save it with all weights inside"
        )
