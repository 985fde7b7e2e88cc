"""Random projection: prompt rows that live in a fixed random subspace, of which only the coordinates are trained.

Knows no backbone, and of Promptuary only what a method may know.

Notation: Z [l, k] trained coordinates; R [k, d] fixed signs over sqrt(k); P = Z R [l, d].
"""

from __future__ import annotations

import hashlib
from typing import ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from promptuary.methods.base import Method, MethodConfig, check_size
from promptuary.prompts.init import Starting
from promptuary.types import Prompt, Shape, View


class RandomProjectionConfig(MethodConfig):
    """Settings of the random projection."""

    name: Literal["random_projection"] = "random_projection"
    num_virtual_tokens: int = Field(20, ge=1, description="l, rows of the prompt; our choice")
    dimension: int = Field(64, ge=1, description="k, coordinates of a row; our choice")
    projection_seed: int = Field(0, ge=0, description="which random subspace; our choice")


def signs(rows: int, columns: int, seed: int) -> Tensor:
    """Random +1 and -1, [rows, columns]: bits of SHAKE-256, so the same on every machine and with every torch."""
    count = rows * columns
    drawn = hashlib.shake_256(f"random_projection {seed} {rows} {columns}".encode()).digest(-(-count // 8))
    bits = torch.tensor(list(drawn))[:, None] >> torch.arange(8) & 1
    return (2.0 * bits.flatten()[:count] - 1).view(rows, columns)


class RandomProjection(Method):
    """Z, and an R that is made again from its seed instead of being saved."""

    name = "random_projection"
    title = "Random projection"
    paper = "after arXiv 1804.08838"
    tiny: ClassVar = {"num_virtual_tokens": 4, "dimension": 8}
    groups: ClassVar = {"z": "prompt"}
    Config = RandomProjectionConfig

    @property
    def settings(self) -> RandomProjectionConfig:
        """The settings with their own type."""
        return cast(RandomProjectionConfig, self.config)

    def build(self) -> None:
        """Z [l, k], and R [k, d], which follows from the settings."""
        c = self.settings
        self.z = self.parameter(c.num_virtual_tokens, c.dimension)
        r = signs(c.dimension, self.shape.width, c.projection_seed) / c.dimension**0.5
        self.register_buffer("r", r, persistent=False)

    def fill(self, source: Starting) -> None:
        """The coordinates whose rows come nearest to the starting rows P0 (least squares)."""
        rows = self.first_rows(self.settings.num_virtual_tokens, source)
        # min_Z |Z R - P0|:  Z = P0 R^+
        self.z.copy_(rows @ torch.linalg.pinv(self.get_buffer("r")))

    def prompt(self, view: View) -> Prompt:
        """P = Z R."""
        return Prompt(rows=(self.z @ self.get_buffer("r"))[None], placement=self.config.placement)

    @classmethod
    def count(cls, config: MethodConfig, shape: Shape) -> int:
        """L k, whatever the width."""
        c = cast(RandomProjectionConfig, config)
        return c.num_virtual_tokens * c.dimension

    @classmethod
    def match_budget(cls, config: MethodConfig, length: int, shape: Shape) -> MethodConfig:
        """The largest k <= d with l k <= length d."""
        c = cast(RandomProjectionConfig, config)
        check_size(c.num_virtual_tokens, length * shape.width, length, "lower method.num_virtual_tokens")
        return c.model_copy(update={"dimension": min(length * shape.width // c.num_virtual_tokens, shape.width)})
