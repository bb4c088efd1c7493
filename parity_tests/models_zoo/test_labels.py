from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

import models_zoo
from models_zoo.errors import UnknownNameError
from models_zoo.labels import get_labels, label_names, list_label_sets


def test_audioset_is_the_published_list() -> None:
    labels = get_labels("audioset")
    assert [label.index for label in labels] == list(range(527))
    assert len({label.mid for label in labels}) == len({label.display_name for label in labels}) == 527
    assert all(label.mid.startswith(("/m/", "/t/dd", "/g/")) for label in labels)
    for index, mid, name in (
        (0, "/m/09x0r", "Speech"),
        (1, "/m/05zppz", "Male speech, man speaking"),
        (74, "/m/0bt9lr", "Dog"),
        (137, "/m/04rlf", "Music"),
        (288, "/m/0838f", "Water"),
        (433, "/g/122z_qxw", "Firecracker"),
        (500, "/m/028v0c", "Silence"),
        (526, "/m/07hvw1", "Field recording"),
    ):
        assert (labels[index].index, labels[index].mid, labels[index].display_name) == (index, mid, name)
    table = Path(models_zoo.__file__).parent / "labels" / "audioset.csv"
    digest = hashlib.sha256(table.read_bytes()).hexdigest()
    assert digest == "fb5c4a6cdb124ebce2840afbe56b53b72b71f3366c507cea9336b58d05f218a5"


def test_names_and_sets() -> None:
    assert list_label_sets() == ["audioset"]
    assert label_names("audioset") == tuple(label.display_name for label in get_labels("audioset"))
    with pytest.raises(UnknownNameError, match="did you mean 'audioset'"):
        get_labels("audio_set")
