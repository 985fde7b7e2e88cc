"""InfoPrompt (arXiv 2306.04933, NeurIPS 2023): prompts with two bounds on mutual information beside the task's loss.

Knows no backbone. Rebuilt from the abstract and from reading the authors' release, whose faults are not repeated;
docs/methods/infoprompt.md says which.

Notation: P [n, d] the prompt, m [h] the state of the answer under it and m0 without it; M, S [h, r] mean and log-std of
a Gaussian q(z | m), O [r, d] back to the width of embeddings, Theta [c, d] the head, W [d, d] the critic's map.
f(z, P) = <O z, mean(W P)> / sqrt(d), and t = mean(Theta) over classes.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, cast

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from promptuary.errors import ConfigError
from promptuary.methods.base import Method, MethodConfig, check_size
from promptuary.prompts import losses
from promptuary.prompts.blocks import linear_start
from promptuary.prompts.init import Starting
from promptuary.types import Losses, Outputs, Prompt, Shape, View

Anchor = Literal["front", "after_bos", "before_answer", "after_answer", "end"]
PREDICTION, REPRESENTATION, NULL = 1, 2, 3
"""Purposes of the noise of a step: of the prediction, of the representation loss, and of its negatives."""


class InfoPromptConfig(MethodConfig):
    """Settings of InfoPrompt."""

    name: Literal["infoprompt"] = "infoprompt"
    num_virtual_tokens: int = Field(1, ge=1, description="k, rows at each place; the release has 1")
    slots: tuple[Anchor, ...] = Field(
        ("after_bos", "end"),
        min_length=1,
        description="places of the rows; every family has these two (our choice). The "
        "release has after_bos, before_answer, after_answer and end, on a masked model",
    )
    prompt_source: Literal["static", "instance"] = Field(
        "static",
        description='"static": trained rows (the abstract); "instance": from a frozen state of the text (the release)',
    )
    instance_state: Literal["answer", "first"] = Field(
        "answer",
        description='what an instance prompt is made from: the frozen state of the "answer" (our choice, for every '
        'family) or of the "first" token (the release), which says nothing on causal models',
    )
    representation: Literal["gaussian", "deterministic"] = Field(
        "gaussian", description='z is drawn from q(z | m) ("gaussian", the release), or is the state itself'
    )
    rank: int = Field(32, ge=1, description="r, width of z and of the generator; the release")
    negatives: int = Field(
        32, ge=1, description="samples of the null posterior per example; the release has four times a batch of 8"
    )
    representation_weight: float = Field(0.2, ge=0, description="beta; the release. 0 leaves loss and critic out")
    head_weight: float = Field(0.1, ge=0, description="gamma; the release. 0 leaves the loss out")
    kl_weight: float = Field(0.1, ge=0, description="of the prior on z; in the release, not in the abstract")
    nce_floor: float | None = Field(
        None,
        lt=0,
        description="log-probability below which a loss has no gradient; the release has -2, which silences it",
    )
    modules_lr: float = Field(1e-3, gt=0, description="learning rate of maps and head; the release")


class InfoPrompt(Method):
    """A prompt, a head on the state of the answer, and what the two losses need."""

    name = "infoprompt"
    title = "InfoPrompt"
    paper = "arXiv 2306.04933"
    reconstructed = True
    reads = frozenset({"answer"})
    tiny: ClassVar = {"rank": 4, "negatives": 6, "num_virtual_tokens": 2}
    groups: ClassVar = {"rows": "prompt"} | dict.fromkeys(
        ("down", "down_bias", "up", "up_bias", "mean", "mean_bias", "spread", "spread_bias", "out", "out_bias",
         "critic", "critic_bias", "head"),
        "modules",
    )  # fmt: skip
    Config = InfoPromptConfig
    rows: nn.Parameter
    down: nn.Parameter
    down_bias: nn.Parameter
    up: nn.Parameter
    up_bias: nn.Parameter
    mean: nn.Parameter
    mean_bias: nn.Parameter
    spread: nn.Parameter
    spread_bias: nn.Parameter
    out: nn.Parameter
    out_bias: nn.Parameter
    critic: nn.Parameter
    critic_bias: nn.Parameter
    head: nn.Parameter

    @property
    def settings(self) -> InfoPromptConfig:
        """The settings with their own type."""
        return cast(InfoPromptConfig, self.config)

    @property
    def depends(self) -> bool:
        """Only an instance prompt does."""
        return self.settings.prompt_source == "instance"

    @property
    def needs(self) -> frozenset[str]:
        """Frozen states for an instance prompt and for the null posterior, embeddings for the head's loss."""
        c = self.settings
        found = set[str]()
        if c.head_weight:
            found.add("embeddings")
        if c.representation_weight or (c.kl_weight and c.representation == "gaussian"):
            found.add("answer")
        if self.depends:
            found.add("answer" if c.instance_state == "answer" else "states")
        return frozenset(found)

    @classmethod
    def sizes(cls, config: MethodConfig, shape: Shape) -> dict[str, tuple[int, ...]]:
        """Tensors by name; only what the settings use.

        Raises:
            ConfigError: the task has no labels, or the states are not as wide as the embeddings where z is the state.
        """
        c, d, h = cast(InfoPromptConfig, config), shape.width, shape.hidden or shape.width
        if not shape.classes:
            raise ConfigError("infoprompt has a head over label words of its own: it needs a task with labels")
        n, r = c.num_virtual_tokens * len(c.slots), c.rank
        found: dict[str, tuple[int, ...]] = {}
        if c.prompt_source == "static":
            found["rows"] = (n, d)
        else:
            found |= {"down": (h, r), "down_bias": (r,), "up": (r, n * d), "up_bias": (n * d,)}
        if c.representation == "gaussian":
            found |= {"mean": (h, r), "mean_bias": (r,), "spread": (h, r), "spread_bias": (r,)}
            found |= {"out": (r, d), "out_bias": (d,)}
        elif h != d:
            raise ConfigError(
                f"method.representation: deterministic compares states of width {h} with embeddings of width {d}; use "
                "gaussian on this model"
            )
        if c.representation_weight:
            found |= {"critic": (d, d), "critic_bias": (d,)}
        return found | {"head": (shape.classes, d)}

    def build(self) -> None:
        """What the settings use."""
        for name, size in self.sizes(self.config, self.shape).items():
            setattr(self, name, self.parameter(*size))

    def fill(self, source: Starting) -> None:
        """Rows as `init` says, the head from the embeddings of the label words, maps as torch starts a layer."""
        for name, value in self.named_parameters():
            if name == "rows":
                value.copy_(self.first_rows(len(value), source))
            elif name == "head":
                value.copy_(source.label_words())
            elif not name.endswith("_bias"):
                linear_start(value, getattr(self, f"{name}_bias"), source.generator)

    def prompt(self, view: View) -> Prompt:
        """P, or g(c) of the frozen state c; in both cases k rows at each place."""
        c = self.settings
        placement = tuple((slot, c.num_virtual_tokens) for slot in c.slots)
        if not self.depends:
            return Prompt(rows=self.rows[None], placement=placement)
        if c.instance_state == "answer":
            state = view.answer
        else:
            assert view.states is not None
            assert view.mask is not None
            first = view.mask.long().argmax(1)
            state = view.states[torch.arange(len(first), device=first.device), first]
        assert state is not None
        # g(c) = up gelu(down c)
        hidden = torch.nn.functional.gelu(state @ self.down + self.down_bias)
        rows = (hidden @ self.up + self.up_bias).unflatten(1, (-1, self.shape.width))
        return Prompt(rows=rows, placement=placement)

    def scores(self, outputs: Outputs) -> Float[Tensor, "b c"]:
        """Theta O(z): with noise in training, at the mean in evaluation."""
        return self._represented(outputs, PREDICTION) @ self.head.T

    def loss(self, task_loss: Float[Tensor, ""], outputs: Outputs) -> Losses:
        """L_task + gamma L_head + beta L_rep + kl_weight L_kl; see the notation above."""
        c, view = self.settings, outputs.view
        total, parts = task_loss, {"task": float(task_loss.detach())}

        def add(name: str, weight: float, value: Tensor) -> None:
            nonlocal total
            total = total + weight * value
            parts[name] = float(value.detach())

        rows = self.prompt(view).rows
        assert rows is not None
        if c.head_weight:
            assert view.embeddings is not None
            assert view.mask is not None
            per_row = losses.aligned_nce(rows, self.head.mean(0), view.embeddings, view.mask, c.nce_floor)
            add("head", c.head_weight, per_row.mean())
        if c.representation_weight:
            # no gradient reaches P through the critic: it would move the context to fit the negatives
            context = (rows.detach() @ self.critic + self.critic_bias).mean(1)
            positive = self._represented(outputs, REPRESENTATION)
            per_row = losses.conditional_nce(positive, self._null(view), context, c.nce_floor)
            add("representation", c.representation_weight, per_row.mean())
        if c.kl_weight and c.representation == "gaussian":
            assert outputs.answer is not None
            assert view.answer is not None
            prior = sum(losses.gaussian_kl(*self._posterior(state)).mean() for state in (outputs.answer, view.answer))
            assert isinstance(prior, Tensor)
            add("prior", c.kl_weight, prior)
        return Losses(total, parts)

    def _posterior(self, state: Float[Tensor, "b h"]) -> tuple[Float[Tensor, "b r"], Float[Tensor, "b r"]]:
        """Mean and log-std of q(z | m)."""
        spread = (state @ self.spread + self.spread_bias).clamp(-2, 10)
        return state @ self.mean + self.mean_bias, spread

    def _represented(self, outputs: Outputs, purpose: int) -> Float[Tensor, "b d"]:
        """O(z), z from q(z | m)."""
        state, chance = outputs.answer, outputs.view.chance
        assert state is not None
        if self.settings.representation == "deterministic":
            return state
        mean, spread = self._posterior(state)
        if chance is not None:
            mean = losses.reparameterised(mean, spread, chance.normal(self.settings.rank, purpose=purpose))
        return mean @ self.out + self.out_bias

    def _null(self, view: View) -> Float[Tensor, "b k d"]:
        """What the text alone says: samples of q(z | m0), or m0 itself."""
        assert view.answer is not None
        if self.settings.representation == "deterministic":
            return view.answer[:, None]
        mean, spread = (part[:, None] for part in self._posterior(view.answer))
        if view.chance is not None:
            noise = view.chance.normal(self.settings.negatives, self.settings.rank, purpose=NULL)
            mean = losses.reparameterised(mean, spread, noise)
        return mean @ self.out + self.out_bias

    @classmethod
    def count(cls, config: MethodConfig, shape: Shape) -> int:
        """The sum over `sizes`; in the release d r + r + r n d + n d + d^2 + d + 2 (d r + r) + r d + d + c d."""
        return sum(math.prod(size) for size in cls.sizes(config, shape).values())

    @classmethod
    def match_budget(cls, config: MethodConfig, length: int, shape: Shape) -> MethodConfig:
        """The largest rank that fits."""
        budget = length * shape.width

        def numbers(rank: int) -> int:
            return cls.count(config.model_copy(update={"rank": rank}), shape)

        critic = cast(InfoPromptConfig, config).representation_weight > 0
        fix = (
            "method.representation_weight: 0, which leaves the critic out" if critic else "fewer slots or rows in each"
        )
        check_size(numbers(1), budget, length, f"set {fix}")
        each = numbers(2) - numbers(1)
        rank = 1 + (budget - numbers(1)) // each if each else 1
        return config.model_copy(update={"rank": min(rank, shape.width)})
