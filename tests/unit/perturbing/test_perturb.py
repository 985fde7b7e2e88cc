"""A text perturbed: the first candidate through the gate, or the clean text, which says that it is no success.

Knows no rule by what it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from promptuary.errors import ConfigError, SpeakerError
from promptuary.perturbing import closeness
from promptuary.perturbing.kinds import KINDS, Kind, chosen
from promptuary.perturbing.perturb import TRIES, Perturbed, perturbed
from promptuary.speakers.base import Message

TEXT = "The movie is not a good one, although many people said that it was the best of the year."
LETTERS = ("C1", "C2", "C3", "S1")


class Script:
    """A model that gives these answers, and remembers what it was asked."""

    name = "script"

    def __init__(self, *answers: str) -> None:
        self.answers, self.asked = list(answers), list[dict[str, Any]]()

    def generate(self, messages: Sequence[Message], **settings: Any) -> list[str]:
        self.asked.append({"text": messages[-1]["content"], **settings})
        return self.answers


def test_nine_kinds_on_three_levels_with_the_gates_of_the_paper() -> None:
    assert list(KINDS) == ["C1", "C2", "C3", "W1", "W2", "W3", "S1", "S2", "S3"]
    assert [kind.level[0].upper() + kind.id[1] for kind in KINDS.values()] == list(KINDS)
    assert tuple(kind.id for kind in KINDS.values() if kind.gate == "surface") == LETTERS
    assert (closeness.SURFACE, closeness.MEANING) == (0.6, 0.8)
    assert len({kind.instruction for kind in KINDS.values()}) == 9


def test_kinds_are_chosen_by_name() -> None:
    assert chosen("all") == chosen(" ALL,w2") == tuple(KINDS.values())
    assert [kind.id for kind in chosen("s1, C1,s1")] == ["C1", "S1"]
    with pytest.raises(ConfigError, match='no such perturbation: "w4"; did you mean "W'):
        chosen("C1,w4")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_changes_a_sentence_and_stays_close(kind: str) -> None:
    made = perturbed(TEXT, kind)
    assert made.changed
    assert made.text != TEXT
    measure, least = (closeness.surface, 0.6) if kind in LETTERS else (closeness.overlap, closeness.OVERLAP)
    assert made.closeness == measure(TEXT, made.text) > least
    assert made == perturbed(TEXT, KINDS[kind])
    plain = TEXT.replace(", although", " of which")  # so that no clause can be moved, which there is one way to do
    assert len({perturbed(plain, kind, seed=seed).text for seed in range(10)}) > 1


@pytest.mark.parametrize("kind", KINDS)
@given(text=some.text(max_size=50), seed=some.integers())
def test_whatever_the_text_it_is_changed_and_close_or_clean_and_told(kind: str, text: str, seed: int) -> None:
    made = perturbed(text, kind, seed=seed)
    assert made.changed == (made.text != text)
    assert made.closeness > 0.6
    assert made.changed or made.closeness == 1
    assert 0 <= made.refused <= TRIES


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["", "a"])
def test_where_nothing_can_change_nothing_is_refused_either(kind: str, text: str) -> None:
    assert perturbed(text, kind) == Perturbed(text, False, 1.0, 0)


def test_what_comes_too_far_from_the_text_is_refused_and_told() -> None:
    # a handle has five characters at least, and with its space six: more than is allowed of eight letters
    assert perturbed("so small", "S1") == Perturbed("so small", False, 1.0, TRIES)
    assert perturbed("as small as this text", "S1").changed


def test_a_measure_of_meaning_that_is_given_decides_at_the_papers_threshold() -> None:
    seen: list[tuple[str, str]] = []

    def similarity(one: str, other: str) -> float:
        seen.append((one, other))
        return 0.8 if len(seen) < 3 else 0.81

    made = perturbed(TEXT, "W3", similarity=similarity)
    assert made == Perturbed(seen[2][1], True, 0.81, 2)
    assert {one for one, _ in seen} == {TEXT}
    seen.clear()
    assert perturbed(TEXT, "C1", similarity=similarity).changed
    assert seen == []


def test_kinds_draw_apart_from_one_another() -> None:
    same = Kind("X1", "word", "", "meaning", "", KINDS["W3"].rule)
    assert perturbed(TEXT, same).text != perturbed(TEXT, "W3").text


def test_the_first_answer_of_an_attacker_that_passes_is_taken() -> None:
    close = TEXT.replace("good", "goood")
    attacker = Script(TEXT, "nothing like it at all", f'"{close}"', TEXT.replace("good", "gud"))
    made = perturbed(TEXT, "C1", seed=7, attacker=attacker)
    assert made == Perturbed(close, True, closeness.surface(TEXT, close), 1)
    (asked,) = attacker.asked
    assert KINDS["C1"].instruction in asked["text"]
    assert TEXT in asked["text"]
    assert (asked["n"], asked["temperature"], asked["top_p"]) == (5, 1.0, 0.95)
    perturbed(TEXT, "C1", seed=7, attacker=attacker)
    perturbed(TEXT, "C1", seed=8, attacker=attacker)
    assert asked["seed"] == attacker.asked[1]["seed"] != attacker.asked[2]["seed"]


@pytest.mark.parametrize("answer", [f"-----\n{TEXT} !\n-----", f"\u201c{TEXT} !\u201d", f"  {TEXT} !\n"])
def test_what_models_put_around_an_answer_is_taken_off(answer: str) -> None:
    assert perturbed(TEXT, "C3", attacker=Script(answer)).text == f"{TEXT} !"


def test_dashes_and_quotes_of_the_text_itself_stay() -> None:
    assert perturbed('"So it is" - or so', "C3", attacker=Script('"So it is" - or so -')).text == '"So it is" - or so -'
    assert perturbed('"so they said"', "C1", attacker=Script('"so they siad"')).text == '"so they siad"'


@pytest.mark.parametrize("answers", [(), ("",), (TEXT,), ("I am sorry.",) * 5])
def test_an_attacker_without_a_close_answer_leaves_the_clean_text(answers: tuple[str, ...]) -> None:
    made = perturbed(TEXT, "S2", attacker=Script(*answers))
    assert (made.text, made.changed) == (TEXT, False)
    assert made.refused == (5 if len(answers) == 5 else 0)


def test_an_attacker_that_cannot_be_reached_is_told_and_not_replaced() -> None:
    class Silent(Script):
        def generate(self, messages: Sequence[Message], **settings: Any) -> list[str]:
            raise SpeakerError("no answer")

    with pytest.raises(SpeakerError, match="no answer"):
        perturbed(TEXT, "C1", attacker=Silent())
