"""The export command: from a bare checkout, with exit codes and one-line errors, and clean when killed."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnx
import pytest
import torch

from export import exporter, pt2onnx
from models_zoo.cards import CARD_KEY, ModelCard
from models_zoo.errors import VerificationError
from parity_tests.networks import card_of, lively
from train_torch.checkpoint import save_checkpoint

SCRIPT = Path(pt2onnx.__file__)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = lively("mn01", num_classes=3)
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    save_checkpoint(path, model, card_of(model, "mn01"))
    return path


def start(arguments, folder, **options):
    """Start the script as from a bare checkout: by its path, elsewhere, with only installed libraries importable."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, arguments)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_exports_from_a_bare_checkout(checkpoint, tmp_path):
    output = tmp_path / "model.onnx"
    # A module beside the script must not hide a library's, nor one of ours elsewhere the checkout's.
    process = start([checkpoint, "-o", output], tmp_path)
    stdout, stderr = process.communicate()
    assert (process.returncode, stderr) == (0, "")
    first, second, third = stdout.splitlines()
    assert first == f"{output}: example (mn01, torchscript exporter)"
    assert second.startswith("verified in 14 cases: 7 lengths from 0.0161 s to 30 s, batches 1, 2, 3, 5")
    assert third.startswith("worst difference ")
    assert os.listdir(tmp_path) == ["model.onnx"]


def test_the_script_puts_the_checkout_first():
    code = (
        "import runpy, sys\n"
        f"sys.path[0] = {str(SCRIPT.parent)!r}\n"
        "sys.argv = ['pt2onnx', '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit:\n"
        "    pass\n"
        f"assert sys.path[0] == {str(SCRIPT.parent.parent)!r}, sys.path\n"
        f"assert {str(SCRIPT.parent)!r} not in sys.path\n"
        "assert not {'torch', 'onnx', 'onnxruntime', 'tensorflow'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--exporter" in done.stdout


def run(capsys, *arguments):
    code = pt2onnx.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert len(captured.err.splitlines()) == (0 if code == 0 else 1)
    return code, captured.out, captured.err


def test_published_file(capsys, tmp_path):
    torch.save(lively("mn01").state_dict(), tmp_path / "mn01_as_mAP_298.pt")
    arguments = (tmp_path / "mn01_as_mAP_298.pt", "--model", "mn01_as", "-o", tmp_path / "mn01_as.onnx")
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert "mn01_as (mn01, torchscript exporter)" in out
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert "--force" in err
    assert run(capsys, *arguments, "--force")[0] == 0


def test_a_published_embedding(capsys, tmp_path):
    torch.save(lively("mn01", num_classes=1000).state_dict(), tmp_path / "mn01_im.pt")
    code, out, _ = run(capsys, tmp_path / "mn01_im.pt", "--model", "mn01_im", "-o", tmp_path / "m.onnx")
    assert code == 0
    assert "worst difference" in out


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ("class 0\nclass 2\nclass 1\n", "the same names in another order) first disagrees with card 'example' (3 "
         "labels) at index 1 (line 2): 'class 2', not 'class 1'"),
        ("class 0\nclass 1\nzebra\n", "at index 2 (line 3): 'zebra', not 'class 2'"),
    ],
)  # fmt: skip
def test_labels_that_disagree_with_the_card_are_refused(capsys, checkpoint, tmp_path, labels, says):
    (tmp_path / "labels.txt").write_text(labels)
    code, _, err = run(capsys, checkpoint, "--labels", tmp_path / "labels.txt", "-o", tmp_path / "m.onnx")
    assert code == 2
    assert says in err
    assert os.listdir(tmp_path) == ["labels.txt"]


def test_labels_that_the_card_has_or_lacks_are_taken(capsys, checkpoint, tmp_path):
    (tmp_path / "labels.txt").write_text("class 0\nclass 1\nclass 2\n")
    arguments = ("--labels", tmp_path / "labels.txt", "-o", tmp_path / "m.onnx", "--force")
    assert run(capsys, checkpoint, *arguments)[0] == 0
    # A published network that someone gave three classes: its card's labels are not the file's.
    torch.save(lively("mn01", num_classes=3).state_dict(), tmp_path / "m.pt")
    assert run(capsys, tmp_path / "m.pt", "--model", "mn01_as", *arguments)[0] == 0
    card = ModelCard.from_json(
        {entry.key: entry.value for entry in onnx.load(tmp_path / "m.onnx").metadata_props}[CARD_KEY]
    )
    assert card.labels == ("class 0", "class 1", "class 2")


def test_bad_input_is_one_line_and_exit_code_2(capsys, checkpoint, tmp_path):
    output = tmp_path / "m.onnx"
    web_page = tmp_path / "page.pt"
    web_page.write_text("<html>")
    (tmp_path / "labels.txt").write_text("one\ntwo\n")
    (tmp_path / "file").touch()
    for arguments, message in (
        (("nothing.safetensors", "-o", output), "no such checkpoint"),
        ((web_page, "--model", "mn01_as", "-o", output), "web page"),
        ((checkpoint, "--model", "mn01_sa", "-o", output), "did you mean"),
        ((checkpoint, "--model", "mn01_as", "-o", output), "own card"),
        ((checkpoint, "--labels", tmp_path / "labels.txt", "-o", output), "untrained head"),
        ((checkpoint, "--name", "Not Lower Case", "-o", output), "lower-case"),
        ((checkpoint, "-o", tmp_path), "is a folder"),
        ((checkpoint, "-o", tmp_path / "file" / "m.onnx"), "cannot make the folder"),
    ):
        code, out, err = run(capsys, *arguments)
        assert (code, out) == (2, ""), arguments
        assert message in err, arguments
    assert not output.exists()


def test_bad_usage_is_exit_code_2(capsys, checkpoint):
    for arguments in ([], [str(checkpoint)], [str(checkpoint), "-o", "m.onnx", "--exporter", "magic"]):
        with pytest.raises(SystemExit) as caught:
            pt2onnx.main(arguments)
        assert caught.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_a_failed_verification_is_exit_code_1(capsys, checkpoint, tmp_path, monkeypatch):
    def fail(*_arguments, **_options):
        raise VerificationError("departs\nby far")

    monkeypatch.setattr(exporter, "verify_onnx", fail)
    code, out, err = run(capsys, checkpoint, "-o", tmp_path / "m.onnx")
    assert (code, out, err) == (1, "", "pt2onnx: departs by far\n")
    assert os.listdir(tmp_path) == []


def test_a_missing_library_says_what_to_install(capsys, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "export.exporter", None)
    code, _, err = run(capsys, checkpoint, "-o", tmp_path / "m.onnx")
    assert code == 2
    assert "[export]" in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_killed_during_export(checkpoint, tmp_path, number, code):
    output = tmp_path / "model.onnx"
    process = start([checkpoint, "-o", output], tmp_path)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".model.onnx.*.partial*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    _, stderr = process.communicate()
    assert process.returncode == code
    assert "Traceback" not in stderr
    assert not output.exists()
    if number == signal.SIGKILL:  # nothing can tidy up after that, save the next export of the same name
        assert len(os.listdir(tmp_path)) == 1
        assert pt2onnx.main([str(checkpoint), "-o", str(output)]) == 0
        assert os.listdir(tmp_path) == ["model.onnx"]
    else:
        assert os.listdir(tmp_path) == []


def test_no_room_on_the_disk(checkpoint, tmp_path):
    """The operating system refuses the file beyond 100 kB, as a full disk would."""
    process = start(
        [checkpoint, "-o", tmp_path / "model.onnx"],
        tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    stdout, stderr = process.communicate()
    assert (process.returncode, stdout) == (2, "")
    assert "could not write" in stderr
    assert len(stderr.splitlines()) == 1
    assert os.listdir(tmp_path) == []
