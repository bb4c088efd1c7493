"""Changes to training clips: each does what it says, and only chance decides how much."""

import numpy as np
import pytest
import torch

from models_zoo.errors import DataError, SpecError, UnknownNameError
from models_zoo.presets import get_frontend
from train_torch import frontend as frontend_module
from train_torch.augment import (
    augment,
    change_speed,
    coloured_noise,
    draw_mixing,
    equalise,
    fit_length,
    mix_labels,
    mix_waveforms,
)
from train_torch.frontend import Mixing, MixStyle, TorchFrontend
from train_torch.losses import clip_loss
from train_torch.models import create_model
from train_torch.recipes import Augmentation, Recipe, get_recipe, list_recipes

RATE = 32000


def tone(frequency, num_samples=RATE // 2, level=0.3):
    return (level * np.sin(2 * np.pi * frequency * np.arange(num_samples) / RATE)).astype(np.float32)


def peak_frequency(waveform):
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(waveform.size)))
    return np.argmax(spectrum) * RATE / waveform.size


@pytest.mark.parametrize("factor", [0.75, 1.0, 1.3])
def test_speed_moves_pitch_and_length_together(factor):
    changed = change_speed(tone(1000), factor)
    assert changed.dtype == np.float32
    assert abs(changed.size - RATE / 2 / factor) <= 1
    assert peak_frequency(changed) == pytest.approx(1000 * factor, abs=3)


def test_equaliser_stays_within_its_limits_and_is_not_flat():
    impulse = np.zeros(4096, np.float32)
    impulse[2048] = 1
    response = 20 * np.log10(np.abs(np.fft.rfft(equalise(impulse, np.random.default_rng(3), 6.0))))
    assert np.abs(response).max() <= 6.001
    assert np.ptp(response) > 1


@pytest.mark.parametrize("num_samples", [16000, 15999])
def test_noise_has_unit_power_and_falls_with_frequency(num_samples):
    slopes = []
    for seed in range(20):
        noise = coloured_noise(num_samples, np.random.default_rng(seed))
        assert noise.shape == (num_samples,)
        assert noise.dtype == np.float32
        assert np.mean(noise**2) == pytest.approx(1, rel=1e-3)
        power = np.abs(np.fft.rfft(noise)) ** 2
        octave = [np.log2(power[size : 2 * size].mean()) for size in (64, 2048)]
        slopes.append((octave[1] - octave[0]) / 5 * 3.0103)
    assert -6.6 < min(slopes) < max(slopes) < 0.6  # dB per octave
    assert np.ptp(slopes) > 2


def test_fit_length_crops_fills_and_repeats():
    clip, rng = np.arange(1, 11, dtype=np.float32), np.random.default_rng(0)
    crops = {tuple(fit_length(clip, 4, rng)) for _ in range(200)}
    assert crops == {tuple(clip[start : start + 4]) for start in range(7)}
    starts = set()
    for _ in range(200):
        filled = fit_length(clip, 13, rng)
        start = int(np.argmax(filled > 0))
        starts.add(start)
        assert np.array_equal(filled[start : start + 10], clip)
        assert filled.sum() == clip.sum()
    assert starts == {0, 1, 2, 3}
    repeated = fit_length(clip, 25, rng, repeat=True)
    assert set(repeated) == set(clip)
    assert np.bincount(repeated.astype(int), minlength=11)[1:].min() == 2


def test_augment_is_a_function_of_its_generator_and_keeps_its_promises():
    settings = Augmentation(
        speed=(0.8, 1.25), gain_db=(-20, 20), roll_seconds=0.1, equalise_db=6, noise_probability=1, noise_snr_db=(0, 20)
    )
    clip = tone(500, 9000, level=0.9)

    def changed(seed, num_samples):
        rng = np.random.default_rng(seed)
        return augment(clip, settings, rng, sample_rate=RATE, num_samples=num_samples)

    for num_samples in (600, 9000, 20000):
        first = changed(1, num_samples)
        assert first.shape == (num_samples,)
        assert first.dtype == np.float32
        assert np.abs(first).max() <= 1
        assert np.array_equal(first, changed(1, num_samples))
        assert not np.array_equal(first, changed(2, num_samples))
    assert np.array_equal(clip, tone(500, 9000, level=0.9)), "the cached clip was changed in place"


def test_augment_off_changes_nothing():
    clip = tone(500)
    rng = np.random.default_rng(0)
    assert np.array_equal(augment(clip, Augmentation(), rng, sample_rate=RATE, num_samples=clip.size), clip)


def test_noise_is_added_at_the_ratio_asked_for():
    settings = Augmentation(noise_probability=1, noise_snr_db=(20, 20))
    clip = tone(500)
    noisy = augment(clip, settings, np.random.default_rng(0), sample_rate=RATE, num_samples=clip.size)
    ratio = 10 * np.log10(np.mean(clip**2) / np.mean((noisy - clip) ** 2))
    assert ratio == pytest.approx(20, abs=0.1)


def test_silence_survives_every_change():
    settings = get_recipe("digits").augmentation
    silent = augment(np.zeros(8000, np.float32), settings, np.random.default_rng(0), sample_rate=RATE, num_samples=8000)
    assert np.abs(silent).max() == 0


def test_mixing_keeps_each_clip_the_louder_part_and_labels_a_distribution():
    mixing = draw_mixing(500, np.random.default_rng(0), alpha=0.3, probability=0.5)
    assert float(mixing.weight.min()) >= 0.5
    assert 0.4 < float((mixing.weight < 1).float().mean()) < 0.6
    targets = mixing(torch.eye(10)[torch.arange(500) % 10])
    assert torch.allclose(targets.sum(dim=1), torch.ones(500))


def test_mixup_is_the_published_one():
    """Every clip, Beta(0.3, 0.3) of its own, folded to the louder half; clips and labels by the same weight."""
    mixing = draw_mixing(4000, np.random.default_rng(0), alpha=0.3, probability=1.0)
    published = np.random.default_rng(1).beta(0.3, 0.3, 4000)
    for quantile in (0.1, 0.5, 0.9):
        expected = np.quantile(np.maximum(published, 1 - published), quantile)
        assert np.quantile(mixing.weight.numpy(), quantile) == pytest.approx(expected, abs=0.02)
    assert len(np.unique(mixing.weight)) > 2000
    assert sorted(mixing.permutation.tolist()) == list(range(4000))
    values, targets = torch.randn(4000, 3, 5), torch.eye(7)[torch.arange(4000) % 7]
    mixed, labels = mixing(values), mix_labels(mixing, targets)[0]
    for i in (0, 17, 3999):
        weight, other = float(mixing.weight[i]), int(mixing.permutation[i])
        assert torch.allclose(mixed[i], weight * values[i] + (1 - weight) * values[other], atol=1e-6)
        assert torch.allclose(labels[i], weight * targets[i] + (1 - weight) * targets[other], atol=1e-6)


def test_waveforms_are_mixed_at_mean_zero_and_others_left_alone():
    mixing = Mixing(torch.tensor([1, 2, 0]), torch.tensor([0.75, 1.0, 0.5]))
    clips = torch.randn(3, 400, generator=torch.Generator().manual_seed(0)) * 0.1 + torch.tensor([[0.5], [0.3], [-0.2]])
    mixed = mix_waveforms(mixing, clips)
    centred = clips - clips.mean(dim=1, keepdim=True)
    assert torch.allclose(mixed[0], 0.75 * centred[0] + 0.25 * centred[1], atol=1e-7)
    assert torch.equal(mixed[1], clips[1]), "a clip that is not mixed keeps its mean"
    assert torch.allclose(mixed[2], 0.5 * centred[2] + 0.5 * centred[0], atol=1e-7)


def test_waveform_mixing_weights_are_the_published_ones():
    mixing = draw_mixing(8000, np.random.default_rng(0), alpha=2.0, probability=0.5)
    mixed = mixing.weight[mixing.weight < 1].numpy()
    assert len(mixed) / 8000 == pytest.approx(0.5, abs=0.02)
    assert mixed.min() >= 0.5
    assert mixed.mean() == pytest.approx(0.6875, abs=0.005)  # of max(l, 1 - l), l from Beta(2, 2)


def test_roll_is_uniform_over_whole_samples_both_ends_included():
    settings, clip = Augmentation(roll_seconds=0.125), np.zeros(RATE, np.float32)
    clip[16000] = 0.5
    rng = np.random.default_rng(0)
    shifts = [
        int(augment(clip, settings, rng, sample_rate=RATE, num_samples=RATE).argmax()) - 16000 for _ in range(3000)
    ]
    assert -4000 <= min(shifts) < -3980
    assert 3980 < max(shifts) <= 4000
    assert np.mean(shifts) == pytest.approx(0, abs=130)
    tiny = Augmentation(roll_seconds=2 / RATE)
    seen = [int(augment(clip, tiny, rng, sample_rate=RATE, num_samples=RATE).argmax()) - 16000 for _ in range(1000)]
    counts = {shift: seen.count(shift) for shift in (-2, -1, 0, 1, 2)}
    assert sum(counts.values()) == 1000
    assert min(counts.values()) > 140


def test_gain_by_whole_decibels_and_without_clipping():
    settings = get_recipe("finetune_esc50").augmentation.replace(roll_seconds=0.0)
    clip, rng = tone(500, 4000, level=0.9), np.random.default_rng(0)
    gains = []
    for _ in range(600):
        changed = augment(clip, settings, rng, sample_rate=RATE, num_samples=clip.size)
        gains.append(20 * np.log10(changed.max() / clip.max()))
    assert np.abs(np.array(gains) - np.round(gains)).max() < 1e-4
    assert set(np.round(gains).astype(int)) == set(range(-12, 12))
    loud = augment(clip, Augmentation(gain_db=(6, 6)), rng, sample_rate=RATE, num_samples=clip.size)
    assert loud.max() == 1
    anywhere = Augmentation(gain_db=(-12, 11), clip=False)
    assert len({augment(clip, anywhere, rng, sample_rate=RATE, num_samples=4000)[100] for _ in range(50)}) == 50


# Frequency-wise mixstyle


def published_mixstyle(x, own, partner, eps=1e-6):
    """EfficientAT helpers/utils.py on ``(batch, 1, n_mels, time)``, its two draws given."""
    mean, spread = x.mean(dim=[1, 3], keepdim=True), (x.var(dim=[1, 3], keepdim=True) + eps).sqrt()
    own = own.view(-1, 1, 1, 1)
    normed = (x - mean) / spread
    return normed * (spread * own + spread[partner] * (1 - own)) + mean * own + mean[partner] * (1 - own)


def noise_clips(count=6, num_samples=6400):
    noise = torch.randn(count, num_samples, generator=torch.Generator().manual_seed(0))
    return noise * torch.logspace(-3, -0.5, count).unsqueeze(1)


def test_mixstyle_exchanges_statistics_per_band_as_published(monkeypatch):
    own, partner = torch.tensor([0.1, 0.9, 0.5, 0.3, 1.0, 0.0]), torch.tensor([3, 0, 1, 5, 2, 4])
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda self, shape: own.view(shape))
    monkeypatch.setattr(torch, "randperm", lambda count: partner)
    spec, clips = get_frontend("efficientat"), noise_clips()
    plain = TorchFrontend(spec)(clips)
    styled = TorchFrontend(spec, mixstyle=MixStyle(1.0, 0.4)).train()(clips)
    expected = published_mixstyle(plain.unsqueeze(1), own, partner).squeeze(1)
    assert torch.allclose(styled, expected, atol=1e-5)
    assert torch.allclose(styled[4], plain[4], atol=1e-5)
    assert float((styled[0] - plain[0]).abs().max()) > 0.1
    mixing = Mixing(torch.tensor([1, 0, 2, 3, 4, 5]), torch.full((6,), 0.5))
    both = TorchFrontend(spec, mixstyle=MixStyle(1.0, 0.4)).train()(clips, mixing)
    assert torch.allclose(both, mixing(expected), atol=1e-5), "statistics are exchanged before clips are mixed"


def test_mixstyle_acts_in_training_alone_and_on_its_share_of_batches():
    spec, clips = get_frontend("efficientat"), noise_clips(num_samples=1600)
    plain = TorchFrontend(spec)(clips)
    frontend = TorchFrontend(spec, mixstyle=MixStyle(0.4, 0.4)).train()
    torch.manual_seed(0)
    changed = sum(not torch.equal(frontend(clips), plain) for _ in range(300))
    assert 90 < changed < 150
    torch.manual_seed(5)
    first = frontend(clips)
    torch.manual_seed(5)
    assert torch.equal(frontend(clips), first)
    state = torch.get_rng_state()
    assert torch.equal(frontend.eval()(clips), plain)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(torch.equal(TorchFrontend(spec, mixstyle=MixStyle(1.0, 0.4))(clips), plain) for _ in range(20))
    assert torch.isfinite(frontend_module._restyled(torch.randn(3, 1, 1, 8), MixStyle(1.0, 0.4))).all(), "one frame"


def test_mixstyle_blocks_the_gradient_of_the_statistics(monkeypatch):
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda self, shape: torch.full(shape, 0.25))
    features = torch.randn(3, 1, 8, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    styled = frontend_module._restyled(features, MixStyle(1.0, 0.4))
    styled.sum().backward()
    # With the statistics held, each band is scaled by a constant; otherwise the mean would take its part back.
    scale = (styled[..., 1:, :] - styled[..., :-1, :]) / (features[..., 1:, :] - features[..., :-1, :])
    assert torch.allclose(features.grad, scale.mean(dim=2, keepdim=True).expand_as(features).detach(), atol=1e-3)


def test_impossible_mixstyle():
    for fields in ((1.1, 0.4), (0.5, 0.0), (-0.1, 0.4)):
        with pytest.raises(SpecError):
            MixStyle(*fields)


def test_single_label_loss_is_smoothed_cross_entropy():
    logits, targets = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.eye(4)[[0, 1, 2, 3, 0, 1]]
    smoothed = 0.9 * targets + 0.1 / 4
    expected = -(smoothed * torch.log_softmax(logits, dim=1)).sum(dim=1).mean()
    assert clip_loss(logits, targets, "single_label", label_smoothing=0.1) == pytest.approx(float(expected), rel=1e-5)


def test_multi_label_loss_is_smoothed_binary_cross_entropy():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    targets = (torch.arange(24).reshape(6, 4) % 3 == 0).float()
    smoothed = 0.9 * targets + 0.05
    p = torch.sigmoid(logits)
    expected = -(smoothed * torch.log(p) + (1 - smoothed) * torch.log(1 - p)).mean()
    assert clip_loss(logits, targets, "multi_label", label_smoothing=0.1) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_names_what_exists(name):
    recipe = get_recipe(name)
    assert recipe.description
    assert type(recipe).from_json(recipe.to_json()) == recipe
    options = dict(recipe.model_options)
    options |= {"n_mels": recipe.n_mels or get_frontend(recipe.frontend).mel.n_mels}
    options |= {} if recipe.task == "embedding" else {"num_classes": 2}
    with torch.device("meta"):  # shapes alone: some are large
        create_model(recipe.model, **options)


def test_shipped_recipes_say_whom_the_weights_are_owed_to():
    assert {"default", "digits", "instruments"} <= set(list_recipes())
    for name in ("digits", "instruments"):
        assert get_recipe(name).license.startswith("CC BY")
        assert get_recipe(name).training_data


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"lr": -1.0}, "lr"),
        ({"epochs": 0}, "epochs"),
        ({"rate": 1}, "rate"),
        ({"crop_seconds_min": 3.0, "seconds": 2.0}, "crop_seconds_min"),
        ({"augmentation": {"speed": [1.2, 0.8]}}, "augmentation.speed"),
        ({"augmentation": {"speed": [0.0, 1.0]}}, "augmentation.speed"),
    ],
)
def test_impossible_recipes_name_the_field(fields, field):
    with pytest.raises(SpecError) as caught:
        Recipe.from_dict(fields)
    assert caught.value.field == field


def test_recipes_that_are_not_there(tmp_path):
    with pytest.raises(UnknownNameError, match="digits"):
        get_recipe("digit")
    with pytest.raises(DataError, match="cannot read"):
        get_recipe(tmp_path / "none.json")
