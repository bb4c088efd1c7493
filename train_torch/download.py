"""Published checkpoints by name: taken from a folder where they lie there, else downloaded whole or not at all."""

from __future__ import annotations

import logging
import os
import sys
import zipfile
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import quote

import pooch
import requests
from tqdm import tqdm

from models_zoo.cards import CheckpointSource, ModelCard
from models_zoo.errors import CheckpointError, DownloadError, OutputWriteError
from models_zoo.files import replacing

__all__ = ["CACHE_VARIABLE", "checkpoint_folder", "fetch_checkpoint"]

CACHE_VARIABLE = "CROSSFADE_CACHE"
"""Environment variable that names the folder for downloaded checkpoints."""

_TIMEOUT = (10.0, 60.0)  # seconds to connect, and without a byte
_CHUNK = 1 << 20

_log = logging.getLogger(__name__)


def checkpoint_folder(folder: str | Path | None = None) -> Path:
    """Return where published checkpoints are kept.

    Args:
        folder: the caller's choice; None for the one :data:`CACHE_VARIABLE` names, else the user's cache folder.
    """
    chosen = folder or os.environ.get(CACHE_VARIABLE)
    return Path(chosen) if chosen else Path(pooch.os_cache("crossfade")) / "checkpoints"


def fetch_checkpoint(card: ModelCard, folder: str | Path | None = None, *, progress: bool = True) -> Path:
    """Return the published file of ``card``, downloaded if it is not in the folder yet.

    Where the card states no hash, the file's sha256 is written beside it (``FILE.sha256``, as ``sha256sum`` writes it)
    the first time the file is seen, and compared on every later call.

    Args:
        card: of a published checkpoint.
        folder: see :func:`checkpoint_folder`.
        progress: show a bar on standard error, where that is a terminal.

    Raises:
        CheckpointError: the card names no published file, or the file in the folder has another hash than the card
            states or was remembered.
        DownloadError: the file could not be fetched, or what came is not it; ``code`` says why.
        OutputWriteError: the folder cannot be written, or the disk is full.
    """
    source = card.checkpoint
    if source is None:
        raise CheckpointError(f"card {card.name!r} names no published file; give the path of a checkpoint")
    target = checkpoint_folder(folder)
    present = next((target / name for name in _spellings(source.file) if os.path.isfile(target / name)), None)
    if present is not None:
        _check_present(present, source)
        return present
    path = target / source.file.strip()
    sha256 = _download(source, path, progress=progress)
    _remember(path, sha256)
    return path


def _spellings(file: str) -> list[str]:
    """Return the names a published file goes by on disk: tidied, as published, and as some downloaders write it."""
    return list(dict.fromkeys((file.strip(), file, quote(file.strip()), quote(file))))


def _record_of(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _check_present(path: Path, source: CheckpointSource) -> None:
    if source.sha256 is not None or source.md5 is not None:
        return  # load_checkpoint compares with what the card states
    try:
        sha256 = pooch.file_hash(path)
        words = _record_of(path).read_text(encoding="utf-8").split()
    except FileNotFoundError:
        _remember(path, sha256)
        return
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {path} and its {_record_of(path).name}: {error}") from error
    if words[:1] != [sha256]:
        raise CheckpointError(
            f"{path} has sha256 {sha256}, but {''.join(words[:1]) or 'nothing'} was remembered in "
            f"{_record_of(path).name} when it was first seen: the file changed since. Remove both to download it again"
        )


def _remember(path: Path, sha256: str) -> None:
    _log.info("%s: sha256 %s, remembered in %s", path, sha256, _record_of(path).name)
    try:
        with replacing(_record_of(path), force=True) as partial:
            partial.write_text(f"{sha256}  {path.name}\n", encoding="utf-8")
    except OutputWriteError as error:
        # A folder shared for reading only: the weights serve all the same.
        _log.info("the sha256 could not be remembered: %s", error)


def _download(source: CheckpointSource, path: Path, *, progress: bool) -> str:
    """Write the published file to ``path`` and return its sha256."""
    _log.info("downloading %s to %s", source.url, path.parent)
    with replacing(path, force=True) as partial:
        bar = tqdm(
            desc=path.name,
            total=1,  # the server's word replaces it; without any, the downloader cannot tell a bar from none
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            file=sys.stderr,
            disable=None if progress else True,
        )
        with bar, ExitStack() as responses:

            def keep(response: requests.Response, **_settings: object) -> None:
                responses.callback(response.close)  # the downloader leaves those of failed requests open

            fetch = pooch.HTTPDownloader(
                bar,
                _CHUNK,
                timeout=_TIMEOUT,
                # The length stated is that of the file itself only where nothing compresses it on the way.
                headers={"Accept-Encoding": "identity"},
                hooks={"response": keep},
            )
            try:
                fetch(source.url, partial, None)
            except requests.RequestException as error:
                raise _explained(error, source, path) from error
        _check_content(partial, source)
        sha256 = pooch.file_hash(partial)
        for algorithm, stated in (("sha256", source.sha256), ("md5", source.md5)):
            if stated is not None:
                found = pooch.file_hash(partial, alg=algorithm)
                if found != stated:
                    raise DownloadError(
                        f"what {source.url} sent has {algorithm} {found}; the card states {stated}; nothing was kept. "
                        "The file was replaced or altered on the way: get it from someone you trust",
                        code="checksum",
                    )
    return sha256


def _explained(error: requests.RequestException, source: CheckpointSource, path: Path) -> DownloadError:
    """Return what went wrong with the request, in our terms."""
    by_hand = f"or put {path.name} into {path.parent} yourself"
    status = None if error.response is None else error.response.status_code
    if status is not None:
        code = "not_found" if status == 404 else "refused"
        return DownloadError(
            f"{source.url} answered {status} {error.response.reason}; the publisher may have moved {path.name}: find "
            f"it, {by_hand}",
            code=code,
        )
    if isinstance(error, (requests.exceptions.ChunkedEncodingError, requests.exceptions.ContentDecodingError)):
        return DownloadError(
            f"the connection to {source.url} broke before the whole file was here; nothing was kept: try again, "
            f"{by_hand}",
            code="truncated",
        )
    return DownloadError(
        f"cannot reach {source.url} ({type(error).__name__}); without a network here, put {path.name} into "
        f"{path.parent} yourself, or say --checkpoints DIR where it lies already",
        code="unreachable",
    )


def _check_content(path: Path, source: CheckpointSource) -> None:
    """Refuse what is no checkpoint: an error page sent with a 200, or a zip archive without its end."""
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"PK\x03\x04"):
        if zipfile.is_zipfile(path):
            return
        raise DownloadError(f"{source.url} sent only part of the file; nothing was kept: try again", code="truncated")
    if not start.startswith(b"\x80"):  # what torch wrote before it wrote zip archives: a pickle
        what = "a web page" if start.lstrip().startswith(b"<") else f"a file that begins with {start[:16]!r}"
        raise DownloadError(
            f"{source.url} sent {what}, not weights; nothing was kept. A proxy or a log-in page may stand in between: "
            "open the address in a browser",
            code="not_weights",
        )
