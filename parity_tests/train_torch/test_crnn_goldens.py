"""Every CRNN variant against what the published code answered, on weights that anyone can make again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models_zoo.presets import get_frontend
from parity_tests.crnn_contract import VARIANTS, case_inputs, cases, contract_model, keys, published_shapes
from parity_tests.frontend_goldens import golden_cases
from parity_tests.tolerances import GOLDEN_CRNN
from train_torch.frontend import TorchFrontend
from train_torch.models import create_model

pytestmark = pytest.mark.contracts


def test_no_published_variant_or_case_is_left_out(contracts):
    described = keys(contracts)
    assert set(VARIANTS) == set(described["variants"])
    assert {case["variant"] for case in cases(contracts)} == set(VARIANTS)
    assert len(cases(contracts)) == 43


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_names_and_shapes(contracts, variant):
    name, options = VARIANTS[variant]
    with torch.device("meta"):
        model = create_model(name, **options)
    found = [(key, list(value.shape)) for key, value in model.state_dict().items()]
    assert found == list(published_shapes(contracts, variant).items())
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert counted == keys(contracts)["variants"][variant]["parameters"]


def stages_and_answers(model, inputs, stages):
    """Return what the parts of ``model`` called ``stages`` return, and its outputs, by name."""
    heard = {}

    def listen(stage):
        return model.get_submodule(stage).register_forward_hook(lambda _, __, returned: heard.update({stage: returned}))

    hooks = [listen(stage) for stage in stages]
    with torch.no_grad():
        answers = model(**inputs)
    for hook in hooks:
        hook.remove()
    assert set(heard) == set(stages)
    return {**heard, **answers}


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_answers(contracts, variant):
    """Also the stages inside, where they were recorded: names the first that departs."""
    model = contract_model(contracts, variant)
    for case in cases(contracts, variant):
        answers = stages_and_answers(
            model, case_inputs(case, model.options["num_classes"]), case.get("intermediate", ())
        )
        with np.load(contracts / "dcase_crnn" / case["file"]) as goldens:
            for what, value in answers.items():
                expected = goldens[f"{case['id']}_{what}"]
                assert value.shape == expected.shape, (case["id"], what)
                np.testing.assert_allclose(
                    value.numpy(), expected, rtol=0, atol=GOLDEN_CRNN, err_msg=f"case {case['id']}: {what}"
                )


@pytest.mark.parametrize(("scaler", "preset"), [("e2e01", "dcase_2023"), ("e2e11", "dcase_2024")])
def test_published_answers_from_the_waveform(contracts, scaler, preset):
    """The scaler's two ranges, through our own front end."""
    model = contract_model(contracts, "crnn_2023")
    waveforms = {case.name.removeprefix(f"{preset}-"): case.waveform for case in golden_cases(contracts)}
    frontend = TorchFrontend(get_frontend(preset)).eval()
    with np.load(contracts / "dcase_crnn" / "golden_features.npz") as goldens:
        clips = {key.split("_", 1)[1].rpartition("_")[0] for key in goldens if key.startswith(scaler)}
        assert clips == {"clip", "clip_padded_10s", "noise_odd", "silence", "speech"}
        for clip in clips:
            with torch.no_grad():
                answers = model(features=frontend(torch.from_numpy(waveforms[clip])))
            for what, value in answers.items():
                expected = goldens[f"{scaler}_{clip}_{what}"]
                np.testing.assert_allclose(value.numpy(), expected, rtol=0, atol=GOLDEN_CRNN, err_msg=f"{clip}: {what}")


def test_the_wrong_range_answers_otherwise(contracts):
    """Why the range belongs to the card: nothing else tells."""
    model = contract_model(contracts, "crnn_2023")
    waveform = next(case.waveform for case in golden_cases(contracts) if case.name == "dcase_2023-clip")
    with torch.no_grad():
        strong = [
            model(features=TorchFrontend(get_frontend(preset)).eval()(torch.from_numpy(waveform)))["strong"]
            for preset in ("dcase_2023", "dcase_2024")
        ]
    assert (strong[0] - strong[1]).abs().max() > 0.05
