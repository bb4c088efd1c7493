"""Architectures by name, and the cards that describe what was built."""

from __future__ import annotations

import bisect
import copy
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol, cast

from torch import Tensor, nn

from models_zoo.cards import LengthPolicy, ModelCard, ModelInput, ModelOutput
from models_zoo.errors import CardError, UnknownNameError
from models_zoo.registry import get_card, list_models
from models_zoo.schema import Declaration
from models_zoo.specs import FrontendSpec
from train_torch.costs import count_costs
from train_torch.models.cavmae import CAVMAEFT, CAVMAEFTOptions
from train_torch.models.cavmae_pretrain import CAVMAE, CAVMAEOptions
from train_torch.models.combined import Combined, CombinedOptions
from train_torch.models.crnn import CRNN, CRNNOptions
from train_torch.models.efficientat_dymn import DyMN, DyMNOptions
from train_torch.models.efficientat_dymn_clip import DyMNClip
from train_torch.models.efficientat_mn import MN, MNOptions
from train_torch.models.mac import MAC, MACOptions
from train_torch.models.panns import PannsOptions
from train_torch.models.panns_cnn import (
    Cnn6,
    Cnn10,
    Cnn14,
    Cnn14DecisionLevelAtt,
    Cnn14DecisionLevelAvg,
    Cnn14DecisionLevelMax,
    Cnn14Options,
    DecisionLevelOptions,
    TransferCnn14,
    TransferOptions,
)
from train_torch.models.panns_mobilenet import MobileNetV1, MobileNetV2
from train_torch.models.panns_resnet import ResNet22, ResNet38, ResNet54
from train_torch.models.panns_wavegram import WavegramCnn14, WavegramLogmelCnn14, WavegramOptions

__all__ = ["Model", "check_card", "clip_form", "create_from_card", "create_model", "list_architectures", "new_card"]


class Model(Protocol):
    """What every architecture offers beyond ``nn.Module``.

    Attributes:
        inputs, outputs: of the graph, in order; ``forward`` takes the inputs by name and returns a dict of the outputs.
        system: published system the family belongs to.
        options: JSON-ready dict with which :func:`create_model` builds the same network.
        declared: the same as a declaration.
        head_prefix: of the state_dict entries behind the embedding.
        class_keys: those of them that belong to one class count, i.e. that fine-tuning to others replaces.
        children_in_order: where they are not declared in the order they are computed in: their names in that order.
        layout: of the features it takes, in :class:`FrontendSpec` terms.
        exporter, exporter_reason: which of torch's ONNX exporters serves the family, and why.
        min_frames, max_frames: fewest and most frames of features it takes; 1 and any where it does not say.
        length_policy: what it asks of a clip in samples, beyond its frames; nothing where it does not say.
        published_frontend: published files of the family hold the tensors of a front end, which are compared with the
            card's and left out; False where it does not say.
        unused_prefixes: of entries that files of the family may hold beside those of the network; none where it does
            not say.
        base_prefix: a file whose entries all lack it holds the part of the model below it; empty where it does not
            say.
    """

    inputs: tuple[ModelInput, ...]
    outputs: tuple[ModelOutput, ...]
    system: str
    options: dict[str, Any]
    declared: Declaration
    head_prefix: str
    class_keys: tuple[str, ...]
    layout: str
    exporter: Literal["torchscript", "dynamo"]
    exporter_reason: str

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]: ...


class _Architecture(NamedTuple):
    build: type[nn.Module]
    options: type[Declaration]
    preset: dict[str, Any]


_ARCHITECTURES: dict[str, _Architecture] = {
    "mn": _Architecture(MN, MNOptions, {}),
    **{
        f"mn{tenths:02d}": _Architecture(MN, MNOptions, {"width": tenths / 10})
        for tenths in (1, 2, 4, 5, 10, 20, 30, 40)
    },
    "dymn": _Architecture(DyMN, DyMNOptions, {}),
    **{f"dymn{tenths:02d}": _Architecture(DyMN, DyMNOptions, {"width": tenths / 10}) for tenths in (4, 10, 20)},
    "crnn": _Architecture(CRNN, CRNNOptions, {}),
    "cavmae": _Architecture(CAVMAE, CAVMAEOptions, {}),
    "cavmaeft": _Architecture(CAVMAEFT, CAVMAEFTOptions, {}),
    "cavmaeft_audio": _Architecture(CAVMAEFT, CAVMAEFTOptions, {"image": False, "mode": "audioonly"}),
    "mac": _Architecture(MAC, MACOptions, {}),
    **{f"mac_{pooling}": _Architecture(MAC, MACOptions, {"pooling": pooling}) for pooling in ("avg", "max")},
    "cnn14": _Architecture(Cnn14, Cnn14Options, {}),
    **{f"cnn14_emb{size}": _Architecture(Cnn14, Cnn14Options, {"embedding": size}) for size in (32, 128, 512)},
    "cnn14_decisionlevelmax": _Architecture(Cnn14DecisionLevelMax, DecisionLevelOptions, {}),
    "cnn14_decisionlevelavg": _Architecture(Cnn14DecisionLevelAvg, DecisionLevelOptions, {}),
    "cnn14_decisionlevelatt": _Architecture(Cnn14DecisionLevelAtt, DecisionLevelOptions, {}),
    "transfer_cnn14": _Architecture(TransferCnn14, TransferOptions, {}),
    "cnn10": _Architecture(Cnn10, PannsOptions, {}),
    "cnn6": _Architecture(Cnn6, PannsOptions, {}),
    "resnet22": _Architecture(ResNet22, PannsOptions, {}),
    "resnet38": _Architecture(ResNet38, PannsOptions, {}),
    "resnet54": _Architecture(ResNet54, PannsOptions, {}),
    "mobilenetv1": _Architecture(MobileNetV1, PannsOptions, {}),
    "mobilenetv2": _Architecture(MobileNetV2, PannsOptions, {}),
    "wavegram_cnn14": _Architecture(WavegramCnn14, WavegramOptions, {}),
    "wavegram_logmel_cnn14": _Architecture(WavegramLogmelCnn14, WavegramOptions, {}),
}

_EXCLUSIVE = ("single_label", "label_distribution")
"""Tasks whose probabilities sum to one."""

_ENSEMBLE = {"ensemble": _Architecture(Combined, CombinedOptions, {})}
"""Made of others, so no architecture anyone would look for among them."""


def list_architectures() -> list[str]:
    """Return the names of the bare architectures; :func:`create_model` takes published names as well."""
    return sorted(_ARCHITECTURES)


def _resolve(name: str, options: Mapping[str, Any]) -> tuple[_Architecture, Declaration]:
    """Return the architecture called ``name``, bare or published, and its complete options."""
    known = _ARCHITECTURES | _ENSEMBLE
    if name not in known and name in list_models():
        return _resolve_card(get_card(name), options)
    if name not in known:
        raise UnknownNameError("model", name, [*_ARCHITECTURES, *list_models()])
    architecture = known[name]
    declared = architecture.options.from_dict({**architecture.preset, **options})
    for key, value in architecture.preset.items():
        if getattr(declared, key) != value:
            free = next(
                other for other, each in _ARCHITECTURES.items() if each.build is architecture.build and not each.preset
            )
            raise CardError(
                f"{key}: got {options[key]!r}; {name!r} stands for {key} {value!r}; leave it out, or choose {free!r} "
                "to set it freely",
                field=key,
            )
    return architecture, declared


def _resolve_card(card: ModelCard, options: Mapping[str, Any]) -> tuple[_Architecture, Declaration]:
    """Return the architecture of ``card`` and its complete options, with ``options`` in place of the card's."""
    architecture, declared = _resolve(card.architecture, {**card.options, **options})
    for fact in getattr(declared, "card_facts", ()):
        if fact not in card.options:
            raise CardError(
                f"options.{fact}: missing on card {card.name!r}; no checkpoint stores it, and a wrong one answers "
                f"wrongly without an error, so the card must state it: {type(declared).model_fields[fact].description}",
                field=f"options.{fact}",
            )
    return architecture, declared


def create_model(name: str, num_classes: int | None = None, **options: Any) -> nn.Module:
    """Return a freshly initialised network, in training mode.

    Args:
        name: an architecture (``mn04``) or a published model (``mn10_as_fc``), whose options are then the defaults.
            Weights are never fetched; see ``load_checkpoint``.
        num_classes: scores per clip; None for the name's own.
        **options: of the architecture, see e.g. :class:`~train_torch.models.efficientat_mn.MNOptions`.

    Raises:
        UnknownNameError: no such architecture or model; the message suggests near names.
        CardError: an unknown or impossible option, named in ``field``.
    """
    architecture, declared = _resolve(name, options if num_classes is None else {**options, "num_classes": num_classes})
    return architecture.build(declared)


def create_from_card(card: ModelCard, **options: Any) -> nn.Module:
    """Return a freshly initialised network as ``card`` describes it, in training mode.

    Args:
        card: of the model; its options must hold what no checkpoint stores (``card_facts`` of the options class).
        **options: in place of the card's.

    Raises:
        UnknownNameError: no such architecture.
        CardError: an unknown, impossible or missing option, named in ``field``.
    """
    architecture, declared = _resolve_card(card, options)
    return architecture.build(declared)


def clip_form(model: nn.Module) -> nn.Module | None:
    """Return ``model`` rewritten for a batch of one, where that is what exports, and runs fastest; otherwise None.

    It takes the same inputs and returns the same outputs, in evaluation mode.
    """
    if isinstance(model, Combined):
        forms = [clip_form(member) for member in model.members]
        if not any(forms):
            return None
        combined = copy.deepcopy(model).eval()
        combined.members = nn.ModuleList(
            member if form is None else form for member, form in zip(combined.members, forms, strict=True)
        )
        return combined
    return DyMNClip(model) if isinstance(model, DyMN) else None


def new_card(
    name: str,
    architecture: str,
    *,
    model: nn.Module,
    frontend: FrontendSpec | None,
    task: str,
    labels: tuple[str, ...] | list[str] | None,
    **fields: Any,
) -> ModelCard:
    """Return the card of ``model``, with its inputs, outputs, options and exporter filled in.

    Args:
        name: of the new model.
        architecture: name under which :func:`create_model` built it.
        model: the network.
        frontend: waveform -> features.
        task: see :class:`ModelCard`.
        labels: class names in order, or None.
        **fields: other fields of the card (licence, metrics, provenance, ...); a ``length_policy`` among them is
            narrowed to what the network takes.

    Raises:
        CardError: an impossible field, or a card that does not fit the model.
    """
    described = cast(Model, model)
    if frontend is not None:
        needed = _length_policy(described, frontend)
        fields["length_policy"] = _narrowed(fields["length_policy"], needed) if "length_policy" in fields else needed
    card = ModelCard(
        name=name,
        system=fields.pop("system", described.system),
        task=task,
        architecture=architecture,
        options=described.options,
        inputs=described.inputs,
        outputs=described.outputs,
        frontend=frontend,
        labels=labels,
        **{"exporter": described.exporter, "exporter_reason": described.exporter_reason, **fields},
    )
    check_card(model, card)
    costs = count_costs(model, card.inputs, frontend, card.length_policy)._asdict()
    return card.replace(**{name: value for name, value in costs.items() if name not in fields})


def _length_policy(model: Model, frontend: FrontendSpec) -> LengthPolicy:
    """Return the legal lengths: what the network asks in samples, and the clips that give the frames it takes."""
    asked: LengthPolicy = getattr(model, "length_policy", LengthPolicy())
    features = next((part for part in model.inputs if part.source == "frontend"), None)
    if features is None:
        return asked
    axis = features.axes[frontend.layout.split(" ").index("t")]
    fixed = axis.isdecimal()
    least: int = int(axis) if fixed else getattr(model, "min_frames", 1)
    most: int | None = int(axis) if fixed else getattr(model, "max_frames", None)
    first = _fewest_samples(frontend, least)
    beyond = None if most is None else _fewest_samples(frontend, most + 1)
    if first is None or (fixed and first == beyond):
        raise CardError(f"frontend: no clip length gives the {least} frames this model takes", field="frontend")
    return asked.replace(
        min=max(asked.min or 1, first) if fixed or least > 1 else asked.min,
        max=asked.max if beyond is None else min(asked.max or beyond, beyond - 1),
    )


def _narrowed(policy: LengthPolicy, needed: LengthPolicy) -> LengthPolicy:
    """Return ``policy`` where the network has no say, and what it needs where it has."""
    return policy.replace(
        min=max(policy.min or 1, needed.min) if needed.min is not None else policy.min,
        max=needed.max if policy.max is None else policy.max,
        multiple_of=needed.multiple_of if policy.multiple_of == 1 else policy.multiple_of,
        uneven=needed.uneven if policy.uneven == "error" else policy.uneven,
    )


def _fewest_samples(frontend: FrontendSpec, frames: int) -> int | None:
    """Return the length of the shortest clip that gives at least as many frames, or None where none does."""
    legal = range(frontend.min_samples, frontend.min_samples + (frames + 1) * frontend.framing.hop_length)
    position = bisect.bisect_left(legal, frames, key=frontend.num_frames)
    return legal[position] if position < len(legal) else None


def check_card(model: nn.Module, card: ModelCard) -> None:
    """Check that ``card`` describes ``model``.

    Raises:
        CardError: the first field that does not, with both values.
    """
    described = cast(Model, model)
    architecture, declared = _resolve_card(card, {})
    if architecture.build is not type(model) or declared.to_dict() != described.options:
        raise CardError(
            f"options: card {card.name!r} says {card.architecture!r} with {declared.to_dict()}; the model is "
            f"{type(model).__name__} with {described.options}",
            field="options",
        )
    for field in ("inputs", "outputs"):
        if getattr(card, field) != getattr(described, field):
            raise CardError(
                f"{field}: card {card.name!r} says {getattr(card, field)}; the model has {getattr(described, field)}",
                field=field,
            )
    scores = card.clip_output()
    if card.labels is not None and (scores is None or scores.axes[-1] != str(len(card.labels))):
        raise CardError(
            f"labels: card {card.name!r} names {len(card.labels)} classes; the model scores "
            f"{'none' if scores is None else scores.axes[-1]}; give as many labels as classes",
            field="labels",
        )
    if scores is not None and scores.kind == "log_probability" and card.task not in _EXCLUSIVE:
        raise CardError(
            f"task: card {card.name!r} says {card.task!r}; the model answers with log-probabilities that sum to one, "
            f"so one class takes from another; choose {' or '.join(map(repr, _EXCLUSIVE))}",
            field="task",
        )
    seen = next((part for part in card.inputs if part.source == "image"), None)
    if seen is not None and card.image is not None and seen.axes[-1] != str(card.image.size):
        raise CardError(
            f"image.size: card {card.name!r} has {card.image.size}; the model takes {seen.axes[-1]}; pass image_size "
            "to the model",
            field="image.size",
        )
    frontend = card.frontend
    if frontend is None:
        return
    features = next((part for part in card.inputs if part.source == "frontend"), None)
    if features is None:
        return  # a model of waveforms: its front end says how they are read
    if frontend.layout != described.layout:
        raise CardError(
            f"frontend.layout: card {card.name!r} has {frontend.layout!r}; the model takes {described.layout!r}",
            field="frontend.layout",
        )
    mels = features.axes[frontend.layout.split(" ").index("m")]
    if mels != str(frontend.mel.n_mels):
        raise CardError(
            f"frontend.mel.n_mels: card {card.name!r} has {frontend.mel.n_mels}; the model was built for {mels}; pass "
            "the same n_mels to both",
            field="frontend.mel.n_mels",
        )
    axes = frontend.layout.split(" ")
    if "c" in axes and features.axes[axes.index("c")] != str(len(frontend.windows)):
        raise CardError(
            f"frontend.windows: card {card.name!r} has {len(frontend.windows)}; the model was built for "
            f"{features.axes[axes.index('c')]}; pass num_windows to the model",
            field="frontend.windows",
        )
    fewest, frames = getattr(described, "min_frames", 1), frontend.num_frames(card.min_samples)
    if frames < fewest:
        raise CardError(
            f"length_policy.min: card {card.name!r} admits clips of {card.min_samples} samples, {frames} frames; the "
            f"model needs {fewest}, and an exported graph may answer to fewer without an error; raise the minimum",
            field="length_policy.min",
        )
