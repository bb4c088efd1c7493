"""``python -m benchmarks.soak``: memory over thousands of predictions, and the answers of 32 threads at once."""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
from numpy.typing import NDArray

from infer_tf import TFAudioClassifier

__all__ = ["measure_growth", "measure_threads"]

GROWTH_BAR_MIB = 20.0
THREADS = 32


def _clips(count: int, classifier: TFAudioClassifier, longest: float, seed: int) -> list[NDArray[np.float32]]:
    """Return noise of ``count`` lengths between the legal minimum and ``longest`` seconds, as int16 would hold it."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(classifier.card.min_samples, round(longest * classifier.sample_rate), count)
    return [(0.1 * rng.standard_normal(length)).astype(np.float32) for length in lengths]


def measure_growth(classifier: TFAudioClassifier, predictions: int, settled: int, longest: float) -> float:
    """Return by how many MiB resident memory grows from the ``settled``-th prediction to the last.

    Every clip has another length, which is what makes caches keyed by shape grow.
    """
    process = psutil.Process()
    rng = np.random.default_rng(1)
    noise = (0.1 * rng.standard_normal(round(longest * classifier.sample_rate))).astype(np.float32)
    start = 0.0
    for index in range(1, predictions + 1):
        length = rng.integers(classifier.card.min_samples, len(noise) + 1)
        classifier.predict(noise[:length])
        memory = process.memory_info().rss / 2**20
        if index == settled:
            start = memory
        if index == settled or index % 1000 == 0:
            print(f"after {index:5d} predictions: {memory:7.1f} MiB", flush=True)
    return memory - start


def measure_threads(classifier: TFAudioClassifier, clips: list[NDArray[np.float32]]) -> float:
    """Return the largest difference between probabilities computed by 32 threads at once and one by one."""
    alone = [classifier.predict(clip).probabilities for clip in clips]
    with ThreadPoolExecutor(THREADS) as pool:
        together = list(pool.map(lambda clip: classifier.predict(clip).probabilities, clips * 4))
    expected = alone * 4
    return max(float(np.abs(a - b).max()) for a, b in zip(expected, together, strict=True))


def main(argv: list[str] | None = None) -> int:
    """Print growth and differences; exit code 1 if memory grows beyond the bar or an answer differs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description="Memory and threads.")
    parser.add_argument("--model", default="digits-mn", help="shipped model or .onnx file (default digits-mn)")
    parser.add_argument("--predictions", type=int, default=5000)
    parser.add_argument("--settled", type=int, default=1000, help="where growth starts to count (default 1000)")
    parser.add_argument("--longest", type=float, default=3.0, help="longest clip in seconds (default 3)")
    arguments = parser.parse_args(argv)

    with TFAudioClassifier(arguments.model) as classifier:
        difference = measure_threads(classifier, _clips(64, classifier, arguments.longest, seed=0))
        print(f"{THREADS} threads, 256 predictions: largest difference from one by one {difference:.1e}")
        growth = measure_growth(classifier, arguments.predictions, arguments.settled, arguments.longest)
    print(f"growth from prediction {arguments.settled} to {arguments.predictions}: {growth:.1f} MiB (at most 20)")
    return 0 if difference == 0.0 and growth <= GROWTH_BAR_MIB else 1


if __name__ == "__main__":
    sys.exit(main())
