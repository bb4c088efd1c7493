"""What the dymn family promises beyond the published answers: options, ranks, temperature, and one exportable form."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from models_zoo.errors import CardError, SpecError
from models_zoo.registry import get_card
from parity_tests.networks import card_of, contract_entry, contract_state, lively, noise_features
from parity_tests.tolerances import FORMULATIONS
from train_torch.checkpoint import load_checkpoint, save_checkpoint
from train_torch.models import check_card, clip_form, create_from_card, create_model
from train_torch.models.efficientat_dymn import DyMNOptions, DynamicConv, DynamicReLU

FEATURES = noise_features(3, 101)
SWITCHES = ("dynamic_conv", "dynamic_relu", "coordinate_attention")


def tiny(**options):
    return lively("dymn", **{"width": 0.1, "num_classes": 5, "temperature": 1, **options})


def on_paper(name, **options):
    """Return a network without weights: shapes only."""
    with torch.device("meta"):
        return create_model(name, **options)


def answer(model):
    with torch.no_grad():
        return model(features=FEATURES)["logits"]


@pytest.mark.parametrize(
    ("name", "parameters", "with_buffers", "embedding", "contexts"),
    [
        ("dymn04", 1_961_239, 1.972, 384, [16] * 6 + [24] * 4 + [48] * 5),
        ("dymn10", 10_548_479, 10.575, 960, [32] * 6 + [64] + [48] * 3 + [120] + [128] * 4),
        ("dymn20", 39_966_143, 40.019, 1920, [64] * 6 + [120, 104, 96, 96, 240] + [256] * 4),
    ],
)
def test_published_sizes(name, parameters, with_buffers, embedding, contexts):
    model = on_paper(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert round(sum(value.numel() for value in model.state_dict().values()) / 1e6, 3) == with_buffers
    assert [layer.context_gen.joint_conv.out_channels for layer in model.layers] == contexts
    assert [(part.name, part.axes) for part in model.outputs] == [
        ("logits", ("batch", "527")),
        ("embedding", ("batch", str(embedding))),
    ]
    assert [(part.name, part.axes) for part in model.inputs] == [("features", ("batch", "128", "time"))]


def test_norms_have_the_published_constants():
    norms = {(norm.eps, norm.momentum) for norm in on_paper("dymn04").modules() if isinstance(norm, nn.BatchNorm2d)}
    assert norms == {(1e-3, 0.01)}


@pytest.mark.parametrize("num_classes", [1, 2, 7])
@pytest.mark.parametrize("batch", [1, 3])
def test_ranks_are_stable(num_classes, batch):
    model = create_model("dymn", num_classes, width=0.1).eval()
    outputs = model(features=FEATURES[:batch])
    assert list(outputs) == ["logits", "embedding"]
    assert outputs["logits"].shape == (batch, num_classes)
    assert outputs["embedding"].shape == (batch, 96)


@pytest.mark.parametrize("options", [{}, {"use_dy_blocks": "replace_se"}, {"num_kernels": 3, "num_pieces": 3}])
def test_a_clip_does_not_depend_on_its_batch(options):
    model = lively("dymn04", num_classes=5, temperature=1, **options)
    with torch.no_grad():
        alone = torch.cat([model(features=FEATURES[i : i + 1])["logits"] for i in range(3)])
    together = answer(model)
    assert together.std(0).mean() > 0.05, "clips that answer alike prove nothing"
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


def test_no_classes_means_the_embedding_alone():
    model = create_model("dymn", 0, width=0.1).eval()
    assert list(model(features=FEATURES)) == [part.name for part in model.outputs] == ["embedding"]
    assert not any(key.startswith("classifier") for key in model.state_dict())


def test_one_frame_is_enough():
    assert torch.isfinite(tiny()(features=FEATURES[:, :, :1])["logits"]).all()


@pytest.mark.parametrize("options", [{}, {"use_dy_blocks": "replace_se"}, {"num_kernels": 1, "num_pieces": 1}])
def test_gradients_reach_every_parameter(options):
    model = tiny(**options).train()
    model(features=FEATURES)["logits"].square().sum().backward()
    without = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []


def test_features_that_do_not_fit_are_refused():
    model = create_model("dymn", 2, width=0.1).eval()
    with pytest.raises(SpecError, match="64 mel bands") as caught:
        model(features=torch.zeros(1, 64, 50))
    assert caught.value.field == "mel.n_mels"
    with pytest.raises(SpecError, match="4 axes"):
        model(features=torch.zeros(1, 1, 128, 50))


@pytest.mark.parametrize("n_mels", [40, 64, 256])
@pytest.mark.parametrize("strides", [[2, 2, 2, 2], [1, 2, 1, 2]])
def test_any_mels_and_strides(n_mels, strides):
    model = create_model("dymn", 3, width=0.1, n_mels=n_mels, strides=strides).eval()
    x = model.in_c(torch.randn(2, 1, n_mels, 50))
    for layer in model.layers:
        x = layer(x)
    steps = 2 * np.prod(strides)
    assert x.shape == (2, 16, -(-n_mels // steps), -(-50 // steps))
    assert model(features=torch.randn(2, n_mels, 50))["logits"].shape == (2, 3)


# The parts, each recomputed from its definition in float64.


def test_kernels_are_mixed_in_shares_that_follow_the_temperature():
    model = tiny(num_kernels=3)
    for convolution in (model.layers[6].exp_conv, model.layers[3].depth_conv):
        weight, bias = (value.double() for value in convolution.residuals[0].state_dict().values())
        kernels = convolution.weight.double().reshape(3, *convolution.shape)
        inputs = torch.randn(2, convolution.shape[0] if convolution.depthwise else convolution.shape[1], 6, 7)
        context = torch.randn(2, weight.shape[1])
        for temperature in (1.0, 4.0):
            convolution.temperature = temperature
            shares = ((context.double() @ weight.T + bias) / temperature).softmax(1)
            expected = torch.cat(
                [
                    nn.functional.conv2d(
                        inputs[i : i + 1].double(),
                        torch.einsum("k,koihw->oihw", shares[i], kernels),
                        stride=convolution.stride,
                        padding=convolution.padding,
                        groups=convolution.shape[0] if convolution.depthwise else 1,
                    )
                    for i in range(2)
                ]
            )
            with torch.no_grad():
                actual = convolution(inputs, context)
            torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_pieces", [1, 2, 3])
def test_the_activation_is_the_largest_of_its_affine_pieces(num_pieces):
    torch.manual_seed(0)
    activation = DynamicReLU(4, 6, num_pieces)
    nn.init.normal_(activation.coef_net[0].weight)
    x, context = torch.randn(2, 4, 3, 5), torch.randn(2, 6)
    weight, bias = (value.detach().numpy().astype(float) for value in activation.coef_net[0].parameters())
    theta = 2 / (1 + np.exp(-(context.numpy() @ weight.T + bias))) - 1
    coefficients = theta.reshape(2, 4, 2 * num_pieces)
    slopes = coefficients[..., :num_pieces] + np.eye(num_pieces)[0]
    offsets = 0.5 * coefficients[..., num_pieces:]
    pieces = x.numpy()[..., None] * slopes[:, :, None, None] + offsets[:, :, None, None]
    np.testing.assert_allclose(activation(x, context).detach().numpy(), pieces.max(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", [3, 4])
def test_gates_come_from_both_axes_and_pools_count_their_padding(layer):
    """Layer 3 halves its map, layer 4 does not."""
    context_gen = tiny().layers[layer].context_gen
    stride = context_gen.stride
    assert stride == (2 if layer == 3 else 1)
    x = torch.rand(2, context_gen.joint_conv.in_channels, context_gen.mels, 13)
    with torch.no_grad():
        vector, sequence = context_gen(x)
        over_mel, over_time = context_gen.gates(sequence)
        x = x.double()
        joint = torch.cat([x.mean(3), x.mean(2)], 2).unsqueeze(3)
        expected = nn.functional.hardswish(context_gen.joint_norm(context_gen.joint_conv(joint.float()))).double()
    torch.testing.assert_close(sequence.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(vector.double(), expected.mean((2, 3)), rtol=1e-5, atol=1e-6)
    parts = (expected[:, :, : context_gen.mels, 0], over_mel[..., 0], context_gen.conv_f)
    others = (expected[:, :, context_gen.mels :, 0], over_time[:, :, 0], context_gen.conv_t)
    for part, gate, linear in (parts, others):
        if stride == 2:
            padded = nn.functional.pad(part, (1, 1))
            part = (padded[..., :-2] + padded[..., 1:-1] + padded[..., 2:])[..., ::2] / 3
        scores = torch.einsum("oi,bil->bol", linear.weight[..., 0, 0].double(), part) + linear.bias[:, None]
        torch.testing.assert_close(gate.double(), scores.sigmoid(), rtol=1e-5, atol=1e-6)


# Options.


def test_replace_se_keeps_the_other_blocks_plain():
    model = on_paper("dymn04", use_dy_blocks="replace_se")
    assert [index + 1 for index, layer in enumerate(model.layers) if hasattr(layer, "context_gen")] == [
        *(4, 5, 6),
        *range(11, 16),
    ]
    assert "layers.0.block.1.0.weight" in model.state_dict()
    assert not any("conc_se" in key for key in model.state_dict())


@pytest.mark.parametrize(
    ("options", "gone", "come"),
    [
        ({"use_dy_blocks": "replace_se"}, "layers.6.exp_conv.weight", "layers.6.block.0.0.weight"),
        ({"dynamic_conv": False}, "layers.1.depth_conv.residuals.0.bias", "layers.1.depth_conv.module.weight"),
        ({"dynamic_relu": False}, "layers.1.depth_act.coef_net.0.weight", None),
        # The published code keeps the weights behind the gates it leaves out.
        ({"coordinate_attention": False}, None, None),
    ],
)
def test_switches_change_keys_and_answers(options, gone, come):
    whole, without = tiny(), tiny(**options)
    keys = set(whole.state_dict()), set(without.state_dict())
    assert gone is None or gone in keys[0] - keys[1]
    assert come is None or come in keys[1] - keys[0]
    assert (keys[0] == keys[1]) == (gone is None)
    shared = {key: value for key, value in whole.state_dict().items() if key in keys[1]}
    without.load_state_dict(shared, strict=False)
    assert (answer(whole) - answer(without)).abs().max() > 0.01


def test_gates_that_are_left_out_have_no_gradient():
    model = tiny(coordinate_attention=False).train()
    model(features=FEATURES)["logits"].square().sum().backward()
    without = {key.split(".")[-2] for key, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {"conv_f", "conv_t"}


def test_everything_switched_off_is_an_mn():
    model = tiny(**dict.fromkeys(SWITCHES, False))
    plain = create_model("mn", 5, width=0.1, se_dims="none").eval()
    renamed = {}
    for key, value in model.state_dict().items():
        if key.startswith("layers."):
            _, index, part, *rest = key.split(".")
            if part == "context_gen":
                continue
            expands = f"layers.{index}.exp_norm.weight" in model.state_dict()
            place = ["exp", "depth", "proj"].index(part.split("_")[0]) - (not expands)
            kind = ["conv", "norm"].index(part.split("_")[1])
            key = f"features.{int(index) + 1}.block.{place}.{kind}.{rest[-1]}"
        key = key.replace("in_c", "features.0").replace("out_c", "features.16")
        renamed[key] = value
    plain.load_state_dict(renamed, strict=True)
    assert answer(model).std() > 0.05
    torch.testing.assert_close(answer(model), answer(plain), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "key", "shape"),
    [
        ({"num_kernels": 2}, "layers.0.proj_conv.weight", (1, 1, 2, 256)),
        ({"num_pieces": 3}, "layers.0.depth_act.coef_net.0.weight", (96, 32)),
        ({"num_pieces": 3}, "layers.0.depth_act.lambdas", (6,)),
        ({"context_ratio": 2}, "layers.14.context_gen.joint_conv.weight", (128, 160, 1, 1)),
        ({"context_ratio": 8}, "layers.14.context_gen.joint_conv.weight", (120, 160, 1, 1)),
        ({"min_context": 48}, "layers.0.context_gen.joint_conv.weight", (48, 16, 1, 1)),
        ({"max_context": 96}, "layers.14.context_gen.joint_conv.weight", (96, 160, 1, 1)),
        ({"strides": (1, 1, 1, 1)}, "layers.14.proj_conv.weight", (1, 1, 4, 153600)),
    ],
)
def test_options_decide_shapes(options, key, shape):
    assert on_paper("dymn10", **options).state_dict()[key].shape == shape


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"num_classes": -1}, "num_classes"),
        ({"width": 0.5}, "width"),
        ({"strides": [2, 2, 2, 3]}, "strides"),
        ({"use_dy_blocks": "some"}, "use_dy_blocks"),
        ({"temperature": 0}, "temperature"),
        ({"num_kernels": 0}, "num_kernels"),
        ({"num_pieces": 0}, "num_pieces"),
        ({"context_ratio": 0}, "context_ratio"),
        ({"min_context": 64, "max_context": 32}, "max_context"),
        ({"dynamic_conv": "no"}, "dynamic_conv"),
        ({"dropout": 1.0}, "dropout"),
        ({"se_dims": "c"}, "se_dims"),
    ],
)
def test_bad_options_name_the_field(options, field):
    with pytest.raises(CardError) as caught:
        create_model("dymn04", **options)
    assert caught.value.field.startswith(field)
    assert field in str(caught.value)


# Temperature: what no checkpoint stores.


def test_temperature_changes_the_answer_and_the_options():
    model = lively("dymn04", num_classes=5)
    assert model.temperature == model.options["temperature"] == DyMNOptions().temperature == 30
    hot = answer(model)
    model.set_temperature(1)
    assert model.temperature == model.options["temperature"] == 1
    assert {module.temperature for module in model.modules() if isinstance(module, DynamicConv)} == {1}
    assert (answer(model) - hot).abs().max() > 0.05
    with pytest.raises(CardError, match="temperature"):
        model.set_temperature(0)
    assert model.temperature == 1


@pytest.mark.parametrize("name", ["dymn04_as", "dymn04_im"])
def test_published_names_bring_their_temperature(name):
    model = on_paper(name)
    assert model.temperature == {"as": 1, "im": 30}[name[-2:]]
    assert on_paper(name, temperature=7).temperature == 7


def test_temperature_travels_with_the_checkpoint(tmp_path):
    model = tiny()
    model.set_temperature(12.5)
    card = card_of(model, "dymn")
    save_checkpoint(tmp_path / "m.safetensors", model, card)
    loaded = load_checkpoint(tmp_path / "m.safetensors")
    assert loaded.model.temperature == loaded.card.options["temperature"] == 12.5
    assert torch.equal(answer(loaded.model), answer(model))
    again = load_checkpoint(tmp_path / "m.safetensors", num_classes=2)
    assert again.model.temperature == again.card.options["temperature"] == 12.5
    model.set_temperature(1)
    with pytest.raises(CardError, match=r"'temperature': 12\.5"):
        check_card(model, card)


def test_a_card_without_temperature_is_refused(tmp_path):
    model = lively("dymn04", temperature=1)
    card = get_card("dymn04_as")
    silent = card.replace(options={"num_classes": 527})
    path = tmp_path / "dymn04_as.pt"
    torch.save(model.state_dict(), path)
    assert torch.equal(answer(load_checkpoint(path, card).model), answer(model))
    for refused in (
        lambda: check_card(create_model("dymn04"), silent),
        lambda: create_from_card(silent),
        lambda: load_checkpoint(path, silent),
        lambda: load_checkpoint(path, silent, num_classes=3),
    ):
        with pytest.raises(CardError, match=r"1 for published \*_as files, 30 for \*_im") as caught:
            refused()
        assert caught.value.field == "options.temperature"


def test_options_travel_as_json():
    model = tiny(use_dy_blocks="replace_se")
    assert json.loads(json.dumps(model.options)) == model.options
    card = card_of(model, "dymn")
    assert (card.system, card.options) == ("efficientat", model.options)
    assert type(card).from_json(card.to_json()) == card


# One network, two forms: any batch, for training; one clip, for export.


def answers_of_both(model, frames, n_mels):
    features = noise_features(1, frames, n_mels)
    with torch.no_grad():
        whole, clip = model(features=features), clip_form(model)(features)
    assert {name: value.shape for name, value in whole.items()} == {name: value.shape for name, value in clip.items()}
    return [(whole[name], clip[name]) for name in whole]


@pytest.mark.parametrize("frames", [2, 3, 101])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dy_blocks": "replace_se"},
        {"dynamic_conv": False},
        {"dynamic_relu": False},
        {"coordinate_attention": False},
        {"dynamic_conv": False, "dynamic_relu": False, "coordinate_attention": False},
        {"num_kernels": 1},
        {"num_kernels": 3, "num_pieces": 3, "temperature": 7.0},
        {"n_mels": 40, "strides": (1, 2, 1, 2)},
        {"num_classes": 0},
    ],
    ids=lambda options: "-".join(map(str, options)) or "published",
)
def test_the_clip_form_gives_the_same_answers(options, frames):
    model = lively("dymn", **{"width": 0.1, "num_classes": 5, "temperature": 1.0, **options})
    for whole, clip in answers_of_both(model, frames, options.get("n_mels", 128)):
        assert (clip - whole).abs().max() / max(1, whole.std(correction=0)) <= FORMULATIONS


@pytest.mark.contracts
@pytest.mark.parametrize("variant", ["dymn04_as", "dymn10_as", "dymn20_as", "dymn04_replace_se_as"])
def test_the_clip_form_gives_the_published_answers(contracts, variant):
    model = create_model(variant).eval()
    model.load_state_dict(contract_state(contracts, contract_entry(contracts, variant)))
    for whole, clip in answers_of_both(model, 101, 128):
        assert (clip - whole).abs().max() / max(1, whole.std()) <= FORMULATIONS


def test_the_clip_form_holds_copies():
    model = lively("dymn", width=0.1, num_classes=5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    clip = clip_form(model)
    clip.train()(noise_features(1, 64))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_mn_needs_no_clip_form():
    assert clip_form(lively("mn01", num_classes=3)) is None
