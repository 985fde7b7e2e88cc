"""Rules for words: W1 synonyms, W2 fewer words, W3 more words.

Knows no measure of closeness. All three are our own rules for what BATprompt asks of a language model, and W1 is weak:
it knows a small table alone.
"""

from __future__ import annotations

import itertools
import random
import re
from typing import TypeVar

from promptuary.perturbing.tables import ADDED, DROPPED, SYNONYMS, negates

T = TypeVar("T")

MOST = 4
"""Most words that are added; source: BATprompt's instruction for classification (arXiv 2412.18196 v1)."""

OFTEN = 0.5
"""How likely each word that may change is changed, or goes; one always does; our choice."""


def synonyms(text: str, chance: random.Random) -> str:
    """W1: some words become others of the same meaning, from a table, in the same case."""
    found = [
        one
        for one in re.finditer(r"[A-Za-z]+", text)
        if (other := SYNONYMS.get(one[0].lower())) and _agrees(other, one[0].lower(), text[: one.start()])
    ]
    chosen = {one.start() for one in _some(found, chance)}
    return re.sub(
        r"[A-Za-z]+", lambda one: like(SYNONYMS[one[0].lower()], one[0]) if one.start() in chosen else one[0], text
    )


def _agrees(word: str, other: str, before: str) -> bool:
    """Whether a word may stand where another does: a or an before it stays right."""
    article = re.search(r"\ban?\s+$", before, re.IGNORECASE)
    return article is None or (word[0] in "aeiou") == (other[0] in "aeiou")


def fewer(text: str, chance: random.Random) -> str:
    """W2: some words that say little are left out, never a negation, a word beside one, or the last that is left."""
    words = list(re.finditer(r"\S+", text))
    plain = [one[0].lower() for one in words]
    beside = {place + step for place, word in enumerate(plain) if negates(word) for step in (-1, 1)}
    found = [place for place, word in enumerate(plain) if word in DROPPED and place not in beside]
    if len(found) == len(words):
        found = found[:-1]
    gone = set(_some(found, chance))
    if not gone:
        return text
    # each word takes the white space behind it along; what stands before the first stays
    ends = [one.start() for one in words[1:]] + [len(text)]
    kept = [
        text[one.start() : end] for place, (one, end) in enumerate(zip(words, ends, strict=True)) if place not in gone
    ]
    left = text[: words[0].start()] + "".join(kept)
    return left if text[-1].isspace() else left.rstrip()


def more(text: str, chance: random.Random) -> str:
    """W3: up to four words that add nothing, fewer in a short text, never behind a negation."""
    if len(text.strip()) < 2:
        return text
    words = list(re.finditer(r"\S+", text))
    # before a word, so that punctuation stays where it is; not before the first, which would change its case
    places = [
        one.start()
        for before, one in itertools.pairwise(words)
        if one[0][0].isalnum() and not negates(before[0].lower())
    ]
    most = min(MOST, len(places), 1 + len(words) // 6)
    if not most:
        return f"{text.rstrip()} {chance.choice(ADDED)}" + text[len(text.rstrip()) :]
    chosen = sorted(chance.sample(places, chance.randint(1, most)), reverse=True)
    for place in chosen:
        text = f"{text[:place]}{chance.choice(ADDED)} {text[place:]}"
    return text


def like(word: str, other: str) -> str:
    """A word in the case of another."""
    if other.isupper() and len(other) > 1:
        return word.upper()
    return word[:1].upper() + word[1:] if other[:1].isupper() else word


def _some(found: list[T], chance: random.Random) -> list[T]:
    """About half of them, at least one."""
    chosen = [one for one in found if chance.random() < OFTEN]
    return chosen or ([chance.choice(found)] if found else [])
