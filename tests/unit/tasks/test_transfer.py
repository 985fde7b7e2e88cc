"""Style transfer: where an answer ends, what it is worth, and what is measured, by hand and with scripted judges.

Knows no backbone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from promptuary.errors import ConfigError, DataError
from promptuary.metrics import METRICS, compute
from promptuary.tasks.transfer import Transfer, TransferConfig, matched_f1
from promptuary.types import Prediction

ENCODER, STYLE, HELD, FLUENT = "encoder", "style", "held", "fluent"


def task(**settings: Any) -> Transfer:
    plain = {"content": ENCODER, "style": STYLE, "style_label": "happy"}
    return Transfer(TransferConfig.read({**plain, **settings}, where="task"))


class Scripted:
    """A word is one of three axes, by its first letter; a classifier looks for a letter; it notes what it was asked."""

    def __init__(self) -> None:
        self.asked = list[tuple[str, list[str]]]()

    def states(self, model: str, texts: Sequence[str]) -> list[Tensor]:
        self.asked.append((model, list(texts)))
        return [torch.eye(3)[[ord(word[0]) % 3 for word in text.split()]] for text in texts]

    def labels(self, folder: str) -> Sequence[str]:
        return {STYLE: ["happy", "sad"], HELD: ["happy", "sad"], FLUENT: ["acceptable", "broken"]}[folder]

    def probabilities(self, folder: str, texts: Sequence[str]) -> list[Mapping[str, float]]:
        self.asked.append((folder, list(texts)))
        first, second = self.labels(folder)
        letter = {STYLE: "h", HELD: "p", FLUENT: "."}[folder]
        return [{first: p, second: 1 - p} for p in (0.75 if letter in text else 0.25 for text in texts)]


# ---- what is asked, and where an answer ends ------------------------------------------------------------------------


def test_the_sentence_stands_in_quotes_behind_the_prompt_and_another_one_is_open() -> None:
    made = task()
    assert made.template.text == '{prompt} "{text}" "'
    assert made.reading == "text"
    assert made.template.fields == ["text"]
    assert made.gold({"text": " so it is . "}) == made.source({"text": "so it is ."}) == "so it is ."
    assert Transfer.required(made.settings) == ("text",)
    assert made.fill({"text": "x"}, labelled=True).answer is None
    assert made.settled() == made.config


def test_the_source_is_the_first_field_that_the_template_shows() -> None:
    made = task(template='{prompt} "{line}" in {year} "', fields=("line",))
    assert made.source({"year": 1600, "line": "thou art"}) == "thou art"
    with pytest.raises(DataError, match="line is missing or blank"):
        made.source({"year": 1600, "line": " "})


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('it is good . very" "and more .', "it is good ."),
        ("it is good! yes.", "it is good!"),
        ("is it? yes", "is it?"),
        ('no end here" but a quote.', "no end here"),
        ("no end at all ", "no end at all"),
        (' " nothing', ""),
        ("", ""),
        ("two\nlines . x", "two\nlines ."),
        ('a "b.', "a"),
        ("Such A Thing.", "Such A Thing."),
    ],
)
def test_an_answer_ends_at_the_first_quote_and_then_behind_the_first_end_of_a_sentence(text: str, kept: str) -> None:
    assert task().decode_text(text).answer == kept


def test_answers_may_be_in_lower_case() -> None:
    assert task(lower=True).decode_text("Such A Thing.").answer == "such a thing."


@pytest.mark.parametrize(("tokens", "most"), [(1, 11), (10, 20), (20, 30), (21, 31), (30, 45), (31, 46)])
def test_an_answer_is_at_most_half_as_long_again_or_ten_tokens_longer(tokens: int, most: int) -> None:
    assert task().longest(tokens) == most == max(int(1.5 * tokens), tokens + 10)


def test_nothing_of_a_gradient_or_of_scores_is_there() -> None:
    with pytest.raises(DataError, match="no loss"):
        task().loss(torch.zeros(1), None)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="decoded from its text"):
        task().decode([0.0], {})


# ---- what an answer is worth ----------------------------------------------------------------------------------------


def slow_f1(candidate: Tensor, reference: Tensor) -> float:
    def cosine(one: Tensor, other: Tensor) -> float:
        return float(one @ other) / (float(one @ one) ** 0.5 * float(other @ other) ** 0.5)

    precision = sum(max(cosine(one, other) for other in reference) for one in candidate) / len(candidate)
    recall = sum(max(cosine(one, other) for one in candidate) for other in reference) / len(reference)
    return 2 * precision * recall / (precision + recall)


def test_content_is_a_greedy_matching_of_tokens_by_hand_and_by_a_loop() -> None:
    x, y, z = torch.eye(3)
    # precision (1 + 0) / 2, recall 1: F1 = 2/3
    assert matched_f1(torch.stack([x, y]), x[None]) == pytest.approx(2 / 3)
    assert matched_f1(torch.stack([x, y]), torch.stack([3 * y, 0.1 * x])) == pytest.approx(1)
    assert matched_f1(x[None], z[None]) == 0
    assert matched_f1(x[None], -x[None]) == 0
    generator = torch.Generator().manual_seed(0)
    for n, m in ((1, 1), (3, 5), (7, 2)):
        one, other = torch.rand(n, 8, generator=generator), torch.rand(m, 8, generator=generator)
        assert matched_f1(one, other) == pytest.approx(slow_f1(one, other), abs=1e-6)
        assert matched_f1(one, other) == pytest.approx(matched_f1(other, one), abs=1e-6)
        assert matched_f1(one, other, 0.5) == pytest.approx(2 * slow_f1(one, other) - 1, abs=1e-6)


def test_a_text_without_tokens_matches_nothing() -> None:
    assert matched_f1(torch.zeros(0, 3), torch.eye(3)) == matched_f1(torch.eye(3), torch.zeros(0, 3)) == 0


def test_a_reward_is_the_mean_of_content_and_style() -> None:
    judges = Scripted()
    # letters: c and f are axis 0 of 3, h is 2, d is 1
    found = task().rewards(judges, "cat dog", ["cat dog", "hat hat", "fun", "cat dog", ""])
    assert [one["content"] for one in found] == pytest.approx([100, 0, 200 / 3, 100, 0])
    assert [one["wanted"] for one in found] == pytest.approx([25, 75, 25, 25, 0])
    assert [one["reward"] for one in found] == pytest.approx([62.5, 37.5, (200 / 3 + 25) / 2, 62.5, 0])
    # each text is judged once, an empty one never
    assert judges.asked == [(ENCODER, ["cat dog", "cat dog", "hat hat", "fun"]), (STYLE, ["cat dog", "hat hat", "fun"])]


def test_content_below_the_baseline_counts_nothing() -> None:
    (low,) = task(content_baseline=0.9).rewards(Scripted(), "cat dog", ["fun"])
    assert low["content"] == 0
    (some,) = task(content_baseline=0.5).rewards(Scripted(), "cat dog", ["fun"])
    assert some["content"] == pytest.approx(100 / 3)


def test_only_empty_answers_ask_nobody() -> None:
    judges = Scripted()
    assert [one["reward"] for one in task().rewards(judges, "cat", ["", ""])] == [0, 0]
    assert task(held_out=HELD).measured_by(judges, [""]) == [{"style": 0.0}]
    assert judges.asked == []


def test_held_out_judges_say_whether_the_likeliest_label_is_the_asked_one() -> None:
    made = task(held_out=HELD, fluency=FLUENT)
    assert made.measured_by(Scripted(), ["pear .", "cat", "sun."]) == [
        {"style": 1.0, "fluency": 1.0}, {"style": 0.0, "fluency": 0.0}, {"style": 0.0, "fluency": 1.0},
    ]  # fmt: skip
    assert task().measured_by(Scripted(), ["pear ."]) == [{}]


# ---- what is measured -----------------------------------------------------------------------------------------------

JUDGED = [
    {"reward": 10.0, "content": 80.0, "style": 1.0, "fluency": 1.0},
    {"reward": 20.0, "content": 60.0, "style": 1.0, "fluency": 0.0},
    {"reward": 60.0, "content": 90.0, "style": 0.0, "fluency": 1.0},
]


def test_metrics_by_hand() -> None:
    names = ["content", "style", "fluency", "joint", "geometric_mean", "reward"]
    found = compute(names, ["x"] * 3, JUDGED)
    assert found == pytest.approx(
        {
            "content": 76.6667,
            "style": 66.6667,
            "fluency": 66.6667,
            "joint": 26.667,
            "geometric_mean": 69.846,
            "reward": 30,
        },
        abs=1e-3,
    )
    assert all(METRICS[name].kind == "judged" and METRICS[name].higher_is_better for name in names)


def test_without_fluency_they_are_of_content_and_style() -> None:
    rest = [{name: value for name, value in one.items() if name != "fluency"} for one in JUDGED]
    found = compute(["joint", "geometric_mean"], ["x"] * 3, rest)
    assert found["joint"] == pytest.approx((80 + 60 + 0) / 3)
    assert found["geometric_mean"] == pytest.approx((230 / 3 * 200 / 3) ** 0.5)


def test_metrics_compare_judgements() -> None:
    assert task().measured(Prediction("x", JUDGED[0])) == JUDGED[0]


@pytest.mark.parametrize(
    ("settings", "metrics", "note"),
    [
        ({}, ("reward", "content"), "task.held_out is not set"),
        ({"held_out": HELD}, ("reward", "content", "style", "joint", "geometric_mean"), "task.fluency is not set"),
        ({"fluency": FLUENT}, ("reward", "content", "fluency"), "task.held_out is not set"),
        (
            {"held_out": HELD, "fluency": FLUENT},
            ("reward", "content", "style", "joint", "geometric_mean", "fluency"),
            None,
        ),
        ({"metrics": ("joint", "style"), "held_out": HELD}, ("joint", "style"), "task.fluency is not set"),
    ],
)
def test_what_is_measured_is_what_there_are_judges_for(
    settings: dict[str, Any], metrics: tuple[str, ...], note: str | None
) -> None:
    made = task(**settings)
    assert made.metrics == metrics
    assert [one for one in made.notes if note is not None and one.startswith(note)] == made.notes
    assert bool(made.notes) == (note is not None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrics": ("style",)}, "task.metrics: style needs a judge; set task.held_out to a saved classifier"),
        ({"metrics": ("joint",)}, "task.metrics: joint needs a judge; set task.held_out"),
        ({"metrics": ("fluency",)}, "task.metrics: fluency needs a judge; set task.fluency"),
        ({"metrics": ("exact_match",)}, "exact_match cannot compare the answers of transfer; use reward, content"),
        ({"template": "{prompt}"}, "shows no field"),
        ({"content_baseline": 1.0}, "content_baseline"),
        ({"samples": 0}, "samples"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        task(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"style_label": "hapy"},
            'task.style_label: the classifier in style has no label "hapy"; did you mean "happy"',
        ),
        (
            {"fluency": FLUENT, "fluency_label": "good"},
            r'task.fluency_label: the classifier in fluent has no label "good" \(its labels: acceptable, broken\)',
        ),
    ],
)
def test_a_judge_that_does_not_know_the_label(settings: dict[str, Any], message: str) -> None:
    task().ready(Scripted())
    with pytest.raises(ConfigError, match=message):
        task(**settings).ready(Scripted())
