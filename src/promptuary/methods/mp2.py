"""MP2 (Sun et al. 2023, arXiv 2210.07565): prompt modules that many tasks have in common, mixed by a router per task.

Knows no backbone, no other task and no search. The paper's reading-comprehension head and Chinese data are not here;
docs/methods/mp2.md says what is.

Notation: n rows, K modules, d the intrinsic dimension, D the width; R [K] a task's router, z [K, d], A [d, n D].
M_k = z_k A is a module, w = gates(R) / sum gates(R), and the prompt is E_0 + sum_k w_k M_k, E_0 [n, D] placeholders.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from promptuary.errors import ConfigError
from promptuary.methods.base import Method, MethodConfig, SourcedConfig, Stage, check_size
from promptuary.prompts.init import Saved, Starting
from promptuary.prompts.routing import log_gates, mixed, mixture_weights
from promptuary.types import Prompt, Shape, View

TINY = 1e-3
"""Routers and z start within this of zero, so that the prompt starts as its placeholders; the release."""


class MP2Config(SourcedConfig):
    """Settings of MP2."""

    name: Literal["mp2"] = "mp2"
    phase: Literal["pretrain", "gradient", "blackbox"] = Field(
        "pretrain",
        description='"pretrain": routers, z and A on many tasks; then on a new one from `sources`: "gradient", router '
        'then modules, or "blackbox", router then a vector, searched with forward passes alone',
    )
    num_virtual_tokens: int = Field(50, ge=1, description="n, rows; the release has 50")
    modules: int = Field(8, ge=1, description="K; the release has 8")
    intrinsic_dimension: int = Field(300, ge=1, description="d; the release has 300")
    attach: Literal["add", "replace"] = Field(
        "add", description="whether the mixture is added to placeholders (the release) or stands alone"
    )
    router_share: float = Field(
        0.5, gt=0, lt=1, description="part of the steps (or calls) for the router; release: 0.5, black-box 0.025"
    )
    router_lr: float = Field(5e-3, gt=0, description="learning rate of routers; release: 5e-3, then 1e-2")
    modules_lr: float = Field(1e-3, gt=0, description="learning rate of z and A, or of modules; release: 1e-3, 3e-4")


class MP2(Method):
    """Modular prompts with routers."""

    name = "mp2"
    title = "MP2"
    paper = "arXiv 2210.07565"
    shared = frozenset({"z", "a", "placeholders"})
    tiny: ClassVar = {
        "num_virtual_tokens": 3, "modules": 3, "intrinsic_dimension": 4, "router_lr": 0.1, "modules_lr": 0.05,
    }  # fmt: skip
    groups: ClassVar = {"router": "router", "z": "modules", "a": "modules", "parts": "modules", "vector": "modules"}
    relative = frozenset()
    Config = MP2Config
    router: nn.Parameter
    z: Tensor
    a: Tensor
    parts: nn.Parameter
    vector: nn.Parameter
    placeholders: Tensor

    @property
    def settings(self) -> MP2Config:
        """The settings with their own type."""
        return cast(MP2Config, self.config)

    @property
    def solver(self) -> str:  # type: ignore[override]
        """Black-box adaptation has no gradient."""
        return "evolution" if self.settings.phase == "blackbox" else "gradient"

    @property
    def advice(self) -> Mapping[str, Any]:
        """The step size of the release."""
        return {"sigma": 0.1}

    @classmethod
    def sizes(cls, config: MethodConfig, shape: Shape) -> dict[str, tuple[int, ...]]:
        """What is trained in this phase."""
        c = cast(MP2Config, config)
        rows = c.num_virtual_tokens * shape.width
        own: dict[str, dict[str, tuple[int, ...]]] = {
            "pretrain": {"z": (c.modules, c.intrinsic_dimension), "a": (c.intrinsic_dimension, rows)},
            "gradient": {"parts": (c.modules, rows)},
            "blackbox": {"vector": (c.intrinsic_dimension,)},
        }
        return {"router": (c.modules,), **own[c.phase]}

    def build(self) -> None:
        """What the phase trains, and as constants the placeholders, and z and A where they are searched through."""
        c = self.settings
        for name, size in self.sizes(c, self.shape).items():
            setattr(self, name, self.parameter(*size))
        rows = c.num_virtual_tokens * self.shape.width
        if c.phase == "blackbox":
            self.constant(c.modules, c.intrinsic_dimension, name="z")
            self.constant(c.intrinsic_dimension, rows, name="a")
        self.constant(c.num_virtual_tokens, self.shape.width, name="placeholders")

    def fill(self, source: Starting) -> None:
        """R, z ~ U(-1e-3, 1e-3), A ~ U(-b, b) with b = 1 / sqrt(n D), or z and A of a source; placeholders by `init`.

        Raises:
            ConfigError: a source is no pre-trained MP2 of these sizes, or sources do not share their modules.
        """
        c, generator = self.settings, source.generator
        self.router.uniform_(-TINY, TINY, generator=generator)
        self.placeholders.copy_(self.first_rows(c.num_virtual_tokens, source))
        rows = self.placeholders.numel()
        z = torch.empty(c.modules, c.intrinsic_dimension).uniform_(-TINY, TINY, generator=generator)
        bound = 1 / math.sqrt(rows)
        a = torch.empty(c.intrinsic_dimension, rows).uniform_(-bound, bound, generator=generator)
        if source.sources:
            found = self._source(source.sources)
            z, a = found["z"], found["a"]
            self.placeholders.copy_(found["placeholders"])
        if c.phase == "gradient":
            self.parts.copy_(z @ a)
        else:
            self.z.copy_(z)
            self.a.copy_(a)

    def _source(self, sources: Sequence[Saved]) -> Mapping[str, Tensor]:
        """The modules that the sources have in common."""
        c, first = self.settings, sources[0].tensors
        wanted = {
            "z": (c.modules, c.intrinsic_dimension),
            "a": (c.intrinsic_dimension, self.placeholders.numel()),
            "placeholders": tuple(self.placeholders.shape),
        }
        for one in sources:
            sizes = {name: tuple(one.tensors[name].shape) for name in wanted if name in one.tensors}
            if one.method != self.name or one.settings["phase"] != "pretrain" or sizes != wanted:
                raise ConfigError(
                    f"mp2 goes on from its own phase pretrain with the same num_virtual_tokens, modules and "
                    f"intrinsic_dimension; {one.name} is {one.method} of another phase, size or kind"
                )
            if not all(torch.equal(one.tensors[name], first[name]) for name in wanted):
                raise ConfigError("these sources do not share their modules: name tasks of one and the same run")
        return first

    def stages(self) -> tuple[Stage, ...]:
        """On a new task the router first, then the modules or the vector with the router as it is."""
        c = self.settings
        if c.phase == "pretrain":
            return (Stage("all", 1.0),)
        rest = "parts" if c.phase == "gradient" else "vector"
        return (
            Stage("router", c.router_share, frozenset({"router"})),
            Stage(rest, 1 - c.router_share, frozenset({rest})),
        )

    def weights(self, view: View) -> Float[Tensor, " k"]:
        """Gates over their sum: relaxed Bernoulli gates at temperature 1 in pre-training, sigmoid(R) otherwise."""
        drawn = self.settings.phase == "pretrain" and view.chance is not None
        noise = view.chance.shared() if drawn and view.chance is not None else None
        return mixture_weights(log_gates(self.router, noise))

    def prompt(self, view: View) -> Prompt:
        """E_0 + sum_k w_k M_k; in black-box adaptation E_0 + (sum_k w_k z_k + v) A."""
        c, w = self.settings, self.weights(view)
        if c.phase == "gradient":
            mixture = mixed(w, self.parts)
        else:
            # (w z) A = w (z A), and cheaper
            short = mixed(w, self.z)
            mixture = (short + self.vector if c.phase == "blackbox" else short) @ self.a
        rows = mixture.view_as(self.placeholders)
        if c.attach == "add":
            rows = self.placeholders + rows
        return Prompt(rows=rows[None], placement=c.placement)

    def insight(self) -> Mapping[str, Tensor]:
        """The weight of each module."""
        return {"modules": self.weights(View()).detach()}

    @classmethod
    def count(cls, config: MethodConfig, shape: Shape) -> int:
        """K + K d + d n D in pre-training, K + K n D by gradient, K + d black-box."""
        return sum(math.prod(size) for size in cls.sizes(config, shape).values())

    @classmethod
    def match_budget(cls, config: MethodConfig, length: int, shape: Shape) -> MethodConfig:
        """The largest number of modules that fits; in pre-training the largest intrinsic dimension."""
        c, budget = cast(MP2Config, config), length * shape.width
        name = "modules" if c.phase == "gradient" else "intrinsic_dimension"

        def numbers(value: int) -> int:
            return cls.count(c.model_copy(update={name: value}), shape)

        check_size(numbers(1), budget, length, "lower method.num_virtual_tokens")
        each = numbers(2) - numbers(1)
        return c.model_copy(update={name: 1 + (budget - numbers(1)) // each})
