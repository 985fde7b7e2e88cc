"""Prompts by hand: words that somebody wrote, or the best of several that somebody wrote.

Knows no model and no search; an instruction is one that stands before everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, cast

from pydantic import Field

from promptuary.methods.words import Draw, TextConfig, TextMethod
from promptuary.prompts.init import Starting


class ManualConfig(TextConfig):
    """Settings of prompts by hand."""

    name: Literal["manual"] = "manual"
    texts: tuple[str, ...] = Field(
        (), description="the prompts; each is tried on the training examples, and the best one is kept; our choice"
    )


class Manual(TextMethod):
    """One of the texts of the settings."""

    name = "manual"
    title = "Manual prompt"
    paper = "none"
    tiny: ClassVar[Mapping[str, Any]] = {"texts": ("was it good", "was it bad", "red or blue")}
    Config = ManualConfig

    @property
    def settings(self) -> ManualConfig:
        """The settings with their own type."""
        return cast(ManualConfig, self.config)

    @property
    def candidates(self) -> tuple[str, ...]:
        """All texts, that to start from first."""
        first = () if self.config.init_text is None else (self.config.init_text,)
        return (*first, *self.settings.texts)

    def fill(self, source: Starting) -> None:
        """The first text."""
        self.text = next(iter(self.candidates), "").strip()

    def proposal(self, number: int, draw: Draw) -> str | None:
        """The texts in their order."""
        return self.candidates[number].strip() if number < len(self.candidates) else None
