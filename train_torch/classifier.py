"""A model behind its front end as Lightning trains it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self, cast

import lightning
import numpy as np
import torch
from torch import Tensor, nn

from models_zoo.cards import ModelCard
from models_zoo.errors import DataError, SpecError
from train_torch.augment import draw_light_mixing, draw_mixing, draw_pairs, mix_labels, mix_waveforms
from train_torch.data import Batch
from train_torch.distill import Teacher, distillation_loss, named
from train_torch.evaluation import collect
from train_torch.feature_cache import FeatureCache
from train_torch.frontend import (
    MelJitter,
    Mixing,
    MixStyle,
    PairMixing,
    Shift,
    SpecMasks,
    TorchFrontend,
    network_inputs,
)
from train_torch.losses import balancing_weights, clip_loss, smoothed_positives, supcon_loss
from train_torch.network_hooks import NetworkHooks
from train_torch.optim import check_layer_decay, check_temperature, configure, freeze, keep_frozen, set_norm_momentum
from train_torch.recipes import Augmentation, Recipe

__all__ = ["Classifier", "selected_by", "training_frontend"]


def selected_by(recipe: Recipe) -> str:
    """Return the validation metric that is followed: that by which the best epoch is chosen, pre-training aside."""
    by_task = {
        "single_label": recipe.select,
        "label_distribution": "kl_divergence",
        "embedding": "audio_to_image_recall_at_1",
    }
    return by_task.get(recipe.task, "mean_average_precision")


class Classifier(lightning.LightningModule):
    """A model behind its front end, trained on batches of waveforms, pictures, or both.

    Args:
        model: takes features, waveform, picture or several by name, returns a dict; channels last in memory, which is
            faster.
        card: of the model.
        recipe: how to train it.
        files: of the validation clips, in order.
        class_counts: label -> training clips, in the order of the card's labels; a class-balanced loss needs them.
        teacher: to learn from as ``recipe.distillation`` says; no part of the state that is saved.
        cache_gib: memory for features that are the same in every epoch, see :class:`FeatureCache`.

    Raises:
        DataError: the loss is class-balanced and a class has no training clip; or a recipe that distils has no
            teacher, or a teacher no recipe that distils.
        SpecError: the recipe asks for what the model does not have: parts to freeze, a temperature, an embedding,
            layers in a row, a place to mix or mask at.
    """

    def __init__(
        self,
        model: nn.Module,
        card: ModelCard,
        recipe: Recipe,
        files: tuple[str, ...] = (),
        *,
        class_counts: Mapping[str, int] | None = None,
        teacher: Teacher | None = None,
        cache_gib: float = 0.0,
    ) -> None:
        super().__init__()
        settings = recipe.augmentation
        self.card = card
        self.recipe = recipe
        self.files = files
        self.teacher = teacher
        self.model = model.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self._hooks = NetworkHooks(
            self.model,
            masks=_masks(settings) if settings.masks_at == "norm" else None,
            mixes=bool(settings.mixup_alpha) and settings.mixup_at == "norm",
        )
        self.frontend = training_frontend(card, settings)
        _check_fit(card, recipe)
        if recipe.bn_momentum is not None:
            set_norm_momentum(self.model, recipe.bn_momentum)
        if (teacher is None) != (recipe.distillation is None):
            raise DataError(
                "the recipe distils, but no teacher was given; give checkpoints (--teacher) or stored logits "
                "(--teacher-logits)"
                if teacher is None
                else "a teacher was given, but the recipe does not say how to learn from it; set distillation"
            )
        check_temperature(self.model, recipe)
        self.frozen = freeze(self.model, recipe.freeze)
        check_layer_decay(self.model, recipe)
        beta = recipe.loss.class_balanced
        weights = None if beta is None else balancing_weights(class_counts or {}, beta)
        self._class_weights: Tensor | None
        self.register_buffer("_class_weights", weights, persistent=False)
        self._scored: list[tuple[Batch, Tensor]] = []
        self._kept = FeatureCache(self.frontend, cache_gib)

    def outputs(
        self,
        waveform: Tensor,
        mixing: Mixing | PairMixing | None = None,
        plain: Tensor | None = None,
        image: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return clip scores ``(batch, num_classes)`` and embedding, if any, of ``(batch, num_samples)`` waveforms.

        Args:
            waveform: see :meth:`TorchFrontend.forward`.
            mixing: a mixup draw, applied where the recipe says.
            plain: see :meth:`TorchFrontend.forward`.
            image: see :func:`~train_torch.frontend.network_inputs`.
        """
        inside = self.recipe.augmentation.mixup_at == "norm"
        inputs = network_inputs(self.card.inputs, self.frontend, waveform, None if inside else mixing, plain, image)
        with self._hooks.mixing(mixing if inside else None):
            outputs = self.model(**inputs)
        clip, embedding = self.card.clip_output(), self.card.embedding_output()
        assert clip is not None
        return outputs[clip.name], None if embedding is None else outputs[embedding.name]

    def logits(self, waveform: Tensor) -> Tensor:
        """Return ``(batch, num_classes)`` clip scores for ``(batch, num_samples)`` waveforms."""
        return self.outputs(waveform)[0]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch; every draw follows from (seed, step, process)."""
        rng = np.random.default_rng((self.recipe.seed, self.global_step, self.global_rank))
        torch.manual_seed(int(rng.integers(2**62)))
        settings, smoothing = self.recipe.augmentation, self.recipe.label_smoothing
        waveform, image, targets, known = batch.waveform, batch.image, batch.targets, batch.known
        size = len(waveform)
        answers = None if self.teacher is None else self.teacher.answers(batch)
        mixed = torch.zeros(size, dtype=torch.bool, device=self.device)
        if settings.mix_probability:
            mix = draw_mixing(
                size, rng, alpha=settings.mix_alpha, probability=settings.mix_probability, device=self.device
            )
            waveform = mix_waveforms(mix, waveform)
            image = None if image is None else mix(image)
            mixed |= mix.weight < 1
            targets, known = mix_labels(mix, targets, known)
            answers = None if answers is None else answers.mixed(mix)
        mixup: Mixing | PairMixing | None = None
        if settings.mixup_pairs:
            mixup = draw_pairs(size, rng, alpha=settings.mixup_alpha, device=self.device)
        elif settings.mixup_alpha:
            mixup = draw_mixing(size, rng, alpha=settings.mixup_alpha, probability=1.0, device=self.device)
        elif settings.mixup_weights is not None:
            mixup = draw_light_mixing(
                size,
                rng,
                weights=settings.mixup_weights,
                probability=settings.mixup_probability,
                device=self.device,
            )
        if mixup is not None:
            targets, known = mix_labels(mixup, targets, known)
            answers = None if answers is None else answers.mixed(mixup)
            mixed = torch.ones(len(targets), dtype=torch.bool, device=self.device)
        if self.recipe.smoothing == "positives":
            targets, smoothing = smoothed_positives(targets, mixed, smoothing), 0.0
        scores, embedding = self.outputs(waveform, mixup, self._kept.features(batch), image)
        task, share = self.recipe.task, self.recipe.loss.supcon
        clip = self.card.clip_output()
        assert clip is not None
        loss = clip_loss(
            scores,
            targets,
            task,
            kind=clip.kind,
            label_smoothing=smoothing,
            class_weights=self._class_weights,
            known=known,
        )
        if answers is not None and self.recipe.distillation is not None:
            weight = self.recipe.distillation.weight
            loss = (1 - weight) * loss + weight * distillation_loss(scores, answers, task)
        if share and embedding is not None:
            contrast = supcon_loss(embedding, targets, task, temperature=self.recipe.loss.supcon_temperature)
            loss = (1 - share) * loss + share * contrast
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, batch_size=len(scores), sync_dist=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep the scores of a batch."""
        outputs = self.outputs(batch.waveform, plain=self._kept.features(batch), image=batch.image)
        self._scored.append((batch, outputs[0]))

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of all validation clips; every process has scored all of them."""
        evaluation = collect(self._scored, self.card, self.files)
        self._scored = []
        values = evaluation.metrics()
        for name, value in values.items():
            self.log(f"val_{name}", value, sync_dist=True)
        # A lower loss decides between equal metrics, which are common on small splits.
        score = values[selected_by(self.recipe)] * (-1 if self.recipe.task == "label_distribution" else 1)
        score -= 1e-3 * values["loss"] / (1 + values["loss"])
        self.log("val_score", score, sync_dist=True)

    def train(self, mode: bool = True) -> Self:
        """Choose training or evaluation mode; frozen norms stay in evaluation mode."""
        super().train(mode)
        keep_frozen(self.model, self.frozen)
        return self

    def on_train_epoch_start(self) -> None:
        """Set the temperature of the epoch; it follows from the epoch alone, so a resumed run has the same."""
        self._set_temperature(self.current_epoch)

    def on_fit_start(self) -> None:
        """Take the teacher along to where the model is, and find the hooks' places in the model as it now is."""
        self._hooks.attach()
        if self.teacher is not None:
            self.teacher.to(self.device)

    def on_fit_end(self) -> None:
        """Give back the memory of features."""
        self._kept.clear()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note whose answers the state was trained on."""
        checkpoint["teacher"] = None if self.teacher is None else self.teacher.origin

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Set the temperature of the epoch the state was saved in, which the weights do not hold.

        Raises:
            DataError: the state was trained with another teacher.
        """
        before, now = checkpoint.get("teacher"), None if self.teacher is None else self.teacher.origin
        if before != now:
            raise DataError(
                f"cannot resume: the run was begun with {named(before)} and is now given {named(now)}; give the same "
                "teachers in the same order, or --force to start afresh"
            )
        self._set_temperature(checkpoint["epoch"])

    def _set_temperature(self, epoch: int) -> None:
        if self.recipe.temperature_schedule is not None:
            cast(Any, self.model).set_temperature(self.recipe.temperature_schedule.at(epoch))

    def configure_optimizers(self) -> Any:
        """Return the recipe's optimiser and its schedule."""
        total = max(int(self.trainer.estimated_stepping_batches), 1)
        return configure(self.model, self.recipe, total)


def training_frontend(card: ModelCard, settings: Augmentation) -> TorchFrontend | None:
    """Return the front end of a card with what training changes in it; None where the card has none."""
    if card.frontend is None:
        return None
    return TorchFrontend(
        card.frontend,
        mel_jitter=None if settings.mel_jitter is None else MelJitter(*settings.mel_jitter),
        masks=None if settings.masks_at == "norm" else _masks(settings),
        shift=None if settings.shift is None else Shift(*settings.shift),
        mixstyle=MixStyle(settings.mixstyle_probability, settings.mixstyle_alpha)
        if settings.mixstyle_probability
        else None,
        noise=settings.features_noise,
        roll=settings.features_roll,
        mix_at="features" if settings.mixup_at == "norm" else settings.mixup_at,
    )


def _masks(settings: Augmentation) -> SpecMasks | None:
    if settings.masks is None:
        return None
    return SpecMasks(*settings.masks, num_time=settings.time_masks, num_mel=settings.mel_masks, at=settings.masks_at)


def _check_fit(card: ModelCard, recipe: Recipe) -> None:
    """Refuse a recipe that asks for what the model of ``card`` cannot give.

    Raises:
        SpecError: says what.
    """
    settings = recipe.augmentation
    if recipe.loss.supcon and card.embedding_output() is None:
        raise SpecError(
            f"loss.supcon: got {recipe.loss.supcon}; a {card.architecture!r} answers without an embedding to contrast; "
            "leave it out",
            field="loss.supcon",
        )
    clip = card.clip_output()
    if recipe.distillation is not None and clip is not None and clip.kind == "probability":
        raise SpecError(
            f"distillation: a {card.architecture!r} answers with probabilities; learning from a teacher's logits needs "
            "logits or log-probabilities; choose another model, or leave it out",
            field="distillation",
        )
    if not any(part.source == "frontend" for part in card.inputs):
        late = (
            "mel_jitter",
            "shift",
            "mixstyle_probability",
            "features_noise",
            "features_roll",
            *(() if settings.masks_at == "norm" else ("masks",)),
        )
        for field in late:
            if getattr(settings, field):
                raise SpecError(
                    f"augmentation.{field}: got {getattr(settings, field)}; a {card.architecture!r} takes no features, "
                    "so nothing would be changed; leave it out",
                    field=f"augmentation.{field}",
                )
        if settings.mixup_at == "mel":
            raise SpecError(
                f"augmentation.mixup_at: got 'mel'; a {card.architecture!r} takes no features; mix 'samples'",
                field="augmentation.mixup_at",
            )
