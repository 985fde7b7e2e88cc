"""Bayesian optimisation: each candidate is where a Gaussian process of all losses so far expects the most.

Knows no method, family or task. For few numbers and few calls: MP2's release searches its router so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from promptuary.errors import ConfigError
from promptuary.seeds import seeded
from promptuary.solvers.base import (
    Batches,
    Job,
    Learner,
    Reduce,
    SearchConfig,
    Solver,
    SolverConfig,
    StepResult,
    Trained,
)

LARGEST, MOST = 1024, 4000
"""Most numbers that are searched, and most candidates of one search: the process inverts a matrix of all candidates."""

LENGTHS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
"""Length scales that are tried, times the root of the number of dimensions, in boxes of width one (our choice)."""

TRIED, NEAR = 2048, 512
"""Points at which the bound is compared: anywhere in the box, and around the best one so far (our choice)."""


class BayesConfig(SearchConfig):
    """Settings of Bayesian optimisation."""

    name: Literal["bayes"] = "bayes"
    population: int = Field(20, ge=1, description="candidates per step, one after the other; our choice")
    bounds: tuple[float, float] | None = Field(
        None, description="smallest and largest value of each number; without it the method's own, or -5 to 5 (MP2)"
    )
    initial: int = Field(20, ge=1, description="candidates that are drawn anywhere in the box at first; MP2: 20")
    kappa: float = Field(2.0, ge=0, description="deviations that a candidate is believed better than its mean; MP2: 2")
    budget: int | None = Field(None, ge=1, description="most candidates that are scored in all; decides train.steps")

    @model_validator(mode="after")
    def _box(self) -> BayesConfig:
        if self.bounds is not None and not self.bounds[0] < self.bounds[1]:
            raise ValueError(f"bounds: expected the smaller value first, got {list(self.bounds)}")
        return self


class BayesSolver(Solver):
    """A Gaussian process (Matern 5/2) over a box, and the point with the best bound, as many times as a step asks for.

    The next candidate follows from the box, the seed and all candidates with their losses, which are the whole state.
    Between steps the tensors hold the best candidate of all.
    """

    name = "bayes"
    uses_gradients = False
    Config = BayesConfig

    def __init__(self, tensors: Sequence[Trained], config: BayesConfig, seed: int) -> None:
        """Start where the tensors are, which is the first candidate.

        Raises:
            ConfigError: too many numbers, or a start outside of the box.
        """
        self.tensors = [tensor for tensor in tensors if tensor.parameter.numel()]
        self.config, self.seed = config, seed
        self.low, self.high = config.bounds or (-5.0, 5.0)
        start = self._flat()
        if not 1 <= len(start) <= LARGEST:
            raise ConfigError(
                f"bayes searches 1 to {LARGEST} numbers, got {len(start)}; use solver: {{name: evolution}}"
            )
        if bool(((start < self.low) | (start > self.high)).any()):
            raise ConfigError(
                f"expected the search to start within its bounds, got {float(start.min()):g} to {float(start.max()):g} "
                f"in {self.low:g} to {self.high:g}; widen them"
            )
        self.points, self.losses = start.new_zeros(0, len(start)), start.new_zeros(0)
        self.start = start

    @classmethod
    def of(cls, config: SolverConfig, job: Job) -> Solver:
        """As its settings say, with the method's advice on the box."""
        c = cast(BayesConfig, config)
        if c.population * job.steps > MOST:
            raise ConfigError(
                f"bayes scores at most {MOST} candidates, got {job.steps} steps of {c.population}; train for fewer, or "
                "use solver: {name: evolution}"
            )
        if c.bounds is None and "bounds" in job.advice:
            c = c.model_copy(update={"bounds": job.advice["bounds"]})
        return cls(job.tensors, c, job.seed)

    def step(
        self,
        learner: Learner,
        batches: Batches,
        total_weight: float,
        *,
        reduce: Reduce | None = None,
        check: Callable[[], None] | None = None,
    ) -> StepResult:
        """Score some candidates one after the other, each with what those before it told.

        A candidate whose loss is not finite counts as the worst of all. If none of the step is finite, the step was
        not taken, but its candidates are remembered.
        """
        points, losses, before = self.points, self.losses, self._flat()
        with torch.no_grad():
            try:
                for _ in range(self.config.population):
                    point = self._candidate(points, losses)
                    self._put(point)
                    found = torch.zeros((), device=self.tensors[0].parameter.device)
                    for batch in batches:
                        if check is not None:
                            check()
                        found += learner.loss(batch).total.detach().float() * (learner.weight(batch) / total_weight)
                    found = found if reduce is None else reduce(found)
                    points = torch.cat([points, point[None]])
                    losses = torch.cat([losses, found.double().cpu()[None]])
            finally:
                self._put(before)
        new = losses[len(self.losses) :]
        self.points, self.losses = points, losses
        finite = new[new.isfinite()]
        if not len(finite):
            return StepResult(math.nan, math.nan, {}, "loss", len(new))
        best = _finite(losses)
        self._put(points[int(best.argmin())])
        told = {"median": float(finite.median()), "best": float(best.min()), "calls": float(len(losses))}
        return StepResult(float(finite.min()), math.nan, told, calls=len(new))

    def rates(self) -> dict[str, float]:
        """It has none."""
        return {}

    def seek(self, step: int) -> None:
        """There is no schedule."""

    def slow_down(self, factor: float) -> None:
        """There is no step size."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All candidates and their losses; what depends on the settings besides."""
        tensors = {"points": self.points.clone(), "losses": self.losses.clone(), "start": self.start.clone()}
        return tensors, {"settings": self._settings()}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Put a state back.

        Raises:
            ConfigError: it belongs to other settings.
        """
        if numbers.get("settings") != self._settings():
            raise ConfigError("this state belongs to another search; continue with the settings it was begun with")
        self.points, self.losses, self.start = (tensors[name].clone() for name in ("points", "losses", "start"))

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        c = self.config
        box = [self.low, self.high]
        return {"seed": self.seed, "bounds": box, "initial": c.initial, "kappa": c.kappa, "population": c.population}

    def _candidate(self, points: Float[Tensor, "m n"], losses: Float[Tensor, " m"]) -> Float[Tensor, " n"]:
        """The start, then points anywhere, then the one with the lowest mean - kappa deviations of those compared."""
        count, width = len(points), self.high - self.low
        if count == 0:
            return self.start
        generator = seeded(self.seed, count)
        anywhere = torch.rand(
            1 if count < self.config.initial else TRIED, len(self.start), generator=generator
        ).double()
        if count < self.config.initial:
            return self.low + width * anywhere[0]
        known = (points - self.low) / width
        values = _finite(losses)
        best = known[int(values.argmin())]
        # around the best one, at all scales, in some of its numbers
        scale = 10 ** (-3 * torch.rand(NEAR, 1, generator=generator).double())
        moved = torch.rand(NEAR, len(best), generator=generator) < torch.rand(NEAR, 1, generator=generator)
        near = best + scale * moved * torch.randn(NEAR, len(best), generator=generator).double()
        tried = torch.cat([anywhere, near.clamp(0, 1)])
        mean, deviation = posterior(known, values, tried)
        return self.low + width * tried[int((mean - self.config.kappa * deviation).argmin())]

    def _flat(self) -> Tensor:
        return torch.cat([tensor.parameter.detach().cpu().double().flatten() for tensor in self.tensors])

    @torch.no_grad()
    def _put(self, vector: Tensor) -> None:
        parts = vector.split([tensor.parameter.numel() for tensor in self.tensors])
        for tensor, part in zip(self.tensors, parts, strict=True):
            tensor.parameter.copy_(part.to(tensor.parameter).view_as(tensor.parameter))


def posterior(
    known: Float[Tensor, "m n"], values: Float[Tensor, " m"], asked: Float[Tensor, "q n"]
) -> tuple[Float[Tensor, " q"], Float[Tensor, " q"]]:
    """Mean and standard deviation of a Gaussian process with the most likely of the `LENGTHS`, in units of `values`."""
    spread = values.std() if len(values) > 1 and float(values.std()) > 0 else values.new_ones(())
    wanted = (values - values.mean()) / spread
    root = math.sqrt(known.shape[1])
    apart = torch.cdist(known, known)
    found: tuple[float, Tensor, float] | None = None
    for length in LENGTHS:
        factor = torch.linalg.cholesky(_matern(apart / (length * root)) + 1e-6 * torch.eye(len(known)).double())
        half = torch.linalg.solve_triangular(factor, wanted[:, None], upper=False)
        # the logarithm of the likelihood, but for a constant
        likely = -0.5 * float(half.square().sum()) - float(factor.diagonal().log().sum())
        if found is None or likely > found[0]:
            found = likely, factor, length * root
    assert found is not None
    _, factor, scale = found
    cross = torch.linalg.solve_triangular(factor, _matern(torch.cdist(known, asked) / scale), upper=False)
    half = torch.linalg.solve_triangular(factor, wanted[:, None], upper=False)
    mean, variance = (cross.T @ half)[:, 0], (1 - cross.square().sum(0)).clamp(min=0)
    return values.mean() + spread * mean, spread * variance.sqrt()


def _matern(distance: Tensor) -> Tensor:
    """(1 + s + s^2 / 3) exp(-s), s = sqrt(5) r."""
    s = math.sqrt(5) * distance
    return (1 + s + s.square() / 3) * torch.exp(-s)


def _finite(losses: Tensor) -> Tensor:
    """Losses, with the worst finite one for those that are not finite."""
    good = losses[losses.isfinite()]
    return torch.where(losses.isfinite(), losses, good.max() if len(good) else losses.new_zeros(()))
