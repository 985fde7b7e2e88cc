"""Text encoders without a language-model head (MiniLM, ...): an example becomes a vector, read by a head or prototypes.

Knows no method, task or data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import transformers
from jaxtyping import Float
from torch import Tensor

from promptuary.backbones.base import Prompts
from promptuary.backbones.bidirectional import Bidirectional
from promptuary.backbones.kept import stamp_of
from promptuary.types import Batch, Candidates, Prompt


class Encoder(Bidirectional):
    """A text encoder. Its "words" are class prototypes: the pooled vectors of the label words, without any prompt."""

    name = "encoder"
    loader: ClassVar[Any] = transformers.AutoModel
    answer_at = "none"
    abilities = frozenset({"words", "pool"})
    pooling = "mean"

    def hidden(self, batch: Batch, prompts: Prompts) -> Float[Tensor, "b t h"]:
        """Last hidden states."""
        placed = self.place(batch, prompts)
        with self.running(placed) as inputs:
            states = self.model(**inputs).last_hidden_state
        return states.gather(1, placed.columns[..., None].expand(-1, -1, states.shape[-1]))

    def score(self, batch: Batch, prompts: Prompts, candidates: Candidates) -> Float[Tensor, "b c"]:
        """Cosine to each answer's prototype over the temperature; answers that do not exist score -inf."""
        return self.words(self.answer(batch, prompts), candidates)

    def words(self, states: Float[Tensor, "b h"], candidates: Candidates) -> Float[Tensor, "b c"]:
        """The same from pooled vectors; answers may have any number of tokens."""
        vectors = torch.nn.functional.normalize(states.float(), dim=-1)
        prototypes = self.prototypes(candidates)
        equation = "bh,bch->bc" if candidates.per_row else "bh,ch->bc"
        scores = torch.einsum(equation, vectors, prototypes) / self.config.temperature
        return scores.masked_fill(~candidates.mask.any(-1), -torch.inf)

    def prototypes(self, candidates: Candidates) -> Float[Tensor, "*b c h"]:
        """Unit vectors of the answers as texts of their own, without a prompt; each is computed once and kept."""
        ids, mask = candidates.ids.flatten(0, -2), candidates.mask.flatten(0, -2)
        stamp, known = stamp_of(self.model), dict[tuple[int, ...], Tensor]()
        answers = [
            tuple(word for word, real in zip(*row, strict=True) if real)
            for row in zip(ids.tolist(), mask.tolist(), strict=True)
        ]
        for answer in dict.fromkeys(answers):
            found = self.kept.get((answer, stamp))
            if found is None:
                found = [(self._embed(answer),)]
                self.kept.put((answer, stamp), found)
            known[answer] = found[0][0]
        return torch.stack([known[answer] for answer in answers]).view(*candidates.ids.shape[:-1], -1)

    @torch.no_grad()
    def _embed(self, answer: Sequence[int]) -> Float[Tensor, " h"]:
        """By itself, so that no other answer has a say in its last digit, and without the model's dropout."""
        ids = torch.tensor([[*self.prefix, *answer, *self.suffix]], dtype=torch.long, device=self.device)
        mask, index = torch.ones_like(ids), torch.zeros(1, dtype=torch.long, device=self.device)
        if ids.numel() == 0:  # no answer, and a tokenizer without special tokens
            ids, mask = torch.full((1, 1), self.pad, device=self.device), torch.zeros_like(index[None])
        drops = self.model.training
        self.model.train(False)
        try:
            pooled = self.pooled(Batch(ids, mask, index), Prompt())
        finally:
            self.model.train(drops)
        return torch.nn.functional.normalize(pooled[0].float(), dim=-1)
