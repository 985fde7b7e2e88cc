"""CMA-ES: tensors get better by what candidates cost alone, with forward passes and no gradient anywhere.

Knows no method, family or task. What is searched is few numbers: mapping them to a large prompt is a method's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any, Literal, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from promptuary.errors import ConfigError, require
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
    Together,
    Trained,
)  # fmt: skip
from promptuary.solvers.turns import Turns

LARGEST = 4096
"""Most numbers that are searched: the covariance alone takes 8 n^2 bytes, its decomposition n^3 operations."""


class EvolutionConfig(SearchConfig):
    """Settings of evolution."""

    name: Literal["evolution"] = "evolution"
    population: int = Field(20, ge=4, description="candidates per step; BBT and MP2 take 20")
    sigma: float | None = Field(
        None, gt=0, description="standard deviation of the first candidates; without it the method's own, or 0.1"
    )
    bounds: tuple[float, float] | None = Field(None, description="smallest and largest value of each number")
    budget: int | None = Field(
        None, ge=4, description="most candidates that are scored in all; decides train.steps. BBT and MP2 take 8,000"
    )
    at_once: int | None = Field(None, ge=1, description="most candidates in one forward pass; without it all")
    apart: bool | None = Field(
        None,
        description="each trained tensor has a search of its own, which takes a step in turn (BBTv2, deep MP2); else "
        "as the method says, or one search over all",
    )


class EvolutionSolver(Solver):
    """A population of candidates per step, drawn around a mean; the better half moves it.

    The full covariance is adapted, with positive weights only and cumulative step-size adaptation (Hansen 2016). Only
    the order of the losses counts. So the whole search follows from its start, its seed and the ranks of each step,
    and these are its state: small, without anything of the package's inside, and played back when a run goes on.

    `calls`: candidates that were scored on a whole batch, as BBT and MP2 count their 8,000 calls, however the batch is
    cut; `best` [n], `best_loss`: the best one of all.
    """

    name = "evolution"
    uses_gradients = False
    Config = EvolutionConfig
    calls: int
    best: Tensor
    best_loss: float
    _pending: Tensor | None

    def __init__(
        self,
        tensors: Sequence[Trained],
        *,
        sigma: float,
        seed: int,
        population: int | None = None,
        bounds: tuple[float, float] | None = None,
        keep: Literal["best", "mean"] = "best",
        together: Together | None = None,
        at_once: int | None = None,
    ) -> None:
        """Start where the tensors are.

        Args:
            tensors: what is searched, all of it together; rates and decays have no meaning here.
            sigma: standard deviation of the first candidates in each number; BBT 1, MP2 0.1.
            seed: of everything that is drawn.
            population: candidates per step; without it 4 + 3 ln n. BBT and MP2 take 20.
            bounds: smallest and largest value of each number, kept by a smooth map.
            keep: what the tensors hold between steps: the best candidate of all, which asks for steps over the same
                rows (BBT, MP2), or the mean of the search, which suits changing batches.
            together: scores several candidates in one pass; without it they go through the learner one by one.
            at_once: most candidates in one such pass; without it all.

        Raises:
            ConfigError: a size, a bound or the number of searched numbers is impossible.
            MissingExtra: the package cma is not installed.
        """
        self.tensors = [tensor for tensor in tensors if tensor.parameter.numel()]
        size = sum(tensor.parameter.numel() for tensor in self.tensors)
        if not 2 <= size <= LARGEST:
            raise ConfigError(
                f"evolution searches 2 to {LARGEST} numbers, got {size}; train fewer, such as a short vector that a "
                "fixed random matrix maps to the prompt, or use the gradient solver"
            )
        if population is not None and population < 4:
            raise ConfigError(f"evolution needs at least 4 candidates per step, got {population}; BBT takes 20")
        if not (math.isfinite(sigma) and sigma > 0):
            raise ConfigError(f"expected a finite sigma above 0, got {sigma}")
        self.population = population or 4 + int(3 * math.log(size))
        self.sigma, self.seed, self.bounds, self.keep = sigma, seed, bounds, keep
        self.together, self.at_once = together, at_once or self.population
        self.start = self._flat()
        if bounds is not None:
            low, high = bounds
            if not low < high or bool(((self.start < low) | (self.start > high)).any()):
                raise ConfigError(
                    f"expected the search to start within its bounds, got {float(self.start.min()):g} to "
                    f"{float(self.start.max()):g} in {low:g} to {high:g}; widen them"
                )
        self._cma = require("cma", extra="blackbox")
        self._begin()

    @classmethod
    def of(cls, config: SolverConfig, job: Job) -> Solver:
        """As its settings say, with the method's advice on what they leave open."""
        c = cast(EvolutionConfig, config)
        apart = c.apart if c.apart is not None else bool(job.advice.get("apart", False))
        if apart and len(job.tensors) > 1:
            alone = c.model_copy(update={"apart": False})
            seeds = [seeded(job.seed, place).initial_seed() for place in range(len(job.tensors))]
            jobs = [replace(job, tensors=[one], seed=seed) for one, seed in zip(job.tensors, seeds, strict=True)]
            return Turns([cls.of(alone, one) for one in jobs])
        return cls(
            job.tensors,
            sigma=c.sigma if c.sigma is not None else float(job.advice.get("sigma", 0.1)),
            seed=job.seed,
            population=c.population,
            bounds=c.bounds,
            # on batches that change, the lowest loss of all is that of an easy batch
            keep="best" if c.whole else "mean",
            together=job.together,
            at_once=c.at_once,
        )

    @property
    def parameters(self) -> list[Tensor]:
        """What is searched."""
        return [tensor.parameter for tensor in self.tensors]

    def step(
        self,
        learner: Learner,
        batches: Batches,
        total_weight: float,
        *,
        reduce: Reduce | None = None,
        check: Callable[[], None] | None = None,
    ) -> StepResult:
        """Draw a population, score each candidate on the whole batch, and learn from the order of the losses.

        Args:
            learner: gives the loss; asked for nothing else, and never for a gradient.
            batches: parts of one batch.
            total_weight: sum of the weights of all parts, on all processes.
            reduce: sums a tensor over processes, which all draw the same candidates.
            check: called before each forward pass; may raise to stop, with nothing changed.

        Returns:
            The loss of the best candidate; there is no gradient, so its norm is not a number. A candidate whose loss
            is not finite counts as the worst. If none is finite, nothing is learnt, and the next population is another.
        """
        candidates = self._drawn()
        before = self._flat()
        with torch.no_grad():
            try:
                losses = self._scored(learner, batches, total_weight, candidates, check)
            finally:
                self._put(before)
            if reduce is not None:
                losses = reduce(losses)
        self.calls += self.population
        self._pending = None
        losses = losses.double().cpu()
        finite = losses.isfinite()
        if not bool(finite.any()):
            self._draw += 1
            return StepResult(math.nan, math.nan, self._parts(losses), "loss", self.population)
        ranks = _ranks(losses)
        first = int(ranks.argmin())
        if float(losses[first]) < self.best_loss:
            self.best_loss, self.best = float(losses[first]), candidates[first].clone()
        self._learn(ranks)
        self._put(self.best if self.keep == "best" else self.mean)
        return StepResult(float(losses[first]), math.nan, self._parts(losses[finite]), calls=self.population)

    @property
    def mean(self) -> Tensor:
        """Where the search stands, [n], inside the bounds."""
        return torch.from_numpy(np.array(self._strategy.result.xfavorite, dtype=np.float64))

    def rates(self) -> dict[str, float]:
        """The step size now."""
        return {"sigma": float(self._strategy.sigma)}

    def seek(self, step: int) -> None:
        """There is no schedule: a step size follows from the search alone."""

    def slow_down(self, factor: float) -> None:
        """Draw closer together (or wider apart) from here on."""
        self._strategy.sigma *= factor
        self._scale *= factor
        self._pending = None

    # ---- state ------------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the next step depends on: tensors by name, and numbers.

        `ranks` [steps, population], `draws` and `scales` [steps]: what was told, which draw it was, and by how much
        the step size was changed from outside before it; `start`, `mean`, `best` [n].
        """
        tensors = {
            "start": self.start.clone(),
            "mean": self.mean,
            "best": self.best.clone(),
            "ranks": torch.stack(self._ranks) if self._ranks else torch.zeros(0, self.population, dtype=torch.int32),
            "draws": torch.tensor(self._draws, dtype=torch.long),
            "scales": torch.tensor(self._scales, dtype=torch.float64),
        }
        numbers = {
            "draw": self._draw,
            "scale": self._scale,
            "calls": self.calls,
            "sigma": float(self._strategy.sigma),
            # JSON has no infinity
            "best_loss": self.best_loss if math.isfinite(self.best_loss) else None,
            "settings": self._settings(),
            "versions": _versions(),
        }
        return tensors, numbers

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Put a state back, exactly, by playing the search back; the tensors themselves are the caller's.

        Raises:
            ConfigError: the state belongs to other settings, or this machine's arithmetic plays it differently.
        """
        if numbers["settings"] != self._settings():
            differing = [name for name, value in self._settings().items() if numbers["settings"].get(name) != value]
            raise ConfigError(
                f"this state of the search belongs to another {', '.join(differing)}; continue with the settings it "
                "was begun with"
            )
        self.start = tensors["start"].clone()
        self._begin()
        told = (tensors["ranks"], tensors["draws"].tolist(), tensors["scales"].tolist())
        for ranks, draw, scale in zip(*told, strict=True):
            self._draw, self._scale = draw, scale
            self._strategy.sigma *= scale
            self._drawn()
            self._learn(ranks)
        self._draw, self._scale, self.calls = numbers["draw"], numbers["scale"], numbers["calls"]
        self._strategy.sigma *= self._scale
        self._pending = None
        self.best = tensors["best"].clone()
        self.best_loss = math.inf if numbers["best_loss"] is None else numbers["best_loss"]
        if not torch.equal(self.mean, tensors["mean"]) or float(self._strategy.sigma) != numbers["sigma"]:
            raise ConfigError(
                "this machine's arithmetic does not play the saved search back bit for bit (it was saved with "
                f"{numbers['versions']}, here is {_versions()}); continue where it was begun and with as many threads, "
                "or start anew from its prompt with method.init: saved"
            )

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """A search at its start."""
        self._generator = torch.Generator()
        bounds = None if self.bounds is None else list(self.bounds)
        options = {
            "popsize": self.population,
            "bounds": bounds,
            "randn": self._normal,
            # with `randn` given, the package neither draws from NumPy's global generator nor seeds it
            "seed": math.nan,
            "CMA_active": False,
            "CMA_diagonal": False,
            "CMA_diagonal_decoding": 0,
            "AdaptSigma": self._cma.sigma_adaptation.CMAAdaptSigmaCSA,
            "verbose": -9,
            "verb_log": 0,
            "verb_disp": 0,
        }
        self._strategy = self._cma.CMAEvolutionStrategy(self.start.numpy().copy(), self.sigma, options)
        self._ranks, self._draws, self._scales = list[Tensor](), list[int](), list[float]()
        self._draw, self._scale, self.calls = 0, 1.0, 0
        self._pending = None
        self.best, self.best_loss = self.start.clone(), math.inf

    def _settings(self) -> dict[str, Any]:
        """What a state depends on besides itself."""
        bounds = None if self.bounds is None else list(self.bounds)
        return {"sigma": self.sigma, "seed": self.seed, "population": self.population, "bounds": bounds}

    def _normal(self, *size: int) -> Any:
        return torch.randn(*size, generator=self._generator, dtype=torch.float64).numpy()

    def _drawn(self) -> Tensor:
        """The candidates of this draw, [population, n]; the same until something is learnt from them."""
        if self._pending is not None:
            return self._pending
        self._generator = seeded(self.seed, self._draw)
        self._asked = self._strategy.ask()
        self._pending = candidates = torch.from_numpy(np.stack(self._asked))
        return candidates

    def _learn(self, ranks: Tensor) -> None:
        """Tell ranks instead of losses: their order is all that counts, and they are always finite."""
        self._strategy.tell(self._asked, ranks.tolist())
        self._ranks.append(ranks)
        self._draws.append(self._draw)
        self._scales.append(self._scale)
        self._draw, self._scale, self._pending = self._draw + 1, 1.0, None

    def _scored(
        self,
        learner: Learner,
        batches: Batches,
        total_weight: float,
        candidates: Tensor,
        check: Callable[[], None] | None,
    ) -> Tensor:
        """Loss of each candidate over all parts, [population]."""
        losses = torch.zeros(len(candidates), device=self.parameters[0].device)
        size = 1 if self.together is None else self.at_once
        for begin in range(0, len(candidates), size):
            chosen = candidates[begin : begin + size]
            if self.together is None:
                self._put(chosen[0])
            for batch in batches:
                if check is not None:
                    check()
                share = learner.weight(batch) / total_weight
                if self.together is None:
                    found = learner.loss(batch).total
                else:
                    found = self.together(batch, self._named(chosen))
                losses[begin : begin + size] += found.detach().float() * share
        return losses

    def _named(self, candidates: Tensor) -> dict[str, Tensor]:
        """Candidates [n, all] as name -> [n, *size], as the tensors hold them."""
        parts = candidates.split([parameter.numel() for parameter in self.parameters], dim=1)
        return {
            tensor.name: part.to(tensor.parameter).view(len(part), *tensor.parameter.shape)
            for tensor, part in zip(self.tensors, parts, strict=True)
        }

    @torch.no_grad()
    def _put(self, vector: Tensor) -> None:
        named = self._named(vector[None])
        for tensor in self.tensors:
            tensor.parameter.copy_(named[tensor.name][0])

    def _flat(self) -> Tensor:
        return torch.cat([parameter.detach().cpu().double().flatten() for parameter in self.parameters])

    def _parts(self, losses: Tensor) -> dict[str, float]:
        """For the log."""
        return {
            "median": float(losses.median()),
            "sigma": float(self._strategy.sigma),
            "best": self.best_loss,
            "calls": float(self.calls),
        }


def _ranks(losses: Tensor) -> Tensor:
    """Places of the losses in rising order, equal ones sharing the lowest; what is not finite shares the last."""
    ranked = torch.where(losses.isfinite(), losses, torch.inf)
    return (ranked[:, None] > ranked).sum(1).to(torch.int32)


def _versions() -> str:
    return f"cma {version('cma')}, numpy {np.__version__}, torch {torch.__version__}"
