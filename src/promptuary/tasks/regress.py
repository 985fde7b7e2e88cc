"""Regression: a number per example, from a trained head or as a mixture of two label words.

Knows no prompt, method or backbone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from promptuary.errors import ConfigError, DataError
from promptuary.tasks.base import Filled, Task, TaskConfig
from promptuary.tasks.classify import softmax
from promptuary.types import Batch, Prediction


class RegressConfig(TaskConfig):
    """Settings of regression."""

    name: Literal["regress"] = "regress"
    label: str = Field("label", description="field with the number")
    low: float | None = Field(None, description="smallest value; without it the smallest in the training data")
    high: float | None = Field(None, description="largest value; without it the largest in the training data")
    words: tuple[str, str] | None = Field(
        None, description="label words of the lowest and the highest value (Gao et al. 2021, section 4.2); else a head"
    )


class Regress(Task):
    """One number per example."""

    name = "regress"
    Config = RegressConfig
    default_metrics: ClassVar = ("pearson", "spearman", "mean_squared_error")
    measured_as: ClassVar = frozenset({"value"})

    @property
    def settings(self) -> RegressConfig:
        """The settings with their own type."""
        return cast(RegressConfig, self.config)

    def settle(self, examples: Sequence[Mapping[str, Any]]) -> None:
        """The range of values.

        Raises:
            ConfigError: no range can be had, or it is empty.
        """
        c = self.settings
        self.reading = "words" if c.words else "head"
        self.words = c.words or ()
        values = [self.gold(example) for example in examples]
        if not values and (c.low is None or c.high is None):
            raise ConfigError("task.low and task.high are needed where there is no training data")
        self.low = c.low if c.low is not None else min(values)
        self.high = c.high if c.high is not None else max(values)
        if not self.low < self.high:
            raise ConfigError(f"task.low {self.low} is not below task.high {self.high}")

    def settled(self) -> TaskConfig:
        """With the range."""
        return self.config.model_copy(update={"low": self.low, "high": self.high})

    @classmethod
    def answer_fields(cls, config: TaskConfig) -> tuple[str, ...]:
        """The value."""
        return (cast(RegressConfig, config).label,)

    def fill(self, example: Mapping[str, Any], *, labelled: bool) -> Filled:
        """The template, and the value on a scale from 0 (low) to 1 (high)."""
        target = (self.gold(example) - self.low) / (self.high - self.low) if labelled else None
        return Filled(self.template.fill(example), target=target)

    @classmethod
    def answer(cls, config: TaskConfig, example: Mapping[str, Any]) -> float:
        """The value."""
        name = cast(RegressConfig, config).label
        value = example.get(name)
        try:
            number = float(cast(Any, value))
        except (TypeError, ValueError, OverflowError):
            raise DataError(f"field {name!r} should be a number, got {value!r}") from None
        if not math.isfinite(number):
            raise DataError(f"field {name!r} should be a finite number, got {value!r}")
        return number

    def gold(self, example: Mapping[str, Any]) -> float:
        """The value.

        Raises:
            DataError: not a finite number.
        """
        return self.answer(self.config, example)

    def loss(self, scores: Tensor, batch: Batch) -> Tensor:
        """Head: squared error on the 0..1 scale. Words: cross-entropy to (1 - y, y). Summed."""
        assert batch.target is not None
        goal, scores = batch.target.float(), scores.float()
        if self.reading == "head":
            return (scores[:, 0] - goal).pow(2).sum()
        # Gao et al. 2021, section 4.2: KL((1 - y, y) || p), up to a constant; values outside the range are clamped
        goal = goal.clamp(0, 1)
        return -(torch.stack([1 - goal, goal], dim=1) * torch.log_softmax(scores, dim=1)).sum()

    def decode(self, scores: list[float], example: Mapping[str, Any]) -> Prediction:
        """Back to the scale of the data; the middle of it where both words are impossible, as for what is no answer."""
        if self.reading == "words" and all(score == -math.inf for score in scores):
            return Prediction((self.low + self.high) / 2)
        part = scores[0] if self.reading == "head" else softmax(scores)[1]
        return Prediction(self.low + part * (self.high - self.low))
