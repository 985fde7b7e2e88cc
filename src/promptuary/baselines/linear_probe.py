"""Linear probing: a head on what the frozen model says, and nothing else.

Knows no architecture and no task; the head is the task's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

from promptuary.baselines.base import Baseline, BaselineConfig


class LinearProbeConfig(BaselineConfig):
    """Settings of linear probing: none, since the head's are the task's (`task.head_lr`)."""

    name: Literal["linear_probe"] = "linear_probe"


class LinearProbe(Baseline):
    """No weight of the model."""

    name = "linear_probe"
    title = "Linear probe"
    paper = "Alain and Bengio 2016, arXiv 1610.01644"
    head_only = True
    Config = LinearProbeConfig

    def choose(self, model: nn.Module, generator: torch.Generator) -> Mapping[str, nn.Parameter]:
        """None."""
        return {}
