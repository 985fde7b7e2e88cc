"""The base of every configuration model: frozen, strict about unknown fields, with readable one-line errors.

Knows no particular setting.
"""

from __future__ import annotations

from typing import Any

import pydantic

from promptuary.errors import ConfigError
from promptuary.registry import suggest


class Settings(pydantic.BaseModel):
    """A frozen group of settings; unknown fields are refused."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @classmethod
    def read(cls, values: Any, *, where: str) -> Any:
        """Validate a mapping.

        Args:
            values: what stood in a file or on the command line.
            where: its place in the run, for messages, such as "method".

        Raises:
            ConfigError: one line that names the field, what was wrong and the nearest known name.
        """
        try:
            return cls.model_validate(values)
        except pydantic.ValidationError as error:
            raise ConfigError(explain(error, cls, where)) from None


def explain(error: pydantic.ValidationError, model: type[pydantic.BaseModel], where: str) -> str:
    """The first problem of a failed validation in one line, with a suggestion for a misspelt field."""
    first = error.errors()[0]
    steps = [str(step) for step in first["loc"]]
    path = ".".join([where, *steps] if where else steps)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, list(first["loc"][:-1]))
        hint = suggest(steps[-1], known) or (f" (known: {', '.join(known)})" if known else "")
        return f"unknown field {path}{hint}{more}"
    if first["type"] == "missing":
        return f"{path} is required{more}"
    message = first["msg"].removeprefix("Value error, ")
    got = "" if first["type"] == "value_error" else f", got {first['input']!r}"
    return f"{path}: {message[0].lower() + message[1:]}{got}{more}"


def _fields_at(model: type[pydantic.BaseModel], path: list[int | str]) -> list[str]:
    for step in path:
        info = model.model_fields.get(str(step))
        inner = info.annotation if info is not None else None
        if not (isinstance(inner, type) and issubclass(inner, pydantic.BaseModel)):
            return []
        model = inner
    return list(model.model_fields)
