"""The mean of a network's weights over the epochs of a run."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

__all__ = ["EpochMean"]


class EpochMean(Callback):
    """Sums up the weights after each of a span of epochs.

    Args:
        network: whose weights are averaged, statistics of norms included; counters keep their last value.
        span: (first, last) epoch, counted from 1, both included.

    Source: YuanGongND/cav-mae src/utilities, wa_model.
    """

    def __init__(self, network: nn.Module, span: tuple[int, int]) -> None:
        self._network = network
        self._span = span
        self.epochs: list[int] = []
        self._sums: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run goes on from."""
        return {"epochs": self.epochs, "sums": self._sums}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self.epochs, self._sums = state_dict["epochs"], state_dict["sums"]

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Add the weights of this epoch, if it is one of the span."""
        epoch = trainer.current_epoch + 1
        if not self._span[0] <= epoch <= self._span[1]:
            return
        self.epochs.append(epoch)
        for key, value in self._network.state_dict().items():
            # In float64: a sum of many epochs is not to lose what the last of them adds.
            added = value.detach().cpu().double()
            before = self._sums.get(key)
            self._sums[key] = added if before is None or not value.is_floating_point() else before + added

    @torch.no_grad()
    def put_into(self, network: nn.Module) -> None:
        """Give ``network`` the mean."""
        state = network.state_dict()
        for key, value in state.items():
            total = self._sums[key]
            value.copy_(total / len(self.epochs) if value.is_floating_point() else total)
