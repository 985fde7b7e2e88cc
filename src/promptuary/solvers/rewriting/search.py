"""Where a rewriting search stands between two rounds, as an object and as plain values.

Knows no model and no example.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from promptuary.solvers.rewriting.records import Record


@dataclass
class Search:
    """Where a search stands. `pool`: perturbed training examples by kind and place; the counts are of all rounds."""

    current: str
    best: str
    worth: float | None = None
    round: int = 0
    exhausted: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)
    pool: dict[str, Record] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    tried: int = 0

    def numbers(self) -> dict[str, Any]:
        """As plain values."""
        pool = {name: record.facts() for name, record in self.pool.items()}
        return {**copy.deepcopy(vars(self)), "pool": pool, **{name: dict(getattr(self, name)) for name in COUNTS}}

    @classmethod
    def of(cls, numbers: Mapping[str, Any]) -> Search:
        """What `numbers` gave."""
        given = copy.deepcopy(dict(numbers))
        pool = {name: Record(**one) for name, one in given["pool"].items()}
        return cls(**{**given, "pool": pool, **{name: Counter(given[name]) for name in COUNTS}})


COUNTS = ("asked", "answers", "refused")
