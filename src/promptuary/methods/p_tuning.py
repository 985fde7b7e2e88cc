"""P-tuning (Liu et al. 2021, arXiv 2103.10385): rows that come out of an LSTM, anywhere in the template.

Knows no backbone and no template.

Notation: H [l, d] the trained inputs, P [l, d] what the encoder makes of them, read as one sequence once a step.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, ClassVar, Literal, cast

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from promptuary.methods.base import Method, MethodConfig, check_size
from promptuary.prompts.blocks import linear_start
from promptuary.prompts.init import Starting
from promptuary.types import Prompt, Shape, View


class PTuningConfig(MethodConfig):
    """Settings of P-tuning."""

    name: Literal["p_tuning"] = "p_tuning"
    num_virtual_tokens: int = Field(9, ge=1, description="l, rows; with slots their sum. The paper: 3 to 12")
    slots: dict[str, int] = Field(
        {}, description="rows of each named place of the template, in the order of the text, such as {prompt: 3}"
    )
    encoder: Literal["lstm", "mlp"] = Field("lstm", description="the paper's bidirectional LSTM, or an MLP of each row")
    hidden: int = Field(128, ge=1, description="width of the encoder's states; our choice (release: d)")
    layers: int = Field(2, ge=1, description="layers of the LSTM; the release has 2")
    modules_lr: float = Field(1e-3, gt=0, description="learning rate of the encoder; our choice")

    @model_validator(mode="before")
    @classmethod
    def _sum_of_slots(cls, values: Any) -> Any:
        slots = values.get("slots") if isinstance(values, dict) else None
        if isinstance(slots, dict) and slots and all(isinstance(one, int) for one in slots.values()):
            return {**values, "num_virtual_tokens": sum(slots.values())}
        return values


class PTuning(Method):
    """Trained inputs, an encoder over them, and what comes out as rows; the encoder is thrown away in the end."""

    name = "p_tuning"
    title = "P-tuning"
    paper = "arXiv 2103.10385"
    tiny: ClassVar = {"num_virtual_tokens": 4, "hidden": 8, "modules_lr": 5e-3}
    Config = PTuningConfig
    inputs: nn.Parameter

    @property
    def groups(self) -> dict[str, str]:  # type: ignore[override]
        """All but the inputs are modules."""
        return {name: "prompt" if name == "inputs" else "modules" for name, _ in self.named_parameters()}

    @property
    def settings(self) -> PTuningConfig:
        """The settings with their own type."""
        return cast(PTuningConfig, self.config)

    @classmethod
    def sizes(cls, config: MethodConfig, shape: Shape) -> dict[str, tuple[int, ...]]:
        """Tensors by name, in the order in which they are filled."""
        c, d = cast(PTuningConfig, config), shape.width
        found: dict[str, tuple[int, ...]] = {"inputs": (c.num_virtual_tokens, d)}
        if c.encoder == "mlp":
            widths: tuple[int, ...] = (d, c.hidden, c.hidden, d)
        else:
            widths = (2 * c.hidden, 2 * c.hidden, d)
            for layer in range(c.layers):
                below = d if layer == 0 else 2 * c.hidden
                for way in ("forward", "backward"):
                    # torch's own layout: four gates, two biases
                    found |= {
                        f"lstm_{layer}_{way}_input": (4 * c.hidden, below),
                        f"lstm_{layer}_{way}_hidden": (4 * c.hidden, c.hidden),
                        f"lstm_{layer}_{way}_input_bias": (4 * c.hidden,),
                        f"lstm_{layer}_{way}_hidden_bias": (4 * c.hidden,),
                    }
        for number, (below, above) in enumerate(itertools.pairwise(widths)):
            found |= {f"map_{number}": (below, above), f"map_{number}_bias": (above,)}
        return found

    def build(self) -> None:
        """What the encoder needs."""
        for name, size in self.sizes(self.config, self.shape).items():
            setattr(self, name, self.parameter(*size))

    def fill(self, source: Starting) -> None:
        """H as `init` says; the encoder as torch starts such layers."""
        self.inputs.copy_(self.first_rows(len(self.inputs), source))
        for name, value in self.named_parameters():
            if name.startswith("lstm_"):
                bound = 1 / math.sqrt(self.settings.hidden)
                value.uniform_(-bound, bound, generator=source.generator)
            elif name.startswith("map_") and not name.endswith("_bias"):
                linear_start(value, getattr(self, f"{name}_bias"), source.generator)

    def encoded(self) -> Float[Tensor, "l d"]:
        """P: an MLP over the LSTM's states at each row, or over the rows themselves."""
        c, found = self.settings, cast(Tensor, self.inputs)
        if c.encoder == "lstm":
            weights: list[Tensor] = [value for name, value in self.named_parameters() if name.startswith("lstm_")]
            start = found.new_zeros(2 * c.layers, 1, c.hidden)
            found = torch.lstm(found[None], (start, start), weights, True, c.layers, 0.0, False, True, True)[0][0]
        maps = [name for name, _ in self.named_parameters() if name.startswith("map_") and not name.endswith("_bias")]
        for name in maps:
            found = found if name == maps[0] else torch.relu(found)
            found = found @ getattr(self, name) + getattr(self, f"{name}_bias")
        return found

    def prompt(self, view: View) -> Prompt:
        """The rows, at their named places where there are such."""
        c = self.settings
        return Prompt(rows=self.encoded()[None], placement=tuple(c.slots.items()) or c.placement)

    @classmethod
    def count(cls, config: MethodConfig, shape: Shape) -> int:
        """The sum over `sizes`."""
        return sum(math.prod(size) for size in cls.sizes(config, shape).values())

    @classmethod
    def match_budget(cls, config: MethodConfig, length: int, shape: Shape) -> MethodConfig:
        """The widest encoder that fits."""
        budget = length * shape.width

        def numbers(hidden: int) -> int:
            return cls.count(config.model_copy(update={"hidden": hidden}), shape)

        check_size(numbers(1), budget, length, "lower method.num_virtual_tokens")
        hidden = 1
        while numbers(hidden + 1) <= budget:
            hidden += 1
        return config.model_copy(update={"hidden": hidden})
