"""BitFit: the bias terms of the model are trained, and nothing else.

Knows no architecture: a bias is what torch's modules call so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from promptuary.baselines.base import Baseline, WeightsConfig
from promptuary.errors import ConfigError


class BitFitConfig(WeightsConfig):
    """Settings of BitFit."""

    name: Literal["bitfit"] = "bitfit"
    learning_rate: float = Field(
        1e-3, gt=0, description="of all biases; the paper searches 1e-4 to 1e-3 (Ben Zaken et al. 2022, A.2)"
    )


class BitFit(Baseline):
    """All biases, those of normalisations included."""

    name = "bitfit"
    title = "BitFit"
    paper = "Ben Zaken et al. 2022, arXiv 2106.10199"
    Config = BitFitConfig

    def choose(self, model: nn.Module, generator: torch.Generator) -> Mapping[str, nn.Parameter]:
        """Every parameter that is called bias.

        Raises:
            ConfigError: there are none, as in Llama and T5.
        """
        found = {name: value for name, value in model.named_parameters() if name.rpartition(".")[2] == "bias"}
        if not found:
            raise ConfigError(f"{type(model).__name__} has no biases, which bitfit trains; use another baseline")
        return found
