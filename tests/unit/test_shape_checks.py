"""The checks of shapes and types that all tests run under: what they refuse, and what they let pass.

Knows nothing of the library but that its modules are checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float, Int
from torch import Tensor

from promptuary.backbones import place
from shape_checks import DONE, checked

if TYPE_CHECKING:
    from nowhere import Unknown


@checked
def turned(value: Float[Tensor, "a b"], again: Float[Tensor, "a b"] | None = None, *, wrong: bool = False) -> Float[
    Tensor, "b a"
]:  # fmt: skip
    return value if wrong else value.T


@checked
def summed(values: Sequence[Float[Tensor, " a"]]) -> Float[Tensor, " a"]:
    return sum(turned(value[None])[:, 0] for value in values)  # type: ignore[return-value]


@checked
def plain(number: int, unknown: Unknown | None = None) -> str:
    return str(number) if number else number  # type: ignore[return-value]


@checked
def parts(value: Float[Tensor, "a b"]) -> Iterator[Tensor]:
    yield from value


@checked
def untyped(value, other=3):  # type: ignore[no-untyped-def]
    return value, other


def adder(number: int) -> Callable[[Any], int]:
    @checked
    def add(other: int) -> int:
        return number + other

    return add


@checked
@dataclass
class Pair:
    one: Float[Tensor, " a"]
    two: Int[Tensor, " a"]


def test_what_fits_passes() -> None:
    assert turned(torch.ones(2, 3), torch.ones(2, 3)).shape == (3, 2)
    assert summed([torch.ones(2), torch.ones(2)]).tolist() == [2, 2]
    assert turned(torch.ones(4, 5)).shape == (5, 4)  # dimensions are named anew in every call
    assert plain(1, unknown=object()) == "1"  # type: ignore[arg-type]
    assert [part.shape for part in parts(torch.ones(2, 3))] == [(3,), (3,)]
    assert untyped(1) == (1, 3)
    assert Pair(torch.ones(2), torch.ones(2, dtype=torch.int64)).one.shape == (2,)


@pytest.mark.parametrize(
    "call",
    [
        lambda: turned(torch.ones(2)),
        lambda: turned(torch.ones(2, 3, dtype=torch.int64)),
        lambda: turned(torch.ones(2, 3), torch.ones(2, 4)),
        lambda: turned(torch.ones(2, 3), wrong=True),
        lambda: turned(torch.ones(2, 3), wrong=1),
        lambda: summed([torch.ones(2, 2)]),
        lambda: plain("1"),
        lambda: plain(0),
        lambda: adder(1)("2"),
    ],
    ids=["dimensions", "kind", "other argument", "answer", "flag", "inside", "type", "type of answer", "nested"],
)
def test_what_does_not_fit_is_refused(call: Callable[[], Any]) -> None:
    with pytest.raises(BeartypeCallHintViolation):
        call()


def test_data_classes_and_generators_are_checked() -> None:
    with pytest.raises(Exception, match="size of dimension a is 3"):
        Pair(torch.ones(2), torch.ones(3, dtype=torch.int64))
    with pytest.raises(Exception, match="Type-check error"):
        list(parts(torch.ones(2)))


def test_nested_functions_are_built_once_and_keep_apart() -> None:
    first, second = adder(1), adder(10)
    assert (first(1), second(1)) == (2, 11)
    assert first.__wrapped__ is not second.__wrapped__  # type: ignore[attr-defined]


def test_the_library_is_checked() -> None:
    assert hasattr(place.place, DONE)
    with pytest.raises(BeartypeCallHintViolation):
        place.place("no batch", None, None)  # type: ignore[arg-type]
