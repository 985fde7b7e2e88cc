"""Who is talked to in a run: models are opened when they are first asked, on one ledger and one cache of the run.

Knows no solver, method or task, and nothing of what is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from promptuary.backbones.base import Backbone, BackboneConfig
from promptuary.building import open_backbone
from promptuary.speakers.asked import Asked
from promptuary.speakers.base import Message, Speaker, SpeakerConfig
from promptuary.speakers.budget import Ledger
from promptuary.speakers.opening import open_speaker

SPENDING, ANSWERS = "spending.jsonl", "answers.sqlite"
"""What was spent, and what was answered, in the folder of the run; a run that goes on pays for nothing twice."""


class Talking:
    """The models that one run talks to."""

    def __init__(self, folder: Path, backbone: Backbone) -> None:
        """Nothing is opened and nothing written yet.

        Args:
            folder: of the run.
            backbone: its own model, which is not loaded again to be talked to.
        """
        self.folder, self.backbone = folder, backbone
        self._open: dict[tuple[str, str], Asked] = {}
        self._models: dict[str, Backbone] = {backbone.config.model: backbone}

    @cached_property
    def ledger(self) -> Ledger:
        """What was spent in this run, also before it was stopped."""
        return Ledger(self.folder / SPENDING)

    def speaker(self, config: SpeakerConfig, role: str) -> Speaker:
        """Somebody who plays a role; opened when first asked."""
        return Later(self, config, role)

    def opened(self, config: SpeakerConfig, role: str) -> Asked:
        """The same, open.

        Raises:
            SpeakerError: it does not go on from a text.
            ConfigError: no such model.
        """
        key = (role, config.model_dump_json())
        if key not in self._open:
            cache = self.folder / ANSWERS
            self._open[key] = open_speaker(config, role, self.ledger, load=self._load, cache=cache)
        return self._open[key]

    def spent(self) -> list[dict[str, Any]]:
        """What each role has spent; empty where nobody was asked."""
        return self.ledger.rows() if self._open else []

    def close(self) -> None:
        """Close connections and files."""
        for one in self._open.values():
            one.close()
        self._open.clear()

    def _load(self, config: BackboneConfig) -> Backbone:
        """A model on this machine, where the run's own is, loaded once for all roles."""
        if config.model not in self._models:
            own = self.backbone.config
            found = config.model_copy(update={"device": own.device, "dtype": own.dtype})
            self._models[config.model] = open_backbone(found)
        return self._models[config.model]


@dataclass(frozen=True)
class Later:
    """A speaker that is opened when it is first asked; see `Speaker`."""

    talking: Talking
    config: SpeakerConfig
    role: str

    @property
    def name(self) -> str:
        """As it is called at its endpoint."""
        return self.config.model

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
        """Answers of the model; see `Speaker.generate`."""
        return self.talking.opened(self.config, self.role).generate(
            messages, n=n, temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed, stop=stop
        )
