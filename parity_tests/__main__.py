"""Prove the parity of your own model: ``python -m parity_tests --onnx M --checkpoint M --data DIR``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a whole number, 1 or more")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """Return the command's arguments."""
    arguments = argparse.ArgumentParser(
        prog="python -m parity_tests",
        description="Compare the torch path of a checkpoint with the TensorFlow + ONNX path of its export on real "
        "recordings, from the file to the decision, and name the first stage that departs.",
        epilog="Exit code: 0 they agree, 1 they do not, 2 bad usage.",
    )
    arguments.add_argument(
        "--onnx", required=True, nargs="+", help="exported model, or the name of a shipped one; several answer together"
    )
    arguments.add_argument(
        "--checkpoint", type=Path, required=True, nargs="+", help="the .safetensors it was exported from, or they were"
    )
    arguments.add_argument("--data", type=Path, required=True, help="labelled folder")
    arguments.add_argument("--split", choices=("train", "validation", "test"), help="keep this split only")
    arguments.add_argument("--limit", type=_count, help="compare at most this many clips, evenly spaced")
    arguments.add_argument("--json", action="store_true", help="print the report as JSON")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; return 0 if the paths agree, 1 if not, 2 on bad usage."""
    options = parser().parse_args(argv)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # One clip at a time: on a shared machine a second thread waits, spinning, more than it works.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from models_zoo.errors import AudioClassifierError
    from parity_tests.parity import run_parity

    onnx, checkpoint = (given[0] if len(given) == 1 else given for given in (options.onnx, options.checkpoint))
    try:
        report = run_parity(onnx, checkpoint, options.data, split=options.split, limit=options.limit)
    except AudioClassifierError as error:
        print(f"parity: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report.to_dict(), indent=2) if options.json else report)
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
