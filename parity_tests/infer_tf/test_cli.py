"""The crossfade command: results on stdout, one line on stderr for what is wrong, and the exit code."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import soundfile

from infer_tf import cli
from models_zoo import registry
from models_zoo.cards import CARD_KEY, CONVOLUTIONS_KEY, VERIFICATION_KEY
from models_zoo.presets import get_frontend
from models_zoo.reference import ReferenceFrontend
from parity_tests.infer_tf.conftest import RATE, noise
from parity_tests.infer_tf.tiny import LABELS, tiny_card, tiny_model, tiny_proto, with_metadata, write_tiny

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(capsys) -> Callable[..., types.SimpleNamespace]:
    """Return a function that runs the command and returns its code, stdout and stderr."""

    def call(*arguments: object) -> types.SimpleNamespace:
        code = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return types.SimpleNamespace(code=code, out=captured.out, err=captured.err)

    return call


def shell(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "infer_tf.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, **options)


def refused(result: types.SimpleNamespace | subprocess.CompletedProcess[str]) -> str:
    """Check that the command refused in one line, and return the line."""
    code, out, err = (
        (result.code, result.out, result.err)
        if isinstance(result, types.SimpleNamespace)
        else (result.returncode, result.stdout, result.stderr)
    )
    assert code == 2, err
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("crossfade: error: ")
    assert "Traceback" not in err
    return err


def test_predict_prints_a_table(run, model_path, wav, classifier):
    path = wav(seconds=0.5)
    result = run("predict", model_path, path, "--threads", 1)
    assert (result.code, result.err) == (0, "")
    first, *rows = result.out.splitlines()
    assert first == f"{path}  (0.50 s)"
    expected = classifier.predict(path).top(5)
    assert [row.split()[:2] for row in rows] == [[label, f"{value:.4f}"] for label, _, value in expected]
    assert run("predict", model_path, path, "--top", 1).out.splitlines()[1:] == rows[:1]


def test_predict_prints_json(run, model_path, wav, classifier):
    path = wav(seconds=0.5)
    plain = json.loads(run("predict", model_path, path, "--json").out)
    answer = classifier.predict(path).to_dict()
    del answer["embedding"]
    assert plain == {"file": str(path), **answer}
    full = json.loads(run("predict", model_path, path, "--json", "--embedding", "--top", 2).out)
    assert len(full["top"]) == 2
    np.testing.assert_allclose(full["embedding"], classifier.embed(path), rtol=1e-6)
    assert "embedding  " in run("predict", model_path, path, "--embedding").out


def test_predict_slides_windows(run, model_path, wav):
    path = wav(seconds=1.2)
    rows = [json.loads(line) for line in run("predict", model_path, path, "--window", 0.5, "--json").out.splitlines()]
    assert [row["start"] for row in rows] == [0, 0.25, 0.5, 0.7]
    table = run("predict", model_path, path, "--window", 0.5, "--hop", 0.5).out.splitlines()
    assert len(table) == 3
    assert "0.70 s to      1.20 s" in table[-1]


def test_predict_reads_standard_input(run, model_path, wav, monkeypatch, classifier):
    path = wav(seconds=0.5)
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(path.read_bytes())))
    found = json.loads(run("predict", model_path, "-", "--json").out)
    assert found["top"] == classifier.predict(path).to_dict()["top"]
    with path.open("rb") as stream:
        piped = shell("predict", model_path, "-", "--json", stdin=stream)
    assert json.loads(piped.stdout) == found
    assert piped.stderr == "", "TensorFlow and onnxruntime stay quiet"


def test_several_recordings_go_on_after_a_bad_one(run, model_path, wav, tmp_path):
    good, bad, last = wav("a.wav"), tmp_path / "b.wav", wav("c.wav", seed=2)
    bad.write_bytes(b"no audio at all, only text")
    result = run("predict", model_path, good, bad, last, "--json")
    assert result.code == 1
    assert [json.loads(line)["file"] for line in result.out.splitlines()] == [str(good), str(last)]
    first, second = result.err.splitlines()
    assert first.startswith("crossfade: error: ")
    assert str(bad) in first
    assert second == "1 of 3 recordings failed"


def folder_of_recordings(wav, tmp_path) -> tuple[Path, list[str]]:
    for name, seconds in [("z.wav", 0.5), ("a/one.wav", 0.3), ("a/two.flac", 0.4), ("short.wav", 0.01)]:
        wav(f"in/{name}", seconds=seconds)
    folder = tmp_path / "in"
    (folder / "empty.wav").touch()
    (folder / "notes.txt").write_text("not a recording")
    return folder, ["a/one.wav", "a/two.flac", "empty.wav", "short.wav", "z.wav"]


def test_a_folder_becomes_a_table_with_a_row_per_failed_file(run, model_path, wav, tmp_path, classifier):
    folder, names = folder_of_recordings(wav, tmp_path)
    output = tmp_path / "out" / "scores.csv"
    result = run("predict", model_path, folder, "-o", output, "--top", 2)
    assert result.code == 1
    assert result.out == ""
    assert f"3 of 5 recordings predicted, 2 failed; wrote {output}" in result.err
    with output.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["file"] for row in rows] == [str(folder / name) for name in names]
    assert [row["code"] for row in rows] == ["", "", "empty", "too_short", ""]
    assert all((row["error"] != "") == (row["code"] != "") for row in rows)
    assert list(rows[0])[:7] == ["file", "start", "end", "label_1", "probability_1", "label_2", "probability_2"]
    best = classifier.predict(folder / names[0]).top(2)
    assert [rows[0]["label_1"], rows[0]["label_2"]] == [label for label, _, _ in best]
    assert float(rows[0]["probability_1"]) == best[0][2]

    assert "exists; pass --force" in refused(run("predict", model_path, folder, "-o", output))
    assert run("predict", model_path, folder, "-o", output, "--force").code == 1
    assert sorted(path.name for path in output.parent.iterdir()) == ["scores.csv"]


def test_a_manifest_becomes_json_lines_in_its_order(run, model_path, wav, tmp_path):
    wav("in/b.wav")
    wav("in/a.wav", seconds=0.6)
    manifest = tmp_path / "in" / "list.csv"
    manifest.write_text("note,file\nx,b.wav\ny,a.wav\nz,b.wav\n", encoding="utf-8-sig")
    output = tmp_path / "scores.jsonl"
    result = run("predict", model_path, manifest, "-o", output, "--embedding", "--window", 0.5, "--hop", 0.5)
    assert result.code == 0, result.err
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(Path(row["file"]).name, row["start"]) for row in rows] == [
        ("b.wav", 0.0),
        ("b.wav", 0.5),
        ("a.wav", 0.0),
        ("a.wav", pytest.approx(0.1)),
        ("b.wav", 0.0),
        ("b.wav", 0.5),
    ]
    assert all(len(row["embedding"]) == 8 for row in rows)


def test_an_interrupted_table_leaves_nothing(run, model_path, wav, tmp_path, monkeypatch):
    folder, _ = folder_of_recordings(wav, tmp_path)
    output = tmp_path / "out" / "scores.csv"
    import infer_tf.batch

    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return iter(())

    monkeypatch.setattr(infer_tf.batch, "scores_of", interrupted)
    result = run("predict", model_path, folder, "-o", output)
    assert result.code == 130
    assert result.err.splitlines()[-1] == "crossfade: interrupted"
    assert list(output.parent.iterdir()) == []


def test_a_progress_bar_shows_on_a_terminal(model_path, wav, tmp_path):
    import pty
    import termios

    folder, _ = folder_of_recordings(wav, tmp_path)
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 120))
    command = [sys.executable, "-m", "infer_tf.cli", "predict", model_path, folder, "-o", tmp_path / "o.csv"]
    subprocess.run(command, stderr=follower, cwd=ROOT, timeout=120)
    os.close(follower)
    assert b"5/5" in os.read(leader, 1 << 16)
    os.close(leader)


LONG = "n" * 300

BAD_COMMANDS: dict[str, tuple[list[str], str]] = {
    "nothing": ([], "required: COMMAND"),
    "unknown command": (["predikt"], "invalid choice"),
    "no input": (["predict", "MODEL"], "nothing to predict"),
    "unknown option": (["predict", "MODEL", "clip.wav", "--frobnicate"], "unrecognized arguments: --frobnicate"),
    "top 0": (["predict", "MODEL", "clip.wav", "--top", "0"], "at least 1"),
    "window 0": (["predict", "MODEL", "clip.wav", "--window", "0"], "more than 0"),
    "window nan": (["predict", "MODEL", "clip.wav", "--window", "nan"], "more than 0"),
    "window inf": (["predict", "MODEL", "clip.wav", "--window", "inf"], "expected seconds"),
    "window too short": (["predict", "MODEL", "clip.wav", "--window", "0.01"], "needs at least 514 samples"),
    "hop without window": (["predict", "MODEL", "clip.wav", "--hop", "1"], "--hop needs --window"),
    "average without window": (["predict", "MODEL", "clip.wav", "--average"], "--average needs --window"),
    "threads text": (["predict", "MODEL", "clip.wav", "--threads", "two"], "invalid int"),
    "threads 0": (["predict", "MODEL", "clip.wav", "--threads", "0"], "threads: got 0"),
    "unknown device": (["predict", "MODEL", "clip.wav", "--device", "tpu"], "unknown device 'tpu'"),
    "no cuda here": (["predict", "MODEL", "clip.wav", "--device", "cuda"], "infer-gpu"),
    "unknown model": (["predict", "no-such-model", "clip.wav"], "unknown model 'no-such-model'"),
    "misspelt model": (["predict", "mn10_az", "clip.wav"], "did you mean 'mn10_as'"),
    "model is a device": (["predict", "/dev/zero", "clip.wav"], "error: /dev/zero is no regular file"),
    "verification is no JSON": (["info", "verified.onnx"], "record of verification"),
    "top of 5000 digits": (["predict", "MODEL", "clip.wav", "--top", "9" * 5000], "at least 1"),
    "window 1e308": (["predict", "MODEL", "clip.wav", "--window", "1e308"], "expected seconds"),
    "hop 1e308": (["predict", "MODEL", "clip.wav", "--window", "0.5", "--hop", "1e308"], "expected seconds"),
    "long name of an input": (["predict", "MODEL", f"{LONG}.wav"], "too long"),
    "long name of a manifest": (["predict", "MODEL", f"{LONG}.csv", "-o", "x.csv"], "too long"),
    "long name of a table": (["predict", "MODEL", "clip.wav", "-o", f"{LONG}.csv"], "too long"),
    "long name of a picture": (["predict", "MODEL", "clip.wav", "--plot", f"{LONG}.png"], "too long"),
    "name too long once partial": (["predict", "MODEL", "clip.wav", "--plot", "n" * 245 + ".png"], "too long"),
    "long name of data": (["evaluate", "MODEL", "--data", LONG], "no such folder"),
    "long name of a front end": (["export-frontend", "yamnet", "-o", LONG], "too long"),
    "missing model": (["predict", "missing.onnx", "clip.wav"], "missing.onnx does not exist"),
    "model is audio": (["predict", "clip.wav", "clip.wav"], "is not an ONNX file"),
    "model is empty": (["predict", "empty.onnx", "clip.wav"], "is empty"),
    "model truncated": (["predict", "truncated.onnx", "clip.wav"], "damaged or truncated"),
    "model without card": (["predict", "cardless.onnx", "clip.wav"], "holds no model card"),
    "model of other labels": (["predict", "labels.onnx", "clip.wav"], "3 labels, output 'logits' has 5 classes"),
    "model with external data": (["predict", "external.onnx", "clip.wav"], "external data"),
    "missing file": (["predict", "MODEL", "missing.wav"], "missing.wav: no such file"),
    "empty file": (["predict", "MODEL", "empty.wav"], "empty.wav"),
    "header only": (["predict", "MODEL", "header.wav"], "header.wav"),
    "truncated wav": (["predict", "MODEL", "truncated.wav"], "truncated.wav"),
    "truncated flac": (["predict", "MODEL", "truncated.flac"], "truncated.flac"),
    "truncated ogg": (["predict", "MODEL", "truncated.ogg"], "truncated.ogg"),
    "truncated mp3": (["predict", "MODEL", "truncated.mp3"], "truncated.mp3"),
    "text": (["predict", "MODEL", "text.wav"], "text.wav"),
    "1 Hz": (["predict", "MODEL", "slow.wav"], "1 Hz"),
    "1000 channels": (["predict", "MODEL", "wide.wav"], "1000 channels"),
    "an hour of silence": (["predict", "MODEL", "hour.flac"], "max_seconds|max-seconds"),
    "nan samples": (["predict", "MODEL", "nan.wav"], "nan.wav"),
    "too short": (["predict", "MODEL", "short.wav"], "needs at least 514 samples"),
    "max seconds": (["predict", "MODEL", "clip.wav", "--max-seconds", "0.2"], "max_seconds"),
    "folder without output": (["predict", "MODEL", "folder"], "add -o FILE.csv"),
    "folder of nothing": (["predict", "MODEL", "folder", "-o", "x.csv"], "no recordings in this folder"),
    "output of another kind": (["predict", "MODEL", "clip.wav", "-o", "x.doc"], "ending in .csv or .jsonl or .tsv"),
    "output is an input": (["predict", "MODEL", "list.csv", "-o", "list.csv", "--force"], "also an input"),
    "output exists": (["predict", "MODEL", "clip.wav", "-o", "list.csv"], "exists; pass --force"),
    "output in a file": (["predict", "MODEL", "clip.wav", "-o", "text.wav/x.csv"], "text.wav"),
    "manifest without column": (["predict", "MODEL", "list.csv", "-o", "x.csv"], "expected a column 'file'"),
    "manifest missing": (["predict", "MODEL", "no.csv", "-o", "x.csv"], "cannot be read"),
    "manifest of bytes": (["predict", "MODEL", "bytes.csv", "-o", "x.csv"], "not a CSV table in UTF-8"),
    "manifest of nothing": (["predict", "MODEL", "norows.csv", "-o", "x.csv"], "no rows"),
    "plot of another kind": (["predict", "MODEL", "clip.wav", "--plot", "x.doc"], "ending in .png"),
    "plot exists": (["predict", "MODEL", "clip.wav", "--plot", "old.png"], "exists; pass --force"),
    "plot of two": (["predict", "MODEL", "clip.wav", "clip.wav", "--plot", "x.png"], "takes one recording"),
    "evaluate nowhere": (["evaluate", "MODEL", "--data", "nowhere"], "no such folder"),
    "evaluate other labels": (["evaluate", "MODEL", "--data", "data"], "labels 'bark' are not among the 3"),
    "evaluate no such split": (["evaluate", "MODEL", "--data", "data", "--split", "validation"], "validation"),
    "info of nothing": (["info", "missing.onnx"], "does not exist"),
    "models of nothing": (["models", "zz*"], "no model matches 'zz*'"),
    "front end unknown": (["export-frontend", "efficientnet", "-o", "x"], "efficientnet"),
    "front end over a file": (["export-frontend", "yamnet", "-o", "clip.wav"], "a file of that name exists"),
    "front end over a folder": (["export-frontend", "yamnet", "-o", "data"], "exists; pass --force"),
}


@pytest.fixture(scope="module")
def bad_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with everything the bad commands name."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "folder").mkdir()
    clip = noise(1.0)
    soundfile.write(folder / "clip.wav", clip, RATE)
    soundfile.write(folder / "short.wav", clip[:100], RATE)
    soundfile.write(folder / "header.wav", clip[:0], RATE)
    soundfile.write(folder / "slow.wav", clip[:100], 1)
    soundfile.write(folder / "wide.wav", np.zeros((10, 1000), np.int16), RATE)
    soundfile.write(folder / "nan.wav", np.full(RATE, np.nan, np.float32), RATE, subtype="FLOAT")
    with soundfile.SoundFile(folder / "hour.flac", "w", 8000, 1) as stream:
        for _ in range(60):
            stream.write(np.zeros(60 * 8000, np.int16))
    for suffix in ("wav", "flac", "ogg", "mp3"):
        whole = io.BytesIO()
        soundfile.write(whole, clip, RATE, format=suffix.upper())
        (folder / f"truncated.{suffix}").write_bytes(whole.getvalue()[: len(whole.getvalue()) * 2 // 3])
    (folder / "text.wav").write_text("This is a text, not a recording.\n" * 50)
    (folder / "empty.wav").touch()
    (folder / "empty.onnx").touch()
    (folder / "truncated.onnx").write_bytes(tiny_model()[:-100])
    (folder / "cardless.onnx").write_bytes(with_metadata(tiny_proto(), {}))
    (folder / "verified.onnx").write_bytes(
        with_metadata(tiny_proto(), {CARD_KEY: tiny_card().to_json(), VERIFICATION_KEY: '{"worst": NaN}'})
    )
    (folder / "labels.onnx").write_bytes(tiny_model(tiny_card(), classes=5))
    onnx.save_model(
        tiny_proto(),
        folder / "external.onnx",
        save_as_external_data=True,
        size_threshold=0,
        location="external.bin",
    )
    (folder / "list.csv").write_text("path,label\nclip.wav,clap\n")
    (folder / "norows.csv").write_text("file\n")
    (folder / "bytes.csv").write_bytes(bytes(range(256)))
    (folder / "old.png").write_bytes(b"old")
    (folder / "data").mkdir()
    soundfile.write(folder / "data" / "a.wav", clip, RATE)
    (folder / "data" / "metadata.csv").write_text("file,label,split\na.wav,bark,test\n")
    return folder


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_bad_input_is_one_line_and_exit_code_2(case, run, model_path, bad_folder, monkeypatch):
    arguments, says = BAD_COMMANDS[case]
    monkeypatch.chdir(bad_folder)
    before = {path: path.stat().st_mtime_ns for path in bad_folder.rglob("*") if path.is_file()}
    line = refused(run(*[str(model_path) if argument == "MODEL" else argument for argument in arguments]))
    assert any(part in line for part in says.split("|")), line
    after = {path: path.stat().st_mtime_ns for path in bad_folder.rglob("*") if path.is_file()}
    assert after == before, "nothing was written"


@pytest.mark.parametrize(
    "case", ["truncated wav", "unknown model", "no cuda here", "model truncated", "unknown option"]
)
def test_bad_input_from_a_shell(case, model_path, bad_folder):
    arguments, says = BAD_COMMANDS[case]
    names = [str(model_path) if argument == "MODEL" else argument for argument in arguments]
    names = [str(bad_folder / name) if (bad_folder / name).is_file() else name for name in names]
    assert says in refused(shell(*names))


def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_read(run, tmp_path):
    (tmp_path / "old.csv").write_text("kept")
    (tmp_path / "clip.wav").touch()
    line = refused(run("predict", "missing.onnx", tmp_path / "clip.wav", "-o", tmp_path / "old.csv"))
    assert "exists" in line
    assert (tmp_path / "old.csv").read_text() == "kept"


def test_a_full_disk_is_one_line_and_leaves_nothing(run, model_path, wav, tmp_path, monkeypatch):
    path = wav()

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("infer_tf.batch.scores_of", full)
    line = refused(run("predict", model_path, path, "-o", tmp_path / "out" / "x.csv"))
    assert "No space left on device" in line
    assert list((tmp_path / "out").iterdir()) == []


def test_standard_output_on_a_full_disk_is_one_line():
    command = [sys.executable, "-m", "infer_tf.cli", "models"]
    with open("/dev/full", "w") as full:
        process = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, cwd=ROOT, text=True, timeout=60)
    assert process.returncode == 2
    assert process.stderr == "crossfade: error: cannot read or write: No space left on device\n"


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_names_that_are_no_utf8_keep_their_row(suffix, run, model_path, wav, tmp_path):
    wav("plain.wav").rename(tmp_path / "\udcff.wav")
    assert run("predict", model_path, tmp_path, "-o", tmp_path / f"x.{suffix}").code == 0
    assert "\\udcff.wav" in (tmp_path / f"x.{suffix}").read_text("utf-8")


def test_a_failed_clip_among_several_is_named(run, model_path, wav):
    short = wav("short.wav", seconds=0.01)
    result = run("predict", model_path, wav(), short)
    assert result.code == 1
    assert f"{short}: the clip has 320 samples" in result.err


def test_a_closed_pipe_is_quiet(model_path, wav):
    command = [
        sys.executable,
        "-m",
        "infer_tf.cli",
        "predict",
        str(model_path),
        str(wav(seconds=60)),
        "--window",
        "0.1",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(120) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_help_and_version_load_nothing_heavy():
    code = (
        "import sys\n"
        "from infer_tf.cli import main\n"
        "codes = [main(['--help']), main(['predict', '--help']), main(['--version'])]\n"
        "heavy = {'tensorflow', 'keras', 'onnxruntime', 'torch', 'matplotlib', 'sklearn'} & set(sys.modules)\n"
        "assert codes == [0, 0, 0] and not heavy, (codes, heavy)\n"
    )
    started = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "usage: crossfade" in result.stdout
    assert "--window" in result.stdout
    assert time.perf_counter() - started < 10


def test_plot_writes_a_picture_and_still_prints(run, model_path, wav, tmp_path):
    for name, options in [("one.png", []), ("many.svg", ["--window", "0.3"])]:
        result = run("predict", model_path, wav(seconds=1), "--plot", tmp_path / name, *options)
        assert result.code == 0
        assert result.err == f"wrote {tmp_path / name}\n"
        assert LABELS[0] in result.out
        assert (tmp_path / name).stat().st_size > 5000
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def labelled(folder: Path, model: Path, run) -> list[dict[str, str]]:
    """Write recordings labelled with what the model answers, except the last, and return the rows."""
    rows = []
    (folder / "audio").mkdir(parents=True)
    for seed in range(6):
        path = folder / "audio" / f"{seed}.wav"
        soundfile.write(path, noise(0.3, seed) * 4.0 ** (seed - 3), RATE, subtype="FLOAT")
        answer = json.loads(run("predict", model, path, "--json", "--top", 1).out)["top"][0]["label"]
        wrong = LABELS[(LABELS.index(answer) + 1) % 3]
        label = wrong if seed == 5 else answer
        rows.append({"file": f"audio/{seed}.wav", "label": label, "split": "test" if seed else "train"})
    with (folder / "metadata.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return rows


def test_evaluate_measures_labelled_recordings(run, model_path, tmp_path):
    rows = labelled(tmp_path / "data", model_path, run)
    result = run("evaluate", model_path, "--data", tmp_path / "data", "--json", "--plot", tmp_path / "c.png")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report["num_clips"] == 5
    assert report["measures"]["accuracy"] == pytest.approx(0.8)
    assert np.sum(report["confusion"]) == 5
    assert np.trace(report["confusion"]) == 4
    clips = {label: sum(row["label"] == label and row["split"] == "test" for row in rows) for label in LABELS}
    assert {label: row["clips"] for label, row in report["per_class"].items()} == clips
    assert (tmp_path / "c.png").stat().st_size > 5000
    table = run("evaluate", model_path, "--data", tmp_path / "data", "--split", "all").out
    assert "accuracy           0.8333" in table
    assert "class" in table


def test_evaluate_names_a_clip_that_is_too_short(run, model_path, wav, tmp_path):
    wav("clap/short.wav", seconds=0.01)
    line = refused(run("evaluate", model_path, "--data", tmp_path, "--split", "all"))
    assert "clap/short.wav: the clip has 320 samples" in line


@pytest.mark.parametrize("name", ["a$b^{$c.wav", "音.wav", "\udcff.wav"])
def test_a_picture_of_a_file_of_any_name(name, run, model_path, wav, tmp_path):
    clip = wav("plain.wav").rename(tmp_path / name)
    result = run("predict", model_path, clip, "--plot", tmp_path / "x.png")
    assert result.code == 0, result.err
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_evaluate_several_labels(run, tmp_path):
    model = write_tiny(tmp_path / "multi.onnx", tiny_card(task="multi_label"))
    soundfile.write(tmp_path / "a.wav", noise(0.2), RATE)
    soundfile.write(tmp_path / "b.wav", noise(0.2, 1), RATE)
    (tmp_path / "metadata.csv").write_text("file,label,split\na.wav,hum;clap,test\nb.wav,whistle,test\n")
    report = json.loads(run("evaluate", model, "--data", tmp_path, "--json").out)
    assert report["confusion"] is None
    assert "accuracy" not in report["measures"]
    assert 0 < report["measures"]["mAP"] <= 1
    line = refused(run("evaluate", model, "--data", tmp_path, "--plot", tmp_path / "c.png"))
    assert "several labels" in line


def test_evaluate_scores_labelled_stretches_and_names_a_bad_recording(run, tmp_path, classifier, model_path):
    clip = np.concatenate([noise(0.3), 0.001 * noise(0.3, 1)])
    soundfile.write(tmp_path / "a.wav", clip, RATE, subtype="FLOAT")
    (tmp_path / "metadata.csv").write_text(
        "file,label,split,onset,offset\na.wav,hum,test,0,0.3\na.wav,clap,test,0.3,0.6\n"
    )
    answers = [classifier.predict(part).label for part in (clip[:9600], clip[9600:])]
    assert answers[0] != answers[1]
    report = json.loads(run("evaluate", model_path, "--data", tmp_path, "--json").out)
    right = (answers[0] == "hum") + (answers[1] == "clap")
    assert report["measures"]["accuracy"] == right / 2
    assert np.count_nonzero(np.sum(report["confusion"], axis=0)) == 2
    (tmp_path / "a.wav").write_bytes((tmp_path / "a.wav").read_bytes()[:5000])
    assert "a.wav" in refused(run("evaluate", model_path, "--data", tmp_path))


def test_info_says_what_the_model_is(run, model_path):
    text = run("info", model_path).out
    for part in ("tiny", "single_label", "clap, hum, whistle", "efficientat", "514 samples (0.0161 s)", "CC0-1.0"):
        assert part in text
    data = json.loads(run("info", model_path, "--json").out)
    assert data["card"] == tiny_card().to_dict()
    assert data["legal_lengths"]["min_samples"] == 514
    assert data["inputs"]["features"] == {"dtype": "float32", "axes": ["batch", 128, "time"]}
    assert data["verification"] is None
    assert data["convolutions"] is None
    assert "convolutions" not in text


def test_info_says_how_convolutions_are_computed(run, tmp_path):
    path, form = tmp_path / "m.onnx", "winograd (6 of them)"
    path.write_bytes(with_metadata(tiny_proto(), {CARD_KEY: tiny_card().to_json(), CONVOLUTIONS_KEY: form}))
    (line,) = (line for line in run("info", path).out.splitlines() if line.startswith("convolutions"))
    assert line.split(maxsplit=1)[1] == form
    assert json.loads(run("info", path, "--json").out)["convolutions"] == form


def test_models_lists_the_zoo(run):
    everything = run("models").out
    header, *lines = everything.splitlines()
    assert header.split("  ")[0] == "name"
    names = [line.split()[0] for line in lines]
    assert len(set(names)) == len(names)
    shipped = registry.list_shipped()
    assert names[: len(shipped)] == shipped
    assert everything.count("ships; load it by name") == len(shipped) >= 3
    assert "mn10_as_mAP_471.pt" in everything
    assert "mAP 0.471" in everything
    some = [json.loads(line) for line in run("models", "mn04*", "--json").out.splitlines()]
    assert {row["name"] for row in some} == {"mn04_as", "mn04_im"}
    assert not any(row["shipped"] for row in some)


def test_models_says_what_each_costs_needs_and_reached(run):
    (line,) = run("models", "mn10_as_hop_15").out.splitlines()[1:]
    assert line.split("  ")[0] == "mn10_as_hop_15"
    for part in (
        "4.88 M",
        "0.36 G",
        "mAP 0.463",
        "efficientat_hop480",
        "0.016 s, else error",
        "mn10_as_hop_15_mAP_463",
    ):
        assert part in line
    (digits,) = run("models", "digits-mn").out.splitlines()[1:]
    for part in ("0.72 M", "0.11 G", "test accuracy 0.990", "0.700 s, else zeros"):
        assert part in digits
    rows = [json.loads(line) for line in run("models", "dymn*", "--json").out.splitlines()]
    assert [row["name"] for row in rows] == registry.list_models("dymn*")
    assert len(rows) >= 11
    row = next(row for row in rows if row["name"] == "dymn10_as")
    card = registry.get_card("dymn10_as")
    assert (row["parameters"], row["macs"], row["mAP"]) == (card.parameters, card.macs, card.metrics["mAP"])
    assert (row["frontend"], row["legal_lengths"]["min_samples"]) == ("efficientat", 514)


def test_info_of_a_published_model_needs_no_file(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = run("info", "dymn10_as").out
    for part in (
        "python export/pt2onnx.py dymn10_as -o dymn10_as.onnx",
        "514 samples (0.0161 s); shorter: error",
        "10,548,479",
        "581,672,832 multiply-accumulates",
        "(batch, 527)",
        "dymn10_as.pt",
        "metric mAP        0.477",
    ):
        assert part in text
    data = json.loads(run("info", "dymn10_as", "--json").out)
    assert data["card"] == registry.get_card("dymn10_as").to_dict()
    assert data["file"] is None
    # A file comes before a name.
    write_tiny(tmp_path / "dymn10_as")
    assert "tiny" in run("info", "dymn10_as").out


def test_info_shows_costs_and_the_rule_for_short_clips(run, tmp_path):
    assert "718,378" in run("info", "digits-mn").out
    assert "110,378,368 multiply-accumulates" in run("info", "digits-mn").out
    path = write_tiny(tmp_path / "m.onnx", tiny_card(length_policy={"min": 16000, "short": "repeat"}))
    text = run("info", path).out
    assert "16000 samples (0.5000 s); shorter: repeat" in text
    assert "not stated" in next(line for line in text.splitlines() if line.startswith("parameters"))


def test_predict_averages_windows(run, model_path, wav, classifier, tmp_path):
    path = wav(seconds=1.2)
    windows = [
        json.loads(line) for line in run("predict", model_path, path, "--window", 0.5, "--json").out.splitlines()
    ]
    one = json.loads(run("predict", model_path, path, "--window", 0.5, "--average", "--json").out)
    assert len(windows) == 4
    assert (one["start"], one["end"]) == (0, pytest.approx(1.2))
    mean = {
        label: np.mean([entry["probability"] for row in windows for entry in row["top"] if entry["label"] == label])
        for label in LABELS
    }
    assert {entry["label"]: entry["probability"] for entry in one["top"]} == pytest.approx(mean, rel=1e-6)
    table = run("predict", model_path, path, "--window", 0.5, "--average").out.splitlines()
    assert table[0] == f"{path}  (1.20 s)"
    output = tmp_path / "scores.csv"
    assert run("predict", model_path, path, "--window", 0.5, "--average", "-o", output).code == 0
    with output.open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert float(row["probability_1"]) == one["top"][0]["probability"]


@pytest.mark.parametrize("source", ["MODEL", "yamnet"])
def test_export_frontend_writes_a_saved_model_with_the_same_numbers(source, run, model_path, tmp_path):
    import tensorflow as tf

    folder = tmp_path / "frontend"
    result = run("export-frontend", model_path if source == "MODEL" else source, "-o", folder)
    assert result.code == 0, result.err
    spec = get_frontend("efficientat" if source == "MODEL" else source)
    serve = tf.saved_model.load(str(folder)).signatures["serving_default"]
    for batch, seconds in [(1, 1.0), (3, 2.37)]:
        waveform = np.stack([noise(seconds, seed, spec.sample_rate) for seed in range(batch)])
        found = serve(waveform=tf.constant(waveform))["features"].numpy()
        expected = ReferenceFrontend(spec)(waveform)
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, atol=1e-3)
    assert json.loads((folder / "assets.extra" / "frontend.json").read_text()) == spec.to_dict()
    refused(run("export-frontend", source if source != "MODEL" else model_path, "-o", folder))
    assert run("export-frontend", model_path, "-o", folder, "--force").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["frontend"]
