"""How well sounds and pictures find each other by a model's embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from models_zoo.cards import ModelCard
from models_zoo.errors import CheckpointError
from models_zoo.retrieval import cosine_similarity, retrieval_metrics
from train_torch.data import ClipData, evaluation_loader
from train_torch.frontend import TorchFrontend, network_inputs

__all__ = ["Retrieval", "embed_pairs", "same_label"]


def same_label(targets: NDArray[np.float32]) -> NDArray[np.bool_] | None:
    """Return ``(num_pairs, num_pairs)``, whether two pairs share a label; None where a pair has none.

    Args:
        targets: ``(num_pairs, num_classes)``, above 0 where a pair has a class.
    """
    has = np.asarray(targets) > 0
    return np.asarray(has.astype(np.int64) @ has.T.astype(np.int64) > 0) if has.any(axis=1).all() else None


@dataclass(frozen=True, eq=False)
class Retrieval:
    """Embeddings of pairs, and what follows from them.

    What a pair looks for is any pair of the same label where every pair has one, and otherwise its own other half.

    Attributes:
        files: the pairs' sounds, relative to their data folder.
        targets: ``(num_pairs, num_classes)`` float32, above 0 where a pair has a class.
        audio, image: ``(num_pairs, size)`` float32.
    """

    files: tuple[str, ...]
    targets: NDArray[np.float32]
    audio: NDArray[np.float32]
    image: NDArray[np.float32]

    def metrics(self) -> dict[str, float]:
        """Return ``audio_to_image_...`` and ``image_to_audio_...`` of recall at 1, 5, 10 and the median rank, and
        ``chance_at_1``: what recall at 1 would be if any pair were answered.
        """
        relevant = same_label(self.targets)
        similarity = cosine_similarity(self.audio, self.image)
        values = {}
        for name, rows in (("audio_to_image", similarity), ("image_to_audio", similarity.T)):
            values |= {f"{name}_{metric}": value for metric, value in retrieval_metrics(rows, relevant).items()}
        return {**values, "chance_at_1": 1 / len(self.files) if relevant is None else float(relevant.mean())}

    def table(self) -> str:
        """Return the metrics as text."""
        return "\n".join(
            [f"{len(self.files)} pairs"] + [f"{name:<32}{value:10.4f}" for name, value in self.metrics().items()]
        )

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {"pairs": len(self.files), "metrics": self.metrics()}


def embed_pairs(model: nn.Module, card: ModelCard, data: ClipData, *, device: torch.device | str = "cpu") -> Retrieval:
    """Return the embeddings of every pair of ``data``; the model in evaluation mode, the middle picture of each.

    Raises:
        CheckpointError: the model has no embedding of sound and of picture.
    """
    if {"audio_embedding", "image_embedding"} - {output.name for output in card.outputs} or card.frontend is None:
        raise CheckpointError(
            f"{card.name!r} embeds sound and picture not each by itself; retrieval needs a pre-trained model (cavmae)"
        )
    model = model.to(device).eval()
    frontend = TorchFrontend(card.frontend).to(device).eval()
    kept: dict[int, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
    with torch.inference_mode():
        for batch in evaluation_loader(data):
            there = batch.to(device)
            outputs = model(**network_inputs(card.inputs, frontend, there.waveform, image=there.image))
            rows = (outputs[name].float().cpu().numpy() for name in ("audio_embedding", "image_embedding"))
            kept |= {int(index): (a, v) for index, a, v in zip(batch.index, *rows, strict=True)}
    order = sorted(kept)
    return Retrieval(
        files=tuple(data.dataset.name_of(data.dataset.records[index]) for index in order),
        targets=data.targets.numpy()[order],
        audio=np.stack([kept[index][0] for index in order]),
        image=np.stack([kept[index][1] for index in order]),
    )
