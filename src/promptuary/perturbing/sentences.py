"""Rules for sentences: S1 a handle at the end, S2 a paraphrase, S3 another syntax.

Knows no measure of closeness. All three are our own rules for what BATprompt asks of a language model; S2 and S3 are
weak: they change how a sentence begins, a few forms of verbs and the order of two clauses, where a model writes anew.
"""

from __future__ import annotations

import random
import re
import string

from promptuary.perturbing.tables import ASKED, CLEFTS, CONTRACTIONS, FRAMES, JOINING, LOWERED, QUESTIONS
from promptuary.perturbing.words import like

HANDLE = (4, 8)
"""Fewest and most letters and digits of a handle; our choice."""

_PAIRS = {**CONTRACTIONS, **{short: long for long, short in CONTRACTIONS.items()}}
_FORMS = re.compile(
    r"\b(" + "|".join(re.escape(one).replace("\\ ", " ") for one in sorted(_PAIRS, key=len, reverse=True)) + r")\b",
    re.IGNORECASE,
)
_APART = re.compile(r"\b(ca|wo|do|does|did|is|are|was|were|has|have|had|would|could|should) n't\b", re.IGNORECASE)
_SENTENCE = re.compile(r"[^.!?\s][^.!?]*(?:[.!?]+(?!\s|$)[^.!?]*)*[.!?]*")
_JOINED = "|".join(JOINING)
_FIRST = re.compile(rf"(?P<clause>(?:{_JOINED})\s[^,;:]+?)\s*,\s*(?P<main>[^,;:]+?)(?P<end>\s*[.!?]*)", re.IGNORECASE)
_LATER = re.compile(rf"(?P<main>[^,;:]+?)\s*,?\s(?P<clause>(?:{_JOINED})\s[^,;:]+?)(?P<end>\s*[.!?]*)", re.IGNORECASE)
_TWO = re.compile(
    r"(?P<main>[^,;:]+?)(?P<join>\s*;\s*|\s*,\s*and\s+)(?P<clause>[^,;:]+?)(?P<end>\s*[.!?]*)", re.IGNORECASE
)


def handle(text: str, chance: random.Random) -> str:
    """S1: a short handle that means nothing, such as @x7kq2, behind the end."""
    if len(text.strip()) < 2:
        return text
    letters = string.ascii_lowercase + string.digits
    return f"{text} @" + "".join(chance.choice(letters) for _ in range(chance.randint(*HANDLE)))


def paraphrase(text: str, chance: random.Random) -> str:
    """S2: verbs lengthened or shortened (is not, isn't); often, or where there are none, words that announce it."""
    if len(text.strip()) < 2:
        return text
    changed = _APART.sub(_whole, text)
    if changed == text:
        changed = _FORMS.sub(lambda one: like(_PAIRS[one[0].lower()], one[0]), text)
    if changed != text and chance.random() < 0.5:
        return changed
    return _before(chance.choice(FRAMES), changed)


def _whole(found: re.Match[str]) -> str:
    """The long form of what tokenisers write as two words, such as does n't."""
    stem = found[1]
    return {"ca": "cannot", "wo": "will not"}.get(stem.lower(), f"{stem} not")


def syntax(text: str, chance: random.Random) -> str:
    """S3: the clauses of one sentence change places; where none can, words that make the first one depend on them."""
    if len(text.strip()) < 2:
        return text
    sentences = list(_SENTENCE.finditer(text))
    chance.shuffle(sentences)
    for one in sentences:
        turned = _turned(one[0])
        if turned is not None:
            return text[: one.start()] + turned + text[one.end() :]
    words = text.split()
    asks = text.rstrip().endswith("?") or words[0].lower() in QUESTIONS
    return _before(ASKED if asks else chance.choice(CLEFTS), text)


def _turned(sentence: str) -> str | None:
    """Two clauses in the other order, each of at least three words; None where there are no two."""
    for pattern, joined in ((_FIRST, "{main} {clause}"), (_LATER, "{clause}, {main}"), (_TWO, "{clause}{join}{main}")):
        found = pattern.fullmatch(sentence)
        if found is None or min(len(found[name].split()) for name in ("main", "clause")) < 3:
            continue
        first, second = ("main", "clause") if pattern is _FIRST else ("clause", "main")
        capital = sentence[0].isupper()
        parts = {first: found[first], second: _lowered(found[second])}
        if capital:
            parts[first] = parts[first][:1].upper() + parts[first][1:]
        return joined.format(**{**found.groupdict(), **parts}) + found["end"]
    return None


def _before(opening: str, text: str) -> str:
    """A text with words before it, which take over its capital."""
    space = text[: len(text) - len(text.lstrip())]
    rest = text.lstrip()
    lowered = _lowered(rest)
    if rest[:1].isupper():
        opening = opening[:1].upper() + opening[1:]
    return space + opening + lowered


def _lowered(text: str) -> str:
    """Without a capital that only the beginning of a sentence gave; that of a name, or of I, stays."""
    words = text.split(maxsplit=1)
    first = words[0] if words else ""
    plain = re.sub(r"\W+$", "", first.lower())
    return text[:1].lower() + text[1:] if plain in LOWERED and first[1:] == first[1:].lower() else text
