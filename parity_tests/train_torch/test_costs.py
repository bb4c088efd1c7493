"""What networks cost: every card recomputed, published figures, and the rules of counting."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn

from models_zoo import registry
from models_zoo.cards import LengthPolicy, ModelInput
from models_zoo.presets import get_frontend
from models_zoo.registry import get_card, list_models
from parity_tests import make_cards
from parity_tests.make_cards import CARDS, completed, costs_of
from parity_tests.networks import card_of
from train_torch.costs import count_costs
from train_torch.models import create_model, new_card

FEATURES = (ModelInput(name="features", axes=("batch", "128", "time"), source="frontend"),)
EFFICIENTAT = get_frontend("efficientat")
FRAMES = 1000  # of a 10 s clip

PUBLISHED = {
    "mn04_as": (0.983, 0.11),
    "mn05_as": (1.43, 0.16),
    "mn10_as": (4.88, 0.54),
    "mn20_as": (17.91, 2.06),
    "mn30_as": (39.09, 4.55),
    "mn40_as": (68.43, 8.03),
    "mn40_as_ext": (68.43, 8.03),
    "mn40_as_no_im_pre": (68.43, 8.03),
    "mn10_as_hop_15": (4.88, 0.36),
    "mn10_as_hop_20": (4.88, 0.27),
    "mn10_as_hop_25": (4.88, 0.22),
    "mn10_as_mels_40": (4.88, 0.21),
    "mn10_as_mels_64": (4.88, 0.27),
    "mn10_as_mels_256": (4.88, 1.08),
    "dymn04_as": (1.97, 0.12),
    "dymn10_as": (10.57, 0.58),
    "dymn20_as": (40.02, 2.2),
}
"""Name -> (millions of parameters, billions of multiply-accumulates) as the publisher rounds them."""


@pytest.mark.parametrize("name", list_models())
def test_every_card_states_what_is_counted(name):
    """Fails where ``python -m parity_tests.make_cards`` has not been run."""
    card = get_card(name)
    assert (card.parameters, card.macs) == costs_of(card)
    assert card.frontend is None or card.length_policy.min >= card.frontend.min_samples
    text = (CARDS / f"{name}.json").read_text(encoding="utf-8")
    assert completed(text, card) == text


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_figures_are_ours_rounded(name):
    card, (millions, billions) = get_card(name), PUBLISHED[name]
    digits = len(str(billions).partition(".")[2])
    assert round(card.macs / 1e9, digits) == billions
    counted = card.parameters
    if name.startswith("dymn"):
        # The publisher counts the buffers in: statistics of norms, constants of the dynamic activation.
        buffers = sum(buffer.numel() for buffer in create_model(name).buffers())
        counted += buffers
    assert counted / 1e6 == pytest.approx(millions, abs=0.006)  # 10.575 is published as 10.57


@pytest.mark.contracts
@pytest.mark.parametrize("name", ["mn04_as", "mn10_as", "mn10_as_fc", "dymn04_as", "dymn10_as"])
def test_parameters_are_those_recorded(contracts, name):
    variants = json.loads((contracts / "efficientat" / "keys.json").read_text())["variants"]
    assert get_card(name).parameters == variants[name]["n_params"]


class Layers(nn.Module):
    """Convolution of 1 to 6 channels, stride 2; grouped convolution; head of 10 on the mean; and what costs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, (5, 1), padding=(2, 0), groups=6)
        self.head = nn.Linear(6, 10)
        self.calls = 0

    def forward(self, features):
        self.calls += 1
        x = torch.relu(self.norm(self.first(features.unsqueeze(1))))
        return {"logits": self.head(torch.sigmoid(self.depthwise(x)).mean((2, 3)))}


def test_the_rule_of_counting():
    model = Layers().train()
    positions = 64 * (FRAMES // 2)
    costs = count_costs(model, FEATURES, EFFICIENTAT)
    assert costs.parameters == 6 * 9 + 2 * 6 + (6 * 5 + 6) + (6 * 10 + 10)
    assert costs.macs == positions * 6 * 9 + positions * 6 * 5 + 6 * 10
    assert model.calls == 0, "a copy is run, not the model"
    assert model.training
    assert model.norm.num_batches_tracked == 0
    assert {value.device.type for value in model.state_dict().values()} == {"cpu"}


def test_a_dynamic_convolution_is_one_convolution_and_the_sum_of_its_kernels():
    options = {"num_classes": 3, "dynamic_relu": False, "coordinate_attention": False}
    kernels = {}
    plain, *mixed = (
        count_costs(create_model("dymn04", **options, **changes), FEATURES, EFFICIENTAT)
        for changes in ({"dynamic_conv": False}, {"num_kernels": 2}, {"num_kernels": 5})
    )
    model = create_model("dymn04", **options, num_kernels=1)
    for name, module in model.named_modules():
        if hasattr(module, "residuals"):
            kernels[name] = (module.weight.numel(), module.residuals[0].in_features)
    assert len(kernels) == 3 * 15 - sum(not hasattr(block, "exp_conv") for block in model.layers)
    for number, costs in zip((2, 5), mixed, strict=True):
        # per kernel: its entries, times its share, summed; and its score from the context
        assert costs.macs - plain.macs == number * sum(size + context for size, context in kernels.values())


@pytest.mark.parametrize(
    ("policy", "frames"),
    [
        (LengthPolicy(), FRAMES),
        (LengthPolicy(max=64000), 200),
        (LengthPolicy(min=640000), 2000),
        (LengthPolicy(multiple_of=48000), 900),
    ],
)
def test_the_clip_is_ten_seconds_or_the_nearest_legal_length(policy, frames):
    model = Layers()
    costs = count_costs(model, FEATURES, EFFICIENTAT, policy)
    assert costs.macs == 64 * frames // 2 * (6 * 9 + 6 * 5) + 60


def test_a_recurrent_part_counts_its_steps():
    """Recomputed from the definition: per step and direction three gates of the input and of the last state."""
    inputs = (ModelInput(name="features", axes=("batch", "128", "time"), source="frontend"),)
    tiny = {"filters": [8], "pools": [[4, 128]], "rnn_size": 16, "num_classes": 3}
    costs = {
        layers: count_costs(create_model("crnn", **tiny, rnn_layers=layers), inputs, get_frontend("dcase_2024"))
        for layers in (1, 2)
    }
    steps = 626 // 4
    convolution, gate, heads = 626 * 128 * 9 * 8, 626 * 128 * 8 * 8, 2 * 3 * 32 * steps
    assert costs[1].macs == convolution + gate + 2 * steps * 3 * 16 * (8 + 16) + heads
    assert costs[2].macs - costs[1].macs == 2 * steps * 3 * 16 * (32 + 16)


def test_a_network_tied_to_a_number_of_frames_is_counted_at_it():
    short, long = (
        card_of(create_model("mn01", num_classes=3, se_dims="ct", num_frames=frames), "mn01").macs
        for frames in (96, 192)
    )
    assert long == pytest.approx(2 * short, rel=0.01)


def test_inputs_that_are_no_audio_leave_the_multiplications_open():
    model = Layers()
    foreign = (ModelInput(name="features", axes=("batch", "128", "time"), source="caller"),)
    assert count_costs(model, foreign, EFFICIENTAT) == (count_costs(model, FEATURES, EFFICIENTAT).parameters, None)
    assert count_costs(model, FEATURES, None).macs is None


def test_a_card_made_for_a_model_states_its_costs():
    model = create_model("mn01", num_classes=7)
    card = new_card(
        "mine", "mn01", model=model, frontend=EFFICIENTAT, task="single_label", labels=[f"l{i}" for i in range(7)]
    )
    assert (card.parameters, card.macs) == count_costs(model, model.inputs, EFFICIENTAT)
    assert card.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_the_script_completes_a_card_and_leaves_the_rest(tmp_path, monkeypatch, capsys):
    text = (CARDS / "mn01_as.json").read_text(encoding="utf-8")
    bare = re.sub(r'(?m)^  "(parameters|macs|length_policy)": .*\n', "", text)
    (tmp_path / "mn01_as.json").write_text(bare, encoding="utf-8")
    monkeypatch.setattr(registry, "_CARDS", tmp_path)
    monkeypatch.setattr(make_cards, "CARDS", tmp_path)
    assert get_card("mn01_as").macs is None
    make_cards.main()
    assert (tmp_path / "mn01_as.json").read_text(encoding="utf-8") == text
    make_cards.main()
    assert capsys.readouterr().out.count("\n") == 1, "the second time there is nothing to do"
