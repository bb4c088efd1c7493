"""Every error crossfade raises on bad input, and the codes that tell them apart.

::

    AudioClassifierError
    ├── SpecError (ValueError)              a front-end spec is impossible; names the field
    ├── CardError (ValueError)              a model card is impossible; names the field
    ├── UnknownNameError (ValueError)       no such model, preset or label set; suggests near names
    ├── AudioDecodeError (ValueError)       a recording cannot be read; has a ``code``
    ├── ImageDecodeError (ValueError)       a picture cannot be read; has a ``code``
    ├── VideoDecodeError (ValueError)       a video cannot be read; has a ``code``
    ├── WaveformError (ValueError)          an array is not a waveform; has a ``code``
    │   └── ClipLengthError                 a clip is shorter or longer than the model allows
    ├── DataError (ValueError)              a data folder, manifest or label table is wrong
    ├── IndexFileError (ValueError)         a search index cannot be used; has a ``code``
    ├── CheckpointError (ValueError)        a checkpoint is corrupt, unsafe or does not fit its card
    ├── DownloadError (RuntimeError)        a published file could not be fetched; has a ``code``
    ├── ModelFileError (ValueError)         an ONNX file has no card, or disagrees with it
    ├── OutputExistsError (ValueError)      refusing to overwrite without ``force``
    ├── OutputWriteError (RuntimeError)     a result could not be written (disk full, no permission)
    ├── DeviceError (RuntimeError)          the device asked for is not there
    ├── ClosedError (RuntimeError)          a classifier or session was used after it was closed
    ├── MissingDependencyError (RuntimeError)  an optional package is needed
    └── ExportError (RuntimeError)          a model could not be exported
        └── VerificationError               the exported graph departs from the model

Messages say what came, what was expected and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "AudioClassifierError",
    "AudioDecodeError",
    "CardError",
    "CheckpointError",
    "ClipLengthError",
    "ClosedError",
    "DataError",
    "DeviceError",
    "DownloadError",
    "ExportError",
    "ImageDecodeError",
    "IndexFileError",
    "MissingDependencyError",
    "ModelFileError",
    "OutputExistsError",
    "OutputWriteError",
    "SpecError",
    "UnknownNameError",
    "VerificationError",
    "VideoDecodeError",
    "WaveformError",
]


class AudioClassifierError(Exception):
    """Root of every error raised on purpose by crossfade."""


class _FieldError(AudioClassifierError, ValueError):
    """Bad value of one declared field.

    Attributes:
        field: dotted path of the offending field, e.g. ``"mel.n_mels"``.
    """

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class SpecError(_FieldError):
    """A front-end spec has an unknown, missing or impossible field."""


class CardError(_FieldError):
    """A model card has an unknown, missing or impossible field."""


class UnknownNameError(AudioClassifierError, ValueError):
    """A name that is not registered; the message lists the nearest ones."""

    def __init__(self, kind: str, name: object, known: Iterable[str]) -> None:
        names = sorted(set(known))
        near = difflib.get_close_matches(str(name).lower(), names, n=4, cutoff=0.5)
        hint = f"did you mean {', '.join(map(repr, near))}?" if near else f"known: {', '.join(names)}."
        super().__init__(f"unknown {kind} {name!r}; {hint}")
        self.name = name
        self.suggestions = tuple(near)


class _CodedError(AudioClassifierError, ValueError):
    """Bad input with a machine-readable reason.

    Attributes:
        code: short lower-case reason, stable between releases.
    """

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


class AudioDecodeError(_CodedError):
    """A recording could not be turned into a waveform.

    ``code`` is one of ``type``, ``not_found``, ``not_readable``, ``empty``, ``no_samples``, ``not_audio``,
    ``unsupported``, ``corrupt``, ``truncated``, ``sample_rate``, ``channels``, ``too_long``, ``non_finite``.
    """


class ImageDecodeError(_CodedError):
    """A picture could not be turned into what a model takes.

    ``code`` is one of ``type``, ``not_found``, ``not_readable``, ``empty``, ``not_image``, ``unsupported``,
    ``corrupt``, ``animated``, ``too_large``, ``aspect``, ``dtype``, ``shape``.
    """


class VideoDecodeError(_CodedError):
    """A video could not be turned into pictures or sound.

    ``code`` is one of ``type``, ``not_found``, ``not_readable``, ``empty``, ``not_video``, ``no_audio``,
    ``no_video``, ``no_frames``, ``too_large``, ``too_long``, ``corrupt``.
    """


class IndexFileError(_CodedError):
    """A search index cannot be used.

    ``code`` is one of ``not_found``, ``not_readable``, ``corrupt``, ``model`` (built with another one).
    """


class WaveformError(_CodedError):
    """An array is not a waveform, or not what a model takes beside one.

    ``code`` is one of ``dtype``, ``rank``, ``shape``, ``empty``, ``non_finite``, ``sample_rate``, ``channels``,
    ``range``, ``type``, ``missing``, ``too_short``, ``too_long``, ``multiple``.
    """


class ClipLengthError(WaveformError):
    """A clip is shorter or longer than the model's card allows."""


class DataError(AudioClassifierError, ValueError):
    """A data folder, manifest, split or label table cannot be used."""


class CheckpointError(AudioClassifierError, ValueError):
    """A checkpoint is corrupt, unsafe to unpickle, or does not fit its card."""


class DownloadError(AudioClassifierError, RuntimeError):
    """A published file could not be fetched; nothing of it was kept.

    Attributes:
        code: ``unreachable`` (no network, no answer in time), ``not_found`` (404), ``refused`` (any other status),
            ``truncated``, ``not_weights`` (a web page, or anything else that is no checkpoint) or ``checksum``.
    """

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


class ModelFileError(AudioClassifierError, ValueError):
    """An ONNX file is not a crossfade model, or its graph disagrees with its card."""


class OutputExistsError(AudioClassifierError, ValueError):
    """The output exists and overwriting was not asked for."""


class OutputWriteError(AudioClassifierError, RuntimeError):
    """A result could not be written; nothing half-written is left under its name."""


class DeviceError(AudioClassifierError, RuntimeError):
    """The device asked for is not available in this environment."""


class ClosedError(AudioClassifierError, RuntimeError):
    """A classifier or session was used after it was closed."""


class MissingDependencyError(AudioClassifierError, RuntimeError):
    """An optional package is needed for what was asked; the message names the extra."""


class ExportError(AudioClassifierError, RuntimeError):
    """A model could not be exported."""


class VerificationError(ExportError):
    """An exported graph does not reproduce the model; the file was not kept."""
