"""Networks that turn the m rows of a context into as many other rows: LSTMs, MLPs, a transformer (PRE's encoders).

Knows no method, vocabulary or model. A network is a description: its tensors belong to whoever uses it.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from promptuary.errors import ConfigError
from promptuary.prompts.encoders import Sizes, Tensors


@dataclass(frozen=True)
class Network(abc.ABC):
    """Rows of `width` to rows of `width`; each of a batch by itself, and as many rows as there are.

    `dropped`: the share of entries that training leaves out, where a network does that at all.
    """

    width: int
    dropped: float = 0.0

    @abc.abstractmethod
    def sizes(self) -> Sizes:
        """Sizes of all tensors, by name, in the order in which they are filled."""

    @abc.abstractmethod
    def begin(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Give a tensor its first value: torch's own start of such layers."""

    @abc.abstractmethod
    def silence(self, tensors: Tensors) -> None:
        """Set to zero what the result hangs on, so that it is zero for every input, and still learns."""

    @abc.abstractmethod
    def __call__(
        self, tensors: Tensors, x: Float[Tensor, "b n d"], chance: torch.Generator | None = None
    ) -> Float[Tensor, "b n d"]:
        """The rows that come out.

        Args:
            tensors: as `sizes` names them.
            x: the rows of each context.
            chance: what is left out is drawn from it, in training; None: nothing is.
        """

    def count(self) -> int:
        """How many numbers the tensors hold."""
        return sum(math.prod(size) for size in self.sizes().values())

    def fill(self, tensors: Tensors, generator: torch.Generator, *, silent: bool = False) -> None:
        """Give every tensor its first value, from the generator alone; `silent`: so that the result is zero."""
        with torch.no_grad():
            for name in self.sizes():
                self.begin(name, tensors[name], generator)
            if silent:
                self.silence(tensors)


@dataclass(frozen=True)
class BiLSTM(Network):
    """A bidirectional LSTM of width / 2 in each direction, whose states at each row are the result."""

    layers: int = 1

    def __post_init__(self) -> None:
        """Two directions make one width.

        Raises:
            ConfigError: it is odd.
        """
        if self.width % 2:
            raise ConfigError(f"an LSTM of two directions needs an even width, not {self.width}; use encoder: mlp")

    def _names(self, layer: int) -> list[str]:
        parts = ("input", "hidden", "input_bias", "hidden_bias")
        return [f"{part}_{layer}_{way}" for way in ("forward", "backward") for part in parts]

    def sizes(self) -> Sizes:
        """Of each layer and direction: input and hidden weights and two biases, four gates each, as torch has them."""
        h = self.width // 2
        each = ((4 * h, self.width), (4 * h, h), (4 * h,), (4 * h,)) * 2
        return {name: size for layer in range(self.layers) for name, size in zip(self._names(layer), each, strict=True)}

    def begin(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """U(-1 / sqrt(h), 1 / sqrt(h))."""
        bound = 1 / math.sqrt(self.width // 2)
        tensor.uniform_(-bound, bound, generator=generator)

    def silence(self, tensors: Tensors) -> None:
        """No candidates for the last layer's cells, which are what its states come from."""
        h = self.width // 2
        for name in self._names(self.layers - 1):
            tensors[name][2 * h : 3 * h] = 0

    def __call__(
        self, tensors: Tensors, x: Float[Tensor, "b n d"], chance: torch.Generator | None = None
    ) -> Float[Tensor, "b n d"]:
        """Layer by layer; between two layers entries are left out."""
        start = x.new_zeros(2, len(x), self.width // 2)
        for layer in range(self.layers):
            x = thinned(x, self.dropped if layer else 0.0, chance)
            weights = [tensors[name] for name in self._names(layer)]
            x = torch.lstm(x, (start, start), weights, True, 1, 0.0, False, True, True)[0]
        return x


@dataclass(frozen=True)
class MLP(Network):
    """Down to `inner`, a rectifier, and up again, for each row by itself; `times` in a row with the same weights."""

    inner: int = 64
    times: int = 1

    def sizes(self) -> Sizes:
        """Two maps with biases, as torch has them."""
        inner, d = self.inner, self.width
        return {"down": (inner, d), "down_bias": (inner,), "up": (d, inner), "up_bias": (d,)}

    def begin(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Uniform within 1 / sqrt(numbers that an output reads)."""
        bound = 1 / math.sqrt(self.width if name.startswith("down") else self.inner)
        tensor.uniform_(-bound, bound, generator=generator)

    def silence(self, tensors: Tensors) -> None:
        """The map up."""
        for name in ("up", "up_bias"):
            tensors[name].zero_()

    def __call__(
        self, tensors: Tensors, x: Float[Tensor, "b n d"], chance: torch.Generator | None = None
    ) -> Float[Tensor, "b n d"]:
        """up(relu(down(x))), once or more; nothing is left out."""
        for _ in range(self.times):
            hidden = torch.relu(functional.linear(x, tensors["down"], tensors["down_bias"]))
            x = functional.linear(hidden, tensors["up"], tensors["up_bias"])
        return x


@dataclass(frozen=True)
class Transformer(Network):
    """Layers of attention among the rows and an MLP, each with a LayerNorm behind it; rows have no positions."""

    layers: int = 2
    heads: int = 2
    inner: int = 2048

    def __post_init__(self) -> None:
        """Heads share the width.

        Raises:
            ConfigError: it cannot be shared.
        """
        if self.width % self.heads:
            raise ConfigError(f"{self.heads} heads cannot share a width of {self.width}; use encoder: mlp")

    def sizes(self) -> Sizes:
        """Of each layer what torch's own has."""
        d, i = self.width, self.inner
        each = {
            "qkv": (3 * d, d), "qkv_bias": (3 * d,), "out": (d, d), "out_bias": (d,),
            "down": (i, d), "down_bias": (i,), "up": (d, i), "up_bias": (d,),
            "norm_1": (d,), "norm_1_bias": (d,), "norm_2": (d,), "norm_2_bias": (d,),
        }  # fmt: skip
        return {f"{name}_{layer}": size for layer in range(self.layers) for name, size in each.items()}

    def begin(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Glorot-uniform for queries, keys and values, whose biases are zero; the others as torch starts them."""
        kind = name.rpartition("_")[0]
        if kind in ("qkv_bias", "out_bias", "norm_1_bias", "norm_2_bias"):
            tensor.zero_()
        elif kind in ("norm_1", "norm_2"):
            tensor.fill_(1)
        else:
            reads = self.inner if kind.startswith("up") else self.width
            bound = math.sqrt(6 / (4 * self.width)) if kind == "qkv" else 1 / math.sqrt(reads)
            tensor.uniform_(-bound, bound, generator=generator)

    def silence(self, tensors: Tensors) -> None:
        """The last LayerNorm."""
        for name in ("norm_2", "norm_2_bias"):
            tensors[f"{name}_{self.layers - 1}"].zero_()

    def __call__(
        self, tensors: Tensors, x: Float[Tensor, "b n d"], chance: torch.Generator | None = None
    ) -> Float[Tensor, "b n d"]:
        """Layer by layer; entries are left out where torch's layer does it."""
        for layer in range(self.layers):
            own = {name.removesuffix(f"_{layer}"): value for name, value in tensors.items() if _of(name, layer)}
            x = self._normed(x + thinned(self._attended(own, x, chance), self.dropped, chance), own, "norm_1")
            hidden = thinned(torch.relu(functional.linear(x, own["down"], own["down_bias"])), self.dropped, chance)
            change = functional.linear(hidden, own["up"], own["up_bias"])
            x = self._normed(x + thinned(change, self.dropped, chance), own, "norm_2")
        return x

    def _attended(
        self, own: Tensors, x: Float[Tensor, "b n d"], chance: torch.Generator | None
    ) -> Float[Tensor, "b n d"]:
        """Every row among all of them."""
        parts = functional.linear(x, own["qkv"], own["qkv_bias"]).chunk(3, -1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        weights = torch.softmax(query @ key.mT / math.sqrt(query.shape[-1]), dim=-1)
        found = thinned(weights, self.dropped, chance) @ value
        return functional.linear(found.transpose(1, 2).flatten(2), own["out"], own["out_bias"])

    def _normed(self, x: Float[Tensor, "b n d"], own: Tensors, name: str) -> Float[Tensor, "b n d"]:
        return functional.layer_norm(x, (self.width,), own[name], own[f"{name}_bias"])


def _of(name: str, layer: int) -> bool:
    return name.rpartition("_")[2] == str(layer)


def thinned(x: Float[Tensor, "*n"], share: float, chance: torch.Generator | None) -> Float[Tensor, "*n"]:
    """X with this share of its entries set to zero and the others made larger to make up for it."""
    if chance is None or not share:
        return x
    # on the CPU: the same entries on every device
    kept = torch.rand(x.shape, generator=chance) >= share
    return x * kept.to(x.device) / (1 - share)


Kind = Literal["bilstm", "bilstm2", "mlp", "mlp_shared", "transformer"]


def network(kind: Kind, width: int, *, inner: int = 64, dropped: float = 0.0) -> Network:
    """One of PRE's encoders.

    Args:
        kind: "bilstm" of one layer, "bilstm2" of two, "mlp", "mlp_shared": the same one twice, "transformer" of two
            layers, two heads and 2,048 inside.
        width: of the rows.
        inner: width inside the MLPs.
        dropped: share left out between the layers of bilstm2 and in the transformer.

    Raises:
        ConfigError: the width does not fit.
    """
    made: Mapping[str, Network] = {"mlp": MLP(width, inner=inner), "mlp_shared": MLP(width, inner=inner, times=2)}
    if kind in made:
        return made[kind]
    if kind == "transformer":
        return Transformer(width, dropped)
    return BiLSTM(width, dropped, layers=2 if kind == "bilstm2" else 1)
