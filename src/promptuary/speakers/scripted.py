"""A speaker whose answers are written beforehand or come from a function: for tests, demos and known best answers.

Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from promptuary.errors import SpeakerError
from promptuary.speakers.asked import Asked, Question, cut
from promptuary.speakers.base import Message
from promptuary.speakers.budget import Account
from promptuary.speakers.cache import Cache, Reply

Answers = Callable[[Sequence[Message]], str | Sequence[str]] | Sequence[str]
"""What to answer: a function of the conversation that gives one answer or several, or answers one after the other."""


class Scripted(Asked):
    """Answers as it is told, and counts how often it was asked. Tokens are counted as words."""

    def __init__(
        self, answers: Answers, *, name: str = "scripted", account: Account | None = None, cache: Cache | None = None
    ) -> None:
        """Write the script.

        Args:
            answers: see `Answers`. A function that gives several is asked anew when they do not suffice.
            name: in ledgers and results.
            account: what its requests are booked on.
            cache: where answers are kept.
        """
        super().__init__(name, {"scripted": name}, account, cache)
        self._script = answers if callable(answers) else None
        self._listed = [] if callable(answers) else list(answers)
        self.calls = 0
        self.asked = list[tuple[Message, ...]]()

    def _ask(self, question: Question, slots: Sequence[int]) -> Iterator[list[Reply]]:
        left = len(slots)
        while left > 0:
            words = sum(len(one["content"].split()) for one in question.messages)
            ticket = self.account.reserve(words, left * question.max_tokens)
            self.calls += 1
            self.asked.append(question.messages)
            texts = self._next(question.messages, left)
            self.account.settle(ticket, words, sum(len(text.split()) for text in texts))
            left -= len(texts)
            yield [Reply(cut(text, question.stop)) for text in texts]

    def _next(self, messages: Sequence[Message], most: int) -> list[str]:
        if self._script is not None:
            said = self._script(messages)
            texts = [said] if isinstance(said, str) else list(said)[:most]
            if not texts:
                raise SpeakerError(f"{self.name}: the function gave no answer; let it give a text, be it an empty one")
            return texts
        if not self._listed:
            raise SpeakerError(f"{self.name}: the script has no further answer; write more, or use a function")
        return [self._listed.pop(0)]
