"""A trained model becomes one ONNX file: exported, verified, and only then given its name."""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, cast

import onnx
import torch
from torch import Tensor, nn

from export.batching import clip_by_clip
from export.verify import Verification, example_inputs, legal_lengths, verify_onnx
from export.winograd import Convolutions, rewrite_convolutions
from models_zoo.cards import CARD_KEY, CONVOLUTIONS_KEY, VERIFICATION_KEY, ModelCard, ModelInput, ModelOutput
from models_zoo.errors import CheckpointError, DataError, ExportError
from models_zoo.files import check_writable, replacing
from models_zoo.labels import check_labels
from train_torch.checkpoint import load_checkpoint
from train_torch.models import Model, check_card, clip_form
from train_torch.models.cavmae import Mode
from train_torch.published_file import Weights
from train_torch.transfer import in_mode

__all__ = [
    "CHECKPOINT_KEY",
    "EXPORTER_KEY",
    "OPSETS",
    "OPSET_KEY",
    "export_checkpoint",
    "export_onnx",
]

CHECKPOINT_KEY = "crossfade.checkpoint_sha256"
OPSET_KEY = "crossfade.opset"
EXPORTER_KEY = "crossfade.exporter"

_log = logging.getLogger(__name__)

OPSETS = {"torchscript": 17, "dynamo": 18}
"""ONNX operator set per exporter: 17 is the oldest that holds our graphs, so the most runtimes read it; 18 is what
dynamo writes itself (older ones go through a converter)."""

_EXAMPLE_BATCH = 2  # an example batch of 1 becomes a constant in the graph, without an error


def export_onnx(
    model: nn.Module,
    card: ModelCard,
    path: str | Path,
    *,
    force: bool = False,
    checkpoint_sha256: str | None = None,
    convolutions: Convolutions = "winograd",
    progress: bool = False,
) -> Verification:
    """Write ``model`` as one verified ``.onnx`` file with its card inside, or nothing.

    Args:
        model: the network; exported in evaluation mode from a copy on the CPU.
        card: of the model; ``card.exporter`` chooses the exporter.
        path: of the file.
        force: replace an existing file.
        checkpoint_sha256: of the checkpoint the weights came from, recorded in the file.
        convolutions: ``winograd`` for those of many channels, see :mod:`export.winograd`, where a CPU will run the
            file; ``direct`` where a GPU will, whose libraries choose the form themselves, or for a file as small as
            the checkpoint. Recorded in the file.
        progress: say on stderr what is being done.

    Returns:
        The comparison with the model; also in the file, under ``crossfade.verification``.

    Raises:
        VerificationError: the graph departs from the model; no file is left.
        ExportError: torch could not export the model.
        CardError: the card does not describe the model.
        OutputExistsError: ``path`` exists and ``force`` is false.
        OutputWriteError: the operating system refused the write.
    """
    check_card(model, card)
    with replacing(path, force=force) as partial:
        _log.log(logging.INFO if progress else logging.DEBUG, "exporting %s with %s", card.name, card.exporter)
        exported, rewritten = _export(copy.deepcopy(model).cpu().eval(), card, convolutions)
        metadata = {
            CARD_KEY: card.to_json(),
            OPSET_KEY: str(OPSETS[card.exporter]),
            EXPORTER_KEY: f"{card.exporter} (torch {torch.__version__})",
            CONVOLUTIONS_KEY: f"winograd ({rewritten} of them)" if rewritten else "direct",
        }
        if checkpoint_sha256 is not None:
            metadata[CHECKPOINT_KEY] = checkpoint_sha256
        onnx.helper.set_model_props(exported, metadata)
        onnx.save_model(exported, partial)
        verification = verify_onnx(partial, model, card, progress=progress)
        onnx.helper.set_model_props(exported, {**metadata, VERIFICATION_KEY: verification.to_json()})
        onnx.save_model(exported, partial)
    return verification


def export_checkpoint(
    checkpoint: str | Path,
    path: str | Path,
    *,
    model: str | None = None,
    checkpoints: str | Path | None = None,
    name: str | None = None,
    labels_file: str | Path | None = None,
    exporter: Literal["torchscript", "dynamo"] | None = None,
    weights: Weights | None = None,
    mode: Mode | None = None,
    convolutions: Convolutions = "winograd",
    force: bool = False,
    progress: bool = False,
) -> tuple[ModelCard, Verification]:
    """Export a checkpoint file; return the card inside the ONNX file, and the comparison.

    Args:
        checkpoint: our ``.safetensors``, a published file, or the name of a published model.
        path: of the ONNX file.
        model: name of the card of a file that holds none.
        checkpoints: folder with published checkpoints, see :func:`~train_torch.download.checkpoint_folder`.
        name: for the exported model; None for the card's.
        labels_file: UTF-8 text, one class name per line in the model's order, for a card without labels; where the
            card has labels, they must be the same.
        exporter: None for the card's choice.
        weights: ``student`` or ``teacher``, of a mean teacher's file; None for those the card's figures are of.
        mode: of a CAV-MAE classifier, in place of its own, see :func:`~train_torch.transfer.in_mode`.
        convolutions: see :func:`export_onnx`.
        force: replace an existing file.

    Raises:
        CardError: the labels in the file are not those of the card; names the first that differs.
        AudioClassifierError: see :func:`~train_torch.checkpoint.load_checkpoint` and :func:`export_onnx`; also where
            the labels are more or fewer than the checkpoint's classes.
    """
    check_writable(path, force=force)
    labels = None if labels_file is None else _read_labels(Path(labels_file))
    num_classes = None if labels is None else len(labels)
    loaded = load_checkpoint(checkpoint, model, num_classes=num_classes, checkpoints=checkpoints, weights=weights)
    if mode is not None:
        loaded = in_mode(loaded, mode)
    untrained = sorted(set(loaded.replaced) & set(loaded.model.state_dict()))
    if untrained:
        raise CheckpointError(
            f"{checkpoint} scores another number of classes than the {len(labels or ())} labels given; exporting would "
            f"ship an untrained head ({', '.join(untrained)}); give as many labels, or train the head first"
        )
    card = loaded.card if name is None else loaded.card.replace(name=name)
    if labels is not None and card.labels is not None:
        check_labels(labels, card.labels, given=str(labels_file), expected=f"card {card.name!r}")
    elif labels is not None:
        card = card.replace(labels=labels)
    if exporter is not None and exporter != card.exporter:
        card = card.replace(exporter=exporter, exporter_reason="asked for")
    verification = export_onnx(
        loaded.model,
        card,
        path,
        force=force,
        checkpoint_sha256=loaded.sha256,
        convolutions=convolutions,
        progress=progress,
    )
    return card, verification


def _read_labels(path: Path) -> tuple[str, ...]:
    try:
        labels = tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines())
    except OSError as error:
        raise DataError(f"cannot read the labels in {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text; save the labels as UTF-8, one per line") from error
    if not labels or not all(labels):
        raise DataError(f"{path} has {'no lines' if not labels else 'an empty line'}; expected one label per line")
    return labels


class _Graph(nn.Module):
    """Positional inputs and a tuple of outputs, in the card's order: what both exporters name reliably."""

    def __init__(self, model: nn.Module, card: ModelCard) -> None:
        super().__init__()
        self.model = model
        self.input_names = [part.name for part in card.inputs]
        self.output_names = [part.name for part in card.outputs]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = cast(Model, self.model)(**dict(zip(self.input_names, inputs, strict=True)))
        return tuple(outputs[name] for name in self.output_names)


def _export(model: nn.Module, card: ModelCard, convolutions: Convolutions) -> tuple[onnx.ModelProto, int]:
    """Return the graph of ``model`` without metadata of the machine it was made on, and its rewritten convolutions."""
    form = clip_form(model)
    graph = _Graph(model if form is None else form, card).eval()
    lengths = legal_lengths(card)
    num_samples = lengths[len(lengths) // 2]
    example = tuple(example_inputs(card, num_samples, _EXAMPLE_BATCH if form is None else 1).values())
    fixed = () if form is None else ("batch",)
    export = _with_torchscript if card.exporter == "torchscript" else _with_dynamo
    try:
        with _quiet_exporters():
            exported = export(graph, example, card, fixed)
    # The exporters raise whatever their passes raise; a user needs to know that it was the export.
    except Exception as error:
        raise ExportError(
            f"torch's {card.exporter!r} exporter failed on {card.name!r}: {type(error).__name__}: {error}"
        ) from error
    # Stack traces hold paths of this machine, and nothing reads them.
    for part in (exported.graph, *exported.graph.node, *exported.graph.value_info, *exported.graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    rewritten = rewrite_convolutions(exported) if convolutions == "winograd" else 0
    return exported if form is None else clip_by_clip(exported, card), rewritten


def _dynamic_axes(part: ModelInput | ModelOutput, fixed: tuple[str, ...]) -> dict[int, str]:
    return {axis: name for axis, name in enumerate(part.axes) if not name.isdecimal() and name not in fixed}


def _with_torchscript(
    graph: _Graph, example: tuple[Tensor, ...], card: ModelCard, fixed: tuple[str, ...]
) -> onnx.ModelProto:
    buffer = io.BytesIO()
    torch.onnx.export(
        graph,
        example,
        buffer,
        dynamo=False,
        opset_version=OPSETS["torchscript"],
        input_names=graph.input_names,
        output_names=graph.output_names,
        dynamic_axes={part.name: _dynamic_axes(part, fixed) for part in (*card.inputs, *card.outputs)},
    )
    return onnx.load_model_from_string(buffer.getvalue())


def _with_dynamo(
    graph: _Graph, example: tuple[Tensor, ...], card: ModelCard, fixed: tuple[str, ...]
) -> onnx.ModelProto:
    names = {name for part in card.inputs for name in _dynamic_axes(part, fixed).values()}
    dimensions = {name: torch.export.Dim(name) for name in names}
    shapes = tuple(
        {axis: dimensions[name] for axis, name in _dynamic_axes(part, fixed).items()} for part in card.inputs
    )
    program = torch.onnx.export(
        graph,
        example,
        dynamo=True,
        verbose=False,
        opset_version=OPSETS["dynamo"],
        input_names=graph.input_names,
        output_names=graph.output_names,
        dynamic_shapes=(shapes,),
    )
    if program is None:
        raise ExportError("the exporter returned no program")
    return program.model_proto


@contextmanager
def _quiet_exporters() -> Iterator[None]:
    """Silence what the exporters say about themselves; anything about the model still shows."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    with warnings.catch_warnings():
        # torch announces that its TorchScript exporter is no longer the default; the card records why we choose it.
        warnings.filterwarnings("ignore", "You are using the legacy TorchScript-based ONNX export", DeprecationWarning)
        warnings.filterwarnings("ignore", "The feature will be removed", DeprecationWarning, r"torch\.onnx")
        # True of a state given at the example's batch size; verification runs others.
        warnings.filterwarnings("ignore", "Exporting a model to ONNX with a batch_size other than 1", UserWarning)
        # torch's own checks of what a recurrence or a norm is given, whose outcome is the same at every size.
        own = r"torch\.nn\.(modules\.rnn|utils\.rnn|functional)"
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=own)
        # torch.export copies a tree specification through a deprecated check of its own.
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        # An axis that several inputs share has one name, which is what we ask for.
        same = (
            r"# The axis name: (\w+) will not be used, since it shares the same shape constraints with another axis: \1"
        )
        warnings.filterwarnings("ignore", same, UserWarning)
        registration.setLevel(logging.ERROR)  # "torchvision is not installed", which nothing here needs
        try:
            yield
        finally:
            registration.setLevel(level)
