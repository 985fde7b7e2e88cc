"""PRE (Pham et al. 2023, arXiv 2309.07760): a context out of a small encoder, which is thrown away in the end.

Knows no backbone, image or class; what an encoder computes stands in `prompts/reparam.py`.

Notation: V [k, m, d] the trained inputs, theta the encoder over the m rows; the context is V' = theta(V) + V.
"""

from __future__ import annotations

from typing import ClassVar, Literal, cast

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from promptuary.methods.base import ContextConfig, Method, MethodConfig, check_size
from promptuary.prompts.contexts import context_placement, context_sets, starting_contexts
from promptuary.prompts.init import Starting
from promptuary.prompts.reparam import Kind, Network, network
from promptuary.types import Prompt, Shape, View


class PREConfig(ContextConfig):
    """Settings of PRE."""

    name: Literal["pre"] = "pre"
    class_specific: bool = Field(False, description="inputs for each class, through the same encoder; the release: no")
    encoder: Kind = Field(
        "bilstm",
        description="LSTM of both directions with one layer (the release) or two, an MLP of each row, the same twice, "
        "or a transformer of two layers without positions",
    )
    residual: bool = Field(True, description="V' = theta(V) + V, not theta(V) alone; the release")
    separate: bool = Field(
        False, description="an encoder for each of the m rows, which reads that row alone; not trained in the release"
    )
    zero_init_last: bool = Field(
        False, description="theta starts as zero, so that V' starts as V; our option, off as in the release"
    )
    bottleneck: int = Field(64, ge=1, description="width inside the MLPs; the release")
    dropout: float = Field(
        0.05, ge=0, lt=1, description="in training, between the layers of bilstm2 and in the transformer; the release"
    )
    modules_lr: float = Field(2e-3, gt=0, description="learning rate of the encoder; the release, as prompt_lr")


class PRE(Method):
    """Trained inputs and an encoder; what comes out is an ordinary context."""

    name = "pre"
    title = "PRE"
    paper = "arXiv 2309.07760"
    sites = frozenset({"context"})
    modalities = frozenset({"image", "text"})
    undecayed = frozenset()
    tiny: ClassVar = {"num_virtual_tokens": 3, "prompt_lr": 0.05, "modules_lr": 0.01}
    Config = PREConfig
    context: nn.Parameter

    @property
    def groups(self) -> dict[str, str]:  # type: ignore[override]
        """All but the inputs are modules."""
        return {name: "prompt" if name == "context" else "modules" for name, _ in self.named_parameters()}

    @property
    def settings(self) -> PREConfig:
        """The settings with their own type."""
        return cast(PREConfig, self.config)

    @classmethod
    def size(cls, config: MethodConfig, shape: Shape) -> tuple[int, int, int]:
        """Of V: sets, rows, width.

        Raises:
            ConfigError: inputs for each class of a task that has none.
        """
        c = cast(PREConfig, config)
        return context_sets(c.class_specific, shape.classes), c.num_virtual_tokens, shape.width

    @classmethod
    def network(cls, config: MethodConfig, shape: Shape) -> Network:
        """Theta without its tensors.

        Raises:
            ConfigError: it cannot have this width.
        """
        c = cast(PREConfig, config)
        return network(c.encoder, shape.width, inner=c.bottleneck, dropped=c.dropout)

    @property
    def several(self) -> int:
        """How many encoders there are."""
        return self.settings.num_virtual_tokens if self.settings.separate else 1

    def build(self) -> None:
        """V and the tensors of each encoder."""
        self.context = self.parameter(*self.size(self.config, self.shape))
        self.theta = self.network(self.config, self.shape)
        for number in range(self.several):
            for name, size in self.theta.sizes().items():
                setattr(self, f"theta_{number}_{name}", self.parameter(*size))

    def fill(self, source: Starting) -> None:
        """V as `init` says; the encoder as torch starts such layers, or so that it gives zero."""
        c = self.settings
        self.context.copy_(starting_contexts(c.init, self.size(c, self.shape), source, text=c.init_text))
        for number in range(self.several):
            self.theta.fill(self.tensors(number), source.generator, silent=c.zero_init_last)

    def tensors(self, number: int) -> dict[str, Tensor]:
        """Those of one encoder, by the names that it gives them."""
        return {name: getattr(self, f"theta_{number}_{name}") for name in self.theta.sizes()}

    def encoded(self, chance: torch.Generator | None = None) -> Float[Tensor, "k m d"]:
        """V'; contexts of several classes are a batch. The encoder runs once, whatever the images and classes are."""
        c, x = self.settings, self.context
        if c.separate:
            rows = x.split(1, dim=1)
            found = torch.cat([self.theta(self.tensors(n), row, chance) for n, row in enumerate(rows)], dim=1)
        else:
            found = self.theta(self.tensors(0), x, chance)
        return found + x if c.residual else found

    def prompt(self, view: View) -> Prompt:
        """V' in the text of each class, context [1, k, 1, m, d]; in training with the dropout of the step."""
        c = self.settings
        found = self.encoded(None if view.chance is None else view.chance.shared())
        return Prompt(context=found[None, :, None], placement=context_placement(c.placement, c.num_virtual_tokens))

    @classmethod
    def count(cls, config: MethodConfig, shape: Shape) -> int:
        """K m d and the encoder, once or m times; at d = 512 that of bilstm has 1,576,960."""
        c = cast(PREConfig, config)
        sets, rows, width = cls.size(c, shape)
        return sets * rows * width + (rows if c.separate else 1) * cls.network(c, shape).count()

    @classmethod
    def match_budget(cls, config: MethodConfig, length: int, shape: Shape) -> MethodConfig:
        """The widest MLP that fits; of other encoders, whose size follows from the width, the most rows."""
        c, budget = cast(PREConfig, config), length * shape.width
        narrow = c.encoder in ("mlp", "mlp_shared")
        name = "bottleneck" if narrow else "num_virtual_tokens"

        def numbers(value: int) -> int:
            return cls.count(c.model_copy(update={name: value}), shape)

        fix = "lower method.num_virtual_tokens" if narrow else "set method.encoder: mlp, which can be narrow"
        check_size(numbers(1), budget, length, fix)
        return c.model_copy(update={name: 1 + (budget - numbers(1)) // (numbers(2) - numbers(1))})
