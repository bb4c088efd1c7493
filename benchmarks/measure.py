"""The measurements, each returning a Markdown table and the bars it missed."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import soundfile
import torch
from numpy.typing import NDArray

from benchmarks.published import PUBLISHED
from benchmarks.timing import interleaved
from export.exporter import export_onnx
from infer_tf import OnnxSession, TFAudioClassifier, TFFrontend
from models_zoo.audio import load_audio
from models_zoo.presets import get_frontend
from models_zoo.registry import get_card
from train_torch.models import create_model

__all__ = ["Report", "measure_cold_start", "measure_frontends", "measure_prediction", "measure_stages", "write_mn10"]

FRONTEND_BAR = 0.8
END_TO_END_BAR = 3.0
OVERHEAD_BAR_MS = 2.0

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
        f"Waveform to features, 10 s, batch 1, one thread. Bar: ratio at most {FRONTEND_BAR}. The difference is in "
        "output units (PANNs: dB).",
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
        report.require(ratio <= FRONTEND_BAR, f"{name} takes {ratio:.2f} of torch's time, more than {FRONTEND_BAR}")
        report.require(difference <= SAME_FEATURES, f"{name} differs from the published features by {difference:.1e}")
    return report


def write_mn10(path: Path) -> torch.nn.Module:
    """Export a seeded mn10 with 527 classes to ``path``; return the network it was made from."""
    torch.manual_seed(0)
    model = create_model("mn10_as").eval()
    export_onnx(model, get_card("mn10_as"), path)
    return model


@torch.no_grad()
def measure_prediction(model: torch.nn.Module, onnx: Path, seconds: float) -> Report:
    """Time array -> probabilities of mn10: published torch front end and eager torch, against ours."""
    report = Report(
        "From array to probabilities, mn10",
        (
            "clip",
            "torch eager (ms)",
            "crossfade (ms)",
            "times faster",
            "front end (ms)",
            "onnxruntime (ms)",
            "rest (ms)",
        ),
        "527 classes, batch 1, one thread. Torch: the published front end and the eager network under no_grad, as "
        f"published. Bars at 10 s: at least {END_TO_END_BAR:.0f} times faster; rest (all but the front end and "
        f"onnxruntime) at most {OVERHEAD_BAR_MS:.0f} ms.",
    )
    theirs = PUBLISHED["efficientat"]().eval()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    alone = onnxruntime.InferenceSession(str(onnx), options, providers=["CPUExecutionProvider"])
    with TFAudioClassifier(onnx, threads=1) as classifier:
        for length in (2.0, 10.0):
            waveform = _clip(length, 32000)
            clip, tensor, features = waveform[0], torch.from_numpy(waveform), classifier.frontend.features(waveform)

            def eager(tensor: torch.Tensor = tensor) -> NDArray[np.float32]:
                return torch.sigmoid(model(features=theirs(tensor))["logits"]).numpy()

            difference = float(np.abs(eager()[0] - classifier.predict(clip).probabilities).max())
            times = interleaved(
                {
                    "torch": eager,
                    "ours": lambda clip=clip: classifier.predict(clip),
                    "frontend": lambda waveform=waveform: classifier.frontend.features(waveform),
                    "onnxruntime": lambda features=features: alone.run(None, {"features": features}),
                },
                seconds=seconds,
            )
            faster = times["torch"] / times["ours"]
            rest = times["ours"] - times["frontend"] - times["onnxruntime"]
            figures = (times["torch"], times["ours"], faster, times["frontend"], times["onnxruntime"], rest)
            report.rows.append((f"{length:.0f} s", *(f"{figure:.2f}" for figure in figures)))
            report.require(difference <= SAME_PROBABILITIES, f"{length} s: probabilities differ by {difference:.1e}")
            if length == 10.0:
                report.require(faster >= END_TO_END_BAR, f"{faster:.2f} times faster, less than {END_TO_END_BAR}")
                report.require(rest <= OVERHEAD_BAR_MS, f"{rest:.2f} ms of overhead, more than {OVERHEAD_BAR_MS}")
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
