"""SMoP (Choi et al. 2023, EMNLP): several short prompts, and a router that gives each text one of them.

Knows no backbone.

Notation: P_i [s, d] the prompts, x the mean embedding of a text, W [d, n] the router.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, cast

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from promptuary.methods.base import Method, MethodConfig, check_size
from promptuary.prompts.blocks import masked_mean
from promptuary.prompts.init import Starting
from promptuary.types import Losses, Outputs, Prompt, Shape, View


class SMoPConfig(MethodConfig):
    """Settings of SMoP."""

    name: Literal["smop"] = "smop"
    num_prompts: int = Field(4, ge=2, description="n, prompts; the release has 4")
    num_virtual_tokens: int = Field(5, ge=1, description="s, rows of each; the release has 5")
    router_noise: float = Field(
        1.0, ge=0, description="in training a logit is multiplied by 1 + this times a normal number; the release has 1"
    )
    router_lr: float = Field(1e-2, gt=0, description="learning rate of the router; our choice (release: 0.5 for all)")


class SMoP(Method):
    """A sparse mixture of prompts: one of them for each text, times its probability."""

    name = "smop"
    title = "SMoP"
    paper = "EMNLP 2023, 2023.emnlp-main.884"
    tiny: ClassVar = {"num_prompts": 3, "num_virtual_tokens": 2, "prompt_lr": 0.5}
    groups: ClassVar = {"rows": "prompt", "router": "router"}
    Config = SMoPConfig

    @property
    def settings(self) -> SMoPConfig:
        """The settings with their own type."""
        return cast(SMoPConfig, self.config)

    @property
    def needs(self) -> frozenset[str]:
        """The text."""
        return frozenset({"embeddings"})

    def build(self) -> None:
        """P [n, s, d] and W [d, n]."""
        c, d = self.settings, self.shape.width
        self.rows = self.parameter(c.num_prompts, c.num_virtual_tokens, d)
        self.router = self.parameter(d, c.num_prompts)

    def fill(self, source: Starting) -> None:
        """Each prompt as `init` says, with other tokens of the vocabulary; an orthogonal router."""
        rows = self.first_rows(self.rows.shape[0] * self.rows.shape[1], source)
        self.rows.copy_(rows.view_as(self.rows))
        torch.nn.init.orthogonal_(self.router, generator=source.generator)

    def shares(self, view: View) -> Float[Tensor, "b n"]:
        """Probability of each prompt for each text: softmax of W x, with noise on the logits in training."""
        assert view.embeddings is not None
        assert view.mask is not None
        logits = masked_mean(view.embeddings, view.mask) @ self.router
        if view.chance is not None and self.settings.router_noise:
            logits = logits * (1 + self.settings.router_noise * view.chance.normal(self.settings.num_prompts))
        return torch.softmax(logits, dim=-1)

    def prompt(self, view: View) -> Prompt:
        """P_i p_i of the most probable i: the product is what the router learns through."""
        shares, best = self.shares(view).max(dim=-1)
        return Prompt(rows=self.rows[best] * shares[:, None, None], placement=self.settings.placement)

    def loss(self, task_loss: Float[Tensor, ""], outputs: Outputs) -> Losses:
        """The task's loss; for the log, the part of the texts that each prompt got. No loss balances them."""
        best = self.shares(outputs.view).detach().argmax(dim=-1)
        load = torch.bincount(best, minlength=self.settings.num_prompts) / max(len(best), 1)
        parts = {f"load of {number}": part for number, part in enumerate(load.tolist())}
        return Losses(task_loss, {"task": float(task_loss.detach()), **parts})

    def insight(self) -> Mapping[str, Tensor]:
        """Cosines between the mean rows of the prompts."""
        means = torch.nn.functional.normalize(self.rows.detach().mean(1), dim=-1)
        return {"similarity": means @ means.T}

    @classmethod
    def count(cls, config: MethodConfig, shape: Shape) -> int:
        """N s d + n d; for T5-base with four prompts of five rows 18,432."""
        c = cast(SMoPConfig, config)
        return c.num_prompts * (c.num_virtual_tokens + 1) * shape.width

    @classmethod
    def match_budget(cls, config: MethodConfig, length: int, shape: Shape) -> MethodConfig:
        """The longest prompts that fit."""
        c = cast(SMoPConfig, config)
        check_size(2 * c.num_prompts * shape.width, length * shape.width, length, "lower method.num_prompts")
        return c.model_copy(update={"num_virtual_tokens": length // c.num_prompts - 1})
