"""Several solvers over the same loss that take steps in turn, each of tensors of its own.

Knows no method, and not how any of them works.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from promptuary.errors import ConfigError
from promptuary.solvers.base import Batches, Job, Learner, Reduce, Solver, SolverConfig, StepResult


class Turns(Solver):
    """One solver a step, in their order, again and again: divide and conquer, as deep MP2 and BBTv2 search layers.

    Each finds the tensors of the others as these left them.
    """

    name = "turns"
    uses_gradients = False
    Config = SolverConfig

    def __init__(self, solvers: Sequence[Solver]) -> None:
        """Of at least one solver; the first begins."""
        self.solvers, self.turn = list(solvers), 0

    @classmethod
    def of(cls, config: SolverConfig, job: Job) -> Solver:
        """Never called: other solvers make it of themselves."""
        raise AssertionError(config, job)

    @property
    def _next(self) -> Solver:
        return self.solvers[self.turn]

    def step(
        self,
        learner: Learner,
        batches: Batches,
        total_weight: float,
        *,
        reduce: Reduce | None = None,
        check: Callable[[], None] | None = None,
    ) -> StepResult:
        """A step of the one whose turn it is; a turn that changed nothing is over as well."""
        result = self._next.step(learner, batches, total_weight, reduce=reduce, check=check)
        self.turn = (self.turn + 1) % len(self.solvers)
        return result

    def rates(self) -> dict[str, float]:
        """Of the one whose turn is next."""
        return self._next.rates()

    def seek(self, step: int) -> None:
        """Whose turn it is at a step; each of them stands where its own steps led."""
        self.turn = step % len(self.solvers)
        for place, solver in enumerate(self.solvers):
            solver.seek((step + len(self.solvers) - 1 - place) // len(self.solvers))

    def slow_down(self, factor: float) -> None:
        """All of them."""
        for solver in self.solvers:
            solver.slow_down(factor)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Of each, by its place, and whose turn it is."""
        several = [solver.state() for solver in self.solvers]
        tensors = {f"{place}/{name}": value for place, one in enumerate(several) for name, value in one[0].items()}
        return tensors, {"turn": self.turn, "several": [numbers for _, numbers in several]}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Put the states back.

        Raises:
            ConfigError: the state is of another number of searches, or as the solvers themselves.
        """
        several = numbers.get("several", ())
        if len(several) != len(self.solvers):
            raise ConfigError(
                f"this state is of {len(several) or 1} searches and these are {len(self.solvers)}; continue with the "
                "solver.apart that it was begun with"
            )
        for place, (solver, own) in enumerate(zip(self.solvers, several, strict=True)):
            begin = f"{place}/"
            mine = {name.removeprefix(begin): value for name, value in tensors.items() if name.startswith(begin)}
            solver.restore(mine, own)
        self.turn = int(numbers["turn"])
