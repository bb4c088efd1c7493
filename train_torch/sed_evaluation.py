"""What a detector answers to clips with known events, and how good that is."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models_zoo.cards import ModelCard
from models_zoo.dataset import read_dataset
from models_zoo.errors import CheckpointError
from models_zoo.events import EventOptions
from models_zoo.sed_metrics import WITHOUT_EXTRA, Answer, SceneScores, has_sed_extra
from train_torch.recipes.sed import SedRecipe
from train_torch.sed_data import SceneData, Scenes, scene_loader

__all__ = ["Detection", "evaluate_detector", "evaluate_scenes", "scene_scores"]

_log = logging.getLogger(__name__)


def scene_scores(data: SceneData, answers: Sequence[Mapping[str, Tensor]]) -> SceneScores:
    """Return the answers to all clips of ``data``, given batch by batch, beside what is known of them."""
    strong, weak = (torch.cat([answer[name] for answer in answers]).numpy() for name in ("strong", "weak"))
    clips = zip(data.files, strong, weak, data.durations, strict=True)
    found = {name: Answer(frames, clip, seconds) for name, frames, clip, seconds in clips}
    return SceneScores.of(data.scenes.dataset, found, data.labels, data.grid)


@torch.no_grad()
def evaluate_scenes(model: nn.Module, data: SceneData, *, device: torch.device | str = "cpu") -> SceneScores:
    """Return what a network answers to clips, each heard from its beginning.

    Args:
        model: takes ``features``; put into evaluation mode.
        data: the clips.
        device: where to compute.
    """
    model = model.eval().to(device)
    answers = []
    for batch in scene_loader(data):
        moved = batch.to(device)
        features = data.frontend.to(device).from_mel(moved.mel)
        found = model(features=features, **moved.beside_features())
        answers.append({name: value.float().cpu() for name, value in found.items()})
    return scene_scores(data, answers)


@dataclass(frozen=True)
class Detection:
    """How good the events are that a detector finds.

    Attributes:
        num_clips: clips scored of which anything is known.
        measures: name -> value, see :meth:`SceneScores.metrics`.
        classes: label -> name -> value, see :meth:`SceneScores.per_class`.
    """

    num_clips: int
    measures: dict[str, float]
    classes: dict[str, dict[str, float]]

    def table(self) -> str:
        """Return the measures and the per-class rows as text."""
        lines = [f"{self.num_clips} clips"] + [f"{name:<24}{value:10.4f}" for name, value in self.measures.items()]
        width = max(map(len, self.classes)) + 2
        lines += ["", f"{'class':<{width}}" + "".join(f"{name:>12}" for name in next(iter(self.classes.values())))]
        for label, row in self.classes.items():
            cells = (f"{v:.3f}" if name.endswith("f1") else f"{v:.0f}" for name, v in row.items())
            lines.append(f"{label:<{width}}" + "".join(f"{cell:>12}" for cell in cells))
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data; nan becomes None."""
        return {
            "clips": self.num_clips,
            "metrics": _numbers(self.measures),
            "classes": [{"label": label, **_numbers(row)} for label, row in self.classes.items()],
        }


def _numbers(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def evaluate_detector(
    model: nn.Module,
    card: ModelCard,
    data: str | Path,
    *,
    split: str | None = None,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Detection:
    """Return how good the events are that a detector finds in clips, each heard for as long as the model takes.

    Args:
        model: takes ``features`` alone.
        card: of it; its thresholds and median filters count.
        data: folder or table with onsets and offsets.
        split: one of the declared splits; None takes every clip.
        device: where to compute.
        progress: show a bar while reading.

    Raises:
        CheckpointError: the model takes clips of any length, or more than audio.
        DataError, AudioDecodeError: bad data.
    """
    assert card.labels is not None
    if card.length_policy.max is None or len(card.inputs) > 1:
        raise CheckpointError(
            f"model {card.name!r} takes clips of any length, or inputs beside audio; evaluate its export: "
            "crossfade evaluate"
        )
    dataset = read_dataset(data).select(split).with_labels(card.labels)
    origin = dict.fromkeys((record.file for record in dataset.records), 0)
    recipe = SedRecipe(seconds=card.length_policy.max / card.sample_rate)
    clips = SceneData(Scenes(dataset, origin, (frozenset(card.labels),)), card, recipe, progress=progress)
    scores = evaluate_scenes(model, clips, device=device)
    if not has_sed_extra():
        _log.info("%s", WITHOUT_EXTRA)
    options = EventOptions.of(card)
    return Detection(len(scores.targets), scores.metrics(options), scores.per_class(options))
