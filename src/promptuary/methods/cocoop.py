"""CoCoOp (Zhou et al. 2022, arXiv 2203.05557): a context that a small network moves for each image.

Knows no backbone, image or class: it sees the frozen feature of the image.

Notation: V [m, d] the context, f [h] the image's feature as a unit vector, pi(f) = up relu(down f), with biases, [d].
V_i(f) = V_i + pi(f) for every row i.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, cast

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from promptuary.methods.base import ContextConfig, Method, MethodConfig, check_size
from promptuary.prompts.blocks import linear_start
from promptuary.prompts.contexts import context_placement, starting_contexts
from promptuary.prompts.init import Starting
from promptuary.types import Prompt, Shape, View


class CoCoOpConfig(ContextConfig):
    """Settings of CoCoOp."""

    name: Literal["cocoop"] = "cocoop"
    reduction: int = Field(16, ge=1, description="the network is h / reduction wide inside; the release has 16")
    modules_lr: float = Field(2e-3, gt=0, description="learning rate of the network; the release, as prompt_lr")


class CoCoOp(Method):
    """A context, and a network from an image's feature to one change for all its rows."""

    name = "cocoop"
    title = "CoCoOp"
    paper = "arXiv 2203.05557"
    sites = frozenset({"context"})
    modalities = frozenset({"image", "text"})
    undecayed = frozenset()
    tiny: ClassVar = {"num_virtual_tokens": 3, "prompt_lr": 0.05, "modules_lr": 0.02}
    groups: ClassVar = {"context": "prompt"} | dict.fromkeys(("down", "down_bias", "up", "up_bias"), "modules")
    Config = CoCoOpConfig
    context: nn.Parameter
    down: nn.Parameter
    down_bias: nn.Parameter
    up: nn.Parameter
    up_bias: nn.Parameter

    @property
    def settings(self) -> CoCoOpConfig:
        """The settings with their own type."""
        return cast(CoCoOpConfig, self.config)

    @property
    def needs(self) -> frozenset[str]:
        """The image's feature."""
        return frozenset({"answer"})

    @classmethod
    def sizes(cls, config: MethodConfig, shape: Shape) -> dict[str, tuple[int, ...]]:
        """Tensors by name."""
        c, d, h = cast(CoCoOpConfig, config), shape.width, shape.hidden or shape.width
        inner = max(1, h // c.reduction)
        return {
            "context": (c.num_virtual_tokens, d),
            "down": (h, inner),
            "down_bias": (inner,),
            "up": (inner, d),
            "up_bias": (d,),
        }

    def build(self) -> None:
        """V and pi."""
        for name, size in self.sizes(self.config, self.shape).items():
            setattr(self, name, self.parameter(*size))

    def fill(self, source: Starting) -> None:
        """V as `init` says, pi as torch starts such layers."""
        c = self.settings
        self.context.copy_(starting_contexts(c.init, (1, *self.context.shape), source, text=c.init_text)[0])
        for weight, bias in ((self.down, self.down_bias), (self.up, self.up_bias)):
            linear_start(weight, bias, source.generator)

    def change(self, features: Float[Tensor, "b h"]) -> Float[Tensor, "b d"]:
        """The change for each image; the length of a feature has no say."""
        unit = nn.functional.normalize(features, dim=-1)
        return torch.relu(unit @ self.down + self.down_bias) @ self.up + self.up_bias

    def prompt(self, view: View) -> Prompt:
        """A context for each image, [b, 1, 1, m, d]."""
        assert view.answer is not None
        c = self.settings
        moved = self.context + self.change(view.answer)[:, None]
        place = context_placement(c.placement, c.num_virtual_tokens)
        return Prompt(context=moved[:, None, None], placement=place, by_row=True)

    @classmethod
    def count(cls, config: MethodConfig, shape: Shape) -> int:
        """M d + h i + i + i d + d with i = h / 16; 35,360 for CLIP ViT-B/16."""
        return sum(math.prod(size) for size in cls.sizes(config, shape).values())

    @classmethod
    def match_budget(cls, config: MethodConfig, length: int, shape: Shape) -> MethodConfig:
        """The most rows that fit beside the network."""
        budget = length * shape.width
        rest = cls.count(config.model_copy(update={"num_virtual_tokens": 0}), shape)
        check_size(rest + shape.width, budget, length, "raise method.reduction")
        return config.model_copy(update={"num_virtual_tokens": (budget - rest) // shape.width})
