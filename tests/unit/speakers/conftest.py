from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from promptuary.speakers.base import SpeakerConfig
from promptuary.speakers.budget import Ledger
from promptuary.speakers.cache import Cache
from promptuary.speakers.endpoint import Endpoint
from speaking_server import KEY, Chat, chatting


@pytest.fixture
def chat() -> Iterator[Chat]:
    with chatting() as server:
        yield server


@pytest.fixture
def waits() -> list[float]:
    """What an endpoint has slept."""
    return []


@pytest.fixture
def endpoint(chat: Chat, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Endpoint]]:
    """Opens endpoints on the server, which sleep in no time."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    opened = []

    def make(*, cache: Any = None, ledger: Ledger | None = None, role: str = "role", **settings: Any) -> Endpoint:
        config = SpeakerConfig(model="tiny", base_url=chat.url, **settings)
        account = (ledger or Ledger()).account(role, config)
        made = Endpoint(config, account=account, cache=None if cache is None else Cache(cache), sleep=waits.append)
        opened.append(made)
        return made

    yield make
    for one in opened:
        one.close()
