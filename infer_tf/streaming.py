"""Events in recordings of any length and in live audio: overlapping windows, joined on one grid of frames."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from models_zoo.audio import Resampler, as_waveform, checked_rate
from models_zoo.cards import ModelCard
from models_zoo.decoding import check_window, frame_scores, legal_segments
from models_zoo.errors import ClosedError, ModelFileError, WaveformError
from models_zoo.events import EventDecoder, EventOptions, FrameGrid
from models_zoo.prediction import Event
from models_zoo.segments import ScoreJoiner

__all__ = ["EventStream", "JoinedWindows", "Scored"]

_LOUDEST = 1e30
"""Samples beyond are refused before they reach the resampler, where they would overflow and spoil what follows."""


@dataclass(frozen=True, eq=False)
class Scored:
    """One window of a recording.

    Attributes:
        outputs: of the graph, by name; None where the recording only ended.
        start, end: of the window, in samples.
        events: that became final with it.
    """

    outputs: dict[str, NDArray[np.float32]] | None
    start: int
    end: int
    events: list[Event]


class JoinedWindows:
    """Scores a recording in overlapping windows, in constant memory, and finds the events of the whole.

    Windows begin every ``hop`` samples; once the recording has ended, what is left is scored in a window as long as the
    others that begins on a frame and ends with the recording, or less than a frame before it. A recording no longer
    than a window is scored whole, by the card's length policy.

    Args:
        card: of the model.
        run: scores ``(segments, num_samples)`` and returns the graph's outputs by name.
        window: samples.
        hop: samples, rounded down to whole frames of the output.
        labels: class names in order.
        options: complete; see :meth:`EventOptions.over`.

    Attributes:
        window, hop: samples, as used.
        delay: samples after an event's end until it is reported, at most.

    Raises:
        ClipLengthError: the model cannot score such windows; ``code`` says why.
        WaveformError: ``hop`` is less than a frame or more than the window (code ``range``).
        CardError, UnknownNameError: the model scores no frames; an option for a label it does not have.
    """

    def __init__(
        self,
        card: ModelCard,
        run: Callable[[NDArray[np.float32]], dict[str, NDArray[np.float32]]],
        window: int,
        hop: int,
        labels: tuple[str, ...],
        options: EventOptions,
    ) -> None:
        grid = FrameGrid.of(card)
        check_window(window, card)
        if not grid.hop <= hop <= window:
            raise WaveformError(
                f"hop: got {hop / card.sample_rate:g} s with windows of {window / card.sample_rate:g} s; to find "
                f"events, windows begin at least one frame ({grid.seconds:g} s) apart and leave no gaps",
                code="range",
            )
        self.window, self.hop = window, hop // grid.hop * grid.hop
        self._card, self._run, self._grid = card, run, grid
        self._joiner = ScoreJoiner()
        self._decoder = EventDecoder(labels, grid, options)
        self.delay = window + self._decoder.delay * grid.hop
        self._kept = np.zeros(0, np.float32)  # samples from `_offset` on: the next window, and the last one received
        self._offset = self._following = 0

    @property
    def received(self) -> int:
        """Samples taken so far."""
        return self._offset + len(self._kept)

    @property
    def _last_start(self) -> int:
        """Where the last window begins if nothing more comes."""
        return max(0, (self.received - self.window) // self._grid.hop * self._grid.hop)

    def feed(self, waveform: NDArray[np.float32]) -> Iterator[Scored]:
        """Yield the windows that are complete with these samples.

        Args:
            waveform: ``(num_samples,)`` float32 at the model's rate, following those fed before.
        """
        self._kept = np.concatenate([self._kept, waveform])
        while self._following + self.window <= self.received:
            yield self._score(self._following, self.window, (self._following + self.hop) // self._grid.hop)
            self._following += self.hop
        keep_from = min(self._following, self._last_start)
        self._kept, self._offset = self._kept[keep_from - self._offset :].copy(), keep_from

    def close(self) -> Iterator[Scored]:
        """Yield the last window, if something is left to score, and the last events."""
        received, unit = self.received, self._grid.hop
        if not received:
            return
        end = -(-received // unit)
        if self._last_start > self._following - self.hop:
            last = self._score(self._last_start, min(self.window, received), end)
        else:
            last = Scored(None, received, received, self._release(end))
        last.events.extend(self._decoder.finish(received / self._card.sample_rate))
        yield last

    def _score(self, start: int, length: int, until: int) -> Scored:
        """Score the window of ``length`` samples from ``start``; no later window changes frames before ``until``."""
        waveform = self._kept[start - self._offset : start - self._offset + length]
        outputs = self._run(legal_segments(waveform, self._card))
        scores = frame_scores(self._card, outputs)
        if length == self.window and scores.shape[1] * self._grid.hop < self.hop:
            raise ModelFileError(
                f"model {self._card.name!r} scored {scores.shape[1]} frames of a window of {length} samples, fewer "
                f"than lie in a hop of {self.hop} samples; use a shorter hop"
            )
        self._joiner.add(start // self._grid.hop, scores)
        return Scored(outputs, start, start + length, self._release(until))

    def _release(self, until: int) -> list[Event]:
        return self._decoder.push(self._joiner.release(until))


class EventStream:
    """Finds events in audio that comes in chunks; made by :meth:`TFAudioClassifier.stream`.

    ::

        with classifier.stream(window=4.0, hop=1.0, sample_rate=48000) as stream:
            for chunk in microphone:
                print(stream.feed(chunk))  # the events that became final
            print(stream.close())  # the last ones

    The size of the chunks changes nothing: the events are those :meth:`TFAudioClassifier.detect` finds in the whole.
    Not to be shared between threads.

    Args:
        windows: what scores the audio.
        card: of the model.
        sample_rate: of the chunks, Hz; None for the model's.
        channels_first: chunks are ``(channels, num_samples)``, not ``(num_samples,)``.

    Attributes:
        window, hop: seconds, as used: ``hop`` is rounded down to whole frames of the model's output.
        latency: seconds from the end of an event until it is reported, at most: a window, and from the options half
            the longest median filter and the longest gap that is joined.

    Raises:
        WaveformError: an impossible ``sample_rate``.
    """

    def __init__(
        self, windows: JoinedWindows, card: ModelCard, *, sample_rate: int | None = None, channels_first: bool = False
    ) -> None:
        assert card.frontend is not None
        self._windows, self._spec, self._channels_first = windows, card.frontend, channels_first
        rate = self._spec.sample_rate
        self.sample_rate = rate if sample_rate is None else checked_rate(sample_rate)
        self.window, self.hop, self.latency = windows.window / rate, windows.hop / rate, windows.delay / rate
        self._resampler = Resampler(self.sample_rate, self._spec)
        self._final: list[Event] = []
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """End the stream without scoring what is left; :meth:`close` returns the last events."""
        self._closed = True

    def feed(self, chunk: ArrayLike, sample_rate: int | None = None) -> list[Event]:
        """Return the events that became final, by onset.

        A refused chunk changes nothing. Where the model fails, its window is scored again with the next chunk.

        Args:
            chunk: ``(num_samples,)``, or ``(channels, num_samples)`` with ``channels_first``; any length, also 0.
                Integers are scaled by their type, see ``models_zoo.audio.as_waveform``.
            sample_rate: of the chunk, to have it compared with the stream's.

        Raises:
            WaveformError: not samples, or of another rate than the stream's; ``code`` says why.
            ModelFileError: the model returned NaN.
            ClosedError: after :meth:`close`.
        """
        if self._closed:
            raise ClosedError("the stream is closed; start another one with classifier.stream()")
        if sample_rate is not None and checked_rate(sample_rate) != self.sample_rate:
            raise WaveformError(
                f"sample_rate: got a chunk at {sample_rate} Hz in a stream at {self.sample_rate} Hz; resample it, or "
                "start another stream",
                code="sample_rate",
            )
        return self._collect(self._windows.feed(self._resampler.feed(self._mono(chunk))))

    def close(self) -> list[Event]:
        """Return the events left, by onset, and end the stream. Closing twice is fine.

        Raises:
            ClipLengthError: the whole stream was shorter than the model takes, and its card declares no rule for that.
            ModelFileError: the model returned NaN.
        """
        if self._closed:
            return []
        self._closed = True
        tail = self._windows.feed(self._resampler.finish())
        return self._collect(chain(tail, self._windows.close()))

    def _collect(self, scored: Iterable[Scored]) -> list[Event]:
        for one in scored:
            self._final += one.events
        events, self._final = self._final, []
        return events

    def _mono(self, chunk: ArrayLike) -> NDArray[np.float32]:
        array: NDArray[Any] = np.asarray(chunk)
        if array.ndim != 1 + self._channels_first:
            expected = "(channels, num_samples)" if self._channels_first else "(num_samples,)"
            raise WaveformError(f"got a chunk of shape {array.shape}; expected {expected}", code="rank")
        if not array.size:
            return np.zeros(0, np.float32)
        samples = as_waveform(array, self._spec, channels_first=self._channels_first)
        if np.abs(samples).max() > _LOUDEST:
            raise WaveformError(
                f"the largest sample is {np.abs(samples).max():g}; expected values near [-1, 1]", code="range"
            )
        return samples
