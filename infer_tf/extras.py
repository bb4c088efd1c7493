"""What a model takes beside audio: pictures, embeddings of another model, and masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models_zoo.cards import ModelCard, ModelInput
from models_zoo.errors import CardError, WaveformError
from models_zoo.images import ImageSpec, load_image

__all__ = ["as_declared", "check_axes", "extras_of", "shown"]


def shown(axes: Sequence[str]) -> str:
    """Return axes as messages write them."""
    return f"({', '.join(axes)})"


def extras_of(cards: Sequence[ModelCard]) -> dict[str, ModelInput]:
    """Return the inputs of source image, encoder or caller, by name; models that answer together are given the same.

    Raises:
        CardError: two models take an input of one name in different ways.
    """
    extras: dict[str, ModelInput] = {}
    images = [card for card in cards if card.image is not None]
    for card in images:
        if card.image != images[0].image:
            raise CardError(
                f"image: {card.name!r} reads pictures in another way than {images[0].name!r}; members share it",
                field="image",
            )
    for card in cards:
        for part in card.inputs:
            if part.source in ("image", "encoder", "caller") and extras.setdefault(part.name, part) != part:
                raise CardError(
                    f"inputs: {card.name!r} takes {part.name!r} as {part.dtype} {shown(part.axes)}, an earlier "
                    f"model as {extras[part.name].dtype} {shown(extras[part.name].axes)}; members share such inputs",
                    field="inputs",
                )
    return extras


def as_declared(part: ModelInput, value: Any, image: ImageSpec | None = None) -> NDArray[Any]:
    """Return one clip's array as the card declares it.

    Args:
        part: the input.
        value: an array; of an input of source image, a picture as :func:`models_zoo.images.read_image` takes it.
        image: how pictures are read.

    Raises:
        WaveformError: of another type or shape, or not finite.
        ImageDecodeError: a picture that cannot be read.
    """
    if part.source == "image" and image is not None:
        return load_image(value, image)
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise WaveformError(f"input {part.name!r}: not an array: {error}", code="dtype") from error
    kinds = {"float32": "f", "int64": "iu", "bool": "b"}[part.dtype]
    if array.dtype.kind not in kinds:
        raise WaveformError(f"input {part.name!r}: got {array.dtype}; expected {part.dtype}", code="dtype")
    axes = part.axes[1:]
    fits = array.ndim == len(axes) and all(
        size > 0 if not axis.isdigit() else size == int(axis) for size, axis in zip(array.shape, axes, strict=False)
    )
    if not fits:
        raise WaveformError(
            f"input {part.name!r}: got shape {array.shape}; expected {shown(axes)}, of one clip", code="shape"
        )
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array, part.dtype)
    if not np.isfinite(array).all():
        raise WaveformError(f"input {part.name!r}: expected finite numbers", code="non_finite")
    return array


def check_axes(card: ModelCard, given: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[np.float32]]) -> None:
    """Refuse an input that a graph may have stretched: one whose named axes differ from its outputs'.

    Raises:
        WaveformError: code ``shape``.
    """
    made = {
        axis: size
        for output in card.outputs
        if output.name in outputs
        for axis, size in zip(output.axes, outputs[output.name].shape, strict=True)
        if not axis.isdigit()
    }
    for part in card.inputs:
        if part.name not in given:
            continue
        for axis, size in zip(part.axes, given[part.name].shape, strict=True):
            if made.get(axis, size) != size:
                raise WaveformError(f"input {part.name!r}: got {size} {axis}; the clip has {made[axis]}", code="shape")
