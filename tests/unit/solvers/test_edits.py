"""Greedy search by edits: pieces, each edit, planted answers, patience, elitism, budgets and exact resuming.

Knows no method and no model: the victim is a function of the prompt, and paraphrases follow a script.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping
from typing import Any

import pytest

from promptuary.errors import ConfigError
from promptuary.solvers.base import Job, StepResult
from promptuary.solvers.edits import EditsConfig, EditsSolver
from promptuary.solvers.rewriting.phrases import Draft, phrases
from promptuary.speakers.base import SpeakerConfig
from talking import CLEAN, Script, Wordy

MODEL = {"model": "small"}
START = "Say whether the review of a film, which may be long, is good or bad."


def search(words: Wordy, speaker: Script | None = None, **settings: Any) -> EditsSolver:
    return EditsSolver(words, EditsConfig.model_validate(settings), speaker, seed=3)


def go(solver: EditsSolver, rounds: int = 1) -> list[StepResult]:
    return [solver.step(None, [], 0.0) for _ in range(rounds)]  # type: ignore[arg-type]


def shorter(prompt: str, example: Mapping[str, Any]) -> float:
    """The fewer words the better; it must speak of a film."""
    return 1.0 - len(prompt.split()) / 100 if "film" in prompt else -1.0


def noisy(prompt: str, example: Mapping[str, Any]) -> float:
    return random.Random(prompt + example["text"]).uniform(-1, 1)


def nothing(piece: str) -> str | None:
    return None


def test_pieces_give_the_text_back_and_phrases_end_at_marks_and_before_small_words() -> None:
    assert phrases(START, "phrase") == [
        "Say", "whether the review", "of a film,", "which may be long,", "is good", "or bad.",
    ]  # fmt: skip
    assert phrases("Read it. Then answer, please!  Yes or no?", "sentence") == [
        "Read it.", "Then answer, please!", "Yes or no?",
    ]  # fmt: skip
    assert phrases("a  b", "word") == ["a", "b"]
    for level in ("word", "phrase", "sentence"):
        assert " ".join(phrases(START, level)) == START
        assert phrases("", level) == []


@pytest.mark.parametrize("seed", range(20))
def test_each_edit_does_what_it_says_and_no_more(seed: int) -> None:
    chance, base = random.Random(seed), Draft(("a", "b", "c"))
    cut = base.edited("delete", [], chance, nothing)
    assert sorted((*cut.pieces, *cut.gone)) == ["a", "b", "c"]
    assert len(cut.gone) == 1
    swapped = base.edited("swap", [], chance, nothing)
    assert sum(one != other for one, other in zip(base.pieces, swapped.pieces, strict=True)) == 2
    assert sorted(swapped.pieces) == ["a", "b", "c"]
    more = base.edited("add", ["x", "y"], chance, nothing)
    assert len(more.pieces) == 4
    assert more.back in (("x",), ("y",))
    assert tuple(one for one in more.pieces if one not in ("x", "y")) == base.pieces
    said = base.edited("paraphrase", [], chance, lambda piece: f"{piece}{piece}")
    changed = [(one, other) for one, other in zip(base.pieces, said.pieces, strict=True) if one != other]
    assert len(changed) == 1
    assert changed[0][1] == changed[0][0] * 2


def test_an_edit_that_cannot_be_leaves_everything_as_it_is() -> None:
    one, chance = Draft(("a",)), random.Random(0)
    assert one.edited("delete", [], chance, nothing) is one
    assert one.edited("swap", [], chance, nothing) is one
    assert one.edited("add", [], chance, nothing) is one
    assert one.edited("paraphrase", [], chance, nothing) is one


def test_what_is_of_no_use_is_deleted() -> None:
    words = Wordy(shorter, text=START)
    solver = search(words, rounds=30, patience=5, measure="reward")
    steps = [go(solver)[0] for _ in itertools.takewhile(lambda _: not solver.done, range(30))]
    assert words.text == "of a film,"
    losses = [step.loss for step in steps]
    assert losses == sorted(losses, reverse=True)
    assert all(entry["score"] > entry["score_before"] for entry in solver.history[1:])
    assert {entry["from"] for entry in solver.history} == {"start", "delete"}
    # everything that went may come back
    assert sorted(solver.search.deleted) == sorted({*phrases(START, "phrase")} - {"of a film,"})


def test_a_piece_that_was_deleted_comes_back_where_that_helps() -> None:
    def victim(prompt: str, example: Mapping[str, Any]) -> float:
        """First the fewer the better; then, at one piece, all want the rest back behind it."""
        return {"a, b, c": 0.1, "b, c": 0.2, "b, c a,": 0.9}.get(prompt, 0.0)

    words = Wordy(victim, text="a, b, c")
    solver = search(words, rounds=50, patience=50, measure="reward")
    go(solver, 40)
    assert words.text == "b, c a,"
    assert solver.history[-1]["from"] == "add"
    assert solver.search.deleted == []


def test_patience_ends_the_search_and_the_start_stays() -> None:
    words = Wordy(lambda prompt, example: 1.0, text=START)
    solver = search(words)
    assert not solver.done
    go(solver)
    assert not solver.done
    go(solver)
    assert solver.done
    assert words.text == START
    assert len(solver.history) == 1


@pytest.mark.parametrize("seed", range(4))
def test_the_text_is_never_worse_on_held_out_examples_than_the_start(seed: int) -> None:
    words = Wordy(lambda prompt, example: noisy(f"{seed}{prompt}", example), text=START)
    solver = search(words, patience=20, measure="reward", examples=6, compose=2)
    worth = [step.parts["held_out"] for step in go(solver, 20)]
    assert worth == sorted(worth)
    assert len(solver.history) > 1
    told = {entry["text"]: entry["held_out"] for entry in solver.history}
    assert told[words.text] == max(told.values())


def test_all_prompts_are_compared_on_one_sample() -> None:
    seen: dict[str, list[str]] = {}

    def spy(prompt: str, example: Mapping[str, Any]) -> float:
        seen.setdefault(prompt, []).append(example["text"])
        return 1.0

    words = Wordy(spy, text=START)
    words.held_out = [{"text": "held out", "label": "yes"}]
    go(search(words, examples=5, patience=5), 3)
    samples = {tuple(sorted(set(texts) - {"held out"})) for texts in seen.values()}
    assert len(samples) == 1
    assert len(samples.pop()) == 5
    assert len(seen) > 5


def test_a_model_says_pieces_otherwise_until_its_budget_is_spent() -> None:
    for budget in (0, 4, None):
        words, speaker = Wordy(shorter, text=START), Script(lambda question, place: "judge:", budget)
        solver = search(words, speaker, operations=("paraphrase",), patience=9, measure="reward", model=MODEL)
        steps = go(solver, 4)
        assert speaker.calls == (20 if budget is None else budget) == solver.search.asked
        assert any(step.parts.get("exhausted") for step in steps) is (budget is not None)
        assert ("judge:" in words.text) is (budget != 0)
        assert "film" in words.text


def test_a_resumed_search_is_the_unbroken_one() -> None:
    def made() -> EditsSolver:
        speaker = Script(lambda question, place: f"{random.Random(question).randrange(1000)}")
        return search(Wordy(noisy, text=START), speaker, patience=20, measure="reward", examples=7, compose=2)

    whole, first, second = made(), made(), made()
    go(whole, 7)
    go(first, 3)
    tensors, numbers = first.state()
    second.restore(tensors, json.loads(json.dumps(numbers)))
    go(second, 4)
    assert second.state() == whole.state()
    assert second.words.text == whole.words.text
    assert len(whole.history) > 2
    with pytest.raises(ConfigError, match="belongs to another search"):
        search(Wordy(noisy, text=START), candidates=6).restore(tensors, numbers)


def test_a_step_that_is_stopped_changes_nothing() -> None:
    solver = search(Wordy(noisy, text=START), Script(lambda *_: "x"), measure="reward")
    go(solver)
    before = solver.state()

    def check() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        solver.step(None, [], 0.0, check=check)  # type: ignore[arg-type]
    assert solver.state() == before


def test_what_must_stay_stays() -> None:
    words = Wordy(lambda prompt, example: 1.0 - len(prompt) / 1000, text=START)
    steps = go(search(words, keep=("good or bad",), patience=20, measure="reward", rounds=40), 40)
    assert "good or bad" in words.text
    assert len(words.text) < len(START)
    assert sum(step.parts.get("refused/lost", 0) for step in steps) > 0


def test_settings_open_the_model_or_say_what_is_wrong() -> None:
    opened: list[tuple[str, str]] = []

    def speaker(config: SpeakerConfig, role: str) -> Script:
        opened.append((config.model, role))
        return Script(lambda *_: CLEAN[0])

    words = Wordy(shorter, text=START)
    config = EditsConfig.model_validate({"model": MODEL})
    assert EditsSolver.of(config, Job([], 2, 1, words=words, speaker=speaker)).chooses
    assert opened == [("small", "paraphraser")]
    with pytest.raises(ConfigError, match="prompts of words"):
        EditsSolver.of(config, Job([], 2, 1))
    with pytest.raises(ConfigError, match="starts? from is empty"):
        EditsSolver.of(EditsConfig(), Job([], 2, 1, words=Wordy(shorter, text="")))
    with pytest.raises(ConfigError, match="paraphrase needs a model"):
        EditsConfig.read({"operations": ["paraphrase"]}, where="solver")
    with pytest.raises(ConfigError, match="validation examples, got 12 and 0"):
        EditsSolver.of(EditsConfig(), Job([], 2, 1, words=Wordy(shorter, text=START, held_out=0)))
    assert EditsConfig().steps(500) == 10
