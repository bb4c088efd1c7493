"""How much energy a training run takes, through codecarbon; nothing leaves the machine."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from models_zoo.errors import MissingDependencyError

__all__ = ["Energy", "measured_energy"]


@dataclass
class Energy:
    """What was measured.

    Attributes:
        kwh: of processor, memory and accelerator; nan until the end.
    """

    kwh: float = math.nan


@contextmanager
def measured_energy(country: str) -> Iterator[Energy]:
    """Measure what happens inside; where the processor has no counter, codecarbon estimates it from its model.

    Args:
        country: ISO code of three letters, e.g. ``FRA``, of whose power the emissions would be.

    Raises:
        MissingDependencyError: the extra ``energy`` is not installed.

    Source: the DCASE baselines report energy in this way, training and test apart.
    """
    try:
        from codecarbon import OfflineEmissionsTracker
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "the energy of a run is measured by codecarbon, which is not installed; say pip install "
            "'crossfade[energy]' (from a checkout: pip install -e '.[energy]')"
        ) from error
    used = Energy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it looks for on this machine and does not find
        tracker: Any = OfflineEmissionsTracker(country_iso_code=country, save_to_file=False, log_level="error")
        tracker.start()
    try:
        yield used
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tracker.stop()
        used.kwh = float(tracker.final_emissions_data.energy_consumed)
