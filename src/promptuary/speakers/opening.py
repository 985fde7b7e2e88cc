"""From settings to a model that is talked to, at an endpoint or on this machine.

Knows no method and no task; how a backbone is loaded is told by the caller.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from promptuary.backbones.base import Backbone, BackboneConfig
from promptuary.errors import ConfigError
from promptuary.speakers.asked import Asked
from promptuary.speakers.base import SpeakerConfig
from promptuary.speakers.budget import Ledger
from promptuary.speakers.cache import Cache
from promptuary.speakers.endpoint import Endpoint
from promptuary.speakers.local import Local


def open_speaker(
    config: SpeakerConfig,
    role: str,
    ledger: Ledger,
    *,
    load: Callable[[BackboneConfig], Backbone] | None = None,
    cache: Path | None = None,
) -> Asked:
    """A model to talk to; `close` it in the end.

    Args:
        config: which one.
        role: who asks, for the ledger.
        ledger: what requests are booked on.
        load: opens a backbone for a model on this machine.
        cache: where answers are kept if the settings name no file.

    Raises:
        ConfigError: a model on this machine, and nothing that loads it.
        SpeakerError: the model on this machine does not go on from a text.
    """
    named = cache if config.cache is None else Path(config.cache).expanduser()
    account = ledger.account(role, config)
    kept = None if named is None else Cache(named)
    if config.base_url is not None:
        return Endpoint(config, account=account, cache=kept)
    if load is None:
        raise ConfigError(f"{role}: {config.model} has no base_url; name an endpoint such as http://localhost:8000/v1")
    return Local(load(BackboneConfig(model=config.model, family="causal")), account=account, cache=kept)
