"""The NumPy front end: float64 says what a feature should be, float32 runs where neither torch nor TensorFlow is."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.fft
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import DTypeLike, NDArray

from models_zoo.errors import SpecError, WaveformError
from models_zoo.filterbanks import analysis_tables
from models_zoo.specs import FrontendSpec, Statistics

__all__ = ["ReferenceFrontend"]

_Array = NDArray[np.floating[Any]]


class ReferenceFrontend:
    """Waveform -> features in NumPy, stage by stage as the spec declares.

    Args:
        spec: the front end.
        dtype: ``float64`` (the arbiter of what the value should be) or ``float32`` (what the other
            implementations compute in). Both use the same float32 tables.

    Raises:
        SpecError: ``dtype`` is neither.
    """

    def __init__(self, spec: FrontendSpec, dtype: DTypeLike = "float64") -> None:
        try:
            name = np.dtype(dtype).name
        except TypeError:
            name = ""
        if name not in ("float64", "float32"):
            raise SpecError(f"dtype: got {dtype!r}; expected 'float64' or 'float32'", field="dtype")
        self.dtype: np.dtype[np.floating[Any]] = np.dtype(name)
        self.spec = spec
        self._tables = analysis_tables(spec)

    def __call__(self, waveform: _Array) -> _Array:
        """Return the features of ``waveform`` in the spec's layout, in ``dtype``.

        Args:
            waveform: ``(batch, num_samples)`` in [-1, 1] at ``spec.sample_rate`` Hz.

        Raises:
            WaveformError: not two-dimensional.
            ClipLengthError: shorter than ``spec.min_samples``.
        """
        return deque(self._walk(waveform), maxlen=1).pop()[1]  # type: ignore[no-any-return]

    def stages(self, waveform: _Array) -> dict[str, Any]:
        """Return every intermediate by name, in order; see ``models_zoo.specs.STAGES`` for shapes."""
        return dict(self._walk(waveform))

    def _walk(self, waveform: _Array) -> Iterator[tuple[str, Any]]:
        spec, framing, tables, dtype = self.spec, self.spec.framing, self._tables, self.dtype
        x = np.asarray(waveform)
        if x.ndim != 2:
            raise WaveformError(f"got shape {x.shape}; expected (batch, num_samples)", code="rank")
        spec.num_frames(x.shape[1])
        x = x.astype(dtype, copy=False)

        if spec.samples is not None:
            x = x[:, : spec.samples]
            x = np.pad(x, ((0, 0), (0, spec.samples - x.shape[1])))
        yield "samples", x  # (batch, num_samples)

        coefficient = dtype.type(spec.preemphasis.coefficient if spec.preemphasis else 0.0)
        edge = spec.preemphasis.edge if spec.preemphasis else None
        if edge in ("signal_drop", "signal_keep"):
            filtered = x[:, 1:] - coefficient * x[:, :-1]
            x = filtered if edge == "signal_drop" else np.concatenate([x[:, :1], filtered], axis=1)
        yield "preemphasis", x

        x = np.pad(x, ((0, 0), (framing.lead, framing.lead)))
        if framing.padding != "snip":
            mode = {"reflect": "reflect", "zero": "constant"}[framing.padding]
            x = np.pad(x, ((0, 0), (spec.edge_padding, spec.edge_padding)), mode=mode)  # type: ignore[call-overload]
        yield "padded", x

        frames = [
            sliding_window_view(x[:, offset : x.shape[1] - spec.span + offset + window.size], window.size, axis=1)[
                :, :: framing.hop_length
            ]
            for window, offset in zip(tables.windows, tables.offsets, strict=True)
        ]
        if framing.remove_dc:
            frames = [frame - frame.mean(axis=-1, keepdims=True) for frame in frames]
        if edge == "frame":
            frames = [
                frame - coefficient * np.concatenate([frame[..., :1], frame[..., :-1]], axis=-1) for frame in frames
            ]
        yield "frames", tuple(frames)  # each (batch, T, win_length)

        frames = [frame * window.astype(dtype) for frame, window in zip(frames, tables.windows, strict=True)]
        yield "windowed", tuple(frames)

        spectra = []
        for frame in frames:
            bins = scipy.fft.rfft(frame, n=framing.n_fft, axis=-1)[..., tables.bins]
            power = bins.real**2 + bins.imag**2
            spectra.append(power if spec.power == 2 else np.sqrt(power))
        spectrum = np.stack(spectra, axis=1)
        yield "spectrum", spectrum  # (batch, windows, T, bins)

        mel = spectrum @ tables.mel.astype(dtype)
        mel = mel[:, :, framing.drop_first : mel.shape[2] - framing.drop_last]
        yield "mel", mel  # (batch, windows, T, n_mels)

        floor = dtype.type(spec.log.floor)
        y = np.log(mel + floor if spec.log.floor_mode == "add" else np.maximum(mel, floor))
        y = y * dtype.type(spec.log.gain)
        yield "log", y

        if spec.clamp is not None:
            y = np.clip(y, spec.clamp.low, spec.clamp.high) if (spec.clamp.low, spec.clamp.high) != (None, None) else y
            if spec.clamp.below_max is not None:
                y = np.maximum(y, y.max(axis=(1, 2, 3), keepdims=True) - dtype.type(spec.clamp.below_max))
        yield "clamp", y

        if spec.statistics is not None:
            y = self._normalise(y, spec.statistics)
        yield "statistics", y

        if spec.affine is not None:
            y = (y + dtype.type(spec.affine.shift)) / dtype.type(spec.affine.scale)
            if tables.ramp is not None:
                y = y + tables.ramp.astype(dtype)
        yield "affine", y

        if spec.frames is not None:
            count = spec.frames.applied_to(y.shape[2])
            y = y[:, :, :count]
            fill = ((0, 0), (0, 0), (0, count - y.shape[2]), (0, 0))
            y = np.pad(y, fill, constant_values=dtype.type(spec.frames.fill))
        yield "length", y

        yield "features", self.arrange(y)

    def _normalise(self, y: _Array, statistics: Statistics) -> _Array:
        axes = (2, 3) if statistics.over == "mel_time" else (2,)
        eps = self.dtype.type(statistics.eps)
        if statistics.kind == "min_max":
            low = y.min(axis=axes, keepdims=True)
            y = (y - low) / np.maximum(y.max(axis=axes, keepdims=True) - low, eps)
        elif statistics.kind == "mean":
            y = y - y.mean(axis=axes, keepdims=True)
        else:
            # Relative to its first value a constant row (silence) is exactly 0, not rounding noise divided by eps.
            y = y - y[tuple(slice(1) if axis in axes else slice(None) for axis in range(4))]
            y = (y - y.mean(axis=axes, keepdims=True)) / (y.std(axis=axes, keepdims=True, ddof=statistics.ddof) + eps)
        return y

    def arrange(self, y: _Array) -> _Array:
        """Return ``(batch, windows, T, n_mels)`` cut into patches and in the layout's order."""
        spec = self.spec
        if spec.patches is not None:
            patches = sliding_window_view(y, spec.patches.length, axis=2)[:, :, :: spec.patches.hop]
            y = np.moveaxis(patches, -1, 3)
        if len(spec.windows) == 1:
            y = y[:, 0]
        return np.ascontiguousarray(np.expand_dims(np.transpose(y, spec.axis_order), spec.unit_axes))
