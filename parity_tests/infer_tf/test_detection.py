"""Models for event detection measured on recordings whose events are known."""

from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile

from infer_tf import TFAudioClassifier, evaluation
from infer_tf.evaluation import evaluate
from models_zoo.dataset import read_dataset
from models_zoo.sed_metrics import METRICS, WITHOUT_EXTRA
from parity_tests.infer_tf.test_cli import refused, run
from parity_tests.infer_tf.test_streaming import RATE, scene
from parity_tests.infer_tf.tiny import EVENT_LABELS, event_card, write_events

__all__ = ["run"]

CARD = event_card(
    thresholds=dict.fromkeys(EVENT_LABELS, 0.4) | {EVENT_LABELS[0]: 0.45},
    median_filters=dict.fromkeys(EVENT_LABELS, 0.192),
    length_policy={"max": 4 * RATE, "long": "crop"},
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_events(tmp_path_factory.mktemp("model") / "model.onnx", CARD)


@pytest.fixture(scope="module")
def data(model, tmp_path_factory):
    """Two strong clips, one longer than the model takes, with the events that it finds; one weak, one unlabelled."""
    folder = tmp_path_factory.mktemp("data")
    rows = ["file,label,onset,offset,split,part"]
    with TFAudioClassifier(model, threads=1) as classifier:
        for seed, (name, seconds) in enumerate({"a": 3.0, "b": 6.0, "c": 3.0, "d": 3.0}.items()):
            soundfile.write(folder / f"{name}.wav", scene(seconds, seed), RATE, subtype="FLOAT")
            if name in "ab":
                found = classifier.predict(folder / f"{name}.wav").events
                assert len({event.label for event in found}) > 1
                rows += [f"{name}.wav,{e.label},{e.onset},{e.offset},test,strong" for e in found]
    rows += [f"b.wav,{EVENT_LABELS[0]},5,5.5,test,strong", f"c.wav,{EVENT_LABELS[1]},,,test,weak"]
    rows += ["d.wav,,,,train,unlabelled"]
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    return folder


def test_a_detector_is_measured_by_its_events(run, model, data, monkeypatch):
    monkeypatch.setattr(evaluation, "has_sed_extra", lambda: False)
    result = run("evaluate", model, "--data", data, "--json")
    assert result.code == 0
    said = json.loads(result.out)
    assert said["num_clips"] == 3
    assert said["measures"]["intersection_f1"] == 1  # the event behind the 4 s that the model takes is not asked for
    clips = said["per_class"]
    assert sum(row["events"] for row in clips.values()) == sum(row["found"] for row in clips.values())
    with TFAudioClassifier(model, threads=1) as classifier:
        found = [event.label for name in "ab" for event in classifier.predict(data / f"{name}.wav").events]
    assert {label: row["found"] for label, row in clips.items()} == {x: found.count(x) for x in EVENT_LABELS}
    table = run("evaluate", model, "--data", data, "--split", "all")
    assert "intersection_f1    1.0000" in table.out
    assert "event_f1" in table.out


def test_what_is_left_out_is_said(model, data, monkeypatch, caplog):
    monkeypatch.setattr(evaluation, "has_sed_extra", lambda: False)
    with TFAudioClassifier(model, threads=1) as classifier:
        evaluate(classifier, read_dataset(data))
    assert [record.getMessage() for record in caplog.records] == [
        f"note: model {CARD.name!r} takes 4 s; of 1 longer recordings the rest is not scored",
        WITHOUT_EXTRA,
    ]


def test_wrong_annotations_show(run, model, data, tmp_path):
    rows = (data / "metadata.csv").read_text().splitlines()
    for name in "abcd":
        (tmp_path / f"{name}.wav").symlink_to(data / f"{name}.wav")
    other = dict(zip(EVENT_LABELS, np.roll(EVENT_LABELS, 1), strict=True))
    moved = [",".join(other.get(cell, cell) for cell in row.split(",")) for row in rows]
    (tmp_path / "metadata.csv").write_text("\n".join(moved) + "\n")
    result = run("evaluate", model, "--data", tmp_path, "--json")
    assert json.loads(result.out)["measures"]["intersection_f1"] < 0.9
    stranger = [row.replace(EVENT_LABELS[0], "gong") for row in rows]
    (tmp_path / "metadata.csv").write_text("\n".join(stranger) + "\n")
    assert "'gong'" in refused(run("evaluate", model, "--data", tmp_path))


@pytest.mark.sed
def test_the_published_figures_are_there_with_the_extra(model, data):
    with TFAudioClassifier(model, threads=1) as classifier:
        measures = evaluate(classifier, read_dataset(data)).measures
    assert set(measures) == {"weak_f1", *METRICS}
    assert measures["collar_f1"] == measures["segment_f1"] == 1
    assert measures["psds2"] > 0.5
