"""Scaling by the statistics of a data set, as the DCASE baselines can: fitted once, then an affine of the front end.

Source: DCASE-REPO/DESED_task ``desed_task/utils/scaler.py``, statistic ``dataset`` over mel and time. The published
``minmax`` of a data set was never written, and one value per mel band is nothing an :class:`Affine` says.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from models_zoo.errors import DataError
from models_zoo.specs import Affine

__all__ = ["dataset_means", "scaling_affine"]

_EPS = 1e-8


def dataset_means(batches: Iterable[NDArray[Any]]) -> tuple[float, float]:
    """Return the mean of a data set's features, and that of their squares.

    As published, batches weigh equally whatever their size.

    Args:
        batches: ``(batch, n_mels, time)`` each, before any scaling.

    Raises:
        DataError: no batches, or values that are not finite.
    """
    means = [(np.mean(batch, dtype=np.float64), np.mean(np.square(batch, dtype=np.float64))) for batch in batches]
    if not means:
        raise DataError("no batches to take the statistics of; give at least one")
    mean, square = (float(value) for value in np.mean(means, axis=0))
    if not math.isfinite(mean) or not math.isfinite(square):
        raise DataError("features that are not finite have no mean; look for NaN in the recordings")
    return mean, square


def scaling_affine(mean: float, mean_squared: float, kind: Literal["mean", "standard"]) -> Affine:
    """Return the affine that scales by a data set's means.

    Args:
        mean, mean_squared: see :func:`dataset_means`.
        kind: x - M (``mean``), or (x - M) / (sqrt(Q - M^2) + 1e-8) (``standard``).

    Raises:
        DataError: means of squares below the square of the mean, which no data set has.
    """
    if mean_squared < mean**2:
        raise DataError(f"mean_squared: got {mean_squared}; expected at least the mean squared, {mean**2}")
    return Affine(shift=-mean, scale=1.0 if kind == "mean" else math.sqrt(mean_squared - mean**2) + _EPS)
