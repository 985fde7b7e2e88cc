"""Classification: one of a fixed set of labels, by label words (a verbaliser) or by a trained head.

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
from promptuary.registry import suggest
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
    reading: Literal["words", "head"] = Field(
        "words", description="score label words (encoders: prototypes of the label words), or train a linear head"
    )


class Classify(Task):
    """One label per example."""

    name = "classify"
    Config = ClassifyConfig
    default_metrics: ClassVar = ("accuracy", "macro_f1")

    @property
    def settings(self) -> ClassifyConfig:
        """The settings with their own type."""
        return cast(ClassifyConfig, self.config)

    def settle(self, examples: Sequence[Mapping[str, Any]]) -> None:
        """Labels from the settings or from the examples."""
        given = self.settings.labels
        if given is None:
            found = sorted({str(example[self.settings.label]) for example in examples})
            given = tuple(found)
        verbaliser = given if isinstance(given, dict) else {label: spoken(label) for label in given}
        if len(verbaliser) < 2:
            raise ConfigError(f"task.labels: at least two labels are needed, found {len(verbaliser)}")
        if len(set(verbaliser.values())) < len(verbaliser):
            raise ConfigError("task.labels: two labels have the same label words")
        self.labels = tuple(verbaliser)
        self.words = tuple(verbaliser.values())
        self.reading = self.settings.reading
        self.outputs = len(self.labels)

    def settled(self) -> TaskConfig:
        """With labels and label words."""
        return self.config.model_copy(update={"labels": dict(zip(self.labels, self.words, strict=True))})

    @classmethod
    def answer_fields(cls, config: TaskConfig) -> tuple[str, ...]:
        """The label."""
        return (cast(ClassifyConfig, config).label,)

    def fill(self, example: Mapping[str, Any], *, labelled: bool) -> Filled:
        """The template, and the index of the label."""
        target = self.labels.index(self.gold(example)) if labelled else None
        return Filled(self.template.fill(example), target=target)

    def gold(self, example: Mapping[str, Any]) -> str:
        """The label.

        Raises:
            DataError: a label that is not among the labels.
        """
        label = str(example.get(self.settings.label))
        if label not in self.labels:
            raise DataError(
                f'unknown label "{label}"{suggest(label, list(self.labels))} (labels: {", ".join(self.labels[:20])}; '
                "they come from task.labels, or else from the training data)"
            )
        return label

    def loss(self, scores: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy among the labels, summed."""
        assert batch.target is not None
        return torch.nn.functional.cross_entropy(scores.float(), batch.target, reduction="sum")

    def decode(self, scores: list[float], example: Mapping[str, Any]) -> Prediction:
        """The best label, and probabilities among the labels."""
        return Prediction(self.labels[best(scores)], dict(zip(self.labels, softmax(scores), strict=True)))


def spoken(label: str) -> str:
    """A label as words: `order_status` -> `order status`."""
    return label.replace("_", " ").replace("-", " ").strip() or label


def best(scores: Sequence[float]) -> int:
    """Place of the largest score; the first one among equals."""
    return max(range(len(scores)), key=lambda place: scores[place])


def softmax(scores: Sequence[float]) -> list[float]:
    """Probabilities; -inf counts as impossible."""
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    total = sum(weights)
    return [weight / total for weight in weights]
