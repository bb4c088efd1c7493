"""Turn a checkpoint into one verified ONNX file.

``python export/pt2onnx.py model.safetensors -o model.onnx``
``python export/pt2onnx.py mn10_as -o mn10_as.onnx`` (a published model; downloaded if need be)

The verification summary goes to stdout, errors go to stderr in one line. Exit codes: 0 exported and verified,
1 the graph departs from the model (no file is left), 2 bad input or usage, 130 and 143 interrupted or terminated.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

if __name__ == "__main__" and not __package__:
    # Started by its path: Python put this folder first, where our packages are missing and names may hide libraries.
    _here = Path(__file__).resolve().parent
    sys.path[:] = [str(_here.parent), *(entry for entry in sys.path if Path(entry).resolve() != _here)]

from models_zoo.errors import AudioClassifierError, VerificationError

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pt2onnx", description="Turn a checkpoint into one verified ONNX file with its card inside."
    )
    parser.add_argument("checkpoint", help="a .safetensors file, a published .pt, or a published model's name")
    parser.add_argument("-o", "--output", required=True, help="the .onnx file to write")
    parser.add_argument("--model", metavar="NAME", help="card of a file that holds none, e.g. mn10_as")
    parser.add_argument(
        "--checkpoints",
        metavar="DIR",
        help="folder with published checkpoints; missing ones are downloaded into it (default: $CROSSFADE_CACHE, else "
        "the user's cache folder)",
    )
    parser.add_argument("--name", help="name of the exported model (default: the card's)")
    parser.add_argument("--labels", metavar="FILE", help="class names, one per line, in the model's order")
    parser.add_argument(
        "--weights",
        choices=("student", "teacher"),
        help="of a mean teacher's file (default: those the card's figures are of)",
    )
    parser.add_argument(
        "--mode",
        choices=("multimodal", "audioonly", "videoonly", "missingaudioonly", "missingvideoonly"),
        help="of a cavmaeft, in place of its own: what it is given; the graph holds no more than that needs",
    )
    parser.add_argument("--exporter", choices=("torchscript", "dynamo"), help="default: the card's choice")
    parser.add_argument(
        "--convolutions",
        choices=("winograd", "direct"),
        default="winograd",
        help="winograd: those of many channels with fewer products, faster on a CPU and up to 16/9 as large in the "
        "file; direct: as they are, for a GPU (default: %(default)s)",
    )
    parser.add_argument("--force", action="store_true", help="replace the output if it exists")
    parser.add_argument("--quiet", action="store_true", help="no progress, which only a terminal gets")
    return parser


def _export(arguments: argparse.Namespace) -> str:
    """Export, and return the summary of the verification."""
    from export.exporter import export_checkpoint  # here, so that --help stays free of torch

    card, done = export_checkpoint(
        arguments.checkpoint,
        arguments.output,
        model=arguments.model,
        checkpoints=arguments.checkpoints,
        name=arguments.name,
        labels_file=arguments.labels,
        exporter=arguments.exporter,
        mode=arguments.mode,
        weights=arguments.weights,
        convolutions=arguments.convolutions,
        force=arguments.force,
        progress=sys.stderr.isatty() and not arguments.quiet,
    )
    lengths = ""
    if card.frontend is not None:  # a network of pictures alone has none
        shortest, longest = (f"{length / card.sample_rate:.3g} s" for length in (done.lengths[0], done.lengths[-1]))
        lengths = f"{len(done.lengths)} lengths from {shortest} to {longest}, "
    quieter = f" ({done.quieter} repeated with quieter noise: see README, Limits)" if done.quieter else ""
    return (
        f"{arguments.output}: {card.name} ({card.architecture}, {card.exporter} exporter)\n"
        f"verified in {done.cases} cases: {lengths}batches {', '.join(map(str, done.batches))}{quieter}\n"
        f"worst difference {done.worst:.2g} (bar {done.tolerance:g}), {done.worst_case}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Export as the arguments say; return the exit code."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    for name in ("train_torch", "export"):
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        print(_export(arguments))
    except AudioClassifierError as error:
        print(f"pt2onnx: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, VerificationError) else 2
    except ModuleNotFoundError as error:
        print(f"pt2onnx: {error.name} is not installed; in the checkout: pip install -e '.[export]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pt2onnx: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def _terminate(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)  # an exception, so that the half-written file is removed on the way out


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(main())
