"""Features of clips that come alike in every epoch, computed once."""

from __future__ import annotations

import torch
from torch import Tensor

from train_torch.data import Batch
from train_torch.frontend import TorchFrontend

__all__ = ["FeatureCache"]


class FeatureCache:
    """Keeps what a front end makes of whole, unchanged clips, before it mixes, masks or moves the features.

    On a CPU a front end of several windows costs more than a small network. On an accelerator it costs less than
    fetching what is kept, so there nothing is.

    Args:
        frontend: of the training; None where no features are computed.
        gib: memory; clips beyond it are computed whenever they come.
    """

    def __init__(self, frontend: TorchFrontend | None, gib: float) -> None:
        self._frontend = frontend
        self._room = gib * 2**30
        self._clips: dict[tuple[bool, int], Tensor] = {}

    def __len__(self) -> int:
        return len(self._clips)

    def clear(self) -> None:
        """Forget all features, e.g. once training has ended: Lightning holds on to its module for longer."""
        self._clips.clear()

    def features(self, batch: Batch) -> Tensor | None:
        """Return ``(batch, windows, T, n_mels)`` to go on from, or None where the front end has to begin afresh.

        Clip by clip: a matrix product rounds by its size, and a resumed run, whose first batch meets an empty cache,
        ends with the same weights.
        """
        if self._frontend is None or self._room <= 0 or batch.waveform.device.type != "cpu" or not batch.unchanged:
            return None
        frontend = self._frontend
        if frontend.training and not frontend.draws_late:
            return None
        rows = zip(batch.index, batch.waveform, strict=True)
        return torch.stack([self._of(int(clip), row, frontend) for clip, row in rows])

    def _of(self, clip: int, waveform: Tensor, frontend: TorchFrontend) -> Tensor:
        """Return ``(windows, T, n_mels)`` of a clip, kept or new; training and validation count their clips apart."""
        key = frontend.training, clip
        kept = self._clips.get(key)
        if kept is not None:
            return kept
        features = frontend.plain(waveform[None])[0]
        nbytes = features.numel() * features.element_size()
        if nbytes * (len(self._clips) + 1) <= self._room:
            self._clips[key] = features
        return features
