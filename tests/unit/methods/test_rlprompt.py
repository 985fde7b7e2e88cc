"""RLPrompt: its reward by hand, what a degenerate prompt earns, and a policy that finds words on a tiny model.

Knows no other method; the policy has tests of its own.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from promptuary import registry
from promptuary.config import load_run
from promptuary.errors import ConfigError
from promptuary.listening import Listener
from promptuary.methods.rlprompt import RLPrompt, RLPromptConfig
from promptuary.methods.words import Draw
from promptuary.testing.case import case_of, logged
from promptuary.training import Training, train
from promptuary.types import Shape

METHOD = RLPrompt(RLPromptConfig(), Shape(8))


def reward(rows: list[list[float]], right: list[int]) -> torch.Tensor:
    return METHOD.reward(torch.tensor(rows, dtype=torch.float64), torch.tensor(right))


def test_the_reward_by_hand() -> None:
    found = reward([[0.9, 0.1], [0.3, 0.7], [0.6, 0.4], [0.55, 0.45]], [0, 1, 1, 0])
    torch.testing.assert_close(found, torch.tensor([160.0, 80, -36, 20], dtype=torch.float64))
    assert float(found.mean()) == pytest.approx(56)


def test_three_classes_and_a_tie() -> None:
    found = reward([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6], [0.1, 0.45, 0.45]], [0, 0, 1])
    torch.testing.assert_close(found, torch.tensor([40.0, -72, 0], dtype=torch.float64), atol=1e-9, rtol=0)


def test_its_bounds() -> None:
    assert reward([[1, 0], [0, 1]], [0, 0]).tolist() == [200, -180]


@pytest.mark.parametrize("q", [0.5, 0.6, 0.9, 1.0])
def test_a_prompt_that_always_gives_one_class_earns_almost_nothing(q: float) -> None:
    earned = float(reward([[q, 1 - q]] * 2, [0, 1]).mean())
    assert earned == pytest.approx(10 * (2 * q - 1))
    assert earned <= 10


def test_weights_are_settings() -> None:
    method = RLPrompt(RLPromptConfig(wrong=1, right=2), Shape(8))
    found = method.reward(torch.tensor([[0.9, 0.1], [0.1, 0.9]]), torch.tensor([0, 0]))
    torch.testing.assert_close(found, torch.tensor([1.6, -0.8]))


def test_a_plain_search_draws_as_many_tokens() -> None:
    drawn = []

    def words(count: int, generator: torch.Generator) -> str:
        drawn.append(count)
        return "w" * count

    draw = Draw([], str, words, torch.Generator())
    assert RLPrompt(RLPromptConfig(num_tokens=3), Shape(8)).proposal(7, draw) == "www"
    assert drawn == [3]


def policy_run(case: Any, name: str, steps: int, **changes: Any) -> Any:
    settings = {"name": "policy", "hidden": 64, "prompts": 6, "learning_rate": 1e-3, "placeholder": "it was"}
    values = case.run(name, steps=steps).model_dump()
    return load_run({**values, "solver": {**settings, **changes}})


@pytest.mark.parametrize("placement", ["front", "end"])
def test_a_policy_finds_words_that_earn_more_than_none(placement: str, tmp_path: Path) -> None:
    case = case_of(registry.load("methods", "rlprompt"), "causal", tmp_path, {"num_tokens": 2, "placement": placement})
    backbone = case.backbone()
    run = policy_run(case, "run", 6)
    result = train(run, backbone=backbone)
    words = Training(run.model_copy(update={"out": str(tmp_path / "again")}), Listener(), backbone).staging.words
    assert words is not None
    nothing = float(words.tried([""], words.examples).reward.mean())
    rewards = [row["parts"] for row in logged(result.dir) if "parts" in row]
    assert rewards[-1]["best"] > nothing
    # what was validated are the words with the best reward at that time; the run keeps them unless it began better
    said = [row["text"] for row in logged(result.dir) if row.get("split") == "validation"]
    assert said[0] == ""
    assert all(said[1:])
    assert result.facts["text"] in said
    assert float(words.tried(said[-1:], words.examples).reward.mean()) == pytest.approx(rewards[-1]["best"], abs=1e-3)
    # the best so far never gets worse
    assert all(one["best"] <= two["best"] for one, two in itertools.pairwise(rewards))
    assert result.facts["forward_calls"] == 6 * 7


def test_the_reward_of_a_text_is_that_of_the_pasted_one(tmp_path: Path) -> None:
    case = case_of(registry.load("methods", "rlprompt"), "causal", tmp_path, {"num_tokens": 2})
    training = Training(policy_run(case, "run", 2), Listener(), case.backbone())
    words = training.staging.words
    assert words is not None
    said = words.tried(["red blue", "very cold"], words.examples[:5])
    for row, text in enumerate(("red blue", "very cold")):
        tuned = training.course.learner.saying(text)  # type: ignore[union-attr]
        answers = tuned.predict(list(words.examples[:5]))
        own = torch.tensor([list(one.scores.values()) for one in answers], dtype=torch.float64)
        right = torch.tensor(
            [list(one.scores).index(e["label"]) for one, e in zip(answers, words.examples, strict=False)]
        )
        torch.testing.assert_close(said.reward[row], METHOD.reward(own, right), atol=1e-3, rtol=1e-5)


def test_a_policy_needs_a_causal_model_to_speak_with(tmp_path: Path) -> None:
    case = case_of(registry.load("methods", "rlprompt"), "masked", tmp_path, {"num_tokens": 2})
    with pytest.raises(ConfigError, match="a policy speaks with a causal model"):
        train(policy_run(case, "run", 2), backbone=case.backbone())
