"""What a model *is*: the card that travels inside every checkpoint and every exported file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, JsonValue, model_validator

from models_zoo.errors import CardError
from models_zoo.images import ImageSpec
from models_zoo.schema import Declaration, Sequence
from models_zoo.specs import FrontendSpec

__all__ = [
    "CARD_KEY",
    "CONVOLUTIONS_KEY",
    "VERIFICATION_KEY",
    "CheckpointSource",
    "LengthPolicy",
    "ModelCard",
    "ModelInput",
    "ModelOutput",
    "labels_sha256",
]

CARD_KEY = "crossfade.card"
"""Metadata key of the card's JSON in a ``.safetensors`` or ``.onnx`` file."""

CONVOLUTIONS_KEY = "crossfade.convolutions"
"""Metadata key of the way in which a ``.onnx`` file computes its convolutions."""

VERIFICATION_KEY = "crossfade.verification"
"""Metadata key of the export verification's JSON in a ``.onnx`` file."""

SCHEMA_VERSION = 1

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


def labels_sha256(labels: tuple[str, ...] | list[str]) -> str:
    """Return the hash that identifies an ordered label list."""
    return hashlib.sha256(json.dumps(list(labels), ensure_ascii=False).encode("utf-8")).hexdigest()


class _Part(Declaration):
    error: ClassVar[type[CardError]] = CardError


Axes = Annotated[Sequence[Annotated[str, Field(pattern=r"^([A-Za-z_]\w*|[0-9]{1,9})$")]], Field(min_length=1)]
"""Names of axes; a whole number in ASCII digits is a fixed size."""


class ModelInput(_Part):
    """One input of the graph.

    Attributes:
        name: graph input and keyword argument of the module, e.g. ``features``.
        dtype: NumPy name.
        axes: names of the axes; an integer in quotes is a fixed size, e.g. ``("batch", "128", "time")``.
        source: who provides it.
    """

    name: str
    dtype: Literal["float32", "int64", "bool"] = "float32"
    axes: Axes
    source: Literal["frontend", "waveform", "image", "encoder", "caller"]


class ModelOutput(_Part):
    """One output of the graph.

    Attributes:
        name: graph output and key of the module's result, e.g. ``logits``.
        role: ``clip`` scores, ``frame`` scores, or an ``embedding``.
        kind: what a score is; None for embeddings.
        axes: names of the axes; an integer in quotes is a fixed size. Frame scores are ``(batch, frames, classes)`` or
            ``(batch, classes, frames)``: the axis named ``frames`` is time, the second one where none is named so.
        hop: of frame scores: the front end's frames from one score to the next.
        needs: names of the inputs it is computed from, or None for all of them. Of a network with a tower for each
            input, one output can then be asked alone: the inputs of others are fed without a row (see
            :meth:`ModelCard.empty_shape`).
    """

    name: str
    role: Literal["clip", "frame", "embedding"]
    kind: Literal["logit", "log_probability", "probability"] | None = None
    axes: Axes
    hop: int = Field(default=1, ge=1)
    needs: Annotated[Sequence[str], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.role == "frame" and (
            len(self.axes) != 3 or "frames" in self.axes[:1] or self.axes[1:] == ("frames",) * 2
        ):
            raise CardError(
                f"axes: got {self.axes}; frame scores are (batch, frames, classes) or (batch, classes, frames)",
                field="axes",
            )
        if (self.kind is None) != (self.role == "embedding"):
            raise CardError(
                f"kind: got {self.kind!r} for role {self.role!r}; scores have a kind, embeddings have none",
                field="kind",
            )
        return self

    @property
    def time_axis(self) -> int:
        """Position of time among the axes of frame scores, 1 or 2."""
        return self.axes.index("frames") if "frames" in self.axes else 1


class LengthPolicy(_Part):
    """Which clip lengths a model takes, in samples at the front end's rate, and what is done with others.

    Attributes:
        min: shortest clip the model itself takes, or None for the front end's own minimum.
        max: longest clip, or None.
        multiple_of: clips are a multiple of this many samples.
        short: a clip below the minimum is an ``error``, filled with ``zero`` on the right, or ``repeat``-ed.
        long: a clip above the maximum is an ``error``, ``crop``-ped to its first samples, or cut into
            ``windows`` of the maximum whose probabilities are averaged.
        uneven: a clip that is no multiple is an ``error``, ``crop``-ped, or filled with ``zero`` on the right.
    """

    min: int | None = Field(default=None, ge=1)
    max: int | None = Field(default=None, ge=1)
    multiple_of: int = Field(default=1, ge=1)
    short: Literal["error", "zero", "repeat"] = "error"
    long: Literal["error", "crop", "windows"] = "error"
    uneven: Literal["error", "crop", "zero"] = "error"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min is not None and self.max is not None and self.max < self.min:
            raise CardError(f"max: got {self.max}; expected at least min, {self.min}", field="max")
        if self.max is not None and self.max % self.multiple_of:
            raise CardError(f"max: got {self.max}; expected a multiple of {self.multiple_of}", field="max")
        return self


class CheckpointSource(_Part):
    """A published checkpoint file.

    Attributes:
        file: its name.
        url: where to get it.
        sha256: of the file, or None where the publisher states none and none was measured.
        md5: likewise.
        prefix: state_dict keys begin with this; stripped on loading.
        container: key under which the state_dict lies in the file, or None.
        not_in_file: facts the model needs that the file does not hold, e.g. ``"hop_length"``.
    """

    file: str
    url: str
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    md5: str | None = Field(default=None, pattern=r"^[0-9a-f]{32}$")
    prefix: str = ""
    container: str | None = None
    not_in_file: Sequence[str] = ()


class ModelCard(_Part):
    """Everything needed to build, load, feed and read a model.

    Attributes:
        name: lower-case name, e.g. ``mn10_as``.
        schema_version: of this declaration.
        system: published system it belongs to, e.g. ``efficientat``.
        task: what its scores mean. ``single_label``: softmax; ``multi_label``: sigmoid;
            ``label_distribution``: softmax; ``event_detection``: sigmoid per frame; ``embedding``: no scores.
        architecture: name for ``train_torch.create_model``.
        options: keyword arguments for it.
        inputs, outputs: of the graph, in order.
        frontend: waveform -> features, or None for a model without one.
        image: picture -> what the network takes, or None for a model that looks at none.
        labels: class names in order, or None for a bare embedding or an unlabelled checkpoint.
        labels_sha256: hash of ``labels``; computed when left out, checked when given.
        length_policy: legal clip lengths.
        thresholds: label -> decision threshold on its probability, or None for the task's default.
        median_filters: label -> length in seconds (event detection), or None.
        exporter: which of torch's exporters serves this family.
        exporter_reason: why.
        license: of the weights.
        training_data: what it was trained on, with credits.
        parameters: trainable numbers of the network, without buffers such as the statistics of norms; None if unknown.
        macs: multiply-accumulates of the network, front end excluded, for one clip of 10 s (of the nearest legal length
            where it takes no such clip); None if unknown. ``train_torch/costs.py`` says what counts.
        metrics: name -> measured value.
        provenance: free-form record: recipe, seed, versions, checkpoint hash.
        checkpoint: the published file, or None.
    """

    name: str
    schema_version: Literal[1] = 1
    system: str
    task: Literal["single_label", "multi_label", "label_distribution", "event_detection", "embedding"]
    architecture: str
    options: dict[str, JsonValue] = Field(default_factory=dict)
    inputs: Sequence[ModelInput] = Field(min_length=1)
    outputs: Sequence[ModelOutput] = Field(min_length=1)
    frontend: FrontendSpec | None = None
    image: ImageSpec | None = None
    labels: Sequence[str] | None = None
    labels_sha256: str | None = None
    length_policy: LengthPolicy = LengthPolicy()
    thresholds: dict[str, Annotated[float, Field(ge=0, le=1)]] | None = None
    median_filters: dict[str, Annotated[float, Field(ge=0)]] | None = None
    exporter: Literal["torchscript", "dynamo"] = "torchscript"
    exporter_reason: str = ""
    license: str = ""
    training_data: str = ""
    parameters: int | None = Field(default=None, ge=0)
    macs: int | None = Field(default=None, ge=0)
    metrics: dict[str, float] = Field(default_factory=dict)
    provenance: dict[str, JsonValue] = Field(default_factory=dict)
    checkpoint: CheckpointSource | None = None

    @model_validator(mode="before")
    @classmethod
    def _hash_labels(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("labels_sha256") is None:
            labels = data.get("labels")
            if isinstance(labels, (list, tuple)) and all(isinstance(label, str) for label in labels):
                return {**data, "labels_sha256": labels_sha256(labels)}
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not _NAME.fullmatch(self.name):
            raise CardError(
                f"name: got {self.name!r}; expected lower-case letters, digits, '.', '_', '-'", field="name"
            )
        for field in ("inputs", "outputs"):
            names = [part.name for part in getattr(self, field)]
            if len(set(names)) != len(names):
                raise CardError(f"{field}: got {names}; expected each name once", field=field)
        if any(part.source == "frontend" for part in self.inputs) and self.frontend is None:
            raise CardError("frontend: missing, although an input comes from it", field="frontend")
        if any(part.source == "image" for part in self.inputs) != (self.image is not None):
            given = "given, although no input is one" if self.image else "missing, although an input is one"
            raise CardError(f"image: {given}; it says how a picture is read", field="image")
        inputs = {part.name for part in self.inputs}
        for output in self.outputs:
            strangers = sorted(set(output.needs or ()) - inputs)
            if strangers:
                raise CardError(
                    f"outputs: {output.name!r} needs {strangers}; inputs: {sorted(inputs)}", field="outputs"
                )
        if self.labels is not None:
            repeated = sorted({label for label in self.labels if self.labels.count(label) > 1})
            if repeated or not self.labels:
                raise CardError(f"labels: expected distinct names, at least one; repeated: {repeated}", field="labels")
            if self.labels_sha256 != labels_sha256(self.labels):
                raise CardError(
                    "labels_sha256: does not match the labels; the card was edited: remove the hash to recompute it",
                    field="labels_sha256",
                )
        longest = self.length_policy.max
        if longest is not None and longest < self.min_samples:
            raise CardError(
                f"length_policy.max: got {longest} samples; the front end needs at least {self.min_samples}",
                field="length_policy.max",
            )
        for field in ("thresholds", "median_filters"):
            strangers = sorted(set(getattr(self, field) or ()) - set(self.labels or ()))
            if strangers:
                raise CardError(f"{field}: unknown labels {strangers}", field=field)
        return self

    def replace(self, **changes: Any) -> Self:
        """Return a copy with ``changes``, validated; the label hash follows the labels."""
        if "labels" in changes:
            changes = {"labels_sha256": None, **changes}
        return super().replace(**changes)

    @property
    def sample_rate(self) -> int:
        """Rate of the waveform the model takes, Hz.

        Raises:
            CardError: the card has no front end.
        """
        if self.frontend is None:
            raise CardError(f"card {self.name!r} has no front end, so no sample rate", field="frontend")
        return self.frontend.sample_rate

    @property
    def min_samples(self) -> int:
        """Shortest clip the model takes before any padding rule, in samples at :attr:`sample_rate`."""
        own = self.length_policy.min or 1
        return own if self.frontend is None else max(own, self.frontend.min_samples)

    def inputs_of(self, outputs: Iterable[str] | None = None) -> tuple[ModelInput, ...]:
        """Return the inputs that the outputs of these names are computed from, in order; None for all outputs."""
        wanted = None if outputs is None else set(outputs)
        asked = [output for output in self.outputs if wanted is None or output.name in wanted]
        if any(output.needs is None for output in asked):
            return self.inputs
        needed = {name for output in asked for name in output.needs or ()}
        return tuple(part for part in self.inputs if part.name in needed)

    def empty_shape(self, part: ModelInput) -> tuple[int, ...]:
        """Return the shape of an input of no clips, which the graph takes for inputs that no output asked for needs."""
        made: tuple[int, ...] = (0, *(int(axis) if axis.isdigit() else 1 for axis in part.axes[1:]))
        if part.source == "frontend" and self.frontend is not None:
            made = (0, *self.frontend.output_shape(self.min_samples)[1:])
        elif part.source == "waveform":
            made = (0, self.min_samples)
        return made

    def clip_output(self) -> ModelOutput | None:
        """Return the first output that holds clip scores, or None."""
        return next((output for output in self.outputs if output.role == "clip"), None)

    def frame_output(self) -> ModelOutput | None:
        """Return the first output that holds frame scores, or None."""
        return next((output for output in self.outputs if output.role == "frame"), None)

    def embedding_output(self) -> ModelOutput | None:
        """Return the first output that holds an embedding, or None."""
        return next((output for output in self.outputs if output.role == "embedding"), None)
