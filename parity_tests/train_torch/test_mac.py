"""MAC: what the published code answered, and what the family promises beyond: options, ranks, lengths, errors."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.nn import functional

from models_zoo.cards import LengthPolicy
from models_zoo.errors import CardError, ClipLengthError, SpecError
from models_zoo.presets import get_frontend
from parity_tests.frontend_goldens import golden_cases
from parity_tests.networks import card_of, contract_state, lively, noise_features
from parity_tests.tolerances import GOLDEN_LOG_PROBABILITIES, GOLDEN_LOGITS, GOLDEN_MAC_SPEECH
from train_torch.checkpoint import load_checkpoint, save_checkpoint
from train_torch.frontend import TorchFrontend
from train_torch.models import check_card, create_from_card, create_model, new_card

VARIANTS = ("mac_avg", "mac_max")
FEATURES = noise_features(3, 101, 160, "mrms_mac")
SHAPES = ("b1_t160", "b3_t160", "b2_t96", "b1_t317", "b3_t33", "b1_t32", "b2_t640")
CLIPS = (
    "speech_16000", "speech_natural", "silence_16000", "impulse_16000", "noise_12345", "noise_16000", "noise_8000",
    "noise_24000",
)  # fmt: skip


def tiny(name="mac", **options):
    return lively(name, **{"width": 4, "num_classes": 5, **options})


def on_paper(name, **options):
    """Return a network without weights: shapes only."""
    with torch.device("meta"):
        return create_model(name, **options)


@pytest.fixture(scope="module")
def published(contracts):
    """The networks with the weights the goldens were recorded with, and the goldens."""
    keys = json.loads((contracts / "mrms_mac" / "keys.json").read_text())
    models = {}
    for variant in VARIANTS:
        models[variant] = create_model(variant).eval()
        described = {key: list(value.shape) for key, value in models[variant].state_dict().items()}
        assert list(described.items()) == list(keys[variant]["keys"].items())
        models[variant].load_state_dict(contract_state(contracts, keys[variant]), strict=True)
    return models, np.load(contracts / "mrms_mac" / "golden_mac.npz")


def answers(model, features):
    """Return what the goldens hold, by their names."""
    with torch.no_grad():
        outputs = model(features=features)
        logits = model.dense(outputs["embedding"])
    named = {"logprob": outputs["log_probabilities"], "logits": logits, "pooled": outputs["embedding"]}
    return {name: value.numpy() for name, value in named.items()}


def relative(actual, expected):
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.mark.contracts
@pytest.mark.parametrize("variant", VARIANTS)
def test_published_answers(published, variant):
    models, goldens = published
    shapes = {f"b{b}_t{t}": (int(b), 4, int(h), int(t)) for b, _, h, t in goldens["shapes"]}
    assert tuple(shapes) == SHAPES
    assert {key for key in goldens if key.startswith(variant)} == {
        f"{variant}_{case}_{what}"
        for case in (*SHAPES, *CLIPS)
        for what in ("logprob", "logits", "pooled")
        if case in SHAPES or what != "pooled"
    }, "a golden is left out"
    for (case, shape), seed in zip(shapes.items(), goldens["seeds"], strict=True):
        features = np.random.default_rng(int(seed)).standard_normal(shape).astype(np.float32)
        for what, actual in answers(models[variant], torch.from_numpy(features)).items():
            expected = goldens[f"{variant}_{case}_{what}"]
            if what == "logprob":
                np.testing.assert_allclose(actual, expected, rtol=0, atol=GOLDEN_LOG_PROBABILITIES, err_msg=case)
            else:
                assert relative(actual, expected) <= GOLDEN_LOGITS, (case, what)


@pytest.mark.contracts
@pytest.mark.parametrize("variant", VARIANTS)
def test_published_answers_to_recordings(published, variant, contracts):
    """From the published features where they were recorded whole, and from the waveform through our own front end."""
    models, goldens = published
    cases = {case.name.removeprefix("mrms-").removesuffix("_every8"): case for case in golden_cases(contracts)}
    frontend = TorchFrontend(get_frontend("mrms")).eval()
    whole = 0
    for clip in CLIPS:
        expected = goldens[f"{variant}_{clip}_logits"], goldens[f"{variant}_{clip}_logprob"]
        own = answers(models[variant], frontend(torch.from_numpy(cases[clip].waveform)))
        logits, log_probabilities = GOLDEN_LOGITS, GOLDEN_LOG_PROBABILITIES
        if clip.startswith("speech"):
            logits, log_probabilities = GOLDEN_MAC_SPEECH[variant]
        assert relative(own["logits"], expected[0]) <= logits, clip
        np.testing.assert_allclose(own["logprob"], expected[1], rtol=0, atol=log_probabilities, err_msg=clip)
        if not cases[clip].name.endswith("_every8"):
            theirs = answers(models[variant], torch.from_numpy(cases[clip].expected))
            assert relative(theirs["logits"], expected[0]) <= GOLDEN_LOGITS, clip
            np.testing.assert_allclose(theirs["logprob"], expected[1], rtol=0, atol=GOLDEN_LOG_PROBABILITIES)
            whole += 1
    assert whole == 5


@pytest.mark.contracts
def test_the_goldens_tell_the_variants_apart(published):
    """A state_dict cannot; the answers must."""
    models, goldens = published
    swapped = create_model("mac_max").eval()
    swapped.load_state_dict(models["mac_avg"].state_dict(), strict=True)
    features = np.random.default_rng(101).standard_normal((1, 4, 160, 160)).astype(np.float32)
    logits = answers(swapped, torch.from_numpy(features))["logits"]
    assert relative(logits, goldens["mac_avg_b1_t160_logits"]) > 0.1


def test_published_sizes():
    model = on_paper("mac_max")
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_539_918
    assert [(part.name, part.axes) for part in model.inputs] == [("features", ("batch", "4", "160", "time"))]
    assert [(part.name, part.kind, part.axes) for part in model.outputs] == [
        ("log_probabilities", "log_probability", ("batch", "30")),
        ("embedding", None, ("batch", "384")),
    ]
    assert model.class_keys == ("dense.4.weight", "dense.4.bias")


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_both_kinds_of_pools_follow_the_option(pooling):
    """Recomputed from the definition: four pools of two by two, then one over everything, all of the same kind."""
    model = tiny(pooling=pooling)
    pool = {"avg": functional.avg_pool2d, "max": functional.max_pool2d}[pooling]
    with torch.no_grad():
        x = model.initialize(FEATURES)
        assert x.shape[2:] == (80, 50), "half of both, rounded down"
        for stage in (model.lg_0, model.lg_1, model.lg_2, model.lg_3):
            x = pool(stage(x), 2)
        x = model.finalize(model.lg_4(x))
        assert x.shape[2:] == (5, 3)
        expected = pool(x, x.shape[2:]).flatten(1)
        torch.testing.assert_close(model(features=FEATURES)["embedding"], expected)


@pytest.mark.parametrize("num_classes", [1, 2, 7])
@pytest.mark.parametrize("batch", [1, 3])
def test_ranks_are_stable(num_classes, batch):
    outputs = tiny(num_classes=num_classes)(features=FEATURES[:batch])
    assert list(outputs) == ["log_probabilities", "embedding"]
    assert outputs["log_probabilities"].shape == (batch, num_classes)
    torch.testing.assert_close(outputs["log_probabilities"].exp().sum(1), torch.ones(batch))


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_a_clip_does_not_depend_on_its_batch(pooling):
    model = tiny(pooling=pooling)
    with torch.no_grad():
        together = model(features=FEATURES)["log_probabilities"]
        alone = torch.cat([model(features=FEATURES[i : i + 1])["log_probabilities"] for i in range(3)])
    assert together.std() > 0.05
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


def test_no_classes_means_the_embedding_alone():
    model = tiny(num_classes=0)
    assert list(model(features=FEATURES)) == [part.name for part in model.outputs] == ["embedding"]
    assert not any(key.startswith("dense") for key in model.state_dict())


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_probabilities_are_one_in_sum_under_autocast(precision):
    model = tiny().eval()
    model.dense[-1].weight.data *= 30
    with torch.no_grad(), torch.autocast("cpu", precision):
        answer = model(features=FEATURES)["log_probabilities"]
    assert answer.dtype == torch.float32
    torch.testing.assert_close(answer.exp().sum(dim=1), torch.ones(len(answer)), atol=1e-5, rtol=0)


def test_gradients_reach_every_parameter():
    model = tiny().train()
    model(features=FEATURES)["log_probabilities"].square().sum().backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize(
    ("shape", "field"),
    [((1, 160, 50), "layout"), ((1, 1, 160, 50), "windows"), ((1, 4, 128, 50), "mel.n_mels")],
)
def test_features_that_do_not_fit_are_refused(shape, field):
    with pytest.raises(SpecError, match=r"expected|built for") as caught:
        tiny()(features=torch.zeros(shape))
    assert caught.value.field == field


def test_too_few_frames_are_refused():
    assert torch.isfinite(tiny()(features=FEATURES[..., :32])["log_probabilities"]).all()
    with pytest.raises(ClipLengthError, match="31 frames") as caught:
        tiny()(features=FEATURES[..., :31])
    assert caught.value.code == "too_short"


def test_the_card_says_the_shortest_clip():
    card = card_of(on_paper("mac_avg", num_classes=3), "mac_avg")
    assert (card.system, card.min_samples, card.clip_output().name) == ("mrms_mac", 3200, "log_probabilities")
    with pytest.raises(CardError, match="answer to fewer") as caught:
        check_card(on_paper("mac_avg", num_classes=3), card.replace(length_policy={"min": 3199}))
    assert caught.value.field == "length_policy.min"
    filled = card_of(on_paper("mac_avg", num_classes=3), "mac_avg", length_policy=LengthPolicy(short="zero"))
    assert filled.length_policy == LengthPolicy(min=3200, short="zero")


def test_the_card_must_state_the_pooling():
    """No file tells the variants apart: only the card can."""
    model = tiny("mac_max")
    card = card_of(model, "mac_max")
    assert card.options["pooling"] == "max"
    silent = {key: value for key, value in card.options.items() if key != "pooling"}
    with pytest.raises(CardError, match="as it was trained") as caught:
        create_from_card(card.replace(options=silent))
    assert caught.value.field == "options.pooling"
    with pytest.raises(CardError, match="choose 'mac'") as caught:
        check_card(model, card.replace(architecture="mac_avg"))
    assert caught.value.field == "pooling"
    with pytest.raises(CardError, match="options"):
        check_card(model, card.replace(architecture="mac", options={**card.options, "pooling": "avg"}))


def test_a_checkpoint_keeps_its_variant(tmp_path):
    """The same weights as either variant: each file answers as its card says."""
    expected = {}
    for variant in VARIANTS:
        model = tiny(variant)
        model.load_state_dict(tiny("mac_avg").state_dict(), strict=True)
        save_checkpoint(tmp_path / f"{variant}.safetensors", model, card_of(model, variant))
        with torch.no_grad():
            expected[variant] = model(features=FEATURES)["log_probabilities"]
    assert (expected["mac_avg"] - expected["mac_max"]).abs().max() > 0.01
    for variant in VARIANTS:
        loaded = load_checkpoint(tmp_path / f"{variant}.safetensors")
        assert loaded.model.options["pooling"] == loaded.card.options["pooling"] == variant.removeprefix("mac_")
        with torch.no_grad():
            torch.testing.assert_close(loaded.model(features=FEATURES)["log_probabilities"], expected[variant])


def test_another_class_count_replaces_the_last_layer_alone(tmp_path):
    model = tiny()
    save_checkpoint(tmp_path / "five.safetensors", model, card_of(model, "mac"))
    loaded = load_checkpoint(tmp_path / "five.safetensors", num_classes=3)
    assert loaded.replaced == ("dense.4.weight", "dense.4.bias")


@pytest.mark.parametrize("task", ["multi_label", "event_detection"])
def test_classes_that_exclude_each_other_serve_no_other_task(task):
    with pytest.raises(CardError, match="sum to one") as caught:
        card_of(on_paper("mac_avg", num_classes=3), "mac_avg", task=task)
    assert caught.value.field == "task"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"windows": get_frontend("mrms").windows[:2]}, "frontend.windows"),
        ({"mel": get_frontend("mrms").mel.replace(n_mels=128)}, "frontend.mel.n_mels"),
    ],
)
def test_a_front_end_that_does_not_fit_is_refused(changes, field):
    frontend = get_frontend("mrms").replace(affine=None).replace(**changes)
    with pytest.raises(CardError) as caught:
        new_card(
            "x", "mac", model=on_paper("mac", num_classes=2), frontend=frontend, task="single_label", labels=["a", "b"]
        )
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"pooling": "mean"}, "pooling"),
        ({"n_mels": 31}, "n_mels"),
        ({"num_classes": -1}, "num_classes"),
        ({"width": 0}, "width"),
        ({"num_windows": 0}, "num_windows"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_bad_options_name_the_field(options, field):
    with pytest.raises(CardError) as caught:
        create_model("mac", **options)
    assert caught.value.field == field
