"""Rewriting: the attack, alignment, elitism, a planted answer, the ledger, budgets and exact resuming.

Knows no method and no model: the victim is a function, and every role follows a script.
"""

from __future__ import annotations

import copy
import json
import math
import random
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from promptuary.errors import ConfigError, DataError, SpeakerError
from promptuary.perturbing.closeness import SURFACE, surface
from promptuary.perturbing.kinds import KINDS
from promptuary.solvers.base import Job, StepResult
from promptuary.solvers.rewrite import RewriteConfig, RewriteSolver
from promptuary.solvers.rewriting.answers import Gate, plain, prompt_in
from promptuary.solvers.rewriting.attack import Attacker, described, kinds_of
from promptuary.solvers.rewriting.questions import MOST_PAIRS, differences
from promptuary.solvers.rewriting.records import Record
from promptuary.solvers.rewriting.roles import Ledger
from promptuary.solvers.rewriting.worth import Scorer
from promptuary.speakers.base import SpeakerConfig
from talking import CLEAN, Script, Wordy, has_typo

START = "Say whether the review is good."
BEWARE = "Beware of typos."
ROLES = ("attacker", "strategist", "explainer", "summariser", "rewriter", "paraphraser")


def victim(prompt: str, example: Mapping[str, Any]) -> float:
    """Right unless the text has a typo of which the prompt does not warn."""
    return 1.0 if BEWARE in prompt or not has_typo(example["text"]) else -1.0


def fragile(prompt: str, example: Mapping[str, Any]) -> float:
    return -1.0 if has_typo(example["text"]) else 1.0


def clean_of(question: str) -> str:
    return re.findall(r"Text: (.*)\nChanged text:", question)[0]


def typo(text: str) -> str:
    """The first two letters of the longest word change places."""
    word = max(text.split(), key=len)
    return text.replace(word, word[1] + word[0] + word[2:], 1)


def four_copies_and_a_typo(question: str, place: int) -> str:
    text = clean_of(question)
    return typo(text) if place == 3 else text


def differs(question: str, place: int) -> str:
    """Speaks of typos only where it is shown a pair with one."""
    pairs = re.findall(r"Before: (.*)\nAfter: (.*)", question)
    return "words are misspelt: typos" if any(has_typo(after) for _, after in pairs) else "no difference"


def warns(question: str, place: int) -> str:
    """Speaks of typos only where it is told of them."""
    told = question.split("</prompt>")[1]
    if place == 2 and "typos" in told:
        return f"<prompt>{START} {BEWARE}</prompt>"
    return f"<prompt>Variant {place} of no use.</prompt>"


def cast(**changes: Callable[[str, int], str]) -> dict[str, Script]:
    answers: dict[str, Callable[[str, int], str]] = {
        "attacker": four_copies_and_a_typo,
        "strategist": lambda question, place: "Misspell the longest word.",
        "explainer": differs,
        "summariser": lambda question, place: "typos" if "typos" in question else "nothing",
        "rewriter": warns,
        "paraphraser": lambda question, place: f"Paraphrase {place} of no use.",
        **changes,
    }
    return {role: Script(answer) for role, answer in answers.items()}


def search(words: Wordy, speakers: Mapping[str, Script], **settings: Any) -> RewriteSolver:
    config = RewriteConfig.model_validate({"perturbations": ("C1",), "selection": 4, "sample_num": 3, **settings})
    return RewriteSolver(words, config, speakers, seed=5)  # type: ignore[arg-type]


def go(solver: RewriteSolver, rounds: int = 1) -> list[StepResult]:
    return [solver.step(None, [], 0.0) for _ in range(rounds)]  # type: ignore[arg-type]


def ledger(speakers: Mapping[str, Script], step: int = 0) -> Ledger:
    return Ledger(speakers, 5, step)  # type: ignore[arg-type]


def attacker(**changes: Any) -> Attacker:
    settings: dict[str, Any] = {
        "by": "model", "kinds": [KINDS["C1"]], "repeats": 3, "count": 5, "objective": "score", "chain": False,
        "strategist": False, "stop_at_zero": False, "seed": 5,
    }  # fmt: skip
    return Attacker(**{**settings, **changes})


def measured(words: Wordy) -> Callable[[str, Any], list[float]]:
    return lambda prompt, examples: words.tried([prompt], examples).reward[0].tolist()


# ---- the attack -----------------------------------------------------------------------------------------------------


def test_the_harmful_candidate_is_taken_where_similarity_alone_would_take_a_copy() -> None:
    words, speakers = Wordy(fragile), cast()
    for objective, harmful in (("score", 3), ("similarity", 0)):
        found = attacker(objective=objective).attack(
            START, [0, 1, 2], words.examples, words.fields, measured(words), ledger(speakers)
        )
        assert sum(one.success for one in found) == harmful, objective
        assert [has_typo(one.text) for one in found] == [bool(harmful)] * 3


@pytest.mark.parametrize("by", ["model", "rule"])
@pytest.mark.parametrize("chain", [False, True])
def test_the_score_never_rises_and_what_is_accepted_is_close(by: str, chain: bool) -> None:
    def graded(prompt: str, example: Mapping[str, Any]) -> float:
        return float(len(example["text"]) % 7) - sum(map(ord, example["text"])) % 11

    chance = random.Random(0)

    def wild(question: str, place: int) -> str:
        text = clean_of(question)
        return text[: chance.randrange(len(text) + 1)] + chance.choice(["", "x", text, "!?"])

    words = Wordy(graded)
    kinds = list(KINDS.values())
    found = attacker(by=by, kinds=kinds, chain=chain).attack(
        START, [0, 3, 5], words.examples, words.fields, measured(words), ledger(cast(attacker=wild))
    )
    assert len(found) == 3 * len(kinds)
    fell = 0
    for one in found:
        assert len(one.trace) == 4
        assert all(later <= earlier for earlier, later in zip(one.trace, one.trace[1:], strict=False))
        assert one.lowest == one.trace[-1] == graded(START, {"text": one.text})
        fell += one.success
        if one.kind.gate == "surface" and one.success and not chain:
            assert surface(one.clean, one.text) > SURFACE
    assert fell > 5


def test_where_nothing_is_close_the_clean_text_comes_back_and_is_no_success() -> None:
    words = Wordy(lambda prompt, example: 1.0 if example["text"] in CLEAN else -1.0)
    found = attacker().attack(
        START, [0, 1], words.examples, words.fields, measured(words),
        ledger(cast(attacker=lambda question, place: "quite another text, as far away as can be")),
    )  # fmt: skip
    assert [(one.text == one.clean, one.passed, one.success, one.record.passed) for one in found] == [
        (True, False, False, False)
    ] * 2


def test_each_attack_begins_with_the_clean_text_unless_they_are_chained() -> None:
    words, speakers = Wordy(fragile), cast(attacker=lambda question, place: clean_of(question) + " x")
    kinds = [KINDS["C3"], KINDS["S1"]]
    for chain in (False, True):
        found = attacker(kinds=kinds, chain=chain, repeats=1).attack(
            START, [0], words.examples, words.fields, measured(words), ledger(speakers)
        )
        assert found[0].text == CLEAN[0] + " x"
        # in the chain the second one begins where the model is wrong already, and cannot lower its score
        assert found[1].begun == (-1.0 if chain else 1.0)
        assert found[1].success is not chain


def test_rules_follow_from_seed_round_example_and_kind_alone() -> None:
    words = Wordy(fragile)
    kinds = list(kinds_of("mix"))

    def run(places: list[int], seed: int = 5, step: int = 0, kinds: Any = kinds) -> dict[tuple[int, str], str]:
        made = attacker(by="rule", kinds=kinds, seed=seed).attack(
            START, places, words.examples, words.fields, measured(words), ledger({}, step)
        )
        return {(one.example, one.kind.id): one.text for one in made}

    whole = run([0, 1, 2])
    assert run([2, 0, 1], kinds=kinds[::-1]) == whole
    assert {key: text for key, text in whole.items() if key[0] == 1} == run([1])
    assert run([0, 1, 2], seed=6) != whole
    assert run([0, 1, 2], step=1) != whole


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


# ---- alignment ------------------------------------------------------------------------------------------------------


def test_a_record_keeps_its_example_and_label_and_their_order_changes_no_score() -> None:
    words = Wordy(lambda prompt, example: (sum(map(ord, example["text"] + example["label"])) % 100) / 7 - 5)
    made = attacker(by="rule")
    records = [
        made.pooled(place, kind, words.examples, words.fields) for place in range(12) for kind in kinds_of("mix")
    ]
    assert any(record.changed for record in records)
    for record in records:
        example = record.among(words.examples)
        assert example["label"] == words.examples[record.example]["label"]
        assert record.clean == words.examples[record.example]["text"]
    scorer = Scorer(words, "reward", 0.3, "mean")
    before = scorer.worth([START], list(range(12)), records, words.examples)
    for seed in range(5):
        random.Random(seed).shuffle(records)
        assert scorer.worth([START], list(range(12))[::-1], records, words.examples) == before
    # a hand-made one: two kinds, means .5 and 1, clean 1
    right = Scorer(Wordy(victim), "score", 0.25, "mean")
    some = [
        Record(0, "C1", "text", CLEAN[0], typo(CLEAN[0]), True),
        Record(1, "C1", "text", CLEAN[1], CLEAN[2], True),
        Record(1, "S1", "text", CLEAN[1], CLEAN[3], True),
        Record(2, "S1", "text", CLEAN[2], CLEAN[2], False),
    ]
    assert right.worth([START], [0, 1], some, words.examples)[0].total == 0.25 * 1 + 0.75 * (0.5 + 1) / 2
    right.aggregate = "min"
    assert right.worth([START], [0, 1], some, words.examples)[0].total == 0.25 * 1 + 0.75 * 0.5


def test_a_record_of_other_data_is_refused() -> None:
    record = Record(3, "C1", "text", "another text", "another txet", True)
    with pytest.raises(DataError, match="made from another example 3"):
        record.among(Wordy(victim).examples)


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
    shared = Script(lambda question, place: "", budget)
    shared.answer = lambda question, place: next(
        script.answer(question, place)
        for role, script in one.items()
        if {"attacker": "Changed text:", "explainer": "Before:", "summariser": "Differences between",
            "rewriter": "Write a better", "paraphraser": "other words", "strategist": "likely to go wrong"}[role] in question
    )  # fmt: skip
    solver = search(words, dict.fromkeys(ROLES, shared))
    steps = go(solver, 3)
    assert shared.calls == min(budget, shared.calls)
    assert sum(step.parts.get("asked", 0) for step in steps) == shared.calls
    assert all(step.applied and math.isfinite(step.loss) for step in steps)
    assert any(step.parts.get("exhausted") for step in steps)
    # the attack takes 9 calls, the explanation 2, the rewriter the next one
    assert words.text == (START if budget < 12 else f"{START} {BEWARE}")
    spent = shared.calls
    assert go(solver)[0].parts == {"held_out": solver.search.worth, "exhausted": 1.0}
    assert shared.calls == spent


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
    def made() -> tuple[Wordy, RewriteSolver]:
        words = Wordy(noisy)
        speakers = cast(rewriter=rewriting, paraphraser=rewriting)
        return words, search(words, speakers, pool="model", measure="reward", perturbations=("C1", "C2"))

    words, whole = made()
    go(whole, 5)
    _, first = made()
    go(first, 2)
    tensors, numbers = first.state()
    kept = json.loads(json.dumps(numbers))
    go(first)
    assert json.loads(json.dumps(numbers)) == kept
    again, second = made()
    second.restore(tensors, kept)
    assert again.text == kept["search"]["best"]
    go(second, 3)
    assert second.state() == whole.state()
    assert again.text == words.text
    assert len(whole.history) > 2


def test_a_step_that_is_stopped_anywhere_changes_nothing_and_is_taken_anew() -> None:
    words = Wordy(noisy)
    speakers = cast(rewriter=rewriting, paraphraser=rewriting)
    solver = search(words, speakers, measure="reward", pool="model")
    go(solver)
    unbroken = copy.deepcopy(solver)
    go(unbroken)
    before, text = solver.state(), words.text
    for allowed in range(0, 30, 3):
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


# ---- settings, answers and gates ------------------------------------------------------------------------------------


def test_each_role_is_played_by_its_own_model_or_by_that_of_all() -> None:
    opened: list[str] = []

    def speaker(config: SpeakerConfig) -> Script:
        opened.append(config.model)
        return Script(lambda *_: "x")

    config = RewriteConfig.model_validate({"model": {"model": "small"}, "roles": {"rewriter": {"model": "large"}}})
    solver = RewriteSolver.of(config, Job([], 2, 1, words=Wordy(victim), speaker=speaker))
    assert isinstance(solver, RewriteSolver)
    assert sorted(opened) == ["large", "small"]
    assert solver.speakers["attacker"] is solver.speakers["explainer"] is not solver.speakers["rewriter"]
    free = RewriteConfig.model_validate(
        {"attacker": "rule", "explainer": "rule", "paraphrases": 0, "roles": {"rewriter": {"model": "large"}}}
    )
    assert free.needed == ("rewriter",)
    assert RewriteSolver.of(free, Job([], 2, 1, words=Wordy(victim), speaker=speaker)).chooses


@pytest.mark.parametrize(
    ("settings", "words", "message"),
    [
        ({"attacker": "rule", "explainer": "rule"}, Wordy(victim), "the rewriter has to be played by a model"),
        ({"model": {"model": "m"}}, None, "is for prompts of words"),
        ({"model": {"model": "m"}, "perturbations": ("C9",)}, Wordy(victim), 'no such perturbation: "C9"'),
        ({"model": {"model": "m"}, "keep": ("yes, no",)}, Wordy(victim), "lacks one of solver.keep"),
        ({"model": {"model": "m"}}, Wordy(victim, text=" "), "starts from is empty"),
        ({"model": {"model": "m"}}, Wordy(victim, held_out=0), "1 validation example"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(settings: dict[str, Any], words: Wordy | None, message: str) -> None:
    job = Job([], 2, 1, words=words, speaker=lambda config: Script(lambda *_: "x"))
    with pytest.raises(ConfigError, match=message) as error:
        RewriteSolver.of(RewriteConfig.model_validate(settings), job)
    assert "\n" not in str(error.value)


def test_settings_that_contradict_each_other_are_refused() -> None:
    for settings in ({"attacker": "rule", "strategist": True}, {"attacker": "rule", "pool": "model"}):
        with pytest.raises(ConfigError, match="attacker: model"):
            RewriteConfig.read(settings, where="solver")


def test_a_run_has_as_many_rounds_as_both_settings_allow() -> None:
    assert RewriteConfig().steps(500) == 5
    assert RewriteConfig().steps(2) == 2


@pytest.mark.parametrize(
    ("answer", "prompt"),
    [
        ("<prompt>Judge it.</prompt> This is better.", "Judge it."),
        ("<prompt>Judge\n it.", "Judge it."),
        ('New prompt: "Judge it."', "Judge it."),
        ("```text\nJudge it.\n```", "Judge it."),
        ("Here is the improved prompt:\n\nJudge it.", "Judge it."),
        ('Say "good" or "bad"', 'Say "good" or "bad"'),
        ('"good" or "bad"', '"good" or "bad"'),
        ("Sorry, I can't.", ""),
        ("<prompt></prompt>", ""),
        ("  ", ""),
    ],
)
def test_the_prompt_in_an_answer(answer: str, prompt: str) -> None:
    assert prompt_in(answer) == prompt


def test_the_gate_of_prompts() -> None:
    gate = Gate(keep=["yes or no"], longest=12, examples=[*CLEAN, "short one"])
    assert gate.fault("Answer yes or no.") is None
    assert gate.fault("") == "empty"
    assert gate.fault("Answer Yes or No.") == "lost"
    assert gate.fault("yes or no " * 5) == "long"
    assert gate.fault(f"yes or no, as in: {CLEAN[1].upper()}!") == "copied"
    assert gate.fault("yes or no for a short one") is None


def test_what_must_stay_is_said_and_checked() -> None:
    words = Wordy(victim, text=f"{START} Answer yes or no.")
    answers = [f"{BEWARE} Judge it.", f"{BEWARE} Answer yes or no."]
    speakers = cast(rewriter=lambda question, place: answers[place % 2])
    steps = go(search(words, speakers, keep=("yes or no",)))
    assert '"yes or no"' in speakers["rewriter"].questions[0]
    assert words.text == f"{BEWARE} Answer yes or no."
    # two answers have lost it, the others are the first one again
    assert steps[0].parts["refused/lost"] == 2
    assert steps[0].parts["refused/same"] >= 2


def test_questions_stay_short_whatever_there_is_to_show() -> None:
    asked = differences(["typos"], [("clean", "claen")] * 500)[0]["content"]
    assert asked.count("Before: ") == MOST_PAIRS


def test_the_description_by_rule_names_what_did_harm() -> None:
    words = Wordy(fragile)
    found = attacker(kinds=[KINDS["C1"], KINDS["C2"]]).attack(
        START, [0, 1], words.examples, words.fields, measured(words),
        ledger(cast(attacker=lambda question, place: typo(clean_of(question)) if KINDS["C1"].instruction in question else "")),
    )  # fmt: skip
    assert described(found) == f"{KINDS['C1'].title} (worse in 2 of 2 texts)"
    assert plain("Text: abc") == "abc"
