"""Training on Lightning: from a data folder and a recipe to a run folder with finished checkpoints.

A run folder holds, in the order they appear: ``recipe.json``, ``split.csv``, ``metrics.csv`` (a row per epoch),
``state.ckpt`` (everything a resumed run needs), ``model.safetensors`` (best epoch so far; where weights are averaged
over epochs, that is ``best.safetensors``, and the model comes at the end), and at the end ``last.safetensors``,
``report.json``, ``learning_curves.png`` and ``confusion_*.png``.

Chance is stateless: what happens in a step follows from (seed, step), what happens to a clip from (seed, epoch, clip).
A run that was killed and resumed therefore ends with the same weights as one that was not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from models_zoo.cards import LengthPolicy, ModelCard
from models_zoo.dataset import Dataset, Group, read_dataset
from models_zoo.errors import CheckpointError, DataError, DeviceError, MissingDependencyError
from models_zoo.files import replacing
from models_zoo.images import ImageSpec
from models_zoo.presets import get_frontend
from train_torch.audiovisual import Pretraining
from train_torch.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from train_torch.classifier import Classifier, selected_by
from train_torch.data import ClipData, ClipDataModule, count_table, split_dataset
from train_torch.distill import LiveTeacher, StoredTeacher, Teacher, named, read_logits
from train_torch.evaluation import Device, Evaluation, accelerator_of, score_clips
from train_torch.models import Model, create_model, new_card
from train_torch.models.cavmae_blocks import Towers
from train_torch.models.cavmae_initial import read_vision_mae, start_from_vision_mae
from train_torch.models.cavmae_pretrain import CAVMAE
from train_torch.models.ensemble import load_ensemble
from train_torch.optim import check_temperature, freeze
from train_torch.plots import plot_confusion, plot_learning_curves
from train_torch.recipes import Recipe
from train_torch.retrieval import Retrieval, embed_pairs
from train_torch.run_folder import (
    REPORT,
    STATE,
    AtomicCheckpointIO,
    Progress,
    RunFolder,
    check_run_folder,
    expected_warnings,
    name_of,
    prepare_run_folder,
    split_hash_of,
)
from train_torch.transfer import fine_tuned_towers, is_towers, is_transfer, take_towers, transferred
from train_torch.weight_mean import EpochMean

__all__ = ["fit"]

_log = logging.getLogger(__name__)

OWN_FILES = (
    "recipe.json", "split.csv", "metrics.csv", STATE, "model.safetensors", "best.safetensors", "last.safetensors",
    REPORT, "learning_curves.png", "confusion_validation.png", "confusion_test.png",
)  # fmt: skip
"""What a finished run leaves in its folder; ``best.safetensors`` only where weights are averaged over epochs."""


def fit(
    data: str | Path,
    out: str | Path,
    recipe: Recipe,
    *,
    name: str | None = None,
    split_by: Literal["file"] | Group | None = None,
    hold_out: tuple[str, ...] = (),
    validate_by: Literal["file"] | Group | None = None,
    init: str | Path | None = None,
    init_card: str | None = None,
    checkpoints: str | Path | None = None,
    teachers: Sequence[str | Path] = (),
    teacher_logits: str | Path | None = None,
    device: Device = "auto",
    devices: int = 1,
    workers: int = 0,
    cache_gib: float = 4.0,
    test: bool = True,
    tensorboard: bool = False,
    progress: bool = True,
    resume: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Train a model and return the report that is also written as ``report.json``.

    Args:
        data: folder or table, see :func:`models_zoo.dataset.read_dataset`.
        out: run folder; made, and refused if it holds a run, unless ``resume`` or ``force``.
        recipe: what to do.
        name: of the model; by default made from the run folder's.
        split_by, hold_out, validate_by: see :func:`train_torch.data.split_dataset`.
        init: checkpoint to start from, a file or the name of a published model; its architecture and front end then
            stand, the recipe's are not used, and neither is its rule for short clips unless it has ``min_seconds``.
            A CAV-MAE to be pre-trained may also begin with the weights of a vision MAE, or with a classifier's towers.
        init_card: name of its card where the file holds none.
        checkpoints: folder with published checkpoints, see :func:`train_torch.download.checkpoint_folder`.
        teachers: checkpoints to distil from, live: the mean of their logits on every batch; needs
            ``recipe.distillation``, as ``teacher_logits`` does.
        teacher_logits: in place of teachers, their stored answers, see :func:`train_torch.distill.teach`.
        device, devices: where to train, and how many of them.
        workers: see :class:`train_torch.data.ClipDataModule`.
        cache_gib: memory for decoded clips, and as much again for features that every epoch would compute anew.
        test: score the test split, if there is one, once at the end.
        tensorboard: also write TensorBoard logs, which imports TensorFlow where that is installed.
        progress: show bars.
        resume: go on after the last complete epoch of the run in ``out``.
        force: replace the run in ``out``.

    Raises:
        AudioClassifierError: bad data, options, checkpoint or device; nothing has been trained then.
        OutputWriteError: the disk is full; what was written before is complete.
    """
    started = time.monotonic()
    folder = Path(out)
    if recipe.fine_tuning and init is None:
        raise CheckpointError(
            "the recipe is for fine-tuning and would teach random weights little; give a checkpoint to start from "
            "(--init mn10_as, or a file), or train from scratch with another recipe"
        )
    chief = rank_zero_only.rank == 0
    if not chief:
        logging.getLogger("train_torch").setLevel(logging.WARNING)
    accelerator = accelerator_of(device)
    there = torch.cuda.device_count() if accelerator == "gpu" else os.cpu_count() or 1
    if not 1 <= devices <= there:
        raise DeviceError(
            f"got {devices} devices; this machine has {there} for {accelerator}; give --devices 1 to {there}"
        )
    logger = _tensorboard(folder) if tensorboard else False
    if chief:
        check_run_folder(folder, recipe, OWN_FILES, resume=resume, force=force)
        if resume and (folder / REPORT).exists():
            _check_same_teacher(folder, teachers, teacher_logits, checkpoints)
            _log.info("%s: this run is finished; nothing to resume", folder)
            return cast(dict[str, Any], json.loads((folder / REPORT).read_text(encoding="utf-8")))

    split_seed = recipe.seed if recipe.split_seed is None else recipe.split_seed
    dataset = split_dataset(
        read_dataset(data),
        split_by=split_by,
        hold_out=hold_out,
        validate_by=validate_by,
        val_fraction=recipe.val_fraction,
        seed=split_seed,
    )
    if recipe.imbalance is not None:
        dataset = dataset.thinned(recipe.imbalance, seed=split_seed)
    if recipe.task == "single_label" and dataset.is_multi_label:
        raise DataError(
            f"{data}: some clips have several labels or unknown ones; train with --task multi_label (or "
            "label_distribution, where the column 'weights' says how much of each)"
        )
    if recipe.task == "label_distribution":
        dataset.distributions()  # refuses what has none before anything is read
    _log.info("%s", count_table(dataset))
    for remark in dataset.remarks():
        _log.info("note: %s", remark)

    torch.manual_seed(recipe.seed)
    split_hash = split_hash_of(dataset)
    model, card = _start(recipe, dataset, name or name_of(folder), init, init_card, checkpoints)
    check_temperature(model, recipe)
    frozen = freeze(model, recipe.freeze)
    teacher = _teacher(recipe, dataset, card, teachers, teacher_logits, checkpoints)
    card = card.replace(
        license=recipe.license,
        training_data=recipe.training_data,
        provenance={
            **card.provenance,
            "recipe": recipe.to_dict(),
            "seed": recipe.seed,
            "split_sha256": split_hash,
            "split_by": split_by,
            "held_out": list(hold_out),
            "frozen": {"prefixes": list(recipe.freeze), "entries": len(frozen)},
            "clips": {
                split: sum(r.split == split for r in dataset.records) for split in ("train", "validation", "test")
            },
            "distilled_from": None if teacher is None else teacher.origin,
            "training_clips": dataset.select("train").class_counts(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "lightning": lightning.__version__,
                "numpy": np.__version__,
            },
        },
    )
    module = ClipDataModule(dataset, card, recipe, cache_gib=cache_gib, workers=workers, progress=progress and chief)
    validation = module.parts["validation"].dataset
    files = tuple(validation.name_of(record) for record in validation.records)
    learner: Classifier | Pretraining
    if recipe.pretraining is not None:
        learner = Pretraining(model, card, recipe, files, cache_gib=cache_gib)
    else:
        counts = dataset.select("train").class_counts()
        learner = Classifier(model, card, recipe, files, class_counts=counts, teacher=teacher, cache_gib=cache_gib)
    if chief:
        prepare_run_folder(folder, recipe, dataset, OWN_FILES, resume=resume)
    mean = None if recipe.average_epochs is None else EpochMean(learner.model, recipe.average_epochs)
    run = RunFolder(folder, card, {"model" if mean is None else "best": learner.model})
    callbacks: list[Callback] = [Progress()] if progress and chief else []
    if recipe.patience:
        callbacks.append(
            EarlyStopping("val_score", mode="max", patience=recipe.patience, check_on_train_epoch_end=True)
        )
    callbacks += [run] if mean is None else [mean, run]  # the state of the run holds the mean of its epoch
    with expected_warnings():
        trainer = lightning.Trainer(
            accelerator=accelerator,
            devices=devices,
            strategy=_strategy(learner.model, devices),
            precision=recipe.precision,
            max_epochs=recipe.epochs,
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO()],
            logger=logger,
            enable_checkpointing=True,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            sync_batchnorm=devices > 1 and accelerator == "gpu",
            default_root_dir=folder,
        )
        state = folder / STATE
        trainer.fit(learner, module, ckpt_path=state if resume and state.exists() else None, weights_only=True)
    if not trainer.is_global_zero:
        return {}
    last = run.card_of(learner.model)
    save_checkpoint(folder / "last.safetensors", learner.model, last, force=True)
    if mean is not None:
        mean.put_into(learner.model)
        averaged = {**last.provenance, "averaged_epochs": list(mean.epochs)}
        save_checkpoint(folder / "model.safetensors", learner.model, last.replace(provenance=averaged), force=True)
    return _finish(folder, run, dataset, recipe, test=test, device=learner.device, cache_gib=cache_gib, began=started)


def _strategy(model: nn.Module, devices: int) -> str:
    """Return Lightning's name for how ``devices`` train one model."""
    if devices == 1:
        return "auto"
    # Blocks hold norms of modalities they are never asked for; to wait for their gradients is to wait for ever.
    return "ddp_find_unused_parameters_true" if isinstance(model, Towers) else "ddp"


def _tensorboard(folder: Path) -> Any:
    try:
        from lightning.pytorch.loggers import TensorBoardLogger

        return TensorBoardLogger(folder, name="", version="tensorboard")
    except ModuleNotFoundError as error:
        raise MissingDependencyError("--tensorboard needs the tensorboard package: pip install tensorboard") from error


def _check_same_teacher(
    folder: Path, teachers: Sequence[str | Path], teacher_logits: str | Path | None, checkpoints: str | Path | None
) -> None:
    """Refuse to pass off a finished run as one that learnt from the teachers given now."""
    if not teachers and teacher_logits is None:
        return
    before = load_checkpoint(folder / "model.safetensors").card.provenance.get("distilled_from") or {}
    if teachers:
        same = before.get("teachers") == load_ensemble(teachers, checkpoints=checkpoints)[1]
    else:
        same = before.get("sha256") == read_logits(cast(str, teacher_logits)).sha256()
    if not same:
        raise DataError(
            f"{folder} holds a finished run that learnt from other teachers ({named(before)}); "
            "give the same, --force to replace it, or choose another folder"
        )


def _start(
    recipe: Recipe,
    dataset: Dataset,
    name: str,
    init: str | Path | None,
    init_card: str | None,
    checkpoints: str | Path | None,
) -> tuple[nn.Module, ModelCard]:
    """Return the model to train and its card: freshly initialised, or from a checkpoint."""
    if init is None:
        return _fresh(recipe, dataset, name)
    if recipe.task == "embedding":
        loaded = _pretraining_start(recipe, dataset, init, init_card, checkpoints)
    elif is_towers(recipe.model):
        loaded = fine_tuned_towers(
            recipe.model,
            init,
            dataset.labels,
            recipe.task,
            init_card,
            options=recipe.model_options,
            checkpoints=checkpoints,
        )
    elif is_transfer(recipe.model):
        loaded = transferred(recipe.model, init, dataset.labels, init_card, checkpoints=checkpoints)
    else:
        loaded = load_checkpoint(init, init_card, labels=dataset.labels, checkpoints=checkpoints)
    if loaded.card.frontend is None and loaded.card.image is None:
        raise CheckpointError(f"{init}: card {loaded.card.name!r} has no front end, so it cannot train on waveforms")
    replaced = ", ".join(loaded.replaced[:8]) or "nothing"
    if len(loaded.replaced) > 8:
        replaced += f" and {len(loaded.replaced) - 8} more"
    _log.info("starting from %s (%s); replaced: %s", loaded.card.name, Path(init).name, replaced)
    origin = {"name": loaded.card.name, "sha256": loaded.sha256, "replaced": list(loaded.replaced)}
    policy = loaded.card.length_policy
    if recipe.min_seconds is not None and loaded.card.frontend is not None:
        policy = policy.replace(min=round(recipe.min_seconds * loaded.card.sample_rate), short=recipe.short)
    card = loaded.card.replace(
        name=name,
        task=recipe.task,
        checkpoint=None,
        length_policy=policy,
        metrics={},
        thresholds=None,
        provenance={"initialised_from": origin},
    )
    return loaded.model, card


def _pretraining_start(
    recipe: Recipe, dataset: Dataset, init: str | Path, init_card: str | None, checkpoints: str | Path | None
) -> Checkpoint:
    """Return the network to pre-train: a pre-trained one, or the recipe's with what others have to give."""
    mae = None if init_card is not None else read_vision_mae(init)
    if mae is not None:
        model, card = _fresh(recipe, dataset, "vision-mae")
        with open(init, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return Checkpoint(model, card, start_from_vision_mae(model, mae), sha256)
    loaded = load_checkpoint(init, init_card, checkpoints=checkpoints)
    if isinstance(loaded.model, CAVMAE):
        return loaded
    model, card = _fresh(recipe, dataset, loaded.card.name)
    return Checkpoint(model, card, take_towers(model, loaded), loaded.sha256)


def _fresh(recipe: Recipe, dataset: Dataset, name: str) -> tuple[nn.Module, ModelCard]:
    """Return the recipe's model, freshly initialised, and its card."""
    spec = get_frontend(recipe.frontend)
    if recipe.n_mels is not None:
        spec = spec.replace(mel=spec.mel.replace(n_mels=recipe.n_mels))
    policy = LengthPolicy(
        min=None if recipe.min_seconds is None else round(recipe.min_seconds * spec.sample_rate), short=recipe.short
    )
    fixed: dict[str, Any] = {"n_mels": spec.mel.n_mels}
    if recipe.task != "embedding":
        fixed["num_classes"] = len(dataset.labels)
    model = create_model(recipe.model, **{**recipe.model_options, **fixed})
    sources = {part.source for part in cast(Model, model).inputs}
    hears = sources != {"image"}
    looks = isinstance(model, Towers) and "image" in sources
    card = new_card(
        name,
        recipe.model,
        model=model,
        frontend=None if not hears else model.fitted(spec) if isinstance(model, Towers) else spec,
        image=ImageSpec(size=cast(Towers, model).declared.image_size) if looks else None,
        task=recipe.task,
        labels=None if recipe.task == "embedding" else dataset.labels,
        **({"length_policy": policy} if hears else {}),
    )
    return model, card


def _teacher(
    recipe: Recipe,
    dataset: Dataset,
    card: ModelCard,
    teachers: Sequence[str | Path],
    teacher_logits: str | Path | None,
    checkpoints: str | Path | None,
) -> Teacher | None:
    """Return whom the recipe distils from, or None."""
    if teachers and teacher_logits is not None:
        raise DataError("got live teachers and stored logits; give one of them (--teacher or --teacher-logits)")
    if recipe.pretraining is not None and (teachers or teacher_logits is not None):
        raise DataError("a teacher was given, and pre-training learns from none; leave it out")
    if teachers:
        live = LiveTeacher(teachers, card, folder=checkpoints)
        _log.info("teachers: %s", ", ".join(one["name"] for one in live.origin["teachers"]))
        return live
    if teacher_logits is None:
        return None
    missing = "error" if recipe.distillation is None else recipe.distillation.missing
    train = dataset.select("train")
    stored = StoredTeacher(read_logits(teacher_logits), train, recipe.task, missing=missing)
    if stored.missing:
        _log.info("%d of %d training clips have no teacher logits: labels alone", stored.missing, len(train))
    return stored


def _finish(
    folder: Path,
    run: RunFolder,
    dataset: Dataset,
    recipe: Recipe,
    *,
    test: bool,
    device: torch.device,
    cache_gib: float,
    began: float,
) -> dict[str, Any]:
    """Score the best model, put what was measured on its card, and write the pictures and the report."""
    best = load_checkpoint(folder / "model.safetensors")
    splits = ["validation"] + (["test"] if test and any(record.split == "test" for record in dataset.records) else [])
    measured: dict[str, float] = {}
    averaged = best.card.provenance.get("averaged_epochs")
    report: dict[str, Any] = {
        "model": best.card.name,
        "best_epoch": None if averaged else run.best_epoch,  # the model is that of no single epoch
        "epochs": len(run.history),
        **({"averaged_epochs": averaged} if averaged else {}),
    }
    for split in splits:
        frames: Literal["middle", "all"] = "middle" if recipe.pretraining is not None else recipe.frames
        data = ClipData(dataset.select(split), best.card, recipe, cache_gib=cache_gib, frames=frames)
        evaluation: Evaluation | Retrieval
        if recipe.pretraining is not None:
            evaluation = embed_pairs(best.model, best.card, data, device=device)
        else:
            evaluation = score_clips(best.model, best.card, data, device=device)
            if evaluation.task == "single_label":
                counts = evaluation.confusion()
                plot_confusion(counts, evaluation.labels, folder / f"confusion_{split}.png", title=split)
        report[split] = evaluation.to_dict()
        measured |= {f"{split}_{metric}": value for metric, value in evaluation.metrics().items()}
    plot_learning_curves(run.history, folder / "learning_curves.png", headline=f"val_{selected_by(recipe)}")
    report["seconds"] = {
        "training": sum(row["seconds"] for row in run.history),
        "this_process": time.monotonic() - began,
    }
    save_checkpoint(folder / "model.safetensors", best.model, best.card.replace(metrics=measured), force=True)
    with replacing(folder / REPORT, force=True) as partial:
        partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report
