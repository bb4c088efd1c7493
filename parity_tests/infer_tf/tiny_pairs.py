"""Models of sound and pictures small enough to write down, recordings, pictures and videos for them."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from models_zoo.cards import CARD_KEY, ModelCard
from models_zoo.images import ImageSpec
from models_zoo.presets import get_frontend
from parity_tests.infer_tf.tiny import LABELS, with_metadata

SIZE = 32
RATE = 16000
WIDTH = 8

Kind = Literal["joint", "towers", "pictures", "sounds"]

_FEATURES = {"name": "features", "axes": ["batch", "time", "128"], "source": "frontend"}
_IMAGE = {"name": "image", "axes": ["batch", "3", str(SIZE), str(SIZE)], "source": "image"}


def pair_card(kind: Kind, **changes: Any) -> ModelCard:
    """Return the card of :func:`pair_model`, with ``changes``."""
    hears, looks = kind != "pictures", kind != "sounds"
    axes = ["batch", str(WIDTH)]
    if kind == "towers":
        outputs: list[dict[str, Any]] = [
            {"name": f"{name}_embedding", "role": "embedding", "axes": axes, "needs": [needed]}
            for name, needed in (("audio", "features"), ("image", "image"))
        ]
    else:
        scores = ["batch", str(len(LABELS))]
        outputs = [
            {"name": "logits", "role": "clip", "kind": "logit", "axes": scores},
            {"name": "embedding", "role": "embedding", "axes": axes},
        ]
    fields: dict[str, Any] = {
        "name": f"tiny-{kind}",
        "system": "test",
        "task": "embedding" if kind == "towers" else "single_label",
        "architecture": "tiny",
        "inputs": [_FEATURES] * hears + [_IMAGE] * looks,
        "outputs": outputs,
        "frontend": get_frontend("cav_mae").replace(frames=None).to_dict() if hears else None,
        "image": ImageSpec(size=SIZE).to_dict() if looks else None,
        "labels": None if kind == "towers" else list(LABELS),
    }
    return ModelCard.from_dict({**fields, **changes})


def pair_model(card: ModelCard, *, seed: int = 0) -> bytes:
    """Return a model's bytes: the mean frame and the pixels, projected; added up, or an embedding each."""
    rng = np.random.default_rng(seed)
    names = [part.name for part in card.inputs]
    weights = {
        "hear": (rng.standard_normal((128, WIDTH)) * 0.2).astype(np.float32),
        "look": (rng.standard_normal((3 * SIZE * SIZE, WIDTH)) * 0.02).astype(np.float32),
        "classify": rng.standard_normal((WIDTH, len(LABELS))).astype(np.float32),
    }
    nodes = []
    if "features" in names:
        nodes += [
            helper.make_node("ReduceMean", ["features"], ["frame"], axes=[1], keepdims=0),
            helper.make_node("MatMul", ["frame", "hear"], ["audio_embedding"]),
        ]
    if "image" in names:
        nodes += [
            helper.make_node("Flatten", ["image"], ["pixels"]),
            helper.make_node("MatMul", ["pixels", "look"], ["image_embedding"]),
        ]
    if card.clip_output() is not None:
        sides = [f"{side}_embedding" for side, name in (("audio", "features"), ("image", "image")) if name in names]
        nodes += [
            helper.make_node("Sum", sides, ["embedding"]),
            helper.make_node("MatMul", ["embedding", "classify"], ["logits"]),
        ]

    def described(part: Any) -> Any:
        axes = [int(axis) if axis.isdigit() else axis for axis in part.axes]
        return helper.make_tensor_value_info(part.name, TensorProto.FLOAT, axes)

    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "pair",
        [described(part) for part in card.inputs],
        [described(part) for part in card.outputs],
        [numpy_helper.from_array(value, name) for name, value in weights.items() if name in used],
    )
    proto: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return with_metadata(proto, {CARD_KEY: card.to_json()})


def write_pair(path: Path, kind: Kind, *, seed: int = 0, **changes: Any) -> Path:
    """Write :func:`pair_model` to ``path`` and return it."""
    path.write_bytes(pair_model(pair_card(kind, **changes), seed=seed))
    return path


def picture(seed: int, width: int = 48, height: int = 40) -> NDArray[np.uint8]:
    """Return ``(height, width, 3)`` uint8: coarse noise, another for each seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST))


def write_picture(path: Path, seed: int, **size: int) -> Path:
    """Write :func:`picture` to ``path`` and return it."""
    Image.fromarray(picture(seed, **size)).save(path)
    return path


def video(seconds: float = 2.0, *, seed: int = 0, pictures: bool = True, heard: bool = True) -> bytes:
    """Return the bytes of a lossless video (Matroska) of 5 pictures per second, each another one, and of noise."""
    stream = io.BytesIO()
    with av.open(stream, "w", format="matroska") as output:
        if pictures:
            track = output.add_stream("ffv1", rate=5)
            track.width, track.height, track.pix_fmt = 48, 40, "bgr0"
        if heard:
            line = output.add_stream("flac", rate=RATE, layout="mono", format="s16")
        if pictures:
            for index in range(round(5 * seconds)):
                frame = av.VideoFrame.from_ndarray(picture(100 * seed + index), format="rgb24")
                frame.pts, frame.time_base = index, Fraction(1, 5)
                output.mux(track.encode(frame))
            output.mux(track.encode())
        if heard:
            noise = np.random.default_rng(seed).standard_normal(round(RATE * seconds))
            samples = (3000 * noise).clip(-32768, 32767).astype(np.int16)
            for first in range(0, len(samples), 4096):
                packed = av.AudioFrame.from_ndarray(samples[None, first : first + 4096], format="s16", layout="mono")
                packed.sample_rate, packed.pts, packed.time_base = RATE, first, Fraction(1, RATE)
                output.mux(line.encode(packed))
            output.mux(line.encode())
    return stream.getvalue()
