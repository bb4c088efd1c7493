"""What a front end *is*: a frozen, validated, JSON-serialisable description of waveform -> features.

The order of application is fixed (``STAGES``); a spec only says what happens at each stage. Runtime choices
(device, threads, batch) are never in a spec.

Source: the nineteen fields were read off five published systems (EfficientAT, PANNs, DCASE task 4, CAV-MAE,
MRMS) and hold Whisper, YAMNet, VGGish, AST and NeMo as well.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Literal, Self

from pydantic import Field, Strict, model_validator

from models_zoo.errors import ClipLengthError, SpecError
from models_zoo.schema import Declaration, Sequence

__all__ = [
    "STAGES",
    "Affine",
    "Clamp",
    "Frames",
    "Framing",
    "FrontendSpec",
    "Log",
    "Mel",
    "Patches",
    "Preemphasis",
    "Statistics",
    "Window",
]

STAGES = (
    "samples",
    "preemphasis",
    "padded",
    "frames",
    "windowed",
    "spectrum",
    "mel",
    "log",
    "clamp",
    "statistics",
    "affine",
    "length",
    "features",
)
"""Names of the intermediates every implementation returns from ``stages()``, in order of application.

``samples`` (after fixing the length), ``preemphasis`` (on the signal), ``padded`` (edges), ``frames`` (cut, with
per-frame DC removal and pre-emphasis done), ``windowed``, ``spectrum`` (|rfft| ** power on the bins the mel matrix
uses), ``mel`` (dropped frames gone), ``log`` (floor and gain), ``clamp``, ``statistics``, ``affine``, ``length``
(frames cut or filled), ``features`` (patches and layout). Every stage is returned even where the spec does nothing
at it. With W windows, ``frames`` ``(batch, T, win_length)`` and the stages up to ``length`` carry a window axis:
``frames`` and ``windowed`` are a tuple of W arrays (their lengths differ), ``spectrum`` is ``(batch, W, T, bins)``
and ``mel`` to ``length`` are ``(batch, W, T, n_mels)``; W is 1 for most systems.
"""

# Beyond these a spec is a mistake or an attack: its tables would not fit in memory, or its numbers not in float32.
_LONGEST_FFT = 1 << 16
_MOST_MELS = 4096
_LONGEST_CLIP = 1 << 28  # samples, more than two hours at 32 kHz
_MOST_FRAMES = 1 << 20
_SMALLEST = 2.0**-126  # of the normal float32 numbers; smaller ones become 0, and their logarithm infinite


class Preemphasis(Declaration):
    """First-difference filter y[n] = x[n] - coefficient * x[n-1].

    Attributes:
        coefficient: in (0, 1].
        edge: ``signal_drop`` filters the signal and drops its first sample (EfficientAT), ``signal_keep``
            filters the signal and keeps x[0] as it is (NeMo), ``frame`` filters inside each frame with
            x[-1] := x[0] (Kaldi).
    """

    coefficient: float = Field(gt=0, le=1)
    edge: Literal["signal_drop", "signal_keep", "frame"]


class Framing(Declaration):
    """How the signal is cut into frames.

    Attributes:
        n_fft: FFT length in samples.
        hop_length: samples between frames.
        placement: where a window shorter than ``n_fft`` sits in its frame. ``centred``: in the middle, and a
            frame spans ``n_fft`` samples for counting; ``left``: at its start, and a frame spans the longest
            window.
        padding: ``reflect`` or ``zero``: half a span is added at both ends; ``snip``: none, whole frames only.
        lead: zeros put at both ends of the signal before the padding, in samples.
        remove_dc: subtract each frame's own mean (over the window's length) before anything else in the frame.
        drop_first: frames dropped at the start.
        drop_last: frames dropped at the end.
    """

    n_fft: int = Field(ge=2, le=_LONGEST_FFT)
    hop_length: int = Field(ge=1, le=_LONGEST_CLIP)
    placement: Literal["centred", "left"] = "centred"
    padding: Literal["reflect", "zero", "snip"] = "reflect"
    lead: int = Field(default=0, ge=0, le=_LONGEST_CLIP)
    remove_dc: bool = False
    drop_first: int = Field(default=0, ge=0)
    drop_last: int = Field(default=0, ge=0)


class Window(Declaration):
    """One analysis window.

    Attributes:
        shape: ``hann``, ``hamming`` (0.54 / 0.46) or ``povey`` (Hann to the power 0.85).
        win_length: samples.
        periodic: divide by ``win_length`` (periodic) or ``win_length - 1`` (symmetric).
    """

    shape: Literal["hann", "hamming", "povey"]
    win_length: int = Field(ge=2)
    periodic: bool


class Mel(Declaration):
    """Triangular mel filters.

    Attributes:
        n_mels: number of filters.
        f_min: lower edge of the first filter, Hz.
        f_max: upper edge of the last filter, Hz.
        scale: ``htk`` (2595 log10(1 + f/700)) or ``slaney`` (linear below 1 kHz) break points.
        linear_in: axis on which the flanks are straight, ``hz`` or ``mel``.
        area_norm: divide each filter by half its width in Hz (librosa's ``norm="slaney"``).
    """

    n_mels: int = Field(ge=1, le=_MOST_MELS)
    f_min: float = Field(ge=0)
    f_max: float = Field(gt=0)
    scale: Literal["htk", "slaney"]
    linear_in: Literal["hz", "mel"]
    area_norm: bool

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.f_max <= self.f_min:
            raise SpecError(f"f_max: got {self.f_max} Hz; expected more than f_min, {self.f_min} Hz", field="f_max")
        return self


class Log(Declaration):
    """gain * ln(floored mel).

    Attributes:
        floor_mode: ``add`` (x + floor) or ``max`` (max(x, floor)).
        floor: smallest value that reaches the logarithm, in units of the mel spectrum.
        gain: factor on the natural logarithm: 1 (ln), 1/ln 10 (log10), 10/ln 10 (dB of power), 20/ln 10 (dB of
            magnitude).
    """

    floor_mode: Literal["add", "max"]
    floor: float = Field(ge=_SMALLEST)
    gain: float = Field(gt=0)


class Clamp(Declaration):
    """Limits on the log-mel values, in its own units.

    Attributes:
        low: lower limit, or None.
        high: upper limit, or None.
        below_max: values more than this below the clip's maximum are raised to it (Whisper 8, top_db 80), or None.
    """

    low: float | None = None
    high: float | None = None
    below_max: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.low is None and self.high is None and self.below_max is None:
            raise SpecError("low: a clamp needs low, high or below_max; for none leave it out", field="low")
        if self.low is not None and self.high is not None and self.high <= self.low:
            raise SpecError(f"high: got {self.high}; expected more than low, {self.low}", field="high")
        return self


class Statistics(Declaration):
    """Normalisation by statistics of the clip itself, per window.

    Attributes:
        kind: ``mean`` (x - mean), ``mean_std`` ((x - mean) / (std + eps)), ``min_max`` ((x - min) / max(range, eps)).
        over: ``mel_time`` (one value per clip) or ``time`` (one value per mel band).
        ddof: delta degrees of freedom of the deviation (``mean_std`` only).
        eps: guard of the division.
    """

    kind: Literal["mean", "mean_std", "min_max"]
    over: Literal["mel_time", "time"] = "mel_time"
    ddof: Literal[0, 1] = 0
    eps: float = Field(default=1e-8, ge=_SMALLEST)


class Affine(Declaration):
    """(x + shift) / scale, then plus a ramp over mel bands.

    Attributes:
        shift: added first.
        scale: divides; not 0.
        ramp: (first, last) values of a line over the mel bands, added last, or None.
    """

    shift: float = 0.0
    scale: float = 1.0
    ramp: Annotated[tuple[float, float], Strict(False)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.scale == 0:
            raise SpecError("scale: got 0; expected a number to divide by, 1 for none", field="scale")
        return self


class Frames(Declaration):
    """Fixing the number of frames, after the affine.

    Attributes:
        count: cut or fill to exactly this many frames, or None.
        multiple_of: fill up to a multiple of this, or None. Exactly one of the two is set.
        fill: value of added frames, in output units.
    """

    count: int | None = Field(default=None, ge=1, le=_MOST_FRAMES)
    multiple_of: int | None = Field(default=None, ge=1, le=_MOST_FRAMES)
    fill: float = 0.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.count is None) == (self.multiple_of is None):
            raise SpecError("count: set exactly one of count and multiple_of", field="count")
        return self

    def applied_to(self, num_frames: int) -> int:
        """Return the number of frames that ``num_frames`` become."""
        if self.multiple_of is not None:
            return -(-num_frames // self.multiple_of) * self.multiple_of
        return num_frames if self.count is None else self.count


class Patches(Declaration):
    """Cutting the frames into patches; a tail shorter than a patch is dropped.

    Attributes:
        length: frames in a patch.
        hop: frames between patches.
    """

    length: int = Field(ge=1)
    hop: int = Field(ge=1)


class FrontendSpec(Declaration):
    """Everything that moves a number between a waveform and the features a model sees.

    Attributes:
        sample_rate: Hz.
        samples: length in samples to which the clip is cut or zero-filled on the right, or None.
        preemphasis, framing, windows, power, mel, log, clamp, statistics, affine, frames, patches: the stages;
            None where a stage does nothing. ``power`` is the exponent of the magnitude, 1 or 2. More than one
            window adds a channel axis.
        layout: order of the output axes: ``b`` batch, ``c`` windows, ``m`` mel, ``t`` frames, ``p`` patches,
            ``1`` a unit axis, separated by spaces.
        channels: how several channels become one: ``mean`` or ``first``.
        resampler: how another sample rate is converted; ``soxr_hq``.
    """

    sample_rate: int = Field(ge=1, le=768_000)
    samples: int | None = Field(default=None, ge=1, le=_LONGEST_CLIP)
    preemphasis: Preemphasis | None = None
    framing: Framing
    windows: Sequence[Window] = Field(min_length=1)
    power: Literal[1, 2]
    mel: Mel
    log: Log
    clamp: Clamp | None = None
    statistics: Statistics | None = None
    affine: Affine | None = None
    frames: Frames | None = None
    patches: Patches | None = None
    layout: str
    channels: Literal["mean", "first"] = "mean"
    resampler: Literal["soxr_hq"] = "soxr_hq"

    @model_validator(mode="after")
    def _check(self) -> Self:
        longest = max(window.win_length for window in self.windows)
        if longest > self.framing.n_fft:
            raise SpecError(
                f"windows: the longest is {longest} samples; expected at most n_fft, {self.framing.n_fft}",
                field="windows",
            )
        if self.mel.f_max > self.sample_rate / 2:
            raise SpecError(
                f"mel.f_max: got {self.mel.f_max} Hz; expected at most half the sample rate, {self.sample_rate / 2} Hz",
                field="mel.f_max",
            )
        axes = self.layout.split(" ")
        expected = {"b", "t", "m"} | ({"p"} if self.patches else set()) | ({"c"} if len(self.windows) > 1 else set())
        named = [axis for axis in axes if axis != "1"]
        if set(named) != expected or len(named) != len(expected) or axes[0] != "b":
            raise SpecError(
                f"layout: got {self.layout!r}; expected 'b' first, then each of {sorted(expected - {'b'})} once, "
                "with '1' for unit axes, separated by single spaces",
                field="layout",
            )
        if not self._is_legal(_LONGEST_CLIP):
            raise SpecError(
                "framing: no clip is long enough to give "
                + ("a frame" if self.patches is None else f"a patch of {self.patches.length} frames")
                + (f", as clips are cut or filled to {self.samples} samples" if self.samples is not None else "")
                + (f" and frames to {self.frames.count}" if self.frames is not None and self.frames.count else ""),
                field="framing",
            )
        return self

    @property
    def axis_order(self) -> tuple[int, ...]:
        """Where the layout's axes lie in ``(batch, windows, [patches,] T, n_mels)``, a single window squeezed away."""
        axes = "bcptm" if self.patches is not None else "bctm"
        if len(self.windows) == 1:
            axes = axes.replace("c", "")
        return tuple(axes.index(axis) for axis in self.layout.split(" ") if axis != "1")

    @property
    def unit_axes(self) -> tuple[int, ...]:
        """Positions of the layout's unit axes, which are inserted last, in order."""
        return tuple(position for position, axis in enumerate(self.layout.split(" ")) if axis == "1")

    @property
    def span(self) -> int:
        """Samples a frame spans when frames are counted: n_fft if centred, else the longest window."""
        if self.framing.placement == "centred":
            return self.framing.n_fft
        return max(window.win_length for window in self.windows)

    @property
    def edge_padding(self) -> int:
        """Samples of reflection or zeros added at each end, after ``framing.lead``."""
        return 0 if self.framing.padding == "snip" else self.span // 2

    def _signal_length(self, num_samples: int) -> int:
        """Samples left once the length is fixed and the signal pre-emphasised, with the lead zeros added."""
        length = num_samples if self.samples is None else self.samples
        if self.preemphasis is not None and self.preemphasis.edge == "signal_drop":
            length -= 1
        return length + 2 * self.framing.lead

    def _analysed_frames(self, num_samples: int) -> int:
        """Frames that come out of the STFT and survive ``drop_first`` and ``drop_last``; may be <= 0."""
        padded = self._signal_length(num_samples) + 2 * self.edge_padding
        if padded < self.span:
            return 0
        count = 1 + (padded - self.span) // self.framing.hop_length
        return count - self.framing.drop_first - self.framing.drop_last

    def _is_legal(self, num_samples: int) -> bool:
        if num_samples < 1 or self._signal_length(num_samples) < 1:
            return False
        if self.framing.padding == "reflect" and self._signal_length(num_samples) < self.edge_padding + 1:
            return False
        frames = self._analysed_frames(num_samples)
        least = 1
        if self.statistics is not None and self.statistics.kind == "mean_std" and self.statistics.over == "time":
            least = 1 + self.statistics.ddof
        if frames < least:
            return False
        return self.patches is None or self._final_frames(frames) >= self.patches.length

    def _final_frames(self, frames: int) -> int:
        return frames if self.frames is None else self.frames.applied_to(frames)

    @cached_property
    def min_samples(self) -> int:
        """Shortest legal clip, in samples at ``sample_rate``."""
        low, high = 0, _LONGEST_CLIP  # illegal and, by the validation, legal
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._is_legal(middle) else (middle, high)
        return high

    def num_frames(self, num_samples: int) -> int:
        """Return the length of the ``t`` axis (frames per patch if the spec cuts patches) for a clip.

        Raises:
            ClipLengthError: the clip is shorter than :attr:`min_samples`.
        """
        if not self._is_legal(num_samples):
            raise ClipLengthError(
                f"the clip has {num_samples} samples ({num_samples / self.sample_rate:.4f} s); this front end needs at "
                f"least {self.min_samples} ({self.min_samples / self.sample_rate:.4f} s at {self.sample_rate} Hz); "
                "use a longer clip or declare a padding rule in the card's length_policy",
                code="too_short",
            )
        if self.patches is not None:
            return self.patches.length
        return self._final_frames(self._analysed_frames(num_samples))

    def num_patches(self, num_samples: int) -> int:
        """Return the length of the ``p`` axis for a clip (1 where the spec cuts no patches)."""
        self.num_frames(num_samples)
        if self.patches is None:
            return 1
        frames = self._final_frames(self._analysed_frames(num_samples))
        return 1 + (frames - self.patches.length) // self.patches.hop

    def output_shape(self, num_samples: int, batch: int = 1) -> tuple[int, ...]:
        """Return the shape of the features of ``(batch, num_samples)`` waveforms, in the spec's layout."""
        sizes = {
            "b": batch,
            "1": 1,
            "c": len(self.windows),
            "m": self.mel.n_mels,
            "t": self.num_frames(num_samples),
            "p": self.num_patches(num_samples),
        }
        return tuple(sizes[axis] for axis in self.layout.split(" "))
