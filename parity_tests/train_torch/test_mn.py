"""What the mn family promises beyond the published answers: options, ranks, and errors that help."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from torch import nn

from models_zoo.errors import CardError, ClipLengthError, SpecError, UnknownNameError
from models_zoo.presets import get_frontend
from models_zoo.registry import get_card, list_models
from parity_tests.networks import card_of, lively, noise_features
from train_torch.models import check_card, create_model, list_architectures, new_card

HEADS = ("mlp", "fully_convolutional", "multihead_attention_pooling")
FEATURES = noise_features(3, 101)


def on_paper(name, **options):
    """Return a network without weights: shapes only, so that mn40 costs nothing."""
    with torch.device("meta"):
        return create_model(name, **options)


@pytest.mark.parametrize(
    ("name", "parameters", "embedding"),
    [
        ("mn01", 123_783, 96),
        ("mn02", 324_695, 192),
        ("mn04", 983_599, 384),
        ("mn05", 1_431_239, 480),
        ("mn10", 4_876_831, 960),
        ("mn20", 17_909_287, 1920),
        ("mn30", 39_086_367, 2880),
        ("mn40", 68_427_303, 3840),
    ],
)
def test_published_sizes(name, parameters, embedding):
    model = on_paper(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert [(part.name, part.axes) for part in model.outputs] == [
        ("logits", ("batch", "527")),
        ("embedding", ("batch", str(embedding))),
    ]
    assert [(part.name, part.axes) for part in model.inputs] == [("features", ("batch", "128", "time"))]


def test_squeeze_widths_are_the_published_ones():
    state = on_paper("mn10").state_dict()
    widths = [value.shape[0] for key, value in state.items() if key.endswith("fc1.weight")]
    assert widths == [24, 32, 32, 120, 168, 168, 240, 240]


def test_narrow_blocks_have_no_expansion():
    blocks = on_paper("mn01").features[1:16]
    assert [index for index, block in enumerate(blocks, 1) if block.block[0][0].groups > 1] == [1, 2, 3, 4]


def test_norms_have_the_published_constants():
    model = on_paper("mn04", head="fully_convolutional")
    backbone = {(norm.eps, norm.momentum) for norm in model.features.modules() if isinstance(norm, nn.BatchNorm2d)}
    assert backbone == {(1e-3, 0.01)}
    assert (model.classifier[1].eps, model.classifier[1].momentum) == (1e-5, 0.1)


@pytest.mark.parametrize("name", [*list_models("mn*"), *list_models("dymn*")])
def test_every_card_of_the_system_describes_its_network(name):
    card = get_card(name)
    model = on_paper(name)
    check_card(model, card)
    assert (card.system, card.exporter_reason) == (model.system, model.exporter_reason)
    pictures = "_im" in name.replace("no_im", "")
    assert model.options["num_classes"] == (0 if pictures else 527)
    assert model.options["width"] == int(re.match(r"(?:dy)?mn(\d\d)", name)[1]) / 10
    assert model.options.get("temperature") == (None if name.startswith("mn") else 30 if pictures else 1)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("num_classes", [1, 2, 7])
@pytest.mark.parametrize("batch", [1, 3])
def test_ranks_are_stable(head, num_classes, batch):
    model = create_model("mn01", num_classes, head=head).eval()
    answer = model(features=FEATURES[:batch])
    assert list(answer) == ["logits", "embedding"]
    assert answer["logits"].shape == (batch, num_classes)
    assert answer["embedding"].shape == (batch, 96)


@pytest.mark.parametrize("head", HEADS)
def test_a_clip_does_not_depend_on_its_batch(head):
    model = lively("mn04", num_classes=5, head=head)
    with torch.no_grad():
        together = model(features=FEATURES)["logits"]
        alone = torch.cat([model(features=FEATURES[i : i + 1])["logits"] for i in range(3)])
    assert together.std() > 0.1
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


def test_no_classes_means_the_embedding_alone():
    model = create_model("mn01", num_classes=0)
    assert list(model.eval()(features=FEATURES)) == [part.name for part in model.outputs] == ["embedding"]
    assert not any(key.startswith("classifier") for key in model.state_dict())


def test_one_frame_is_enough():
    answer = lively("mn04")(features=FEATURES[:, :, :1])
    assert torch.isfinite(answer["logits"]).all()


@pytest.mark.parametrize("head", HEADS)
def test_gradients_reach_every_parameter(head):
    model = lively("mn01", num_classes=3, head=head, se_dims="cf").train()
    model(features=FEATURES)["logits"].square().sum().backward()
    without = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []


def test_attention_weights_sum_to_one_over_time():
    """Values that do not change over time pass through attention unchanged, whatever it attends to."""
    model = lively("mn01", num_classes=4, head="multihead_attention_pooling")
    pooling = model.classifier
    with torch.no_grad():
        half = pooling.subspace_proj.weight.shape[0] // 2
        pooling.subspace_proj.weight[half:] = 0
        pooling.subspace_proj.bias[half:] = torch.arange(half, dtype=torch.float32)
        logits = model(features=FEATURES)["logits"]
    torch.testing.assert_close(logits, torch.arange(half).reshape(4, 4).float().mean(0).expand(3, 4))


@pytest.mark.parametrize("se_agg", ["max", "min", "add", "avg"])
@pytest.mark.parametrize("se_dims", ["c", "f", "t", "cf", "fc", "ct", "ft", "cft"])
def test_squeeze_excitation_over_any_axes(se_dims, se_agg):
    """Each branch is recomputed in NumPy float64 from its definition, then merged."""
    frames = 101 if "t" in se_dims else None
    model = lively("mn04", se_dims=se_dims, se_agg=se_agg, num_frames=frames)
    block = model.features[4].block
    with torch.no_grad():
        before = block[1](block[0](model.features[:4](FEATURES.unsqueeze(1))))
        actual = block[2](before).numpy()
    x = before.double().numpy()
    branches = []
    for letter, branch in zip(se_dims, block[2].conc_se_layers, strict=True):
        axis = "cft".index(letter) + 1
        w1, b1, w2, b2 = (value.double().numpy() for value in branch.state_dict().values())
        gate = x.mean(tuple({1, 2, 3} - {axis}))
        gate = 1 / (1 + np.exp(-(np.maximum(gate @ w1.T + b1, 0) @ w2.T + b2)))
        shape = [3, 1, 1, 1]
        shape[axis] = -1
        branches.append(x * gate.reshape(shape))
    merge = {"max": np.max, "min": np.min, "add": np.sum, "avg": np.mean}[se_agg]
    np.testing.assert_allclose(actual, merge(branches, axis=0), rtol=1e-4, atol=1e-5)
    assert torch.isfinite(model(features=FEATURES)["logits"]).all()


@pytest.mark.parametrize("n_mels", [40, 64, 128, 256])
@pytest.mark.parametrize("options", [{}, {"dilated": True}, {"strides": [1, 2, 1, 2]}, {"reduced_tail": True}])
def test_frequency_excitation_follows_every_shape(n_mels, options):
    model = create_model("mn01", 3, se_dims="cft", num_frames=50, n_mels=n_mels, **options).eval()
    assert model(features=torch.randn(2, n_mels, 50))["logits"].shape == (2, 3)


def test_without_squeeze_excitation():
    assert not any("conc_se" in key for key in on_paper("mn04", se_dims="none").state_dict())


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (4, 4)),
        ({"strides": (2, 2, 2, 1)}, (8, 7)),
        ({"strides": (2, 2, 1, 1)}, (16, 13)),
        ({"strides": (1, 1, 1, 1)}, (64, 51)),
        ({"dilated": True}, (8, 7)),
    ],
)
def test_strides_decide_the_last_map(options, shape):
    model = create_model("mn01", 3, **options).eval()
    assert model.features(FEATURES.unsqueeze(1)).shape[2:] == shape


def test_dilation_and_bypass():
    model = on_paper("mn01", dilated=True)
    convolution = model.get_submodule("features.13.block.1.0")
    assert (convolution.dilation, convolution.stride, convolution.padding) == ((2, 2), (1, 1), (4, 4))
    # 16 channels in and out and stride 1 in effect, yet the published rule looks at the row's stride of 2.
    assert [model.features[index].bypass for index in (13, 14, 15)] == [False, True, True]


def test_reduced_tail_halves_the_tail():
    model = on_paper("mn10", reduced_tail=True)
    assert model.features[16][0].out_channels == 480
    assert model.classifier[2].out_features == 640
    assert model.features[12].block[3][0].out_channels == 112


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"num_classes": -1}, "num_classes"),
        ({"num_classes": "ten"}, "num_classes"),
        ({"width": 0.5}, "width"),
        ({"strides": [2, 2, 2]}, "strides"),
        ({"strides": [2, 2, 2, 3]}, "strides"),
        ({"head": "linear"}, "head"),
        ({"num_heads": 0}, "num_heads"),
        ({"se_dims": "x"}, "se_dims"),
        ({"se_dims": ""}, "se_dims"),
        ({"se_dims": "cc"}, "se_dims"),
        ({"se_dims": "ct"}, "num_frames"),
        ({"num_frames": 100}, "num_frames"),
        ({"se_agg": "mean"}, "se_agg"),
        ({"dropout": 1.0}, "dropout"),
        ({"n_mels": 0}, "n_mels"),
        ({"dropuot": 0.1}, "dropuot"),
    ],
)
def test_bad_options_name_the_field(options, field):
    with pytest.raises(CardError) as caught:
        create_model("mn04", **options)
    assert caught.value.field.startswith(field)
    assert field in str(caught.value)


def test_any_width_under_the_bare_name():
    assert create_model("mn", width=0.35, num_classes=2).options["width"] == 0.35


def test_unknown_names_suggest_near_ones():
    with pytest.raises(UnknownNameError, match="'mn04_as'"):
        create_model("mn04_sa")
    with pytest.raises(UnknownNameError, match="'mn04'"):
        create_model("nm04")


@pytest.mark.parametrize("name", [*list_architectures(), "mn10_as_fc_s2221", "mn10_as_mels_40"])
def test_options_rebuild_the_network(name):
    model = on_paper(name, **({} if name == "cavmae" else {"num_classes": 11}))
    assert json.loads(json.dumps(model.options)) == model.options
    again = on_paper(name, **model.options)
    assert again.options == model.options
    assert {key: value.shape for key, value in again.state_dict().items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }


def test_features_that_do_not_fit_are_refused():
    model = create_model("mn01", 2).eval()
    with pytest.raises(SpecError, match="64 mel bands") as caught:
        model(features=torch.zeros(1, 64, 50))
    assert caught.value.field == "mel.n_mels"
    with pytest.raises(SpecError, match="4 axes"):
        model(features=torch.zeros(1, 1, 128, 50))


@pytest.mark.parametrize(("frames", "code"), [(99, "too_short"), (101, "too_long")])
def test_time_excitation_takes_one_length(frames, code):
    model = create_model("mn01", 2, se_dims="t", num_frames=100).eval()
    with pytest.raises(ClipLengthError, match="exactly 100") as caught:
        model(features=torch.zeros(1, 128, frames))
    assert caught.value.code == code


def test_time_excitation_fixes_the_card_s_lengths():
    model = on_paper("mn01", num_classes=2, se_dims="t", num_frames=100)
    policy = card_of(model, "mn01").length_policy
    frontend = get_frontend("efficientat")
    assert (policy.min, policy.max) == (31_681, 32_000)
    assert [frontend.num_frames(n) for n in (policy.min - 1, policy.min, policy.max, policy.max + 1)] == [
        99,
        100,
        100,
        101,
    ]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"frontend": get_frontend("efficientat_mels64")}, "frontend.mel.n_mels"),
        ({"frontend": get_frontend("panns_32k")}, "frontend.layout"),
        ({"labels": ["one"]}, "labels"),
    ],
)
def test_a_card_that_does_not_fit_is_refused(changes, field):
    model = on_paper("mn01", num_classes=2)
    with pytest.raises(CardError) as caught:
        card_of(model, "mn01", **changes)
    assert caught.value.field == field


def test_a_card_of_another_architecture_is_refused():
    model = on_paper("mn01", num_classes=2)
    card = card_of(model, "mn01")
    with pytest.raises(CardError, match="width"):
        check_card(model, card.replace(architecture="mn04"))
    with pytest.raises(CardError) as caught:
        check_card(on_paper("mn01", num_classes=2, head="fully_convolutional"), card)
    assert caught.value.field == "options"


def test_new_card_travels():
    model = on_paper("mn04", num_classes=2)
    card = new_card(
        "mine",
        "mn04",
        model=model,
        frontend=get_frontend("efficientat"),
        task="single_label",
        labels=["a", "b"],
        license="CC0-1.0",
    )
    assert type(card).from_json(card.to_json()) == card
    assert card.exporter == "torchscript"
    assert card.exporter_reason
