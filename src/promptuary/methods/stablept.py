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
from torch.nn.functional import cross_entropy, gelu, layer_norm

from promptuary.errors import ConfigError, SiteError
from promptuary.methods.base import Method, MethodConfig, check_size
from promptuary.prompts import blocks
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
    block_width: int | None = Field(
        None, ge=2, description="of queries, keys and values of both blocks; without it the states' (the release)"
    )
    contrastive_weight: float = Field(1.0, ge=0, description="of the contrastive loss; the release")
    contrastive_temperature: float = Field(0.3, gt=0, description="of its cosines; the release")
    detach_context: bool = Field(
        True, description="no gradient of the contrastive loss reaches the semantic encoder; the release"
    )
    class_weights: bool | None = Field(
        None,
        description="weigh a class in cross-entropy by one minus its part of the batch (the release, but with the "
        "plain mean where a batch has one class, not NaN); without it as the preset says",
    )
    dropout: float = Field(
        0.2, ge=0, lt=1, description="of the semantic encoder's features; the release has 0.2 by entry"
    )
    drop_path: float = Field(
        0.2, ge=0, lt=1, description="chance of a row to skip a part of the semantic encoder; the release"
    )
    decoder_drop_path: float = Field(
        0.1, ge=0, lt=1, description="chance of a row to skip a part of the decoder; the release"
    )
    modules_lr: float = Field(1e-4, gt=0, description="learning rate of everything; the release")
    weight_decay: float = Field(1e-4, ge=0, description="the release")

    @property
    def fuses(self) -> bool:
        """Whether e reaches the prediction."""
        return self.preset == "paper" if self.fusion is None else self.fusion

    @property
    def decodes(self) -> bool:
        """Whether anything looks at e; if not, there is neither soft prompt nor decoder."""
        return self.fuses or self.contrastive_weight > 0

    @property
    def reader(self) -> str:
        """Which head reads."""
        return self.head or ("model" if self.preset == "paper" else "scratch")

    @property
    def weighs(self) -> bool:
        """Whether classes are weighed."""
        return self.preset == "release" if self.class_weights is None else self.class_weights


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
    tiny: ClassVar = {"num_virtual_tokens": 3, "heads": 4, "block_width": 8, "modules_lr": 3e-3}
    groups: ClassVar = dict.fromkeys(
        (
            *(f"encoder_{name}" for name in Block.NAMES), *(f"decoder_{name}" for name in Block.NAMES),
            "prompt_rows", "last", "last_bias", "fusion",
            "inner", "inner_bias", "inner_norm", "inner_norm_bias", "words", "words_bias",
        ),
        "modules",
    )  # fmt: skip
    Config = StablePTConfig
    prompt_rows: nn.Parameter
    last: nn.Parameter
    last_bias: nn.Parameter
    fusion: nn.Parameter
    inner: nn.Parameter
    inner_bias: nn.Parameter
    inner_norm: nn.Parameter
    inner_norm_bias: nn.Parameter
    words: nn.Parameter
    words_bias: nn.Parameter

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
    def sizes(cls, config: MethodConfig, shape: Shape) -> dict[str, tuple[int, ...]]:
        """Tensors by name.

        Raises:
            ConfigError: the task has no labels, or the states do not divide into the heads.
        """
        c, h = cast(StablePTConfig, config), shape.hidden or shape.width
        if not shape.classes:
            raise ConfigError("stablept reads label words from states of its own: it needs a task with labels")
        inner = c.block_width or h
        if inner % c.heads:
            fix = "set method.heads, or method.block_width to a multiple of it"
            raise ConfigError(f"method.heads: a width of {inner} does not divide into {c.heads} heads; {fix}")
        block = cls.block(config, shape).sizes()
        found: dict[str, tuple[int, ...]] = {f"encoder_{name}": size for name, size in block.items()}
        if c.decodes:
            found |= {f"decoder_{name}": size for name, size in block.items()}
            found |= {"last": (h,), "last_bias": (h,), "prompt_rows": (c.num_virtual_tokens, h)}
        if c.fuses:
            found["fusion"] = (h, h)
        if c.reader == "scratch":
            found |= {"inner": (h, BOTTLENECK), "inner_bias": (BOTTLENECK,)}
            found |= {"inner_norm": (BOTTLENECK,), "inner_norm_bias": (BOTTLENECK,)}
            found |= {"words": (BOTTLENECK, shape.classes), "words_bias": (shape.classes,)}
        return found

    @classmethod
    def block(cls, config: MethodConfig, shape: Shape) -> Block:
        """The form of both blocks."""
        c = cast(StablePTConfig, config)
        return Block(shape.hidden or shape.width, c.heads, c.block_width or 0)

    def build(self) -> None:
        """What the settings use."""
        for name, size in self.sizes(self.config, self.shape).items():
            setattr(self, name, self.parameter(*size))

    def fill(self, source: Starting) -> None:
        """Blocks as they start, a head as torch starts layers, a fusion of zero, a standard normal soft prompt."""
        block, c = self.block(self.config, self.shape), self.settings
        block.fill(self._of("encoder"), source.generator)
        if c.reader == "scratch":
            linear_start(self.inner, self.inner_bias, source.generator)
            self.inner_norm.fill_(1)
            linear_start(self.words, self.words_bias, source.generator)
        if c.decodes:
            block.fill(self._of("decoder"), source.generator)
            self.last.fill_(1)
            # drawn last, so that its seed can differ while everything else is the same
            self.prompt_rows.copy_(torch.randn(self.prompt_rows.shape, generator=source.generator))

    def _of(self, side: str) -> dict[str, Tensor]:
        return {name: getattr(self, f"{side}_{name}") for name in Block.NAMES}

    def prompt(self, view: View) -> Prompt:
        """None: the soft prompt never enters the model."""
        return Prompt()

    # ---- what is made of the states ----------------------------------------------------------------------------------

    def semantic(self, view: View, asking: Float[Tensor, "b q h"]) -> Float[Tensor, "b q h"]:
        """G = x + Att(LN x over LN H), then G + MLP(LN G), for states x of the text or of its answer."""
        assert view.states is not None
        assert view.mask is not None
        block, own, c = self.block(self.config, self.shape), self._of("encoder"), self.settings
        context = block.norm(own, "before", view.states)
        taken = block.attend(own, block.norm(own, "before", asking), context, view.mask)
        found = asking + _noisy(taken, view, 1, c.dropout, c.drop_path)
        return found + _noisy(block.mlp(own, block.norm(own, "between", found)), view, 2, c.dropout, c.drop_path)

    def feature(self, view: View) -> Float[Tensor, "b h"]:
        """The feature e: what the soft prompt takes from G, averaged over its vectors.

        p = LN P, p + CrossAtt(p over LN G), p = LN p, p + MLP(p), LN. The LN of G has no scale and shift: the maps of
        keys and values take them up, and in the release no gradient reaches them.
        """
        assert view.states is not None
        assert view.mask is not None
        block, own, c = self.block(self.config, self.shape), self._of("decoder"), self.settings
        context = self.semantic(view, view.states)
        context = blocks.layer_norm(context.detach() if c.detach_context else context)
        p = block.norm(own, "before", self.prompt_rows).expand(len(context), -1, -1)
        p = p + _noisy(block.attend(own, p, context, view.mask), view, 3, 0.0, c.decoder_drop_path)
        p = block.norm(own, "between", p)
        p = p + _noisy(block.mlp(own, p), view, 4, 0.0, c.decoder_drop_path)
        return layer_norm(p, p.shape[-1:], self.last, self.last_bias).mean(1)

    def scores(self, outputs: Outputs) -> Float[Tensor, "b c"]:
        """Of g + W_f e, or of g alone, by the model's head or by one of its own.

        Raises:
            SiteError: the model's head does not read such states, or label words have several tokens.
        """
        view, c = outputs.view, self.settings
        assert view.answer is not None
        state = self.semantic(view, view.answer[:, None])[:, 0]
        if c.fuses:
            state = state + self.feature(view) @ self.fusion
        if c.reader == "model":
            assert outputs.words is not None
            try:
                return outputs.words(state).float()
            except SiteError as error:
                raise SiteError(f"{error}; or set method.head: scratch") from None
        inner = gelu(state @ self.inner + self.inner_bias)
        return layer_norm(inner, (BOTTLENECK,), self.inner_norm, self.inner_norm_bias) @ self.words + self.words_bias

    def loss(self, task_loss: Float[Tensor, ""], outputs: Outputs) -> Losses:
        """L_task + weight * L_con, which draws the features of a class together.

        Raises:
            ConfigError: the task has values, not classes.
        """
        c, target = self.settings, outputs.target
        if target is not None and target.is_floating_point() and (c.contrastive_weight or c.weighs):
            raise ConfigError(
                "stablept tells classes apart, and this task has values; set method.contrastive_weight: 0 and "
                "method.class_weights: false"
            )
        if c.weighs:
            assert target is not None
            scores = self.scores(outputs).float()
            share = torch.bincount(target, minlength=scores.shape[1]) / len(target)
            # above zero, so that a batch of one class has its plain mean
            task_loss = cross_entropy(scores, target, (1 - share).clamp(min=1e-6))
        parts = {"task": float(task_loss.detach())}
        if not c.contrastive_weight:
            return Losses(task_loss, parts)
        assert target is not None
        contrast = supervised_contrastive(self.feature(outputs.view), target, c.contrastive_temperature)
        parts["contrastive"] = float(contrast.detach())
        return Losses(task_loss + c.contrastive_weight * contrast, parts)

    @classmethod
    def count(cls, config: MethodConfig, shape: Shape) -> int:
        """Sum over `sizes`: 2 (5 h^2 + 6.5 h) + 2 h + n h, h^2 for the fusion, 300 h + 900 + 301 c for its own head."""
        return sum(math.prod(size) for size in cls.sizes(config, shape).values())

    @classmethod
    def match_budget(cls, config: MethodConfig, length: int, shape: Shape) -> MethodConfig:
        """The widest blocks that fit."""
        c, budget, width = cast(StablePTConfig, config), length * shape.width, shape.hidden or shape.width

        def sized(inner: int) -> MethodConfig:
            return config.model_copy(update={"block_width": inner})

        smallest = max(2, c.heads)
        fix = "set method.fusion: false, method.head: model and fewer method.heads; this is no small method"
        check_size(cls.count(sized(smallest), shape), budget, length, fix)
        wider = range(smallest, width + 1, c.heads)
        return sized(max((one for one in wider if cls.count(sized(one), shape) <= budget), default=smallest))


def _noisy(x: Float[Tensor, "b q h"], view: View, purpose: int, dropout: float, skip: float) -> Float[Tensor, "b q h"]:
    """Features dropped, and whole rows; the same for all tokens of a row, so that padding has no say."""
    chance = view.chance
    if chance is None:
        return x
    kept = (chance.uniform(x.shape[-1], purpose=2 * purpose) >= dropout)[:, None] / (1 - dropout)
    stays = (chance.uniform(1, purpose=2 * purpose + 1) >= skip)[:, None] / (1 - skip)
    return x * kept * stays
