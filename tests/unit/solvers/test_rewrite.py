"""Rewriting: the attack, alignment, elitism, a planted answer, the ledger, budgets and exact resuming.

Knows no method and no model: the victim is a function, and every role follows a script.
"""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from promptuary.errors import ConfigError, SpeakerError
from promptuary.perturbing.kinds import KINDS
from promptuary.solvers.base import StepResult
from promptuary.solvers.rewrite import RewriteConfig, RewriteSolver
from promptuary.speakers.base import Message, SpeakerConfig
from promptuary.speakers.budget import Ledger
from promptuary.speakers.cache import Cache
from promptuary.speakers.scripted import Scripted
from talking import BEWARE, CLEAN, ROLES, START, Script, Wordy, cast, fragile, victim  # fmt: skip


def search(words: Wordy, speakers: Mapping[str, Script], **settings: Any) -> RewriteSolver:
    config = RewriteConfig.model_validate({"perturbations": ("C1",), "selection": 4, "sample_num": 3, **settings})
    return RewriteSolver(words, config, speakers, seed=5)  # type: ignore[arg-type]


def go(solver: RewriteSolver, rounds: int = 1) -> list[StepResult]:
    return [solver.step(None, [], 0.0) for _ in range(rounds)]  # type: ignore[arg-type]


def test_the_strategist_words_the_attack_of_c1_alone() -> None:
    words, speakers = Wordy(fragile), cast()
    go(search(words, speakers, strategist=True, perturbations=("C1", "C2")))
    assert speakers["strategist"].calls == 3
    worded = ["Misspell the longest word." in question for question in speakers["attacker"].questions]
    assert sum(worded) == 9
    assert all(
        KINDS["C2"].instruction in one
        for one, own in zip(speakers["attacker"].questions, worded, strict=True)
        if not own
    )


def test_an_attack_that_cannot_get_worse_may_end() -> None:
    counts = []
    for stop in (False, True):
        speakers = cast()
        go(search(Wordy(fragile), speakers, stop_at_zero=stop))
        counts.append(speakers["attacker"].calls)
    # score 0 after the first of three repeats
    assert counts == [9, 3]


def test_what_is_attacked_is_not_what_prompts_are_compared_on() -> None:
    solver = search(Wordy(victim), cast(), sample_num=5, selection=20)
    now = solver._begin(None)
    assert len(now.attacked) == 5
    assert len(now.places) == 7
    assert not set(now.attacked) & set(now.places)


# ---- the whole loop -------------------------------------------------------------------------------------------------


def test_a_planted_warning_is_found_and_only_because_of_the_attack() -> None:
    words = Wordy(victim)
    solver = search(words, cast())
    assert solver.words.text == START
    steps = go(solver, 2)
    assert words.text == f"{START} {BEWARE}"
    assert steps[0].parts["accepted"] == 1
    assert steps[0].parts["harmful"] == 3
    assert steps[0].loss == -1.0
    assert [entry["from"] for entry in solver.history] == ["start", "rewrite"]
    found = solver.history[1]
    assert found["why"] == "typos"
    assert found["instead_of"] == START
    assert found["selection"]["total"] > found["selection_before"]["total"]
    assert found["held_out"]["total"] == 1.0 > solver.history[0]["held_out"]["total"]
    disabled = Wordy(victim)
    blind = search(disabled, cast(), iter=0)
    go(blind, 4)
    assert disabled.text == START
    assert [entry["from"] for entry in blind.history] == ["start"]


def test_the_model_free_mode_finds_it_too() -> None:
    words = Wordy(victim)
    speakers = {role: one for role, one in cast().items() if role in ("rewriter", "paraphraser")}
    solver = search(words, speakers, attacker="rule", explainer="rule", perturbations="mix", sample_num=5)
    go(solver, 2)
    assert BEWARE in words.text
    assert "typos (worse in " in speakers["rewriter"].questions[0]


@pytest.mark.parametrize(
    "answer", ["", "???", "I'm sorry, I cannot do that.", START, "word " * 400, CLEAN[0], "Useless."]
)
def test_a_rewriter_of_no_use_leaves_the_start_as_it_is(answer: str) -> None:
    words = Wordy(victim)
    solver = search(words, cast(rewriter=lambda *_: answer, paraphraser=lambda *_: answer))
    steps = go(solver, 3)
    assert words.text == START
    assert len({step.loss for step in steps}) == 1
    assert len(solver.history) == 1
    assert all(step.parts["accepted"] == 0 for step in steps)


@pytest.mark.parametrize("seed", range(5))
def test_held_out_worth_never_falls_and_the_text_is_always_the_best_one(seed: int) -> None:
    def noisy(prompt: str, example: Mapping[str, Any]) -> float:
        return random.Random(f"{seed}{prompt}{example['text']}").choice([-1.0, 1.0])

    words = Wordy(noisy)
    count = iter(range(1000))
    speakers = cast(
        rewriter=lambda *_: f"Rewrite {next(count)} of it.", paraphraser=lambda *_: f"Say {next(count)} again."
    )
    solver = search(words, speakers, clean_weight=0.5, perturbations="mix")
    steps = go(solver, 5)
    losses = [step.loss for step in steps]
    assert losses == sorted(losses, reverse=True)
    assert sum(step.parts["accepted"] for step in steps) >= 3
    told = [(entry["held_out"]["total"], entry["text"]) for entry in solver.history]
    assert words.text == next(text for worth, text in told if worth == max(worth for worth, _ in told))
    for entry in solver.history[1:]:
        assert entry["selection"]["total"] > entry["selection_before"]["total"]


def test_candidates_and_the_prompt_as_it_is_see_the_same_examples() -> None:
    seen: dict[str, set[str]] = {}

    def spy(prompt: str, example: Mapping[str, Any]) -> float:
        seen.setdefault(prompt, set()).add(example["text"])
        return 1.0

    go(search(Wordy(spy), cast(), selection=6))
    variants = [texts for prompt, texts in seen.items() if prompt != START]
    assert len(variants) == 5 + 2
    assert all(texts == variants[0] for texts in variants)
    assert variants[0] <= seen[START]


def test_the_best_rewrite_is_paraphrased() -> None:
    words, speakers = Wordy(victim), cast(paraphraser=lambda question, place: f"Paraphrase {place}. {BEWARE}")
    go(search(words, speakers, rewrites=4))
    assert speakers["paraphraser"].calls == 1
    assert f"<prompt>{START} {BEWARE}</prompt>" in speakers["paraphraser"].questions[0]
    # as good as the rewrite, so not put in its place
    assert words.text == f"{START} {BEWARE}"


def test_a_role_that_says_nothing_is_counted_and_the_rule_speaks_for_it() -> None:
    for role in ("explainer", "summariser"):
        words, speakers = Wordy(victim), cast(**{role: lambda *_: "  "})
        steps = go(search(words, speakers))
        assert steps[0].parts["unsaid"] == 1
        assert "typos" in speakers["rewriter"].questions[0]


# ---- the ledger and budgets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [("C1",), ("C1", "C2", "C3")])
def test_calls_by_role_are_those_of_the_closed_form(kinds: tuple[str, ...]) -> None:
    words, speakers = Wordy(fragile), cast()
    solver = search(words, speakers, perturbations=kinds, sample_num=5, strategist=True, pool="model", selection=4)
    parts = go(solver)[0].parts
    expected = {
        "attacker": 5 * len(kinds) * 3, "strategist": 5, "explainer": 1, "summariser": 1, "rewriter": 1,
        "paraphraser": 1, "pool": 4 * len(kinds),
    }  # fmt: skip
    assert {role: parts[f"asked/{role}"] for role in expected} == expected
    assert parts["asked"] == sum(expected.values()) == sum(script.calls for script in speakers.values())
    assert parts["answers/attacker"] == 5 * expected["attacker"]
    assert dict(solver.search.asked) == expected
    # the same question is asked in every repeat: only another seed brings other answers
    seeds = [seed for script in speakers.values() for seed in script.seeds]
    assert len(set(seeds)) == len(seeds)
    assert speakers["rewriter"].counts == {5: 1}
    assert speakers["paraphraser"].counts == {2: 1}


def test_what_the_victim_is_asked_is_that_of_the_closed_form() -> None:
    words = Wordy(fragile)
    solver = search(words, cast(), sample_num=5, selection=4)
    parts = go(solver)[0].parts
    changed = sum(record.changed for record in solver._pool(solver._begin(None)))
    judged = sum(solver.attacker.pooled(place, KINDS["C1"], words.held_out, words.fields).changed for place in range(6))
    # clean texts, and the one typo of the first repeat of each attack; 5 + 2 candidates and the prompt as it is
    assert parts["tried"] == judged + 5 + 5 + (1 + 5 + 2) * changed
    assert parts["compared"] == 8


@pytest.mark.parametrize("budget", [0, 1, 5, 9, 10, 11, 12, 13, 20])
def test_a_budget_is_never_exceeded_and_the_best_so_far_stays(budget: int) -> None:
    words, one = Wordy(victim), cast()
    marks = {
        "attacker": "Changed text:", "explainer": "Before:", "summariser": "Differences between",
        "rewriter": "Write a better", "paraphraser": "other words",
    }  # fmt: skip

    def answer(question: str, place: int) -> str:
        role = next(role for role, mark in marks.items() if mark in question)
        return one[role].answer(question, place)

    shared = Script(answer, budget)
    solver = search(words, dict.fromkeys(ROLES, shared))
    steps = go(solver, 3)
    assert shared.calls <= budget
    assert solver.done
    assert sum(step.parts.get("asked", 0) for step in steps) == shared.calls
    assert all(step.applied and math.isfinite(step.loss) for step in steps)
    assert any(step.parts.get("exhausted") for step in steps)
    # the attack takes 9 calls, the explanation 2, the rewriter the next one
    assert words.text == (START if budget < 12 else f"{START} {BEWARE}")
    spent = shared.calls
    assert go(solver)[0].parts == {"held_out": solver.search.worth, "exhausted": 1.0}
    assert shared.calls == spent


def test_a_second_run_with_the_same_cache_asks_nobody_and_a_real_budget_ends_it(tmp_path: Path) -> None:
    scripts = cast()

    def run(calls: int | None, cache: bool = True) -> tuple[RewriteSolver, list[StepResult], Ledger]:
        ledger = Ledger()
        config, kept = SpeakerConfig(model="script", budget_calls=calls), Cache(tmp_path / "answers")

        def answers(role: str) -> Callable[[Sequence[Message]], list[str]]:
            return lambda messages: [scripts[role].answer(messages[-1]["content"], place) for place in range(5)]

        speakers = {
            role: Scripted(
                answers(role),
                account=ledger.account(role, config),
                cache=kept if cache else None,
            )
            for role in ROLES
        }
        solver = search(Wordy(victim), speakers)  # type: ignore[arg-type]
        return solver, go(solver, 2), ledger

    first, steps, paid = run(None)
    assert paid.spent().calls == sum(step.parts["asked"] for step in steps) > 0
    second, again, free = run(None)
    assert free.spent().calls == 0
    assert second.state() == first.state()
    assert [step.parts for step in again] == [step.parts for step in steps]
    spent, steps, few = run(11, cache=False)
    assert few.spent().calls == 11
    assert spent.done
    assert steps[0].parts["exhausted"] == 1
    assert spent.words.text == START


def test_a_model_that_cannot_be_reached_ends_the_step_with_nothing_changed() -> None:
    def broken(question: str, place: int) -> str:
        raise SpeakerError("no answer from http://localhost:1")

    solver = search(Wordy(victim), cast(rewriter=broken))
    before = solver.state()
    with pytest.raises(SpeakerError, match="no answer"):
        go(solver)
    assert solver.state() == before


# ---- state ----------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """Somebody wants the run to end."""


def noisy(prompt: str, example: Mapping[str, Any]) -> float:
    return random.Random(prompt + example["text"]).uniform(-1, 1)


def rewriting(question: str, place: int) -> str:
    return f"Prompt {random.Random(f'{question}{place}').randrange(10**6)}."


def test_a_resumed_search_is_the_unbroken_one() -> None:
    asked: list[dict[str, Script]] = []

    def made() -> tuple[Wordy, RewriteSolver]:
        words = Wordy(noisy)
        speakers = cast(rewriter=rewriting, paraphraser=rewriting)
        asked.append(speakers)
        return words, search(words, speakers, pool="model", measure="reward", perturbations=("C1", "C2"))

    words, whole = made()
    go(whole, 5)
    _, first = made()
    go(first, 2)
    tensors, numbers = first.state()
    kept = json.loads(json.dumps(numbers))
    told = {role: (script.calls, list(script.seeds)) for role, script in asked[1].items()}
    go(first)
    assert json.loads(json.dumps(numbers)) == kept
    again, second = made()
    second.restore(tensors, kept)
    assert again.text == kept["search"]["best"]
    go(second, 3)
    assert second.state() == whole.state()
    assert again.text == words.text
    assert len(whole.history) > 2
    for role in ROLES:
        assert asked[0][role].seeds == told[role][1] + asked[2][role].seeds


def test_a_step_that_is_stopped_anywhere_changes_nothing_and_is_taken_anew() -> None:
    words = Wordy(noisy)
    speakers = cast(rewriter=rewriting, paraphraser=rewriting)
    solver = search(words, speakers, measure="reward", pool="model")
    go(solver)
    unbroken = copy.deepcopy(solver)
    go(unbroken)
    before, text = solver.state(), words.text
    for allowed in range(0, 18, 3):
        left = iter(range(allowed))

        def check(left: Any = left) -> None:
            if next(left, None) is None:
                raise Stopped

        with pytest.raises(Stopped):
            solver.step(None, [], 0.0, check=check)  # type: ignore[arg-type]
        assert solver.state() == before
        assert words.text == text
    go(solver)
    assert solver.state() == unbroken.state()


def test_a_state_of_other_settings_is_refused() -> None:
    solver = search(Wordy(victim), cast())
    with pytest.raises(ConfigError, match="another selection, clean_weight"):
        search(Wordy(victim), cast(), selection=5, clean_weight=0.5).restore(*solver.state())


# ---- what must stay -------------------------------------------------------------------------------------------------


def test_what_must_stay_is_said_and_checked() -> None:
    words = Wordy(victim, text=f"{START} Answer yes or no.")
    answers = [f"{BEWARE} Judge it.", f"{BEWARE} Answer yes or no."]
    speakers = cast(rewriter=lambda question, place: answers[place % 2])
    steps = go(search(words, speakers, keep=("yes or no",)))
    assert '"yes or no"' in speakers["rewriter"].questions[0]
    assert words.text == f"{BEWARE} Answer yes or no."
    # three rewrites and both paraphrases have lost it, and the second of the others is the first one again
    assert steps[0].parts["refused/lost"] == 5
    assert steps[0].parts["refused/same"] == 1
