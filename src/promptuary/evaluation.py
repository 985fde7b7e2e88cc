"""Scores of a prompt on labelled examples, with intervals; tidy rows of predictions.

Knows no training, no command line and no method or family by name.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from promptuary import memory, metrics
from promptuary.data.collate import Row
from promptuary.errors import DataError, OutOfMemory
from promptuary.tasks.base import Task
from promptuary.tuned import Tuned
from promptuary.types import Prediction


@dataclass(frozen=True)
class Evaluation:
    """Scores by metric name, the predictions behind them, and a 95 % bootstrap interval of the first metric.

    `batch_size`: examples that were run together in the end; less than was asked for if memory ran out.
    """

    scores: dict[str, float]
    predictions: list[Prediction]
    gold: list[Any]
    interval: tuple[float, float] | None
    batch_size: int

    def rows(self) -> list[dict[str, Any]]:
        """One row per example: place, right answer, given answer, scores."""
        return [
            {
                "index": index,
                "gold": gold,
                "answer": prediction.answer,
                "scores": dict(prediction.scores),
                **({} if prediction.prompt is None else {"prompt": prediction.prompt}),
            }
            for index, (gold, prediction) in enumerate(zip(self.gold, self.predictions, strict=True))
        ]


def evaluate(
    tuned: Tuned,
    examples: Sequence[Mapping[str, Any]],
    *,
    rows: Sequence[Row] | None = None,
    batch_size: int = 32,
    interval: bool = True,
    check: Callable[[], None] | None = None,
) -> Evaluation:
    """Predict labelled examples and score the answers.

    Args:
        tuned: a prompt on its base.
        examples: with labels.
        rows: the same examples, encoded already.
        batch_size: examples per batch; halved as often as memory asks for that.
        interval: whether to bootstrap an interval (labels and texts that are right or wrong only).
        check: called before each batch; may raise to stop.

    Raises:
        DataError: no examples, or one lacks a field or has an unknown label.
        OutOfMemory: a single example is too large.
    """
    if isinstance(examples, str | bytes | Mapping) or not all(isinstance(one, Mapping) for one in examples or ()):
        raise DataError("expected a list of mappings of fields, with their labels, to evaluate on")
    if not examples:
        raise DataError("there are no examples to evaluate on")
    encoded = rows if rows is not None else tuned.rows(examples, labelled=True)
    gold = [tuned.task.gold(example) for example in examples]
    size = batch_size
    while True:
        answer = functools.partial(tuned.answer, encoded, examples, batch_size=size, check=check)
        predictions = memory.attempt(answer)
        if predictions is not None:
            break
        if size == 1:
            raise OutOfMemory(
                "evaluation runs out of memory with a single example; lower data.max_length or task.max_new_tokens, "
                "shorten the prompt, or use backbone.dtype: bfloat16"
            )
        size = math.ceil(min(size, len(examples)) / 2)
    return scored(tuned.task, gold, predictions, interval=interval, batch_size=size)


def scored(
    task: Task, gold: Sequence[Any], predictions: Sequence[Prediction], *, interval: bool, batch_size: int
) -> Evaluation:
    """Scores of answers that are there already.

    Args:
        task: says what is measured.
        gold: right answers.
        predictions: in the same order.
        interval: whether to bootstrap an interval (labels and texts that are right or wrong only).
        batch_size: what they were made with.
    """
    answers = [task.measured(prediction) for prediction in predictions]
    spread = None
    if interval and by_example(task):
        spread = metrics.bootstrap_interval(rightness(task, gold, answers))
    return Evaluation(metrics.compute(task.metrics, gold, answers), list(predictions), list(gold), spread, batch_size)


def by_example(task: Task) -> bool:
    """Whether the first metric is a share of examples that are right, or a mean over what judges say of each."""
    return task.metrics[0] in ("accuracy", "exact_match", "reward", "content", "joint")


def rightness(task: Task, gold: Sequence[Any], answers: Sequence[Any]) -> list[float]:
    """The first metric of each example alone."""
    score = metrics.METRICS[task.metrics[0]].function
    return [score([right], [answer]) for right, answer in zip(gold, answers, strict=True)]
