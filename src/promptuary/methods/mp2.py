"""MP2 (Sun et al. 2023, arXiv 2210.07565): prompt modules that many tasks have in common, mixed by a router per task.

Knows no backbone, no other task and no search. The paper's reading-comprehension head and Chinese data are not here;
docs/methods/mp2.md says what is.

Notation: n rows, K modules, d the intrinsic dimension, D the width; R [K] a task's router, z [K, d], A [d, n D].
M_k = z_k A is a module, w = gates(R) / sum gates(R), and the prompt is E_0 + sum_k w_k M_k, E_0 [n, D] placeholders.
Deep, all of it once in each of l layers, where a module is keys and values: n 2 k e numbers instead of n D.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from promptuary.errors import ConfigError
from promptuary.methods.base import Method, MethodConfig, SourcedConfig, Stage, check_size
from promptuary.prompts.init import Saved, Starting, starting_prefix
from promptuary.prompts.routing import log_gates, mixed, mixture_weights
from promptuary.types import Prompt, Shape, View

TINY = 1e-3
"""Routers and z start within this of zero, so that the prompt starts as its placeholders; the release."""

BOX = (-5.0, 5.0)
"""Where Bayesian optimisation looks for logits of gates; the release."""

RATES = {
    ("input", "pretrain"): (5e-3, 1e-3),
    ("input", "gradient"): (1e-2, 3e-4),
    ("layers", "pretrain"): (5e-4, 1e-4),
    ("layers", "gradient"): (3e-3, 2e-5),
}
"""Learning rates of the release, of routers and of what they mix."""


class MP2Config(SourcedConfig):
    """Settings of MP2."""

    name: Literal["mp2"] = "mp2"
    preset: Literal["paper", "release"] = Field(
        "paper",
        description='what the settings without a value are: "paper", our reading for models and budgets of any size; '
        '"release", the authors\' code: its rates, Bayesian search of the router in 200 of 8,000 calls, a small sum',
    )
    phase: Literal["pretrain", "gradient", "blackbox"] = Field(
        "pretrain",
        description='"pretrain": routers, z and A on many tasks; then on a new one from `sources`: "gradient", router '
        'then modules, or "blackbox", router then a vector, searched with forward passes alone',
    )
    depth: Literal["input", "layers"] = Field(
        "input",
        description='"input": rows at the input (Shallow); "layers": keys and values of every layer, each layer with '
        "its own router, z and A (Deep; in the release they are added to hidden states)",
    )
    num_virtual_tokens: int = Field(50, ge=1, description="n, rows; the release has 50")
    modules: int = Field(8, ge=1, description="K; the release has 8")
    intrinsic_dimension: int = Field(300, ge=1, description="d; the release has 300")
    one_matrix: bool = Field(
        False, description="with depth: layers, one A for all layers, which is l times smaller; our choice"
    )
    attach: Literal["add", "replace"] = Field(
        "add", description="whether the mixture is added to placeholders (the release) or stands alone"
    )
    gates: Literal["pretrain", "train", "mean"] = Field(
        "pretrain",
        description="when gates are drawn: in pre-training alone (the release), in all training, or never",
    )
    epsilon: float | None = Field(
        None,
        ge=0,
        description="of the sum that gates are divided by; without it 0, or as the preset says (release: 1e-12, with "
        "which weights vanish where all gates are all but shut)",
    )
    router_share: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="part of the steps (or calls) for the router; without it 0.5, or as the preset says (release: "
        "black-box 0.025)",
    )
    router_search: Literal["evolution", "bayes"] | None = Field(
        None,
        description="how black-box adaptation searches the router; without it evolution, or as the preset has it: "
        "Bayesian optimisation from -5 to 5",
    )
    freeze_router: bool = Field(True, description="whether the router stays as it is in the second stage; the release")
    router_lr: float | None = Field(
        None,
        gt=0,
        description="learning rate of routers; without it 5e-3, or as the preset says (see its card)",
    )
    modules_lr: float | None = Field(
        None, gt=0, description="learning rate of z and A, or of modules; without it 1e-3, or as the preset says"
    )

    @model_validator(mode="after")
    def _consistent(self) -> MP2Config:
        if self.one_matrix and self.depth == "input":
            raise ValueError("one_matrix is for depth: layers; at the input there is one matrix anyway")
        if self.depth == "layers" and self.init == "saved":
            raise ValueError("with depth: layers placeholders are keys and values, not saved rows; choose another init")
        return self

    @property
    def released(self) -> bool:
        """Whether what was left open is as in the release."""
        return self.preset == "release"

    @property
    def router_part(self) -> float:
        """`router_share` as it is meant."""
        usual = 0.025 if self.released and self.phase == "blackbox" else 0.5
        return usual if self.router_share is None else self.router_share

    @property
    def searches(self) -> str:
        """`router_search` as it is meant."""
        return self.router_search or ("bayes" if self.released else "evolution")

    @property
    def smallest(self) -> float:
        """`epsilon` as it is meant."""
        usual = 1e-12 if self.released else 0.0
        return usual if self.epsilon is None else self.epsilon

    @property
    def rates(self) -> dict[str, float]:
        """`router_lr` and `modules_lr` as they are meant."""
        usual = RATES.get((self.depth, self.phase)) if self.released else None
        router, modules = usual or (5e-3, 1e-3)
        return {
            "router": router if self.router_lr is None else self.router_lr,
            "modules": modules if self.modules_lr is None else self.modules_lr,
        }


class MP2(Method):
    """Modular prompts with routers."""

    name = "mp2"
    title = "MP2"
    paper = "arXiv 2210.07565"
    shared = frozenset({"z", "a", "placeholders"})
    tiny: ClassVar = {
        "num_virtual_tokens": 3, "modules": 3, "intrinsic_dimension": 4, "router_lr": 0.1, "modules_lr": 0.05,
    }  # fmt: skip
    relative = frozenset()
    Config = MP2Config
    router: nn.Parameter
    z: Tensor
    a: Tensor
    parts: nn.Parameter
    placeholders: Tensor

    @property
    def settings(self) -> MP2Config:
        """The settings with their own type."""
        return cast(MP2Config, self.config)

    @property
    def groups(self) -> dict[str, str]:  # type: ignore[override]
        """Routers, and everything else."""
        return {name: "router" if name == "router" else "modules" for name, _ in self.named_parameters()}

    @property
    def solver(self) -> str:  # type: ignore[override]
        """Black-box adaptation has no gradient."""
        return "evolution" if self.settings.phase == "blackbox" else "gradient"

    @property
    def advice(self) -> Mapping[str, Any]:
        """The step size of the release."""
        return {"sigma": 0.1}

    @property
    def deep(self) -> bool:
        """Whether every layer has a mixture of its own."""
        return self.settings.depth == "layers"

    @classmethod
    def sizes(cls, config: MethodConfig, shape: Shape) -> dict[str, tuple[int, ...]]:
        """What is trained in this phase; deep, the vector of each layer is a tensor, which can be searched alone."""
        c = cast(MP2Config, config)
        k, d, wide = c.modules, c.intrinsic_dimension, _wide(c, shape)
        each: tuple[int, ...] = (shape.layers,) if c.depth == "layers" else ()
        own: dict[str, dict[str, tuple[int, ...]]] = {
            "pretrain": {"z": (*each, k, d), "a": (*(() if c.one_matrix else each), d, wide)},
            "gradient": {"parts": (*each, k, wide)},
            "blackbox": dict.fromkeys(_vectors(c, shape), (d,)),
        }
        return {"router": (*each, k), **own[c.phase]}

    def build(self) -> None:
        """What the phase trains, and as constants the placeholders, and z and A where they are searched through."""
        c, shape = self.settings, self.shape
        for name, size in self.sizes(c, shape).items():
            setattr(self, name, self.parameter(*size))
        if c.phase == "blackbox":
            earlier = self.sizes(c.model_copy(update={"phase": "pretrain"}), shape)
            for name in ("z", "a"):
                self.constant(*earlier[name], name=name)
        n = c.num_virtual_tokens
        if self.deep:
            self.sites = frozenset({"kv"})
            self.constant(shape.layers, 2, shape.heads, n, shape.head, name="placeholders")
        else:
            self.constant(n, shape.width, name="placeholders")

    def fill(self, source: Starting) -> None:
        """R, z ~ U(-1e-3, 1e-3), A ~ U(-b, b) with b = 1 / sqrt(n D), or z and A of a source; placeholders by `init`.

        Deep, placeholders are what the frozen model computes for tokens of the vocabulary (or of `init_text`).

        Raises:
            ConfigError: a source is no pre-trained MP2 of these sizes, or sources do not share their modules.
            SiteError: deep, on a model without a place for keys and values.
        """
        c, generator = self.settings, source.generator
        self.router.uniform_(-TINY, TINY, generator=generator)
        n = c.num_virtual_tokens
        self.placeholders.copy_(
            starting_prefix(c.init, n, source, text=c.init_text) if self.deep else self.first_rows(n, source)
        )
        sizes = self.sizes(c.model_copy(update={"phase": "pretrain"}), self.shape)
        z = torch.empty(sizes["z"]).uniform_(-TINY, TINY, generator=generator)
        bound = 1 / math.sqrt(_wide(c, self.shape))
        a = torch.empty(sizes["a"]).uniform_(-bound, bound, generator=generator)
        if source.sources:
            found = self._source(source.sources, sizes)
            z, a = found["z"], found["a"]
            self.placeholders.copy_(found["placeholders"])
        if c.phase == "gradient":
            self.parts.copy_(z @ a)
        else:
            self.z.copy_(z)
            self.a.copy_(a)

    def _source(self, sources: Sequence[Saved], sizes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Tensor]:
        """The modules that the sources have in common."""
        first = sources[0].tensors
        wanted = {"z": sizes["z"], "a": sizes["a"], "placeholders": tuple(self.placeholders.shape)}
        for one in sources:
            found = {name: tuple(one.tensors[name].shape) for name in wanted if name in one.tensors}
            if one.method != self.name or one.settings["phase"] != "pretrain" or found != wanted:
                raise ConfigError(
                    f"mp2 goes on from its own phase pretrain with the same depth, num_virtual_tokens, modules and "
                    f"intrinsic_dimension; {one.name} is {one.method} of another phase, size or kind"
                )
            if not all(torch.equal(one.tensors[name], first[name]) for name in wanted):
                raise ConfigError("these sources do not share their modules: name tasks of one and the same run")
        return first

    def stages(self) -> tuple[Stage, ...]:
        """On a new task the router first, then the modules or the vector with the router as it is.

        Black-box, logits of gates are searched in steps of one: from all but shut to all but open is 10.
        """
        c = self.settings
        if c.phase == "pretrain":
            return (Stage("all", 1.0),)
        rest = {"parts"} if c.phase == "gradient" else set(_vectors(c, self.shape))
        last = frozenset(rest if c.freeze_router else {*rest, "router"})
        # deep, one search for each layer, in turn
        how = {"apart": self.deep}
        search = c.searches if c.phase == "blackbox" else None
        return (
            Stage("router", c.router_part, frozenset({"router"}), {"sigma": 1.0, "bounds": BOX}, search),
            Stage("parts" if c.phase == "gradient" else "vector", 1 - c.router_part, last, advice=how),
        )

    def rate(self, group: str) -> float:
        """As it is meant."""
        return self.settings.rates[group]

    def weights(self, view: View) -> Float[Tensor, "*l k"]:
        """Gates over their sum: relaxed Bernoulli gates at temperature 1 in pre-training, sigmoid(R) otherwise."""
        c = self.settings
        drawn = c.gates == "train" or (c.gates == "pretrain" and c.phase == "pretrain")
        noise = view.chance.shared() if drawn and view.chance is not None else None
        return mixture_weights(log_gates(self.router, noise), c.smallest)

    def prompt(self, view: View) -> Prompt:
        """E_0 + sum_k w_k M_k; in black-box adaptation E_0 + (sum_k w_k z_k + v) A; deep, so in every layer."""
        c, w = self.settings, self.weights(view)
        if c.phase == "gradient":
            mixture = _mixed(w, self.parts)
        else:
            # (w z) A = w (z A), and cheaper
            short = _mixed(w, self.z)
            if c.phase == "blackbox":
                short = short + torch.stack([getattr(self, name) for name in _vectors(c, self.shape)]).view_as(short)
            mixture = (short[..., None, :] @ self.a).squeeze(-2)
        whole = mixture.view_as(self.placeholders)
        if c.attach == "add":
            whole = self.placeholders + whole
        return Prompt(kv=whole[None]) if self.deep else Prompt(rows=whole[None], placement=c.placement)

    def insight(self) -> Mapping[str, Tensor]:
        """The weight of each module; deep, in each layer."""
        return {"modules": self.weights(View()).detach()}

    @classmethod
    def count(cls, config: MethodConfig, shape: Shape) -> int:
        """K + K d + d n D in pre-training, K + K n D by gradient, K + d black-box; deep, l times n 2 k e for n D."""
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


def _wide(c: MP2Config, shape: Shape) -> int:
    """Numbers of one module: n D, or n 2 k e in one layer."""
    return c.num_virtual_tokens * (2 * shape.heads * shape.head if c.depth == "layers" else shape.width)


def _vectors(c: MP2Config, shape: Shape) -> list[str]:
    """Names of what is searched beside the router."""
    return [f"vector_{layer}" for layer in range(shape.layers)] if c.depth == "layers" else ["vector"]


def _mixed(weights: Float[Tensor, "*l k"], modules: Float[Tensor, "*l k m"]) -> Float[Tensor, "*l m"]:
    """The weighted sum of modules; deep, in each layer its own."""
    if weights.dim() == 1:
        return mixed(weights, modules)
    return torch.stack([mixed(own, several) for own, several in zip(weights, modules, strict=True)])
