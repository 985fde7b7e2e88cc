"""What prompts are worth on clean and perturbed examples, all of them on the same ones.

Knows no model, role or round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from promptuary.solvers.base import Tried, Words
from promptuary.solvers.rewriting.records import Example, Examples, Record

MARGIN = 1e-6
"""Least difference that counts: the same answer in another batch, as after a stop, differs in its last digits."""


def first_best(values: Sequence[float]) -> int:
    """Place of the highest value; of those within the margin the first one."""
    highest = max(values)
    return next(place for place, value in enumerate(values) if value >= highest - MARGIN)


@dataclass(frozen=True)
class Worth:
    """Of one prompt: `total` is the objective; `clean`, None where it has no weight; `kinds`: mean of each kind."""

    total: float
    clean: float | None
    kinds: Mapping[str, float]


@dataclass
class Scorer:
    """Scores prompts and counts what that takes.

    `total = weight * clean + (1 - weight) * aggregate over kinds`. `tried`: prompts times examples that were asked for,
    whatever is remembered of them.
    """

    words: Words
    measure: Literal["score", "reward"]
    weight: float
    aggregate: Literal["mean", "min"]
    check: Callable[[], None] | None = None
    tried: int = 0

    def alone(self, measure: Literal["score", "reward"], text: str, examples: Sequence[Example]) -> list[float]:
        """What the model makes of n examples under one prompt, n numbers."""
        return self._values([text], examples, measure)[0]

    def _values(
        self, texts: Sequence[str], examples: Sequence[Example], measure: Literal["score", "reward"]
    ) -> list[list[float]]:
        self.tried += len(texts) * len(examples)
        found: Tried = self.words.tried(texts, examples, self.check)
        return (found.reward if measure == "reward" else found.score).double().tolist()

    def worth(
        self, texts: Sequence[str], places: Sequence[int], records: Sequence[Record], examples: Examples
    ) -> list[Worth]:
        """Each prompt on the same examples.

        Args:
            texts: the prompts.
            places: clean examples.
            records: perturbed ones, in any order; those that could not be perturbed count for nothing.
            examples: what both point into.

        Raises:
            DataError: a record does not belong to these examples.
        """
        changed = [record for record in records if record.changed]
        with_clean = self.weight > 0 or not changed
        clean = [examples[place] for place in places] if with_clean else []
        rows = [*clean, *(record.among(examples) for record in changed)]
        return [self._worth(found, len(clean), changed) for found in self._values(texts, rows, self.measure)]

    def _worth(self, values: Sequence[float], clean: int, changed: Sequence[Record]) -> Worth:
        kinds: dict[str, list[float]] = {}
        for record, value in zip(changed, values[clean:], strict=True):
            kinds.setdefault(record.kind, []).append(value)
        means = {kind: _mean(kinds[kind]) for kind in sorted(kinds)}
        plain = _mean(values[:clean]) if clean else None
        if not means:
            assert plain is not None
            return Worth(plain, plain, {})
        robust = min(means.values()) if self.aggregate == "min" else _mean(list(means.values()))
        total = robust if plain is None else self.weight * plain + (1 - self.weight) * robust
        return Worth(total, plain, means)


def _mean(values: Sequence[float]) -> float:
    """Exactly rounded, so that no order of the examples changes it."""
    return math.fsum(values) / len(values)
