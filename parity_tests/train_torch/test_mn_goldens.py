"""The mn family against what the published code answered, on weights anyone can make again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from parity_tests.networks import CONTRACT_MODELS, contract_entry, contract_features, contract_state
from parity_tests.tolerances import LOGITS
from train_torch.models import create_model

pytestmark = pytest.mark.contracts

OUTPUTS = {"logits": "logits", "features": "embedding"}


@pytest.mark.parametrize("variant", CONTRACT_MODELS)
def test_published_answers(contracts, variant):
    name, options = CONTRACT_MODELS[variant]
    entry = contract_entry(contracts, variant)
    model = create_model(name, **options).eval()
    assert [(key, list(value.shape)) for key, value in model.state_dict().items()] == list(entry["keys"].items())
    assert sum(parameter.numel() for parameter in model.parameters()) == entry["n_params"]
    state = contract_state(contracts, entry)
    model.load_state_dict(state, strict=True)

    with np.load(contracts / "efficientat" / "golden_mn.npz") as goldens:
        recorded = {tuple(key.split("|")[1:]): goldens[key] for key in goldens.files if key.split("|")[0] == variant}
    compared = 0
    answers: dict[str, dict[str, torch.Tensor]] = {}
    for (case, what), expected in recorded.items():
        features = contract_features(contracts, case)
        if features.shape[1] != model.declared.n_mels:
            model = create_model(name, **options, n_mels=features.shape[1]).eval()
            model.load_state_dict(state, strict=True)
        if what in OUTPUTS:
            if case not in answers:
                with torch.no_grad():
                    answers[case] = model(features=features)
            actual = answers[case][OUTPUTS[what]].numpy()
            assert actual.shape == expected.shape, (case, what)
            np.testing.assert_allclose(actual, expected, rtol=0, atol=LOGITS, err_msg=f"{variant} {case} {what}")
            compared += 1
        elif what == "probe":
            _compare_stages(model, features, expected, recorded[case, "probe_shapes"])
            compared += 1
    assert compared == len(recorded) - sum(what == "probe_shapes" for _, what in recorded) > 0


def _compare_stages(model, features, expected, shapes):
    """Name the first stage that departs."""
    assert len(model.features) == len(expected) == 17
    x = features.unsqueeze(1)
    for index, layer in enumerate(model.features):
        with torch.no_grad():
            x = layer(x)
        assert x.shape == tuple(shapes[index]), f"features.{index}"
        values = x.numpy().ravel()
        picked = values[np.linspace(0, values.size - 1, 32).astype(int)]
        np.testing.assert_allclose(picked, expected[index], rtol=0, atol=LOGITS, err_msg=f"features.{index}")
