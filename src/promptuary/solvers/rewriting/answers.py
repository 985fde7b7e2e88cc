"""A prompt out of a model's answer, and whether it may be one.

Knows no model and no score. Small models talk around their answer, copy examples and drop what must stay: such answers
are counted and left out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from promptuary.speakers.answers import refuses, unquoted

SHORTEST_COPY = 5
"""Words from which on an example's text inside of a prompt counts as copied; our choice."""

_TAG = re.compile(r"<prompt>(.*?)(?:</prompt>|$)", re.IGNORECASE | re.DOTALL)
_LABEL = re.compile(
    r"^(?:here(?:'s| is)[^:\n]{0,60}:"
    r"|(?:the )?(?:new|improved|better|rewritten|revised|changed)?\s*(?:prompt|text)\s*:)\s*",
    re.IGNORECASE,
)


def plain(answer: str) -> str:
    """A text without what a model puts around it: a label, quotes, a fence; on one line."""
    return unquoted(" ".join(_LABEL.sub("", unquoted(answer), count=1).split()))


def prompt_in(answer: str) -> str:
    """The prompt in an answer: what stands between the marks, or all of it but labels and quotes; "" where none is."""
    found = _TAG.search(answer)
    if found is not None:
        text = plain(found.group(1))
    else:
        # what comes behind the first paragraph is talk
        text = plain(re.split(r"\n\s*\n", _LABEL.sub("", unquoted(answer), count=1).strip())[0])
    text = re.sub(r"</?prompt>", " ", text, flags=re.IGNORECASE)
    return "" if refuses(text) else " ".join(text.split())


class Gate:
    """What a prompt must be to be scored at all; every refusal is counted with its reason."""

    def __init__(self, *, keep: Sequence[str], longest: int, examples: Iterable[str]) -> None:
        """Of a search.

        Args:
            keep: texts that stand in every prompt.
            longest: most words of one.
            examples: texts of labelled examples, none of which may be copied.
        """
        self.keep, self.longest = [_joined(one) for one in keep], longest
        folded = (_folded(text) for text in examples)
        self.copies = [f" {text} " for text in folded if len(text.split()) >= SHORTEST_COPY]

    def fault(self, text: str) -> str | None:
        """Why a text may not be a prompt: empty of words, long, lost (what must stay) or copied (an example).

        None if it may.
        """
        if not re.search(r"\w", text):
            return "empty"
        if len(text.split()) > self.longest:
            return "long"
        if any(one not in text for one in self.keep):
            return "lost"
        folded = f" {_folded(text)} "
        return "copied" if any(one in folded for one in self.copies) else None

    def prompts(self, answers: Iterable[str], known: Sequence[str], refused: Counter[str]) -> list[str]:
        """The prompts in some answers, each once and none of those known; `refused` counts the others by reason."""
        found: list[str] = []
        for answer in answers:
            text = prompt_in(answer)
            fault = self.fault(text) or ("same" if text in known or text in found else None)
            if fault is None:
                found.append(text)
            else:
                refused[fault] += 1
        return found


def _joined(text: str) -> str:
    return " ".join(text.split())


def _folded(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
