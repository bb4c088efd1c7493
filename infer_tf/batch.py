"""Many recordings into one table: a row per clip, in order, and a row with the reason per clip that failed."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from infer_tf.classifier import Frames, TFAudioClassifier
from models_zoo.audio import probe_audio
from models_zoo.dataset import AUDIO_SUFFIXES
from models_zoo.errors import (
    AudioDecodeError,
    CardError,
    DataError,
    ImageDecodeError,
    ModelFileError,
    VideoDecodeError,
    WaveformError,
)
from models_zoo.event_files import write_events
from models_zoo.events import EventOptions
from models_zoo.files import replacing
from models_zoo.images import is_picture
from models_zoo.prediction import Event, Prediction, average_predictions
from models_zoo.video import is_video

__all__ = [
    "Request",
    "Summary",
    "find_events",
    "hearing_all",
    "is_collection",
    "list_recordings",
    "predict_files",
    "scores_of",
    "with_progress",
]

_CLIP_ERRORS = (AudioDecodeError, ImageDecodeError, VideoDecodeError, WaveformError, ModelFileError)
"""What one clip may fail with without ending the work on the others."""


@dataclass(frozen=True)
class Request:
    """What to predict of each recording.

    Attributes:
        top: classes listed per clip.
        window, hop: seconds of sliding windows, or None to score each recording whole.
        average: one answer per recording, the mean over its windows.
        embedding: keep the embedding.
        events: how to find events, or None for the card's way.
        image: path of the picture that belongs to the recording, or None.
        frames: of a video, which are looked at; see :meth:`TFAudioClassifier.predict`.
    """

    top: int = 5
    window: float | None = None
    hop: float | None = None
    average: bool = False
    embedding: bool = False
    events: EventOptions | None = None
    image: str | None = None
    frames: Frames = "middle"


@dataclass(frozen=True)
class Summary:
    """How many recordings were worked on and how many of them failed."""

    total: int
    failed: int


def is_collection(path: str | os.PathLike[str]) -> bool:
    """Return whether ``path`` is a folder or a manifest rather than a recording."""
    return os.path.isdir(path) or Path(path).suffix.lower() == ".csv"


def list_recordings(inputs: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Return the recordings that files, folders and manifests name, in order.

    A folder stands for the recordings below it, sorted by path; a manifest (``.csv`` with a ``file`` column) for the
    files it lists, relative to itself.

    Raises:
        DataError: a folder without recordings, or a manifest without a ``file`` column or without rows.
    """
    found: list[Path] = []
    for item in map(Path, inputs):
        if os.path.isdir(item):
            below = sorted(path for path in item.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES and path.is_file())
            if not below:
                raise DataError(
                    f"{item}: no recordings in this folder; expected files {', '.join(sorted(AUDIO_SUFFIXES))}"
                )
            found += below
        elif is_collection(item):
            found += _read_manifest(item)
        else:
            found.append(item)
    return found


def _read_manifest(path: Path) -> list[Path]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            columns = reader.fieldnames or []
            if "file" not in columns:
                raise DataError(f"{path}: columns {', '.join(columns) or 'none'}; expected a column 'file'")
            names = [(reader.line_num, row["file"] or "") for row in reader]
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a CSV table in UTF-8: {error}") from None
    empty = [line for line, name in names if not name.strip()]
    if empty or not names:
        raise DataError(
            f"{path}: {f'line {empty[0]} names no file' if empty else 'no rows'}; expected one file per row"
        )
    return [path.parent / name for _, name in names]


def scores_of(classifier: TFAudioClassifier, source: Any, request: Request) -> Iterator[Prediction]:
    """Yield the prediction of a recording, or of each of its windows, or their mean, as ``request`` asks.

    A path may name a video or, for a model that looks at pictures alone, a picture; None is no recording, but the
    request's picture.
    """
    if is_video(source) or is_picture(source) or source is None:
        if request.window is not None:
            raise WaveformError(f"{source}: windows are cut out of recordings; leave the window out", code="type")
        if is_video(source):
            answer = classifier.predict(video=source, frames=request.frames, events=request.events)
        else:
            answer = classifier.predict(image=request.image if source is None else source, events=request.events)
        answers: Iterator[Prediction] = iter([answer])
    elif request.window is None:
        answers = iter([classifier.predict(source, image=request.image, events=request.events)])
    else:
        looks = [part.name for part in classifier.card.inputs if part.source == "image"]
        inputs = None if request.image is None else dict.fromkeys(looks or ["image"], request.image)
        answers = classifier.predict_windows(
            source, request.window, _hop(request), events=request.events, inputs=inputs
        )
        if request.average:
            answers = iter([average_predictions(answers)])
    for answer in answers:
        yield answer if request.embedding else replace(answer, embedding=None)


def hearing_all(classifier: TFAudioClassifier, source: Any, request: Request) -> Request:
    """Return ``request`` with windows where a detector would hear the beginning of a recording alone, and say so.

    Cards that crop long clips do so because training did; whoever looks for events wants those of the whole recording.

    Args:
        classifier: any model; the request of one that is not for event detection stays as it is.
        source: a recording; windows are chosen where it is a path that states a length.
        request: with or without windows.
    """
    policy = classifier.card.length_policy
    crops = classifier.card.task == "event_detection" and policy.long == "crop" and policy.max is not None
    if request.window is not None or not crops or not isinstance(source, (str, Path)) or source == "-":
        return request
    if is_video(source) or is_picture(source):
        return request
    duration, longest = probe_audio(source).duration, (policy.max or 0) / classifier.sample_rate
    if duration is None or duration <= longest:
        return request
    tqdm.write(
        f"note: {source} has {duration:.1f} s, and {classifier.card.name} hears {longest:g} s at once: scored as with "
        f"--window {longest:g}",
        file=sys.stderr,
    )
    return replace(request, window=longest)


def _hop(request: Request) -> float:
    assert request.window is not None
    return request.window / 2 if request.hop is None else request.hop


def with_progress(answers: Iterable[Prediction], source: Any) -> Iterator[Prediction]:
    """Yield the windows of a recording, with a progress bar in seconds where standard error is a terminal."""
    total = None if source is sys.stdin.buffer else probe_audio(source).duration
    with tqdm(total=total and round(total), unit="s", unit_scale=True, file=sys.stderr, disable=None) as bar:
        for answer in answers:
            yield answer
            bar.update(round(answer.end) - bar.n)


def find_events(
    classifier: TFAudioClassifier,
    recordings: Sequence[Path],
    output: str | Path,
    request: Request,
    *,
    force: bool = False,
) -> Summary:
    """Write the events of many recordings to ``output``, completely or not at all; recordings that fail are left out.

    Progress, and why a recording failed, are shown on standard error.

    Args:
        classifier: a model for event detection.
        recordings: paths.
        output: as :func:`models_zoo.event_files.write_events` takes it.
        request: how to find events, and in which windows.
        force: replace an existing file.

    Raises:
        CardError: the model is not for event detection.
        DataError: several recordings for a label track.
        OutputExistsError, OutputWriteError: the file cannot be written.
    """
    if classifier.card.task != "event_detection":
        raise CardError(
            f"{output} is to hold events, and model {classifier.card.name!r} is for {classifier.card.task}; use "
            "a model for event_detection, or write a .csv or .jsonl",
            field="task",
        )
    if Path(output).suffix.lower() == ".txt" and len(recordings) > 1:
        raise DataError(f"{output}: a label track is of one recording, got {len(recordings)}; write a .tsv or a .json")
    found: dict[str, tuple[Event, ...]] = {}
    failed = 0
    single = len(recordings) == 1
    for recording in tqdm(recordings, unit="file", file=sys.stderr, disable=True if single else None):
        name = os.fspath(recording)
        try:
            chosen = hearing_all(classifier, recording, request)
            answers = scores_of(classifier, recording, chosen)
            if single and chosen.window is not None:
                answers = with_progress(answers, recording)
            found[name] = tuple(event for answer in answers for event in answer.events or ())
        except _CLIP_ERRORS as error:
            if single:
                raise
            failed += 1
            tqdm.write(f"crossfade: error: {name}: {' '.join(str(error).split())}", file=sys.stderr)
    write_events(output, found, force=force)
    return Summary(total=len(recordings), failed=failed)


def predict_files(
    classifier: TFAudioClassifier,
    recordings: Sequence[Path],
    output: str | Path,
    request: Request,
    *,
    force: bool = False,
) -> Summary:
    """Write the predictions of many recordings to ``output``, completely or not at all.

    A progress bar is shown on standard error where that is a terminal.

    Args:
        classifier: the model.
        recordings: paths; each gets a row (one per window where windows are asked for, or chosen by
            :func:`hearing_all`), in order.
        output: a ``.csv`` or ``.jsonl`` file.
        request: what to predict.
        force: replace an existing file.

    Raises:
        OutputExistsError, OutputWriteError: the table cannot be written.
    """
    failed = 0
    with replacing(output, force=force) as partial, _open_table(partial) as stream:
        classes = min(request.top, len(classifier.labels))
        write = (
            _csv_writer(stream, classes, request) if Path(output).suffix.lower() == ".csv" else _jsonl_writer(stream)
        )
        for recording in tqdm(recordings, unit="file", file=sys.stderr, disable=None):
            name = os.fspath(recording)
            try:
                chosen = hearing_all(classifier, recording, request)
                for prediction in scores_of(classifier, recording, chosen):
                    write({"file": name, **prediction.to_dict(classes)})
            except _CLIP_ERRORS as error:
                failed += 1
                code = getattr(error, "code", type(error).__name__)
                write({"file": name, "error": " ".join(str(error).split()), "code": code})
    return Summary(total=len(recordings), failed=failed)


def _open_table(path: Path) -> IO[str]:
    # A file's name may hold bytes that are no UTF-8; they are written as they are printed.
    return path.open("w", encoding="utf-8", errors="backslashreplace", newline="")


def _jsonl_writer(stream: IO[str]) -> Any:
    def write(row: dict[str, Any]) -> None:
        stream.write(json.dumps(row) + "\n")

    return write


def _csv_writer(stream: IO[str], classes: int, request: Request) -> Any:
    """Return a writer of the columns file, start, end, label_1, probability_1, ..., [embedding,] code, error."""
    columns = ["file", "start", "end"]
    columns += [f"{name}_{rank}" for rank in range(1, classes + 1) for name in ("label", "probability")]
    columns += ["embedding"] * request.embedding + ["code", "error"]
    writer = csv.DictWriter(stream, columns, restval="")
    writer.writeheader()

    def write(row: dict[str, Any]) -> None:
        flat = {key: value for key, value in row.items() if key in columns}
        for rank, entry in enumerate(row.get("top", []), start=1):
            flat |= {f"label_{rank}": entry["label"], f"probability_{rank}": entry["probability"]}
        if "embedding" in flat:
            flat["embedding"] = json.dumps(flat["embedding"])
        writer.writerow(flat)

    return write
