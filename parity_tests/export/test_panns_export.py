"""Export of the PANNs: two inputs, frame scores, and lengths at which onnxruntime answers without a right to."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

from export.exporter import export_onnx
from export.verify import example_inputs, legal_lengths, verify_onnx
from models_zoo.errors import ClipLengthError
from parity_tests.networks import card_of, lively
from parity_tests.tolerances import LOGITS
from train_torch.frontend import TorchFrontend

LENGTHS = (10_240, 10_880, 16_000, 32_000, 44_160, 64_000, 99_840, 320_000)
"""Samples at 32 kHz, legal for every network here: multiples of 640 from the wavegram's minimum to 10 s."""
ODD_LENGTHS = (9_920, 9_921, 10_559, 16_001, 33_333, 44_100, 100_001, 320_000)
"""Of networks without a waveform: the minimum, and no multiples of anything."""
BATCHES = (1, 2, 5)

BARS = ("cnn14", "cnn10", "mobilenetv1", "resnet38", "cnn14_decisionlevelmax", "wavegram_logmel_cnn14")
OTHERS = (
    *("cnn6", "cnn14_emb32", "cnn14_decisionlevelavg", "cnn14_decisionlevelatt", "transfer_cnn14"),
    *("resnet22", "resnet54", "mobilenetv2", "wavegram_cnn14"),
)


def narrow(name, **options):
    """Return a network with an eighth of the published channels, half of those few a MobileNet has, and its card."""
    width = 0.5 if name.startswith("mobilenet") else 0.125
    model = lively(name, num_classes=6, width=width, **options)
    return model, card_of(model, name)


def exported(tmp_path, model, card):
    """Return the graph of a model; the export's own verification is kept short, as the tests verify more."""
    card = card.replace(length_policy=card.length_policy.replace(max=16_000))
    export_onnx(model, card, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.mark.parametrize("name", [*BARS, *OTHERS])
def test_the_graph_answers_like_the_model(tmp_path, name):
    model, card = narrow(name)
    path = exported(tmp_path, model, card)
    lengths = ODD_LENGTHS if len(card.inputs) == 1 and card.inputs[0].name == "features" else LENGTHS
    lengths = lengths if name in BARS else lengths[:-1:3]
    done = verify_onnx(path, model, card, lengths=lengths, batches=BATCHES)
    assert (done.lengths, done.batches, done.cases) == (lengths, BATCHES, len(lengths) * len(BATCHES))
    assert done.worst <= LOGITS

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for part, node in zip(card.inputs, session.get_inputs(), strict=True):
        assert node.shape == [int(axis) if axis.isdecimal() else axis for axis in part.axes]
        assert {"batch", "time"} <= set(node.shape) or {"batch", "samples"} <= set(node.shape)
    inputs = {key: value.numpy() for key, value in example_inputs(card, 20_480, 5).items()}
    together = session.run(None, inputs)
    assert np.abs(together[0] - together[0][:1]).max() > 0.01, "a dead network agrees with anything"
    alone = session.run(None, {key: value[3:4] for key, value in inputs.items()})
    for many, one in zip(together, alone, strict=True):
        np.testing.assert_allclose(many[3:4], one, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cnn14", "cnn10", "mobilenetv1"])
def test_the_published_size_exports(tmp_path, name):
    model = lively(name)
    card = card_of(model, name, task="multi_label")
    done = verify_onnx(exported(tmp_path, model, card), model, card, lengths=(32_000,), batches=(2,))
    assert done.worst <= LOGITS


def test_verification_keeps_to_multiples():
    _, card = narrow("wavegram_logmel_cnn14")
    lengths = legal_lengths(card)
    assert (lengths[0], lengths[-1]) == (10_240, 960_000)
    assert len(lengths) >= 5
    assert not any(length % 640 for length in lengths)


def test_what_onnxruntime_answers_below_the_minimum(tmp_path):
    """The reason for the minimum on the card: torch refuses what the graph answers, plausibly and without an error."""
    model, card = narrow("cnn14")
    session = onnxruntime.InferenceSession(exported(tmp_path, model, card), providers=["CPUExecutionProvider"])
    short = example_inputs(card.replace(length_policy=card.length_policy.replace(min=None)), 9_919, 2)["features"]
    assert short.shape[2] == model.min_frames - 1
    with pytest.raises(ClipLengthError):
        model(features=short)
    logits = session.run(["logits"], {"features": short.numpy()})[0]
    assert np.isfinite(logits).all()
    assert card.min_samples == 9_920


def test_the_graph_refuses_maps_that_do_not_match(tmp_path):
    """What the card's multiples of 640 keep away."""
    model, card = narrow("wavegram_logmel_cnn14")
    session = onnxruntime.InferenceSession(exported(tmp_path, model, card), providers=["CPUExecutionProvider"])
    frontend = TorchFrontend(card.frontend).eval()
    waveform = example_inputs(card, 11_520, 2)["waveform"]
    for legal in (10_559, 10_876):
        answer = session.run(["logits"], _fed(frontend, waveform[:, :legal]))[0]
        np.testing.assert_allclose(
            answer,
            model(features=frontend(waveform[:, :legal]), waveform=waveform[:, :legal])["logits"].detach(),
            atol=LOGITS,
        )
    for illegal in (10_560, 10_875):
        with pytest.raises(Exception, match="Concat"):
            session.run(["logits"], _fed(frontend, waveform[:, :illegal]))


def _fed(frontend, waveform):
    return {"features": frontend(waveform).numpy(), "waveform": waveform.numpy()}
