"""Overlapped words from a folder of spoken ones: clips in which two or three sound at once, in shares that are known.

A clip is a weighted sum of utterances of different classes, each brought to the same level (unit RMS) before, so that
the weights can be heard: x = sum of w_k s_k with w_k > 0, one in sum, and its label is the weights. Faint noise lies
under it, since front ends that look at a whole clip see little else than digital silence. The published task
(classification of overlapped speech, MRMS) states how its label distributions are scored and not how they were drawn;
this reading is ours.

A sum of two clips that is clipped holds its parts in other shares than it says. Mixtures are therefore scaled as a
whole, below full scale, and :func:`count_clipped` finds those of others that were not.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from models_zoo.audio import load_audio
from models_zoo.dataset import Dataset, Record, read_dataset
from models_zoo.errors import DataError
from models_zoo.files import check_writable, replacing
from models_zoo.soundscapes import check_seed
from models_zoo.specs import FrontendSpec

__all__ = ["count_clipped", "mix", "write_mixtures"]

_Waveform = NDArray[np.float32]

_SPLIT_PATTERN = ("train", "train", "test", "train", "train", "validation", "train", "train", "test", "train")
_LEAST_WEIGHT = 0.1
_PEAK_DB = (-12.0, -1.0)
_NOISE_DB = (-60.0, -40.0)
_FULL_SCALE = 1 - 2**-15
_RUN = 3  # a single sample at full scale is a peak that happens to reach it


def count_clipped(waveform: ArrayLike) -> int:
    """Return how many samples of ``waveform`` ``(num_samples,)`` in [-1, 1] lie in flat tops at full scale.

    A flat top is three samples or more in a row that reach the largest value of 16 bits.
    """
    beyond = np.abs(np.asarray(waveform)) >= _FULL_SCALE
    edges = np.flatnonzero(np.diff(beyond, prepend=False, append=False))
    lengths = edges[1::2] - edges[::2]
    return int(lengths[lengths >= _RUN].sum())


def mix(
    utterances: Sequence[_Waveform], weights: Sequence[float], starts: Sequence[int], num_samples: int
) -> _Waveform:
    """Return the weighted sum of utterances, each at unit RMS before, scaled to a peak of one half.

    Args:
        utterances: each ``(any,)`` float32, not silent; one that is longer than the clip loses its end.
        weights: one per utterance, above 0.
        starts: sample at which each begins.
        num_samples: length of the result.

    Returns:
        ``(num_samples,)`` float32 in [-0.5, 0.5].

    Raises:
        DataError: an utterance is silent, so that no weight could be heard.
    """
    clip = np.zeros(num_samples, np.float64)
    for utterance, weight, start in zip(utterances, weights, starts, strict=True):
        part = utterance[: num_samples - start]
        level = float(np.sqrt(np.mean(np.square(part, dtype=np.float64))))
        if level == 0:
            raise DataError("got a silent utterance; a mixture of it has no share that could be heard")
        clip[start : start + part.size] += weight / level * part
    return np.asarray(clip * (0.5 / np.abs(clip).max()), np.float32)


def write_mixtures(
    data: str | Path,
    folder: str | Path,
    frontend: FrontendSpec,
    *,
    num_clips: int,
    seed: int = 0,
    seconds: float = 1.0,
    words: tuple[int, int] = (2, 3),
    force: bool = False,
    progress: bool = False,
) -> Path:
    """Write mixtures of labelled recordings with their ``metadata.csv``; return the path of the table.

    The same arguments give the same clips, and clip i does not depend on ``num_clips``. Of every ten clips seven are
    ``train``, one ``validation`` and two ``test``, each made of recordings of that split alone: of the declared ones,
    where the data has them, and otherwise of a split by file. A missing validation split is carved from ``train``.

    Args:
        data: folder or table of recordings with one label each, see :func:`models_zoo.dataset.read_dataset`.
        folder: made if missing; ``audio/*.wav`` (16 bit) and ``metadata.csv`` (file, label, weights, split, sources).
        frontend: says how recordings are read; its rate is that of the mixtures.
        num_clips: at least 10, so that every split has one.
        seed: of everything random.
        seconds: length of each clip, at least 0.1; utterances lie anywhere in it.
        words: fewest and most utterances in a clip, all of different classes.
        force: replace an earlier folder's table and clips.
        progress: show bars on standard error.

    Raises:
        DataError: impossible arguments, recordings with several labels, silent or clipped ones, or too few classes.
        AudioDecodeError: a recording cannot be read.
        OutputExistsError, OutputWriteError: the table exists and ``force`` is false, or a write failed.
    """
    fewest, most = words
    if num_clips < 10 or seconds < 0.1 or not 1 <= fewest <= most or most * _LEAST_WEIGHT > 1:
        raise DataError(
            f"got num_clips={num_clips}, seconds={seconds}, words={words}; expected at least 10 clips, 0.1 s, and "
            f"(fewest, most) words of 1 to {int(1 / _LEAST_WEIGHT)}"
        )
    check_seed(seed)
    folder = Path(folder)
    table = folder / "metadata.csv"
    check_writable(table, force=force)
    dataset = read_dataset(data).single_sources(seed=seed)
    waveforms = _read(dataset, frontend, progress)
    sources = {split: _by_class(dataset, split, most) for split in set(_SPLIT_PATTERN)}
    # Until the new table is whole there is none: an interrupted run must not leave old labels beside new clips.
    table.unlink(missing_ok=True)
    rows = []
    for index in tqdm(range(num_clips), desc="mixing", unit="clip", file=sys.stderr, disable=not progress, leave=False):
        rng = np.random.default_rng([seed, index])
        split = _SPLIT_PATTERN[index % len(_SPLIT_PATTERN)]
        count = int(rng.integers(fewest, most + 1))
        labels = [str(label) for label in rng.permutation(sorted(sources[split]))[:count]]
        records = [sources[split][label][int(rng.integers(len(sources[split][label])))] for label in labels]
        shares = _shares(count, rng)
        utterances = [waveforms[dataset.name_of(record)] for record in records]
        num_samples = round(seconds * frontend.sample_rate)
        starts = [int(rng.integers(max(num_samples - utterance.size, 0) + 1)) for utterance in utterances]
        clip = mix(utterances, [float(share) for share in shares], starts, num_samples)
        noise = rng.standard_normal(num_samples) * clip.std() * 10 ** (rng.uniform(*_NOISE_DB) / 20)
        clip = (clip + noise) * (10 ** (rng.uniform(*_PEAK_DB) / 20) / np.abs(clip + noise).max())
        name = f"audio/{index:05d}.wav"
        with replacing(folder / name, force=force) as partial:
            soundfile.write(partial, clip, frontend.sample_rate, subtype="PCM_16", format="WAV")
        names = ";".join(dataset.name_of(record) for record in records)
        rows.append((name, ";".join(labels), ";".join(shares), split, names))
    with replacing(table, force=force) as partial, open(partial, "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("file", "label", "weights", "split", "sources"))
        writer.writerows(rows)
    return table


def _read(dataset: Dataset, frontend: FrontendSpec, progress: bool) -> dict[str, _Waveform]:
    """Return name -> waveform of every recording, refusing those that are of no use in a mixture."""
    waveforms = {}
    for record in tqdm(
        dataset.records, desc="reading", unit="file", file=sys.stderr, disable=not progress, leave=False
    ):
        waveform = load_audio(record.file, frontend)
        clipped = count_clipped(waveform)
        if clipped or not waveform.any():
            what = f"has {clipped} clipped samples" if clipped else "is silent"
            raise DataError(
                f"{record.file}: {what}; its level, and so its share of a mixture, is unknown: leave it out"
            )
        waveforms[dataset.name_of(record)] = waveform
    return waveforms


def _by_class(dataset: Dataset, split: str, most: int) -> dict[str, list[Record]]:
    """Return label -> recordings of one split."""
    classes: dict[str, list[Record]] = defaultdict(list)
    for record in dataset.select(split).records:
        classes[record.labels[0]].append(record)
    if len(classes) < most:
        raise DataError(
            f"{dataset.root}: split {split!r} has recordings of {len(classes)} classes; mixtures of {most} words need "
            "as many; add recordings, or ask for fewer words"
        )
    return classes


def _shares(count: int, rng: np.random.Generator) -> list[str]:
    """Return weights of three decimals, one in sum, drawn evenly from all in which none is below a tenth."""
    free = round(1000 * (1 - count * _LEAST_WEIGHT))
    cuts = np.sort(rng.integers(0, free + 1, count - 1))
    parts = np.diff(np.concatenate([[0], cuts, [free]])) + round(1000 * _LEAST_WEIGHT)
    return [f"{part / 1000:.3f}" for part in parts]
