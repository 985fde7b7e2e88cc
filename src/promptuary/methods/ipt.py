"""IPT, instance-wise prompt tuning (arXiv 2206.01958): every token of the vocabulary has a prompt vector of its own.

Knows no backbone. Rebuilt from the abstract and the authors' release; docs/methods/ipt.md says what differs.

Notation: E_s [V + 1, w] the table, its last row for a token that is missing; u [b, n] the first n tokens of each text;
Q = E_s[u], or a small network over it; P [n, d] or KV [l, 2, k, n, e] what all texts share; s the scale of Q.
w = d among the text, 2 k e in front of the first layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, cast

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from promptuary.errors import ConfigError
from promptuary.methods.base import Method, MethodConfig, SourcedConfig, check_size
from promptuary.prompts.blocks import svd_factors
from promptuary.prompts.encoders import ENCODERS, Encoder
from promptuary.prompts.init import Saved, Starting, starting_prefix
from promptuary.types import Prompt, Shape, View

Combine = Literal["replace", "add", "concat"]
ADDED = 0.05
"""Scale of what is added; the release."""
TABLE = ("table", "left", "right")


class IPTConfig(SourcedConfig):
    """Settings of IPT. "Open question n" refers to the list in docs/methods/ipt.md."""

    name: Literal["ipt"] = "ipt"
    preset: Literal["paper", "release"] = Field(
        "paper",
        description='"paper": what instances say is added to a prompt that all share, and content tokens say it (our '
        'reading); "release": among the text it replaces that prompt, and all tokens say it (the authors\' code)',
    )
    mode: Literal["prompt", "prefix"] = Field(
        "prompt", description="on prompt tuning (rows among the text), or on prefix tuning (keys and values of layer 0)"
    )
    num_virtual_tokens: int = Field(100, ge=1, description="n, tokens that are looked up, and rows; the release")
    combine: Combine | None = Field(
        None,
        description="what the instance's rows do to those that all texts share; without it as the preset says (open "
        "question 1). In front of layer 0 they are always added",
    )
    instance_scale: float | None = Field(
        None,
        ge=0,
        description="s, factor of the instance's rows; without it 0.05 where they are added (the release), else 1. 0 "
        "leaves them out (open question 2)",
    )
    tokens: Literal["content", "ids"] | None = Field(
        None,
        description='what the first n tokens are among: all but special ones ("content"), or special ones too ("ids"); '
        "without it as the preset says (open question 3)",
    )
    table_init: Literal["random", "vocabulary", "saved"] = Field(
        "random",
        description='"random": uniform within 0.5 (the release\'s Random IPT); "vocabulary": the model\'s own '
        'embeddings; "saved": of the earlier prompt in sources (Pretrained IPT)',
    )
    table_rank: int | None = Field(
        None, ge=1, description="r, the table as [V + 1, r] times [r, w]; without it whole (open question 6)"
    )
    train_table: bool = Field(True, description="off: only a network over the table learns (open question 8)")
    encoder: Literal["cnn", "rnn", "mlp"] | None = Field(
        None, description="a network over the n vectors (Encoder IPT); without it they are the rows themselves"
    )
    table_lr: float = Field(
        0.03, gt=0, description="learning rate of the table, in lr_unit; our choice, 0.009 for a random start"
    )
    modules_lr: float = Field(1e-3, gt=0, description="learning rate of the network; our choice")

    @property
    def combined(self) -> Combine:
        """`combine` as it is meant."""
        if self.mode == "prefix":
            return "add"
        return self.combine or ("add" if self.preset == "paper" else "replace")

    @property
    def scale(self) -> float:
        """`instance_scale` as it is meant."""
        usual = ADDED if self.combined == "add" else 1.0
        return usual if self.instance_scale is None else self.instance_scale

    @property
    def all_tokens(self) -> bool:
        """`tokens` as it is meant."""
        return (self.tokens or ("content" if self.preset == "paper" else "ids")) == "ids"

    @model_validator(mode="after")
    def _consistent(self) -> IPTConfig:
        if self.mode == "prefix" and self.combine not in (None, "add"):
            raise ValueError("in mode prefix only layer 0 knows the instance, so combine can only be add")
        if self.scale == 0 and self.combined == "replace":
            raise ValueError(
                "instance_scale 0 with combine replace leaves no prompt at all; use add, or a scale above 0"
            )
        if self.mode == "prefix" and self.table_init == "vocabulary":
            raise ValueError("in mode prefix a row is keys and values, no embedding; use table_init random or saved")
        if (self.table_init == "saved") != bool(self.sources) or len(self.sources) > 1:
            raise ValueError("table_init saved reads one earlier prompt of ipt, and only then: name it in sources")
        if not self.train_table and self.encoder is None:
            raise ValueError("train_table: false needs an encoder over the table; otherwise nothing of it would learn")
        return self


class IPT(Method):
    """A table over the vocabulary, perhaps with a network over it, and a prompt or prefix that all texts share."""

    name = "ipt"
    title = "IPT"
    paper = "arXiv 2206.01958"
    reconstructed = True
    sites = frozenset({"input", "kv"})
    relative = frozenset({"prompt", "table"})
    undecayed = frozenset({"table", "modules"})
    tiny: ClassVar = {"num_virtual_tokens": 3, "instance_scale": 1.0}
    Config = IPTConfig
    rows: nn.Parameter
    kv: nn.Parameter
    table: Tensor
    left: Tensor
    right: Tensor

    @property
    def settings(self) -> IPTConfig:
        """The settings with their own type."""
        return cast(IPTConfig, self.config)

    @property
    def groups(self) -> dict[str, str]:  # type: ignore[override]
        """The shared prompt, the table, and the network's tensors."""
        known = {"rows": "prompt", "kv": "prompt"} | dict.fromkeys(TABLE, "table")
        return {name: known.get(name, "modules") for name, _ in self.named_parameters()}

    @property
    def needs(self) -> frozenset[str]:
        """The ids of the text; with a scale of 0 nothing, and the prompt is the same for all."""
        if self.settings.scale == 0:
            return frozenset()
        return frozenset({"ids"}) if self.settings.all_tokens else frozenset({"ids", "content"})

    @classmethod
    def network(cls, config: MethodConfig, shape: Shape) -> Encoder | None:
        """The network over the table, if there is one."""
        c = cast(IPTConfig, config)
        return None if c.encoder is None or c.scale == 0 else ENCODERS[c.encoder](c.num_virtual_tokens, _row(c, shape))

    @classmethod
    def sizes(cls, config: MethodConfig, shape: Shape) -> dict[str, tuple[int, ...]]:
        """Tensors by name; only what the settings use."""
        c, n, w = cast(IPTConfig, config), cast(IPTConfig, config).num_virtual_tokens, _row(config, shape)
        found: dict[str, tuple[int, ...]] = {}
        if c.mode == "prefix":
            found["kv"] = (shape.layers, 2, shape.heads, n, shape.head)
        elif c.combined != "replace":
            found["rows"] = (n, w)
        if c.scale == 0:
            return found
        if c.table_rank is None:
            found["table"] = (shape.vocabulary + 1, w)
        else:
            found |= {"left": (shape.vocabulary + 1, c.table_rank), "right": (c.table_rank, w)}
        network = cls.network(c, shape)
        return found | ({} if network is None else {f"encoder_{k}": size for k, size in network.sizes().items()})

    def build(self) -> None:
        """What the settings use; a table that does not learn is a constant.

        Raises:
            ConfigError: the backbone does not say how many tokens it has.
        """
        if not self.shape.vocabulary:
            raise ConfigError("ipt looks up a row for every token of the vocabulary: it needs a model of text")
        most, rank = min(self.shape.vocabulary, _row(self.config, self.shape)), self.settings.table_rank
        if rank is not None and rank > most:
            raise ConfigError(f"method.table_rank {rank} is above {most}, where a table is whole; leave it out")
        for name, size in self.sizes(self.config, self.shape).items():
            if name in TABLE and not self.settings.train_table:
                self.constant(*size, name=name)
            else:
                setattr(self, name, self.parameter(*size))

    def fill(self, source: Starting) -> None:
        """The shared prompt as `init` says, the table as `table_init` says, the network as torch starts such layers.

        Of an earlier prompt come the table and, where it has the same network, that too.

        Raises:
            ConfigError: the earlier prompt has no such table.
        """
        c, sizes = self.settings, self.sizes(self.config, self.shape)
        if "rows" in sizes:
            self.rows.copy_(self.first_rows(len(self.rows), source))
        if "kv" in sizes:
            self.kv.copy_(starting_prefix(c.init, c.num_virtual_tokens, source, text=c.init_text))
        if c.scale == 0:
            return
        network = self.network(c, self.shape)
        if network is not None:
            network.fill(self._weights(), source.generator)
        if c.table_init == "saved":
            self._copy(source.sources[0])
        elif c.table_init == "vocabulary":
            self._fill_from_words(source.vocabulary.embed(torch.arange(self.shape.vocabulary)))
        else:
            self._fill_random(source.generator)

    def _fill_random(self, generator: torch.Generator) -> None:
        """Uniform within 0.5; the factors so that their product has that variance."""
        rank = self.settings.table_rank
        bound = 0.5 if rank is None else math.sqrt(0.5 * math.sqrt(3 / rank))
        for part in (self.table,) if rank is None else (self.left, self.right):
            part.uniform_(-bound, bound, generator=generator)

    def _fill_from_words(self, words: Float[Tensor, "v d"]) -> None:
        """Each token its embedding, and a missing one zero; the factors are the nearest of their rank."""
        rank = self.settings.table_rank
        if rank is None:
            self.table[:-1] = words
            return
        u, sigma, v = svd_factors(words, rank)
        root = sigma.sqrt()
        self.left[:-1], self.right[:] = u * root, v * root[:, None]

    def _copy(self, earlier: Saved) -> None:
        own = {name: value for name, value in self.state_dict(keep_vars=True).items() if name not in ("rows", "kv")}
        theirs = {name: value for name, value in earlier.tensors.items() if name in own}
        sizes = {name: list(value.shape) for name, value in theirs.items()}
        if earlier.method != self.name or not {*own} & {*TABLE} <= {*theirs}:
            what = "a prompt of ipt with a table of the same kind (mode, table_rank)"
            raise ConfigError(f"method.sources: {what} is expected, {earlier.name} ({earlier.method}) is none")
        for name, value in theirs.items():
            if value.shape != own[name].shape:
                raise ConfigError(
                    f"method.sources: {earlier.name} has {name} of size {sizes[name]}, {list(own[name].shape)} is "
                    "expected; give both the same mode, table_rank, num_virtual_tokens and encoder"
                )
            own[name].copy_(value)

    def _weights(self) -> dict[str, Tensor]:
        """The network's tensors by the names that it has for them."""
        found = self.named_parameters()
        return {name.removeprefix("encoder_"): value for name, value in found if name.startswith("encoder_")}

    def prompt(self, view: View) -> Prompt:
        """P + s Q, s Q or [P; s Q] among the text; or KV with s Q added in layer 0."""
        c = self.settings
        if c.scale == 0:
            return Prompt(kv=self.kv[None]) if c.mode == "prefix" else self._among(self.rows[None])
        own = c.scale * self._instance(view)
        if c.mode == "prefix":
            # [b, n, 2 k e] -> [b, 2, k, n, e]: first all keys, then all values
            first = own.unflatten(2, (2, self.shape.heads, self.shape.head)).permute(0, 2, 3, 1, 4)
            others = self.kv[1:].expand(len(own), *self.kv[1:].shape)
            return Prompt(kv=torch.cat([(self.kv[0] + first)[:, None], others], dim=1))
        if c.combined == "add":
            return self._among(self.rows + own)
        if c.combined == "concat":
            return self._among(torch.cat([self.rows.expand_as(own), own], dim=1))
        return self._among(own)

    def _among(self, rows: Float[Tensor, "g n d"]) -> Prompt:
        return Prompt(rows=rows, placement=self.settings.placement)

    def chosen(self, view: View) -> Int[Tensor, "b n"]:
        """u, the first n tokens of each text; V where there are fewer."""
        real = view.mask if self.settings.all_tokens else view.content
        assert real is not None
        assert view.ids is not None
        n, missing = self.settings.num_virtual_tokens, self.shape.vocabulary
        order = torch.argsort((~real).long(), dim=1, stable=True)[:, :n]
        found = view.ids.gather(1, order).masked_fill(~real.gather(1, order), missing)
        return torch.nn.functional.pad(found, (0, n - found.shape[1]), value=missing)

    def _instance(self, view: View) -> Float[Tensor, "b n w"]:
        """Q."""
        u, network = self.chosen(view), self.network(self.config, self.shape)
        whole = self.settings.table_rank is None
        found = nn.functional.embedding(u, self.table if whole else self.left)
        found = found if whole else found @ self.right
        if network is None:
            return found
        noise = None
        if view.chance is not None and network.dropped:
            noise = view.chance.uniform(network.rows * network.width)
        return network(self._weights(), found, noise)

    def insight(self) -> Mapping[str, Tensor]:
        """How large the shared rows are, [n]; of keys and values in every layer, [l, n]."""
        if self.settings.mode == "prefix":
            return {"norms of the prefix": self.kv.detach().pow(2).sum(dim=(1, 2, 4)).sqrt()}
        return {} if self.settings.combined == "replace" else {"norms of rows": self.rows.detach().norm(dim=1)}

    @classmethod
    def count(cls, config: MethodConfig, shape: Shape) -> int:
        """N d or 2 l k e n of the shared prompt, (V + 1) w or (V + 1 + w) r of the table, and the network."""
        still = () if cast(IPTConfig, config).train_table else TABLE
        return sum(math.prod(size) for name, size in cls.sizes(config, shape).items() if name not in still)

    @classmethod
    def match_budget(cls, config: MethodConfig, length: int, shape: Shape) -> MethodConfig:
        """The whole table if it fits, or the largest rank that does; the number of rows stays."""
        c, budget = cast(IPTConfig, config), length * shape.width

        def numbers(rank: int | None) -> int:
            return cls.count(c.model_copy(update={"table_rank": rank}), shape)

        if numbers(None) <= budget:
            return c.model_copy(update={"table_rank": None})
        check_size(
            numbers(1), budget, length, "lower method.num_virtual_tokens, or raise match_length: a table over the "
            f"{shape.vocabulary:,} tokens of this model has at least a number for each",
        )  # fmt: skip
        each = numbers(2) - numbers(1)
        update: dict[str, Any] = {"table_rank": 1 + (budget - numbers(1)) // each if each else 1}
        return c.model_copy(update=update)


def _row(config: MethodConfig, shape: Shape) -> int:
    """w, width of a row of the table."""
    return shape.width if cast(IPTConfig, config).mode == "prompt" else 2 * shape.heads * shape.head
