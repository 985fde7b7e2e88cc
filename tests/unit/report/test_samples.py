"""Which examples are shown, and how they look.

Knows no page.
"""

from __future__ import annotations

import base64
import io

import pytest
from PIL import Image

from promptuary import registry
from promptuary.report import samples
from promptuary.tasks.base import Task
from promptuary.types import Prediction


def task(name: str, **settings: object) -> Task:
    found = registry.load("tasks", name)
    return found(found.Config.read({"name": name, **settings}, where="task"))


def told(answer: str, sure: float) -> Prediction:
    return Prediction(
        answer, {"yes": sure if answer == "yes" else 1 - sure, "no": sure if answer == "no" else 1 - sure}
    )


def test_the_surest_mistake_comes_first_and_right_ones_are_spread() -> None:
    predictions = [told("yes", 0.6), told("yes", 0.9), told("yes", 0.7), *[told("no", 0.8)] * 10]
    gold = ["no"] * 13
    wrongness = samples.judged(task("classify", labels=["yes", "no"]), gold, predictions)
    assert samples.chosen(wrongness, predictions, 2) == ([1, 2], [3, 8])
    assert samples.chosen(wrongness, predictions, 100) == ([1, 2, 0], list(range(3, 13)))


def test_a_probability_that_is_no_number_is_no_sure_one() -> None:
    predictions = [Prediction("yes", {"yes": float("nan"), "no": 0.0}), told("yes", 0.6)]
    assert samples.chosen([1.0, 1.0], predictions, 2) == ([1, 0], [])


def test_numbers_are_wrong_by_their_distance() -> None:
    predictions = [Prediction(2.0), Prediction(5.0), Prediction(1.0)]
    wrongness = samples.judged(task("regress", low=0, high=5), [2.5, 1.0, 1.0], predictions)
    assert wrongness == [0.5, 4.0, 0.0]
    assert samples.chosen(wrongness, predictions, 5) == ([1, 0], [2])


def test_texts_are_right_as_their_metric_says() -> None:
    predictions = [Prediction("The cat."), Prediction("dog")]
    found = samples.judged(task("generate", metrics=["exact_match"]), ["cat", "cat"], predictions)
    assert found == [0.0, 1.0]


def test_only_tasks_with_the_same_labels_for_all_have_classes() -> None:
    labels = task("classify", labels=["yes", "no"])
    assert samples.classes(labels, [told("yes", 0.6)]) == ("yes", "no")
    assert samples.classes(task("choose"), [told("yes", 0.6)]) == ()
    assert samples.classes(task("regress", low=0, high=5), [Prediction(1.0)]) == ()
    assert samples.classes(labels, []) == ()


@pytest.mark.parametrize(("size", "expected"), [((640, 320), (160, 80)), ((20, 24), (20, 24)), ((1, 4000), (1, 160))])
def test_pictures_are_made_small_and_never_large(size: tuple[int, int], expected: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (200, 30, 30))
    kind, _, content = samples.small(image).partition(",")
    assert kind == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(content))).size == expected
    assert image.size == size


def test_long_texts_are_cut_and_lists_are_joined() -> None:
    assert len(samples.said("x" * 1000)) == samples.LONG
    assert samples.said("x" * 1000).endswith("…")
    assert samples.said(["tea", "milk"]) == "tea | milk"
    assert samples.said(0.123456) == "0.1235"
