"""A model small enough to write down: features -> mean over time -> two matrices, with a card inside."""

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
