"""A causal model on this machine that is talked to like any other.

Knows no file and no method; the backbone comes loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jinja2
import torch

from promptuary.backbones.base import Backbone
from promptuary.errors import SpeakerError
from promptuary.speakers.asked import Asked, Question, cut
from promptuary.speakers.base import Message
from promptuary.speakers.budget import Account
from promptuary.speakers.cache import Cache, Reply
from promptuary.types import ANSWER, Batch, Prompt

_SPOKEN = {"system": "Instruction", "user": "User", "assistant": "Assistant"}
"""How turns are called in a transcript, for models without a chat template; our choice."""


class Local(Asked):
    """A backbone that writes, asked by messages."""

    def __init__(self, backbone: Backbone, *, account: Account | None = None, cache: Cache | None = None) -> None:
        """Talk to a backbone.

        Args:
            backbone: causal; its prompt-free model answers.
            account: what its requests are booked on.
            cache: where answers are kept.

        Raises:
            SpeakerError: the family does not go on from a text.
        """
        if "generate" not in backbone.abilities or backbone.answer_at != "end":
            raise SpeakerError(
                f"{backbone.config.model} ({backbone.name}) does not go on from a text; talk to a causal model"
            )
        super().__init__(backbone.config.model, backbone.identity, account, cache)
        self.backbone = backbone

    def _ask(self, question: Question, slots: Sequence[int]) -> Iterator[list[Reply]]:
        backbone, tokenizer = self.backbone, self.backbone.tokenizer
        ids, most = self._ids(question.messages), question.max_tokens
        limit = backbone.max_positions
        if limit is not None:
            most = min(most, limit - len(ids))
            if most < 1:
                raise SpeakerError(
                    f"{self.name}: the question has {len(ids)} tokens and the model {limit} positions; ask less"
                )
        row = torch.tensor(ids, device=backbone.device).expand(len(slots), -1)
        at = torch.full((len(slots),), len(ids) - 1, device=row.device)
        batch = Batch(row, torch.ones_like(row), torch.arange(len(slots), device=row.device), slots={ANSWER: at})
        options: dict[str, Any] = {"do_sample": False}
        if question.temperature > 0:
            # every other rule of the model's own settings is off
            sampled = {"temperature": question.temperature, "top_p": question.top_p, "top_k": 0}
            options = {"do_sample": True, **sampled}
        ticket = self.account.reserve(len(ids) * len(slots), most * len(slots))
        devices = [backbone.device] if backbone.device.type == "cuda" else []
        # without a seed of the caller's the question itself decides, so that a run is repeatable
        seed = int(question.key[:12], 16) if question.seed is None else question.seed
        try:
            with torch.random.fork_rng(devices):
                torch.manual_seed(seed + slots[0])
                written = backbone.generate(batch, Prompt(), max_new_tokens=most, **options)
        except BaseException:
            self.account.release(ticket)
            raise
        self.account.settle(ticket, len(ids) * len(slots), sum(map(len, written)))
        texts = tokenizer.batch_decode(written, skip_special_tokens=True)
        ends = ["length" if len(one) >= most else "stop" for one in written]
        yield [Reply(cut(text, question.stop), end) for text, end in zip(texts, ends, strict=True)]

    def _ids(self, messages: Sequence[Message]) -> list[int]:
        """The conversation as token ids, ending where the answer begins."""
        tokenizer = self.backbone.tokenizer
        if not tokenizer.chat_template:
            return [*self.backbone.prefix, *self._plain(transcript(messages))]
        for turns in (list(messages), without_system(messages)):  # some templates know no system message
            try:
                text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            except jinja2.TemplateError as error:
                reason = str(error)
            else:
                return list(tokenizer(text, add_special_tokens=False).input_ids)
        raise SpeakerError(f"{self.name}: its chat template does not take these messages: {reason}")

    def _plain(self, text: str) -> list[int]:
        return list(self.backbone.tokenizer(text, add_special_tokens=False).input_ids)


def transcript(messages: Sequence[Message]) -> str:
    """A conversation as plain text that ends where the answer begins."""
    turns = [f"{_SPOKEN[one['role']]}: {one['content']}" for one in messages]
    return "\n\n".join([*turns, f"{_SPOKEN['assistant']}:"])


def without_system(messages: Sequence[Message]) -> list[Message]:
    """The same with the system message at the head of the first question."""
    system = [one["content"] for one in messages if one["role"] == "system"]
    rest = [Message(role=one["role"], content=one["content"]) for one in messages if one["role"] != "system"]
    if system and rest:
        rest[0]["content"] = "\n\n".join([*system, rest[0]["content"]])
    return rest
