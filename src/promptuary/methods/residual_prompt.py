"""Residual prompt tuning (Razdaibiedina et al. 2023, arXiv 2305.03937): rows plus what a small network makes of them.

Knows no backbone.

Notation: P [l, d] the rows, f(P) = LN(up relu(down P)), with biases.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, cast

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from promptuary.methods.base import Method, MethodConfig, check_size
from promptuary.prompts.blocks import linear_start
from promptuary.prompts.init import Starting
from promptuary.types import Prompt, Shape, View


class ResidualPromptConfig(MethodConfig):
    """Settings of residual prompt tuning."""

    name: Literal["residual_prompt"] = "residual_prompt"
    num_virtual_tokens: int = Field(10, ge=1, description="l, rows; the paper's short prompts have 10")
    bottleneck: int = Field(400, ge=1, description="width between the two maps; 400 gives the published counts")
    network: Literal["shared", "each"] = Field(
        "shared", description="one network for all rows, or one for each (the paper has both)"
    )
    layer_norm: bool = Field(True, description="LayerNorm behind the maps; on in the authors' script")
    norm_start: Literal["vocabulary", "one"] = Field(
        "vocabulary",
        description="scale of the LayerNorm at the start: that of the vocabulary, so that f(P) is as large as P (our "
        "choice), or one (the paper, on models whose embeddings are that large)",
    )
    modules_lr: float = Field(1e-3, gt=0, description="learning rate of the network; our choice (paper: 0.3 for all)")


class ResidualPrompt(Method):
    """Rows that are trained around a network, which is thrown away in the end."""

    name = "residual_prompt"
    title = "Residual prompt tuning"
    paper = "arXiv 2305.03937"
    tiny: ClassVar = {"num_virtual_tokens": 3, "bottleneck": 6, "prompt_lr": 0.3}
    groups: ClassVar = {"rows": "prompt"} | dict.fromkeys(
        ("down", "down_bias", "up", "up_bias", "norm", "norm_bias"), "modules"
    )
    Config = ResidualPromptConfig
    rows: nn.Parameter
    down: nn.Parameter
    down_bias: nn.Parameter
    up: nn.Parameter
    up_bias: nn.Parameter

    @property
    def settings(self) -> ResidualPromptConfig:
        """The settings with their own type."""
        return cast(ResidualPromptConfig, self.config)

    @classmethod
    def sizes(cls, config: MethodConfig, shape: Shape) -> dict[str, tuple[int, ...]]:
        """Tensors by name; networks of `each` stand side by side."""
        c, d = cast(ResidualPromptConfig, config), shape.width
        several = 1 if c.network == "shared" else c.num_virtual_tokens
        found: dict[str, tuple[int, ...]] = {
            "rows": (c.num_virtual_tokens, d),
            "down": (several, d, c.bottleneck),
            "down_bias": (several, c.bottleneck),
            "up": (several, c.bottleneck, d),
            "up_bias": (several, d),
        }
        return found | ({"norm": (several, d), "norm_bias": (several, d)} if c.layer_norm else {})

    def build(self) -> None:
        """What the settings use."""
        for name, size in self.sizes(self.config, self.shape).items():
            setattr(self, name, self.parameter(*size))

    def fill(self, source: Starting) -> None:
        """P as `init` says, maps as torch starts a layer, the LayerNorm's scale as `norm_start` says."""
        self.rows.copy_(self.first_rows(len(self.rows), source))
        for weight, bias in ((self.down, self.down_bias), (self.up, self.up_bias)):
            for one, own in zip(weight, bias, strict=True):
                linear_start(one, own, source.generator)
        if self.settings.layer_norm:
            relative = self.settings.norm_start == "vocabulary"
            cast(Tensor, self.norm).fill_(source.vocabulary.rms() if relative else 1)

    def residual(self) -> Float[Tensor, "l d"]:
        """f(P)."""
        inner = torch.relu(torch.einsum("ld,ldi->li", self.rows, self._each(self.down)) + self.down_bias)
        outer = torch.einsum("li,lid->ld", inner, self._each(self.up)) + self.up_bias
        if not self.settings.layer_norm:
            return outer
        plain = torch.nn.functional.layer_norm(outer, outer.shape[-1:])
        return plain * cast(Tensor, self.norm) + cast(Tensor, self.norm_bias)

    def _each(self, weight: Float[Tensor, "n a b"]) -> Float[Tensor, "l a b"]:
        return weight.expand(len(self.rows), -1, -1)

    def prompt(self, view: View) -> Prompt:
        """P + f(P)."""
        return Prompt(rows=(self.rows + self.residual())[None], placement=self.settings.placement)

    @classmethod
    def count(cls, config: MethodConfig, shape: Shape) -> int:
        """L d + 2 d i + i + d + 2 d, the network once or l times; for T5-large with 100 rows 925,072."""
        return sum(math.prod(size) for size in cls.sizes(config, shape).values())

    @classmethod
    def match_budget(cls, config: MethodConfig, length: int, shape: Shape) -> MethodConfig:
        """The widest bottleneck that fits."""
        budget = length * shape.width

        def numbers(width: int) -> int:
            return cls.count(config.model_copy(update={"bottleneck": width}), shape)

        check_size(numbers(1), budget, length, "lower method.num_virtual_tokens, or share the network")
        return config.model_copy(update={"bottleneck": 1 + (budget - numbers(1)) // (numbers(2) - numbers(1))})
