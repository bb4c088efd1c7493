"""Architectures by name, and the cards that describe what was built."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol, cast

from torch import Tensor, nn

from models_zoo.cards import LengthPolicy, ModelCard, ModelInput, ModelOutput
from models_zoo.errors import CardError, UnknownNameError
from models_zoo.registry import get_card, list_models
from models_zoo.schema import Declaration
from models_zoo.specs import FrontendSpec
from train_torch.costs import count_costs
from train_torch.models.efficientat_dymn import DyMN, DyMNOptions
from train_torch.models.efficientat_dymn_clip import DyMNClip
from train_torch.models.efficientat_mn import MN, MNOptions

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
}


def list_architectures() -> list[str]:
    """Return the names of the bare architectures; :func:`create_model` takes published names as well."""
    return sorted(_ARCHITECTURES)


def _resolve(name: str, options: Mapping[str, Any]) -> tuple[_Architecture, Declaration]:
    """Return the architecture called ``name``, bare or published, and its complete options."""
    if name not in _ARCHITECTURES and name in list_models():
        return _resolve_card(get_card(name), options)
    if name not in _ARCHITECTURES:
        raise UnknownNameError("model", name, [*_ARCHITECTURES, *list_models()])
    architecture = _ARCHITECTURES[name]
    declared = architecture.options.from_dict({**architecture.preset, **options})
    for key, value in architecture.preset.items():
        if getattr(declared, key) != value:
            raise CardError(
                f"{key}: got {options[key]!r}; {name!r} stands for {key} {value!r}; leave it out, or choose "
                f"{name.rstrip('0123456789')!r} to set it freely",
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
        **fields: other fields of the card (licence, metrics, provenance, ...).

    Raises:
        CardError: an impossible field, or a card that does not fit the model.
    """
    described = cast(Model, model)
    if "length_policy" not in fields and frontend is not None:
        fields["length_policy"] = _length_policy(described, frontend)
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
    """Return the legal lengths: those of the front end, unless the network is tied to a number of frames."""
    axis = frontend.layout.split(" ").index("t")
    frames = next(part.axes[axis] for part in model.inputs if part.source == "frontend")
    if not frames.isdecimal():
        return LengthPolicy()
    legal = range(frontend.min_samples, frontend.min_samples + (int(frames) + 1) * frontend.framing.hop_length)
    first = bisect.bisect_left(legal, int(frames), key=frontend.num_frames)
    last = bisect.bisect_right(legal, int(frames), key=frontend.num_frames) - 1
    if last < first:
        raise CardError(f"frontend: no clip length gives the {frames} frames this model takes", field="frontend")
    return LengthPolicy(min=legal[first], max=legal[last])


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
    frontend = card.frontend
    if frontend is None:
        return
    features = next((part for part in card.inputs if part.source == "frontend"), None)
    if features is None or frontend.layout != described.layout:
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
