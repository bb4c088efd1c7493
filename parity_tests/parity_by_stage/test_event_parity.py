"""Events in research and in production: the same list, but where rounding decides."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from export.exporter import export_onnx
from infer_tf import TFAudioClassifier
from infer_tf.evaluation import evaluate
from models_zoo.audio import load_audio
from models_zoo.cards import LengthPolicy
from models_zoo.dataset import Dataset, Record, read_dataset
from models_zoo.decoding import decode
from models_zoo.events import EventOptions
from models_zoo.presets import get_frontend
from models_zoo.sed_metrics import has_sed_extra
from models_zoo.soundscapes import CLASSES, write_soundscapes
from parity_tests.infer_tf.tiny import EVENT_LABELS, event_card
from parity_tests.networks import card_of
from parity_tests.parity import StageReport, TorchPath, _compare_events, _detection, _score, run_parity
from train_torch.checkpoint import save_checkpoint
from train_torch.evaluation import evaluate as evaluate_trained
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


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A folder with a small network of random weights whose thresholds lie amid its scores, and its export."""
    folder = tmp_path_factory.mktemp("detector")
    torch.manual_seed(0)
    model = create_model("crnn", num_classes=len(CLASSES), filters=(8,) * 7, rnn_size=8, rnn_layers=1).eval()
    card = card_of(model, "crnn", task="event_detection", labels=CLASSES)
    with torch.no_grad():
        features = torch.rand(1, 128, 200)
        middle = model(features=features)["strong"][0].median(dim=1).values.tolist()
    card = card.replace(
        frontend=get_frontend("dcase_2023"),
        length_policy=LengthPolicy(min=32000, max=32000, short="zero", long="crop"),
        thresholds=dict(zip(CLASSES, middle, strict=True)),
        median_filters=dict.fromkeys(CLASSES, 0.192),
    )
    save_checkpoint(folder / "m.safetensors", model, card)
    export_onnx(model, card, folder / "m.onnx")
    return folder


@pytest.mark.slow
def test_from_the_file_to_the_events(detector, tmp_path):
    """Of clips as long as the model takes, shorter and longer; the truth is what the research path finds in them."""
    data = tmp_path / "sounds"
    for index, seconds in enumerate((2.0, 1.5, 2.5)):
        part = tmp_path / str(index)
        write_soundscapes(part, num_clips=1, seconds=seconds, sample_rate=16000, events_per_clip=3, seed=index)
        data.mkdir(exist_ok=True)
        (part / "audio" / "00000.wav").rename(data / f"{index}.wav")
    research = TorchPath(detector / "m.safetensors")
    found = {f"{i}.wav": research.predict(load_audio(data / f"{i}.wav", research.spec)).events for i in range(3)}
    assert all(found.values())
    rows = [f"{name},{e.label},{e.onset},{e.offset},test" for name, events in found.items() for e in events]
    (data / "metadata.csv").write_text("\n".join(["file,label,onset,offset,split", *rows]) + "\n")
    report = run_parity(detector / "m.onnx", detector / "m.safetensors", data, split="test", progress=False)
    assert report.passed, f"\n{report}"
    assert [stage.stage for stage in report.stages][-2:] == ["events", "measures"]
    assert report.num_clips == 3
    assert report.detection["intersection_f1"] == (1, 1)
    assert report.accuracy is None  # of clip labels, which the rows of events do not give
    assert "intersection_f1: torch 1.000000, production 1.000000" in str(report)
    with TFAudioClassifier(detector / "m.onnx", threads=1) as served:
        measured = evaluate(served, read_dataset(data)).measures
    trained = evaluate_trained(detector / "m.safetensors", data, split="test", progress=False)
    for measures in (measured, trained.measures):
        assert measures == pytest.approx(
            {name: pair[0] for name, pair in report.detection.items()}, abs=1e-3, nan_ok=True
        )
    if has_sed_extra():
        assert report.detection["psds1"][0] > 0.3


def test_measures_that_differ_fail(scores, tmp_path):
    dataset = Dataset(
        (Record(tmp_path / "a.wav", (EVENT_LABELS[0],), onset=0.64, offset=1.28, part="strong"),),
        EVENT_LABELS,
        tmp_path,
    )
    right = scores * 0.4
    right[0, 10:20] = 0.9
    row = ("a.wav", answer(right), answer(scores * 0.4), dataset.records[0])
    ours, theirs = _detection([row], CARD, dataset)["intersection_f1"]
    assert (ours, theirs) == (1, 0)
    assert _detection([row], CARD, replace(dataset, labels=("stranger",))) is None
