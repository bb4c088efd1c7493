"""Events in files."""

from __future__ import annotations

import json

import pytest

from models_zoo.errors import DataError, OutputExistsError
from models_zoo.event_files import EVENT_SUFFIXES, read_events, write_events
from models_zoo.prediction import Event

FOUND = {
    "a.wav": (Event("dog bark", 0.448, 2.048, 0.75), Event("cat", 9.856, 9.984, 0.6)),
    "b/silent.wav": (),
}
HEADER = "filename\tonset\toffset\tevent_label\n"


@pytest.fixture
def table(tmp_path):
    def write(rows: str, header: str = HEADER):
        path = tmp_path / "events.tsv"
        path.write_text(header + rows, encoding="utf-8")
        return path

    return write


def test_tables_have_the_columns_of_dcase_and_are_read_back(tmp_path):
    path = tmp_path / "found.tsv"
    write_events(path, FOUND)
    assert path.read_text() == f"{HEADER}a.wav\t0.448\t2.048\tdog bark\na.wav\t9.856\t9.984\tcat\n"
    back = read_events(path, labels=["cat", "dog bark"], durations={"a.wav": 10.0})
    assert back == {"a.wav": tuple(Event(one.label, one.onset, one.offset) for one in FOUND["a.wav"])}


def test_json_says_everything(tmp_path):
    write_events(tmp_path / "found.json", FOUND)
    said = json.loads((tmp_path / "found.json").read_text())
    assert {name: tuple(Event(**one) for one in events) for name, events in said.items()} == FOUND


def test_label_tracks_are_what_audacity_reads(tmp_path):
    write_events(tmp_path / "found.txt", {"a.wav": [Event("a\tb", 1.5, 2.25)]})
    assert (tmp_path / "found.txt").read_text() == "1.5\t2.25\ta b\n"
    with pytest.raises(DataError, match="one recording, got 2"):
        write_events(tmp_path / "two.txt", FOUND)


@pytest.mark.parametrize("suffix", EVENT_SUFFIXES)
def test_files_are_not_replaced_by_accident(tmp_path, suffix):
    path = tmp_path / f"found{suffix}"
    write_events(path, {"a.wav": FOUND["a.wav"]})
    before = path.read_bytes()
    with pytest.raises(OutputExistsError):
        write_events(path, {"a.wav": ()})
    assert path.read_bytes() == before
    write_events(path, {"a.wav": ()}, force=True)
    assert path.read_bytes() != before


def test_other_files(tmp_path):
    with pytest.raises(DataError, match=r"ending in \.tsv, \.json, \.txt"):
        write_events(tmp_path / "found.csv", FOUND)


def test_a_row_with_a_name_alone_is_a_recording_without_events(table):
    path = table("a.wav\t1\t2\tdog\nb.wav\t\t\t\nc.wav\tnan\tnan\tnan\n")
    assert read_events(path) == {"a.wav": (Event("dog", 1, 2),), "b.wav": (), "c.wav": ()}


def test_confidences_are_probabilities(table):
    header = "event_label\tconfidence\tfilename\tonset\toffset\tnote\n"
    path = table("dog\t0.3\ta.wav\t1\t2\tx\ncat\t\ta.wav\t0\t1\ty\n", header)
    assert read_events(path) == {"a.wav": (Event("cat", 0, 1), Event("dog", 1, 2, 0.3))}


def test_overlapping_events_of_a_class_are_merged_and_it_is_said(table):
    path = table("a.wav\t1\t3\tdog\nb.wav\t0\t1\tcat\nb.wav\t2\t4\tdog\nb.wav\t3\t5\tdog\nb.wav\t5\t6\tdog\n")
    with pytest.warns(UserWarning, match=r"2 events overlap .* merged with it, first in b\.wav"):
        found = read_events(path)
    assert found["b.wav"] == (Event("cat", 0, 1), Event("dog", 2, 6))


def test_a_table_without_events_is_said_to_be(table):
    with pytest.warns(UserWarning, match="holds no events"):
        assert read_events(table("")) == {}
    with pytest.warns(UserWarning, match="holds no events"):
        assert read_events(table("a.wav\t\t\t\n")) == {"a.wav": ()}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("a.wav\t2\t1\tdog", "line 2: an event from 2.0 to 1.0 s; expected 0 <= onset < offset"),
        ("a.wav\t2\t2\tdog", "expected 0 <= onset < offset"),
        ("a.wav\t-1\t2\tdog", "expected 0 <= onset"),
        ("a.wav\tsoon\t2\tdog", "onset is 'soon'; expected a number"),
        ("a.wav\t1\tinf\tdog", "offset is 'inf'"),
        ("a.wav\t1\t\tdog", "offset is ''"),
        ("a.wav\t1\t2", "unknown label ''"),
        ("a.wav\t1\t2\tdogs", "line 2: unknown label 'dogs'; did you mean 'dog'"),
        ("a.wav\t9\t10.02\tdog", "from 9.0 to 10.02 s in a recording of 10 s"),
        ("a.wav\t10\t10.005\tdog", "in a recording of 10 s"),
        ("\t1\t2\tdog", "names no file"),
    ],
)
def test_rows_that_cannot_be(table, row, said):
    with pytest.raises(DataError) as caught:
        read_events(table(row + "\n"), labels=["dog", "cat"], durations={"a.wav": 10.0})
    assert said in str(caught.value)


def test_rounded_offsets_end_with_the_recording(table):
    assert read_events(table("a.wav\t9\t10.01\tdog\n"), durations={"a.wav": 10.0}) == {"a.wav": (Event("dog", 9, 10),)}
    assert read_events(table("b.wav\t9\t99\tdog\n"), durations={"a.wav": 10.0}) == {"b.wav": (Event("dog", 9, 99),)}


@pytest.mark.parametrize(
    ("header", "said"),
    [("", "an empty file"), ("filename,onset,offset,event_label\n", "expected the tab-separated columns")],
)
def test_files_that_are_no_such_table(table, header, said):
    with pytest.raises(DataError, match=said):
        read_events(table("", header))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_events(tmp_path / "missing.tsv")
    (tmp_path / "noise.tsv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(DataError, match="UTF-8"):
        read_events(tmp_path / "noise.tsv")
