"""Scores of labelled clips: what a model answers, and the metrics that follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models_zoo import metrics
from models_zoo.cards import ModelCard
from models_zoo.dataset import Dataset, Group, read_dataset
from models_zoo.decoding import probabilities_of
from models_zoo.errors import CheckpointError, DataError, DeviceError
from train_torch.checkpoint import load_checkpoint
from train_torch.data import Batch, ClipData, evaluation_loader
from train_torch.losses import Task, clip_loss
from train_torch.models.cavmae import Mode
from train_torch.models.ensemble import Ensemble, load_ensemble
from train_torch.recipes import Recipe
from train_torch.retrieval import Retrieval, embed_pairs
from train_torch.sed_evaluation import Detection, evaluate_detector
from train_torch.transfer import in_mode

__all__ = ["Device", "Evaluation", "accelerator_of", "check_finite", "collect", "evaluate", "score_clips"]

Device = Literal["auto", "cpu", "cuda"]

_LEAST_ERROR = 1e-6
"""An AUC counts as at least this far from 0 and 1 in d-prime: at most 6.72."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Scores of every clip of a split, and what follows from them.

    Attributes:
        task: ``single_label``, ``multi_label`` or ``label_distribution``.
        labels: class names.
        files: the clips, relative to their data folder.
        targets: ``(num_clips, num_classes)`` float32, 0 or 1, or between for a distribution.
        probabilities: ``(num_clips, num_classes)`` float32 in [0, 1].
        loss: mean over the clips.
        known: ``(num_clips, num_classes)``, whether a label is known, or None where all are; metrics are over these.
    """

    task: str
    labels: tuple[str, ...]
    files: tuple[str, ...]
    targets: NDArray[np.float32]
    probabilities: NDArray[np.float32]
    loss: float
    known: NDArray[np.bool_] | None = None

    def metrics(self) -> dict[str, float]:
        """Return name -> value: what the task is measured by, and the loss.

        Accuracy and balanced accuracy; mAP, mean ROC AUC and d-prime, where any class has both clips and others; or, of
        a distribution, the mean KL divergence, and what it would be if every answer were that all classes are alike.
        """
        if self.task == "single_label":
            truth, answer = self.targets.argmax(axis=1), self.probabilities.argmax(axis=1)
            values = {
                "accuracy": metrics.accuracy(truth, answer),
                "balanced_accuracy": metrics.balanced_accuracy(truth, answer),
            }
        elif self.task == "label_distribution":
            uniform = np.full(self.targets.shape, 1 / len(self.labels))
            values = {
                "kl_divergence": metrics.kl_divergence(self.targets, self.probabilities).mean(),
                "kl_divergence_uniform": metrics.kl_divergence(self.targets, uniform).mean(),
            }
        else:
            values = {}
        if self.task != "label_distribution":
            ranked = (self.targets, self.probabilities, self.known)
            auc = metrics.mean_roc_auc(*ranked)
            values["mean_average_precision"] = metrics.mean_average_precision(*ranked)
            values["mean_roc_auc"] = auc
            # Of an AUC of 1 it would be infinite, which neither a card nor a table holds.
            values["d_prime"] = metrics.d_prime(np.clip(auc, _LEAST_ERROR, 1 - _LEAST_ERROR))
            if self.task == "single_label" and np.isnan(auc):
                values = {name: value for name, value in values.items() if "accuracy" in name}
        return {name: float(value) for name, value in {**values, "loss": self.loss}.items()}

    @property
    def headline(self) -> str:
        """Name of the metric that counts."""
        by_task = {"single_label": "accuracy", "label_distribution": "kl_divergence"}
        return by_task.get(self.task, "mean_average_precision")

    def per_class(self) -> list[dict[str, Any]]:
        """Return a row per class: clips, and by the task recall and precision, average precision, or mean weights.

        None where one is undefined. The clips of a class in distributions are those it has a share in.
        """
        truth = self.targets > (0 if self.task == "label_distribution" else 0.5)
        rows: list[dict[str, Any]] = [
            {"label": label, "clips": int(truth[:, i].sum())} for i, label in enumerate(self.labels)
        ]
        if self.task == "single_label":
            answers = np.eye(len(self.labels), dtype=bool)[self.probabilities.argmax(axis=1)]
            for i, row in enumerate(rows):
                right = int((truth[:, i] & answers[:, i]).sum())
                row["recall"] = right / row["clips"] if row["clips"] else None
                row["precision"] = right / int(answers[:, i].sum()) if answers[:, i].any() else None
        elif self.task == "label_distribution":
            for i, row in enumerate(rows):
                row["mean_weight"] = float(self.targets[:, i].mean())
                row["mean_answer"] = float(self.probabilities[:, i].mean())
        else:
            precision = metrics.average_precision(self.targets, self.probabilities, self.known)
            for row, value in zip(rows, precision, strict=True):
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


def check_finite(values: Tensor, card: ModelCard) -> None:
    """Refuse answers, or losses, of a model that are no numbers.

    Raises:
        CheckpointError: some are NaN or infinite.
    """
    if not torch.isfinite(values).all():
        raise CheckpointError(
            f"model {card.name!r} answers with NaN or infinity: the training diverged; lower the learning rate (--lr), "
            "or go back to an earlier checkpoint"
        )


def collect(scored: Sequence[tuple[Batch, Tensor]], card: ModelCard, files: tuple[str, ...]) -> Evaluation:
    """Return the evaluation of all clips from the model's answers to all batches; segments of a clip are averaged."""
    index = torch.cat([batch.index for batch, _ in scored]).numpy()
    targets = torch.cat([batch.targets for batch, _ in scored]).cpu()
    scores = torch.cat([answers for _, answers in scored]).float().cpu()
    check_finite(scores, card)
    task = cast(Task, card.task)
    masks = [batch.known.cpu() for batch, _ in scored if batch.known is not None]
    known = torch.cat(masks) if masks else None
    output = card.clip_output()
    assert output is not None
    assert card.labels is not None
    loss = float(clip_loss(scores, targets, task, kind=output.kind, known=known))
    probabilities = probabilities_of(scores.numpy(), task=task, kind=output.kind)
    clips, place, segments = np.unique(index, return_inverse=True, return_counts=True)
    total = np.zeros((len(clips), probabilities.shape[1]), np.float32)
    np.add.at(total, place, probabilities)
    truth = np.zeros_like(total)
    truth[place] = targets.numpy()
    certain = None
    if known is not None:
        certain = np.zeros(total.shape, np.bool_)
        certain[place] = known.numpy() > 0.5
    return Evaluation(
        task=task,
        labels=card.labels,
        files=tuple(files[clip] for clip in clips),
        targets=truth,
        probabilities=total / segments[:, None].astype(np.float32),
        loss=loss,
        known=certain,
    )


def score_clips(model: nn.Module, card: ModelCard, data: ClipData, *, device: torch.device | str = "cpu") -> Evaluation:
    """Return the evaluation of every clip of ``data`` at its own length, front end and model in evaluation mode."""
    return _score(Ensemble([(model, card)]), data, device)


def _score(ensemble: Ensemble, data: ClipData, device: torch.device | str) -> Evaluation:
    files = tuple(data.dataset.name_of(record) for record in data.dataset.records)
    ensemble = ensemble.to(device)
    with torch.inference_mode():
        moved = ((batch, batch.to(device)) for batch in evaluation_loader(data))
        scored = [(batch, ensemble(there.waveform, there.image)["logits"]) for batch, there in moved]
    return collect(scored, ensemble.card, files)


def accelerator_of(device: Device) -> str:
    """Return Lightning's name for ``device``.

    Raises:
        DeviceError: CUDA was asked for and is not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("device 'cuda' was asked for, but torch finds no CUDA device; use --device cpu or auto")
    if device == "auto":
        return "gpu" if torch.cuda.is_available() else "cpu"
    return "gpu" if device == "cuda" else "cpu"


def evaluate(
    checkpoint: str | Path | Sequence[str | Path],
    data: str | Path,
    *,
    card: str | None = None,
    checkpoints: str | Path | None = None,
    split: str | None = None,
    split_by: Group | None = None,
    hold_out: tuple[str, ...] = (),
    frames: Literal["middle", "all"] = "middle",
    mode: Mode | None = None,
    device: Device = "auto",
    progress: bool = True,
) -> Evaluation | Detection | Retrieval:
    """Return the evaluation of a checkpoint on labelled recordings, each clip at its own length.

    Of a model for event detection, how good its events are, see :func:`train_torch.sed_evaluation.evaluate_detector`;
    of a pre-trained CAV-MAE, how well sounds and pictures find each other, see :mod:`train_torch.retrieval`.

    Args:
        checkpoint: ``.safetensors``, a published file, or the name of a published model; of several, the mean of
            their logits is evaluated.
        data: folder or table.
        card: name of the card where the file holds none.
        checkpoints: folder with published checkpoints, see :func:`train_torch.download.checkpoint_folder`.
        split: one of the declared splits; None takes every clip.
        split_by, hold_out: score the clips of these speakers or folds, whatever their split.
        frames: of several pictures of a clip, the ``middle`` one, or the mean of the answers to ``all``, which
            embeddings have not.
        mode: of a single CAV-MAE classifier, in place of its own, see :func:`train_torch.transfer.in_mode`.
        device: where to score.
        progress: show bars.

    Raises:
        AudioClassifierError: bad data, checkpoint or device.
    """
    target = "cuda" if accelerator_of(device) == "gpu" else "cpu"
    paths = [checkpoint] if isinstance(checkpoint, (str, Path)) else list(checkpoint)
    if len(paths) == 1:
        loaded = load_checkpoint(paths[0], card, checkpoints=checkpoints)
        if mode is not None:
            loaded = in_mode(loaded, mode)
        if loaded.card.task == "embedding" and loaded.card.image is not None:
            if frames != "middle":
                raise CheckpointError(
                    f"frames: got {frames!r}; {loaded.card.name!r} embeds pairs, whose picture is the middle one; "
                    "leave it out"
                )
            pairs = _clips_of(data, split, split_by, hold_out)
            clips = ClipData(pairs, loaded.card, Recipe(), progress=progress)
            return embed_pairs(loaded.model, loaded.card, clips, device=target)
        ensemble = Ensemble([(loaded.model, loaded.card)])
    elif mode is not None:
        raise CheckpointError(f"mode: got {mode!r} for {len(paths)} checkpoints; choose it for one at a time")
    else:
        ensemble = load_ensemble(paths, card, checkpoints=checkpoints)[0]
    model = ensemble.card
    if model.task == "event_detection" and model.labels is not None and len(paths) == 1 and not hold_out:
        detector = cast(nn.Module, ensemble.models[0])
        return evaluate_detector(detector, model, data, split=split, device=target, progress=progress)
    if model.labels is None or model.task not in get_args(Task):
        raise CheckpointError(f"{paths[0]}: task {model.task!r} without clip labels cannot be evaluated")
    dataset = _clips_of(data, split, split_by, hold_out).with_labels(model.labels)
    if model.task == "single_label" and dataset.is_multi_label:
        raise DataError(f"{data}: some clips have several labels; model {model.name!r} answers with one")
    recipe = Recipe(task=model.task)
    return _score(ensemble, ClipData(dataset, model, recipe, progress=progress, frames=frames), target)


def _clips_of(data: str | Path, split: str | None, split_by: Group | None, hold_out: tuple[str, ...]) -> Dataset:
    """Return the clips of a split, or of the speakers or folds held out, whatever their split."""
    dataset = read_dataset(data).by_file()
    if hold_out and split_by is None:
        raise DataError(f"holding out {', '.join(hold_out)} needs to know of what: split by 'speaker' or 'fold'")
    if hold_out and split_by is not None:
        dataset = dataset.split_by_group(split_by, held_out=hold_out).select("test")
    return dataset.select(split)
