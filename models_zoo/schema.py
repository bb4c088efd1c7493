"""The base of everything crossfade declares in JSON: frozen, strict, and typed in its errors."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Strict, ValidationError

from models_zoo.errors import CardError, SpecError

__all__ = ["Declaration", "Sequence"]

_T = TypeVar("_T")

Sequence = Annotated[tuple[_T, ...], Strict(False)]
"""A tuple that may be written as a list, which is what JSON has."""


class Declaration(BaseModel):
    """A frozen declaration whose unknown, missing and impossible fields are errors naming the field."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    error: ClassVar[type[SpecError] | type[CardError]] = SpecError

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise self._explain(error) from None

    @classmethod
    def _explain(cls, error: ValidationError) -> SpecError | CardError:
        first = error.errors(include_url=False)[0]
        cause = first.get("ctx", {}).get("error")
        field = ".".join(str(part) for part in first["loc"])
        if isinstance(cause, (SpecError, CardError)):
            field = ".".join(part for part in (field, cause.field) if part)
            message = str(cause).split(": ", 1)[-1]
        elif first["type"] == "extra_forbidden":
            message = f"unknown field; known fields here: {', '.join(sorted(cls._fields_beside(first['loc'])))}"
        elif first["type"] == "missing":
            message = "missing field; give it a value"
        else:
            message = f"got {first['input']!r:.80}; {first['msg'].removeprefix('Value error, ')}"
        return cls.error(f"{cls.__name__}.{field}: {message}" if field else f"{cls.__name__}: {message}", field=field)

    @classmethod
    def _fields_beside(cls, location: tuple[int | str, ...]) -> set[str]:
        fields = cls.model_fields
        for part in location[:-1]:
            annotation = fields[part].annotation if isinstance(part, str) and part in fields else None
            nested = _declaration_in(annotation)
            if nested is None:
                return {"see the documentation of that part"}
            fields = nested.model_fields
        return set(fields)

    @classmethod
    def from_dict(cls, data: object) -> Self:
        """Return the declaration held by ``data``, a plain JSON-like mapping.

        Raises:
            SpecError or CardError: an unknown, missing or impossible field, named in ``field``.
        """
        if not isinstance(data, dict):
            raise cls.error(f"{cls.__name__}: got {type(data).__name__}; expected a mapping of its fields")
        try:
            text = json.dumps(data)
        except (TypeError, ValueError) as error:
            raise cls.error(f"{cls.__name__}: not expressible as JSON: {error}") from None
        return cls.from_json(text)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Return the declaration held by a JSON document; inverse of :meth:`to_json`.

        Raises:
            SpecError or CardError: not JSON, or an unknown, missing or impossible field.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise cls._explain(error) from None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-like data; inverse of :meth:`from_dict`."""
        return self.model_dump(mode="json")

    def to_json(self, *, indent: int | None = None) -> str:
        """Return the JSON document; inverse of :meth:`from_json`."""
        return self.model_dump_json(indent=indent)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with ``changes``, validated like any other declaration."""
        return type(self)(**{**{name: getattr(self, name) for name in type(self).model_fields}, **changes})


def _declaration_in(annotation: Any) -> type[Declaration] | None:
    """Return the Declaration inside ``X``, ``X | None`` or ``tuple[X, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, Declaration):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _declaration_in(argument)
        if found is not None:
            return found
    return None
