"""Training recipes: everything that decides what a training run does, as one JSON file with a seed.

A recipe never names a folder or a machine: the data, the run folder, the device and the threads are the caller's.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, Strict, model_validator

from models_zoo.errors import DataError, SpecError, UnknownNameError
from models_zoo.schema import Declaration

__all__ = ["Augmentation", "Recipe", "get_recipe", "list_recipes"]

Range = Annotated[tuple[float, float], Strict(False)]


class Augmentation(Declaration):
    """Changes made to training clips only; every field is off at its default.

    Attributes:
        share: of the clips that are changed as waveforms at all.
        ramp_epochs: the share rises linearly to its full value over this many epochs; strong changes from the first
            step can keep a network from learning anything.
        speed: (slowest, fastest) playing speed; changes pitch, formants and tempo together.
        gain_db: (lowest, highest) gain.
        roll_seconds: greatest circular shift either way.
        equalise_db: greatest boost or cut of a smooth random frequency response.
        noise_probability: share of clips that get coloured noise.
        noise_snr_db: (lowest, highest) ratio of clip to noise.
        mix_probability: share of clips added to another clip of the batch, labels mixed with Beta(2, 2).
        mixup_alpha: Beta parameter of the mixup drawn per clip; 0 for none.
        mixup_at: stage of the front end at which clips are mixed.
        mel_jitter: (f_min, f_max) ranges of the front end's mel edges, Hz.
        masks: greatest width of the (mel, time) masks, in bands and frames.
    """

    share: float = Field(default=1.0, ge=0, le=1)
    ramp_epochs: int = Field(default=0, ge=0)
    speed: Range | None = None
    gain_db: Range | None = None
    roll_seconds: float = Field(default=0.0, ge=0)
    equalise_db: float = Field(default=0.0, ge=0)
    noise_probability: float = Field(default=0.0, ge=0, le=1)
    noise_snr_db: Range = (10.0, 40.0)
    mix_probability: float = Field(default=0.0, ge=0, le=1)
    mixup_alpha: float = Field(default=0.0, ge=0)
    mixup_at: Literal["samples", "mel", "features"] = "features"
    mel_jitter: Annotated[tuple[int, int], Strict(False)] | None = None
    masks: Annotated[tuple[int, int], Strict(False)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        for field in ("speed", "gain_db", "noise_snr_db"):
            limits = getattr(self, field)
            if limits is not None and limits[0] > limits[1]:
                raise SpecError(f"{field}: got {limits}; expected (lowest, highest)", field=field)
        if self.speed is not None and not 0.25 <= self.speed[0] <= self.speed[1] <= 4:
            raise SpecError(f"speed: got {self.speed}; expected factors between 0.25 and 4", field="speed")
        return self


class Recipe(Declaration):
    """What a training run does.

    Attributes:
        description: one sentence: what it is for.
        model: architecture for ``create_model``.
        frontend: preset name.
        task: ``single_label`` (softmax, cross-entropy) or ``multi_label`` (sigmoid, binary cross-entropy).
        seed: of weights, split, order and augmentation.
        epochs: passes over the training split.
        batch_size: clips per device and step.
        optimizer, lr, weight_decay: AdamW (decoupled decay) or Adam; peak learning rate.
        warmup_epochs: linear rise from zero; a cosine to ``final_lr`` times the peak follows.
        label_smoothing: share of the target spread over all classes.
        bn_momentum: of every BatchNorm, or None for the architecture's own.
        seconds: longest training clip; a longer one is cropped at random. None for whole clips.
        crop_seconds_min: where given, the length of each batch is drawn between this and ``seconds``.
        sort_batches: clips of similar length share a batch: this many batches are sorted together, 1 for none.
        min_seconds, short: the card's length policy: clips below ``min_seconds`` are an ``error``, filled with
            ``zero``, or ``repeat``-ed, in training, evaluation and production alike. None: the front end's minimum.
        val_fraction: share of the training clips (or groups) set aside where the data has no ``val`` split.
        patience: epochs without a better validation score before stopping; 0 for never.
        precision: Lightning's, e.g. ``32-true``, ``16-mixed``, ``bf16-mixed``.
        augmentation: changes to training clips.
        license, training_data: of the weights, for the card: what may be done with them, and whom they are owed to.
    """

    description: str = ""
    model: str = "mn04"
    frontend: str = "efficientat"
    task: Literal["single_label", "multi_label"] = "single_label"
    seed: int = Field(default=0, ge=0)
    epochs: int = Field(default=30, ge=1)
    batch_size: int = Field(default=32, ge=2)
    optimizer: Literal["adamw", "adam"] = "adamw"
    lr: float = Field(default=2e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup_epochs: float = Field(default=2, ge=0)
    final_lr: float = Field(default=0.01, ge=0, le=1)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    bn_momentum: float | None = Field(default=None, gt=0, le=1)
    seconds: float | None = Field(default=None, gt=0)
    crop_seconds_min: float | None = Field(default=None, gt=0)
    sort_batches: int = Field(default=1, ge=1)
    min_seconds: float | None = Field(default=None, gt=0)
    short: Literal["error", "zero", "repeat"] = "zero"
    val_fraction: float = Field(default=0.1, gt=0, lt=1)
    patience: int = Field(default=0, ge=0)
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] = "32-true"
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
        return self


def list_recipes() -> list[str]:
    """Return the names of the recipes that come with the package."""
    files = resources.files("train_torch.recipes").iterdir()
    return sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json"))


def get_recipe(name: str | Path) -> Recipe:
    """Return a recipe by name, or from a ``.json`` file.

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
    return Recipe.from_json(text)
