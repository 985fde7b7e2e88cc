"""Classification: one of a fixed set of labels, by label words (a verbaliser) or by a trained head.

Knows no prompt, method or backbone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field, field_validator
from torch import Tensor

from promptuary.data.check import RowCheck, as_label
from promptuary.errors import ConfigError
from promptuary.metrics import METRICS
from promptuary.tasks.base import Filled, Task, TaskConfig
from promptuary.types import Batch, Prediction


class ClassifyConfig(TaskConfig):
    """Settings of classification."""

    name: Literal["classify"] = "classify"
    label: str = Field("label", description="field with the label")
    labels: dict[str, str] | tuple[str, ...] | None = Field(
        None,
        description="label words of each label (a verbaliser), or just the labels; without it the labels found in "
        "the training data, each with its own name as label words",
    )
    label_template: str = Field(
        "{}",
        description="how a label that has no label words of its own is put into words, such as 'a photo of a {}.'",
    )
    reading: Literal["words", "head"] = Field(
        "words", description="score label words (encoders: prototypes of the label words), or train a linear head"
    )

    @field_validator("labels", mode="before")
    @classmethod
    def _numbers_are_names(cls, value: Any) -> Any:
        """`{0: bad, 1: good}`: whole numbers that name labels, as files of data have them."""
        if isinstance(value, Mapping):
            return {_name(label): word for label, word in value.items()}
        return [_name(label) for label in value] if isinstance(value, list | tuple) else value

    @field_validator("label_template")
    @classmethod
    def _one_place(cls, value: Any) -> Any:
        if value.count("{}") != 1:
            raise ValueError(f"expected one place {{}} for the label, such as 'a photo of a {{}}.', got {value!r}")
        return value

    @field_validator("labels")
    @classmethod
    def _at_least_two(cls, value: Any) -> Any:
        if value is not None and len(value) < 2:
            raise ValueError(f"at least two labels are needed, found {len(value)}; name all of them")
        return value


def _name(label: Any) -> Any:
    return str(label) if isinstance(label, int) and not isinstance(label, bool) else label


class Classify(Task):
    """One label per example."""

    name = "classify"
    Config = ClassifyConfig
    default_metrics: ClassVar = ("accuracy", "macro_f1")
    measured_as: ClassVar = frozenset({"label", "pair", "text"})
    gives_scores = True

    @property
    def settings(self) -> ClassifyConfig:
        """The settings with their own type."""
        return cast(ClassifyConfig, self.config)

    def settle(self, examples: Sequence[Mapping[str, Any]]) -> None:
        """Labels from the settings or from the examples.

        Raises:
            ConfigError: fewer than two, one that stands twice or has no words, or two with the same words.
        """
        given = self.settings.labels
        if given is None:
            given = tuple(sorted({self.answer(self.settings, example) for example in examples}))
        if not isinstance(given, dict) and len(set(given)) < len(given):
            twice = next(label for label in given if given.count(label) > 1)
            raise ConfigError(f"task.labels: the label {twice!r} stands twice; keep one of them")
        names = given if isinstance(given, dict) else {label: spoken(label) for label in given}
        verbaliser = given if isinstance(given, dict) else {label: self.spoken_as(label) for label in given}
        if len(verbaliser) < 2:
            origin = (
                "" if self.settings.labels is not None else f" in field {self.settings.label!r} of the training data"
            )
            raise ConfigError(
                f"task.labels: at least two labels are needed, found {len(verbaliser)}{origin}; name all of them"
            )
        for metric in self.metrics:
            if METRICS[metric].kind == "pair" and len(verbaliser) != 2:
                count = len(verbaliser)
                raise ConfigError(f"task.metrics: {metric} is for two labels, and there are {count}; use macro_f1")
        owners: dict[str, str] = {}
        for label, words in verbaliser.items():
            if not words.strip():
                raise ConfigError(f"task.labels: the label {label!r} has no label words; give it at least one")
            owner = owners.setdefault(words, label)
            if owner != label:
                raise ConfigError(
                    f"task.labels: two labels have the same label words: {owner!r} and {label!r} both have {words!r}; "
                    "change one of them"
                )
        self.pipeline = "text-classification" if self.settings.image is None else "image-classification"
        self.labels = tuple(verbaliser)
        self.words = tuple(verbaliser.values())
        self.names = tuple(names.values())
        self.reading = self.settings.reading
        self.outputs = len(self.labels)

    def settled(self) -> TaskConfig:
        """With labels and label words; where a template makes the words, with the labels."""
        if self.settings.label_template != "{}" and not isinstance(self.settings.labels, dict):
            return self.config.model_copy(update={"labels": self.labels})
        return self.config.model_copy(update={"labels": dict(zip(self.labels, self.words, strict=True))})

    @classmethod
    def answer_fields(cls, config: TaskConfig) -> tuple[str, ...]:
        """The label."""
        return (cast(ClassifyConfig, config).label,)

    def fill(self, example: Mapping[str, Any], *, labelled: bool) -> Filled:
        """The template, and the index of the label."""
        target = self.labels.index(self.gold(example)) if labelled else None
        return Filled(self.template.fill(example), target=target)

    @classmethod
    def check(cls, config: TaskConfig) -> RowCheck:
        """Labels from the settings, or else from the training rows."""
        own = cast(ClassifyConfig, config)
        return replace(
            super().check(config),
            labels=None if own.labels is None else tuple(own.labels),
            learn_labels=own.labels is None,
            label=own.label,
        )

    @classmethod
    def answer(cls, config: TaskConfig, example: Mapping[str, Any]) -> str:
        """The label."""
        own = cast(ClassifyConfig, config)
        return as_label(example.get(own.label), own.label, own.labels)

    def gold(self, example: Mapping[str, Any]) -> str:
        """The label.

        Raises:
            DataError: none, or one that is not among the labels.
        """
        name = self.settings.label
        return as_label(example.get(name), name, self.labels, "task.labels, or else from the training data")

    def loss(self, scores: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy among the labels, summed."""
        assert batch.target is not None
        return torch.nn.functional.cross_entropy(scores.float(), batch.target, reduction="sum")

    def spoken_as(self, name: str) -> str:
        """The name, as words, in the label template."""
        return self.settings.label_template.replace("{}", spoken(name))

    def decode(self, scores: list[float], example: Mapping[str, Any]) -> Prediction:
        """The best label, and probabilities among the labels; as `chosen` for what is no answer."""
        return chosen(self.labels, scores)


def spoken(label: str) -> str:
    """A label as words: `order_status` -> `order status`."""
    return label.replace("_", " ").replace("-", " ").strip() or label


def chosen(labels: Sequence[str], scores: Sequence[float]) -> Prediction:
    """The best of some labels, and probabilities among them.

    Where all are impossible, as when a model that is talked to answers with no label at all, the answer is "", which is
    no label, and every probability 0: it is wrong whatever the right label is.
    """
    if all(score == -math.inf for score in scores):
        return Prediction("", dict.fromkeys(labels, 0.0))
    return Prediction(labels[best(scores)], dict(zip(labels, softmax(scores), strict=True)))


def best(scores: Sequence[float]) -> int:
    """Place of the largest score; the first one among equals."""
    return max(range(len(scores)), key=lambda place: scores[place])


def softmax(scores: Sequence[float]) -> list[float]:
    """Probabilities; -inf counts as impossible, and at least one is possible."""
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    total = sum(weights)
    return [weight / total for weight in weights]
