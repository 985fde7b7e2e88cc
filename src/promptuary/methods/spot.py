"""SPoT (Vu et al. 2022, arXiv 2110.07904): prompt tuning that starts from prompts of other tasks, named or retrieved.

Knows no backbone, and not what the sources were trained for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, cast

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from promptuary.errors import ConfigError
from promptuary.methods.base import Method, MethodConfig, SourcedConfig, Stage, check_size
from promptuary.prompts.init import Saved, Starting
from promptuary.types import Prompt, Shape, View


class SpotConfig(SourcedConfig):
    """Settings of SPoT."""

    name: Literal["spot"] = "spot"
    num_virtual_tokens: int = Field(100, ge=1, description="rows of the prompt and of every source; the paper has 100")
    choose: Literal["nearest", "average"] = Field(
        "nearest",
        description='"nearest": a short training tells which sources are most like the task (the paper\'s retrieval); '
        '"average": the mean of all sources, from the start; of a single source both are that one',
    )
    top: int = Field(
        1, ge=1, description="sources that nearest averages, weighted by likeness; the paper tries 1 to all"
    )
    similarity: Literal["mean", "rows"] = Field(
        "mean", description="cosine of the mean rows, or mean cosine over all pairs of rows; the paper has both"
    )
    probe_share: float = Field(
        0.2, gt=0, lt=1, description="part of the steps of the short training; the paper: 10,000 of 262,144"
    )


class Spot(Method):
    """One table of trained rows, begun from other prompts."""

    name = "spot"
    title = "SPoT"
    paper = "arXiv 2110.07904"
    tiny: ClassVar = {"num_virtual_tokens": 3, "prompt_lr": 0.3}
    tiny_sources: ClassVar = ({"name": "prompt_tuning", "num_virtual_tokens": 3},) * 2
    groups: ClassVar = {"rows": "prompt"}
    Config = SpotConfig
    rows: nn.Parameter

    @property
    def settings(self) -> SpotConfig:
        """The settings with their own type."""
        return cast(SpotConfig, self.config)

    @property
    def retrieves(self) -> bool:
        """Whether there is anything to choose."""
        return self.settings.choose == "nearest" and len(self.settings.sources) > 1

    def build(self) -> None:
        """Rows [p, d]."""
        self.rows = self.parameter(self.settings.num_virtual_tokens, self.shape.width)

    def fill(self, source: Starting) -> None:
        """As `init` says where the sources are chosen later, else their mean.

        Raises:
            ConfigError: no source, or one of another length.
            NotFoldable: a source has no static rows.
        """
        known = self._known(source.sources)
        self.rows.copy_(self.first_rows(len(self.rows), source) if self.retrieves else known.mean(0))

    def stages(self) -> tuple[Stage, ...]:
        """A short training from `init`, whose prompt the sources are compared with; then from the chosen ones."""
        if not self.retrieves:
            return (Stage("all"),)
        share = self.settings.probe_share
        return Stage("probe", share), Stage("transfer", 1 - share)

    def begin(self, stage: int, source: Starting) -> Mapping[str, float]:
        """The sources that are most like the prompt now, weighted by their likeness, which is told."""
        c, known = self.settings, self._known(source.sources)
        found = likeness(self.rows, known, c.similarity)
        best = found.topk(min(c.top, len(known)))
        # a source that points away from the task takes no part, unless it is the best
        weights = best.values.clamp(min=0)
        weights = weights / weights.sum() if float(weights.sum()) > 0 else torch.eye(len(weights))[0]
        self.rows.copy_(torch.einsum("n,npd->pd", weights.to(known), known[best.indices]))
        return {f"likeness of {one.name}": value for one, value in zip(source.sources, found.tolist(), strict=True)}

    def _known(self, sources: Sequence[Saved]) -> Float[Tensor, "n p d"]:
        """The rows of the sources."""
        if not sources:
            raise ConfigError("spot starts from other prompts: name their folders in method.sources")
        found = [one.rows() for one in sources]
        for one, rows in zip(sources, found, strict=True):
            if len(rows) != len(self.rows):
                raise ConfigError(
                    f"{one.name} has {len(rows)} rows, and method.num_virtual_tokens is {len(self.rows)}; they have to "
                    "be the same"
                )
        return torch.stack(found)

    def prompt(self, view: View) -> Prompt:
        """The rows."""
        return Prompt(rows=self.rows[None], placement=self.settings.placement)

    @classmethod
    def count(cls, config: MethodConfig, shape: Shape) -> int:
        """P d."""
        return cast(SpotConfig, config).num_virtual_tokens * shape.width

    @classmethod
    def match_budget(cls, config: MethodConfig, length: int, shape: Shape) -> MethodConfig:
        """As it is: its length is that of its sources."""
        check_size(cls.count(config, shape), length * shape.width, length, "start from shorter sources")
        return config


def likeness(
    rows: Float[Tensor, "p d"], sources: Float[Tensor, "n p d"], similarity: Literal["mean", "rows"]
) -> Float[Tensor, " n"]:
    """Cosine similarity of a prompt to each source: of the mean rows, or the mean over all pairs of rows."""
    if similarity == "mean":
        return normalize(sources.mean(1), dim=-1) @ normalize(rows.mean(0), dim=-1)
    # the mean over pairs is the product of the mean unit rows
    return normalize(sources, dim=-1).mean(1) @ normalize(rows, dim=-1).mean(0)
