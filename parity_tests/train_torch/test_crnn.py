"""The CRNN beyond its goldens: masks, heads, what only training does, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from models_zoo.errors import CardError, ClipLengthError, SpecError, WaveformError
from models_zoo.registry import get_card, list_models
from parity_tests.crnn_contract import features
from parity_tests.networks import card_of
from train_torch.checkpoint import load_checkpoint, save_checkpoint
from train_torch.models import check_card, create_from_card, create_model
from train_torch.models.crnn import Spans

SMALL = {"num_classes": 6, "filters": [8, 12], "pools": [[2, 8], [2, 16]], "rnn_size": 8, "embedding_size": 20}
FUSIONS = ("none", "global", "frame", "interpolate", "pool1d")
OFF = {"most": 0, "share": 0.0}
PLAIN = {"dropout": 0.0, "mask_time": OFF, "mask_mel": OFF}
"""Nothing random in training."""

FEATURES = features(5, 3, 61)  # 15 frames of scores


def small(**options):
    """Return a small network with weights large enough to tell frames, classes and clips apart."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = create_model("crnn", **{**SMALL, **options})
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    nn.init.kaiming_normal_(parameter)
    return model.eval()


def embeddings(model, tokens=17, batch=3):
    shape = (batch, 20) if model.declared.fusion == "global" else (batch, 20, tokens)
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def inputs_of(model, x=FEATURES):
    extra = {} if model.declared.fusion == "none" else {"embeddings": embeddings(model, batch=len(x))}
    return {"features": x, **extra}


def answer(model, **inputs):
    with torch.no_grad():
        return model(**inputs)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_card_follows_from_the_options(fusion):
    model = small(fusion=fusion, masks=["classes_mask", "pad_mask"])
    card = card_of(model, "crnn", task="event_detection")
    check_card(create_from_card(type(card).from_json(card.to_json())), card)
    assert json.loads(json.dumps(model.options)) == model.options
    assert (card.frame_output().hop, card.frame_output().axes, card.clip_output().name) == (
        4, ("batch", "6", "frames"), "weak",
    )  # fmt: skip
    asked = {part.name: (part.source, part.dtype) for part in card.inputs}
    assert asked == {
        "features": ("frontend", "float32"),
        **({} if fusion == "none" else {"embeddings": ("encoder", "float32")}),
        "classes_mask": ("caller", "bool"),
        "pad_mask": ("caller", "bool"),
    }
    scores = answer(model, **inputs_of(model))
    assert {name: tuple(value.shape) for name, value in scores.items()} == {"strong": (3, 6, 15), "weak": (3, 6)}
    assert scores["strong"].std(2).mean() > 0.01, "alive over time"


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("attention", [True, False])
def test_gradients_reach_every_parameter(fusion, attention):
    model = small(fusion=fusion, attention=attention, **PLAIN).train()
    scores = model(**inputs_of(model))
    (scores["strong"].square().sum() + scores["weak"].square().sum()).backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []
    # The embeddings' own path, which a fusion that was dropped would leave without one.
    still = {key for key, parameter in model.named_parameters() if "emb" in key and not parameter.grad.any()}
    # Of the encoder's backward direction the last step is taken, which is its first: there is no state before it.
    assert still <= {"frame_embs_encoder.weight_hh_l0_reverse"}


@pytest.mark.parametrize("fusion", FUSIONS[1:])
def test_embeddings_count(fusion):
    model = small(fusion=fusion)
    first = answer(model, **inputs_of(model))["strong"]
    other = answer(model, features=FEATURES, embeddings=embeddings(model).flip(0))["strong"]
    assert (first - other).abs().max() > 0.01


def test_several_heads_share_attention_and_masks_by_head():
    """Each head answers as a network of its own would, with its part of the mask."""
    model = small(num_classes=7, heads=[4, 3])
    assert [key for key in model.class_keys if "softmax" in key] == [
        f"dense_softmax.{head}.{kind}" for head in (0, 1) for kind in ("weight", "bias")
    ]
    mask = torch.tensor([[1, 1, 0, 1, 0, 1, 1], [0, 0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0]]).bool()
    together = answer(model, features=FEATURES, classes_mask=mask)
    state = model.state_dict()
    for head, classes in ((0, slice(0, 4)), (1, slice(4, 7))):
        alone = small(num_classes=classes.stop - classes.start)
        own = {key.replace(f".{head}.", "."): value for key, value in state.items() if key.startswith("dense")
               and f".{head}." in key}  # fmt: skip
        alone.load_state_dict({**{key: state[key] for key in alone.state_dict() if key in state}, **own})
        part = answer(alone, features=FEATURES, classes_mask=mask[:, classes])
        torch.testing.assert_close(together["strong"][:, classes], part["strong"])
        torch.testing.assert_close(together["weak"][:, classes], part["weak"])
    assert not together["weak"][~mask].any()
    assert together["weak"][mask].min() > 0


def test_a_class_that_is_not_valid_takes_no_attention():
    model = small()
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[:, 4:] = False
    plain, masked = answer(model, features=FEATURES), answer(model, features=FEATURES, classes_mask=mask)
    torch.testing.assert_close(masked["strong"][:, :4], plain["strong"][:, :4])
    assert not masked["strong"][:, 4:].any()
    assert not masked["weak"][:, 4:].any()
    assert (masked["weak"][:, :4] - plain["weak"][:, :4]).abs().max() > 1e-4


def padding(*kept, frames=15):
    return (torch.arange(frames) >= torch.tensor(kept)[:, None])[:, None]


def test_published_padding_leaves_frames_the_weight_of_doubt():
    """Recomputed from the definition: a padded frame weighs 1 / classes, and strong scores stay."""
    model = small()
    mask = padding(15, 9, 4)
    plain, padded = answer(model, features=FEATURES), answer(model, features=FEATURES, pad_mask=mask)
    torch.testing.assert_close(padded["strong"], plain["strong"])
    heard = []
    hook = model.dense_softmax.register_forward_hook(lambda _, __, returned: heard.append(returned))
    answer(model, features=FEATURES)
    hook.remove()
    weights = torch.where(mask.transpose(1, 2), torch.tensor(1 / 6), heard[0].softmax(2)).transpose(1, 2)
    torch.testing.assert_close(padded["weak"], (plain["strong"] * weights).sum(2) / weights.sum(2))
    assert (padded["weak"] - plain["weak"]).abs().max() > 1e-4


def test_attention_over_time_weighs_the_frames_of_each_class():
    """Recomputed from the definition; a class gains nothing from how others stand in its frames."""
    model = small(attention="time")
    heard = []
    hook = model.dense_softmax.register_forward_hook(lambda _, __, returned: heard.append(returned))
    scores = answer(model, features=FEATURES)
    hook.remove()
    weights = heard[0].softmax(1).transpose(1, 2)
    torch.testing.assert_close(scores["weak"], (scores["strong"] * weights).sum(2))
    published = small()
    published.load_state_dict(model.state_dict())
    other = answer(published, features=FEATURES)
    torch.testing.assert_close(other["strong"], scores["strong"])
    assert (other["weak"] - scores["weak"]).abs().max() > 1e-4


@pytest.mark.parametrize("attention", [True, False, "time"])
@pytest.mark.parametrize("activation", ["glu", "relu"])
def test_removed_padding_answers_as_the_clip_alone(attention, activation):
    """Whatever fills the end of a clip, and whatever the clips beside it are."""
    model = small(attention=attention, activation=activation, padding="removed")
    kept = (15, 9, 4)
    together = answer(model, features=FEATURES, pad_mask=padding(*kept))
    for clip, frames in enumerate(kept):
        alone = answer(model, features=FEATURES[clip : clip + 1, :, : 4 * frames])
        torch.testing.assert_close(together["strong"][clip, :, :frames], alone["strong"][0], rtol=0, atol=2e-6)
        torch.testing.assert_close(together["weak"][clip], alone["weak"][0], rtol=0, atol=2e-6)
        assert not together["strong"][clip, :, frames:].any()
    published = answer(small(attention=attention, activation=activation), features=FEATURES, pad_mask=padding(*kept))
    assert (published["strong"][1, :, :9] - together["strong"][1, :, :9]).abs().max() > 1e-3


def test_eval_and_train_return_the_network():
    model = small()
    assert model.eval() is model
    assert model.train() is model
    assert model.training


def test_frozen_norms_stay_as_they_are():
    model = small(freeze_bn=True, **PLAIN).train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    model(features=FEATURES)["weak"].sum().backward()
    assert norms
    for norm, mean in zip(norms, before, strict=True):
        assert not norm.training
        assert norm.weight.grad is None
        torch.testing.assert_close(norm.running_mean, mean, rtol=0, atol=0)
    free = small(**PLAIN).train()
    free(features=FEATURES)
    assert free.cnn.cnn.batchnorm0.running_mean.abs().max() > 0
    assert model.cnn.cnn.conv0.weight.grad is not None, "only norms are frozen"


def test_a_convolutional_part_that_does_not_learn():
    model = small(train_cnn=False, **PLAIN).train()
    model(features=FEATURES)["weak"].sum().backward()
    assert {key.split(".")[0] for key, parameter in model.named_parameters() if parameter.grad is not None} == {
        "rnn", "dense", "dense_softmax",
    }  # fmt: skip


def heard_by(part, model, **inputs):
    """Return what the part of ``model`` called ``part`` was given."""
    heard = []
    hook = model.get_submodule(part).register_forward_pre_hook(lambda _, given: heard.append(given[0].detach()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model(**inputs)
    hook.remove()
    return heard[0]


@pytest.mark.parametrize(
    ("option", "axis", "most"), [("mask_time", 2, 5), ("mask_mel", 3, 10)], ids=["frames", "mel bands"]
)
def test_training_hides_spans_of_each_clip_by_itself(option, axis, most):
    """What the first convolution is given, over many clips; nothing is hidden in evaluation."""
    model = small(**{**PLAIN, option: {"most": most, "share": 0.2}}).train()
    clips = torch.ones(80, 128, 60)
    given = heard_by("cnn", model, features=clips)[:, 0]  # (clips, time, mel)
    hidden = (given == 0).all(3 - axis + 1 if axis == 2 else 1)
    widths = hidden.sum(1)
    assert widths.max() == most - 1, "the widest span is the next whole number below"
    assert widths.unique().numel() == most
    assert (hidden.int().diff(dim=1).abs().sum(1) <= 2).all(), "one span"
    assert len({tuple(row.tolist()) for row in hidden}) > 50, "each clip by itself"
    assert (given.sum((1, 2)) == clips[0].numel() - widths * (given.shape[3 - axis + 1 if axis == 2 else 1])).all()
    assert (heard_by("cnn", model.eval(), features=clips) == 1).all()


def test_a_share_limits_a_span():
    x = torch.ones(300, 4, 40)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert (Spans(most=16, share=0.1).hide(x, 2) == 0).all(1).sum(1).max() == 3
    assert (Spans(most=16, share=0.0).hide(x, 2) == 1).all()


def test_dropped_steps_hide_features_and_embeddings_apart():
    model = small(fusion="pool1d", dropstep={"most": 8, "share": 0.5}, **PLAIN).train()
    x = features(9, 60, 61)
    given = heard_by("cat_tf", model, features=x, embeddings=embeddings(model, batch=60))
    own, joined = ((part == 0).all(2) for part in (given[:, :, :12], given[:, :, 12:]))
    for hidden in (own, joined):
        assert 3 <= hidden.sum(1).max() <= 7
        assert (hidden.int().diff(dim=1).abs().sum(1) <= 2).all()
    assert (own != joined).any(1).float().mean() > 0.5
    assert not (heard_by("cat_tf", model.eval(), features=x, embeddings=embeddings(model, batch=60)) == 0).all(2).any()


def test_dropout_has_its_published_places():
    """Before the recurrent part with embeddings, or where steps are dropped; else only behind it."""
    silent = {"mask_time": OFF, "mask_mel": OFF, "activation": "leakyrelu", "normalization": "none", "dropout": 0.4}
    for options, place, dropped in (
        ({"fusion": "pool1d"}, "cat_tf", True),
        ({}, "rnn", False),
        ({"dropstep": {"most": 2, "share": 0.5}}, "rnn", True),
        ({}, "dense", True),
    ):
        model = small(**silent, **options).train()
        # Without dropout inside, zeros can only come from the place looked at.
        for name, module in model.cnn.named_modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
                assert name.startswith("cnn.dropout")
        given = heard_by(place, model, **inputs_of(model))
        share = float((given == 0).float().mean())
        assert (0.3 < share < 0.55) if dropped else share == 0, (options, place)
    assert small().cnn.cnn.dropout1.p == 0.5


def test_other_classes_replace_the_heads_alone(tmp_path):
    model = small()
    save_checkpoint(tmp_path / "six.safetensors", model, card_of(model, "crnn", task="event_detection"))
    loaded = load_checkpoint(tmp_path / "six.safetensors", num_classes=3)
    assert loaded.replaced == ("dense.weight", "dense.bias", "dense_softmax.weight", "dense_softmax.bias")
    assert loaded.card.frame_output().axes[1] == "3"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"rnn_type": "BLSTM"}, "rnn_type"),
        ({"fusion": "sum"}, "fusion"),
        ({"activation": "swish"}, "activation"),
        ({"num_classes": 0}, "num_classes"),
        ({"heads": [4, 3]}, "heads"),
        ({"heads": [7, -1]}, "heads"),
        ({"pools": [[2, 8], [2, 8]]}, "pools"),
        ({"pools": [[2, 8]]}, "pools"),
        ({"pools": [[2, 8], [2, 16, 1]]}, "pools"),
        ({"pools": [[2, 8], [0, 16]]}, "pools"),
        ({"n_mels": 64}, "pools"),
        ({"kernels": [3, 3, 3]}, "kernels"),
        ({"filters": []}, "filters"),
        ({"padding": "removed", "strides": [2], "pools": [[1, 4], [1, 8]]}, "padding"),
        ({"masks": ["pad_mask"], "attention": False}, "masks"),
        ({"mask_time": {"most": 5, "share": 2.0}}, "mask_time.share"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_bad_options_name_the_field(options, field):
    with pytest.raises(CardError) as caught:
        create_model("crnn", **{**SMALL, **options})
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("shape", "error", "says"),
    [
        ((1, 1, 128, 40), SpecError, "expected"),
        ((1, 64, 40), SpecError, "64 mel bands; this model was built for 128"),
        ((1, 128, 3), ClipLengthError, "3 frames; this model needs at least 4"),
    ],
)
def test_features_that_do_not_fit_are_refused(shape, error, says):
    with pytest.raises(error, match=says):
        small()(features=torch.zeros(shape))


@pytest.mark.parametrize(
    ("fusion", "shape", "code"),
    [
        ("none", (3, 20, 9), "type"),
        ("pool1d", None, "type"),
        ("pool1d", (3, 21, 9), "rank"),
        ("pool1d", (2, 20, 9), "rank"),
        ("interpolate", (3, 20), "rank"),
        ("global", (3, 20, 9), "rank"),
        ("frame", (3, 20, 0), "empty"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(fusion, shape, code):
    with pytest.raises(WaveformError, match=r"embeddings: ") as caught:
        small(fusion=fusion)(features=FEATURES, embeddings=None if shape is None else torch.zeros(shape))
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("name", "mask", "code"),
    [
        ("classes_mask", torch.ones(3, 5, dtype=torch.bool), "rank"),
        ("classes_mask", torch.ones(3, 6), "dtype"),
        ("pad_mask", torch.zeros(3, 1, 16, dtype=torch.bool), "rank"),
        ("pad_mask", torch.zeros(3, 15, dtype=torch.bool), "rank"),
        ("pad_mask", padding(15, 9, 0), "range"),
        ("pad_mask", ~padding(1, 9, 15), "range"),
    ],
)
def test_masks_that_do_not_fit_are_refused(name, mask, code):
    with pytest.raises(WaveformError, match=name) as caught:
        small(padding="removed")(features=FEATURES, **{name: mask})
    assert caught.value.code == code


def test_the_baselines_cards():
    assert list_models("crnn_*") == ["crnn_2021", "crnn_2022", "crnn_2023", "crnn_2023_beats", "crnn_2024"]
    for name in list_models("crnn_*"):
        card = get_card(name)
        check_card(create_from_card(card), card)
        newest = name == "crnn_2024"
        assert (card.frontend.affine is None) != newest, "the scaler's range"
        assert len(card.labels) == (27 if newest else 10)
        assert card.labels[:2] == ("Alarm_bell_ringing", "Blender")
        assert set(card.thresholds.values()) == {0.5}
        assert set(card.median_filters) == set(card.labels)
        frames = [round(seconds / 0.064, 6) for seconds in card.median_filters.values()]
        assert frames == ([3, 9, 9, 5, 5, 5, 9, 7, 11, 9, 7, 3, 9, 13, 7, 1, 13, 3, 13, 7, 5, 5, 1, 13, 17, 13, 15]
                          if newest else [7] * 10)  # fmt: skip
        assert (card.length_policy.min, card.length_policy.max) == (160_000, 160_000)
        assert ("embeddings" in {part.name for part in card.inputs}) == (newest or name == "crnn_2023_beats")
    fused = get_card("crnn_2023_beats").macs - get_card("crnn_2023").macs
    assert round(fused / 1e6, 2) == round(948.79 - 930.90, 2), "the published figures' difference"
