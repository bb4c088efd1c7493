"""Every PANNs architecture against what the published code answered, on weights that anyone can make again."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from parity_tests import panns_contract
from parity_tests.panns_contract import (
    VARIANTS,
    case_inputs,
    cases,
    contract_model,
    entry,
    learned_shapes,
    overridden,
    taps,
)
from parity_tests.tolerances import GOLDEN_PANNS, GOLDEN_PANNS_PROBABILITIES, GOLDEN_PANNS_STAGES
from train_torch.models import create_model

pytestmark = pytest.mark.contracts

RECORDED = [
    *("Cnn14", "Cnn14_16k", "Cnn14_8k", "Cnn14_DecisionLevelMax", "Cnn14_DecisionLevelAvg", "Cnn14_DecisionLevelAtt"),
    *("Wavegram_Cnn14", "Wavegram_Logmel_Cnn14", "Cnn10", "Cnn6", "ResNet38", "MobileNetV1", "MobileNetV2"),
    "Transfer_Cnn14",
]
"""Variants with recorded answers; those that share weights are neighbours."""

TAPS = ["Cnn14/real_33333", "Cnn10/real_33333", "Wavegram_Logmel_Cnn14/noise_b3_16300"]


@pytest.fixture(scope="module", autouse=True)
def _weights():
    yield
    panns_contract.forget_weights()


def test_no_published_variant_is_left_out(contracts):
    index = panns_contract._variants(contracts)
    assert set(VARIANTS) == set(index) - {"_note"}
    assert set(RECORDED) == {variant for variant in VARIANTS if cases(contracts, variant)}
    assert {name.split("/")[0] for name in taps(contracts)} <= set(RECORDED)


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_names_and_shapes(contracts, variant):
    name, options, _ = VARIANTS[variant]
    with torch.device("meta"):
        model = create_model(name, **options)
    found = [(key, list(value.shape)) for key, value in model.state_dict().items()]
    assert found == list(learned_shapes(contracts, variant).items())
    dtypes = {key: str(value.dtype).removeprefix("torch.") for key, value in model.state_dict().items()}
    assert {key: dtype for key, dtype in dtypes.items() if dtype != "float32"} == entry(contracts, variant)["dtypes"]
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert counted == entry(contracts, variant)["trainable_parameters"]


PARTS = {
    "logits": "fc_audioset",
    "transfer_logits": "fc_transfer",
    "att_logits": "att_block.att",
    "cla_logits": "att_block.cla",
}
"""What was recorded inside the published networks -> the part that returns it, where the names differ."""


@contextmanager
def listening(model, names):
    """Collect what the parts of ``model`` called ``names`` return; the input of one called ``x_input``."""
    parts = dict(model.named_modules())
    heard: dict[str, torch.Tensor] = {}

    def listen(name):
        place = PARTS.get(name, name.removesuffix("_input"))
        return parts.get(f"base.{place}", parts.get(place)).register_forward_hook(
            lambda _, given, returned: heard.update({name: given[0] if name.endswith("_input") else returned})
        )

    hooks = [listen(name) for name in names]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def answers(model, inputs):
    with torch.no_grad():
        return model(**{part.name: inputs[part.name] for part in model.inputs})


def published(outputs):
    """Return ``outputs`` of ours under the published names and with the published activations."""
    if "log_probabilities" in outputs:
        return {"clipwise_output": outputs["log_probabilities"], "embedding": outputs["embedding"]}
    named = {"logits": "clipwise_output", "frame_logits": "framewise_output"}
    named |= {"probabilities": "clipwise_output", "frame_probabilities": "framewise_output", "embedding": "embedding"}
    return {named[key]: value.sigmoid() if "logits" in key else value for key, value in outputs.items()}


@pytest.mark.slow
@pytest.mark.parametrize("variant", RECORDED)
def test_published_answers(contracts, variant):
    model = contract_model(contracts, variant)
    compared = 0
    for case in cases(contracts, variant):
        inputs = case_inputs(contracts, case)
        inside = [name for name in case["outputs"] if name.endswith("logits")]
        with overridden(model, case.get("overrides", {})), listening(model, inside) as heard:
            found = published(answers(model, inputs)) | heard
        with np.load(contracts / "panns" / case["file"]) as goldens:
            logits = f"{variant}/{case['case']}/logits"
            apart = np.abs(found["logits"].numpy() - goldens[logits]).max() if logits in goldens else 0.0
            for output, shape in case["outputs"].items():
                where = f"{variant}/{case['case']}/{output}"
                expected = goldens[where]
                assert list(expected.shape) == list(found[output].shape) == shape, where
                difference = np.abs(found[output].numpy() - expected).max()
                if output in ("clipwise_output", "framewise_output"):
                    # What the logits' difference, checked below, allows: a sigmoid's slope is at most a quarter.
                    assert difference <= max(GOLDEN_PANNS_PROBABILITIES, 0.25 * apart), where
                else:
                    assert difference / np.abs(expected).max() <= GOLDEN_PANNS, where
                compared += 1
    assert compared > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", TAPS)
def test_published_stages(contracts, name):
    """Statistics of every stage: names the first that departs."""
    variant, case_name = name.split("/")
    model = contract_model(contracts, variant)
    case = next(case for case in cases(contracts, variant) if case["case"] == case_name)
    inputs = case_inputs(contracts, case)
    stages = taps(contracts)[name]
    with listening(model, [stage for stage in stages if stage != "logmel_extractor"]) as heard:
        answers(model, inputs)
    heard["logmel_extractor"] = inputs["features"]
    for stage, (shape, *expected) in stages.items():
        value = heard[stage]
        assert list(value.shape) == shape, stage
        found = [value.mean(), value.std(), value.min(), value.max()]
        scale = max(map(abs, expected))
        for one, other in zip(found, expected, strict=True):
            assert abs(float(one) - other) / scale <= GOLDEN_PANNS_STAGES, stage
