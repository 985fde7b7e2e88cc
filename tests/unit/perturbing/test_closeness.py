"""Closeness: Levenshtein's distance against the plain table, values by hand, and a cosine of letters.

Knows no rule.
"""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as some

from promptuary.perturbing.closeness import distance, overlap, surface

TEXTS = some.text(some.sampled_from("abcé 漢😀"), max_size=70)


def plain(one: str, other: str) -> int:
    """The table, a row at a time."""
    row = list(range(len(other) + 1))
    for down, letter in enumerate(one, start=1):
        before, row[0] = row[0], down
        for across, wanted in enumerate(other, start=1):
            best = min(row[across] + 1, row[across - 1] + 1, before + (letter != wanted))
            before, row[across] = row[across], best
    return row[-1]


def test_values_by_hand() -> None:
    assert distance("kitten", "sitting") == 3
    assert surface("kitten", "sitting") == pytest.approx(0.5714, abs=5e-5)
    assert surface("", "") == 1
    assert surface("a cat", "a cat") == 1
    assert surface("abc", "") == surface("abc", "xyz") == 0
    assert distance("flaw", "lawn") == 2


@given(TEXTS, TEXTS)
def test_the_distance_is_that_of_the_plain_table(one: str, other: str) -> None:
    assert distance(one, other) == plain(one, other) == distance(other, one)
    assert 0 <= surface(one, other) <= 1


def test_texts_of_ten_thousand_letters_take_no_time() -> None:
    one = "the quick brown fox jumps over it " * 300
    began = time.perf_counter()
    assert distance(one, one.replace("fox", "dog")) == 600
    assert time.perf_counter() - began < 2  # 0.1 s when quiet; the plain table takes 20


def test_overlap_of_a_text_with_itself_is_one_whatever_the_case_and_the_spaces() -> None:
    assert overlap("", "") == 1
    assert overlap("A cat", "a  CAT") == pytest.approx(1)
    assert overlap("abc", "") == 0
    assert overlap("abc", "xyz") == 0


def test_overlap_by_hand() -> None:
    # " ab", "abc", "bc " against " ab", "abd", "bd ": one of three
    assert overlap("abc", "abd") == pytest.approx(1 / 3)


@given(TEXTS, TEXTS)
def test_overlap_is_symmetric_and_between_nothing_and_one(one: str, other: str) -> None:
    assert 0 <= overlap(one, other) <= 1
    assert overlap(one, other) == pytest.approx(overlap(other, one))
