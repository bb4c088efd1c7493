"""Recipes against each other over paired seeds: the difference of a metric with its 95 % interval.

Runs of one seed share the split, the thinning, the order of the clips and, where the architectures agree, the initial
weights; what is left between them is what the recipes do differently. The output folder holds

* ``<recipe>/seed-<n>/``: the run folders, see :mod:`train_torch.train`;
* ``runs.csv``: a row per run;
* ``comparison.csv``, ``comparison.md``: a row per pair of recipes;
* ``comparison.png``: the paired differences.
"""

from __future__ import annotations

import csv
import itertools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from models_zoo.errors import DataError
from models_zoo.files import replacing
from train_torch.evaluation import Device
from train_torch.plots import plot_differences
from train_torch.recipes import Recipe, get_recipe
from train_torch.train import fit

__all__ = ["Comparison", "Difference", "compare"]

_log = logging.getLogger(__name__)

# Recipes that differ in one of these are not trained or scored on the same clips.
_PAIRED = ("task", "split_seed", "val_fraction", "imbalance")


@dataclass(frozen=True, eq=False)
class Difference:
    """What one recipe gains over another.

    Attributes:
        baseline, recipe: names.
        values: ``(num_seeds,)``, ``recipe`` minus ``baseline``, seed by seed.
        baseline_mean, recipe_mean: of the metric.
    """

    baseline: str
    recipe: str
    values: NDArray[np.float64]
    baseline_mean: float
    recipe_mean: float

    @property
    def mean(self) -> float:
        """Mean of the paired differences."""
        return float(self.values.mean())

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Return the (lowest, highest) mean difference at ``confidence``, by Student's t on the paired differences."""
        count = len(self.values)
        half = stats.t.ppf((1 + confidence) / 2, count - 1) * self.values.std(ddof=1) / np.sqrt(count)
        return self.mean - float(half), self.mean + float(half)


@dataclass(frozen=True, eq=False)
class Comparison:
    """The runs and the differences between their recipes.

    Attributes:
        metric: what is compared, on the test split.
        seeds: in order.
        rows: a dict per run: recipe, seed, test and validation metrics, mean recall of the half of the classes with
            the fewest and with the most training clips, best epoch (None of averaged weights), last training loss,
            seconds.
        differences: of every pair of recipes, in the order they were given.
    """

    metric: str
    seeds: tuple[int, ...]
    rows: tuple[dict[str, Any], ...]
    differences: tuple[Difference, ...]

    def markdown(self) -> str:
        """Return the table of differences as Markdown: shares as percentages and points, losses as they are."""
        lines = [
            f"{self.metric} on the test split, {len(self.seeds)} paired seeds ({', '.join(map(str, self.seeds))})",
            "",
            "| recipe | against | its mean | the other's | difference | 95 % interval | by seed |",
            "|---|---|---|---|---|---|---|",
        ]
        scale, digits = (1.0, 4) if self.metric.endswith(("loss", "kl_divergence")) else (100.0, 1)
        for one in self.differences:
            low, high = one.interval()
            by_seed = ", ".join(f"{scale * value:+.{digits}f}" for value in one.values)
            lines.append(
                f"| `{one.recipe}` | `{one.baseline}` | {scale * one.recipe_mean:.{digits}f} | "
                f"{scale * one.baseline_mean:.{digits}f} | {scale * one.mean:+.{digits}f} | "
                f"{scale * low:+.{digits}f} to {scale * high:+.{digits}f} | {by_seed} |"
            )
        return "\n".join(lines)

    def write(self, folder: str | Path) -> None:
        """Write ``runs.csv``, ``comparison.csv``, ``comparison.md`` and ``comparison.png`` into ``folder``."""
        folder = Path(folder)
        _write_rows(folder / "runs.csv", self.rows)
        pairs = []
        for one in self.differences:
            low, high = one.interval()
            by_seed = {f"seed_{seed}": value for seed, value in zip(self.seeds, one.values, strict=True)}
            pairs.append(
                {
                    "metric": self.metric,
                    "recipe": one.recipe,
                    "baseline": one.baseline,
                    "recipe_mean": one.recipe_mean,
                    "baseline_mean": one.baseline_mean,
                    "difference": one.mean,
                    "low": low,
                    "high": high,
                    **by_seed,
                }
            )
        _write_rows(folder / "comparison.csv", pairs)
        with replacing(folder / "comparison.md", force=True) as partial:
            partial.write_text(self.markdown() + "\n", encoding="utf-8")
        labels = [f"{one.recipe}\nminus {one.baseline}" for one in self.differences]
        plot_differences(
            labels,
            [one.values for one in self.differences],
            [one.interval() for one in self.differences],
            folder / "comparison.png",
            metric=self.metric,
        )


def compare(
    recipes: Sequence[str | Path],
    data: str | Path,
    out: str | Path,
    *,
    seeds: Sequence[int] = (1, 2, 3, 4, 5),
    metric: str = "balanced_accuracy",
    teachers: Sequence[str] = (),
    teacher_logits: str | None = None,
    init: str | None = None,
    device: Device = "auto",
    cache_gib: float = 4.0,
    progress: bool = True,
    force: bool = False,
) -> Comparison:
    """Run every recipe with every seed, write the tables and the picture, and return the comparison.

    Runs that are finished are read, not repeated; one that was interrupted goes on where it stopped.

    Args:
        recipes: names or ``.json`` files, at least two; the name of a file is its stem.
        data: folder or table with a test split.
        out: folder to write.
        seeds: at least two; each takes the place of the recipes' own.
        metric: of the test split, e.g. ``balanced_accuracy``, ``accuracy``, ``loss``, ``rare_recall``.
        teachers, teacher_logits: for the recipes that distil, see :func:`train_torch.train.fit`; ``{seed}`` in a path
            stands for the seed, so that a teacher may have seen the same clips as its student.
        init: checkpoint all runs start from.
        device, cache_gib, progress: see :func:`train_torch.train.fit`.
        force: repeat everything.

    Raises:
        DataError: fewer than two recipes or seeds, recipes that cannot be paired, no test split, an unknown metric.
        AudioClassifierError: a run failed.
    """
    arms = _arms(recipes)
    seeds = tuple(seeds)
    if len(seeds) < 2 or len(set(seeds)) < len(seeds):
        raise DataError(f"got seeds {list(seeds)}; expected at least two, all different: an interval needs a spread")
    out = Path(out)
    rows: list[dict[str, Any]] = []
    for seed, (name, recipe) in itertools.product(seeds, arms.items()):
        _log.info("run %d of %d: %s, seed %d", len(rows) + 1, len(seeds) * len(arms), name, seed)
        distils = recipe.distillation is not None
        folder = out / name / f"seed-{seed}"
        report = fit(
            data,
            folder,
            recipe.replace(seed=seed),
            name=name.lower().replace("_", "-"),
            init=init,
            teachers=[path.replace("{seed}", str(seed)) for path in teachers] if distils else (),
            teacher_logits=teacher_logits.replace("{seed}", str(seed)) if distils and teacher_logits else None,
            device=device,
            cache_gib=cache_gib,
            progress=progress,
            resume=not force,
            force=force,
        )
        if "test" not in report:
            raise DataError(f"{data}: no test split, or the run in {folder} left it out; a comparison is made on it")
        rows.append({"recipe": name, "seed": seed, **_measured(folder, report)})
    _check_paired(out, arms, seeds)
    if metric not in rows[0]:
        numbers = [key for key, value in rows[0].items() if isinstance(value, float)]
        raise DataError(f"got metric {metric!r}; these runs have {', '.join(numbers)}")
    values = {name: np.array([row[metric] for row in rows if row["recipe"] == name], np.float64) for name in arms}
    differences = tuple(
        Difference(first, second, values[second] - values[first], *(float(values[n].mean()) for n in (first, second)))
        for first, second in itertools.combinations(arms, 2)
    )
    comparison = Comparison(metric, seeds, tuple(rows), differences)
    comparison.write(out)
    return comparison


def _arms(recipes: Sequence[str | Path]) -> dict[str, Recipe]:
    """Return the recipes by name, or refuse those whose runs would not be pairs."""
    arms: dict[str, Recipe] = {}
    for name in recipes:
        recipe = get_recipe(name)
        if not isinstance(recipe, Recipe):
            raise DataError(f"recipe {name} is for sound event detection; run it with fit-sed, once per --seed")
        arms[Path(name).stem] = recipe
    if len(arms) < 2 or len(arms) < len(recipes):
        raise DataError(f"got recipes {', '.join(map(str, recipes))}; expected at least two of different names")
    first, *others = arms
    for name, field in itertools.product(others, _PAIRED):
        values = getattr(arms[first], field), getattr(arms[name], field)
        if values[0] != values[1]:
            raise DataError(f"{field}: {first} has {values[0]!r}, {name} has {values[1]!r}; paired runs need the same")
    return arms


def _check_paired(out: Path, arms: Mapping[str, Recipe], seeds: Sequence[int]) -> None:
    """Prove that the runs of a seed had the same clips in the same splits."""
    for seed in seeds:
        splits = {name: (out / name / f"seed-{seed}" / "split.csv").read_bytes() for name in arms}
        first, *others = splits
        for name in others:
            if splits[name] != splits[first]:
                raise DataError(
                    f"seed {seed}: {first} and {name} were run on different clips; did the data change between the "
                    f"runs? Repeat them with --force, or choose another folder than {out}"
                )


def _measured(folder: Path, report: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a finished run says about itself."""
    test = report["test"]
    measured: dict[str, Any] = dict(test["metrics"])
    measured |= {f"validation_{name}": value for name, value in report["validation"]["metrics"].items()}
    counts = _training_counts(folder / "split.csv")
    recalls = [(counts[row["label"]], row["recall"]) for row in test["classes"] if row.get("recall") is not None]
    if recalls:
        recalls.sort()
        half = len(recalls) // 2 or 1
        measured["rare_recall"] = float(np.mean([recall for _, recall in recalls[:half]]))
        measured["frequent_recall"] = float(np.mean([recall for _, recall in recalls[-half:]]))
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as stream:
        last = list(csv.DictReader(stream))[-1]
    measured["last_train_loss"] = float(last["train_loss"])
    return {**measured, "best_epoch": report["best_epoch"], "seconds": report["seconds"]["training"]}


def _training_counts(split: Path) -> Counter[str]:
    with open(split, newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["split"] == "train"]
    return Counter(label for row in rows for label in row["label"].split(";"))


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with replacing(path, force=True) as partial, open(partial, "w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
