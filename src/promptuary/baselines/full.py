"""Full fine-tuning: every weight of the model is trained.

Knows no architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from promptuary.baselines.base import Baseline, WeightsConfig


class FullConfig(WeightsConfig):
    """Settings of full fine-tuning."""

    name: Literal["full"] = "full"
    learning_rate: float = Field(
        3e-5,
        gt=0,
        description="of all trained weights; BERT was fine-tuned with 2e-5 to 5e-5 (Devlin et al. 2019, A.3)",
    )


class Full(Baseline):
    """All parameters; those that have no part in the loss are left alone."""

    name = "full"
    title = "Full fine-tuning"
    paper = "Devlin et al. 2019, arXiv 1810.04805"
    Config = FullConfig

    def choose(self, model: nn.Module, generator: torch.Generator) -> Mapping[str, nn.Parameter]:
        """All of them, each once however many modules share it."""
        return dict(model.named_parameters())
