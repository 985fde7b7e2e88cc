"""What a task is: how an example is asked, what its right answer is, how scores become answers, and what is measured.

Knows no prompt, method or backbone; a backbone's scores come in as plain tensors.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from pydantic import Field
from torch import Tensor

from promptuary.data.check import RowCheck, as_text
from promptuary.errors import ConfigError
from promptuary.metrics import METRICS
from promptuary.registry import suggest
from promptuary.settings import Settings
from promptuary.tasks.template import Template, checked, default_template, shown
from promptuary.types import Batch, Piece, Prediction

Reading = Literal["words", "head", "text"]


class TaskConfig(Settings):
    """Settings that every task has; a task adds its own."""

    name: str = Field(description="classify, choose, regress, generate or transfer")
    template: str | None = Field(
        None, description="how an example is asked, such as '{text} It was {mask}.'; without one the fields themselves"
    )
    fields: tuple[str, ...] = Field(("text",), description="text fields, for the default template")
    image: str | None = Field(
        None,
        description="field that holds an image: a path, or the image itself; the default template then shows it alone",
    )
    metrics: tuple[str, ...] = Field((), description="what is measured; the first one chooses the best checkpoint")
    head_lr: float = Field(5e-3, gt=0, description="learning rate of a trained head; our choice")
    head_weight_decay: float = Field(0.0, ge=0, description="on the weights of a trained head; SPT: 0.5 to 3")


def template_of(config: TaskConfig) -> Template:
    """The template of the settings, or the default one.

    Raises:
        ConfigError: as `Template`.
    """
    fields = config.fields if config.image is None else (config.image,)
    return Template(config.template or default_template(fields), config.image)


def seen(config: TaskConfig, example: Mapping[str, Any], name: str) -> str:
    """What a field shows: its text, or the digest of its image.

    Raises:
        DataError: it is missing, blank or no text, or its image cannot be read.
    """
    value = example.get(name)
    return checked(value, name).digest if name == config.image else as_text(value, name)


@dataclass(frozen=True)
class Filled:
    """An example that is ready to be encoded.

    `target`: class index, or value; `answer`: text to be written; `choices`: this example's own possible answers.
    """

    pieces: list[Piece]
    target: int | float | None = None
    answer: str | None = None
    choices: tuple[str, ...] | None = None


class Task(abc.ABC):
    """What examples mean.

    Facts that a task declares:
        name: file name, config tag.
        pipeline: the hub's name for this kind of task.
        reading: how answers are read off a backbone: "words" scored, a trained "head", or written "text".
        outputs: numbers that a head gives.
        measured_as: kinds of metrics that can compare its answers (see `metrics.Metric`).
        gives_scores: whether its predictions have a probability per label or choice.
        words: possible answers as texts, in the order of the scores; empty if each example has its own or none.
        names: what the possible answers are called, where the words are made from that; as many as `words`.
    """

    name: ClassVar[str]
    Config: ClassVar[type[TaskConfig]]
    default_metrics: ClassVar[tuple[str, ...]]
    pipeline: str = "text-classification"
    measured_as: ClassVar[frozenset[str]]
    gives_scores: ClassVar[bool] = False
    reading: Reading
    outputs: int = 1
    words: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    def __init__(self, config: TaskConfig, examples: Sequence[Mapping[str, Any]] = ()) -> None:
        """Settle everything that the settings leave open by looking at training examples.

        Args:
            config: an instance of this class's `Config`.
            examples: training examples; not needed when the settings say everything (see `settled`).

        Raises:
            ConfigError: settings that do not fit together or cannot be settled.
        """
        self.config = config
        self.template = template_of(config)
        for metric in self.metrics:
            if metric not in METRICS:
                raise ConfigError(f"task.metrics: no metric {metric!r}{suggest(metric, list(METRICS))}")
            if METRICS[metric].kind not in self.measured_as:
                fitting = [name for name, known in METRICS.items() if known.kind in self.measured_as]
                raise ConfigError(
                    f"task.metrics: {metric} cannot compare the answers of {self.name}; use {', '.join(fitting)}"
                )
        if not self.asked(config):
            raise ConfigError(
                f"task.template {shown(self.template.text)} shows no field of an example; put one in, such as {{text}}"
            )
        self.settle(examples)
        told = [name for name in self.answer_fields(config) if name in self.template.fields]
        if told:
            raise ConfigError(f"task.template shows the answer field {told[0]!r}; take it out")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what is measured; the first chooses the best checkpoint."""
        return self.config.metrics or self.default_metrics

    @abc.abstractmethod
    def settle(self, examples: Sequence[Mapping[str, Any]]) -> None:
        """Set `reading`, `outputs`, `words` and the like."""

    @abc.abstractmethod
    def settled(self) -> TaskConfig:
        """The settings with everything spelt out, so that a saved prompt needs no data."""

    @classmethod
    @abc.abstractmethod
    def answer_fields(cls, config: TaskConfig) -> tuple[str, ...]:
        """Fields of a labelled example that are not in the template."""

    @classmethod
    def asked(cls, config: TaskConfig) -> tuple[str, ...]:
        """Fields that an example must have to be answered."""
        return tuple(template_of(config).fields)

    @classmethod
    def check(cls, config: TaskConfig) -> RowCheck:
        """What finds labelled examples that cannot be used, while their files are read."""
        return RowCheck(
            lambda example: cls.question(config, example),
            lambda example: cls.answer(config, example),
            image=config.image,
        )

    @classmethod
    def question(cls, config: TaskConfig, example: Mapping[str, Any]) -> tuple[str, ...]:
        """What is shown of an example; of an image its digest.

        Raises:
            DataError: a field is missing, blank or no text, or an image cannot be read.
        """
        return tuple(seen(config, example, name) for name in cls.asked(config))

    @classmethod
    @abc.abstractmethod
    def answer(cls, config: TaskConfig, example: Mapping[str, Any]) -> Any:
        """The right answer of an example, as far as the settings alone tell.

        Raises:
            DataError: it has none, or one that cannot be right.
        """

    @classmethod
    def required(cls, config: TaskConfig) -> tuple[str, ...]:
        """Fields that every labelled example must have."""
        return tuple(dict.fromkeys((*template_of(config).fields, *cls.answer_fields(config))))

    @abc.abstractmethod
    def fill(self, example: Mapping[str, Any], *, labelled: bool) -> Filled:
        """Ask one example.

        Raises:
            DataError: a field is missing, or the label is unknown.
        """

    @abc.abstractmethod
    def gold(self, example: Mapping[str, Any]) -> Any:
        """The right answer, comparable with `Prediction.answer`."""

    @abc.abstractmethod
    def loss(self, scores: Tensor, batch: Batch) -> Tensor:
        """Sum of the losses of the examples of a batch; `scores` [b, c] or [b, outputs]."""

    @abc.abstractmethod
    def decode(self, scores: list[float], example: Mapping[str, Any]) -> Prediction:
        """One example's scores as an answer."""

    def measured(self, prediction: Prediction) -> Any:
        """What metrics compare of an answer; by default the answer itself."""
        return prediction.answer

    @property
    def notes(self) -> list[str]:
        """What a person should know of the settings before a run; by default nothing."""
        return []

    def spoken_as(self, name: str) -> str:
        """How what an answer is called is put into words, see `names`; also of what is no answer of this task."""
        return name

    def decode_text(self, text: str) -> Prediction:
        """A written text as an answer."""
        return Prediction(text.strip())

    def for_abilities(self, abilities: frozenset[str], family: str) -> Self:
        """Refuse a backbone that cannot do what the task reads.

        Raises:
            ConfigError: with what to change.
        """
        need = {"words": "words", "head": "pool", "text": "generate"}[self.reading]
        if need not in abilities:
            other = "use a causal or seq2seq model" if need == "generate" else "choose another task.reading"
            raise ConfigError(f"task {self.name} reads {self.reading!r}, which the {family} family cannot do; {other}")
        return self
