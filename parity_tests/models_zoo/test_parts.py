"""Strong, weak and unlabelled parts of a table: read as they are stated, refused where they contradict themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models_zoo.dataset import Dataset, read_dataset
from models_zoo.errors import DataError

HEADER = "file,label,onset,offset,split,part\n"


def read(root: Path, text: str) -> Dataset:
    for name in ("a.wav", "b.wav", "c.wav", "d.wav"):
        (root / name).write_bytes(name.encode())
    (root / "metadata.csv").write_text(text)
    return read_dataset(root)


def test_every_part_is_read_as_stated(tmp_path: Path) -> None:
    rows = "a.wav,dog,0.5,1,train,strong\na.wav,cat,0,2,train,strong\nb.wav,dog;cat,,,train,weak\n"
    dataset = read(tmp_path, HEADER + rows + "c.wav,,,,train,unlabelled\nd.wav,,,,test,strong\n")
    files = dataset.by_file()
    assert [record.part for record in files.records] == ["strong", "weak", "unlabelled", "strong"]
    assert dataset.events() == {"a.wav": (("cat", 0.0, 2.0), ("dog", 0.5, 1.0)), "d.wav": ()}
    known = files.known()
    assert known is not None
    np.testing.assert_array_equal(known, [[True, True], [True, True], [False, False], [True, True]])
    np.testing.assert_array_equal(files.multi_hot(), [[1, 1], [1, 1], [0, 0], [0, 0]])


def test_without_the_column_times_make_a_row_strong(tmp_path: Path) -> None:
    dataset = read(tmp_path, "file,label,onset,offset\na.wav,dog,0,1\nb.wav,dog,,\n")
    assert [record.part for record in dataset.records] == ["strong", "weak"]
    assert list(dataset.events()) == ["a.wav"]


def test_a_clip_without_events_is_not_one_of_a_single_class(tmp_path: Path) -> None:
    dataset = read(tmp_path, HEADER + "a.wav,dog,0,1,train,strong\nb.wav,,,,train,strong\n")
    assert dataset.by_file().is_multi_label
    with pytest.raises(DataError, match="several labels, or none"):
        dataset.single_sources()


def test_overlapping_events_of_one_class_are_one(tmp_path: Path) -> None:
    rows = (
        "a.wav,dog,0,1,,\na.wav,dog,0.5,2,,\na.wav,dog,2,2.5,,\na.wav,dog,3,4,,\na.wav,cat,0.5,3.5,,\nb.wav,cat,0,1,,\n"
    )
    dataset = read(tmp_path, HEADER + rows)
    assert dataset.events()["a.wav"] == (("dog", 0.0, 2.5), ("cat", 0.5, 3.5), ("dog", 3.0, 4.0))
    assert dataset.overlapping() == ["a.wav"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a.wav,dog,,,train,strong", "strong row is an event"),
        ("a.wav,,0,1,train,strong", "strong row is an event"),
        ("a.wav,dog,0,1,train,weak", "weak row has no times"),
        ("a.wav,dog,,,train,unlabelled", "says nothing of its clip"),
        ("a.wav,,,,train,weak", "empty 'label'"),
        ("a.wav,,,,train,", "empty 'label'"),
        ("a.wav,dog,0,1,train,Strong!", "part 'Strong!'"),
        ("a.wav,dog,2,1,train,strong", "0 <= onset < offset"),
        ("a.wav,dog,0,1,train,strong\na.wav,,,,train,strong", "2 rows"),
    ],
)
def test_rows_that_contradict_their_part(tmp_path: Path, row: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, HEADER + row + "\n")


def test_an_empty_annotation_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="lists no recordings"):
        read(tmp_path, HEADER)
