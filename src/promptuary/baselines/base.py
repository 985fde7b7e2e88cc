"""What a baseline is: it says which numbers of a model are trained instead of a prompt, and may add some to it.

Knows no prompt, task, data set, file or device; a model is torch modules and parameters here.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from promptuary.errors import ConfigError
from promptuary.methods.base import Group, Stage
from promptuary.settings import Settings


class BaselineConfig(Settings):
    """Settings that every baseline has; a baseline adds its own."""

    name: str = Field(description="baseline; `promptuary methods` lists them")


class WeightsConfig(BaselineConfig):
    """Settings of a baseline that trains weights of the model."""

    learning_rate: float = Field(gt=0, description="of all trained weights; a head has task.head_lr")
    weight_decay: float = Field(0.0, ge=0, description="of all trained weights; our choice")


class Baseline(abc.ABC):
    """One way of adapting a model by its weights.

    Facts that a baseline declares:
        name: file name, results column, and what the user types.
        title, paper: for tables.
        head_only: whether it trains nothing but the task's head.

    Three more are those of a method, for whoever trains it: `solver`, `advice` and `whole_batches`.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    head_only: ClassVar[bool] = False
    solver: ClassVar[str] = "gradient"
    advice: ClassVar[Mapping[str, Any]] = {}
    whole_batches: ClassVar[bool] = False
    Config: ClassVar[type[BaselineConfig]]

    def __init__(self, config: BaselineConfig) -> None:
        """Keep the settings; the model comes in `install`."""
        self.config = config
        self.parameters: dict[str, nn.Parameter] = {}

    @abc.abstractmethod
    def choose(self, model: nn.Module, generator: torch.Generator) -> Mapping[str, nn.Parameter]:
        """Names and parameters that shall be trained; what has to be added to the model is added.

        Raises:
            ConfigError: the model has no such parameters.
        """

    def install(self, model: nn.Module, generator: torch.Generator) -> None:
        """Make the parameters of a model trainable.

        Args:
            model: frozen as a whole.
            generator: of starting values.

        Raises:
            ConfigError: it has no such parameters, or they are held in a precision in which small steps are lost.
        """
        self.parameters = dict(self.choose(model, generator))
        coarse = next((p.dtype for p in self.parameters.values() if p.dtype != torch.float32), None)
        if coarse is not None:
            raise ConfigError(
                f"{self.name} would train weights that are held as {str(coarse).removeprefix('torch.')}, where small "
                "steps are lost; use backbone.dtype: float32 and no quantization"
            )
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)

    def trained(self) -> list[Group]:
        """Every trained tensor with its learning rate."""
        config = self.config
        if not isinstance(config, WeightsConfig):
            return []
        return [Group(n, p, config.learning_rate, config.weight_decay) for n, p in self.parameters.items()]

    def stages(self) -> tuple[Stage, ...]:
        """One: everything is trained from the first step to the last."""
        return (Stage("all"),)

    def companions(self) -> dict[str, bytes]:
        """Files that other libraries read, by name, to stand beside the trained tensors."""
        return {}
