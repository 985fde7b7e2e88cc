"""What every model that is talked to shares: questions with keys, kept answers, counts of what became of them.

Knows no endpoint and no backbone: one of them answers in `_ask`.
"""

from __future__ import annotations

import abc
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from promptuary.errors import ConfigError
from promptuary.speakers.answers import refuses
from promptuary.speakers.base import Message, SpeakerConfig
from promptuary.speakers.budget import Account, Ledger
from promptuary.speakers.cache import Cache, Reply, question_key


@dataclass(frozen=True)
class Question:
    """A conversation, how it shall be answered, and its `key`; `tops`: how many likeliest first tokens are wanted."""

    messages: tuple[Message, ...]
    temperature: float
    top_p: float
    max_tokens: int
    seed: int | None
    stop: tuple[str, ...]
    tops: int
    key: str

    @property
    def size(self) -> int:
        """UTF-8 bytes of the conversation, which no tokenizer exceeds, with room for what a chat template adds."""
        return 64 + sum(16 + len(one["content"].encode()) for one in self.messages)


class Asked(abc.ABC):
    """A model that is talked to, with a cache and a budget."""

    def __init__(
        self, name: str, identity: Mapping[str, str], account: Account | None = None, cache: Cache | None = None
    ) -> None:
        """Name it.

        Args:
            name: in ledgers and results.
            identity: what tells it from other models, for the cache.
            account: what its requests are booked on; without one on a ledger of its own.
            cache: where answers are kept; it is closed together with this.
        """
        self._name, self.identity, self.cache = name, dict(identity), cache
        self.account = account or Ledger().account("speaker", SpeakerConfig(model=name))
        self._asked_before: Counter[str] = Counter()
        self._counting = threading.Lock()

    @property
    def name(self) -> str:
        """What it is called in ledgers and results; never holds a key."""
        return self._name

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    def close(self) -> None:
        """Let go of files and connections; they open again when they are used."""
        if self.cache is not None:
            self.cache.close()

    def generate(
        self,
        messages: Sequence[Message],
        *,
        n: int = 1,
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_tokens: int = 256,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """Answers to a conversation, see `Speaker.generate`.

        At temperature 0 all answers would be the same: one is asked for and given. The same question with the same seed
        has the same answers. Sampled without a seed it has others each time that it is asked, which a run that begins
        anew with the same cache gets in the same order; a run that goes on in the middle needs seeds for that.

        Raises:
            ConfigError: no messages, or a number that cannot be.
        """
        asked = self._question(messages, temperature, top_p, max_tokens, seed, stop)
        if n < 1:
            raise ConfigError(f"n: expected at least 1, got {n}")
        return [one.text for one in self._replies(asked, 1 if temperature == 0 else n) if self._counted(one)]

    def weighed(
        self, messages: Sequence[Message], *, max_tokens: int = 16, stop: Sequence[str] = (), tops: int = 20
    ) -> Reply | None:
        """The likeliest answer together with the likeliest first tokens, where the model tells them.

        Returns:
            None where there is no answer; `tops` are empty where the model does not tell.
        """
        asked = self._question(messages, 0.0, 1.0, max_tokens, None, stop, tops)
        return next((one for one in self._replies(asked, 1) if self._counted(one)), None)

    @abc.abstractmethod
    def _ask(self, question: Question, slots: Sequence[int]) -> Iterator[list[Reply]]:
        """Answers for these numbers of answers, in their order, as they come; each list is kept as a whole."""

    def _question(
        self,
        messages: Sequence[Message],
        temperature: float,
        top_p: float,
        max_tokens: int,
        seed: int | None,
        stop: Sequence[str],
        tops: int = 0,
    ) -> Question:
        if not messages:
            raise ConfigError("messages: expected at least one")
        if max_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
            raise ConfigError(
                "expected max_tokens of at least 1, a temperature of at least 0 and top_p above 0 and at most 1, got "
                f"{max_tokens}, {temperature} and {top_p}"
            )
        said = tuple(Message(role=one["role"], content=one["content"]) for one in messages)
        sampled = temperature > 0
        key = question_key(
            identity=self.identity,
            messages=said,
            temperature=float(temperature),
            top_p=float(top_p) if sampled else 1.0,
            max_tokens=max_tokens,
            seed=seed if sampled else None,
            stop=list(stop),
            tops=tops,
            # without a seed two roles that ask the same should not get the same answer
            role=self.account.role if sampled and seed is None else None,
        )
        return Question(said, temperature, top_p, max_tokens, seed if sampled else None, tuple(stop), tops, key)

    def _replies(self, asked: Question, count: int) -> list[Reply]:
        first = 0
        if asked.temperature > 0 and asked.seed is None:
            with self._counting:
                first = self._asked_before[asked.key]
                self._asked_before[asked.key] += count
        slots = range(first, first + count)
        found: dict[int, Reply] = {}
        if self.cache is not None:
            kept = {slot: self.cache.get(asked.key, slot) for slot in slots}
            found = {slot: one for slot, one in kept.items() if one is not None}
            self.account.note("hits", len(found))
        missing = [slot for slot in slots if slot not in found]
        if missing:
            for replies in self._ask(asked, tuple(missing)):
                new = dict(zip(missing, replies, strict=False))
                del missing[: len(new)]
                found |= new if self.cache is None else self.cache.keep(asked.key, new)
        return [found[slot] for slot in slots if slot in found]

    def _counted(self, reply: Reply) -> bool:
        """Whether it is an answer; what became of it is counted."""
        if reply.ends == "refused" or refuses(reply.text):
            self.account.note("refused")
        elif not reply.text:
            self.account.note("empty")
        return bool(reply.text) and reply.ends != "refused"


def cut(text: str, stop: Sequence[str]) -> str:
    """A text up to the first of the stops, stripped."""
    ends = [place for one in stop if one and (place := text.find(one)) >= 0]
    return text[: min(ends, default=len(text))].strip()
