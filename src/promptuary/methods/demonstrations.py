"""In-context demonstrations (Brown et al. 2020, arXiv 2005.14165): solved training examples before the question.

Knows no model and no task: how an example is asked with its answer comes from outside.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field

from promptuary.methods.words import Draw, TextConfig, TextMethod


class DemonstrationsConfig(TextConfig):
    """Settings of in-context demonstrations."""

    name: Literal["demonstrations"] = "demonstrations"
    count: int = Field(4, ge=1, description="k, examples that are shown; Brown et al. 2020: as many as fit")
    separator: Literal["line", "empty_line", "space"] = Field(
        "line", description="what stands between two of them: a line break, an empty line, or a space; our choice"
    )
    draws: int = Field(
        1, ge=1, description="random draws of examples that are tried; the best one is kept; 1 is the usual baseline"
    )


class Demonstrations(TextMethod):
    """Training examples with their answers, drawn by chance."""

    name = "demonstrations"
    title = "In-context demonstrations"
    paper = "arXiv 2005.14165"
    tiny: ClassVar[Mapping[str, Any]] = {"count": 2, "draws": 2}
    Config = DemonstrationsConfig

    @property
    def settings(self) -> DemonstrationsConfig:
        """The settings with their own type."""
        return cast(DemonstrationsConfig, self.config)

    def proposal(self, number: int, draw: Draw) -> str | None:
        """So many examples in random order, after the instruction of `init_text` where there is one."""
        if number >= self.settings.draws:
            return None
        order = torch.randperm(len(draw.examples), generator=draw.generator)[: self.settings.count].tolist()
        shown = [draw.shown(draw.examples[place]) for place in order]
        before = [self.config.init_text] if self.config.init_text else []
        return {"line": "\n", "empty_line": "\n\n", "space": " "}[self.settings.separator].join([*before, *shown])
