"""Pictures for people: what the model heard beside what it answered. The only place that needs matplotlib."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from models_zoo.audio import load_audio
from models_zoo.decoding import legal_segments
from models_zoo.errors import AudioDecodeError, ImageDecodeError, MissingDependencyError, VideoDecodeError
from models_zoo.files import replacing
from models_zoo.filterbanks import mel_matrix
from models_zoo.images import is_picture, read_image
from models_zoo.prediction import Event, Prediction
from models_zoo.segments import ScoreJoiner
from models_zoo.specs import FrontendSpec
from models_zoo.video import is_video, read_video_audio, read_video_frames

if TYPE_CHECKING:
    from PIL import Image

    from infer_tf.classifier import TFAudioClassifier
    from infer_tf.frontend import TFFrontend
    from infer_tf.index import Match

__all__ = ["plot_confusion", "plot_matches", "plot_prediction", "require_matplotlib", "spectrogram"]

_BLOCK_SECONDS = 30.0
_COLUMNS = 6  # of a contact sheet
_PIXELS = 512  # of the longer side of a picture, as it is drawn
_TICKS_HZ = (100, 250, 500, 1000, 2000, 4000, 8000, 16000)


def require_matplotlib() -> Any:
    """Return matplotlib's figure class.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise MissingDependencyError("a picture needs matplotlib; install crossfade[plot]") from None
    return Figure


def spectrogram(frontend: TFFrontend, waveform: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the features of ``(num_samples,)`` as a picture ``(n_mels, num_frames)`` float32.

    Long recordings are analysed block by block. Of several windows the first is shown; overlapping patches are laid
    end to end without their overlap.
    """
    spec = frontend.spec
    block = max(round(_BLOCK_SECONDS * spec.sample_rate), spec.min_samples)
    starts = range(0, max(len(waveform) - spec.min_samples, 0) + 1, block)
    pictures = [_picture(frontend.features(waveform[None, start : start + block]), spec) for start in starts]
    return np.concatenate(pictures, axis=1)


def _picture(features: NDArray[np.float32], spec: FrontendSpec) -> NDArray[np.float32]:
    axes = spec.layout.split(" ")
    keep = np.asarray(features[tuple(0 if axis in ("b", "c", "1") else slice(None) for axis in axes)])
    left = [axis for axis in axes if axis in ("p", "t", "m")]
    keep = keep.transpose([left.index(axis) for axis in ("p", "t", "m") if axis in left])
    if spec.patches is not None:
        keep = keep[:, : spec.patches.hop].reshape(-1, spec.mel.n_mels)
    return keep.T


def _mel_ticks(spec: FrontendSpec) -> tuple[list[float], list[str]]:
    """Return where round frequencies lie on the axis of mel bands, and how to write them."""
    matrix = mel_matrix(spec.mel, spec.framing.n_fft, spec.sample_rate)
    weight = matrix.sum(axis=0)
    frequencies = np.arange(len(matrix)) * (spec.sample_rate / spec.framing.n_fft)
    centres = (matrix * frequencies[:, None]).sum(axis=0)[weight > 0] / weight[weight > 0]
    bands = np.flatnonzero(weight > 0)
    ticks = [hz for hz in _TICKS_HZ if centres[0] <= hz <= centres[-1]]
    positions = np.interp(ticks, centres, bands).tolist()
    return positions, [f"{hz / 1000:g} kHz" if hz >= 1000 else f"{hz} Hz" for hz in ticks]


def plot_prediction(
    path: str | Path,
    frontend: TFFrontend | None,
    waveform: NDArray[np.float32] | None,
    predictions: Sequence[Prediction],
    *,
    title: str,
    top: int = 5,
    picture: Image.Image | None = None,
    force: bool = False,
) -> None:
    """Write a picture of a clip's spectrogram, and of the picture beside it, with its scores.

    One prediction gives bars of its most probable classes; several (windows of a recording) give a map of
    probability over time. Of a model for event detection, either gives a lane for each class: its frame scores in blue
    and frames around its events.

    Args:
        path: where to; the suffix decides the format.
        frontend: of the model; its features are what is shown. None where it hears nothing.
        waveform: ``(num_samples,)`` float32 at the front end's rate, or None.
        predictions: of the clip, or of its windows in order.
        title: above the picture.
        picture: what the model looked at, or None; shown where there is one prediction.
        top: classes shown; of events, those that have any, and the ``top`` most probable.
        force: replace an existing file.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        OutputExistsError, OutputWriteError: the picture cannot be written.
    """
    figure = require_matplotlib()(figsize=(11, 4.5), layout="constrained")
    figure.suptitle(_plain(title))
    if predictions[0].events is not None and predictions[0].frame_probabilities is not None:
        scores, seconds = _joined_scores(predictions)
        events = [event for prediction in predictions for event in prediction.events or ()]
        lanes = _lanes(scores, events, predictions[0].labels, top)
        figure.set_size_inches(11, 4.4 + 0.34 * len(lanes))
        heard, answered = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, 0.5 + 0.34 * len(lanes)])
        _draw_lanes(figure, answered, scores, seconds, events, predictions[0].labels, lanes)
    elif len(predictions) == 1:
        sides = [2.0] * (waveform is not None) + [1.0] * (picture is not None)
        axes = figure.subplots(1, len(sides) + 1, width_ratios=[*sides, 1], squeeze=False)[0]
        heard, answered = axes[0], axes[-1]
        if picture is not None:
            _draw_picture(axes[-2], picture, "picture")
        _draw_bars(answered, predictions[0], top)
    else:
        figure.set_size_inches(11, 6.5)
        heard, answered = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
        _draw_map(figure, answered, predictions, top)
    if frontend is not None and waveform is not None:
        _draw_spectrogram(figure, heard, frontend, waveform)
    _save(figure, path, force)


def plot_matches(
    path: str | Path, classifier: TFAudioClassifier, query: str, matches: Sequence[Match], *, force: bool = False
) -> None:
    """Write a contact sheet: a query and what was found for it, pictures as such and sounds as spectrograms.

    Args:
        path: where to; the suffix decides the format.
        classifier: the index's model.
        query: path of a sound or a picture.
        matches: found by :class:`~infer_tf.index.AudioVisualIndex`; files that are not there any more are named only.
        force: replace an existing file.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        AudioDecodeError, ImageDecodeError: the query cannot be read.
        OutputExistsError, OutputWriteError: the sheet cannot be written.
    """
    shown: list[tuple[str, str, str]] = [(query, "image" if is_picture(query) else "audio", "query")]
    for rank, match in enumerate(matches, start=1):
        name = match.label or Path(match.path).name
        shown.append((match.path, match.kind, f"{rank}. {_short(name, 20)}  {match.cosine:.3f}"))
    columns = min(len(shown), _COLUMNS)
    rows = -(-len(shown) // columns)
    figure = require_matplotlib()(figsize=(2.4 * columns, 2.5 * rows), layout="constrained")
    for place, axes in enumerate(figure.subplots(rows, columns, squeeze=False).ravel()):
        axes.set_axis_off()
        if place < len(shown):
            _draw_thing(axes, classifier, *shown[place], needed=place == 0)
    _save(figure, path, force)


def _draw_thing(axes: Any, classifier: TFAudioClassifier, path: str, kind: str, title: str, *, needed: bool) -> None:
    """Draw one cell of a contact sheet."""
    axes.set_title(_plain(title), fontsize=9)
    try:
        if is_video(path):
            thing: Any = (
                read_video_audio(path, classifier.frontend.spec) if kind == "audio" else read_video_frames(path)[0]
            )
        else:
            thing = load_audio(path, classifier.frontend.spec) if kind == "audio" else read_image(path)
    except (AudioDecodeError, ImageDecodeError, VideoDecodeError):
        if needed:
            raise
        axes.text(0.5, 0.5, "not there any more", ha="center", va="center", fontsize=9, transform=axes.transAxes)
        return
    if kind == "audio":
        legal = legal_segments(thing, classifier.card)[0]
        picture = spectrogram(classifier.frontend, legal)
        axes.imshow(picture, origin="lower", aspect="auto", interpolation="nearest", cmap="magma")
    else:
        _draw_picture(axes, thing, title)


def _draw_picture(axes: Any, picture: Image.Image, title: str) -> None:
    small = picture.copy()
    small.thumbnail((_PIXELS, _PIXELS))
    axes.imshow(np.asarray(small))
    axes.set_axis_off()
    axes.set_title(_plain(title), fontsize=10 if title == "picture" else 9)


def _draw_spectrogram(figure: Any, axes: Any, frontend: TFFrontend, waveform: NDArray[np.float32]) -> None:
    spec = frontend.spec
    picture = spectrogram(frontend, waveform)
    seconds = len(waveform) / spec.sample_rate
    image = axes.imshow(
        picture,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        cmap="magma",
        extent=(0, seconds, -0.5, len(picture) - 0.5),
    )
    positions, names = _mel_ticks(spec)
    axes.set_yticks(positions, names)
    axes.set_xlabel("time (s)")
    axes.set_title("log-mel spectrogram, as the model sees it", fontsize=10)
    figure.colorbar(image, ax=axes, label="front end's units", pad=0.01)


def _draw_bars(axes: Any, prediction: Prediction, top: int) -> None:
    best = prediction.top(top)[::-1]
    bars = axes.barh([_short(label) for label, _, _ in best], [value for _, _, value in best], color="#3b6ea5")
    axes.bar_label(bars, labels=[f"{value:.3f}" for _, _, value in best], padding=3, fontsize=9)
    axes.set_xlim(0, 1.18)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_xlabel("probability")
    axes.set_title("scores", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_map(figure: Any, axes: Any, predictions: Sequence[Prediction], top: int) -> None:
    scores = np.stack([prediction.probabilities for prediction in predictions])  # (windows, num_classes)
    best = np.argsort(-scores.max(axis=0), kind="stable")[:top][::-1]
    # Where windows overlap, each is drawn until the next one begins.
    edges = [prediction.start for prediction in predictions] + [predictions[-1].end]
    image = axes.pcolormesh(edges, np.arange(len(best) + 1) - 0.5, scores[:, best].T, cmap="viridis", vmin=0, vmax=1)
    axes.set_yticks(range(len(best)), [_short(predictions[0].labels[index]) for index in best])
    axes.set_xlabel("time (s)")
    axes.set_title("probability per window, drawn from its beginning", fontsize=10)
    figure.colorbar(image, ax=axes, label="probability", pad=0.01)


def _joined_scores(predictions: Sequence[Prediction]) -> tuple[NDArray[np.float32], float]:
    """Return the frame scores of a clip or of windows, ``(num_classes, num_frames)``, and the seconds of a frame."""
    joiner = ScoreJoiner()
    seconds = 0.0
    for prediction in predictions:
        scores, times = prediction.frame_probabilities, prediction.frame_times
        assert scores is not None
        assert times is not None
        seconds = seconds or (float(times[1] - times[0]) if len(times) > 1 else prediction.end - prediction.start)
        joiner.add(round(prediction.start / seconds), scores)
    return joiner.release(1 << 62), seconds


def _lanes(scores: NDArray[np.float32], events: Sequence[Event], labels: Sequence[str], top: int) -> list[int]:
    """Return the classes to show, in the model's order."""
    best = np.argsort(-scores.max(axis=1), kind="stable")[:top].tolist()
    found = {labels.index(event.label) for event in events}
    return sorted(found | set(best))


def _draw_lanes(
    figure: Any,
    axes: Any,
    scores: NDArray[np.float32],
    seconds: float,
    events: Sequence[Event],
    labels: Sequence[str],
    lanes: Sequence[int],
) -> None:
    edges = np.arange(scores.shape[1] + 1) * seconds
    rows = np.arange(len(lanes) + 1) - 0.5
    image = axes.pcolormesh(edges, rows, scores[lanes], cmap="Blues", vmin=0, vmax=1)
    for event in events:
        axes.broken_barh(
            [(event.onset, event.offset - event.onset)],
            (lanes.index(labels.index(event.label)) - 0.36, 0.72),
            facecolors="none",
            edgecolors="#c8321e",
            linewidth=1.6,
        )
    axes.hlines(rows[1:-1], 0, edges[-1], colors="#cccccc", linewidth=0.6)
    axes.set_yticks(range(len(lanes)), [_short(labels[lane]) for lane in lanes])
    axes.set_ylim(len(lanes) - 0.5, -0.5)
    axes.set_xlabel("time (s)")
    axes.set_title(f"frame scores and events ({len(events)})", fontsize=10)
    figure.colorbar(image, ax=axes, label="probability", pad=0.01)


def _short(label: str, limit: int = 28) -> str:
    return _plain(label if len(label) <= limit else label[: limit - 1] + "…")


def _plain(text: str) -> str:
    """Return ``text`` so that matplotlib draws it as it is: a dollar sign would start a formula."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8").replace("$", r"\$")


def plot_confusion(
    path: str | Path, matrix: NDArray[np.int64], labels: Sequence[str], *, title: str, force: bool = False
) -> None:
    """Write a picture of a confusion matrix.

    Args:
        path: where to; the suffix decides the format.
        matrix: ``(num_classes, num_classes)`` counts; rows are the truth, columns the answer.
        labels: class names.
        title: above the picture.
        force: replace an existing file.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        OutputExistsError, OutputWriteError: the picture cannot be written.
    """
    size = min(max(4.0, 1.8 + 0.42 * len(labels)), 24.0)
    figure = require_matplotlib()(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    names = [_short(label, 20) for label in labels]
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("answer")
    axes.set_ylabel("truth")
    axes.set_title(_plain(title), fontsize=10)
    if len(labels) <= 30:
        for row, column in np.argwhere(matrix > 0):
            colour = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, str(matrix[row, column]), ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, ax=axes, label="share of the truth", pad=0.01)
    _save(figure, path, force)


def _save(figure: Any, path: str | Path, force: bool) -> None:
    with replacing(path, force=force) as partial, warnings.catch_warnings():
        # Names in scripts that the font does not know are drawn as boxes.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)
        figure.savefig(partial, dpi=150)
