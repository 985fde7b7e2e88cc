"""Generation: what is written, what is asked, and what is refused.

Knows no backbone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from promptuary.errors import ConfigError, DataError
from promptuary.tasks.generate import Generate, GenerateConfig


def task(**settings: Any) -> Generate:
    return Generate(GenerateConfig.read(settings, where="task"))


def test_the_answer_is_the_target_text() -> None:
    made = task()
    assert made.reading == "text"
    assert made.fill({"text": "x", "target": "  two words "}, labelled=True).answer == "two words"
    assert made.fill({"text": "x"}, labelled=False).answer is None
    assert task(target="y").gold({"y": 7}) == "7"


@pytest.mark.parametrize("value", ["", "  ", None])
def test_an_empty_answer_is_refused(value: Any) -> None:
    with pytest.raises(DataError, match="target is missing or blank"):
        task().gold({"text": "x", "target": value})


def test_a_number_as_answer_is_written_as_it_is() -> None:
    assert task().gold({"target": 0}) == "0"


def test_a_template_that_shows_the_answer_is_refused() -> None:
    with pytest.raises(ConfigError, match="shows the answer"):
        task(template="{text} {target} {mask}")


def test_a_written_text_is_the_answer_without_white_space_around() -> None:
    assert task().decode_text(" two words\n").answer == "two words"
    with pytest.raises(DataError, match="decoded from its text"):
        task().decode([0.0], {})


def test_the_loss_is_what_the_backbone_summed() -> None:
    assert task().loss(torch.tensor(2.5), None).item() == 2.5  # type: ignore[arg-type]


def test_nothing_is_left_open() -> None:
    assert task().settled() == task().config
    assert Generate.required(GenerateConfig(template="{q} {mask}")) == ("q", "target")


@pytest.mark.parametrize(("family", "refused"), [("masked", True), ("encoder", True), ("causal", False)])
def test_a_family_that_cannot_write_is_refused(family: str, refused: bool) -> None:
    abilities = frozenset({"words", "pool"} if refused else {"words", "generate"})
    if not refused:
        assert task().for_abilities(abilities, family).reading == "text"
        return
    with pytest.raises(ConfigError, match=f"the {family} family cannot do; use a causal or seq2seq"):
        task().for_abilities(abilities, family)
