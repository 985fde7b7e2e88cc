"""One transformer block whose tensors belong to whoever uses it: attention with padding masked, and a small MLP.

Knows no method and no model. Noise is handed in as factors for each row of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from promptuary.prompts.blocks import xavier_uniform

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Block:
    """Multi-head attention without biases in queries, keys and values, a projection, and an MLP.

    `width` d of what comes in and goes out; `inner` k of queries, keys and values, all heads together, and half of it
    that of the MLP between its layers; 0 is d.
    """

    width: int
    heads: int
    inner: int = 0

    NAMES: ClassVar = (
        "before", "before_bias", "query", "key", "value", "projection", "projection_bias",
        "between", "between_bias", "up", "up_bias", "down", "down_bias",
    )  # fmt: skip

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Tensors by name: 5 d k + 6 d + k / 2 numbers, 5 d^2 + 6.5 d where k is d."""
        d, k = self.width, self.inner or self.width
        attention = [(d,), (d,), (d, k), (d, k), (d, k), (k, d), (d,)]
        mlp = [(d,), (d,), (d, k // 2), (k // 2,), (k // 2, d), (d,)]
        return dict(zip(self.NAMES, (*attention, *mlp), strict=True))

    def fill(self, tensors: Tensors, generator: torch.Generator) -> None:
        """Glorot-uniform maps, zero biases, plain LayerNorms."""
        with torch.no_grad():
            for name, size in self.sizes().items():
                if len(size) == 2:
                    tensors[name].copy_(xavier_uniform(*size, generator))
                else:
                    tensors[name].fill_(float(name in ("before", "between")))

    def norm(self, tensors: Tensors, name: str, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """LayerNorm with the scale and shift of that name."""
        return layer_norm(x, (self.width,), tensors[name], tensors[f"{name}_bias"])

    def attend(
        self,
        tensors: Tensors,
        asking: Float[Tensor, "b q d"],
        context: Float[Tensor, "b t d"],
        mask: Bool[Tensor, "b t"],
    ) -> Float[Tensor, "b q d"]:
        """What each asking vector takes from the real vectors of its row's context, projected."""
        given = {"query": asking, "key": context, "value": context}
        q, k, v = ((x @ tensors[n]).unflatten(-1, (self.heads, -1)).transpose(1, 2) for n, x in given.items())
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        weights = torch.softmax(scores.masked_fill(~mask[:, None, None], -math.inf), dim=-1)
        return (weights @ v).transpose(1, 2).flatten(2) @ tensors["projection"] + tensors["projection_bias"]

    def mlp(self, tensors: Tensors, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """Up, GELU, down."""
        return gelu(x @ tensors["up"] + tensors["up_bias"]) @ tensors["down"] + tensors["down_bias"]
