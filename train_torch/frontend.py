"""The torch front end: the spec's features inside the training graph, with hooks where published recipes put them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from models_zoo.cards import ModelInput
from models_zoo.errors import CardError, SpecError, WaveformError
from models_zoo.filterbanks import analysis_tables, mel_recipe
from models_zoo.specs import FrontendSpec, Statistics

__all__ = [
    "MelJitter",
    "MixStyle",
    "Mixing",
    "PairMixing",
    "Shift",
    "SpecMasks",
    "TorchFrontend",
    "masked",
    "network_inputs",
]


@dataclass(frozen=True)
class MelJitter:
    """Random mel edges, drawn once per batch in training.

    f_min grows by U{0 .. f_min_range - 1} Hz; f_max moves by f_max_range // 2 - U{0 .. f_max_range - 1} Hz, kept
    below half the sample rate. A range of 1 leaves its edge alone.

    Source: EfficientAT models/preprocess.py (ranges 10 and 2000; f_max 14001 to 16000 Hz at 32 kHz).
    """

    f_min_range: int = 10
    f_max_range: int = 2000

    def __post_init__(self) -> None:
        for field in ("f_min_range", "f_max_range"):
            if getattr(self, field) < 1:
                raise SpecError(
                    f"{field}: got {getattr(self, field)}; expected at least 1 (1 for no jitter)", field=field
                )


@dataclass(frozen=True)
class SpecMasks:
    """One frequency mask and one time mask, or several of each, per clip, the same for all its windows.

    Widths are U(0, max), starts U(0, size - width), both floored; 0 switches a mask off. At ``log``, before any
    normalisation, ``value`` is in log units: EfficientAT's 0 becomes 0.9 after its affine, a loud value, as published.
    At ``features`` it is in output units: MRMS's 0 is the clip's mean level apart from the ramp. At ``norm``, inside a
    network, it is in units of its norm: PANNs' 0 is the mean of all clips.

    Source: torchaudio FrequencyMasking / TimeMasking with iid_masks, as in EfficientAT (48 and 192 by default); MRMS
    (32 and twice 12, on finished features); torchlibrosa SpecAugmentation, as in PANNs (twice 8 and twice 64, behind
    the norm; it draws whole starts below size - width, so the last position is a little more likely there).
    """

    max_mels: int = 48
    max_frames: int = 192
    value: float = 0.0
    num_time: int = 1
    num_mel: int = 1
    at: Literal["log", "features", "norm"] = "log"


@dataclass(frozen=True)
class Shift:
    """Random shift of the finished features along mel and time, drawn per clip, the same for all its windows.

    The features are framed with ``max_mels`` bands and ``max_frames`` frames of zeros on both sides, and cut to their
    size again at an offset of U(0, 2 max) floored: a shift of -max + 1 to max, what leaves is lost, zeros come in.

    Source: the MRMS notebook (32 and 32 of 160 x 160).
    """

    max_mels: int
    max_frames: int

    def __post_init__(self) -> None:
        if min(self.max_mels, self.max_frames) < 0:
            raise SpecError(f"shift: got {self.max_mels}, {self.max_frames}; expected 0 or more", field="shift")


@dataclass(frozen=True)
class MixStyle:
    """Frequency-wise mixstyle: a clip's features keep their shape and take on another's mean and spread per mel band.

    Of a share of the batches, every clip's bands are normalised by their own mean and standard deviation over channels
    and time, then given w * own + (1 - w) * those of another clip, with w from Beta(alpha, alpha) for each clip; the
    statistics carry no gradient, and labels stay. Recording devices colour bands, so a network learns to ignore it.

    Source: Kim et al., "Domain Generalization with Relaxed Instance Frequency-wise Normalization for Multi-device
    Acoustic Scene Classification" (arXiv 2206.12513), as in EfficientAT helpers/utils.py mixstyle (0.4, 0.4).
    """

    probability: float
    alpha: float
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1 or self.alpha <= 0 or self.eps <= 0:
            raise SpecError(
                f"mixstyle: got probability {self.probability}, alpha {self.alpha}, eps {self.eps}; expected a "
                "probability, and the others above 0",
                field="mixstyle",
            )


@dataclass(frozen=True, eq=False)
class Mixing:
    """A mixup draw: clip i becomes weight[i] * clip i + (1 - weight[i]) * clip permutation[i].

    Attributes:
        permutation: ``(batch,)`` int64.
        weight: ``(batch,)`` float32 in [0, 1].
        plain: the other clip comes without masks and shift, where features are mixed.
    """

    permutation: Tensor
    weight: Tensor
    plain: bool = False

    def __call__(self, values: Tensor, others: Tensor | None = None) -> Tensor:
        """Return ``values`` ``(batch, ...)`` mixed along the batch, or with ``others``; labels mix the same way."""
        weight = self.weight.to(values.dtype).view(-1, *[1] * (values.dim() - 1))
        others = values if others is None else others
        return values * weight + others[self.permutation] * (1 - weight)


@dataclass(frozen=True, eq=False)
class PairMixing:
    """A mixup draw that makes one clip of two: weight[i] * clip 2 i + (1 - weight[i]) * clip 2 i + 1.

    Attributes:
        weight: ``(batch / 2,)`` float32 in [0, 1].
    """

    weight: Tensor
    plain: ClassVar[bool] = False

    def __call__(self, values: Tensor, others: Tensor | None = None) -> Tensor:
        """Return ``(batch / 2, ...)`` of ``values`` ``(batch, ...)``; labels mix the same way."""
        weight = self.weight.to(values.dtype).view(-1, *[1] * (values.dim() - 1))
        others = values if others is None else others
        return values[0::2] * weight + others[1::2] * (1 - weight)


class TorchFrontend(nn.Module):
    """Waveform -> features in torch, stage by stage as the spec declares.

    The tables are the ones every implementation loads; none of them is part of a state_dict. Computed in float32
    also under autocast. In ``eval()`` it draws no random numbers.

    Args:
        spec: the front end.
        mel_jitter: random mel edges, in training mode only.
        masks: spectrogram masks, in training mode only.
        shift: random shift of the finished features after masks, in training mode only.
        mixstyle: exchange of statistics between the clips of a batch, on the finished features before they are mixed,
            in training mode only.
        noise: greatest level of uniform noise on the finished features, drawn per clip, in training mode only.
        roll: move the finished features round in time by any number of frames, in training mode only. Noise and roll
            come last, mixing aside. Source: YuanGongND/cav-mae src/dataloader.py (noise 0.1).
        mix_at: stage at which ``forward(..., mixing=...)`` mixes clips: ``samples`` (waveforms), ``mel`` (linear
            mel values before the log, as DCASE does) or ``features`` (as EfficientAT and MRMS do).
    """

    def __init__(
        self,
        spec: FrontendSpec,
        *,
        mel_jitter: MelJitter | None = None,
        masks: SpecMasks | None = None,
        shift: Shift | None = None,
        mixstyle: MixStyle | None = None,
        noise: float = 0.0,
        roll: bool = False,
        mix_at: Literal["samples", "mel", "features"] = "features",
    ) -> None:
        super().__init__()
        self.spec = spec
        self.mel_jitter = mel_jitter
        self.masks = masks
        self.shift = shift
        self.mixstyle = mixstyle
        self.noise = noise
        self.roll = roll
        self.mix_at = mix_at
        tables = analysis_tables(spec)
        self._offsets = tables.offsets
        self._bins = tables.bins
        for index, window in enumerate(tables.windows):
            self.register_buffer(f"_window{index}", torch.tensor(window), persistent=False)
        self.register_buffer("_mel", torch.tensor(tables.mel), persistent=False)
        ramp = None if tables.ramp is None else torch.tensor(tables.ramp)
        self.register_buffer("_ramp", ramp, persistent=False)

    def forward(
        self, waveform: Tensor, mixing: Mixing | PairMixing | None = None, plain: Tensor | None = None
    ) -> Tensor:
        """Return the features of ``waveform`` in the spec's layout, float32.

        Args:
            waveform: ``(batch, num_samples)`` float32 in [-1, 1] at ``spec.sample_rate`` Hz.
            mixing: a mixup draw, applied at ``mix_at``.
            plain: what :meth:`plain` returned for these waveforms, which is then not computed again.

        Raises:
            WaveformError: not two-dimensional.
            ClipLengthError: shorter than ``spec.min_samples``.
        """
        with torch.autocast(device_type=waveform.device.type, enabled=False):
            if plain is not None:
                return self._finished(plain, mixing)
            return deque(self._walk(waveform, mixing), maxlen=1).pop()[1]

    @property
    def draws_late(self) -> bool:
        """Whether all that training changes at random is the finished features, so that :meth:`plain` is for good."""
        masks_late = self.masks is None or self.masks.at == "features"
        return self.mel_jitter is None and masks_late and self.mix_at == "features"

    def plain(self, waveform: Tensor) -> Tensor:
        """Return the finished features ``(batch, windows, T, n_mels)`` before any are mixed, masked or moved."""
        with torch.autocast(device_type=waveform.device.type, enabled=False):
            return next(value for name, value in self._walk(waveform, None) if name == "length")

    def mel(self, waveform: Tensor) -> Tensor:
        """Return the linear mel values ``(batch, windows, T, n_mels)``, before the log."""
        with torch.autocast(device_type=waveform.device.type, enabled=False):
            return next(value for name, value in self._walk(waveform, None) if name == "mel")

    def from_mel(self, mel: Tensor) -> Tensor:
        """Return the features, as :meth:`forward` does, of what :meth:`mel` returned, changed or not."""
        with torch.autocast(device_type=mel.device.type, enabled=False):
            return deque(self._walk_on(mel, None), maxlen=1).pop()[1]

    def stages(self, waveform: Tensor) -> dict[str, Any]:
        """Return every intermediate by name, in order; see ``models_zoo.specs.STAGES`` for shapes."""
        return dict(self._walk(waveform, None))

    def _walk(self, waveform: Tensor, mixing: Mixing | PairMixing | None) -> Iterator[tuple[str, Any]]:
        spec, framing = self.spec, self.spec.framing
        x = waveform
        if x.dim() != 2:
            raise WaveformError(f"got shape {tuple(x.shape)}; expected (batch, num_samples)", code="rank")
        spec.num_frames(x.shape[1])
        x = x.float()

        if mixing is not None and self.mix_at == "samples":
            x = mixing(x)
        if spec.samples is not None:
            x = x[:, : spec.samples]
            x = functional.pad(x, (0, spec.samples - x.shape[1]))
        yield "samples", x  # (batch, num_samples)

        edge = spec.preemphasis.edge if spec.preemphasis else None
        coefficient = spec.preemphasis.coefficient if spec.preemphasis else 0.0
        if edge in ("signal_drop", "signal_keep"):
            filtered = x[:, 1:] - coefficient * x[:, :-1]
            x = filtered if edge == "signal_drop" else torch.cat([x[:, :1], filtered], dim=1)
        yield "preemphasis", x

        if framing.lead:
            x = functional.pad(x, (framing.lead, framing.lead))
        if framing.padding != "snip":
            mode = {"reflect": "reflect", "zero": "constant"}[framing.padding]
            x = functional.pad(x, (spec.edge_padding, spec.edge_padding), mode=mode)
        yield "padded", x

        windows = [self.get_buffer(f"_window{index}") for index in range(len(spec.windows))]
        frames = [
            x[:, offset : x.shape[1] - spec.span + offset + window.numel()].unfold(
                1, window.numel(), framing.hop_length
            )
            for window, offset in zip(windows, self._offsets, strict=True)
        ]
        if framing.remove_dc:
            frames = [frame - frame.mean(dim=-1, keepdim=True) for frame in frames]
        if edge == "frame":
            frames = [frame - coefficient * torch.cat([frame[..., :1], frame[..., :-1]], dim=-1) for frame in frames]
        yield "frames", tuple(frames)  # each (batch, T, win_length)

        frames = [frame * window for frame, window in zip(frames, windows, strict=True)]
        yield "windowed", tuple(frames)

        bins, matrix = self._mel_bank()
        spectra = []
        for frame in frames:
            used = torch.view_as_real(torch.fft.rfft(frame, n=framing.n_fft)[..., bins])
            power = used.square().sum(dim=-1)
            spectra.append(power if spec.power == 2 else power.sqrt())
        spectrum = torch.stack(spectra, dim=1)
        yield "spectrum", spectrum  # (batch, windows, T, bins)

        mel = spectrum @ matrix
        mel = mel[:, :, framing.drop_first : mel.shape[2] - framing.drop_last]
        if mixing is not None and self.mix_at == "mel":
            mel = mixing(mel)
        yield "mel", mel  # (batch, windows, T, n_mels)
        yield from self._walk_on(mel, mixing)

    def _walk_on(self, mel: Tensor, mixing: Mixing | PairMixing | None) -> Iterator[tuple[str, Tensor]]:
        """Yield the stages behind linear mel values ``(batch, windows, T, n_mels)``."""
        spec = self.spec
        y = torch.log(mel + spec.log.floor if spec.log.floor_mode == "add" else mel.clamp(min=spec.log.floor))
        if spec.log.gain != 1:
            y = y * spec.log.gain
        if self.training and self.masks is not None and self.masks.at == "log":
            y = masked(y, self.masks)
        yield "log", y

        if spec.clamp is not None:
            if spec.clamp.low is not None or spec.clamp.high is not None:
                y = y.clamp(spec.clamp.low, spec.clamp.high)
            if spec.clamp.below_max is not None:
                y = torch.maximum(y, y.amax(dim=(1, 2, 3), keepdim=True) - spec.clamp.below_max)
        yield "clamp", y

        if spec.statistics is not None:
            y = _normalise(y, spec.statistics)
        yield "statistics", y

        if spec.affine is not None:
            y = (y + spec.affine.shift) / spec.affine.scale
            if self._ramp is not None:
                y = y + self._ramp
        yield "affine", y

        if spec.frames is not None:
            count = spec.frames.applied_to(y.shape[2])
            y = y[:, :, :count]
            y = functional.pad(y, (0, 0, 0, count - y.shape[2]), value=spec.frames.fill)
        yield "length", y
        yield "features", self._finished(y, mixing)

    def _finished(self, y: Tensor, mixing: Mixing | PairMixing | None) -> Tensor:
        """Return ``(batch, windows, T, n_mels)`` as training changes it, in the layout of the spec."""
        if self.training and self.mixstyle is not None:
            y = _restyled(y, self.mixstyle)
        plain = y
        if self.training and self.masks is not None and self.masks.at == "features":
            y = masked(y, self.masks)
        if self.training and self.shift is not None:
            y = _shifted(y, self.shift)
        if self.training and self.noise:
            level = torch.rand(y.shape[0], 1, 1, 1, device=y.device) * self.noise
            y = y + torch.rand_like(y) * level
        if self.training and self.roll:
            moved = torch.randint(y.shape[2], (y.shape[0],)).tolist()
            y = torch.stack([torch.roll(clip, frames, dims=1) for clip, frames in zip(y, moved, strict=True)])
        if mixing is not None and self.mix_at == "features":
            y = mixing(y, plain if mixing.plain else None)
        return self._arrange(y)

    def _mel_bank(self) -> tuple[slice, Tensor]:
        """Return the FFT bins and the ``(bins, n_mels)`` matrix of this call: the table, or a jittered one."""
        if not self.training or self.mel_jitter is None:
            return self._bins, self._mel
        mel, jitter = self.spec.mel, self.mel_jitter
        f_min = mel.f_min + int(torch.randint(jitter.f_min_range, ()))
        f_max = mel.f_max + jitter.f_max_range // 2 - int(torch.randint(jitter.f_max_range, ()))
        if jitter.f_max_range == 1:
            f_max = mel.f_max
        jittered = mel.replace(f_min=float(f_min), f_max=float(min(f_max, self.spec.sample_rate / 2)))
        matrix = mel_recipe(jittered, self.spec.framing.n_fft, self.spec.sample_rate)
        return slice(None), torch.tensor(matrix, device=self._mel.device)

    def _arrange(self, y: Tensor) -> Tensor:
        """Return ``(batch, windows, T, n_mels)`` cut into patches and in the layout's order."""
        spec = self.spec
        if spec.patches is not None:
            y = y.unfold(2, spec.patches.length, spec.patches.hop).movedim(-1, 3)
        if len(spec.windows) == 1:
            y = y.squeeze(1)
        y = y.permute(spec.axis_order)
        for position in spec.unit_axes:
            y = y.unsqueeze(position)
        return y.contiguous()


def network_inputs(
    inputs: Sequence[ModelInput],
    frontend: TorchFrontend | None,
    waveform: Tensor,
    mixing: Mixing | PairMixing | None = None,
    plain: Tensor | None = None,
    image: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return what a network takes, by name: features, waveform, picture, or several of them.

    Args:
        inputs: of the network's card; each comes from the front end, or is the waveform or the picture itself.
        frontend: of the card; not computed where no input comes from it.
        waveform, mixing, plain: see :meth:`TorchFrontend.forward`; a waveform or picture that is an input is mixed by
            the same draw as the features.
        image: ``(batch, 3, size, size)`` float32, as the card's image front end returns it; of a network that looks at
            pictures.

    Raises:
        CardError: an input comes from elsewhere.
    """
    made = {}
    for part in inputs:
        if part.source == "frontend" and frontend is not None:
            made[part.name] = frontend(waveform, mixing, plain)
            continue
        given = {"waveform": waveform, "image": image}.get(part.source)
        if given is None:
            raise CardError(
                f"inputs: {part.name!r} comes from {part.source!r}, and none was given; expected frontend, waveform or "
                "image",
                field="inputs",
            )
        made[part.name] = given if mixing is None else mixing(given)
    return made


def masked(y: Tensor, masks: SpecMasks) -> Tensor:
    """Return ``(batch, windows, T, n_mels)`` with masks along mel and time drawn for each clip."""
    for dim, longest in (*[(3, masks.max_mels)] * masks.num_mel, *[(2, masks.max_frames)] * masks.num_time):
        if longest < 1:
            continue
        size = y.shape[dim]
        width = torch.rand(y.shape[0], device=y.device) * min(longest, size)
        start = torch.rand(y.shape[0], device=y.device) * (size - width)
        begin = start.floor().view(-1, 1)
        positions = torch.arange(size, device=y.device)
        hidden = (positions >= begin) & (positions < begin + width.floor().view(-1, 1))
        shape = [y.shape[0], 1, 1, 1]
        shape[dim] = size
        y = y.masked_fill(hidden.view(shape), masks.value)
    return y


def _shifted(y: Tensor, shift: Shift) -> Tensor:
    """Return ``(batch, windows, T, n_mels)``, each clip shifted along time and mel by its own draw."""
    frames, mels = y.shape[2:]
    framed = functional.pad(y, (shift.max_mels, shift.max_mels, shift.max_frames, shift.max_frames))
    most = torch.tensor([2 * shift.max_frames, 2 * shift.max_mels])
    offsets = (torch.rand(y.shape[0], 2) * most).long().tolist()
    return torch.stack([clip[:, t : t + frames, m : m + mels] for clip, (t, m) in zip(framed, offsets, strict=True)])


def _restyled(y: Tensor, style: MixStyle) -> Tensor:
    """Return ``(batch, windows, T, n_mels)`` with the statistics of its bands exchanged, or, by chance, as it was."""
    if float(torch.rand(())) >= style.probability:
        return y
    own = torch.distributions.Beta(style.alpha, style.alpha).sample((y.shape[0], 1, 1, 1)).to(y.device)
    partner = torch.randperm(y.shape[0]).to(y.device)
    values = y.detach()
    mean = values.mean(dim=(1, 2), keepdim=True)
    # A single frame has no spread; the published unbiased variance would be NaN.
    correction = min(1, y.shape[1] * y.shape[2] - 1)
    spread = (values.var(dim=(1, 2), keepdim=True, correction=correction) + style.eps).sqrt()
    new_mean = own * mean + (1 - own) * mean[partner]
    new_spread = own * spread + (1 - own) * spread[partner]
    return (y - mean) / spread * new_spread + new_mean


def _normalise(y: Tensor, statistics: Statistics) -> Tensor:
    """Return ``(batch, windows, T, n_mels)`` normalised by the clip's own statistics."""
    dims = (2, 3) if statistics.over == "mel_time" else (2,)
    if statistics.kind == "min_max":
        low = y.amin(dim=dims, keepdim=True)
        return (y - low) / (y.amax(dim=dims, keepdim=True) - low).clamp(min=statistics.eps)
    if statistics.kind == "mean":
        return y - y.mean(dim=dims, keepdim=True)
    # Relative to its first value a constant row (silence) is exactly 0, not rounding noise divided by eps.
    y = y - (y[:, :, :1, :1] if statistics.over == "mel_time" else y[:, :, :1])
    centred = y - y.mean(dim=dims, keepdim=True)
    return centred / (y.std(dim=dims, keepdim=True, correction=statistics.ddof) + statistics.eps)
