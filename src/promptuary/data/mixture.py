"""The order of a run over several tasks: which tasks each step takes, and which of their rows.

Knows no task, row or tokenizer. All chance comes from the seed: any step can be asked for by itself, and nothing but
seed and step has to be kept to go on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from promptuary.data.collate import batches
from promptuary.seeds import seeded

Strategy = Literal["uniform", "proportional", "temperature"]
Place = tuple[int, int]
"""A task, and a row of it."""

BLOCK = 4096
"""Draws of a task that are made together."""


def rates(
    sizes: Sequence[int], strategy: Strategy, *, temperature: float = 1.0, limit: int | None = None
) -> Float[Tensor, " n"]:
    """How often each task is taken; they sum to one.

    Args:
        sizes: rows of each task.
        strategy: "uniform"; "proportional" to the sizes; or to their 1/temperature-th power.
        temperature: 1 is proportional, large values come near to uniform.
        limit: sizes count as at most this, so that one huge task does not take all.

    Source: Raffel et al. 2020, section 3.5.2.

    Raises:
        ValueError: no task, a task without rows, or a temperature or limit that is not positive.
    """
    if not sizes or min(sizes) < 1:
        raise ValueError(f"expected at least one task, and rows in each, got sizes {list(sizes)}")
    if temperature <= 0 or (limit is not None and limit < 1):
        raise ValueError(f"expected temperature above 0 and limit of at least 1, got {temperature} and {limit}")
    counted = torch.tensor([size if limit is None else min(size, limit) for size in sizes], dtype=torch.float64)
    power = {"uniform": 0.0, "proportional": 1.0, "temperature": 1 / temperature}[strategy]
    # among logarithms, since large powers of large sizes overflow
    return torch.softmax(power * counted.log(), dim=0)


class Mixture:
    """The rows of each step. Every pass over a task takes each of its rows exactly once, whatever comes between.

    What is drawn is a task: for a batch where batches are of one task, for each row where they are mixed.

    What is remembered between calls only saves time; it follows from the arguments.
    """

    def __init__(
        self,
        lengths: Sequence[Sequence[int]],
        batch_size: int,
        *,
        seed: int,
        strategy: Strategy = "uniform",
        temperature: float = 1.0,
        limit: int | None = None,
        mixed: bool = False,
        bucket: bool = False,
    ) -> None:
        """Set up.

        Args:
            lengths: for each task the tokens of each of its rows.
            batch_size: rows per batch; in batches of one task the last one of a pass over it may be smaller.
            seed: of the order.
            strategy: how often each task is taken, see `rates`.
            temperature: see `rates`.
            limit: see `rates`.
            mixed: whether each row of a batch may be of another task, instead of all of one.
            bucket: whether rows of similar length come together, see `batches`; in batches of one task only.

        Raises:
            ValueError: as `rates`; `batch_size` is not positive; or rows shall be mixed and bucketed.
        """
        if batch_size < 1:
            raise ValueError(f"expected batch_size of at least 1, got {batch_size}")
        if mixed and bucket:
            raise ValueError("rows of mixed batches are drawn one by one and cannot be bucketed; choose one")
        self.lengths, self.batch_size, self.seed, self.bucket = lengths, batch_size, seed, bucket
        self.rates = rates([len(rows) for rows in lengths], strategy, temperature=temperature, limit=limit)
        # draws of a step, and rows of a draw
        self._draws, self._rows = (batch_size, 1) if mixed else (1, batch_size)
        # how often each task was drawn before each block
        self._before = [torch.zeros(len(lengths), dtype=torch.long)]
        self._block = (-1, torch.zeros(0, dtype=torch.long))
        self._orders: dict[int, tuple[int, list[list[int]]]] = {}

    def at(self, step: int) -> list[Place]:
        """The rows of one step as (task, row), in their order; the same whenever it is asked for.

        Raises:
            ValueError: the step is negative.
        """
        if step < 0:
            raise ValueError(f"expected a step of at least 0, got {step}")
        found = []
        for draw in range(step * self._draws, (step + 1) * self._draws):
            task = int(self._tasks(draw // BLOCK)[draw % BLOCK])
            found += [(task, row) for row in self._turn(task, int(self._drawn(draw)[task]))]
        return found

    def taken(self, step: int) -> Int[Tensor, " n"]:
        """How many draws of the steps before `step` each task had: batches of it, or rows where they are mixed."""
        return self._drawn(step * self._draws)

    def _turn(self, task: int, turn: int) -> list[int]:
        """The rows that a task gives when it is drawn for the `turn`-th time, from 0."""
        lengths = self.lengths[task]
        epoch, place = divmod(turn, math.ceil(len(lengths) / self._rows))
        known = self._orders.get(task)
        if known is None or known[0] != epoch:
            generator = seeded(self.seed, 1, task, epoch)
            known = (epoch, batches(lengths, self._rows, generator=generator, bucket=self.bucket))
            self._orders[task] = known
        return known[1][place]

    def _drawn(self, draw: int) -> Int[Tensor, " n"]:
        """How often each task was drawn before."""
        block, place = divmod(draw, BLOCK)
        while len(self._before) <= block:
            whole = self._tasks(len(self._before) - 1)
            self._before.append(self._before[-1] + torch.bincount(whole, minlength=len(self.lengths)))
        return self._before[block] + torch.bincount(self._tasks(block)[:place], minlength=len(self.lengths))

    def _tasks(self, block: int) -> Int[Tensor, " s"]:
        """The tasks of a block of draws."""
        if self._block[0] != block:
            drawn = torch.multinomial(self.rates, BLOCK, replacement=True, generator=seeded(self.seed, 0, block))
            self._block = (block, drawn)
        return self._block[1]
