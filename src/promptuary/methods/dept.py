"""DePT, decomposed prompt tuning (Shi, Lipani, ICLR 2024, arXiv 2309.05173): a short prompt and a low-rank offset.

Knows no backbone: it gives rows and an offset table, and somebody else places them.

Notation: P_s [s, d] short prompt; A [m, r], B [r, d] low-rank pair; gamma = alpha / sqrt(r).
E~ = E + gamma A B by position of the token in the source; X = [P_s ; E~].
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, cast

from pydantic import Field

from promptuary.methods.base import Method, MethodConfig, check_size
from promptuary.prompts.blocks import kaiming_uniform
from promptuary.prompts.init import Starting
from promptuary.types import Offset, OffsetAlign, OffsetOverflow, Prompt, Shape, View


class DePTConfig(MethodConfig):
    """Settings of DePT."""

    name: Literal["dept"] = "dept"
    num_virtual_tokens: int = Field(60, ge=0, description="s, rows of the short prompt; released runs: 40 to 80")
    rank: int = Field(30, ge=0, description="r of the low-rank pair; released runs: 15 to 45")
    max_tokens: int = Field(256, ge=1, description="m, positions of the source that get an offset; released runs: 256")
    lowrank_scale: Literal["alpha", "one"] = Field(
        "alpha", description='gamma: "alpha" is alpha / sqrt(r) (released code), "one" is 1 (the paper\'s formula)'
    )
    alpha: float = Field(8.0, gt=0, description="alpha of gamma; released code: 8")
    low_rank_lr: float = Field(5e-4, gt=0, description="learning rate of A and B; released runs: 1e-4 to 5e-3")
    offset_align: OffsetAlign = Field(
        "token", description='count source tokens ("token", our choice) or columns ("slot", released code)'
    )
    offset_overflow: OffsetOverflow = Field(
        "zero", description="offset of tokens beyond max_tokens: none (our choice), the last row, or an error"
    )


class DePT(Method):
    """A short prompt, and one low-rank table added to the text embeddings by position."""

    name = "dept"
    title = "DePT"
    paper = "arXiv 2309.05173"
    sites = frozenset({"input", "offset"})
    tiny: ClassVar = {"num_virtual_tokens": 3, "rank": 2, "max_tokens": 24, "low_rank_lr": 5e-3}
    groups: ClassVar = {"rows": "prompt", "a": "low_rank", "b": "low_rank"}
    Config = DePTConfig

    @property
    def settings(self) -> DePTConfig:
        """The settings with their own type."""
        return cast(DePTConfig, self.config)

    def build(self) -> None:
        """P_s [s, d], A [m, r], B [r, d]."""
        c, d = self.settings, self.shape.width
        self.rows = self.parameter(c.num_virtual_tokens, d)
        self.a = self.parameter(c.max_tokens, c.rank)
        self.b = self.parameter(c.rank, d)

    def fill(self, source: Starting) -> None:
        """P_s as `init` says; A Kaiming-uniform; B zero, so that nothing is added at the start."""
        self.rows.copy_(self.first_rows(len(self.rows), source))
        self.a.copy_(kaiming_uniform(self.settings.max_tokens, self.settings.rank, source.generator))

    def prompt(self, view: View) -> Prompt:
        """P_s and gamma A B."""
        c = self.settings
        # gamma = alpha / sqrt(r); r = 0 has no table
        gamma = 1.0 if c.lowrank_scale == "one" else c.alpha / math.sqrt(max(c.rank, 1))
        offset = Offset(gamma * self.a, self.b, c.offset_align, c.offset_overflow) if c.rank else None
        rows = self.rows[None] if len(self.rows) else None
        return Prompt(rows=rows, offset=offset, placement=c.placement)

    @classmethod
    def count(cls, config: MethodConfig, shape: Shape) -> int:
        """S d + r (m + d)."""
        c = cast(DePTConfig, config)
        return c.num_virtual_tokens * shape.width + c.rank * (c.max_tokens + shape.width)

    @classmethod
    def match_budget(cls, config: MethodConfig, length: int, shape: Shape) -> MethodConfig:
        """The largest r with s d + r (m + d) <= length d."""
        c, d = cast(DePTConfig, config), shape.width
        check_size(c.num_virtual_tokens * d, length * d, length, "lower method.num_virtual_tokens")
        return c.model_copy(update={"rank": (length - c.num_virtual_tokens) * d // (c.max_tokens + d)})
