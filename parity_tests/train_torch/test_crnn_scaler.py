"""Every mode of the published scaler that a front end can state, against what it returned."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models_zoo.errors import DataError
from models_zoo.scaling import dataset_means, scaling_affine
from models_zoo.specs import Statistics
from parity_tests.tolerances import GOLDEN_SCALER
from train_torch.frontend import _normalise


def drawn(seed, shape, factor, shift):
    return (factor * np.random.default_rng(seed).standard_normal(shape) + shift).astype(np.float32)


BATCHES = [drawn(201, (4, 128, 31), 10, -20), drawn(202, (2, 128, 31), 6, -30)]
APPLIED = drawn(203, (2, 128, 31), 8, -25)


@pytest.fixture(scope="module")
def goldens(contracts):
    with np.load(contracts / "dcase_crnn" / "golden_features.npz") as stored:
        return {key: stored[key] for key in stored if key.startswith("scaler_")}


@pytest.mark.contracts
@pytest.mark.parametrize("kind", ["mean", "standard"])
def test_statistics_of_a_data_set(goldens, kind):
    mean, square = dataset_means(BATCHES)
    name = f"scaler_dataset_{kind}_dims12"
    np.testing.assert_allclose([mean, square], [goldens[f"{name}_mean"].item(), goldens[f"{name}_meansq"].item()], 1e-6)
    affine = scaling_affine(mean, square, kind)
    scaled = (APPLIED + affine.shift) / affine.scale
    np.testing.assert_allclose(scaled[:, ::8, ::5], goldens[name], rtol=0, atol=GOLDEN_SCALER)


@pytest.mark.contracts
@pytest.mark.parametrize("kind", ["mean", "mean_std", "min_max"])
@pytest.mark.parametrize("over", ["mel_time", "time"])
def test_statistics_of_a_clip(goldens, kind, over):
    published = {"mean": "mean", "mean_std": "standard", "min_max": "minmax"}[kind]
    x = torch.from_numpy(APPLIED).transpose(1, 2)[:, None]
    scaled = _normalise(x, Statistics(kind=kind, over=over, ddof=1 if kind == "mean_std" else 0))[:, 0].transpose(1, 2)
    if kind == "min_max":
        scaled = 2 * scaled - 1
    expected = goldens[f"scaler_instance_{published}_dims{'12' if over == 'mel_time' else '2'}"]
    np.testing.assert_allclose(scaled[:, ::8, ::5].numpy(), expected, rtol=0, atol=GOLDEN_SCALER)


def test_impossible_statistics_are_refused():
    with pytest.raises(DataError, match="no batches"):
        dataset_means([])
    with pytest.raises(DataError, match="not finite"):
        dataset_means([np.full((1, 2, 3), np.nan)])
    with pytest.raises(DataError, match="mean_squared"):
        scaling_affine(3.0, 8.0, "standard")
