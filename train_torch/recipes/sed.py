"""Recipes for sound event detection: a student and its mean teacher on strong, weak and unlabelled clips."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, JsonValue, model_validator

from models_zoo.dataset import Part
from models_zoo.errors import SpecError
from models_zoo.schema import Declaration, Sequence

__all__ = ["BatchGroup", "SedRecipe"]


class BatchGroup(Declaration):
    """One part of every batch.

    Attributes:
        part: of which clips.
        size: how many.
        data: which of the data sets given, counted from 0, they come from; None: all of them.
        consistency: whether the student follows the teacher on them.
    """

    part: Part
    size: int = Field(ge=1)
    data: int | None = Field(default=None, ge=0)
    consistency: bool = True


class SedRecipe(Declaration):
    """What a training run for event detection does; the defaults are the 2023 baseline's.

    Attributes:
        description: one sentence: what it is for.
        task: always ``event_detection``; tells these recipes from others.
        model, model_options: architecture and its options beyond the number of classes and mel bands.
        frontend: preset name.
        n_mels, hop_length: in place of the preset's; fewer bands and longer hops make a cheaper model.
        seed: of weights, order and chance.
        split_seed: of a validation split that has to be carved; None: ``seed``.
        seconds: length of every clip: longer ones are cropped, at random in training, shorter ones get zeros.
        groups: what a batch is made of.
        steps_per_epoch: batches in an epoch, clips coming again where they are used up; None: until the first group is.
        epochs: how many.
        lr: peak learning rate of Adam.
        warmup_epochs: over which the learning rate and the consistency rise as exp(-5 (1 - n / R)^2).
        annealing_start: epoch from which the learning rate falls as a quarter of a cosine (2024: 100); None: never.
        full_first_step: the very first step is at the full rate, as in the published code, where nothing sets the rate
            before the first call of the scheduler; False begins on the rise.
        gradient_clip: greatest norm of the gradient (2024: 5); None: any.
        bn_momentum: of every BatchNorm, or None for the architecture's own (published: 0.99, nearly the last batch).
        teacher_decay: most that the teacher keeps of itself in a step.
        consistency: greatest weight of the distance between student and teacher; 0 trains without a teacher.
        weak_from_strong: strong clips teach the clip scores too: a clip has the classes of its events. The published
            recipes learn clip scores from weak clips alone, of which a run on strong clips has none.
        mixup_probability: share of steps in which the clips of each group, unlabelled ones aside, are mixed.
        mixup_alpha: of the Beta distribution the weight is drawn from, once per group.
        mixup: labels of a mix: ``soft``, weighted like the clips; ``hard``, all there are.
        mixup_embeddings: what becomes of the embeddings of mixed clips: ``none``, they stay those of the one clip
            (2023); ``second``, they are mixed by a draw of their own, by which the labels are mixed again (2024);
            ``same``, they are mixed like the features.
        frame_shift: deviation, in frames of features, of a circular shift in time of clips and labels; 0 for none. In
            the published code, and used by none of its recipes.
        aliases: label -> another that its events count for as well (2024: people talking -> Speech).
        validate_every: epochs.
        patience: validations without a better score before stopping; 0: never.
        val_fraction: share of the training clips, unlabelled ones aside, for a validation split where none is declared.
        threshold, median_seconds: of the events that are measured, and of the card.
        precision: Lightning's.
        license, training_data: of the weights, for the card.

    Source: DESED_task recipes/dcase2021 to dcase2024_task4_baseline.
    """

    description: str = ""
    task: Literal["event_detection"] = "event_detection"
    model: str = "crnn"
    model_options: dict[str, JsonValue] = Field(default_factory=dict)
    frontend: str = "dcase_2024"
    n_mels: int | None = Field(default=None, ge=1)
    hop_length: int | None = Field(default=None, ge=1)
    seed: int = Field(default=42, ge=0)
    split_seed: int | None = Field(default=None, ge=0)
    seconds: float = Field(default=10.0, gt=0)
    groups: Sequence[BatchGroup] = (
        BatchGroup(part="strong", size=12),
        BatchGroup(part="weak", size=12),
        BatchGroup(part="unlabelled", size=24),
    )
    steps_per_epoch: int | None = Field(default=None, ge=1)
    epochs: int = Field(default=200, ge=1)
    lr: float = Field(default=1e-3, gt=0)
    warmup_epochs: float = Field(default=50, gt=0)
    annealing_start: float | None = Field(default=None, ge=0)
    full_first_step: bool = True
    gradient_clip: float | None = Field(default=None, gt=0)
    bn_momentum: float | None = Field(default=None, gt=0, le=1)
    teacher_decay: float = Field(default=0.999, ge=0, lt=1)
    consistency: float = Field(default=2.0, ge=0)
    weak_from_strong: bool = False
    mixup_probability: float = Field(default=0.5, ge=0, le=1)
    mixup_alpha: float = Field(default=0.2, gt=0)
    mixup: Literal["soft", "hard"] = "soft"
    mixup_embeddings: Literal["none", "second", "same"] = "none"
    frame_shift: float = Field(default=0.0, ge=0)
    aliases: dict[str, str] = Field(default_factory=dict)
    validate_every: int = Field(default=1, ge=1)
    patience: int = Field(default=0, ge=0)
    val_fraction: float = Field(default=0.1, gt=0, lt=1)
    threshold: float = Field(default=0.5, ge=0, le=1)
    median_seconds: float = Field(default=0.448, ge=0)
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] = "32-true"
    license: str = ""
    training_data: str = ""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not any(group.part != "unlabelled" for group in self.groups):
            raise SpecError("groups: none has labels; give a group of strong or weak clips", field="groups")
        if not self.consistency and any(group.part == "unlabelled" for group in self.groups):
            raise SpecError(
                "groups: nothing is learnt from unlabelled clips without a teacher; give consistency a weight, or "
                "leave them out",
                field="groups",
            )
        if self.annealing_start is not None and not self.warmup_epochs <= self.annealing_start < self.epochs:
            raise SpecError(
                f"annealing_start: got {self.annealing_start}; expected an epoch after the warm-up, "
                f"{self.warmup_epochs:g}, and before the end, {self.epochs}",
                field="annealing_start",
            )
        if self.validate_every > self.epochs:
            raise SpecError(
                f"validate_every: got {self.validate_every} for {self.epochs} epochs; the best one would never be "
                "known: give at most as many",
                field="validate_every",
            )
        return self
