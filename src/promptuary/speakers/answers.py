"""Reading what a model said: a label, a list of candidates, or nothing of use.

Knows no model and no task; labels come in as words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

_EDGES = " \t\r\n.,;:!?\"'`*_#()[]{}<>«»“”‘’„-"  # noqa: RUF001 (quotation marks of many languages)

_CANNOT = r"(?:can\s?not|can['’]?t|could\s?n['’]?t|unable|not able|won['’]?t|will not|must decline)\b"  # noqa: RUF001
_HELP = r"(?:help|assist|comply|do|fulfil|fulfill|provide|answer|continue|create|write|generate|engage|support)\b"
_REFUSAL = re.compile(
    rf"^\W*(?:(?:i['’]?m|i am|we['’]?re|we are)\s+(?:\w+\s+){{0,2}}sorry\b[^.]{{0,30}}\b{_CANNOT}"  # noqa: RUF001
    rf"|(?:sorry|apologies|unfortunately)\b[^.]{{0,20}}\b(?:i|we)\s+(?:\w+\s+)?{_CANNOT}"
    rf"|(?:(?:i['’]?m|i am|we are)\s+)?(?:i\s+|we\s+)?{_CANNOT}\s+(?:to\s+)?{_HELP}"  # noqa: RUF001
    rf"|as an ai\b[^.]*\b{_CANNOT})",
    re.IGNORECASE,
)

_ITEM = re.compile(
    r"^\s*(?:\(?\d{1,3}[.):]|[-*•–]|(?:prompt|variant|candidate|option|version)\s+\d{1,3}\s*[:.)-])(?:\s+|$)",  # noqa: RUF001
    re.IGNORECASE,
)

_QUOTES = {'"': '"', "'": "'", "`": "`", "“": "”", "‘": "’", "«": "»", "„": "“"}  # noqa: RUF001


def refuses(text: str) -> bool:
    """Whether a text declines to answer; looks at how it begins, in English."""
    return bool(_REFUSAL.match(text))


def bare(text: str) -> str:
    """A text as it is compared: lower case, single spaces, without marks at its edges."""
    return " ".join(text.casefold().split()).strip(_EDGES)


def label_in(text: str, labels: Sequence[str]) -> int | None:
    """Which label an answer means: the one that it is, else the only one that stands in it as a whole word.

    "Positive." is positive; "not negative but positive" names two and is none; a label inside a longer label that
    stands there ("positive" in "very positive") is not counted. Negation is not understood.

    Args:
        text: of the model.
        labels: words of each label.

    Returns:
        The place of the label; None if there is none or more than one.
    """
    said, known = bare(text), [bare(label) for label in labels]
    if said in known:
        found = [place for place, one in enumerate(known) if one == said]
        return found[0] if len(found) == 1 and said else None
    spans = [
        (match.start(), match.end(), place)
        for place, one in enumerate(known)
        if one
        for match in re.finditer(rf"(?<!\w){re.escape(one)}(?!\w)", said)
    ]
    whole = {
        place
        for start, end, place in spans
        if not any(low <= start and end <= high and high - low > end - start for low, high, _ in spans)
    }
    return whole.pop() if len(whole) == 1 else None


def unquoted(text: str) -> str:
    """A text without the quotation marks or code marks around the whole of it."""
    text = text.strip()
    fence = re.fullmatch(r"```\w*\n(.*?)\n?```", text, re.DOTALL)
    if fence is not None:
        text = fence[1].strip()
    while len(text) >= 2 and _QUOTES.get(text[0]) == text[-1] and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    return text


def listed(text: str) -> list[str]:
    """Candidates in an answer: the items of a numbered or dotted list or of a JSON array, or the whole of it.

    Words before the first item ("Here are three:") are left out, lines behind an item that are no item belong to it,
    quotation marks go, and so do items that are empty, stand there twice or refuse.
    """
    text = unquoted(text)
    items: list[str] = []
    if text.startswith("["):
        try:
            parsed = json.loads(text)
        except ValueError:
            parsed = None
        if isinstance(parsed, list):
            items = [one for one in parsed if isinstance(one, str)]
    if not items:
        lines = text.splitlines()
        if any(_ITEM.match(line) for line in lines):
            for line in lines:
                if (mark := _ITEM.match(line)) is not None:
                    items.append(line[mark.end() :])
                elif items:
                    items[-1] += "\n" + line
        else:
            items = [text]
    cleaned = [unquoted(re.sub(r"^\*\*(.+)\*\*$", r"\1", one.strip(), flags=re.DOTALL)) for one in items]
    return list(dict.fromkeys(one for one in cleaned if one and not refuses(one)))


@dataclass
class Reader:
    """Reads answers and counts those that were none: `asked` of them in all."""

    asked: int = 0
    empty: int = 0
    refused: int = 0
    unparsed: int = 0

    def label(self, text: str | None, labels: Sequence[str]) -> int | None:
        """As `label_in`; None, counted, for what is no label."""
        found = None if text is None else label_in(text, labels)
        self._count(text, found is not None)
        return found

    def candidates(self, text: str | None) -> list[str]:
        """As `listed`; empty, counted, for what holds none."""
        found = [] if text is None else listed(text)
        self._count(text, bool(found))
        return found

    def _count(self, text: str | None, read: bool) -> None:
        self.asked += 1
        if text is None or not text.strip():
            self.empty += 1
        elif not read and refuses(text):
            self.refused += 1
        elif not read:
            self.unparsed += 1
