"""Decoder-only language models (GPT-2, Llama, Qwen, Gemma, SmolLM2, ...): the answer is the continuation.

Knows no method, task or data set.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor

from promptuary.backbones.base import Backbone, Prompts, phrase_scores, read_words
from promptuary.backbones.cache import check_window, keys_values, repeat_kv, window_of
from promptuary.backbones.feed import loses_prefix, reads_both_ways, writing
from promptuary.backbones.place import Placed, insert_after
from promptuary.backbones.shared import Body
from promptuary.backbones.tail import Expected, Narrow, Whole
from promptuary.errors import SiteError
from promptuary.types import ANSWER, IGNORED, Batch, Candidates, Prompt


class Causal(Backbone):
    """A causal language model."""

    name = "causal"
    loader: ClassVar[Any] = transformers.AutoModelForCausalLM
    answer_at = "end"
    abilities = frozenset({"words", "pool", "generate"})
    pooling = "answer"
    sites = frozenset({"input", "offset", "kv", "text"})

    def keys_values(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "1 l 2 k n e"]:
        """From one run over the tokens."""
        check_window(self.model, len(ids))
        with torch.no_grad(), self.wiring.active():
            cache = self.model.base_model(input_ids=ids[None].to(self.device), use_cache=True).past_key_values
        return keys_values(cache, self.shape.layers).float().cpu()

    def check_model(self) -> None:
        """Every token may see only those before it.

        Raises:
            SiteError: a masked model, which transformers loads as a causal one that sees all tokens.
        """
        if reads_both_ways(self.model):
            raise SiteError(f"{type(self.model).__name__} reads in both directions; use backbone.family: masked")

    def notes(self) -> list[str]:
        """Where sharing was asked for and cannot be had."""
        found = super().notes()
        if not (self.config.share_prefix and self.frozen) or self.shares:
            return found
        return [
            *found,
            f"{type(self.model).__name__} does not go on exactly from keys and values: the prompt runs in every row "
            "(backbone.share_prefix: false says that this is meant)",
        ]

    @cached_property
    def body(self) -> Body:
        """The model below its head."""
        return Body(self.model, self.shape.layers, self.kept)

    @property
    def shares(self) -> bool:
        """Whether common beginnings run once: as the settings ask, where it was tried and found exact."""
        if not (self.config.share_prefix and self.frozen):
            return False
        with self.wiring.active():
            return self.body.shareable(self.vocabulary.common(6).to(self.device))

    def _states(self, placed: Placed, read: Tensor, same: Tensor | None = None) -> Float[Tensor, "b n h"]:
        shares = self.shares
        with self.wiring.active(placed.bank):
            return self.body.states(placed, read, same=same) if shares else self.body.whole(placed, read)

    def hidden(self, batch: Batch, prompts: Prompts) -> Float[Tensor, "b t h"]:
        """States of the model below its head."""
        placed = self.place(batch, prompts)
        real = batch.attention_mask.bool()
        first = placed.columns.masked_fill(~real, placed.input_ids.shape[1]).amin(1, keepdim=True)
        return self._states(placed, torch.where(real, placed.columns, first))

    def states(self, batch: Batch, prompts: Prompts, at: Tensor, *, same: Tensor | None = None) -> Tensor:
        """States [b, n, h] of what the head turns into words behind text columns `at` [b, n]; see `Body.states`."""
        placed = self.place(batch, prompts)
        return self._states(placed, placed.ahead.gather(1, _real(batch, at)), same)

    def answer(self, batch: Batch, prompts: Prompts) -> Float[Tensor, "b h"]:
        """The state behind the last token of the text."""
        return self.states(batch, prompts, batch.slots[ANSWER][:, None])[:, 0]

    def answer_in(self, batch: Batch, states: Float[Tensor, "b t h"]) -> Float[Tensor, "b h"]:
        """The state of the last token of the text."""
        return states[torch.arange(len(batch), device=states.device), batch.slots[ANSWER]]

    def expected(self, batch: Batch, prompts: Prompts, at: Tensor, *, same: Tensor | None = None) -> Expected:
        """What the model expects behind the tokens at text columns `at` [b, n]."""
        if self.narrow:
            return Narrow(self.states(batch, prompts, at, same=same), self.tail)
        placed = self.place(batch, prompts)
        with self.running(placed) as inputs:
            logits = self.model(**inputs, use_cache=False).logits
        columns = placed.ahead.gather(1, _real(batch, at))
        return Whole(logits.gather(1, columns[..., None].expand(-1, -1, logits.shape[-1])))

    def arguments(self, ids: Int[Tensor, "b n"]) -> dict[str, Any]:
        """No cache is made for them."""
        return {"input_ids": ids, "use_cache": False}

    def score_words(self, batch: Batch, prompts: Prompts, ids: Tensor) -> Float[Tensor, "b c"]:
        """Logits behind the last token of the text."""
        words = torch.unique(ids)
        scores = self.expected(batch, prompts, batch.slots[ANSWER][:, None]).words(words)[:, 0].float()
        return read_words(scores, words, ids.expand(len(batch), -1))

    def score_phrases(self, batch: Batch, prompts: Prompts, candidates: Candidates) -> Float[Tensor, "b c"]:
        """Every answer behind every text; what the answers of a text have in common runs once."""
        count = candidates.ids.shape[-2]
        ids = candidates.ids.expand(len(batch), -1, -1).flatten(0, 1)
        mask = candidates.mask.expand(len(batch), -1, -1).flatten(0, 1)
        rows = torch.arange(len(batch), device=ids.device).repeat_interleave(count)
        repeated = batch.rows(rows)
        grown, columns = insert_after(repeated, repeated.slots[ANSWER], ids, mask, plain=True)
        read = torch.cat([grown.slots[ANSWER][:, None], columns[:, :-1]], dim=1)
        expected = self.expected(grown, _repeat(prompts, rows, len(batch)), read, same=rows)
        return phrase_scores(expected.log_probabilities(ids.clamp(min=0)), mask).view(len(batch), count)

    def answer_losses(self, batch: Batch, prompts: Prompts) -> Float[Tensor, " b"]:
        """Teacher forcing on the answer behind the text."""
        assert batch.target_ids is not None
        mask = batch.target_ids != IGNORED
        grown, columns = insert_after(batch, batch.slots[ANSWER], batch.target_ids, mask, plain=True)
        read = torch.cat([grown.slots[ANSWER][:, None], columns[:, :-1]], dim=1)
        taken = self.expected(grown, prompts, read).log_probabilities(batch.target_ids.clamp(min=0))
        return -(taken * mask).sum(1)

    def generate(self, batch: Batch, prompts: Prompts, *, max_new_tokens: int, **options: Any) -> list[list[int]]:
        """The model's own `generate` on left-padded virtual ids."""
        placed = self.place(batch, prompts)
        window = window_of(self.model) is not None
        if self.shares and not (window and len(batch) > 1) and not loses_prefix(self.model, options):
            with torch.no_grad(), self.wiring.active(placed.bank):
                placed = self.body.behind_prompts(placed)
        placed = placed.padded_left()
        if placed.prefix is not None and len(batch) > 1 and window:
            # padding between a prefix and its text would push it out of the window
            several = [prompts] if isinstance(prompts, Prompt) else list(prompts)
            which = [0] * len(batch) if batch.prompt_index is None else batch.prompt_index.tolist()
            written = []
            for number, row in zip(which, torch.arange(len(batch), device=batch.index.device)[:, None], strict=True):
                alone, own = replace(batch.rows(row), prompt_index=None), repeat_kv(several[number], row)
                written += self.generate(alone, own, max_new_tokens=max_new_tokens, **options)
            return written
        options = {"do_sample": False, "pad_token_id": self.pad, **options}
        with torch.no_grad(), self.wiring.active(placed.bank, None, placed.text_mask):
            inputs = writing(self.model, placed, options)
            written = self.model.generate(**inputs, max_new_tokens=max_new_tokens, **options)
        return trim(written[:, inputs["input_ids"].shape[1] :], self.model.generation_config.eos_token_id, self.pad)


def _real(batch: Batch, at: Int[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """Columns of padding, which nobody reads in the end, replaced by each row's first one, so that no pass grows."""
    return torch.where(batch.attention_mask.gather(1, at).bool(), at, at[:, :1])


def _repeat(prompts: Prompts, rows: Tensor, size: int) -> Prompts:
    """Prompts with one set of rows per example, repeated with their examples."""

    def repeat(prompt: Prompt) -> Prompt:
        return prompt if size == 1 else repeat_kv(prompt, rows)

    return repeat(prompts) if isinstance(prompts, Prompt) else [repeat(prompt) for prompt in prompts]


def trim(written: Tensor, eos: int | list[int] | None, pad: int) -> list[list[int]]:
    """Each row up to its first end token, without padding."""
    ends = {eos} if isinstance(eos, int) else set(eos or [])
    out = []
    for row in written.tolist():
        stop = next((place for place, token in enumerate(row) if token in ends), len(row))
        out.append([token for token in row[:stop] if token != pad or pad in ends])
    return out
