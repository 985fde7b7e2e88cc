"""What a situation is, and how far apart two results are.

Knows no library, model or situation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from libraries import Ours, Peft

LOGITS, TOKENS = "largest difference of logits", "tokens that differ"
LOSS = "difference of the loss"
CAUSAL = ("gpt2", "llama", "qwen3", "gemma3")
TWO = ("gpt2", "llama")
CLOSE = 1e-4
"""Of float32 sums in another order; logits here are of size 1 to 20."""

Measure = Callable[["Ours | Peft", str], float]


@dataclass(frozen=True)
class Situation:
    """`measure(library, kind)` on models of these kinds; right is what stays within `limit`."""

    name: str
    group: str
    kinds: tuple[str, ...]
    unit: str
    measure: Measure

    @property
    def limit(self) -> float:
        """How large the number may be."""
        return CLOSE if self.unit in (LOGITS, LOSS) else 0.0


SITUATIONS: list[Situation] = []


def situation(name: str, group: str, kinds: Iterable[str], unit: str) -> Callable[[Measure], Measure]:
    """Add one to the list."""

    def add(measure: Measure) -> Measure:
        SITUATIONS.append(Situation(name, group, tuple(kinds), unit, measure))
        return measure

    return add


def far(one: Tensor, two: Tensor) -> float:
    """Largest difference; another shape is infinitely far."""
    return float((one.float() - two.float()).abs().max()) if one.shape == two.shape else float("inf")


def differing(found: list[list[int]], expected: list[list[int]]) -> int:
    """Tokens that are not the expected ones."""
    assert len(found) == len(expected), (found, expected)
    return sum(
        sum(a != b for a, b in zip(mine, right, strict=False)) + abs(len(mine) - len(right))
        for mine, right in zip(found, expected, strict=True)
    )
