"""Training on events: the published pieces to the last digit, and every part of a run doing what the recipe says."""

from __future__ import annotations

import copy
import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from models_zoo.dataset import read_dataset
from models_zoo.errors import DataError, MissingDependencyError, OutputExistsError, SpecError
from models_zoo.events import EventOptions
from models_zoo.presets import get_frontend
from models_zoo.scenes import SceneSettings, write_scenes
from models_zoo.sed_metrics import SceneScores
from train_torch import sed
from train_torch.__main__ import main
from train_torch.checkpoint import load_checkpoint
from train_torch.frontend import TorchFrontend
from train_torch.models import create_model
from train_torch.recipes import Recipe, get_recipe
from train_torch.recipes.sed import BatchGroup, SedRecipe
from train_torch.sed import (
    MeanTeacher,
    fit_sed,
    learning_rate_factor,
    mixed,
    mixed_targets,
    ramp,
    shifted,
    teacher_keeps,
    update_teacher,
)
from train_torch.sed_data import SceneBatch, SceneData, SceneDataModule, read_scenes, scene_loader
from train_torch.sed_evaluation import evaluate_detector, evaluate_scenes, scene_scores

RATE = 16000
CLASSES = ["buzz", "knock", "whistle"]
GROUPS = (
    BatchGroup(part="strong", size=2),
    BatchGroup(part="weak", size=2),
    BatchGroup(part="unlabelled", size=2),
)
TINY = SedRecipe(
    model_options={"filters": [4, 8], "pools": [[2, 4], [1, 8]], "rnn_size": 8, "rnn_layers": 1, "dropout": 0.0},
    n_mels=32,
    hop_length=512,
    seconds=1.0,
    groups=GROUPS,
    epochs=2,
    steps_per_epoch=2,
    warmup_epochs=1,
    mixup_probability=1.0,
    lr=1e-2,
)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    settings = SceneSettings(seconds=1.0, events=(2, 4), event_seconds=(0.1, 0.4))
    counts = {"strong": 5, "weak": 4, "unlabelled": 4, "validation": 3, "test": 3}
    write_scenes(folder, get_frontend("dcase_2024"), counts=counts, classes=CLASSES, settings=settings, seed=2)
    return folder


@pytest.fixture(scope="module")
def trained(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("runs") / "Tiny Detector"
    return out, fit_sed([scenes], out, TINY, progress=False)


@pytest.fixture(scope="module")
def golden(contracts: Path) -> dict[str, np.ndarray]:
    with np.load(contracts / "dcase_crnn" / "golden_training.npz") as arrays:
        return dict(arrays)


def learner_of(scenes: Path, recipe: SedRecipe = TINY) -> tuple[MeanTeacher, SceneDataModule]:
    """A learner and its data, as ``fit_sed`` makes them, without a run."""
    found = read_scenes([scenes])
    spec = sed._frontend(recipe)
    torch.manual_seed(recipe.seed)
    fixed = {"num_classes": len(found.dataset.labels), "n_mels": spec.mel.n_mels}
    student = create_model(recipe.model, **{**recipe.model_options, **fixed})
    card = sed.new_card(
        "tiny", recipe.model, model=student, frontend=spec, task="event_detection", labels=found.dataset.labels
    )
    module = SceneDataModule(found, card, recipe)
    return MeanTeacher(student, card, recipe, module.parts["validation"]), module


def first_batch(module: SceneDataModule) -> SceneBatch:
    return next(iter(module.train_dataloader()))


# The published pieces


@pytest.mark.contracts
def test_learning_rates_are_the_published_ones(golden: dict[str, np.ndarray]) -> None:
    calls = golden["lr_calls"].tolist()
    assert golden["lr_step_num"].tolist() == [call + 1 for call in calls]
    plain = [1e-3 * learning_rate_factor(call + 1, rise=5900) for call in calls]
    np.testing.assert_allclose(plain, golden["lr_2023"], rtol=1e-6, atol=0)
    annealed = [1e-3 * learning_rate_factor(call + 1, rise=5900, fall=11800, end=35400) for call in calls]
    np.testing.assert_allclose(annealed, golden["lr_2024"], rtol=1e-6, atol=0)
    assert np.abs(golden["lr_2023"] - golden["lr_2024"]).max() > 5e-4


@pytest.mark.contracts
def test_the_teacher_keeps_what_is_published(golden: dict[str, np.ndarray]) -> None:
    kept = [teacher_keeps(int(step), 0.999) for step in golden["ema_step"]]
    np.testing.assert_allclose(kept, golden["ema_alpha"], rtol=0, atol=1e-12)


@pytest.mark.contracts
@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_mixup_is_the_published_one(golden: dict[str, np.ndarray], kind: str) -> None:
    rng_x, rng_y = np.random.default_rng(301), np.random.default_rng(302)
    x = torch.from_numpy(rng_x.standard_normal((4, 3, 5)).astype(np.float32))
    y = torch.from_numpy((rng_y.uniform(size=(4, 2, 5)) > 0.6).astype(np.float32))
    order = torch.tensor([2, 0, 3, 1])
    np.testing.assert_allclose(mixed(x, order, 0.3), golden[f"mixup_{kind}_x"], rtol=0, atol=1e-6)
    targets = mixed_targets(y, order, 0.3, hard=kind == "hard")
    np.testing.assert_allclose(targets, golden[f"mixup_{kind}_y"], rtol=0, atol=1e-6)


@pytest.mark.contracts
def test_frame_shift_is_the_published_one(golden: dict[str, np.ndarray]) -> None:
    mel = torch.arange(6 * 40, dtype=torch.float32).reshape(6, 1, 40, 1)
    labels = torch.arange(6 * 10, dtype=torch.float32).reshape(6, 1, 10)
    moved, targets = shifted(mel, labels, golden["frame_shift_shifts"].tolist(), 4)
    np.testing.assert_array_equal(moved[:, :, :, 0], golden["frame_shift_mels"])
    np.testing.assert_array_equal(targets, golden["frame_shift_labels"])


def test_the_rise_ends_at_one() -> None:
    assert [ramp(n, 10) for n in (0, 10, 99)] == [math.exp(-5), 1, 1]


def test_the_teacher_is_the_mean_of_the_students_but_for_the_statistics_of_its_norms() -> None:
    student = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 1
    student[1].running_mean += 5
    before = copy.deepcopy(teacher.state_dict())
    update_teacher(teacher, student, 0.75)
    for name, parameter in teacher.named_parameters():
        torch.testing.assert_close(parameter.data, before[name] + 0.25)
    assert torch.equal(teacher[1].running_mean, before["1.running_mean"])


# Clips and batches


def test_a_batch_is_made_of_its_groups_and_an_epoch_ends_with_the_first_used_up(scenes: Path) -> None:
    _, module = learner_of(scenes, TINY.replace(steps_per_epoch=None))
    assert len(module.batches) == 2  # four weak clips, two in a batch
    data = module.parts["train"]
    module.batches.set_epoch(3)
    epoch = list(module.batches)
    for request in epoch:
        assert [data.parts[index] for index in request.indices] == ["strong"] * 2 + ["weak"] * 2 + ["unlabelled"] * 2
    used = [index for request in epoch for index in request.indices]
    assert len(set(used)) == len(used) == 12
    assert list(module.batches) == epoch
    module.batches.set_epoch(4)
    assert list(module.batches) != epoch


def test_a_longer_epoch_takes_clips_again(scenes: Path) -> None:
    _, module = learner_of(scenes, TINY.replace(steps_per_epoch=5))
    weak = [index for request in module.batches for index in request.indices[2:4]]
    assert len(weak) == 10
    assert {weak.count(index) for index in set(weak)} == {2, 3}


def test_targets_say_what_is_known_of_each_part(scenes: Path) -> None:
    _, module = learner_of(scenes)
    batch, data = first_batch(module), module.parts["train"]
    rows = {record.file: record for record in read_dataset(scenes).by_file().records}
    assert batch.strong.shape == (6, 3, 15)  # 1 s in frames of two hops of 512
    for place, index in enumerate(batch.index.tolist()):
        labels = rows[scenes / data.files[index]].labels
        assert [data.labels[row] for row in torch.nonzero(batch.weak[place])[:, 0]] == sorted(labels)
        assert bool(batch.strong[place].any()) == (place < 2)
        for label, onset, offset in read_dataset(scenes).events().get(data.files[index], ()) if place < 2 else ():
            row = batch.strong[place, data.labels.index(label)]
            middle = int((onset + offset) / 2 / 0.064)
            assert row[min(middle, 14)] == 1
        if place < 2:
            heard = sum(offset - onset for _, onset, offset in read_dataset(scenes).events()[data.files[index]]) / 0.064
            assert heard - 1 <= float(batch.strong[place].sum()) <= heard + 2 * 4


def write_clip(root: Path, rows: str, seconds: float = 1.0) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for name in ("a.wav", "b.wav", "c.wav"):
        noise = np.random.default_rng(0).standard_normal(round(seconds * RATE))
        soundfile.write(root / name, 0.1 * noise, RATE)
    (root / "metadata.csv").write_text("file,label,onset,offset,split,part,confidence\n" + rows)
    return root


TABLE = "a.wav,dog,0.1,0.5,train,strong,\nb.wav,dog,0.2,0.4,validation,strong,\n"


def data_of(root: Path, recipe: SedRecipe = TINY, labels: tuple[str, ...] | None = None) -> SceneData:
    found = read_scenes([root])
    spec = sed._frontend(recipe)
    labels = labels or found.dataset.labels
    fixed = {"num_classes": len(labels), "n_mels": spec.mel.n_mels}
    model = create_model("crnn", **{**recipe.model_options, **fixed})
    card = sed.new_card("t", "crnn", model=model, frontend=spec, task="event_detection", labels=labels)
    return SceneData(found.select("train"), card, recipe)


def events_of(scenes: Path, split: str) -> list:
    return list(read_dataset(scenes).select(split).events().values())


def answered(data: SceneData, share: float = 1.0) -> SceneScores:
    """Scores as a detector gives them that knows the truth, or, with ``share`` 0, says the contrary."""
    batches = list(scene_loader(data))
    strong, weak = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("strong", "weak"))
    return scene_scores(data, [{"strong": (strong - 1 + share).abs(), "weak": (weak - 1 + share).abs()}])


@pytest.mark.parametrize("times", ["1.0,1.05", "0.5,1.2"])
def test_events_beyond_the_clip_are_refused(tmp_path: Path, times: str) -> None:
    root = write_clip(tmp_path, TABLE.replace("0.1,0.5", times))
    with pytest.raises(DataError, match="lies beyond the clip, which is 1 s long"):
        data_of(root)


def test_labels_the_model_does_not_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown to the model: 'dog'"):
        data_of(write_clip(tmp_path, TABLE), labels=("cat",))


def test_confidence_is_the_target_and_half_sure_is_no_event(tmp_path: Path) -> None:
    rows = "a.wav,dog,0,0.512,train,strong,0.3\na.wav,dog,0.512,1,train,strong,0.7\nb.wav,dog,0,1,validation,strong,1\n"
    data = data_of(write_clip(tmp_path, rows))
    batch = data[scene_loader(data).sampler[0]]
    np.testing.assert_allclose(batch.strong[0, 0], [0.3] * 8 + [0.7] * 7, atol=1e-6)
    assert answered(data).truth == {"a.wav": (("dog", 0.512, 1.0),)}
    for confidence in ("0", "1.5", "sure"):
        with pytest.raises(DataError, match="confidence"):
            read_dataset(write_clip(tmp_path, rows.replace("0.7", confidence)))


def test_short_clips_get_zeros_and_long_ones_are_cropped_with_their_events(tmp_path: Path) -> None:
    rows = "a.wav,dog,1.5,2,train,strong,\nb.wav,dog,0,1,validation,strong,\n"
    root = write_clip(tmp_path, rows, seconds=2.0)
    data = data_of(root)
    whole = data[scene_loader(data).sampler[0]]
    assert not whole.strong.any()  # evaluation hears the first second
    assert answered(data).truth == {"a.wav": ()}
    crops = [data[type(scene_loader(data).sampler[0])((0,), epoch)] for epoch in range(6)]
    assert {crop.mel.shape for crop in crops} == {whole.mel.shape}
    lengths = [float(crop.strong.sum()) for crop in crops]
    assert max(lengths) >= 4
    assert len(set(lengths)) > 1
    longer = data_of(root, TINY.replace(seconds=4.0))
    clip = longer[scene_loader(longer).sampler[0]]
    assert not clip.mel[0, 0, 70:].any()
    assert clip.mel[0, 0, 30].any()


def test_a_split_is_carved_of_labelled_clips_alone(tmp_path: Path) -> None:
    rows = "a.wav,dog,0,1,train,strong,\nb.wav,dog,,,train,weak,\nc.wav,,,,train,unlabelled,\n"
    found = read_scenes([write_clip(tmp_path, rows)], val_fraction=0.5)
    parts = {record.part: record.split for record in found.dataset.records}
    assert parts["unlabelled"] == "train"
    assert sorted((parts["strong"], parts["weak"])) == ["train", "validation"]


def test_every_data_set_knows_its_own_labels_and_aliases_count_for_both(tmp_path: Path) -> None:
    one = write_clip(tmp_path / "one", TABLE)
    two = write_clip(tmp_path / "two", TABLE.replace("dog", "dog_bark"))
    found = read_scenes([one, two], aliases={"dog_bark": "dog"})
    assert found.dataset.labels == ("dog", "dog_bark")
    assert found.valid == ({"dog"}, {"dog", "dog_bark"})
    labels = {found.dataset.name_of(record): record.labels for record in found.dataset.records}
    assert labels["one/a.wav"] == ("dog",)
    assert labels["two/a.wav"] == ("dog_bark", "dog")
    with pytest.raises(DataError, match="no label cow"):
        read_scenes([one], aliases={"cow": "dog"})
    with pytest.raises(DataError, match="give each once"):
        read_scenes([one, one])


# A step


def test_classes_unknown_to_a_data_set_are_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = write_clip(tmp_path / "one", TABLE)
    two = write_clip(tmp_path / "two", TABLE.replace("dog", "cat"))
    groups = (BatchGroup(part="strong", size=1, data=0), BatchGroup(part="strong", size=1, data=1, consistency=False))
    recipe = TINY.replace(groups=groups, epochs=1)
    seen = []
    plain = MeanTeacher._consistency
    away = torch.tensor([[0.0], [1.0]])

    def noted(self, answer, inputs):
        seen.append((answer["strong"].detach(), inputs["classes_mask"]))
        self.teacher.eval()  # answers the same twice
        near = plain(self, answer, inputs)
        far = {name: value + away.view(-1, *[1] * (value.dim() - 1)) for name, value in answer.items()}
        assert {name: float(value.detach()) for name, value in plain(self, far, inputs).items()} == {
            name: float(value.detach()) for name, value in near.items()
        }, "the second clip, moved far away, follows no teacher"
        self.teacher.train()
        return near

    monkeypatch.setattr(MeanTeacher, "_consistency", noted)
    fit_sed([one, two], tmp_path / "run", recipe, progress=False)
    strong, mask = seen[0]
    assert mask.tolist() == [[True, False], [False, True]]
    assert not strong[~mask].any()
    assert strong[mask].all()


def losses_of(
    learner: MeanTeacher, batch: SceneBatch, monkeypatch: pytest.MonkeyPatch, step: int = 0
) -> dict[str, float]:
    logged: dict[str, float] = {}
    with monkeypatch.context() as patch:
        patch.setattr(learner, "log", lambda name, value, **_: logged.update({name: float(value)}))
        patch.setattr(MeanTeacher, "global_step", step)
        patch.setattr(MeanTeacher, "_steps", lambda self, epochs: 10.0)
        patch.setattr(MeanTeacher, "device", torch.device("cpu"))
        logged["sum"] = float(learner.training_step(batch, 0).detach())
    return logged


def test_the_loss_is_the_published_sum(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, module = learner_of(scenes, TINY.replace(mixup_probability=0.0))
    batch = first_batch(module)
    mask = {"mask_time": {"most": 0, "share": 0.0}, "mask_mel": {"most": 0, "share": 0.0}}
    learner, _ = learner_of(scenes, TINY.replace(mixup_probability=0.0, model_options={**TINY.model_options, **mask}))
    with torch.no_grad():
        for parameter in learner.teacher.parameters():
            parameter *= 0.5
    values = losses_of(learner, batch, monkeypatch, step=4)
    features = TorchFrontend(learner.card.frontend).from_mel(batch.mel)
    with torch.no_grad():
        student, teacher = (copy.deepcopy(net)(features=features) for net in (learner.student, learner.teacher))
    entropy = torch.nn.functional.binary_cross_entropy
    expected = {
        "train_strong": entropy(student["strong"][:2, :, :15], batch.strong[:2]),
        "train_weak": entropy(student["weak"][2:4], batch.weak[2:4]),
    }
    weight = 2 * math.exp(-5 * (1 - 5 / 10) ** 2)
    for name in ("strong", "weak"):
        expected[f"train_consistency_{name}"] = weight * ((student[name] - teacher[name]) ** 2).mean()
    for name, value in expected.items():
        assert values[name] == pytest.approx(float(value), rel=1e-4), name
    assert values["sum"] == pytest.approx(sum(float(value) for value in expected.values()), rel=1e-4)
    assert values["train_consistency_strong"] > 1e-6


def test_strong_clips_teach_clip_scores_where_asked(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strong = TINY.replace(groups=GROUPS[:1], consistency=0.0)
    batch = first_batch(learner_of(scenes, strong)[1])
    values = losses_of(learner_of(scenes, strong)[0], batch, monkeypatch)
    assert set(values) == {"train_strong", "sum"}
    values = losses_of(learner_of(scenes, strong.replace(weak_from_strong=True))[0], batch, monkeypatch)
    assert set(values) == {"train_strong", "train_weak", "sum"}


def test_groups_are_mixed_apart_and_unlabelled_clips_not_at_all(scenes: Path) -> None:
    learner, module = learner_of(scenes)
    batch = first_batch(module)
    moved = 0
    for seed in range(8):
        changed = learner._augmented(batch, np.random.default_rng(seed))
        mel, strong, weak = changed.mel, changed.strong, changed.weak
        assert torch.equal(mel[4:], batch.mel[4:])
        for pair in (slice(0, 2), slice(2, 4)):
            # What two clips are mixed of is theirs alone: their sum, or twice one of them where both are the same.
            total = mel[pair].sum(dim=0) - batch.mel[pair].sum(dim=0)
            assert total.abs().max() <= 1e-4 * batch.mel[pair].abs().max()
        assert not strong[2:].any()
        torch.testing.assert_close(weak[:2].sum(0), batch.weak[:2].sum(0))
        moved += not torch.equal(mel[:2], batch.mel[:2])
    assert moved >= 2
    never = learner_of(scenes, TINY.replace(mixup_probability=0.0))[0]
    assert torch.equal(never._augmented(batch, np.random.default_rng(0)).mel, batch.mel)
    hard = learner_of(scenes, TINY.replace(mixup="hard"))[0]
    targets = torch.cat([hard._augmented(batch, np.random.default_rng(seed)).weak[:4] for seed in range(8)])
    assert set(targets.unique().tolist()) <= {0.0, 1.0}


def test_norms_have_the_momentum_of_the_recipe(scenes: Path) -> None:
    for recipe, momentum in ((TINY, 0.99), (TINY.replace(bn_momentum=0.2), 0.2)):
        learner = learner_of(scenes, recipe)[0]
        norms = [m for m in learner.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert len(norms) == 4  # two of the student, two of the teacher
        assert {norm.momentum for norm in norms} == {momentum}


def test_clips_are_shifted_with_their_labels_where_asked(scenes: Path) -> None:
    learner, module = learner_of(scenes, TINY.replace(frame_shift=20.0, mixup_probability=0.0))
    batch = first_batch(module)
    changed = learner._augmented(batch, np.random.default_rng(0))
    mel, strong, weak = changed.mel, changed.strong, changed.weak
    assert not torch.equal(mel, batch.mel)
    assert not torch.equal(strong, batch.strong)
    assert torch.equal(weak, batch.weak)
    torch.testing.assert_close(mel.sort(dim=2).values, batch.mel.sort(dim=2).values)
    torch.testing.assert_close(strong.sum(dim=2), batch.strong.sum(dim=2))


def test_features_go_on_from_linear_mels(scenes: Path) -> None:
    frontend = TorchFrontend(get_frontend("dcase_2024")).eval()
    waveform = 0.1 * torch.from_numpy(np.random.default_rng(0).standard_normal((2, 8000)).astype(np.float32))
    assert torch.equal(frontend.from_mel(frontend.mel(waveform)), frontend(waveform))
    assert not torch.equal(frontend.from_mel(0.5 * frontend.mel(waveform) + 0.1), frontend(waveform))


# A run


def test_a_run_leaves_student_teacher_and_what_was_measured(trained: tuple[Path, dict], scenes: Path) -> None:
    out, report = trained
    assert sorted(path.name for path in out.iterdir()) == sorted(sed.OWN_FILES)
    assert json.loads((out / "report.json").read_text()) == report
    with open(out / "metrics.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert {"train_strong", "train_consistency_weak", "val_weak_f1", "val_teacher_intersection_f1"} <= set(rows[0])
    student, teacher = (load_checkpoint(out / f"{name}.safetensors") for name in ("model", "teacher"))
    assert student.card == teacher.card.replace(metrics=student.card.metrics)
    assert student.card.task == "event_detection"
    assert student.card.labels == tuple(CLASSES)
    assert student.card.length_policy.min == student.card.length_policy.max == RATE
    assert student.card.provenance["training_clips"] == {"strong": 5, "weak": 4, "unlabelled": 4}
    assert set(report["test"]) == {"student", "teacher"}
    own = dict(student.model.named_parameters())
    assert any(not torch.equal(own[name], value) for name, value in teacher.model.named_parameters())
    for checkpoint, name in ((student, "student"), (teacher, "teacher")):
        data = SceneData(read_scenes([scenes]).select("test"), checkpoint.card, TINY)
        values = evaluate_scenes(checkpoint.model, data).selection(EventOptions.of(checkpoint.card))
        assert {key: report["test"][name][key] for key in values} == pytest.approx(values, nan_ok=True)


def test_a_resumed_run_ends_as_an_uninterrupted_one(
    trained: tuple[Path, dict], scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, steps = MeanTeacher.training_step, []

    def killed(self, *arguments):
        if len(steps) == 3:
            raise RuntimeError("killed")
        steps.append(self.global_step)
        return step(self, *arguments)

    out = tmp_path / "Tiny Detector"
    with monkeypatch.context() as patch:
        patch.setattr(MeanTeacher, "training_step", killed)
        with pytest.raises(RuntimeError, match="killed"):
            fit_sed([scenes], out, TINY, progress=False)
    with pytest.raises(DataError, match="lr"):
        fit_sed([scenes], out, TINY.replace(lr=0.5), progress=False, resume=True)
    fit_sed([scenes], out, TINY, progress=False, resume=True)
    for name in ("last", "model", "teacher"):
        ours, theirs = (load_checkpoint(folder / f"{name}.safetensors").model for folder in (out, trained[0]))
        for (key, one), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            assert torch.equal(one, other), (name, key)
    with pytest.raises(OutputExistsError):
        fit_sed([scenes], out, TINY, progress=False)


def test_the_schedule_and_the_teacher_follow_the_steps(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates, keeps, clips = [], [], []
    step = MeanTeacher.training_step

    def noted(self, *arguments):
        clips.append(self.trainer.gradient_clip_val)
        rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return step(self, *arguments)

    monkeypatch.setattr(MeanTeacher, "training_step", noted)
    monkeypatch.setattr(sed, "update_teacher", lambda teacher, student, share: keeps.append(share))
    recipe = TINY.replace(epochs=4, warmup_epochs=2, annealing_start=3, teacher_decay=0.7, validate_every=2)
    recipe = recipe.replace(gradient_clip=5.0)
    fit_sed([scenes], tmp_path / "run", recipe, progress=False, test=False)
    expected = [1.0, *(learning_rate_factor(step, rise=4, fall=6, end=8) for step in range(2, 9))]
    np.testing.assert_allclose(rates, 1e-2 * np.array(expected), rtol=1e-9)
    np.testing.assert_allclose(keeps, [0.5, 2 / 3, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7])
    assert set(clips) == {5.0}
    with open(tmp_path / "run" / "metrics.csv", newline="") as stream:
        assert [bool(row["val_score"]) for row in csv.DictReader(stream)] == [False, True, False, True]
    rates.clear()
    late = recipe.replace(full_first_step=False, epochs=1, validate_every=1, warmup_epochs=0.5, annealing_start=None)
    fit_sed([scenes], tmp_path / "late", late.replace(validate_every=1), progress=False, test=False)
    np.testing.assert_allclose(rates, [1e-2 * ramp(1, 1), 1e-2])


def test_without_a_teacher_there_is_none(scenes: Path, tmp_path: Path) -> None:
    recipe = TINY.replace(groups=GROUPS[:1], consistency=0.0, epochs=1)
    report = fit_sed([scenes], tmp_path / "run", recipe, progress=False)
    assert set(report["test"]) == {"student"}
    assert not (tmp_path / "run" / "teacher.safetensors").exists()


def test_events_are_found_where_scores_say_so(scenes: Path) -> None:
    data = learner_of(scenes)[1].parts["validation"]
    values = answered(data).selection(EventOptions())
    assert values["weak_f1"] == 1
    assert values["intersection_f1"] > 0.95
    wrong = answered(data, share=0.0).selection(EventOptions())
    assert wrong["weak_f1"] < 0.5
    assert wrong["intersection_f1"] < 0.5


@pytest.mark.sed
def test_the_report_holds_the_published_metrics(trained: tuple[Path, dict]) -> None:
    assert {"psds1", "psds2", "collar_f1", "segment_pauc"} <= set(trained[1]["test"]["student"])


@pytest.mark.sed
def test_perfect_scores_have_perfect_metrics(scenes: Path) -> None:
    data = learner_of(scenes)[1].parts["validation"]
    values = answered(data).metrics(EventOptions())
    assert values["psds2"] > 0.9
    assert values["collar_f1"] > 0.9
    assert values["segment_best_f1"] > 0.9


def test_a_checkpoint_is_evaluated_as_its_run_was(trained: tuple[Path, dict], scenes: Path, capsys) -> None:
    out, report = trained
    checkpoint = load_checkpoint(out / "model.safetensors")
    found = evaluate_detector(checkpoint.model, checkpoint.card, scenes, split="test")
    assert found.num_clips == 3
    assert report["test"]["student"] == pytest.approx({k: v for k, v in found.measures.items() if not math.isnan(v)})
    assert sum(row["events"] for row in found.classes.values()) == sum(map(len, events_of(scenes, "test")))
    shared = [row["event_f1"] for row in found.classes.values()]
    assert np.nanmean(shared) == pytest.approx(found.measures["intersection_f1"])
    command = ["evaluate", str(out / "model.safetensors"), "--data", str(scenes), "--split", "test", "--quiet"]
    assert main([*command, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["metrics"] == pytest.approx(found.to_dict()["metrics"])
    assert [row["label"] for row in shown["classes"]] == CLASSES
    assert main(command) == 0
    assert f"weak_f1{found.measures['weak_f1']:27.4f}" in capsys.readouterr().out


@pytest.mark.energy
def test_the_energy_of_a_run_is_reported(scenes: Path, tmp_path: Path) -> None:
    recipe = TINY.replace(epochs=1)
    report = fit_sed([scenes], tmp_path / "run", recipe, progress=False, test=False, energy="FRA")
    assert 0 < report["energy_kwh"] < 0.1


def test_energy_without_its_extra_is_refused(monkeypatch: pytest.MonkeyPatch, scenes: Path, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "codecarbon", None)
    with pytest.raises(MissingDependencyError, match=r"crossfade\[energy\]"):
        fit_sed([scenes], tmp_path / "run", TINY, progress=False, energy="FRA")


# Recipes and the command


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": GROUPS[2:]}, "none has labels"),
        ({"consistency": 0.0}, "nothing is learnt from unlabelled"),
        ({"annealing_start": 0.5}, "after the warm-up"),
        ({"validate_every": 9}, "never be known"),
    ],
)
def test_impossible_recipes(changes: dict, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        TINY.replace(**changes)


def test_too_few_clips_for_a_batch(scenes: Path, tmp_path: Path) -> None:
    many = TINY.replace(groups=(BatchGroup(part="strong", size=6),), consistency=0.0)
    with pytest.raises(DataError, match="5 strong training clips; a batch takes 6"):
        fit_sed([scenes], tmp_path / "run", many, progress=False)


def test_a_model_without_frames_is_refused(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="scores no frames"):
        fit_sed([scenes], tmp_path / "run", TINY.replace(model="mn04", model_options={}), progress=False)


def test_the_arms_of_the_comparison_differ_in_nothing_else() -> None:
    teacher, strong = get_recipe("scenes_crnn"), get_recipe("scenes_crnn_strong")
    assert isinstance(teacher, SedRecipe)
    assert strong == teacher.replace(description=strong.description, groups=teacher.groups[:1], consistency=0.0)


def test_the_command_trains_and_tells_recipes_apart(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tiny.json"
    file.write_text(TINY.replace(annealing_start=1.5).to_json())
    arguments = ["--data", str(scenes), "--out", str(tmp_path / "run"), "--quiet"]
    together = ["--epochs", "1", "--set", "lr=0.001", "warmup_epochs=0.5", "annealing_start=0.7"]  # only so possible
    assert main(["fit-sed", *arguments, "--recipe", str(file), *together]) == 0
    assert "test teacher intersection_f1: " in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["lr"] == 0.001
    assert main(["fit", *arguments, "--recipe", str(file)]) == 2
    assert "train with fit-sed" in capsys.readouterr().err
    assert main(["fit-sed", *arguments, "--recipe", "default", "--force"]) == 2
    assert "train with fit" in capsys.readouterr().err
    assert isinstance(get_recipe("default"), Recipe)
