"""Pre-training of a CAV-MAE as Lightning runs it: masked reconstruction and contrast of pairs."""

from __future__ import annotations

from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor, nn

from models_zoo.cards import ModelCard
from models_zoo.errors import SpecError
from train_torch.classifier import training_frontend
from train_torch.data import Batch
from train_torch.evaluation import check_finite
from train_torch.feature_cache import FeatureCache
from train_torch.models.cavmae_pretrain import CAVMAE, Masking
from train_torch.optim import check_layer_decay, configure, freeze
from train_torch.recipes import Recipe
from train_torch.retrieval import Retrieval

__all__ = ["Pretraining"]

_PARTS = ("loss", "mae_a", "mae_v", "contrast", "contrast_accuracy")


class Pretraining(lightning.LightningModule):
    """A CAV-MAE behind its front end, trained on pairs of waveform and picture.

    Args:
        model: takes ``features`` and ``image``.
        card: of the model.
        recipe: how to train it; its ``pretraining`` says what is masked and how the losses weigh.
        files: of the validation pairs, in order.
        cache_gib: memory for features that are the same in every epoch, see :class:`FeatureCache`.

    Raises:
        SpecError: another model, or one of clips of any length; changes to clips that need labels or mix clips; masks
            that hide every token; rates by depth.
    """

    def __init__(
        self, model: nn.Module, card: ModelCard, recipe: Recipe, files: tuple[str, ...] = (), *, cache_gib: float = 0.0
    ) -> None:
        super().__init__()
        settings = recipe.augmentation
        if not isinstance(model, CAVMAE):
            raise SpecError(
                f"model: got a {card.architecture!r} for task 'embedding'; pre-training takes a 'cavmae'", field="model"
            )
        if model.declared.dynamic_time:
            raise SpecError(
                "dynamic_time: pre-training hides tokens of whole clips, of audio_length frames; leave it out, and "
                "give it to the classifier that begins with this network",
                field="dynamic_time",
            )
        if settings.mix_probability or settings.mixup_alpha or settings.mixup_weights:
            raise SpecError(
                "augmentation: mixed clips have no picture of their own, so pre-training mixes none; leave "
                "mix_probability, mixup_alpha and mixup_weights out",
                field="augmentation",
            )
        assert recipe.pretraining is not None
        self.card, self.recipe, self.settings, self.files = card, recipe, recipe.pretraining, files
        self.model = model.train()
        self.frozen = freeze(self.model, recipe.freeze)
        check_layer_decay(self.model, recipe)
        frontend = training_frontend(card, settings)
        assert frontend is not None
        self.frontend = frontend
        self._kept = FeatureCache(self.frontend, cache_gib)
        self._masks(
            1, torch.Generator(self.model.norm.weight.device)
        )  # refuses what cannot be before anything is trained
        self._scored: list[tuple[Batch, dict[str, Tensor], Tensor, Tensor]] = []

    def features(self, batch: Batch) -> Tensor:
        """Return ``(batch, time, n_mels)`` of a batch."""
        return self.frontend(batch.waveform, plain=self._kept.features(batch))

    def losses(self, features: Tensor, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return the losses of a batch, masked as drawn from ``generator`` (torch's own where it is None)."""
        assert batch.image is not None
        settings = self.settings
        return self.model.losses(
            features,
            batch.image,
            *self._masks(len(batch.waveform), generator),
            mae_weight=settings.mae_weight,
            contrast_weight=settings.contrast_weight,
            bidirectional=settings.bidirectional,
        )

    def _masks(self, batch: int, generator: torch.Generator | None) -> tuple[Masking, Masking]:
        settings = self.settings
        return self.model.draw_maskings(
            batch, settings.mask_audio, settings.mask_image, kind=settings.mask_kind, generator=generator
        )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch; every draw follows from (seed, step, process)."""
        rng = np.random.default_rng((self.recipe.seed, self.global_step, self.global_rank))
        torch.manual_seed(int(rng.integers(2**62)))
        losses = self.losses(self.features(batch), batch)
        for name in _PARTS:
            self.log(
                f"train_{name}",
                losses[name].detach(),
                on_step=False,
                on_epoch=True,
                batch_size=len(batch.waveform),
                sync_dist=True,
            )
        return losses["loss"]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep losses and embeddings of a batch; every epoch hides the same tokens."""
        generator = torch.Generator(self.device).manual_seed(batch_idx)
        assert batch.image is not None
        features = self.features(batch)
        outputs = self.model(features=features, image=batch.image)
        losses = self.losses(features, batch, generator)
        self._scored.append((batch, losses, outputs["audio_embedding"], outputs["image_embedding"]))

    def on_validation_epoch_end(self) -> None:
        """Log the losses and the retrieval of all validation pairs; every process has scored all of them.

        Raises:
            CheckpointError: a loss or an embedding is no number.
        """
        for _, losses, *embeddings in self._scored:
            for value in (*losses.values(), *embeddings):
                check_finite(value, self.card)
        weights = [len(batch.waveform) for batch, *_ in self._scored]
        values = {
            name: float(np.average([float(losses[name]) for _, losses, *_ in self._scored], weights=weights))
            for name in _PARTS
        }
        order = np.argsort(torch.cat([batch.index for batch, *_ in self._scored]).cpu().numpy())
        targets, audio, image = (
            torch.cat(parts).float().cpu().numpy()[order]
            for parts in zip(*((batch.targets, a, v) for batch, _, a, v in self._scored), strict=True)
        )
        self._scored = []
        found = Retrieval(tuple(self.files), targets, audio, image).metrics()
        for name, value in {**values, **found}.items():
            self.log(f"val_{name}", value, sync_dist=True)
        score = -values["loss"]
        if self.settings.select == "recall_at_1":
            recalls = (found["audio_to_image_recall_at_1"], found["image_to_audio_recall_at_1"])
            # A lower loss decides between equal recalls.
            score = sum(recalls) / 2 - 1e-3 * values["loss"] / (1 + values["loss"])
        self.log("val_score", score, sync_dist=True)

    def on_fit_end(self) -> None:
        """Give back the memory of features."""
        self._kept.clear()

    def configure_optimizers(self) -> Any:
        """Return the recipe's optimiser and its schedule."""
        return configure(self.model, self.recipe, max(int(self.trainer.estimated_stepping_batches), 1))
