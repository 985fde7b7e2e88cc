"""Encoder-decoder models (T5, BART, ...): prompts go into the encoder's input, the answer is the decoder's target.

Knows no method, task or data set.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from promptuary.backbones.base import Backbone, Prompts, phrase_scores, read_words
from promptuary.backbones.cache import keys_values
from promptuary.backbones.causal import trim
from promptuary.backbones.feed import decoder_writing, decoding
from promptuary.backbones.place import Placed
from promptuary.backbones.tail import Expected, Narrow, Whole
from promptuary.errors import SiteError
from promptuary.types import IGNORED, Batch, Candidates


class Seq2Seq(Backbone):
    """An encoder-decoder language model."""

    name = "seq2seq"
    loader: ClassVar[Any] = transformers.AutoModelForSeq2SeqLM
    answer_at = "target"
    abilities = frozenset({"words", "pool", "generate"})
    pooling = "mean"
    sites = frozenset({"input", "offset", "kv", "text"})

    def check_model(self) -> None:
        """A decoder needs a token to start with.

        Raises:
            SiteError: the model's config names none.
        """
        config, generation = self.model.config, self.model.generation_config
        start = generation.decoder_start_token_id
        start = start if start is not None else config.to_dict().get("decoder_start_token_id")
        if start is None:
            raise SiteError("the model's config has no decoder_start_token_id; set it before loading")
        # BART writes <s> before its answer; T5 writes nothing
        self.decoder_start = [int(start), *(token for token in self.prefix if token != start)]
        # some models add a vocabulary-sized bias behind the head, so words can only be picked after it
        self.words_at_head = "final_logits_bias" not in dict(self.model.named_buffers())

    def key_value_shape(self) -> tuple[int, int, int]:
        """Of the decoder's self-attention."""
        facts = self.model.config.to_dict()
        layers = facts.get("num_decoder_layers") or facts.get("decoder_layers") or 1
        heads = facts.get("num_heads") or facts.get("decoder_attention_heads") or 1
        return layers, heads, facts.get("d_kv") or facts["d_model"] // heads

    def keys_values(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "1 l 2 k n e"]:
        """Of the decoder, which reads the tokens and the encoder's states of the same tokens."""
        given = ids[None].to(self.device)
        with torch.no_grad(), self.wiring.active():
            cache = self.model(input_ids=given, decoder_input_ids=given, use_cache=True).past_key_values
        return keys_values(cache.self_attention_cache, self.shape.layers).float().cpu()

    def hidden(self, batch: Batch, prompts: Prompts) -> Float[Tensor, "b t h"]:
        """States of the encoder."""
        placed = self.place(batch, prompts)
        states = self._encode(placed)
        return states.gather(1, placed.columns[..., None].expand(-1, -1, states.shape[-1]))

    def _encode(self, placed: Placed) -> Tensor:
        with self.running(placed) as inputs:
            return self.model.get_encoder()(**inputs).last_hidden_state

    def arguments(self, ids: Int[Tensor, "b n"]) -> dict[str, Any]:
        """They are the decoder's, which sees a text of nothing."""
        nothing = torch.zeros(len(ids), 1, self.shape.width, dtype=self.model.dtype, device=ids.device)
        return {
            "encoder_outputs": BaseModelOutput(last_hidden_state=nothing), "decoder_input_ids": ids, "use_cache": False
        }  # fmt: skip

    def answer(self, batch: Batch, prompts: Prompts) -> Float[Tensor, "b h"]:
        """The decoder's state that the first token of an answer is read from.

        Raises:
            SiteError: the model's head does not run apart from its body.
        """
        if not self.separable:
            raise SiteError(f"{type(self.model).__name__} does not let its head run apart from its body")
        placed = self.place(batch, prompts)
        start, at = self._started(torch.zeros(len(batch), 1, dtype=torch.long, device=placed.input_ids.device))
        found = self.tail.states(self._decoding(self._encode(placed), placed, start))
        return found[torch.arange(len(batch), device=at.device), at[:, 0]]

    def answer_in(self, batch: Batch, states: Float[Tensor, "b t h"]) -> None:
        """It is the decoder's."""

    def _decoding(self, states: Tensor, placed: Placed, ids: Tensor) -> dict[str, Any]:
        """What the decoder takes with its input `ids`; several inputs may share a text."""
        times = len(ids) // len(placed.input_ids)
        prefix = None if placed.prefix is None else placed.prefix.repeat(times)
        return {
            "encoder_outputs": BaseModelOutput(last_hidden_state=states.repeat_interleave(times, 0)),
            "attention_mask": placed.attention_mask.repeat_interleave(times, 0),
            "decoder_input_ids": ids,
            "use_cache": prefix is not None,
            **decoding(self.model, prefix, ids),
        }

    def _decode(self, states: Tensor, placed: Placed, ids: Tensor, at: Tensor) -> Expected:
        """What the model expects at columns `at` of the decoder's input `ids`."""
        inputs = self._decoding(states, placed, ids)
        if self.narrow:
            found = self.tail.states(inputs)
            return Narrow(found.gather(1, at[..., None].expand(-1, -1, found.shape[-1])), self.tail)
        with self.wiring.active():
            logits = self.model(**inputs).logits
        return Whole(logits.gather(1, at[..., None].expand(-1, -1, logits.shape[-1])))

    def _started(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Decoder input for teacher forcing on `ids` [n, k], and the columns that predict them."""
        start = torch.tensor(self.decoder_start, device=ids.device).expand(len(ids), -1)
        columns = torch.arange(ids.shape[1], device=ids.device) + start.shape[1] - 1
        return torch.cat([start, ids[:, :-1].clamp(min=0)], dim=1), columns.expand(len(ids), -1)

    def score_words(self, batch: Batch, prompts: Prompts, ids: Tensor) -> Float[Tensor, "b c"]:
        """One decoder position."""
        placed = self.place(batch, prompts)
        words = torch.unique(ids)
        start, at = self._started(ids.expand(len(batch), -1)[:, :1])
        scores = self._decode(self._encode(placed), placed, start, at).words(words)[:, 0].float()
        return read_words(scores, words, ids.expand(len(batch), -1))

    def score_phrases(self, batch: Batch, prompts: Prompts, candidates: Candidates) -> Float[Tensor, "b c"]:
        """The encoder runs once per row, the decoder once per answer."""
        placed = self.place(batch, prompts)
        states, count = self._encode(placed), candidates.ids.shape[-2]
        ids = candidates.ids.expand(len(batch), -1, -1).flatten(0, 1)
        mask = candidates.mask.expand(len(batch), -1, -1).flatten(0, 1)
        start, at = self._started(ids)
        taken = self._decode(states, placed, start, at).log_probabilities(ids.clamp(min=0))
        return phrase_scores(taken, mask).view(len(batch), count)

    def answer_losses(self, batch: Batch, prompts: Prompts) -> Float[Tensor, " b"]:
        """Teacher forcing in the decoder."""
        assert batch.target_ids is not None
        placed = self.place(batch, prompts)
        start, at = self._started(batch.target_ids)
        taken = self._decode(self._encode(placed), placed, start, at).log_probabilities(batch.target_ids.clamp(min=0))
        return -(taken * (batch.target_ids != IGNORED)).sum(1)

    def generate(self, batch: Batch, prompts: Prompts, *, max_new_tokens: int, **options: Any) -> list[list[int]]:
        """The model's own `generate`; the prompt is in the encoder's input only."""
        placed = self.place(batch, prompts)
        options = {"do_sample": False, "num_beams": 1, **options}
        # as in teacher forcing, the answer begins behind all of the start tokens
        start = torch.tensor(self.decoder_start, device=placed.input_ids.device).expand(len(batch), -1)
        with torch.no_grad(), self.wiring.active(placed.bank, None, placed.attention_mask):
            inputs, prefix = decoder_writing(self.model, placed, start, options)
            written = self.model.generate(**inputs, max_new_tokens=max_new_tokens, **options)[:, prefix:]
        skip = {*self.decoder_start, self.pad}
        eos = self.model.generation_config.eos_token_id
        ends = {eos} if isinstance(eos, int) else set(eos or [])
        first = len(self.decoder_start)  # a start token may equal the end token (BART)
        return [[t for t in row if t not in skip - ends] for row in trim(written[:, first:], eos, self.pad)]
