"""What methods of words have in common: no tensors, words that start as they are set, and the gap as a reward.

Knows no search and no particular method but a plain one.
"""

from __future__ import annotations

import pytest
import torch

from promptuary.errors import ConfigError
from promptuary.methods.manual import Manual, ManualConfig
from promptuary.methods.words import UNUSED
from promptuary.types import Prompt, Shape, View

OTHER = {"init_prompt": "some/folder", "prompt_lr": 0.1, "lr_unit": "absolute", "weight_decay": 0.1}


def test_there_is_nothing_to_train_and_any_budget_holds_it() -> None:
    method, config = Manual(ManualConfig(), Shape(8)), ManualConfig()
    assert list(method.parameters()) == []
    assert Manual.count(config, Shape(8)) == 0
    assert Manual.match_budget(config, 1, Shape(8)) == config


@pytest.mark.parametrize("name", UNUSED)
def test_settings_of_tensors_are_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"method\.{name}: manual is words"):
        Manual(ManualConfig.read({"name": "manual", name: OTHER[name]}, where="method"), Shape(8))


def test_the_prompt_is_the_text_and_saying_something_else_leaves_it() -> None:
    method = Manual(ManualConfig(), Shape(8))
    method.text = "it was"
    other = method.saying("very cold")
    assert (method.prompt(View()), other.prompt(View())) == (Prompt(text="it was"), Prompt(text="very cold"))


def test_the_reward_is_the_gap_to_the_best_wrong_label() -> None:
    found = Manual(ManualConfig(), Shape(8)).reward(
        torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.4, 0.2]]), torch.tensor([1, 0])
    )
    torch.testing.assert_close(found, torch.tensor([-0.5, 0.0]))
