"""Training and evaluation on Lightning: from a data folder and a recipe to a run folder with finished checkpoints.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from models_zoo import metrics
from models_zoo.cards import LengthPolicy, ModelCard
from models_zoo.dataset import Dataset, Group, read_dataset
from models_zoo.decoding import probabilities_of
from models_zoo.errors import CheckpointError, DataError, DeviceError, MissingDependencyError, OutputExistsError
from models_zoo.files import check_writable, replacing
from models_zoo.presets import get_frontend
from train_torch.augment import draw_mixing
from train_torch.checkpoint import load_checkpoint, save_checkpoint
from train_torch.data import Batch, ClipData, ClipDataModule, count_table, evaluation_loader, split_dataset
from train_torch.frontend import MelJitter, SpecMasks, TorchFrontend
from train_torch.losses import clip_loss
from train_torch.models import create_model, new_card
from train_torch.plots import plot_confusion, plot_learning_curves
from train_torch.recipes import Recipe

__all__ = ["Classifier", "Evaluation", "evaluate", "fit", "score_clips"]

_log = logging.getLogger(__name__)

_STATE = "state.ckpt"
_REPORT = "report.json"
_OWN_FILES = (
    "recipe.json", "split.csv", "metrics.csv", _STATE, "model.safetensors", "last.safetensors", _REPORT,
    "learning_curves.png", "confusion_validation.png", "confusion_test.png",
)  # fmt: skip

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Scores of every clip of a split, and what follows from them.

    Attributes:
        task: ``single_label`` or ``multi_label``.
        labels: class names.
        files: the clips, relative to their data folder.
        targets: ``(num_clips, num_classes)`` float32, 0 or 1.
        probabilities: ``(num_clips, num_classes)`` float32 in [0, 1].
        loss: mean over the clips.
    """

    task: str
    labels: tuple[str, ...]
    files: tuple[str, ...]
    targets: NDArray[np.float32]
    probabilities: NDArray[np.float32]
    loss: float

    def metrics(self) -> dict[str, float]:
        """Return name -> value: accuracy and balanced accuracy, or mAP and mean ROC AUC; and the loss."""
        if self.task == "single_label":
            truth, answer = self.targets.argmax(axis=1), self.probabilities.argmax(axis=1)
            values = {
                "accuracy": metrics.accuracy(truth, answer),
                "balanced_accuracy": metrics.balanced_accuracy(truth, answer),
            }
        else:
            values = {
                "mean_average_precision": metrics.mean_average_precision(self.targets, self.probabilities),
                "mean_roc_auc": metrics.mean_roc_auc(self.targets, self.probabilities),
            }
        return {name: float(value) for name, value in {**values, "loss": self.loss}.items()}

    @property
    def headline(self) -> str:
        """Name of the metric that counts."""
        return "accuracy" if self.task == "single_label" else "mean_average_precision"

    def per_class(self) -> list[dict[str, Any]]:
        """Return a row per class: clips, and recall and precision or average precision (None where undefined)."""
        truth = self.targets > 0.5
        rows: list[dict[str, Any]] = [
            {"label": label, "clips": int(truth[:, i].sum())} for i, label in enumerate(self.labels)
        ]
        if self.task == "single_label":
            answers = np.eye(len(self.labels), dtype=bool)[self.probabilities.argmax(axis=1)]
            for i, row in enumerate(rows):
                right = int((truth[:, i] & answers[:, i]).sum())
                row["recall"] = right / row["clips"] if row["clips"] else None
                row["precision"] = right / int(answers[:, i].sum()) if answers[:, i].any() else None
        else:
            for row, value in zip(rows, metrics.average_precision(self.targets, self.probabilities), strict=True):
                row["average_precision"] = None if np.isnan(value) else float(value)
        return rows

    def confusion(self) -> NDArray[np.int64]:
        """Return ``(num_classes, num_classes)`` counts, truth by answer."""
        truth, answer = self.targets.argmax(axis=1), self.probabilities.argmax(axis=1)
        return metrics.confusion_matrix(truth, answer, len(self.labels))

    def mistakes(self) -> list[dict[str, Any]]:
        """Return file, truth, answer and its probability of every clip answered wrongly (single label)."""
        truth, answer = self.targets.argmax(axis=1), self.probabilities.argmax(axis=1)
        return [
            {
                "file": self.files[i],
                "label": self.labels[truth[i]],
                "answer": self.labels[answer[i]],
                "probability": float(self.probabilities[i, answer[i]]),
            }
            for i in np.flatnonzero(truth != answer)
        ]

    def table(self) -> str:
        """Return the metrics and the per-class rows as text."""
        lines = [f"{len(self.files)} clips"] + [f"{name:<24}{value:10.4f}" for name, value in self.metrics().items()]
        rows = self.per_class()
        columns = [name for name in rows[0] if name != "label"]
        width = max(len(row["label"]) for row in rows) + 2
        lines += ["", f"{'class':<{width}}" + "".join(f"{name:>20}" for name in columns)]
        for row in rows:
            cells = ["-" if row[name] is None else f"{row[name]:.3f}" for name in columns[1:]]
            lines.append(f"{row['label']:<{width}}{row['clips']:>20}" + "".join(f"{cell:>20}" for cell in cells))
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        data: dict[str, Any] = {"clips": len(self.files), "metrics": self.metrics(), "classes": self.per_class()}
        if self.task == "single_label":
            data["mistakes"] = self.mistakes()
        return data


class Classifier(lightning.LightningModule):
    """A model behind its front end, trained on batches of waveforms.

    Args:
        model: takes the front end's features by name, returns a dict; channels last in memory, which is faster.
        card: of the model.
        recipe: how to train it.
        files: of the validation clips, in order.
    """

    def __init__(self, model: nn.Module, card: ModelCard, recipe: Recipe, files: tuple[str, ...] = ()) -> None:
        super().__init__()
        assert card.frontend is not None
        settings = recipe.augmentation
        self.card = card
        self.recipe = recipe
        self.files = files
        self.model = model.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self.frontend = TorchFrontend(
            card.frontend,
            mel_jitter=None if settings.mel_jitter is None else MelJitter(*settings.mel_jitter),
            masks=None if settings.masks is None else SpecMasks(*settings.masks),
            mix_at=settings.mixup_at,
        )
        if recipe.bn_momentum is not None:
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.momentum = recipe.bn_momentum
        self._scored: list[tuple[Batch, Tensor]] = []

    def logits(self, waveform: Tensor, mixing: Any = None) -> Tensor:
        """Return ``(batch, num_classes)`` for ``(batch, num_samples)`` waveforms."""
        features = self.frontend(waveform, mixing)
        output = self.card.clip_output()
        assert output is not None
        return cast(Tensor, self.model(**{self.card.inputs[0].name: features})[output.name])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch; every draw follows from (seed, step, process)."""
        rng = np.random.default_rng((self.recipe.seed, self.global_step, self.global_rank))
        torch.manual_seed(int(rng.integers(2**62)))
        settings, smoothing = self.recipe.augmentation, self.recipe.label_smoothing
        waveform, targets = batch.waveform, batch.targets
        size = len(waveform)
        if settings.mix_probability:
            mix = draw_mixing(size, rng, alpha=2.0, probability=settings.mix_probability, device=self.device)
            waveform, targets = mix(waveform), mix(targets)
        mixup = None
        if settings.mixup_alpha:
            mixup = draw_mixing(size, rng, alpha=settings.mixup_alpha, probability=1.0, device=self.device)
            targets = mixup(targets)
        loss = clip_loss(self.logits(waveform, mixup), targets, self.recipe.task, label_smoothing=smoothing)
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, batch_size=size, sync_dist=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep the logits of a batch."""
        self._scored.append((batch, self.logits(batch.waveform)))

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of all validation clips; every process has scored all of them."""
        evaluation = _collect(self._scored, self.card, self.files)
        self._scored = []
        values = evaluation.metrics()
        for name, value in values.items():
            self.log(f"val_{name}", value, sync_dist=True)
        # A lower loss decides between equal metrics, which are common on small splits.
        score = values[evaluation.headline] - 1e-3 * values["loss"] / (1 + values["loss"])
        self.log("val_score", score, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Return the recipe's optimiser and its schedule: linear warm-up, then a cosine."""
        recipe = self.recipe
        kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
        optimizer = kind(self.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
        total = max(int(self.trainer.estimated_stepping_batches), 1)
        warmup = recipe.warmup_epochs * total / recipe.epochs

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            progress = (step - warmup) / max(total - warmup, 1)
            return float(recipe.final_lr + (1 - recipe.final_lr) * 0.5 * (1 + np.cos(np.pi * min(progress, 1.0))))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _collect(scored: Sequence[tuple[Batch, Tensor]], card: ModelCard, files: tuple[str, ...]) -> Evaluation:
    """Return the evaluation of all clips from the logits of all batches; segments of a clip are averaged."""
    index = torch.cat([batch.index for batch, _ in scored]).numpy()
    targets = torch.cat([batch.targets for batch, _ in scored]).cpu()
    logits = torch.cat([logits for _, logits in scored]).float().cpu()
    if not torch.isfinite(logits).all():
        raise CheckpointError(
            f"model {card.name!r} answers with NaN or infinity: the training diverged; lower the learning rate (--lr), "
            "or go back to an earlier checkpoint"
        )
    task = cast(Literal["single_label", "multi_label"], card.task)
    loss = float(clip_loss(logits, targets, task))
    output = card.clip_output()
    assert output is not None
    assert card.labels is not None
    probabilities = probabilities_of(logits.numpy(), task=task, kind=output.kind)
    clips, place, segments = np.unique(index, return_inverse=True, return_counts=True)
    total = np.zeros((len(clips), probabilities.shape[1]), np.float32)
    np.add.at(total, place, probabilities)
    truth = np.zeros_like(total)
    truth[place] = targets.numpy()
    return Evaluation(
        task=task,
        labels=card.labels,
        files=tuple(files[clip] for clip in clips),
        targets=truth,
        probabilities=total / segments[:, None].astype(np.float32),
        loss=loss,
    )


def score_clips(model: nn.Module, card: ModelCard, data: ClipData, *, device: torch.device | str = "cpu") -> Evaluation:
    """Return the evaluation of every clip of ``data`` at its own length, front end and model in evaluation mode."""
    files = tuple(data.dataset.name_of(record) for record in data.dataset.records)
    classifier = Classifier(model, card, data.recipe, files).eval().to(device)
    with torch.inference_mode():
        scored = [(batch, classifier.logits(batch.waveform.to(device))) for batch in evaluation_loader(data)]
    return _collect(scored, card, files)


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

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "best_score": self.best_score, "best_epoch": self.best_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history, self.best_score = state_dict["history"], state_dict["best_score"]
        self.best_epoch = state_dict["best_epoch"]

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._started = time.monotonic()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        classifier = cast(Classifier, pl_module)
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        row = {"epoch": trainer.current_epoch, "lr": trainer.optimizers[0].param_groups[0]["lr"], **values}
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
        card = classifier.card
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
        # The epoch is counted by batches of a sampler of our own, shorter than the default logging interval.
        warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
        # The schedule is stepped once per optimiser step; under 16-mixed the scaler may skip the very first.
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step.*")
        # Lightning 2.6 asks torch 2.11 about batches in a way that torch has renamed.
        warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
        yield


def _accelerator_of(device: Device) -> str:
    """Return Lightning's name for ``device``.

    Raises:
        DeviceError: CUDA was asked for and is not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("device 'cuda' was asked for, but torch finds no CUDA device; use --device cpu or auto")
    if device == "auto":
        return "gpu" if torch.cuda.is_available() else "cpu"
    return "gpu" if device == "cuda" else "cpu"


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
        init: checkpoint to start from; its architecture and front end then stand, the recipe's are not used.
        init_card: name of its card where the file holds none.
        device, devices: where to train, and how many of them.
        workers, cache_gib: see :class:`train_torch.data.ClipDataModule`.
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
    chief = rank_zero_only.rank == 0
    if not chief:
        logging.getLogger("train_torch").setLevel(logging.WARNING)
    accelerator = _accelerator_of(device)
    there = torch.cuda.device_count() if accelerator == "gpu" else os.cpu_count() or 1
    if not 1 <= devices <= there:
        raise DeviceError(
            f"got {devices} devices; this machine has {there} for {accelerator}; give --devices 1 to {there}"
        )
    logger = _tensorboard(folder) if tensorboard else False
    if chief:
        _check_run_folder(folder, recipe, resume=resume, force=force)
        if resume and (folder / _REPORT).exists():
            _log.info("%s: this run is finished; nothing to resume", folder)
            return cast(dict[str, Any], json.loads((folder / _REPORT).read_text(encoding="utf-8")))

    dataset = split_dataset(
        read_dataset(data),
        split_by=split_by,
        hold_out=hold_out,
        validate_by=validate_by,
        val_fraction=recipe.val_fraction,
        seed=recipe.seed,
    )
    if recipe.task == "single_label" and dataset.is_multi_label:
        raise DataError(f"{data}: some clips have several labels; train with --task multi_label")
    _log.info("%s", count_table(dataset))
    for remark in dataset.remarks():
        _log.info("note: %s", remark)

    torch.manual_seed(recipe.seed)
    split_hash = _split_hash(dataset)
    model, card = _start(recipe, dataset, name or _name_of(folder), init, init_card)
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
            "clips": {
                split: sum(r.split == split for r in dataset.records) for split in ("train", "validation", "test")
            },
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "lightning": lightning.__version__,
                "numpy": np.__version__,
            },
        },
    )
    module = ClipDataModule(dataset, card, recipe, cache_gib=cache_gib, workers=workers, progress=progress and chief)
    if chief:
        _prepare_run_folder(folder, recipe, dataset, split_hash, resume=resume)

    validation = module.parts["validation"].dataset
    classifier = Classifier(model, card, recipe, tuple(validation.name_of(record) for record in validation.records))
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


def _name_of(folder: Path) -> str:
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
    elif not resume:
        for name in present:
            (folder / name).unlink()


def _prepare_run_folder(folder: Path, recipe: Recipe, dataset: Dataset, split_hash: str, *, resume: bool) -> None:
    if resume and (folder / "split.csv").exists():
        before = hashlib.sha256((folder / "split.csv").read_bytes()).hexdigest()
        if before != split_hash:
            raise DataError(
                f"cannot resume {folder}: the data or its split changed since it was begun; give the same data and "
                "split options, or --force to start afresh"
            )
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
    recipe: Recipe, dataset: Dataset, name: str, init: str | Path | None, init_card: str | None
) -> tuple[nn.Module, ModelCard]:
    """Return the model to train and its card: freshly initialised, or from a checkpoint."""
    if init is None:
        spec = get_frontend(recipe.frontend)
        policy = LengthPolicy(
            min=None if recipe.min_seconds is None else round(recipe.min_seconds * spec.sample_rate),
            short=recipe.short,
        )
        model = create_model(recipe.model, num_classes=len(dataset.labels), n_mels=spec.mel.n_mels)
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
    loaded = load_checkpoint(init, init_card, labels=dataset.labels)
    if loaded.card.frontend is None:
        raise CheckpointError(f"{init}: card {loaded.card.name!r} has no front end, so it cannot train on waveforms")
    replaced = ", ".join(loaded.replaced) or "nothing"
    _log.info("starting from %s (%s); replaced: %s", loaded.card.name, Path(init).name, replaced)
    origin = {"name": loaded.card.name, "sha256": loaded.sha256, "replaced": list(loaded.replaced)}
    card = loaded.card.replace(
        name=name,
        task=recipe.task,
        checkpoint=None,
        metrics={},
        thresholds=None,
        provenance={"initialised_from": origin},
    )
    return loaded.model, card


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
    plot_learning_curves(run.history, folder / "learning_curves.png", headline=f"val_{evaluation.headline}")
    report["seconds"] = {
        "training": sum(row["seconds"] for row in run.history),
        "this_process": time.monotonic() - began,
    }
    save_checkpoint(folder / "model.safetensors", best.model, best.card.replace(metrics=measured), force=True)
    with replacing(folder / _REPORT, force=True) as partial:
        partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def evaluate(
    checkpoint: str | Path,
    data: str | Path,
    *,
    card: str | None = None,
    split: str | None = None,
    split_by: Group | None = None,
    hold_out: tuple[str, ...] = (),
    device: Device = "auto",
    progress: bool = True,
) -> Evaluation:
    """Return the evaluation of a checkpoint on labelled recordings, each clip at its own length.

    Args:
        checkpoint: ``.safetensors``, or a published file with ``card``.
        data: folder or table.
        card: name of the card where the file holds none.
        split: one of the declared splits; None takes every clip.
        split_by, hold_out: score the clips of these speakers or folds, whatever their split.
        device: where to score.
        progress: show bars.

    Raises:
        AudioClassifierError: bad data, checkpoint or device.
    """
    target = "cuda" if _accelerator_of(device) == "gpu" else "cpu"
    loaded = load_checkpoint(checkpoint, card)
    if loaded.card.labels is None or loaded.card.task not in ("single_label", "multi_label"):
        raise CheckpointError(f"{checkpoint}: task {loaded.card.task!r} without clip labels cannot be evaluated")
    dataset = read_dataset(data).by_file()
    if hold_out and split_by is None:
        raise DataError(f"holding out {', '.join(hold_out)} needs to know of what: split by 'speaker' or 'fold'")
    if hold_out and split_by is not None:
        dataset = dataset.split_by_group(split_by, held_out=hold_out).select("test")
    dataset = dataset.select(split).with_labels(loaded.card.labels)
    if loaded.card.task == "single_label" and dataset.is_multi_label:
        raise DataError(f"{data}: some clips have several labels; model {loaded.card.name!r} answers with one")
    recipe = Recipe(task=cast(Literal["single_label", "multi_label"], loaded.card.task))
    return score_clips(
        loaded.model, loaded.card, ClipData(dataset, loaded.card, recipe, progress=progress), device=target
    )
