"""What the wheel and the sdist hold: all of what is needed, and nothing that crept in."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SDIST_FOLDERS = {"models_zoo", "infer_tf", "train_torch", "export", "parity_tests", "benchmarks", "docs", ".ci"}
SDIST_FILES = {
    ".gitignore", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "NOTICE", "PKG-INFO", "README.md",
    "constraints.txt", "demo.sh", "pyproject.toml",
}  # fmt: skip
WHEEL_SUFFIXES = {".py", ".md", ".typed", ".json", ".csv", ".npz", ".onnx"}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """Names of the files in (wheel, sdist), the sdist's without their leading folder."""
    folder = tmp_path_factory.mktemp("dist")
    # The wheel from the checkout directly, not from the sdist: both are asked the same question, separately.
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--sdist",
        "--wheel",
        "--outdir",
        str(folder),
        str(ROOT),
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        in_wheel = {name for name in wheel.namelist() if not name.endswith("/")}
    with tarfile.open(next(folder.glob("*.tar.gz"))) as sdist:
        in_sdist = {member.name.partition("/")[2] for member in sdist.getmembers() if member.isfile()}
    return in_wheel, in_sdist


def in_checkout(folder: str, *patterns: str) -> set[str]:
    return {path.relative_to(ROOT).as_posix() for pattern in patterns for path in (ROOT / folder).rglob(pattern)}


def test_wheel_holds_the_two_production_packages_and_nothing_else(distributions):
    wheel, _ = distributions
    tops = {name.partition("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"models_zoo", "infer_tf"}
    packaged = {name for name in wheel if ".dist-info/" not in name}
    strangers = {name for name in packaged if Path(name).suffix not in WHEEL_SUFFIXES}
    assert not strangers


def test_wheel_holds_code_tables_cards_labels_and_weights(distributions):
    wheel, _ = distributions
    code = in_checkout("models_zoo", "*.py") | in_checkout("infer_tf", "*.py")
    data = in_checkout("models_zoo", "*.json", "*.csv", "*.npz", "*.onnx")
    assert code | data <= wheel, f"missing: {sorted((code | data) - wheel)}"
    for folder, suffix in (("cards", ".json"), ("labels", ".csv"), ("tables", ".npz"), ("weights", ".onnx")):
        assert any(name.startswith(f"models_zoo/{folder}/") and name.endswith(suffix) for name in wheel), folder
    assert {"models_zoo/py.typed", "infer_tf/py.typed"} <= wheel


def test_wheel_carries_licence_notice_and_command(distributions):
    wheel, _ = distributions
    info = {name.split("/", 1)[1] for name in wheel if ".dist-info/" in name}
    assert {"licenses/LICENSE", "licenses/NOTICE", "METADATA", "entry_points.txt"} <= info


def test_sdist_lists_no_stranger(distributions):
    _, sdist = distributions
    folders = {name.partition("/")[0] for name in sdist if "/" in name}
    assert folders <= SDIST_FOLDERS, sorted(folders - SDIST_FOLDERS)
    assert {name for name in sdist if "/" not in name} == SDIST_FILES
    suffixes = {Path(name).suffix for name in sdist}
    assert not suffixes & {".wav", ".flac", ".mp3", ".ogg", ".pt", ".pth", ".ckpt", ".pyc", ".log"}


def test_sdist_can_run_every_check(distributions):
    _, sdist = distributions
    for folder in ("models_zoo", "infer_tf", "train_torch", "export", "parity_tests", "benchmarks"):
        missing = in_checkout(folder, "*.py", "*.json", "*.csv", "*.npz") - sdist
        assert not missing, sorted(missing)
    assert {".ci/run", ".ci/check_wheel"} <= sdist
