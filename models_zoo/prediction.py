"""The answer to one clip."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Event", "Prediction"]


@dataclass(frozen=True)
class Event:
    """A sound found in a recording: label, onset and offset in seconds, probability in [0, 1]."""

    label: str
    onset: float
    offset: float
    probability: float


@dataclass(frozen=True, eq=False)
class Prediction:
    """Scores of one clip.

    Attributes:
        labels: class names in the model's order.
        probabilities: ``(num_classes,)`` float32 in [0, 1].
        logits: ``(num_classes,)`` float32 as the graph returned them, or None where it returns probabilities.
        embedding: ``(size,)`` float32, or None.
        start, end: seconds of the recording that were scored.
        frame_probabilities: ``(num_classes, num_frames)`` float32 for event detection, or None.
        frame_times: ``(num_frames,)`` seconds at which a frame begins, or None.
        events: sounds found, for event detection.
    """

    labels: tuple[str, ...]
    probabilities: NDArray[np.float32]
    logits: NDArray[np.float32] | None = None
    embedding: NDArray[np.float32] | None = None
    start: float = 0.0
    end: float = 0.0
    frame_probabilities: NDArray[np.float32] | None = None
    frame_times: NDArray[np.float64] | None = None
    events: tuple[Event, ...] = field(default=())

    def top(self, k: int = 5) -> list[tuple[str, int, float]]:
        """Return the ``k`` most probable classes as (label, index, probability), the lower index first on ties."""
        order = np.argsort(-self.probabilities, kind="stable")[: max(k, 0)]
        return [(self.labels[i], int(i), float(self.probabilities[i])) for i in order]

    @property
    def label(self) -> str:
        """The most probable class."""
        return self.top(1)[0][0]

    def to_dict(self, k: int | None = None) -> dict[str, Any]:
        """Return JSON-ready data; ``k`` limits the listed classes to the most probable."""
        top = self.top(len(self.labels) if k is None else k)
        data: dict[str, Any] = {
            "start": self.start,
            "end": self.end,
            "top": [{"label": label, "index": index, "probability": value} for label, index, value in top],
        }
        if self.embedding is not None:
            data["embedding"] = self.embedding.tolist()
        if self.frame_probabilities is not None and self.frame_times is not None:
            data["frame_times"] = self.frame_times.tolist()
            data["frame_probabilities"] = self.frame_probabilities.tolist()
        if self.events:
            data["events"] = [vars(event) for event in self.events]
        return data
