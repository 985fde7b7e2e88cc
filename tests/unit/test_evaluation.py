"""Evaluation: the scores are those of the answers, in the order of the examples, whatever the batches.

Knows no training.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
import toy
from promptuary import registry
from promptuary.building import build_method
from promptuary.config import load_run
from promptuary.errors import DataError, Interrupted
from promptuary.evaluation import evaluate
from promptuary.methods.prompt_tuning import PromptTuning
from promptuary.testing import case_of
from promptuary.tuned import Tuned

EXAMPLES = toy.rows(13, seed=3)


def tuned(where: Path, task: str = "classify_words", family: str = "causal") -> Tuned:
    """Prompt tuning at its start, which answers differently for different texts."""
    run = load_run(toy.settings(where, family, task))
    backbone = tiny.backbone(family)
    made = registry.load("tasks", run.task.name)(run.task, EXAMPLES)
    return Tuned(backbone, made, build_method(run.method, backbone.shape)).initialise(torch.Generator().manual_seed(1))


def test_classification_scores_are_the_metrics_by_hand(tmp_path: Path) -> None:
    made = tuned(tmp_path)
    found = evaluate(made, EXAMPLES)
    gold = [example["label"] for example in EXAMPLES]
    answers = [prediction.answer for prediction in made.predict(EXAMPLES)]
    right = [g == a for g, a in zip(gold, answers, strict=True)]
    f1 = []
    for label in ("positive", "negative"):
        both = sum(g == a == label for g, a in zip(gold, answers, strict=True))
        f1.append(2 * both / (gold.count(label) + answers.count(label)))
    assert found.scores == {"accuracy": pytest.approx(sum(right) / 13), "macro_f1": pytest.approx(sum(f1) / 2)}
    assert 0 < sum(right) < 13
    assert found.gold == gold
    assert found.interval is not None
    assert found.interval[0] <= found.scores["accuracy"] <= found.interval[1]


def test_values_are_scored_on_the_scale_of_the_data(tmp_path: Path) -> None:
    made = tuned(tmp_path, "regress_words")
    found = evaluate(made, EXAMPLES)
    gold = np.array([example["value"] for example in EXAMPLES])
    answers = np.array([prediction.answer for prediction in found.predictions])
    assert found.scores["mean_squared_error"] == pytest.approx(np.mean((gold - answers) ** 2))
    assert found.scores["pearson"] == pytest.approx(np.corrcoef(gold, answers)[0, 1], abs=1e-9)
    assert found.interval is None


def test_written_texts_are_scored_as_texts(tmp_path: Path) -> None:
    made = tuned(tmp_path, "generate")
    answers = [prediction.answer for prediction in made.predict(EXAMPLES)]
    assert len(set(answers)) > 1
    swapped = [{**example, "target": answer or "nothing"} for example, answer in zip(EXAMPLES, answers, strict=True)]
    assert evaluate(made, swapped).scores["exact_match"] == pytest.approx(sum(map(bool, answers)) / 13)
    assert evaluate(made, EXAMPLES).scores["exact_match"] < 0.5


@pytest.mark.parametrize("task", toy.TASKS)
def test_answers_keep_the_order_of_the_examples_whatever_the_batch_size(task: str, tmp_path: Path) -> None:
    made = tuned(tmp_path, task, "seq2seq")
    if made.head is not None:
        torch.nn.init.normal_(made.head.weight, generator=torch.Generator().manual_seed(0))
    alone = [evaluate(made, [example]).predictions[0] for example in EXAMPLES]
    assert len({str(one) for one in alone}) > 1
    for batch_size in (1, 3, 64):
        together = evaluate(made, EXAMPLES, batch_size=batch_size).predictions
        for one, other in zip(alone, together, strict=True):
            same = pytest.approx(one.answer, abs=1e-4) if isinstance(one.answer, float) else one.answer
            assert other.answer == same
            assert other.scores == pytest.approx(one.scores, abs=1e-4)


def test_rows_that_are_encoded_already_give_the_same(tmp_path: Path) -> None:
    made = tuned(tmp_path)
    rows = made.rows(EXAMPLES, labelled=True)
    assert evaluate(made, EXAMPLES, rows=rows) == evaluate(made, EXAMPLES)


def test_one_row_per_example_for_the_file(tmp_path: Path) -> None:
    found = evaluate(tuned(tmp_path), EXAMPLES[:3])
    rows = found.rows()
    assert [row["index"] for row in rows] == [0, 1, 2]
    assert [row["gold"] for row in rows] == ["positive", "negative", "positive"]
    for row, prediction in zip(rows, found.predictions, strict=True):
        assert row["answer"] == prediction.answer == max(row["scores"], key=row["scores"].get)


def test_no_interval_is_drawn_where_none_is_asked_for(tmp_path: Path) -> None:
    assert evaluate(tuned(tmp_path), EXAMPLES, interval=False).interval is None


def test_no_examples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no examples"):
        evaluate(tuned(tmp_path), [])


def test_a_wrong_row_is_named(tmp_path: Path) -> None:
    wrong = [*EXAMPLES[:2], {**EXAMPLES[2], "label": "positve"}]
    with pytest.raises(DataError, match='example 3: unknown label "positve"; did you mean "positive"'):
        evaluate(tuned(tmp_path), wrong)
    with pytest.raises(DataError, match="example 2: .*no field"):
        evaluate(tuned(tmp_path), [EXAMPLES[0], {"label": "positive"}])


def test_it_can_be_stopped_between_batches(tmp_path: Path) -> None:
    calls: list[int] = []

    def check() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        evaluate(tuned(tmp_path), EXAMPLES, batch_size=2, check=check)
    assert len(calls) == 3


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_mode_as_it_was(training: bool, tmp_path: Path) -> None:
    made = case_of(PromptTuning, "masked", tmp_path).tuned().train(training)
    made.predict(["a red apple"])
    assert made.training is training
    assert (made._folded is None) is training
