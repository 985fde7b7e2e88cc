"""Generation: the answer is a text that the model writes.

Knows no prompt, method or backbone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from promptuary.data.check import as_text
from promptuary.errors import DataError
from promptuary.tasks.base import Filled, Task, TaskConfig
from promptuary.types import Batch, Prediction


class GenerateConfig(TaskConfig):
    """Settings of generation."""

    name: Literal["generate"] = "generate"
    target: str = Field("target", description="field with the text to be written")
    max_new_tokens: int = Field(
        20, ge=1, description="most tokens of an answer, in training and in generation; DePT: 20"
    )


class Generate(Task):
    """A text per example."""

    name = "generate"
    Config = GenerateConfig
    default_metrics: ClassVar = ("exact_match", "token_f1")
    pipeline = "text-generation"
    measured_as: ClassVar = frozenset({"text", "label"})

    @property
    def settings(self) -> GenerateConfig:
        """The settings with their own type."""
        return cast(GenerateConfig, self.config)

    def settle(self, examples: Sequence[Mapping[str, Any]]) -> None:
        """Answers are always written."""
        self.reading = "text"

    def settled(self) -> TaskConfig:
        """Nothing is open."""
        return self.config

    @classmethod
    def answer_fields(cls, config: TaskConfig) -> tuple[str, ...]:
        """The text to be written."""
        return (cast(GenerateConfig, config).target,)

    def fill(self, example: Mapping[str, Any], *, labelled: bool) -> Filled:
        """The template, and the text to be written."""
        return Filled(self.template.fill(example), answer=self.gold(example) if labelled else None)

    @classmethod
    def answer(cls, config: TaskConfig, example: Mapping[str, Any]) -> str:
        """The text to be written."""
        target = cast(GenerateConfig, config).target
        return as_text(example.get(target), target).strip()

    def gold(self, example: Mapping[str, Any]) -> str:
        """The text to be written.

        Raises:
            DataError: none is there.
        """
        return self.answer(self.config, example)

    def loss(self, scores: Tensor, batch: Batch) -> Tensor:
        """The backbone already summed the token losses."""
        return torch.as_tensor(scores)

    def decode(self, scores: list[float], example: Mapping[str, Any]) -> Prediction:
        """Written answers have no scores.

        Raises:
            DataError: always; `decode_text` is the way.
        """
        raise DataError("a written answer is decoded from its text")
