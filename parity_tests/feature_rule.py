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


@dataclass(frozen=True, eq=False)
class Levels:
    """How loud the bins of some features are.

    Attributes:
        level: dB below the largest mel value of the bin's clip, window and frame, <= 0; NaN in filled frames.
        above: 1 where the mel value is above the spec's floor, else 0; NaN in filled frames.
    """

    level: _Array
    above: _Array

    def map(self, change: Callable[[_Array], _Array]) -> Levels:
        """Return both arrays after ``change``."""
        return Levels(change(self.level), change(self.above))

    def with_filler(self, spec: FrontendSpec) -> Levels:
        """Return ``(batch, windows, T, n_mels)`` levels cut or filled to the frames of the spec."""
        if spec.frames is None:
            return self
        count = spec.frames.applied_to(self.level.shape[2])
        fill = ((0, 0), (0, 0), (0, max(0, count - self.level.shape[2])), (0, 0))
        return self.map(lambda array: np.pad(array[:, :, :count], fill, constant_values=np.nan))


def mel_levels(spec: FrontendSpec, waveform: _Array) -> Levels:
    """Return the levels of ``(batch, windows, T, n_mels)`` log-mel values, before frames are cut or filled.

    Taken from the float64 mel value without its floor: 20 log10 of magnitudes, 10 log10 of powers.
    """
    mel = ReferenceFrontend(spec, "float64").stages(waveform)["mel"]
    peak = mel.max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        level = (20.0 if spec.power == 1 else 10.0) * (np.log10(mel) - np.log10(peak))
    # A silent frame has no peak: all its bins count as peaks and must agree.
    level = np.where(peak > 0, level, 0.0)
    floor = spec.log.floor
    if spec.clamp is not None and spec.clamp.low is not None:
        floor = max(floor, float(np.exp(spec.clamp.low / spec.log.gain)))
    return Levels(level, (mel > floor).astype(np.float64))


def difference_by_level(expected: _Array, actual: _Array, levels: Levels) -> FeatureDifference:
    """Return how far ``actual`` is from ``expected``, all of one shape."""
    if not expected.shape == actual.shape == levels.level.shape:
        raise ValueError(
            f"expected {expected.shape}, actual {actual.shape}, levels {levels.level.shape}: shapes differ"
        )
    difference = np.abs(np.asarray(expected, np.float64) - np.asarray(actual, np.float64))
    filler = np.isnan(levels.level)

    def largest(mask: NDArray[np.bool_]) -> float:
        return float(difference[mask].max(initial=0.0))

    def average(mask: NDArray[np.bool_]) -> float:
        return float(difference[mask].mean()) if mask.any() else 0.0

    return FeatureDifference(
        within_60=largest(~filler & (levels.level >= -60)),
        within_100=largest(~filler & (levels.level >= -100)),
        mean=average(~filler & (levels.above > 0)),
        mean_60=average(~filler & (levels.level >= -60)),
        filler=largest(filler),
        finite=bool(np.isfinite(expected).all() and np.isfinite(actual).all()),
    )


def compare_features(
    spec: FrontendSpec,
    waveform: _Array,
    expected: _Array,
    actual: _Array,
    select: Callable[[_Array], _Array] = lambda features: features,
) -> FeatureDifference:
    """Return how far features are apart, in the spec's layout and output units.

    Args:
        spec: the front end.
        waveform: ``(batch, num_samples)`` both came from.
        expected, actual: features after ``select``.
        select: picks what ``expected`` holds out of whole features, for goldens that keep some frames only.
    """
    arrange = ReferenceFrontend(spec).arrange
    levels = mel_levels(spec, waveform).with_filler(spec).map(lambda array: select(arrange(array)))
    return difference_by_level(expected, actual, levels)
