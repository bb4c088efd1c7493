"""A generator of small labelled soundscapes: ten synthetic sounds at known times on a quiet background.

Nothing to download, no licence to mind; times are exact, so the same folder serves clip labels and event
detection. Pitch, length, place, level and background differ from clip to clip.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from models_zoo.errors import DataError, UnknownNameError
from models_zoo.files import check_writable, replacing

__all__ = ["CLASSES", "check_seed", "render", "render_clip", "write_soundscapes"]

_Signal = NDArray[np.float64]
_SPLIT_PATTERN = ("train", "test", "train", "validation", "train")


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _sine(frequency: _Signal | float, time: _Signal) -> _Signal:
    """Return a sine whose frequency in Hz may move over ``time`` in seconds."""
    step = float(time[1] - time[0]) if len(time) > 1 else 0.0
    cycles = np.cumsum(np.broadcast_to(frequency, time.shape)) * step
    return np.asarray(np.sin(2 * np.pi * cycles), np.float64)


def _pulses(time: _Signal, starts: Sequence[float], one: Callable[[_Signal], _Signal]) -> _Signal:
    """Return the sum of ``one`` (a function of the time since its start) begun at each of ``starts``."""
    signal = np.zeros_like(time)
    for start in starts:
        since = time[time >= start] - start
        signal[len(time) - len(since) :] += one(since)
    return signal


def _train_of_starts(time: _Signal, rate: float, rng: np.random.Generator) -> list[float]:
    starts = np.arange(0.0, float(time[-1]) if len(time) else 0.0, 1 / rate)
    return [max(0.0, float(start + rng.uniform(-0.08, 0.08) / rate)) for start in starts]


def _tone(time: _Signal, rng: np.random.Generator) -> _Signal:
    pitch = _log_uniform(rng, 250, 2500)
    return _sine(pitch, time) + rng.uniform(0, 0.3) * _sine(2 * pitch, time)


def _sweep(time: _Signal, rng: np.random.Generator, upward: bool) -> _Signal:
    low = _log_uniform(rng, 200, 900)
    ends = (low, low * _log_uniform(rng, 2.5, 5))
    start, end = ends if upward else ends[::-1]
    return _sine(start * (end / start) ** (time / max(float(time[-1]), 1e-9)), time)


def _knock(time: _Signal, rng: np.random.Generator) -> _Signal:
    pitch, decay = _log_uniform(rng, 90, 260), rng.uniform(0.015, 0.04)
    starts = _train_of_starts(time, rng.uniform(4, 8), rng)
    return _pulses(time, starts, lambda since: np.exp(-since / decay) * np.sin(2 * np.pi * pitch * since))


def _noise_burst(time: _Signal, rng: np.random.Generator) -> _Signal:
    noise = rng.standard_normal(len(time))
    return np.asarray(noise * np.exp(-time / rng.uniform(0.1, 0.6)), np.float64)


def _chirps(time: _Signal, rng: np.random.Generator) -> _Signal:
    pitch, rise, length = _log_uniform(rng, 1800, 4000), rng.uniform(8000, 20000), rng.uniform(0.04, 0.07)

    def chirp(since: _Signal) -> _Signal:
        envelope = np.where(since < length, np.sin(np.pi * np.minimum(since / length, 1)), 0)
        return np.asarray(envelope * np.sin(2 * np.pi * (pitch + rise * since / 2) * since), np.float64)

    return _pulses(time, _train_of_starts(time, rng.uniform(7, 11), rng), chirp)


def _clicks(time: _Signal, rng: np.random.Generator) -> _Signal:
    pitch = _log_uniform(rng, 2500, 6000)
    starts = _train_of_starts(time, rng.uniform(12, 25), rng)
    return _pulses(time, starts, lambda since: np.exp(-since / 0.0012) * np.cos(2 * np.pi * pitch * since))


def _bell(time: _Signal, rng: np.random.Generator) -> _Signal:
    pitch, decay = _log_uniform(rng, 400, 1200), rng.uniform(0.25, 0.6)
    signal = np.zeros_like(time)
    for ratio in (1.0, 2.0, 2.76, 4.07, 5.4):
        signal += np.exp(-time * ratio**0.7 / decay) * _sine(pitch * ratio, time) / ratio**0.5
    return signal


def _buzz(time: _Signal, rng: np.random.Generator) -> _Signal:
    pitch = _log_uniform(rng, 70, 180)
    highest = int(4000 / pitch)
    signal = np.zeros_like(time)
    for harmonic in range(1, highest + 1):
        signal += _sine(pitch * harmonic, time) / harmonic**0.5
    return signal


def _whistle(time: _Signal, rng: np.random.Generator) -> _Signal:
    pitch, depth, speed = _log_uniform(rng, 900, 2500), rng.uniform(0.04, 0.08), rng.uniform(5, 9)
    breath = rng.standard_normal(len(time)) * 0.05
    return _sine(pitch * (1 + depth * np.sin(2 * np.pi * speed * time)), time) + breath


_SOUNDS: dict[str, Callable[[_Signal, np.random.Generator], _Signal]] = {
    "bell": _bell,
    "buzz": _buzz,
    "chirps": _chirps,
    "clicks": _clicks,
    "knock": _knock,
    "noise_burst": _noise_burst,
    "sweep_down": lambda time, rng: _sweep(time, rng, upward=False),
    "sweep_up": lambda time, rng: _sweep(time, rng, upward=True),
    "tone": _tone,
    "whistle": _whistle,
}

CLASSES = tuple(_SOUNDS)
"""Names of the sounds, sorted."""


def render(label: str, seconds: float, sample_rate: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return one sound: ``(round(seconds * sample_rate),)`` float32 with its largest sample at +-1.

    Args:
        label: one of :data:`CLASSES`.
        seconds: length, above 0.
        sample_rate: Hz, at least 16000 (the sounds reach up to 7 kHz).
        rng: source of pitch, speed and decay.

    Raises:
        UnknownNameError: no such sound.
        DataError: an impossible length or rate.
    """
    if label not in _SOUNDS:
        raise UnknownNameError("sound", label, CLASSES)
    num_samples = round(seconds * sample_rate)
    if num_samples < 2 or sample_rate < 16000:
        raise DataError(f"got {seconds} s at {sample_rate} Hz; expected more than one sample, at 16000 Hz or more")
    time = np.arange(num_samples) / sample_rate
    signal = _SOUNDS[label](time, rng)
    fade = min(round(0.005 * sample_rate), num_samples // 2)
    ramp = np.sin(np.linspace(0, np.pi / 2, fade)) ** 2
    signal[:fade] *= ramp
    signal[num_samples - fade :] *= ramp[::-1]
    return (signal / max(float(np.abs(signal).max()), 1e-9)).astype(np.float32)


def render_clip(
    labels: Sequence[str], seconds: float, sample_rate: int, rng: np.random.Generator
) -> tuple[NDArray[np.float32], list[tuple[str, float, float]]]:
    """Return a clip with one sound per label on a quiet background, and (label, onset, offset in seconds) of each.

    The waveform is ``(round(seconds * sample_rate),)`` float32 in [-1, 1]; sounds may overlap. Each stands 6 to
    30 dB above the background, which is white to pink noise at -66 to -46 dB of full scale.
    """
    num_samples = round(seconds * sample_rate)
    tint = rng.uniform(0, 0.5)
    spectrum = np.fft.rfft(rng.standard_normal(num_samples))
    background = np.fft.irfft(spectrum / np.maximum(np.arange(len(spectrum)), 1) ** tint, num_samples)
    background *= 10 ** (rng.uniform(-66, -46) / 20) / max(float(background.std()), 1e-12)
    level = float(background.std())
    clip = background
    events = []
    for label in labels:
        length = float(rng.uniform(min(0.35, 0.4 * seconds), min(1.0, 0.8 * seconds)))
        sound = render(label, length, sample_rate, rng).astype(np.float64)
        first = int(rng.integers(0, num_samples - len(sound) + 1))
        gain = level * 10 ** (rng.uniform(6, 30) / 20) / max(float(sound.std()), 1e-9)
        clip[first : first + len(sound)] += gain * sound
        events.append((label, first / sample_rate, (first + len(sound)) / sample_rate))
    return np.clip(clip, -1, 1).astype(np.float32), sorted(events, key=lambda event: event[1:])


def check_seed(seed: object) -> None:
    """Refuse what no chance can be drawn from.

    Raises:
        DataError: not a whole number, or below 0.
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise DataError(f"seed: got {seed!r}; expected a whole number, 0 or more")


def write_soundscapes(
    folder: str | Path,
    *,
    num_clips: int,
    seed: int = 0,
    sample_rate: int = 32000,
    seconds: float = 2.0,
    events_per_clip: int = 1,
    classes: Sequence[str] = CLASSES,
    class_folders: bool = False,
    force: bool = False,
) -> Path:
    """Write labelled clips and their ``metadata.csv``; return the path of the table, or of the folder without one.

    The same arguments give the same clips, and clip i does not depend on ``num_clips``. Classes are balanced.
    Of every five clips of a class three are ``train``, one ``test``, one ``validation``.

    Args:
        folder: made if missing; ``audio/*.wav`` (16 bit) and ``metadata.csv`` (file, label, split, onset, offset).
        num_clips: at least 1; ten per class and more are needed for every split to have every class.
        seed: of everything random.
        sample_rate: Hz, at least 16000.
        seconds: length of each clip, at least 0.5.
        events_per_clip: with 1, every clip holds one sound; with more, 1 to that many different ones, in several
            rows per file.
        classes: the sounds to use, from :data:`CLASSES`.
        class_folders: write ``train/bell/00000.wav`` and so on, without a table; one sound per clip then.
        force: replace an earlier folder's table and clips.

    Raises:
        DataError, UnknownNameError: impossible arguments.
        OutputExistsError, OutputWriteError: the table (or the first clip) exists and ``force`` is false, or a write
            failed.
    """
    for label in classes:
        if label not in _SOUNDS:
            raise UnknownNameError("sound", label, CLASSES)
    if num_clips < 1 or seconds < 0.5 or sample_rate < 16000 or not 1 <= events_per_clip <= len(set(classes)):
        raise DataError(
            f"got num_clips={num_clips}, seconds={seconds}, sample_rate={sample_rate}, events_per_clip="
            f"{events_per_clip}, {len(set(classes))} classes; expected at least 1 clip, 0.5 s, 16000 Hz and 1 event, "
            "and no more events than classes"
        )
    if class_folders and events_per_clip > 1:
        raise DataError(
            f"got {events_per_clip} events per clip; a class folder says one class: ask for one, or a table"
        )
    check_seed(seed)
    folder = Path(folder)
    table = folder / "metadata.csv"
    if not class_folders:
        check_writable(table, force=force)
    # Until the new table is whole there is none: an interrupted run must not leave old labels beside new clips.
    table.unlink(missing_ok=True)
    rows: list[tuple[str, str, str, str, str]] = []
    for index in range(num_clips):
        rng = np.random.default_rng([seed, index])
        first = classes[index % len(classes)]
        others = [label for label in classes if label != first]
        extra = rng.integers(0, events_per_clip)
        labels = [first, *(str(label) for label in rng.permutation(others)[:extra])]
        clip, events = render_clip(labels, seconds, sample_rate, rng)
        split = _SPLIT_PATTERN[index // len(classes) % len(_SPLIT_PATTERN)]
        name = f"{split}/{first}/{index:05d}.wav" if class_folders else f"audio/{index:05d}.wav"
        with replacing(folder / name, force=force) as partial:
            soundfile.write(partial, clip, sample_rate, subtype="PCM_16", format="WAV")
        rows += [(name, label, split, f"{onset:.6f}", f"{offset:.6f}") for label, onset, offset in events]
    if class_folders:
        return folder
    with replacing(table, force=force) as partial, open(partial, "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("file", "label", "split", "onset", "offset"))
        writer.writerows(rows)
    return table
