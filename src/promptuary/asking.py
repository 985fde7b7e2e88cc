"""A task on a backbone: examples checked, filled into the template, and encoded.

Knows no prompt, no method and no file; runs no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from promptuary.backbones.base import Backbone
from promptuary.data.collate import Row, pad_candidates
from promptuary.data.images import picture_of
from promptuary.errors import ConfigError, DataError
from promptuary.tasks.base import Task
from promptuary.tasks.judged import JudgedTask
from promptuary.tasks.template import shown
from promptuary.types import ANSWER, Candidates, Piece, Prompt

PLACE = "prompt"
"""The place of the template where the words of a prompt go."""

T = TypeVar("T")

_STORED = {"bytes", "path"}
"""What an image is kept in where `datasets` does not decode it."""


class Asking:
    """What turns examples into rows, and the label words that answers are chosen from."""

    def __init__(
        self, backbone: Backbone, task: Task, max_length: int, words_at: Literal["front", "end"] | None = None
    ) -> None:
        """Put a task on a backbone.

        Args:
            backbone: whose tokenizer encodes.
            task: settled.
            max_length: most tokens of a text, special tokens included, those of a prompt not.
            words_at: where the words of a prompt go if the template has no `{prompt}`: before everything, in a line of
                their own, or right before the answer; None for a prompt that is not words.

        Raises:
            ConfigError: the family cannot read what the task reads, or cannot tell its label words apart.
        """
        task.for_abilities(backbone.abilities, backbone.name)
        if backbone.answer_at != "mask" and not task.template.asks_at_end:
            raise ConfigError(
                f"task.template {shown(task.template.text)} has text behind {{mask}}, but the {backbone.name} family "
                "answers at the end: end it in {mask}, or use a masked model"
            )
        if backbone.answer_at == "mask" and task.reading == "words" and "mask" not in task.template.slots:
            raise ConfigError('a masked model reads its answer at a mask: put "{mask}" into task.template')
        self.backbone, self.task, self.max_length = backbone, task, max_length
        self.words_at = words_at
        words = task.words if task.reading == "words" else ()
        self.word_ids = [backbone.answer_ids(word, glue=task.template.glue) for word in words]
        self._check_words()
        self.words: Candidates | None = pad_candidates(self.word_ids).to(backbone.device) if self.word_ids else None

    def _check_words(self) -> None:
        """Label words that become the same tokens could never be told apart."""
        known: dict[tuple[int, ...], int] = {}
        for place, tokens in enumerate(self.word_ids):
            first = known.setdefault(tuple(tokens), place)
            if first != place:
                raise ConfigError(
                    f"the label words {self.task.words[first]!r} and {self.task.words[place]!r} "
                    "are the same tokens in this model's vocabulary; choose other words"
                )

    @property
    def writes(self) -> int:
        """Most tokens of a written answer."""
        return int(getattr(self.task.config, "max_new_tokens", 20))

    # ---- examples to rows -------------------------------------------------------------------------------------------

    def mapping(self, example: Any) -> Mapping[str, Any]:
        """An example as a mapping of fields; a plain text stands for the only field.

        Where the only field is an image, a path, the bytes of a file or an image in memory stands for it.

        Raises:
            DataError: neither a mapping nor a text or an image, or a single one where there are several fields.
        """
        image = self.task.config.image
        if isinstance(example, Mapping) and not (image is not None and example.keys() == _STORED):
            return example
        if image is None and not isinstance(example, str):
            raise DataError(f"expected a text or a mapping of fields, got {type(example).__name__}")
        fields = self.task.asked(self.task.config)
        if len(fields) != 1:
            got = "a text" if isinstance(example, str) else f"one {type(example).__name__}"
            raise DataError(f"expected a mapping of the fields {', '.join(fields)}, got {got}")
        return {fields[0]: example if image is None else picture_of(example)}

    def mappings(self, examples: Any) -> list[Mapping[str, Any]]:
        """Examples as mappings of fields.

        Raises:
            DataError: no list, or names the example (from 1) that is wrong.
        """
        one_image = isinstance(examples, np.ndarray) and examples.ndim < 4
        if isinstance(examples, str | bytes | Mapping | Tensor) or one_image or not isinstance(examples, Iterable):
            kind = type(examples).__name__
            raise DataError(f"expected a list of texts or of mappings of fields, got {kind}; put it into a list")
        return [named(f"example {number}", self.mapping, one) for number, one in enumerate(examples, start=1)]

    def rows(self, examples: Iterable[Mapping[str, Any]], *, labelled: bool) -> list[Row]:
        """Encode examples.

        Raises:
            DataError: names the example (from 1) that is wrong.
        """
        return [
            named(f"example {index + 1}", self.row, example, index, labelled) for index, example in enumerate(examples)
        ]

    def row(self, example: Mapping[str, Any], index: int, labelled: bool = False) -> Row:
        """Encode an example.

        Raises:
            DataError: a field is missing or holds no text, or the label is unknown.
        """
        backbone, glue = self.backbone, self.task.template.glue
        filled = self.task.fill(example, labelled=labelled)
        target_ids = None
        if filled.answer is not None:
            ids = backbone.answer_ids(filled.answer, glue=glue)[: self.writes]
            target_ids = (*ids, backbone.tokenizer.eos_token_id)
        choices = None
        if filled.choices is not None:
            choices = tuple(tuple(backbone.answer_ids(choice, glue=glue)) for choice in filled.choices)
        pieces = filled.pieces if self.words_at is None else with_place(filled.pieces, self.words_at)
        encoded, writes = backbone.encode(pieces, self.max_length), None
        if isinstance(self.task, JudgedTask):
            writes = self.task.longest(len(backbone.text.plain_ids(self.task.source(example))))
        return Row(encoded, index, target=filled.target, target_ids=target_ids, choices=choices, writes=writes)

    # ---- prompts of words ------------------------------------------------------------------------------------------

    def spelled(self, prompt: Prompt) -> Prompt:
        """A prompt of words as tokens of this backbone, at their place; any other as it is.

        The words are encoded as they stand behind what the template has before them: nothing, a space, or anything
        else. At the front without a `{prompt}` they end in a line break.
        """
        if prompt.text is None or prompt.ids is not None:
            return prompt
        text, ids = prompt.text.strip(), list[int]()
        if text:
            fixed = self._before_words()
            if fixed is None:
                line = "" if PLACE in self.task.template.slots else "\n"
                ids = self.backbone.text.plain_ids(text + line)
            else:
                ids = self.backbone.text.ids_behind(text, glue=fixed)
        found = torch.tensor(ids, dtype=torch.long, device=self.backbone.device)
        return replace(prompt, ids=found, placement=((PLACE, len(ids)),))

    def _before_words(self) -> str | None:
        """The space right before the words of a prompt, which may be none; None at the front of everything."""
        if PLACE not in self.task.template.slots:
            return None if self.words_at == "front" else " "
        place = next(n for n, (_, name) in enumerate(self.task.template.parts) if name == PLACE)
        fixed = self.task.template.parts[place][0]
        if not place and not fixed.strip():
            return None
        return fixed[len(fixed.rstrip()) :]

    # ---- lengths ----------------------------------------------------------------------------------------------------

    def answers(self, row: Row) -> Sequence[Sequence[int]]:
        """Token ids of the possible answers to a row; none for a head and for written answers."""
        return self.word_ids if row.choices is None else row.choices

    def answer_positions(self, row: Row, writes: int | None = None) -> int:
        """Positions that an answer takes besides the text's own; a single token is read where it would stand."""
        lengths = [len(row.target_ids or ()), *map(len, self.answers(row))]
        if self.task.reading == "text" or writes is not None:
            own = self.writes if row.writes is None else row.writes
            lengths.append(own if writes is None else writes)
        longest = max(lengths)
        return {"end": longest, "mask": longest - 1}.get(self.backbone.answer_at, 0) if longest > 1 else 0

    def check_length(self, row: Row, added: int, limit: int, writes: int | None = None) -> None:
        """Refuse a text that exceeds the model's positions together with the prompt and the answer.

        Args:
            row: the encoded text.
            added: positions of the prompt.
            limit: positions of the model.
            writes: tokens that shall be written, other than the task's own number.

        Raises:
            DataError: with all numbers.
        """
        text, answer = len(row.encoded.ids), self.answer_positions(row, writes)
        if text + answer + added > limit:
            raise DataError(
                f"its {text} tokens, the prompt ({added}) and the answer ({answer}) exceed the "
                f"model's {limit} positions; shorten it to {max(0, limit - answer - added)} tokens"
            )


def named(place: str, make: Callable[..., T], *given: Any) -> T:
    """What `make` gives; its error says where it happened."""
    try:
        return make(*given)
    except DataError as error:
        raise DataError(f"{place}: {error}") from None


def with_place(pieces: Sequence[Piece], words_at: Literal["front", "end"]) -> list[Piece]:
    """A filled template with a place for the words of a prompt, and no spaces right before it."""
    found = list(pieces)
    at = next((n for n, piece in enumerate(found) if piece == Piece("slot", PLACE)), None)
    if at is None:
        answer = next((n for n, piece in enumerate(found) if piece == Piece("slot", ANSWER)), len(found))
        at = 0 if words_at == "front" else answer
        found.insert(at, Piece("slot", PLACE))
    if at and found[at - 1].role == "fixed":
        # an empty text is no piece: the token of a space would stand between two words
        found[at - 1] = Piece("fixed", found[at - 1].value.rstrip(" "))
    return found
