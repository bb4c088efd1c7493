"""Models small enough to write down, with a card inside.

One of clips: features -> mean over time -> two matrices. One of events: features -> a convolution over time -> scores
of every fourth frame, which depend on where a window begins and ends, as those of real networks do.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from models_zoo.cards import CARD_KEY, ModelCard
from models_zoo.presets import get_frontend

LABELS = ("clap", "hum", "whistle")
EMBEDDING = 8


def tiny_card(**changes: Any) -> ModelCard:
    """Return the card of :func:`tiny_model`, with ``changes``."""
    fields: dict[str, Any] = {
        "name": "tiny",
        "system": "test",
        "task": "single_label",
        "architecture": "tiny",
        "inputs": [{"name": "features", "axes": ["batch", "128", "time"], "source": "frontend"}],
        "outputs": [
            {"name": "logits", "role": "clip", "kind": "logit", "axes": ["batch", "classes"]},
            {"name": "embedding", "role": "embedding", "axes": ["batch", str(EMBEDDING)]},
        ],
        "frontend": get_frontend("efficientat").to_dict(),
        "labels": list(LABELS),
        "license": "CC0-1.0",
        "metrics": {"accuracy": 0.5},
    }
    return ModelCard.from_dict({**fields, **changes})


def tiny_proto(
    *,
    axes: tuple[Any, ...] = ("batch", 128, "time"),
    classes: int = len(LABELS),
    scale: float = 1.0,
    seed: int = 0,
) -> onnx.ModelProto:
    """Return the graph without a card: ``features`` -> ``logits`` ``(batch, classes)`` and ``embedding``."""
    rng = np.random.default_rng(seed)
    weights = {
        "project": (rng.standard_normal((128, EMBEDDING)) * 0.2).astype(np.float32),
        "classify": (rng.standard_normal((EMBEDDING, classes)) * scale).astype(np.float32),
    }
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["features"], ["mean"], axes=[2], keepdims=0),
            helper.make_node("MatMul", ["mean", "project"], ["embedding"]),
            helper.make_node("MatMul", ["embedding", "classify"], ["logits"]),
        ],
        "tiny",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, axes)],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, [axes[0], classes]),
            helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [axes[0], EMBEDDING]),
        ],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def with_metadata(proto: onnx.ModelProto, metadata: Mapping[str, str]) -> bytes:
    """Return the file's bytes with ``metadata`` inside."""
    helper.set_model_props(proto, dict(metadata))
    return proto.SerializeToString()


def tiny_model(card: ModelCard | None = None, **graph: Any) -> bytes:
    """Return a model's bytes with its card inside."""
    card = card or tiny_card()
    graph.setdefault("classes", len(card.labels or LABELS))
    return with_metadata(tiny_proto(**graph), {CARD_KEY: card.to_json()})


def write_tiny(path: Path, card: ModelCard | None = None, **graph: Any) -> Path:
    """Write :func:`tiny_model` to ``path`` and return it."""
    path.write_bytes(tiny_model(card, **graph))
    return path


EVENT_LABELS = ("hiss", "hum", "tick", "whistle")
TOKEN_SIZE = 6


def event_card(*, embeddings: bool = False, mask: bool = False, turned: bool = True, **changes: Any) -> ModelCard:
    """Return the card of :func:`event_model`, with ``changes``."""
    classes = str(len(EVENT_LABELS))
    inputs = [{"name": "features", "axes": ["batch", "128", "time"], "source": "frontend"}]
    if embeddings:
        inputs.append({"name": "embeddings", "axes": ["batch", str(TOKEN_SIZE), "tokens"], "source": "encoder"})
    if mask:
        inputs.append({"name": "classes_mask", "dtype": "bool", "axes": ["batch", classes], "source": "caller"})
    axes = ["batch", classes, "frames"] if turned else ["batch", "frames", classes]
    fields: dict[str, Any] = {
        "task": "event_detection",
        "inputs": inputs,
        "outputs": [
            {"name": "strong", "role": "frame", "kind": "probability", "axes": axes, "hop": 4},
            {"name": "weak", "role": "clip", "kind": "probability", "axes": ["batch", classes]},
        ],
        "frontend": get_frontend("dcase_2023").to_dict(),
        "labels": list(EVENT_LABELS),
    }
    return tiny_card(**{**fields, **changes})


def event_model(card: ModelCard | None = None, *, seed: int = 0, scale: float = 1.0) -> bytes:
    """Return the bytes of a model that scores frames: ``features`` and what else the card asks for -> its outputs."""
    card = card or event_card()
    rng = np.random.default_rng(seed)
    classes = len(EVENT_LABELS)
    kernel = rng.standard_normal((classes, 128, 9)).astype(np.float32)
    kernel -= kernel.mean(axis=(1, 2), keepdims=True)
    weights = {"kernel": kernel * np.float32(scale), "bias": np.zeros(classes, np.float32)}
    inputs = {part.name: part for part in card.inputs}
    nodes = [
        helper.make_node("Conv", ["features", "kernel", "bias"], ["heard"], pads=[4, 4]),
        helper.make_node("AveragePool", ["heard"], ["pooled"], kernel_shape=[4], strides=[4]),
    ]
    last = "pooled"
    if "embeddings" in inputs:
        weights["shrink"] = rng.standard_normal((TOKEN_SIZE, classes)).astype(np.float32)
        weights["column"] = np.array([2], np.int64)
        nodes += [
            helper.make_node("ReduceMean", ["embeddings"], ["token"], axes=[2], keepdims=0),
            helper.make_node("MatMul", ["token", "shrink"], ["shrunk"]),
            helper.make_node("Unsqueeze", ["shrunk", "column"], ["fused"]),
            helper.make_node("Add", [last, "fused"], ["sum"]),
        ]
        last = "sum"
    nodes.append(helper.make_node("Sigmoid", [last], ["scores"]))
    last = "scores"
    if "classes_mask" in inputs:
        weights["column"] = np.array([2], np.int64)
        nodes += [
            helper.make_node("Cast", ["classes_mask"], ["valid"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["valid", "column"], ["valid_column"]),
            helper.make_node("Mul", [last, "valid_column"], ["masked"]),
        ]
        last = "masked"
    turned = card.outputs[0].time_axis == 2
    nodes += [
        helper.make_node("Identity", [last], ["strong"])
        if turned
        else helper.make_node("Transpose", [last], ["strong"], perm=[0, 2, 1]),
        helper.make_node("ReduceMax", [last], ["weak"], axes=[2], keepdims=0),
    ]
    types = {"float32": TensorProto.FLOAT, "bool": TensorProto.BOOL}

    def described(part: Any, dtype: int) -> Any:
        axes = [int(axis) if axis.isdigit() else axis for axis in part.axes]
        return helper.make_tensor_value_info(part.name, dtype, axes)

    graph = helper.make_graph(
        nodes,
        "events",
        [described(part, types[part.dtype]) for part in card.inputs],
        [described(part, TensorProto.FLOAT) for part in card.outputs],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return with_metadata(proto, {CARD_KEY: card.to_json()})


def write_events(path: Path, card: ModelCard | None = None, **graph: Any) -> Path:
    """Write :func:`event_model` to ``path`` and return it."""
    path.write_bytes(event_model(card, **graph))
    return path


def encoder_card(size: int = TOKEN_SIZE, *, frontend: str = "dcase_2023", **changes: Any) -> ModelCard:
    """Return the card of :func:`write_encoder`, with ``changes``."""
    fields: dict[str, Any] = {
        "name": "tiny-encoder",
        "task": "embedding",
        "outputs": [{"name": "tokens", "role": "embedding", "axes": ["batch", str(size), "tokens"]}],
        "frontend": get_frontend(frontend).to_dict(),
        "length_policy": {"min": 16 * 256, "short": "zero"},
        "labels": None,
        "metrics": {},
    }
    return tiny_card(**{**fields, **changes})


def write_encoder(path: Path, card: ModelCard | None = None, *, seed: int = 1) -> Path:
    """Write a model that turns every 16 frames of ``features`` into a token, and return its path."""
    card = card or encoder_card()
    size = int(card.outputs[0].axes[1])
    kernel = (np.random.default_rng(seed).standard_normal((size, 128, 16)) * 0.1).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["features", "kernel"], ["tokens"], strides=[16])],
        "encoder",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ("batch", 128, "time"))],
        [helper.make_tensor_value_info("tokens", TensorProto.FLOAT, ("batch", size, "tokens"))],
        [numpy_helper.from_array(kernel, "kernel")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(with_metadata(proto, {CARD_KEY: card.to_json()}))
    return path
