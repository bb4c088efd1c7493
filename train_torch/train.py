"""Training on Lightning: from a data folder and a recipe to a run folder with finished checkpoints.

A run folder holds, in the order they appear: ``recipe.json``, ``split.csv``, ``metrics.csv`` (a row per epoch),
``state.ckpt`` (everything a resumed run needs), ``model.safetensors`` (best epoch so far), and at the end
``last.safetensors``, ``report.json``, ``learning_curves.png`` and ``confusion_*.png``.

Chance is stateless: what happens in a step follows from (seed, step), what happens to a clip from (seed, epoch, clip).
A run that was killed and resumed therefore ends with the same weights as one that was not.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
import platform
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from torch import nn
from tqdm import tqdm

from models_zoo.cards import LengthPolicy, ModelCard
from models_zoo.dataset import Dataset, Group, read_dataset
from models_zoo.errors import CheckpointError, DataError, DeviceError, MissingDependencyError, OutputExistsError
from models_zoo.files import check_writable, replacing
from models_zoo.presets import get_frontend
from train_torch.checkpoint import load_checkpoint, save_checkpoint
from train_torch.classifier import Classifier, selected_by
from train_torch.data import ClipData, ClipDataModule, count_table, split_dataset
from train_torch.distill import LiveTeacher, StoredTeacher, Teacher, named, read_logits
from train_torch.evaluation import Device, accelerator_of, score_clips
from train_torch.models import create_model, new_card
from train_torch.models.ensemble import load_ensemble
from train_torch.optim import check_temperature, freeze
from train_torch.plots import plot_confusion, plot_learning_curves
from train_torch.recipes import Recipe

__all__ = ["fit", "name_of"]

_log = logging.getLogger(__name__)

_STATE = "state.ckpt"
_REPORT = "report.json"
_OWN_FILES = (
    "recipe.json", "split.csv", "metrics.csv", _STATE, "model.safetensors", "last.safetensors", _REPORT,
    "learning_curves.png", "confusion_validation.png", "confusion_test.png",
)  # fmt: skip


class _AtomicCheckpointIO(TorchCheckpointIO):
    """Writes Lightning's checkpoints completely or not at all."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        # Through memory: torch's own writer reports a full disk as something other than an OSError.
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        with replacing(path, force=True) as partial:
            partial.write_bytes(buffer.getbuffer())


class _RunFolder(Checkpoint):
    """Keeps the run folder up to date after every epoch: metrics, best model, and the state to resume from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.history: list[dict[str, float]] = []
        self.best_score = -np.inf
        self.best_epoch = -1
        self._started = time.monotonic()
        self._lr = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "best_score": self.best_score, "best_epoch": self.best_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history, self.best_score = state_dict["history"], state_dict["best_score"]
        self.best_epoch = state_dict["best_epoch"]

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._started = time.monotonic()

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        classifier = cast(Classifier, pl_module)
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        row = {"epoch": trainer.current_epoch, "lr": self._lr, **values}
        self.history.append({**row, "seconds": time.monotonic() - self._started})
        if values["val_score"] > self.best_score:
            self.best_score, self.best_epoch = values["val_score"], trainer.current_epoch
            if trainer.is_global_zero:
                save_checkpoint(self.folder / "model.safetensors", classifier.model, self.card(classifier), force=True)
        if trainer.is_global_zero:
            self._write_history()
        trainer.save_checkpoint(self.folder / _STATE)

    def card(self, classifier: Classifier) -> ModelCard:
        """Return the card with what the latest epoch measured."""
        latest = self.history[-1]
        measured = {
            name.replace("val_", "validation_"): value
            for name, value in latest.items()
            if name.startswith("val_") and name != "val_score"
        }
        card = classifier.card.replace(options=classifier.model.options)
        return card.replace(metrics=measured, provenance={**card.provenance, "epoch": int(latest["epoch"])})

    def _write_history(self) -> None:
        with replacing(self.folder / "metrics.csv", force=True) as partial, open(partial, "w", newline="") as stream:
            writer = csv.DictWriter(stream, list(self.history[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.history)


class _Progress(Callback):
    """One bar for the whole run, on stderr."""

    def __init__(self) -> None:
        self._bar: Any = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        total = int(trainer.estimated_stepping_batches)
        self._bar = tqdm(total=total, initial=trainer.global_step, unit="step", mininterval=1.0)

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        self._bar.update(1)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        shown = {name: float(value) for name, value in trainer.callback_metrics.items() if name != "val_score"}
        self._bar.set_postfix({"epoch": trainer.current_epoch + 1, **{k: f"{v:.3f}" for k, v in shown.items()}})

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        if self._bar is not None:
            self._bar.close()


@contextmanager
def _expected_warnings() -> Iterator[None]:
    """Silence what Lightning says about choices made here on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
        # Frozen norms are, and stay, in evaluation mode.
        warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")
        # The epoch is counted by batches of a sampler of our own, shorter than the default logging interval.
        warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
        # The schedule is stepped once per optimiser step; under 16-mixed the scaler may skip the very first.
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step.*")
        # Lightning 2.6 asks torch 2.11 about batches in a way that torch has renamed.
        warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
        yield


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
        _check_run_folder(folder, recipe, resume=resume, force=force)
        if resume and (folder / _REPORT).exists():
            _check_same_teacher(folder, teachers, teacher_logits, checkpoints)
            _log.info("%s: this run is finished; nothing to resume", folder)
            return cast(dict[str, Any], json.loads((folder / _REPORT).read_text(encoding="utf-8")))

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
    split_hash = _split_hash(dataset)
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
    classifier = Classifier(
        model,
        card,
        recipe,
        tuple(validation.name_of(record) for record in validation.records),
        class_counts=dataset.select("train").class_counts(),
        teacher=teacher,
        cache_gib=cache_gib,
    )
    if chief:
        _prepare_run_folder(folder, recipe, dataset, split_hash, resume=resume)
    run = _RunFolder(folder)
    callbacks: list[Callback] = [_Progress()] if progress and chief else []
    if recipe.patience:
        callbacks.append(
            EarlyStopping("val_score", mode="max", patience=recipe.patience, check_on_train_epoch_end=True)
        )
    callbacks.append(run)
    with _expected_warnings():
        trainer = lightning.Trainer(
            accelerator=accelerator,
            devices=devices,
            strategy="ddp" if devices > 1 else "auto",
            precision=recipe.precision,
            max_epochs=recipe.epochs,
            callbacks=callbacks,
            plugins=[_AtomicCheckpointIO()],
            logger=logger,
            enable_checkpointing=True,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            sync_batchnorm=devices > 1 and accelerator == "gpu",
            default_root_dir=folder,
        )
        state = folder / _STATE
        trainer.fit(classifier, module, ckpt_path=state if resume and state.exists() else None, weights_only=True)
    if not trainer.is_global_zero:
        return {}
    save_checkpoint(folder / "last.safetensors", classifier.model, run.card(classifier), force=True)
    return _finish(
        folder, run, dataset, recipe, test=test, device=classifier.device, cache_gib=cache_gib, began=started
    )


def _tensorboard(folder: Path) -> Any:
    try:
        from lightning.pytorch.loggers import TensorBoardLogger

        return TensorBoardLogger(folder, name="", version="tensorboard")
    except ModuleNotFoundError as error:
        raise MissingDependencyError("--tensorboard needs the tensorboard package: pip install tensorboard") from error


def name_of(folder: Path) -> str:
    """Return a legal model name made from the run folder's."""
    return re.sub(r"[^a-z0-9._-]+", "-", folder.resolve().name.lower()).strip("._-") or "model"


def _check_run_folder(folder: Path, recipe: Recipe, *, resume: bool, force: bool) -> None:
    check_writable(folder / "recipe.json", force=True)
    present = [name for name in _OWN_FILES if (folder / name).exists()]
    if present and not resume and not force:
        raise OutputExistsError(
            f"{folder} holds a run already ({', '.join(present[:3])}, ...); pass --resume to go on with it, --force to "
            "replace it, or choose another folder"
        )
    if resume and (folder / "recipe.json").exists():
        before = Recipe.from_json((folder / "recipe.json").read_text(encoding="utf-8"))
        changed = [field for field in Recipe.model_fields if getattr(before, field) != getattr(recipe, field)]
        if changed:
            raise DataError(
                f"cannot resume {folder}: it was begun with another recipe; different: {', '.join(changed)}; give the "
                "same options, or --force to start afresh"
            )


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


def _prepare_run_folder(folder: Path, recipe: Recipe, dataset: Dataset, split_hash: str, *, resume: bool) -> None:
    """Begin the run in ``folder``: an earlier one is removed only now that nothing stands in the way."""
    if resume and (folder / "split.csv").exists():
        before = hashlib.sha256((folder / "split.csv").read_bytes()).hexdigest()
        if before != split_hash:
            raise DataError(
                f"cannot resume {folder}: the data or its split changed since it was begun; give the same data and "
                "split options, or --force to start afresh"
            )
    if not resume:
        for name in _OWN_FILES:
            (folder / name).unlink(missing_ok=True)
    with replacing(folder / "recipe.json", force=True) as partial:
        partial.write_text(recipe.to_json(indent=2) + "\n", encoding="utf-8")
    dataset.write_split(folder / "split.csv", force=True)


def _split_hash(dataset: Dataset) -> str:
    """Return the sha256 that ``split.csv`` will have."""
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("file", "label", "split"))
    writer.writerows((dataset.name_of(record), ";".join(record.labels), record.split) for record in dataset.records)
    return hashlib.sha256(stream.getvalue().encode("utf-8")).hexdigest()


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
        spec = get_frontend(recipe.frontend)
        policy = LengthPolicy(
            min=None if recipe.min_seconds is None else round(recipe.min_seconds * spec.sample_rate),
            short=recipe.short,
        )
        fixed = {"num_classes": len(dataset.labels), "n_mels": spec.mel.n_mels}
        model = create_model(recipe.model, **{**recipe.model_options, **fixed})
        card = new_card(
            name,
            recipe.model,
            model=model,
            frontend=spec,
            task=recipe.task,
            labels=dataset.labels,
            length_policy=policy,
        )
        return model, card
    loaded = load_checkpoint(init, init_card, labels=dataset.labels, checkpoints=checkpoints)
    if loaded.card.frontend is None:
        raise CheckpointError(f"{init}: card {loaded.card.name!r} has no front end, so it cannot train on waveforms")
    replaced = ", ".join(loaded.replaced) or "nothing"
    _log.info("starting from %s (%s); replaced: %s", loaded.card.name, Path(init).name, replaced)
    origin = {"name": loaded.card.name, "sha256": loaded.sha256, "replaced": list(loaded.replaced)}
    policy = loaded.card.length_policy
    if recipe.min_seconds is not None:
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
    run: _RunFolder,
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
    report: dict[str, Any] = {"model": best.card.name, "best_epoch": run.best_epoch, "epochs": len(run.history)}
    for split in splits:
        evaluation = score_clips(
            best.model,
            best.card,
            ClipData(dataset.select(split), best.card, recipe, cache_gib=cache_gib),
            device=device,
        )
        report[split] = evaluation.to_dict()
        measured |= {f"{split}_{metric}": value for metric, value in evaluation.metrics().items()}
        if evaluation.task == "single_label":
            plot_confusion(evaluation.confusion(), evaluation.labels, folder / f"confusion_{split}.png", title=split)
    plot_learning_curves(run.history, folder / "learning_curves.png", headline=f"val_{selected_by(recipe)}")
    report["seconds"] = {
        "training": sum(row["seconds"] for row in run.history),
        "this_process": time.monotonic() - began,
    }
    save_checkpoint(folder / "model.safetensors", best.model, best.card.replace(metrics=measured), force=True)
    with replacing(folder / _REPORT, force=True) as partial:
        partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report
