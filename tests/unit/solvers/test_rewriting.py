"""What rewriting is made of: the attack, records and their worth, the prompt in an answer, questions.

Knows no method and no model: the victim is a function, and the attacker follows a script.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from promptuary.errors import ConfigError, DataError
from promptuary.perturbing.closeness import SURFACE, surface
from promptuary.perturbing.kinds import KINDS
from promptuary.solvers.base import Job
from promptuary.solvers.rewrite import RewriteConfig, RewriteSolver
from promptuary.solvers.rewriting.answers import Gate, plain, prompt_in
from promptuary.solvers.rewriting.attack import Attacker, described, kinds_of
from promptuary.solvers.rewriting.questions import MOST_PAIRS, differences
from promptuary.solvers.rewriting.records import Record
from promptuary.solvers.rewriting.roles import Ledger
from promptuary.solvers.rewriting.worth import Scorer, first_best
from promptuary.speakers.base import SpeakerConfig
from talking import CLEAN, START, Script, Wordy, cast, clean_of, fragile, has_typo, typo, victim


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


def test_what_differs_in_its_last_digits_is_the_same() -> None:
    assert first_best([0.5, 0.5 + 1e-9, 0.3]) == 0
    assert first_best([0.5, 0.5 + 1e-5, 0.3]) == 1
    words = Wordy(lambda prompt, example: 1.0 if example["text"] in CLEAN else 1.0 - 1e-8)
    found = attacker().attack(START, [0], words.examples, words.fields, measured(words), ledger(cast()))
    assert not found[0].success


def test_a_record_of_other_data_is_refused() -> None:
    record = Record(3, "C1", "text", "another text", "another txet", True)
    with pytest.raises(DataError, match="made from another example 3"):
        record.among(Wordy(victim).examples)


# ---- answers and questions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "prompt"),
    [
        ("<prompt>Judge it.</prompt> This is better.", "Judge it."),
        ("<prompt>Judge\n it.", "Judge it."),
        ('New prompt: "Judge it."', "Judge it."),
        ("```text\nJudge it.\n```", "Judge it."),
        ("Here is the improved prompt:\n\nJudge it.", "Judge it."),
        ('Prompt: "Judge it."\n\nThis prompt is better, since it is clear.', "Judge it."),
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
    assert gate.fault("") == gate.fault("...</") == "empty"
    assert gate.fault("Answer Yes or No.") == "lost"
    assert gate.fault("yes or no " * 5) == "long"
    assert gate.fault(f"yes or no, as in: {CLEAN[1].upper()}!") == "copied"
    assert gate.fault("yes or no for a short one") is None


def test_questions_stay_short_whatever_there_is_to_show() -> None:
    asked = differences(["typos"], [("clean", "claen")] * 500)[0]["content"]
    assert asked.count("Before: ") == MOST_PAIRS


def test_the_description_by_rule_names_what_did_harm() -> None:
    words = Wordy(fragile)

    def answer(question: str, place: int) -> str:
        return typo(clean_of(question)) if KINDS["C1"].instruction in question else ""

    found = attacker(kinds=[KINDS["C1"], KINDS["C2"]]).attack(
        START, [0, 1], words.examples, words.fields, measured(words), ledger(cast(attacker=answer))
    )
    assert described(found) == f"{KINDS['C1'].title} (worse in 2 of 2 texts)"
    assert plain("Text: abc") == "abc"


# ---- settings ------------------------------------------------------------------------------------------------------


def test_each_role_is_played_by_its_own_model_or_by_that_of_all() -> None:
    opened: dict[str, str] = {}

    def speaker(config: SpeakerConfig, role: str) -> Script:
        opened[role] = config.model
        return Script(lambda *_: "x")

    config = RewriteConfig.model_validate({"model": {"model": "small"}, "roles": {"rewriter": {"model": "large"}}})
    solver = RewriteSolver.of(config, Job([], 2, 1, words=Wordy(victim), speaker=speaker))
    assert isinstance(solver, RewriteSolver)
    others = ("attacker", "explainer", "summariser", "paraphraser")
    assert opened == {"rewriter": "large", **dict.fromkeys(others, "small")}
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
    job = Job([], 2, 1, words=words, speaker=lambda config, role: Script(lambda *_: "x"))
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
