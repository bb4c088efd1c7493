"""Joining what was scored piece by piece: windows of one recording on its frame grid, and clips cut from long ones.

Source of :func:`segment_scores` and :func:`join_events`: the DCASE 2024 task 4 baseline (DESED_task, MIT licence),
which cuts MAESTRO's recordings into overlapping clips of 10 s named ``recording-onset*100-offset*100``.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from models_zoo.errors import DataError, WaveformError
from models_zoo.events import FrameGrid
from models_zoo.prediction import Event

__all__ = ["ScoreJoiner", "join_events", "merge_events", "segment_scores"]


class ScoreJoiner:
    """Frame scores of overlapping windows, cross-faded into those of the recording, in constant memory.

    A frame's score is the mean over the windows it lies in, each weighing in proportion to the frame's distance from
    the window's nearer end: there a network has heard the least around it. So scores have no steps where windows begin
    and end.
    """

    def __init__(self) -> None:
        self._first = 0  # frames before it have been released
        self._sums = self._weights = np.zeros((0, 0), np.float64)

    def add(self, first: int, scores: NDArray[np.float32]) -> None:
        """Take the scores of one window; those of frames already released are left out.

        Args:
            first: frame of the recording with which the window begins.
            scores: ``(classes, frames)`` float32.
        """
        classes, frames = scores.shape
        skipped = max(0, self._first - first)
        place = first + skipped - self._first
        longer = max(0, first + frames - self._first - self._sums.shape[1])
        if not self._sums.size:
            self._sums, self._weights = np.zeros((classes, 0)), np.zeros((1, 0))
        self._sums = np.pad(self._sums, ((0, 0), (0, longer)))
        self._weights = np.pad(self._weights, ((0, 0), (0, longer)))
        weights = np.minimum(np.arange(1, frames + 1), np.arange(frames, 0, -1))[skipped:]
        stretch = slice(place, place + frames - skipped)
        self._sums[:, stretch] += weights * scores[:, skipped:].astype(np.float64)
        self._weights[:, stretch] += weights

    def release(self, end: int) -> NDArray[np.float32]:
        """Return the scores of all frames before ``end`` not returned before, ``(classes, frames)`` float32.

        No window added later changes them.

        Raises:
            WaveformError: a frame lies in no window (code ``range``).
        """
        count = min(max(0, end - self._first), self._sums.shape[1])
        sums, weights = self._sums[:, :count], self._weights[:, :count]
        if not weights.all():
            frame = self._first + int(np.flatnonzero(weights[0] == 0)[0])
            raise WaveformError(f"frame {frame} lies in no window; expected windows without gaps", code="range")
        self._sums, self._weights = self._sums[:, count:], self._weights[:, count:]
        self._first += count
        return np.asarray(sums / weights, np.float32)


def merge_events(events: Iterable[Event]) -> tuple[Event, ...]:
    """Return events without overlaps: those of one class that overlap or touch are one; by onset.

    The probability is the highest of those that became one.
    """
    merged: dict[str, list[Event]] = defaultdict(list)
    for event in sorted(events, key=lambda event: (event.onset, event.offset)):
        of_class = merged[event.label]
        if of_class and event.onset <= of_class[-1].offset:
            last = of_class[-1]
            of_class[-1] = replace(
                last, offset=max(last.offset, event.offset), probability=max(last.probability, event.probability)
            )
        else:
            of_class.append(event)
    return tuple(sorted((event for row in merged.values() for event in row), key=lambda event: event.onset))


def join_events(clips: Mapping[str, Iterable[Event]]) -> dict[str, tuple[Event, ...]]:
    """Return the events of recordings from those of clips cut from them: moved to the recording's time and merged.

    Args:
        clips: ``recording-onset*100-offset*100`` -> events in the clip's time.

    Raises:
        DataError: a name of another form.
    """
    moved: dict[str, list[Event]] = defaultdict(list)
    for name, events in clips.items():
        recording, begin, _ = _parted(name)
        moved[recording] += [replace(event, onset=event.onset + begin, offset=event.offset + begin) for event in events]
    return {recording: merge_events(events) for recording, events in moved.items()}


def segment_scores(
    clips: Mapping[str, NDArray[np.floating]], durations: Mapping[str, float], grid: FrameGrid, *, seconds: float = 1.0
) -> dict[str, NDArray[np.float64]]:
    """Return the scores of each recording's segments, ``(classes, segments)``, from the frame scores of its clips.

    Within a clip, frames count by their overlap with a segment; clips count alike. The last segment ends with the
    recording. Clips begin on the border of a segment, or are moved back to it.

    Args:
        clips: ``recording-onset*100-offset*100`` -> ``(classes, frames)``, in [0, 1].
        durations: recording -> seconds.
        grid: of the frame scores.
        seconds: length of a segment.

    Raises:
        DataError: a name of another form, a recording without a duration, or a clip that begins after its recording's
            end.
    """
    sums: dict[str, NDArray[np.float64]] = {}
    counts: dict[str, NDArray[np.int64]] = {}
    for name, scores in clips.items():
        recording, begin, end = _parted(name)
        if recording not in durations or not begin < durations[recording]:
            stated = f"is {durations[recording]} s long" if recording in durations else "has no duration"
            raise DataError(f"clip {name!r}: its recording {recording!r} {stated}; correct the durations or the name")
        classes, frames = scores.shape
        if recording not in sums:
            segments = math.ceil(durations[recording] / seconds)
            sums[recording], counts[recording] = np.zeros((classes, segments)), np.zeros(segments, np.int64)
        onsets = np.arange(0.0, end - begin, seconds)[:, None]
        borders = np.array([grid.time_of(frame) for frame in range(frames + 1)])
        overlap = np.minimum(borders[1:], onsets + seconds) - np.maximum(borders[:-1], onsets)
        overlap = np.maximum(overlap, 0)  # (segments, frames)
        own = np.asarray(scores, np.float64) @ overlap.T / overlap.sum(axis=1)
        first = int(begin // seconds)
        fitting = min(own.shape[1], len(counts[recording]) - first)
        sums[recording][:, first : first + fitting] += own[:, :fitting]
        counts[recording][first : first + fitting] += 1
    return {recording: total / np.maximum(counts[recording], 1) for recording, total in sums.items()}


def _parted(name: str) -> tuple[str, float, float]:
    """Return the recording a clip was cut from, and its begin and end in seconds."""
    recording, *times = name.rsplit("-", 2)
    if (
        len(times) != 2
        or not all(time.isascii() and time.isdecimal() for time in times)
        or not int(times[0]) < int(times[1])
    ):
        raise DataError(f"clip {name!r}; expected a name of the form recording-onset*100-offset*100, as a-500-1500")
    return recording, int(times[0]) / 100, int(times[1]) / 100
