"""Settings: frozen, strict, and wrong ones are explained in one line with the nearest name.

Knows no particular setting of the library.
"""

from __future__ import annotations

from typing import Literal

import pydantic
import pytest
from pydantic import Field, model_validator

from promptuary.errors import ConfigError
from promptuary.settings import Settings


class Inner(Settings):
    depth: int = Field(1, ge=1)
    colour: Literal["red", "blue"] = "red"


class Outer(Settings):
    name: str
    inner: Inner = Inner()
    sizes: tuple[int, ...] = ()
    low: float = 0.0
    high: float = 1.0

    @model_validator(mode="after")
    def _ordered(self) -> Outer:
        if self.low > self.high:
            raise ValueError("Low is above high; swap them")
        return self


def refusal(values: object, where: str = "part") -> str:
    with pytest.raises(ConfigError) as caught:
        Outer.read(values, where=where)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    return str(caught.value)


def test_right_values_are_read_and_completed() -> None:
    read = Outer.read({"name": "a", "inner": {"depth": 3}, "sizes": [1, 2]}, where="part")
    assert read == Outer(name="a", inner=Inner(depth=3, colour="red"), sizes=(1, 2))


def test_settings_are_frozen() -> None:
    with pytest.raises(pydantic.ValidationError):
        Outer(name="a").name = "b"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "a", "inne": {}}, 'unknown field part.inne; did you mean "inner"?'),
        ({"name": "a", "inner": {"dept": 2}}, 'unknown field part.inner.dept; did you mean "depth"?'),
        ({"name": "a", "inner": {"zzzzzz": 2}}, "unknown field part.inner.zzzzzz (known: depth, colour)"),
        ({}, "part.name is required"),
        ({"name": 1}, "part.name: expected text, got 1 (put it in quotes)"),
        ({"name": "a", "inner": {"depth": 0}}, "part.inner.depth: expected at least 1, got 0"),
        ({"name": "a", "sizes": [1, "x"]}, "part.sizes.1: expected a whole number, got 'x'"),
        ({"name": "a", "low": 2}, "part: low is above high; swap them"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(values: dict[str, object], message: str) -> None:
    assert refusal(values).startswith(message)


def test_the_other_problems_are_counted() -> None:
    assert refusal({"nam": "a", "inner": {"depth": 0}}).endswith("(and 2 more)")


def test_the_top_needs_no_prefix() -> None:
    assert refusal({"name": "a", "lwo": 1}, where="") == 'unknown field lwo; did you mean "low"?'


def test_something_that_is_no_mapping_is_refused() -> None:
    assert refusal([1]).startswith("part: ")


def test_choices_are_listed() -> None:
    text = refusal({"name": "a", "inner": {"colour": "green"}})
    assert "part.inner.colour" in text
    assert "'red' or 'blue'" in text
    assert text.endswith("got 'green'")
