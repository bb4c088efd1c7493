"""Several networks behind one front end as one network: the weighted mean of their answers."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self, cast

import torch
from pydantic import Field, JsonValue, Strict, model_validator
from torch import Tensor, nn

from models_zoo.cards import ModelInput, ModelOutput
from models_zoo.ensembles import Mean, normalised_weights
from models_zoo.errors import CardError
from models_zoo.schema import Declaration

__all__ = ["Combined", "CombinedOptions", "Member"]


class Member(Declaration):
    """One network of an ensemble: its architecture and the options that build it."""

    error: ClassVar[type[CardError]] = CardError

    architecture: str
    options: dict[str, JsonValue] = Field(default_factory=dict)


class CombinedOptions(Declaration):
    """What can be chosen about an ensemble of networks.

    Attributes:
        members: the networks; they take the same inputs and score the same classes.
        weights: of the members, or None for equal ones; only their ratios count.
        mean: of the members' ``logits``, or of their ``probabilities``.
        activation: what makes logits probabilities; follows from the task.
    """

    error: ClassVar[type[CardError]] = CardError

    members: Annotated[tuple[Member, ...], Strict(False)] = Field(min_length=1)
    weights: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Strict(False)] | None = None
    mean: Mean = "probabilities"
    activation: Literal["softmax", "sigmoid"] = "sigmoid"

    @model_validator(mode="after")
    def _check(self) -> Self:
        normalised_weights(self.weights, len(self.members))
        return self


class Combined(nn.Module):
    """An ensemble whose members share their inputs; state_dict entries begin with ``members.0.`` and so on.

    Attributes:
        inputs: the members'.
        outputs: ``logits`` or ``probabilities``, as ``mean`` says, ``(batch, num_classes)``.
        options: JSON-ready dict that rebuilds the network through ``create_model``.

    Raises:
        CardError: members with different inputs or class counts, or without what is to be averaged.
    """

    system: ClassVar[str] = "crossfade"
    head_prefix: ClassVar[str] = "members."
    class_keys: ClassVar[tuple[str, ...]] = ()
    exporter: ClassVar[Literal["torchscript", "dynamo"]] = "torchscript"
    exporter_reason: ClassVar[str] = "as its members"

    def __init__(self, options: CombinedOptions) -> None:
        super().__init__()
        from train_torch.models import create_model  # which also builds ensembles, hence not above

        self.declared = options
        self.members = nn.ModuleList(create_model(one.architecture, **one.options) for one in options.members)
        described = [cast(Any, member) for member in self.members]
        first = described[0]
        self.layout: str = first.layout
        self.inputs: tuple[ModelInput, ...] = first.inputs
        self.min_frames: int = max(getattr(one, "min_frames", 1) for one in described)
        self.scores = [self._scores_of(one) for one in described]
        for which, one in enumerate(described[1:], start=1):
            if one.inputs != first.inputs or one.layout != first.layout:
                raise CardError(f"members: {which} takes {one.inputs}, 0 takes {first.inputs}", field="members")
            if self.scores[which].axes[-1] != self.scores[0].axes[-1]:
                raise CardError(
                    f"members: {which} scores {self.scores[which].axes[-1]} classes, 0 scores "
                    f"{self.scores[0].axes[-1]}; members score the same classes",
                    field="members",
                )
        self.weights = normalised_weights(options.weights, len(self.members))
        kind: Literal["logit", "probability"] = "logit" if options.mean == "logits" else "probability"
        self.outputs = (ModelOutput(name=options.mean, role="clip", kind=kind, axes=self.scores[0].axes),)

    def _scores_of(self, member: Any) -> ModelOutput:
        """Return the output of a member that is averaged."""
        for output in member.outputs:
            if output.role == "clip" and (output.kind == "logit" or self.declared.mean == "probabilities"):
                return cast(ModelOutput, output)
        raise CardError(
            f"members: {type(member).__name__} returns {', '.join(output.name for output in member.outputs)}; expected "
            f"clip scores that a mean of {self.declared.mean} can be taken of",
            field="members",
        )

    @property
    def options(self) -> dict[str, Any]:
        """JSON-ready dict that rebuilds the network through ``create_model``; members may have changed theirs."""
        current = [
            one.replace(options=cast(Any, member).options)
            for one, member in zip(self.declared.members, self.members, strict=True)
        ]
        return self.declared.replace(members=tuple(current)).to_dict()

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Return ``{"logits": (batch, num_classes)}`` or ``{"probabilities": ...}``, float32.

        Args:
            **inputs: the members', by name.
        """
        total: Tensor | None = None
        for member, output, weight in zip(self.members, self.scores, self.weights, strict=True):
            part = self._averaged(member(**inputs)[output.name], output) * weight
            total = part if total is None else total + part
        assert total is not None
        return {self.declared.mean: total}

    def _averaged(self, scores: Tensor, output: ModelOutput) -> Tensor:
        if self.declared.mean == "logits" or output.kind == "probability":
            return scores
        if output.kind == "log_probability":
            return scores.exp()
        return scores.softmax(-1) if self.declared.activation == "softmax" else torch.sigmoid(scores)
