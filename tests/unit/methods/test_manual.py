"""Prompts by hand: the best of several is kept, the first of equals, and one alone is simply there.

Knows no other method.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
from promptuary import registry
from promptuary.methods.manual import Manual, ManualConfig
from promptuary.methods.words import Draw
from promptuary.prompts.init import Starting
from promptuary.testing.case import case_of
from promptuary.training import train
from promptuary.types import Shape

DRAW = Draw([], str, lambda count, generator: "", torch.Generator())


def made(**settings: object) -> Manual:
    method = Manual(ManualConfig.read({"name": "manual", **settings}, where="method"), Shape(8))
    backbone = tiny.backbone("causal")
    method.initialise(Starting(backbone.vocabulary, torch.Generator()))
    return method


def test_it_starts_as_the_first_text_and_proposes_all() -> None:
    method = made(init_text=" was it good ", texts=["was it bad", "blue"])
    assert method.text == "was it good"
    assert [method.proposal(number, DRAW) for number in range(4)] == ["was it good", "was it bad", "blue", None]


def test_without_any_text_there_is_no_prompt() -> None:
    method = made()
    assert (method.text, method.proposal(0, DRAW)) == ("", None)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
def test_the_run_keeps_the_text_that_answers_best(order: list[int], tmp_path: Path) -> None:
    case = case_of(registry.load("methods", "manual"), "causal", tmp_path)
    texts = [("was it good", "was it bad", "red or blue")[place] for place in order]
    backbone = case.backbone()
    scores = {}
    for number, text in enumerate(texts):
        run = case.run(f"one-{number}", steps=3, method={"name": "manual", "texts": [text]})
        facts = train(run, backbone=backbone).facts
        scores[text] = (facts["validation"]["accuracy"], reward(run, text, backbone))
    together = case.run("all", steps=3, method={"name": "manual", "texts": texts})
    together = together.model_copy(update={"solver": together.solver.model_copy(update={"population": 1})})  # type: ignore[union-attr]
    found = train(together, backbone=backbone)
    assert found.facts["text"] == max(texts, key=lambda text: scores[text])
    assert {one["text"] for one in found.facts["texts"]} <= set(texts)


def reward(run: object, text: str, backbone: object) -> float:
    from promptuary.listening import Listener
    from promptuary.training import Training

    training = Training(run, Listener(), backbone)  # type: ignore[arg-type]
    assert training.staging.words is not None
    return float(training.staging.words.tried([text], training.staging.words.examples).reward.mean())
