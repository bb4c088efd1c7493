"""PANNs are masked and mixed inside, where published: behind bn0 and pre_block4, in training alone."""

import numpy as np
import pytest
import torch

from models_zoo.errors import DataError, SpecError
from parity_tests.networks import card_of, noise_inputs
from train_torch import classifier as module
from train_torch.augment import draw_pairs
from train_torch.classifier import Classifier
from train_torch.data import Batch
from train_torch.frontend import Mixing, PairMixing, SpecMasks, masked
from train_torch.models import _ARCHITECTURES, create_model, list_architectures
from train_torch.models.panns import PannsNetwork
from train_torch.recipes import Augmentation, Recipe

COUNT, WIDTH = 6, 0.05
PUBLISHED = {
    "mixup_alpha": 1.0,
    "mixup_pairs": True,
    "mixup_at": "norm",
    "masks": (8, 64),
    "time_masks": 2,
    "mel_masks": 2,
    "masks_at": "norm",
}
MASKS = SpecMasks(8, 64, num_time=2, num_mel=2, at="norm")


def made(name, settings, **fields):
    """Return a network without dropout, what its parts named below put out, and its classifier in training mode."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=COUNT, width=WIDTH, dropout=0.0, head_dropout=0.0)
    seen = {}
    parts = dict(model.named_modules())
    for place in ("bn0", "base.bn0", "pre_block4"):
        if place in parts:  # before the classifier's own hooks, so what these are given
            parts[place].register_forward_hook(lambda _, __, output, part=place: seen.update({part: output}))
    recipe = Recipe(augmentation=Augmentation(**settings), **fields)
    classifier = Classifier(model, card_of(model, name), recipe)
    for place in ("conv_block1", "base.conv_block1", "conv_block2"):
        if place in parts:
            parts[place].register_forward_pre_hook(lambda _, inputs, part=place: seen.update({part: inputs[0]}))
    classifier.log = lambda *_, **__: None
    return model, seen, classifier.train()


def waveforms(count=2 * COUNT):
    return torch.randn(count, 32000, generator=torch.Generator().manual_seed(1)) * 0.1


def norm_output(seen, part="bn0"):
    return seen[part].transpose(1, 3)


def test_masks_hide_stripes_of_normed_features_in_training_alone():
    _, seen, classifier = made("cnn6", {**PUBLISHED, "mixup_alpha": 0.0, "mixup_pairs": False})
    classifier.logits(waveforms())
    before, after = norm_output(seen), seen["conv_block1"]
    hidden = after != before
    assert (after[hidden] == 0).all()
    frames, mels = hidden.all(dim=3)[:, 0].sum(dim=1), hidden.all(dim=2)[:, 0].sum(dim=1)
    assert 0 < frames.max() <= 2 * 63
    assert 0 < mels.max() <= 2 * 7
    assert len(set(frames.tolist())) > 3, "drawn for each clip"
    # What is hidden is whole stripes: where neither a frame nor a band is hidden, nothing is.
    stripes = hidden.all(dim=3, keepdim=True) | hidden.all(dim=2, keepdim=True)
    assert torch.equal(stripes.expand_as(hidden), hidden)
    classifier.eval()
    classifier.logits(waveforms())
    assert torch.equal(norm_output(seen), seen["conv_block1"])


def test_two_masks_of_each_kind_with_the_published_widths():
    ones = torch.ones(2000, 1, 80, 40)
    for masks, dim, most in ((SpecMasks(0, 64), 3, 63), (SpecMasks(8, 0), 2, 7)):
        widths = (masked(ones, masks) == 0).all(dim=dim)[:, 0].sum(dim=1)
        assert (int(widths.min()), int(widths.max())) == (0, most)
        assert abs(float(widths.float().mean()) - most / 2) < most * 0.03, "whole numbers, all alike"
    two = (masked(ones, SpecMasks(8, 0, num_mel=2)) == 0).all(dim=2)[:, 0].sum(dim=1)
    assert int(two.max()) > 7


def test_norms_see_what_is_hidden():
    """The statistics are of whole features: masks come behind the norm."""
    means = []
    for masks in (None, (8, 64)):
        model, _, classifier = made("cnn6", {**PUBLISHED, "masks": masks})
        classifier.training_step(Batch(waveforms(), torch.eye(COUNT).repeat(2, 1), torch.arange(2 * COUNT)), 0)
        means.append(model.bn0.running_mean.clone())
    assert torch.equal(*means)


def test_masks_come_before_mixing():
    _, seen, classifier = made("cnn6", PUBLISHED)
    mixing = PairMixing(torch.linspace(0.2, 0.7, COUNT))
    torch.manual_seed(5)
    classifier.outputs(waveforms(), mixing)
    torch.manual_seed(5)
    expected = masked(norm_output(seen), MASKS)
    assert torch.equal(seen["conv_block1"], mixing(expected))
    assert len(seen["conv_block1"]) == COUNT


@pytest.fixture
def step(monkeypatch):
    """Return a function: classifier -> targets at the loss of one step on twelve clips, clip i of class i % 6."""
    seen = {}

    def run(classifier):
        real = module.clip_loss

        def loss(scores, targets, *args, **fields):
            seen.update(targets=targets)
            return real(scores, targets, *args, **fields)

        monkeypatch.setattr(module, "clip_loss", loss)
        batch = Batch(waveforms(), torch.eye(COUNT).repeat(2, 1), torch.arange(2 * COUNT))
        seen["loss"] = classifier.training_step(batch, 0)
        return seen

    return run


def test_labels_mix_with_the_weights_and_pairs_of_the_features(step):
    _, inside, classifier = made("cnn6", {**PUBLISHED, "masks": None})
    targets = step(classifier)["targets"]
    assert targets.shape == (COUNT, COUNT)
    plain = norm_output(inside)
    for i in range(COUNT):
        first, second = (2 * i) % COUNT, (2 * i + 1) % COUNT
        weight = targets[i, first]
        assert 0 < weight < 1
        assert targets[i, second] == pytest.approx(1 - float(weight), abs=1e-6)
        mixed = weight * plain[2 * i] + (1 - weight) * plain[2 * i + 1]
        assert torch.allclose(inside["conv_block1"][i], mixed, atol=1e-5)
    assert len({round(float(targets[i].max()), 4) for i in range(COUNT)}) > 3, "a weight for each pair"


def test_the_draw_is_beta_for_an_even_number():
    weight = draw_pairs(20000, np.random.default_rng(0), alpha=1.0).weight
    assert weight.shape == (10000,)
    assert abs(float(weight.mean()) - 0.5) < 0.01
    assert abs(float(weight.var()) - 1 / 12) < 0.005, "uniform, not folded"
    with pytest.raises(DataError, match="5 clips to mix in pairs; expected an even number"):
        draw_pairs(5, np.random.default_rng(0), alpha=1.0)


def test_without_mixing_a_batch_stays_whole(step):
    _, inside, classifier = made("cnn6", {**PUBLISHED, "mixup_alpha": 0.0, "mixup_pairs": False})
    assert torch.equal(step(classifier)["targets"], torch.eye(COUNT).repeat(2, 1))
    assert len(inside["conv_block1"]) == 2 * COUNT


def test_both_branches_of_a_two_input_network_mix_by_one_draw():
    _, seen, classifier = made("wavegram_logmel_cnn14", {**PUBLISHED, "masks": None})
    mixing = PairMixing(torch.linspace(0.2, 0.7, COUNT))
    classifier.outputs(waveforms(), mixing)
    assert torch.equal(seen["conv_block1"], mixing(norm_output(seen)))
    joined, of_waveform = seen["conv_block2"], mixing(seen["pre_block4"])
    assert len(joined) == COUNT
    assert torch.equal(joined[:, -of_waveform.shape[1] :], of_waveform)


def test_masks_are_of_the_features_alone():
    _, seen, classifier = made("wavegram_logmel_cnn14", {**PUBLISHED, "mixup_alpha": 0.0, "mixup_pairs": False})
    classifier.outputs(waveforms())
    assert not torch.equal(seen["conv_block1"], norm_output(seen))
    width = seen["pre_block4"].shape[1]
    assert torch.equal(seen["conv_block2"][:, -width:], seen["pre_block4"])


def test_a_waveform_network_mixes_its_wavegram():
    _, seen, classifier = made("wavegram_cnn14", {**PUBLISHED, "masks": None})
    mixing = PairMixing(torch.linspace(0.2, 0.7, COUNT))
    classifier.outputs(waveforms(), mixing)
    assert torch.equal(seen["conv_block2"], mixing(seen["pre_block4"]))


def test_two_inputs_are_mixed_alike_before_the_network():
    """At another place than ``norm`` the waveform goes in mixed as the features are."""
    model, _, classifier = made("wavegram_logmel_cnn14", {"mixup_alpha": 1.0, "mixup_at": "features"})
    given = {}
    model.register_forward_pre_hook(lambda _, args, kwargs: given.update(kwargs), with_kwargs=True)
    clips = waveforms(4)
    mixing = Mixing(torch.tensor([1, 0, 3, 2]), torch.tensor([0.9, 0.8, 0.7, 0.6]))
    classifier.outputs(clips, mixing)
    assert torch.equal(given["waveform"], mixing(clips))
    assert torch.allclose(given["features"], mixing(classifier.frontend(clips)))
    classifier.outputs(clips)
    assert torch.equal(given["waveform"], clips)


def test_a_frozen_base_is_masked_and_mixed_all_the_same():
    model, seen, classifier = made("transfer_cnn14", {**PUBLISHED, "masks": (8, 64)}, freeze=("base",))
    assert not model.base.bn0.training
    mixing = PairMixing(torch.linspace(0.2, 0.7, COUNT))
    torch.manual_seed(5)
    classifier.outputs(waveforms(), mixing)
    torch.manual_seed(5)
    assert torch.equal(seen["base.conv_block1"], mixing(masked(norm_output(seen, "base.bn0"), MASKS)))


def test_hooks_leave_names_answers_and_traces_alone():
    plain = create_model("cnn6", num_classes=COUNT, width=WIDTH)
    model, _, classifier = made("cnn6", PUBLISHED)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    plain.load_state_dict(model.state_dict())
    inputs = noise_inputs(plain, 3, 64)
    classifier.eval()
    with torch.inference_mode(), classifier._hooks.mixing(PairMixing(torch.full((1,), 0.5))):
        # Contiguous: the classifier keeps weights channels last, whose sums round differently.
        answer = model.to(memory_format=torch.contiguous_format)(**inputs)["logits"]
        assert torch.equal(answer, plain.eval()(**inputs)["logits"])


def test_hooks_survive_that_norms_are_replaced():
    """Several GPUs synchronise their norms: other modules under the same names, put there before the fit begins."""
    model, _, classifier = made("cnn6", PUBLISHED)
    torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(model.bn0, torch.nn.SyncBatchNorm)
    mixing = PairMixing(torch.full((COUNT,), 0.5))
    assert len(classifier.outputs(waveforms(), mixing)[0]) == 2 * COUNT, "lost with the norm"
    for _ in range(2):
        classifier.on_fit_start()
        assert len(classifier.outputs(waveforms(), mixing)[0]) == COUNT, "found again, once"


def test_a_draw_ends_with_its_step():
    _, seen, classifier = made("cnn6", PUBLISHED)
    classifier.outputs(waveforms(), PairMixing(torch.full((COUNT,), 0.5)))
    classifier.outputs(waveforms())
    assert len(seen["conv_block1"]) == 2 * COUNT


@pytest.mark.parametrize(
    ("name", "settings", "field"),
    [
        ("mn01", {"masks": (8, 8), "masks_at": "norm"}, "masks_at"),
        ("mn01", {"mixup_alpha": 1.0, "mixup_at": "norm"}, "mixup_at"),
        ("wavegram_cnn14", {"masks": (8, 8), "masks_at": "norm"}, "masks_at"),
        ("wavegram_cnn14", {"masks": (8, 8)}, "masks"),
        ("wavegram_cnn14", {"mel_jitter": (10, 2000)}, "mel_jitter"),
        ("wavegram_cnn14", {"mixup_alpha": 1.0, "mixup_at": "mel"}, "mixup_at"),
    ],
)
def test_a_network_without_the_place_says_so(name, settings, field):
    options = {} if name == "mn01" else {"width": WIDTH}
    model = create_model(name, num_classes=2, **options)
    with pytest.raises(SpecError) as caught:
        Classifier(model, card_of(model, name), Recipe(augmentation=Augmentation(**settings)))
    assert caught.value.field == f"augmentation.{field}"


def test_every_place_exists_in_every_network():
    found = 0
    for name in list_architectures():
        if not issubclass(_ARCHITECTURES[name].build, PannsNetwork):
            continue
        model = create_model(name, width=WIDTH)
        for part in (*model.masked_at, *model.mixed_at):
            model.get_submodule(part)
        assert model.mixed_at
        found += 1
    assert found == 17
