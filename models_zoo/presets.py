"""The published front ends by name.

Source: per preset, the repository named beside it; measured constants in each system's published code.
"""

from __future__ import annotations

import math

from models_zoo.errors import UnknownNameError
from models_zoo.specs import (
    Affine,
    Clamp,
    Frames,
    Framing,
    FrontendSpec,
    Log,
    Mel,
    Patches,
    Preemphasis,
    Statistics,
    Window,
)

__all__ = ["get_frontend", "list_frontends"]

_DB_POWER = 10 / math.log(10)
_DB_MAGNITUDE = 20 / math.log(10)


def _efficientat(hop_length: int = 320, n_mels: int = 128) -> FrontendSpec:
    """fschmid56/EfficientAT models/preprocess.py; f_max is sample_rate / 2 - 1000 as the published scripts leave it."""
    return FrontendSpec(
        sample_rate=32000,
        preemphasis=Preemphasis(coefficient=0.97, edge="signal_drop"),
        framing=Framing(n_fft=1024, hop_length=hop_length),
        windows=(Window(shape="hann", win_length=800, periodic=False),),
        power=2,
        mel=Mel(n_mels=n_mels, f_min=0.0, f_max=15000.0, scale="htk", linear_in="mel", area_norm=False),
        log=Log(floor_mode="add", floor=1e-5, gain=1.0),
        affine=Affine(shift=4.5, scale=5.0),
        layout="b m t",
    )


def _panns(sample_rate: int, n_fft: int, hop_length: int, f_max: float) -> FrontendSpec:
    """qiuqiangkong/audioset_tagging_cnn pytorch/models.py with torchlibrosa."""
    return FrontendSpec(
        sample_rate=sample_rate,
        framing=Framing(n_fft=n_fft, hop_length=hop_length),
        windows=(Window(shape="hann", win_length=n_fft, periodic=True),),
        power=2,
        mel=Mel(n_mels=64, f_min=50.0, f_max=f_max, scale="slaney", linear_in="hz", area_norm=True),
        log=Log(floor_mode="max", floor=1e-10, gain=_DB_POWER),
        layout="b 1 t m",
    )


def _dcase(affine: Affine | None) -> FrontendSpec:
    """DCASE-REPO/DESED_task; the scaler's output range changed from [0, 1] (to 2023) to [-1, 1] (2024)."""
    return FrontendSpec(
        sample_rate=16000,
        framing=Framing(n_fft=2048, hop_length=256),
        windows=(Window(shape="hamming", win_length=2048, periodic=False),),
        power=1,
        mel=Mel(n_mels=128, f_min=0.0, f_max=8000.0, scale="htk", linear_in="hz", area_norm=False),
        log=Log(floor_mode="max", floor=1e-5, gain=_DB_MAGNITUDE),
        clamp=Clamp(low=-50.0, high=80.0),
        statistics=Statistics(kind="min_max", over="mel_time", eps=1e-8),
        affine=affine,
        layout="b m t",
    )


def _kaldi(shift: float, scale: float) -> FrontendSpec:
    """YuanGongND/cav-mae and YuanGongND/ast src/dataloader.py over torchaudio.compliance.kaldi.fbank.

    Frames are filled with log-mel 0 before the affine, i.e. with shift / scale in output units.
    """
    return FrontendSpec(
        sample_rate=16000,
        preemphasis=Preemphasis(coefficient=0.97, edge="frame"),
        framing=Framing(n_fft=512, hop_length=160, placement="left", padding="snip", remove_dc=True),
        windows=(Window(shape="hann", win_length=400, periodic=False),),
        power=2,
        mel=Mel(n_mels=128, f_min=20.0, f_max=8000.0, scale="htk", linear_in="mel", area_norm=False),
        log=Log(floor_mode="max", floor=2.0**-23, gain=1.0),
        affine=Affine(shift=shift, scale=scale),
        frames=Frames(count=1024, fill=shift / scale),
        layout="b t m",
        channels="first",
    )


def _mrms() -> FrontendSpec:
    """Multi-resolution mel of the MAC classifier: four windows, one mel matrix, per-clip mean removed."""
    return FrontendSpec(
        sample_rate=16000,
        framing=Framing(n_fft=2048, hop_length=100, lead=50, drop_first=1, drop_last=1),
        windows=tuple(Window(shape="hann", win_length=length, periodic=True) for length in (250, 500, 750, 1000)),
        power=2,
        mel=Mel(n_mels=160, f_min=25.0, f_max=7500.0, scale="htk", linear_in="hz", area_norm=False),
        log=Log(floor_mode="max", floor=1e-10, gain=_DB_POWER),
        statistics=Statistics(kind="mean", over="mel_time"),
        affine=Affine(scale=20.0, ramp=(-0.5, 0.5)),
        layout="b c m t",
        channels="first",
    )


def _whisper() -> FrontendSpec:
    """openai/whisper whisper/audio.py, 80 mels; the maximum is taken per clip, not over a batch."""
    return FrontendSpec(
        sample_rate=16000,
        samples=480_000,
        framing=Framing(n_fft=400, hop_length=160, drop_last=1),
        windows=(Window(shape="hann", win_length=400, periodic=True),),
        power=2,
        mel=Mel(n_mels=80, f_min=0.0, f_max=8000.0, scale="slaney", linear_in="hz", area_norm=True),
        log=Log(floor_mode="max", floor=1e-10, gain=1 / math.log(10)),
        clamp=Clamp(below_max=8.0),
        affine=Affine(shift=4.0, scale=4.0),
        layout="b m t",
    )


def _audioset_vgg(floor: float, patch_hop: int) -> FrontendSpec:
    """tensorflow/models research/audioset: YAMNet (params.py, features.py) and VGGish."""
    return FrontendSpec(
        sample_rate=16000,
        framing=Framing(n_fft=512, hop_length=160, placement="left", padding="snip"),
        windows=(Window(shape="hann", win_length=400, periodic=True),),
        power=1,
        mel=Mel(n_mels=64, f_min=125.0, f_max=7500.0, scale="htk", linear_in="mel", area_norm=False),
        log=Log(floor_mode="add", floor=floor, gain=1.0),
        patches=Patches(length=96, hop=patch_hop),
        layout="b p t m",
    )


def _nemo() -> FrontendSpec:
    """NVIDIA/NeMo FilterbankFeatures defaults: reflect edges, frames filled to a multiple of 16."""
    return FrontendSpec(
        sample_rate=16000,
        preemphasis=Preemphasis(coefficient=0.97, edge="signal_keep"),
        framing=Framing(n_fft=512, hop_length=160),
        windows=(Window(shape="hann", win_length=400, periodic=False),),
        power=2,
        mel=Mel(n_mels=80, f_min=0.0, f_max=8000.0, scale="slaney", linear_in="hz", area_norm=True),
        log=Log(floor_mode="add", floor=2.0**-24, gain=1.0),
        statistics=Statistics(kind="mean_std", over="time", ddof=1, eps=1e-5),
        frames=Frames(multiple_of=16, fill=0.0),
        layout="b m t",
    )


_PRESETS: dict[str, FrontendSpec] = {
    "efficientat": _efficientat(),
    "efficientat_hop160": _efficientat(hop_length=160),
    "efficientat_hop480": _efficientat(hop_length=480),
    "efficientat_hop640": _efficientat(hop_length=640),
    "efficientat_hop800": _efficientat(hop_length=800),
    "efficientat_mels40": _efficientat(n_mels=40),
    "efficientat_mels64": _efficientat(n_mels=64),
    "efficientat_mels256": _efficientat(n_mels=256),
    "panns_32k": _panns(32000, 1024, 320, 14000.0),
    "panns_16k": _panns(16000, 512, 160, 8000.0),
    "panns_8k": _panns(8000, 256, 80, 4000.0),
    "dcase_2023": _dcase(None),
    "dcase_2024": _dcase(Affine(shift=-0.5, scale=0.5)),
    "cav_mae": _kaldi(5.081, 4.4849),
    "mrms": _mrms(),
    "whisper": _whisper(),
    "yamnet": _audioset_vgg(0.001, 48),
    "vggish": _audioset_vgg(0.01, 96),
    "ast": _kaldi(4.2677393, 9.1379948),
    "nemo": _nemo(),
}


def get_frontend(name: str) -> FrontendSpec:
    """Return the published front end called ``name``; see :func:`list_frontends`.

    Raises:
        UnknownNameError: no such preset; the message suggests near names.
    """
    if name not in _PRESETS:
        raise UnknownNameError("front end", name, _PRESETS)
    return _PRESETS[name]


def list_frontends() -> list[str]:
    """Return the names of the published front ends and their variants."""
    return list(_PRESETS)
