"""Words that are looked for: rewards and scores by hand, many texts at once as one by one, and nothing run twice.

Knows no solver.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from promptuary.building import build_method, shape_of
from promptuary.errors import ConfigError, Interrupted
from promptuary.methods.manual import ManualConfig
from promptuary.tasks.base import Task
from promptuary.tasks.choose import Choose, ChooseConfig
from promptuary.tasks.classify import Classify, ClassifyConfig
from promptuary.tasks.generate import Generate, GenerateConfig
from promptuary.tasks.regress import Regress, RegressConfig
from promptuary.testing.case import case_of
from promptuary.tuned import Tuned
from promptuary.wording import Wording

LABELS = {"positive": "good", "negative": "bad"}
TEXTS = ["red apple was new", "the old dog sleeps", "blue sky", "never cold but always hot"]
EXAMPLES = [{"text": text, "label": ("positive", "negative")[n % 2]} for n, text in enumerate(TEXTS)]
SAID = ["it was", "", "very cold and quite big", "it was"]


def wording(family: str = "causal", task: Task | None = None, **options: Any) -> Wording:
    backbone = tiny.backbone(family)
    task = task or Classify(ClassifyConfig(template="{text} {prompt} {mask}", labels=LABELS))
    method = build_method(ManualConfig(placement="end"), shape_of(backbone, task))
    return Wording(Tuned(backbone, task, method, max_length=40), EXAMPLES, EXAMPLES[:2], **options)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_many_texts_at_once_are_each_alone(family: str) -> None:
    found = wording(family).tried(SAID, EXAMPLES)
    assert found.reward.shape == found.score.shape == (4, 4)
    for row, text in enumerate(SAID):
        for column, example in enumerate(EXAMPLES):
            alone = wording(family).tried([text], [example])
            torch.testing.assert_close(found.reward[row, column], alone.reward[0, 0], atol=1e-5, rtol=0)
            assert found.score[row, column] == alone.score[0, 0]


def test_the_reward_is_the_gap_and_the_score_is_being_right() -> None:
    words = wording()
    found = words.tried(["it was"], EXAMPLES)
    answers = words.tuned.saying("it was").predict(EXAMPLES)
    for column, (one, example) in enumerate(zip(answers, EXAMPLES, strict=True)):
        right, wrong = one.scores[example["label"]], next(v for k, v in one.scores.items() if k != example["label"])
        assert float(found.reward[0, column]) == pytest.approx(right - wrong, abs=1e-6)
        assert float(found.score[0, column]) == float(one.answer == example["label"])


def test_nothing_is_run_twice() -> None:
    words = wording()
    words.tried(SAID, EXAMPLES)
    assert words.runs == 3 * 4
    words.tried(SAID[:2], EXAMPLES[1:])
    assert words.runs == 12
    words.tried(["it was", "new"], EXAMPLES)
    assert words.runs == 16


def test_an_example_that_says_something_else_is_another_one() -> None:
    words = wording()
    words.tried(["it was"], EXAMPLES[:1])
    other = {**EXAMPLES[0], "label": "negative"}
    found = words.tried(["it was"], [EXAMPLES[0], other])
    assert words.runs == 2
    assert float(found.reward[0, 0]) == pytest.approx(-float(found.reward[0, 1]))


def test_the_prompt_stays_what_it_is() -> None:
    words = wording()
    words.text = "red"
    words.tried(SAID, EXAMPLES)
    assert (words.text, words.tuned.text) == ("red", "red")


def test_a_prompt_that_does_not_fit_earns_nothing_and_breaks_nothing() -> None:
    words = wording("masked")
    limit = words.tuned.backbone.max_positions
    assert limit is not None
    found = words.tried(["very " * limit, "it was"], EXAMPLES)
    assert bool((found.reward[0] == -torch.inf).all())
    assert float(found.score[0].sum()) == 0
    assert bool(found.reward[1].isfinite().all())


def test_it_can_be_stopped_between_batches() -> None:
    words, seen = wording(batch_size=2), []

    def check() -> None:
        seen.append(1)
        if len(seen) == 3:
            raise Interrupted("stop")

    with pytest.raises(Interrupted):
        words.tried(SAID, EXAMPLES, check)
    # what had not come back is asked again
    assert bool(words.tried(SAID, EXAMPLES).reward.isfinite().all())


def test_choices_and_values_and_written_texts_are_graded_too() -> None:
    chosen = Choose(ChooseConfig(template="{text} {prompt} {mask}", choices=("options",), label="right"))
    examples: list[Mapping[str, Any]] = [
        {"text": "red apple", "options": ["good", "bad"], "right": 1},
        {"text": "blue sky", "options": ["old", "new", "big"], "right": 0},
    ]
    found = wording(task=chosen).tried(["it was", "so"], examples)
    assert bool(found.reward.isfinite().all())
    assert set(found.score.flatten().tolist()) <= {0.0, 1.0}

    valued = [{"text": "red apple", "value": 0.0}, {"text": "blue sky", "value": 1.0}]
    config = RegressConfig(template="{text} {prompt} {mask}", label="value", words=("bad", "good"))
    found = wording(task=Regress(config, valued)).tried(["it was"], valued)
    assert bool((found.score <= 0).all())
    torch.testing.assert_close(found.reward, found.score)

    written = [{"text": "red apple", "target": "good"}]
    made = wording(task=Generate(GenerateConfig(template="{text} {prompt}", max_new_tokens=3)))
    answer = made.tuned.saying("it was").predict(written)[0].answer
    assert float(made.tried(["it was"], [{**written[0], "target": answer or "x"}]).score[0, 0]) == float(bool(answer))
    assert float(made.tried(["it was"], [{**written[0], "target": "cold cold cold"}]).score[0, 0]) == 0.0


def test_texts_that_prompts_stand_behind_are_run_once_on_causal_models() -> None:
    words, ran = wording("causal", batch_size=64), [0]
    body = words.tuned.backbone.model.base_model
    forward = body.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        ids = kwargs["input_ids"]
        ran[0] += ids.numel()
        return forward(*args, **kwargs)

    body.forward = counting
    words.tried(["it was", "so good"], EXAMPLES)
    ran[0] = 0
    words.tried(["very cold", "quite big", "one two"], EXAMPLES)
    body.forward = forward
    # three prompts of two tokens behind each of four texts; the texts themselves are kept
    assert ran[0] == 3 * 4 * 2


def test_only_words_of_one_task_are_looked_for(tmp_path: Path) -> None:
    soft = case_of(__import__("promptuary").registry.load("methods", "prompt_tuning"), "causal", tmp_path).tuned()
    assert Wording.of(soft, None) is None
    with pytest.raises(ConfigError, match="one task"):
        Wording.of(wording().tuned, None)


def test_random_words_are_tokens_of_the_model() -> None:
    words = wording()
    generator = torch.Generator().manual_seed(0)
    text = words._drawn(3, generator)
    assert len(words.tuned.backbone.text.plain_ids(text)) == 3
    assert text != words._drawn(3, generator)
