"""Write a file completely or not at all."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from models_zoo.errors import OutputExistsError, OutputWriteError

__all__ = ["check_folder_writable", "check_writable", "replacing", "replacing_folder"]

_PARTIAL = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)\.partial(?P<suffix>\.[^.]+)?$")


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
