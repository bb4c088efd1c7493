"""The training command: ``python -m train_torch fit | fit-sed | evaluate | teach | compare | soundscapes |
mixtures | scenes | pairs | recipes``.

Results go to stdout, everything else to stderr. Exit codes: 0 fine, 2 bad data, options or environment (one line).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from models_zoo.errors import AudioClassifierError, SpecError
from models_zoo.schema import Declaration
from train_torch.recipes import DistillationRecipe, Recipe, get_recipe, list_recipes
from train_torch.recipes.sed import SedRecipe

__all__ = ["main"]

_AnyRecipe = TypeVar("_AnyRecipe", bound=Declaration)

_PRECISIONS = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m train_torch", description="Train and evaluate audio classifiers.")
    commands = parser.add_subparsers(dest="command", required=True)

    fit = commands.add_parser(
        "fit",
        help="train a model on labelled recordings",
        description="Train a model on a folder of class folders, a metadata.csv or ESC-50. The recipe decides what "
        "happens; the options below override single fields of it.",
    )
    fit.add_argument("--data", required=True, help="folder with the recordings, or its table")
    fit.add_argument("--out", required=True, help="run folder to write")
    fit.add_argument("--recipe", default="default", help=f"a .json file, or one of: {', '.join(list_recipes())}")
    fit.add_argument("--name", help="name of the model (default: the run folder's)")
    recipe = fit.add_argument_group("recipe fields")
    recipe.add_argument("--model", help="architecture, e.g. mn04, mn10")
    recipe.add_argument("--frontend", help="front-end preset, e.g. efficientat, efficientat_mels64")
    recipe.add_argument("--task", choices=("single_label", "multi_label", "label_distribution"))
    recipe.add_argument("--epochs", type=int)
    recipe.add_argument("--batch-size", type=int)
    recipe.add_argument("--lr", type=float, help="peak learning rate")
    recipe.add_argument("--freeze", nargs="+", metavar="PREFIX", help="leave these parts as they are, e.g. features.0")
    recipe.add_argument("--layer-decay", type=float, help="factor on the learning rate per block away from the head")
    recipe.add_argument("--seed", type=int)
    recipe.add_argument("--seconds", type=float, help="longest training clip; longer ones are cropped at random")
    recipe.add_argument("--patience", type=int, help="epochs without improvement before stopping; 0: never")
    recipe.add_argument("--val-fraction", type=float, help="share set aside where the data has no validation split")
    recipe.add_argument("--precision", choices=tuple(_PRECISIONS), help="16 and bf16: mixed precision")
    recipe.add_argument(
        "--set",
        metavar="FIELD=VALUE",
        nargs="+",
        default=[],
        help="any field of the recipe, e.g. loss.class_balanced=0.9999 augmentation.gain_db=[-6,6]",
    )
    start = fit.add_argument_group("starting point")
    start.add_argument(
        "--init", metavar="CHECKPOINT", help="fine-tune: a published model's name, e.g. mn10_as, or a file"
    )
    start.add_argument("--card", metavar="NAME", help="card of a file that holds none; alone, the same as --init NAME")
    _add_checkpoints(start)
    start.add_argument(
        "--teacher",
        metavar="CHECKPOINT",
        nargs="+",
        default=[],
        help="distil from these: the mean of their logits on every batch (distillation.weight 0.9 where the recipe "
        "says nothing)",
    )
    start.add_argument("--teacher-logits", metavar="FILE", help="distil from stored logits, see: teach")
    start.add_argument("--resume", action="store_true", help="go on with the run in --out after its last full epoch")
    start.add_argument("--force", action="store_true", help="replace the run in --out")
    _add_split_options(fit, ("file", "speaker", "fold"))
    fit.add_argument(
        "--validate-by", choices=("file", "speaker", "fold"), help="how validation is carved (default: as --split-by)"
    )
    fit.add_argument("--no-test", action="store_true", help="leave the test split untouched")
    machine = fit.add_argument_group("machine")
    _add_device(machine)
    machine.add_argument("--devices", type=int, default=1, help="how many of them (default 1)")
    machine.add_argument("--workers", type=int, default=0, help="processes that prepare batches (default 0)")
    machine.add_argument("--threads", type=int, help="CPU threads of torch")
    machine.add_argument(
        "--cache-gib",
        type=float,
        default=4.0,
        help="memory for decoded clips, and again for features that are alike in every epoch (default 4)",
    )
    machine.add_argument("--tensorboard", action="store_true", help="TensorBoard logs (imports TensorFlow if present)")
    machine.add_argument("--quiet", action="store_true", help="no progress bar")
    fit.set_defaults(run=_fit)

    detect = commands.add_parser(
        "fit-sed",
        help="train a sound event detector on strong, weak and unlabelled clips",
        description="Train a student and its mean teacher on tables with onsets and offsets (strong), classes alone "
        "(weak) and nothing (unlabelled), see: scenes. Each data set knows the classes of its own table.",
    )
    detect.add_argument("--data", required=True, nargs="+", help="folders with a metadata.csv, or tables")
    detect.add_argument("--out", required=True, help="run folder to write")
    detect.add_argument("--recipe", default="scenes_crnn", help="a .json file, or the name of a recipe for events")
    detect.add_argument("--name", help="name of the model (default: the run folder's)")
    detect.add_argument("--seed", type=int, help="in place of the recipe's")
    detect.add_argument("--epochs", type=int, help="in place of the recipe's")
    detect.add_argument(
        "--set", metavar="FIELD=VALUE", nargs="+", default=[], help="any field of the recipe, e.g. lr=0.002 mixup=hard"
    )
    detect.add_argument(
        "--embeddings",
        metavar="PATH",
        help="for a model with a fusion: an exported encoder (.onnx), an .npz file with an array for each clip, or a "
        "folder of .npy files",
    )
    detect.add_argument("--no-test", action="store_true", help="leave the test split untouched")
    detect.add_argument("--resume", action="store_true", help="go on with the run in --out after its last full epoch")
    detect.add_argument("--force", action="store_true", help="replace the run in --out")
    detect.add_argument("--energy", metavar="COUNTRY", help="report the energy used, e.g. FRA (needs codecarbon)")
    _add_device(detect)
    detect.add_argument("--threads", type=int, help="CPU threads of torch")
    detect.add_argument("--cache-gib", type=float, default=4.0, help="memory for features of clips (default 4)")
    detect.add_argument("--quiet", action="store_true", help="no progress bar")
    detect.set_defaults(run=_fit_sed)

    evaluate = commands.add_parser("evaluate", help="score a checkpoint on labelled recordings")
    evaluate.add_argument(
        "checkpoint",
        nargs="+",
        help="a .safetensors file, a published .pt, or a published model's name; of several, the mean of their logits",
    )
    evaluate.add_argument("--data", required=True, help="folder with the recordings, or its table")
    evaluate.add_argument("--card", metavar="NAME", help="card of a file that holds none")
    _add_checkpoints(evaluate)
    evaluate.add_argument("--split", help="train, validation or test (default: every clip)")
    evaluate.add_argument(
        "--frames",
        choices=("middle", "all"),
        default="middle",
        help="of several pictures of a clip: look at the middle one, or average over all (default middle)",
    )
    _add_mode(evaluate)
    _add_split_options(evaluate, ("speaker", "fold"))
    evaluate.add_argument("--json", action="store_true", help="print JSON instead of tables")
    _add_device(evaluate)
    evaluate.add_argument("--threads", type=int, help="CPU threads of torch")
    evaluate.add_argument("--quiet", action="store_true", help="no progress bar")
    evaluate.set_defaults(run=_evaluate)

    teach = commands.add_parser("teach", help="store what one or more checkpoints answer, to distil from")
    teach.add_argument("checkpoint", nargs="+", help="as for evaluate; of several, the mean of their logits")
    teach.add_argument("--data", required=True, help="folder with the recordings, or its table")
    teach.add_argument("-o", "--out", required=True, help=".npz to write: files, logits, labels")
    teach.add_argument("--card", metavar="NAME", help="card of files that hold none")
    _add_checkpoints(teach)
    teach.add_argument("--split", help="train, validation or test (default: every clip)")
    _add_device(teach)
    teach.add_argument("--threads", type=int, help="CPU threads of torch")
    teach.add_argument("--quiet", action="store_true", help="no progress bar")
    teach.add_argument("--force", action="store_true", help="replace the file")
    teach.set_defaults(run=_teach)

    combine = commands.add_parser(
        "combine",
        help="make one model of several checkpoints: the mean of their answers",
        description="Write several checkpoints with the same front end and labels as one checkpoint, whose answer is "
        "the weighted mean of theirs; it exports to one graph and serves like any other.",
    )
    combine.add_argument("checkpoint", nargs="+", help="as for evaluate")
    combine.add_argument("-o", "--out", required=True, help=".safetensors to write")
    combine.add_argument("--card", metavar="NAME", help="card of files that hold none")
    _add_checkpoints(combine)
    combine.add_argument("--name", help="of the ensemble (default: made from the file's)")
    combine.add_argument("--weights", type=float, nargs="+", metavar="W", help="of the members (default: equal)")
    combine.add_argument(
        "--mean", choices=("probabilities", "logits"), default="probabilities", help="what is averaged"
    )
    combine.add_argument("--force", action="store_true", help="replace the file")
    combine.set_defaults(run=_combine)

    compare = commands.add_parser(
        "compare",
        help="run recipes against each other over paired seeds",
        description="Run every recipe with every seed; runs of a seed share split, thinning, order and, where the "
        "architectures agree, initial weights. Prints the differences on the test split with their 95 % intervals. "
        "Finished runs are not repeated.",
    )
    compare.add_argument("--recipes", required=True, nargs="+", help=".json files or recipe names, the baseline first")
    compare.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds 1 to N (default 5)")
    compare.add_argument("--data", required=True, help="folder with the recordings, or its table")
    compare.add_argument("--out", required=True, help="folder to write")
    compare.add_argument("--metric", default="balanced_accuracy", help="of the test split (default balanced_accuracy)")
    compare.add_argument("--init", metavar="CHECKPOINT", help="start all runs from these weights")
    compare.add_argument(
        "--teacher", metavar="CHECKPOINT", nargs="+", default=[], help="for recipes that distil; {seed} is filled in"
    )
    compare.add_argument("--teacher-logits", metavar="FILE", help="the same, stored")
    compare.add_argument("--force", action="store_true", help="repeat everything")
    _add_device(compare)
    compare.add_argument("--threads", type=int, help="CPU threads of torch")
    compare.add_argument("--cache-gib", type=float, default=4.0, help="memory for decoded clips (default 4)")
    compare.add_argument("--quiet", action="store_true", help="no progress bar")
    compare.set_defaults(run=_compare)

    soundscapes = commands.add_parser("soundscapes", help="make the built-in labelled sounds")
    soundscapes.add_argument("--out", required=True, help="folder to write")
    soundscapes.add_argument("--clips", type=int, default=200, help="how many (default 200)")
    soundscapes.add_argument("--seconds", type=float, default=2.0, help="length of each (default 2)")
    soundscapes.add_argument("--sample-rate", type=int, default=32000, help="Hz (default 32000)")
    soundscapes.add_argument("--events", type=int, default=1, help="sounds per clip, at most (default 1)")
    soundscapes.add_argument(
        "--class-folders", action="store_true", help="train/bell/00000.wav, ... in place of audio/ and a table"
    )
    soundscapes.add_argument("--seed", type=int, default=0)
    soundscapes.add_argument("--force", action="store_true", help="replace an earlier folder's table and clips")
    soundscapes.set_defaults(run=_soundscapes)

    mixtures = commands.add_parser(
        "mixtures",
        help="make clips of overlapped words, labelled with their shares",
        description="Mix labelled recordings of single words, two or three at a time in known shares: data for the "
        "task label_distribution. Training mixtures are made of training recordings alone, and so on.",
    )
    mixtures.add_argument("--data", required=True, help="folder with recordings of one label each, or its table")
    mixtures.add_argument("--out", required=True, help="folder to write")
    mixtures.add_argument("--clips", type=int, default=2000, help="how many; a fifth of them for test (default 2000)")
    mixtures.add_argument("--seconds", type=float, default=1.0, help="length of each (default 1)")
    mixtures.add_argument(
        "--words", type=int, nargs=2, default=(2, 3), metavar=("FEWEST", "MOST"), help="per clip (default 2 3)"
    )
    mixtures.add_argument("--frontend", default="mrms", help="whose rate and channel rule are used (default mrms)")
    mixtures.add_argument("--seed", type=int, default=0)
    mixtures.add_argument("--quiet", action="store_true", help="no progress bar")
    mixtures.add_argument("--force", action="store_true", help="replace an earlier folder's table and clips")
    mixtures.set_defaults(run=_mixtures)

    scenes = commands.add_parser(
        "scenes",
        help="make scenes for sound event detection: labelled sounds at known times on a background",
        description="Place labelled recordings, or the built-in sounds, at known times on a background: scenes whose "
        "events are known with their times (strong), by class alone (weak), or not at all (unlabelled). Training "
        "scenes are made of training recordings alone, and so on.",
    )
    scenes.add_argument(
        "--data", nargs="+", default=[], help="folders with recordings of one label each (default: built-in sounds)"
    )
    scenes.add_argument("--classes", nargs="+", default=[], help="use these of their classes only")
    scenes.add_argument("--background", help="folder with labelled recordings to lie under them (default: noise)")
    scenes.add_argument("--out", required=True, help="folder to write")
    for kind, default in (("strong", 150), ("weak", 150), ("unlabelled", 300), ("validation", 50), ("test", 200)):
        scenes.add_argument(f"--{kind}", type=int, default=default, help=f"how many (default {default})")
    scenes.add_argument("--seconds", type=float, default=10.0, help="length of each (default 10)")
    for name, low, high, kind, what in (
        ("events", 1, 5, int, "per scene"),
        ("event-seconds", 0.25, 3.0, float, "length of an event"),
        ("snr", 6.0, 30.0, float, "level of an event above the background, dB"),
    ):
        scenes.add_argument(
            f"--{name}", type=kind, nargs=2, default=(low, high), metavar=("LOW", "HIGH"),
            help=f"{what} (default {low} {high})",
        )  # fmt: skip
    scenes.add_argument("--polyphony", type=int, default=2, help="most events that sound at once (default 2)")
    scenes.add_argument("--frontend", default="dcase_2024", help="whose rate and channel rule are used")
    scenes.add_argument("--seed", type=int, default=0)
    scenes.add_argument("--quiet", action="store_true", help="no progress bar")
    scenes.add_argument("--force", action="store_true", help="replace an earlier folder's table and scenes")
    scenes.set_defaults(run=_scenes)

    pairs = commands.add_parser(
        "pairs",
        help="make pairs of sound and picture for audio-visual training",
        description="Give every labelled recording, or built-in sound, a rendered picture whose glyph stands for its "
        "label; place, size, colours and background are chance. A pair is in the split of its recording.",
    )
    pairs.add_argument(
        "--data", help="folder with recordings of one label each, or its table (default: built-in sounds)"
    )
    pairs.add_argument("--out", required=True, help="folder to write")
    pairs.add_argument(
        "--ambiguous", action="store_true", help="picture and sound each tell only one half of the label"
    )
    pairs.add_argument("--frames", type=int, default=1, help="pictures per clip, as of a video (default 1)")
    pairs.add_argument("--size", type=int, default=224, help="short side of the pictures in pixels (default 224)")
    pairs.add_argument("--format", choices=("jpeg", "png"), default="jpeg", help="of the pictures")
    pairs.add_argument("--seed", type=int, default=0)
    pairs.add_argument("--quiet", action="store_true", help="no progress bar")
    pairs.add_argument("--force", action="store_true", help="replace an earlier folder's table, clips and pictures")
    pairs.set_defaults(run=_pairs)

    recipes = commands.add_parser("recipes", help="list the recipes that come with the package, or print one")
    recipes.add_argument("name", metavar="NAME", nargs="?", help="print this one as JSON: a start for your own file")
    recipes.set_defaults(run=_recipes)
    return parser


def _add_split_options(parser: argparse.ArgumentParser, groups: Sequence[str]) -> None:
    parser.add_argument("--split-by", choices=groups, help="keep the clips of one speaker or fold on one side")
    parser.add_argument(
        "--hold-out", metavar="GROUP", nargs="+", default=[], help="test on these speakers or folds (with --split-by)"
    )


def _add_mode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mode",
        choices=("multimodal", "audioonly", "videoonly", "missingaudioonly", "missingvideoonly"),
        help="of a cavmaeft, in place of its own: what it is given",
    )


def _add_checkpoints(parser: Any) -> None:
    parser.add_argument(
        "--checkpoints",
        metavar="DIR",
        help="folder with published checkpoints; missing ones are downloaded into it (default: $CROSSFADE_CACHE, else "
        "the user's cache folder)",
    )


def _add_device(parser: Any) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def _set_threads(threads: int | None) -> None:
    import torch

    if threads is not None:
        torch.set_num_threads(max(threads, 1))


def _quieten_lightning() -> None:
    """Keep Lightning's own log out of ours; it sets its levels when it is imported."""
    for name in ("lightning", "lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _with_fields(recipe: _AnyRecipe, given: Mapping[str, Any], assignments: Sequence[str]) -> _AnyRecipe:
    """Return ``recipe`` as the command line wants it.

    Args:
        recipe: to start from.
        given: field -> value of options of their own; None leaves the recipe's.
        assignments: ``field.inner=value``, applied in order; values are JSON, or text where they are not.
    """
    # All at once: fields that only go together may be changed together.
    data: dict[str, Any] = recipe.to_dict() | {field: value for field, value in given.items() if value is not None}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        *outer, last = path.split(".")
        part: Any = data
        for name in outer:
            if isinstance(part, dict) and part.get(name, "") is None:
                part[name] = {}  # a part that is off by default is switched on by setting something in it
            part = part.get(name) if isinstance(part, dict) else None
        if not equals or not isinstance(part, dict):
            raise SpecError(
                f"--set {assignment}: expected FIELD=VALUE with a field of the recipe, e.g. "
                "loss.class_balanced=0.9999; python -m train_torch recipes default prints them all",
                field=path,
            )
        try:
            part[last] = json.loads(text)
        except ValueError:
            part[last] = text
    return type(recipe).from_dict(data)


def _fit(options: argparse.Namespace) -> None:
    overrides = {field: getattr(options, field, None) for field in Recipe.model_fields if field != "precision"}
    if options.precision is not None:
        overrides["precision"] = _PRECISIONS[options.precision]
    found = get_recipe(options.recipe)
    if isinstance(found, SedRecipe):
        raise SpecError(f"--recipe {options.recipe}: is for sound event detection; train with fit-sed", field="task")
    recipe = _with_fields(found, overrides, options.set)
    for field in ("model", "frontend"):
        if (options.init or options.card) and getattr(options, field) is not None:
            raise SpecError(
                f"--{field} {getattr(options, field)}: a checkpoint to start from (--init, --card) brings its own "
                f"{field}; leave out one of them",
                field=field,
            )
    if (options.teacher or options.teacher_logits) and recipe.distillation is None:
        recipe = recipe.replace(distillation=DistillationRecipe())

    from train_torch.train import fit

    _quieten_lightning()
    _set_threads(options.threads)
    with _resumable(options.out):
        report = fit(
            options.data,
            options.out,
            recipe,
            name=options.name,
            split_by=options.split_by,
            hold_out=tuple(options.hold_out),
            validate_by=options.validate_by,
            init=options.init or options.card,
            init_card=options.card,
            checkpoints=options.checkpoints,
            teachers=options.teacher,
            teacher_logits=options.teacher_logits,
            device=options.device,
            devices=options.devices,
            workers=options.workers,
            cache_gib=options.cache_gib,
            test=not options.no_test,
            tensorboard=options.tensorboard,
            progress=not options.quiet,
            resume=options.resume,
            force=options.force,
        )
    for split in ("validation", "test"):
        for metric, value in report.get(split, {}).get("metrics", {}).items():
            sys.stdout.write(f"{split} {metric}: {value:.4f}\n")


@contextmanager
def _resumable(out: str) -> Iterator[None]:
    """Exit with the code of the signal that stopped a training, saying how to go on."""
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    try:
        yield
    except SIGTERMException:
        sys.stderr.write(f"stopped by SIGTERM; the same command with --resume goes on with {out}\n")
        sys.exit(128 + signal.SIGTERM)
    except SystemExit:  # how Lightning passes Ctrl-C on
        sys.stderr.write(f"interrupted; the same command with --resume goes on with {out}\n")
        sys.exit(128 + signal.SIGINT)


def _fit_sed(options: argparse.Namespace) -> None:
    recipe = get_recipe(options.recipe)
    if not isinstance(recipe, SedRecipe):
        raise SpecError(f"--recipe {options.recipe}: has the task {recipe.task!r}; train with fit", field="task")
    recipe = _with_fields(recipe, {"seed": options.seed, "epochs": options.epochs}, options.set)

    from train_torch.sed import fit_sed

    _quieten_lightning()
    _set_threads(options.threads)
    with _resumable(options.out):
        report = fit_sed(
            options.data,
            options.out,
            recipe,
            name=options.name,
            device=options.device,
            cache_gib=options.cache_gib,
            test=not options.no_test,
            energy=options.energy,
            embeddings=options.embeddings,
            progress=not options.quiet,
            resume=options.resume,
            force=options.force,
        )
    for split in ("validation", "test"):
        for network, values in report.get(split, {}).items():
            for metric, value in values.items():
                sys.stdout.write(f"{split} {network} {metric}: {value:.4f}\n")
    if "energy_kwh" in report:
        sys.stdout.write(f"energy: {report['energy_kwh']:.6f} kWh\n")


def _evaluate(options: argparse.Namespace) -> None:
    from train_torch.evaluation import evaluate

    _set_threads(options.threads)
    evaluation = evaluate(
        options.checkpoint,
        options.data,
        card=options.card,
        checkpoints=options.checkpoints,
        split=options.split,
        split_by=options.split_by,
        hold_out=tuple(options.hold_out),
        frames=options.frames,
        mode=options.mode,
        device=options.device,
        progress=not options.quiet,
    )
    text = json.dumps(evaluation.to_dict(), indent=2) if options.json else evaluation.table()
    sys.stdout.write(text + "\n")


def _teach(options: argparse.Namespace) -> None:
    from train_torch.distill import teach
    from train_torch.evaluation import accelerator_of

    _set_threads(options.threads)
    stored = teach(
        options.checkpoint,
        options.data,
        options.out,
        card=options.card,
        folder=options.checkpoints,
        split=options.split,
        device="cuda" if accelerator_of(options.device) == "gpu" else "cpu",
        progress=not options.quiet,
        force=options.force,
    )
    sys.stdout.write(f"{options.out}: {len(stored.files)} clips, {len(stored.labels)} labels\n")


def _combine(options: argparse.Namespace) -> None:
    from train_torch.checkpoint import save_checkpoint
    from train_torch.models.ensemble import combine
    from train_torch.run_folder import name_of

    network, card = combine(
        options.checkpoint,
        options.card,
        name=options.name or name_of(Path(options.out).with_suffix("")),
        weights=options.weights,
        mean=options.mean,
        checkpoints=options.checkpoints,
    )
    save_checkpoint(options.out, network, card, force=options.force)
    sys.stdout.write(f"{options.out}: {card.name}, the mean of {len(options.checkpoint)} models\n")


def _compare(options: argparse.Namespace) -> None:
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from train_torch.compare import compare

    _quieten_lightning()
    _set_threads(options.threads)
    try:
        comparison = compare(
            options.recipes,
            options.data,
            options.out,
            seeds=range(1, options.seeds + 1),
            metric=options.metric,
            teachers=options.teacher,
            teacher_logits=options.teacher_logits,
            init=options.init,
            device=options.device,
            cache_gib=options.cache_gib,
            progress=not options.quiet,
            force=options.force,
        )
    except (SIGTERMException, SystemExit) as error:  # SystemExit is how Lightning passes Ctrl-C on
        sys.stderr.write("stopped; the same command (without --force) goes on where it was\n")
        sys.exit(128 + (signal.SIGTERM if isinstance(error, SIGTERMException) else signal.SIGINT))
    sys.stdout.write(comparison.markdown() + "\n")


def _soundscapes(options: argparse.Namespace) -> None:
    from models_zoo.soundscapes import write_soundscapes

    table = write_soundscapes(
        options.out,
        num_clips=options.clips,
        seed=options.seed,
        sample_rate=options.sample_rate,
        seconds=options.seconds,
        events_per_clip=options.events,
        class_folders=options.class_folders,
        force=options.force,
    )
    sys.stdout.write(f"{table}\n")


def _mixtures(options: argparse.Namespace) -> None:
    from models_zoo.mixtures import write_mixtures
    from models_zoo.presets import get_frontend

    table = write_mixtures(
        options.data,
        options.out,
        get_frontend(options.frontend),
        num_clips=options.clips,
        seed=options.seed,
        seconds=options.seconds,
        words=tuple(options.words),
        force=options.force,
        progress=not options.quiet,
    )
    sys.stdout.write(f"{table}\n")


def _scenes(options: argparse.Namespace) -> None:
    from models_zoo.presets import get_frontend
    from models_zoo.scenes import SceneSettings, write_scenes

    table = write_scenes(
        options.out,
        get_frontend(options.frontend),
        counts={kind: getattr(options, kind) for kind in ("strong", "weak", "unlabelled", "validation", "test")},
        data=options.data,
        classes=options.classes,
        background=options.background,
        settings=SceneSettings(
            seconds=options.seconds,
            events=tuple(options.events),
            event_seconds=tuple(options.event_seconds),
            snr_db=tuple(options.snr),
            max_polyphony=options.polyphony,
        ),
        seed=options.seed,
        force=options.force,
        progress=not options.quiet,
    )
    sys.stdout.write(f"{table}\n")


def _pairs(options: argparse.Namespace) -> None:
    from models_zoo.pairs import write_pairs

    table = write_pairs(
        options.out,
        data=options.data,
        seed=options.seed,
        ambiguous=options.ambiguous,
        frames=options.frames,
        size=options.size,
        picture_format=options.format,
        force=options.force,
        progress=not options.quiet,
    )
    sys.stdout.write(f"{table}\n")


def _recipes(options: argparse.Namespace) -> None:
    if options.name is not None:
        sys.stdout.write(get_recipe(options.name).to_json(indent=2) + "\n")
        return
    names = list_recipes()
    for name in names:
        sys.stdout.write(f"{name:<{max(map(len, names))}}  {get_recipe(name).description}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = _parser().parse_args(argv)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    logging.getLogger("train_torch").setLevel(logging.INFO)
    try:
        options.run(options)
    except AudioClassifierError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
