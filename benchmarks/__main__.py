"""``python -m benchmarks``: ratios against torch, in one process on one thread; exit code 1 if a bar is missed."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

# Read by the libraries while they are imported, so before any of them.
os.environ.update(OMP_NUM_THREADS="1", TF_NUM_INTRAOP_THREADS="1", TF_NUM_INTEROP_THREADS="1")

RESULTS = Path(__file__).with_name("results.md")


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and with ``--write`` keep the figures in ``benchmarks/results.md``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Time crossfade against PyTorch.")
    parser.add_argument("--seconds", type=float, default=10.0, help="wall time spent on each comparison (default 10)")
    parser.add_argument("--write", action="store_true", help=f"keep the figures in {RESULTS.name}")
    arguments = parser.parse_args(argv)

    import torch

    torch.set_num_threads(1)
    from benchmarks.timing import describe_machine

    machine = describe_machine()
    print(machine, flush=True)
    from benchmarks import measure

    reports = []

    def show(report: measure.Report) -> None:
        reports.append(report)
        print(f"\n{report.markdown()}", flush=True)

    show(measure.measure_frontends(arguments.seconds))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        networks = {}
        for name in ("mn10_as", "dymn10_as", "dymn20_as", "cnn14", "crnn_2024", "cavmaeft_audio_as"):
            print(f"\nexporting {name}", flush=True)
            networks[name] = measure.write_network(name, folder / f"{name}.onnx"), folder / f"{name}.onnx"
        onnx = networks["mn10_as"][1]
        for name in measure.END_TO_END_BARS:
            show(measure.measure_prediction(name, *networks[name], 2 * arguments.seconds))
        del networks["cnn14"], networks["crnn_2024"], networks["cavmaeft_audio_as"]
        show(measure.measure_ensemble(folder, 2 * arguments.seconds))
        show(measure.measure_networks(networks, 2 * arguments.seconds))
        show(measure.measure_recordings("dymn20_as", *networks["dymn20_as"], folder, arguments.seconds))
        show(measure.measure_stages(onnx, folder, arguments.seconds))
        show(measure.measure_cold_start(onnx, repeats=3))
        measure.write_network("crnn_2023", folder / "crnn_2023.onnx")
        show(measure.measure_events(folder / "crnn_2023.onnx", folder))

    missed = [entry for report in reports for entry in report.missed]
    verdict = "Every bar is met." if not missed else "Bars missed:\n\n" + "\n".join(f"- {entry}" for entry in missed)
    print(f"\n{verdict}")
    if arguments.write:
        heading = (
            "# Results of `python -m benchmarks`\n\nWall time on one thread, the least of many interleaved calls.\n\n"
        )
        sections = "\n".join(report.markdown() for report in reports)
        RESULTS.write_text(f"{heading}{machine}\n\n{sections}\n{verdict}\n", encoding="utf-8")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
