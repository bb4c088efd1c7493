"""What the PANNs promise beyond the published answers: options, lengths, ranks, and published files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from models_zoo.errors import CardError, CheckpointError, ClipLengthError, SpecError, WaveformError
from models_zoo.presets import get_frontend
from models_zoo.registry import get_card, list_models
from parity_tests.networks import card_of, lively, noise_inputs
from parity_tests.panns_contract import frozen_tensors
from train_torch.checkpoint import load_checkpoint, save_checkpoint
from train_torch.models import _ARCHITECTURES, check_card, create_from_card, create_model, new_card
from train_torch.published_frontend import TOLERANCE, without_frontend

TAGGERS = ("cnn14", "cnn10", "cnn6", "resnet22", "resnet38", "resnet54", "mobilenetv1", "mobilenetv2")
SEGMENTS = ("cnn14_decisionlevelmax", "cnn14_decisionlevelavg", "cnn14_decisionlevelatt")
WAVEGRAMS = ("wavegram_cnn14", "wavegram_logmel_cnn14")
ALL = (*TAGGERS, *SEGMENTS, *WAVEGRAMS, "transfer_cnn14")
PUBLISHED = [name for name in list_models() if get_card(name).system == "panns" and get_card(name).checkpoint]


def narrow(name, **options):
    """Return a lively network with an eighth of the published channels."""
    return lively(name, **{"num_classes": 5, "width": 0.125, **options})


def on_paper(name, **options):
    """Return a network without weights: shapes only."""
    with torch.device("meta"):
        return create_model(name, **options)


def answers(model, **inputs):
    with torch.no_grad():
        return model(**inputs)


def test_no_network_of_the_system_is_left_out():
    sizes = {f"cnn14_emb{size}" for size in (32, 128, 512)}
    of_system = {name for name, each in _ARCHITECTURES.items() if getattr(each.build, "system", "") == "panns"}
    assert of_system == {*ALL, *sizes}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_card_of_the_system_describes_its_network(name):
    card = get_card(name)
    with torch.device("meta"):
        model = create_from_card(card)
    check_card(model, card)
    made = new_card(
        name, card.architecture, model=model, frontend=card.frontend, task="multi_label", labels=card.labels
    )
    for field in ("system", "inputs", "outputs", "length_policy", "exporter", "exporter_reason", "parameters", "macs"):
        assert getattr(card, field) == getattr(made, field), field
    assert card.checkpoint.container == "model"
    assert card.checkpoint.file == f"{card.provenance['published_name']}_mAP={card.metrics['mAP']:.3f}.pth"
    assert ("md5" in card.provenance) == (card.checkpoint.md5 is not None)
    shared = name in ("cnn14", "cnn14_16k", "cnn14_8k", "cnn14_decisionlevelmax")
    assert ("pooling variant" in card.checkpoint.not_in_file) == ("warning" in card.provenance) == shared


@pytest.mark.parametrize(
    ("name", "shortest"),
    [("cnn14", 9_920), ("cnn14_16k", 4_960), ("cnn14_8k", 2_480), ("cnn10", 4_800), ("mobilenetv2", 9_920)],
)
def test_the_shortest_clip_gives_the_fewest_frames(name, shortest):
    card, model = get_card(name), on_paper(name)
    assert card.min_samples == card.length_policy.min == shortest
    assert card.frontend.num_frames(shortest) == model.min_frames
    assert card.frontend.num_frames(shortest - 1) == model.min_frames - 1


@pytest.mark.parametrize("name", ALL)
def test_outputs_keep_their_ranks(name):
    for num_classes in (1, 7):
        model = create_model(name, num_classes, width=0.125).eval()
        for batch in (1, 3):
            given = answers(model, **noise_inputs(model, batch, 64))
            assert list(given) == [part.name for part in model.outputs]
            for part in model.outputs:
                sizes = {"batch": batch, "time": 65}
                assert given[part.name].shape == tuple(sizes.get(axis) or int(axis) for axis in part.axes)


@pytest.mark.parametrize("name", ALL)
def test_a_clip_does_not_depend_on_its_batch(name):
    model = narrow(name)
    inputs = noise_inputs(model, 3, 64)
    together = answers(model, **inputs)
    alone = [answers(model, **{key: value[i : i + 1] for key, value in inputs.items()}) for i in range(3)]
    for output in together:
        assert together[output].std() > 0.01, "a dead network depends on nothing"
        torch.testing.assert_close(together[output], torch.cat([one[output] for one in alone]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*TAGGERS, *WAVEGRAMS])
def test_no_classes_means_the_embedding_alone(name):
    model = create_model(name, num_classes=0, width=0.125).eval()
    assert list(answers(model, **noise_inputs(model, 2, 64))) == [part.name for part in model.outputs] == ["embedding"]
    assert not any(key.startswith("fc_audioset") for key in model.state_dict())


@pytest.mark.parametrize("name", [*SEGMENTS, "transfer_cnn14"])
def test_a_network_that_is_all_scores_needs_a_class(name):
    with pytest.raises(CardError) as caught:
        create_model(name, num_classes=0)
    assert caught.value.field == "num_classes"


@pytest.mark.parametrize(
    ("name", "unused"),
    [
        *((name, set()) for name in TAGGERS),
        *((name, set()) for name in SEGMENTS[:2]),
        ("cnn14_decisionlevelatt", {"att_block.bn_att"}),
        ("wavegram_logmel_cnn14", set()),
        ("wavegram_cnn14", {"bn0", "conv_block1"}),
        ("transfer_cnn14", {"base.fc_audioset"}),
    ],
)
def test_gradients_reach_every_parameter_in_use(name, unused):
    model = narrow(name).train()
    given = model(**noise_inputs(model, 3, 64))
    given[model.outputs[0].name].square().sum().backward()
    without = {key for key, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {key for key, _ in model.named_parameters() if key.startswith(tuple(unused))}


def test_a_fresh_residual_block_is_its_shortcut():
    block = create_model("resnet22", 3, width=0.125).resnet.layer1[0].eval()
    x = torch.rand(2, 8, 7, 5)
    torch.testing.assert_close(block(x), x)


def test_the_returned_embedding_is_dropped_in_training_and_the_scores_are_not():
    model = narrow("mobilenetv2", num_classes=3).train()
    inputs = noise_inputs(model, 8, 64)
    given = model(**inputs)
    dropped = (given["embedding"] == 0) & (model.eval()(**inputs)["embedding"] > 0)
    assert 0.1 < dropped.float().mean() < 0.9
    with torch.no_grad():
        from_dropped = model.fc_audioset(given["embedding"])
    assert (from_dropped - given["logits"]).abs().max() > 0.01


@pytest.mark.parametrize("name", [*TAGGERS, *SEGMENTS, "transfer_cnn14"])
def test_too_few_frames_are_refused(name):
    model = narrow(name)
    features = torch.zeros(2, 1, model.min_frames, 64)
    answers(model, features=features)
    with pytest.raises(ClipLengthError, match=f"at least {model.min_frames}") as caught:
        answers(model, features=features[:, :, 1:])
    assert caught.value.code == "too_short"


@pytest.mark.parametrize(
    ("features", "field", "says"),
    [((2, 64, 50), "layout", r"\(batch, 1, time, 64\)"), ((2, 1, 50, 128), "mel.n_mels", "128 mel bands")],
)
def test_features_that_do_not_fit_are_refused(features, field, says):
    with pytest.raises(SpecError, match=says) as caught:
        answers(narrow("cnn10"), features=torch.zeros(features))
    assert caught.value.field == field


def test_a_waveform_that_is_too_short_or_stacked_is_refused():
    model = narrow("wavegram_cnn14")
    answers(model, waveform=torch.zeros(1, 10_236))
    with pytest.raises(ClipLengthError, match="at least 10236"):
        answers(model, waveform=torch.zeros(1, 10_235))
    with pytest.raises(WaveformError, match=r"\(batch, samples\)"):
        answers(model, waveform=torch.zeros(1, 1, 10_240))


@pytest.mark.parametrize("num_samples", [10_240, 10_559, 10_560, 10_875, 10_876, 10_879, 10_880, 11_200, 33_333])
def test_both_branches_must_be_equally_long(num_samples):
    model = narrow("wavegram_logmel_cnn14")
    frames = get_frontend("panns_32k").num_frames(num_samples)
    given = {"features": torch.zeros(1, 1, frames, 64), "waveform": torch.zeros(1, num_samples)}
    if num_samples % 640 <= 319 or num_samples % 640 >= 636:
        answers(model, **given)
        return
    with pytest.raises(ClipLengthError, match="multiple of 640") as caught:
        answers(model, **given)
    assert caught.value.code == "multiple"


@pytest.mark.parametrize("frames", [32, 63, 64, 77, 95, 96])
@pytest.mark.parametrize("name", SEGMENTS)
def test_frames_repeat_their_segment_to_the_end(name, frames):
    model = narrow(name)
    features = noise_inputs(model, 2, 96)["features"][:, :, :frames]
    clip, scores = answers(model, features=features).values()
    last = frames // 32 - 1
    for frame in range(frames):
        assert torch.equal(scores[:, frame], scores[:, 32 * min(frame // 32, last)])
    segments = scores[:, ::32][:, : last + 1]
    # Two segments are smoothed into the same, as each hears its neighbours.
    assert last < 2 or not torch.equal(segments[:, 0], segments[:, 1])
    if name.endswith("max"):
        assert torch.equal(clip, segments.amax(1))
    elif name.endswith("avg"):
        torch.testing.assert_close(clip, segments.mean(1))
    else:
        assert (clip <= segments.amax(1) + 1e-6).all()
        assert (clip >= segments.amin(1) - 1e-6).all()


@pytest.mark.parametrize(
    ("name", "options", "field"),
    [
        ("cnn14", {"num_classes": -1}, "num_classes"),
        ("cnn14", {"width": 0}, "width"),
        ("cnn14", {"n_mels": 31}, "n_mels"),
        ("cnn14", {"embedding": 0}, "embedding"),
        ("cnn14_emb32", {"embedding": 64}, "embedding"),
        ("cnn10", {"embedding": 64}, "embedding"),
        ("wavegram_logmel_cnn14", {"n_mels": 128}, "n_mels"),
        ("resnet22", {"dropout": 1.0}, "dropout"),
        ("transfer_cnn14", {"base_classes": 0}, "base_classes"),
    ],
)
def test_bad_options_name_the_field(name, options, field):
    with pytest.raises(CardError) as caught:
        create_model(name, **options)
    assert caught.value.field.startswith(field)


def test_a_name_that_stands_for_a_size_names_the_free_one():
    with pytest.raises(CardError, match="choose 'cnn14' to set it freely"):
        create_model("cnn14_emb32", embedding=64)
    assert on_paper("cnn14", embedding=64).fc1.out_features == 64


@pytest.mark.parametrize("name", ALL)
def test_options_rebuild_the_network(name):
    model = on_paper(name, num_classes=11, width=0.3)
    assert json.loads(json.dumps(model.options)) == model.options
    again = on_paper(name, **model.options)
    assert {key: value.shape for key, value in again.state_dict().items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }


def test_other_numbers_of_mel_bands():
    model = create_model("cnn10", 3, width=0.125, n_mels=128).eval()
    assert answers(model, features=torch.randn(2, 1, 40, 128))["logits"].shape == (2, 3)


# Published files: a dict with the weights under "model", and the front end among them.


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A file as the publisher writes them, of a narrow Cnn14, with the model and the card that describes it."""
    model = narrow("cnn14", num_classes=7)
    card = card_of(model, "cnn14", task="multi_label", frontend=get_frontend("panns_32k"))
    path = tmp_path_factory.mktemp("published") / "Cnn14_narrow.pth"
    write(path, model)
    return path, model, card


def write(path, model, preset="panns_32k", **changes):
    state = {**frozen_tensors(get_frontend(preset)), **model.state_dict(), **changes}
    torch.save({"iteration": 600_000, "model": state}, path)
    return path


@pytest.mark.parametrize("preset", ["panns_32k", "panns_16k", "panns_8k"])
def test_our_tables_are_the_published_ones(preset, tmp_path):
    spec = get_frontend(preset)
    card = get_card("cnn14").replace(frontend=spec, length_policy=get_card("cnn14_8k").length_policy)
    state = {**frozen_tensors(spec), "kept": torch.zeros(1)}
    assert list(without_frontend(tmp_path, state, card)) == ["kept"]
    for key, tensor in frozen_tensors(spec).items():
        nearly = tensor + 10 * TOLERANCE * tensor.abs().max()
        with pytest.raises(CheckpointError, match=f"{key} is another"):
            without_frontend(tmp_path, {**state, key: nearly}, card)


@pytest.mark.contracts
@pytest.mark.parametrize("rate", ["32k", "16k", "8k"])
def test_the_published_tables_are_those_recorded(contracts, rate):
    tables = frozen_tensors(get_frontend(f"panns_{rate}"))
    real, imaginary, mel = (tensor.numpy() for tensor in tables.values())
    rows = [0, 1, 2, 7, len(real) // 2, len(real) - 1]
    with np.load(contracts / "panns" / "frontend.npz") as recorded:
        np.testing.assert_array_equal(mel, recorded[f"melW_{rate}"])
        np.testing.assert_allclose(real[rows, 0], recorded[f"dft_real_{rate}_rows"], rtol=0, atol=1e-7)
        np.testing.assert_allclose(imaginary[rows, 0], recorded[f"dft_imag_{rate}_rows"], rtol=0, atol=1e-7)


def test_a_published_file_is_loaded(published):
    path, model, card = published
    loaded = load_checkpoint(path, card)
    assert (loaded.card, loaded.replaced) == (card, ())
    inputs = noise_inputs(model, 2, 40)
    assert torch.equal(answers(loaded.model, **inputs)["logits"], answers(model, **inputs)["logits"])


def test_our_own_file_has_no_front_end_and_needs_none(published, tmp_path):
    _, model, card = published
    save_checkpoint(tmp_path / "mine.safetensors", model, card)
    assert load_checkpoint(tmp_path / "mine.safetensors").replaced == ()


def test_the_front_end_may_be_missing_in_part(published, tmp_path):
    path, _, card = published
    held = torch.load(path, weights_only=True)
    del held["model"]["spectrogram_extractor.stft.conv_imag.weight"]
    torch.save(held, tmp_path / "part.pth")
    assert load_checkpoint(tmp_path / "part.pth", card).replaced == ()


def test_a_file_from_behind_another_front_end_is_refused(published, tmp_path):
    _, model, card = published
    with pytest.raises(CheckpointError, match=r"n_fft 1024.*its shape is \[257, 1, 512\], ours \[513, 1, 1024\]"):
        load_checkpoint(write(tmp_path / "16k.pth", model, "panns_16k"), card)
    mel = frozen_tensors(get_frontend("panns_32k"))["logmel_extractor.melW"].roll(1, 0)
    with pytest.raises(CheckpointError, match=r"logmel_extractor\.melW is another; they differ by"):
        load_checkpoint(write(tmp_path / "mel.pth", model, **{"logmel_extractor.melW": mel}), card)
    broken = mel.clone().fill_(float("nan"))
    with pytest.raises(CheckpointError, match=r"logmel_extractor\.melW is another"):
        load_checkpoint(write(tmp_path / "nan.pth", model, **{"logmel_extractor.melW": broken}), card)


def test_a_truncated_file_is_refused(published, tmp_path):
    path, _, card = published
    short = tmp_path / "short.pth"
    short.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(short, card)


def test_a_file_without_its_container_is_refused(published, tmp_path):
    path, _, card = published
    source = get_card("cnn14").checkpoint.replace(md5=None)
    torch.save({"weights": torch.load(path, weights_only=True)["model"]}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="no entry 'model'"):
        load_checkpoint(tmp_path / "other.pth", card.replace(checkpoint=source))


def test_the_published_hash_is_compared(published):
    path, _, card = published
    with pytest.raises(CheckpointError, match="its md5 is"):
        load_checkpoint(path, card.replace(checkpoint=get_card("cnn14").checkpoint))


def test_the_file_of_another_network_says_what_it_is(tmp_path):
    torch.save({"model": create_model("cnn10").state_dict()}, tmp_path / "some.pth")
    with pytest.raises(CheckpointError, match=r"is cnn10 with width 1\.0, 527 classes .*; the card is cnn6"):
        load_checkpoint(tmp_path / "some.pth", get_card("cnn6").replace(checkpoint=None))


def test_a_twin_of_the_same_names_and_shapes_is_named(tmp_path):
    torch.save({"model": create_model("cnn14").state_dict()}, tmp_path / "some.pth")
    twins = r"\(or cnn14_decisionlevelavg, cnn14_decisionlevelmax, of the same names and shapes\)"
    with pytest.raises(CheckpointError, match=f"is cnn14 with .*{twins}"):
        load_checkpoint(tmp_path / "some.pth", get_card("cnn6").replace(checkpoint=None))


def test_pooling_variants_cannot_be_told_apart(published, tmp_path, caplog):
    """Why their cards carry a warning: the file of one is loaded as another, and answers otherwise."""
    path, model, card = published
    shared = {key: value for key, value in model.options.items() if key != "embedding"}
    other = on_paper("cnn14_decisionlevelmax", **shared)
    loaded = load_checkpoint(path, card_of(other, "cnn14_decisionlevelmax", task="multi_label"))
    assert loaded.replaced == ()
    inputs = noise_inputs(model, 2, 64)
    apart = answers(loaded.model, **inputs)["logits"] - answers(model, **inputs)["logits"]
    assert apart.abs().max() > 0.01

    warned = card.replace(name="cnn14", provenance=get_card("cnn14").provenance)
    load_checkpoint(path, warned)
    assert "only the file's name tells" in caplog.text
    caplog.clear()
    named = tmp_path / get_card("cnn14").checkpoint.file
    named.write_bytes(path.read_bytes())
    load_checkpoint(named, warned)
    assert "only the file's name tells" not in caplog.text


def test_a_bare_network_becomes_the_base_of_a_transfer(published):
    path, model, _ = published
    transfer = on_paper("transfer_cnn14", num_classes=3, base_classes=7, width=0.125)
    card = card_of(transfer, "transfer_cnn14")
    loaded = load_checkpoint(path, card, num_classes=3)
    assert set(loaded.replaced) == {"fc_transfer.weight", "fc_transfer.bias"}
    inputs = noise_inputs(model, 2, 40)
    given = answers(loaded.model, **inputs)
    assert torch.equal(given["embedding"], answers(model, **inputs)["embedding"])
    torch.testing.assert_close(given["log_probabilities"].exp().sum(-1), torch.ones(2))
    with pytest.raises(CheckpointError, match=r"fc_transfer\.weight"):
        load_checkpoint(path, card)


def test_fine_tuning_replaces_the_head(published):
    path, model, card = published
    loaded = load_checkpoint(path, card, num_classes=4)
    assert set(loaded.replaced) == {"fc_audioset.weight", "fc_audioset.bias"} == set(model.class_keys)
    assert loaded.card.outputs[0].axes == ("batch", "4")
    assert isinstance(loaded.model.fc_audioset, nn.Linear)
