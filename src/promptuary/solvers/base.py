"""What a solver is, what it works on, and what it gives back.

Knows nothing about how the loss comes about.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from promptuary.errors import ConfigError
from promptuary.settings import Settings
from promptuary.speakers.base import Speaker, SpeakerConfig
from promptuary.types import Batch, Losses


class Learner(Protocol):
    """Something with a loss."""

    def loss(self, batch: Batch) -> Losses:
        """Mean loss of a batch."""

    def weight(self, batch: Batch) -> int:
        """What that mean is taken over."""


class Trained(Protocol):
    """A trained tensor with its learning rate (`methods.base.Group` is one)."""

    @property
    def name(self) -> str:
        """Its name in the saved state."""

    @property
    def parameter(self) -> torch.nn.Parameter:
        """The tensor."""

    @property
    def learning_rate(self) -> float:
        """Its own learning rate."""

    @property
    def weight_decay(self) -> float:
        """Its own weight decay."""


@dataclass(frozen=True)
class StepResult:
    """One step over a whole batch: its loss, the norm of all gradients before clipping, the parts of the loss.

    `fault`: what was not finite, so that no tensor was changed; None for a step that was taken. `calls`: how often the
    whole batch was scored without gradients.
    """

    loss: float
    grad_norm: float
    parts: dict[str, float]
    fault: Literal["loss", "gradient", "update"] | None = None
    calls: int = 0

    @property
    def applied(self) -> bool:
        """Whether the step was taken."""
        return self.fault is None


Reduce = Callable[[Tensor], Tensor]
Batches = Sequence[Batch]


class Together(Protocol):
    """Scores several candidates in one forward pass."""

    def __call__(self, batch: Batch, candidates: Mapping[str, Tensor]) -> Tensor:
        """Mean loss of the batch under each candidate, [n]; `candidates` are name -> [n, *size]."""


@dataclass(frozen=True)
class Tried:
    """What became of k texts on n examples.

    `reward` [k, n]: what the method calls good; `score` [k, n]: the task's first metric of each example alone, for
    accuracy 1 where the answer is right and 0 where it is not.
    `maxima` [k, n, g]: of rewards that depend on chance, what each is the mean of.
    """

    reward: Float[Tensor, "k n"]
    score: Float[Tensor, "k n"]
    maxima: Float[Tensor, "k n g"] | None = None


class Words(Protocol):
    """A prompt of words while it is looked for: texts are tried on examples, and one of them is the prompt."""

    text: str

    @property
    def examples(self) -> Sequence[Mapping[str, Any]]:
        """Labelled examples to learn from; `Batch.index` says which of them are in a batch."""

    @property
    def held_out(self) -> Sequence[Mapping[str, Any]]:
        """Labelled examples to choose with."""

    @property
    def fields(self) -> Sequence[str]:
        """Fields of an example that hold the text which is asked about."""

    def written_by(self, policy: Any) -> None:
        """From here on the prompt is what a policy (`policy_net.Policy`) writes for each input.

        Raises:
            ConfigError: the method has one prompt for all inputs.
        """

    def proposal(self, number: int) -> str | None:
        """What the method itself proposes as number 0, 1, ... of a plain search; None if it has no more."""

    def tried(
        self,
        texts: Sequence[str],
        examples: Sequence[Mapping[str, Any]],
        check: Callable[[], None] | None = None,
        draw: int = 0,
    ) -> Tried:
        """Every text on every example, in large batches; the prompt itself stays what it is.

        What was tried before is not run again where answers do not depend on chance; where they do, they are drawn
        anew, and follow from the seed and `draw`. `check` is called before each batch and may raise to stop.
        """


class Voice(Protocol):
    """A frozen causal language model that a policy speaks with."""

    @property
    def name(self) -> str:
        """By which the model can be opened again."""

    @property
    def identity(self) -> Mapping[str, str]:
        """What tells it from another model."""

    @property
    def width(self) -> int:
        """h, of its states."""

    @property
    def vocabulary(self) -> int:
        """v, words of its head."""

    @property
    def device(self) -> torch.device:
        """Where it is."""

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""

    def text(self, ids: Sequence[int]) -> str:
        """A text from token ids."""

    def states(self, sequences: Sequence[Sequence[int]]) -> Float[Tensor, "b h"]:
        """The last hidden state behind the last token of each sequence, without gradients."""

    def logits(self, states: Float[Tensor, "n h"]) -> Float[Tensor, "n v"]:
        """What its head makes of such states; differentiable in them."""


class SolverConfig(Settings):
    """Settings that every solver has; a solver adds its own."""

    name: str = Field(
        description="gradient, evolution or bayes; for prompts of words policy, rewrite or edits; without `solver` the "
        "method's own"
    )

    @property
    def whole(self) -> bool:
        """Whether a step takes all training rows instead of a batch."""
        return False

    def steps(self, planned: int) -> int:
        """Steps of the run, where the solver counts otherwise than the training settings."""
        return planned


class SearchConfig(SolverConfig):
    """Settings of what scores candidates by forward passes alone; each search says what is usual for it."""

    population: int
    bounds: tuple[float, float] | None
    budget: int | None
    rows: Literal["all", "batch"] = Field(
        "all",
        description="score candidates on all training rows (BBT, MP2), in parts of train.batch_size, or on a batch",
    )

    @property
    def whole(self) -> bool:
        """As `rows` says."""
        return self.rows == "all"

    def steps(self, planned: int) -> int:
        """As many steps as the budget holds.

        Raises:
            ConfigError: it does not hold one.
        """
        return afforded(self.budget, planned, self.population, "candidates", "population")


def afforded(budget: int | None, planned: int, scored: int, what: str, setting: str) -> int:
    """Steps that a budget holds, or as many as planned without one.

    Args:
        budget: of what is scored in all.
        planned: steps of the training settings.
        scored: how many a step scores.
        what: their name.
        setting: of the solver, that says how many they are.

    Raises:
        ConfigError: it does not hold one.
    """
    if budget is None:
        return planned
    if budget < scored:
        raise ConfigError(
            f"a budget of {budget} does not hold one step of {scored} {what}; raise it, or lower solver.{setting}"
        )
    return budget // scored


@dataclass(frozen=True)
class Job:
    """What a solver shall do: its tensors, for so many steps.

    `optimizer`, `schedule`, `warmup` (steps) and `clip` are those of the training settings; `advice`: settings that the
    method gives for those that were left open; `together`: scores several candidates at once, where that can be done.
    `words`: the prompt of words that is looked for, where the method has one. `voice` opens the model that a policy
    speaks with, the run's own without a name; `speaker` opens a model that is talked to, from its settings and the role
    that its requests are booked on.
    """

    tensors: Sequence[Trained]
    steps: int
    seed: int
    optimizer: str = "adamw"
    schedule: str = "constant"
    warmup: int = 0
    clip: float = 1.0
    advice: Mapping[str, Any] = field(default_factory=dict)
    together: Together | None = None
    words: Words | None = None
    voice: Callable[[str | None], Voice] | None = None
    speaker: Callable[[SpeakerConfig, str], Speaker] | None = None


class Solver(abc.ABC):
    """Makes tensors better step by step.

    Facts that a solver declares:
        name: file name, and what the user types.
        uses_gradients: whether it asks the loss for them.
        searches: what it makes better: "tensors", or the text of a prompt of words.
        chooses: whether what it holds after its last step is what it found best on held-out examples, so that the run
            keeps that, and not the state that scored best in between.
    """

    name: ClassVar[str]
    uses_gradients: ClassVar[bool]
    searches: ClassVar[Literal["tensors", "words"]] = "tensors"
    chooses: ClassVar[bool] = False
    Config: ClassVar[type[SolverConfig]]

    @property
    def done(self) -> bool:
        """Whether there is nothing left to try, so that the run ends before its last step; by default never."""
        return False

    @property
    def history(self) -> list[dict[str, Any]]:
        """What it accepted, in order, as plain values: texts with scores, cost and reason; by default nothing."""
        return []

    @classmethod
    @abc.abstractmethod
    def of(cls, config: SolverConfig, job: Job) -> Solver:
        """One for a job.

        Raises:
            ConfigError: settings that cannot be.
        """

    @abc.abstractmethod
    def step(
        self,
        learner: Learner,
        batches: Batches,
        total_weight: float,
        *,
        reduce: Reduce | None = None,
        check: Callable[[], None] | None = None,
    ) -> StepResult:
        """One step over the parts of a batch.

        Args:
            learner: gives the loss.
            batches: parts of one batch.
            total_weight: sum of the weights of all parts, on all processes.
            reduce: sums a tensor over processes.
            check: called before each forward pass; may raise to stop, with nothing changed.

        Returns:
            What became of it; where something was not finite, no tensor is changed.
        """

    @abc.abstractmethod
    def rates(self) -> dict[str, float]:
        """Learning rates or step sizes now."""

    @abc.abstractmethod
    def seek(self, step: int) -> None:
        """Go to a place in the schedule, in steps of the job."""

    @abc.abstractmethod
    def slow_down(self, factor: float) -> None:
        """Multiply every rate, now and from here on."""

    @abc.abstractmethod
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the next step depends on: tensors by name, and numbers."""

    @abc.abstractmethod
    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Put a state back, exactly; the trained tensors themselves are the caller's."""
