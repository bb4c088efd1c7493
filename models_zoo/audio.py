"""From a recording to a waveform: the one way in, for training, parity and serving alike.

Decoding is libsndfile's, resampling is soxr's HQ, and :mod:`models_zoo.containers` says whether the file is whole.
Nothing is clipped or scaled: float recordings and lossy ones may exceed 1, and stay as they are.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile
import soxr
from numpy.typing import ArrayLike, NDArray

from models_zoo.containers import Container, inspect_container, is_cut_flac
from models_zoo.errors import AudioDecodeError, WaveformError
from models_zoo.files import opened
from models_zoo.specs import FrontendSpec

__all__ = [
    "MAX_CHANNELS",
    "MAX_SECONDS",
    "SAMPLE_RATES",
    "AudioInfo",
    "AudioSource",
    "Resampler",
    "as_waveform",
    "checked_rate",
    "load_audio",
    "mix_channels",
    "probe_audio",
    "stream_audio",
]

AudioSource = str | Path | bytes | bytearray | memoryview | BinaryIO
"""A path, the bytes of a file, or a file object open for reading bytes."""

SAMPLE_RATES = (1_000, 768_000)
"""Lowest and highest sample rate taken, Hz."""

MAX_CHANNELS = 64
"""Most channels taken."""

MAX_SECONDS = 600.0
"""Longest recording :func:`load_audio` takes unless told otherwise."""

_BLOCK_VALUES = 1 << 16
_EXPECTED = "a path, the bytes of an audio file, or a file object (for samples in an array use as_waveform)"


@dataclass(frozen=True)
class AudioInfo:
    """What a recording states about itself.

    Attributes:
        sample_rate: Hz.
        channels: their number.
        num_samples: per channel, at ``sample_rate``; None where the file does not say.
        duration: seconds; None where the file does not say.
        format: container and coding, e.g. ``WAV PCM_16``.
    """

    sample_rate: int
    channels: int
    num_samples: int | None
    duration: float | None
    format: str


def load_audio(source: AudioSource, spec: FrontendSpec, *, max_seconds: float = MAX_SECONDS) -> NDArray[np.float32]:
    """Return a recording as ``(num_samples,)`` float32 mono at ``spec.sample_rate`` Hz, nominally in [-1, 1].

    Channels become one as ``spec.channels`` says, before resampling. A file object is read from its beginning and
    stays open; one that cannot seek is copied first.

    Args:
        source: path, bytes or binary file object.
        spec: gives sample rate and channel rule.
        max_seconds: longest recording taken; ``math.inf`` for no cap.

    Raises:
        AudioDecodeError: with ``code`` ``not_found``, ``not_readable``, ``type``, ``empty``, ``no_samples``,
            ``not_audio``, ``unsupported``, ``corrupt``, ``truncated``, ``sample_rate``, ``channels``, ``too_long`` or
            ``non_finite``.
    """
    _check_seconds("max_seconds", max_seconds)
    return np.concatenate(list(_decode(source, spec, max_seconds)))


def stream_audio(
    source: AudioSource, spec: FrontendSpec, *, block_seconds: float = 10.0
) -> Iterator[NDArray[np.float32]]:
    """Yield a recording of any length in blocks of ``block_seconds`` (the last is shorter), in constant memory.

    The blocks joined are :func:`load_audio`'s waveform, bit for bit. Errors are raised by the first ``next``, except
    those that only decoding can find (``corrupt``, ``non_finite``, a FLAC that is ``truncated``), which are raised
    where they are.

    Args:
        source: path, bytes or binary file object.
        spec: gives sample rate and channel rule.
        block_seconds: length of a block, at least one sample.

    Raises:
        AudioDecodeError: as :func:`load_audio`, but never ``too_long``.
    """
    _check_seconds("block_seconds", block_seconds)
    length = max(1, round(min(block_seconds, 3600.0) * spec.sample_rate))
    held: list[NDArray[np.float32]] = []
    num_held = 0
    for block in _decode(source, spec, math.inf):
        held.append(block)
        num_held += len(block)
        if num_held >= length:
            joined = np.concatenate(held)
            whole = num_held - num_held % length
            yield from (joined[start : start + length] for start in range(0, whole, length))
            held = [joined[whole:]]
            num_held -= whole
    if num_held:
        yield np.concatenate(held)


def probe_audio(source: AudioSource) -> AudioInfo:
    """Return what a recording states about itself, without decoding it; checks what can be checked that way.

    Raises:
        AudioDecodeError: as :func:`load_audio`, except for what only decoding can find, and never ``too_long``.
    """
    with _opened(source) as recording:
        file = recording.file
        known = file.frames < _UNKNOWN_FRAMES
        return AudioInfo(
            sample_rate=file.samplerate,
            channels=file.channels,
            num_samples=file.frames if known else None,
            duration=file.frames / file.samplerate if known else None,
            format=f"{file.format} {file.subtype}",
        )


_UNKNOWN_FRAMES = 1 << 62
"""libsndfile reports SF_COUNT_MAX where a stream does not state its length."""


@dataclass(frozen=True)
class _Recording:
    """An open recording whose header has been checked.

    Attributes:
        file: libsndfile's handle.
        stream: the file.
        decodable: what libsndfile reads from.
        name: for messages.
        expected: samples per channel it must hold.
    """

    file: soundfile.SoundFile
    stream: BinaryIO
    decodable: _Decodable
    name: str
    expected: int


def _decode(source: AudioSource, spec: FrontendSpec, max_seconds: float) -> Iterator[NDArray[np.float32]]:
    """Yield the mono waveform at ``spec.sample_rate`` in blocks; at least one sample in all."""
    with _opened(source) as recording:
        rate = recording.file.samplerate
        if recording.expected > max_seconds * rate:
            raise _too_long(recording.name, recording.expected / rate, max_seconds)
        resampler = Resampler(rate, spec)
        num_in = num_out = 0
        for block in _blocks(recording):
            num_in += len(block)
            if num_in > max_seconds * rate:
                raise _too_long(recording.name, num_in / rate, max_seconds)
            out = resampler.feed(mix_channels(block, spec))
            num_out += len(out)
            yield _finite(out, recording.name)
        out = resampler.finish()
        num_out += len(out)
        yield _finite(out, recording.name)
        if num_out == 0:
            raise AudioDecodeError(
                f"{recording.name}: {num_in} samples at {rate} Hz leave none at {spec.sample_rate} Hz; "
                "use a longer recording",
                code="no_samples",
            )


class Resampler:
    """Brings mono audio that comes in chunks to another rate; the chunks' sizes do not change the result.

    Args:
        sample_rate: of the chunks, Hz.
        spec: gives the rate to bring them to.
    """

    def __init__(self, sample_rate: int, spec: FrontendSpec) -> None:
        self._stream = (
            None
            if sample_rate == spec.sample_rate
            else soxr.ResampleStream(sample_rate, spec.sample_rate, 1, dtype="float32", quality="HQ")
        )

    def feed(self, waveform: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the samples that are ready after ``(num_samples,)`` float32 more, any number of them."""
        return waveform if self._stream is None else self._stream.resample_chunk(waveform)

    def finish(self) -> NDArray[np.float32]:
        """Return the samples left once no more come."""
        empty = np.zeros(0, np.float32)
        return empty if self._stream is None else self._stream.resample_chunk(empty, last=True)


def _blocks(recording: _Recording) -> Iterator[NDArray[np.float32]]:
    """Yield ``(n, channels)`` float32 until the recording ends; checks that all of it was there and finite."""
    file, name = recording.file, recording.name
    count = 0
    while True:
        try:
            block = file.read(max(1, _BLOCK_VALUES // file.channels), dtype="float32", always_2d=True)
        except (soundfile.SoundFileError, RuntimeError, TypeError, ValueError, OSError) as error:
            if file.format == "FLAC" and is_cut_flac(recording.stream, recording.expected):
                raise _cut_short(name, recording.expected, count) from error
            raise AudioDecodeError(
                f"{name}: the recording is damaged after {count} samples ({_reason(error)}); get an undamaged copy",
                code="corrupt",
            ) from error
        if recording.decodable.failure is not None:
            raise _not_readable(name, recording.decodable.failure)
        if not len(block):
            break
        finite = np.isfinite(block)
        if not finite.all():
            frame, channel = (int(i) for i in np.argwhere(~finite)[0])
            at = count + frame
            raise AudioDecodeError(
                f"{name}: sample {at} ({at / file.samplerate:.4f} s) of channel {channel} is {block[frame, channel]}; "
                "expected finite numbers: repair or leave out the recording",
                code="non_finite",
            )
        count += len(block)
        yield block
    if count < recording.expected:
        raise _cut_short(name, recording.expected, count)
    if count == 0:
        raise _no_samples(name)


def _cut_short(name: str, stated: int | None, count: int) -> AudioDecodeError:
    return AudioDecodeError(
        f"{name}: the recording is cut short: it states {stated or 'no number of'} samples, {count} could be decoded; "
        "get the whole file again",
        code="truncated",
    )


def mix_channels(block: NDArray[np.float32], spec: FrontendSpec) -> NDArray[np.float32]:
    """Return ``(n,)`` of ``(n, channels)`` float32, as ``spec.channels`` says."""
    if spec.channels == "first" or block.shape[1] == 1:
        return np.ascontiguousarray(block[:, 0])
    return np.asarray(block.mean(axis=1, dtype=np.float32))


def _finite(waveform: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    if not np.isfinite(waveform).all():
        raise AudioDecodeError(
            f"{name}: its samples are so large that mixing or resampling overflows; expected values near [-1, 1]",
            code="non_finite",
        )
    return waveform


@contextmanager
def _opened(source: AudioSource) -> Iterator[_Recording]:
    with ExitStack() as stack:
        stream, name = stack.enter_context(opened(source, AudioDecodeError, _EXPECTED))
        try:
            container = inspect_container(stream)
            decodable = _Decodable(container, stream)
        except AudioDecodeError as error:
            raise AudioDecodeError(f"{name}: {error}", code=error.code) from None
        except (OSError, ValueError, OverflowError) as error:
            raise _not_readable(name, error) from error
        if container.sample_rate is not None and container.channels is not None:
            _check_layout(name, container.sample_rate, container.channels)
        try:
            file = stack.enter_context(soundfile.SoundFile(decodable))
        except (soundfile.SoundFileError, RuntimeError, TypeError, ValueError, OSError) as error:
            if container.format == "FLAC" and is_cut_flac(stream, container.num_samples or 0):
                raise _cut_short(name, container.num_samples, 0) from error
            raise AudioDecodeError(
                f"{name}: looks like {container.format} but cannot be opened ({_reason(error)}); "
                "get an undamaged copy or convert it to WAV or FLAC",
                code="corrupt",
            ) from error
        _check_layout(name, file.samplerate, file.channels)
        if file.frames <= 0:
            raise _no_samples(name)
        stated = file.frames if file.frames < _UNKNOWN_FRAMES else 0
        yield _Recording(file, stream, decodable, name, max(stated, container.num_samples or 0))


class _Decodable(io.RawIOBase):
    """What libsndfile reads from: a file whose first bytes are replaced by ``container.head``.

    libsndfile calls back into Python, where an exception would be printed and lost. So seeking never raises (a damaged
    header sends it before the beginning), and a failure to read looks like the end of the file and is kept.

    Attributes:
        failure: why reading stopped, or None.
    """

    def __init__(self, container: Container, stream: BinaryIO) -> None:
        super().__init__()
        self.failure: Exception | None = None
        self._head, self._shift = container.head, container.head_length - len(container.head)
        self._stream = stream
        self._size = stream.seek(0, 2) - self._shift
        self._offset = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._offset = min(max(0, (0, self._offset, self._size)[whence] + offset), self._size)
        return self._offset

    def readinto(self, buffer: Any) -> int:
        data = self._head[self._offset : self._offset + len(buffer)]
        try:
            if len(data) < len(buffer):
                self._stream.seek(self._offset + len(data) + self._shift)
                data += self._stream.read(len(buffer) - len(data))
        except (OSError, ValueError) as error:
            self.failure = error
        buffer[: len(data)] = data
        self._offset += len(data)
        return len(data)


def _check_layout(name: str, sample_rate: int, channels: int) -> None:
    low, high = SAMPLE_RATES
    if not low <= sample_rate <= high:
        raise AudioDecodeError(
            f"{name}: states a sample rate of {sample_rate} Hz; expected {low} to {high} Hz: resample it first",
            code="sample_rate",
        )
    if not 1 <= channels <= MAX_CHANNELS:
        raise AudioDecodeError(
            f"{name}: states {channels} channels; expected 1 to {MAX_CHANNELS}: mix them down first", code="channels"
        )


def _check_seconds(option: str, seconds: float) -> None:
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
        raise AudioDecodeError(f"got {option}={seconds!r}; expected a number of seconds above 0", code="type")


def _reason(error: BaseException) -> str:
    return str(getattr(error, "error_string", None) or error).strip().rstrip(".")


def _not_readable(name: str, error: BaseException) -> AudioDecodeError:
    reason = getattr(error, "strerror", None) or error
    return AudioDecodeError(
        f"{name}: cannot be read: {reason}; check the path and its permissions", code="not_readable"
    )


def _no_samples(name: str) -> AudioDecodeError:
    return AudioDecodeError(f"{name}: has a header but no samples; record it again", code="no_samples")


def _too_long(name: str, seconds: float, cap: float) -> AudioDecodeError:
    return AudioDecodeError(
        f"{name}: lasts at least {seconds:.1f} s; expected at most {cap:g} s: raise the cap with max_seconds=... "
        "(--max-seconds on the command line), or stream it in windows, which has no cap",
        code="too_long",
    )


def as_waveform(
    array: ArrayLike,
    spec: FrontendSpec,
    *,
    sample_rate: int | None = None,
    channels_first: bool = False,
) -> NDArray[np.float32]:
    """Return samples in memory as ``(num_samples,)`` or ``(batch, num_samples)`` float32 at ``spec.sample_rate`` Hz.

    The result is a new array or the caller's own, never written to. Conversion is fixed: int16 / 32768,
    int32 / 2**31, uint8 (x - 128) / 128; float16, float64 are cast; nothing is clipped or scaled, so float samples
    are taken as they are even far outside [-1, 1].

    Args:
        array: ``(num_samples,)``, ``(batch, num_samples)``, or ``(channels, num_samples)`` with ``channels_first``.
        spec: gives sample rate and channel rule.
        sample_rate: of ``array`` in Hz; None for ``spec.sample_rate``.
        channels_first: the rows are channels of one clip, which become one as ``spec.channels`` says.

    Raises:
        WaveformError: with ``code`` ``dtype``, ``rank``, ``empty``, ``non_finite``, ``range``, ``sample_rate`` or
            ``channels``.
    """
    rate = spec.sample_rate if sample_rate is None else checked_rate(sample_rate)
    samples = _to_float32(array)
    if samples.ndim not in (1, 2) or (channels_first and samples.ndim != 2):
        expected = "(channels, num_samples)" if channels_first else "(num_samples,) or (batch, num_samples)"
        raise WaveformError(f"got an array of shape {samples.shape}; expected {expected}", code="rank")
    if samples.size == 0:
        raise WaveformError(f"got an array of shape {samples.shape}; expected at least one sample", code="empty")
    if channels_first:
        if len(samples) > MAX_CHANNELS:
            raise WaveformError(
                f"got {len(samples)} channels in shape {samples.shape}; expected at most {MAX_CHANNELS}: "
                "channels_first wants (channels, num_samples)",
                code="channels",
            )
        samples = mix_channels(samples.T, spec)
    if rate != spec.sample_rate:
        rows = [
            soxr.resample(np.ascontiguousarray(row), rate, spec.sample_rate, quality="HQ")
            for row in np.atleast_2d(samples)
        ]
        samples = np.stack(rows) if samples.ndim == 2 else rows[0]
        if samples.size == 0:
            raise WaveformError(
                f"the clip is too short: nothing is left of it at {spec.sample_rate} Hz; use a longer one", code="empty"
            )
    if not np.isfinite(samples).all():
        raise WaveformError(
            "the samples are so large that mixing or resampling overflows; expected values near [-1, 1]", code="range"
        )
    return np.ascontiguousarray(samples)


def checked_rate(sample_rate: object) -> int:
    """Return a sample rate in Hz as an int.

    Raises:
        WaveformError: no whole number from the lowest to the highest of :data:`SAMPLE_RATES` (code ``sample_rate``).
    """
    low, high = SAMPLE_RATES
    whole = isinstance(sample_rate, (int, np.integer)) and not isinstance(sample_rate, (bool, np.bool_))
    if not whole and isinstance(sample_rate, (float, np.floating)):
        whole = math.isfinite(sample_rate) and float(sample_rate).is_integer()
    if not whole or not low <= int(sample_rate) <= high:  # type: ignore[call-overload]
        raise WaveformError(
            f"got sample_rate={sample_rate!r} ({type(sample_rate).__name__}); expected a whole number of Hz from "
            f"{low} to {high}",
            code="sample_rate",
        )
    return int(sample_rate)  # type: ignore[call-overload,no-any-return]


def _to_float32(array: ArrayLike) -> NDArray[np.float32]:
    try:
        given: NDArray[Any] = np.asarray(array)
    except (ValueError, TypeError, OverflowError) as error:
        raise WaveformError(f"not an array of numbers ({error}); expected equally long rows", code="dtype") from error
    name = given.dtype.newbyteorder("=").name
    samples: NDArray[np.float32]
    if name == "uint8":
        samples = (given.astype(np.float32) - np.float32(128)) / np.float32(128)
    elif name in ("int16", "int32"):
        samples = given.astype(np.float32) / np.float32(2 ** (8 * given.itemsize - 1))
    elif name in ("float16", "float32", "float64"):
        finite = np.isfinite(given)
        if not finite.all():
            place = tuple(int(i) for i in np.argwhere(~finite)[0])
            raise WaveformError(f"sample {place} is {given[place]}; expected finite numbers", code="non_finite")
        with np.errstate(over="ignore"):
            samples = given.astype(np.float32, copy=False)
        if not np.isfinite(samples).all():
            raise WaveformError(
                f"the largest sample, {np.abs(given).max()}, does not fit into float32; expected values near [-1, 1]",
                code="range",
            )
    else:
        raise WaveformError(
            f"got dtype {given.dtype}; expected float32, float64, float16, int16 (/ 32768), int32 (/ 2**31) or uint8 "
            "((x - 128) / 128): convert it so that full scale is 1",
            code="dtype",
        )
    return samples
