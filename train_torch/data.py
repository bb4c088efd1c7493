"""Labelled recordings as batches of waveforms, and of pictures where the network looks at them.

Training clips are cropped, filled and changed at random to the length of their batch; evaluation clips keep their
own length (a batch holds clips of equal length), filled only where the card's length policy says so. Every draw comes
from a generator seeded by (seed, epoch, clip): the number of workers, a restart or the machine changes nothing.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import lightning
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.fft import next_fast_len
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

from models_zoo.audio import load_audio
from models_zoo.cards import ModelCard
from models_zoo.dataset import SPLITS, Dataset, Group
from models_zoo.decoding import legal_segments
from models_zoo.errors import CardError, ClipLengthError, DataError, SpecError
from models_zoo.images import crop_image, normalise_image, read_image
from models_zoo.mixtures import count_clipped
from train_torch.augment import augment, fit_length
from train_torch.recipes import Recipe
from train_torch.sampling import ClassDraws, ClipDraws, sampling_weights

__all__ = [
    "Batch",
    "ClipData",
    "ClipDataModule",
    "EvaluationBatches",
    "TrainingBatches",
    "count_table",
    "evaluation_loader",
    "split_dataset",
]

_log = logging.getLogger(__name__)

Waveform = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Batch:
    """Clips of one length.

    Attributes:
        waveform: ``(batch, num_samples)`` float32 in [-1, 1] at the front end's rate.
        targets: ``(batch, num_classes)`` float32 in [0, 1].
        index: ``(batch,)`` int64, the clips' places in their data set.
        known: ``(batch, num_classes)`` float32, 1 where a label is known and 0 where it is not, or None where all are.
        unchanged: these clips' waveforms come whole and like this in every epoch.
        image: ``(batch, 3, size, size)`` float32, normalised, a picture of each clip, or None.
    """

    waveform: Tensor
    targets: Tensor
    index: Tensor
    known: Tensor | None = None
    unchanged: bool = False
    image: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on ``device``."""
        moved = {
            name: value.to(device)
            for name in ("waveform", "targets", "known", "image")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class _Request:
    """Which clips make a batch.

    For training ``epoch`` seeds their changes and ``num_samples`` is their length, and ``takes`` says how often each
    has come before in this epoch, which seeds its changes too; for evaluation ``epoch`` is None, and ``views`` says
    which legal segment of each clip, and which of its pictures, are wanted.
    """

    indices: tuple[int, ...]
    num_samples: int
    epoch: int | None = None
    takes: tuple[int, ...] = ()
    views: tuple[tuple[int, int], ...] = ()


def split_dataset(
    dataset: Dataset,
    *,
    split_by: Literal["file"] | Group | None = None,
    hold_out: tuple[str, ...] = (),
    validate_by: Literal["file"] | Group | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
) -> Dataset:
    """Return one record per file, each in ``train``, ``validation`` or ``test``, and prove that nothing is torn.

    Declared splits are kept unless ``split_by`` is given. A missing validation split is carved from ``train``.

    Args:
        dataset: as :func:`models_zoo.dataset.read_dataset` returned it.
        split_by: split anew by file, or keep the clips of a speaker or fold together.
        hold_out: with ``speaker`` or ``fold``: these groups are the test split; clips of other groups that the data
            declares as test are left out.
        validate_by: how a missing validation split is carved from the training clips; None for as ``split_by`` says.
            By ``file`` keeps every training speaker (or fold), and makes validation easier than the test.
        val_fraction: share of the training clips (or groups) for validation.
        seed: of the split.

    Raises:
        DataError: there is no way to split as asked, or a class would have no training clip; says what to do.
    """
    dataset = dataset.by_file()
    declared = {record.split for record in dataset.records}
    by: Group | None = split_by if split_by in ("speaker", "fold") else None
    if hold_out:
        if by is None:
            raise DataError(f"holding out {', '.join(hold_out)} needs to know of what: split by 'speaker' or 'fold'")
        held = {record.file for record in dataset.split_by_group(by, held_out=hold_out).select("test").records}
        kept = [record for record in dataset.records if record.file in held or record.split != "test"]
        if len(kept) < len(dataset):
            _log.info("%d clips that the data declares as test are left out", len(dataset) - len(kept))
        dataset = replace(
            dataset,
            records=tuple(
                replace(record, split="test" if record.file in held else record.split or "train") for record in kept
            ),
        )
    elif by is not None:
        dataset = dataset.split_by_group(by, test=0.2, seed=seed)
    elif split_by == "file" or declared == {None}:
        dataset = dataset.split_by_file(test=0.2, seed=seed)
        if split_by is None:
            _log.info("the data declares no split: split by file with seed %d, a fifth for test", seed)
    elif None in declared:
        missing = sum(record.split is None for record in dataset.records)
        raise DataError(
            f"{dataset.root}: {missing} of {len(dataset)} clips have no split while others have one; fill the column, "
            "or split anew with --split-by file (or speaker, fold)"
        )
    if not any(record.split == "train" for record in dataset.records):
        raise DataError(
            f"{dataset.root}: no clip is left to train on; give the data a 'train' split, or split anew with "
            "--split-by file (or speaker, fold)"
        )
    if not any(record.split == "validation" for record in dataset.records):
        dataset = dataset.carve_validation(val_fraction, by=validate_by or by or "file", seed=seed)
    # Each border on its own: validation may share speakers with training, where it was to be carved otherwise.
    sides = (replace(record, split="test" if record.split == "test" else "train") for record in dataset.records)
    replace(dataset, records=tuple(sides)).check_disjoint(by)
    learnt = tuple(record for record in dataset.records if record.split != "test")
    replace(dataset, records=learnt).check_disjoint(None if validate_by == "file" else validate_by or by)
    dataset.check_trainable()
    return dataset


def count_table(dataset: Dataset) -> str:
    """Return the class-count report: one row per class, one column per split, totals last."""
    splits = [split for split in SPLITS if any(record.split == split for record in dataset.records)]
    counts = {split: dataset.select(split).class_counts() for split in splits}
    width = max(map(len, [*dataset.labels, "clips"]))
    rows = [f"{'class':<{width}}" + "".join(f"{split:>12}" for split in splits)]
    rows += [
        f"{label:<{width}}" + "".join(f"{counts[split][label]:>12}" for split in splits) for label in dataset.labels
    ]
    rows.append(f"{'clips':<{width}}" + "".join(f"{len(dataset.select(split)):>12}" for split in splits))
    return "\n".join(rows)


class ClipData(torch.utils.data.Dataset[Batch]):
    """The clips of one split, decoded once; maps a request to a batch.

    A network that takes pictures alone gets waveforms of one sample, and no sound is read.

    Args:
        dataset: the records, one per file.
        card: its front end says how ``load_audio`` reads, its length policy what is legal, its image front end how
            pictures are read.
        recipe: how training clips are changed.
        cache_gib: decoded waveforms and pictures kept in memory; those beyond that are decoded whenever they are
            needed.
        progress: show a bar while decoding.
        frames: of several pictures of a clip: in evaluation the ``middle`` one, or a view of ``all``; in training it is
            one at random.

    Raises:
        AudioDecodeError, ImageDecodeError: a file cannot be read; every file is read here, before any training.
        ClipLengthError: a clip is outside the length policy.
        DataError: a clip whose labels have weights is clipped, or, for a card of distributions, one has no weights; or
            a clip has no picture, and the network looks at them.
    """

    def __init__(
        self,
        dataset: Dataset,
        card: ModelCard,
        recipe: Recipe,
        *,
        cache_gib: float = 4.0,
        progress: bool = False,
        frames: Literal["middle", "all"] = "middle",
    ) -> None:
        if card.frontend is None and card.image is None:
            raise CardError(f"card {card.name!r} has no front end, so no way to read a clip", field="frontend")
        self.dataset = dataset
        self.card = card
        self.spec = card.frontend
        self.recipe = recipe
        distributed = card.task == "label_distribution"
        self.targets = torch.from_numpy(dataset.distributions() if distributed else dataset.multi_hot())
        known = dataset.known()
        self.known = None if known is None else torch.from_numpy(known).float()
        self._cache: list[Waveform | None] = []
        self.lengths: list[int] = []
        self.segment_shapes: list[tuple[int, ...]] = []
        self.frames = frames
        self._pictures: dict[Path, NDArray[np.uint8]] = {}
        _check_pictures(dataset, card)
        room = cache_gib * 2**30
        for index in tqdm(range(len(dataset)), desc="reading", unit="clip", disable=not progress, leave=False):
            waveform = self._read(index)
            room -= waveform.nbytes
            for path in dataset.records[index].images if card.image is not None else ():
                picture = crop_image(read_image(path), card.image)
                room -= picture.nbytes
                if room >= 0:
                    self._pictures[path] = picture
            clipped = count_clipped(waveform) if dataset.records[index].weights is not None else 0
            if clipped:
                raise DataError(
                    f"{dataset.records[index].file}: {clipped} clipped samples, so its parts no longer have the "
                    "weights the table says; mix it again at a lower level, or leave it out"
                )
            self._cache.append(waveform if room >= 0 else None)
            self.lengths.append(waveform.size)
            self.segment_shapes.append(self._segments(index, waveform).shape)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, request: _Request) -> Batch:
        if request.epoch is None:
            views = list(zip(request.indices, request.views, strict=True))
            rows = [self._segments(index, self._waveform(index))[segment] for index, (segment, _) in views]
            pictures = [self._shown(index)[frame] for index, (_, frame) in views]
        else:
            seeds = [(request.epoch, *one) for one in zip(request.indices, request.takes, strict=True)]
            rows = [self._changed(seed[1], request.num_samples, seed) for seed in seeds]
            pictures = [self._any_picture(seed) for seed in seeds]
        index = torch.tensor(request.indices)
        known = None if self.known is None else self.known[index]
        if request.epoch is None:
            unchanged = all(self.segment_shapes[clip][0] == 1 for clip in request.indices)
        else:
            whole = all(self.lengths[clip] == request.num_samples for clip in request.indices)
            unchanged = whole and not self.recipe.augmentation.changes_waveforms
        image = None if self.card.image is None else self._images([path for path in pictures if path is not None])
        return Batch(torch.from_numpy(np.stack(rows)), self.targets[index], index, known, unchanged, image)

    def views(self, index: int) -> list[tuple[int, int]]:
        """Return (segment, picture) of all that is answered for a clip in evaluation."""
        segments, frames = self.segment_shapes[index][0], len(self._shown(index))
        return [(segment, frame) for segment in range(segments) for frame in range(frames)]

    def _read(self, index: int) -> Waveform:
        return np.zeros(1, np.float32) if self.spec is None else load_audio(self.dataset.records[index].file, self.spec)

    def _waveform(self, index: int) -> Waveform:
        cached = self._cache[index]
        return self._read(index) if cached is None else cached

    def _shown(self, index: int) -> tuple[Path | None, ...]:
        """Return the pictures of a clip that evaluation looks at; None stands for the clip without one."""
        record = self.dataset.records[index]
        if self.card.image is None:
            return (None,)
        return record.images if self.frames == "all" else (record.image,)

    def _any_picture(self, seed: tuple[int, int, int]) -> Path | None:
        """Return a picture of the clip ``seed[1]``, drawn apart from its changes, so that these stay the same."""
        if self.card.image is None:
            return None
        images = self.dataset.records[seed[1]].images
        return images[int(np.random.default_rng((self.recipe.seed, *seed, 1)).integers(len(images)))]

    def _images(self, paths: Sequence[Path]) -> Tensor:
        spec = self.card.image
        assert spec is not None
        crops = [
            self._pictures[path] if path in self._pictures else crop_image(read_image(path), spec) for path in paths
        ]
        return torch.from_numpy(normalise_image(np.stack(crops), spec))

    def _segments(self, index: int, waveform: Waveform) -> Waveform:
        if self.spec is None:
            return waveform[None]
        try:
            return legal_segments(waveform, self.card)
        except ClipLengthError as error:
            raise ClipLengthError(f"{self.dataset.records[index].file}: {error}", code=error.code) from None

    def _changed(self, index: int, num_samples: int, seed: tuple[int, int, int]) -> Waveform:
        settings, epoch = self.recipe.augmentation, seed[0]
        if self.spec is None:
            return np.zeros(num_samples, np.float32)
        rng = np.random.default_rng((self.recipe.seed, *seed))
        waveform, repeat = self._waveform(index), self.card.length_policy.short == "repeat"
        if rng.random() >= settings.share * min(1.0, (epoch + 1) / (settings.ramp_epochs + 1)):
            return fit_length(waveform, num_samples, rng, repeat=repeat)
        return augment(
            waveform, settings, rng, sample_rate=self.spec.sample_rate, num_samples=num_samples, repeat=repeat
        )


def _share() -> tuple[int, int]:
    """Return (rank, number of processes) of distributed training, (0, 1) elsewhere."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


class TrainingBatches(Sampler[_Request]):
    """Requests for the batches of an epoch, in an order and of lengths that follow from (seed, epoch).

    Every clip comes once, or, where the recipe samples, as many as it says are drawn by class. Each process of
    distributed training gets every n-th batch. A last batch that is not full is left out where there is another
    (BatchNorm and the schedule want equal batches); the order changes, so no clip is lost for good.
    """

    def __init__(self, data: ClipData) -> None:
        self.data = data
        self.epoch = 0
        recipe = data.recipe
        sampling = recipe.sampling
        self._weights = self._by_class = None
        if sampling is not None and sampling.kind == "weighted":
            self._weights = sampling_weights(data.dataset, sampling)
        elif sampling is not None:
            self._by_class = ClassDraws(data.dataset, recipe.seed)
        self._by_clip = ClipDraws(len(data), recipe.seed)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next; Lightning calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return max(1, self._drawn_per_epoch() // self.data.recipe.batch_size // _share()[1])

    def _drawn_per_epoch(self) -> int:
        sampling = self.data.recipe.sampling
        return len(self.data) if sampling is None else sampling.clips_per_epoch or len(self.data)

    def _shuffled(self, rng: np.random.Generator) -> list[NDArray[np.int64]]:
        """Return the batches of an epoch in which no clip comes twice."""
        recipe = self.data.recipe
        if recipe.sampling is None or self._weights is None:
            order = rng.permutation(len(self.data))
        else:
            share = self._weights / self._weights.sum()
            drawn = rng.choice(len(share), self._drawn_per_epoch(), replace=recipe.sampling.replacement, p=share)
            # The likely ones are drawn first; batches should not know.
            order = rng.permutation(drawn)
        pool = recipe.sort_batches * recipe.batch_size
        if recipe.sort_batches > 1:
            lengths = np.asarray(self.data.lengths)
            parts = [order[start : start + pool] for start in range(0, len(order), pool)]
            order = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in parts])
        batches = [order[start : start + recipe.batch_size] for start in range(0, len(order), recipe.batch_size)]
        if len(batches) > 1 and len(batches[-1]) < recipe.batch_size:
            batches.pop()
        if recipe.augmentation.mixup_pairs:
            batches = [batch[: len(batch) // 2 * 2] for batch in batches]  # a lone batch may be odd
        return [batches[position] for position in rng.permutation(len(batches))]

    def _drawn(self, by_class: ClassDraws) -> list[NDArray[np.int64]]:
        """Return the batches of an epoch whose clips are drawn class by class, in every step or in every other one.

        The draws go on from epoch to epoch.
        """
        sampling, size, world = self.data.recipe.sampling, self.data.recipe.batch_size, _share()[1]
        alternating = sampling is not None and sampling.kind == "alternating"
        batches = []
        for number in range(self.epoch * len(self) * world, (self.epoch + 1) * len(self) * world):
            step, process = divmod(number, world)
            if alternating:
                # All processes of a step draw alike, so that it is steps that alternate.
                draws = self._by_clip if step % 2 else by_class
                number = step // 2 * world + process
            else:
                draws = by_class
            batches.append(draws(number * size, size))
        return batches

    def __iter__(self) -> Iterator[_Request]:
        recipe, rate = self.data.recipe, 1 if self.data.spec is None else self.data.spec.sample_rate
        rng = np.random.default_rng((recipe.seed, self.epoch))
        batches = self._shuffled(rng) if self._by_class is None else self._drawn(self._by_class)
        # Room for the slowed clips of a batch, save the longest of them, which lose their ends.
        room = 1.0 if recipe.augmentation.speed is None else recipe.augmentation.speed[0] ** -0.5
        requests = []
        seen: Counter[int] = Counter()
        for batch in batches:
            indices = tuple(int(index) for index in batch)
            takes = []
            for index in indices:
                takes.append(seen[index])
                seen[index] += 1
            longest = max(self.data.lengths[index] for index in indices) * room
            if recipe.seconds is not None:
                limit = (
                    recipe.seconds
                    if recipe.crop_seconds_min is None
                    else rng.uniform(recipe.crop_seconds_min, recipe.seconds)
                )
                longest = min(longest, limit * rate)
            requests.append(_Request(indices, self._legal(round(longest)), self.epoch, tuple(takes)))
        rank, world = _share()
        yield from requests[rank : len(self) * world : world]

    def _legal(self, num_samples: int) -> int:
        """Return a length the model takes, near ``num_samples`` and kind to the FFT."""
        card = self.data.card
        num_samples = next_fast_len(max(num_samples, card.min_samples), real=True)
        num_samples = -(-num_samples // card.length_policy.multiple_of) * card.length_policy.multiple_of
        return num_samples if card.length_policy.max is None else min(num_samples, card.length_policy.max)


class EvaluationBatches(Sampler[_Request]):
    """Requests for every clip once, unchanged, equal lengths together; each process sees all of them."""

    def __init__(self, data: ClipData, batch_size: int = 32) -> None:
        same: dict[int, list[tuple[int, tuple[int, int]]]] = defaultdict(list)
        for index, (_, num_samples) in enumerate(data.segment_shapes):
            same[num_samples] += [(index, view) for view in data.views(index)]
        self._requests = [
            _Request(tuple(i for i, _ in group), num_samples, views=tuple(view for _, view in group))
            for num_samples, rows in sorted(same.items())
            for group in (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))
        ]

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[_Request]:
        return iter(self._requests)


def _check_pictures(dataset: Dataset, card: ModelCard) -> None:
    """Refuse clips without a picture where the network looks at them.

    Raises:
        DataError: names the first.
    """
    bare = [dataset.name_of(record) for record in dataset.records if not record.images]
    if card.image is not None and bare:
        raise DataError(
            f"{dataset.root}: {len(bare)} clips have no picture, e.g. {bare[0]!r}, and {card.name!r} looks at them; "
            "give each one in the column 'image' of metadata.csv, or use a model of sound alone (audioonly)"
        )


def _check_crops(recipe: Recipe, card: ModelCard) -> None:
    """Refuse crops that are shorter than the network takes, unless the recipe says that clips are to be filled.

    Raises:
        SpecError: says how short they may be.
    """
    field = "seconds" if recipe.crop_seconds_min is None else "crop_seconds_min"
    shortest = getattr(recipe, field)
    if shortest is None or recipe.min_seconds is not None or card.frontend is None:
        return
    num_samples = round(shortest * card.sample_rate)
    if num_samples < card.min_samples:
        raise SpecError(
            f"{field}: got {shortest} s, {num_samples} samples; {card.architecture!r} takes clips of at least "
            f"{card.min_samples} samples ({card.min_samples / card.sample_rate:.3f} s); train on longer crops, or set "
            "min_seconds to fill shorter clips",
            field=field,
        )


class ClipDataModule(lightning.LightningDataModule):
    """The splits of a data set as Lightning takes them.

    Args:
        dataset: every record in a split, as :func:`split_dataset` returns it.
        card, recipe, progress: see :class:`ClipData`.
        cache_gib: shared out between the splits by their sizes.
        workers: processes that prepare batches; 0 prepares them in the training process, best for small sets.
    """

    def __init__(
        self,
        dataset: Dataset,
        card: ModelCard,
        recipe: Recipe,
        *,
        cache_gib: float = 4.0,
        workers: int = 0,
        progress: bool = False,
    ) -> None:
        super().__init__()
        self.workers = workers
        train = dataset.select("train")
        # What cannot be drawn is refused before a clip is read.
        if recipe.sampling is not None and recipe.sampling.kind == "weighted":
            sampling_weights(train, recipe.sampling)
        elif recipe.sampling is not None:
            ClassDraws(train, recipe.seed)
        if recipe.augmentation.mixup_pairs and len(train) < 2:
            raise DataError(f"{dataset.root}: got {len(train)} training clip; mixing pairs needs at least 2")
        _check_crops(recipe, card)
        self.parts = {
            split: ClipData(part, card, recipe, cache_gib=cache_gib * len(part) / len(dataset), progress=progress)
            for split in ("train", "validation")
            for part in [dataset.select(split)]
        }

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the batches of an epoch."""
        data = self.parts["train"]
        return DataLoader(data, batch_size=None, sampler=TrainingBatches(data), num_workers=self.workers)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the validation clips, unchanged."""
        return evaluation_loader(self.parts["validation"], workers=self.workers)


def evaluation_loader(data: ClipData, *, workers: int = 0) -> DataLoader[Any]:
    """Return the clips of ``data`` unchanged, in batches of equal length."""
    return DataLoader(data, batch_size=None, sampler=EvaluationBatches(data), num_workers=workers)
