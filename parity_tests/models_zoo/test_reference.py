"""The NumPy front end's own promises; its numbers are tested in parity_by_stage."""

from __future__ import annotations

import numpy as np
import pytest

from models_zoo.errors import SpecError
from models_zoo.presets import get_frontend
from models_zoo.reference import ReferenceFrontend


@pytest.mark.parametrize("dtype", ["float32", np.float32, np.dtype("float64"), "float64"])
def test_computes_in_the_dtype_asked_for(dtype) -> None:
    spec = get_frontend("mrms")
    features = ReferenceFrontend(spec, dtype)(np.random.default_rng(0).standard_normal((1, 4000)))
    assert features.dtype == np.dtype(dtype)
    assert features.flags.c_contiguous


@pytest.mark.parametrize("dtype", ["float16", "int32", "half-hearted", object])
def test_refuses_other_dtypes(dtype) -> None:
    with pytest.raises(SpecError, match="float64"):
        ReferenceFrontend(get_frontend("mrms"), dtype)


def test_leaves_its_input_alone() -> None:
    waveform = np.random.default_rng(0).standard_normal((2, 4000))
    before = waveform.copy()
    ReferenceFrontend(get_frontend("cav_mae"))(waveform)
    np.testing.assert_array_equal(waveform, before)
