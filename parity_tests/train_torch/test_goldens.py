"""Every architecture against what the published code answered, on weights anyone can make again."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from parity_tests.networks import CONTRACT_MODELS, contract_entry, contract_features, contract_state
from parity_tests.tolerances import GOLDEN_LOGITS, GOLDEN_STAGES
from train_torch.models import create_model

pytestmark = pytest.mark.contracts

OUTPUTS = {"logits": "logits", "logits_temperature30": "logits", "features": "embedding"}


def test_no_published_variant_is_left_out(contracts):
    assert set(CONTRACT_MODELS) == set(json.loads((contracts / "efficientat" / "keys.json").read_text())["variants"])


@pytest.mark.parametrize("variant", CONTRACT_MODELS)
def test_published_answers(contracts, variant):
    name, options = CONTRACT_MODELS[variant]
    entry = contract_entry(contracts, variant)
    model = create_model(name, **options).eval()
    assert [(key, list(value.shape)) for key, value in model.state_dict().items()] == list(entry["keys"].items())
    assert sum(parameter.numel() for parameter in model.parameters()) == entry["n_params"]
    state = contract_state(contracts, entry)
    model.load_state_dict(state, strict=True)

    family = "dymn" if variant.startswith("dymn") else "mn"
    with np.load(contracts / "efficientat" / f"golden_{family}.npz") as goldens:
        recorded = {tuple(key.split("|")[1:]): goldens[key] for key in goldens.files if key.split("|")[0] == variant}
    compared = 0
    answers: dict[tuple[str, bool], dict[str, torch.Tensor]] = {}
    for (case, what), expected in recorded.items():
        features = contract_features(contracts, case)
        if features.shape[1] != model.declared.n_mels:
            model = create_model(name, **options, n_mels=features.shape[1]).eval()
            model.load_state_dict(state, strict=True)
        if what in OUTPUTS:
            hot = what == "logits_temperature30"
            if (case, hot) not in answers:
                if family == "dymn":
                    model.set_temperature(30 if hot else 1)
                with torch.no_grad():
                    answers[case, hot] = model(features=features)
            actual = answers[case, hot][OUTPUTS[what]].numpy()
            assert actual.shape == expected.shape, (case, what)
            np.testing.assert_allclose(actual, expected, rtol=0, atol=GOLDEN_LOGITS, err_msg=f"{variant} {case} {what}")
            compared += 1
        elif what == "probe":
            _compare_stages(model, features, expected, recorded[case, "probe_shapes"])
            compared += 1
    assert compared == len(recorded) - sum(what == "probe_shapes" for _, what in recorded) > 0


def _compare_stages(model, features, expected, shapes):
    """Name the first stage that departs."""
    stages = model.features if hasattr(model, "features") else [model.in_c, *model.layers, model.out_c]
    assert len(stages) == len(expected) == 17
    x = features.unsqueeze(1)
    for index, stage in enumerate(stages):
        with torch.no_grad():
            x = stage(x)
        assert x.shape == tuple(shapes[index]), f"stage {index}"
        values = x.numpy().ravel()
        picked = values[np.linspace(0, values.size - 1, 32).astype(int)]
        np.testing.assert_allclose(picked, expected[index], rtol=0, atol=GOLDEN_STAGES, err_msg=f"stage {index}")
