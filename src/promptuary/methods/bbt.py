"""Black-box tuning (Sun et al. 2022, arXiv 2201.03514): a short vector that a random matrix maps to the prompt.

Knows no backbone, and not how the vector is searched; evolution with forward passes alone is the default.

Notation: v [k] the vector, A [k, n d] drawn once and never trained, P_0 [n, d] the start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from promptuary.methods.base import Method, MethodConfig, check_size
from promptuary.prompts.init import Starting
from promptuary.types import Prompt, Shape, View


class BBTConfig(MethodConfig):
    """Settings of black-box tuning."""

    name: Literal["bbt"] = "bbt"
    num_virtual_tokens: int = Field(50, ge=1, description="n, rows; the paper has 50")
    intrinsic_dimension: int = Field(500, ge=1, description="k, numbers that are searched; the paper has 500")
    alpha: float = Field(1.0, gt=0, description="scale of A; the release has 1")
    sigma: float = Field(
        1.0,
        gt=0,
        description="step size of the search that A is scaled for; as solver.sigma; the release: 1",
    )


class BBT(Method):
    """P_0 + v A."""

    name = "bbt"
    title = "BBT"
    paper = "arXiv 2201.03514"
    solver = "evolution"
    tiny: ClassVar = {"num_virtual_tokens": 4, "intrinsic_dimension": 60, "alpha": 60.0}
    groups: ClassVar = {"vector": "prompt"}
    Config = BBTConfig
    matrix: Tensor
    base: Tensor
    scale: Tensor

    @property
    def settings(self) -> BBTConfig:
        """The settings with their own type."""
        return cast(BBTConfig, self.config)

    @property
    def advice(self) -> Mapping[str, Any]:
        """The step size that A is scaled for."""
        return {"sigma": self.settings.sigma}

    def build(self) -> None:
        """Vector v [k]; constants A [k, n d], which follows from a seed, P_0 [n, d] and the scale of A."""
        c, d = self.settings, self.shape.width
        self.vector = self.parameter(c.intrinsic_dimension)
        self.constant(c.intrinsic_dimension, c.num_virtual_tokens * d, name="matrix", drawn=True)
        self.constant(c.num_virtual_tokens, d, name="base")
        self.constant(1, name="scale")

    def draw(self, generator: torch.Generator) -> None:
        """A standard normal; its scale is kept apart, since it follows from the vocabulary."""
        self.matrix.copy_(torch.randn(self.matrix.shape, generator=generator))

    def fill(self, source: Starting) -> None:
        """P_0 as `init` says, v zero, and a standard deviation of alpha std(E) / (sqrt(k) sigma) for A."""
        c = self.settings
        self.base.copy_(self.first_rows(len(self.base), source))
        self.scale.fill_(c.alpha * source.vocabulary.rms() / (math.sqrt(c.intrinsic_dimension) * c.sigma))

    def prompt(self, view: View) -> Prompt:
        """P_0 + v A."""
        rows = self.base + (self.scale * (self.vector @ self.matrix)).view_as(self.base)
        return Prompt(rows=rows[None], placement=self.settings.placement)

    @classmethod
    def count(cls, config: MethodConfig, shape: Shape) -> int:
        """K."""
        return cast(BBTConfig, config).intrinsic_dimension

    @classmethod
    def match_budget(cls, config: MethodConfig, length: int, shape: Shape) -> MethodConfig:
        """The largest k that fits."""
        c = cast(BBTConfig, config)
        check_size(1, length * shape.width, length, "raise match_length")
        return c.model_copy(update={"intrinsic_dimension": min(c.intrinsic_dimension, length * shape.width)})
