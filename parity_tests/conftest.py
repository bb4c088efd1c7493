"""Options, fixtures and the rule about skips.

Tests that need recordings (``real_data``), the contracts' goldens (``contracts``), an extra (``sed``, ``energy``) or a
GPU (``gpu``) are deselected, with one printed line and the reason, where those are absent. Nothing may skip where they
are present: with ``CROSSFADE_NO_SKIPS=1`` (CI) a skip is a failure. With ``--onnx`` and ``--checkpoint`` only the
parity of that model runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Small networks on small batches: a second thread waits more than it works.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what a user says about their own model and where recordings lie."""
    group = parser.getgroup("crossfade")
    group.addoption("--data", type=Path, help="labelled recordings; default ../shared/data with fsdd and instruments")
    group.addoption("--contracts", type=Path, default=SHARED / "contracts", help="goldens of the published systems")
    group.addoption("--onnx", type=Path, help="exported model whose parity to prove")
    group.addoption("--checkpoint", type=Path, help="the .safetensors it was exported from")
    group.addoption("--limit", type=int, help="compare at most this many clips of --data")


def _data(config: pytest.Config) -> Path:
    return config.getoption("--data") or SHARED / "data"


def _has_sed() -> bool:
    from models_zoo.sed_metrics import has_sed_extra

    return has_sed_extra()


def _has_cuda() -> bool:
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def pytest_configure(config: pytest.Config) -> None:
    """Check the options that go together, and set what the deselection reports."""
    given = [config.getoption(name) is not None for name in ("--onnx", "--checkpoint")]
    if any(given) and not (all(given) and config.getoption("--data") is not None):
        raise pytest.UsageError("parity of your own model needs --onnx, --checkpoint and --data together")
    config.stash[_ABSENT] = []


_ABSENT: pytest.StashKey[list[str]] = pytest.StashKey()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what cannot run here, and say so."""
    own_model = config.getoption("--onnx") is not None
    needs: list[tuple[str, Callable[[], bool], str]] = [
        ("own_model", lambda: own_model, ""),
        ("contracts", lambda: config.getoption("--contracts").is_dir(), "no goldens at --contracts"),
        ("real_data", lambda: _data(config).is_dir(), "no recordings at --data"),
        ("sed", _has_sed, "the extra sed is not installed"),
        ("energy", lambda: find_spec("codecarbon") is not None, "the extra energy is not installed"),
        ("gpu", _has_cuda, "onnxruntime has no CUDA provider here"),
    ]
    kept, removed = items, []
    for marker, available, reason in needs:
        marked = [item for item in kept if item.get_closest_marker(marker)]
        if not marked or available():
            continue
        removed += marked
        kept = [item for item in kept if not item.get_closest_marker(marker)]
        if reason:
            config.stash[_ABSENT].append(f"deselected {len(marked)} tests marked {marker}: {reason}")
    if own_model:
        removed += [item for item in kept if not item.get_closest_marker("own_model")]
        kept = [item for item in kept if item.get_closest_marker("own_model")]
    if removed:
        config.hook.pytest_deselected(items=removed)
        items[:] = kept


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    """Print one line per kind of test that cannot run here."""
    return config.stash[_ABSENT]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Generator[None, Any, Any]:
    """Turn a skip into a failure where nothing may be skipped."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("CROSSFADE_NO_SKIPS") == "1":
        report.outcome = "failed"
        report.longrepr = f"skipped, and a skip is a failure here: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def contracts(request: pytest.FixtureRequest) -> Path:
    """The folder of the published systems' goldens; tests using it are marked ``contracts``."""
    return request.config.getoption("--contracts")


@pytest.fixture(scope="session")
def data(request: pytest.FixtureRequest) -> Path:
    """The folder of real recordings; tests using it are marked ``real_data``."""
    return _data(request.config)
