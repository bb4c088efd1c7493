"""The feature rule: how two sets of log-mel features are compared (DESIGN.md section 4)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models_zoo.reference import ReferenceFrontend
from models_zoo.specs import FrontendSpec
from parity_tests.tolerances import FILLER, FeatureLimit

_Array = NDArray[np.floating[Any]]

PARTS = ("within_60", "within_100", "mean", "mean_60")


@dataclass(frozen=True)
class FeatureDifference:
    """How far two feature arrays are apart, in the spec's output units.

    Attributes:
        within_60: largest difference on bins within 60 dB of the largest mel value of their frame.
        within_100: the same within 100 dB.
        mean: mean difference over bins above the floor, filler excluded.
        mean_60: mean difference over bins within 60 dB.
        filler: largest difference on filled frames, 0 where there are none.
        finite: both arrays are finite everywhere.
    """

    within_60: float
    within_100: float
    mean: float
    mean_60: float
    filler: float
    finite: bool

    def of_limit(self, limit: FeatureLimit) -> dict[str, float]:
        """Return part -> measured / allowed; more than 1 is broken, infinite where a value is not finite."""
        if not self.finite:
            return {"finite": math.inf}
        ratios = {name: getattr(self, name) / getattr(limit, name) for name in PARTS}
        return {**ratios, "filler": self.filler / FILLER}

    def exceeds(self, limit: FeatureLimit) -> list[str]:
        """Return the parts of ``limit`` that are broken, in words."""
        return [f"{part} {getattr(self, part)}" for part, ratio in self.of_limit(limit).items() if not ratio <= 1]


def mel_levels(spec: FrontendSpec, waveform: _Array) -> tuple[_Array, _Array]:
    """Return (level, above) of every output bin, in the spec's layout.

    Level is the float64 mel value in dB below the largest of its clip, window and frame (20 log10 of magnitude, 10
    log10 of power), <= 0, NaN in filled frames. ``above`` is true where the mel value is above the spec's floor.
    """
    reference = ReferenceFrontend(spec, "float64")
    mel = reference.stages(waveform)["mel"]  # (batch, windows, T, n_mels)
    decibel = 20.0 if spec.power == 1 else 10.0
    with np.errstate(divide="ignore", invalid="ignore"):
        level = decibel * (np.log10(mel) - np.log10(mel.max(axis=-1, keepdims=True)))
    # A silent frame has no peak: all its bins count as peaks and must agree.
    level = np.where(mel.max(axis=-1, keepdims=True) > 0, level, 0.0)
    floor = spec.log.floor
    if spec.clamp is not None and spec.clamp.low is not None:
        floor = max(floor, float(np.exp(spec.clamp.low / spec.log.gain)))
    above = (mel > floor).astype(np.float64)
    if spec.frames is not None:
        count = spec.frames.applied_to(mel.shape[2])
        level, above = (_fixed(array, count) for array in (level, above))
    return reference.arrange(level), reference.arrange(above)


def _fixed(array: _Array, count: int) -> _Array:
    array = array[:, :, :count]
    return np.pad(array, ((0, 0), (0, 0), (0, count - array.shape[2]), (0, 0)), constant_values=np.nan)


def compare_features(
    spec: FrontendSpec,
    waveform: _Array,
    expected: _Array,
    actual: _Array,
    select: Callable[[_Array], _Array] = lambda features: features,
) -> FeatureDifference:
    """Return how far ``actual`` is from ``expected``.

    Args:
        spec: the front end.
        waveform: ``(batch, num_samples)`` both came from.
        expected, actual: features after ``select``.
        select: picks what ``expected`` holds out of whole features, for goldens that keep some frames only.
    """
    level, above = (select(array) for array in mel_levels(spec, waveform))
    if not expected.shape == actual.shape == level.shape:
        raise ValueError(f"shapes differ: expected {expected.shape}, actual {actual.shape}, levels {level.shape}")
    difference = np.abs(np.asarray(expected, np.float64) - np.asarray(actual, np.float64))
    filler = np.isnan(level)

    def largest(mask: NDArray[np.bool_]) -> float:
        return float(difference[mask].max(initial=0.0))

    def average(mask: NDArray[np.bool_]) -> float:
        return float(difference[mask].mean()) if mask.any() else 0.0

    return FeatureDifference(
        within_60=largest(~filler & (level >= -60)),
        within_100=largest(~filler & (level >= -100)),
        mean=average(~filler & (above > 0)),
        mean_60=average(~filler & (level >= -60)),
        filler=largest(filler),
        finite=bool(np.isfinite(expected).all() and np.isfinite(actual).all()),
    )
