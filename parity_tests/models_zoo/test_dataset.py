from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models_zoo.dataset import Dataset, Record, read_dataset, read_split
from models_zoo.errors import DataError, OutputExistsError


def folder_with(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def table(root: Path, text: str, *, encoding: str = "utf-8", name: str = "metadata.csv") -> Path:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(text.encode(encoding))
    return root


@pytest.fixture
def speakers(tmp_path: Path) -> Dataset:
    """Three labels by four speakers, seven recordings each."""
    rows = [
        (f"audio/{label}_{speaker}_{take}.wav", label, speaker, str(take % 5))
        for label in ("no", "stop", "yes")
        for speaker in ("ann", "bob", "cy", "di")
        for take in range(7)
    ]
    folder_with(tmp_path, *(row[0] for row in rows))
    lines = "\n".join(",".join(row) for row in rows)
    return read_dataset(table(tmp_path, "file,label,speaker,fold\n" + lines))


# Layouts


def test_table(tmp_path: Path) -> None:
    folder_with(tmp_path, "audio/a b.wav", "audio/ü.wav", "c,d.wav")
    text = (
        "\ufeffFile, LABEL ,split,seconds,speaker,fold\r\n"
        "audio/a b.wav, dog ,train,1.5,ann,1\r\n"
        '"audio/ü.wav","cat; dog",Valid,2,,\r\n'
        "\r\n"
        '"c,d.wav","say ""hi""",test,2,bob,2\r\n'
    )
    dataset = read_dataset(table(tmp_path, text))
    assert dataset.labels == ("cat", "dog", 'say "hi"')
    assert [record.labels for record in dataset.records] == [("dog",), ("cat", "dog"), ('say "hi"',)]
    assert [record.split for record in dataset.records] == ["train", "validation", "test"]
    assert [record.speaker for record in dataset.records] == ["ann", None, "bob"]
    assert [record.fold for record in dataset.records] == ["1", None, "2"]
    assert [dataset.name_of(record) for record in dataset.records] == ["audio/a b.wav", "audio/ü.wav", "c,d.wav"]
    assert dataset.class_counts() == {"cat": 1, "dog": 2, 'say "hi"': 1}
    np.testing.assert_array_equal(dataset.multi_hot(), [[0, 1, 0], [1, 1, 0], [0, 0, 1]])
    assert dataset.is_multi_label
    assert dataset.has_splits
    assert len(dataset.select("valid")) == 1
    assert dataset.select("test").labels == dataset.labels
    assert read_dataset(tmp_path / "metadata.csv") == dataset


def test_labelled_stretches(tmp_path: Path) -> None:
    folder_with(tmp_path, "a.wav", "b.wav")
    text = "file,label,onset,offset\na.wav,dog,0,1.5\na.wav,cat,1.0,2\na.wav,dog,3,4\nb.wav,cat,,\n"
    dataset = read_dataset(table(tmp_path, text))
    assert [(record.onset, record.offset) for record in dataset.records] == [(0, 1.5), (1, 2), (3, 4), (None, None)]
    merged = dataset.by_file()
    assert [record.labels for record in merged.records] == [("dog", "cat"), ("cat",)]
    assert all(record.onset is None for record in merged.records)


def test_classes_known_to_be_absent_and_unknown_ones(tmp_path: Path) -> None:
    folder_with(tmp_path, "a.wav", "b.wav", "c.wav")
    text = "file,label,absent\na.wav,cello,flute;voice\nb.wav,,cello\nc.wav,cello; voice,\n"
    dataset = read_dataset(table(tmp_path, text))
    assert dataset.labels == ("cello", "flute", "voice"), "classes that are only ever absent are classes"
    assert [record.labels for record in dataset.records] == [("cello",), (), ("cello", "voice")]
    assert [record.absent for record in dataset.records] == [("flute", "voice"), ("cello",), ()]
    np.testing.assert_array_equal(dataset.multi_hot(), [[1, 0, 0], [0, 0, 0], [1, 0, 1]])
    np.testing.assert_array_equal(dataset.known(), [[1, 1, 1], [1, 0, 0], [1, 0, 1]])
    assert dataset.is_multi_label
    wider = dataset.with_labels(("voice", "drums", "flute", "cello"))
    np.testing.assert_array_equal(wider.known(), [[1, 0, 1, 1], [0, 0, 0, 1], [1, 0, 0, 1]])
    assert dataset.class_counts() == {"cello": 2, "flute": 0, "voice": 1}


def test_without_the_column_absent_every_label_is_known(tmp_path: Path) -> None:
    folder_with(tmp_path, "a.wav", "b.wav")
    assert read_dataset(table(tmp_path, "file,label\na.wav,dog\nb.wav,cat\n")).known() is None


def test_a_class_is_absent_from_a_file_only_where_it_is_from_every_stretch(tmp_path: Path) -> None:
    folder_with(tmp_path, "a.wav")
    text = (
        "file,label,absent,onset,offset\n"
        "a.wav,dog,cat;owl;cow,0,1\n"
        "a.wav,cat,owl;dog,1,2\n"  # the cow is unknown here
    )
    (record,) = read_dataset(table(tmp_path, text)).by_file().records
    assert record.labels == ("dog", "cat")
    assert record.absent == ("owl",)


def test_weights_of_the_labels(tmp_path: Path) -> None:
    folder_with(tmp_path, "a.wav", "b.wav", "c.wav")
    text = "file,label,weights\na.wav,three;five,0.7;0.3\nb.wav,five,1\nc.wav,one;five;three,0.3333;0.3333;0.3333\n"
    dataset = read_dataset(table(tmp_path, text))
    assert dataset.labels == ("five", "one", "three")
    assert [record.weights for record in dataset.records[:2]] == [(0.7, 0.3), (1.0,)]
    np.testing.assert_allclose(dataset.distributions(), [[0.3, 0, 0.7], [1, 0, 0], [1 / 3] * 3], rtol=1e-6)
    np.testing.assert_array_equal(dataset.distributions().sum(axis=1, dtype=np.float64).round(6), 1)
    np.testing.assert_array_equal(dataset.multi_hot(), [[1, 0, 1], [1, 0, 0], [1, 1, 1]])
    np.testing.assert_array_equal(dataset.by_file().distributions(), dataset.distributions())
    turned = dataset.with_labels(("three", "two", "one", "five"))
    np.testing.assert_allclose(turned.distributions()[0], [0.7, 0, 0, 0.3])


def test_without_weights_a_clip_is_all_of_its_one_label(tmp_path: Path) -> None:
    folder_with(tmp_path, "a.wav", "b.wav")
    one = read_dataset(table(tmp_path, "file,label\na.wav,dog\nb.wav,cat\n"))
    np.testing.assert_array_equal(one.distributions(), one.multi_hot())
    for text in ("file,label\na.wav,dog\nb.wav,cat;dog\n", "file,label,absent\na.wav,dog,\nb.wav,cat,dog\n"):
        with pytest.raises(DataError, match="without saying how much of each; add the column 'weights'"):
            read_dataset(table(tmp_path, text)).distributions()


def test_files_of_one_recording(tmp_path: Path) -> None:
    names = [f"{take}{cut}.wav" for take in "abcdefghij" for cut in range(3)]
    folder_with(tmp_path, *names)
    rows = "\n".join(f"{name},{'dog' if name[0] < 'f' else 'cat'},{name[0]}" for name in names)
    dataset = read_dataset(table(tmp_path, "file,label,recording\n" + rows))
    for seed in range(10):
        split = dataset.split_by_file(test=0.4, seed=seed)
        sides = {r.recording: r.split for r in split.records}
        assert all(sides[r.recording] == r.split for r in split.records)
        assert len(split.select("test")) == 12
        assert set(split.select("test").class_counts().values()) == {6}


def test_pictures_of_clips(tmp_path: Path) -> None:
    folder_with(tmp_path, "a.wav", "b.wav", "c.wav", "pictures/a.png", "b_0.jpg", "b_1.jpg", "b_2.jpg")
    text = "file,label,image\na.wav,dog,pictures/a.png\nb.wav,cat,b_0.jpg; b_1.jpg;b_2.jpg\nc.wav,cat,\n"
    dataset = read_dataset(table(tmp_path, text))
    assert [record.image for record in dataset.records] == [tmp_path / "pictures/a.png", tmp_path / "b_1.jpg", None]
    assert dataset.records[1].images == tuple(tmp_path / f"b_{frame}.jpg" for frame in range(3))
    assert dataset.by_file().records[1].images == dataset.records[1].images
    assert read_dataset(table(tmp_path, "file,label\na.wav,dog\n")).records[0].image is None


def test_of_ten_frames_the_sixth_is_looked_at() -> None:
    frames = tuple(Path(f"{frame}.jpg") for frame in range(10))
    assert Record(Path("a.wav"), ("dog",), images=frames).image == Path("5.jpg")


def test_esc50(tmp_path: Path) -> None:
    folder_with(tmp_path, "audio/1-100-A-0.wav", "audio/2-7-B-14.wav", "audio/1-9-A-3.wav")
    text = (
        "filename,fold,target,category,esc10,src_file,take\n"
        "1-100-A-0.wav,1,0,dog,True,100,A\n"
        "2-7-B-14.wav,2,14,chirping_birds,False,7,B\n"
        "1-9-A-3.wav,1,3,cow,False,9,A\n"
    )
    dataset = read_dataset(table(tmp_path, text, name="meta/esc50.csv"))
    assert dataset.labels == ("dog", "cow", "chirping_birds"), "in the order of the targets"
    assert [record.fold for record in dataset.records] == ["1", "2", "1"]
    assert [record.recording for record in dataset.records] == ["100", "7", "9"]
    assert dataset.records[0].file == tmp_path / "audio" / "1-100-A-0.wav"
    assert [(fold, len(part.select("test"))) for fold, part in dataset.leave_one_out("fold")] == [("1", 2), ("2", 1)]


def test_class_folders(tmp_path: Path) -> None:
    folder_with(tmp_path, "dog/1.wav", "dog/more/2.FLAC", "cat/1.mp3", "cat/._1.mp3", ".cache/x.wav", "cat/notes.txt")
    dataset = read_dataset(tmp_path)
    assert dataset.labels == ("cat", "dog")
    assert [dataset.name_of(record) for record in dataset.records] == ["cat/1.mp3", "dog/1.wav", "dog/more/2.FLAC"]
    assert not dataset.has_splits


def test_class_folders_below_splits(tmp_path: Path) -> None:
    dataset = read_dataset(folder_with(tmp_path, "train/dog/1.wav", "train/cat/2.wav", "val/dog/3.wav"))
    assert dataset.labels == ("cat", "dog")
    assert [record.split for record in dataset.records] == ["train", "train", "validation"]


# What is wrong with data


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "missing column 'file', 'label'"),
        ("file;label\na.wav;dog\n", "missing column 'file', 'label'"),
        ("name,label\na.wav,dog\n", "missing column 'file'"),
        ("file,label,label\na.wav,dog,cat\n", "twice"),
        ("file,label\n", "lists no recordings"),
        ("file,label\na.wav,\n", r"metadata\.csv:2: empty 'label'"),
        ("file,label,absent\na.wav,,\n", r"metadata\.csv:2: empty 'label'.*known to be 'absent'"),
        ("file,label,absent\na.wav,dog,cat;dog\n", r"metadata\.csv:2: 'dog' is in 'label' and in 'absent'"),
        ("file,label,absent\na.wav,dog,cat;\n", "distinct names"),
        ("file,label,split,recording\na.wav,dog,train,1\nb.wav,dog,test,1\n", "'recording 1' in"),
        ("file,label,recording,onset,offset\na.wav,dog,1,0,1\na.wav,dog,2,2,3\n", "speakers, folds, recordings"),
        ("file,label\n,dog\n", "empty 'file'"),
        ("file,label\na.wav,dog;\n", "got label 'dog;'"),
        ("file,label\na.wav,dog;dog\n", "distinct"),
        ("file,label\na.wav,dog,extra\n", "got 3 values; expected 2"),
        ("file,label\na.wav\n", "got 1 values; expected 2"),
        ("file,label\na.wav,dog\nx.wav,dog\ny.wav,cat\n", "2 listed files are missing: 'x.wav', 'y.wav'"),
        ("file,label\n../a.wav,dog\n", "leads out of"),
        ("file,label\n/etc/hostname,dog\n", "leads out of"),
        ("file,label\nsub/../../a.wav,dog\n", "leads out of"),
        ("file,label\na.wav,dog\na.wav,dog\n", "has 2 rows"),
        ("file,label\na.wav,dog\na.wav,cat\n", "separated by ';'"),
        ("file,label,onset,offset\na.wav,dog,0,1\na.wav,dog,0,1\n", "same row twice"),
        ("file,label,onset,offset\na.wav,dog,zero,1\n", "onset 'zero'"),
        ("file,label,onset,offset\na.wav,dog,0,\n", "expected seconds in both"),
        ("file,label,onset,offset\na.wav,dog,2,1\n", "onset < offset"),
        ("file,label,onset,offset\na.wav,dog,1,1\n", "onset < offset"),
        ("file,label,onset,offset\na.wav,dog,-1,1\n", "0 <= onset"),
        ("file,label,onset,offset\na.wav,dog,0,nan\n", "onset < offset"),
        ("file,label,onset,offset\na.wav,dog,0,inf\n", "onset < offset"),
        ("file,label,split\na.wav,dog,holdout\n", "unknown split 'holdout'"),
        ("file,label,split\na.wav,dog,train\nb.wav,dog,\n", "1 recordings are in no split"),
        ("file,label,split,onset,offset\na.wav,dog,train,0,1\na.wav,dog,test,2,3\n", "more than one split"),
        ("file,label,speaker,onset,offset\na.wav,dog,ann,0,1\na.wav,dog,bob,2,3\n", "different speakers"),
        ('file,label\n"a.wav,dog\n', "not a CSV table"),
        ("file,label,weights\na.wav,dog;cat,0.7;-0.3\n", r"metadata\.csv:2: got weights '0.7;-0.3'.*none negative"),
        ("file,label,weights\na.wav,dog,1\nb.wav,dog;cat,1.3;-0.3\n", r"metadata\.csv:3: .*none negative"),
        ("file,label,weights\na.wav,dog;cat,0.7;0.2\n", "0.9 in sum.*1 in sum"),
        ("file,label,weights\na.wav,dog;cat,0.701;0.301\n", "1.002 in sum"),
        ("file,label,weights\na.wav,dog;cat,much;0.3\n", "'much;0.3'; expected 2, numbers"),
        ("file,label,weights\na.wav,dog;cat,1\n", "expected 2, separated by ';'"),
        ("file,label,weights\na.wav,dog,\n", "expected 1, numbers separated by ';'"),
        ("file,label,weights\na.wav,dog;cat,half;half\n", "got weights 'half;half'"),
        ("file,label,weights\na.wav,dog;cat,nan;1\n", "got weights 'nan;1'"),
        ("file,label,weights\na.wav,dog;cat,inf;-inf\n", "got weights 'inf;-inf'"),
        ("file,label,weights,onset,offset\na.wav,dog;cat,0.5;0.5,0,1\n", "leave out onset, offset and absent"),
        ("file,label,weights,absent\na.wav,dog;cat,0.5;0.5,cow\n", "leave out onset, offset and absent"),
        ("file,label,image\na.wav,dog,x.png\nb.wav,dog,b.wav\n", "1 listed files are missing: 'x.png'"),
        ("file,label,image\na.wav,dog,../x.png\n", r"metadata\.csv:2: image '../x.png' leads out of"),
        ("file,label,image\na.wav,dog,/etc/hostname\n", "image '/etc/hostname' leads out of"),
        ("file,label,image\na.wav,dog,b.wav;\n", "got image 'b.wav;'"),
        ("file,label,image,split\na.wav,dog,b.wav,train\nb.wav,dog,b.wav,test\n", "'image b.wav' in"),
        ("file,label,image,onset,offset\na.wav,dog,a.wav,0,1\na.wav,dog,b.wav,2,3\n", "recordings or images"),
    ],
)
def test_tables_that_are_refused(tmp_path: Path, text: str, words: str) -> None:
    folder_with(tmp_path, "a.wav", "b.wav")
    with pytest.raises(DataError, match=words):
        read_dataset(table(tmp_path, text))


def test_tables_in_another_encoding_are_refused(tmp_path: Path) -> None:
    folder_with(tmp_path, "a.wav")
    with pytest.raises(DataError, match="UTF-8"):
        read_dataset(table(tmp_path, "file,label\na.wav,Vögel\n", encoding="latin-1"))


def test_folders_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        read_dataset(tmp_path / "missing")
    with pytest.raises(DataError, match="no recordings found"):
        read_dataset(tmp_path)
    folder_with(tmp_path, "dog/1.wav", "2.wav")
    with pytest.raises(DataError, match=r"2\.wav: lies in no class folder"):
        read_dataset(tmp_path)
    folder_with(tmp_path / "empty", "dog/1.wav", "cat/notes.txt", ".cache/x")
    (tmp_path / "empty" / "owl").mkdir()
    with pytest.raises(DataError, match="2 class folders hold no recordings: 'cat', 'owl'"):
        read_dataset(tmp_path / "empty")
    folder_with(tmp_path / "sides", "train/dog/1.wav", "test/dog/2.wav")
    (tmp_path / "sides" / "test" / "cat").mkdir()
    with pytest.raises(DataError, match=r"1 class folders hold no recordings: 'test.cat'"):
        read_dataset(tmp_path / "sides")
    folder_with(tmp_path / "esc", "audio/1.wav", "audio/2.wav")
    for rows, words in (
        ("1.wav,1,x,dog", "expected a class number"),
        ("1.wav,1,0,dog\n2.wav,1,1,dog", "target 1 here and 0 before"),
        ("3.wav,1,0,dog", "missing"),
    ):
        table(tmp_path / "esc", f"filename,fold,target,category\n{rows}\n", name="meta/esc50.csv")
        with pytest.raises(DataError, match=words):
            read_dataset(tmp_path / "esc")


def test_remarks(tmp_path: Path) -> None:
    folder_with(tmp_path, "a.wav", "b.wav", "c.wav")
    one = read_dataset(table(tmp_path, "file,label\na.wav,dog\nb.wav,dog\n"))
    assert "only one class, 'dog'" in one.remarks()[0]
    uneven = read_dataset(table(tmp_path, "file,label,split\na.wav,dog,train\nb.wav,cat,train\nc.wav,dog,test\n"))
    assert uneven.remarks() == ["split 'test' has no recording of 'cat'"]


# Splits


def sides(dataset: Dataset, of: str) -> dict[str, set[object]]:
    return {
        split: {getattr(record, of) for record in dataset.records if record.split == split}
        for split in ("train", "validation", "test")
    }


@pytest.mark.parametrize("seed", range(5))
def test_split_by_file(speakers: Dataset, seed: int) -> None:
    split = speakers.split_by_file(test=0.2, validation=0.1, seed=seed)
    assert split == speakers.split_by_file(test=0.2, validation=0.1, seed=seed)
    assert split != speakers.split_by_file(test=0.2, validation=0.1, seed=seed + 1)
    files = sides(split, "file")
    assert set.union(*files.values()) == {record.file for record in speakers.records}
    assert sum(map(len, files.values())) == len(speakers)
    assert abs(len(files["test"]) - 0.2 * len(speakers)) <= 1
    assert abs(len(files["validation"]) - 0.1 * len(speakers)) <= 1
    for part, share in (("test", 0.2), ("validation", 0.1)):
        assert all(abs(count - share * 28) <= 1.5 for count in split.select(part).class_counts().values())
    split.check_disjoint()


@pytest.mark.parametrize("by", ["speaker", "fold"])
@pytest.mark.parametrize("seed", range(5))
def test_split_by_group_never_tears_one(speakers: Dataset, by: str, seed: int) -> None:
    split = speakers.split_by_group(by, test=0.25, validation=0.2, seed=seed)  # type: ignore[arg-type]
    groups = sides(split, by)
    assert all(groups.values())
    assert sum(map(len, groups.values())) == len(set.union(*groups.values()))
    split.check_disjoint(by)  # type: ignore[arg-type]


def test_groups_held_out_by_name_and_one_by_one(speakers: Dataset) -> None:
    split = speakers.split_by_group("speaker", held_out=["bob", "cy"])
    assert sides(split, "speaker") == {"train": {"ann", "di"}, "validation": set(), "test": {"bob", "cy"}}
    runs = dict(speakers.leave_one_out("speaker"))
    assert list(runs) == ["ann", "bob", "cy", "di"]
    for name, run in runs.items():
        assert sides(run, "speaker")["test"] == {name}
        assert name not in sides(run, "speaker")["train"]
        assert len(run) == len(speakers)


def test_carving_validation_leaves_test_alone(speakers: Dataset) -> None:
    split = speakers.split_by_group("speaker", held_out=["di"])
    for by in ("file", "speaker"):
        carved = split.carve_validation(0.3, by=by)  # type: ignore[arg-type]
        assert sides(carved, "file")["test"] == sides(split, "file")["test"]
        assert sides(carved, "file")["validation"]
        assert sides(carved, "file")["validation"] | sides(carved, "file")["train"] == sides(split, "file")["train"]
        carved.check_disjoint()
    carved.check_disjoint("speaker")


def test_stretches_of_a_file_stay_together(tmp_path: Path) -> None:
    names = [f"{i}.wav" for i in range(20)]
    folder_with(tmp_path, *names)
    rows = [f"{name},{label},{onset},{onset + 1}" for name in names for onset, label in enumerate(("dog", "cat"))]
    dataset = read_dataset(table(tmp_path, "file,label,onset,offset\n" + "\n".join(rows)), split_by="file", test=0.25)
    dataset.check_disjoint()
    assert len(dataset.select("test")) == 10


def test_split_written_and_read_back(speakers: Dataset, tmp_path: Path) -> None:
    split = speakers.split_by_file(test=0.3, seed=4)
    path = tmp_path / "run" / "split.csv"
    split.write_split(path)
    assert path.read_text().startswith("file,label,split\naudio/no_ann_0.wav,no,")
    assert speakers.with_split(read_split(path)) == split
    with pytest.raises(OutputExistsError):
        split.write_split(path)
    split.write_split(path, force=True)
    with pytest.raises(DataError, match="in no split"):
        speakers.write_split(tmp_path / "other.csv")
    lines = path.read_text().splitlines()
    for changed, words in (
        ([*lines, lines[-1]], "listed twice"),
        (lines[:-1], "1 files are not in the split: 'audio/yes_di_6.wav'"),
        ([*lines, "audio/other.wav,yes,test"], "1 files are not in the data: 'audio/other.wav'"),
        ([line.replace("train", "trian") for line in lines], "unknown split 'trian'"),
    ):
        path.write_text("\n".join(changed))
        with pytest.raises(DataError, match=words):
            speakers.with_split(read_split(path))


def test_splits_that_are_refused(speakers: Dataset, tmp_path: Path) -> None:
    for test, validation in ((1.0, 0.0), (-0.1, 0.0), (0.5, 0.5), (float("nan"), 0.0)):
        with pytest.raises(DataError, match="expected shares"):
            speakers.split_by_file(test=test, validation=validation)
    with pytest.raises(DataError, match="no speaker called 'eve'"):
        speakers.split_by_group("speaker", held_out=["eve"])
    with pytest.raises(DataError, match="nothing left to train on"):
        speakers.split_by_group("speaker", held_out=["ann", "bob", "cy", "di"])
    with pytest.raises(DataError, match="expected 'speaker' or 'fold'"):
        speakers.split_by_group("label")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no recording in split 'test'"):
        speakers.select("test")
    with pytest.raises(DataError, match="unknown split"):
        speakers.select("holdout")
    tiny = read_dataset(table(folder_with(tmp_path / "tiny", "a.wav", "b.wav"), "file,label\na.wav,x\nb.wav,x\n"))
    with pytest.raises(DataError, match="2 files are too few"):
        tiny.split_by_file(test=0.1)
    with pytest.raises(DataError, match=r"'a\.wav' has no speaker"):
        tiny.split_by_group("speaker")


def test_labels_in_a_models_order(speakers: Dataset) -> None:
    reordered = speakers.with_labels(("yes", "other", "no", "stop"))
    assert reordered.labels == ("yes", "other", "no", "stop")
    assert reordered.class_counts() == {"yes": 28, "other": 0, "no": 28, "stop": 28}
    with pytest.raises(DataError, match="1 labels are unknown to the model: 'stop'"):
        speakers.with_labels(("yes", "no"))


def test_copies_in_different_splits_are_found(tmp_path: Path) -> None:
    folder_with(tmp_path, "a.wav", "b.wav", "c.wav")
    (tmp_path / "c.wav").write_bytes((tmp_path / "a.wav").read_bytes())
    rows = "file,label,split\na.wav,dog,train\nb.wav,dog,train\nc.wav,dog,{}\n"
    assert read_dataset(table(tmp_path, rows.format("test"))).copies_across_splits() == [("a.wav", "c.wav")]
    assert read_dataset(table(tmp_path, rows.format("train"))).copies_across_splits() == []


@pytest.mark.real_data
def test_digits_and_instruments(data: Path) -> None:
    if (data / "metadata.csv").exists():
        assert read_dataset(data).labels
        return
    digits = read_dataset(data / "fsdd")
    assert digits.labels == tuple("0123456789")
    assert {split: len(digits.select(split)) for split in ("train", "test")} == {"train": 1800, "test": 200}
    assert [name for name, _ in digits.leave_one_out("speaker")] == ["george", "jackson", "lucas", "nicolas"]
    assert digits.copies_across_splits() == []
    instruments = read_dataset(data / "instruments")
    assert (len(instruments), len(instruments.labels)) == (200, 10)
    assert len(instruments.select("test")) == 50
