"""Multiple choice: each example brings its own possible answers, which are scored as label words.

Knows no prompt, method or backbone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from promptuary.data.check import as_text
from promptuary.errors import ConfigError, DataError
from promptuary.tasks.base import Filled, Task, TaskConfig, seen
from promptuary.tasks.classify import chosen
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
    pipeline = "multiple-choice"
    measured_as: ClassVar = frozenset({"label", "text"})
    gives_scores = True

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

    @classmethod
    def asked(cls, config: TaskConfig) -> tuple[str, ...]:
        """The template's fields, and the choices."""
        return (*super().asked(config), *cast(ChooseConfig, config).choices)

    @classmethod
    def question(cls, config: TaskConfig, example: Mapping[str, Any]) -> tuple[str, ...]:
        """The template's fields, and the choices."""
        fields = super().asked(config)
        return (*(seen(config, example, name) for name in fields), *cls.options(config, example))

    @classmethod
    def options(cls, config: TaskConfig, example: Mapping[str, Any]) -> tuple[str, ...]:
        """The possible answers of one example.

        Raises:
            DataError: a field is missing, a choice is no text, or there are fewer than two.
        """
        names = cast(ChooseConfig, config).choices
        missing = [name for name in names if name not in example]
        if missing:
            there = ", ".join(map(str, example))
            raise DataError(f"the data has no field {missing[0]!r} for task.choices (fields: {there})")
        values: list[Any] = [example[name] for name in names]
        if len(values) == 1:
            values = list(values[0]) if isinstance(values[0], list | tuple) else values
        if len(values) < 2:
            raise DataError(f"task.choices gives {len(values)} choice(s); a list or several fields are needed")
        return tuple(as_text(value, f"choice {place}") for place, value in enumerate(values))

    def choices(self, example: Mapping[str, Any]) -> tuple[str, ...]:
        """The possible answers of one example.

        Raises:
            DataError: a field is missing, a choice is no text, or there are fewer than two.
        """
        return self.options(self.config, example)

    def fill(self, example: Mapping[str, Any], *, labelled: bool) -> Filled:
        """The template, the choices and the place of the right one."""
        choices = self.choices(example)
        target = choices.index(self.gold(example)) if labelled else None
        return Filled(self.template.fill(example), target=target, choices=choices)

    @classmethod
    def answer(cls, config: TaskConfig, example: Mapping[str, Any]) -> str:
        """The text of the right choice."""
        choices, label = cls.options(config, example), example.get(cast(ChooseConfig, config).label)
        if not isinstance(label, int) and str(label) in choices:
            return str(label)
        # a number is a place, also where the choices are numbers
        number = isinstance(label, int | str) and not isinstance(label, bool) and str(label).isdecimal()
        if number and int(cast(Any, label)) < len(choices):
            return choices[int(cast(Any, label))]
        raise DataError(f"label {label!r} is neither a choice nor a place from 0 to {len(choices) - 1}")

    def gold(self, example: Mapping[str, Any]) -> str:
        """The text of the right choice.

        Raises:
            DataError: the label is neither a place nor a choice.
        """
        return self.answer(self.config, example)

    def loss(self, scores: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy among the choices, summed."""
        assert batch.target is not None
        return torch.nn.functional.cross_entropy(scores.float(), batch.target, reduction="sum")

    def decode(self, scores: list[float], example: Mapping[str, Any]) -> Prediction:
        """The best choice; choices that only pad the batch are left out. As `chosen` for what is no answer."""
        choices = self.choices(example)
        return chosen(choices, scores[: len(choices)])
