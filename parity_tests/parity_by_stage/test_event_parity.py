"""Events in research and in production: the same list, but where rounding decides."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from export.exporter import export_onnx
from models_zoo.audio import load_audio
from models_zoo.decoding import decode
from models_zoo.events import EventOptions
from models_zoo.presets import get_frontend
from models_zoo.soundscapes import CLASSES, write_soundscapes
from parity_tests.infer_tf.tiny import EVENT_LABELS, event_card
from parity_tests.networks import card_of
from parity_tests.parity import StageReport, TorchPath, _compare_events, _score, run_parity
from train_torch.checkpoint import save_checkpoint
from train_torch.models import create_model

CARD = event_card(thresholds=dict.fromkeys(EVENT_LABELS, 0.5), median_filters=dict.fromkeys(EVENT_LABELS, 0.192))


def answer(scores, options=None):
    outputs = {"strong": scores[None], "weak": scores.max(axis=1)[None]}
    return decode(CARD, outputs, end=scores.shape[1] * 0.064, events=options or EventOptions())


@pytest.fixture
def scores():
    return np.random.default_rng(0).random((len(EVENT_LABELS), 50)).astype(np.float32)


def test_equal_events_are_equal(scores):
    assert _compare_events(answer(scores), answer(scores), CARD) == (0.0, "equal", ([], []))


def test_rounding_may_decide_and_is_listed(scores):
    scores[0, 10:20] = 0.5 + 1e-7
    other = scores.copy()
    other[0, 10:20] = 0.5 - 1e-7
    ours, theirs = answer(scores), answer(other)
    ratio, detail, only = _compare_events(ours, theirs, CARD)
    assert 0 < ratio <= 1
    assert "frames differ" in detail
    assert any(only)
    reports = {name: StageReport(name) for name in ("logits", "probabilities", "decisions", "events")}
    changed = _score([("a.wav", ours, theirs, None)], CARD, reports)
    assert not reports["events"].clips
    assert [clip for clip, *_ in changed] == ["a.wav"]


def test_events_that_differ_for_another_reason_fail(scores):
    ours = answer(scores)
    wrong = answer(scores, EventOptions(median_filters=0.448))
    assert _compare_events(ours, wrong, CARD)[0] == np.inf
    nearly = replace(wrong, frame_probabilities=scores + np.float32(1e-6))
    assert _compare_events(ours, nearly, CARD)[0] > 1
    missing = replace(ours, frame_probabilities=None, events=())
    assert _compare_events(ours, missing, CARD)[0] == np.inf


@pytest.mark.slow
def test_from_the_file_to_the_events(tmp_path):
    """A small network of random weights whose thresholds lie amid its scores."""
    write_soundscapes(tmp_path / "sounds", num_clips=3, seconds=2.0, sample_rate=16000, events_per_clip=3)
    torch.manual_seed(0)
    model = create_model("crnn", num_classes=len(CLASSES), filters=(8,) * 7, rnn_size=8, rnn_layers=1).eval()
    card = card_of(model, "crnn", task="event_detection", labels=CLASSES)
    with torch.no_grad():
        features = torch.rand(1, 128, 200)
        middle = model(features=features)["strong"][0].median(dim=1).values.tolist()
    card = card.replace(
        frontend=get_frontend("dcase_2023"),
        thresholds=dict(zip(CLASSES, middle, strict=True)),
        median_filters=dict.fromkeys(CLASSES, 0.192),
    )
    save_checkpoint(tmp_path / "m.safetensors", model, card)
    export_onnx(model, card, tmp_path / "m.onnx")
    report = run_parity(tmp_path / "m.onnx", tmp_path / "m.safetensors", tmp_path / "sounds", progress=False)
    assert report.passed, f"\n{report}"
    assert [stage.stage for stage in report.stages][-1] == "events"
    assert report.num_clips == 3
    heard = load_audio(tmp_path / "sounds" / "audio" / "00000.wav", card.frontend)
    assert len(TorchPath(tmp_path / "m.safetensors").predict(heard).events) > 5
