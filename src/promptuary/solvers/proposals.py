"""A plain search for words: what the method proposes is tried, and the best of it is kept.

Knows no method, family or task; a proposal is whatever the method says it is, and may be drawn by chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

from pydantic import Field
from torch import Tensor

from promptuary.errors import ConfigError
from promptuary.solvers.base import (
    Batches,
    Job,
    Learner,
    Reduce,
    SearchConfig,
    Solver,
    SolverConfig,
    StepResult,
    Words,
)  # fmt: skip


class ProposalsConfig(SearchConfig):
    """Settings of the plain search."""

    name: Literal["proposals"] = "proposals"
    population: int = Field(16, ge=1, description="proposals per step; as many prompts as RLPrompt scores in one")
    bounds: None = Field(None, description="words have none")
    budget: int | None = Field(None, ge=1, description="most proposals that are tried in all; decides train.steps")


class ProposalsSolver(Solver):
    """Tries proposals in their order. The best of each step, by mean reward, is tried on the held-out examples too.

    It keeps what scores best there, of equal ones that with the higher reward, then the first; our choice. What the
    words were at the start counts only if it is proposed.

    `calls`: texts that were tried on a whole batch.
    """

    name = "proposals"
    uses_gradients = False
    searches = "words"
    chooses = True
    Config = ProposalsConfig

    def __init__(self, words: Words, population: int) -> None:
        """Start with the words as they are."""
        self.words, self.population = words, population
        self.number, self.best, self.standing = 0, words.text, (-math.inf, -math.inf)
        self._done = False

    @classmethod
    def of(cls, config: SolverConfig, job: Job) -> Solver:
        """As its settings say.

        Raises:
            ConfigError: the prompt is not words.
        """
        if job.words is None:
            raise ConfigError("solver proposals looks for words, and this method holds none")
        return cls(job.words, cast(ProposalsConfig, config).population)

    @property
    def done(self) -> bool:
        """Whether the method has nothing more to propose."""
        return self._done

    def step(
        self,
        learner: Learner,
        batches: Batches,
        total_weight: float,
        *,
        reduce: Reduce | None = None,
        check: Callable[[], None] | None = None,
    ) -> StepResult:
        """Try the next proposals on the batch.

        Returns:
            Minus the highest reward of the step as its loss; there is no gradient.

        Raises:
            ConfigError: that was the last step, and no proposal fitted into the model.
        """
        examples = [self.words.examples[int(place)] for batch in batches for place in batch.index]
        found = [self.words.proposal(self.number + more) for more in range(self.population)]
        texts = [text for text in found if text is not None]
        if not texts:
            self._done = True
            return StepResult(-self.standing[1], math.nan, {})
        tried = self.words.tried(texts, examples, check)
        rewards, scores = tried.reward.mean(1), tried.score.mean(1)
        first = int(rewards.argmax())
        held = self.words.tried(texts[first : first + 1], self.words.held_out, check).score
        standing = (float(held.mean()) if held.numel() else 0.0, float(rewards[first]))
        if standing > self.standing:
            self.standing, self.best = standing, texts[first]
        self.words.text = self.best
        self.number += len(found)
        self._done = len(texts) < len(found)
        if self._done and self.standing[1] == -math.inf:
            raise ConfigError(
                f"none of the {self.number - found.count(None)} texts fits into the model together with the examples; "
                "shorten them, or lower data.max_length"
            )
        parts = {
            "reward_mean": float(rewards.mean()),
            "reward_max": float(rewards[first]),
            "score_max": float(scores.max()),
            "held_out": standing[0],
        }
        return StepResult(-float(rewards[first]), math.nan, parts, calls=len(texts))

    def rates(self) -> dict[str, float]:
        """None."""
        return {}

    def seek(self, step: int) -> None:
        """There is no schedule."""

    def slow_down(self, factor: float) -> None:
        """There is no rate."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """How far it is, and the best so far."""
        standing = list(self.standing) if self.number else None
        return {}, {"number": self.number, "best": self.best, "standing": standing, "done": self._done}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Put a state back."""
        self.number, self.best, self._done = numbers["number"], numbers["best"], numbers["done"]
        held, reward = numbers["standing"] or (-math.inf, -math.inf)
        self.standing = (held, reward)
