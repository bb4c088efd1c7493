"""A model behind its front end as Lightning trains it."""

from __future__ import annotations

from typing import Any, cast

import lightning
import numpy as np
import torch
from torch import Tensor, nn

from models_zoo.cards import ModelCard
from train_torch.augment import draw_mixing
from train_torch.data import Batch
from train_torch.evaluation import collect
from train_torch.frontend import MelJitter, SpecMasks, TorchFrontend
from train_torch.losses import clip_loss
from train_torch.optim import configure
from train_torch.recipes import Recipe

__all__ = ["Classifier"]


class Classifier(lightning.LightningModule):
    """A model behind its front end, trained on batches of waveforms.

    Args:
        model: takes the front end's features by name, returns a dict; channels last in memory, which is faster.
        card: of the model.
        recipe: how to train it.
        files: of the validation clips, in order.
    """

    def __init__(self, model: nn.Module, card: ModelCard, recipe: Recipe, files: tuple[str, ...] = ()) -> None:
        super().__init__()
        assert card.frontend is not None
        settings = recipe.augmentation
        self.card = card
        self.recipe = recipe
        self.files = files
        self.model = model.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self.frontend = TorchFrontend(
            card.frontend,
            mel_jitter=None if settings.mel_jitter is None else MelJitter(*settings.mel_jitter),
            masks=None if settings.masks is None else SpecMasks(*settings.masks),
            mix_at=settings.mixup_at,
        )
        if recipe.bn_momentum is not None:
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.momentum = recipe.bn_momentum
        self._scored: list[tuple[Batch, Tensor]] = []

    def logits(self, waveform: Tensor, mixing: Any = None) -> Tensor:
        """Return ``(batch, num_classes)`` for ``(batch, num_samples)`` waveforms."""
        features = self.frontend(waveform, mixing)
        output = self.card.clip_output()
        assert output is not None
        return cast(Tensor, self.model(**{self.card.inputs[0].name: features})[output.name])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch; every draw follows from (seed, step, process)."""
        rng = np.random.default_rng((self.recipe.seed, self.global_step, self.global_rank))
        torch.manual_seed(int(rng.integers(2**62)))
        settings, smoothing = self.recipe.augmentation, self.recipe.label_smoothing
        waveform, targets = batch.waveform, batch.targets
        size = len(waveform)
        if settings.mix_probability:
            mix = draw_mixing(size, rng, alpha=2.0, probability=settings.mix_probability, device=self.device)
            waveform, targets = mix(waveform), mix(targets)
        mixup = None
        if settings.mixup_alpha:
            mixup = draw_mixing(size, rng, alpha=settings.mixup_alpha, probability=1.0, device=self.device)
            targets = mixup(targets)
        loss = clip_loss(self.logits(waveform, mixup), targets, self.recipe.task, label_smoothing=smoothing)
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, batch_size=size, sync_dist=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep the logits of a batch."""
        self._scored.append((batch, self.logits(batch.waveform)))

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of all validation clips; every process has scored all of them."""
        evaluation = collect(self._scored, self.card, self.files)
        self._scored = []
        values = evaluation.metrics()
        for name, value in values.items():
            self.log(f"val_{name}", value, sync_dist=True)
        # A lower loss decides between equal metrics, which are common on small splits.
        score = values[evaluation.headline] - 1e-3 * values["loss"] / (1 + values["loss"])
        self.log("val_score", score, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Return the recipe's optimiser and its schedule."""
        total = max(int(self.trainer.estimated_stepping_batches), 1)
        return configure(self.model, self.recipe, total)
