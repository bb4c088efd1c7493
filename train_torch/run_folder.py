"""The folder of a training run: what a run writes there after every epoch, and what it refuses to write over."""

from __future__ import annotations

import csv
import hashlib
import io
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn
from tqdm import tqdm

from models_zoo.cards import ModelCard
from models_zoo.dataset import Dataset
from models_zoo.errors import DataError, OutputExistsError
from models_zoo.files import check_writable, replacing
from models_zoo.schema import Declaration
from train_torch.checkpoint import save_checkpoint
from train_torch.models import Model

__all__ = [
    "REPORT",
    "STATE",
    "AtomicCheckpointIO",
    "Progress",
    "RunFolder",
    "check_run_folder",
    "expected_warnings",
    "name_of",
    "prepare_run_folder",
    "split_hash_of",
]

STATE = "state.ckpt"
"""Everything a resumed run needs."""

REPORT = "report.json"
"""What a finished run measured."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes Lightning's checkpoints completely or not at all."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write ``checkpoint`` under its name once it is whole."""
        # Through memory: torch's own writer reports a full disk as something other than an OSError.
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        with replacing(path, force=True) as partial:
            partial.write_bytes(buffer.getbuffer())


class RunFolder(Checkpoint):
    """Keeps the run folder up to date after every epoch: metrics, best networks, and the state to resume from.

    Args:
        folder: of the run.
        card: of the networks, to which is added what was measured.
        networks: file stem -> network; each is saved when ``val_score`` is better than ever before.
    """

    def __init__(self, folder: Path, card: ModelCard, networks: Mapping[str, nn.Module]) -> None:
        self.folder = folder
        self.networks = networks
        self._card = card
        self.history: list[dict[str, float]] = []
        self.best_score = -np.inf
        self.best_epoch = -1
        self._started = time.monotonic()
        self._lr = 0.0
        self._validated = False

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run goes on from."""
        return {"history": self.history, "best_score": self.best_score, "best_epoch": self.best_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self.history, self.best_score = state_dict["history"], state_dict["best_score"]
        self.best_epoch = state_dict["best_epoch"]

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Take the time."""
        self._started = time.monotonic()
        self._validated = False

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Note that the epoch was validated."""
        self._validated = True

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Note the learning rate of the step."""
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the metrics, the networks where they are the best so far, and the state."""
        metrics = trainer.callback_metrics.items()
        values = {name: float(value) for name, value in metrics if self._validated or not name.startswith("val_")}
        row = {"epoch": trainer.current_epoch, "lr": self._lr, **values}
        self.history.append({**row, "seconds": time.monotonic() - self._started})
        if values.get("val_score", -np.inf) > self.best_score:
            self.best_score, self.best_epoch = values["val_score"], trainer.current_epoch
            for stem, network in self.networks.items() if trainer.is_global_zero else ():
                save_checkpoint(self.folder / f"{stem}.safetensors", network, self.card_of(network), force=True)
        if trainer.is_global_zero:
            self._write_history()
        trainer.save_checkpoint(self.folder / STATE)

    def card_of(self, network: nn.Module) -> ModelCard:
        """Return the card of a network, with what the latest epoch measured."""
        latest = self.history[-1]
        measured = {
            name.replace("val_", "validation_"): value
            for name, value in latest.items()
            if name.startswith("val_") and name != "val_score"
        }
        card = self._card.replace(options=cast(Model, network).options)
        return card.replace(metrics=measured, provenance={**card.provenance, "epoch": int(latest["epoch"])})

    def _write_history(self) -> None:
        with replacing(self.folder / "metrics.csv", force=True) as partial, open(partial, "w", newline="") as stream:
            columns = max(self.history, key=len)  # an epoch without validation has fewer
            writer = csv.DictWriter(stream, list(columns), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.history)


class Progress(Callback):
    """One bar for the whole run, on stderr."""

    def __init__(self) -> None:
        self._bar: Any = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Draw the bar, at the step a resumed run is at."""
        total = int(trainer.estimated_stepping_batches)
        self._bar = tqdm(total=total, initial=trainer.global_step, unit="step", mininterval=1.0)

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Move the bar."""
        self._bar.update(1)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Show the metrics of the epoch beside the bar."""
        shown = {name: float(value) for name, value in trainer.callback_metrics.items() if name != "val_score"}
        self._bar.set_postfix({"epoch": trainer.current_epoch + 1, **{k: f"{v:.3f}" for k, v in shown.items()}})

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


@contextmanager
def expected_warnings() -> Iterator[None]:
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


def name_of(folder: Path) -> str:
    """Return a legal model name made from the run folder's."""
    return re.sub(r"[^a-z0-9._-]+", "-", folder.resolve().name.lower()).strip("._-") or "model"


def check_run_folder(folder: Path, recipe: Declaration, own_files: Sequence[str], *, resume: bool, force: bool) -> None:
    """Refuse to write over a run, or to go on with one that was begun otherwise.

    Raises:
        OutputExistsError: there is a run, and neither ``resume`` nor ``force``.
        DataError: ``resume``, and the run was begun with another recipe.
        OutputWriteError: nothing can be written there.
    """
    check_writable(folder / "recipe.json", force=True)
    present = [name for name in own_files if (folder / name).exists()]
    if present and not resume and not force:
        raise OutputExistsError(
            f"{folder} holds a run already ({', '.join(present[:3])}, ...); pass --resume to go on with it, --force to "
            "replace it, or choose another folder"
        )
    if resume and (folder / "recipe.json").exists():
        before = type(recipe).from_json((folder / "recipe.json").read_text(encoding="utf-8"))
        changed = [field for field in type(recipe).model_fields if getattr(before, field) != getattr(recipe, field)]
        if changed:
            raise DataError(
                f"cannot resume {folder}: it was begun with another recipe; different: {', '.join(changed)}; give the "
                "same options, or --force to start afresh"
            )


def prepare_run_folder(
    folder: Path, recipe: Declaration, dataset: Dataset, own_files: Sequence[str], *, resume: bool
) -> None:
    """Begin the run in ``folder``: an earlier one is removed only now that nothing stands in the way.

    Raises:
        DataError: ``resume``, and the data or its split changed since the run was begun.
    """
    if resume and (folder / "split.csv").exists():
        before = hashlib.sha256((folder / "split.csv").read_bytes()).hexdigest()
        if before != split_hash_of(dataset):
            raise DataError(
                f"cannot resume {folder}: the data or its split changed since it was begun; give the same data and "
                "split options, or --force to start afresh"
            )
    if not resume:
        for name in own_files:
            (folder / name).unlink(missing_ok=True)
    with replacing(folder / "recipe.json", force=True) as partial:
        partial.write_text(recipe.to_json(indent=2) + "\n", encoding="utf-8")
    dataset.write_split(folder / "split.csv", force=True)


def split_hash_of(dataset: Dataset) -> str:
    """Return the sha256 that ``split.csv`` will have."""
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("file", "label", "split"))
    writer.writerows((dataset.name_of(record), ";".join(record.labels), record.split) for record in dataset.records)
    return hashlib.sha256(stream.getvalue().encode("utf-8")).hexdigest()
