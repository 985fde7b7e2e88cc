"""What can be wrong with an example, and what is only suspicious about a data set.

Knows no task, template or file; the task says how a question and an answer are read off an example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from promptuary.errors import DataError
from promptuary.registry import suggest
from promptuary.settings import broken

SHOWN = 5
"""Rows that a message names."""

Row = tuple[str, int, Mapping[str, Any]]
"""Where an example comes from (a name of a file or split), its number there, and its fields."""


def as_text(value: Any, field: str) -> str:
    """What a field holds, as text: a text, a number, or true or false.

    Raises:
        DataError: nothing, only white space, half a character, or a value of another kind.
    """
    # NaN, the only thing that differs from itself, is how pandas writes what is missing
    if value is None or (isinstance(value, float) and value != value):
        raise DataError(f"{field} is missing or blank")
    if not isinstance(value, str | int | float):
        raise DataError(f"{field} should be text, got {type(value).__name__}")
    text = str(value)
    if not text.strip():
        raise DataError(f"{field} is missing or blank")
    if broken(text):
        raise DataError(f"{field} holds half a character (a lone surrogate, {ascii(text)[:40]}); write it anew")
    return text


def is_missing(value: Any) -> bool:
    """Whether a field holds nothing, or white space alone."""
    if isinstance(value, str):
        return not value.strip()
    # NaN, the only thing that differs from itself, is how pandas writes what is missing
    return value is None or (isinstance(value, float) and value != value)


def as_label(value: Any, field: str, labels: Iterable[str] | None, source: str = "task.labels") -> str:
    """A label as text.

    Raises:
        DataError: no label, or one that is not among `labels`, which come from `source`.
    """
    label = as_text(value, field)
    if labels is not None and label not in labels:
        known = list(labels)
        listed = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
        raise DataError(f'unknown label "{label}"{suggest(label, known)} (labels: {listed}; they come from {source})')
    return label


def places(unit: str, numbers: Sequence[int], names: Mapping[int, str] | None = None) -> str:
    """Numbers of rows in words: `lines 3, 4, 9 and 2 more`; with `names`, these instead."""
    more = f" and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else ""
    shown = [str((names or {}).get(number, number)) for number in numbers[:SHOWN]]
    return f"{unit}{'s' if len(numbers) > 1 else ''} {', '.join(shown)}{more}"


@dataclass
class RowCheck:
    """Looks at every labelled example once, the training rows first.

    `question` and `answer` read an example or raise DataError; `labels` are the possible answers where they are a
    fixed set; without them, and if `learn_labels`, they are the answers of the training rows. `tell`: whether what
    is only odd is told. `image`: the field that holds an image.
    """

    question: Callable[[Mapping[str, Any]], tuple[str, ...]]
    answer: Callable[[Mapping[str, Any]], Any]
    labels: tuple[str, ...] | None = None
    learn_labels: bool = False
    label: str = "label"
    tell: bool = True
    image: str | None = None
    learnt: dict[str, None] = field(default_factory=dict)

    def problem(self, split: str, example: Mapping[str, Any]) -> str | None:
        """Why an example cannot be used; None if it can."""
        try:
            self.question(example)
            answer = self.answer(example)
            if self.learn_labels and split == "train":
                self.learnt[answer] = None
            elif self.learn_labels:
                as_label(answer, self.label, self.learnt, "the training data")
        except DataError as error:
            return str(error)
        return None

    def notes(
        self,
        splits: Mapping[str, Sequence[Row]],
        units: Mapping[str, str],
        names: Mapping[str, Mapping[int, str]] | None = None,
    ) -> list[str]:
        """What a person should look at: repeated rows, training rows in another split, labels that are rare or odd.

        Args:
            splits: all that could be used.
            units: what a row of each split of origin is called, such as `train.jsonl line`.
            names: of the rows of each split of origin, where they have some.
        """
        known = names or {}
        if not self.tell:
            return []
        first: dict[tuple[str, ...], Any] = {}
        again, against = list[Row](), 0
        for row in splits["train"]:
            question, answer = self.question(row[2]), self.answer(row[2])
            if question in first:
                again.append(row)
                against += first[question] != answer
            first.setdefault(question, answer)
        notes = []
        if again:
            other = f", {against} of them with another answer" if against else ""
            notes.append(f"{_count(again)} the same input as an earlier one{other}: {_where(again, units, known)}")
        seen: list[Sequence[Row]] = []
        for split in ("validation", "test"):
            if splits[split] in seen:
                continue
            seen.append(splits[split])
            leaked = [row for row in splits[split] if self.question(row[2]) in first]
            if leaked:
                notes.append(
                    f"{len(leaked)} of {len(splits[split])} {split} rows: the same input as a training row, "
                    f"so their scores flatter: {_where(leaked, units, known)}"
                )
        return [*notes, *self._label_notes(splits["train"])]

    def _label_notes(self, rows: Sequence[Row]) -> list[str]:
        found = dict.fromkeys(self.answer(row[2]) for row in rows)
        if self.labels is not None:
            absent = [label for label in self.labels if label not in found]
            return [f"no training row has the label {', '.join(absent[:SHOWN])}"] if absent else []
        if self.learn_labels and len(found) > max(SHOWN, len(rows) // 2):
            return [f"{len(found)} labels among {len(rows)} training rows: is {self.label!r} the right column?"]
        return []


def _count(rows: Sequence[Row]) -> str:
    return "1 training row has" if len(rows) == 1 else f"{len(rows)} training rows have"


def _where(rows: Sequence[Row], units: Mapping[str, str], names: Mapping[str, Mapping[int, str]]) -> str:
    by_origin: dict[str, list[int]] = {}
    for origin, number, _ in rows:
        by_origin.setdefault(origin, []).append(number)
    return "; ".join(places(units[origin], numbers, names.get(origin)) for origin, numbers in by_origin.items())
