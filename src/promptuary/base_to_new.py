"""Base to new: a prompt learnt on the first half of the classes is also tested on the others, by their names alone.

Knows no method, family or task by name. Source of the protocol: CoCoOp (arXiv 2203.05557), section 4.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from promptuary import registry
from promptuary.data.collate import Row
from promptuary.data.load import load
from promptuary.evaluation import Evaluation
from promptuary.metrics import harmonic_mean
from promptuary.run import OneTask
from promptuary.seeds import seeded
from promptuary.tuned import Tuned

NEW = "new"
"""What the test rows of the new classes are called among the splits, and what stands before their scores."""

HARMONIC = "harmonic_mean"
"""2 b n / (b + n) of the first score on base (b) and new (n) classes, each among the classes of its own half."""


@dataclass(frozen=True)
class NewClasses:
    """The test rows of the classes that are not trained on, and the prompt with their names in the place of its own."""

    tuned: Tuned
    examples: Sequence[Mapping[str, Any]]
    rows: list[Row]
    notes: tuple[str, ...]


def new_classes(run: OneTask, tuned: Tuned) -> NewClasses | None:
    """Of a run on base classes whose prompt can do with other names; None for any other run.

    A prompt that has a context of its own for each class, a trained head, or a model without a text tower cannot.

    Raises:
        DataError: their rows cannot be used.
    """
    if run.data.classes != "base" or tuned.task.reading != "words" or "texts" not in tuned.backbone.abilities:
        return None
    with torch.no_grad():
        context = tuned.prompt(tuned.backbone.probe()).context
    if run.task.model_dump().get("labels") is not None or (context is not None and context.shape[1] > 1):
        return None
    task_class = registry.load("tasks", run.task.name)
    whole = {"classes": "new", "shots": None, "validation_shots": None, "train_size": None, "validation_size": None}
    data = run.data.model_copy(update=whole)
    seed = run.seed if data.split_seed is None else data.split_seed
    check = replace(task_class.check(run.task), tell=False)
    splits = load(data, task_class.required(run.task), seeded(seed, 1), check)
    other = Tuned(tuned.backbone, task_class(run.task, splits.train), tuned.method, max_length=run.data.max_length)
    rows = other.rows(splits.test, labelled=True)
    note = f"test scores named {NEW}_ are of {len(other.task.words)} classes that are not trained on, among themselves"
    return NewClasses(other, splits.test, rows, (note,))


def with_new(base: Evaluation, new: Evaluation, primary: str) -> Evaluation:
    """The evaluation on base classes with the scores on new ones, and the harmonic mean of the first of both."""
    both = {f"{NEW}_{name}": score for name, score in new.scores.items()}
    mean = harmonic_mean(base.scores[primary], new.scores[primary])
    return replace(base, scores={**base.scores, **both, HARMONIC: mean})
