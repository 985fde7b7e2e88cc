"""Text encoders without a language-model head (MiniLM, ...): an example becomes a vector, read by a head or prototypes.

Knows no method, task or data set.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import transformers
from jaxtyping import Float
from torch import Tensor

from promptuary.backbones.base import Backbone, Prompts
from promptuary.types import Batch, Candidates, Prompt


class Encoder(Backbone):
    """A text encoder. Its "words" are class prototypes: the pooled vectors of the label words, without any prompt."""

    name = "encoder"
    loader: ClassVar[Any] = transformers.AutoModel
    answer_at = "none"
    abilities = frozenset({"words", "pool"})
    pooling = "mean"

    def check_model(self) -> None:
        """Nothing is needed; starts the memory of prototypes."""
        self._prototypes: dict[str, Tensor] = {}

    def hidden(self, batch: Batch, prompts: Prompts) -> Float[Tensor, "b t h"]:
        """Last hidden states."""
        placed = self.place(batch, prompts)
        with self.running(placed) as inputs:
            states = self.model(**inputs).last_hidden_state
        return states.gather(1, placed.columns[..., None].expand(-1, -1, states.shape[-1]))

    def score(self, batch: Batch, prompts: Prompts, candidates: Candidates) -> Float[Tensor, "b c"]:
        """Cosine to each answer's prototype over the temperature; answers that do not exist score -inf."""
        vectors = torch.nn.functional.normalize(self.pooled(batch, prompts).float(), dim=-1)
        prototypes = self.prototypes(candidates)
        equation = "bh,bch->bc" if candidates.per_row else "bh,ch->bc"
        scores = torch.einsum(equation, vectors, prototypes) / self.config.temperature
        return scores.masked_fill(~candidates.mask.any(-1), -torch.inf)

    def prototypes(self, candidates: Candidates) -> Float[Tensor, "*b c h"]:
        """Unit vectors of the answers as texts of their own; those shared by all rows are computed once."""
        key = f"{candidates.ids.tolist()} {candidates.mask.tolist()}"
        if candidates.per_row or key not in self._prototypes:
            found = self._embed(candidates)
            if candidates.per_row:
                return found
            self._prototypes[key] = found
        return self._prototypes[key]

    @torch.no_grad()
    def _embed(self, candidates: Candidates) -> Tensor:
        ids, mask = candidates.ids.flatten(0, -2), candidates.mask.flatten(0, -2)
        count, start = len(ids), len(self.prefix)
        width = start + ids.shape[1] + len(self.suffix)
        batch_ids = ids.new_full((count, width), self.pad)
        batch_mask = torch.zeros_like(batch_ids)
        for row, (words, real) in enumerate(zip(ids.tolist(), mask.tolist(), strict=True)):
            full = [*self.prefix, *(word for word, is_real in zip(words, real, strict=True) if is_real), *self.suffix]
            batch_ids[row, : len(full)] = torch.tensor(full, device=ids.device)
            batch_mask[row, : len(full)] = 1
        batch = Batch(batch_ids, batch_mask, torch.arange(count, device=ids.device))
        pooled = torch.nn.functional.normalize(self.pooled(batch, Prompt()).float(), dim=-1)
        return pooled.view(*candidates.ids.shape[:-1], -1)
