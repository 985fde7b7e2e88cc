"""What can be talked to: messages in, texts out.

Knows no provider, no model and no file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, TypedDict
from urllib.parse import urlsplit

from pydantic import (
    Field,
    SerializationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from promptuary.settings import Settings

HASHED = "hashed"
"""Set in the context of `model_dump`, it leaves only what answers depend on."""


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


class EndpointConfig(Settings):
    """Where a model is talked to, how patiently, and what it may cost; a key is never among the settings."""

    base_url: str | None = Field(
        None,
        description="an OpenAI-compatible endpoint, such as http://localhost:8000/v1; keys come from the environment",
    )
    api_key_env: str = Field(
        "OPENAI_API_KEY", description="the environment variable that holds the key; servers without keys need none"
    )
    timeout: float = Field(60.0, gt=0, description="seconds until an answer must be there, whole; our choice")
    retries: int = Field(
        5, ge=0, le=100, description="further tries after 429, 5xx, a time-out or a broken answer; our choice"
    )
    patience: float = Field(
        120.0, ge=0, description="longest wait before a further try, in seconds, also if the server asks for more"
    )
    requests_per_minute: float | None = Field(None, gt=0, description="no more than this many; None is no limit")
    parallel: int = Field(
        4, ge=1, le=256, description="questions that are on their way at once where many are asked; our choice"
    )
    budget_calls: int | None = Field(None, ge=0, description="most requests, further tries included")
    budget_tokens: int | None = Field(None, ge=0, description="most tokens, in and out together")
    budget_money: float | None = Field(None, ge=0, description="most money, in the unit of the prices")
    price_in: float | None = Field(None, ge=0, description="price of a million tokens that are asked")
    price_out: float | None = Field(None, ge=0, description="price of a million tokens that are answered")
    cache: str | None = Field(
        None, description="file in which answers are kept, so that the same question is paid once; may be shared"
    )

    matters: ClassVar[frozenset[str]] = frozenset({"model", "base_url"})
    """What answers depend on: the rest may change between a run and its continuation."""

    @field_validator("base_url")
    @classmethod
    def _plain_address(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError("expected an address such as http://localhost:8000/v1")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError("expected an address without user, key or anything behind it; keys come from api_key_env")
        return value.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def _name_only(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,99}", value):  # the value may be a key: it is not shown
            raise ValueError(
                "expected the NAME of an environment variable in capitals, such as OPENAI_API_KEY, not the key"
            )
        return value

    @model_validator(mode="after")
    def _priced(self) -> EndpointConfig:
        if self.budget_money is not None and (self.price_in is None or self.price_out is None):
            raise ValueError("budget_money needs price_in and price_out")
        return self

    @model_serializer(mode="wrap")
    def _for_hash(self, handler: Callable[[Any], Any], info: SerializationInfo) -> dict[str, Any]:
        whole: dict[str, Any] = handler(self)
        if isinstance(info.context, Mapping) and info.context.get(HASHED):
            return {name: value for name, value in whole.items() if name in self.matters}
        return whole


class SpeakerConfig(EndpointConfig):
    """Which model is talked to."""

    model: str = Field(
        min_length=1, description="name of the model at the endpoint; without base_url a causal model on this machine"
    )
