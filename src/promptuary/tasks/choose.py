"""Multiple choice: each example brings its own possible answers, which are scored as label words.

Knows no prompt, method or backbone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from promptuary.errors import ConfigError, DataError
from promptuary.tasks.base import Filled, Task, TaskConfig
from promptuary.tasks.classify import best, softmax
from promptuary.types import Batch, Prediction


class ChooseConfig(TaskConfig):
    """Settings of multiple choice."""

    name: Literal["choose"] = "choose"
    choices: tuple[str, ...] = Field(
        ("choices",), min_length=1, description="fields with one choice each, or one field with a list of them"
    )
    label: str = Field("label", description="field with the place of the right choice (from 0), or its text")


class Choose(Task):
    """The best of an example's own choices."""

    name = "choose"
    Config = ChooseConfig
    default_metrics: ClassVar = ("accuracy",)

    @property
    def settings(self) -> ChooseConfig:
        """The settings with their own type."""
        return cast(ChooseConfig, self.config)

    def settle(self, examples: Sequence[Mapping[str, Any]]) -> None:
        """Choices are always scored as words.

        Raises:
            ConfigError: the template uses a choice, which stands at the answer.
        """
        self.reading = "words"
        inside = set(self.template.fields) & set(self.settings.choices)
        if inside:
            raise ConfigError(
                f"task.template uses the choice {inside.pop()!r}; choices are scored at {{mask}} or at the end"
            )

    def settled(self) -> TaskConfig:
        """Nothing is open."""
        return self.config

    @classmethod
    def answer_fields(cls, config: TaskConfig) -> tuple[str, ...]:
        """Choices and label."""
        return (*cast(ChooseConfig, config).choices, cast(ChooseConfig, config).label)

    def choices(self, example: Mapping[str, Any]) -> tuple[str, ...]:
        """The possible answers of one example.

        Raises:
            DataError: a field is missing, or there are fewer than two.
        """
        missing = [name for name in self.settings.choices if name not in example]
        if missing:
            raise DataError(f"the data has no field {missing[0]!r} for task.choices (fields: {', '.join(example)})")
        values: list[Any] = [example[name] for name in self.settings.choices]
        if len(values) == 1:
            values = list(values[0]) if isinstance(values[0], list | tuple) else values
        if len(values) < 2:
            raise DataError(f"task.choices gives {len(values)} choice(s); a list or several fields are needed")
        return tuple(map(str, values))

    def fill(self, example: Mapping[str, Any], *, labelled: bool) -> Filled:
        """The template, the choices and the place of the right one."""
        choices = self.choices(example)
        target = choices.index(self.gold(example)) if labelled else None
        return Filled(self.template.fill(example), target=target, choices=choices)

    def gold(self, example: Mapping[str, Any]) -> str:
        """The text of the right choice.

        Raises:
            DataError: the label is neither a place nor a choice.
        """
        choices, label = self.choices(example), example.get(self.settings.label)
        if not isinstance(label, int) and str(label) in choices:
            return str(label)
        # a number is a place, also where the choices are numbers
        number = isinstance(label, int | str) and not isinstance(label, bool) and str(label).isdecimal()
        if number and int(cast(Any, label)) < len(choices):
            return choices[int(cast(Any, label))]
        raise DataError(f"label {label!r} is neither a choice nor a place from 0 to {len(choices) - 1}")

    def loss(self, scores: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy among the choices, summed."""
        assert batch.target is not None
        return torch.nn.functional.cross_entropy(scores.float(), batch.target, reduction="sum")

    def decode(self, scores: list[float], example: Mapping[str, Any]) -> Prediction:
        """The best choice; choices that only pad the batch are left out."""
        choices = self.choices(example)
        mine = scores[: len(choices)]
        return Prediction(choices[best(mine)], dict(zip(choices, softmax(mine), strict=True)))
