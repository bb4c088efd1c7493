"""Stage 1: every implementation against what the published front ends returned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from infer_tf.frontend import TFFrontend
from models_zoo.filterbanks import mel_key, mel_matrix, mel_recipe, window_array, window_key, window_recipe
from models_zoo.presets import get_frontend, list_frontends
from models_zoo.reference import ReferenceFrontend
from models_zoo.specs import FrontendSpec
from parity_tests.feature_rule import compare_features
from parity_tests.frontend_goldens import GoldenCase, golden_cases
from parity_tests.make_tables import published_tables
from parity_tests.tolerances import GOLDEN_FEATURES, MEL_RECIPE, WINDOW_RECIPE
from train_torch.frontend import TorchFrontend

IMPLEMENTATIONS = {
    "ReferenceFrontend": lambda spec: ReferenceFrontend(spec, "float32"),
    "TorchFrontend": lambda spec: _torch(spec),
    "TFFrontend": lambda spec: TFFrontend(spec).features,
}


def _torch(spec: FrontendSpec):
    frontend = TorchFrontend(spec).eval()
    return lambda waveform: frontend(torch.from_numpy(waveform)).numpy()


@pytest.fixture(scope="module")
def cases(contracts: Path) -> list[GoldenCase]:
    return golden_cases(contracts)


@pytest.mark.contracts
@pytest.mark.parametrize("system", sorted(GOLDEN_FEATURES))
@pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS))
def test_reproduces_the_published_features(cases: list[GoldenCase], implementation: str, system: str) -> None:
    built, broken, compared = {}, [], 0
    for case in cases:
        if case.system != system:
            continue
        key = case.spec.to_json()
        if key not in built:
            built[key] = IMPLEMENTATIONS[implementation](case.spec)
        actual = case.select(built[key](case.waveform))
        difference = compare_features(case.spec, case.waveform, case.expected, actual, case.select)
        broken += [f"{case.name}: {part}" for part in difference.exceeds(GOLDEN_FEATURES[system])]
        compared += 1
    assert compared >= 8
    assert not broken, "\n".join(broken)


@pytest.mark.contracts
def test_the_rule_sees_a_wrong_window_in_every_system(cases: list[GoldenCase]) -> None:
    """The comparison itself has teeth: goldens fail with the other kind of window."""
    seen = set()
    for case in cases:
        window = case.spec.windows[0]
        wrong = case.spec.replace(windows=[w.replace(periodic=not window.periodic) for w in case.spec.windows])
        actual = case.select(ReferenceFrontend(wrong, "float32")(case.waveform))
        difference = compare_features(case.spec, case.waveform, case.expected, actual, case.select)
        if difference.exceeds(GOLDEN_FEATURES[case.system]):
            seen.add(case.system)
    assert seen == set(GOLDEN_FEATURES)


def test_shipped_tables_are_bit_equal_to_the_published_ones() -> None:
    windows, mels = published_tables()
    for name in list_frontends():
        spec = get_frontend(name)
        for window in spec.windows:
            np.testing.assert_array_equal(window_array(window), windows[window_key(window)], strict=True)
        key = mel_key(spec.mel, spec.framing.n_fft, spec.sample_rate)
        np.testing.assert_array_equal(
            mel_matrix(spec.mel, spec.framing.n_fft, spec.sample_rate), mels[key], strict=True
        )


@pytest.mark.parametrize("name", list_frontends())
def test_recipes_for_other_parameters_agree_with_the_published_tables(name: str) -> None:
    spec = get_frontend(name)
    for window in spec.windows:
        assert np.abs(window_recipe(window) - window_array(window)).max() <= WINDOW_RECIPE
    table = mel_matrix(spec.mel, spec.framing.n_fft, spec.sample_rate)
    recipe = mel_recipe(spec.mel, spec.framing.n_fft, spec.sample_rate)
    assert np.abs(recipe - table).max() <= MEL_RECIPE * table.max()


@pytest.mark.contracts
def test_tables_equal_the_ones_recorded_with_the_goldens(contracts: Path) -> None:
    efficientat = np.load(contracts / "efficientat" / "golden_frontend.npz")
    for n_mels, name in ((40, "efficientat_mels40"), (128, "efficientat"), (256, "efficientat_mels256")):
        spec = get_frontend(name)
        np.testing.assert_array_equal(mel_matrix(spec.mel, 1024, 32000).T, efficientat[f"mel_basis|{n_mels}"])
    panns = np.load(contracts / "panns" / "frontend.npz")
    for rate in ("32k", "16k", "8k"):
        spec = get_frontend(f"panns_{rate}")
        matrix = mel_matrix(spec.mel, spec.framing.n_fft, spec.sample_rate)
        np.testing.assert_array_equal(matrix, panns[f"melW_{rate}"])
    mrms = np.load(contracts / "mrms_mac" / "golden_frontend_parts.npz")
    spec = get_frontend("mrms")
    np.testing.assert_array_equal(mel_matrix(spec.mel, 2048, 16000), mrms["mel_fb"])
    for window in spec.windows:
        np.testing.assert_array_equal(window_array(window), mrms[f"window_{window.win_length}"])
