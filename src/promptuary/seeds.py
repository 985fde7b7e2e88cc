"""Generators that follow from a seed and from what they are for, and the noise of a step that follows from its rows.

Knows nothing of what is drawn; torch's global generators are never touched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor


def seeded(seed: int, *parts: int) -> torch.Generator:
    """A generator for one purpose: the same seed and parts give the same numbers."""
    value = seed
    for part in parts:
        value = (value * 1_000_003 + part + 1) % (2**63)
    return torch.Generator().manual_seed(value)


@dataclass(frozen=True)
class Chance:
    """The noise of one training step.

    What a row gets follows from seed, step and the row's own place in its data set: so a step in several parts, on
    several processes, among other runs, or after a stop draws what it draws in one piece. `purpose` tells apart the
    draws of one step.
    """

    seed: int
    step: int
    index: Int[Tensor, " b"]

    def shared(self, purpose: int = 0) -> torch.Generator:
        """A generator that all rows of the step have in common."""
        return seeded(self.seed, 6, self.step, purpose)

    def normal(self, *size: int, purpose: int = 0) -> Float[Tensor, "b ..."]:
        """Standard normal noise for each row, [b, *size]."""
        return self._stacked(torch.randn, size, purpose)

    def uniform(self, *size: int, purpose: int = 0) -> Float[Tensor, "b ..."]:
        """Noise from 0 to below 1 for each row, [b, *size]."""
        return self._stacked(torch.rand, size, purpose)

    def rows(self, rows: Int[Tensor, " n"]) -> Chance:
        """Of the chosen rows."""
        return replace(self, index=self.index[rows])

    def _stacked(self, draw: Callable[..., Tensor], size: tuple[int, ...], purpose: int) -> Tensor:
        # on the CPU: the same numbers on every device
        drawn = [draw(size, generator=seeded(self.seed, 7, self.step, purpose, row)) for row in self.index.tolist()]
        return torch.stack(drawn).to(self.index.device)
