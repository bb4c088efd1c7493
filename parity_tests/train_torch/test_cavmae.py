"""CAV-MAE: what the published code answered, in every mode and masking, and what our networks refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from models_zoo.cards import ModelCard
from models_zoo.errors import CardError, CheckpointError, ClipLengthError, SpecError
from models_zoo.images import ImageSpec, load_image
from models_zoo.presets import get_frontend
from models_zoo.registry import get_card
from parity_tests.networks import contract_state
from parity_tests.tolerances import (
    GOLDEN_CAV_MAE,
    GOLDEN_CAV_MAE_LOSSES,
    GOLDEN_CAV_MAE_POSITIONS,
    GOLDEN_CAV_MAE_SMALL_BLOCK,
)
from train_torch.checkpoint import load_checkpoint
from train_torch.frontend import TorchFrontend
from train_torch.models import check_card, create_from_card, create_model, new_card
from train_torch.models.cavmae import CAVMAEFT, CAVMAEFTOptions
from train_torch.models.cavmae_blocks import position_table
from train_torch.models.cavmae_initial import start_from_vision_mae
from train_torch.models.cavmae_pretrain import (
    CAVMAE,
    CAVMAEOptions,
    Masking,
    contrastive_loss,
    draw_masking,
    patch_values,
)

MODES = ("multimodal", "audioonly", "videoonly", "missingaudioonly", "missingvideoonly")
SMALL = {"embed_dim": 24, "num_heads": 3, "audio_length": 64, "n_mels": 32, "image_size": 32}
NAMES = {"label_dim": "num_classes"}
PLACES_V = [0, 1, 13, 14, 15, 100, 195]


def network(variant, contracts):
    """Return the network of a recorded variant with the weights its goldens were recorded with."""
    entry = json.loads((contracts / "cav_mae" / "keys.json").read_text())[variant]
    options = {NAMES.get(key, key): value for key, value in entry["config"].items()}
    if entry["class"] == "CAVMAE":
        model = CAVMAE(CAVMAEOptions(**options))
    else:
        alone = {"mode": "audioonly", "image": False} if entry["class"] == "CAVMAEFTAudio" else {}
        model = CAVMAEFT(CAVMAEFTOptions(**options, **alone))
    fresh = model.state_dict()
    assert {key: list(value.shape) for key, value in fresh.items()} == entry["keys"]
    assert list(fresh) == list(entry["keys"])
    assert sum(parameter.numel() for parameter in model.parameters()) == entry["n_params"]
    fixed = {key: fresh[key].numpy() for key in entry["fixed"]}
    model.load_state_dict(contract_state(contracts, {**entry, "fixed": fixed}), strict=True)
    return model.eval()


def noise(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def pair(seed, batch, frames=1024):
    """Return the recorded (features, image)."""
    return noise(seed, batch, frames, 128), noise(seed + 100, batch, 3, 224, 224)


def answer(model, mode, features, image):
    model.set_mode(mode)
    given = {"features": features, "image": image}
    with torch.no_grad():
        return {
            name: value.numpy()
            for name, value in model(**{part.name: given[part.name] for part in model.inputs}).items()
        }


def apart(actual, expected):
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max())


@pytest.fixture(scope="module")
def goldens(contracts):
    return np.load(contracts / "cav_mae" / "golden_tiny.npz")


def check_fine_tuned(model, golden, prefix, seed, batch, frames):
    """Compare everything that was recorded of a network on a batch."""
    features, image = pair(seed, batch, frames)
    answers = {mode: answer(model, mode, features, image) for mode in MODES}
    for mode in MODES:
        assert apart(answers[mode]["logits"], golden[f"{prefix}.{mode}"]) <= GOLDEN_CAV_MAE, mode
    assert apart(answers["audioonly"]["embedding"], golden[f"{prefix}.feat_a_mean"]) <= GOLDEN_CAV_MAE
    assert apart(answers["videoonly"]["embedding"], golden[f"{prefix}.feat_v_mean"]) <= GOLDEN_CAV_MAE
    recorded = golden[f"{prefix}.feat_a_rows"]
    at = {5: [0, 1, 63, 64, 511], 7: [0, 1, 63, 64, 65, 300, 511], 8: [0, 1, 5, 12, 13, 14, 50, 103]}
    with torch.no_grad():
        heard = model.joined(model.audio_tokens(features), "a")[:, at[recorded.shape[1]]].numpy()
        seen = model.joined(model.image_tokens(image), "v")[:, PLACES_V].numpy()
    assert apart(heard, recorded) <= GOLDEN_CAV_MAE
    assert apart(seen, golden[f"{prefix}.feat_v_rows"]) <= GOLDEN_CAV_MAE


@pytest.mark.contracts
@pytest.mark.parametrize(
    ("variant", "prefix", "frames", "seeds"),
    [
        ("cavmaeft_tiny_11", "ft_tiny", 1024, (11, 12)),
        ("cavmaeft_tiny_11_t208", "ft_tiny_t208", 208, (229, 230)),
        ("cavmaeft_tiny_11_t512", "ft_tiny_t512", 512, (533, 534)),
    ],
)
def test_fine_tuned_networks_answer_as_published(contracts, goldens, variant, prefix, frames, seeds):
    model = network(variant, contracts)
    for seed, batch in zip(seeds, (1, 3), strict=True):
        check_fine_tuned(model, goldens, f"{prefix}.b{batch}", seed, batch, frames)


@pytest.mark.contracts
def test_one_weight_shows(contracts, goldens):
    model = network("cavmaeft_tiny_11", contracts)
    with torch.no_grad():
        model.blocks_a[5].mlp.fc1.weight[3, 7] += 5.0
    moved = answer(model, "multimodal", *pair(11, 1))["logits"]
    assert apart(moved, goldens["ft_tiny.b1.multimodal_perturbed"]) <= GOLDEN_CAV_MAE
    assert apart(moved, goldens["ft_tiny.b1.multimodal"]) > 100 * GOLDEN_CAV_MAE


@pytest.mark.contracts
def test_norms_see_tiny_tokens_as_published(contracts, goldens):
    block = network("cavmaeft_tiny_11", contracts).blocks_u[0]
    tokens = torch.from_numpy((np.random.default_rng(81).standard_normal((1, 5, 96)) * 1e-3).astype(np.float32))
    for stream in (None, "a", "v"):
        with torch.no_grad():
            answered = block(tokens, stream).numpy()
        assert apart(answered, goldens[f"block_u0_small.{stream}"]) <= GOLDEN_CAV_MAE_SMALL_BLOCK


@pytest.mark.contracts
def test_the_audio_network_is_the_audio_half(contracts):
    """Without the parameters of pictures the audio-only answer is the same, bit for bit."""
    whole, half = network("cavmaeft_tiny_11", contracts), network("cavmaeftaudio_tiny_11", contracts)
    half.load_state_dict({key: whole.state_dict()[key] for key in half.state_dict()}, strict=True)
    features = noise(7, 2, 1024, 128)
    with torch.no_grad():
        whole.set_mode("audioonly")
        assert torch.equal(whole(features=features)["logits"], half(features=features)["logits"])


@pytest.mark.contracts
def test_places_are_as_published(goldens):
    sound = [0, 1, 63, 64, 65, 300, 511]
    for width in (64, 96, 512, 768):
        assert (
            apart(position_table(8, 64, width)[0, sound].numpy(), goldens[f"pos_a_{width}_rows"])
            <= GOLDEN_CAV_MAE_POSITIONS
        )
        assert (
            apart(position_table(14, 14, width)[0, PLACES_V].numpy(), goldens[f"pos_v_{width}_rows"])
            <= GOLDEN_CAV_MAE_POSITIONS
        )
    whole = position_table(8, 64, 96)[0].numpy()
    assert np.abs(whole - goldens["pos_a_96_full"].astype(np.float32)).max() <= 1e-3  # stored as float16


def test_a_shorter_grid_has_the_first_columns():
    long, short = position_table(8, 64, 96), position_table(8, 13, 96)
    assert torch.equal(long.unflatten(1, (8, 64))[:, :, :13].flatten(1, 2), short)


MASKED = {
    "mae_tiny": ("cavmae_tiny", 3, 31, 0.75, 0.75),
    "mae_tiny_b1_r50_65": ("cavmae_tiny", 1, 32, 0.5, 0.65),
    "mae_tiny_time": ("cavmae_tiny", 2, 41, 0.75, 0.75),
    "mae_tiny_freq": ("cavmae_tiny", 2, 42, 0.75, 0.75),
    "mae_tiny_tf": ("cavmae_tiny", 2, 43, 0.75, 0.75),
    "mae_tiny_u2": ("cavmae_tiny_u2", 2, 51, 0.75, 0.75),
}


def uniform(seed, batch, tokens):
    return torch.from_numpy(np.random.default_rng(seed).random((batch, tokens)).astype(np.float32))


def check_pretrained(model, golden, name, batch, seed, ratio_a, ratio_v):
    features, image = pair(seed, batch)
    restore = torch.from_numpy(golden[f"{name}.ids_restore_a"].astype(np.int64))
    sound = Masking(restore.argsort(1), int(512 * (1 - ratio_a)))
    picture = draw_masking(uniform(seed + 300, batch, 196), ratio_v)
    assert np.array_equal(sound.removed.numpy(), golden[f"{name}.mask_a"])
    assert np.array_equal(picture.removed.numpy(), golden[f"{name}.mask_v"])
    for norm_pix, key in ((True, "losses_pix1"), (False, "losses_pix0")):
        if f"{name}.{key}" not in golden:
            continue
        model.declared = model.declared.replace(norm_pix_loss=norm_pix)
        with torch.no_grad():
            losses = model.losses(features, image, sound, picture)
        mae = losses["mae_a"] + losses["mae_v"]
        got = [losses["loss"], mae, losses["mae_a"], losses["mae_v"], 0.01 * losses["contrast"]]
        assert np.allclose(np.array(got), golden[f"{name}.{key}"][:5], rtol=GOLDEN_CAV_MAE_LOSSES, atol=1e-9)
        assert float(losses["contrast_accuracy"]) == pytest.approx(golden[f"{name}.{key}"][5])
    with torch.no_grad():
        latent, heard, seen = model.encoded(features, image, sound, picture)
        predicted_a, predicted_v = model.decoded(latent, sound, picture)
        for key, bidirectional in (("contrast_uni", False), ("contrast_bi", True)):
            got = torch.stack(contrastive_loss(heard, seen, bidirectional=bidirectional)).numpy()
            assert np.allclose(got, golden[f"{name}.{key}"], rtol=GOLDEN_CAV_MAE_LOSSES, atol=1e-9)
    assert apart(heard.numpy(), golden[f"{name}.ca_mean"]) <= GOLDEN_CAV_MAE
    assert apart(seen.numpy(), golden[f"{name}.cv_mean"]) <= GOLDEN_CAV_MAE
    if f"{name}.latent_rows" in golden:
        rows = golden[f"{name}.latent_rows_idx"]
        assert apart(latent[:, rows].numpy(), golden[f"{name}.latent_rows"]) <= GOLDEN_CAV_MAE
        assert apart(latent.mean(1).numpy(), golden[f"{name}.latent_mean"]) <= GOLDEN_CAV_MAE
        assert apart(predicted_a[:, [0, 70, 511], :64].numpy(), golden[f"{name}.pred_a_rows"]) <= GOLDEN_CAV_MAE
        assert apart(predicted_v[:, [0, 20, 195], :64].numpy(), golden[f"{name}.pred_v_rows"]) <= GOLDEN_CAV_MAE
        assert np.array_equal(picture.restore.numpy(), golden[f"{name}.ids_restore_v"])
    if f"{name}.feat_a_mean" in golden:
        with torch.no_grad():
            embeddings = model(features=features, image=image)
        assert apart(embeddings["audio_embedding"].numpy(), golden[f"{name}.feat_a_mean"]) <= GOLDEN_CAV_MAE
        assert apart(embeddings["image_embedding"].numpy(), golden[f"{name}.feat_v_mean"]) <= GOLDEN_CAV_MAE


@pytest.mark.contracts
@pytest.mark.parametrize("name", MASKED)
def test_pre_training_is_as_published(contracts, goldens, name):
    variant, *case = MASKED[name]
    check_pretrained(network(variant, contracts), goldens, name, *case)


def real_clip(contracts):
    """Return the recorded clip as (features made of the published filter bank, features of our own, picture)."""
    sound = np.load(contracts / "cav_mae" / "golden_frontend.npz")
    picture = np.load(contracts / "cav_mae" / "golden_image.npz")["recipe_jpeg_bytes"].tobytes()
    filled = np.pad(sound["fbank_real"], ((0, 1024 - len(sound["fbank_real"])), (0, 0)))
    published = (torch.from_numpy(filled)[None] + 5.081) / 4.4849
    waveform = torch.from_numpy(sound["real_int16"].astype(np.float32) / 32768)[None]
    with torch.no_grad():
        ours = TorchFrontend(get_frontend("cav_mae")).eval()(waveform)
    return published, ours, torch.from_numpy(load_image(picture, ImageSpec()))[None]


def check_real_clip(model, golden, prefix, clip):
    """Compare the answers to the recorded clip, from the published features and from the waveform."""
    published, ours, image = clip
    for features in (published, ours):
        for mode in ("audioonly", "multimodal"):
            got = answer(model, mode, features, image)
            assert apart(got["logits"], golden[f"{prefix}.{mode}"]) <= GOLDEN_CAV_MAE, mode
            if mode == "audioonly" and f"{prefix}.emb_a" in golden:
                assert apart(unit(got["embedding"]), golden[f"{prefix}.emb_a"]) <= GOLDEN_CAV_MAE
    if f"{prefix}.emb_v" in golden:
        seen = answer(model, "videoonly", None, image)["embedding"]
        assert apart(unit(seen), golden[f"{prefix}.emb_v"]) <= GOLDEN_CAV_MAE


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.contracts
def test_the_recorded_clip_is_answered_as_published(contracts, goldens):
    model = network("cavmaeft_tiny_11", contracts)
    clip = real_clip(contracts)
    check_real_clip(model, goldens, "ft_tiny.real", clip)
    other = answer(model, "multimodal", clip[0], clip[2].flip(2))["logits"]
    assert apart(other, goldens["ft_tiny.real.multimodal"]) > 100 * GOLDEN_CAV_MAE, "the picture counts"


@pytest.mark.contracts
@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("cavmae_scalepp", "cavmae_base"),
        ("cavmaeft_as", "cavmaeft_base_527"),
        ("cavmaeft_image_as20k", "cavmaeft_base_527"),
        ("cavmaeft_audio_as", "cavmaeftaudio_base_527"),
    ],
)
def test_cards_of_released_files_build_the_recorded_networks(contracts, name, variant):
    entries = json.loads((contracts / "cav_mae" / "keys.json").read_text())
    with torch.device("meta"):
        model = create_from_card(get_card(name))
    check_card(model, get_card(name))
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert shapes == entries[variant]["keys"]


@pytest.mark.slow
@pytest.mark.contracts
def test_full_size_networks_answer_as_published(contracts):
    golden = np.load(contracts / "cav_mae" / "golden_base.npz")
    model = network("cavmaeft_base_527", contracts)
    check_real_clip(model, golden, "ft_base.real", real_clip(contracts))
    weight = model.blocks_a[5].mlp.fc1.weight
    with torch.no_grad():
        before = float(weight[3, 7])
        weight[3, 7] += 5.0
    moved = answer(model, "audioonly", pair(11, 1)[0], None)["logits"]
    assert apart(moved, golden["ft_base.b1.audioonly_perturbed"]) <= GOLDEN_CAV_MAE
    assert apart(moved, golden["ft_base.b1.audioonly"]) > 10 * GOLDEN_CAV_MAE
    with torch.no_grad():
        weight[3, 7] = before
    check_fine_tuned(model, golden, "ft_base.b1", 11, 1, 1024)
    check_fine_tuned(model, golden, "ft_base.b3", 12, 3, 1024)
    short = noise(234, 1, 208, 128)
    model.declared = model.declared.replace(dynamic_time=True)
    cut = answer(model, "audioonly", short, None)
    assert apart(cut["logits"], golden["ft_base.t208.audioonly"]) <= GOLDEN_CAV_MAE
    assert apart(cut["embedding"], golden["ft_base.t208.feat_a_mean"]) <= GOLDEN_CAV_MAE
    del model
    check_pretrained(network("cavmae_base", contracts), golden, "mae_base", 2, 71, 0.75, 0.75)


@pytest.mark.contracts
def test_shorter_clips_have_the_places_of_their_own_frames(contracts):
    """With dynamic time a network answers as the published one built for that length, its table cut by columns."""
    model = network("cavmaeft_tiny_11", contracts)
    for frames in (16, 208, 333, 512, 1024):
        features = noise(frames, 2, frames, 128)
        columns = frames // 16
        fixed = CAVMAEFT(model.declared.replace(audio_length=frames, mode="audioonly")).eval()
        state = model.state_dict()
        state["pos_embed_a"] = state["pos_embed_a"].unflatten(1, (8, 64))[:, :, :columns].flatten(1, 2)
        fixed.load_state_dict(state, strict=True)
        free = CAVMAEFT(model.declared.replace(dynamic_time=True, mode="audioonly")).eval()
        free.load_state_dict(model.state_dict(), strict=True)
        with torch.no_grad():
            assert torch.equal(free(features=features)["logits"], fixed(features=features)["logits"])


def test_structured_maskings_hide_whole_times_and_bands():
    generator = torch.Generator().manual_seed(3)
    draws = torch.rand(4, 512, generator=generator)
    for kind, hidden in (("time", (48, 0)), ("freq", (0, 6))):
        removed = draw_masking(draws, 0.75, grid=(8, 64), kind=kind, generator=generator).removed.unflatten(1, (8, 64))
        assert removed.sum((1, 2)).tolist() == [384] * 4
        times, bands = removed.amin(1).sum(1), removed.amin(2).sum(1)
        assert (times.tolist(), bands.tolist()) == ([hidden[0]] * 4, [hidden[1]] * 4)
        assert len({tuple(one.flatten().tolist()) for one in removed}) == 4, "each clip has its own"
    both = draw_masking(draws, 0.75, grid=(8, 64), kind="tf", generator=generator)
    assert both.kept == 128
    assert both.removed.sum(1).tolist() == [384] * 4


def test_maskings_follow_from_their_generator():
    model = CAVMAE(CAVMAEOptions(**SMALL, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2))
    draws = [model.draw_maskings(2, 0.5, 0.25, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0][0].order, draws[1][0].order)
    assert torch.equal(draws[0][1].order, draws[1][1].order)
    assert not torch.equal(draws[0][0].order, draws[2][0].order)
    assert (draws[0][0].kept, draws[0][1].kept) == (4, 3)


def test_every_part_of_the_loss_reaches_what_it_is_about():
    model = CAVMAE(CAVMAEOptions(**SMALL, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2))
    features, image = noise(1, 3, 64, 32), noise(2, 3, 3, 32, 32)
    maskings = model.draw_maskings(3, 0.5, 0.5, generator=torch.Generator().manual_seed(0))
    model.losses(features, image, *maskings, contrast_weight=0.0)["loss"].backward()
    assert model.decoder_pred_a.weight.grad.any()
    assert not model.norm_a.weight.grad.any(), "the contrast's norms take no part in reconstruction"
    model.zero_grad()
    model.losses(features, image, *maskings, mae_weight=0.0)["loss"].backward()
    assert model.norm_a.weight.grad.any()
    assert model.norm_v.weight.grad.any()
    assert not model.decoder_pred_a.weight.grad.any()
    assert model.pos_embed_a.grad is None, "places are given in pre-training"


def test_what_is_hidden_is_what_is_scored():
    model = CAVMAE(CAVMAEOptions(**SMALL, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)).eval()
    features, image = noise(1, 1, 64, 32), noise(2, 1, 3, 32, 32)
    maskings = model.draw_maskings(1, 0.5, 0.5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latent, _, _ = model.encoded(features, image, *maskings)
        _, predicted = model.decoded(latent, *maskings)
        target = patch_values(image)
        target = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-6).sqrt()
        hidden = maskings[1].removed[0].bool()
        expected = (predicted - target).square()[0, hidden].mean()
        assert torch.allclose(model.losses(features, image, *maskings)["mae_v"], expected)


def test_reconstructions_are_pictures_in_their_places():
    options = CAVMAEOptions(**SMALL, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2, norm_pix_loss=False)
    model = CAVMAE(options).eval()
    features, image = noise(1, 2, 64, 32), noise(2, 2, 3, 32, 32)
    maskings = model.draw_maskings(2, 0.5, 0.5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sound, picture = model.reconstruct(features, image, *maskings)
        latent, _, _ = model.encoded(features, image, *maskings)
        patches_a, patches_v = model.decoded(latent, *maskings)
    assert (sound.shape, picture.shape) == (features.shape, image.shape)
    assert torch.equal(patch_values(picture), patches_v)
    assert torch.equal(patch_values(sound[:, None].transpose(2, 3)), patches_a)
    model.declared = model.declared.replace(norm_pix_loss=True)
    with pytest.raises(SpecError, match="norm_pix_loss"):
        model.reconstruct(features, image, *maskings)


def test_a_mode_takes_what_it_needs():
    model = CAVMAEFT(CAVMAEFTOptions(**SMALL, num_classes=3))
    needed = {mode: [part.name for part in (model.set_mode(mode), model)[1].inputs] for mode in MODES}
    assert needed == {
        "multimodal": ["features", "image"],
        "audioonly": ["features"],
        "missingaudioonly": ["features"],
        "videoonly": ["image"],
        "missingvideoonly": ["image"],
    }
    assert model.options["mode"] == "missingvideoonly"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"embed_dim": 26}, "embed_dim"),
        ({"num_heads": 5}, "num_heads"),
        ({"image": False}, "mode"),
        ({"image_size": 33}, "image_size"),
        ({"modality_specific_depth": 12}, "modality_specific_depth"),
        ({"modality_specific_depth": 3, "depth": 3}, "modality_specific_depth"),
        ({"depth": 1}, "depth"),
    ],
)
def test_impossible_options_name_their_field(options, field):
    with pytest.raises(CardError) as caught:
        CAVMAEFTOptions(**{**SMALL, **options})
    assert caught.value.field == field


def test_inputs_of_other_shapes_are_refused():
    model = CAVMAEFT(CAVMAEFTOptions(**SMALL, num_classes=3)).eval()
    features, image = noise(1, 1, 64, 32), noise(2, 1, 3, 32, 32)
    for wrong, error, said in (
        ({"features": features[:, :48]}, ClipLengthError, "48 frames.*exactly 64"),
        ({"features": features[..., :16]}, SpecError, r"\(1, 64, 16\)"),
        ({"features": features[0]}, SpecError, r"\(batch, time, 32\)"),
        ({"image": image[..., :16]}, SpecError, r"\(1, 3, 32, 16\)"),
    ):
        with pytest.raises(error, match=said):
            model(**{"features": features, "image": image, **wrong})
    free = CAVMAEFT(CAVMAEFTOptions(**SMALL, num_classes=3, mode="audioonly", dynamic_time=True)).eval()
    for frames in (15, 65):
        with pytest.raises(ClipLengthError, match=f"{frames} frames.*16 to 64"):
            free(features=noise(1, 1, frames, 32))


def test_maskings_that_cannot_be_are_refused():
    with pytest.raises(SpecError, match=r"1\.0"):
        draw_masking(torch.rand(1, 4), 1.0)
    with pytest.raises(SpecError, match="unstructured"):
        draw_masking(torch.rand(1, 8), 0.5, grid=(2, 4), kind="time")


def test_cards_say_which_inputs_and_lengths_a_network_takes():
    published, free = get_frontend("cav_mae"), get_frontend("cav_mae").replace(frames=None)
    cases = [
        ("cavmaeft", {}, published, ["features", "image"], (400, None)),
        ("cavmaeft_audio", {}, published, ["features"], (400, None)),
        ("cavmaeft_audio", {"dynamic_time": True}, free, ["features"], (400 + 15 * 160, 400 + 1024 * 160 - 1)),
        ("cavmaeft", {"mode": "videoonly"}, None, ["image"], (None, None)),
    ]
    for name, options, frontend, inputs, lengths in cases:
        model = create_model(name, num_classes=3, embed_dim=24, num_heads=3, **options)
        image = ImageSpec() if "image" in inputs else None
        card = new_card(
            "example", name, model=model, frontend=frontend, image=image, task="single_label", labels=list("abc")
        )
        assert [part.name for part in card.inputs] == inputs
        assert (card.length_policy.min, card.length_policy.max) == lengths
        assert create_from_card(card).options == model.options
        assert card.macs > 0


def test_a_card_must_say_the_mode():
    model = create_model("cavmaeft_audio", num_classes=3, embed_dim=24, num_heads=3)
    card = new_card(
        "example", "cavmaeft_audio", model=model, frontend=get_frontend("cav_mae"), task="single_label", labels=None
    )
    forgotten = card.replace(architecture="cavmaeft", options={**card.options, "image": True}).to_dict()
    del forgotten["options"]["mode"]
    with pytest.raises(CardError, match=r"options\.mode: missing"):
        create_from_card(ModelCard.from_dict(forgotten))


def test_a_picture_of_another_size_does_not_fit_the_card():
    model = create_model("cavmaeft", num_classes=3, mode="videoonly", embed_dim=24, num_heads=3)
    described = {"model": model, "frontend": None, "task": "single_label", "labels": None}
    with pytest.raises(CardError, match=r"image.size: .* 96; the model takes 224"):
        new_card("example", "cavmaeft", **described, image=ImageSpec(size=96))
    with pytest.raises(CardError, match="image: missing"):
        new_card("example", "cavmaeft", **described)


def vision_mae(width=24, decoder=16, depth=1, seed=0):
    """Return the state_dict of a vision MAE of 2 x 2 patches, of random numbers."""
    generator = torch.Generator().manual_seed(seed)
    block = {
        "norm1.weight": (width,), "norm1.bias": (width,), "attn.qkv.weight": (3 * width, width),
        "attn.qkv.bias": (3 * width,), "attn.proj.weight": (width, width), "attn.proj.bias": (width,),
        "norm2.weight": (width,), "norm2.bias": (width,), "mlp.fc1.weight": (4 * width, width),
        "mlp.fc1.bias": (4 * width,), "mlp.fc2.weight": (width, 4 * width), "mlp.fc2.bias": (width,),
    }  # fmt: skip
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 5, width),
        "patch_embed.proj.weight": (width, 3, 16, 16),
        "patch_embed.proj.bias": (width,),
        **{f"blocks.{index}.{name}": shape for index in range(12) for name, shape in block.items()},
        "norm.weight": (width,),
        "norm.bias": (width,),
        "mask_token": (1, 1, decoder),
        "decoder_pos_embed": (1, 5, decoder),
        "decoder_embed.weight": (decoder, width),
        "decoder_embed.bias": (decoder,),
        **{
            f"decoder_blocks.{index}.{name}": tuple(size // width * decoder for size in shape)
            for index in range(depth)
            for name, shape in block.items()
        },
        "decoder_norm.weight": (decoder,),
        "decoder_norm.bias": (decoder,),
        "decoder_pred.weight": (768, decoder),
        "decoder_pred.bias": (768,),
    }
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def test_pre_training_starts_from_a_vision_mae():
    model = CAVMAE(CAVMAEOptions(**SMALL, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2))
    state = vision_mae()
    fresh = start_from_vision_mae(model, state)
    got = model.state_dict()
    for kind in ("a", "v"):
        assert torch.equal(got[f"blocks_{kind}.10.mlp.fc2.weight"], state["blocks.10.mlp.fc2.weight"])
        assert torch.equal(got[f"blocks_u.0.norm2_{kind}.bias"], state["blocks.11.norm2.bias"])
        assert torch.equal(got[f"norm_{kind}.weight"], state["norm.weight"])
    assert torch.equal(got["blocks_u.0.norm1.weight"], state["blocks.11.norm1.weight"])
    assert torch.equal(got["patch_embed_a.proj.weight"][:, 0], state["patch_embed.proj.weight"].sum(1))
    assert torch.equal(got["pos_embed_v"], state["pos_embed"][:, 1:])
    assert torch.equal(got["decoder_pred_a.weight"], state["decoder_pred.weight"][:256])
    assert torch.equal(got["decoder_blocks.0.attn.qkv.bias"], state["decoder_blocks.0.attn.qkv.bias"])
    unused = {
        f"blocks_{kind}.{index}.{norm}_{stream}.{part}"
        for kind in "av" for index in range(11) for norm in ("norm1", "norm2") for stream in "av"
        for part in ("weight", "bias")
    }  # fmt: skip
    unused |= {
        f"decoder_blocks.0.{norm}_{s}.{p}" for norm in ("norm1", "norm2") for s in "av" for p in ("weight", "bias")
    }
    own = {"modality_a", "modality_v", "pos_embed_a", "decoder_pos_embed_a", "decoder_modality_a", "decoder_modality_v"}
    assert set(fresh) == unused | own


def test_another_mae_is_refused():
    model = CAVMAE(CAVMAEOptions(**SMALL, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2))
    before = model.state_dict()["norm.weight"].clone()
    state = vision_mae()
    del state["blocks.7.norm1.weight"]
    with pytest.raises(CheckpointError, match=r"blocks\.7\.norm1\.weight is missing"):
        start_from_vision_mae(model, state)
    with pytest.raises(CheckpointError, match=r"\[48"):
        start_from_vision_mae(model, vision_mae(width=48))
    with pytest.raises(CheckpointError, match=r"decoder_blocks\.1.*nothing"):
        start_from_vision_mae(model, vision_mae(depth=2))
    assert torch.equal(model.state_dict()["norm.weight"], before)


def pretrained_file(folder, *, drop=(), add=()):
    """Write a pre-trained file as published, every key behind ``module.``; return it and the network."""
    model = CAVMAE(CAVMAEOptions(embed_dim=24, num_heads=3, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2))
    state = {f"module.{key}": value for key, value in model.state_dict().items() if key not in drop}
    state |= {f"module.{key}": torch.zeros(2) for key in add}
    path = folder / "audio_model.21.pth"
    torch.save(state, path)
    return path, model


def card_for(name, num_classes=527, **options):
    model = create_model(name, num_classes=num_classes, embed_dim=24, num_heads=3, **options)
    needed = [part.source for part in model.inputs]
    return new_card(
        "example",
        name,
        model=model,
        frontend=get_frontend("cav_mae") if "frontend" in needed else None,
        image=ImageSpec() if "image" in needed else None,
        task="multi_label" if num_classes else "embedding",
        labels=None,
    )


def test_fine_tuning_starts_from_a_pre_trained_file(tmp_path):
    path, before = pretrained_file(tmp_path)
    loaded = load_checkpoint(path, card_for("cavmaeft"), num_classes=3)
    assert set(loaded.replaced) == {f"mlp_head.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")}
    for key, value in loaded.model.state_dict().items():
        assert key in loaded.replaced or torch.equal(value, before.state_dict()[key])
    towers = load_checkpoint(path, card_for("cavmaeft_audio", num_classes=0)).model
    features = noise(3, 2, 1024, 128)
    with torch.no_grad():
        expected = before.eval()(features=features, image=noise(4, 2, 3, 224, 224))["audio_embedding"]
        assert torch.equal(towers(features=features)["embedding"], expected)


@pytest.mark.parametrize(("drop", "add"), [(("norm_a.weight",), ()), ((), ("blocks_w.0.norm1.weight",))])
def test_a_file_that_lacks_or_holds_anything_else_is_refused(tmp_path, drop, add):
    path, _ = pretrained_file(tmp_path, drop=drop, add=add)
    with pytest.raises(CheckpointError, match=(*drop, *add)[0]):
        load_checkpoint(path, card_for("cavmaeft"), num_classes=3)


@pytest.mark.contracts
def test_what_a_pre_trained_file_lacks_and_holds_is_as_published(contracts):
    keys = {
        name: set(entry["keys"])
        for name, entry in json.loads((contracts / "cav_mae" / "keys.json").read_text()).items()
    }
    with torch.device("meta"):
        fine_tuned, heard = create_model("cavmaeft"), create_model("cavmaeft_audio")
    pre_trained, whole = keys["cavmae_base"], keys["cavmaeft_base_527"]
    unused = {key for key in pre_trained if key.startswith(fine_tuned.unused_prefixes)}
    assert (len(unused), len(whole - pre_trained)) == (173, 4)
    assert pre_trained - unused <= whole
    assert {key for key in whole if not key.startswith(heard.unused_prefixes)} == keys["cavmaeftaudio_base_527"]


def test_networks_of_any_depth():
    model = CAVMAEFT(CAVMAEFTOptions(**{**SMALL, "depth": 4, "modality_specific_depth": 3}, num_classes=3))
    assert [len(blocks) for blocks in (model.blocks_a, model.blocks_v, model.blocks_u)] == [3, 3, 1]
    assert model.options["depth"] == 4
