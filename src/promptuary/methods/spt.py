"""Self-prompt tuning (Wang et al. 2024, arXiv 2402.02382): VPT that starts as prototypes of the images' own patches.

Knows no backbone and no image: the tokens that enter each layer of the frozen model come as a stream.

Notation: E_i [n, v] the patch tokens that enter layer i + 1 of the frozen model, P_i [p, v] prototypes of them. Form,
loss and training are those of VPT.
"""

from __future__ import annotations

from typing import ClassVar, Literal, cast

import torch
from pydantic import Field, model_validator

from promptuary.errors import ConfigError
from promptuary.methods.visual import Visual, VisualConfig
from promptuary.prompts.init import Starting
from promptuary.prompts.patches import Prototypes, sampler


class SPTConfig(VisualConfig):
    """Settings of SPT."""

    name: Literal["spt"] = "spt"
    init: Literal["random"] = Field("random", description="of no use here: `prototypes` says how the rows start")
    prototypes: Prototypes = Field(
        "random",
        description='"random" patch tokens (SPT\'s default), "mean" or "max" of windows of an image, "kmeans" centres',
    )
    images: int | None = Field(
        1000,
        ge=1,
        description="training images whose patches are looked at, at most; our choice. null: as many as there are "
        "(SPT's scripts for a supervised model and MAE; the one for MoCo-v3: 1)",
    )
    cluster_tokens: int = Field(
        50_000, ge=1, le=200_000, description='tokens of a layer that "kmeans" keeps and clusters; our choice'
    )
    position: bool = Field(
        False, description="tokens of the first layer with their position added; the release: without"
    )
    official: bool = Field(
        False,
        description="as the release: images with replacement, in training views, and its windows for mean and max; "
        "ours: without replacement, in plain views, and windows of equal length",
    )

    @model_validator(mode="after")
    def _released(self) -> SPTConfig:
        if self.official and not self.deep and self.prototypes != "random":
            raise ValueError(
                "expected prototypes: random with official: true and deep: false, as the release knows no other there, "
                f"got {self.prototypes}"
            )
        return self


class SPT(Visual):
    """Rows that start as prototypes of patch tokens, each layer's of its own."""

    name = "spt"
    title = "SPT"
    paper = "arXiv 2402.02382"
    tiny: ClassVar = {"num_virtual_tokens": 4, "prompt_lr": 5e-2}
    Config = SPTConfig

    @property
    def settings(self) -> SPTConfig:
        """The settings with their own type."""
        return cast(SPTConfig, self.config)

    def fill(self, source: Starting) -> None:
        """P_i out of the E_i of the un-prompted model, a draw of its own for each layer.

        Raises:
            ConfigError: no training images are at hand, or too few for so many rows.
        """
        if source.patches is None:
            raise ConfigError(
                "spt starts from patches of the training images, but there are none here; give it the data"
            )
        c, rows = self.settings, self.rows
        seeds = torch.randint(2**53, (1 + len(rows),), generator=source.generator).tolist()
        images, *own = (torch.Generator().manual_seed(seed) for seed in seeds)
        samplers = [
            sampler(c.prototypes, rows.shape[1], one, official=c.official, most=c.cluster_tokens) for one in own
        ]
        views = source.patches.tokens(
            c.images, images, position=c.position, replacement=c.official, augmented=c.official
        )
        for tokens in views:
            for one, entering in zip(samplers, tokens[: len(samplers)], strict=True):
                one.update(entering)
        rows.copy_(torch.stack([one.rows() for one in samplers]))
