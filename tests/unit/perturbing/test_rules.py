"""Rules: each changes what its level allows and nothing else, says the same with the same seed, and leaves the meaning.

Knows no gate.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as some

from promptuary.perturbing import sentences, words
from promptuary.perturbing.kinds import KINDS
from promptuary.perturbing.tables import ADDED, CONTRACTIONS, DROPPED, FRAMES, NEGATIONS, SYNONYMS, negates

VOCABULARY = [
    "The", "the", "a", "of", "movie", "Movie", "FILM", "good", "bad", "not", "n't", "don't", "cannot", "is", "it",
    "and", ",", ".", "?", "because", "when", "Ünïcode", "漢字", "x", "don't.", "isn't", "it's", "-", "7", "although",
    "e\u0301tude", "👍🏽",
]  # fmt: skip
SENTENCES = some.builds(" ".join, some.lists(some.sampled_from(VOCABULARY), min_size=1, max_size=25))
TEXTS = some.one_of(SENTENCES, some.text(max_size=60))
SEEDS = some.integers(0, 2**64 - 1)


def ruled(kind: str, text: str, seed: int) -> str:
    return KINDS[kind].rule(text, random.Random(seed))


def subsequence(short: list[str], long: list[str]) -> bool:
    rest = iter(long)
    return all(word in rest for word in short)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS, seed=SEEDS)
def test_the_same_seed_gives_the_same_text_and_never_a_blank_one(kind: str, text: str, seed: int) -> None:
    made = ruled(kind, text, seed)
    assert made == ruled(kind, text, seed)
    assert bool(made.strip()) == bool(text.strip())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["", " ", "\n\t", "a", "I", "?", " x ", "漢"])
def test_what_is_too_short_to_change_stays(kind: str, text: str) -> None:
    assert all(ruled(kind, text, seed) == text for seed in range(20))


@pytest.mark.parametrize("kind", ["C1", "C2"])
@given(text=TEXTS, seed=SEEDS)
@example(text="AAA²", seed=0)
def test_letters_change_within_their_words(kind: str, text: str, seed: int) -> None:
    made = ruled(kind, text, seed)
    assert len(made.split()) == len(text.split())
    assert len(made) == len(text)
    for before, after in zip(text, made, strict=True):
        assert before == after or (before.isalpha() and after.isalpha())


@given(text=TEXTS, seed=SEEDS)
def test_altered_letters_leave_negations_alone(text: str, seed: int) -> None:
    for before, after in zip(text.split(), ruled("C2", text, seed).split(), strict=True):
        assert before == after or not negates(before.lower())


@pytest.mark.parametrize("kind", ["C3", "S1"])
@given(text=TEXTS, seed=SEEDS)
def test_what_is_put_at_the_end_leaves_the_text_before_it(kind: str, text: str, seed: int) -> None:
    made = ruled(kind, text, seed)
    assert made.startswith(text)
    if len(text.strip()) > 1:
        tail = made[len(text) :]
        assert tail
        assert not set(tail) & set("()[]!?:")


@given(text=TEXTS, seed=SEEDS)
def test_fewer_words_are_a_part_of_the_words_and_no_negation_goes(text: str, seed: int) -> None:
    before, after = text.split(), ruled("W2", text, seed).split()
    assert subsequence(after, before)
    for word in set(before):
        assert word.lower() in DROPPED or before.count(word) == after.count(word)
    assert [word for word in before if negates(word.lower())] == [word for word in after if negates(word.lower())]


@given(text=TEXTS, seed=SEEDS)
def test_at_most_four_words_are_added_and_none_is_lost(text: str, seed: int) -> None:
    before, after = text.split(), ruled("W3", text, seed).split()
    assert subsequence(before, after)
    assert len(after) - len(before) <= 4
    if len(text.strip()) > 1:
        assert len(after) > len(before)


@given(text=TEXTS, seed=SEEDS)
def test_synonyms_stand_in_the_place_and_the_case_of_their_words(text: str, seed: int) -> None:
    before, after = text.split(), ruled("W1", text, seed).split()
    for old, new in zip(before, after, strict=True):
        assert old == new or (old[0].isupper() == new[0].isupper() and old.isupper() == new.isupper())


def test_tables_neither_praise_nor_negate() -> None:
    assert not {*SYNONYMS, *SYNONYMS.values(), *ADDED, *DROPPED} & NEGATIONS
    feelings = {
        "good",
        "bad",
        "great",
        "poor",
        "best",
        "worst",
        "fine",
        "nice",
        "awful",
        "boring",
        "funny",
        "love",
        "hate",
    }
    assert not {*SYNONYMS, *SYNONYMS.values(), *ADDED, *DROPPED} & feelings
    assert len(set(CONTRACTIONS.values())) == len(CONTRACTIONS)
    assert all(word != other for word, other in SYNONYMS.items())


def test_a_synonym_agrees_with_its_article() -> None:
    assert words.synonyms("an actor in a movie", random.Random(0)) == "an actor in a film"
    assert words.synonyms("A big Film", random.Random(1)) in {"A large Film", "A big Movie", "A large Movie"}
    assert words.synonyms("FILM", random.Random(0)) == "MOVIE"


def test_no_word_beside_a_negation_is_left_out() -> None:
    assert all(words.fewer("it is not the end", random.Random(seed)) == "is not the end" for seed in range(20))


@pytest.mark.parametrize(
    ("text", "turned"),
    [
        ("Because it rains today, we stay at home.", "We stay at home because it rains today."),
        ("We stay at home because it rains today.", "Because it rains today, we stay at home."),
        ("the plot is thin , and the cast is weak", "the cast is weak , and the plot is thin"),
        ("It sold well; Nobody there knows why.", "Nobody there knows why; it sold well."),
    ],
)
def test_clauses_change_places(text: str, turned: str) -> None:
    assert sentences.syntax(text, random.Random(0)) == turned


def test_other_syntax_keeps_names_and_questions() -> None:
    assert sentences.syntax("What is a cat?", random.Random(0)) == "The question is this: what is a cat?"
    assert sentences.syntax("Paris is a city.", random.Random(0)).endswith(" that Paris is a city.")
    assert sentences.syntax("The sea is a place.", random.Random(0)).endswith(" that the sea is a place.")


@pytest.mark.parametrize(
    ("text", "forms"),
    [
        ("It does not work.", "It doesn't work."),
        ("I'm here", "I am here"),
        ("CANNOT go", "CAN'T go"),
        ("it does n't work , and it ca n't", "it does not work , and it cannot"),
    ],
)
def test_a_paraphrase_changes_forms_of_verbs_or_announces_itself(text: str, forms: str) -> None:
    made = {sentences.paraphrase(text, random.Random(seed)) for seed in range(40)}
    assert forms in made
    lowered = forms if forms[0] == "C" or forms[:2] == "I " else forms[0].lower() + forms[1:]
    announced = {frame + lowered for frame in FRAMES} | {frame.capitalize() + lowered for frame in FRAMES}
    assert len(made) > 1
    assert made - {forms} <= announced
