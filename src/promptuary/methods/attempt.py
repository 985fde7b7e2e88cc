"""ATTEMPT (Asai et al. 2022, arXiv 2205.11961): frozen source prompts and a trained one, mixed by attention.

Knows no backbone, and not what the source prompts were trained for.

Notation: P_0 [l, d] the trained prompt, P_1 .. P_n the frozen sources, x [t, d] the embeddings of a text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal, cast

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from promptuary.errors import ConfigError
from promptuary.methods.base import Method, MethodConfig, SourcedConfig, check_size
from promptuary.prompts.init import Starting
from promptuary.types import Prompt, Shape, View


class AttemptConfig(SourcedConfig):
    """Settings of ATTEMPT."""

    name: Literal["attempt"] = "attempt"
    num_virtual_tokens: int = Field(100, ge=1, description="l, rows of every prompt; the paper has 100")
    inner: int = Field(100, ge=1, description="width between the two maps of the text; the released code")
    temperature: float | None = Field(None, gt=0, description="T of the attention; without it d e, the released code")
    modules_lr: float = Field(1e-3, gt=0, description="learning rate of the maps and of their LayerNorm; our choice")


class Attempt(Method):
    """Attention over prompts, asked by the text; P_0 is one of them and is added besides."""

    name = "attempt"
    title = "ATTEMPT"
    paper = "arXiv 2205.11961"
    shared = frozenset({"down", "up", "norm", "norm_bias"})
    tiny: ClassVar = {"num_virtual_tokens": 3, "inner": 4, "temperature": 1.0, "prompt_lr": 0.3}
    tiny_sources: ClassVar = ({"name": "prompt_tuning", "num_virtual_tokens": 3},) * 2
    groups: ClassVar = {"rows": "prompt"} | dict.fromkeys(("down", "up", "norm", "norm_bias"), "modules")
    Config = AttemptConfig
    sources: Tensor

    @property
    def settings(self) -> AttemptConfig:
        """The settings with their own type."""
        return cast(AttemptConfig, self.config)

    @property
    def needs(self) -> frozenset[str]:
        """The text."""
        return frozenset({"embeddings"})

    def build(self) -> None:
        """P_0 [l, d], down [d, i], up [i, d], the LayerNorm's scale and shift [d], and the sources [n, l, d]."""
        c, d = self.settings, self.shape.width
        self.rows = self.parameter(c.num_virtual_tokens, d)
        self.down = self.parameter(d, c.inner)
        self.up = self.parameter(c.inner, d)
        self.norm = self.parameter(d)
        self.norm_bias = self.parameter(d)
        self.constant(len(c.sources), c.num_virtual_tokens, d, name="sources")

    def fill(self, source: Starting) -> None:
        """P_0 as `init` says, sources as they were saved, maps as torch starts a layer, a plain LayerNorm.

        Raises:
            ConfigError: a source has another number of rows.
            NotFoldable: a source has no static rows.
        """
        self.rows.copy_(self.first_rows(len(self.rows), source))
        for own, one in zip(self.sources, source.sources, strict=True):
            rows = one.rows()
            if len(rows) != len(own):
                raise ConfigError(
                    f"attempt mixes prompts of one length: {one.name} has {len(rows)} rows, and "
                    f"method.num_virtual_tokens is {len(own)}"
                )
            own.copy_(rows)
        for weight in (self.down, self.up):
            bound = 1 / math.sqrt(len(weight))
            weight.uniform_(-bound, bound, generator=source.generator)
        self.norm.fill_(1)

    def weights(self, view: View) -> Float[Tensor, "b n"]:
        """Attention of each text to P_0, P_1 .. P_n.

        a = softmax(pool(P) . H / T), H = LN(up silu(down pool(x))); pool is the maximum over rows, or real tokens.
        """
        assert view.embeddings is not None
        assert view.mask is not None
        # over real tokens: the release pools padding too, so that its answers depend on what else is in a batch
        text = view.embeddings.masked_fill(~view.mask[..., None], -math.inf).amax(1)
        asked = torch.nn.functional.silu(text @ self.down) @ self.up
        asked = torch.nn.functional.layer_norm(asked, (self.shape.width,), self.norm, self.norm_bias)
        keys = torch.cat([self.rows[None], self.sources]).amax(1)
        heat = self.settings.temperature or self.shape.width * math.e
        return torch.softmax(asked @ keys.T / heat, dim=-1)

    def prompt(self, view: View) -> Prompt:
        """P_0 + sum_j a_j P_j, for each text its own."""
        a = self.weights(view)
        mixed = torch.einsum("bn,nld->bld", a, torch.cat([self.rows[None], self.sources]))
        return Prompt(rows=self.rows + mixed, placement=self.settings.placement)

    def insight(self) -> Mapping[str, Tensor]:
        """Cosines between the mean rows of the prompts: the trained one first, then the sources."""
        means = torch.nn.functional.normalize(torch.cat([self.rows.detach()[None], self.sources]).mean(1), dim=-1)
        return {"similarity": means @ means.T}

    @classmethod
    def count(cls, config: MethodConfig, shape: Shape) -> int:
        """L d + 2 d i + 2 d; for T5-base 231,936."""
        c, d = cast(AttemptConfig, config), shape.width
        return c.num_virtual_tokens * d + 2 * d * c.inner + 2 * d

    @classmethod
    def match_budget(cls, config: MethodConfig, length: int, shape: Shape) -> MethodConfig:
        """The largest inner width that fits; the length is that of the sources."""
        c, d = cast(AttemptConfig, config), shape.width
        smallest = cls.count(c.model_copy(update={"inner": 1}), shape)
        check_size(smallest, length * d, length, "use shorter sources and lower method.num_virtual_tokens")
        return c.model_copy(update={"inner": 1 + (length * d - smallest) // (2 * d)})
