"""What a task is whose written answers have no right one: several are drawn, and frozen models judge them.

Knows no prompt, method or backbone: whoever asks hands in the models that judge.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from jaxtyping import Float
from torch import Tensor

from promptuary.tasks.base import Task
from promptuary.types import Prediction


class Judges(Protocol):
    """The frozen models that a task asks for a judgement, by the names in its settings."""

    def states(self, model: str, texts: Sequence[str]) -> list[Float[Tensor, "t h"]]:
        """Last hidden states of an encoder at the tokens of each text, special tokens left out."""

    def labels(self, folder: str) -> Sequence[str]:
        """What a saved classifier tells apart."""

    def probabilities(self, folder: str, texts: Sequence[str]) -> list[Mapping[str, float]]:
        """What a saved classifier gives each label of each text."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    `count`: of those among which the best is the answer; `groups`: so many times `count` are drawn to estimate how good
    that answer is on average. `top_k`, `temperature`: of each token. `seed`: of what is drawn in use.
    """

    count: int
    groups: int
    top_k: int
    temperature: float
    seed: int


class JudgedTask(Task):
    """A task of written answers that are judged; what its metrics compare are the judgements of each answer.

    `ends`: letters behind the first of which nothing of a written text is kept.
    """

    ends: ClassVar[str] = ""

    measured_as: ClassVar = frozenset({"judged"})

    def measured(self, prediction: Prediction) -> Any:
        """The judgements."""
        return prediction.scores

    @property
    @abc.abstractmethod
    def sampling(self) -> Sampling:
        """How answers are drawn."""

    @abc.abstractmethod
    def source(self, example: Mapping[str, Any]) -> str:
        """The text that is rewritten.

        Raises:
            DataError: it is missing, blank or no text.
        """

    @abc.abstractmethod
    def longest(self, tokens: int) -> int:
        """Most tokens that are written for a source of so many."""

    @abc.abstractmethod
    def ready(self, judges: Judges) -> None:
        """Look at the judges before anything is asked.

        Raises:
            PromptuaryError: one cannot be opened, or does not tell what is asked.
        """

    @abc.abstractmethod
    def rewards(self, judges: Judges, source: str, written: Sequence[str]) -> list[dict[str, float]]:
        """What each answer to a source is worth, under "reward", and what that is made of."""

    @abc.abstractmethod
    def measured_by(self, judges: Judges, written: Sequence[str]) -> list[dict[str, float]]:
        """What judges that no search has seen say of each answer; empty where there are none."""
