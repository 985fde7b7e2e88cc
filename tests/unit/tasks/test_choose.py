"""Multiple choice: where choices come from, what a label means, and what padding must not do.

Knows no backbone.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from promptuary.errors import ConfigError, DataError
from promptuary.tasks.choose import Choose, ChooseConfig
from promptuary.types import Batch

LISTED = {"text": "x", "choices": ["up", "down", "left"], "label": 2}


def task(**settings: Any) -> Choose:
    return Choose(ChooseConfig.read(settings, where="task"))


def test_choices_from_one_list_or_from_several_fields() -> None:
    filled = task().fill(LISTED, labelled=True)
    assert (filled.choices, filled.target) == (("up", "down", "left"), 2)
    filled = task(choices=["a", "b"]).fill({"text": "x", "a": "yes", "b": 5, "label": "yes"}, labelled=True)
    assert (filled.choices, filled.target) == (("yes", "5"), 0)
    assert task().fill({**LISTED, "label": None}, labelled=False).target is None


@pytest.mark.parametrize(
    ("choices", "label", "right"),
    [
        (["up", "down"], 1, "down"),
        (["up", "down"], "1", "down"),
        (["up", "down"], "down", "down"),
        (["1", "2", "0"], "1", "1"),
        # a number is a place: the answer of "3 - 1" at place 2 is not the choice "2"
        (["1", "2", "0"], 2, "0"),
        ([3, 4], 0, "3"),
    ],
)
def test_a_label_is_a_place_or_a_text(choices: list[Any], label: Any, right: str) -> None:
    example = {"text": "x", "choices": choices, "label": label}
    assert task().gold(example) == right
    assert task().fill(example, labelled=True).target == list(map(str, choices)).index(right)


@pytest.mark.parametrize("label", [2, -1, "2", "sideways", None, True, 1.0])
def test_a_label_that_is_neither_is_refused(label: Any) -> None:
    with pytest.raises(DataError, match="neither a choice nor a place from 0 to 1"):
        task().gold({"text": "x", "choices": ["up", "down"], "label": label})


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        ({"text": "x", "label": 0}, "no field 'choices'"),
        ({"text": "x", "choices": ["only"], "label": 0}, "gives 1 choice"),
        ({"text": "x", "choices": "a text", "label": 0}, "gives 1 choice"),
        ({"text": "x", "choices": [], "label": 0}, "gives 0 choice"),
    ],
)
def test_an_example_without_choices_is_refused(example: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match="choice") as caught:
        task().fill(example, labelled=False)
    assert reason in str(caught.value)


def test_a_template_that_shows_a_choice_is_refused() -> None:
    with pytest.raises(ConfigError, match="uses the choice 'a'"):
        task(choices=["a", "b"], template="{text} {a} {mask}")


def test_padding_choices_are_never_the_answer() -> None:
    found = task().decode([-1.0, -2.0, -1.5, 7.0, -math.inf], LISTED)
    assert found.answer == "up"
    assert list(found.scores) == ["up", "down", "left"]
    assert sum(found.scores.values()) == pytest.approx(1)


def test_the_loss_ignores_choices_that_do_not_exist() -> None:
    ones = torch.ones(2, 1, dtype=torch.long)
    batch = Batch(ones, ones, torch.arange(2), target=torch.tensor([0, 2]))
    scores = torch.tensor([[1.0, 0.0, -torch.inf], [0.0, 1.0, 2.0]], requires_grad=True)
    loss = task().loss(scores, batch)
    loss.backward()
    by_hand = -math.log(math.e / (math.e + 1)) - math.log(math.exp(2) / (1 + math.e + math.exp(2)))
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)
    assert scores.grad is not None
    assert scores.grad[0, 2] == 0
    assert bool(scores.grad.isfinite().all())


def test_nothing_is_left_open_and_all_fields_are_required() -> None:
    made = task(choices=["a", "b"], label="y")
    assert made.settled() == made.config
    assert Choose.required(made.config) == ("text", "a", "b", "y")
