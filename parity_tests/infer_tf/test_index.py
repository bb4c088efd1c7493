"""The index of sounds and pictures: what it finds, in which order, and what it refuses."""

from __future__ import annotations

import io
import os
import sys
import zipfile

import numpy as np
import pytest
import soundfile

from infer_tf import AudioVisualIndex, TFAudioClassifier
from infer_tf.index import Entry, list_files
from models_zoo.errors import (
    AudioDecodeError,
    DataError,
    IndexFileError,
    MissingDependencyError,
    ModelFileError,
    OutputExistsError,
)
from models_zoo.retrieval import cosine_similarity
from parity_tests.infer_tf.tiny import event_card, write_encoder, write_events
from parity_tests.infer_tf.tiny_pairs import RATE, WIDTH, picture, video, write_pair, write_picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("search")
    write_pair(root / "towers.onnx", "towers")
    rng = np.random.default_rng(0)
    for index in range(6):
        noise = rng.standard_normal(RATE) * np.linspace(0.01, 0.3, RATE) ** (1 + index)
        soundfile.write(root / f"{index}.wav", noise, RATE)
        write_picture(root / f"{index}.png", index)
    (root / "clip.mkv").write_bytes(video(seed=3))
    return root


@pytest.fixture(scope="module")
def towers(folder):
    with TFAudioClassifier(folder / "towers.onnx", threads=1) as classifier:
        yield classifier


@pytest.fixture(scope="module")
def index(folder, towers):
    files = [(folder / f"{i}.{suffix}", f"thing {i}") for i in range(6) for suffix in ("wav", "png")]
    return AudioVisualIndex.build(towers, [*files, folder / "clip.mkv"])


def test_sounds_find_pictures_and_pictures_sounds(folder, towers, index):
    assert len(index) == 14
    assert [entry.kind for entry in index.entries[-2:]] == ["audio", "image"]
    for asked, found, suffixes in (("audio", "image", (".wav", ".png")), ("image", "audio", (".png", ".wav"))):
        query = folder / f"2{suffixes[0]}"
        matches = index.search(**{asked: query}, k=7)
        vector = towers.embed_audio(query) if asked == "audio" else towers.embed_image(query)
        there = [(entry, row) for entry, row in zip(index.entries, index.vectors, strict=True) if entry.kind == found]
        cosines = cosine_similarity(vector[None], [row for _, row in there])[0]
        order = np.argsort(-cosines, kind="stable")
        assert [match.path for match in matches] == [there[i][0].path for i in order]
        assert np.abs(np.array([match.cosine for match in matches]) - cosines[order]).max() < 1e-6
        assert {match.kind for match in matches} == {found}
        assert matches == index.search(**{asked: str(query)}, k=7)
        assert [match.label for match in matches if "clip" not in match.path] == [
            there[i][0].label for i in order if there[i][0].label
        ]
    (itself,) = index.search(audio=folder / "4.wav", k=1, among="audio")
    assert (itself.path, itself.kind) == (str(folder / "4.wav"), "audio")
    assert itself.cosine == pytest.approx(1, abs=1e-6)


def test_both_sides_of_a_video_are_entered(folder, towers, tmp_path):
    (tmp_path / "silent.mkv").write_bytes(video(seed=1, heard=False))
    (tmp_path / "dark.mkv").write_bytes(video(seed=1, pictures=False))
    built = AudioVisualIndex.build(towers, [tmp_path / "silent.mkv", (tmp_path / "dark.mkv", "night")])
    assert [(entry.kind, entry.label) for entry in built.entries] == [("image", None), ("audio", "night")]


def test_equal_matches_come_in_the_order_they_were_entered(towers):
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((3, WIDTH)).astype(np.float32)
    vectors = np.concatenate([rows[[1]], *[rows[[0]]] * 40, rows[[2]]])
    entries = [Entry(path=str(place), kind="image") for place in range(len(vectors))]
    index = AudioVisualIndex(towers, entries, vectors)
    for k in (1, 3, 39):
        found = index.nearest(rows[0], k)
        assert [match.path for match in found] == [str(1 + place) for place in range(k)]
        assert len({match.cosine for match in found}) == 1


def test_an_index_is_saved_and_loaded_whole(folder, towers, index, tmp_path):
    path = tmp_path / "pairs.index"
    index.save(path)
    for classifier in (towers, None):
        loaded = AudioVisualIndex.load(path, classifier)
        assert loaded.entries == index.entries
        assert np.abs(loaded.vectors - index.vectors).max() < 1e-7
        assert loaded.search(audio=folder / "1.wav", k=5) == index.search(audio=folder / "1.wav", k=5)
    with pytest.raises(OutputExistsError):
        index.save(path)
    assert [one.name for one in tmp_path.iterdir()] == ["pairs.index"]


def test_the_index_of_another_model_is_refused(index, tmp_path):
    index.save(tmp_path / "pairs.index")
    with (
        TFAudioClassifier(write_pair(tmp_path / "towers.onnx", "towers", seed=1), threads=1) as other,
        pytest.raises(IndexFileError, match="built with another model") as refused,
    ):
        AudioVisualIndex.load(tmp_path / "pairs.index", other)
    assert refused.value.code == "model"


def test_the_model_an_index_names_is_opened_once_it_is_known_to_be_the_one(index, folder, tmp_path, monkeypatch):
    path, model = tmp_path / "pairs.index", write_pair(tmp_path / "towers.onnx", "towers")
    opened, closed = [], []

    class Watched(TFAudioClassifier):
        def __init__(self, *arguments, **options):
            opened.append(options)
            super().__init__(*arguments, **options)

        def close(self):
            closed.append(self)
            super().close()

    monkeypatch.setattr("infer_tf.index.TFAudioClassifier", Watched)
    with TFAudioClassifier(model, threads=1) as classifier:
        AudioVisualIndex(classifier, index.entries, index.vectors).save(path)
        AudioVisualIndex(classifier, index.entries, index.vectors[:, :5]).save(tmp_path / "narrow.index")
    with AudioVisualIndex.load(path, threads=1).classifier:
        assert (opened, closed) == ([{"threads": 1}], [])
    with pytest.raises(IndexFileError, match="vectors of 5 numbers"):
        AudioVisualIndex.load(tmp_path / "narrow.index")
    assert (len(opened), len(closed)) == (2, 2)
    moved = model.rename(tmp_path / "moved.onnx")
    with pytest.raises(ModelFileError, match=r"towers\.onnx: the model of the index is not there"):
        AudioVisualIndex.load(path)
    model.write_bytes(b"something else")
    with pytest.raises(IndexFileError, match="built with another model"):
        AudioVisualIndex.load(path)
    assert len(opened) == 2
    with AudioVisualIndex.load(path, moved).classifier as classifier:
        assert classifier.paths == (moved,)


def test_models_that_one_file_does_not_describe_make_no_index(folder, tmp_path):
    outputs = [event_card().outputs[0].to_dict(), {"name": "weak", "role": "embedding", "axes": ["batch", "4"]}]
    fused = write_events(tmp_path / "fused.onnx", event_card(embeddings=True, outputs=outputs))
    encoder, joint = write_encoder(tmp_path / "encoder.onnx"), write_pair(tmp_path / "joint.onnx", "joint")
    with (
        TFAudioClassifier(fused, threads=1, encoder=encoder) as encoded,
        pytest.raises(ModelFileError, match="depend on an encoder"),
    ):
        AudioVisualIndex.build(encoded, [folder / "1.wav"])
    with (
        TFAudioClassifier([joint, joint], threads=1) as several,
        pytest.raises(ModelFileError, match="no embedding output"),
    ):
        AudioVisualIndex.build(several, [folder / "1.wav"])


def test_files_that_are_no_index(towers, index, tmp_path):
    index.save(tmp_path / "pairs.index")
    whole = (tmp_path / "pairs.index").read_bytes()
    cases = {"empty": b"", "text": b"no index at all", "cut": whole[: len(whole) // 2], "array": b"\x93NUMPY\x01\x00"}
    for place in (60, len(whole) // 2, len(whole) - 60):
        cases[f"bit at {place}"] = whole[:place] + bytes([whole[place] ^ 0x40]) + whole[place + 1 :]
    path = tmp_path / "other.index"
    for name, data in cases.items():
        path.write_bytes(data)
        with pytest.raises(IndexFileError, match="damaged") as refused:
            AudioVisualIndex.load(path, towers)
        assert refused.value.code == "corrupt", name
    with path.open("wb") as file:
        np.savez(file, header=np.zeros(3, np.uint8), vectors=np.ones((1, 8), np.float32))
    with pytest.raises(IndexFileError, match="damaged"):
        AudioVisualIndex.load(path, towers)
    with pytest.raises(IndexFileError) as refused:
        AudioVisualIndex.load(tmp_path / "missing.index", towers)
    assert refused.value.code == "not_found"
    with pytest.raises(IndexFileError) as refused:
        AudioVisualIndex.load(tmp_path, towers)
    assert refused.value.code == "not_readable"


def _npy(values):
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def _zipped(path, how=zipfile.ZIP_STORED, **members):
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return path.read_bytes()


def test_whatever_bytes_come_as_an_index_the_error_is_typed(towers, index, tmp_path):
    path = tmp_path / "pairs.index"
    index.save(path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        header = archive.read("header.npy")
        vectors = archive.read("vectors.npy")
        place = next(one for one in archive.infolist() if one.filename == "vectors.npy").header_offset
    directory = whole.index(b"PK\x01\x02")
    shape = b"(14, 8), }" + b" " * 20
    assert shape in vectors
    cases = {
        "npy": _npy(np.ones((2, 8), np.float32)),
        "raw": _zipped(path, header=header, vectors=b"raw"),
        "nothing": _zipped(path, header=header, vectors=b""),
        "raw header": _zipped(path, header=b"{}", vectors=vectors),
        "huge": _zipped(path, header=header, vectors=vectors.replace(shape, b"(%d, 8), }" % 10**21)),
        "float64": _zipped(path, header=header, vectors=_npy(index.vectors.astype(np.float64))),
        "flat": _zipped(path, header=header, vectors=_npy(index.vectors.ravel())),
        "narrow": _zipped(path, header=header, vectors=_npy(np.ascontiguousarray(index.vectors[:, :5]))),
    }
    for name, offset, value in (("encrypted", 8, 1), ("version", 6, 99), ("method", 10, 97)):
        data = bytearray(whole)
        data[directory + offset] = data[place + offset - 2] = value
        cases[name] = bytes(data)
    for name, data in cases.items():
        path.write_bytes(data)
        with pytest.raises(IndexFileError, match="damaged") as refused:
            AudioVisualIndex.load(path, towers)
        assert refused.value.code == "corrupt", name


def test_an_index_takes_no_more_memory_than_it_has_bytes(towers, index, tmp_path):
    path = tmp_path / "pairs.index"
    index.save(path)
    with zipfile.ZipFile(path) as archive:
        members = {name.removesuffix(".npy"): archive.read(name) for name in archive.namelist()}
    _zipped(path, **members)
    assert AudioVisualIndex.load(path, towers).entries == index.entries
    _zipped(path, zipfile.ZIP_DEFLATED, **members)
    with pytest.raises(IndexFileError, match="compressed"):
        AudioVisualIndex.load(path, towers)
    whole = bytearray(_zipped(path, **members))
    last = whole.rindex(b"PK\x01\x02")
    whole[last + 24 : last + 28] = (len(whole) + 1).to_bytes(4, "little")
    path.write_bytes(whole)
    with pytest.raises(IndexFileError, match="more than the file's"):
        AudioVisualIndex.load(path, towers)


def test_impossible_searches(folder, towers, index):
    for k in (0, -1, 8, True, 2.0):
        with pytest.raises(DataError, match="7 entries of image"):
            index.search(audio=folder / "1.wav", k=k)
    with pytest.raises(DataError, match="by sound or by picture"):
        index.search()
    with pytest.raises(DataError, match="by sound or by picture"):
        index.search(audio=folder / "1.wav", image=picture(0))
    with pytest.raises(DataError, match="by picture takes inputs; got sample_rate"):
        index.search(image=picture(0), sample_rate=3)
    with pytest.raises(DataError, match="by sound takes channels_first, inputs, sample_rate; got frames"):
        index.search(audio=folder / "1.wav", frames="all")
    noise = np.random.default_rng(0).standard_normal(2 * RATE).astype(np.float32) / 9
    assert index.search(audio=noise, sample_rate=RATE, k=7) == index.search(audio=noise, k=7)
    assert index.search(audio=noise, sample_rate=2 * RATE, k=7) != index.search(audio=noise, k=7)
    with pytest.raises(DataError, match="point somewhere"):
        index.nearest(np.zeros(WIDTH, np.float32), 1)
    with pytest.raises(DataError, match="at least one"):
        AudioVisualIndex.build(towers, [])
    with pytest.raises(DataError, match=r"notes\.txt: its suffix"):
        AudioVisualIndex.build(towers, [folder / "1.wav", "notes.txt"])
    with pytest.raises(DataError, match="points nowhere"):
        AudioVisualIndex(towers, [Entry(path="a", kind="image")], np.zeros((1, WIDTH), np.float32))
    with pytest.raises(AudioDecodeError, match="missing"):
        AudioVisualIndex.build(towers, [folder / "missing.wav"])


def test_what_no_index_can_hold_is_refused_before_any_work(folder, towers, tmp_path, monkeypatch):
    monkeypatch.setattr(towers, "embed_image", lambda path: pytest.fail(f"{path} was embedded"))
    good, stray = str(folder / "1.png"), os.fsdecode(b"caf\xe9.png")
    for files, message in (
        ([good, stray], r"caf\\udce9\.png' is not UTF-8"),
        ([good, (good, "caf\udce9")], r"caf\\udce9' is not UTF-8"),
        ([good, good.encode()], "expected a path, or a pair"),
        ([good, (good, "label", 3)], "expected a path, or a pair"),
        ([good, (good, 3)], "expected a path, or a pair"),
        ([good, None], "got None; expected a path"),
        (None, "got NoneType; expected paths"),
        (good, "got str; expected paths"),
    ):
        with pytest.raises(DataError, match=message):
            AudioVisualIndex.build(towers, files)
    model = write_pair(tmp_path / os.fsdecode(b"caf\xe9.onnx"), "towers")
    with TFAudioClassifier(model, threads=1) as stray_model, pytest.raises(DataError, match="UTF-8"):
        AudioVisualIndex.build(stray_model, [good])


def test_folders_are_listed_by_their_files(folder, tmp_path):
    (tmp_path / "d.wav").mkdir()
    (tmp_path / "d.wav" / "a.wav").symlink_to(folder / "1.wav")
    assert list_files([tmp_path]) == [(tmp_path / "d.wav" / "a.wav", None)]


def test_a_label_is_kept_however_else_its_file_is_named(folder, tmp_path):
    labelled, outer = tmp_path / "outer" / "labelled", tmp_path / "outer"
    labelled.mkdir(parents=True)
    for name in ("a.wav", "b.wav"):
        (labelled / name).symlink_to(folder / "1.wav")
    (labelled / "metadata.csv").write_text("file,label,split\na.wav,dog,test\nb.wav,cat,test\n")
    expected = {labelled / "a.wav": "dog", labelled / "b.wav": "cat"}
    for inputs in (
        [labelled],
        [labelled, labelled / "a.wav"],
        [labelled / "a.wav", labelled],
        [labelled, outer],
        [outer, labelled],
    ):
        found = list_files(inputs)
        assert (dict(found), len(found)) == (expected, 2)


def test_a_joint_model_makes_no_index(folder, tmp_path):
    with (
        TFAudioClassifier(write_pair(tmp_path / "joint.onnx", "joint"), threads=1) as joint,
        pytest.raises(ModelFileError, match="embedding of features and image"),
    ):
        AudioVisualIndex.build(joint, [folder / "1.wav"])


def test_without_faiss_the_extra_is_named(folder, index, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    fresh = AudioVisualIndex(index.classifier, index.entries, index.vectors)
    with pytest.raises(MissingDependencyError, match=r"crossfade\[search\]"):
        fresh.search(audio=folder / "1.wav", k=1)
