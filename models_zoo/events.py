"""Events and frames: labels for training from annotated times, timed events from frame scores, whole or as they come.

Scores and encodings are class-major, ``(classes, frames)``. Everything that finds events passes through
:class:`EventDecoder`, which takes scores in pieces of any size and answers the same whatever the pieces are.

Source: the DCASE 2024 task 4 baseline (DESED_task, MIT licence): label encoder and median filters. Two things differ: a
time within a millionth of a frame of a frame's border is that border, so that times written by the decoder are read
back exactly; and joining gaps and dropping short events, which the baseline does not do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.ndimage import median_filter

from models_zoo.cards import ModelCard
from models_zoo.errors import CardError, UnknownNameError, WaveformError
from models_zoo.prediction import Event
from models_zoo.schema import Declaration

__all__ = ["EventDecoder", "EventOptions", "FrameGrid", "decode_events", "encode_events", "filter_scores"]

_SNAP = 1e-6
"""Frames; times this near to a border lie on it."""

_THRESHOLD = 0.5
"""Where neither the card nor the caller says anything."""

_Probability: TypeAlias = Annotated[float, Field(ge=0, le=1)]
_Seconds: TypeAlias = Annotated[float, Field(ge=0, le=3600)]


@dataclass(frozen=True)
class FrameGrid:
    """Where the scores of a model lie in time: frame k from ``k * hop`` to ``(k + 1) * hop`` samples.

    Attributes:
        sample_rate: Hz.
        hop: samples from one score to the next.
    """

    sample_rate: int
    hop: int

    @classmethod
    def of(cls, card: ModelCard) -> Self:
        """Return the grid of a model's frame scores.

        Raises:
            CardError: the model scores no frames, or has no front end.
        """
        frame = card.frame_output()
        if frame is None or card.frontend is None:
            raise CardError(
                f"model {card.name!r} scores no frames, so it finds no events; use a model for event detection",
                field="outputs",
            )
        return cls(card.sample_rate, frame.hop * card.frontend.framing.hop_length)

    @property
    def seconds(self) -> float:
        """Length of a frame."""
        return self.hop / self.sample_rate

    def time_of(self, frame: int) -> float:
        """Return when a frame begins, in seconds."""
        return frame * self.hop / self.sample_rate

    def num_frames(self, num_samples: int) -> int:
        """Return how many whole frames a clip has: the length of its targets in training (10 s at 16 kHz: 156)."""
        return num_samples // self.hop

    def onset_frame(self, seconds: float) -> int:
        """Return the frame in which a time lies: rounded down."""
        return math.floor(self._snapped(seconds))

    def offset_frame(self, seconds: float) -> int:
        """Return the first frame that begins at a time or after it: rounded up."""
        return math.ceil(self._snapped(seconds))

    def _snapped(self, seconds: float) -> float:
        frames = seconds * self.sample_rate / self.hop
        nearest = float(round(frames))
        return nearest if abs(frames - nearest) <= _SNAP else frames


class EventOptions(Declaration):
    """How events are found in frame scores. Each field is one number for all classes, or label -> number.

    In this order: scores are smoothed, those above the threshold make events, events of a class with a short gap
    between them become one, short ones are dropped.

    Attributes:
        thresholds: a frame is active where its smoothed score is greater. None, or a label left out: the card's, or
            0.5 where it states none.
        median_filters: seconds over which the running median is taken, see :meth:`median_frames`. None, or a label
            left out: the card's, or no smoothing where it states none.
        min_duration: shorter events are dropped, seconds.
        merge_gap: events of one class with a gap of at most this between them are one, seconds.
    """

    error: ClassVar[type[CardError]] = CardError

    thresholds: _Probability | dict[str, _Probability] | None = None
    median_filters: _Seconds | dict[str, _Seconds] | None = None
    min_duration: _Seconds | dict[str, _Seconds] = 0.0
    merge_gap: _Seconds | dict[str, _Seconds] = 0.0

    @classmethod
    def of(cls, card: ModelCard) -> Self:
        """Return what the card states."""
        return cls(thresholds=card.thresholds, median_filters=card.median_filters)

    def over(self, card: ModelCard) -> EventOptions:
        """Return these options, completed by what the card states for the labels they leave out."""
        return self.replace(
            thresholds=_completed(self.thresholds, card.thresholds),
            median_filters=_completed(self.median_filters, card.median_filters),
        )

    def per_class(self, field: str, labels: Sequence[str]) -> list[float]:
        """Return the number of each label.

        Args:
            field: name of one of the attributes.
            labels: in the model's order.

        Raises:
            UnknownNameError: the field names a label that is not among them.
        """
        default = _THRESHOLD if field == "thresholds" else 0.0
        value: float | dict[str, float] | None = getattr(self, field)
        if not isinstance(value, dict):
            return [default if value is None else value] * len(labels)
        for label in value:
            if label not in labels:
                raise UnknownNameError(f"label in {field}", label, labels)
        return [value.get(label, default) for label in labels]

    def median_frames(self, labels: Sequence[str], grid: FrameGrid) -> list[int]:
        """Return the length of each label's median filter: an odd number of frames, 1 for none.

        The odd number nearest to the seconds asked for, the longer one between two: 0.448 s of 0.064 s are 7 frames.
        """
        return [2 * int(seconds / grid.seconds / 2 + _SNAP) + 1 for seconds in self.per_class("median_filters", labels)]


def _completed(
    own: float | dict[str, float] | None, stated: dict[str, float] | None
) -> float | dict[str, float] | None:
    if own is None or (isinstance(own, dict) and stated is not None):
        return {**(stated or {}), **(own or {})} or None
    return own


def encode_events(
    events: Iterable[Event], labels: Sequence[str], grid: FrameGrid, num_frames: int
) -> NDArray[np.float32]:
    """Return events as targets, ``(classes, num_frames)`` float32: their probability where they are, 0 elsewhere.

    An onset is rounded down and an offset up to whole frames, both cut to the clip. Where events of a class overlap the
    higher probability counts; annotated events have 1.

    Raises:
        UnknownNameError: a label that is not among ``labels``.
        WaveformError: an offset before its onset, or a time below 0 or not finite (code ``range``).
    """
    index = {label: number for number, label in enumerate(labels)}
    targets = np.zeros((len(labels), num_frames), np.float32)
    for event in events:
        if event.label not in index:
            raise UnknownNameError("label", event.label, labels)
        if not 0 <= event.onset <= event.offset < math.inf:
            raise WaveformError(
                f"event {event.label!r} from {event.onset} to {event.offset} s; expected 0 <= onset <= offset",
                code="range",
            )
        stretch = targets[index[event.label], grid.onset_frame(event.onset) : grid.offset_frame(event.offset)]
        np.maximum(stretch, np.float32(event.probability), out=stretch)
    return targets


def filter_scores(scores: NDArray[np.float32], lengths: Sequence[int]) -> NDArray[np.float32]:
    """Return scores smoothed in time by a running median, the same shape and type.

    Args:
        scores: ``(classes, frames)``.
        lengths: frames over which the median of each class is taken; 1 leaves it as it is. Beyond its ends a clip is
            continued by its mirror image, the last score twice.
    """
    smoothed = scores.copy()
    for length in sorted(set(lengths) - {1}):
        rows = [row for row, own in enumerate(lengths) if own == length]
        smoothed[rows] = median_filter(scores[rows], size=(1, length), mode="reflect")
    return smoothed


@dataclass
class _Run:
    """An event that may still grow: frames from ``onset`` to before ``offset``, and the highest score in it."""

    onset: int
    offset: int
    peak: float


class EventDecoder:
    """Finds events in frame scores that come in pieces; the pieces do not change the answer.

    An event's times are the borders of its frames. Its probability is the highest smoothed score in it: a threshold
    from there on would not have found it.

    Args:
        labels: class names in order.
        grid: of the scores.
        options: see :class:`EventOptions`.

    Attributes:
        delay: frames after an event's end until it is final: half the longest median filter and the longest gap.

    Raises:
        UnknownNameError: the options name a label that is not there.
    """

    def __init__(self, labels: Sequence[str], grid: FrameGrid, options: EventOptions | None = None) -> None:
        options = options or EventOptions()
        frame = grid.seconds
        self._labels, self._grid = tuple(labels), grid
        self._rows = {label: row for row, label in enumerate(labels)}
        self._thresholds = np.array(options.per_class("thresholds", labels), np.float64)[:, None]
        self._lengths = options.median_frames(labels, grid)
        self._least = [math.ceil(seconds / frame - _SNAP) for seconds in options.per_class("min_duration", labels)]
        self._gaps = [math.floor(seconds / frame + _SNAP) for seconds in options.per_class("merge_gap", labels)]
        self._reach = max(self._lengths, default=1) // 2
        self.delay = self._reach + max(self._gaps, default=0)
        self._kept = np.zeros((len(labels), 0), np.float32)  # scores from frame `_first` on
        self._first = self._done = 0  # `_done` frames have been smoothed and compared with the threshold
        self._growing: list[_Run | None] = [None] * len(labels)

    def push(self, scores: NDArray[np.float32]) -> list[Event]:
        """Return the events that have become final, by onset.

        Args:
            scores: ``(classes, frames)`` float32 in [0, 1], following those pushed before.
        """
        self._kept = np.concatenate([self._kept, scores], axis=1)
        return self._advance(self._first + self._kept.shape[1] - self._reach, math.inf)

    def finish(self, end: float = math.inf) -> list[Event]:
        """Return the events left once no more scores come, by onset.

        Args:
            end: of the recording, in seconds; an event that reaches further, as the last frame may, ends there.
        """
        events = self._advance(self._first + self._kept.shape[1], end)
        rest = [self._event(row, run, end) for row, run in enumerate(self._growing) if run is not None]
        self._growing = [None] * len(self._labels)
        return self._sorted([*events, *(event for event in rest if event)])

    def _advance(self, until: int, end: float) -> list[Event]:
        """Smooth and compare the frames before ``until``."""
        if until <= self._done:
            return []
        smoothed = filter_scores(self._kept, self._lengths)[:, self._done - self._first : until - self._first]
        active = smoothed > self._thresholds
        begin, self._done = self._done, until
        keep_from = max(0, until - self._reach)
        self._kept, self._first = self._kept[:, keep_from - self._first :], keep_from
        events = []
        found = _stretches(active)
        waiting = {row for row, run in enumerate(self._growing) if run is not None}
        for row in sorted(waiting | set(found)):
            for onset, offset in found.get(row, ()):
                run = _Run(begin + onset, begin + offset, float(smoothed[row, onset:offset].max()))
                before = self._growing[row]
                if before is not None and run.onset - before.offset <= self._gaps[row]:
                    run = _Run(before.onset, run.offset, max(before.peak, run.peak))
                elif before is not None:
                    events.append(self._event(row, before, end))
                self._growing[row] = run
            last = self._growing[row]
            if last is not None and until - last.offset > self._gaps[row]:
                events.append(self._event(row, last, end))
                self._growing[row] = None
        return self._sorted([event for event in events if event])

    def _event(self, row: int, run: _Run, end: float) -> Event | None:
        if run.offset - run.onset < self._least[row]:
            return None
        onset, offset = self._grid.time_of(run.onset), self._grid.time_of(run.offset)
        return Event(self._labels[row], onset, min(offset, end), run.peak)

    def _sorted(self, events: list[Event]) -> list[Event]:
        return sorted(events, key=lambda event: (event.onset, event.offset, self._rows[event.label]))


def _stretches(active: NDArray[np.bool_]) -> dict[int, list[tuple[int, int]]]:
    """Return row -> its runs of active frames as (first, first behind), of rows that have any."""
    padded = np.zeros((active.shape[0], active.shape[1] + 2), bool)
    padded[:, 1:-1] = active
    rows, edges = (part.tolist() for part in np.nonzero(padded[:, 1:] != padded[:, :-1]))
    found: dict[int, list[tuple[int, int]]] = {}
    for row, onset, offset in zip(rows[::2], edges[::2], edges[1::2], strict=True):
        found.setdefault(row, []).append((onset, offset))
    return found


def decode_events(
    scores: NDArray[np.float32],
    labels: Sequence[str],
    grid: FrameGrid,
    options: EventOptions | None = None,
    *,
    end: float = math.inf,
) -> tuple[Event, ...]:
    """Return the events in the frame scores of one clip, by onset.

    Args:
        scores: ``(classes, frames)`` float32 in [0, 1].
        labels: class names in order.
        grid: of the scores.
        options: see :class:`EventOptions`; as they are, without a card's thresholds.
        end: of the clip, in seconds: frames that begin there or after it do not count, and events end there at last.

    Raises:
        UnknownNameError: the options name a label that is not there.
    """
    if end < math.inf:
        scores = scores[:, : grid.offset_frame(end)]
    decoder = EventDecoder(labels, grid, options)
    events = [*decoder.push(scores), *decoder.finish(end)]
    return tuple(decoder._sorted(events))
