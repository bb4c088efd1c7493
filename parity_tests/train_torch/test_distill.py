"""Distillation: the teacher's term, live and stored teachers, ensembles, and what is refused."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional

from models_zoo.dataset import read_dataset
from models_zoo.errors import CardError, DataError, OutputExistsError
from models_zoo.soundscapes import write_soundscapes
from parity_tests.networks import card_of
from train_torch import classifier as module
from train_torch.__main__ import main
from train_torch.augment import draw_mixing
from train_torch.checkpoint import load_checkpoint, save_checkpoint
from train_torch.classifier import Classifier
from train_torch.data import Batch
from train_torch.distill import (
    Answers,
    LiveTeacher,
    StoredLogits,
    StoredTeacher,
    distillation_loss,
    read_logits,
    teach,
)
from train_torch.evaluation import evaluate
from train_torch.frontend import TorchFrontend
from train_torch.models import create_model
from train_torch.models.ensemble import Ensemble
from train_torch.recipes import Augmentation, DistillationRecipe, Recipe
from train_torch.train import fit

CLASSES = ("buzz", "clicks", "tone")
TINY = Recipe(
    model="mn01", frontend="efficientat_mels40", seed=3, epochs=2, batch_size=8, lr=3e-3, seconds=0.5, bn_momentum=0.1
)
DISTIL = TINY.replace(distillation=DistillationRecipe())


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Thirty clips of three sounds, split 18 / 6 / 6."""
    folder = tmp_path_factory.mktemp("sounds")
    write_soundscapes(folder, num_clips=30, seed=1, seconds=0.5, classes=CLASSES)
    return folder


def network(seed, *, n_mels=128, labels=CLASSES, task="single_label", **card):
    """Return a model that answers differently to different clips, with its card."""
    torch.manual_seed(seed)
    model = create_model("mn01", num_classes=len(labels), n_mels=n_mels)
    torch.nn.init.normal_(model.classifier[5].weight)
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.running_var.fill_(0.1)
    return model.eval(), card_of(model, "mn01", name=f"teacher-{seed}", labels=labels, task=task, **card)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Two checkpoints of which one has fewer mel bands: each needs its own front end."""
    folder = tmp_path_factory.mktemp("teachers")
    paths = [folder / "a.safetensors", folder / "b.safetensors"]
    for seed, (path, n_mels) in enumerate(zip(paths, (128, 40), strict=True)):
        save_checkpoint(path, *network(seed, n_mels=n_mels))
    return paths


def by_hand(paths, waveform):
    """Return the mean of the logits, each network behind its own front end."""
    logits = []
    for path in paths:
        loaded = load_checkpoint(path)
        with torch.no_grad():
            features = TorchFrontend(loaded.card.frontend).eval()(waveform)
            logits.append(loaded.model.eval()(features=features)["logits"])
    return torch.stack(logits).mean(dim=0)


def clips(count=6):
    waveform = torch.randn(count, 16000, generator=torch.Generator().manual_seed(5)) * 0.1
    waveform *= torch.linspace(0.1, 2, count)[:, None]
    return Batch(waveform, torch.eye(3)[torch.arange(count) % 3], torch.arange(count))


def student(recipe=DISTIL, teacher=None, seed=9):
    model, card = network(seed)
    classifier = Classifier(model, card, recipe, teacher=teacher)
    classifier.log = lambda *_, **__: None
    return classifier


# The loss


def test_the_published_loss_of_several_labels():
    generator = torch.Generator().manual_seed(0)
    logits, theirs = torch.randn(4, 5, generator=generator), torch.randn(4, 5, generator=generator)
    said = torch.tensor([[1.0], [1.0], [0.0], [1.0]])
    each = functional.binary_cross_entropy_with_logits(logits, theirs.sigmoid(), reduction="none").mean(dim=1)
    expected = (each * said[:, 0]).sum() / 4  # the clip without an answer adds zero and is still counted
    loss = distillation_loss(logits, Answers(theirs.sigmoid() * said, said), "multi_label")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_one_label_learns_the_teachers_softmax():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 5, generator=generator).requires_grad_()
    theirs = torch.randn(4, 5, generator=generator).softmax(dim=1)
    loss = distillation_loss(logits, Answers(theirs, torch.ones(4, 1)), "single_label")
    divergence = functional.kl_div(logits.log_softmax(dim=1), theirs, reduction="batchmean")
    entropy = -(theirs * theirs.log()).sum(dim=1).mean()
    assert loss.item() == pytest.approx((divergence + entropy).item(), rel=1e-5)
    gradients = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, divergence)]
    assert torch.allclose(*gradients, atol=1e-7)


@pytest.mark.parametrize("task", ["single_label", "multi_label"])
def test_mixing_answers_is_mixing_losses(task):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=generator)
    positive = torch.randn(6, 5, generator=generator).softmax(dim=1)
    said = torch.tensor([[1.0], [0.0], [1.0], [1.0], [0.0], [1.0]])
    answers = Answers(positive * said, said)
    mixing = draw_mixing(6, np.random.default_rng(1), alpha=0.3, probability=1.0)
    expected = 0.0
    for i in range(6):
        one = logits[i : i + 1]
        other = int(mixing.permutation[i])
        for place, weight in ((i, mixing.weight[i]), (other, 1 - mixing.weight[i])):
            part = Answers(answers.positive[place : place + 1], answers.said[place : place + 1])
            expected += float(weight * distillation_loss(one, part, task)) / 6
    assert distillation_loss(logits, answers.mixed(mixing), task).item() == pytest.approx(expected, rel=1e-5)


# Ensembles and live teachers


def test_an_ensemble_is_the_mean_of_logits_behind_own_front_ends(teachers):
    ensemble = Ensemble([(one.model, one.card) for one in map(load_checkpoint, teachers)])
    waveform = clips().waveform
    assert torch.allclose(ensemble(waveform)["logits"], by_hand(teachers, waveform), atol=1e-6)
    assert not torch.allclose(ensemble(waveform)["logits"], by_hand(teachers[:1], waveform), atol=1e-2)


def test_an_ensemble_stays_in_evaluation_mode_and_without_gradients():
    ensemble = Ensemble([network(0)])
    before = {key: value.clone() for key, value in ensemble.state_dict().items()}
    ensemble.train()
    waveform = clips().waveform.requires_grad_()
    assert not ensemble(waveform)["logits"].requires_grad
    assert not any(part.training for part in ensemble.modules())
    assert all(torch.equal(value, before[key]) for key, value in ensemble.state_dict().items())


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"labels": ("buzz", "tone", "clicks")}, "labels"),
        ({"task": "multi_label"}, "task"),
        ({"length_policy": {"min": 20000}}, "length_policy"),
    ],
)
def test_members_that_do_not_go_together_are_named(change, field):
    model, card = network(1)
    other = card.from_dict({**card.to_dict(), **change, "labels_sha256": None})
    with pytest.raises(CardError, match="teacher-1") as caught:
        Ensemble([network(0), (model, other)])
    assert caught.value.field == field


def test_an_empty_ensemble_is_refused():
    with pytest.raises(CardError, match="at least one"):
        Ensemble([])


def test_a_live_teacher_answers_the_same_waveforms(teachers):
    batch = clips()
    answers = LiveTeacher(teachers, network(9)[1]).answers(batch)
    assert torch.allclose(answers.positive, by_hand(teachers, batch.waveform).softmax(dim=1), atol=1e-6)
    assert torch.equal(answers.said, torch.ones(6, 1))


def test_several_labels_are_answered_by_sigmoids(tmp_path):
    save_checkpoint(tmp_path / "t.safetensors", *network(0, task="multi_label"))
    batch = clips()
    answers = LiveTeacher([tmp_path / "t.safetensors"], network(9, task="multi_label")[1]).answers(batch)
    assert torch.allclose(answers.positive, by_hand([tmp_path / "t.safetensors"], batch.waveform).sigmoid(), atol=1e-6)


def test_teachers_that_cannot_teach_this_student_are_refused(tmp_path):
    _, card = network(9)
    save_checkpoint(tmp_path / "t.safetensors", *network(0, labels=("buzz", "knock", "tone")))
    with pytest.raises(CardError, match=r"at index 1 .*'knock', not 'clicks'"):
        LiveTeacher([tmp_path / "t.safetensors"], card)
    save_checkpoint(tmp_path / "u.safetensors", *network(0, task="multi_label"))
    with pytest.raises(CardError, match="task"):
        LiveTeacher([tmp_path / "u.safetensors"], card)
    model, long = network(0)
    save_checkpoint(tmp_path / "v.safetensors", model, long.replace(length_policy={"min": 64000}))
    with pytest.raises(CardError, match=r"length_policy\.min.*64000"):
        LiveTeacher([tmp_path / "v.safetensors"], card)
    save_checkpoint(tmp_path / "w.safetensors", model, long.replace(length_policy={"max": 64000}))
    with pytest.raises(CardError, match=r"length_policy\.max.*stored logits"):
        LiveTeacher([tmp_path / "w.safetensors"], card)


# The training step


class Fixed:
    """A teacher who says what he was told to say; clip i belongs to class 2 - i % 3, never the labels' class."""

    def __init__(self):
        self.origin = {"kind": "fixed", "teachers": []}

    def to(self, device):
        return self

    def answers(self, batch):
        return Answers(batch.targets.roll(1, dims=1), torch.ones(len(batch.targets), 1))


def gradient(recipe, teacher):
    classifier = student(recipe, teacher)
    classifier.training_step(clips(), 0).backward()
    return classifier.model.classifier[5].weight.grad.clone()


def test_the_teachers_term_changes_the_gradient_by_its_weight():
    labels = gradient(TINY, None)
    shares = {weight: DISTIL.replace(distillation=DistillationRecipe(weight=weight)) for weight in (0.25, 0.9, 1.0)}
    taught = {weight: gradient(recipe, Fixed()) for weight, recipe in shares.items()}
    assert not torch.allclose(labels, taught[1.0], atol=1e-3)
    for weight in (0.25, 0.9):
        assert torch.allclose(taught[weight], (1 - weight) * labels + weight * taught[1.0], atol=1e-6)


def test_answers_are_mixed_with_the_draws_of_the_labels(monkeypatch):
    """With a teacher who answers the labels themselves, what reaches both losses is the same mixture."""
    seen = {}

    class Echo(Fixed):
        def answers(self, batch):
            seen["waveform"] = batch.waveform.clone()
            return Answers(batch.targets, torch.ones(len(batch.targets), 1))

    def keep(name, original):
        def wrapped(logits, targets, *arguments, **options):
            seen[name] = targets
            return original(logits, targets, *arguments, **options)

        return wrapped

    monkeypatch.setattr(module, "clip_loss", keep("labels", module.clip_loss))
    monkeypatch.setattr(module, "distillation_loss", keep("answers", module.distillation_loss))
    settings = Augmentation(mix_probability=0.7, mixup_alpha=0.3)
    student(DISTIL.replace(augmentation=settings), Echo()).training_step(clips(), 0)
    assert torch.allclose(seen["labels"], seen["answers"].positive)
    assert seen["labels"].max(dim=1).values.min() < 0.99
    assert torch.allclose(seen["answers"].said, torch.ones(6, 1))
    assert torch.equal(seen["waveform"], clips().waveform)


def test_recipe_and_teacher_come_together():
    with pytest.raises(DataError, match="--teacher"):
        student(DISTIL, None)
    with pytest.raises(DataError, match="set distillation"):
        student(TINY, Fixed())


def test_a_teacher_is_no_part_of_the_student(teachers):
    classifier = student(DISTIL, LiveTeacher(teachers, network(9)[1]))
    assert len(classifier.state_dict()) == len(student(TINY).state_dict())


# Stored logits


def test_stored_logits_are_those_of_the_ensemble_clip_by_clip(teachers, sounds, tmp_path, capsys):
    paths = [str(path) for path in teachers]
    assert main(["teach", *paths, "--data", str(sounds), "-o", str(tmp_path / "l.npz"), "--quiet"]) == 0
    assert "30 clips, 3 labels" in capsys.readouterr().out
    stored = read_logits(tmp_path / "l.npz")
    dataset = read_dataset(sounds)
    assert stored.files == tuple(dataset.name_of(record) for record in dataset.records)
    assert stored.labels == CLASSES
    assert [one["name"] for one in stored.teachers] == ["teacher-0", "teacher-1"]
    scored = evaluate(teachers, sounds, progress=False)
    softmax = torch.from_numpy(stored.logits).softmax(dim=1).numpy()
    assert np.abs(softmax - scored.probabilities).max() < 1e-6
    with pytest.raises(OutputExistsError):
        teach(teachers, sounds, tmp_path / "l.npz", progress=False)


def test_stored_logits_are_looked_up_by_file(sounds):
    dataset = read_dataset(sounds).select("train")
    names = [dataset.name_of(record) for record in dataset.records]
    logits = np.random.default_rng(0).standard_normal((18, 3)).astype(np.float32)
    teacher = StoredTeacher(StoredLogits(tuple(reversed(names)), logits[::-1], CLASSES), dataset, "single_label")
    index = torch.tensor([4, 0, 17])
    answers = teacher.answers(Batch(torch.zeros(3, 1), torch.zeros(3, 3), index))
    assert torch.allclose(answers.positive, torch.from_numpy(logits)[index].softmax(dim=1))
    assert torch.equal(answers.said, torch.ones(3, 1))


def test_missing_logits_are_counted_and_handled_as_told(sounds):
    dataset = read_dataset(sounds).select("train")
    names = tuple(dataset.name_of(record) for record in dataset.records)
    stored = StoredLogits(names[5:], np.ones((13, 3), np.float32), CLASSES)
    with pytest.raises(DataError, match=f"5 of 18 training clips.*{names[0]}"):
        StoredTeacher(stored, dataset, "multi_label")
    teacher = StoredTeacher(stored, dataset, "multi_label", missing="labels")
    assert teacher.missing == 5
    assert teacher.origin["missing"] == 5
    answers = teacher.answers(Batch(torch.zeros(2, 1), torch.zeros(2, 3), torch.tensor([0, 5])))
    assert answers.said.tolist() == [[0.0], [1.0]]
    logits = torch.zeros(2, 3, requires_grad=True)
    distillation_loss(logits, answers, "multi_label").backward()
    assert torch.equal(logits.grad[0], torch.zeros(3))
    assert (logits.grad[1] != 0).all()
    with pytest.raises(DataError, match="18 of 18"):
        StoredTeacher(
            StoredLogits(("x",), np.ones((1, 3), np.float32), CLASSES), dataset, "multi_label", missing="labels"
        )


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (("buzz", "tone", "clicks"), r"at index 1 .*'tone', not 'clicks'"),
        (("buzz", "clicks"), r"at index 2 .*nothing, not 'tone'"),
    ],
)
def test_labels_of_stored_logits_must_be_the_datas(sounds, labels, said):
    dataset = read_dataset(sounds).select("train")
    with pytest.raises(CardError, match=said):
        StoredTeacher(StoredLogits(("x",), np.ones((1, len(labels)), np.float32), labels), dataset, "single_label")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"files": None}, "holds no files"),
        ({"logits": np.zeros((2, 2), np.float32)}, r"expected floats \(2, 3\)"),
        ({"logits": np.full((2, 3), np.nan, np.float32)}, "2 clips have logits that are not finite"),
        ({"files": np.array(["a", "a"])}, "listed twice"),
        ({"files": np.array("a"), "logits": np.zeros((1, 3), np.float32)}, "expected floats"),
    ],
)
def test_broken_stored_logits_are_refused(tmp_path, change, said):
    arrays = {"files": np.array(["a", "b"]), "logits": np.zeros((2, 3), np.float32), "labels": np.array(CLASSES)}
    arrays = {name: value for name, value in {**arrays, **change}.items() if value is not None}
    np.savez(tmp_path / "l.npz", **arrays)
    with pytest.raises(DataError, match=said):
        read_logits(tmp_path / "l.npz")


def test_logits_stored_by_others_need_not_say_whose_they_are_our_way(tmp_path):
    arrays = {"files": np.array(["a"]), "logits": np.zeros((1, 3), np.float32), "labels": np.array(CLASSES)}
    np.savez(tmp_path / "l.npz", **arrays, teachers=np.array(["passt"]))
    assert read_logits(tmp_path / "l.npz").teachers == ({"sha256": "passt", "name": ""},)


def test_a_file_that_holds_no_logits_is_refused(tmp_path):
    (tmp_path / "l.npz").write_bytes(b"no zip")
    np.save(tmp_path / "bare.npy", np.zeros((2, 3), np.float32))
    for name in ("l.npz", "absent.npz", "bare.npy"):
        with pytest.raises(DataError, match=r"cannot read teacher logits.*train_torch teach"):
            read_logits(tmp_path / name)


# Whole runs


def test_a_student_learns_what_the_teacher_says_and_not_the_labels(sounds, tmp_path):
    """The stored teacher answers the next class; a student with weight 1 ends up agreeing with it."""
    dataset = read_dataset(sounds)
    logits = 8 * np.roll(dataset.multi_hot(), 1, axis=1)
    StoredLogits(tuple(map(dataset.name_of, dataset.records)), logits, CLASSES).write(tmp_path / "l.npz")
    recipe = TINY.replace(distillation=DistillationRecipe(weight=1.0), epochs=20, batch_size=6, warmup_epochs=1)
    fit(sounds, tmp_path / "run", recipe, teacher_logits=tmp_path / "l.npz", progress=False)
    scored = evaluate(tmp_path / "run" / "last.safetensors", sounds, split="train", progress=False)
    taught = (scored.probabilities * np.roll(scored.targets, 1, axis=1)).sum(axis=1).mean()
    labelled = (scored.probabilities * scored.targets).sum(axis=1).mean()
    assert taught > 0.6 > 0.2 > labelled


def test_a_run_records_its_teachers_and_resumes_with_no_others(teachers, sounds, tmp_path, monkeypatch):
    recipe = DISTIL.replace(min_seconds=None, frontend="efficientat")
    step, steps = Classifier.training_step, []

    def killed(self, batch, index):
        steps.append(index)
        if len(steps) > 3:
            raise KeyboardInterrupt
        return step(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", killed)
        with pytest.raises(SystemExit):
            fit(sounds, tmp_path / "run", recipe, teachers=teachers, progress=False)
    for others in (teachers[:1], list(reversed(teachers))):
        with pytest.raises(DataError, match=r"cannot resume.*teacher-0"):
            fit(sounds, tmp_path / "run", recipe, teachers=others, progress=False, resume=True)
    fit(sounds, tmp_path / "run", recipe, teachers=teachers, progress=False, resume=True)
    with pytest.raises(DataError, match=r"finished run that learnt from other teachers.*teacher-0"):
        fit(sounds, tmp_path / "run", recipe, teachers=teachers[:1], progress=False, resume=True)
    fit(sounds, tmp_path / "run", recipe, teachers=teachers, progress=False, resume=True)
    fit(sounds, tmp_path / "whole", recipe, teachers=teachers, progress=False)
    cards = [load_checkpoint(tmp_path / name / "last.safetensors") for name in ("run", "whole")]
    hashes = [load_checkpoint(path).sha256 for path in teachers]
    assert [one["sha256"] for one in cards[0].card.provenance["distilled_from"]["teachers"]] == hashes
    resumed, whole = (card.model.state_dict() for card in cards)
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_live_and_stored_together_are_refused(teachers, sounds, tmp_path):
    with pytest.raises(DataError, match="give one of them"):
        fit(sounds, tmp_path / "run", DISTIL, teachers=teachers, teacher_logits="l.npz", progress=False)


def test_the_command_line_distils_and_evaluates_ensembles(teachers, sounds, tmp_path, capsys):
    paths = [str(path) for path in teachers]
    options = ["--data", str(sounds), "--quiet", "--threads", "1"]
    fitted = ["fit", *options, "--out", str(tmp_path / "run"), "--model", "mn01", "--epochs", "1", "--seconds", "0.5"]
    assert main([*fitted, "--batch-size", "8", "--teacher", *paths]) == 0
    card = load_checkpoint(tmp_path / "run" / "model.safetensors").card
    assert card.provenance["recipe"]["distillation"]["weight"] == 0.9
    assert len(card.provenance["distilled_from"]["teachers"]) == 2
    capsys.readouterr()
    assert main(["evaluate", *paths, *options, "--split", "test", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == evaluate(teachers, sounds, split="test", progress=False).to_dict()
    assert printed != evaluate(teachers[0], sounds, split="test", progress=False).to_dict()
