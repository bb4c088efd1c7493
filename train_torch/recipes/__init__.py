"""Training recipes: everything that decides what a training run does, as one JSON file with a seed.

A recipe never names a folder or a machine: the data, the run folder, the device and the threads are the caller's.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, Strict, model_validator

from models_zoo.errors import DataError, SpecError, UnknownNameError
from models_zoo.schema import Declaration, Sequence
from train_torch.recipes.sed import SedRecipe

__all__ = [
    "Augmentation",
    "DistillationRecipe",
    "LossRecipe",
    "PretrainingRecipe",
    "Recipe",
    "SamplingRecipe",
    "TemperatureSchedule",
    "get_recipe",
    "list_recipes",
]

Range = Annotated[tuple[float, float], Strict(False)]


class Augmentation(Declaration):
    """Changes made to training clips only; every field is off at its default.

    Attributes:
        share: of the clips that are changed as waveforms at all.
        ramp_epochs: the share rises linearly to its full value over this many epochs; strong changes from the first
            step can keep a network from learning anything.
        speed: (slowest, fastest) playing speed; changes pitch, formants and tempo together.
        gain_db: (lowest, highest) gain.
        gain_step_db: gains are the lowest plus a whole number of these steps; None for any gain between.
        roll_seconds: greatest circular shift either way.
        equalise_db: greatest boost or cut of a smooth random frequency response.
        noise_probability: share of clips that get coloured noise.
        noise_snr_db: (lowest, highest) ratio of clip to noise.
        clip: changed clips are clipped to [-1, 1], as a recorder would; the published recipes let gain exceed it.
        mix_probability: share of clips added to another clip of the batch, both of mean zero, waveforms, pictures and
            labels mixed with Beta(mix_alpha, mix_alpha).
        mix_alpha: of that mix: 2 as published for EfficientAT, 10 for CAV-MAE.
        mixup_alpha: Beta parameter of the mixup drawn per clip; 0 for none.
        mixup_pairs: clips 2 i and 2 i + 1 of a batch become one, with weights drawn from Beta(alpha, alpha) and 1 less
            that; half of the clips are left, so a batch holds twice as many as the network is to see.
        mixup_at: where clips are mixed: a stage of the front end, or ``norm``, inside the network: behind the norm of
            its features (PANNs' bn0), and where it has a branch for the waveform, at the end of that. A waveform that
            the network takes is mixed by the same draw.
        mel_jitter: (f_min, f_max) ranges of the front end's mel edges, Hz.
        mixstyle_probability: share of batches whose clips exchange their statistics per mel band.
        mixstyle_alpha: Beta parameter of that exchange, drawn per clip.
        mixup_weights: (least, greatest) weight of the other clip in place of ``mixup_alpha``'s draws: uniform between
            them, of any clip of the batch as it is without masks and shift.
        mixup_probability: share of clips mixed by ``mixup_weights``.
        masks: greatest width of the (mel, time) masks, in bands and frames.
        time_masks, mel_masks: how many of each.
        masks_at: ``log``: on log-mel values before any normalisation, as EfficientAT does; ``features``: on the
            finished features, as MRMS does; ``norm``: inside the network, behind the norm of its features and before
            any mixing there, as PANNs do. Masked values are 0.
        shift: greatest shift of the features along (mel, time) either way, in bands and frames, zeros coming in; as
            padding all sides and cropping at random.
        features_noise: uniform noise on the finished features, from 0 to a level drawn per clip up to this one.
        features_roll: move the finished features round in time by any number of frames, filler included, as CAV-MAE
            does.
    """

    share: float = Field(default=1.0, ge=0, le=1)
    ramp_epochs: int = Field(default=0, ge=0)
    speed: Range | None = None
    gain_db: Range | None = None
    gain_step_db: float | None = Field(default=None, gt=0)
    roll_seconds: float = Field(default=0.0, ge=0)
    equalise_db: float = Field(default=0.0, ge=0)
    noise_probability: float = Field(default=0.0, ge=0, le=1)
    noise_snr_db: Range = (10.0, 40.0)
    clip: bool = True
    mix_probability: float = Field(default=0.0, ge=0, le=1)
    mix_alpha: float = Field(default=2.0, gt=0)
    mixup_alpha: float = Field(default=0.0, ge=0)
    mixup_pairs: bool = False
    mixup_at: Literal["samples", "mel", "features", "norm"] = "features"
    mixup_weights: Range | None = None
    mixup_probability: float = Field(default=1.0, ge=0, le=1)
    mixstyle_probability: float = Field(default=0.0, ge=0, le=1)
    mixstyle_alpha: float = Field(default=0.4, gt=0)
    mel_jitter: Annotated[tuple[int, int], Strict(False)] | None = None
    masks: Annotated[tuple[int, int], Strict(False)] | None = None
    time_masks: int = Field(default=1, ge=1)
    mel_masks: int = Field(default=1, ge=1)
    masks_at: Literal["log", "features", "norm"] = "log"
    shift: Annotated[tuple[int, int], Strict(False)] | None = None
    features_noise: float = Field(default=0.0, ge=0)
    features_roll: bool = False

    @property
    def changes_waveforms(self) -> bool:
        """Whether clips are changed before the front end, beyond being cut or filled to the length of their batch."""
        return bool(
            self.speed
            or self.gain_db
            or self.roll_seconds
            or self.equalise_db
            or self.noise_probability
            or self.mix_probability
        )

    @model_validator(mode="after")
    def _check(self) -> Self:
        for field in ("speed", "gain_db", "noise_snr_db", "mixup_weights"):
            limits = getattr(self, field)
            if limits is not None and limits[0] > limits[1]:
                raise SpecError(f"{field}: got {limits}; expected (lowest, highest)", field=field)
        if self.speed is not None and not 0.25 <= self.speed[0] <= self.speed[1] <= 4:
            raise SpecError(f"speed: got {self.speed}; expected factors between 0.25 and 4", field="speed")
        if self.mixup_weights is not None:
            if not 0 <= self.mixup_weights[0] <= self.mixup_weights[1] <= 1:
                raise SpecError(
                    f"mixup_weights: got {self.mixup_weights}; expected weights between 0 and 1", field="mixup_weights"
                )
            if self.mixup_alpha or self.mixup_at != "features":
                raise SpecError(
                    f"mixup_weights: got them with mixup_alpha {self.mixup_alpha} at {self.mixup_at!r}; they take the "
                    "place of mixup_alpha (0), and mix finished features",
                    field="mixup_weights",
                )
        if self.mixup_pairs and not self.mixup_alpha:
            raise SpecError(
                "mixup_pairs: got it with mixup_alpha 0, so no weights to mix with; PANNs' mixup_alpha is 1",
                field="mixup_pairs",
            )
        return self


class SamplingRecipe(Declaration):
    """Which clips an epoch is made of.

    Attributes:
        kind: ``weighted``: drawn anew for each epoch, a clip's weight being the sum over its
            labels of 1000 / (offset + training clips of that label). ``balanced``: one clip of each class in random
            order, then another of each, and so on through the run, the clips of a class in turn. ``alternating``:
            batches drawn like this (the first, third, ...) and ones in which every clip comes in turn (the others).
        clips_per_epoch: how many are drawn; of weighted ones without replacement, the more of all clips, the less the
            weights can do. None for as many as there are, which needs replacement.
        offset: keeps the rarest classes from being drawn over and over by weight.
        replacement: weighted clips may come again within an epoch.

    Source: EfficientAT datasets/audioset.py, get_ft_cls_balanced_sample_weights (100,000 clips, offset 100); PANNs
    utils/data_generator.py, BalancedTrainSampler and AlternateTrainSampler; with replacement, offset 0.01 and as many
    draws as clips: YuanGongND/cav-mae src/gen_weight.
    """

    kind: Literal["weighted", "balanced", "alternating"] = "weighted"
    clips_per_epoch: int | None = Field(default=None, ge=1)
    offset: float = Field(default=100.0, ge=0)
    replacement: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.replacement and self.kind != "weighted":
            raise SpecError(
                f"replacement: got it with {self.kind} draws, in which clips come again anyway; it belongs to weighted "
                "ones",
                field="replacement",
            )
        if self.clips_per_epoch is None and not self.replacement:
            raise SpecError(
                "clips_per_epoch: missing; say how many clips an epoch draws, or draw with replacement",
                field="clips_per_epoch",
            )
        return self


class TemperatureSchedule(Declaration):
    """The temperature of dynamic convolutions, lowered from epoch to epoch.

    In epoch e, from 0, it is max(start - step e, 1 + slope (start - 1) / step - slope e, 1).

    Attributes:
        start: temperature of the first epoch.
        step: fall per epoch.
        slope: fall per epoch of the second line, which ends where the first would without it; 0 leaves the first alone.

    Source: EfficientAT models/dymn/model.py, update_params; its factory has 30, 1 and 0.02.
    """

    start: float = Field(default=30.0, ge=1)
    step: float = Field(default=1.0, gt=0)
    slope: float = Field(default=0.02, ge=0)

    def at(self, epoch: int) -> float:
        """Return the temperature of an epoch, counted from 0."""
        second = 1 + self.slope * (self.start - 1) / self.step - self.slope * epoch
        return max(self.start - self.step * epoch, second, 1.0)


class LossRecipe(Declaration):
    """What is added to or changed in the cross-entropy; every field is off at its default.

    Attributes:
        class_balanced: beta of the class-balanced loss, e.g. 0.9999: clips weigh by the inverse effective number of
            training clips of their class. None for equal weights.
        supcon: share s of the supervised contrastive loss on the embedding in (1 - s) * main + s * contrastive.
        supcon_temperature: of its similarities.
    """

    class_balanced: float | None = Field(default=None, ge=0, lt=1)
    supcon: float = Field(default=0.0, ge=0, lt=1)
    supcon_temperature: float = Field(default=0.07, gt=0)


class DistillationRecipe(Declaration):
    """How a teacher's answers are learnt; who the teacher is, is the caller's to say.

    Attributes:
        weight: w of the teacher's term in (1 - w) * labels + w * teacher.
        missing: training clips without stored teacher logits are an ``error``, or learnt from their ``labels`` alone:
            their teacher term is 0 and still counts in the mean.
    """

    weight: float = Field(default=0.9, gt=0, le=1)
    missing: Literal["error", "labels"] = "error"


class PretrainingRecipe(Declaration):
    """How a CAV-MAE is pre-trained on pairs of sound and picture; labels are not learnt from.

    Attributes:
        mask_audio, mask_image: share of the tokens that are hidden.
        mask_kind: of sound: see :func:`train_torch.models.cavmae_pretrain.draw_masking`.
        mae_weight: of the reconstruction of both.
        contrast_weight: of the contrast between them; the published 0.01 is for batches and data sets far larger than
            a few thousand pairs, which need more.
        bidirectional: sounds pick their picture too, not only pictures their sound.
        select: the best epoch has the lowest validation ``loss``, or the highest ``recall_at_1``, the mean of both
            directions of retrieval.

    Source: YuanGongND/cav-mae egs/audioset/run_cavmae_pretrain_scale++.sh.
    """

    mask_audio: float = Field(default=0.75, ge=0, lt=1)
    mask_image: float = Field(default=0.75, ge=0, lt=1)
    mask_kind: Literal["unstructured", "time", "freq", "tf"] = "unstructured"
    mae_weight: float = Field(default=1.0, ge=0)
    contrast_weight: float = Field(default=0.01, ge=0)
    bidirectional: bool = False
    select: Literal["loss", "recall_at_1"] = "loss"


class Recipe(Declaration):
    """What a training run does.

    Attributes:
        description: one sentence: what it is for.
        model: architecture for ``create_model``. A run that begins with a checkpoint keeps that one's, unless this is a
            transfer model, which takes the checkpoint as its base.
        model_options: of it, beyond the number of classes and mel bands, e.g. ``{"width": 12}``.
        frontend: preset name; a network with a fixed number of frames (``audio_length``) gets as many.
        n_mels: in place of the preset's.
        task: ``single_label`` (softmax, cross-entropy), ``multi_label`` (sigmoid, binary cross-entropy),
            ``label_distribution`` (softmax, Kullback-Leibler divergence), or ``embedding`` (see ``pretraining``).
        seed: of weights, split, order and augmentation.
        split_seed: of the split and of ``imbalance`` alone, so that runs with other seeds share them; None: ``seed``.
        epochs: passes over the training split.
        batch_size: clips per device and step, before any are mixed into one.
        optimizer, lr, weight_decay: AdamW (decoupled decay), Adam or SGD; peak learning rate.
        momentum: of SGD, not Nesterov's.
        betas: of Adam and AdamW.
        amsgrad: of Adam and AdamW: steps by the greatest second moment so far.
        schedule: of the learning rate. ``constant``: a linear rise over ``warmup_epochs``, then the peak. ``cosine``:
            the same rise, then a cosine to ``final_lr`` times the peak at the last epoch. ``published``
            (EfficientAT's, constant within an epoch): an exponential
            rise over ``warmup_epochs``, flat to ``ramp_down_start``, a straight line over ``ramp_down_epochs`` to
            ``final_lr`` times the peak, flat; these epochs are absolute, however many are trained. ``steps``
            (CAV-MAE's): times ``steps_factor`` once ``steps_start`` epochs are done and every ``steps_every`` epochs
            after that.
        warmup_epochs, final_lr, ramp_down_start, ramp_down_epochs, steps_start, steps_every, steps_factor: of the
            schedule.
        head_lr: factor on the learning rate of the head.
        label_smoothing: share of the target spread over all classes.
        smoothing: ``spread``: what is taken from the targets goes to all classes alike (to both answers of each, multi
            label). ``positives`` (CAV-MAE's): every class has label_smoothing / num_classes; a clip's own classes have
            1 - label_smoothing, set for a clip that is not mixed, added with its weight for each part of a mix.
        layer_decay: learning rates fall by this factor per block from the head down to the stem; None for one rate.
        freeze: whatever these state_dict prefixes name (``features.0``, whole parts between dots) stays as it is,
            BatchNorm statistics included.
        temperature_schedule: of dynamic convolutions; None leaves the model's temperature as it is.
        sampling: draws the clips of an epoch by class; None takes every clip once.
        fine_tuning: meant to begin with a trained checkpoint; from scratch it is refused.
        bn_momentum: of every BatchNorm, or None for the architecture's own.
        seconds: longest training clip; a longer one is cropped at random. None for whole clips.
        crop_seconds_min: where given, the length of each batch is drawn between this and ``seconds``.
        sort_batches: clips of similar length share a batch: this many batches are sorted together, 1 for none.
        min_seconds, short: the card's length policy: clips below ``min_seconds`` are an ``error``, filled with
            ``zero``, or ``repeat``-ed, in training, evaluation and production alike. None: the front end's minimum.
        val_fraction: share of the training clips (or groups) set aside where the data has no ``val`` split.
        patience: epochs without a better validation score before stopping; 0 for never.
        precision: Lightning's, e.g. ``32-true``, ``16-mixed``, ``bf16-mixed``.
        average_epochs: (first, last) counted from 1: the model is the mean of the weights after each of these epochs,
            and the best single epoch is kept beside it; None: the best epoch is the model.
        frames: of several pictures of a clip, those looked at when a finished model is scored: the ``middle`` one, or
            ``all``, whose probabilities are averaged. In training it is one at random, in validation the middle one.
        select: metric of the validation split by which the best epoch is chosen (single label; multi label always
            goes by mean average precision, a distribution by its KL divergence). Where classes are not equally
            frequent, ``balanced_accuracy``.
        imbalance: thin the training split to this ratio of the most to the least frequent class, for experiments: see
            :meth:`models_zoo.dataset.Dataset.thinned`. Validation and test stay as they are.
        loss: additions to the cross-entropy.
        distillation: learn from a teacher; None for labels alone.
        pretraining: how a CAV-MAE is pre-trained, which is the task ``embedding``; None for all others.
        augmentation: changes to training clips.
        license, training_data: of the weights, for the card: what may be done with them, and whom they are owed to.
    """

    description: str = ""
    model: str = "mn04"
    model_options: dict[str, JsonValue] = Field(default_factory=dict)
    frontend: str = "efficientat"
    n_mels: int | None = Field(default=None, ge=1)
    task: Literal["single_label", "multi_label", "label_distribution", "embedding"] = "single_label"
    seed: int = Field(default=0, ge=0)
    split_seed: int | None = Field(default=None, ge=0)
    epochs: int = Field(default=30, ge=1)
    batch_size: int = Field(default=32, ge=2)
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    momentum: float = Field(default=0.9, ge=0, lt=1)
    betas: Range = (0.9, 0.999)
    amsgrad: bool = False
    lr: float = Field(default=2e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    schedule: Literal["constant", "cosine", "published", "steps"] = "cosine"
    warmup_epochs: float = Field(default=2, ge=0)
    ramp_down_start: float = Field(default=10, ge=0)
    ramp_down_epochs: float = Field(default=65, gt=0)
    final_lr: float = Field(default=0.01, ge=0, le=1)
    steps_start: int = Field(default=10, ge=1)
    steps_every: int = Field(default=5, ge=1)
    steps_factor: float = Field(default=0.5, gt=0, le=1)
    head_lr: float = Field(default=1.0, gt=0)
    layer_decay: float | None = Field(default=None, gt=0, le=1)
    freeze: Sequence[str] = ()
    temperature_schedule: TemperatureSchedule | None = None
    sampling: SamplingRecipe | None = None
    fine_tuning: bool = False
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    smoothing: Literal["spread", "positives"] = "spread"
    bn_momentum: float | None = Field(default=None, gt=0, le=1)
    seconds: float | None = Field(default=None, gt=0)
    crop_seconds_min: float | None = Field(default=None, gt=0)
    sort_batches: int = Field(default=1, ge=1)
    min_seconds: float | None = Field(default=None, gt=0)
    short: Literal["error", "zero", "repeat"] = "zero"
    val_fraction: float = Field(default=0.1, gt=0, lt=1)
    patience: int = Field(default=0, ge=0)
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] = "32-true"
    average_epochs: Annotated[tuple[int, int], Strict(False)] | None = None
    frames: Literal["middle", "all"] = "middle"
    select: Literal["accuracy", "balanced_accuracy"] = "accuracy"
    imbalance: float | None = Field(default=None, ge=1)
    loss: LossRecipe = LossRecipe()
    distillation: DistillationRecipe | None = None
    pretraining: PretrainingRecipe | None = None
    augmentation: Augmentation = Augmentation()
    license: str = ""
    training_data: str = ""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.crop_seconds_min is not None and (self.seconds is None or self.crop_seconds_min > self.seconds):
            raise SpecError(
                f"crop_seconds_min: got {self.crop_seconds_min} with seconds {self.seconds}; expected at most seconds",
                field="crop_seconds_min",
            )
        if self.task == "label_distribution" and self.loss.class_balanced is not None:
            raise SpecError(
                "loss.class_balanced: weighs clips by their one class, and a clip of a distribution has several; leave "
                "it out",
                field="loss.class_balanced",
            )
        if self.augmentation.mixup_pairs and self.batch_size % 2:
            raise SpecError(
                f"batch_size: got {self.batch_size}; clips are mixed in pairs (augmentation.mixup_pairs), so give an "
                "even number, twice as many as the network is to see",
                field="batch_size",
            )
        if (self.task == "embedding") != (self.pretraining is not None):
            raise SpecError(
                f"pretraining: {'given' if self.pretraining else 'missing'} with task {self.task!r}; the task "
                "'embedding' is pre-training, and the others have none",
                field="pretraining",
            )
        for field in self._unused_in_pretraining() if self.pretraining is not None else ():
            raise SpecError(
                f"{field}: given with task 'embedding'; pre-training has no labels, teacher, norm of features, batch "
                "norm or temperature for it to act on; leave it out",
                field=field,
            )
        if self.average_epochs is not None and not 1 <= self.average_epochs[0] <= self.average_epochs[1] <= self.epochs:
            raise SpecError(
                f"average_epochs: got {self.average_epochs} of {self.epochs} epochs; expected (first, last), counted "
                "from 1",
                field="average_epochs",
            )
        if self.average_epochs is not None and self.patience:
            raise SpecError(
                f"patience: got {self.patience} with average_epochs {self.average_epochs}; a run that stops early has "
                "not all of these epochs; leave out one of them",
                field="patience",
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise SpecError(f"betas: got {self.betas}; expected two numbers from 0 to below 1", field="betas")
        if self.amsgrad and self.optimizer == "sgd":
            raise SpecError("amsgrad: SGD has no second moments; choose adam or adamw", field="amsgrad")
        if self.sampling is not None and self.sampling.kind != "weighted" and self.sort_batches > 1:
            raise SpecError(
                f"sort_batches: got {self.sort_batches} with {self.sampling.kind} sampling, whose batches are drawn "
                "one by one; leave out one of them",
                field="sort_batches",
            )
        return self

    def _unused_in_pretraining(self) -> list[str]:
        """Return the fields, not at their default, that only learning from labels heeds."""
        names = (
            "distillation", "label_smoothing", "smoothing", "bn_momentum", "temperature_schedule", "select", "frames",
        )  # fmt: skip
        fields = type(self).model_fields
        given = [name for name in names if getattr(self, name) != fields[name].default]
        additions = LossRecipe.model_fields
        given += [f"loss.{name}" for name in additions if getattr(self.loss, name) != additions[name].default]
        return given + ["augmentation.masks_at"] * (self.augmentation.masks_at == "norm")


def list_recipes() -> list[str]:
    """Return the names of the recipes that come with the package."""
    files = resources.files("train_torch.recipes").iterdir()
    return sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json"))


def get_recipe(name: str | Path) -> Recipe | SedRecipe:
    """Return a recipe by name, or from a ``.json`` file; its ``task`` says which kind.

    Raises:
        UnknownNameError: no such recipe; the message suggests near names.
        DataError: the file cannot be read.
        SpecError: a field is unknown or impossible; named in ``field``.
    """
    if str(name).endswith(".json"):
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read the recipe {name}: {error}; give a .json file or a recipe's name") from error
    elif str(name) in list_recipes():
        text = resources.files("train_torch.recipes").joinpath(f"{name}.json").read_text(encoding="utf-8")
    else:
        raise UnknownNameError("recipe", name, list_recipes())
    try:
        task = json.loads(text).get("task")
    except (ValueError, AttributeError):
        task = None  # said of the whole file below
    return SedRecipe.from_json(text) if task == "event_detection" else Recipe.from_json(text)
