"""A read-only look at a frozen model's vocabulary: what prompts start from.

Knows no family and no prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from promptuary.errors import SiteError


class Vocabulary(Protocol):
    """What a prompt may start from; of a model that sees, its patches are, and there is nothing here."""

    def common(self, limit: int) -> Int[Tensor, " n"]:
        """Ids of the first `limit` ordinary tokens."""

    def ids(self, text: str) -> Int[Tensor, " n"]:
        """Ids of a text, without special tokens."""

    def embed(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """Embeddings as the model sees them, float32 on the CPU."""

    @property
    def keys_values(self) -> Callable[[Int[Tensor, " n"]], Float[Tensor, "1 l 2 k n e"]]:
        """Keys and values of a sequence of tokens."""

    def rms(self) -> float:
        """Root mean square over the entries of common tokens."""


@dataclass(frozen=True)
class NoWords:
    """The vocabulary of a model that reads none."""

    name: str

    def common(self, limit: int) -> Int[Tensor, " n"]:
        """None.

        Raises:
            SiteError: in any case, as all of these.
        """
        raise self._error()

    def ids(self, text: str) -> Int[Tensor, " n"]:
        """None."""
        raise self._error()

    def embed(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """None."""
        raise self._error()

    def keys_values(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "1 l 2 k n e"]:
        """None."""
        raise self._error()

    def rms(self) -> float:
        """None."""
        raise self._error()

    def _error(self) -> SiteError:
        return SiteError(
            f"{self.name} has no vocabulary that a prompt could start from; choose another method or model"
        )


@dataclass(frozen=True)
class TableVocabulary:
    """A read-only look at an embedding table, as `prompts.init` wants it."""

    table: Any
    tokenizer: Any
    keys_values: Callable[[Int[Tensor, " n"]], Float[Tensor, "1 l 2 k n e"]]
    _common: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def common(self, limit: int) -> Int[Tensor, " n"]:
        """The first `limit` ordinary tokens in the order of their ids, which is by frequency in most vocabularies."""
        size = min(len(self.tokenizer), self.table.weight.shape[0])
        if (limit, size) in self._common:
            return self._common[limit, size].clone()
        special = set(self.tokenizer.all_special_ids)
        names = self.tokenizer.convert_ids_to_tokens(list(range(min(size, 4 * limit + 2000))))
        ordinary = [
            number
            for number, name in enumerate(names)
            if number not in special
            and name is not None
            and not name.startswith(("[unused", "<extra_id", "<|", "<unused"))
        ]
        found = self._common[limit, size] = torch.tensor(ordinary[:limit])
        return found.clone()

    def ids(self, text: str) -> Int[Tensor, " n"]:
        """Ids of a text, without special tokens."""
        return torch.tensor(self.tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.long)

    def embed(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """Embeddings as the model sees them, float32 on the CPU."""
        with torch.no_grad():
            return self.table(ids.to(self.table.weight.device)).float().cpu()

    def rms(self) -> float:
        """Root mean square over the entries of common tokens."""
        return float(self.embed(self.common(5000)).pow(2).mean().sqrt())
