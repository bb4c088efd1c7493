"""Opening files however they are given; writing completely or not at all."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from models_zoo.errors import (
    AudioDecodeError,
    ImageDecodeError,
    OutputExistsError,
    OutputWriteError,
    VideoDecodeError,
)
from models_zoo.files import check_writable, opened, replacing


def test_takes_its_name_only_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "out.bin"
    with replacing(target) as partial:
        partial.write_bytes(b"new")
        assert not target.exists()
        assert partial.suffix == ".bin"
    assert target.read_bytes() == b"new"
    with pytest.raises(KeyboardInterrupt), replacing(target, force=True) as partial:
        partial.write_bytes(b"half")
        raise KeyboardInterrupt
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["out.bin"]


def test_refuses_what_exists_and_what_cannot_be_written(tmp_path: Path) -> None:
    target = tmp_path / "out.bin"
    target.write_bytes(b"old")
    with pytest.raises(OutputExistsError, match="--force"), replacing(target):
        pytest.fail("the block must not run")
    with pytest.raises(OutputWriteError, match="folder"):
        check_writable(tmp_path)
    with pytest.raises(OutputWriteError, match="cannot make the folder"):
        check_writable(target / "below" / "x.bin")
    assert target.read_bytes() == b"old"


def test_asking_leaves_no_folder_behind(tmp_path: Path) -> None:
    target = tmp_path / "runs" / "mine" / "out.bin"
    assert check_writable(target) == target
    assert os.listdir(tmp_path) == []
    with replacing(target) as partial:
        partial.write_bytes(b"new")
    assert target.read_bytes() == b"new"
    assert check_writable(target.with_name("other.bin")).parent.is_dir()


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputWriteError, match="No space left"), replacing(tmp_path / "out.bin") as partial:
        partial.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert os.listdir(tmp_path) == []


def test_a_killed_writer_leaves_nothing_under_the_name_and_is_tidied_up(tmp_path: Path) -> None:
    target = tmp_path / "out.bin"
    script = (
        "import os, signal, sys\n"
        "from models_zoo.files import replacing\n"
        "with replacing(sys.argv[1]) as partial:\n"
        "    partial.write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(target)], check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert not target.exists()
    assert len(os.listdir(tmp_path)) == 1
    with replacing(target) as partial:
        partial.write_bytes(b"whole")
    assert os.listdir(tmp_path) == ["out.bin"]


class Pipe:
    """A foreign file object that cannot seek."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def read(self, size: int = -1) -> bytes:
        part, self.data = self.data[:size], self.data[size:]
        return part


@pytest.mark.parametrize("error", [AudioDecodeError, ImageDecodeError, VideoDecodeError])
def test_a_file_is_opened_however_it_is_given(tmp_path: Path, error: type) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    with path.open("rb") as own:
        own.seek(3)
        for given in (
            path,
            str(path),
            b"content",
            bytearray(b"content"),
            own,
            Pipe(b"content"),
            io.BytesIO(b"content"),
        ):
            with opened(given, error, "a file") as (stream, name):
                assert (stream.read(), bool(name)) == (b"content", True)
        assert not own.closed
    for given, code in ((b"", "empty"), (3, "type"), (tmp_path / "none", "not_found"), (tmp_path, "not_readable")):
        with pytest.raises(error) as refused, opened(given, error, "a file"):
            pass
        assert refused.value.code == code
    with pytest.raises(error, match="got int; expected a file"), opened(3, error, "a file"):
        pass
