"""The mistakes people make when they write a front end by hand, as edits of a spec.

Source: the contracts' FRONTENDS.md, "What a mistake costs", every row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from models_zoo.specs import Affine, FrontendSpec, Preemphasis, Window


@dataclass(frozen=True)
class Mistake:
    """One mistake: the preset it is made in, the edit, and the stage at which it enters."""

    preset: str
    name: str
    stage: str
    make: Callable[[FrontendSpec], FrontendSpec]


def _windows(**changes: object) -> Callable[[FrontendSpec], FrontendSpec]:
    return lambda spec: spec.replace(windows=[window.replace(**changes) for window in spec.windows])


def _mel(**changes: object) -> Callable[[FrontendSpec], FrontendSpec]:
    return lambda spec: spec.replace(mel=spec.mel.replace(**changes))


def _framing(**changes: object) -> Callable[[FrontendSpec], FrontendSpec]:
    return lambda spec: spec.replace(framing=spec.framing.replace(**changes))


def _power_as_magnitude(spec: FrontendSpec) -> FrontendSpec:
    return spec.replace(power=2, log=spec.log.replace(gain=10 / math.log(10), floor=spec.log.floor**2))


def _silent_filler(spec: FrontendSpec) -> FrontendSpec:
    return spec.replace(frames=spec.frames.replace(fill=0.0)) if spec.frames else spec


MISTAKES = (
    Mistake("efficientat", "periodic window", "windowed", _windows(periodic=True)),
    Mistake("efficientat", "triangles linear in Hz", "mel", _mel(linear_in="hz")),
    Mistake(
        "efficientat",
        "first sample kept",
        "preemphasis",
        lambda spec: spec.replace(preemphasis=Preemphasis(coefficient=0.97, edge="signal_keep")),
    ),
    Mistake("efficientat", "floor by max", "log", lambda spec: spec.replace(log=spec.log.replace(floor_mode="max"))),
    Mistake("efficientat", "f_max at Nyquist", "mel", _mel(f_max=16000.0)),
    Mistake("panns_32k", "symmetric window", "windowed", _windows(periodic=False)),
    Mistake("panns_32k", "zero edges", "padded", _framing(padding="zero")),
    Mistake("panns_32k", "HTK mel", "mel", _mel(scale="htk")),
    Mistake("panns_32k", "no area norm", "mel", _mel(area_norm=False)),
    Mistake("dcase_2023", "periodic Hamming", "windowed", _windows(periodic=True)),
    Mistake(
        "dcase_2023",
        "Hann",
        "windowed",
        lambda spec: spec.replace(windows=[Window(shape="hann", win_length=2048, periodic=False)]),
    ),
    Mistake("dcase_2023", "Slaney mel", "mel", _mel(scale="slaney")),
    Mistake("dcase_2023", "power with 10 log10", "spectrum", _power_as_magnitude),
    Mistake("dcase_2023", "no clamp", "clamp", lambda spec: spec.replace(clamp=None)),
    Mistake(
        "dcase_2023",
        "the range of 2024",
        "affine",
        lambda spec: spec.replace(affine=Affine(shift=-0.5, scale=0.5)),
    ),
    Mistake("cav_mae", "triangles linear in Hz", "mel", _mel(linear_in="hz")),
    Mistake("cav_mae", "periodic window", "windowed", _windows(periodic=True)),
    Mistake("cav_mae", "povey window", "windowed", _windows(shape="povey")),
    Mistake(
        "cav_mae",
        "pre-emphasis on the signal",
        "preemphasis",
        lambda spec: spec.replace(preemphasis=Preemphasis(coefficient=0.97, edge="signal_keep")),
    ),
    Mistake("cav_mae", "no frame DC removal", "frames", _framing(remove_dc=False)),
    Mistake("cav_mae", "filler at 0", "length", _silent_filler),
    Mistake("mrms", "symmetric windows", "windowed", _windows(periodic=False)),
    Mistake("mrms", "zero edges", "padded", _framing(padding="zero")),
    Mistake("mrms", "no lead zeros and no trim", "padded", _framing(lead=0, drop_first=0, drop_last=0)),
)
