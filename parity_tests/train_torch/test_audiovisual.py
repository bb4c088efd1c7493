"""Training on pairs of sound and picture: what a step mixes, masks and averages, and whole runs on tiny networks."""

import json

import numpy as np
import pytest
import torch

from models_zoo.dataset import read_dataset
from models_zoo.errors import CardError, CheckpointError, DataError, ImageDecodeError, SpecError
from models_zoo.images import ImageSpec, load_image
from models_zoo.pairs import write_pairs
from models_zoo.presets import get_frontend
from models_zoo.soundscapes import write_soundscapes
from parity_tests.train_torch.test_cavmae import vision_mae
from train_torch import classifier as module
from train_torch import train
from train_torch.__main__ import main
from train_torch.audiovisual import Pretraining
from train_torch.checkpoint import load_checkpoint, save_checkpoint
from train_torch.classifier import Classifier
from train_torch.data import Batch, ClipData, EvaluationBatches, TrainingBatches
from train_torch.distill import LiveTeacher
from train_torch.evaluation import evaluate
from train_torch.frontend import TorchFrontend
from train_torch.losses import smoothed_positives
from train_torch.models import create_model, new_card
from train_torch.optim import configure, factor_at
from train_torch.recipes import (
    Augmentation,
    DistillationRecipe,
    LossRecipe,
    PretrainingRecipe,
    Recipe,
    SamplingRecipe,
    TemperatureSchedule,
    get_recipe,
)
from train_torch.retrieval import Retrieval, same_label
from train_torch.train import fit
from train_torch.transfer import fine_tuned_towers, in_mode
from train_torch.weight_mean import EpochMean

pytestmark = pytest.mark.usefixtures("one_thread")

LABELS = ("bell", "buzz", "knock")
TOWERS = {"audio_length": 32, "n_mels": 32, "image_size": 32, "embed_dim": 12, "num_heads": 2}
TOWERS |= {"depth": 3, "modality_specific_depth": 2}
DECODER = {"decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2}
PRE = Recipe(
    model="cavmae", model_options={**TOWERS, **DECODER}, frontend="cav_mae", n_mels=32, task="embedding", epochs=2,
    batch_size=6, lr=3e-3, seconds=0.4, seed=3, pretraining=PretrainingRecipe(mask_image=0.5, contrast_weight=1.0),
)  # fmt: skip
TUNE = Recipe(
    model="cavmaeft", model_options=TOWERS, frontend="cav_mae", n_mels=32, epochs=2, batch_size=6, lr=3e-3, seconds=0.4,
    seed=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Thirty clips of three sounds, split 18 / 6 / 6, without pictures."""
    folder = tmp_path_factory.mktemp("sounds")
    write_soundscapes(folder, num_clips=30, seed=1, sample_rate=16000, seconds=0.5, classes=LABELS)
    return folder


@pytest.fixture(scope="module")
def pairs(sounds, tmp_path_factory):
    """The same with three pictures each."""
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder, data=sounds, size=32, frames=3)
    return folder


@pytest.fixture(scope="module")
def pretrained(pairs, tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("pretrained")
    fit(pairs, folder, PRE, progress=False)
    return folder


def network(name="cavmaeft", task="single_label", classes=LABELS, **options):
    """Return a tiny network and its card."""
    torch.manual_seed(0)
    head = {} if name == "cavmae" else {"num_classes": len(classes)}
    model = create_model(name, **{**TOWERS, **(DECODER if name == "cavmae" else {}), **head, **options})
    spec = get_frontend("cav_mae")
    spec = spec.replace(mel=spec.mel.replace(n_mels=32), frames=spec.frames.replace(count=model.declared.audio_length))
    sources = {part.source for part in model.inputs}
    card = new_card(
        "tiny",
        name,
        model=model,
        frontend=spec if "frontend" in sources else None,
        image=ImageSpec(size=32) if "image" in sources else None,
        task=task,
        labels=None if name == "cavmae" else classes,
    )
    return model, card


# Data


def test_training_sees_any_picture_and_evaluation_the_middle_one_or_all(pairs):
    dataset, (_, card) = read_dataset(pairs).by_file().select("test"), network()
    clips = ClipData(dataset, card, TUNE)
    shown = {path: load_image(path, card.image) for record in dataset.records for path in record.images}
    for request in EvaluationBatches(clips):
        batch = clips[request]
        for index, image in zip(batch.index, batch.image, strict=True):
            assert np.array_equal(image, shown[dataset.records[index].image])
    frames = []
    for epoch in range(12):
        sampler = TrainingBatches(clips)
        sampler.set_epoch(epoch)
        for request in sampler:
            batch = clips[request]
            assert torch.equal(batch.image, clips[request].image)
            for index, image in zip(batch.index, batch.image, strict=True):
                same = [np.array_equal(image, shown[path]) for path in dataset.records[index].images]
                assert sum(same) == 1
                frames.append(same.index(True))
    assert set(frames) == {0, 1, 2}
    every = ClipData(dataset, card, TUNE, frames="all", cache_gib=0.0)
    batches = [every[request] for request in EvaluationBatches(every)]
    assert sorted(torch.cat([batch.index for batch in batches]).tolist()) == sorted(3 * list(range(len(dataset))))
    assert len({image.numpy().tobytes() for batch in batches for image in batch.image}) == 3 * len(dataset)


def test_a_network_of_pictures_alone_reads_no_sound(pairs, monkeypatch):
    monkeypatch.setattr("train_torch.data.load_audio", lambda *_: pytest.fail("sound was read"))
    dataset, (model, card) = read_dataset(pairs).by_file().select("test"), network(mode="videoonly")
    assert card.frontend is None
    classifier = Classifier(model, card, TUNE)
    classifier.log = lambda *_, **__: None
    clips = ClipData(dataset, card, TUNE)
    batch = clips[next(iter(TrainingBatches(clips)))]
    assert classifier.training_step(batch, 0).isfinite()


def test_clips_without_pictures_are_refused_by_name(sounds, pairs, tmp_path):
    with pytest.raises(DataError, match=r"18 clips have no picture, e\.g\. 'audio/00000\.wav'.*audioonly"):
        fit(sounds, tmp_path / "run", TUNE, progress=False)
    dataset = read_dataset(sounds).by_file()
    assert ClipData(dataset, network(mode="audioonly")[1], TUNE).card.image is None
    (tmp_path / "data").mkdir()
    table = (pairs / "metadata.csv").read_text()
    for name in ("audio", "images"):
        (tmp_path / "data" / name).symlink_to(pairs / name)
    broken = tmp_path / "data" / "broken.jpg"
    broken.write_bytes(b"no picture")
    (tmp_path / "data" / "metadata.csv").write_text(table.replace("images/000/00003_1.jpg", "broken.jpg"))
    with pytest.raises(ImageDecodeError, match=r"broken\.jpg"):
        fit(tmp_path / "data", tmp_path / "run", TUNE, progress=False)


# A step


@pytest.fixture
def step(monkeypatch):
    """Return a function: recipe -> (shares of the clips in waveforms, in pictures, targets)."""
    count = 9
    clips, pictures = torch.zeros(count, 6400), torch.zeros(count, 3, 32, 32)
    for i in range(count):
        clips[i, 2 * i], clips[i, 2 * i + 1] = 1.0, -1.0
        pictures[i, 0, 0, i] = 1.0
    seen = {}

    def inputs(parts, frontend, waveform, mixing=None, plain=None, image=None):
        seen.update(waveform=waveform, image=image)
        return {"features": frontend(waveform), "image": image}

    def loss(scores, targets, *_, **fields):
        seen.update(targets=targets, smoothing=fields["label_smoothing"])
        return scores.sum()

    def run(recipe):
        monkeypatch.setattr(module, "network_inputs", inputs)
        monkeypatch.setattr(module, "clip_loss", loss)
        classifier = Classifier(*network(classes=tuple("abcdefghi")), recipe)
        classifier.log = lambda *_, **__: None
        batch = Batch(clips, torch.eye(count), torch.arange(count), image=pictures)
        classifier.training_step(batch, 0)
        return seen["waveform"][:, 0 : 2 * count : 2], seen["image"][:, 0, 0, :count], seen["targets"], seen

    return run


def test_sound_picture_and_labels_are_mixed_by_one_draw(step):
    heard, shown, targets, _ = step(TUNE.replace(augmentation=Augmentation(mix_probability=0.5, mix_alpha=10.0)))
    assert torch.allclose(heard, targets, atol=1e-6)
    assert torch.allclose(shown, targets, atol=1e-6)
    assert 1 <= int((targets.max(dim=1).values < 1).sum()) < len(targets)


def test_targets_are_smoothed_as_published(step):
    settings = Augmentation(mix_probability=0.5, mix_alpha=10.0)
    _, shown, targets, seen = step(TUNE.replace(augmentation=settings, label_smoothing=0.1, smoothing="positives"))
    assert seen["smoothing"] == 0
    floor, alone = torch.full((9,), 0.1 / 9), 0
    for share, target in zip(shown, targets, strict=True):
        published = torch.where(share > 0, 0.9, floor)
        if share.max() > 0.9999 and torch.allclose(target, published, atol=1e-6):
            alone += 1
        else:  # of a mix, of a clip with itself by chance too
            assert torch.allclose(target, floor + 0.9 * share, atol=1e-6)
    assert 1 <= alone < 9


def test_smoothing_of_several_labels():
    targets = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.7, 0.0, 0.3, 0.0]])
    smoothed = smoothed_positives(targets, torch.tensor([False, True]), 0.2)
    assert torch.allclose(smoothed, torch.tensor([[0.8, 0.8, 0.05, 0.05], [0.61, 0.05, 0.29, 0.05]]))


def test_noise_and_roll_change_training_features_alone():
    spec = get_frontend("cav_mae")
    spec = spec.replace(frames=spec.frames.replace(count=64))
    waveform = torch.randn(3, 8000)
    plain = TorchFrontend(spec).eval()(waveform)
    noisy, rolled = TorchFrontend(spec, noise=0.1), TorchFrontend(spec, roll=True)
    assert torch.equal(noisy.eval()(waveform), plain)
    assert torch.equal(rolled.eval()(waveform), plain)
    added = noisy.train()(waveform) - plain
    assert 0 <= added.min() <= 1e-3
    assert 0 < added.max() <= 0.1 + 1e-5
    assert len({round(float(clip.max()), 4) for clip in added}) == 3
    moved = rolled.train()(waveform)
    shifts = [
        [frames for frames in range(64) if torch.equal(torch.roll(before, frames, dims=0), after)]
        for before, after in zip(plain, moved, strict=True)
    ]
    assert all(len(found) == 1 for found in shifts)
    assert len({found[0] for found in shifts}) > 1


# Rates, draws, means


def test_the_head_learns_faster_by_its_factor():
    model, _ = network()
    recipe = TUNE.replace(optimizer="adam", betas=(0.95, 0.999), head_lr=50.0, weight_decay=5e-7)
    optimizer = configure(model, recipe, 10)["optimizer"]
    rates = {id(parameter): group["initial_lr"] for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == pytest.approx(recipe.lr * (50 if name.startswith("mlp_head.") else 1))
    assert {group["betas"] for group in optimizer.param_groups} == {(0.95, 0.999)}
    assert optimizer.param_groups[0]["initial_lr"] == recipe.lr
    assert len(configure(model, TUNE, 10)["optimizer"].param_groups) == 1


@pytest.mark.parametrize("name", ["cavmaeft", "cavmae"])
@pytest.mark.parametrize("freeze", [(), ("modality_a", "modality_v", "pos_embed_a", "pos_embed_v")])
def test_towers_have_no_layers_in_a_row(name, freeze):
    made, settings = network(name, "embedding" if name == "cavmae" else "single_label"), {"layer_decay": 0.8}
    with pytest.raises(SpecError, match=r"layer_decay: got 0\.8") as refused:
        if name == "cavmae":
            Pretraining(*made, PRE.replace(freeze=freeze, **settings))
        else:
            Classifier(*made, TUNE.replace(freeze=freeze, **settings))
    assert refused.value.field == "layer_decay"


def test_rates_fall_in_steps():
    recipe = TUNE.replace(schedule="steps", steps_start=3, steps_every=2, epochs=8)
    factors = [factor_at(step, recipe, 16) for step in range(16)]
    assert factors[::2] == factors[1::2] == [1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.125]


def test_clips_are_drawn_with_replacement_as_many_as_there_are(pairs):
    dataset = read_dataset(pairs).by_file().select("train")
    rare = [r for r in dataset.records if r.labels == ("bell",)][:1]
    kept = tuple(rare + [r for r in dataset.records if r.labels != ("bell",)])
    dataset = dataset.__class__(kept, dataset.labels, dataset.root)
    sampling = SamplingRecipe(replacement=True, offset=0.01)
    clips = ClipData(dataset, network()[1], TUNE.replace(sampling=sampling, batch_size=2))
    counts = np.zeros(len(kept))
    for epoch in range(60):
        sampler = TrainingBatches(clips)
        sampler.set_epoch(epoch)
        drawn = [index for request in sampler for index in request.indices]
        assert len(drawn) == len(kept) // 2 * 2
        counts += np.bincount(drawn, minlength=len(kept))
    # One clip stands for its class as all six of another do.
    assert counts[0] / counts.sum() == pytest.approx(1 / 3, abs=0.06)
    with pytest.raises(SpecError, match="clips_per_epoch"):
        SamplingRecipe()
    with pytest.raises(SpecError, match="replacement"):
        SamplingRecipe(kind="balanced", replacement=True)


def test_the_model_is_the_mean_of_the_epochs_asked_for(pairs, tmp_path, monkeypatch):
    kept = {}
    summed = EpochMean.on_train_epoch_end

    def noted(self, trainer, learner):
        kept[trainer.current_epoch + 1] = {k: v.clone() for k, v in learner.model.state_dict().items()}
        summed(self, trainer, learner)

    monkeypatch.setattr(EpochMean, "on_train_epoch_end", noted)
    recipe = TUNE.replace(epochs=3, average_epochs=(2, 3), augmentation=Augmentation(mix_probability=0.5))
    report = fit(pairs, tmp_path / "run", recipe, progress=False)
    assert (report["best_epoch"], report["averaged_epochs"]) == (None, [2, 3])
    loaded = load_checkpoint(tmp_path / "run" / "model.safetensors")
    for key, value in loaded.model.state_dict().items():
        assert torch.allclose(value, (kept[2][key] + kept[3][key]) / 2, atol=1e-7), key
        assert torch.equal(load_checkpoint(tmp_path / "run" / "last.safetensors").model.state_dict()[key], kept[3][key])
    assert loaded.card.provenance["averaged_epochs"] == [2, 3]
    assert (tmp_path / "run" / "best.safetensors").exists()

    killed = iter([None, None])

    def die(self, trainer, learner):
        noted(self, trainer, learner)
        if next(killed, "die") == "die":
            raise KeyboardInterrupt

    monkeypatch.setattr(EpochMean, "on_train_epoch_end", die)
    with pytest.raises(SystemExit):
        fit(pairs, tmp_path / "other", recipe, progress=False)
    monkeypatch.setattr(EpochMean, "on_train_epoch_end", summed)
    fit(pairs, tmp_path / "other", recipe, progress=False, resume=True)
    resumed = load_checkpoint(tmp_path / "other" / "model.safetensors").model.state_dict()
    assert all(torch.equal(value, resumed[key]) for key, value in loaded.model.state_dict().items())


@pytest.mark.parametrize("span", [(0, 2), (2, 1), (1, 4)])
def test_spans_of_epochs_that_are_none(span):
    with pytest.raises(SpecError, match="average_epochs"):
        TUNE.replace(epochs=3, average_epochs=span)


def test_a_mean_of_epochs_needs_all_of_them():
    with pytest.raises(SpecError, match="patience: got 2 with average_epochs") as refused:
        TUNE.replace(epochs=3, average_epochs=(2, 3), patience=2)
    assert refused.value.field == "patience"


# Several devices


class _Step(torch.nn.Module):
    """A learner's training step as distributed training calls it."""

    def __init__(self, learner):
        super().__init__()
        self.learner = learner
        learner.log = lambda *_, **__: None

    def forward(self, batch):
        return self.learner.training_step(batch, 0)


@pytest.fixture
def alone():
    """A process group of this process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["cavmaeft", "cavmae"])
def test_networks_with_unused_norms_train_on_several_devices(alone, name):
    made = network(name, "embedding" if name == "cavmae" else "single_label")
    learner = Pretraining(*made, PRE) if name == "cavmae" else Classifier(*made, TUNE)
    unused = train._strategy(learner.model, 2) == "ddp_find_unused_parameters_true"
    step = torch.nn.parallel.DistributedDataParallel(_Step(learner), find_unused_parameters=unused)
    batch = Batch(torch.randn(4, 6400), torch.eye(4)[:, :3], torch.arange(4), image=torch.randn(4, 3, 32, 32))
    for _ in range(2):
        loss = step(batch)
        loss.backward()
        assert loss.isfinite()


def test_the_strategy_is_that_of_the_network(pairs, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    def trainer(**settings):
        raise Stop(settings["strategy"])

    monkeypatch.setattr(train.lightning, "Trainer", trainer)
    monkeypatch.setattr(train.os, "cpu_count", lambda: 2)
    for recipe, devices, expected in (
        (PRE, 2, "ddp_find_unused_parameters_true"),
        (PRE, 1, "auto"),
        (TUNE.replace(model="mn01", model_options={}, frontend="efficientat", n_mels=None), 2, "ddp"),
    ):
        with pytest.raises(Stop, match=f"^{expected}$"):
            fit(pairs, tmp_path, recipe, device="cpu", devices=devices, progress=False, force=True)


# Pre-training


def test_a_pretraining_run_leaves_a_model_and_its_retrieval(pretrained, pairs, capsys):
    report = json.loads((pretrained / "report.json").read_text())
    loaded = load_checkpoint(pretrained / "model.safetensors")
    assert loaded.card.task == "embedding"
    assert loaded.card.labels is None
    assert loaded.card.image == ImageSpec(size=32)
    assert loaded.card.frontend.frames.count == 32
    assert report["test"]["pairs"] == 6
    assert report["test"]["metrics"]["chance_at_1"] == pytest.approx(1 / 3)
    again = evaluate(pretrained / "model.safetensors", pairs, split="test", progress=False)
    assert again.metrics() == report["test"]["metrics"]
    assert main(["evaluate", str(pretrained / "model.safetensors"), "--data", str(pairs), "--quiet"]) == 0
    assert "audio_to_image_recall_at_1" in capsys.readouterr().out
    first, last = (float(row.split(",")[2]) for row in (pretrained / "metrics.csv").read_text().split()[1:])
    assert last < first


def test_pairs_of_one_speaker_are_scored_alone(pairs, tmp_path):
    model, card = network("cavmae", "embedding")
    path = tmp_path / "towers.safetensors"
    save_checkpoint(path, model, card)
    head, *rows = (pairs / "metadata.csv").read_text().splitlines()
    column = head.split(",").index("speaker")
    for i, row in enumerate(rows):
        cells = row.split(",")
        cells[column] = "anna" if i < 4 else "ben"
        rows[i] = ",".join(cells)
    data = tmp_path / "data"
    data.mkdir()
    (data / "metadata.csv").write_text("\n".join([head, *rows]) + "\n")
    for name in ("audio", "images"):
        (data / name).symlink_to(pairs / name)
    found = evaluate(path, data, split_by="speaker", hold_out=("anna",), progress=False)
    assert sorted(found.files) == [row.split(",")[0] for row in rows[:4]]
    with pytest.raises(DataError, match="no speaker called 'carl'"):
        evaluate(path, data, split_by="speaker", hold_out=("carl",), progress=False)
    with pytest.raises(CheckpointError, match="frames: got 'all'"):
        evaluate(path, data, frames="all", progress=False)


def test_a_resumed_pretraining_ends_as_an_uninterrupted_one(pretrained, pairs, tmp_path, monkeypatch):
    original = train.RunFolder.on_train_epoch_end

    def die(self, trainer, learner):
        original(self, trainer, learner)
        raise KeyboardInterrupt

    monkeypatch.setattr(train.RunFolder, "on_train_epoch_end", die)
    with pytest.raises(SystemExit):
        fit(pairs, tmp_path, PRE, progress=False)
    monkeypatch.setattr(train.RunFolder, "on_train_epoch_end", original)
    fit(pairs, tmp_path, PRE, progress=False, resume=True)
    whole, resumed = (load_checkpoint(f / "last.safetensors").model.state_dict() for f in (pretrained, tmp_path))
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


def test_the_recipe_says_what_is_masked_and_how_the_losses_weigh(monkeypatch):
    seen = {}
    model, card = network("cavmae", "embedding")
    settings = PretrainingRecipe(
        mask_audio=0.25, mask_image=0.5, mae_weight=0.0, contrast_weight=0.3, bidirectional=True
    )
    learner = Pretraining(model, card, PRE.replace(pretraining=settings))
    learner.log = lambda name, value, **_: seen.update({name: float(value)})
    original = model.losses

    def losses(features, image, *masks, **weights):
        seen.update(kept=[mask.kept for mask in masks], **weights)
        return original(features, image, *masks, **weights)

    monkeypatch.setattr(model, "losses", losses)
    loss = learner.training_step(
        Batch(torch.randn(4, 6400), torch.eye(4), torch.arange(4), image=torch.randn(4, 3, 32, 32)), 0
    )
    assert seen["kept"] == [3, 2]
    assert seen["bidirectional"] is True
    assert loss.item() == pytest.approx(0.3 * seen["train_contrast"], rel=1e-5)


def test_validation_hides_the_same_tokens_in_every_epoch():
    model, card = network("cavmae", "embedding")
    learner = Pretraining(model, card, PRE, tuple("abcd")).eval()
    batch = Batch(torch.randn(4, 6400), torch.eye(4), torch.arange(4), image=torch.randn(4, 3, 32, 32))
    logged, computed = [], []
    learner.frontend.register_forward_hook(lambda *_: computed.append(True))
    for _ in range(2):
        seen = {}
        learner.log = lambda name, value, seen=seen, **_: seen.update({name: float(value)})
        with torch.no_grad():
            learner.validation_step(batch, 0)
            learner.on_validation_epoch_end()
        logged.append(seen)
    assert logged[0] == logged[1]
    assert len(computed) == 2, "the front end once per batch"
    assert logged[0]["val_score"] == pytest.approx(-logged[0]["val_loss"])


def test_a_share_of_none_hides_nothing():
    model, card = network("cavmae", "embedding")
    settings = PretrainingRecipe(mask_audio=0.0, mask_image=0.0, contrast_weight=1.0)
    learner = Pretraining(model, card, PRE.replace(pretraining=settings))
    batch = Batch(torch.randn(4, 6400), torch.eye(4), torch.arange(4), image=torch.randn(4, 3, 32, 32))
    losses = learner.losses(learner.features(batch), batch)
    assert (losses["mae_a"], losses["mae_v"]) == (0, 0)
    losses["loss"].backward()
    assert all(part.grad is None or part.grad.isfinite().all() for part in model.parameters())


@pytest.mark.parametrize("field", ["mask_audio", "mask_image"])
def test_a_share_that_hides_every_token_is_refused(field):
    settings = PretrainingRecipe(**{field: 0.9})
    with pytest.raises(SpecError, match=r"got 0\.9 of 4 tokens.*at most 0\.75"):
        Pretraining(*network("cavmae", "embedding"), PRE.replace(pretraining=settings))


def test_a_diverged_pretraining_says_so():
    model, card = network("cavmae", "embedding")
    learner = Pretraining(model, card, PRE, tuple("abcd")).eval()
    batch = Batch(torch.randn(4, 6400), torch.eye(4), torch.arange(4), image=torch.randn(4, 3, 32, 32))
    with torch.no_grad():
        model.decoder_pred_a.bias.fill_(torch.nan)
        learner.validation_step(batch, 0)
    with pytest.raises(CheckpointError, match="diverged"):
        learner.on_validation_epoch_end()


def test_pretraining_takes_whole_clips():
    model, card = network("cavmae", "embedding")
    model.declared = model.declared.replace(dynamic_time=True)
    with pytest.raises(SpecError, match="dynamic_time: pre-training") as refused:
        Pretraining(model, card, PRE)
    assert refused.value.field == "dynamic_time"


def test_pretraining_that_cannot_be():
    with pytest.raises(SpecError, match="takes a 'cavmae'"):
        Pretraining(*network(), PRE)
    with pytest.raises(SpecError, match="mixes none"):
        Pretraining(*network("cavmae", "embedding"), PRE.replace(augmentation=Augmentation(mix_probability=0.5)))
    with pytest.raises(SpecError, match="pretraining: missing"):
        PRE.replace(pretraining=None)
    with pytest.raises(SpecError, match="pretraining: given"):
        TUNE.replace(pretraining=PretrainingRecipe())


def test_a_hit_is_the_same_label_where_all_have_one():
    targets = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 1]], np.float32)
    assert same_label(targets).tolist() == [[True, True, False], [True, True, False], [False, False, True]]
    assert same_label(np.array([[1, 0], [0, 0]], np.float32)) is None
    audio, image = np.eye(4, dtype=np.float32), np.eye(4, dtype=np.float32)[[1, 0, 3, 2]]
    alike = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], np.float32)
    by_label = Retrieval(tuple("abcd"), alike, audio, image).metrics()
    by_pair = Retrieval(tuple("abcd"), 0 * alike, audio, image).metrics()
    assert (by_label["audio_to_image_recall_at_1"], by_label["chance_at_1"]) == (1.0, 0.5)
    assert (by_pair["image_to_audio_recall_at_1"], by_pair["chance_at_1"]) == (0.0, 0.25)


@pytest.mark.parametrize(
    "fields",
    [
        {"distillation": DistillationRecipe()},
        {"label_smoothing": 0.1},
        {"smoothing": "positives"},
        {"bn_momentum": 0.1},
        {"temperature_schedule": TemperatureSchedule()},
        {"select": "balanced_accuracy"},
        {"frames": "all"},
        {"loss.supcon": 0.5},
        {"loss.class_balanced": 0.9},
        {"augmentation.masks_at": "norm"},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_pretraining_refuses_what_it_does_not_heed(fields):
    ((path, value),) = fields.items()
    outer, _, inner = path.partition(".")
    given = {"loss": LossRecipe, "augmentation": Augmentation}[outer](**{inner: value}) if inner else value
    assert getattr(TUNE.replace(**{outer: given}), outer) == given
    with pytest.raises(SpecError, match=f"{path}: given with task 'embedding'") as refused:
        PRE.replace(**{outer: given})
    assert refused.value.field == path


def test_pretraining_refuses_a_teacher(pretrained, pairs, tmp_path):
    with pytest.raises(DataError, match="learns from none"):
        fit(pairs, tmp_path / "run", PRE, teachers=[pretrained / "model.safetensors"], progress=False)
    assert not (tmp_path / "run").exists()


def test_a_live_teacher_and_its_student_hear(tmp_path):
    seeing, hearing = network(mode="videoonly"), network(mode="audioonly")
    for name, made in (("seeing", seeing), ("hearing", hearing)):
        save_checkpoint(tmp_path / f"{name}.safetensors", *made)
    with pytest.raises(CardError, match="the student looks at pictures alone") as refused:
        LiveTeacher([tmp_path / "hearing.safetensors"], seeing[1])
    assert refused.value.field == "frontend"
    with pytest.raises(CardError, match="teacher 'tiny' looks at pictures alone"):
        LiveTeacher([tmp_path / "seeing.safetensors"], hearing[1])


# Fine-tuning


def test_a_classifier_begins_with_the_pretrained_towers(pretrained, pairs, tmp_path):
    before = load_checkpoint(pretrained / "model.safetensors")
    for name, mode in (("cavmaeft", "multimodal"), ("cavmaeft", "missingvideoonly"), ("cavmaeft_audio", "audioonly")):
        begun = fine_tuned_towers(
            name, pretrained / "model.safetensors", LABELS, "single_label", options={"mode": mode}
        )
        assert begun.card.options["mode"] == mode
        assert set(begun.replaced) == {f"mlp_head.{part}.{kind}" for part in (0, 1) for kind in ("weight", "bias")}
        state = begun.model.state_dict()
        for key, value in before.model.state_dict().items():
            if key in state:
                assert torch.equal(value, state[key]), key
        left = {key.split(".")[0] for key in before.model.state_dict() if key not in state}
        assert all("decoder" in key or "mask" in key or name == "cavmaeft_audio" for key in left)
    recipe = TUNE.replace(fine_tuning=True, head_lr=10.0, epochs=1, model_options={"mode": "multimodal"}, frames="all")
    report = fit(pairs, tmp_path, recipe, init=pretrained / "model.safetensors", progress=False)
    tuned = load_checkpoint(tmp_path / "model.safetensors")
    assert tuned.card.provenance["initialised_from"]["sha256"] == before.sha256
    assert report["test"]["clips"] == 6
    every = evaluate(tmp_path / "model.safetensors", pairs, split="test", frames="all", progress=False)
    assert every.metrics() == pytest.approx(report["test"]["metrics"])
    one = evaluate(tmp_path / "model.safetensors", pairs, split="test", progress=False)
    assert not np.array_equal(one.probabilities, every.probabilities)
    again = fine_tuned_towers("cavmaeft", tmp_path / "model.safetensors", LABELS, "single_label")
    assert again.replaced == ()
    other = {"mode": "missingaudioonly"}
    turned = fine_tuned_towers("cavmaeft", tmp_path / "model.safetensors", LABELS, "single_label", options=other)
    assert {key.split(".")[0] for key in turned.replaced} == {"mlp_head"}


def test_a_classifier_of_clips_of_any_length_begins_with_towers_of_one_length(pairs, tmp_path):
    model, card = network("cavmae", "embedding", audio_length=64)
    save_checkpoint(tmp_path / "towers.safetensors", model, card)
    recipe = TUNE.replace(fine_tuning=True, epochs=1, model_options={"mode": "audioonly", "dynamic_time": True})
    fit(pairs, tmp_path / "run", recipe, init=tmp_path / "towers.safetensors", progress=False)
    tuned = load_checkpoint(tmp_path / "run" / "model.safetensors")
    assert tuned.card.options["dynamic_time"] is True
    assert tuned.card.frontend.frames is None
    assert tuned.card.inputs[0].axes == ("batch", "time", "32")
    # 16 to 64 frames of 160 samples, windows of 400.
    assert (tuned.card.length_policy.min, tuned.card.length_policy.max) == (400 + 15 * 160, 400 + 64 * 160 - 1)
    assert torch.equal(tuned.model.pos_embed_v, model.pos_embed_v)


@pytest.mark.parametrize("option", [{"depth": 4}, {"audio_length": 48}])
def test_towers_are_those_of_the_checkpoint(pretrained, option):
    path = pretrained / "model.safetensors"
    with pytest.raises(SpecError, match=r"the towers of .* have") as refused:
        fine_tuned_towers("cavmaeft", path, LABELS, "single_label", options=option)
    assert refused.value.field == next(iter(option))
    fine_tuned_towers("cavmaeft", path, LABELS, "single_label", options=TOWERS)


def test_towers_that_do_not_fit_are_refused(pretrained, tmp_path):
    model, card = network("cavmaeft_audio")
    save_checkpoint(tmp_path / "heard.safetensors", model, card)
    with pytest.raises(CheckpointError, match="needs; begin with a network of both"):
        fine_tuned_towers("cavmaeft", tmp_path / "heard.safetensors", LABELS, "single_label")
    other = create_model("mn01", num_classes=3)
    described = new_card(
        "x", "mn01", model=other, frontend=get_frontend("efficientat"), task="single_label", labels=LABELS
    )
    save_checkpoint(tmp_path / "other.safetensors", other, described)
    with pytest.raises(CheckpointError, match="begins with a pre-trained 'cavmae'"):
        fine_tuned_towers("cavmaeft", tmp_path / "other.safetensors", LABELS, "single_label")


def test_published_recipes_have_the_published_numbers():
    pre = get_recipe("cavmae_pretrain")
    assert (pre.batch_size, pre.lr, pre.epochs, pre.betas, pre.weight_decay) == (256, 2e-4, 25, (0.95, 0.999), 5e-7)
    assert (pre.schedule, pre.steps_start, pre.steps_every, pre.steps_factor) == ("steps", 10, 5, 0.5)
    assert pre.pretraining == PretrainingRecipe(mask_audio=0.75, mask_image=0.75, mae_weight=1.0, contrast_weight=0.01)
    expected = {
        "cavmae_as20k": (5e-5, 100, 15, 5, 36, (3, 15), False, "multi_label"),
        "cavmae_as2m": (1e-5, 50, 10, 2, 48, (1, 10), True, "multi_label"),
        "cavmae_vggsound": (1e-4, 10, 10, 2, 48, (3, 10), True, "single_label"),
    }
    for name, (lr, head, epochs, start, batch, span, balanced, task) in expected.items():
        recipe = get_recipe(name)
        assert (recipe.lr, recipe.head_lr, recipe.epochs, recipe.steps_start) == (lr, head, epochs, start), name
        assert (recipe.steps_every, recipe.batch_size, recipe.average_epochs) == (1, batch, span)
        assert (recipe.sampling is not None) == balanced
        assert recipe.sampling is None or (recipe.sampling.replacement, recipe.sampling.offset) == (True, 0.01)
        assert (recipe.task, recipe.label_smoothing, recipe.smoothing) == (task, 0.1, "positives")
        settings = recipe.augmentation
        assert (settings.mix_probability, settings.mix_alpha, settings.masks) == (0.5, 10, (48, 192))
        assert (settings.features_noise, settings.features_roll) == (0.1, True)
        assert recipe.fine_tuning
        assert recipe.frames == "all"


@pytest.fixture
def begun(pairs, tmp_path, monkeypatch):
    """Return a function: (checkpoint, recipe) -> the weights that its pre-training begins with."""

    class Stop(Exception):
        pass

    def noted(learner):
        raise Stop({key: value.clone() for key, value in learner.model.state_dict().items()})

    def begin(path, recipe):
        monkeypatch.setattr(Pretraining, "on_fit_start", noted, raising=False)
        with pytest.raises(Stop) as stopped:
            fit(pairs, tmp_path / "run", recipe, init=path, progress=False, force=True)
        return stopped.value.args[0]

    return begin


def test_pretraining_may_begin_with_a_vision_mae(begun, pairs, tmp_path):
    state = vision_mae(width=12, decoder=8)
    torch.save({"model": state}, tmp_path / "mae.pth")
    recipe = PRE.replace(model_options={**PRE.model_options, "depth": 12, "modality_specific_depth": 11})
    weights = begun(tmp_path / "mae.pth", recipe)
    assert torch.equal(weights["blocks_a.3.mlp.fc1.weight"], state["blocks.3.mlp.fc1.weight"])
    assert torch.equal(weights["blocks_u.0.norm1_v.bias"], state["blocks.11.norm1.bias"])
    torch.save({"other": torch.ones(2)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="holds no card"):
        fit(pairs, tmp_path / "x", PRE, init=tmp_path / "other.pth", progress=False)


def test_pretraining_may_begin_with_a_tower_of_pictures(pairs, begun, tmp_path):
    model, card = network(mode="videoonly")
    save_checkpoint(tmp_path / "seen.safetensors", model, card)
    weights = begun(tmp_path / "seen.safetensors", PRE)
    for key, value in model.state_dict().items():
        if key in weights:
            assert torch.equal(value, weights[key]) != key.startswith("blocks_a.") or value.std() == 0, key
    wide, described = network(mode="videoonly", embed_dim=16)
    save_checkpoint(tmp_path / "wide.safetensors", wide, described)
    with pytest.raises(CheckpointError, match="give both the same widths"):
        fit(pairs, tmp_path / "other", PRE, init=tmp_path / "wide.safetensors", progress=False)


def test_a_network_of_both_answers_to_one_of_them_alone(sounds, pairs, tmp_path, capsys):
    both, card = network()
    save_checkpoint(tmp_path / "both.safetensors", both, card)
    command = ["evaluate", str(tmp_path / "both.safetensors"), "--split", "test", "--quiet", "--data"]
    assert main([*command, str(sounds)]) == 2
    assert "have no picture" in capsys.readouterr().err
    assert main([*command, str(sounds), "--mode", "missingaudioonly"]) == 0
    heard = in_mode(load_checkpoint(tmp_path / "both.safetensors"), "missingaudioonly")
    assert [part.name for part in heard.card.inputs] == ["features"]
    assert heard.card.image is None
    assert heard.card.provenance["trained_in_mode"] == "multimodal"
    assert heard.card.macs < card.macs
    seen = in_mode(load_checkpoint(tmp_path / "both.safetensors"), "missingvideoonly")
    save_checkpoint(tmp_path / "seen.safetensors", seen.model, seen.card)
    with pytest.raises(CheckpointError, match=r"trained as 'missingvideoonly'.*no frontend"):
        evaluate(tmp_path / "seen.safetensors", pairs, mode="multimodal", progress=False)
    with pytest.raises(CheckpointError, match="one at a time"):
        evaluate([tmp_path / "both.safetensors"] * 2, pairs, mode="audioonly", progress=False)
    deaf, described = network("cavmaeft_audio")
    save_checkpoint(tmp_path / "heard.safetensors", deaf, described)
    with pytest.raises(CardError, match="no parameters of pictures"):
        evaluate(tmp_path / "heard.safetensors", pairs, mode="multimodal", progress=False)
    model, described = network("cavmae", "embedding")
    save_checkpoint(tmp_path / "towers.safetensors", model, described)
    with pytest.raises(CheckpointError, match="a 'cavmaeft' has modes"):
        evaluate(tmp_path / "towers.safetensors", pairs, mode="audioonly", progress=False)
