"""Robustness: the scores are those of the perturbed examples with their own labels, whatever their order.

Knows no rule of a perturbation.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import promptuary
import tiny
import toy
from promptuary import metrics, registry
from promptuary.building import build_method
from promptuary.config import load_run
from promptuary.errors import ConfigError, DataError, Interrupted
from promptuary.evaluation import evaluate
from promptuary.perturbing.kinds import KINDS
from promptuary.perturbing.perturb import perturbed
from promptuary.report import bars, page
from promptuary.robust import Robustness, robustness
from promptuary.speakers.base import Message
from promptuary.tuned import Tuned

EXAMPLES = toy.rows(13, seed=3)


def tuned(where: Path, task: str = "classify_words", family: str = "causal", **changes: Any) -> Tuned:
    """Prompt tuning at its start, which answers differently for different texts."""
    values = toy.settings(where, family, task)
    values["task"].update(changes)
    run = load_run(values)
    backbone = tiny.backbone(family)
    made = registry.load("tasks", run.task.name)(run.task, EXAMPLES)
    return Tuned(backbone, made, build_method(run.method, backbone.shape)).initialise(torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("clean", "after", "drop"), [(0.8, 0.6, 0.25), (0.5, 0.5, 0), (0.5, 0.6, -0.2), (0, 0, 0), (0, 0.1, 0)]
)
def test_the_drop_rate_by_hand(clean: float, after: float, drop: float) -> None:
    assert metrics.drop_rate(clean, after) == pytest.approx(drop)


def test_the_drop_rate_of_errors_and_of_scores_below_zero_is_above_zero_where_they_get_worse() -> None:
    assert metrics.drop_rate(2.0, 3.0, higher_is_better=False) == pytest.approx(0.5)
    assert metrics.drop_rate(-0.2, -0.3) == pytest.approx(0.5)
    assert metrics.drop_rate(0.0, -0.3) == math.inf
    assert metrics.drop_rate(0.0, 1.0, higher_is_better=False) == math.inf
    assert metrics.drop_rate(0.0, 0.0, higher_is_better=False) == 0


@pytest.mark.parametrize("task", toy.TASKS)
def test_scores_are_those_of_the_perturbed_examples_in_every_task(task: str, tmp_path: Path) -> None:
    made = tuned(tmp_path, task)
    found = robustness(made, EXAMPLES, "C1,S1,S3", seed=5)
    assert found.clean == evaluate(made, EXAMPLES)
    for one in found.under:
        plain = [{**example, "text": perturbed(example["text"], one.kind, seed=5).text} for example in EXAMPLES]
        assert list(one.examples) == plain
        alone = evaluate(made, plain)
        assert one.evaluation.scores == pytest.approx(alone.scores, abs=1e-5)
        assert one.evaluation.gold == alone.gold == found.clean.gold
        assert [place.index for place in one.changed] == [
            index for index, example in enumerate(EXAMPLES) if example["text"] != plain[index]["text"]
        ]
        assert len(one.changed) > 6
        metric = made.task.metrics[0]
        higher = metrics.METRICS[metric].higher_is_better
        clean = found.clean.scores[metric]
        assert one.drop == metrics.drop_rate(clean, one.evaluation.scores[metric], higher_is_better=higher)
        has = metric in ("accuracy", "exact_match")
        assert (one.evaluation.interval is not None) == (one.lost is not None) == has
    assert json.loads(json.dumps(found.summary()))["perturbed"].keys() == {"C1", "S1", "S3"}


def test_some_answers_change_under_perturbations_and_the_interval_of_the_loss_covers_it(tmp_path: Path) -> None:
    found = robustness(tuned(tmp_path), EXAMPLES)
    assert [one.kind for one in found.under] == list(KINDS.values())
    clean = found.clean.scores["accuracy"]
    assert len({one.evaluation.scores["accuracy"] for one in found.under}) > 1
    for one in found.under:
        assert one.lost is not None
        assert one.lost[0] <= clean - one.evaluation.scores["accuracy"] <= one.lost[1]
    scores = [one.evaluation.scores["accuracy"] for one in found.under]
    assert found.mean == pytest.approx(sum(scores) / 9)
    assert found.worst.evaluation.scores["accuracy"] == min(scores)
    assert found.worst is found.under[scores.index(min(scores))]
    assert found.mean_drop == pytest.approx(1 - sum(scores) / 9 / clean)


def test_the_order_of_the_examples_changes_nothing(tmp_path: Path) -> None:
    made = tuned(tmp_path)
    places = list(range(len(EXAMPLES)))
    random.Random(0).shuffle(places)
    found, other = robustness(made, EXAMPLES), robustness(made, [EXAMPLES[place] for place in places], batch_size=3)
    for one, moved in zip(found.under, other.under, strict=True):
        assert [one.examples[place] for place in places] == list(moved.examples)
        assert one.evaluation.scores == pytest.approx(moved.evaluation.scores)
        assert one.closeness == pytest.approx(moved.closeness)


def test_the_same_seed_gives_the_same_and_another_one_something_else(tmp_path: Path) -> None:
    made = tuned(tmp_path)
    first = robustness(made, EXAMPLES, "C2,W3", seed=1)
    assert first == robustness(made, EXAMPLES, "W3,C2", seed=1)
    assert first.under[0].examples == robustness(made, EXAMPLES, "C2", seed=1).under[0].examples
    assert first.under[0].examples != robustness(made, EXAMPLES, "C2", seed=2).under[0].examples


def test_a_prompt_that_does_not_look_at_the_text_scores_the_same(tmp_path: Path) -> None:
    made = tuned(tmp_path, "classify_head")
    assert made.head is not None
    with torch.no_grad():
        made.head.weight.zero_()
        made.head.bias.copy_(torch.tensor([1.0, 0.0]))
    found = robustness(made, EXAMPLES)
    for one in found.under:
        assert one.evaluation.scores == found.clean.scores
        assert (one.drop, one.lost) == (0, (0, 0))
    assert found.worst.kind.id == "C1"


def test_labels_choices_and_fields_that_are_not_shown_stay(tmp_path: Path) -> None:
    made = tuned(tmp_path, "choose", template="{text} or {other} it was {mask}")
    examples = [{**example, "id": place, "other": "a " + example["text"]} for place, example in enumerate(EXAMPLES)]
    (under,) = robustness(made, examples, "C2").under
    for before, after in zip(examples, under.examples, strict=True):
        assert {**after, "text": "", "other": ""} == {**before, "text": "", "other": ""}
        assert after["text"] != before["text"]
        assert after["other"] != before["other"]
    assert set(under.changed[0].texts) == {"text", "other"}


def test_only_what_changed_is_answered_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tuned(tmp_path)
    clean = evaluate(made, EXAMPLES)
    counts: list[int] = []
    answer = Tuned.answer

    def counted(self: Tuned, rows: Sequence[Any], *given: Any, **more: Any) -> Any:
        counts.append(len(rows))
        return answer(self, rows, *given, **more)

    monkeypatch.setattr(Tuned, "answer", counted)
    found = robustness(made, EXAMPLES, "W1,W2,S1", clean=clean)
    assert counts == [len(one.changed) for one in found.under if one.changed]
    assert [len(one.changed) for one in found.under[1:]] == [0, 13]
    assert found.under[1].closeness is None
    assert found.under[1].evaluation.predictions == clean.predictions


def test_an_attacker_and_a_measure_of_meaning_are_used(tmp_path: Path) -> None:
    class Attacker:
        name = "shouter"

        def generate(self, messages: Sequence[Message], **settings: Any) -> list[str]:
            return [messages[-1]["content"].split("\n")[-2].upper()]

    made = tuned(tmp_path)
    found = robustness(made, EXAMPLES, "S2", attacker=Attacker(), similarity=lambda one, other: one.upper() == other)
    assert [one["text"] for one in found.under[0].examples] == [one["text"].upper() for one in EXAMPLES]
    assert found.by == found.summary()["by"] == "shouter"
    refused = robustness(made, EXAMPLES, "S2", attacker=Attacker(), similarity=lambda one, other: 0.5)
    assert refused.under[0].changed == ()


def test_it_can_be_stopped_between_batches_and_tells_what_is_done(tmp_path: Path) -> None:
    calls, done = list[int](), list[str]()

    def check() -> None:
        calls.append(1)
        if len(calls) == 12:
            raise Interrupted("stopped")

    def told(one: Any, so_far: Robustness) -> None:
        assert so_far.under[-1] is one
        done.append(one.kind.id)

    with pytest.raises(Interrupted):
        robustness(tuned(tmp_path), EXAMPLES, batch_size=4, check=check, told=told)
    assert (len(calls), done) == (12, ["C1"])


def test_what_is_wrong_is_told_in_a_line(tmp_path: Path) -> None:
    made = tuned(tmp_path)
    with pytest.raises(ConfigError, match='no such perturbation: "C9"; did you mean "C'):
        robustness(made, EXAMPLES, "C9")
    with pytest.raises(ConfigError, match="there is no perturbation to try"):
        robustness(made, EXAMPLES, ())
    with pytest.raises(DataError, match="there are no examples"):
        robustness(made, [])
    assert promptuary.robustness is robustness


def test_bars_stand_where_the_scores_are(tmp_path: Path) -> None:
    found = robustness(tuned(tmp_path), EXAMPLES)
    made = bars.bars(found, len(EXAMPLES), page.NAMES, page.SHARES)
    assert [line.name for line in made.lines] == ["clean", *(f"{one.kind.id} {one.kind.title}" for one in found.under)]
    scores = [found.clean.scores["accuracy"], *(one.evaluation.scores["accuracy"] for one in found.under)]
    for line, score in zip(made.lines, scores, strict=True):
        assert line.width == pytest.approx(score * (made.right - made.left), abs=0.01)
        assert line.whisker is not None
        assert line.whisker[0] <= line.x + line.width + 0.01
        assert f"{100 * score:.1f} %" in line.title
    assert "worst" not in [line.look for line in made.lines]  # nothing is lost here
    low = replace(found.under[3], drop=0.9, evaluation=replace(found.clean, scores={"accuracy": 0.01}))
    lower = bars.bars(replace(found, under=(*found.under[:3], low)), len(EXAMPLES), page.NAMES, page.SHARES)
    assert [line.look for line in lower.lines] == ["fill", "under", "under", "under", "worst"]
    assert lower.worst == "W1, synonyms: 1.0 % (90.0 % lost)"
    assert made.ticks[0].shown == "0.0 %"
    assert made.ticks[-1].shown == "100.0 %"
    shown = {pair.name[:2]: pair for pair in made.pairs}
    assert shown["S1"].perturbed.startswith(shown["S1"].clean + " @")
    assert (shown["W2"].clean, shown["W2"].changed) == ("", "0 of 13")


def test_bars_of_values_have_an_axis_of_their_own_and_no_whiskers(tmp_path: Path) -> None:
    found = robustness(tuned(tmp_path, "regress_words"), EXAMPLES, "C1,S1")
    made = bars.bars(found, len(EXAMPLES), page.NAMES, page.SHARES)
    assert not made.whiskers
    assert all(line.whisker is None for line in made.lines)
    assert all(made.left <= line.x <= line.x + line.width <= made.right for line in made.lines)
    strange = replace(found.clean, scores={**found.clean.scores, "pearson": math.nan})
    bars.bars(replace(found, clean=strange), len(EXAMPLES), page.NAMES, page.SHARES)
