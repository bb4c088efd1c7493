"""The measurements, each returning a Markdown table and the bars it missed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import soundfile
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from benchmarks.published import PUBLISHED
from benchmarks.timing import interleaved
from export.exporter import export_checkpoint, export_onnx
from infer_tf import OnnxSession, TFAudioClassifier, TFFrontend
from models_zoo.audio import load_audio
from models_zoo.cards import LengthPolicy
from models_zoo.decoding import probabilities_of
from models_zoo.presets import get_frontend
from models_zoo.registry import get_card
from train_torch.checkpoint import save_checkpoint
from train_torch.models import create_from_card, create_model, new_card
from train_torch.models.ensemble import combine

__all__ = [
    "Report",
    "measure_cold_start",
    "measure_ensemble",
    "measure_events",
    "measure_frontends",
    "measure_networks",
    "measure_prediction",
    "measure_recordings",
    "measure_stages",
    "write_network",
]

FRONTEND_BAR = 0.8
FRONTEND_BARS = {"mrms": 0.45}
END_TO_END_BARS = {"mn10_as": 3.0, "cnn14": 2.0, "crnn_2024": 1.8, "cavmaeft_audio_as": 1.8}
OVERHEAD_BAR_MS = 2.0
ENSEMBLE_BAR = 8.3
NETWORK_BARS = {"mn10_as": 4.0, "dymn10_as": 3.0}
BATCH_BAR = 1.1
RECORDING_BAR = 3.0
RUNTIME_SHARE_BAR = 0.7
REAL_TIME_BAR = 150.0
GROWTH_BAR_MIB = 50.0

_TOKENS = 496  # of BEATs for 10 s

# A benchmark of wrong numbers is worthless; the parity tests hold the strict limits.
SAME_FEATURES = 2e-3
SAME_PROBABILITIES = 1e-4


@dataclass
class Report:
    """A titled Markdown table, a note, and what fell short."""

    title: str
    header: tuple[str, ...]
    note: str
    rows: list[tuple[str, ...]] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)

    def require(self, holds: bool, what: str) -> None:
        """Record ``what`` as missed unless it holds."""
        if not holds:
            self.missed.append(f"{self.title}: {what}")

    def markdown(self) -> str:
        """Return the section as Markdown."""
        lines = [self.header, tuple("---" for _ in self.header), *self.rows]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"## {self.title}\n\n{self.note}\n\n{table}\n"


def _clip(seconds: float, sample_rate: int) -> NDArray[np.float32]:
    """Return ``(1, num_samples)`` float32: noise under a swept tone, the same at every call."""
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    noise = np.random.default_rng(0).standard_normal(len(time))
    return (0.05 * noise + 0.3 * np.sin(2 * np.pi * (200 + 150 * time) * time)).astype(np.float32)[None]


@torch.no_grad()
def measure_frontends(seconds: float) -> Report:
    """Time the TensorFlow front end of each system against the published torch formulation, on a 10 s clip."""
    report = Report(
        "Front ends",
        ("system", "torch, published (ms)", "TensorFlow (ms)", "ratio", "largest difference"),
        f"Waveform to features, 10 s, batch 1, one thread. Bar: ratio at most {FRONTEND_BAR}"
        + "".join(f", {name} {bar}" for name, bar in FRONTEND_BARS.items())
        + ". The difference is in output units (PANNs: dB).",
    )
    for name, published in PUBLISHED.items():
        spec = get_frontend(name)
        waveform = _clip(10.0, spec.sample_rate)
        tensor = torch.from_numpy(waveform)
        ours, theirs = TFFrontend(spec), published().eval()
        difference = float(np.abs(ours.features(waveform) - theirs(tensor).numpy()).max())
        times = interleaved(
            {
                "torch": lambda theirs=theirs, tensor=tensor: theirs(tensor),
                "tf": lambda ours=ours, waveform=waveform: ours.features(waveform),
            },
            seconds=seconds,
        )
        ratio = times["tf"] / times["torch"]
        report.rows.append((name, f"{times['torch']:.2f}", f"{times['tf']:.2f}", f"{ratio:.2f}", f"{difference:.0e}"))
        bar = FRONTEND_BARS.get(name, FRONTEND_BAR)
        report.require(ratio <= bar, f"{name} takes {ratio:.2f} of torch's time, more than {bar}")
        report.require(difference <= SAME_FEATURES, f"{name} differs from the published features by {difference:.1e}")
    return report


def write_network(name: str, path: Path) -> torch.nn.Module:
    """Export a seeded published network to ``path``; return the network it was made from."""
    torch.manual_seed(0)
    card = get_card(name)
    model = create_from_card(card).eval()
    export_onnx(model, card, path)
    return model


def _session(onnx: Path | bytes) -> onnxruntime.InferenceSession:
    """Return a session of one thread, otherwise with onnxruntime's own settings."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(
        onnx if isinstance(onnx, bytes) else str(onnx), options, providers=["CPUExecutionProvider"]
    )


def _macs_per_ms(seconds: float) -> float:
    """Return the multiply-accumulates of onnxruntime's fastest float32 matrix product, per millisecond."""
    size, products = 768, 4
    weights = np.random.default_rng(0).standard_normal((products, size, size)).astype(np.float32) / size**0.5
    nodes = [helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"x{i + 1}"]) for i in range(products)]
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("x0", TensorProto.FLOAT, [size, size])],
        [helper.make_tensor_value_info(f"x{products}", TensorProto.FLOAT, [size, size])],
        [numpy_helper.from_array(weight, f"w{i}") for i, weight in enumerate(weights)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    session = _session(model.SerializeToString())
    times = interleaved({"product": lambda: session.run(None, {"x0": weights[0]})}, seconds=seconds)
    return products * size**3 / times["product"]


@torch.no_grad()
def measure_networks(networks: Mapping[str, tuple[torch.nn.Module, Path]], seconds: float) -> Report:
    """Time the networks alone: eager torch against the exported graph, at batch 1 and 8."""
    rate = _macs_per_ms(seconds / 4)
    report = Report(
        "Networks alone",
        ("network", "clip", "torch eager (ms)", "onnxruntime (ms)", "times faster", "batch 8, per clip", "floor (ms)"),
        "Features to logits, 527 classes, batch 1, one thread. Bars: times faster at least "
        f"{' and '.join(f'{bar:.0f} ({name})' for name, bar in NETWORK_BARS.items())}; a clip in a batch of 8 at most "
        f"{BATCH_BAR} times a clip alone. Floor: the network's multiply-accumulates at the rate of onnxruntime's own "
        f"largest matrix product in this run, {rate / 1e6:.0f} per ns; no float32 graph of it can be faster.",
    )
    for name, (model, onnx) in networks.items():
        session = _session(onnx)
        macs = get_card(name).macs
        assert macs is not None
        for length in (2, 10):
            features = np.random.default_rng(0).standard_normal((8, 128, 100 * length)).astype(np.float32)
            tensor, one = torch.from_numpy(features[:1]), features[:1]
            times = interleaved(
                {
                    "torch": lambda tensor=tensor, model=model: model(features=tensor),
                    "one": lambda one=one, session=session: session.run(None, {"features": one}),
                    "eight": lambda features=features, session=session: session.run(None, {"features": features}),
                },
                seconds=seconds,
            )
            faster, batched = times["torch"] / times["one"], times["eight"] / 8 / times["one"]
            floor = macs * length / 10 / rate
            figures = (times["torch"], times["one"], faster, batched, floor)
            report.rows.append((name, f"{length} s", *(f"{figure:.2f}" for figure in figures)))
            if name in NETWORK_BARS:
                bar = NETWORK_BARS[name]
                report.require(faster >= bar, f"{name} at {length} s {faster:.2f} times faster, less than {bar:g}")
            report.require(
                batched <= BATCH_BAR,
                f"{name} at {length} s takes {batched:.2f} per clip in a batch of 8, not {BATCH_BAR}",
            )
    return report


@torch.no_grad()
def measure_recordings(name: str, model: torch.nn.Module, onnx: Path, folder: Path, seconds: float) -> Report:
    """Time 2 s recordings from the file to the probabilities: eager torch, ours, and onnxruntime alone."""
    report = Report(
        f"From a 2 s recording to probabilities, {name}",
        ("what", "clips per second"),
        "A 16-bit WAV file at 32 kHz, batch 1, one thread, read with soundfile by both. Torch: the published "
        f"front end and the eager network. Bars: ours at least {RECORDING_BAR:.0f} times torch, and at least "
        f"{RUNTIME_SHARE_BAR} of onnxruntime alone on features at hand.",
    )
    recording = folder / "two_seconds.wav"
    soundfile.write(recording, _clip(2.0, 32000)[0], 32000, subtype="PCM_16")
    theirs, session = PUBLISHED["efficientat"]().eval(), _session(onnx)

    def eager() -> NDArray[np.float32]:
        waveform = torch.from_numpy(soundfile.read(recording, dtype="float32")[0])[None]
        return torch.sigmoid(model(features=theirs(waveform))["logits"]).numpy()

    with TFAudioClassifier(onnx, threads=1) as classifier:
        features = classifier.frontend.features(load_audio(recording, get_frontend("efficientat"))[None])
        difference = float(np.abs(eager()[0] - classifier.predict(recording).probabilities).max())
        times = interleaved(
            {
                "torch": eager,
                "ours": lambda: classifier.predict(recording),
                "onnxruntime": lambda: session.run(None, {"features": features}),
            },
            seconds=seconds,
        )
    faster, share = times["torch"] / times["ours"], times["onnxruntime"] / times["ours"]
    report.rows = [
        ("torch eager", f"{1e3 / times['torch']:.1f}"),
        ("crossfade", f"{1e3 / times['ours']:.1f} ({faster:.2f} times torch, {share:.2f} of onnxruntime)"),
        ("onnxruntime alone", f"{1e3 / times['onnxruntime']:.1f}"),
    ]
    report.require(difference <= SAME_PROBABILITIES, f"probabilities differ by {difference:.1e}")
    report.require(faster >= RECORDING_BAR, f"{faster:.2f} times torch, less than {RECORDING_BAR:.0f}")
    report.require(share >= RUNTIME_SHARE_BAR, f"{share:.2f} of onnxruntime alone, less than {RUNTIME_SHARE_BAR}")
    return report


@torch.no_grad()
def measure_prediction(name: str, model: torch.nn.Module, onnx: Path, seconds: float) -> Report:
    """Time array -> probabilities: published torch front end and eager torch, against ours."""
    card, bar = get_card(name), END_TO_END_BARS[name]
    system = next(system for system in PUBLISHED if card.frontend == get_frontend(system))
    output = card.clip_output()
    assert output is not None
    assert card.labels is not None
    rate = card.sample_rate
    tokens = {
        part.name: np.random.default_rng(1).standard_normal((int(part.axes[1]), _TOKENS)).astype(np.float32)
        for part in card.inputs
        if part.source == "encoder"
    }
    given = {name: one[None] for name, one in tokens.items()}
    beside = {name: torch.from_numpy(one) for name, one in given.items()}
    report = Report(
        f"From array to probabilities, {name}",
        (
            "clip",
            "torch eager (ms)",
            "crossfade (ms)",
            "times faster",
            "front end (ms)",
            "onnxruntime (ms)",
            "rest (ms)",
        ),
        f"{len(card.labels)} classes, batch 1, one thread"
        + (f", {_TOKENS} tokens of an encoder at hand" if tokens else "")
        + ". Torch: the published front end and the eager network under no_grad, as "
        f"published. Bar at 10 s: at least {bar:g} times faster"
        + (
            "; the rest finds the events too."
            if card.task == "event_detection"
            else f"; rest (all but the front end and onnxruntime) at most {OVERHEAD_BAR_MS:.0f} ms."
        ),
    )
    theirs = PUBLISHED[system]().eval()
    alone = _session(onnx)
    with TFAudioClassifier(onnx, threads=1) as classifier:
        for length in (2.0, 10.0):
            if length * rate < (card.length_policy.min or 0):
                continue
            waveform = _clip(length, rate)
            clip, tensor, features = waveform[0], torch.from_numpy(waveform), classifier.frontend.features(waveform)

            def eager(tensor: torch.Tensor = tensor) -> NDArray[np.float32]:
                scores = model(features=theirs(tensor), **beside)[output.name].numpy()
                return probabilities_of(scores, task=card.task, kind=output.kind)

            difference = float(np.abs(eager()[0] - classifier.predict(clip, inputs=tokens).probabilities).max())
            times = interleaved(
                {
                    "torch": eager,
                    "ours": lambda clip=clip: classifier.predict(clip, inputs=tokens),
                    "frontend": lambda waveform=waveform: classifier.frontend.features(waveform),
                    "onnxruntime": lambda features=features: alone.run(None, {"features": features, **given}),
                },
                seconds=seconds,
            )
            faster = times["torch"] / times["ours"]
            rest = times["ours"] - times["frontend"] - times["onnxruntime"]
            figures = (times["torch"], times["ours"], faster, times["frontend"], times["onnxruntime"], rest)
            report.rows.append((f"{length:.0f} s", *(f"{figure:.2f}" for figure in figures)))
            report.require(difference <= SAME_PROBABILITIES, f"{length} s: probabilities differ by {difference:.1e}")
            if length == 10.0:
                report.require(faster >= bar, f"{faster:.2f} times faster, less than {bar:g}")
                report.require(
                    rest <= OVERHEAD_BAR_MS or card.task == "event_detection",
                    f"{rest:.2f} ms of overhead, more than {OVERHEAD_BAR_MS}",
                )
    return report


def measure_ensemble(folder: Path, seconds: float) -> Report:
    """Time eight MAC models as one, in one call, against their networks one by one."""
    report = Report(
        "Eight MAC models as one",
        (
            "clip",
            "one network (ms)",
            "front end (ms)",
            "list of eight (ms)",
            "in networks",
            "one graph of eight (ms)",
            "in networks",
        ),
        "Four mac_avg and four mac_max of 30 classes and the published width, batch 1, one thread, from array to "
        "probabilities in one call of predict; either as TFAudioClassifier([...]) or combined into one graph. One "
        "network: the mean of the eight, each run by itself on features at hand. In networks: the whole less one front "
        f"end, in times of that. Bar: at most {ENSEMBLE_BAR}.",
    )
    spec = get_frontend("mrms")
    checkpoints = []
    for seed in range(8):
        torch.manual_seed(seed)
        name = "mac_avg" if seed < 4 else "mac_max"
        network = create_model(name, num_classes=30).eval()
        card = new_card(
            f"member-{seed}",
            name,
            model=network,
            frontend=spec,
            task="label_distribution",
            labels=tuple(f"word {label}" for label in range(30)),
            length_policy=LengthPolicy(),
        )
        checkpoints.append(folder / f"{card.name}.safetensors")
        save_checkpoint(checkpoints[-1], network, card)
    paths = [path.with_suffix(".onnx") for path in checkpoints]
    for checkpoint, path in zip(checkpoints, paths, strict=True):
        export_checkpoint(checkpoint, path)
    save_checkpoint(folder / "combined.safetensors", *combine(checkpoints, name="combined"))
    export_checkpoint(folder / "combined.safetensors", folder / "combined.onnx")
    sessions = {f"network {place}": _session(path) for place, path in enumerate(paths)}
    with (
        TFAudioClassifier(paths, threads=1) as listed,
        TFAudioClassifier(folder / "combined.onnx", threads=1) as combined,
    ):
        for length in (1.0, 10.0):
            waveform = _clip(length, spec.sample_rate)
            clip, features = waveform[0], listed.frontend.features(waveform)
            difference = float(np.abs(listed.predict(clip).probabilities - combined.predict(clip).probabilities).max())
            times = interleaved(
                {
                    "listed": lambda clip=clip: listed.predict(clip),
                    "combined": lambda clip=clip: combined.predict(clip),
                    "frontend": lambda waveform=waveform: listed.frontend.features(waveform),
                    **{
                        name: lambda session=session, features=features: session.run(None, {"features": features})
                        for name, session in sessions.items()
                    },
                },
                seconds=seconds,
            )
            one = sum(times[name] for name in sessions) / len(sessions)
            rest = {name: (times[name] - times["frontend"]) / one for name in ("listed", "combined")}
            figures = (times["listed"], rest["listed"], times["combined"], rest["combined"])
            report.rows.append((f"{length:.0f} s", *(f"{figure:.2f}" for figure in (one, times["frontend"], *figures))))
            report.require(
                difference <= SAME_PROBABILITIES, f"{length:.0f} s: probabilities differ by {difference:.1e}"
            )
            for name, ratio in rest.items():
                report.require(
                    ratio <= ENSEMBLE_BAR,
                    f"{length:.0f} s, {name}: {ratio:.2f} networks' time and a front end, more than {ENSEMBLE_BAR}",
                )
    return report


def measure_stages(onnx: Path, folder: Path, seconds: float) -> Report:
    """Time each stage between a recording on disk and the answer."""
    report = Report(
        "Where the time goes, mn10",
        ("stage", "ms", "share"),
        "A 10 s stereo 16-bit WAV file at 44.1 kHz to probabilities, one thread.",
    )
    clip = _clip(10.0, 44100)[0]
    recording = folder / "clip.wav"
    soundfile.write(recording, np.stack([clip, clip], axis=1), 44100, subtype="PCM_16")
    with TFAudioClassifier(onnx, threads=1) as classifier:
        spec = get_frontend("efficientat")
        waveform = load_audio(recording, spec)[None]
        features = classifier.frontend.features(waveform)
        session = OnnxSession(onnx, "cpu", 1)
        times = interleaved(
            {
                "read, mix, resample": lambda: load_audio(recording, spec),
                "front end": lambda: classifier.frontend.features(waveform),
                "network": lambda: session.run({"features": features}),
                "whole": lambda: classifier.predict(recording),
            },
            seconds=seconds,
        )
    whole = times.pop("whole")
    times["rest"] = max(whole - sum(times.values()), 0.0)
    report.rows = [(stage, f"{ms:.2f}", f"{ms / whole:.0%}") for stage, ms in times.items()]
    report.rows.append(("whole", f"{whole:.2f}", "100%"))
    return report


_COLD_START = """
import json, sys, time
import numpy as np, psutil
clip = np.random.default_rng(0).standard_normal(320000).astype(np.float32) * np.float32(0.1)
marks = []
def mark(what, since=[time.perf_counter()]):
    now = time.perf_counter()
    marks.append((what, now - since[0], psutil.Process().memory_info().rss / 2**20))
    since[0] = now
mark("Python with NumPy")
import infer_tf
mark("import infer_tf")
classifier = infer_tf.TFAudioClassifier(sys.argv[1], threads=1)
mark("TFAudioClassifier(path), TensorFlow's import included")
classifier.predict(clip)
mark("first predict, 10 s")
classifier.predict(clip)
mark("second predict")
print(json.dumps(marks))
"""


def measure_cold_start(onnx: Path, repeats: int) -> Report:
    """Time a fresh process up to its second answer, and its memory at each point."""
    report = Report(
        "Cold start, mn10",
        ("step", "wall time (s)", "resident memory afterwards (MiB)"),
        f"A fresh process, files in the page cache, the fastest of {repeats}.",
    )
    runs: list[list[Any]] = []
    for _ in range(repeats):
        command = [sys.executable, "-c", _COLD_START, str(onnx)]
        runs.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    fastest = min(runs, key=lambda marks: sum(seconds for _, seconds, _ in marks))
    report.rows = [(what, f"{seconds:.3f}", f"{memory:.0f}") for what, seconds, memory in fastest]
    return report


_DETECT = """
import json, pathlib, re, sys, time
from infer_tf import TFAudioClassifier
with TFAudioClassifier(sys.argv[1]) as classifier:
    classifier.warmup(10.0)
    begin = time.perf_counter()
    events = sum(1 for _ in classifier.detect(sys.argv[2], window=10.0, hop=5.0))
    seconds = time.perf_counter() - begin
# Not getrusage, whose peak includes that of the process which started this one.
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) / 2**10
print(json.dumps([seconds, peak, events]))
"""


def measure_events(onnx: Path, folder: Path, *, minutes: int = 60) -> Report:
    """Time the detection of events in a long recording, and its memory against that for a recording of one minute.

    Args:
        onnx: a model for event detection at 16 kHz.
        folder: for the recordings.
        minutes: length of the long one.
    """
    report = Report(
        f"Events in {minutes} minutes",
        ("recording", "wall time (s)", "times real time", "peak memory (MiB)", "events"),
        "A fresh process each, both cores, windows of 10 s every 5 s; noise bursts at 16 kHz. Bars: at least "
        f"{REAL_TIME_BAR:.0f} times real time, at most {GROWTH_BAR_MIB:.0f} MiB more than for one minute.",
    )
    minute = _clip(60.0, 16000)[0]
    minute *= np.repeat(np.random.default_rng(1).random(120), 8000).astype(np.float32)
    peaks = []
    for length in (1, minutes):
        path = folder / f"{length}.wav"
        with soundfile.SoundFile(path, "w", 16000, 1, "PCM_16") as file:
            for turn in range(length):
                file.write(np.roll(minute, 7919 * turn))
        command = [sys.executable, "-c", _DETECT, str(onnx), str(path)]
        answer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        wall, peak, events = answer
        peaks.append(peak)
        rate = 60 * length / wall
        report.rows.append((f"{length} min", f"{wall:.1f}", f"{rate:.0f}", f"{peak:.0f}", str(events)))
    report.require(rate >= REAL_TIME_BAR, f"{rate:.0f} times real time, less than {REAL_TIME_BAR:.0f}")
    growth = peaks[1] - peaks[0]
    report.require(growth <= GROWTH_BAR_MIB, f"{growth:.0f} MiB more memory, above {GROWTH_BAR_MIB:.0f}")
    return report
