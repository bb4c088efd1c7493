"""From a clip to what a graph may be fed, and from what it returns to an answer; the same NumPy for every path.

Training-side and production-side predictions both pass through :func:`legal_segments` and :func:`decode`, so a
difference between them can only come from the front end or the network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from models_zoo.cards import ModelCard
from models_zoo.errors import CardError, ClipLengthError, ModelFileError
from models_zoo.events import EventOptions, FrameGrid, decode_events
from models_zoo.prediction import Prediction

__all__ = [
    "check_window",
    "class_names",
    "decode",
    "frame_scores",
    "legal_segments",
    "probabilities_of",
    "window_starts",
]


def probabilities_of(scores: NDArray[np.float32], *, task: str, kind: str | None) -> NDArray[np.float32]:
    """Return scores as probabilities, the same shape, float32 in [0, 1].

    Args:
        scores: ``(..., num_classes)`` float32, as the graph returned them.
        task: the card's; decides between softmax (``single_label``, ``label_distribution``) and sigmoid.
        kind: the output's; ``logit``, ``log_probability`` or ``probability``.
    """
    if kind == "probability":
        return np.asarray(scores, np.float32)
    # float64 inside: exp of a float32 rounds differently on different machines.
    x = np.asarray(scores, np.float64)
    if kind == "log_probability":
        x = np.exp(x)
    elif task in ("single_label", "label_distribution"):
        x = np.exp(x - x.max(axis=-1, keepdims=True))
        x = x / x.sum(axis=-1, keepdims=True)
    else:
        # exp(-|x|) never overflows.
        small = np.exp(-np.abs(x))
        x = np.where(x >= 0, 1.0, small) / (1.0 + small)
    return np.asarray(x, np.float32)


def window_starts(num_samples: int, window: int, hop: int) -> list[int]:
    """Return where windows of ``window`` samples begin in a recording of ``num_samples``.

    Every ``hop`` samples from 0; the last one ends exactly with the recording, so it may overlap its neighbour by
    more than the others do. A recording no longer than one window is one window: the whole of it.
    """
    if num_samples <= window:
        return [0]
    last = num_samples - window
    starts = list(range(0, last, hop))
    return [*starts, last]


def _seconds(num_samples: int, card: ModelCard) -> str:
    return f"{num_samples} samples ({num_samples / card.sample_rate:.4f} s)"


def _multiple(num_samples: int, multiple: int, *, up: bool) -> int:
    return (-(-num_samples // multiple) if up else num_samples // multiple) * multiple


def legal_segments(waveform: NDArray[np.float32], card: ModelCard) -> NDArray[np.float32]:
    """Return what a model scores of one clip: ``(segments, num_samples)`` float32, each of a legal length.

    One segment as a rule; several only where the card cuts long clips into windows, which are placed as
    :func:`window_starts` says. The card's ``length_policy`` decides in the order long, short, uneven.

    Args:
        waveform: ``(num_samples,)`` float32 at ``card.sample_rate``.
        card: of the model.

    Raises:
        ClipLengthError: too short, too long or no multiple, and the card declares no rule for it; ``code`` is
            ``too_short``, ``too_long`` or ``multiple``.
    """
    policy, shortest = card.length_policy, card.min_samples
    if policy.max is not None and len(waveform) > policy.max:
        if policy.long == "error":
            raise ClipLengthError(
                f"the clip has {_seconds(len(waveform), card)}; model {card.name!r} takes at most "
                f"{_seconds(policy.max, card)}; cut it, or use predict_windows",
                code="too_long",
            )
        if policy.long == "windows":
            starts = window_starts(len(waveform), policy.max, policy.max)
            return np.stack([waveform[start : start + policy.max] for start in starts])
        waveform = waveform[: policy.max]
    if len(waveform) < shortest:
        if policy.short == "error":
            raise ClipLengthError(
                f"the clip has {_seconds(len(waveform), card)}; model {card.name!r} needs at least "
                f"{_seconds(shortest, card)}; use a longer clip or declare a padding rule in the card's length_policy",
                code="too_short",
            )
        filled = _multiple(shortest, policy.multiple_of, up=True)
        if policy.short == "repeat":
            waveform = np.tile(waveform, -(-filled // len(waveform)))[:filled]
        else:
            waveform = np.pad(waveform, (0, filled - len(waveform)))
    remainder = len(waveform) % policy.multiple_of
    if remainder and policy.uneven == "zero":
        waveform = np.pad(waveform, (0, policy.multiple_of - remainder))
    elif remainder and policy.uneven == "crop" and len(waveform) - remainder >= shortest:
        waveform = waveform[: len(waveform) - remainder]
    elif remainder:
        raise ClipLengthError(
            f"the clip has {_seconds(len(waveform), card)}; model {card.name!r} takes multiples of "
            f"{policy.multiple_of} samples; cut it to {_multiple(len(waveform), policy.multiple_of, up=False)} or fill "
            f"it to {_multiple(len(waveform), policy.multiple_of, up=True)}",
            code="multiple",
        )
    return waveform[None]


def check_window(window: int, card: ModelCard) -> None:
    """Refuse a sliding window that the model cannot score.

    Args:
        window: samples at ``card.sample_rate``.
        card: of the model.

    Raises:
        ClipLengthError: shorter than the shortest legal clip, longer than the longest, or no multiple.
    """
    policy = card.length_policy
    if window < card.min_samples:
        code, limit = "too_short", f"at least {_seconds(card.min_samples, card)}"
    elif policy.max is not None and window > policy.max:
        code, limit = "too_long", f"at most {_seconds(policy.max, card)}"
    elif window % policy.multiple_of:
        code, limit = "multiple", f"a multiple of {_seconds(policy.multiple_of, card)}"
    else:
        return
    raise ClipLengthError(f"window: got {_seconds(window, card)}; model {card.name!r} needs {limit}", code=code)


def class_names(card: ModelCard, num_classes: int) -> tuple[str, ...]:
    """Return the labels of a card, or ``class 0``, ``class 1``, ... where it has none.

    Raises:
        ModelFileError: the card's labels are not as many as the classes.
    """
    if card.labels is None:
        return tuple(f"class {index}" for index in range(num_classes))
    if len(card.labels) != num_classes:
        raise ModelFileError(
            f"model {card.name!r} returned {num_classes} classes, but its card has {len(card.labels)} labels; "
            "export it again with the right labels"
        )
    return card.labels


def decode(
    card: ModelCard,
    outputs: Mapping[str, NDArray[np.float32]],
    *,
    start: float = 0.0,
    end: float = 0.0,
    events: EventOptions | None = None,
) -> Prediction:
    """Return the answer to one clip from what the graph returned for its segments.

    Probabilities and embeddings are averaged over the segments; logits, frame scores and events are kept only where
    there is one segment. The first frame begins with the clip.

    Args:
        card: of the model.
        outputs: output name -> ``(segments, ...)`` float32.
        start, end: seconds of the recording that were scored; an ``end`` of 0 is not known.
        events: how to find events in the frame scores of a clip that begins its recording, and None not to; what it
            leaves out is the card's.

    Raises:
        ModelFileError: the model has no clip scores, or not as many as its card has labels.
        UnknownNameError: an event option for a label the model does not have.
    """
    clip = card.clip_output()
    if clip is None:
        raise ModelFileError(f"model {card.name!r} has no clip scores to predict from; use embed")
    scores = outputs[clip.name]
    probabilities = probabilities_of(scores, task=card.task, kind=clip.kind)
    labels = class_names(card, scores.shape[-1])
    embedding = card.embedding_output()
    frames = grid = found = None
    if len(scores) == 1 and card.frame_output() is not None and card.frontend is not None:
        frames, grid = frame_scores(card, outputs), FrameGrid.of(card)
        if events is not None:
            found = decode_events(frames, labels, grid, events.over(card), end=end or math.inf)
    return Prediction(
        labels=labels,
        probabilities=probabilities.mean(axis=0) if len(probabilities) > 1 else probabilities[0],
        logits=scores[0] if clip.kind == "logit" and len(scores) == 1 else None,
        embedding=None if embedding is None else outputs[embedding.name].mean(axis=0),
        start=start,
        end=end,
        frame_probabilities=frames,
        frame_times=None
        if frames is None or grid is None
        else start + np.arange(frames.shape[1], dtype=np.float64) * grid.seconds,
        events=found,
    )


def frame_scores(card: ModelCard, outputs: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    """Return the frame scores of one segment as probabilities, ``(num_classes, num_frames)`` float32.

    Args:
        card: of the model.
        outputs: output name -> ``(1, ...)`` float32.

    Raises:
        CardError: the model scores no frames.
    """
    frame = card.frame_output()
    if frame is None:
        raise CardError(f"model {card.name!r} scores no frames", field="outputs")
    scores = np.moveaxis(outputs[frame.name], frame.time_axis, 1)[0]
    return np.ascontiguousarray(probabilities_of(scores, task=card.task, kind=frame.kind).T)
