"""Pictures of a training run. matplotlib is imported only when one is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models_zoo.files import replacing

__all__ = ["plot_confusion", "plot_detection_curves", "plot_differences", "plot_learning_curves"]


def plot_confusion(counts: NDArray[np.int64], labels: Sequence[str], path: str | Path, *, title: str) -> None:
    """Draw a confusion matrix as a PNG: rows are the truth, columns the answers, cells count clips.

    Args:
        counts: ``(num_classes, num_classes)``, truth by answer.
        labels: class names.
        path: of the picture; replaced if it exists.
        title: the split; the accuracy is added to it.
    """
    from matplotlib.figure import Figure

    size = max(4.0, 0.45 * len(labels) + 2.0)
    figure = Figure(figsize=(size + 0.8, size), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(share, cmap="Blues", vmin=0.0, vmax=1.0)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel("answer")
    axes.set_ylabel("truth")
    total = int(counts.sum())
    axes.set_title(f"{title}: {int(np.trace(counts))} of {total} right ({np.trace(counts) / max(total, 1):.1%})")
    if len(labels) <= 30:
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour, fontsize=9)
    with replacing(path, force=True) as partial:
        figure.savefig(partial)


def plot_learning_curves(history: Sequence[Mapping[str, float]], path: str | Path, *, headline: str) -> None:
    """Draw loss and validation metric over the epochs as a PNG.

    Args:
        history: a row per epoch with ``train_loss``, ``val_loss``, ``val_score`` (by which the best is chosen) and
            ``headline``.
        path: of the picture; replaced if it exists.
        headline: the metric of the lower panel, e.g. ``val_accuracy``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), dpi=120, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    epochs = [row["epoch"] + 1 for row in history]
    for name, label in (("train_loss", "training (augmented clips)"), ("val_loss", "validation")):
        upper.plot(epochs, [row[name] for row in history], marker=".", label=label)
    upper.set_ylabel("loss")
    upper.set_ylim(0, 1.05 * max(max(row["train_loss"], row["val_loss"]) for row in history))
    upper.legend()
    values = [row[headline] for row in history]
    best = int(np.argmax([row["val_score"] for row in history]))
    lower.plot(epochs, values, marker=".", color="tab:green")
    lower.plot(epochs[best], values[best], marker="o", color="tab:red", label=f"best {values[best]:.3f}")
    lower.set_ylabel(headline.removeprefix("val_").replace("_", " ") + " (validation)")
    lower.set_ylim(0, 1.02)
    lower.set_xlabel("epoch")
    lower.xaxis.get_major_locator().set_params(integer=True)
    lower.legend(loc="lower right")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    with replacing(path, force=True) as partial:
        figure.savefig(partial)


def plot_differences(
    labels: Sequence[str],
    values: Sequence[NDArray[np.float64]],
    intervals: Sequence[tuple[float, float]],
    path: str | Path,
    *,
    metric: str,
) -> None:
    """Draw paired differences as a PNG: a row per pair, a dot per seed, the mean and its interval below the dots.

    Args:
        labels: of the pairs.
        values: of each pair ``(num_seeds,)``.
        intervals: of each pair (lowest, highest) mean.
        path: of the picture; replaced if it exists.
        metric: what differs.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 0.9 * len(labels)), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0.0, color="grey", linewidth=1)
    for row, (dots, (low, high)) in enumerate(zip(values, intervals, strict=True)):
        axes.plot(dots, np.full(len(dots), row - 0.12), "o", color="tab:blue", alpha=0.6)
        mean = float(dots.mean())
        axes.errorbar(mean, row + 0.12, xerr=[[mean - low], [high - mean]], fmt="D", color="tab:red", capsize=4)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel(f"difference of {metric.replace('_', ' ')} (test split): seeds, and mean with 95 % interval")
    axes.grid(axis="x", alpha=0.3)
    with replacing(path, force=True) as partial:
        figure.savefig(partial)


def plot_detection_curves(history: Sequence[Mapping[str, float]], path: str | Path) -> None:
    """Draw the losses and the validation F1 values of a training on events over its epochs as a PNG.

    Args:
        history: a row per epoch with ``train_...`` losses and, where it was validated, ``val_...`` values.
        path: of the picture; replaced if it exists.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), dpi=120, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    names = sorted({name for row in history for name in row})
    for axes, wanted in ((upper, "train_"), (lower, "val_")):
        for name in names:
            if name.startswith(wanted) and name != "val_score":
                rows = [row for row in history if name in row]
                values = [row[name] for row in rows]
                axes.plot([row["epoch"] + 1 for row in rows], values, label=name.removeprefix(wanted).replace("_", " "))
        axes.grid(alpha=0.3)
        axes.legend()
    upper.set_ylabel("loss")
    upper.set_ylim(bottom=0)
    lower.set_ylabel("validation")
    lower.set_ylim(0, 1.02)
    lower.set_xlabel("epoch")
    lower.xaxis.get_major_locator().set_params(integer=True)
    with replacing(path, force=True) as partial:
        figure.savefig(partial)
