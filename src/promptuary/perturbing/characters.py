"""Rules for letters: C1 typos in some words, C2 other letters, C3 letters at the end.

Knows no word and no measure of closeness. All three are our own rules for what BATprompt asks of a language model.
"""

from __future__ import annotations

import random
import re
import string

from promptuary.perturbing.tables import KEYS, negates

TYPOS, ALTERED, APPENDED = 0.2, 0.08, 6
"""Share of the words that get a typo, share of the letters that are altered, most letters at the end; our choice."""

TAIL = string.ascii_lowercase + "#*~^_;,."
"""What is put at the end: nothing that could be read as a face or a shout; our choice."""


def typos(text: str, chance: random.Random) -> str:
    """C1: in some words two letters change places, or one becomes its neighbour on the keyboard.

    The first letter of a word stays. Words of fewer than four letters stay.
    """
    # a raised 2 is no digit for a pattern, and no letter either
    spans = [found.span() for found in re.finditer(r"[^\W\d_]{4,}", text) if found[0].isalpha()]
    chosen = chance.sample(spans, min(len(spans), max(1, round(TYPOS * len(text.split())))))
    letters = list(text)
    for start, end in chosen:
        letters[start:end] = _typo(text[start:end], chance)
    return "".join(letters)


def _typo(word: str, chance: random.Random) -> str:
    place = chance.randrange(1, len(word) - 1)
    near = _near(word[place].lower())
    swaps = word[place] != word[place + 1] and chance.random() < 0.5
    if swaps or not near:
        return word[:place] + word[place + 1] + word[place] + word[place + 2 :]
    return word[:place] + _cased(chance.choice(near), word[place]) + word[place + 1 :]


def _near(letter: str) -> str:
    row = next((keys for keys in KEYS if letter in keys), "")
    place = row.find(letter)
    return row[max(place - 1, 0) : place] + row[place + 1 : place + 2] if row else ""


def altered(text: str, chance: random.Random) -> str:
    """C2: some letters become others; what is no letter from a to z becomes another letter of the text.

    A negation stays: one letter makes another word of `not`.
    """
    words = [found for found in re.finditer(r"\S+", text) if not negates(found[0].lower())]
    places = [place for found in words for place in range(*found.span()) if text[place].isalpha()]
    if len(places) < 2:
        return text
    letters = list(text)
    for place in chance.sample(places, max(1, round(ALTERED * len(places)))):
        old = letters[place]
        known = string.ascii_lowercase if old.isascii() else sorted({text[one] for one in places})
        others = [one for one in known if one != old.lower() and one != old]
        letters[place] = _cased(chance.choice(others), old) if others else old
    return "".join(letters)


def _cased(letter: str, like: str) -> str:
    upper = letter.upper()
    return upper if like.isupper() and len(upper) == 1 else letter


def appended(text: str, chance: random.Random) -> str:
    """C3: a few letters and signs behind the end, fewer behind a short text."""
    if len(text.strip()) < 2:
        return text
    most = min(APPENDED, len(text) // 2)
    return text + "".join(chance.choice(TAIL) for _ in range(chance.randint(min(2, most), most)))
