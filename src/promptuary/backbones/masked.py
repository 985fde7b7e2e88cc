"""Masked language models with their heads (BERT, RoBERTa, DeBERTa, ModernBERT, ...): the answer is at the mask.

Knows no method, task or data set.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import transformers
from jaxtyping import Float
from torch import Tensor

from promptuary.backbones.base import Prompts, phrase_scores, read_words
from promptuary.backbones.bidirectional import Bidirectional
from promptuary.backbones.feed import reading
from promptuary.backbones.place import insert_after
from promptuary.backbones.tail import Expected, Narrow, Whole
from promptuary.errors import DataError, SiteError
from promptuary.types import ANSWER, Batch, Candidates


class Masked(Bidirectional):
    """A masked language model."""

    name = "masked"
    loader: ClassVar[Any] = transformers.AutoModelForMaskedLM
    answer_at = "mask"
    abilities = frozenset({"words", "pool"})
    pooling = "first"

    def check_model(self) -> None:
        """A mask token and an output head are needed.

        Raises:
            SiteError: one of them is missing.
        """
        if self.tokenizer.mask_token_id is None:
            raise SiteError("the tokenizer has no mask token; use backbone.family: encoder")
        if self.model.get_output_embeddings() is None:
            raise SiteError(f"{type(self.model).__name__} has no masked-language-model head")

    def hidden(self, batch: Batch, prompts: Prompts) -> Float[Tensor, "b t h"]:
        """States of the model below its head."""
        placed = self.place(batch, prompts)
        with self.running(placed) as inputs:
            states = self.model.base_model(**inputs).last_hidden_state
        return states.gather(1, placed.columns[..., None].expand(-1, -1, states.shape[-1]))

    def answer(self, batch: Batch, prompts: Prompts) -> Float[Tensor, "b h"]:
        """The state at the mask."""
        states = self.hidden(batch, prompts)
        return states[torch.arange(len(batch), device=states.device), self._answer(batch)]

    def expected(self, batch: Batch, prompts: Prompts, at: Tensor) -> Expected:
        """What the model expects at text columns `at` [b, n]."""
        placed = self.place(batch, prompts)
        columns, inputs = placed.columns.gather(1, at)[..., None], reading(self.model, placed)
        if self.narrow:
            states = self.tail.states(inputs, placed.bank, placed.attention_mask)
            return Narrow(states.gather(1, columns.expand(-1, -1, states.shape[-1])), self.tail)
        with self.wiring.active(placed.bank, None, placed.attention_mask):
            logits = self.model(**inputs).logits
        return Whole(logits.gather(1, columns.expand(-1, -1, logits.shape[-1])))

    def _answer(self, batch: Batch) -> Tensor:
        if ANSWER not in batch.slots:
            raise DataError('a masked model reads its answer at a mask: put "{mask}" into task.template')
        return batch.slots[ANSWER]

    def score_words(self, batch: Batch, prompts: Prompts, ids: Tensor) -> Float[Tensor, "b c"]:
        """Logits at the mask."""
        words = torch.unique(ids)
        scores = self.expected(batch, prompts, self._answer(batch)[:, None]).words(words)[:, 0].float()
        return read_words(scores, words, ids.expand(len(batch), -1))

    def score_phrases(self, batch: Batch, prompts: Prompts, candidates: Candidates) -> Float[Tensor, "b c"]:
        """One run per length of answer, with that many masks; all tokens of an answer are read at once."""
        count, size = candidates.ids.shape[-2], len(batch)
        ids, mask = candidates.ids.expand(size, -1, -1), candidates.mask.expand(size, -1, -1)
        lengths, at = mask.sum(-1), self._answer(batch)
        scores = torch.zeros(size, count, device=ids.device)
        for length in sorted(set(lengths.flatten().tolist()) - {0}):
            more = torch.full((size, length - 1), self.tokenizer.mask_token_id, device=ids.device)
            grown, added = insert_after(batch, at, more, torch.ones_like(more, dtype=torch.bool), plain=False)
            columns = torch.cat([grown.slots[ANSWER][:, None], added], dim=1)
            chosen = ids[..., :length].clamp(min=0)
            logits = torch.log_softmax(self.expected(grown, prompts, columns).words().float(), dim=-1)
            taken = logits[:, None].expand(-1, count, -1, -1).gather(-1, chosen[..., None])[..., 0]
            part = phrase_scores(taken.flatten(0, 1), mask[..., :length].flatten(0, 1))
            scores = torch.where(lengths == length, part.view(size, count), scores)
        return scores
