"""In-context demonstrations: which examples are shown, in what form, and that they follow from the seed.

Knows no other method.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from promptuary import registry
from promptuary.listening import Listener
from promptuary.methods.demonstrations import Demonstrations, DemonstrationsConfig
from promptuary.methods.words import Draw
from promptuary.testing.case import case_of
from promptuary.training import Training, train
from promptuary.types import Shape

EXAMPLES = [{"text": f"text {number}", "label": "yes"} for number in range(6)]


def shown(example: Mapping[str, Any]) -> str:
    return f"<{example['text']}>"


def proposed(number: int, seed: int = 0, **settings: Any) -> str | None:
    config = DemonstrationsConfig.read({"name": "demonstrations", **settings}, where="method")
    draw = Draw(EXAMPLES, shown, lambda count, generator: "", torch.Generator().manual_seed(seed))
    return Demonstrations(config, Shape(8)).proposal(number, draw)


def test_so_many_different_examples_are_shown() -> None:
    text = proposed(0, count=4)
    assert text is not None
    lines = text.split("\n")
    assert len(set(lines)) == 4
    assert set(lines) <= {shown(example) for example in EXAMPLES}


def test_no_more_than_there_are() -> None:
    assert len((proposed(0, count=50) or "").split("\n")) == 6


def test_another_seed_shows_others() -> None:
    assert proposed(0, seed=1) != proposed(0, seed=2)
    assert proposed(0, seed=1) == proposed(0, seed=1)


@pytest.mark.parametrize(("separator", "between"), [("line", "\n"), ("empty_line", "\n\n"), ("space", " ")])
def test_an_instruction_comes_first(separator: str, between: str) -> None:
    text = proposed(0, count=1, init_text="Answer:", separator=separator)
    assert text is not None
    assert text.startswith(f"Answer:{between}<")


def test_draws_end() -> None:
    assert proposed(2, draws=3) is not None
    assert proposed(3, draws=3) is None


def test_an_example_is_shown_as_the_task_asks_it_with_its_answer(tmp_path: Path) -> None:
    case = case_of(registry.load("methods", "demonstrations"), "masked", tmp_path)
    training = Training(case.run("run"), Listener(), case.backbone())
    words = training.staging.words
    assert words is not None
    example = words.examples[0]
    answer = {"positive": "good", "negative": "bad"}[example["label"]]
    assert words.shown(example) == f"{example['text']} it was {answer}"
    found = train(case.run("other"), backbone=case.backbone()).facts["text"]
    assert all(line.endswith((" it was good", " it was bad")) for line in found.split("\n"))
