"""Clips for sound event detection: what is known of them on the frames of a model, in batches composed of parts.

Clips have one length: longer ones are cropped, at random in training, shorter ones get zeros. A clip comes as its
linear mel values, which follow from the clip alone and are computed once; what training changes comes after them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

from models_zoo.audio import load_audio
from models_zoo.cards import ModelCard
from models_zoo.dataset import Dataset, Part, Record, read_dataset
from models_zoo.errors import CardError, DataError
from models_zoo.events import FrameGrid, encode_events
from models_zoo.prediction import Event
from train_torch.frontend import TorchFrontend
from train_torch.recipes.sed import BatchGroup, SedRecipe
from train_torch.sed_embeddings import Embedder

__all__ = ["SceneBatch", "SceneData", "SceneDataModule", "Scenes", "read_scenes", "scene_loader"]

_Waveform = NDArray[np.float32]

_BEYOND = 0.1
"""Seconds that an event may reach beyond its clip, as rounded annotations do."""


@dataclass(frozen=True)
class Scenes:
    """Clips of one or several data sets.

    Attributes:
        dataset: their rows, stretches apart; every row is in a split, no unlabelled one in validation.
        origin: file -> number of the data set it comes from.
        valid: of each data set, the labels that its annotations know; others are unknown on its clips.
    """

    dataset: Dataset
    origin: dict[Path, int]
    valid: tuple[frozenset[str], ...]

    def select(self, split: str) -> Scenes:
        """Return the clips of one split."""
        return replace(self, dataset=self.dataset.select(split))


def read_scenes(
    data: Sequence[str | Path],
    *,
    aliases: dict[str, str] | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
) -> Scenes:
    """Return the clips of data sets with strong, weak and unlabelled parts, every one in a split.

    Args:
        data: folders or tables, see :func:`models_zoo.dataset.read_dataset`. Of several, each knows its own labels
            alone.
        aliases: label -> another that its events count for as well.
        val_fraction, seed: of a validation split, carved from labelled training clips where none is declared.

    Raises:
        DataError: bad tables, an alias of nothing, no split, or a label without any training clip.
    """
    sets = [read_dataset(one) for one in data]
    if not sets:
        raise DataError("got no data; give a folder with a metadata.csv that has onsets and offsets")
    known = {label for one in sets for label in one.labels}
    aliases = aliases or {}
    strangers = sorted(set(aliases) - known)
    if strangers:
        raise DataError(f"aliases: the data has no label {', '.join(strangers)}; it has {', '.join(sorted(known))}")
    valid = tuple(frozenset({*one.labels, *(aliases[name] for name in one.labels if name in aliases)}) for one in sets)
    records = [_with_alias(record, aliases) for one in sets for record in one.records]
    root = Path(os.path.commonpath([one.root.resolve() for one in sets])) if len(sets) > 1 else sets[0].root
    if len(sets) > 1:
        records = [replace(record, file=record.file.resolve()) for record in records]
    origin = {}
    for number, one in enumerate(sets):
        for record in one.records:
            file = record.file.resolve() if len(sets) > 1 else record.file
            if origin.setdefault(file, number) != number:
                raise DataError(f"{file} is in two of the data sets given; give each once")
    labels = tuple(dict.fromkeys(label for one in sets for label in one.labels))
    labels += tuple(sorted(set(aliases.values()) - set(labels)))
    dataset = Dataset(tuple(records), labels, root)
    if not dataset.has_splits:
        raise DataError(
            f"{', '.join(map(str, data))}: some clips are in no split; fill the column 'split' with train, validation "
            "and test"
        )
    if not any(record.split == "validation" for record in records):
        labelled = replace(dataset, records=tuple(r for r in records if r.part != "unlabelled" and r.split == "train"))
        held = labelled.carve_validation(val_fraction, seed=seed).select("validation").records
        files = {record.file for record in held}
        records = [replace(r, split="validation") if r.file in files else r for r in records]
    records = [record for record in records if record.split == "train" or record.part != "unlabelled"]
    dataset = replace(dataset, records=tuple(records))
    dataset.check_disjoint()
    dataset.check_trainable()
    return Scenes(dataset, origin, valid)


def _with_alias(record: Record, aliases: dict[str, str]) -> Record:
    more = tuple(aliases[label] for label in record.labels if label in aliases)
    return replace(record, labels=tuple(dict.fromkeys(record.labels + more))) if more else record


@dataclass(frozen=True, eq=False)
class SceneBatch:
    """Clips of one length.

    Attributes:
        mel: ``(batch, windows, T, n_mels)`` float32, linear.
        strong: ``(batch, num_classes, frames)`` float32 in [0, 1]; 0 for clips that are not strong.
        weak: ``(batch, num_classes)`` float32 in [0, 1]; of strong clips their events' classes, of unlabelled ones 0.
        valid: ``(batch, num_classes)`` bool, whether a clip's data set knows the class.
        index: ``(batch,)`` int64, places in the data set.
        embeddings: ``(batch, size, tokens)`` or ``(batch, size)`` float32, or None where the model takes none.
    """

    mel: Tensor
    strong: Tensor
    weak: Tensor
    valid: Tensor
    index: Tensor
    embeddings: Tensor | None = None

    def to(self, device: torch.device | str) -> SceneBatch:
        """Return the batch on ``device``."""
        moved = (part.to(device) for part in (self.mel, self.strong, self.weak, self.valid))
        return SceneBatch(*moved, self.index, None if self.embeddings is None else self.embeddings.to(device))

    def beside_features(self) -> dict[str, Tensor]:
        """Return what a network is given beside features: embeddings, and the valid classes where not all are."""
        given = {} if self.embeddings is None else {"embeddings": self.embeddings}
        return given if bool(self.valid.all()) else {**given, "classes_mask": self.valid}


@dataclass(frozen=True)
class _Request:
    """Which clips make a batch; ``epoch`` seeds their crops in training and is None in evaluation."""

    indices: tuple[int, ...]
    epoch: int | None = None


class SceneData(torch.utils.data.Dataset[SceneBatch]):
    """The clips of one split; maps a request to a batch.

    Args:
        scenes: of one split.
        card: its front end says how clips are read, its labels and frame scores what targets look like.
        recipe: the length of clips and the seed of their crops.
        cache_gib: memory for mel values of clips that are never cropped; others are read whenever they come.
        progress: show a bar while reading.
        embedder: gives the embeddings of each clip, see :func:`train_torch.sed_embeddings.open_embeddings`; they are
            kept, beyond ``cache_gib``.

    Attributes:
        files: names of the clips.
        parts, origins: of the clips; see :class:`Scenes`.
        frontend: of the card, in evaluation mode.
        durations: seconds of each clip, at most those of the recipe.

    Raises:
        AudioDecodeError: a file cannot be read; every file is read here, before any training.
        DataError: an event begins after its clip ends, or reaches well beyond it; or a label that is not the card's; or
            embeddings that are missing, of unequal shapes, or of clips that would be cropped.
    """

    def __init__(
        self,
        scenes: Scenes,
        card: ModelCard,
        recipe: SedRecipe,
        *,
        cache_gib: float = 4.0,
        progress: bool = False,
        embedder: Embedder | None = None,
    ) -> None:
        if card.frontend is None or card.labels is None:
            raise CardError(f"card {card.name!r} has no front end or no labels, so no targets", field="frontend")
        self.scenes = replace(scenes, dataset=scenes.dataset.with_labels(card.labels))
        self.recipe, self.labels = recipe, card.labels
        self.grid = FrameGrid.of(card)
        self._spec = card.frontend
        self.frontend = TorchFrontend(card.frontend).eval()
        self._length = round(recipe.seconds * card.sample_rate)
        dataset = self.scenes.dataset
        rows: dict[Path, list[Record]] = {}
        for record in dataset.records:
            rows.setdefault(record.file, []).append(record)
        self._rows = list(rows.items())
        self.files = tuple(dataset.name_of(same[0]) for same in rows.values())
        self.parts: tuple[Part, ...] = tuple(same[0].part for same in rows.values())
        self.origins = tuple(scenes.origin[file] for file in rows)
        known = [[label in scenes.valid[origin] for label in card.labels] for origin in self.origins]
        self.valid = torch.tensor(known, dtype=torch.bool).reshape(-1, len(card.labels))
        self._kept: list[Tensor | None] = []
        self._embeddings: list[Tensor] = []
        durations = []
        room = cache_gib * 2**30
        for index in tqdm(range(len(self._rows)), desc="reading", unit="clip", disable=not progress, leave=False):
            waveform = load_audio(self._rows[index][0], self._spec)
            self._check_events(index, waveform.size / self._spec.sample_rate)
            durations.append(min(waveform.size, self._length) / self._spec.sample_rate)
            mel = self._mel(waveform, 0) if waveform.size <= self._length else None
            room -= 0 if mel is None else mel.numel() * mel.element_size()
            self._kept.append(mel if room >= 0 else None)
            if embedder is not None:
                self._embeddings.append(self._embedded(index, waveform, embedder))
        self.durations = tuple(durations)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, request: _Request) -> SceneBatch:
        clips = [self._clip(index, request.epoch) for index in request.indices]
        index = torch.tensor(request.indices)
        mel, strong, weak = (torch.stack(parts) for parts in zip(*clips, strict=True))
        embeddings = torch.stack([self._embeddings[i] for i in request.indices]) if self._embeddings else None
        return SceneBatch(mel, strong, weak, self.valid[index], index, embeddings)

    def _clip(self, index: int, epoch: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return mel values and targets of one clip."""
        mel, start = self._kept[index], 0
        if mel is None:
            waveform = load_audio(self._rows[index][0], self._spec)
            if epoch is not None and waveform.size > self._length:
                rng = np.random.default_rng((self.recipe.seed, epoch, index))
                start = int(rng.integers(waveform.size - self._length + 1))
            mel = self._mel(waveform, start)
        strong, weak = self._targets(index, start / self._spec.sample_rate)
        return mel, strong, weak

    def _embedded(self, index: int, waveform: _Waveform, embedder: Embedder) -> Tensor:
        """Return the embeddings of a clip with zeros behind it."""
        name = self.files[index]
        if waveform.size > self._length:
            raise DataError(
                f"{name} is longer than {self.recipe.seconds:g} s and would be cropped, and its embeddings are of all "
                "of it; cut it first"
            )
        found = torch.from_numpy(embedder(name, np.pad(waveform, (0, self._length - waveform.size))))
        if self._embeddings and found.shape != self._embeddings[0].shape:
            raise DataError(
                f"{name} has embeddings of shape {tuple(found.shape)}, {self.files[0]} of "
                f"{tuple(self._embeddings[0].shape)}; expected the same, as clips have one length"
            )
        return found

    def _mel(self, waveform: _Waveform, start: int) -> Tensor:
        """Return ``(windows, T, n_mels)`` of the clip from ``start``, with zeros behind a short one."""
        clip = waveform[start : start + self._length]
        clip = np.pad(clip, (0, self._length - clip.size))
        with torch.no_grad():
            return self.frontend.mel(torch.from_numpy(clip)[None])[0]

    def _targets(self, index: int, start: float) -> tuple[Tensor, Tensor]:
        """Return the strong and weak targets of the stretch of a clip from ``start`` seconds on."""
        rows = self._rows[index][1]
        frames = self.grid.num_frames(self._length)
        events, weak = [], torch.zeros(len(self.labels))
        for record in rows:
            if record.onset is None or record.offset is None:
                for label in record.labels:
                    weak[self.labels.index(label)] = 1.0
            elif record.offset > start and record.onset < start + self.recipe.seconds:
                onset, offset = max(record.onset - start, 0.0), record.offset - start
                events += [Event(label, onset, offset, record.confidence) for label in record.labels]
        strong = torch.from_numpy(encode_events(events, self.labels, self.grid, frames))
        return strong, torch.maximum(weak, strong.amax(dim=1))

    def _check_events(self, index: int, seconds: float) -> None:
        file, rows = self._rows[index]
        for record in rows:
            onset, offset = record.onset or 0.0, record.offset or 0.0
            if onset >= seconds or offset > seconds + _BEYOND:
                raise DataError(
                    f"{file}: {';'.join(record.labels)} from {onset:g} to {offset:g} s lies beyond the clip, which is "
                    f"{seconds:g} s long; correct the table"
                )


class _TrainingBatches(Sampler[_Request]):
    """Requests for batches composed of groups, in an order that follows from (seed, epoch)."""

    def __init__(self, data: SceneData, groups: Sequence[BatchGroup], steps: int | None) -> None:
        self.data, self.groups, self.epoch = data, groups, 0
        self.members = []
        for number, group in enumerate(groups):
            wanted = [
                index
                for index, (part, origin) in enumerate(zip(data.parts, data.origins, strict=True))
                if part == group.part and group.data in (None, origin)
            ]
            if len(wanted) < group.size:
                of = "" if group.data is None else f" in data set {group.data}"
                raise DataError(
                    f"groups.{number}: {len(wanted)} {group.part} training clips{of}; a batch takes {group.size}; add "
                    "clips, or make the group smaller (or leave it out)"
                )
            self.members.append(np.array(wanted))
        shortest = min(len(m) // g.size for m, g in zip(self.members, groups, strict=True))
        self._steps = shortest if steps is None else steps

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next; Lightning calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[_Request]:
        rng = np.random.default_rng((self.data.recipe.seed, self.epoch))
        orders = []
        for members, group in zip(self.members, self.groups, strict=True):
            rounds = -(-self._steps * group.size // len(members))
            orders.append(np.concatenate([rng.permutation(members) for _ in range(rounds)]))
        for step in range(self._steps):
            parts = (
                order[step * group.size : (step + 1) * group.size]
                for order, group in zip(orders, self.groups, strict=True)
            )
            yield _Request(tuple(int(index) for part in parts for index in part), self.epoch)


class SceneDataModule(lightning.LightningDataModule):
    """The splits as Lightning takes them.

    Args:
        scenes: with a train and a validation split.
        card, recipe, cache_gib, progress, embedder: see :class:`SceneData`; the cache is shared out by numbers of
            clips.
    """

    def __init__(
        self,
        scenes: Scenes,
        card: ModelCard,
        recipe: SedRecipe,
        *,
        cache_gib: float = 4.0,
        progress: bool = False,
        embedder: Embedder | None = None,
    ) -> None:
        super().__init__()
        parts = {split: scenes.select(split) for split in ("train", "validation")}
        total = sum(len(part.dataset) for part in parts.values())
        self.parts = {
            split: SceneData(
                part,
                card,
                recipe,
                cache_gib=cache_gib * len(part.dataset) / total,
                progress=progress,
                embedder=embedder,
            )
            for split, part in parts.items()
        }
        self.batches = _TrainingBatches(self.parts["train"], recipe.groups, recipe.steps_per_epoch)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the batches of an epoch."""
        return DataLoader(self.parts["train"], batch_size=None, sampler=self.batches)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the validation clips."""
        return scene_loader(self.parts["validation"])


def scene_loader(data: SceneData, batch_size: int = 16) -> DataLoader[Any]:
    """Return all clips in order, from their beginnings, as batches."""
    order = range(len(data))
    requests = [_Request(tuple(order[first : first + batch_size])) for first in order[::batch_size]]
    return DataLoader(data, batch_size=None, sampler=requests)
