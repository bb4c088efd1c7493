"""Pictures and sound of a video; decoding is FFmpeg's, through PyAV (extra ``video``).

Source: YuanGongND/cav-mae ``src/preprocess`` (ten evenly spaced frames of the first ten seconds; the first audio
channel at 16 kHz). Differences: frames are not stored as JPEG on the way, and audio is resampled as that of any
recording.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models_zoo.audio import MAX_SECONDS, Resampler, checked_rate, mix_channels
from models_zoo.errors import MissingDependencyError, VideoDecodeError
from models_zoo.files import opened
from models_zoo.images import MAX_PIXELS, ImageSpec, crop_image
from models_zoo.specs import FrontendSpec

__all__ = [
    "MIDDLE",
    "NUM_FRAMES",
    "VIDEO_SUFFIXES",
    "VideoSource",
    "chosen_frames",
    "frame_indices",
    "is_video",
    "read_video_audio",
    "read_video_frames",
]

VideoSource: TypeAlias = str | Path | bytes | bytearray | memoryview | BinaryIO
"""A path, the bytes of a file, or a file object open for reading bytes."""

VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi"})
"""By which files are taken for videos where nothing else says so."""

NUM_FRAMES = 10
"""Evenly spaced frames of a video; the published systems know no others."""

MIDDLE = NUM_FRAMES // 2
"""The one of them that is looked at where one is."""

_SECONDS = 10

_TURNS = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_270,
}
"""By degrees counterclockwise, as PyAV states them; players turn frames by no others."""

_LIMITS = {"max_pixels": str(2 * MAX_PIXELS)}
"""Of a decoder: frames need not keep to what the header states. Twice as many, for decoders round sizes up."""

_OPTIONS = {
    **_LIMITS,  # already here a frame may be decoded
    # FFmpeg would take play lists as well, which name other files, and pictures.
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi",
    "protocol_whitelist": "",  # nothing is opened beside the file given
}


def is_video(source: object) -> bool:
    """Return whether a path names a video, by its suffix."""
    return isinstance(source, (str, Path)) and Path(source).suffix.lower() in VIDEO_SUFFIXES


def frame_indices(num_frames: int, rate: float) -> list[int]:
    """Return the indices of the ten frames of a video of ``num_frames`` at ``rate`` per second; short ones repeat some.

    They are evenly spaced over the first ten seconds; each is the one before the place meant, as the published
    extraction reads them.
    """
    total = min(num_frames, int(rate * _SECONDS))
    return [max(int(i * total / NUM_FRAMES) - 1, 0) for i in range(NUM_FRAMES)]


def chosen_frames(frames: object) -> tuple[int, ...]:
    """Return which of the ten frames are meant by ``middle``, ``all``, an index 0 to 9, or several, also in an array.

    Raises:
        VideoDecodeError: anything else; ``code`` ``type``.
    """
    if isinstance(frames, str) and frames in ("middle", "all"):
        return (MIDDLE,) if frames == "middle" else tuple(range(NUM_FRAMES))
    try:
        chosen = tuple(map(operator.index, frames if isinstance(frames, Iterable) else (frames,)))
    except TypeError:
        chosen = ()
    if not chosen or not all(0 <= one < NUM_FRAMES for one in chosen):
        raise VideoDecodeError(
            f"frames: got {frames!r}; expected 'middle', 'all', or frames 0 to {NUM_FRAMES - 1}, at least one",
            code="type",
        )
    return chosen


def read_video_frames(
    source: VideoSource, chosen: Sequence[int] = (MIDDLE,), crop: ImageSpec | None = None
) -> list[Image.Image]:
    """Return frames of a video as pictures in RGB, turned as the video says they are shown.

    Args:
        source: path, bytes or binary file object of an MP4, MOV, Matroska, WebM or AVI.
        chosen: which of the ten evenly spaced frames, 0 to 9, in any order.
        crop: cut each frame at once to what :func:`models_zoo.images.crop_image` leaves of it; None for whole frames.

    Raises:
        VideoDecodeError: with ``code`` ``not_found``, ``not_readable``, ``type``, ``empty``, ``not_video``,
            ``no_video`` (sound alone), ``no_frames``, ``too_large`` or ``corrupt``; or ``type`` for a frame that is
            not 0 to 9.
        ImageDecodeError: frames too stretched for ``crop``; ``code`` ``aspect``.
        MissingDependencyError: PyAV is not installed.
    """
    chosen = chosen_frames(chosen)
    with _container(source) as (container, name):
        stream = _stream_of(container, "video", name)
        _check_pixels(stream.codec_context, name)
        stream.codec_context.options = _LIMITS
        # Many containers state no number of frames, and some a wrong one.
        count = sum(packet.size > 0 for packet in container.demux(stream))
        if not count:
            raise VideoDecodeError(f"{name}: holds no frame", code="no_frames")
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        container.seek(0, stream=stream, any_frame=False)
        wanted = frame_indices(count, rate)
        wanted = [wanted[index] for index in chosen]
        kept: dict[int, Image.Image] = {}
        frame = None
        for index, frame in enumerate(container.decode(stream)):
            _check_pixels(frame, name)
            if index in wanted:
                kept[index] = _shown(frame, crop)
            if index >= max(wanted):
                break
        if frame is None:
            raise VideoDecodeError(f"{name}: no frame of it can be decoded; get a whole copy", code="corrupt")
        # A container may count a frame or two that are never shown: the last one stands for them.
        return [kept[index] if index in kept else _shown(frame, crop) for index in wanted]


def read_video_audio(
    source: VideoSource, spec: FrontendSpec, *, max_seconds: float = MAX_SECONDS
) -> NDArray[np.float32]:
    """Return the sound of a video as ``(num_samples,)`` float32 mono at ``spec.sample_rate`` Hz.

    Channels become one as ``spec.channels`` says, before resampling, as those of a recording do.

    Args:
        source: path, bytes or binary file object.
        spec: gives sample rate and channel rule.
        max_seconds: longest sound taken.

    Raises:
        VideoDecodeError: as :func:`read_video_frames`, but ``no_audio`` for ``no_video``, and ``too_long``.
        AudioDecodeError: an impossible sample rate.
        MissingDependencyError: PyAV is not installed.
    """
    with _container(source) as (container, name):
        import av

        stream = _stream_of(container, "audio", name)
        rate = checked_rate(stream.rate)
        planar = av.AudioResampler(format="fltp")  # of the samples' type alone
        resampler = Resampler(rate, spec)
        blocks: list[NDArray[np.float32]] = []
        count = 0
        for frame in container.decode(stream):
            try:
                parts = planar.resample(frame)
            except ValueError:
                raise VideoDecodeError(
                    f"{name}: its sound changes its rate, channels or type midway; cut it there, or convert it to one",
                    code="corrupt",
                ) from None
            for part in parts:
                block = np.asarray(part.to_ndarray().T, np.float32)
                count += len(block)
                if count > max_seconds * rate:
                    raise VideoDecodeError(
                        f"{name}: its sound is longer than {max_seconds:g} s; cut it, or raise max_seconds",
                        code="too_long",
                    )
                blocks.append(resampler.feed(mix_channels(block, spec)))
        blocks.append(resampler.finish())
        waveform = np.concatenate(blocks)
        if not waveform.size or not np.isfinite(waveform).all():
            raise VideoDecodeError(
                f"{name}: its sound has {'values that are not finite' if waveform.size else 'no samples'}; get a whole "
                "copy",
                code="corrupt",
            )
        return waveform


def _check_pixels(sized: Any, name: str) -> None:
    if sized.width * sized.height > MAX_PIXELS:
        raise VideoDecodeError(f"{name}: a frame has more than {MAX_PIXELS} pixels; make it smaller", code="too_large")


def _shown(frame: Any, crop: ImageSpec | None) -> Image.Image:
    """Return a decoded frame as it is shown, or what is cropped out of it."""
    picture: Image.Image = frame.to_image()
    turn = _TURNS.get(frame.rotation % 360)
    if turn is not None:
        picture = picture.transpose(turn)
    return picture if crop is None else Image.fromarray(crop_image(picture, crop))


def _stream_of(container: Any, kind: str, name: str) -> Any:
    streams = getattr(container.streams, kind)
    if not streams:
        other = "picture" if kind == "video" else "sound"
        raise VideoDecodeError(f"{name}: has no {other}; give the {other} by itself", code=f"no_{kind}")
    return streams[0]


@contextmanager
def _container(source: object) -> Iterator[tuple[Any, str]]:
    try:
        import av
    except ImportError:
        raise MissingDependencyError("videos need PyAV; install the extra: pip install 'crossfade[video]'") from None
    with opened(source, VideoDecodeError, "a path, bytes, or an open file") as (stream, name):
        try:
            container = av.open(stream, mode="r", options=_OPTIONS)
        except (av.error.FFmpegError, ValueError, OSError) as error:
            raise VideoDecodeError(
                f"{name}: is no video: {error}; use MP4, MOV, Matroska, WebM or AVI", code="not_video"
            ) from None
        with container:
            try:
                yield container, name
            except av.error.FFmpegError as error:
                raise VideoDecodeError(
                    f"{name}: cannot be decoded: {error}; get a whole copy", code="corrupt"
                ) from None
