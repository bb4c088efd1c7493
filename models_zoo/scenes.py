"""Scenes: labelled sounds at known times on a background, as data for sound event detection.

In the spirit of Scaper (Salamon et al. 2017), whose scenes make up the synthetic part of DESED: every event is a
recording of one class, or one of the built-in sounds, cut and faded, placed at random and brought to a stated ratio
above the background. Onsets and offsets are therefore exact. Levels are root mean squares, not loudness.

What is known of a scene is its part: ``strong`` (events with their times), ``weak`` (classes) or ``unlabelled``.
Scenes for training are made of training recordings alone, those for test of test recordings, and so on.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import soundfile
from numpy.typing import NDArray
from pydantic import Field, Strict, model_validator
from tqdm import tqdm

from models_zoo.audio import load_audio
from models_zoo.dataset import Dataset, Part, Record, read_dataset
from models_zoo.errors import DataError, SpecError, UnknownNameError
from models_zoo.files import check_writable, replacing
from models_zoo.schema import Declaration
from models_zoo.soundscapes import CLASSES, check_seed, render
from models_zoo.specs import FrontendSpec

__all__ = ["SceneSettings", "trimmed", "write_scenes"]

_Waveform = NDArray[np.float32]
_Range = Annotated[tuple[float, float], Strict(False)]

_Sound = Callable[[float, np.random.Generator], tuple[_Waveform, str]]
"""(seconds, generator) -> waveform of at most that length, and the name of what it was cut from."""

_FADE = 0.01  # seconds at either end of an event
_BACKGROUND_DB = (-50.0, -30.0)
_PEAK = 0.95
_TRIM_DB = 40.0
_TRIM_FRAME = 0.01  # seconds
_TRIES = 30

_KINDS: dict[str, tuple[str, Part]] = {
    "strong": ("train", "strong"),
    "weak": ("train", "weak"),
    "unlabelled": ("train", "unlabelled"),
    "validation": ("validation", "strong"),
    "test": ("test", "strong"),
}


class SceneSettings(Declaration):
    """What a scene is like.

    Attributes:
        seconds: its length.
        events: (fewest, most) events; one that finds no free place is left out.
        event_seconds: (shortest, longest) event; a longer recording is cut to a random length between them, a shorter
            one than the shortest is used whole.
        snr_db: (lowest, highest) level of an event above the background, both as root mean squares.
        max_polyphony: most events that sound at once; two of one class never overlap.
    """

    seconds: float = Field(default=10.0, ge=0.5)
    events: Annotated[tuple[int, int], Strict(False)] = (1, 5)
    event_seconds: _Range = (0.25, 3.0)
    snr_db: _Range = (6.0, 30.0)
    max_polyphony: int = Field(default=2, ge=1)

    @model_validator(mode="after")
    def _check(self) -> SceneSettings:
        for name, least in (("events", 0), ("event_seconds", 0.05), ("snr_db", -60)):
            low, high = getattr(self, name)
            if not least <= low <= high:
                raise SpecError(f"{name}: got {low}, {high}; expected (lowest, highest), from {least}", field=name)
        if self.event_seconds[1] > self.seconds:
            raise SpecError(
                f"event_seconds: got {self.event_seconds[1]} s in scenes of {self.seconds} s; expected no longer ones",
                field="event_seconds",
            )
        return self


@dataclass(frozen=True)
class _Scene:
    """A scene and what is in it.

    Attributes:
        waveform: ``(num_samples,)`` float32 in [-1, 1].
        events: (label, onset, offset in seconds, name of the recording), by onset.
        background: name of its recording, or "" for noise.
    """

    waveform: _Waveform
    events: tuple[tuple[str, float, float, str], ...]
    background: str = ""


@dataclass(frozen=True)
class _Material:
    """What scenes of one split are made of.

    Attributes:
        sounds: label -> what makes sounds of it.
        backgrounds: (waveform, name); empty for noise.
    """

    sounds: Mapping[str, Sequence[_Sound]]
    backgrounds: Sequence[tuple[_Waveform, str]] = field(default=())


def trimmed(waveform: _Waveform, sample_rate: int) -> _Waveform:
    """Return ``waveform`` ``(num_samples,)`` without the silence before and after the sound, at least one frame of it.

    Silence is what lies 40 dB below the loudest frame of 10 ms. What sounds once and fades, a struck bell, ends there.
    """
    length = max(round(_TRIM_FRAME * sample_rate), 1)
    count = -(-waveform.size // length)
    frames = np.pad(waveform, (0, count * length - waveform.size)).reshape(count, length)
    power = np.mean(np.square(frames, dtype=np.float64), axis=1)
    loud = np.flatnonzero(power > power.max() * 10 ** (-_TRIM_DB / 10))
    return waveform if not loud.size else waveform[loud[0] * length : (loud[-1] + 1) * length]


def _make(material: _Material, settings: SceneSettings, sample_rate: int, rng: np.random.Generator) -> _Scene:
    """Return one scene; everything in it follows from ``rng``."""
    num_samples = round(settings.seconds * sample_rate)
    scene, background = _background(material, num_samples, rng)
    level = float(np.sqrt(np.mean(np.square(scene))))
    events: list[tuple[str, float, float, str]] = []
    taken: list[tuple[str, int, int]] = []
    labels = sorted(material.sounds)
    for _ in range(int(rng.integers(settings.events[0], settings.events[1] + 1))):
        label = labels[int(rng.integers(len(labels)))]
        sources = material.sounds[label]
        sound, name = sources[int(rng.integers(len(sources)))](float(rng.uniform(*settings.event_seconds)), rng)
        sound = sound[:num_samples]
        start = _free_place(label, sound.size, num_samples, taken, settings.max_polyphony, rng)
        gain = level * 10 ** (rng.uniform(*settings.snr_db) / 20)
        if start is None:
            continue
        fade = min(round(_FADE * sample_rate), sound.size // 2)
        ramp = np.sin(np.linspace(0, np.pi / 2, fade, endpoint=False)) ** 2
        shaped = sound.astype(np.float64)
        shaped[:fade] *= ramp
        shaped[sound.size - fade :] *= ramp[::-1]
        shaped *= gain / max(float(np.sqrt(np.mean(np.square(shaped)))), 1e-12)
        scene[start : start + sound.size] += shaped
        taken.append((label, start, start + sound.size))
        events.append((label, start / sample_rate, (start + sound.size) / sample_rate, name))
    scene *= min(1.0, _PEAK / max(float(np.abs(scene).max()), 1e-12))
    return _Scene(scene.astype(np.float32), tuple(sorted(events, key=lambda event: event[1:3])), background)


def write_scenes(
    folder: str | Path,
    frontend: FrontendSpec,
    *,
    counts: Mapping[str, int],
    data: Sequence[str | Path] = (),
    classes: Sequence[str] = (),
    background: str | Path | None = None,
    settings: SceneSettings | None = None,
    seed: int = 0,
    force: bool = False,
    progress: bool = False,
) -> Path:
    """Write scenes with their ``metadata.csv``; return the path of the table.

    The same arguments give the same scenes, and scene i of a kind does not depend on how many there are.

    Args:
        folder: made if missing; ``strong/*.wav`` (16 bit) and so on, and ``metadata.csv`` (file, label, onset, offset,
            split, part, sources): a row per event in strong scenes, one per scene in others.
        frontend: says how recordings are read; its rate is that of the scenes.
        counts: of ``strong``, ``weak`` and ``unlabelled`` scenes for training, and of ``validation`` and ``test``
            scenes, which are strong; what is left out is 0.
        data: folders or tables of recordings with one label each, see :func:`models_zoo.dataset.read_dataset`; their
            classes are put together. none for the built-in sounds.
        classes: those of them to use; none for all.
        background: like ``data``, its labels unused; None for white to brown noise.
        settings: what a scene is like.
        seed: of everything random.
        force: replace an earlier folder's table and scenes.
        progress: show bars on standard error.

    Raises:
        DataError: impossible counts, recordings that are silent or of several labels, or a class without one in a
            split that is asked for.
        UnknownNameError: a class that there is not.
        AudioDecodeError: a recording cannot be read.
        OutputExistsError, OutputWriteError: the table exists and ``force`` is false, or a write failed.
    """
    settings = settings or SceneSettings()
    strangers = sorted(set(counts) - set(_KINDS))
    if strangers or any(count < 0 for count in counts.values()) or not sum(counts.values()):
        raise DataError(f"got scenes {dict(counts)}; expected numbers of {', '.join(_KINDS)}, at least one above 0")
    check_seed(seed)
    folder = Path(folder)
    table = folder / "metadata.csv"
    check_writable(table, force=force)
    splits = sorted({_KINDS[kind][0] for kind, count in counts.items() if count})
    material = _materials(splits, data, classes, background, frontend, seed, progress)
    rows: list[tuple[str, ...]] = []
    bar = tqdm(
        total=sum(counts.values()), desc="mixing", unit="scene", file=sys.stderr, disable=not progress, leave=False
    )
    # Until the new table is whole there is none: an interrupted run must not leave old labels beside new clips.
    table.unlink(missing_ok=True)
    with bar:
        for position, (kind, (split, part)) in enumerate(_KINDS.items()):
            for index in range(counts.get(kind, 0)):
                rng = np.random.default_rng([seed, position, index])
                scene = _make(material[split], settings, frontend.sample_rate, rng)
                name = f"{kind}/{index:05d}.wav"
                with replacing(folder / name, force=force) as partial:
                    soundfile.write(partial, scene.waveform, frontend.sample_rate, subtype="PCM_16", format="WAV")
                rows += _rows(name, scene, split, part)
                bar.update()
    with replacing(table, force=force) as partial, open(partial, "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("file", "label", "onset", "offset", "split", "part", "sources"))
        writer.writerows(rows)
    return table


def _rows(name: str, scene: _Scene, split: str, part: Part) -> list[tuple[str, ...]]:
    """Return the rows of a scene: of what its part says is known of it."""
    sources = ";".join(source for source in (scene.background, *(event[3] for event in scene.events)) if source)
    labels = ";".join(sorted({event[0] for event in scene.events}))
    if part == "strong" and scene.events:
        return [
            (name, label, f"{onset:.6f}", f"{offset:.6f}", split, part, source)
            for label, onset, offset, source in scene.events
        ]
    if part == "weak" and not labels:
        part = "strong"  # a scene without events is fully known
    return [(name, labels if part == "weak" else "", "", "", split, part, sources)]


def _background(material: _Material, num_samples: int, rng: np.random.Generator) -> tuple[NDArray[np.float64], str]:
    """Return ``(num_samples,)`` of background at a random level, and its name."""
    name = ""
    if material.backgrounds:
        recording, name = material.backgrounds[int(rng.integers(len(material.backgrounds)))]
        start = int(rng.integers(max(recording.size - num_samples, 0) + 1))
        sound = np.resize(recording[start : start + num_samples], num_samples).astype(np.float64)
    else:
        spectrum = np.fft.rfft(rng.standard_normal(num_samples))
        colour = np.maximum(np.arange(len(spectrum)), 1) ** rng.uniform(0, 1)
        sound = np.fft.irfft(spectrum / colour, num_samples)
    level = 10 ** (rng.uniform(*_BACKGROUND_DB) / 20)
    return sound * (level / max(float(np.sqrt(np.mean(np.square(sound)))), 1e-12)), name


def _free_place(
    label: str,
    length: int,
    num_samples: int,
    taken: Sequence[tuple[str, int, int]],
    max_polyphony: int,
    rng: np.random.Generator,
) -> int | None:
    """Return a random start at which an event overlaps none of its class and not too many others, or None."""
    for _ in range(_TRIES):
        start = int(rng.integers(num_samples - length + 1))
        beside = [(other, a, b) for other, a, b in taken if a <= start + length and start <= b]
        # Most sound at once where one of them begins.
        begun = [start, *(a for _, a, _ in beside if a > start)]
        together = max(sum(a <= at < b for _, a, b in beside) for at in begun)
        if all(other != label for other, _, _ in beside) and together < max_polyphony:
            return start
    return None


def _materials(
    splits: Sequence[str],
    data: Sequence[str | Path],
    classes: Sequence[str],
    background: str | Path | None,
    frontend: FrontendSpec,
    seed: int,
    progress: bool,
) -> dict[str, _Material]:
    """Return what the scenes of every split asked for are made of."""
    sets = [read_dataset(one).single_sources(seed=seed) for one in data]
    there = {label for dataset in sets for label in dataset.labels} if sets else set(CLASSES)
    for label in classes:
        if label not in there:
            raise UnknownNameError("class", label, there)
    wanted = set(classes) or there
    behind = None if background is None else read_dataset(background).single_sources(seed=seed)
    materials = {}
    for split in splits:
        if sets:
            sounds: dict[str, list[_Sound]] = defaultdict(list)
            for dataset in sets:
                used = tuple(record for record in dataset.records if record.labels[0] in wanted)
                for record, waveform in _read(replace(dataset, records=used), split, frontend, progress):
                    name = f"{dataset.root.name}/{dataset.name_of(record)}"
                    sounds[record.labels[0]].append(_cut(trimmed(waveform, frontend.sample_rate), name, frontend))
            absent = sorted(wanted - set(sounds))
            if absent:
                raise DataError(
                    f"{', '.join(map(str, data))}: split {split!r} has no recording of {', '.join(absent)}, so its "
                    "scenes would have no such event; add some, or take the class out"
                )
        else:
            sounds = {label: [_rendered(label, frontend.sample_rate)] for label in sorted(wanted)}
        heard = () if behind is None else _read(behind, split, frontend, progress)
        materials[split] = _Material(
            sounds, [(waveform, behind.name_of(record)) for record, waveform in heard] if behind is not None else ()
        )
    return materials


def _read(dataset: Dataset, split: str, frontend: FrontendSpec, progress: bool) -> list[tuple[Record, _Waveform]]:
    """Return the recordings of a split, none of them silent."""
    found = []
    records = dataset.select(split).records
    for record in tqdm(records, desc="reading", unit="file", file=sys.stderr, disable=not progress, leave=False):
        waveform = load_audio(record.file, frontend)
        if not waveform.any():
            raise DataError(f"{record.file}: is silent, so it has no level above or below another; leave it out")
        found.append((record, waveform))
    return found


def _cut(waveform: _Waveform, name: str, frontend: FrontendSpec) -> _Sound:
    """Return a function that cuts a stretch of at most so many seconds from a recording."""

    def cut(seconds: float, rng: np.random.Generator) -> tuple[_Waveform, str]:
        length = min(round(seconds * frontend.sample_rate), waveform.size)
        start = int(rng.integers(waveform.size - length + 1))
        return waveform[start : start + length], name

    return cut


def _rendered(label: str, sample_rate: int) -> _Sound:
    """Return a function that makes one of the built-in sounds of so many seconds."""

    def rendered(seconds: float, rng: np.random.Generator) -> tuple[_Waveform, str]:
        return render(label, seconds, sample_rate, rng), f"built-in {label}"

    return rendered
