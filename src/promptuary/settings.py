"""The base of every configuration model: frozen, strict about unknown fields, with readable one-line errors.

Knows no particular setting.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pydantic
from pydantic_core import ErrorDetails

from promptuary.errors import ConfigError
from promptuary.registry import suggest

_EXPECTED = {
    "string_type": "expected text",
    "string_too_short": "expected text that is not empty",
    "tuple_type": "expected a list such as [a, b]",
    "model_type": "expected a mapping such as {{a: b}}",
    "dict_type": "expected a mapping such as {{a: b}}",
    "int_type": "expected a whole number",
    "int_parsing": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_type": "expected a number",
    "float_parsing": "expected a number",
    "finite_number": "expected a finite number",
    "bool_type": "expected true or false",
    "bool_parsing": "expected true or false",
    "too_short": "expected a list of at least {min_length}",
    "greater_than": "expected more than {gt:g}",
    "greater_than_equal": "expected at least {ge:g}",
    "less_than_equal": "expected at most {le:g}",
}
"""What pydantic calls a problem -> what the writer of a YAML file would call it."""

_SHOWN = 80
"""Characters of a wrong value that are shown."""


class Settings(pydantic.BaseModel):
    """A frozen group of settings; refuses unknown fields, numbers that are not finite, and true for a number."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        kinds = set(_kinds(cls.model_fields[str(info.field_name)].annotation))
        if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
            # pydantic would take it for 0 or 1
            raise ValueError(f"expected a number, got {_shown(value)}")
        if any(broken(text) for text in _texts(value)):
            raise ValueError(f"holds half a character (a lone surrogate), got {_shown(value)}; write it anew")
        return value

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


def broken(text: str) -> bool:
    """Whether a text holds half a character: a lone surrogate, which no UTF-8 file and no tokenizer takes."""
    return any("\ud800" <= character <= "\udfff" for character in text) if not text.isascii() else False


def explain(error: pydantic.ValidationError, model: type[pydantic.BaseModel], where: str) -> str:
    """The first problem of a failed validation in one line, with a suggestion for a misspelt field."""
    # a field that may be several things fails once for each of them
    fields: dict[tuple[int | str, ...], list[ErrorDetails]] = {}
    for one in error.errors():
        fields.setdefault(_field(one["loc"]), []).append(one)
    loc, problems = next(iter(fields.items()))
    more = f" (and {len(fields) - 1} more)" if len(fields) > 1 else ""
    # what went wrong deepest inside tells most: there the value was of the right kind so far
    first = max(problems, key=lambda one: len(one["loc"]))
    steps = [str(step) for step in first["loc"] if not _is_tag(step)]
    path = ".".join([where, *steps] if where else steps)
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, list(loc[:-1]))
        hint = suggest(steps[-1], known) or (f" (known: {', '.join(known)})" if known else "")
        return f"unknown field {path}{hint}{more}"
    if first["type"] == "missing" and isinstance(loc[-1], int):
        return f"{path.rpartition('.')[0]}: expected a list of more than {loc[-1]}{more}"
    if first["type"] == "missing":
        return f"{path} is required{more}"
    if first["type"] == "value_error":
        message = first["msg"].removeprefix("Value error, ")
        return f"{path}: {message[0].lower() + message[1:]}{more}"
    if steps[-1:] == ["[key]"]:
        path = path.removesuffix(".[key]").rpartition(".")[0]
        return f"{path}: a name should be text, got {_shown(first['input'])}{_quotes(first['input'])}{more}"
    if all(one["type"] == "literal_error" for one in problems):
        expected = ", ".join(str(one["ctx"]["expected"]).replace(" or ", ", ") for one in problems)
        message = "expected " + " or ".join(expected.rsplit(", ", 1))
    elif len(problems) > 1 and all(len(one["loc"]) == len(first["loc"]) for one in problems):
        wanted = [_expected(one).removeprefix("expected ") for one in problems]
        message = "expected " + " or ".join(dict.fromkeys(wanted))
    else:
        message = _expected(first)
    quotes = _quotes(first["input"]) if first["type"] in ("string_type", "literal_error") else ""
    return f"{path}: {message}, got {_shown(first['input'])}{quotes}{more}"


def _expected(error: ErrorDetails) -> str:
    message = error["msg"]
    return _EXPECTED.get(error["type"], message[0].lower() + message[1:]).format(**error.get("ctx", {}))


def _shown(value: Any) -> str:
    """A value as it stands in YAML, cut short."""
    if value is None or isinstance(value, bool):
        return "nothing" if value is None else str(value).lower()
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _quotes(value: Any) -> str:
    if isinstance(value, bool):
        return " (a bare yes, no, on or off is true or false in YAML: put it in quotes)"
    return " (put it in quotes)" if isinstance(value, int | float) else ""


def _is_tag(step: int | str) -> bool:
    """Whether a step of a path only says which form of a value was tried, such as `dict[str,str]`."""
    return isinstance(step, str) and "[" in step and step != "[key]"


def _field(loc: Sequence[int | str]) -> tuple[int | str, ...]:
    """The path up to the first such step."""
    return tuple(loc[: next((place for place, step in enumerate(loc) if _is_tag(step)), len(loc))])


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types in a union, and one that is none."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        yield from (kind for one in typing.get_args(annotation) for kind in _kinds(one))
    else:
        yield annotation


def _texts(value: Any) -> Iterator[str]:
    """Every text in a value of YAML."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for pair in value.items() for one in pair for text in _texts(one))
    elif isinstance(value, list | tuple):
        yield from (text for one in value for text in _texts(one))


def _fields_at(model: type[pydantic.BaseModel], path: list[int | str]) -> list[str]:
    for step in path:
        info = model.model_fields.get(str(step))
        kinds = list(_kinds(info.annotation)) if info is not None else []
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel)]
        if not inner:
            return []
        model = inner[0]
    return list(model.model_fields)
