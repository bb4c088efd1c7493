"""Several models as one: each behind its own front end, or all behind one, as one network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from models_zoo.cards import ModelCard
from models_zoo.ensembles import Mean, check_members, common_policy, normalised_weights
from models_zoo.errors import CardError
from train_torch.checkpoint import load_checkpoint
from train_torch.frontend import TorchFrontend, network_inputs
from train_torch.models import new_card
from train_torch.models.combined import Combined, CombinedOptions, Member

__all__ = ["Ensemble", "combine", "load_ensemble"]


class Ensemble(nn.Module):
    """Waveforms -> the mean of the members' logits; one member is a model behind its front end.

    Members may differ in architecture and front end, but read a clip alike and answer for the same labels in the same
    order. Nothing here is for training: members stay in evaluation mode, and no gradient reaches them.

    Args:
        members: models with the cards that describe them.

    Attributes:
        cards: of the members, in order.
        card: of the first; says how clips are read, cut and labelled for all.

    Raises:
        CardError: no member, one without front end or logits, or members that do not go together; named in ``field``.
    """

    def __init__(self, members: Sequence[tuple[nn.Module, ModelCard]]) -> None:
        super().__init__()
        if not members:
            raise CardError("an ensemble needs at least one model; give one or more checkpoints")
        self.cards = tuple(card for _, card in members)
        self.card = self.cards[0]
        self.frontends = nn.ModuleList(_frontend(card) for card in self.cards)
        self.models = nn.ModuleList(model.to(memory_format=torch.channels_last) for model, _ in members)  # type: ignore[call-overload]
        if len(members) > 1:
            check_members(self.cards, "logits")
        for card in self.cards[1:]:
            if card.length_policy != self.card.length_policy:
                raise CardError(
                    f"length_policy: {card.name!r} has {card.length_policy}, {self.card.name!r} "
                    f"{self.card.length_policy}; members read a clip alike",
                    field="length_policy",
                )
        self.eval()

    def require_logits(self) -> None:
        """Refuse members that answer with anything but logits; a single one may, where no mean is taken.

        Raises:
            CardError: one does.
        """
        for card in self.cards:
            output = card.clip_output()
            if output is None or output.kind != "logit":
                kind = None if output is None else output.kind
                raise CardError(f"{card.name!r} answers with {kind}; expected logits", field="outputs")

    def train(self, mode: bool = True) -> Ensemble:
        """Stay in evaluation mode, whatever is asked: the statistics of a trained model are not to move."""
        return super().train(False)

    @property
    def min_samples(self) -> int:
        """Fewest samples that every member takes as they are."""
        return max(card.min_samples for card in self.cards)

    def forward(self, waveform: Tensor, image: Tensor | None = None) -> dict[str, Tensor]:
        """Return ``logits`` ``(batch, num_classes)`` of ``(batch, num_samples)`` waveforms, without gradients.

        Members that look at pictures take ``image``, see :func:`~train_torch.frontend.network_inputs`.
        What a single member answers is returned under this name as it is, whatever its card calls it.
        """
        answers = []
        with torch.no_grad():
            for card, frontend, model in zip(self.cards, self.frontends, self.models, strict=True):
                output = card.clip_output()
                assert output is not None
                fed = network_inputs(card.inputs, frontend, waveform, image=image)
                answers.append(model(**fed)[output.name].float())
        return {"logits": torch.stack(answers).mean(dim=0)}


def load_ensemble(
    paths: Sequence[str | Path], card: str | None = None, *, checkpoints: str | Path | None = None
) -> tuple[Ensemble, list[dict[str, str]]]:
    """Return the ensemble of one or more checkpoints, and name and sha256 of each.

    Args:
        paths: files, or names of published models.
        card: name of the card of files that hold none.
        checkpoints: folder with published checkpoints, see :func:`train_torch.download.checkpoint_folder`.

    Raises:
        CheckpointError, CardError, UnknownNameError: see :func:`load_checkpoint` and :class:`Ensemble`.
    """
    loaded = [load_checkpoint(path, card, checkpoints=checkpoints) for path in paths]
    ensemble = Ensemble([(one.model, one.card) for one in loaded])
    return ensemble, [{"name": one.card.name, "sha256": one.sha256} for one in loaded]


def _frontend(card: ModelCard) -> TorchFrontend | None:
    if card.frontend is None and {part.source for part in card.inputs} == {"image"}:
        return None  # it is given pictures alone
    if card.frontend is None:
        raise CardError(f"{card.name!r} has no front end, so it cannot take waveforms", field="frontend")
    if card.clip_output() is None:
        raise CardError(f"{card.name!r} has no clip scores to take the mean of", field="outputs")
    return TorchFrontend(card.frontend)


def combine(
    paths: Sequence[str | Path],
    card: str | None = None,
    *,
    name: str = "ensemble",
    weights: Sequence[float] | None = None,
    mean: Mean = "probabilities",
    checkpoints: str | Path | None = None,
) -> tuple[Combined, ModelCard]:
    """Return several checkpoints as one network behind one front end, and its card.

    What :func:`~train_torch.checkpoint.save_checkpoint`, export, serving and parity take like any other model.

    Args:
        paths: files, or names of published models; at least one.
        card: name of the card of files that hold none.
        name: of the ensemble.
        weights: of the members; None for equal ones.
        mean: of ``probabilities``, or of ``logits``.
        checkpoints: folder with published checkpoints.

    Raises:
        CardError: members that do not go together, different front ends among them; named in ``field``.
        CheckpointError, UnknownNameError: see :func:`load_checkpoint`.
    """
    loaded = [load_checkpoint(path, card, checkpoints=checkpoints) for path in paths]
    cards = [one.card for one in loaded]
    check_members(cards, mean)
    first = cards[0]
    for one in cards[1:]:
        if one.frontend != first.frontend:
            raise CardError(
                f"frontend: {one.name!r} and {first.name!r} have different ones, and one graph has one; give "
                "TFAudioClassifier the exported models as a list instead",
                field="frontend",
            )
    options = CombinedOptions(
        members=tuple(Member(architecture=one.architecture, options=one.options) for one in cards),
        weights=None if weights is None else normalised_weights(weights, len(cards)),
        mean=mean,
        activation="sigmoid" if first.task in ("multi_label", "event_detection") else "softmax",
    )
    network = Combined(options).eval()
    for member, one in zip(network.members, loaded, strict=True):
        member.load_state_dict(one.model.state_dict())
    described = new_card(
        name,
        "ensemble",
        model=network,
        frontend=first.frontend,
        task=first.task,
        labels=first.labels,
        length_policy=common_policy(cards),
        license="; ".join(dict.fromkeys(one.license for one in cards if one.license)),
        training_data="; ".join(dict.fromkeys(one.training_data for one in cards if one.training_data)),
        provenance={"members": [{"name": one.card.name, "sha256": one.sha256} for one in loaded]},
    )
    return network, described
