"""The crossfade command with models for event detection: tables, files, pictures, options."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import soundfile
from tqdm import tqdm

from infer_tf import TFAudioClassifier, batch, cli, plot
from models_zoo.event_files import EVENT_SUFFIXES, read_events
from models_zoo.events import EventOptions
from parity_tests.infer_tf.test_cli import refused, run
from parity_tests.infer_tf.test_streaming import RATE, scene
from parity_tests.infer_tf.tiny import EVENT_LABELS, event_card, write_encoder, write_events

__all__ = ["run"]

OPTIONS = EventOptions(
    thresholds={**dict.fromkeys(EVENT_LABELS, 0.4), "hum": 0.9}, median_filters=0.448, min_duration=0.2, merge_gap=0.1
)
ARGUMENTS = ["--threshold", 0.4, "--threshold", "hum=0.9", "--median-filter", 0.448]
ARGUMENTS += ["--min-duration", 0.2, "--merge-gap", 0.1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    write_events(folder / "model.onnx", event_card(median_filters={"tick": 0.448}))
    for name, seconds in (("a", 3.0), ("b", 13.0)):
        soundfile.write(folder / f"{name}.wav", scene(seconds), RATE, subtype="FLOAT")
    return folder


@pytest.fixture(scope="module")
def classifier(folder):
    with TFAudioClassifier(folder / "model.onnx", threads=1) as built:
        yield built


def listed(out: str) -> list[tuple[float, float, str]]:
    """Return (onset, offset, label) of the lines that are events."""
    rows = [line.split() for line in out.splitlines() if " s to " in line]
    rows = [row[row.index("to") - 2 :] for row in rows]
    return [(float(row[0]), float(row[3]), row[5]) for row in rows]


def times(events) -> list[tuple[float, float, str]]:
    return [(pytest.approx(one.onset, abs=6e-4), pytest.approx(one.offset, abs=6e-4), one.label) for one in events]


def test_a_clip_is_answered_with_classes_and_a_table_of_events(run, folder, classifier):
    result = run("predict", folder / "model.onnx", folder / "a.wav", *ARGUMENTS)
    found = classifier.predict(folder / "a.wav", events=OPTIONS).events
    assert (result.code, result.err) == (0, "")
    assert "(3.00 s)" in result.out
    assert f"events: {len(found)}\n" in result.out
    assert listed(result.out) == times(found)
    quiet = run("predict", folder / "model.onnx", folder / "a.wav", "--threshold", "1")
    assert "events: none" in quiet.out


def test_windows_print_the_events_of_the_recording(run, folder, classifier):
    result = run("predict", folder / "model.onnx", folder / "b.wav", "--window", 4, "--hop", 2, *ARGUMENTS)
    found = list(classifier.detect(folder / "b.wav", 4.0, 2.0, events=OPTIONS))
    assert (result.code, result.err) == (0, "")
    assert listed(result.out) == times(found)
    rows = run("predict", folder / "model.onnx", folder / "b.wav", "--window", 4, "--hop", 2, "--json", *ARGUMENTS)
    said = [event for line in rows.out.splitlines() for event in json.loads(line)["events"]]
    assert said == [vars(event) for event in found]


def test_a_model_that_crops_hears_a_long_recording_in_windows(run, folder, tmp_path):
    model = write_events(tmp_path / "m.onnx", event_card(length_policy={"max": 4 * RATE, "long": "crop"}))
    with TFAudioClassifier(model, threads=1) as classifier:
        found = list(classifier.detect(folder / "b.wav", 4.0, 2.0))
        assert max(event.offset for event in found) > 4
        short = classifier.predict(folder / "a.wav").events
    result = run("predict", model, folder / "a.wav", folder / "b.wav")
    note = (
        f"note: {folder / 'b.wav'} has 13.0 s, and {classifier.card.name} hears 4 s at once: scored as with --window 4"
    )
    assert result.err.splitlines() == [note]
    assert listed(result.out) == times([*short, *found])
    written = run("predict", model, folder / "a.wav", folder / "b.wav", "-o", tmp_path / "events.tsv")
    assert note in written.err
    rows = read_events(tmp_path / "events.tsv")
    assert [len(events) for events in rows.values()] == [len(short), len(found)]
    tabled = run("predict", model, folder / "a.wav", folder / "b.wav", "-o", tmp_path / "events.jsonl")
    assert note in tabled.err
    said = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    for name, events in (("a", short), ("b", found)):
        of_one = [event for row in said if row["file"] == str(folder / f"{name}.wav") for event in row["events"]]
        assert of_one == [vars(event) for event in events]
    run("predict", model, folder / "b.wav", "-o", tmp_path / "scores.csv")
    with (tmp_path / "scores.csv").open(newline="") as stream:
        assert max(float(row["end"]) for row in csv.DictReader(stream)) > 12
    plotted = run("predict", model, folder / "b.wav", "--plot", tmp_path / "b.png")
    assert listed(plotted.out) == times(found)


@pytest.mark.parametrize("windows", [(), ("--window", "4", "--hop", "2")])
def test_events_are_written_to_files(run, folder, classifier, tmp_path, windows):
    model, recordings = folder / "model.onnx", [folder / "a.wav", folder / "b.wav"]
    find = (
        (lambda path: classifier.detect(path, 4.0, 2.0)) if windows else (lambda path: classifier.predict(path).events)
    )
    expected = {str(path): sorted(find(path), key=str) for path in recordings}
    table = run("predict", model, *recordings, *windows, "-o", tmp_path / "found.tsv")
    assert (table.code, table.out) == (0, "")
    assert f"2 of 2 recordings predicted, 0 failed; wrote {tmp_path / 'found.tsv'}" in table.err
    back = read_events(tmp_path / "found.tsv")
    for name, events in expected.items():
        assert sorted((one.label, one.onset, one.offset) for one in back[name]) == [
            (one.label, one.onset, one.offset) for one in sorted(events, key=lambda one: (one.label, one.onset))
        ]
    assert run("predict", model, folder, *windows, "-o", tmp_path / "found.json").code == 0
    said = json.loads((tmp_path / "found.json").read_text())
    assert {name: sorted(map(str, events)) for name, events in said.items()} == {
        name: sorted(str(vars(one)) for one in events) for name, events in expected.items()
    }
    assert run("predict", model, folder / "b.wav", *windows, "-o", tmp_path / "found.txt").code == 0
    assert len((tmp_path / "found.txt").read_text().splitlines()) == len(expected[str(folder / "b.wav")])


def test_event_files_are_refused_early(run, folder, tmp_path, model_path):
    model, clip = folder / "model.onnx", folder / "a.wav"
    (tmp_path / "there.tsv").write_text("mine")
    assert "exists; pass --force" in refused(run("predict", model, clip, "-o", tmp_path / "there.tsv"))
    assert (tmp_path / "there.tsv").read_text() == "mine"
    assert run("predict", model, clip, "-o", tmp_path / "there.tsv", "--force").code == 0
    assert (tmp_path / "there.tsv").read_text().startswith("filename\tonset\toffset\tevent_label\n")
    assert "of one recording, got 2" in refused(run("predict", model, folder, "-o", tmp_path / "two.txt"))
    assert "is for single_label" in refused(run("predict", model_path, clip, "-o", tmp_path / "tags.tsv"))
    assert "no such file" in refused(run("predict", model, folder / "c.wav", "-o", tmp_path / "c.tsv"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there.tsv"]


def test_recordings_that_fail_are_counted(run, folder, tmp_path):
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    (tmp_path / "list.csv").write_text(f"file\nbad.wav\n{folder / 'a.wav'}\n")
    result = run("predict", folder / "model.onnx", tmp_path / "list.csv", "-o", tmp_path / "found.json")
    assert result.code == 1
    assert "1 of 2 recordings predicted, 1 failed" in result.err
    assert f"crossfade: error: {tmp_path / 'bad.wav'}" in result.err
    assert list(json.loads((tmp_path / "found.json").read_text())) == [str(folder / "a.wav")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--threshold", "high"), "got 'high'; expected a number, or LABEL=NUMBER"),
        (("--threshold", "2"), "thresholds"),
        (("--threshold", "hums=0.3"), "unknown label in thresholds 'hums'; did you mean 'hum'"),
        (("--merge-gap", "-1"), "merge_gap"),
        (("--window", "4", "--hop", "0.05"), "at least one frame"),
        (("--window", "4", "--hop", "5"), "leave no gaps"),
        (("--window", "4", "--hop", "2", "--median-filter", "nan"), "median_filters"),
    ],
)
def test_options_that_cannot_be(run, folder, arguments, said):
    assert said in refused(run("predict", folder / "model.onnx", folder / "a.wav", *arguments))


def test_event_options_need_a_model_for_events(run, folder, model_path):
    assert "found by models for event_detection" in refused(
        run("predict", model_path, folder / "a.wav", "--min-duration", "1")
    )


def test_the_command_knows_the_suffixes_without_loading_what_writes_them():
    assert cli._EVENT_FILES == EVENT_SUFFIXES


@pytest.mark.parametrize("windows", [(), ("--window", "4", "--hop", "1")])
def test_pictures_show_events_where_they_are(run, folder, classifier, tmp_path, monkeypatch, windows):
    drawn = []
    save = plot._save
    monkeypatch.setattr(plot, "_save", lambda figure, *rest: (drawn.append(figure), save(figure, *rest)))
    result = run("predict", folder / "model.onnx", folder / "b.wav", *windows, "--plot", tmp_path / "b.png", *ARGUMENTS)
    assert result.code == 0, result.err
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    heard, lanes = drawn[0].axes[:2]
    drawn[0].canvas.draw()
    assert heard.get_xlim() == lanes.get_xlim() == (0, 13)
    assert heard.get_position().x0 == pytest.approx(lanes.get_position().x0, abs=1e-6)
    assert heard.get_position().x1 == pytest.approx(lanes.get_position().x1, abs=1e-6)
    names = [text.get_text() for text in lanes.get_yticklabels()]
    boxes = [part for part in lanes.collections if type(part).__name__ == "PolyCollection"]
    outlines = [path.get_extents() for part in boxes for path in part.get_paths()]
    shown = sorted((names[round(box.y0 + 0.36)], round(box.x0, 3), round(box.x1, 3)) for box in outlines)
    events = (
        classifier.detect(folder / "b.wav", 4.0, 1.0, events=OPTIONS)
        if windows
        else classifier.predict(folder / "b.wav", events=OPTIONS).events
    )
    assert shown == sorted((one.label, round(one.onset, 3), round(one.offset, 3)) for one in events)
    scores = lanes.collections[0].get_array()
    assert scores.shape[0] == len(names)
    if not windows:
        expected = classifier.predict(folder / "b.wav").frame_probabilities
        order = [EVENT_LABELS.index(name) for name in names]
        np.testing.assert_allclose(scores, expected[order], atol=1e-6)


def test_long_recordings_show_progress_in_seconds(run, folder, monkeypatch):
    """Standard error is no terminal here, so the bar has to be forced."""
    monkeypatch.setattr(
        batch, "tqdm", lambda *a, **options: tqdm(*a, **{**options, "disable": False, "mininterval": 0})
    )
    quiet = run("predict", folder / "model.onnx", folder / "b.wav", "--window", 4, "--hop", 2)
    shown = quiet.err.replace("\r", "\n").splitlines()
    assert any("13.0/13.0" in line for line in shown), shown
    assert any("4.00/13.0" in line for line in shown), shown
    assert listed(quiet.out)


def test_a_model_with_an_encoder(run, folder, tmp_path):
    fused = write_events(tmp_path / "fused.onnx", event_card(embeddings=True))
    assert "pass encoder=" in refused(run("predict", fused, folder / "a.wav"))
    encoder = write_encoder(tmp_path / "encoder.onnx")
    result = run("predict", fused, folder / "a.wav", "--encoder", encoder, "--json")
    assert result.code == 0, result.err
    with TFAudioClassifier(fused, encoder=encoder) as classifier:
        assert json.loads(result.out)["events"] == classifier.predict(folder / "a.wav").to_dict()["events"]


def test_info_says_how_events_are_found(run, folder):
    rows = [line.split("  ") for line in run("info", folder / "model.onnx").out.splitlines()]
    said = {row[0]: row[-1].strip() for row in rows}
    assert (said["frames"], said["thresholds"], said["median filters"]) == (
        "a score every 0.064 s",
        "0.5",
        "0 s, 0.448 s",
    )
