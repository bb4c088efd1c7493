"""The command line with pictures, videos and an index."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import soundfile
from PIL import Image

from infer_tf import AudioVisualIndex, TFAudioClassifier
from infer_tf.cli import main
from infer_tf.evaluation import evaluate
from models_zoo.dataset import read_dataset
from models_zoo.retrieval import cosine_similarity, retrieval_metrics
from parity_tests.infer_tf.tiny import LABELS
from parity_tests.infer_tf.tiny_pairs import RATE, video, write_pair, write_picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    for kind in ("joint", "towers", "pictures", "sounds"):
        write_pair(root / f"{kind}.onnx", kind)
    data = root / "data"
    data.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for index in range(9):
        noise = rng.standard_normal(RATE // 2) * np.linspace(0.01, 0.3, RATE // 2) ** (1 + index % 3)
        soundfile.write(data / f"{index}.wav", noise, RATE)
        write_picture(data / f"{index}.png", index)
        rows.append((f"{index}.wav", LABELS[index % 3], f"{index}.png", "test"))
    with (data / "metadata.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("file", "label", "image", "split"), *rows])
    (root / "clip.mkv").write_bytes(video(seed=1))
    return root


@pytest.fixture(autouse=True)
def _here(folder, monkeypatch):
    monkeypatch.chdir(folder)


def run(capsys, *arguments):
    code = main([str(argument) for argument in (*arguments, "--threads", "1")])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def told(capsys, *arguments):
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    return [{row["label"]: row["probability"] for row in json.loads(line)["top"]} for line in out.splitlines()]


def asked(model, **given):
    with TFAudioClassifier(model, threads=1) as classifier:
        says = classifier.predict(**given)
    return {label: pytest.approx(value, abs=1e-6) for label, _, value in says.top()}


def test_predict_a_recording_with_its_picture(capsys):
    expected = asked("joint.onnx", audio="data/1.wav", image="data/2.png")
    assert told(capsys, "predict", "joint.onnx", "data/1.wav", "--image", "data/2.png") == [expected]
    windows = told(capsys, "predict", "joint.onnx", "data/1.wav", "--image", "data/2.png", "--window", "0.2")
    assert len(windows) == 4


def test_predict_a_picture(capsys):
    expected = asked("pictures.onnx", image="data/3.png")
    assert told(capsys, "predict", "pictures.onnx", "--image", "data/3.png") == [expected]
    assert told(capsys, "predict", "pictures.onnx", "data/3.png", "data/3.png") == [expected] * 2
    code, out, _ = run(capsys, "predict", "pictures.onnx", "data/3.png")
    assert code == 0
    assert out.startswith("data/3.png")


def test_predict_a_video(capsys):
    for frames, given in ((), {}), (("--frames", "all"), {"frames": "all"}), (("--frames", "0,9"), {"frames": [0, 9]}):
        expected = asked("joint.onnx", video="clip.mkv", **given)
        assert told(capsys, "predict", "joint.onnx", "clip.mkv", *frames) == [expected]


def test_what_cannot_be_predicted(capsys):
    cases = {
        ("joint.onnx", "data/1.wav"): "image: missing",
        ("joint.onnx",): "nothing to predict",
        ("joint.onnx", "--image", "data/1.png"): "audio: missing",
        ("sounds.onnx", "data/1.wav", "--image", "data/1.png"): "looks at no pictures",
        ("joint.onnx", "data/1.wav", "data/2.wav", "--image", "data/1.png"): "--image takes one recording",
        ("joint.onnx", "clip.mkv", "--window", "1"): "windows are cut out of recordings",
        ("joint.onnx", "clip.mkv", "--frames", "some"): "expected middle, all",
        ("joint.onnx", "clip.mkv", "--frames", "11"): "frames 0 to 9",
    }
    for arguments, message in cases.items():
        code, out, err = run(capsys, "predict", *arguments)
        assert (code, out) == (2, "")
        assert message in err


def colours_of(path):
    with Image.open(path) as picture:
        return {tuple(colour) for colour in np.asarray(picture.convert("RGB")).reshape(-1, 3)}


def test_plots_show_what_was_given(capsys, tmp_path):
    for name, arguments in {
        "joint": ("joint.onnx", "data/1.wav", "--image", "data/1.png"),
        "picture": ("pictures.onnx", "--image", "data/1.png"),
        "video": ("joint.onnx", "clip.mkv"),
    }.items():
        code, _, err = run(capsys, "predict", *arguments, "--plot", tmp_path / f"{name}.png")
        assert code == 0, err
        drawn, colours = (colours_of(path) for path in (tmp_path / f"{name}.png", "data/1.png"))
        assert (len(colours & drawn) > 3) == (name != "video")


def test_info_says_how_a_picture_is_read(capsys):
    code = main(["info", "joint.onnx"])
    out = capsys.readouterr().out
    assert code == 0
    assert "short side to 32 (bicubic), centre 32 x 32" in out
    assert "0.485, 0.456, 0.406" in out


def test_index_and_search(capsys, tmp_path):
    path = tmp_path / "pairs.index"
    code, _, err = run(capsys, "index", "towers.onnx", "data", "clip.mkv", "-o", path)
    assert code == 0
    assert "entered 10 sounds and 10 pictures of 19 files" in err
    with TFAudioClassifier("towers.onnx", threads=1) as towers:
        pictures = [towers.embed_image(f"data/{index}.png") for index in range(9)]
        cosines = cosine_similarity([towers.embed_audio("data/4.wav")], pictures)[0]
    best = [f"{index}.png" for index in np.argsort(-cosines)]
    sheet = tmp_path / "sheet.png"
    code, out, err = run(capsys, "search", path, "data/4.wav", "-k", "10", "--json", "--plot", sheet)
    assert code == 0, err
    matches = json.loads(out)["matches"]
    assert [match["path"].split("/")[-1] for match in matches if "mkv" not in match["path"]] == best
    assert matches[0].keys() == {"path", "label", "kind", "cosine"}
    named = {match["path"].split("/")[-1]: match["label"] for match in matches}
    assert named["4.png"] == LABELS[1]
    assert named["clip.mkv"] is None
    with Image.open(sheet) as picture:
        width, height = picture.size
    assert width > height > 300
    code, out, _ = run(capsys, "search", path, "data/4.png")
    assert code == 0
    assert len(out.splitlines()) == 11
    assert all(line.endswith((".wav", ".mkv")) for line in out.splitlines()[1:])
    assert "joint" not in out
    for arguments, message in {
        (path, "data/4.wav", "-k", "11"): "10 entries of image",
        (path, "data/metadata.csv"): "its suffix '.csv'",
        (path, "clip.mkv"): "search by its sound",
        ("data/4.wav", "data/4.wav"): "damaged",
        (path, "data/4.wav", "--model", "joint.onnx"): "built with another model",
        (path, "data/4.wav", "--encoder", "joint.onnx"): "unrecognized arguments: --encoder",
        (path, "data/4.wav", "--weights", "1"): "unrecognized arguments: --weights",
    }.items():
        code, _, err = run(capsys, "search", *arguments)
        assert code == 2
        assert message in err
    code, _, err = run(capsys, "index", "towers.onnx", "data", "-o", path)
    assert code == 2
    assert "--force" in err
    code, _, err = run(capsys, "index", "towers.onnx", "data", "-o", tmp_path / "train.index", "--split", "train")
    assert code == 2
    assert "train" in err


def test_a_contact_sheet_has_an_end(capsys, tmp_path, monkeypatch):
    with TFAudioClassifier("towers.onnx", threads=1) as towers:
        AudioVisualIndex.build(towers, [f"data/{index % 9}.png" for index in range(53)]).save(tmp_path / "a")
    drawn = []
    monkeypatch.setattr("infer_tf.plot.plot_matches", lambda *given, force: drawn.append(given[-1]))
    for k, said in (("53", "sheet.png, with the first 50 of 53\n"), ("50", "sheet.png\n")):
        arguments = ("search", tmp_path / "a", "data/4.wav", "-k", k, "--plot", tmp_path / "sheet.png")
        code, out, err = run(capsys, *arguments)
        assert (code, len(out.splitlines())) == (0, 1 + int(k))
        assert err.endswith(said)
    assert [len(matches) for matches in drawn] == [50, 50]


def test_no_output_replaces_what_was_given(capsys, tmp_path, monkeypatch):
    """Links make each input an output that exists, whatever suffix the option wants."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "data"
    root.mkdir()
    write_pair(tmp_path / "towers.onnx", "towers")
    write_pair(tmp_path / "joint.onnx", "joint")
    write_pair(tmp_path / "pictures.onnx", "pictures")
    soundfile.write(root / "a.wav", np.random.default_rng(0).standard_normal(RATE // 2) / 9, RATE)
    for seed, name in enumerate(("data/a.png", "b.png")):
        write_picture(tmp_path / name, seed)
    (root / "metadata.csv").write_text(f"file,label,image,split\na.wav,{LABELS[0]},a.png,test\n")
    for name in ("towers.onnx", "joint.onnx", "data/a.wav"):
        (tmp_path / f"{name.replace('/', '-')}.png").hardlink_to(name)
    (tmp_path / "sound.csv").hardlink_to("data/a.wav")
    code, _, err = run(capsys, "index", "towers.onnx", "data", "-o", "pairs.index")
    assert code == 0, err
    (tmp_path / "pairs.png").hardlink_to("pairs.index")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for arguments in (
        ("index", "towers.onnx", "data/a.png", "-o", "data/a.png"),
        ("index", "towers.onnx", "data", "-o", "data/a.wav"),
        ("index", "towers.onnx", "data", "-o", "data/metadata.csv"),
        ("index", "towers.onnx", "data", "-o", "towers.onnx"),
        ("predict", "pictures.onnx", "b.png", "--plot", "b.png"),
        ("predict", "pictures.onnx", "--image", "b.png", "--plot", "./b.png"),
        ("predict", "joint.onnx", "data/a.wav", "--image", "b.png", "--plot", "data-a.wav.png"),
        ("predict", "joint.onnx", "data/a.wav", "--image", "b.png", "--plot", "joint.onnx.png"),
        ("predict", "joint.onnx", "data", "-o", "sound.csv"),
        ("search", "pairs.index", "b.png", "--plot", "b.png"),
        ("search", "pairs.index", "b.png", "--plot", "pairs.png"),
        ("search", "pairs.index", "b.png", "--plot", "data/a.png"),
        ("evaluate", "joint.onnx", "--data", "data", "--plot", "data/a.png"),
        ("evaluate", "joint.onnx", "--data", "data", "--plot", "joint.onnx.png"),
    ):
        code, _, err = run(capsys, *arguments, "--force")
        assert (code, "also an input" in err) == (2, True), (arguments, err)
    assert main(["export-frontend", "joint.onnx", "-o", str(tmp_path), "--force"]) == 2
    assert "holds joint.onnx" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_evaluate_with_pictures(capsys):
    dataset = read_dataset("data").select("test")
    for kind in ("joint", "pictures"):
        with TFAudioClassifier(f"{kind}.onnx", threads=1) as classifier:
            report = evaluate(classifier, dataset)
            right = [
                classifier.predict(record.file if kind == "joint" else None, image=record.image).label
                == record.labels[0]
                for record in dataset.records
            ]
        assert report.measures["accuracy"] == pytest.approx(np.mean(right))
    code, out, err = run(capsys, "evaluate", "towers.onnx", "--data", "data", "--json")
    assert code == 0, err
    measures = json.loads(out)["measures"]
    with TFAudioClassifier("towers.onnx", threads=1) as towers:
        sounds = towers.embed_audio([record.file for record in dataset.records])
        pictures = towers.embed_image([record.image for record in dataset.records])
    similarity = cosine_similarity(sounds, pictures)
    names = np.array([record.labels[0] for record in dataset.records])
    same = names[:, None] == names
    for name, rows in (("audio_to_image", similarity), ("image_to_audio", similarity.T)):
        for measure, value in retrieval_metrics(rows, same).items():
            assert measures[f"{name}_{measure}"] == pytest.approx(value)
    assert measures["chance_at_1"] == pytest.approx(1 / 3)
    code, out, _ = run(capsys, "evaluate", "towers.onnx", "--data", "data")
    assert "audio_to_image_recall_at_10" in out


def test_evaluate_without_the_pictures_says_which_column(capsys, tmp_path):
    soundfile.write(tmp_path / "1.wav", np.zeros(RATE), RATE)
    (tmp_path / "metadata.csv").write_text(f"file,label,split\n1.wav,{LABELS[0]},test\n")
    for kind in ("joint", "towers"):
        code, _, err = run(capsys, "evaluate", f"{kind}.onnx", "--data", tmp_path)
        assert code == 2
        assert "1.wav: no picture" in err
        assert "column 'image'" in err
