"""Small networks that turn the vectors of n tokens into n rows of a prompt: convolutions, an LSTM, one layer.

Knows no method, vocabulary or model. A network is a description: its tensors belong to whoever uses it.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Sizes = dict[str, tuple[int, ...]]
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Encoder(abc.ABC):
    """`rows` token vectors of `width` to as many prompt rows, by a summary of all of them and one linear map.

    Each example is read by itself: a row of a batch gets what it gets alone.
    """

    rows: int
    width: int

    dropped = 0.0
    """The share of the result's entries that training leaves out."""

    @property
    @abc.abstractmethod
    def summary(self) -> int:
        """Numbers in the summary of an example."""

    @abc.abstractmethod
    def inner(self) -> Sizes:
        """Sizes of the tensors that make the summary, by name."""

    @abc.abstractmethod
    def summarise(self, tensors: Tensors, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b s"]:
        """The summary of each example."""

    @abc.abstractmethod
    def bound(self, name: str) -> float:
        """Inner tensors start as uniform between minus this and this: torch's own start of such layers."""

    def sizes(self) -> Sizes:
        """Sizes of all tensors, by name, in the order in which they are filled."""
        flat = self.rows * self.width
        return {**self.inner(), "out_weight": (flat, self.summary), "out_bias": (flat,)}

    def count(self) -> int:
        """How many numbers they hold."""
        return sum(math.prod(size) for size in self.sizes().values())

    def fill(self, tensors: Tensors, generator: torch.Generator) -> None:
        """Give every tensor its first value, from the generator alone."""
        with torch.no_grad():
            for name in self.sizes():
                bound = 1 / math.sqrt(self.summary) if name.startswith("out_") else self.bound(name)
                tensors[name].uniform_(-bound, bound, generator=generator)

    def __call__(
        self, tensors: Tensors, x: Float[Tensor, "b n d"], noise: Float[Tensor, "b m"] | None = None
    ) -> Float[Tensor, "b n d"]:
        """Prompt rows of each example.

        Args:
            tensors: as `sizes` names them.
            x: vectors of the tokens.
            noise: from 0 to below 1 for each entry of the result, in training; decides what is left out of it.
        """
        found = torch.nn.functional.linear(self.summarise(tensors, x), tensors["out_weight"], tensors["out_bias"])
        if self.dropped:
            found = torch.relu(found)
            if noise is not None:
                found = found * (noise >= self.dropped) / (1 - self.dropped)
        return found.view(len(x), self.rows, self.width)


@dataclass(frozen=True)
class Convolutional(Encoder):
    """One filter per span of 3, 4 and 5 tokens, the largest answer of each: three numbers, then the linear map.

    Fewer tokens than a span are filled up with zeros.
    """

    spans = (3, 4, 5)

    @property
    def summary(self) -> int:
        """One per filter."""
        return len(self.spans)

    def inner(self) -> Sizes:
        """A filter [span, width] and its bias for each span."""
        found: Sizes = {}
        for span in self.spans:
            found |= {f"filter_{span}": (span, self.width), f"filter_bias_{span}": (1,)}
        return found

    def bound(self, name: str) -> float:
        """1 / sqrt(numbers that a filter reads)."""
        return 1 / math.sqrt(int(name.rpartition("_")[2]) * self.width)

    def summarise(self, tensors: Tensors, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b s"]:
        """Max over places of relu(filter * x + bias)."""
        missing = max(0, max(self.spans) - x.shape[1])
        x = torch.nn.functional.pad(x, (0, 0, 0, missing)).transpose(1, 2)
        found = [
            torch.nn.functional.conv1d(x, tensors[f"filter_{span}"].T[None], tensors[f"filter_bias_{span}"])
            for span in self.spans
        ]
        return torch.stack([torch.relu(answers[:, 0]).amax(1) for answers in found], dim=-1)


@dataclass(frozen=True)
class Recurrent(Encoder):
    """A bidirectional LSTM of two layers; its two final states, then the linear map."""

    hidden: int = 64
    layers: int = 2

    @property
    def summary(self) -> int:
        """Both directions."""
        return 2 * self.hidden

    def inner(self) -> Sizes:
        """Of each layer and direction: input and hidden weights and two biases, four gates each, as torch has them."""
        found: Sizes = {}
        for layer in range(self.layers):
            below = self.width if layer == 0 else 2 * self.hidden
            for way in ("forward", "backward"):
                found |= {
                    f"input_{layer}_{way}": (4 * self.hidden, below),
                    f"hidden_{layer}_{way}": (4 * self.hidden, self.hidden),
                    f"input_bias_{layer}_{way}": (4 * self.hidden,),
                    f"hidden_bias_{layer}_{way}": (4 * self.hidden,),
                }
        return found

    def bound(self, name: str) -> float:
        """1 / sqrt(hidden)."""
        return 1 / math.sqrt(self.hidden)

    def summarise(self, tensors: Tensors, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b s"]:
        """The last layer's final states."""
        start = x.new_zeros(2 * self.layers, len(x), self.hidden)
        weights = [tensors[name] for name in self.inner()]
        final = torch.lstm(x, (start, start), weights, True, self.layers, 0.0, False, True, True)[1]
        return torch.cat([final[-2], final[-1]], dim=-1)


@dataclass(frozen=True)
class Averaging(Encoder):
    """The mean of the token vectors, one linear map, and a rectifier; in training half of the entries are left out."""

    dropped = 0.5

    @property
    def summary(self) -> int:
        """As wide as a token."""
        return self.width

    def inner(self) -> Sizes:
        """None: a mean has nothing to train."""
        return {}

    def bound(self, name: str) -> float:
        """Never asked for: there are no inner tensors."""
        raise KeyError(name)

    def summarise(self, tensors: Tensors, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b s"]:
        """The mean."""
        return x.mean(1)


ENCODERS: Mapping[str, type[Encoder]] = {"cnn": Convolutional, "rnn": Recurrent, "mlp": Averaging}
"""By the names that the papers use."""
