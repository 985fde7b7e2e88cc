"""MaPLe (Khattak et al. 2023, arXiv 2210.03117): contexts in the first layers of both towers, tied by linear maps.

Knows no backbone, image or class.

Notation: V_k [m, d] the context before layer k of the text tower, k = 1..J; F_k [d, v] a map to the width of patches.
The rows before layer k of the image tower are V_k F_k + f_k.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, cast

from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from promptuary.errors import ConfigError
from promptuary.methods.base import ContextConfig, Method, MethodConfig, check_size
from promptuary.prompts.blocks import linear_start
from promptuary.prompts.contexts import random_contexts, starting_contexts
from promptuary.prompts.init import Starting
from promptuary.types import Prompt, Shape, View


class MaPLeConfig(ContextConfig):
    """Settings of MaPLe."""

    name: Literal["maple"] = "maple"
    num_virtual_tokens: int = Field(2, ge=1, description="m, rows of each layer; the release has 2")
    depth: int = Field(9, ge=1, description="J, layers of each tower with rows of their own; the release has 9")
    init_text: str | None = Field(
        "a photo",
        description='what the first layer starts as, with init: "text"; the release, where "of a" stands before the '
        "class (task.label_template)",
    )
    placement: Literal["front"] = Field("front", description="before the words of the class; the release")
    prompt_lr: float = Field(3.5e-3, gt=0, description="learning rate of the rows; the release, with SGD")
    modules_lr: float = Field(3.5e-3, gt=0, description="learning rate of the maps; the release, as prompt_lr")


class MaPLe(Method):
    """Contexts of layers, and a map of each to the image tower."""

    name = "maple"
    title = "MaPLe"
    paper = "arXiv 2210.03117"
    sites = frozenset({"context", "layers"})
    modalities = frozenset({"image", "text"})
    undecayed = frozenset()
    tiny: ClassVar = {"num_virtual_tokens": 2, "depth": 2, "prompt_lr": 0.05, "modules_lr": 0.01}
    groups: ClassVar = {"contexts": "prompt", "maps": "modules", "map_biases": "modules"}
    Config = MaPLeConfig
    contexts: nn.Parameter
    maps: nn.Parameter
    map_biases: nn.Parameter

    @property
    def settings(self) -> MaPLeConfig:
        """The settings with their own type."""
        return cast(MaPLeConfig, self.config)

    @classmethod
    def sizes(cls, config: MethodConfig, shape: Shape) -> dict[str, tuple[int, ...]]:
        """Tensors by name.

        Raises:
            ConfigError: the model that sees has fewer layers.
        """
        c, d, v = cast(MaPLeConfig, config), shape.width, shape.visual or shape.width
        if shape.depth and c.depth > shape.depth:
            raise ConfigError(f"method.depth is {c.depth}, and this model has {shape.depth} layers that see; lower it")
        return {"contexts": (c.depth, c.num_virtual_tokens, d), "maps": (c.depth, d, v), "map_biases": (c.depth, v)}

    def build(self) -> None:
        """V [J, m, d], F [J, d, v], f [J, v]."""
        for name, size in self.sizes(self.config, self.shape).items():
            setattr(self, name, self.parameter(*size))

    def fill(self, source: Starting) -> None:
        """V_1 as `init` says, the deeper ones N(0, 0.02^2), maps as torch starts a layer."""
        c, (layers, count, width) = self.settings, self.contexts.shape
        self.contexts[:1] = starting_contexts(c.init, (1, count, width), source, text=c.init_text)
        self.contexts[1:] = random_contexts(layers - 1, count, width, generator=source.generator)
        for weight, bias in zip(self.maps, self.map_biases, strict=True):
            linear_start(weight, bias, source.generator)

    def seen(self) -> Float[Tensor, "l m v"]:
        """The rows of the image tower."""
        return self.contexts @ self.maps + self.map_biases[:, None]

    def prompt(self, view: View) -> Prompt:
        """V in the text of every class, context [1, 1, J, m, d], and layers [1, J, m, v] among the patches."""
        return Prompt(context=self.contexts[None, None], layers=self.seen()[None], placement=self.settings.placement)

    @classmethod
    def count(cls, config: MethodConfig, shape: Shape) -> int:
        """J m d + J (d v + v); 3,555,072 for CLIP ViT-B/16."""
        return sum(math.prod(size) for size in cls.sizes(config, shape).values())

    @classmethod
    def match_budget(cls, config: MethodConfig, length: int, shape: Shape) -> MethodConfig:
        """The most layers that fit, at most those there are."""
        budget = length * shape.width
        each = cls.count(config.model_copy(update={"depth": 1}), shape)
        check_size(each, budget, length, "a single layer with its map is that large; use another method, such as coop")
        layers = budget // each
        return config.model_copy(update={"depth": min(layers, shape.depth) if shape.depth else layers})
