"""The TensorFlow front end: the spec's features in one graph with dynamic batch and length."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from infer_tf.backend import load_tensorflow
from models_zoo.errors import WaveformError
from models_zoo.filterbanks import analysis_tables, mel_blocks
from models_zoo.specs import STAGES, Frames, FrontendSpec, Statistics

__all__ = ["TFFrontend"]

tf = load_tensorflow()  # imported without its notices on standard error

_BLOCK = 1 << 19
"""Samples transformed at a time: of few, loops cost more than the spectra of many do that leave a core's cache."""


@tf.keras.utils.register_keras_serializable(package="crossfade")
class TFFrontend(tf.keras.layers.Layer):  # type: ignore[misc, name-defined]
    """Waveform -> features in TensorFlow, stage by stage as the spec declares.

    One explicit path (cut frames, window, ``tf.signal.rfft``, the FFT bins each mel filter uses) serves every spec;
    ``tf.signal.stft`` gives the same numbers and cannot express Kaldi's per-frame steps. The graph is compiled once:
    a new batch size or clip length does not retrace. Always float32, whatever Keras' global dtype policy.

    Args:
        spec: the front end, or the plain mapping of one.
    """

    def __init__(self, spec: FrontendSpec | dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "dtype": "float32", "trainable": False})
        self.spec = spec if isinstance(spec, FrontendSpec) else FrontendSpec.from_dict(spec)
        self._tables = analysis_tables(self.spec)
        self._mel_blocks = mel_blocks(self._tables.mel)
        # A concrete function cannot retrace, and does not count towards TensorFlow's retracing warning.
        self._graph = self._compiled(self._features)
        self.built = True

    def __call__(self, waveform: Any, *args: Any, **kwargs: Any) -> Any:
        """Return :meth:`call` of ``waveform``, with its errors as they are: Keras would wrap those raised inside."""
        self._check(waveform.shape)
        return super().__call__(waveform, *args, **kwargs)

    def call(self, waveform: Any) -> Any:
        """Return the features of ``waveform`` in the spec's layout, float32.

        Args:
            waveform: ``(batch, num_samples)`` float32 in [-1, 1] at ``spec.sample_rate`` Hz.

        Raises:
            WaveformError: not two-dimensional.
            ClipLengthError: shorter than ``spec.min_samples``.
        """
        return self._graph(tf.convert_to_tensor(waveform, tf.float32))

    def features(self, waveform: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the same features as NumPy, without Keras in the way: the path of a prediction."""
        self._check(waveform.shape)
        return self._graph(tf.constant(waveform, tf.float32)).numpy()  # type: ignore[no-any-return]

    def stages(self, waveform: Any) -> dict[str, Any]:
        """Return every intermediate by name, in order; see ``models_zoo.specs.STAGES`` for shapes."""
        self._check(waveform.shape)
        intermediates = self._stages_graph(tf.constant(waveform, tf.float32))
        return {name: intermediates[name] for name in STAGES}

    @functools.cached_property
    def _stages_graph(self) -> Any:
        return self._compiled(lambda waveform: dict(self._walk(waveform)))

    @staticmethod
    def _compiled(function: Any) -> Any:
        signature = [tf.TensorSpec([None, None], tf.float32, name="waveform")]
        return tf.function(function, input_signature=signature).get_concrete_function()

    def save(self, folder: str | Path) -> None:
        """Write a SavedModel whose ``serving_default`` maps ``waveform`` to ``features``.

        It needs TensorFlow alone to run: ``tf.saved_model.load(folder).signatures["serving_default"]``.
        """
        module = tf.Module()
        module.features = tf.function(
            lambda waveform: {"features": self._features(waveform)},
            input_signature=[tf.TensorSpec([None, None], tf.float32, name="waveform")],
        )
        tf.saved_model.save(module, str(folder), signatures={"serving_default": module.features})

    def get_config(self) -> dict[str, Any]:
        """Return what :meth:`from_config` rebuilds the layer from."""
        return {**super().get_config(), "spec": self.spec.to_dict()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Return the layer described by ``config``."""
        return cls(**config)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Return the shape of the features; None where it follows a dynamic axis."""
        batch, num_samples = input_shape
        reference = num_samples if num_samples is not None else self.spec.min_samples
        shape: list[int | None] = list(self.spec.output_shape(reference))
        for position, axis in enumerate(self.spec.layout.split(" ")):
            if axis == "b":
                shape[position] = batch
            elif axis in ("t", "p") and num_samples is None and not self._frames_are_fixed(axis):
                shape[position] = None
        return tuple(shape)

    def _frames_are_fixed(self, axis: str) -> bool:
        spec = self.spec
        if axis == "t" and spec.patches is not None:
            return True
        return spec.samples is not None or (spec.frames is not None and spec.frames.count is not None)

    def _check(self, shape: Any) -> None:
        if len(shape) != 2:
            raise WaveformError(f"got shape {tuple(shape)}; expected (batch, num_samples)", code="rank")
        if shape[1] is not None:
            self.spec.num_frames(int(shape[1]))

    def _features(self, waveform: Any) -> Any:
        return deque(self._walk(waveform, in_blocks=True), maxlen=1).pop()[1]

    def _walk(self, waveform: Any, *, in_blocks: bool = False) -> Iterator[tuple[str, Any]]:
        """Yield every stage by name; ``in_blocks`` without those between "padded" and "mel", which need less memory."""
        spec, framing, tables = self.spec, self.spec.framing, self._tables
        x = waveform
        # Reached only where the length is not known in Python, e.g. in a loaded SavedModel.
        with tf.control_dependencies(
            [tf.debugging.assert_greater_equal(tf.shape(x)[1], spec.min_samples, message="clip too short")]
        ):
            x = tf.identity(x)

        if spec.samples is not None:
            x = x[:, : spec.samples]
            x = tf.pad(x, [[0, 0], [0, spec.samples - tf.shape(x)[1]]])
        yield "samples", x  # (batch, num_samples)

        if spec.preemphasis is not None and spec.preemphasis.edge in ("signal_drop", "signal_keep"):
            filtered = x[:, 1:] - spec.preemphasis.coefficient * x[:, :-1]
            x = filtered if spec.preemphasis.edge == "signal_drop" else tf.concat([x[:, :1], filtered], axis=1)
        yield "preemphasis", x

        if framing.lead:
            x = tf.pad(x, [[0, 0], [framing.lead, framing.lead]])
        if framing.padding != "snip":
            mode = {"reflect": "REFLECT", "zero": "CONSTANT"}[framing.padding]
            x = tf.pad(x, [[0, 0], [spec.edge_padding, spec.edge_padding]], mode)
        yield "padded", x

        if in_blocks:
            mel = self._mel_in_blocks(x)
        else:
            frames = self._frames(x)
            yield "frames", tuple(frames)  # each (batch, T, win_length)

            frames = self._windowed(frames)
            yield "windowed", tuple(frames)

            spectra = self._spectra(frames)
            yield "spectrum", tf.stack([spectrum[..., tables.bins] for spectrum in spectra], axis=1)  # (..., T, bins)

            mel = self._mel(spectra)
        if framing.drop_first or framing.drop_last:
            mel = mel[:, :, framing.drop_first : tf.shape(mel)[2] - framing.drop_last]
        yield "mel", mel  # (batch, windows, T, n_mels)

        floor = tf.constant(spec.log.floor, tf.float32)
        y = tf.math.log(mel + floor if spec.log.floor_mode == "add" else tf.maximum(mel, floor))
        if spec.log.gain != 1:
            y = y * spec.log.gain
        yield "log", y

        if spec.clamp is not None:
            if spec.clamp.low is not None:
                y = tf.maximum(y, spec.clamp.low)
            if spec.clamp.high is not None:
                y = tf.minimum(y, spec.clamp.high)
            if spec.clamp.below_max is not None:
                y = tf.maximum(y, tf.reduce_max(y, axis=[1, 2, 3], keepdims=True) - spec.clamp.below_max)
        yield "clamp", y

        if spec.statistics is not None:
            y = _normalise(y, spec.statistics)
        yield "statistics", y

        if spec.affine is not None:
            y = (y + spec.affine.shift) / spec.affine.scale
            if tables.ramp is not None:
                y = y + tables.ramp
        yield "affine", y

        if spec.frames is not None:
            y = _fix_frames(y, spec.frames)
        yield "length", y

        yield "features", self._arrange(y)

    def _frames(self, x: Any) -> list[Any]:
        """Return ``(batch, T, win_length)`` of each window, cut from a padded signal."""
        spec, tables = self.spec, self._tables
        slack = tf.shape(x)[1] - spec.span
        frames = [
            tf.signal.frame(x[:, offset : slack + offset + window.size], window.size, spec.framing.hop_length)
            for window, offset in zip(tables.windows, tables.offsets, strict=True)
        ]
        if spec.framing.remove_dc:
            frames = [frame - tf.reduce_mean(frame, axis=-1, keepdims=True) for frame in frames]
        if spec.preemphasis is not None and spec.preemphasis.edge == "frame":
            coefficient = spec.preemphasis.coefficient
            frames = [frame - coefficient * tf.concat([frame[..., :1], frame[..., :-1]], axis=-1) for frame in frames]
        return frames

    def _windowed(self, frames: list[Any]) -> list[Any]:
        return [frame * window for frame, window in zip(frames, self._tables.windows, strict=True)]

    def _spectra(self, frames: list[Any]) -> list[Any]:
        """Return ``(batch, T, n_fft / 2 + 1)`` of each window's frames."""
        spectra = []
        for frame in frames:
            bins = tf.signal.rfft(frame, [self.spec.framing.n_fft])
            power = tf.square(tf.math.real(bins)) + tf.square(tf.math.imag(bins))
            spectra.append(power if self.spec.power == 2 else tf.sqrt(power))
        return spectra

    def _mel(self, spectra: list[Any]) -> Any:
        """Return ``(batch, windows, T, n_mels)`` of each window's spectra.

        Of each by itself: they are large, and stacking them, or cutting unused bins off, moves them once more.
        """
        first = self._tables.bins.start
        mels = []
        for spectrum in spectra:
            parts = [
                tf.tensordot(spectrum[..., first + bins.start : first + bins.stop], block, 1)
                for bins, block in self._mel_blocks
            ]
            mels.append(tf.concat(parts, axis=-1))
        return tf.stack(mels, axis=1)

    def _mel_in_blocks(self, x: Any) -> Any:
        """Return ``(batch, windows, T, n_mels)`` of a padded signal, a block of frames after the other."""
        hop, span = self.spec.framing.hop_length, self.spec.span
        # Of all clips of a batch together.
        size = tf.maximum(_BLOCK // (self.spec.framing.n_fft * tf.maximum(tf.shape(x)[0], 1)), 1)
        count = (tf.shape(x)[1] - span) // hop + 1

        def block(number: Any, blocks: Any) -> tuple[Any, Any]:
            first = number * size
            last = tf.minimum(first + size, count) - 1
            mel = self._mel(self._spectra(self._windowed(self._frames(x[:, first * hop : last * hop + span]))))
            return number + 1, blocks.write(number, tf.transpose(mel, [2, 0, 1, 3]))

        numbers = (count + size - 1) // size
        shape = [None, None, len(self.spec.windows), self.spec.mel.n_mels]
        blocks = tf.TensorArray(tf.float32, numbers, infer_shape=False, element_shape=shape)
        _, blocks = tf.while_loop(lambda number, _: number < numbers, block, [0, blocks], parallel_iterations=1)
        return tf.transpose(blocks.concat(), [1, 2, 0, 3])

    def _arrange(self, y: Any) -> Any:
        """Return ``(batch, windows, T, n_mels)`` cut into patches and in the layout's order."""
        spec = self.spec
        if spec.patches is not None:
            y = tf.signal.frame(y, spec.patches.length, spec.patches.hop, axis=2)
        if len(spec.windows) == 1:
            y = tf.squeeze(y, axis=1)
        y = tf.transpose(y, spec.axis_order)
        for position in spec.unit_axes:
            y = tf.expand_dims(y, position)
        return y


def _fix_frames(y: Any, frames: Frames) -> Any:
    """Return ``(batch, windows, T, n_mels)`` cut or filled along T."""
    if frames.count is not None:
        count = frames.count
        y = y[:, :, :count]
    else:
        count = -(-tf.shape(y)[2] // frames.multiple_of) * frames.multiple_of
    return tf.pad(y, [[0, 0], [0, 0], [0, count - tf.shape(y)[2]], [0, 0]], constant_values=frames.fill)


def _normalise(y: Any, statistics: Statistics) -> Any:
    """Return ``(batch, windows, T, n_mels)`` normalised by the clip's own statistics."""
    axes = [2, 3] if statistics.over == "mel_time" else [2]
    if statistics.kind == "min_max":
        low = tf.reduce_min(y, axis=axes, keepdims=True)
        span = tf.reduce_max(y, axis=axes, keepdims=True) - low
        # Not "span + eps": the graph optimiser reassociates that sum and silence becomes 0 / 0.
        return (y - low) / tf.maximum(span, statistics.eps)
    if statistics.kind == "mean":
        return y - tf.reduce_mean(y, axis=axes, keepdims=True)
    # Relative to its first value a constant row (silence) is exactly 0, not rounding noise divided by eps.
    y = y - (y[:, :, :1, :1] if statistics.over == "mel_time" else y[:, :, :1])
    centred = y - tf.reduce_mean(y, axis=axes, keepdims=True)
    count = tf.cast(tf.reduce_prod(tf.gather(tf.shape(y), axes)) - statistics.ddof, y.dtype)
    variance = tf.reduce_sum(tf.square(centred), axis=axes, keepdims=True) / count
    return centred / (tf.sqrt(variance) + statistics.eps)
