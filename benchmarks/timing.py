"""Timing that survives a shared machine: interleaved calls, the minimum of many."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from datetime import date
from importlib.metadata import version
from typing import Any

from infer_tf.backend import load_tensorflow

__all__ = ["describe_machine", "interleaved"]


def interleaved(calls: Mapping[str, Callable[[], Any]], *, seconds: float, warmups: int = 3) -> dict[str, float]:
    """Return the least wall time of each of ``calls`` in milliseconds.

    The calls take turns until ``seconds`` of wall time are over (each at least five times), so that whatever else
    the machine does hits all of them alike. Not CPU time: the clock of a process lags behind its other threads, and
    TensorFlow computes in one of its own, so the least CPU time of many calls comes out too small for it alone.
    """
    for _ in range(warmups):
        for call in calls.values():
            call()
    best = dict.fromkeys(calls, float("inf"))
    end = time.monotonic() + seconds
    rounds = 0
    while rounds < 5 or time.monotonic() < end:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
        rounds += 1
    return {name: 1e3 * value for name, value in best.items()}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            names = [line.partition(":")[2].strip() for line in stream if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def describe_machine() -> str:
    """Return date, hardware, load and versions in one paragraph."""
    packages = ("numpy", "onnxruntime", "torch", "torchaudio")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return (
        f"{date.today().isoformat()}, {_processor()}, {os.cpu_count()} cores, load {load}, {platform.system()}, "
        f"Python {platform.python_version()}, {versions}, tensorflow {load_tensorflow().__version__}."
    )
