"""Regression: the scale from 0 to 1 and back, by a head and by two words.

Knows no backbone.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from promptuary.errors import ConfigError, DataError
from promptuary.tasks.regress import Regress, RegressConfig
from promptuary.types import Batch

VALUES = [{"text": "x", "label": value} for value in (2, 7.0, "-3", 4.5)]
WORDS = {"words": ["bad", "good"], "low": 0, "high": 5}


def task(examples: list[dict[str, Any]] | None = None, **settings: Any) -> Regress:
    return Regress(RegressConfig.read(settings, where="task"), VALUES if examples is None else examples)


def batch(*target: float) -> Batch:
    ones = torch.ones(len(target), 1, dtype=torch.long)
    return Batch(ones, ones, torch.arange(len(target)), target=torch.tensor(target))


def test_the_range_comes_from_the_settings_or_from_the_data() -> None:
    assert (task().low, task().high, task().reading, task().outputs) == (-3.0, 7.0, "head", 1)
    assert (task(low=0).low, task(low=0).high) == (0, 7.0)
    made = task([], **WORDS)
    assert (made.low, made.high, made.reading, made.words) == (0, 5, "words", ("bad", "good"))


def test_settled_settings_need_no_data() -> None:
    again = Regress(task().settled())
    assert (again.low, again.high) == (-3.0, 7.0)


@pytest.mark.parametrize(
    ("examples", "settings", "reason"),
    [
        ([], {}, "task.low and task.high are needed"),
        ([], {"low": 1}, "task.low and task.high are needed"),
        ([{"label": 1}, {"label": 1}], {}, "not below"),
        ([], {"low": 3, "high": 2}, "not below"),
    ],
)
def test_an_empty_range_is_refused(examples: list[dict[str, Any]], settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        task(examples, **settings)


@pytest.mark.parametrize("value", ["many", None, "", math.nan, math.inf, [1]])
def test_what_is_no_finite_number_is_refused(value: Any) -> None:
    with pytest.raises(DataError, match="number"):
        task().gold({"label": value})


@given(value=st.floats(-1e6, 1e6), low=st.floats(-1e3, 1e3), span=st.floats(1e-2, 1e3))
def test_decoding_a_head_is_the_inverse_of_the_target(value: float, low: float, span: float) -> None:
    made = task([], low=low, high=low + span)
    target = made.fill({"text": "x", "label": value}, labelled=True).target
    assert target is not None
    assert made.decode([target], {}).answer == pytest.approx(value, rel=1e-6, abs=1e-6 * span)


@given(value=st.floats(0.01, 4.99))
def test_decoding_words_is_the_inverse_of_the_best_scores(value: float) -> None:
    made = task([], **WORDS)
    goal = made.fill({"text": "x", "label": value}, labelled=True).target
    assert goal is not None
    assert made.decode([math.log(1 - goal), math.log(goal)], {}).answer == pytest.approx(value, rel=1e-6)


def test_words_answer_within_the_range() -> None:
    made = task([], **WORDS)
    assert made.decode([100.0, -100.0], {}).answer == pytest.approx(0)
    assert made.decode([-100.0, 100.0], {}).answer == pytest.approx(5)
    assert made.decode([3.0, 3.0], {}).answer == pytest.approx(2.5)


def test_a_head_pays_the_squared_error() -> None:
    scores = torch.tensor([[0.5], [0.25]])
    assert task().loss(scores, batch(0.0, 0.75)).item() == pytest.approx(0.5)
    assert task().loss(scores, batch(0.5, 0.25)).item() == 0


@pytest.mark.parametrize("goal", [0.1, 0.5, 0.8])
def test_words_pay_least_at_the_goal_and_there_the_entropy(goal: float) -> None:
    made = task([], **WORDS)
    scores = torch.tensor([[math.log(1 - goal), math.log(goal)]], requires_grad=True)
    loss = made.loss(scores, batch(goal))
    loss.backward()
    entropy = -goal * math.log(goal) - (1 - goal) * math.log(1 - goal)
    assert loss.item() == pytest.approx(entropy, rel=1e-5)
    assert scores.grad is not None
    assert scores.grad.abs().max() < 1e-6
    for step in (-0.5, 0.5):
        assert made.loss(scores.detach() + torch.tensor([[0.0, step]]), batch(goal)) > loss


def test_words_clamp_goals_outside_of_the_range() -> None:
    made, scores = task([], **WORDS), torch.tensor([[0.3, -0.2]])
    high = made.fill({"text": "x", "label": 9}, labelled=True).target
    assert high == pytest.approx(1.8)
    assert torch.equal(made.loss(scores, batch(1.8)), made.loss(scores, batch(1.0)))
    assert torch.equal(made.loss(scores, batch(-0.4)), made.loss(scores, batch(0.0)))
    # a head may aim there
    assert task().loss(torch.tensor([[1.8]]), batch(1.8)).item() == 0
