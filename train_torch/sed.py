"""Training for sound event detection on Lightning: a student, and a teacher that is the mean of what it was.

The teacher has the student's weights averaged over time. Where nothing is known of a clip, the student learns to answer
as the teacher does; strong clips teach frames, weak ones whole clips. A run folder is that of other trainings (see
:mod:`train_torch.train`), with ``teacher.safetensors`` beside the student in ``model.safetensors``.

Source: DESED_task (MIT licence), recipes 2021 to 2024; Tarvainen & Valpola 2017, arXiv 1703.01780. Kept as published:
the teacher is updated before the student's step, and its norms have statistics of their own; rates follow a counter
that is raised before it is used, so the first scheduled rate is that of step 2, after a first step at the full rate.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from torch import Tensor, nn
from torch.nn import functional

from models_zoo.cards import LengthPolicy, ModelCard
from models_zoo.errors import SpecError
from models_zoo.events import EventOptions
from models_zoo.files import replacing
from models_zoo.presets import get_frontend
from models_zoo.sed_metrics import WITHOUT_EXTRA, has_sed_extra
from models_zoo.specs import FrontendSpec
from train_torch.checkpoint import load_checkpoint, save_checkpoint
from train_torch.data import count_table
from train_torch.energy import measured_energy
from train_torch.evaluation import Device, accelerator_of
from train_torch.frontend import TorchFrontend
from train_torch.models import create_model, new_card
from train_torch.optim import set_norm_momentum
from train_torch.plots import plot_detection_curves
from train_torch.recipes.sed import SedRecipe
from train_torch.run_folder import (
    REPORT,
    STATE,
    AtomicCheckpointIO,
    Progress,
    RunFolder,
    check_run_folder,
    expected_warnings,
    name_of,
    prepare_run_folder,
    split_hash_of,
)
from train_torch.sed_data import SceneBatch, SceneData, SceneDataModule, read_scenes
from train_torch.sed_embeddings import open_embeddings
from train_torch.sed_evaluation import evaluate_scenes, scene_scores

__all__ = [
    "MeanTeacher",
    "fit_sed",
    "learning_rate_factor",
    "mixed",
    "mixed_targets",
    "ramp",
    "shifted",
    "teacher_keeps",
    "update_teacher",
]

_log = logging.getLogger(__name__)

OWN_FILES = (
    "recipe.json", "split.csv", "metrics.csv", STATE, "model.safetensors", "teacher.safetensors", "last.safetensors",
    REPORT, "learning_curves.png",
)  # fmt: skip
"""What a finished run leaves in its folder; one without a teacher has none."""

_LEAST_FACTOR = 1e-5


def ramp(step: float, length: float) -> float:
    """Return exp(-5 (1 - step / length)^2), from e^-5 at step 0 to 1 from ``length`` on."""
    return math.exp(-5.0 * (1.0 - min(max(step / length, 0.0), 1.0)) ** 2)


def learning_rate_factor(step: int, *, rise: float, fall: float | None = None, end: float = math.inf) -> float:
    """Return the factor on the learning rate in a step of the published counter, which begins at 1.

    Args:
        step: the counter; the scheduler raises it before it is used, so its n-th call means step n + 1.
        rise: steps of the rise, see :func:`ramp`.
        fall: step from which a quarter of a cosine falls to 0 at ``end``, at least 1e-5; None: never.
        end: last step of the run.
    """
    if fall is not None and step >= fall:
        return max(_LEAST_FACTOR, math.cos(math.pi / 2 * (step - fall) / (end - fall)))
    return ramp(step, rise)


def teacher_keeps(step: int, ceiling: float) -> float:
    """Return how much of itself the teacher keeps in a step, counted from 1: min(1 - 1 / (step + 1), ceiling)."""
    return min(1 - 1 / (step + 1), ceiling)


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, keeps: float) -> None:
    """Move the teacher's parameters towards the student's; statistics of norms stay its own.

    Args:
        teacher, student: of the same architecture.
        keeps: share of the teacher that stays, see :func:`teacher_keeps`.
    """
    for own, new in zip(teacher.parameters(), student.parameters(), strict=True):
        own.mul_(keeps).add_(new, alpha=1 - keeps)


def mixed(values: Tensor, permutation: Tensor, weight: float) -> Tensor:
    """Return weight * ``values`` + (1 - weight) * those of other clips; ``values`` is ``(batch, ...)``."""
    return weight * values + (1 - weight) * values[permutation]


def mixed_targets(targets: Tensor, permutation: Tensor, weight: float, *, hard: bool) -> Tensor:
    """Return the targets of clips that were mixed: weighted like them, or, if ``hard``, those of both; in [0, 1]."""
    both = targets + targets[permutation] if hard else mixed(targets, permutation, weight)
    return both.clamp(0, 1)


def shifted(mel: Tensor, strong: Tensor, shifts: Sequence[int], hop: int) -> tuple[Tensor, Tensor]:
    """Return clips and their frame targets moved round in time, each by its own number of frames.

    Args:
        mel: ``(batch, windows, T, n_mels)``.
        strong: ``(batch, num_classes, frames)``; moved by ``shift / hop``, rounded down: -17 / 4 is -5.
        shifts: one per clip, in frames of ``mel``.
        hop: frames of ``mel`` per frame of ``strong``.
    """
    moved = [torch.roll(one, shift, dims=1) for one, shift in zip(mel, shifts, strict=True)]
    targets = [torch.roll(one, shift // hop, dims=1) for one, shift in zip(strong, shifts, strict=True)]
    return torch.stack(moved), torch.stack(targets)


class MeanTeacher(lightning.LightningModule):
    """A student and its teacher behind their front end.

    Args:
        student: takes ``features`` and, where data sets know different classes, ``classes_mask``; returns ``strong``
            and ``weak`` probabilities.
        card: of it.
        recipe: how to train.
        validation: the clips that choose the best epoch.
    """

    def __init__(
        self, student: nn.Module, card: ModelCard, recipe: SedRecipe, validation: SceneData | None = None
    ) -> None:
        super().__init__()
        assert card.frontend is not None
        self.card, self.recipe, self.validation = card, recipe, validation
        self.frontend = TorchFrontend(card.frontend)
        frame = card.frame_output()
        assert frame is not None
        self.hop = frame.hop
        if recipe.bn_momentum is not None:
            set_norm_momentum(student, recipe.bn_momentum)
        self.student = student.train()
        self.teacher = copy.deepcopy(student).requires_grad_(False) if recipe.consistency else None
        self._scored: list[tuple[SceneBatch, dict[str, dict[str, Tensor]]]] = []

    @property
    def networks(self) -> dict[str, nn.Module]:
        """File stem -> network."""
        return {"model": self.student} | ({} if self.teacher is None else {"teacher": self.teacher})

    def training_step(self, batch: SceneBatch, batch_idx: int) -> Tensor:
        """Return the loss of a batch; every draw follows from (seed, step)."""
        rng = np.random.default_rng((self.recipe.seed, self.global_step))
        torch.manual_seed(int(rng.integers(2**62)))
        batch = self._augmented(batch, rng)
        mel, strong, weak = batch.mel, batch.strong, batch.weak
        inputs = {"features": self.frontend.from_mel(mel), **batch.beside_features()}
        answer = self.student(**inputs)
        frames = min(answer["strong"].shape[2], strong.shape[2])
        losses = self._supervised(answer, strong, weak, frames)
        if self.teacher is not None:
            losses |= self._consistency(answer, inputs)
        for name, value in losses.items():
            self.log(f"train_{name}", value.detach(), on_step=False, on_epoch=True, batch_size=len(mel))
        return cast(Tensor, sum(losses.values()))

    def _augmented(self, batch: SceneBatch, rng: np.random.Generator) -> SceneBatch:
        """Return the batch shifted and mixed as the recipe says."""
        mel, strong, weak, embeddings = batch.mel, batch.strong, batch.weak, batch.embeddings
        if self.recipe.frame_shift:
            shifts = [int(shift) for shift in rng.normal(0, self.recipe.frame_shift, len(mel))]
            mel, strong = shifted(mel, strong, shifts, self.hop)
        if rng.random() < self.recipe.mixup_probability:
            hard = self.recipe.mixup == "hard"
            parts = []
            for group, members in self._groups():
                tokens = None if embeddings is None else embeddings[members]
                rows = (mel[members], strong[members], weak[members])
                if group.part != "unlabelled":
                    weight, order = self._mix(rng, rows[0])
                    targets = [mixed_targets(one, order, weight, hard=hard) for one in rows[1:]]
                    if tokens is not None and self.recipe.mixup_embeddings == "second":
                        # As published in 2024: mixed by a draw of their own, by which the targets are mixed again.
                        again, other = self._mix(rng, tokens)
                        tokens = mixed(tokens, other, again)
                        targets = [mixed_targets(one, other, again, hard=hard) for one in targets]
                    elif tokens is not None and self.recipe.mixup_embeddings == "same":
                        tokens = mixed(tokens, order, weight)
                    rows = (mixed(rows[0], order, weight), targets[0], targets[1])
                parts.append((*rows, tokens))
            mel, strong, weak = (torch.cat([part[place] for part in parts]) for place in range(3))
            embeddings = None if embeddings is None else torch.cat([part[3] for part in parts])
        valid = batch.valid
        return replace(batch, mel=mel, strong=strong * valid[:, :, None], weak=weak * valid, embeddings=embeddings)

    def _mix(self, rng: np.random.Generator, rows: Tensor) -> tuple[float, Tensor]:
        """Return a weight, and the order of the clips that each is mixed with."""
        weight = float(rng.beta(self.recipe.mixup_alpha, self.recipe.mixup_alpha))
        return weight, torch.as_tensor(rng.permutation(len(rows)), device=rows.device)

    def _groups(self) -> list[tuple[Any, slice]]:
        """Return the groups of the recipe and where their clips lie in a batch."""
        ends = np.cumsum([group.size for group in self.recipe.groups]).tolist()
        return [(group, slice(end - group.size, end)) for group, end in zip(self.recipe.groups, ends, strict=True)]

    def _rows(self, wanted: Sequence[bool]) -> Tensor:
        """Return the rows of a batch that belong to the groups wanted."""
        rows = [torch.arange(s.start, s.stop) for (_, s), want in zip(self._groups(), wanted, strict=True) if want]
        return torch.cat(rows).to(self.device) if rows else torch.zeros(0, dtype=torch.long, device=self.device)

    def _supervised(self, answer: Mapping[str, Tensor], strong: Tensor, weak: Tensor, frames: int) -> dict[str, Tensor]:
        """Return the cross-entropies of frames (strong clips) and of clips (weak ones)."""
        groups = self.recipe.groups
        losses = {}
        rows = self._rows([group.part == "strong" for group in groups])
        if len(rows):
            losses["strong"] = _entropy(answer["strong"][rows, :, :frames], strong[rows, :, :frames])
        taught = ("weak", "strong") if self.recipe.weak_from_strong else ("weak",)
        rows = self._rows([group.part in taught for group in groups])
        if len(rows):
            losses["weak"] = _entropy(answer["weak"][rows], weak[rows])
        return losses

    def _consistency(self, answer: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weighted distance to the teacher's answers, which it gives in training mode, as published."""
        assert self.teacher is not None
        with torch.no_grad():
            taught = self.teacher(**inputs)
        rows = self._rows([group.consistency for group in self.recipe.groups])
        weight = self.recipe.consistency * ramp(self.global_step + 1, self._steps(self.recipe.warmup_epochs))
        return {
            f"consistency_{name}": weight * functional.mse_loss(answer[name][rows], taught[name][rows])
            for name in ("strong", "weak")
        }

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        """Update the teacher, before the student's own step."""
        if self.teacher is not None:
            keeps = teacher_keeps(self.global_step + 1, self.recipe.teacher_decay)
            update_teacher(self.teacher, self.student, keeps)

    def _steps(self, epochs: float) -> float:
        """Return how many steps so many epochs have."""
        return epochs * int(self.trainer.num_training_batches)

    def validation_step(self, batch: SceneBatch, batch_idx: int) -> None:
        """Keep the answers to a batch."""
        inputs = {"features": self.frontend.from_mel(batch.mel), **batch.beside_features()}
        answers = {
            stem: {name: value.float().cpu() for name, value in network(**inputs).items()}
            for stem, network in self.networks.items()
        }
        self._scored.append((batch, answers))

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the validation clips; the student's choose the best epoch."""
        assert self.validation is not None
        score = 0.0
        options = EventOptions.of(self.card)
        for stem in self.networks:
            answers = [answers[stem] for _, answers in self._scored]
            values = scene_scores(self.validation, answers).selection(options)
            for name, value in values.items():
                self.log(f"val_{name}" if stem == "model" else f"val_teacher_{name}", value)
            if stem == "model":
                score = sum(value for value in values.values() if not math.isnan(value))
        self._scored = []
        self.log("val_score", score)

    def configure_optimizers(self) -> Any:
        """Return Adam and the schedule of the recipe."""
        recipe = self.recipe
        optimizer = torch.optim.Adam((p for p in self.student.parameters() if p.requires_grad), lr=recipe.lr)
        total = int(self.trainer.estimated_stepping_batches)
        per_epoch = total / recipe.epochs
        fall = None if recipe.annealing_start is None else recipe.annealing_start * per_epoch

        def factor(calls: int) -> float:
            if not calls and recipe.full_first_step:
                return 1.0
            return learning_rate_factor(calls + 1, rise=recipe.warmup_epochs * per_epoch, fall=fall, end=total)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _entropy(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Return the mean binary cross-entropy, in float32 also where the network answers in half precision."""
    with torch.autocast(device_type=probabilities.device.type, enabled=False):
        return functional.binary_cross_entropy(probabilities.float(), targets.float())


def fit_sed(
    data: Sequence[str | Path],
    out: str | Path,
    recipe: SedRecipe,
    *,
    name: str | None = None,
    device: Device = "auto",
    cache_gib: float = 4.0,
    test: bool = True,
    energy: str | None = None,
    embeddings: str | Path | None = None,
    progress: bool = True,
    resume: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Train a detector and return the report that is also written as ``report.json``.

    Args:
        data: folders or tables with strong, weak and unlabelled parts, see :func:`train_torch.sed_data.read_scenes`.
        out: run folder; made, and refused if it holds a run, unless ``resume`` or ``force``.
        recipe: what to do.
        name: of the model; by default made from the run folder's.
        device: where to train.
        cache_gib: memory for features of clips.
        test: score the test split, if there is one, once at the end.
        energy: country, as a code of three letters, for whose power the energy of the run is reported; None: not.
        embeddings: for a model that takes them: an exported encoder or stored ones, see
            :func:`train_torch.sed_embeddings.open_embeddings`.
        progress: show bars.
        resume: go on after the last complete epoch of the run in ``out``.
        force: replace the run in ``out``.

    Raises:
        AudioClassifierError: bad data, options or device; nothing has been trained then.
        OutputWriteError: the disk is full; what was written before is complete.
    """
    started = time.monotonic()
    folder = Path(out)
    check_run_folder(folder, recipe, OWN_FILES, resume=resume, force=force)
    if resume and (folder / REPORT).exists():
        _log.info("%s: this run is finished; nothing to resume", folder)
        return cast(dict[str, Any], json.loads((folder / REPORT).read_text(encoding="utf-8")))
    scenes = read_scenes(
        data,
        aliases=recipe.aliases,
        val_fraction=recipe.val_fraction,
        seed=recipe.seed if recipe.split_seed is None else recipe.split_seed,
    )
    files = scenes.dataset.by_file()
    _log.info("%s", count_table(files))
    for remark in files.remarks():
        _log.info("note: %s", remark)
    overlapping = scenes.dataset.overlapping()
    if overlapping:
        _log.info(
            "note: in %d clips events of one class overlap or touch, and count as one, e.g. in %s",
            len(overlapping),
            overlapping[0],
        )
    torch.manual_seed(recipe.seed)
    spec = _frontend(recipe)
    fixed = {"num_classes": len(files.labels), "n_mels": spec.mel.n_mels}
    student = create_model(recipe.model, **{**recipe.model_options, **fixed})
    embedder = None if embeddings is None else open_embeddings(embeddings, spec.sample_rate)
    _check_embeddings(student, recipe, embeddings)
    samples = round(recipe.seconds * spec.sample_rate)
    parts = {part: sum(r.part == part and r.split == "train" for r in files.records) for part in _parts(recipe)}
    card = new_card(
        name or name_of(folder),
        recipe.model,
        model=student,
        frontend=spec,
        task="event_detection",
        labels=files.labels,
        length_policy=LengthPolicy(min=samples, max=samples, short="zero", long="crop"),
        thresholds=dict.fromkeys(files.labels, recipe.threshold),
        median_filters=dict.fromkeys(files.labels, recipe.median_seconds),
        license=recipe.license,
        training_data=recipe.training_data,
        provenance={
            "recipe": recipe.to_dict(),
            "seed": recipe.seed,
            "split_sha256": split_hash_of(files),
            "training_clips": parts,
            **({} if embeddings is None else {"embeddings": Path(embeddings).name}),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "lightning": lightning.__version__,
                "numpy": np.__version__,
            },
        },
    )
    if card.frame_output() is None:
        raise SpecError(f"model: {recipe.model!r} scores no frames, so it finds no events; use crnn", field="model")
    module = SceneDataModule(scenes, card, recipe, cache_gib=cache_gib, progress=progress, embedder=embedder)
    learner = MeanTeacher(student, card, recipe, module.parts["validation"])
    prepare_run_folder(folder, recipe, files, OWN_FILES, resume=resume)
    run = RunFolder(folder, card, learner.networks)
    callbacks: list[Callback] = [Progress()] if progress else []
    if recipe.patience:
        callbacks.append(EarlyStopping("val_score", mode="max", patience=recipe.patience))
    callbacks.append(run)
    meter = nullcontext() if energy is None else measured_energy(energy)
    with expected_warnings(), meter as used:
        trainer = lightning.Trainer(
            accelerator=accelerator_of(device),
            devices=1,
            precision=recipe.precision,
            max_epochs=recipe.epochs,
            check_val_every_n_epoch=recipe.validate_every,
            gradient_clip_val=recipe.gradient_clip,
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO()],
            logger=False,
            enable_checkpointing=True,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            default_root_dir=folder,
        )
        state = folder / STATE
        trainer.fit(learner, module, ckpt_path=state if resume and state.exists() else None, weights_only=True)
    save_checkpoint(folder / "last.safetensors", learner.student, run.card_of(learner.student), force=True)
    report: dict[str, Any] = {"model": card.name, "best_epoch": run.best_epoch, "epochs": len(run.history)}
    splits = {"validation": module.parts["validation"]}
    if test and any(record.split == "test" for record in files.records):
        splits["test"] = SceneData(
            scenes.select("test"), card, recipe, cache_gib=cache_gib, progress=progress, embedder=embedder
        )
    options = EventOptions.of(card)
    if not has_sed_extra():
        _log.info("%s", WITHOUT_EXTRA)
    for stem in learner.networks:
        best = load_checkpoint(folder / f"{stem}.safetensors")
        measured: dict[str, float] = {}
        for split, part in splits.items():
            found = evaluate_scenes(best.model, part, device=learner.device).metrics(options)
            values = {metric: value for metric, value in found.items() if not math.isnan(value)}
            report.setdefault(split, {})["student" if stem == "model" else "teacher"] = values
            measured |= {f"{split}_{metric}": value for metric, value in values.items()}
        save_checkpoint(folder / f"{stem}.safetensors", best.model, best.card.replace(metrics=measured), force=True)
    plot_detection_curves(run.history, folder / "learning_curves.png")
    report["seconds"] = {
        "training": sum(row["seconds"] for row in run.history),
        "this_process": time.monotonic() - started,
    }
    if used is not None:
        report["energy_kwh"] = used.kwh
    with replacing(folder / REPORT, force=True) as partial:
        partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _check_embeddings(network: nn.Module, recipe: SedRecipe, embeddings: str | Path | None) -> None:
    """Refuse embeddings that the model does not take, and their absence where it does."""
    takes = any(part.source == "encoder" for part in cast(Any, network).inputs)
    if takes != (embeddings is not None):
        raise SpecError(
            "embeddings: the model takes none; choose a fusion in model_options, or leave them out"
            if embeddings is not None
            else "embeddings: the model joins embeddings to its features; give an encoder or stored ones",
            field="model_options",
        )
    if takes and recipe.frame_shift:
        raise SpecError(
            "frame_shift: moves features, and embeddings would stay behind; set it to 0", field="frame_shift"
        )


def _parts(recipe: SedRecipe) -> list[str]:
    return list(dict.fromkeys(group.part for group in recipe.groups))


def _frontend(recipe: SedRecipe) -> FrontendSpec:
    """Return the front end of the recipe: a preset, with other bands or another hop where it says so."""
    spec = get_frontend(recipe.frontend)
    if recipe.n_mels is not None:
        spec = spec.replace(mel=spec.mel.replace(n_mels=recipe.n_mels))
    if recipe.hop_length is not None:
        spec = spec.replace(framing=spec.framing.replace(hop_length=recipe.hop_length))
    return spec
