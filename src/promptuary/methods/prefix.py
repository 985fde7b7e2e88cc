"""Prefix tuning (Li and Liang 2021, arXiv 2101.00190; P-tuning v2, arXiv 2110.07602): keys and values per layer.

Knows no backbone: only how many layers, heads and widths there are.

Notation: KV [l, 2, k, p, e] the prefix of p positions in l layers. Reparameterised: KV = MLP(P'), P' [p, d], and the
MLP is thrown away at the end (Li and Liang, section 4.3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from promptuary.methods.base import Method, MethodConfig, check_size
from promptuary.prompts.blocks import kaiming_uniform
from promptuary.prompts.init import Starting, starting_prefix
from promptuary.types import Prompt, Shape, View


class PrefixConfig(MethodConfig):
    """Settings of prefix tuning."""

    name: Literal["prefix"] = "prefix"
    num_virtual_tokens: int = Field(
        20, ge=1, description="p, positions of the prefix; Li and Liang 2021: 10 for tables, 200 for summaries"
    )
    reparameterize: bool = Field(
        False, description="train P' and an MLP instead of the prefix itself; off as in most of P-tuning v2's runs"
    )
    encoder_hidden_size: int = Field(512, ge=1, description="h, hidden width of the MLP; Li and Liang's code: 512")
    modules_lr: float = Field(1e-3, gt=0, description="learning rate of the MLP; our choice")


class Prefix(Method):
    """Keys and values that every layer reads before those of the text."""

    name = "prefix"
    title = "Prefix tuning"
    paper = "arXiv 2101.00190"
    sites = frozenset({"kv"})
    tiny: ClassVar = {"num_virtual_tokens": 3}
    groups: ClassVar = {
        "kv": "prompt", "tokens": "prompt", "w_1": "modules", "b_1": "modules", "w_2": "modules", "b_2": "modules",
    }  # fmt: skip
    exceptions: ClassVar = {
        "cached_generation_equals_uncached": "the prefix lives in the model's cache; writing without one is refused",
    }
    Config = PrefixConfig

    @property
    def settings(self) -> PrefixConfig:
        """The settings with their own type."""
        return cast(PrefixConfig, self.config)

    def build(self) -> None:
        """KV, or P', W_1, b_1, W_2, b_2."""
        config, shape = self.settings, self.shape
        p, h = config.num_virtual_tokens, config.encoder_hidden_size
        if not config.reparameterize:
            self.kv = self.parameter(shape.layers, 2, shape.heads, p, shape.head)
            return
        self.tokens = self.parameter(p, shape.width)
        self.w_1, self.b_1 = self.parameter(shape.width, h), self.parameter(h)
        self.w_2, self.b_2 = self.parameter(h, _wide(shape)), self.parameter(_wide(shape))

    def fill(self, source: Starting) -> None:
        """As `init` says: what the frozen model computes for sampled words or for a text, or random at that scale.

        Starting from real words is Li and Liang's advice (section 7.4). Reparameterised, P' starts as prompt tuning
        does and the MLP at random.
        """
        config = self.settings
        if config.reparameterize:
            self.tokens.copy_(self.first_rows(len(self.tokens), source))
            for weight in (self.w_1, self.w_2):
                weight.copy_(kaiming_uniform(weight.shape[1], weight.shape[0], source.generator).T)
            return
        self.kv.copy_(starting_prefix(config.init, config.num_virtual_tokens, source, text=config.init_text))

    def prompt(self, view: View) -> Prompt:
        """KV; the MLP runs once, not once per row of the batch."""
        return Prompt(kv=self._kv()[None])

    def _kv(self) -> Tensor:
        if not self.settings.reparameterize:
            return self.kv
        shape, p = self.shape, self.settings.num_virtual_tokens
        # KV = W_2 tanh(W_1 P' + b_1) + b_2
        wide = torch.tanh(self.tokens @ self.w_1 + self.b_1) @ self.w_2 + self.b_2
        return wide.view(p, shape.layers, 2, shape.heads, shape.head).permute(1, 2, 3, 0, 4)

    def insight(self) -> Mapping[str, Tensor]:
        """How large keys and values are, [l, p]: the norm over heads and their width."""
        with torch.no_grad():
            norms = self._kv().pow(2).sum(dim=(2, 4)).sqrt()
        return {"norms of keys": norms[:, 0], "norms of values": norms[:, 1]}

    @classmethod
    def count(cls, config: MethodConfig, shape: Shape) -> int:
        """P 2 l k e; reparameterised p d + d h + h + (h + 1) 2 l k e."""
        own = cast(PrefixConfig, config)
        p, h, d, wide = own.num_virtual_tokens, own.encoder_hidden_size, shape.width, _wide(shape)
        return p * d + d * h + h + (h + 1) * wide if own.reparameterize else p * wide

    @classmethod
    def match_budget(cls, config: MethodConfig, length: int, shape: Shape) -> MethodConfig:
        """Fewer positions, at least one."""
        own = cast(PrefixConfig, config)
        budget = length * shape.width
        fixed = cls.count(own.model_copy(update={"num_virtual_tokens": 0}), shape)
        each = shape.width if own.reparameterize else _wide(shape)
        check_size(
            fixed + each, budget, length, "a prefix of one position is larger; set reparameterize: false or more"
        )
        update: dict[str, Any] = {"num_virtual_tokens": (budget - fixed) // each}
        return config.model_copy(update=update)


def _wide(shape: Shape) -> int:
    """2 l k e: numbers of one position."""
    return 2 * shape.layers * shape.heads * shape.head
