"""LAMP (arXiv 2502.12200, NAACL 2025): a prompt as trained SVD factors, multiplied out and averaged over rows.

Knows no backbone. A reconstruction from the abstract and secondary digests: docs/methods/lamp.md lists what is open.

Notation: P0 [l, d] the starting prompt, P0 ~ U diag(q) V with U [l, r], q [r], V [r, d].
M = U diag(q), I = V; C = sum_i M[:, i] (outer) I[i, :] = M I; P* = AvgPool_p(C) over rows, [ceil(l / p), d].
"""

from __future__ import annotations

from typing import ClassVar, Literal, cast

from pydantic import Field
from torch import Tensor

from promptuary.errors import ConfigError
from promptuary.methods.base import Method, MethodConfig, check_size
from promptuary.prompts.blocks import pool_rows, svd_factors
from promptuary.prompts.init import Starting
from promptuary.types import Prompt, Shape, View


class LAMPConfig(MethodConfig):
    """Settings of LAMP."""

    name: Literal["lamp"] = "lamp"
    length: int = Field(100, ge=1, description="l, rows of the prompt that is decomposed; our choice (not published)")
    rank: int = Field(8, ge=1, description="r, kept singular directions; our choice, grid 2 4 8 16")
    pool: int = Field(5, ge=1, description="p, rows averaged into one; our choice, grid 2 4 5 10; 1 is off")
    q_power: Literal[1, 2] = Field(
        1, description="1: q scales U only; 2: q scales both U and V (open question 2; our choice 1)"
    )
    singular_lr: float = Field(
        0.005, gt=0, description="learning rate of q, relative to its starting scale; our choice: a tenth of prompt_lr"
    )


def outer_product(m: Tensor, i: Tensor) -> Tensor:
    """Compressed outer product: sum over r of m[:, r] (outer) i[r, :], which is the matrix product, [l, d]."""
    return m @ i


class LAMP(Method):
    """Three factors of a prompt."""

    name = "lamp"
    title = "LAMP"
    paper = "arXiv 2502.12200"
    reconstructed = True
    tiny: ClassVar = {"length": 8, "rank": 3, "pool": 2}
    groups: ClassVar = {"u": "prompt", "q": "singular", "v": "prompt"}
    relative = frozenset({"prompt", "singular"})
    Config = LAMPConfig

    @property
    def settings(self) -> LAMPConfig:
        """The settings with their own type."""
        return cast(LAMPConfig, self.config)

    def build(self) -> None:
        """U [l, r], q [r], V [r, d].

        Raises:
            ConfigError: r above min(l, d).
        """
        c, d = self.settings, self.shape.width
        if c.rank > min(c.length, d):
            raise ConfigError(f"method.rank {c.rank} is above min(method.length {c.length}, width {d}); lower it")
        self.u = self.parameter(c.length, c.rank)
        self.q = self.parameter(c.rank)
        self.v = self.parameter(c.rank, d)

    def fill(self, source: Starting) -> None:
        """Thin SVD of the starting rows, cut to r; orthogonality is not kept in training."""
        u, q, v = svd_factors(self.first_rows(self.settings.length, source), self.settings.rank)
        self.u.copy_(u)
        self.q.copy_(q if self.settings.q_power == 1 else q.sqrt())
        self.v.copy_(v)

    def prompt(self, view: View) -> Prompt:
        """AvgPool(M I) = AvgPool(M) I, so pooling comes first."""
        c = self.settings
        # M = U diag(q);  I = V, or diag(q) V
        m = self.u * self.q
        i = self.v if c.q_power == 1 else self.q[:, None] * self.v
        return Prompt(rows=outer_product(pool_rows(m, c.pool), i)[None], placement=c.placement)

    @classmethod
    def count(cls, config: MethodConfig, shape: Shape) -> int:
        """R (l + d + 1)."""
        c = cast(LAMPConfig, config)
        return c.rank * (c.length + shape.width + 1)

    @classmethod
    def match_budget(cls, config: MethodConfig, length: int, shape: Shape) -> MethodConfig:
        """The largest r with r (l + d + 1) <= length d."""
        c, d = cast(LAMPConfig, config), shape.width
        each = c.length + d + 1
        check_size(each, length * d, length, "lower method.length")
        return c.model_copy(update={"rank": min(length * d // each, c.length, d)})
