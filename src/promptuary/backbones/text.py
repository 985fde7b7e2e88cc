"""Text to token ids and back to places: templates encoded, fields cut to fit, answers as they stand behind a text.

Knows no model: only a tokenizer, and where its family puts an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from promptuary.errors import ConfigError, DataError
from promptuary.types import ANSWER, Encoded, Piece

AnswerAt = Literal["mask", "end", "target", "none"]
"""Where an answer goes: at a mask, at the end of the text, as a target of its own, or nowhere."""


class TextCoder:
    """A tokenizer with the special tokens that it puts before (`prefix`) and behind (`suffix`) a text."""

    def __init__(self, tokenizer: Any, answer_at: AnswerAt) -> None:
        """Find out the special tokens by encoding a letter with and without them."""
        self.tokenizer, self.answer_at = tokenizer, answer_at
        # asked of the tokenizer once: each answer takes it as long as a token takes us
        self._special = frozenset(tokenizer.all_special_ids)
        self._unknown, self._mask, self._sep = (
            tokenizer.unk_token_id, tokenizer.mask_token_id, tokenizer.sep_token_id
        )  # fmt: skip
        self.prefix, self.suffix = self._special_ids()

    def answer_ids(self, words: str, *, glue: str = " ") -> list[int]:
        """Token ids of an answer as it stands behind a text, [k].

        Raises:
            DataError: the answer has no tokens.
        """
        ids = self.ids_behind(words, glue=glue)
        if not ids:
            raise DataError(f"the answer {words!r} has no tokens in this vocabulary; choose other label words")
        return ids

    def ids_behind(self, words: str, *, glue: str = " ") -> list[int]:
        """Token ids of words as they stand behind a text, [k]; none where the vocabulary has nothing for them."""
        before = "a" + glue.strip(" ")
        together = self.plain_ids(f"a{glue}{words}")
        alone = self.plain_ids(before)
        return together[len(alone) :] if together[: len(alone)] == alone else self.plain_ids(words)

    def encode(self, pieces: Sequence[Piece], max_length: int) -> Encoded:
        """A filled template as token ids with special tokens; only fields are cut to make it fit.

        Args:
            pieces: fixed text, fields and slots, in order.
            max_length: most tokens of the text, special tokens included, prompt and answer not.

        Raises:
            DataError: the fixed parts alone are longer than `max_length`.
            ConfigError: there is an image among the pieces.
        """
        if any(piece.role == "image" for piece in pieces):
            raise ConfigError(
                "task.image: this model reads text, not images; use a vision or a dual model, or leave out task.image"
            )
        tokens = self._tokens(pieces)
        room = max_length - len(self.prefix) - len(self.suffix)
        counts: dict[int, int] = {}
        for item in tokens:
            if isinstance(item, tuple) and item[1] is not None:
                counts[item[1]] = counts.get(item[1], 0) + 1
        total = sum(isinstance(item, tuple) for item in tokens)
        kept, over = dict(counts), max(0, total - room)
        for _ in range(over):
            longest = max(kept, key=lambda number: kept[number], default=None)
            if longest is None or kept[longest] == 0:
                raise DataError(
                    f"the template alone has more than {max_length} tokens; "
                    "raise data.max_length or shorten task.template"
                )
            kept[longest] -= 1
        ids, segments, slots = list(self.prefix), [0] * len(self.prefix), {}
        segment, used = 0, dict.fromkeys(counts, 0)
        for item in tokens:
            if isinstance(item, str):
                slots[item] = len(ids)
                continue
            token, number = item
            if number is not None:
                used[number] += 1
                if used[number] > kept[number]:
                    continue
            if token == self._mask and self.answer_at == "mask":
                slots[ANSWER] = len(ids)
            ids.append(token)
            segments.append(segment)
            if number is None and token == self._sep:
                segment = 1
        if self.answer_at == "end":
            if not ids:
                raise DataError("an example has no tokens at all; give it a text or a template with fixed words")
            slots[ANSWER] = len(ids) - 1
        if self.answer_at != "end":
            ids, segments = ids + list(self.suffix), segments + [segment] * len(self.suffix)
        if not ids:
            raise DataError("an example has no tokens at all; give it a text or a template with fixed words")
        return Encoded(ids, segments, slots, cut=over)

    def _tokens(self, pieces: Sequence[Piece]) -> list[tuple[int, int | None] | str]:
        """(token, number of its field or None) for text, and names of slots that take no token."""
        out: list[tuple[int, int | None] | str] = []
        text, fields = "", 0
        spans: list[tuple[int, int, int]] = []
        for piece in pieces:
            if piece.role == "fixed":
                text += piece.value
                continue
            if piece.role == "field":
                spans.append((len(text), len(text) + len(piece.value), fields))
                text += piece.value
                fields += 1
                continue
            ends = piece.value in (ANSWER, "sep")
            out.extend(self._coded(text.rstrip(" ") if ends else text, spans))
            text, spans = "", []
            token = {ANSWER: self._mask if self.answer_at == "mask" else None, "sep": self._sep}.get(piece.value)
            if not ends:
                out.append(piece.value)
            elif token is not None:
                out.append((token, None))
        out.extend(self._coded(text, spans))
        return out

    def _coded(self, text: str, spans: Sequence[tuple[int, int, int]]) -> list[tuple[int, int | None]]:
        """Tokens of a text, each with the number of the field whose span (first, end, number) it is in."""
        if not text:
            return []
        coded = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True, verbose=False
        )
        out = list[tuple[int, int | None]]()
        for token, (start, end) in zip(coded["input_ids"], coded["offset_mapping"], strict=True):
            inside = next((number for low, high, number in spans if start >= low and end <= high and end > low), None)
            out.extend((known, inside) for known in self._ordinary([token]))
        return out

    def plain_ids(self, text: str) -> list[int]:
        """Token ids of a text by itself, without special tokens, also where it spells one."""
        coded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return self._ordinary(coded.input_ids)

    def _ordinary(self, ids: Sequence[int]) -> list[int]:
        """Ids of plain text. Unigram vocabularies find "</s>" and "<mask>" in it; there they are unknown words."""
        known = [token if token not in self._special else self._unknown for token in ids]
        return [token for token in known if token is not None]

    def _special_ids(self) -> tuple[list[int], list[int]]:
        """Special tokens that the tokenizer puts before and behind a text."""
        bare = self.plain_ids("a")
        full = list(self.tokenizer("a", add_special_tokens=True).input_ids)
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
        return [], []
