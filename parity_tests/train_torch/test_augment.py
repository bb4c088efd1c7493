"""Changes to training clips: each does what it says, and only chance decides how much."""

import numpy as np
import pytest
import torch

from models_zoo.errors import DataError, SpecError, UnknownNameError
from models_zoo.presets import get_frontend
from train_torch.augment import augment, change_speed, coloured_noise, draw_mixing, equalise, fit_length
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
    assert Recipe.from_json(recipe.to_json()) == recipe
    create_model(recipe.model, num_classes=2, n_mels=get_frontend(recipe.frontend).mel.n_mels)


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
