"""Which examples a report shows, and what is seen of each: its picture made small, its texts cut short.

Knows no method, backbone or page.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from promptuary import metrics

if TYPE_CHECKING:
    from promptuary.tasks.base import Task
    from promptuary.types import Prediction

SIDE = 160
"""Longer side of a small picture, in pixels; our choice."""

LONG = 300
"""Most characters of a text that are shown; our choice."""


@dataclass(frozen=True)
class Sample:
    """One example with its answer.

    `index`: its place among the examples, from 0; `texts`: shown fields by name; `picture`: a data address, or none;
    `probability`: of the given answer, and `of_gold` of the right one, where the task gives probabilities.
    """

    index: int
    gold: str
    answer: str
    right: bool
    texts: tuple[tuple[str, str], ...]
    picture: str | None
    probability: float | None
    of_gold: float | None


def classes(task: Task, predictions: Sequence[Prediction]) -> tuple[str, ...]:
    """The labels of a task that has the same ones for every example; else none."""
    return tuple(predictions[0].scores) if task.gives_scores and task.words and predictions else ()


def judged(task: Task, gold: Sequence[Any], predictions: Sequence[Prediction]) -> list[float]:
    """How wrong each answer is: 0 is right, 1 is wrong; of numbers, how far they are from the right ones.

    Of what is judged, how far the first metric is from 100.
    """
    kind = "label" if task.gives_scores else metrics.METRICS[task.metrics[0]].kind
    if kind == "value":
        return [abs(right - one.answer) for right, one in zip(gold, predictions, strict=True)]
    if kind == "judged":
        score = metrics.METRICS[task.metrics[0]].function
        return [100 - score([right], [task.measured(one)]) for right, one in zip(gold, predictions, strict=True)]
    same = metrics.accuracy if kind in ("label", "pair") else metrics.exact_match
    return [1 - same([right], [one.answer]) for right, one in zip(gold, predictions, strict=True)]


def chosen(wrongness: Sequence[float], predictions: Sequence[Prediction], most: int) -> tuple[list[int], list[int]]:
    """Places of wrong answers, the worst and then the surest first, and of right ones, evenly from first to last.

    Args:
        wrongness: as `judged` gives it.
        predictions: of the same examples.
        most: how many of each.
    """
    wrong = [place for place, how in enumerate(wrongness) if how != 0]
    right = [place for place, how in enumerate(wrongness) if how == 0]
    wrong.sort(key=lambda place: (-_number(wrongness[place]), -_number(probability(predictions[place]) or 0.0), place))
    count = min(most, len(right))
    return wrong[:most], [right[number * len(right) // count] for number in range(count)]


def sample(
    place: int, example: Mapping[str, Any], gold: Any, prediction: Prediction, wrong: float, task: Task
) -> Sample:
    """What is seen of an example.

    Raises:
        DataError: its image can no longer be read.
    """
    from promptuary.data.images import picture_of

    image = task.config.image
    shown = [name for name in task.asked(task.config) if name != image]
    return Sample(
        place,
        said(gold),
        said(prediction.answer),
        wrong == 0,
        tuple((name, said(example[name])) for name in shown),
        None if image is None else small(picture_of(example[image]).opened()),
        probability(prediction),
        prediction.scores.get(gold) if prediction.scores else None,
    )


def said(value: Any, most: int = LONG) -> str:
    """A value as a short text."""
    if isinstance(value, list | tuple):
        text = " | ".join(map(str, value))
    else:
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def probability(prediction: Prediction) -> float | None:
    """Of the given answer, if there are probabilities."""
    return prediction.scores.get(prediction.answer) if prediction.scores else None


def small(image: Image.Image, side: int = SIDE) -> str:
    """An image in RGB as a data address, no side longer than `side` pixels; a smaller one keeps its size."""
    # a copy: an image that somebody holds in memory must not change
    copy = image.copy()
    copy.thumbnail((side, side))
    file = io.BytesIO()
    copy.save(file, "JPEG", quality=85)
    return address(file.getvalue(), "jpeg")


def png(image: Image.Image) -> str:
    """An image as a data address, exactly."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return address(file.getvalue(), "png")


def address(content: bytes, kind: str) -> str:
    """The bytes of an image as a data address."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _number(value: float) -> float:
    return value if math.isfinite(value) else -1.0
