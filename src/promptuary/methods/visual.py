"""What visual prompt methods share: trained rows among the patches of an image, in one layer or in all (VPT's form).

Knows no backbone and no image, and is no method itself: where the first values come from is a method's own matter.

Notation: P [L, p, k] the rows of L layers; k is the width v of patch tokens unless a method projects them.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from promptuary.errors import ConfigError
from promptuary.methods.base import Method, MethodConfig, check_size
from promptuary.prompts.init import Starting
from promptuary.types import Prompt, Shape, View


class VisualConfig(MethodConfig):
    """Settings of every method with rows among the patches."""

    num_virtual_tokens: int = Field(20, ge=1, description="p, rows of a layer; SPT: 20 deep, 100 shallow")
    deep: bool = Field(
        True,
        description="rows of its own for every layer, in the place of those before (VPT-deep), or for the first layer "
        "alone (VPT-shallow)",
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="of the rows, for each image; VPT's release: 0.1 deep on VTAB-1k, 0 shallow"
    )
    frozen: bool = Field(
        False, description="leave the rows as they start and train the head alone (SPT, ablation of initialisers)"
    )
    init: Literal["random"] = Field("random", description="what the method draws; no text stands in an image's prompt")
    init_text: None = Field(None, description="none: no text stands in an image's prompt")
    init_prompt: None = Field(None, description="none: saved prompts are rows among text")
    placement: Literal["front"] = Field("front", description="between the special tokens and the patches (VPT)")
    prompt_lr: float = Field(
        5e-3,
        gt=0,
        description="learning rate of the rows, with AdamW; our choice between SPT's 1e-3 (a supervised ViT-B/16) and "
        "5e-2 (MAE)",
    )
    lr_unit: Literal["relative", "absolute"] = Field(
        "absolute",
        description='"absolute": as is (VPT, SPT); "relative": prompt_lr times the root mean square of the rows at the '
        "start",
    )
    weight_decay: float = Field(1e-2, ge=0, description="on the rows; SPT: 1e-2")


class Visual(Method):
    """Rows in the first layers of a model that sees."""

    sites = frozenset({"layers"})
    modalities = frozenset({"image"})
    rows: Tensor

    @property
    def groups(self) -> Mapping[str, str]:  # type: ignore[override]
        """All that is trained has one rate, as in VPT."""
        return {name: "prompt" for name, _ in self.named_parameters()}

    @property
    def visual(self) -> VisualConfig:
        """The settings that all such methods have."""
        return cast(VisualConfig, self.config)

    @classmethod
    def sizes(cls, config: MethodConfig, shape: Shape) -> dict[str, tuple[int, ...]]:
        """Tensors by name: the rows P [L, p, v]."""
        own = cast(VisualConfig, config)
        return {"rows": (shape.depth if own.deep else 1, own.num_virtual_tokens, shape.visual)}

    def build(self) -> None:
        """What `sizes` lists; constants where nothing but the head is trained."""
        for name, size in self.sizes(self.config, self.shape).items():
            if self.visual.frozen:
                self.constant(*size, name=name)
            else:
                setattr(self, name, self.parameter(*size))

    @abc.abstractmethod
    def fill(self, source: Starting) -> None:
        """The first rows, and what else there is."""

    def laid(self) -> Float[Tensor, "l p v"]:
        """The rows as the model takes them."""
        return self.rows

    def prompt(self, view: View) -> Prompt:
        """P; in training with dropout one for each image, as in VPT's release."""
        rows, dropout = self.laid()[None], self.visual.dropout
        if view.chance is not None and dropout:
            kept = view.chance.uniform(*rows.shape[1:]) >= dropout
            rows = rows * kept / (1 - dropout)
        return Prompt(layers=rows)

    def insight(self) -> Mapping[str, Tensor]:
        """Lengths of the rows, [L, p]."""
        return {"norms of rows": self.laid().detach().norm(dim=-1)}

    @classmethod
    def count(cls, config: MethodConfig, shape: Shape) -> int:
        """L p v; for ViT-B 184,320 deep with 20 rows a layer, 76,800 shallow with 100. Frozen: 0."""
        return 0 if cast(VisualConfig, config).frozen else cls._numbers(config, shape)

    @classmethod
    def match_budget(cls, config: MethodConfig, length: int, shape: Shape) -> MethodConfig:
        """Fewer rows of a layer, at least one; frozen rows as many as if they were trained."""
        one, two = (cls._numbers(config.model_copy(update={"num_virtual_tokens": rows}), shape) for rows in (1, 2))
        if one == two:
            raise ConfigError(
                f"{cls.name} stands among patches; give the whole shape of a model that sees (backbone.shape)"
            )
        budget = length * shape.width
        check_size(one, budget, length, "raise it, or set method.deep: false")
        update: dict[str, Any] = {"num_virtual_tokens": 1 + (budget - one) // (two - one)}
        return config.model_copy(update=update)

    @classmethod
    def _numbers(cls, config: MethodConfig, shape: Shape) -> int:
        return sum(math.prod(size) for size in cls.sizes(config, shape).values())


def uniform_rows(size: tuple[int, ...], patch: int, generator: torch.Generator) -> Float[Tensor, "l p k"]:
    """U(-u, u) with u = sqrt(6 / (3 patch^2 + k)), as VPT's release starts its rows; for ViT-B/16 u = 0.0625."""
    bound = math.sqrt(6 / (3 * patch * patch + size[-1]))
    return torch.empty(size).uniform_(-bound, bound, generator=generator)
