"""Learning rates by epoch and by depth, frozen parts, and the temperature of dynamic convolutions."""

import math

import pytest
import torch
from torch import nn

from models_zoo.errors import SpecError
from parity_tests.networks import card_of
from train_torch.classifier import Classifier
from train_torch.models import create_model, list_architectures
from train_torch.optim import (
    check_layer_decay,
    check_temperature,
    configure,
    factor_at,
    freeze,
    layers_of,
    published_factor,
)
from train_torch.recipes import Recipe, TemperatureSchedule, get_recipe

AUDIOSET = get_recipe("audioset")
FINE_TUNING = get_recipe("finetune_esc50")


# The learning rate


def published(epoch, *, warmup, start, length, last):
    """The factor as FACTS section 5 words it."""
    rise = math.exp(-5 * (1 - max(epoch, 0.5) / warmup) ** 2) if epoch < warmup else 1
    if epoch <= start:
        return rise
    if epoch < start + length:
        return rise * (last + (1 - last) * (length - epoch + start) / length)
    return rise * last


@pytest.mark.parametrize(
    ("recipe", "numbers"),
    [
        (AUDIOSET, {"warmup": 8, "start": 80, "length": 95, "last": 0.01}),
        (FINE_TUNING, {"warmup": 10, "start": 10, "length": 65, "last": 0.01}),
        (FINE_TUNING.replace(warmup_epochs=20), {"warmup": 20, "start": 10, "length": 65, "last": 0.01}),
        (FINE_TUNING.replace(warmup_epochs=0), {"warmup": 0, "start": 10, "length": 65, "last": 0.01}),
    ],
    ids=["audioset", "fine-tuning", "rise and fall overlap", "no warm-up"],
)
def test_published_schedule_in_every_epoch(recipe, numbers):
    for epoch in range(200):
        assert published_factor(epoch, recipe) == pytest.approx(published(epoch, **numbers), rel=1e-12), epoch


def test_published_schedule_at_known_points():
    audioset = {0: 0.012345, 1: 0.021750, 4: 0.286505, 7: 0.924849, 8: 1, 80: 1, 81: 0.989579, 127: 0.510211, 175: 0.01}
    for epoch, factor in {**audioset, 199: 0.01}.items():
        assert published_factor(epoch, AUDIOSET) == pytest.approx(factor, abs=1e-6), epoch
    for epoch, factor in {
        0: 0.010971,
        5: 0.286505,
        9: 0.951229,
        10: 1,
        11: 0.984769,
        42: 0.512615,
        75: 0.01,
        79: 0.01,
    }.items():
        assert published_factor(epoch, FINE_TUNING) == pytest.approx(factor, abs=1e-6), epoch


def test_published_schedule_is_constant_within_an_epoch():
    for steps in (1, 3, 7):
        total = FINE_TUNING.epochs * steps
        for epoch in (0, 1, 9, 10, 30, 79):
            factors = {factor_at(epoch * steps + step, FINE_TUNING, total) for step in range(steps)}
            assert factors == {published_factor(epoch, FINE_TUNING)}


def test_the_cosine_is_what_it_was():
    recipe = Recipe(epochs=10, warmup_epochs=2, final_lr=0.01)
    assert factor_at(0, recipe, 100) == pytest.approx(1 / 21)
    assert factor_at(19, recipe, 100) == pytest.approx(20 / 21)
    assert factor_at(20, recipe, 100) == 1
    assert factor_at(60, recipe, 100) == pytest.approx(0.505)
    assert factor_at(100, recipe, 100) == pytest.approx(0.01)


@pytest.mark.parametrize("layer_decay", [None, 0.7])
def test_the_optimiser_follows_the_schedule(layer_decay):
    recipe = FINE_TUNING.replace(layer_decay=layer_decay)
    model = create_model("mn01", num_classes=2)
    made = configure(model, recipe, total_steps=160)
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    assert made["lr_scheduler"]["interval"] == "step"
    bases = [group["initial_lr"] for group in optimizer.param_groups]
    for step in range(30):
        for group, base in zip(optimizer.param_groups, bases, strict=True):
            assert group["lr"] == pytest.approx(base * published_factor(step // 2, recipe))
        optimizer.step()
        schedule.step()


# Layers


def test_layers_are_in_the_order_they_are_computed_in():
    assert layers_of(create_model("mn01")) == [f"features.{i}" for i in range(17)] + ["classifier"]
    assert layers_of(create_model("dymn", width=0.1)) == [
        "in_c", *(f"layers.{i}" for i in range(15)), "out_c", "classifier"
    ]  # fmt: skip
    assert layers_of(create_model("mn01", num_classes=0))[-1] == "features.16"


@pytest.mark.parametrize(("name", "options"), [("mn01", {}), ("dymn", {"width": 0.1})])
def test_layer_order_is_the_order_of_the_forward_pass(name, options):
    """Whatever ``layers_of`` says, the network is asked: each layer's first call comes after the one before it."""
    model, called = create_model(name, num_classes=2, **options).eval(), []
    for layer in layers_of(model):
        model.get_submodule(layer).register_forward_pre_hook(lambda *_, layer=layer: called.append(layer))
    model(features=torch.zeros(2, 128, 64))
    assert called == layers_of(model)


@pytest.mark.parametrize(("name", "options"), [("mn01", {}), ("dymn", {"width": 0.1})])
def test_learning_rates_fall_from_the_head_to_the_stem(name, options):
    model = create_model(name, num_classes=2, **options)
    groups = configure(model, Recipe(lr=1e-3, layer_decay=0.8), 10)["optimizer"].param_groups
    rates = {id(parameter): group["initial_lr"] for group in groups for parameter in group["params"]}
    assert len(rates) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    layers = layers_of(model)
    for key, parameter in model.named_parameters():
        depth = next(i for i, layer in enumerate(layers) if key.startswith(layer + "."))
        assert rates[id(parameter)] == pytest.approx(1e-3 * 0.8 ** (len(layers) - 1 - depth), rel=1e-12), key
    assert groups[0]["initial_lr"] == 1e-3, "metrics.csv reports the first group's rate"


def test_learning_rates_by_depth_reach_everything():
    recipe, towers = Recipe(layer_decay=0.8), {"cavmae", "cavmaeft", "cavmaeft_audio"}
    for name in sorted({*list_architectures()} - towers):
        with torch.device("meta"):
            model = create_model(name)
        check_layer_decay(model, recipe)
        groups = configure(model, recipe, 10)["optimizer"].param_groups
        reached = {id(parameter) for group in groups for parameter in group["params"]}
        assert reached == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}, name


def test_a_parameter_in_no_layer_is_refused_by_name():
    model = create_model("mn01", num_classes=2)
    model.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(SpecError, match="scale and 0 more belong to no layer") as refused:
        Classifier(model, card_of(model, "mn01"), Recipe(layer_decay=0.8))
    assert refused.value.field == "layer_decay"
    Classifier(model, card_of(model, "mn01"), Recipe())


def test_one_rate_without_layer_decay():
    model = create_model("mn01", num_classes=2)
    (group,) = configure(model, Recipe(lr=1e-3), 10)["optimizer"].param_groups
    assert all(a is b for a, b in zip(group["params"], model.parameters(), strict=True))


# Freezing


def tuned(model, **fields):
    recipe = Recipe(task="single_label", batch_size=2, lr=0.05, bn_momentum=0.5, **fields)
    return Classifier(model, card_of(model, "mn01"), recipe)


def steps(classifier, count=3):
    """Train on noise; return the optimiser."""
    optimizer = configure(classifier.model, classifier.recipe, 10)["optimizer"]
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        logits = classifier.logits(torch.randn(4, 6400, generator=generator) * 0.1)
        nn.functional.cross_entropy(logits, torch.tensor([0, 1, 0, 1])).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def test_what_is_frozen_stays_as_it_is_and_the_rest_moves():
    model = create_model("mn01", num_classes=2)
    classifier = tuned(model, freeze=("features.0", "features.1.", "features.16.1.running_mean")).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    classifier.eval()
    classifier.train()
    optimizer = steps(classifier)
    frozen = {key for key in before if key.startswith(("features.0.", "features.1."))}
    assert any("running_var" in key for key in frozen)
    for key, value in model.state_dict().items():
        if key in frozen or key == "features.16.1.running_mean":
            assert torch.equal(value, before[key]), key
        elif not key.startswith("features.16.1."):
            assert not torch.equal(value, before[key]), key
    assert not torch.equal(
        model.state_dict()["features.10.block.0.1.running_mean"], before["features.10.block.0.1.running_mean"]
    )
    held = {id(parameter) for parameter in optimizer.state}
    for key, parameter in model.named_parameters():
        assert (id(parameter) in held) == (key not in frozen), key


def test_nothing_is_frozen_by_default():
    model = create_model("mn01", num_classes=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    steps(tuned(model).train())
    same = [key for key, value in model.state_dict().items() if torch.equal(value, before[key])]
    assert same == []


def test_frozen_norms_use_their_statistics_in_training():
    model = create_model("mn01", num_classes=2)
    classifier = tuned(model, freeze=("features",)).train()
    clips = torch.randn(4, 6400, generator=torch.Generator().manual_seed(1)) * 0.1
    embedding = classifier.outputs(clips)[1]
    assert torch.allclose(embedding[:2], classifier.outputs(clips[:2])[1], atol=1e-5), "another batch, another answer"
    assert model.classifier.training
    assert not model.features[3].block[0][1].training


def test_layer_decay_leaves_frozen_layers_out():
    model = create_model("mn01", num_classes=2)
    freeze(model, ["features.0", "features.1"])
    groups = configure(model, Recipe(lr=1.0, layer_decay=0.5), 10)["optimizer"].param_groups
    assert len(groups) == 16
    assert groups[-1]["initial_lr"] == 0.5**15


@pytest.mark.parametrize("prefix", ["features.17", "feature", "classifier.5.weight.x", ""])
def test_a_prefix_that_matches_nothing_says_what_there_is(prefix):
    model = create_model("mn01", num_classes=2)
    with pytest.raises(SpecError, match=r"there are features, features\.0, .*features\.16, classifier") as caught:
        freeze(model, ["features.0", prefix])
    assert caught.value.field == "freeze"
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_freezing_everything_is_refused():
    with pytest.raises(SpecError, match="nothing to train; leave out 'classifier'"):
        freeze(create_model("mn01", num_classes=2), ["features", "classifier"])


# The temperature


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (TemperatureSchedule(), {0: 30, 1: 29, 15: 15, 28: 2, 29: 1, 30: 1, 199: 1}),
        (TemperatureSchedule(start=10, step=2, slope=0.5), {0: 10, 1: 8, 4: 2, 5: 1, 6: 1}),
        (TemperatureSchedule(start=31, step=3, slope=0.05), {0: 31, 9: 4, 10: 1, 50: 1}),
        (TemperatureSchedule(start=5, step=1, slope=2), {0: 9, 2: 5, 4: 1, 5: 1}),  # the second line is the higher
    ],
)
def test_temperature_of_an_epoch(schedule, expected):
    for epoch, value in expected.items():
        assert schedule.at(epoch) == pytest.approx(value), epoch


@pytest.mark.parametrize(
    ("name", "options"), [("mn01", {}), ("dymn", {"width": 0.1, "dynamic_conv": False})], ids=["mn", "no dyconv"]
)
def test_a_model_without_temperature_has_nothing_to_schedule(name, options):
    model, recipe = create_model(name, num_classes=2, **options), Recipe(temperature_schedule=TemperatureSchedule())
    with pytest.raises(SpecError, match="no dynamic convolutions") as caught:
        check_temperature(model, recipe)
    assert caught.value.field == "temperature_schedule"
    check_temperature(model, Recipe())
    check_temperature(create_model("dymn", width=0.1, num_classes=2), recipe)
