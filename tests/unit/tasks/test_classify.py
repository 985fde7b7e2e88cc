"""Classification: labels and label words from every source, loss and answers by formula.

Knows no backbone.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from promptuary.errors import ConfigError, DataError
from promptuary.tasks.classify import Classify, ClassifyConfig, best, softmax, spoken
from promptuary.types import Batch

EXAMPLES = [{"text": "x", "label": label} for label in ("wrong_item", "ok", "b-c", "ok")]


def task(examples: list[dict[str, Any]] | None = None, **settings: Any) -> Classify:
    return Classify(ClassifyConfig.read(settings, where="task"), EXAMPLES if examples is None else examples)


def batch(*target: int) -> Batch:
    ones = torch.ones(len(target), 1, dtype=torch.long)
    return Batch(ones, ones, torch.arange(len(target)), target=torch.tensor(target))


def test_a_verbaliser_gives_each_label_its_words() -> None:
    made = task(labels={"n": "not so good", "p": "great"})
    assert (made.labels, made.words, made.outputs) == (("n", "p"), ("not so good", "great"), 2)


def test_listed_labels_keep_their_order_and_are_spoken() -> None:
    made = task(labels=["z_a", "b"])
    assert (made.labels, made.words) == (("z_a", "b"), ("z a", "b"))


def test_without_labels_the_data_names_them_in_sorted_order() -> None:
    made = task()
    assert made.labels == ("b-c", "ok", "wrong_item")
    assert made.words == ("b c", "ok", "wrong item")
    assert task([{"label": 1}, {"label": 0}]).labels == ("0", "1")


def test_settled_settings_need_no_data() -> None:
    for made in (task(), task(labels=["z_a", "b"]), task(labels={"n": "bad", "p": "great"}, reading="head")):
        again = Classify(made.settled())
        assert (again.labels, again.words, again.reading, again.outputs) == (
            made.labels,
            made.words,
            made.reading,
            made.outputs,
        )


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"labels": ["one"]}, "at least two labels"),
        ({"labels": {"a": "same", "b": "same"}}, "same label words"),
        ({"labels": ["a_b", "a-b"]}, "same label words"),
        ({"metrics": ["acuracy"]}, 'did you mean "accuracy"'),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        task(**settings)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_single_label_in_the_data_is_refused() -> None:
    with pytest.raises(ConfigError, match="found 1"):
        task([{"label": "a"}, {"label": "a"}])


def test_the_target_is_the_place_of_the_label() -> None:
    made = task()
    assert [made.fill(example, labelled=True).target for example in EXAMPLES] == [2, 1, 0, 1]
    assert made.fill({"text": "x"}, labelled=False).target is None
    assert task(labels={"0": "bad", "1": "good"}).gold({"label": 1}) == "1"


def test_an_unknown_label_is_named_with_the_nearest_and_all_known() -> None:
    with pytest.raises(DataError, match='unknown label "wrong_itm"; did you mean "wrong_item"') as caught:
        task().fill({"text": "x", "label": "wrong_itm"}, labelled=True)
    assert "b-c, ok, wrong_item" in str(caught.value)


def test_the_loss_is_the_summed_cross_entropy_and_least_at_the_right_label() -> None:
    made, scores = task(), torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 3.0]])
    by_hand = -math.log(math.exp(2) / (math.e + math.exp(2) + math.exp(0.5))) - math.log(1 / (2 + math.exp(3)))
    assert made.loss(scores, batch(1, 0)).item() == pytest.approx(by_hand, rel=1e-6)
    assert made.loss(scores, batch(1, 2)) < made.loss(scores, batch(1, 0))


def test_the_loss_is_taken_in_float32() -> None:
    scores = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(task().loss(scores, batch(0, 1, 2, 0)), task().loss(scores.float(), batch(0, 1, 2, 0)))


def test_the_best_score_decides_and_scores_are_probabilities() -> None:
    found = task().decode([0.0, 2.0, 1.0], {})
    assert found.answer == "ok"
    assert list(found.scores) == ["b-c", "ok", "wrong_item"]
    assert sum(found.scores.values()) == pytest.approx(1)
    assert found.scores["ok"] == pytest.approx(math.exp(2) / (1 + math.e + math.exp(2)))


def test_softmax_of_extreme_scores_is_finite() -> None:
    assert softmax([1e4, 0.0, -math.inf]) == [1.0, 0.0, 0.0]
    assert softmax([-1e4, -1e4]) == [0.5, 0.5]
    assert best([1.0, 3.0, 3.0]) == 1


def test_a_label_that_is_only_signs_keeps_them() -> None:
    assert (spoken("a_b-c"), spoken("_"), spoken("-1")) == ("a b c", "_", "1")


def test_required_fields_are_those_of_the_template_and_the_label() -> None:
    config = ClassifyConfig(template="{b} {a} {b} {mask}", label="y")
    assert Classify.required(config) == ("b", "a", "y")
    assert Classify.required(ClassifyConfig(fields=("a", "label"))) == ("a", "label")
