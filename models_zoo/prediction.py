"""The answer to one clip."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models_zoo.errors import WaveformError

__all__ = ["Event", "Prediction", "average_predictions"]


@dataclass(frozen=True)
class Event:
    """A sound in a recording: label, onset and offset in seconds, probability in [0, 1] (1 where it was annotated)."""

    label: str
    onset: float
    offset: float
    probability: float = 1.0


@dataclass(frozen=True, eq=False)
class Prediction:
    """Scores of one clip.

    Attributes:
        labels: class names in the model's order.
        probabilities: ``(num_classes,)`` float32 in [0, 1].
        logits: ``(num_classes,)`` float32 as the graph returned them, or None where it returns probabilities.
        embedding: ``(size,)`` float32, or None.
        start, end: seconds of the recording that were scored.
        frame_probabilities: ``(num_classes, num_frames)`` float32 of a model that scores frames, or None.
        frame_times: ``(num_frames,)`` seconds at which a frame begins, or None.
        events: sounds found, by onset; None where they were not looked for, which only event detection does.
    """

    labels: tuple[str, ...]
    probabilities: NDArray[np.float32]
    logits: NDArray[np.float32] | None = None
    embedding: NDArray[np.float32] | None = None
    start: float = 0.0
    end: float = 0.0
    frame_probabilities: NDArray[np.float32] | None = None
    frame_times: NDArray[np.float64] | None = None
    events: tuple[Event, ...] | None = None

    def top(self, k: int = 5) -> list[tuple[str, int, float]]:
        """Return the ``k`` most probable classes as (label, index, probability), the lower index first on ties."""
        order = np.argsort(-self.probabilities, kind="stable")[: max(k, 0)]
        return [(self.labels[i], int(i), float(self.probabilities[i])) for i in order]

    @property
    def label(self) -> str:
        """The most probable class."""
        return self.top(1)[0][0]

    def to_dict(self, k: int | None = None) -> dict[str, Any]:
        """Return JSON-ready data; ``k`` limits the listed classes to the most probable.

        Frame probabilities are listed class by class, in the order of ``top``.
        """
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
            data["frame_probabilities"] = [self.frame_probabilities[index].tolist() for _, index, _ in top]
        if self.events is not None:
            data["events"] = [vars(event) for event in self.events]
        return data


def average_predictions(predictions: Iterable[Prediction]) -> Prediction:
    """Return one answer for a recording from those for its windows, in constant memory.

    Probabilities and embeddings are the plain means over the windows, each window counting once, also a last one that
    overlaps its neighbour by more than the others do. There are no averaged logits, unless there was one window.

    Args:
        predictions: of one model, at least one; frame scores and events are left out.

    Raises:
        WaveformError: no prediction at all (code ``empty``).
    """
    count = 0
    for count, one in enumerate(predictions, start=1):
        if count == 1:
            first = one
            probabilities = one.probabilities.astype(np.float64)
            embedding = None if one.embedding is None else one.embedding.astype(np.float64)
            start, end = one.start, one.end
            continue
        probabilities += one.probabilities
        if embedding is not None and one.embedding is not None:
            embedding += one.embedding
        start, end = min(start, one.start), max(end, one.end)
    if not count:
        raise WaveformError("got no predictions; an average needs at least one", code="empty")
    return Prediction(
        labels=first.labels,
        probabilities=(probabilities / count).astype(np.float32),
        logits=first.logits if count == 1 else None,
        embedding=None if embedding is None else (embedding / count).astype(np.float32),
        start=start,
        end=end,
    )
