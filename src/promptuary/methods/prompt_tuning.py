"""Prompt tuning (Lester, Al-Rfou, Constant 2021, arXiv 2104.08691): trained rows in front of the input.

Knows no backbone; the rows are all it has.

Notation: P [l, d] the prompt. X = [P ; E].
"""

from __future__ import annotations

from typing import ClassVar, Literal, cast

from pydantic import Field

from promptuary.methods.base import Method, MethodConfig
from promptuary.prompts.init import Starting
from promptuary.types import Prompt, Shape, View


class PromptTuningConfig(MethodConfig):
    """Settings of prompt tuning."""

    name: Literal["prompt_tuning"] = "prompt_tuning"
    num_virtual_tokens: int = Field(20, ge=1, description="l, rows of the prompt; Lester et al. 2021: 20 to 100")


class PromptTuning(Method):
    """One table of trained rows."""

    name = "prompt_tuning"
    title = "Prompt tuning"
    paper = "arXiv 2104.08691"
    tiny: ClassVar = {"num_virtual_tokens": 4}
    groups: ClassVar = {"rows": "prompt"}
    Config = PromptTuningConfig

    @property
    def settings(self) -> PromptTuningConfig:
        """The settings with their own type."""
        return cast(PromptTuningConfig, self.config)

    def build(self) -> None:
        """P [l, d]."""
        self.rows = self.parameter(self.settings.num_virtual_tokens, self.shape.width)

    def fill(self, source: Starting) -> None:
        """Rows of the vocabulary, of a text, or random, as `init` says."""
        self.rows.copy_(self.first_rows(len(self.rows), source))

    def prompt(self, view: View) -> Prompt:
        """P itself."""
        return Prompt(rows=self.rows[None], placement=self.config.placement)

    @classmethod
    def count(cls, config: MethodConfig, shape: Shape) -> int:
        """L d."""
        return cast(PromptTuningConfig, config).num_virtual_tokens * shape.width

    @classmethod
    def match_budget(cls, config: MethodConfig, length: int, shape: Shape) -> MethodConfig:
        """L = length."""
        return config.model_copy(update={"num_virtual_tokens": length})
