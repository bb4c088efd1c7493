"""Published checkpoints by name: from a folder, else downloaded whole or not at all. The server is a thread here."""

from __future__ import annotations

import hashlib
import http.server
import io
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pooch
import pytest
import torch

from export import pt2onnx
from models_zoo import registry
from models_zoo.cards import CheckpointSource, ModelCard
from models_zoo.errors import CheckpointError, DownloadError, OutputWriteError, UnknownNameError
from models_zoo.registry import get_card, list_models, published_as, shipped_checkpoint
from parity_tests.networks import lively
from train_torch import __main__ as command
from train_torch import checkpoint as checkpoint_module
from train_torch.checkpoint import load_checkpoint
from train_torch.download import checkpoint_folder, fetch_checkpoint

FILE = "mn01_as_mAP_298.pt"


@pytest.fixture(scope="module")
def weights() -> bytes:
    """A published file of the smallest network, as bytes."""
    buffer = io.BytesIO()
    torch.save(lively("mn01").state_dict(), buffer)
    return buffer.getvalue()


class _Handler(http.server.BaseHTTPRequestHandler):
    """Serves the weights in the manner that the first folder of the address names."""

    def do_GET(self) -> None:
        self.server.seen.append(self.path)
        manner, body = self.path.split("/")[1], self.server.weights
        if manner == "moved":
            self.send_response(302)
            self.send_header("Location", "/whole/" + self.path.split("/")[-1])
            self.end_headers()
            return
        if manner == "missing":
            self.send_error(404)
            return
        if manner == "broken":
            self.send_error(503)
            return
        if manner == "page":
            body = b"<!DOCTYPE html><html><body>Please log in</body></html>"
        if manner == "text":
            body = b"Not Found"
        self.send_response(200)
        if manner != "unmeasured":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if manner in ("cut", "unmeasured") else body)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def server(weights: bytes) -> Iterator[http.server.ThreadingHTTPServer]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as running:
        running.weights, running.seen = weights, []
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def card_at(
    server: http.server.ThreadingHTTPServer, manner: str = "whole", file: str = FILE, **hashes: str
) -> ModelCard:
    """Return the card of mn01_as whose file is served by ``server`` in a manner."""
    url = f"http://127.0.0.1:{server.server_address[1]}/{manner}/{file}"
    return get_card("mn01_as").replace(checkpoint=CheckpointSource(file=file, url=url, **hashes))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("manner", ["whole", "moved"])
def test_a_file_comes_whole_and_is_remembered(server, weights, tmp_path, caplog, manner):
    folder = tmp_path / "new" / "folder"
    with caplog.at_level(logging.INFO, "train_torch"):
        path = fetch_checkpoint(card_at(server, manner), folder)
    assert path == folder / FILE
    assert path.read_bytes() == weights
    assert (folder / f"{FILE}.sha256").read_text() == f"{sha256(weights)}  {FILE}\n"
    assert sha256(weights) in caplog.text
    assert sorted(os.listdir(folder)) == [FILE, f"{FILE}.sha256"]


def test_a_file_that_is_there_is_not_fetched_again(server, weights, tmp_path):
    card = card_at(server)
    assert fetch_checkpoint(card, tmp_path) == fetch_checkpoint(card, tmp_path)
    assert server.seen == [f"/whole/{FILE}"]


def test_a_file_put_there_by_hand_is_remembered_too(server, weights, tmp_path):
    (tmp_path / FILE).write_bytes(weights)
    assert fetch_checkpoint(card_at(server), tmp_path) == tmp_path / FILE
    assert (tmp_path / f"{FILE}.sha256").read_text().split() == [sha256(weights), FILE]
    assert server.seen == []


def test_a_file_that_changed_since_is_refused_with_both_hashes(server, weights, tmp_path):
    fetch_checkpoint(card_at(server), tmp_path)
    (tmp_path / FILE).write_bytes(weights + b"!")
    with pytest.raises(CheckpointError, match=f"has sha256 {sha256(weights + b'!')}, but {sha256(weights)} was remem"):
        fetch_checkpoint(card_at(server), tmp_path)
    with pytest.raises(CheckpointError, match="changed since"):
        load_checkpoint("mn01_as", checkpoints=tmp_path)
    (tmp_path / f"{FILE}.sha256").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="cannot read"):
        fetch_checkpoint(card_at(server), tmp_path)


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
def test_a_stated_hash_is_compared_before_anything_is_kept(server, weights, tmp_path, algorithm):
    digest = hashlib.new(algorithm, weights).hexdigest()
    with pytest.raises(DownloadError, match=f"has {algorithm} {digest}; the card states {digest[::-1]}") as caught:
        fetch_checkpoint(card_at(server, **{algorithm: digest[::-1]}), tmp_path)
    assert caught.value.code == "checksum"
    assert os.listdir(tmp_path) == []
    assert fetch_checkpoint(card_at(server, **{algorithm: digest}), tmp_path).read_bytes() == weights


@pytest.mark.parametrize(
    ("manner", "code", "says"),
    [
        ("missing", "not_found", "answered 404 Not Found.*find it, or put .*mn01_as_mAP_298.pt into"),
        ("broken", "refused", "answered 503 Service Unavailable"),
        ("cut", "truncated", "broke before the whole file was here; nothing was kept"),
        ("unmeasured", "truncated", "sent only part of the file"),
        ("page", "not_weights", "sent a web page, not weights"),
        ("text", "not_weights", "sent a file that begins with b'Not Found', not weights"),
    ],
)
def test_what_goes_wrong_is_typed_and_leaves_nothing(server, tmp_path, manner, code, says):
    with pytest.raises(DownloadError, match=says) as caught:
        fetch_checkpoint(card_at(server, manner), tmp_path)
    assert caught.value.code == code
    assert os.listdir(tmp_path) == []


def test_without_a_network_the_address_and_the_folder_are_named(server, tmp_path):
    card = card_at(server)
    url = "http://127.0.0.1:1/gone.pt"  # nothing listens on port 1
    with pytest.raises(DownloadError, match=f"cannot reach {url} .*put gone.pt into {tmp_path}") as caught:
        fetch_checkpoint(card.replace(checkpoint=CheckpointSource(file="gone.pt", url=url)), tmp_path)
    assert caught.value.code == "unreachable"
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_nothing(server, tmp_path, monkeypatch):
    def full(self, url, output_file, pooch):
        Path(output_file).write_bytes(b"PK\x03\x04 half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", full)
    with pytest.raises(OutputWriteError, match="No space left on device"):
        fetch_checkpoint(card_at(server), tmp_path)
    assert os.listdir(tmp_path) == []


def test_an_interrupted_download_leaves_nothing(server, tmp_path, monkeypatch):
    def interrupted(self, url, output_file, pooch):
        Path(output_file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_checkpoint(card_at(server), tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputWriteError):
        fetch_checkpoint(card_at(server), tmp_path / "file")
    assert server.seen == []


def test_weights_in_a_folder_shared_for_reading_serve(server, weights, tmp_path, monkeypatch):
    (tmp_path / FILE).write_bytes(weights)
    monkeypatch.setattr("train_torch.download.replacing", _refuse)
    assert fetch_checkpoint(card_at(server), tmp_path) == tmp_path / FILE


def _refuse(path: Path, **options: object) -> None:
    raise OutputWriteError(f"cannot write into {path.parent}: no permission; choose another folder")


def test_a_bar_shows_on_a_terminal(server, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    fetch_checkpoint(card_at(server), tmp_path / "shown")
    assert f"{FILE}: 100%" in terminal.getvalue()
    terminal.seek(0)
    terminal.truncate()
    fetch_checkpoint(card_at(server), tmp_path / "silent", progress=False)
    assert terminal.getvalue() == ""


def test_names_as_published_and_as_downloaders_write_them(server, weights, tmp_path):
    """``mn40_as_mAP_483(2).pt`` carries a bracket, and one published name a blank in front."""
    for number, (file, lies_as) in enumerate(
        [
            ("mn40_as_mAP_483(2).pt", "mn40_as_mAP_483(2).pt"),
            ("mn40_as_mAP_483(2).pt", "mn40_as_mAP_483%282%29.pt"),
            (" dymn10_replace_se_as.pt", "dymn10_replace_se_as.pt"),
            (" dymn10_replace_se_as.pt", "%20dymn10_replace_se_as.pt"),
            (" dymn10_replace_se_as.pt", " dymn10_replace_se_as.pt"),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / lies_as).write_bytes(weights)
        assert fetch_checkpoint(card_at(server, file=file), folder) == folder / lies_as
    assert server.seen == []
    assert fetch_checkpoint(card_at(server, file="mn40_as_mAP_483(2).pt"), tmp_path).name == "mn40_as_mAP_483(2).pt"
    assert fetch_checkpoint(card_at(server, file=" dymn10.pt"), tmp_path).name == "dymn10.pt"
    assert server.seen[1] == "/whole/%20dymn10.pt", "the address keeps the blank it was published with"


def test_the_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("CROSSFADE_CACHE", raising=False)
    assert checkpoint_folder() == Path(pooch.os_cache("crossfade")) / "checkpoints"
    monkeypatch.setenv("CROSSFADE_CACHE", str(tmp_path))
    assert checkpoint_folder() == tmp_path
    assert checkpoint_folder("elsewhere") == Path("elsewhere")


def test_a_name_loads_its_published_file(weights, tmp_path, monkeypatch):
    (tmp_path / FILE).write_bytes(weights)
    monkeypatch.setenv("CROSSFADE_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    loaded = load_checkpoint("mn01_as")
    assert (loaded.card, loaded.sha256) == (get_card("mn01_as"), sha256(weights))
    assert load_checkpoint("MN01_AS", "mn01_as").card == loaded.card
    assert load_checkpoint(FILE).card == loaded.card, "the published file's name is enough"
    with pytest.raises(CheckpointError, match="card of its own, which differs from card 'mn10_as'"):
        load_checkpoint("mn01_as", "mn10_as")
    with pytest.raises(UnknownNameError, match="unknown checkpoint 'mn01_az'; did you mean 'mn01_as'"):
        load_checkpoint("mn01_az")
    (tmp_path / "mn01_as").mkdir()
    assert load_checkpoint("mn01_as").card == loaded.card, "a folder of that name is no checkpoint"


def test_a_name_downloads_its_published_file(server, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "get_card", lambda name: card_at(server))
    assert load_checkpoint("mn01_as", checkpoints=tmp_path).replaced == ()
    assert server.seen == [f"/whole/{FILE}"]


def test_a_shipped_model_is_its_own_checkpoint(tmp_path, monkeypatch):
    loaded = load_checkpoint("digits-mn", checkpoints=tmp_path)
    assert loaded.card.name == "digits-mn"
    assert os.listdir(tmp_path) == []
    (tmp_path / "digits-mn.onnx").touch()
    monkeypatch.setattr(registry, "_WEIGHTS", tmp_path)
    assert shipped_checkpoint("digits-mn") is None
    with pytest.raises(CheckpointError, match="names no published file"):
        load_checkpoint("digits-mn")


def test_files_tell_their_card_by_name():
    assert published_as("mn10_as_mAP_471.pt") == "mn10_as"
    assert published_as("mn40_as_mAP_483.pt") == "mn40_as_2"
    assert published_as("mn40_as_mAP_483(2).pt") == "mn40_as_3"
    assert published_as("mn40_as_mAP_483%282%29.pt") == "mn40_as_3"
    assert published_as("mn40_as_mAP_483 (1).pt") == "mn40_as_2", "a browser's mark of a second copy"
    assert published_as("mn10_as.pt") is None
    published = [name for name in list_models() if get_card(name).checkpoint is not None]
    assert [published_as(get_card(name).checkpoint.file) for name in published] == published


@pytest.fixture
def folder(weights: bytes, tmp_path: Path) -> Path:
    """A folder with the published file, for ``--checkpoints``."""
    path = tmp_path / "published"
    path.mkdir()
    (path / FILE).write_bytes(weights)
    return path


def test_export_takes_a_name(folder, tmp_path, capsys, caplog):
    output = tmp_path / "mn01_as.onnx"
    assert pt2onnx.main(["mn01_as", "-o", str(output), "--checkpoints", str(folder)]) == 0
    assert "mn01_as (mn01, torchscript exporter)" in capsys.readouterr().out
    assert "sha256" in caplog.text
    assert output.stat().st_size > 100_000
    assert pt2onnx.main(["mn01_az", "-o", str(tmp_path / "x.onnx")]) == 2
    assert "did you mean 'mn01_as'" in capsys.readouterr().err


@pytest.mark.parametrize("how", [["--init", "mn01_as"], ["--card", "mn01_as"]])
def test_fit_takes_a_name(folder, tmp_path, caplog, how):
    from models_zoo.soundscapes import write_soundscapes

    write_soundscapes(tmp_path / "sounds", num_clips=10, seconds=0.5, classes=("tone", "buzz"))
    arguments = ["--data", str(tmp_path / "sounds"), "--out", str(tmp_path / "run"), "--epochs", "1", "--quiet"]
    assert command.main(["fit", *arguments, *how, "--checkpoints", str(folder)]) == 0
    assert "replaced: classifier.5.weight, classifier.5.bias" in caplog.text
    card = load_checkpoint(tmp_path / "run" / "model.safetensors").card
    assert card.provenance["initialised_from"]["name"] == "mn01_as"
    assert card.provenance["initialised_from"]["sha256"] == sha256((folder / FILE).read_bytes())


def test_evaluate_takes_a_name(folder, tmp_path, capsys):
    from models_zoo.soundscapes import write_soundscapes

    write_soundscapes(tmp_path / "sounds", num_clips=2, seconds=0.5, classes=("tone", "buzz"))
    arguments = ["evaluate", "mn01_as", "--data", str(tmp_path / "sounds"), "--checkpoints", str(folder), "--quiet"]
    assert command.main(arguments) == 2
    assert "unknown to the model" in capsys.readouterr().err, "the weights were found; the labels are not AudioSet's"
