"""What can be talked to: messages in, texts out.

Knows no provider, no model and no file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, TypedDict

from pydantic import Field

from promptuary.settings import Settings


class Message(TypedDict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Speaker(Protocol):
    """A model that answers messages with texts."""

    @property
    def name(self) -> str:
        """What it is called in ledgers and results; never holds a key."""

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
        """Answers to a conversation.

        Args:
            messages: the conversation so far.
            n: how many answers; fewer come back where some were empty or refused by the server.
            temperature: 0 takes the likeliest token each time.
            top_p: mass of the likeliest tokens that are drawn from.
            max_tokens: most tokens of an answer.
            seed: what sampling is drawn from, where the model can be told.
            stop: an answer ends before any of these.

        Returns:
            At most `n` texts, stripped, none of them empty.

        Raises:
            BudgetExceeded: the next call would cost more than is allowed; nothing was asked.
            SpeakerError: the model cannot be reached, or refuses the request.
        """


def user(content: str, system: str | None = None) -> list[Message]:
    """A conversation of one question, with or without an instruction before it."""
    before: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": content}]


class SpeakerConfig(Settings):
    """Which model is talked to."""

    model: str = Field(
        min_length=1, description="name of the model at the endpoint; without base_url a causal model on this machine"
    )
    base_url: str | None = Field(
        None,
        description="an OpenAI-compatible endpoint, such as http://localhost:8000/v1; keys come from the environment",
    )
