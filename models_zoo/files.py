"""Open a file however it is given; write one completely or not at all."""

from __future__ import annotations

import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from models_zoo.errors import (
    AudioDecodeError,
    ImageDecodeError,
    OutputExistsError,
    OutputWriteError,
    VideoDecodeError,
)

__all__ = ["check_folder_writable", "check_writable", "opened", "replacing", "replacing_folder"]

_DecodeError: TypeAlias = type[AudioDecodeError] | type[ImageDecodeError] | type[VideoDecodeError]

_SPOOL_IN_MEMORY = 1 << 24
_SPOOL_LIMIT = 1 << 32

_PARTIAL = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)\.partial(?P<suffix>\.[^.]+)?$")


@contextmanager
def opened(source: object, error: _DecodeError, expected: str) -> Iterator[tuple[BinaryIO, str]]:
    """Yield a stream at the beginning of a file, and a name for messages; what is opened here is closed.

    A file object that is none of the standard library's, or cannot seek, is copied first, to memory or, if large, to a
    temporary file: decoders call back into Python, where an exception of a foreign one would be lost.

    Args:
        source: a path, a file's bytes, or a file object open for reading bytes, which stays open.
        error: raised on whatever cannot be read, with ``code`` ``type``, ``not_found``, ``not_readable``, ``empty`` or
            ``too_long``.
        expected: what ``source`` should have been, for messages.
    """
    with ExitStack() as stack:
        if isinstance(source, (bytes, bytearray, memoryview)):
            stream: Any = stack.enter_context(io.BytesIO(source))
            name = f"<{len(source)} bytes>"
        elif isinstance(source, (str, os.PathLike)):
            name = str(source)
            stream = stack.enter_context(_open_path(source, name, error))
        elif callable(getattr(source, "read", None)):
            name = str(getattr(source, "name", None) or "<file object>")
            stream = _seekable(source, name, error, stack)
        else:
            raise error(f"got {type(source).__name__}; expected {expected}", code="type")
        stream.seek(0)
        if not stream.read(1):
            raise error(f"{name}: the file is empty (0 bytes)", code="empty")
        stream.seek(0)
        yield stream, name


def _open_path(path: str | os.PathLike[str], name: str, error: _DecodeError) -> BinaryIO:
    code, why = "not_readable", "is a folder; expected a file"
    if not os.path.isdir(path):
        try:
            return open(path, "rb")
        except (FileNotFoundError, NotADirectoryError):
            code, why = "not_found", "no such file; check the path"
        except (OSError, ValueError) as cause:
            why = f"cannot be read: {getattr(cause, 'strerror', None) or cause}; check the path and its permissions"
    raise error(f"{name}: {why}", code=code)


def _seekable(stream: Any, name: str, error: _DecodeError, stack: ExitStack) -> Any:
    """Return ``stream``, or a copy of it."""
    try:
        if isinstance(stream, (io.BytesIO, io.BufferedReader, io.BufferedRandom)) and stream.seekable():
            return stream
        if not isinstance(stream, (io.BufferedReader, io.BytesIO)) and callable(getattr(stream, "seek", None)):
            stream.seek(0)
    except io.UnsupportedOperation:
        pass
    except (OSError, ValueError) as cause:
        raise _unread(name, cause, error) from cause
    copy: Any = stack.enter_context(tempfile.SpooledTemporaryFile(max_size=_SPOOL_IN_MEMORY))  # noqa: SIM115
    size = 0
    while True:
        try:
            data = stream.read(1 << 20)
        except Exception as cause:  # whatever a foreign file object raises, it could not be read
            raise _unread(name, cause, error) from cause
        if not data:
            return copy
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise error(
                f"{name}: reading gave {type(data).__name__}; expected bytes: open the file in binary mode ('rb')",
                code="type",
            )
        size += len(data)
        if size > _SPOOL_LIMIT:
            raise error(
                f"{name}: more than {_SPOOL_LIMIT >> 30} GiB from a file object that cannot seek; pass a path",
                code="too_long",
            )
        copy.write(data)


def _unread(
    name: str, cause: BaseException, error: _DecodeError
) -> AudioDecodeError | ImageDecodeError | VideoDecodeError:
    reason = getattr(cause, "strerror", None) or cause
    return error(f"{name}: cannot be read: {reason}; check the path and its permissions", code="not_readable")


def _process_is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove_abandoned(path: Path) -> None:
    """Remove what an earlier process, killed while writing ``path``, left beside it."""
    for candidate in path.parent.glob(f".{path.name}.*.partial*"):
        match = _PARTIAL.match(candidate.name)
        if match and match["name"] == path.name and not _process_is_alive(int(match["pid"])):
            _remove(candidate)


def _remove(path: Path) -> None:
    """Remove a file or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _partial_name(path: Path) -> str:
    return f".{path.name}.{os.getpid()}.partial{path.suffix}"


def check_writable(path: str | Path, *, force: bool = False) -> Path:
    """Return ``path`` once it is known that a result may be written there.

    Call it before long work, so that a refused output is refused at once.

    Raises:
        OutputExistsError: ``path`` exists and ``force`` is false.
        OutputWriteError: its folder cannot be made or ``path`` is a folder.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise OutputWriteError(f"cannot write {path}: it is a folder; name a file inside it")
    if os.path.exists(path) and not force:
        raise OutputExistsError(f"{path} exists; pass --force (force=True) to replace it, or choose another name")
    missing = [folder for folder in (path.parent, *path.parent.parents) if not os.path.isdir(folder)]
    _make_folder(path.parent)
    try:
        with suppress(FileNotFoundError):
            os.lstat(path.with_name(_partial_name(path)))
    except (OSError, ValueError) as error:  # ValueError: a null character
        raise OutputWriteError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        writable = os.access(path.parent, os.W_OK)
        # Work that is refused later, for another reason, should leave no empty folder.
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
    if not writable:
        raise OutputWriteError(f"cannot write into {path.parent}: no permission; choose another folder")
    return path


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputWriteError(f"cannot make the folder {folder}: {error.strerror or error}") from error


@contextmanager
def replacing(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its name when the block succeeds.

    The temporary file keeps the suffix of ``path`` (some writers choose a format by it). It is removed
    when the block raises; one left by a killed process is removed by the next write of the same path.

    Raises:
        OutputExistsError: ``path`` exists and ``force`` is false.
        OutputWriteError: the operating system refused the write (full disk, permissions).
    """
    path = check_writable(path, force=force)
    _make_folder(path.parent)
    _remove_abandoned(path)
    partial = path.with_name(_partial_name(path))
    try:
        yield partial
        with open(partial, "rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise OutputWriteError(
            f"could not write {path}: {error.strerror or error}; nothing was left under that name"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def check_folder_writable(path: str | Path, *, force: bool = False) -> Path:
    """Return ``path`` once it is known that a result folder may be written there.

    Raises:
        OutputExistsError: ``path`` is a folder with something in it and ``force`` is false.
        OutputWriteError: ``path`` is a file, or its parent cannot be made or written to.
    """
    path = Path(path)
    if os.path.exists(path) and not os.path.isdir(path):
        raise OutputWriteError(f"cannot write the folder {path}: a file of that name exists")
    if os.path.isdir(path) and any(path.iterdir()) and not force:
        raise OutputExistsError(f"{path} exists; pass --force (force=True) to replace it, or choose another name")
    check_writable(path / "x" if os.path.isdir(path) else path, force=True)
    return path


@contextmanager
def replacing_folder(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside ``path`` that takes its name when the block succeeds.

    Raises:
        OutputExistsError: ``path`` is a folder with something in it and ``force`` is false.
        OutputWriteError: the operating system refused the write (full disk, permissions).
    """
    path = check_folder_writable(path, force=force)
    _make_folder(path.parent)
    _remove_abandoned(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    replaced = path.with_name(f".{path.name}.{os.getpid()}.partial.old")
    try:
        partial.mkdir()
        yield partial
        if path.exists():
            os.replace(path, replaced)
        os.replace(partial, path)
    except OSError as error:
        raise OutputWriteError(
            f"could not write {path}: {error.strerror or error}; nothing half-written was left under that name"
        ) from error
    finally:
        _remove(partial)
        _remove(replaced)
