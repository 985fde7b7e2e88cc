"""One text perturbed: candidates by rule or by a model, the first that stays close enough, or the clean text.

Knows no prompt, task or label.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from promptuary.perturbing import closeness
from promptuary.perturbing.closeness import Similarity
from promptuary.perturbing.kinds import Kind, chosen
from promptuary.speakers.base import Speaker, user

TRIES = 5
"""Candidates that are looked at; source: BATprompt's five (arXiv 2412.18196 v1), for rules our choice."""

TOKENS = 1000
"""Most tokens of a candidate that a model writes; source: as `TRIES`."""

_LINES = re.compile(r"^-{3,}\s*\n|\n\s*-{3,}$")


@dataclass(frozen=True)
class Perturbed:
    """What became of a text.

    `changed`: whether a candidate was accepted; if not, `text` is the clean one, and this is no success of anything.
    `closeness`: of `text` to the clean one, by the measure of its gate. `refused`: candidates that came too far from
    the clean text.
    """

    text: str
    changed: bool
    closeness: float
    refused: int


def perturbed(
    text: str,
    kind: Kind | str,
    *,
    seed: int = 0,
    similarity: Similarity | None = None,
    attacker: Speaker | None = None,
) -> Perturbed:
    """Change a text and keep its meaning.

    What is drawn follows from the seed, the kind and the text alone, so that neither the order of texts nor the other
    kinds matter.

    Args:
        text: clean.
        kind: or its id.
        seed: of the draws.
        similarity: how alike two texts are in meaning, such as a cosine of sentence embeddings, of which more than
            0.8 is asked; without it `closeness.overlap`, of which more than 0.6 is asked.
        attacker: a model that is asked for the candidates; without one the kind's rule makes them.

    Raises:
        ConfigError: no such kind.
        SpeakerError: the attacker cannot be asked.
    """
    if isinstance(kind, str):
        (kind,) = chosen(kind)
    refused = 0
    made = _ruled(text, kind, seed) if attacker is None else _asked(text, kind, seed, attacker)
    for candidate in made:
        if not candidate.strip() or candidate == text:
            continue
        close, least = _closeness(text, candidate, kind, similarity)
        if close > least:
            return Perturbed(candidate, True, close, refused)
        refused += 1
    return Perturbed(text, False, 1.0, refused)


def _closeness(text: str, candidate: str, kind: Kind, similarity: Similarity | None) -> tuple[float, float]:
    """How close a candidate is, and what must be exceeded."""
    if kind.gate == "surface":
        return closeness.surface(text, candidate), closeness.SURFACE
    if similarity is None:
        return closeness.overlap(text, candidate), closeness.OVERLAP
    return float(similarity(text, candidate)), closeness.MEANING


def _ruled(text: str, kind: Kind, seed: int) -> Iterator[str]:
    for attempt in range(TRIES):
        yield kind.rule(text, random.Random(_drawn(seed, kind, text, attempt)))


def _asked(text: str, kind: Kind, seed: int, attacker: Speaker) -> Iterator[str]:
    messages = user(
        f"Below, between the lines of dashes, stands a text. {kind.instruction} Its meaning, and whatever it would be "
        "labelled as, must stay the same. Answer with the changed text alone, without dashes, quotes or remarks.\n"
        f"-----\n{text}\n-----"
    )
    drawn = _drawn(seed, kind, text, 0) % 2**31
    answers = attacker.generate(messages, n=TRIES, temperature=1.0, top_p=0.95, max_tokens=TOKENS, seed=drawn)
    for answer in answers:
        yield _bare(answer, text)


def _bare(answer: str, text: str) -> str:
    """An answer without the lines of dashes and the quotes that models put around it."""
    found = _LINES.sub("", answer.strip()).strip()
    quoted = len(found) > 1 and (found[0], found[-1]) in (('"', '"'), ("“", "”"), ("'", "'"))
    return found[1:-1].strip() if quoted and text[:1] != found[0] else found


def _drawn(seed: int, kind: Kind, text: str, attempt: int) -> int:
    given = f"{seed} {kind.id} {attempt} {text}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(given, digest_size=8).digest())
