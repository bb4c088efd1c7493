"""Export of the CRNN: every way to join embeddings and every mask, right at every length, batch and token count."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from export.exporter import export_onnx
from export.verify import example_inputs, legal_lengths, verify_onnx
from models_zoo.errors import ExportError, VerificationError
from models_zoo.registry import get_card, list_models
from parity_tests.crnn_contract import features
from parity_tests.networks import card_of
from parity_tests.tolerances import CRNN_EXPORT
from parity_tests.train_torch.test_crnn import small
from train_torch.models import create_model

GRAPHS = {
    "plain": {},
    "global": {"fusion": "global"},
    "frame": {"fusion": "frame"},
    "interpolate": {"fusion": "interpolate", "masks": ["classes_mask"]},
    "pool1d": {"fusion": "pool1d"},
    "masks": {"fusion": "pool1d", "masks": ["classes_mask", "pad_mask"]},
    "removed padding": {"masks": ["pad_mask"], "padding": "removed"},
    "heads": {
        "num_classes": 7,
        "heads": [4, 3],
        "masks": ["classes_mask"],
        "activation": "cg",
        "normalization": "layer",
    },
    "attention over time": {"attention": "time", "masks": ["classes_mask", "pad_mask"]},
    "no attention": {"attention": False, "activation": "leakyrelu", "normalization": "none", "rnn_layers": 1},
    "wide first kernel": {"kernels": [5, 3], "paddings": [2, 1], "pools": [[2, 8], [1, 16]], "activation": "relu"},
}

PUBLISHED = {
    "crnn_2023": {},
    "crnn_2024": {"masks": ["classes_mask", "pad_mask"]},
    "global": {"fusion": "global"},
    "frame": {"fusion": "frame"},
    "interpolate": {"fusion": "interpolate", "masks": ["classes_mask"]},
}
"""Of the sizes of 2023 and 2024 (the rest), with every fusion and mask."""

CORNERS = (
    # (batch, frames, tokens): every batch, the least and the most of everything, more tokens than frames and fewer.
    (1, 1251, 496),
    (5, 313, 5),
    (2, 626, 496),
    (3, 157, 62),
    (4, 101, 31),
    (5, 8, 496),
    (2, 7, 17),
    (3, 5, 496),
    (1, 4, 5),
    (4, 4, 496),
)

FRAMES = (4, 5, 7, 8, 31, 157, 626, 1251)
TOKENS = (5, 17, 496)


def exported(tmp_path, **options):
    """Return a small network, its card, and its graph; the export's own verification is kept to two seconds."""
    model = small(**options)
    card = card_of(model, "crnn", task="event_detection")
    path = tmp_path / "model.onnx"
    export_onnx(model, card.replace(length_policy=card.length_policy.replace(max=32_000)), path)
    return model, card, path


def drawn(model, batch, frames, tokens):
    """Return inputs for so many frames and tokens; masks differ from clip to clip."""
    rng = np.random.default_rng([batch, frames, tokens])
    inputs = {"features": features(frames, batch, frames)}
    scores = model.declared.reduced(frames, axis=0)
    for part in model.inputs[1:]:
        if part.name == "embeddings":
            shape = [batch, *(tokens if axis == "tokens" else int(axis) for axis in part.axes[1:])]
            inputs["embeddings"] = torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
        elif part.name == "classes_mask":
            mask = rng.random((batch, model.declared.num_classes)) < 0.6
            mask[0] = True
            inputs["classes_mask"] = torch.from_numpy(mask)
        else:
            kept = rng.integers(1, scores, batch, endpoint=True)
            inputs["pad_mask"] = torch.from_numpy((np.arange(scores) >= kept[:, None])[:, None])
    return inputs


def worst_difference(model, path, cases):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch, frames, tokens in cases:
        inputs = drawn(model, batch, frames, tokens)
        with torch.no_grad():
            expected = model(**inputs)
        got = session.run(["strong", "weak"], {name: value.numpy() for name, value in inputs.items()})
        for name, value in zip(("strong", "weak"), got, strict=True):
            assert value.shape == tuple(expected[name].shape), (name, batch, frames, tokens)
            worst = max(worst, float(np.abs(value - expected[name].numpy()).max()))
    return worst


@pytest.mark.parametrize("name", GRAPHS)
def test_the_graph_answers_like_the_network(tmp_path, name):
    model, _, path = exported(tmp_path, **GRAPHS[name])
    tokens = "tokens" in {axis for part in model.inputs for axis in part.axes}
    cases = [
        (batch, frames, count)
        for batch, frames in itertools.product((1, 2, 5), FRAMES)
        for count in (TOKENS if tokens else TOKENS[:1])
        if batch * max(frames, 2 * count) < 3000
    ]
    assert {frames for _, frames, _ in cases} == set(FRAMES)
    assert worst_difference(model, path, cases) <= CRNN_EXPORT

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    axes = {part.name: list(part.shape) for part in (*session.get_inputs(), *session.get_outputs())}
    assert axes["features"] == ["batch", 128, "time"]
    assert axes["strong"][2] == "frames"
    assert axes.get("embeddings", ["batch", 20, "tokens"])[2:] in (["tokens"], [])
    recurrent = [node for node in onnx.load(path).graph.node if node.op_type == "GRU"]
    assert len(recurrent) == model.declared.rnn_layers + (name == "frame")
    for node in recurrent:
        assert {a.name: a.i for a in node.attribute}["linear_before_reset"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["masks", "interpolate"])
def test_every_short_length_and_many_long_ones(tmp_path, name):
    model, _, path = exported(tmp_path, **GRAPHS[name])
    lengths = [*range(4, 200), *range(200, 1251, 11), 1251]
    cases = [(1 + frames % 5 if frames < 400 else 1, frames, 5 + 7 * frames % 492) for frames in lengths]
    assert worst_difference(model, path, cases) <= CRNN_EXPORT


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_at_every_corner(tmp_path, name):
    card = get_card(name if name in list_models() else "crnn_2024")
    torch.manual_seed(0)
    model = create_model("crnn", **{**card.options, **PUBLISHED[name]}).eval()
    if PUBLISHED[name]:  # a card's own graph is verified at its one length and at others; variants briefly
        card = card.replace(length_policy=card.length_policy.replace(min=None, max=32_000))
    card = card.replace(inputs=model.inputs, options=model.options)
    done = export_onnx(model, card, tmp_path / "model.onnx")
    assert done.worst <= CRNN_EXPORT
    if not PUBLISHED[name]:
        assert done.lengths == (160_000, 200_000, 280_000)
    assert worst_difference(model, tmp_path / "model.onnx", CORNERS) <= CRNN_EXPORT


def test_a_card_with_one_length_is_verified_at_others():
    card = get_card("crnn_2023")
    assert legal_lengths(card) == [160_000, 200_000, 280_000]
    inputs = example_inputs(get_card("crnn_2024"), 160_000, 3)
    assert inputs["features"].shape == (3, 128, 626)
    assert inputs["embeddings"].shape[:2] == (3, 768)
    assert 5 <= inputs["embeddings"].shape[2] <= 496


def test_examples_of_masks_differ_from_clip_to_clip():
    model = small(masks=["classes_mask", "pad_mask"])
    inputs = example_inputs(card_of(model, "crnn", task="event_detection"), 32_000, 6)
    assert inputs["classes_mask"].dtype == inputs["pad_mask"].dtype == torch.bool
    assert inputs["pad_mask"].shape == (6, 1, 31)
    for mask in (inputs["classes_mask"], inputs["pad_mask"][:, 0]):
        assert mask.sum(1).unique().numel() > 2
        assert not mask[:, 0].any()
    card = card_of(model, "crnn", task="event_detection")
    odd = card.inputs[0].replace(name="numbers", source="caller", axes=("batch", "3"))
    with pytest.raises(ExportError, match="'numbers' comes from 'caller'"):
        example_inputs(card.replace(inputs=[*card.inputs, odd]), 32_000, 2)


def test_a_gru_that_resets_after_the_product_is_refused(tmp_path):
    """Some versions of torch wrote such graphs; their answers are nearly right."""
    model, card, path = exported(tmp_path)
    graph = onnx.load(path)
    for node in graph.graph.node:
        for attribute in node.attribute:
            if attribute.name == "linear_before_reset":
                attribute.i = 0
    onnx.save(graph, path)
    with pytest.raises(VerificationError, match="linear_before_reset 0; torch computes with 1"):
        verify_onnx(path, model, card, lengths=[16_000], batches=[1])


def test_a_frozen_time_axis_is_noticed(tmp_path):
    """What adaptive pooling would leave without its rewriting: verification departs from the traced length."""
    model, card, path = exported(tmp_path, fusion="pool1d")
    other = small(fusion="interpolate")
    other.load_state_dict(model.state_dict())
    with pytest.raises(VerificationError, match="departs from the model"):
        verify_onnx(path, other, card.replace(options=other.options), lengths=[16_000], batches=[2])
