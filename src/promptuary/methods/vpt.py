"""Visual prompt tuning (Jia et al. 2022, arXiv 2203.12119): trained rows among the patches, in one layer or in all.

Knows no backbone and no image; a head over the model's features is the task's matter.

Notation: P [L, p, v] the rows, L = 1 shallow. X_i = [cls_i ; P_i ; E_i] enters layer i + 1.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, cast

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from promptuary.methods.base import MethodConfig
from promptuary.methods.visual import Visual, VisualConfig, uniform_rows
from promptuary.prompts.init import Starting
from promptuary.types import Shape


class VPTConfig(VisualConfig):
    """Settings of VPT."""

    name: Literal["vpt"] = "vpt"
    project: int | None = Field(
        None,
        ge=1,
        description="k: the rows live in this width, and a trained linear map makes patch tokens of them; off",
    )


class VPT(Visual):
    """Rows that start at random, uniform."""

    name = "vpt"
    title = "VPT"
    paper = "arXiv 2203.12119"
    tiny: ClassVar = {"num_virtual_tokens": 4, "prompt_lr": 5e-2}
    Config = VPTConfig
    projection: Tensor
    bias: Tensor

    @property
    def settings(self) -> VPTConfig:
        """The settings with their own type."""
        return cast(VPTConfig, self.config)

    @classmethod
    def sizes(cls, config: MethodConfig, shape: Shape) -> dict[str, tuple[int, ...]]:
        """P [L, p, v]; or P [L, p, k], the map [k, v] and its bias [v], which all layers share."""
        found, project = super().sizes(config, shape), cast(VPTConfig, config).project
        if project is None:
            return found
        return {"rows": (*found["rows"][:2], project), "projection": (project, shape.visual), "bias": (shape.visual,)}

    def fill(self, source: Starting) -> None:
        """P uniform; the map Kaiming-normal by its outputs (VPT's release), its bias zero (our choice)."""
        self.rows.copy_(uniform_rows(tuple(self.rows.shape), self.shape.patch, source.generator))
        if self.settings.project is not None:
            spread = math.sqrt(2 / self.shape.visual)
            self.projection.copy_(torch.randn(self.projection.shape, generator=source.generator) * spread)
            self.bias.zero_()

    def laid(self) -> Float[Tensor, "l p v"]:
        """P, or P W + b."""
        return self.rows if self.settings.project is None else self.rows @ self.projection + self.bias
