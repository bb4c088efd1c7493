"""Knowledge distillation: teachers that answer while the student trains, or whose answers were stored before.

A teacher sees the clips of a batch as the student's data pipeline made them, before any of them are mixed; its answers
are then mixed with the draws that mix the labels. The teacher's term is linear in its answers, so mixing them is the
same as mixing the losses, which is what the published code does.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from models_zoo.cards import ModelCard
from models_zoo.dataset import Dataset, read_dataset
from models_zoo.errors import CardError, DataError
from models_zoo.files import check_writable, replacing
from models_zoo.labels import check_labels
from train_torch.data import Batch, ClipData, evaluation_loader
from train_torch.frontend import Mixing, PairMixing
from train_torch.losses import Task
from train_torch.models.ensemble import load_ensemble
from train_torch.recipes import Recipe

__all__ = [
    "Answers",
    "LiveTeacher",
    "StoredLogits",
    "StoredTeacher",
    "Teacher",
    "distillation_loss",
    "named",
    "read_logits",
    "teach",
]


@dataclass(frozen=True, eq=False)
class Answers:
    """What a teacher says about the clips of a batch.

    Attributes:
        positive: ``(batch, num_classes)`` in [0, 1], its probabilities; 0 where it says nothing.
        said: ``(batch, 1)`` in [0, 1]: how much of the clip it spoke about, 1 or 0 before mixing.
    """

    positive: Tensor
    said: Tensor

    def mixed(self, mixing: Mixing | PairMixing) -> Answers:
        """Return the answers for clips mixed by ``mixing``."""
        return Answers(mixing(self.positive), mixing(self.said))


class Teacher(Protocol):
    """Where answers come from.

    Attributes:
        origin: JSON-ready; goes on the student's card, and a resumed run must have the same.
    """

    origin: dict[str, Any]

    def to(self, device: torch.device | str) -> Any:
        """Move what the teacher holds."""

    def answers(self, batch: Batch) -> Answers:
        """Return what the teacher says about the unmixed clips of a training batch, without gradients."""


def distillation_loss(logits: Tensor, answers: Answers, task: Task) -> Tensor:
    """Return the teacher's term, a scalar: mean over all clips of the batch, the ones without an answer adding 0.

    Multi label: binary cross-entropy against the teacher's sigmoid, mean over classes, as published. Other tasks:
    cross-entropy against its softmax, which has the gradient of the Kullback-Leibler divergence.

    Args:
        logits: ``(batch, num_classes)`` of the student.
        answers: of the teacher, mixed as the clips were.
        task: of both.

    Source: EfficientAT ex_audioset.py (temperature 1; softmax in place of sigmoid is ours, for one label per clip).
    """
    logits = logits.float()
    if task != "multi_label":
        return -(answers.positive * logits.log_softmax(dim=1)).sum(dim=1).mean()
    return (answers.said * functional.softplus(logits) - answers.positive * logits).mean()


class LiveTeacher:
    """An ensemble that answers each batch while the student trains on it.

    Args:
        checkpoints: of one or more models; the answer is the mean of their logits.
        student: card of the model that learns.
        folder: with published checkpoints.

    Raises:
        CardError: a teacher has other labels, another task or sample rate, or needs longer clips than the student.
    """

    def __init__(
        self, checkpoints: Sequence[str | Path], student: ModelCard, *, folder: str | Path | None = None
    ) -> None:
        self.ensemble, members = load_ensemble(checkpoints, checkpoints=folder)
        self.ensemble.require_logits()
        self.origin: dict[str, Any] = {"kind": "teachers", "teachers": members}
        card = self.ensemble.card
        for name, hears in ((f"teacher {card.name!r}", card.frontend), ("the student", student.frontend)):
            if hears is None:
                raise CardError(
                    f"frontend: {name} looks at pictures alone, and a live teacher answers to the sound its student "
                    "hears; store the teacher's logits (teach) and give these",
                    field="frontend",
                )
        _check_classes(card.labels or (), student.labels or (), f"teacher {card.name!r}")
        for field, theirs, ours in (
            ("task", card.task, student.task),
            ("frontend.sample_rate", card.sample_rate, student.sample_rate),
        ):
            if theirs != ours:
                raise CardError(f"{field}: teacher {card.name!r} has {theirs}, the student {ours}", field=field)
        if self.ensemble.min_samples > student.min_samples:
            raise CardError(
                f"length_policy.min: a teacher takes clips from {self.ensemble.min_samples} samples on, the student "
                f"from {student.min_samples}; set min_seconds in the recipe to the teacher's",
                field="length_policy.min",
            )
        longest = card.length_policy.max
        if longest is not None and longest < (student.length_policy.max or np.inf):
            raise CardError(
                f"length_policy.max: teacher {card.name!r} takes at most {longest} samples, the student more; use "
                "stored logits (python -m train_torch teach), which are made of legal segments",
                field="length_policy.max",
            )
        self.task = student.task

    def to(self, device: torch.device | str) -> LiveTeacher:
        """Move the networks to ``device``."""
        self.ensemble.to(device)
        return self

    def answers(self, batch: Batch) -> Answers:
        """Return the answers to the waveforms of ``batch``, each network behind its own front end."""
        positive = _probabilities(self.ensemble(batch.waveform, batch.image)["logits"], self.task)
        return Answers(positive, positive.new_ones(len(positive), 1))


@dataclass(frozen=True, eq=False)
class StoredLogits:
    """A teacher's answers to the clips of a data set, at their own lengths and unchanged.

    Attributes:
        files: the clips, relative to their data folder.
        logits: ``(num_clips, num_classes)`` float32, finite.
        labels: class names, in order.
        teachers: name and sha256 of each, where known.
    """

    files: tuple[str, ...]
    logits: NDArray[np.float32]
    labels: tuple[str, ...]
    teachers: tuple[Mapping[str, str], ...] = ()

    def sha256(self) -> str:
        """Return the hash of what is answered to what, whatever the file looks like."""
        digest = hashlib.sha256(json.dumps([self.files, self.labels]).encode())
        digest.update(np.ascontiguousarray(self.logits, np.float32).tobytes())
        return digest.hexdigest()

    def write(self, path: str | Path, *, force: bool = False) -> None:
        """Write ``files``, ``logits``, ``labels`` (and the teachers) as an ``.npz``, completely or not at all."""
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            files=np.array(self.files),
            logits=self.logits,
            labels=np.array(self.labels),
            teachers=np.array([f"{one['sha256']} {one['name']}" for one in self.teachers], dtype=np.str_),
        )
        with replacing(path, force=force) as partial:
            partial.write_bytes(buffer.getbuffer())


def read_logits(path: str | Path) -> StoredLogits:
    """Return the stored answers in an ``.npz`` with ``files``, ``logits`` and ``labels``.

    Raises:
        DataError: no such file, not an ``.npz``, or arrays that do not go together.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            missing = [name for name in ("files", "logits", "labels") if name not in stored]
            if missing:
                raise DataError(f"{path}: holds no {', '.join(missing)}; expected files, logits and labels")
            files, logits, labels = (stored[name] for name in ("files", "logits", "labels"))
            teachers = stored.get("teachers", [])
    except DataError:
        raise
    # TypeError: a bare .npy array is no archive.
    except (OSError, ValueError, TypeError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path}: cannot read teacher logits: {error}; make them with python -m train_torch teach"
        ) from error
    if (files.ndim, labels.ndim) != (1, 1) or logits.shape != (files.size, labels.size) or logits.dtype.kind != "f":
        raise DataError(
            f"{path}: logits are {logits.dtype} {logits.shape}; expected floats ({files.size}, {labels.size}), as many "
            "as there are files and labels"
        )
    if not np.isfinite(logits).all():
        raise DataError(
            f"{path}: {int((~np.isfinite(logits)).any(axis=1).sum())} clips have logits that are not finite"
        )
    names = [str(name) for name in files]
    if len(set(names)) < len(names):
        raise DataError(f"{path}: a file is listed twice")
    return StoredLogits(
        tuple(names),
        logits.astype(np.float32),
        tuple(str(label) for label in labels),
        tuple({"sha256": sha256, "name": name} for sha256, _, name in (str(text).partition(" ") for text in teachers)),
    )


class StoredTeacher:
    """Answers that were stored before, looked up clip by clip.

    Args:
        stored: of any set of clips.
        dataset: the training clips, in the order of a batch's ``index``.
        task: of the student.
        missing: clips without an entry are an ``error``, or learnt from their ``labels`` alone.

    Attributes:
        missing: how many training clips have no entry.

    Raises:
        CardError: the labels disagree; the first that differs is named.
        DataError: clips are missing; their number is stated.
    """

    def __init__(
        self, stored: StoredLogits, dataset: Dataset, task: Task, *, missing: Literal["error", "labels"] = "error"
    ) -> None:
        _check_classes(stored.labels, dataset.labels, "the stored teacher logits")
        place = {name: row for row, name in enumerate(stored.files)}
        rows = np.array([place.get(dataset.name_of(record), -1) for record in dataset.records])
        self.missing = int((rows < 0).sum())
        if self.missing and (missing == "error" or self.missing == len(rows)):
            absent = dataset.name_of(dataset.records[int(np.argmax(rows < 0))])
            raise DataError(
                f"{self.missing} of {len(rows)} training clips have no stored teacher logits, e.g. {absent!r}; store "
                "them (python -m train_torch teach), or set distillation.missing to 'labels' to learn those from "
                "their labels alone (which needs logits of some)"
            )
        self.said = torch.from_numpy((rows >= 0).astype(np.float32))[:, None]
        self.positive = _probabilities(torch.from_numpy(stored.logits[rows]), task) * self.said
        self.origin: dict[str, Any] = {
            "kind": "stored logits of",
            "teachers": [dict(one) for one in stored.teachers],
            "sha256": stored.sha256(),
            "missing": self.missing,
        }

    def to(self, device: torch.device | str) -> StoredTeacher:
        """Move the answers to ``device``."""
        self.said, self.positive = self.said.to(device), self.positive.to(device)
        return self

    def answers(self, batch: Batch) -> Answers:
        """Return the stored answers for the clips of ``batch``; nothing where there are none."""
        index = batch.index.to(self.said.device)
        return Answers(self.positive[index], self.said[index])


def teach(
    checkpoints: Sequence[str | Path],
    data: str | Path,
    out: str | Path,
    *,
    card: str | None = None,
    folder: str | Path | None = None,
    split: str | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
    force: bool = False,
) -> StoredLogits:
    """Store and return the mean logits of one or more checkpoints for every clip, each at its own length.

    Args:
        checkpoints, card, folder: the teachers, see :func:`load_ensemble`.
        data: folder or table.
        out: ``.npz`` to write.
        split: one of the declared splits; None takes every clip.
        device: where to compute.
        progress: show bars.
        force: replace ``out``.

    Raises:
        AudioClassifierError: bad data, checkpoints or device, or ``out`` exists.
    """
    check_writable(Path(out), force=force)
    if Path(out).suffix != ".npz":
        raise DataError(f"cannot store logits as {Path(out).name}: expected a name ending in .npz")
    ensemble, members = load_ensemble(checkpoints, card, checkpoints=folder)
    ensemble.require_logits()
    model = ensemble.to(device).card
    if model.labels is None or model.task not in get_args(Task):
        raise CardError(f"{model.name!r} has no clip labels to teach", field="labels")
    dataset = read_dataset(data).by_file().select(split).with_labels(model.labels)
    clips = ClipData(dataset, model, Recipe(task=model.task), progress=progress)
    total = np.zeros((len(dataset), len(model.labels)), np.float64)
    segments = np.zeros(len(dataset))
    for batch in tqdm(evaluation_loader(clips), desc="teaching", unit="batch", disable=not progress, leave=False):
        there = batch.to(device)
        np.add.at(total, batch.index.numpy(), ensemble(there.waveform, there.image)["logits"].cpu().numpy())
        np.add.at(segments, batch.index.numpy(), 1)
    stored = StoredLogits(
        tuple(dataset.name_of(record) for record in dataset.records),
        (total / segments[:, None]).astype(np.float32),
        model.labels,
        tuple(members),
    )
    stored.write(out, force=force)
    return stored


def named(origin: Mapping[str, Any] | None) -> str:
    """Return a teacher's :attr:`Teacher.origin` in words."""
    if not origin:
        return "no teacher"
    names = [f"{one['name']} ({one['sha256'][:8]})" for one in origin["teachers"]]
    return f"{origin['kind']} {', '.join(names) or 'unknown models'}"


def _probabilities(logits: Tensor, task: str) -> Tensor:
    return logits.sigmoid() if task == "multi_label" else logits.softmax(dim=1)


def _check_classes(theirs: Sequence[str], ours: Sequence[str], whose: str) -> None:
    advice = "a teacher answers for the student's classes in the same order"
    check_labels(theirs, ours, given=whose, expected="the data", advice=advice)
