"""StablePT (arXiv 2404.19335, EMNLP 2024): a soft prompt beside the text instead of in it, class-aware by contrast.

Knows no backbone. Rebuilt from the abstract and from reading the authors' release; docs/methods/stablept.md says what
of it is our reading.

Notation: H [t, h] the frozen model's states of the text with its hard prompt (the template), a [h] that of the answer;
P [n, h] the soft prompt; G the semantic encoder's states of H, g that of a; e [h] the prompt's feature.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, cast

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm

from promptuary.errors import ConfigError
from promptuary.methods.base import Method, MethodConfig, check_size
from promptuary.prompts.attention import Block
from promptuary.prompts.blocks import linear_start
from promptuary.prompts.init import Starting
from promptuary.prompts.losses import supervised_contrastive
from promptuary.types import Losses, Outputs, Prompt, Shape, View

BOTTLENECK = 300
"""Width of a head of its own; the release."""


class StablePTConfig(MethodConfig):
    """Settings of StablePT."""

    name: Literal["stablept"] = "stablept"
    preset: Literal["paper", "release"] = Field(
        "paper",
        description='"paper": e reaches the prediction, read by the model\'s own head (our reading of the abstract); '
        '"release": it does not, and a head of its own reads g (the authors\' code)',
    )
    fusion: bool | None = Field(None, description="whether a map of e is added to g; without it as the preset says")
    head: Literal["model", "scratch"] | None = Field(
        None, description="the frozen model's head, or a trained one of label words; without it as the preset says"
    )
    num_virtual_tokens: int = Field(10, ge=1, description="n, vectors of the soft prompt; the release")
    heads: int = Field(8, ge=1, description="of attention; the release")
    contrastive_weight: float = Field(1.0, ge=0, description="of the contrastive loss; the release")
    contrastive_temperature: float = Field(0.3, gt=0, description="of its cosines; the release")
    detach_context: bool = Field(
        True, description="no gradient of the contrastive loss reaches the semantic encoder; the release"
    )
    dropout: float = Field(0.2, ge=0, lt=1, description="of the blocks' features; the release has 0.2 by entry")
    drop_path: float = Field(0.2, ge=0, lt=1, description="chance of a row to skip a part of a block; release: 0.2")
    modules_lr: float = Field(1e-4, gt=0, description="learning rate of everything; the release")
    weight_decay: float = Field(1e-4, ge=0, description="the release")


class StablePT(Method):
    """A semantic encoder over frozen states, a decoder that a soft prompt asks it with, and a head."""

    name = "stablept"
    title = "StablePT"
    paper = "arXiv 2404.19335"
    reconstructed = True
    sites = frozenset()
    reads = frozenset({"view"})
    whole_batches = True
    undecayed = frozenset()
    tiny: ClassVar = {"num_virtual_tokens": 3, "heads": 4, "modules_lr": 3e-3}
    Config = StablePTConfig
    prompt_rows: nn.Parameter

    @property
    def groups(self) -> dict[str, str]:  # type: ignore[override]
        """One rate for all."""
        return dict.fromkeys((name for name, _ in self.named_parameters()), "modules")

    @property
    def settings(self) -> StablePTConfig:
        """The settings with their own type."""
        return cast(StablePTConfig, self.config)

    @property
    def needs(self) -> frozenset[str]:
        """What the frozen model makes of the text without any soft prompt."""
        return frozenset({"states", "answer"})

    @property
    def depends(self) -> bool:
        """Nothing stands in the model's input, whatever the text."""
        return False

    @classmethod
    def parts(cls, config: MethodConfig) -> tuple[bool, str]:
        """Whether e is fused, and which head reads."""
        c = cast(StablePTConfig, config)
        paper = c.preset == "paper"
        return (paper if c.fusion is None else c.fusion), c.head or ("model" if paper else "scratch")

    @classmethod
    def sizes(cls, config: MethodConfig, shape: Shape) -> dict[str, tuple[int, ...]]:
        """Tensors by name.

        Raises:
            ConfigError: the task has no labels, or the states do not divide into the heads.
        """
        c, h = cast(StablePTConfig, config), shape.hidden or shape.width
        if not shape.classes:
            raise ConfigError("stablept reads label words from states of its own: it needs a task with labels")
        if h % c.heads:
            raise ConfigError(f"method.heads: states of width {h} do not divide into {c.heads} heads")
        fusion, head = cls.parts(c)
        block = Block(h, c.heads).sizes()
        found: dict[str, tuple[int, ...]] = {"prompt_rows": (c.num_virtual_tokens, h)}
        found |= {f"encoder_{name}": size for name, size in block.items()}
        found |= {f"decoder_{name}": size for name, size in block.items()}
        found |= {"last": (h,), "last_bias": (h,)}
        if fusion:
            found["fusion"] = (h, h)
        if head == "scratch":
            found |= {"inner": (h, BOTTLENECK), "inner_bias": (BOTTLENECK,)}
            found |= {"inner_norm": (BOTTLENECK,), "inner_norm_bias": (BOTTLENECK,)}
            found |= {"words": (BOTTLENECK, shape.classes), "words_bias": (shape.classes,)}
        return found

    def build(self) -> None:
        """What the settings use."""
        for name, size in self.sizes(self.config, self.shape).items():
            setattr(self, name, self.parameter(*size))

    @property
    def block(self) -> Block:
        """The form of both blocks."""
        return Block(self.prompt_rows.shape[1], self.settings.heads)

    def fill(self, source: Starting) -> None:
        """A standard normal soft prompt, blocks as they start, a fusion of zero, a head as torch starts layers."""
        # the prompt is drawn last, so that its seed can differ while everything else is the same
        for side in ("encoder", "decoder"):
            self.block.fill(self._of(side), source.generator)
        cast(Tensor, self.last).fill_(1)
        if self.parts(self.config)[1] == "scratch":
            linear_start(cast(Tensor, self.inner), cast(Tensor, self.inner_bias), source.generator)
            cast(Tensor, self.inner_norm).fill_(1)
            linear_start(cast(Tensor, self.words), cast(Tensor, self.words_bias), source.generator)
        self.prompt_rows.copy_(torch.randn(self.prompt_rows.shape, generator=source.generator))

    def _of(self, side: str) -> dict[str, Tensor]:
        return {name: getattr(self, f"{side}_{name}") for name in self.block.sizes()}

    def prompt(self, view: View) -> Prompt:
        """None: the soft prompt never enters the model."""
        return Prompt()

    # ---- what is made of the states ----------------------------------------------------------------------------------

    def semantic(self, view: View, asking: Float[Tensor, "b q h"]) -> Float[Tensor, "b q h"]:
        """G = x + Att(LN x over LN H), then G + MLP(LN G), for states x of the text or of its answer."""
        assert view.states is not None
        assert view.mask is not None
        block, own = self.block, self._of("encoder")
        context = block.norm(own, "before", view.states)
        taken = block.attend(own, block.norm(own, "before", asking), context, view.mask)
        found = asking + self._noisy(taken, view, 1)
        return found + self._noisy(block.mlp(own, block.norm(own, "between", found)), view, 2)

    def feature(self, view: View) -> Float[Tensor, "b h"]:
        """E: what the soft prompt takes from G, averaged over its vectors.

        p = LN P, p + CrossAtt(p over LN G), p = LN p, p + MLP(p), LN; the first LayerNorm reads both P and G.
        """
        assert view.states is not None
        assert view.mask is not None
        block, own = self.block, self._of("decoder")
        context = self.semantic(view, view.states)
        if self.settings.detach_context:
            context = context.detach()
        p = block.norm(own, "before", self.prompt_rows).expand(len(context), -1, -1)
        taken = block.attend(own, p, block.norm(own, "before", context), view.mask)
        p = block.norm(own, "between", p + self._noisy(taken, view, 3))
        p = p + self._noisy(block.mlp(own, p), view, 4)
        return layer_norm(p, p.shape[-1:], cast(Tensor, self.last), cast(Tensor, self.last_bias)).mean(1)

    def _noisy(self, x: Float[Tensor, "b q h"], view: View, purpose: int) -> Float[Tensor, "b q h"]:
        """Features dropped, and whole rows; the same for all tokens of a row, so that padding has no say."""
        c, chance = self.settings, view.chance
        if chance is None:
            return x
        kept = (chance.uniform(x.shape[-1], purpose=2 * purpose) >= c.dropout)[:, None] / (1 - c.dropout)
        stays = (chance.uniform(1, purpose=2 * purpose + 1) >= c.drop_path)[:, None] / (1 - c.drop_path)
        return x * kept * stays

    def scores(self, outputs: Outputs) -> Float[Tensor, "b c"]:
        """Of g + W_f e, or of g alone, by the model's head or by one of its own."""
        view = outputs.view
        assert view.answer is not None
        fusion, head = self.parts(self.config)
        state = self.semantic(view, view.answer[:, None])[:, 0]
        if fusion:
            state = state + self.feature(view) @ cast(Tensor, self.fusion)
        if head == "model":
            assert outputs.words is not None
            return outputs.words(state).float()
        inner = gelu(state @ cast(Tensor, self.inner) + cast(Tensor, self.inner_bias))
        inner = layer_norm(inner, (BOTTLENECK,), cast(Tensor, self.inner_norm), cast(Tensor, self.inner_norm_bias))
        return inner @ cast(Tensor, self.words) + cast(Tensor, self.words_bias)

    def loss(self, task_loss: Float[Tensor, ""], outputs: Outputs) -> Losses:
        """L_task + weight * L_con, which draws the features of a class together."""
        c, parts = self.settings, {"task": float(task_loss.detach())}
        if not c.contrastive_weight:
            return Losses(task_loss, parts)
        assert outputs.target is not None
        contrast = supervised_contrastive(self.feature(outputs.view), outputs.target, c.contrastive_temperature)
        parts["contrastive"] = float(contrast.detach())
        return Losses(task_loss + c.contrastive_weight * contrast, parts)

    @classmethod
    def count(cls, config: MethodConfig, shape: Shape) -> int:
        """N h + 2 (5 h^2 + 6.5 h) + 2 h, h^2 for the fusion, 300 h + 900 + 301 c for a head of its own."""
        return sum(math.prod(size) for size in cls.sizes(config, shape).values())

    @classmethod
    def match_budget(cls, config: MethodConfig, length: int, shape: Shape) -> MethodConfig:
        """As it is: its blocks have the model's own width.

        Raises:
            ConfigError: it is larger than the budget.
        """
        budget = length * shape.width
        check_size(cls.count(config, shape), budget, length, "its two blocks have the model's width: never small")
        return config
