"""Answers to encoded examples: rows of any prompts on one backbone in common batches, each decoded by its own task.

Knows no file, no optimiser, and no method, family or task by name.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from promptuary.asking import named
from promptuary.data.collate import Row, collate, pad_choices
from promptuary.errors import ConfigError
from promptuary.passes import outputs, placed
from promptuary.tasks.judged import JudgedTask
from promptuary.types import Batch, Candidates, Prediction

if TYPE_CHECKING:
    from promptuary.tuned import Tuned


@dataclass(frozen=True, eq=False)
class Answerer:
    """A prompt in use, with what is asked of it once per call: its form for the probe, and its number of positions."""

    tuned: Tuned
    added: int
    prefix: int

    @classmethod
    def of(cls, tuned: Tuned) -> Answerer:
        """Look at a prompt, which should be in evaluation."""
        rows, prefix = tuned.lengths
        return cls(tuned, rows + prefix, prefix)


@dataclass(frozen=True, eq=False)
class Question:
    """An encoded example, and the prompt that answers it."""

    answerer: Answerer
    row: Row
    example: Mapping[str, Any]

    @property
    def length(self) -> int:
        """Positions of text and prompt."""
        return len(self.row.encoded.ids) + self.answerer.added


Check = Callable[[], None] | None
"""Called before each batch; may raise to stop."""


def check_lengths(questions: Sequence[Question], what: str, writes: Sequence[int | None] | None = None) -> None:
    """Refuse texts that exceed the model's positions together with the prompt and the answer.

    Args:
        questions: of one backbone.
        what: the name of a question in messages.
        writes: tokens that shall be written behind each; default: what its task writes, if it does.

    Raises:
        DataError: names the first such question, from 1.
    """
    limit = questions[0].answerer.tuned.backbone.max_positions if questions else None
    if limit is None:
        return
    own = [None] * len(questions) if writes is None else writes
    for number, (one, most) in enumerate(zip(questions, own, strict=True), start=1):
        asking = one.answerer.tuned.asking
        named(f"{what} {number}", asking.check_length, one.row, one.answerer.added, limit, most)


@torch.no_grad()
def predictions(
    questions: Sequence[Question], batch_size: int, batch_tokens: int | None = None, *, check: Check = None
) -> list[Prediction]:
    """Answers in the order of the questions.

    Args:
        questions: of one backbone, of any tasks.
        batch_size: most questions that run together.
        batch_tokens: most positions that run together, padding included; a single question may have more.
        check: called before each batch.

    Raises:
        ConfigError: batch_size or batch_tokens is no whole number of at least 1.
    """
    found: list[Prediction | None] = [None] * len(questions)
    kinds = [_kind(one) for one in questions]
    for places in _batches(questions, kinds, batch_size, batch_tokens):
        if check is not None:
            check()
        chosen = [questions[place] for place in places]
        tasks = [one.answerer.tuned.task for one in chosen]
        if isinstance(tasks[0], JudgedTask):
            answers = chosen[0].answerer.tuned.judging.answers(chosen, check)
        elif tasks[0].reading == "text":
            texts = _write(chosen, chosen[0].answerer.tuned.asking.writes)
            answers = [task.decode_text(text) for task, text in zip(tasks, texts, strict=True)]
        else:
            scores = _scores(chosen)
            answers = [task.decode(own, one.example) for task, own, one in zip(tasks, scores, chosen, strict=True)]
        for place, answer in zip(places, answers, strict=True):
            found[place] = answer
    return [answer for answer in found if answer is not None]


@torch.no_grad()
def texts(
    questions: Sequence[Question],
    batch_size: int,
    batch_tokens: int | None = None,
    *,
    writes: Sequence[int],
    **options: Any,
) -> list[str]:
    """What the model writes behind each question, in their order.

    Args:
        questions: of one backbone, of any tasks.
        batch_size: most questions that run together.
        batch_tokens: most positions that run together, padding included; a single question may have more.
        writes: most tokens behind each.
        options: of the model's own `generate`.

    Raises:
        SiteError: the family does not write.
        ConfigError: batch_size or batch_tokens is no whole number of at least 1.
    """
    found = [""] * len(questions)
    kinds = [("text", limit, *_same(one)) for one, limit in zip(questions, writes, strict=True)]
    for places in _batches(questions, kinds, batch_size, batch_tokens):
        written = _write([questions[place] for place in places], writes[places[0]], **options)
        for place, text in zip(places, written, strict=True):
            found[place] = text
    return found


# ---- what runs together ----------------------------------------------------------------------------------------------


def _kind(one: Question) -> Hashable:
    """Questions of one kind are read in one pass."""
    asking = one.answerer.tuned.asking
    if isinstance(asking.task, JudgedTask):
        # judges are of a prompt
        return ("judged", id(one.answerer.tuned.judging))
    if asking.task.reading == "text":
        # beams and sampling depend on the limit, and a short answer should not wait for a long one
        return ("text", asking.writes, *_same(one))
    several = any(len(answer) > 1 for answer in asking.answers(one.row))
    return (asking.task.reading, several, *_same(one))


def _same(one: Question) -> tuple[Hashable, ...]:
    """What rows of one batch must have in common: named places, and prefixes where these do not mix."""
    mixes = one.answerer.tuned.backbone.mixes_prefixes
    return (frozenset(one.row.encoded.slots), None if mixes else one.answerer.prefix)


def _batches(
    questions: Sequence[Question], kinds: Sequence[Hashable], size: int, tokens: int | None
) -> Iterator[list[int]]:
    """Places of the questions that run together: of one kind and similar length, the longest first.

    Raises:
        ConfigError: a bound is no whole number of at least 1.
    """
    for name, bound in (("batch_size", size), ("batch_tokens", 1 if tokens is None else tokens)):
        if not isinstance(bound, int) or isinstance(bound, bool) or bound < 1:
            raise ConfigError(f"{name}: expected a whole number of at least 1, got {bound!r}")
    groups: dict[Hashable, list[int]] = {}
    for place, kind in enumerate(kinds):
        groups.setdefault(kind, []).append(place)
    for group in groups.values():
        order = sorted(group, key=lambda place: -questions[place].length)  # memory errors come early
        start = 0
        while start < len(order):
            longest = questions[order[start]].length
            count = size if tokens is None else max(1, min(size, tokens // longest))
            yield order[start : start + count]
            start += count


def _batch(chosen: Sequence[Question]) -> tuple[Batch, dict[Answerer, list[int]]]:
    """One batch, and the rows of each prompt."""
    backbone = chosen[0].answerer.tuned.backbone
    bare = [Row(one.row.encoded, one.row.index) for one in chosen]
    rows: dict[Answerer, list[int]] = {}
    for place, one in enumerate(chosen):
        rows.setdefault(one.answerer, []).append(place)
    return collate(bare, backbone.pad, segments=backbone.uses_segments, sight=backbone.sight).to(backbone.device), rows


# ---- what they are read with -----------------------------------------------------------------------------------------


def _scores(chosen: Sequence[Question]) -> list[list[float]]:
    """What each task reads: a score per label or choice, or the numbers of its head."""
    batch, rows = _batch(chosen)
    answers = [one.answerer.tuned.asking.answers(one.row) for one in chosen]
    if chosen[0].answerer.tuned.task.reading == "words":
        batch = replace(batch, candidates=_candidates(chosen, answers).to(batch.input_ids.device))
    said = outputs(batch, [(answerer.tuned, mine) for answerer, mine in rows.items()])
    found: list[list[float]] = [[] for _ in chosen]
    for (answerer, mine), own in zip(rows.items(), said, strict=True):
        for place, numbers in zip(mine, answerer.tuned.decided(own).float().tolist(), strict=True):
            found[place] = numbers[: len(answers[place])] if answers[place] else numbers
    return found


def _candidates(chosen: Sequence[Question], answers: Sequence[Sequence[Sequence[int]]]) -> Candidates:
    """The same for all rows where that is so, else each row its own."""
    words = chosen[0].answerer.tuned.asking.words
    same = all(own is answers[0] for own in answers)
    return words if same and words is not None and chosen[0].row.choices is None else pad_choices(answers)


def _write(chosen: Sequence[Question], limit: int, **options: Any) -> list[str]:
    batch, rows = _batch(chosen)
    batch, prompts, _ = placed(batch, [(answerer.tuned, mine) for answerer, mine in rows.items()])
    backbone = chosen[0].answerer.tuned.backbone
    written = backbone.generate(batch, prompts, max_new_tokens=limit, **options)
    decoded: list[str] = backbone.tokenizer.batch_decode(written, skip_special_tokens=True)
    return decoded
