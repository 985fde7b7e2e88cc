"""A prompt as phrases, and the small edits of GrIPS: delete, swap, add back.

Knows no model and no score.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Level = Literal["word", "phrase", "sentence"]
Operation = Literal["delete", "swap", "add", "paraphrase"]

OPENING = frozenset({
    "about", "after", "although", "and", "as", "at", "because", "before", "between", "but", "by", "for", "from", "how",
    "if", "in", "into", "is", "are", "of", "on", "or", "so", "than", "that", "then", "to", "was", "were", "what",
    "when", "where", "whether", "which", "while", "who", "with", "without",
})  # fmt: skip
"""Words that begin a phrase."""


def phrases(text: str, level: Level) -> list[str]:
    """A text in pieces, in order, which joined by spaces give it back.

    Words, sentences, or phrases: up to a mark such as a comma, or up to a word such as `of`, `whether` or `is`. GrIPS
    takes the phrases of a constituency parser; these need none (our choice).
    """
    words = text.split()
    if level == "word":
        return words
    found: list[list[str]] = []
    for place, word in enumerate(words):
        before = words[place - 1] if place else ""
        ends = bool(re.search(r"[.!?]['\")]*$", before))
        if level == "phrase":
            opens = word.lower() in OPENING and before.lower() not in OPENING
            ends = ends or opens or bool(re.search(r"[,;:)]$", before))
        if not found or ends:
            found.append([])
        found[-1].append(word)
    return [" ".join(one) for one in found]


@dataclass(frozen=True)
class Draft:
    """An edited prompt: its pieces, what was done to it, and which pieces went or came back on the way."""

    pieces: tuple[str, ...]
    done: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    back: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The pieces as one text."""
        return " ".join(self.pieces)

    def edited(
        self, operation: Operation, deleted: Sequence[str], chance: random.Random, say: Callable[[str], str | None]
    ) -> Draft:
        """One edit more, at a place that is drawn.

        Args:
            operation: which.
            deleted: pieces that earlier edits took out.
            chance: draws places.
            say: a piece in other words; None where nobody says it.

        Returns:
            The draft as it was where the edit cannot be: the last piece stays, two are needed for a swap, and what was
            not deleted is not added.
        """
        pieces, count = list(self.pieces), len(self.pieces)
        gone, back = self.gone, self.back
        if operation == "delete" and count > 1:
            gone = (*gone, pieces.pop(chance.randrange(count)))
        elif operation == "swap" and count > 1:
            one, other = chance.sample(range(count), 2)
            pieces[one], pieces[other] = pieces[other], pieces[one]
        elif operation == "add" and deleted:
            piece = chance.choice(list(deleted))
            pieces.insert(chance.randrange(count + 1), piece)
            back = (*back, piece)
        elif operation == "paraphrase":
            place = chance.randrange(count)
            said = say(pieces[place])
            if said is None:
                return self
            pieces[place] = said
        else:
            return self
        return Draft(tuple(pieces), (*self.done, operation), gone, back)
