"""What looks at token ids while a model writes: processors, stopping criteria and lookups see the text, no virtual ids.

Knows no prompt, method or family; works on any model that transformers' `generate` runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
)

from promptuary.backbones.inject import Active, Wiring


def readable(ids: Int[Tensor, "n q"], active: Active, pad: int) -> Int[Tensor, "n q"]:
    """Ids without offsets and prompt rows, of the same width: what was a prompt row is padding in front of the text."""
    tokens, is_prompt = _tokens(ids, active)
    order = torch.argsort((~is_prompt).long(), dim=1, stable=True)
    return tokens.masked_fill(is_prompt, pad).gather(1, order)


def as_a_set(ids: Int[Tensor, "n q"], active: Active) -> Int[Tensor, "n q"]:
    """Ids of which only the set matters: what was a prompt row or padding is the row's first token once more."""
    tokens, is_prompt = _tokens(ids, active)
    empty = is_prompt
    if active.mask is not None:
        # beams and several answers to a text are rows beside each other
        mask = active.mask.repeat_interleave(len(ids) // len(active.mask), 0)[:, : ids.shape[1]]
        empty = is_prompt.clone()
        empty[:, : mask.shape[1]] |= mask == 0
    first = tokens.gather(1, (~empty).long().argmax(1, keepdim=True))
    return torch.where(empty, first, tokens)


def _tokens(ids: Tensor, active: Active) -> tuple[Tensor, Tensor]:
    assert active.bank is not None
    tokens = ids % active.bank.stride
    return tokens, tokens >= active.bank.vocabulary


def _virtual(wiring: Wiring) -> Active | None:
    """What is active, if what the model writes behind can hold virtual ids: never in the decoder of two parts."""
    active = wiring.now
    if active is None or active.bank is None or wiring.model.config.is_encoder_decoder:
        return None
    return active


def _needs_set(processor: Any) -> bool:
    """Whether only the set of tokens matters: then padding, which prompt rows become elsewhere, must not be in it."""
    if isinstance(processor, NoRepeatNGramLogitsProcessor):
        return processor.ngram_size == 1
    return isinstance(processor, RepetitionPenaltyLogitsProcessor)


class TextProcessors(LogitsProcessorList):
    """Logits processors that see the text."""

    wiring: Wiring
    pad: int

    def __call__(self, input_ids: Tensor, scores: Float[Tensor, "n v"], **kwargs: Any) -> Float[Tensor, "n v"]:
        """As in transformers, on readable ids."""
        active = _virtual(self.wiring)
        if active is None:
            return super().__call__(input_ids, scores, **kwargs)
        seen, together = readable(input_ids, active, self.pad), as_a_set(input_ids, active)
        for processor in self:
            scores = LogitsProcessorList([processor])(together if _needs_set(processor) else seen, scores, **kwargs)
        return scores


class TextCriteria(StoppingCriteriaList):
    """Stopping criteria that see the text; lengths stay what they are."""

    wiring: Wiring
    pad: int

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """As in transformers, on readable ids."""
        active = _virtual(self.wiring)
        if active is not None:
            input_ids = readable(input_ids, active, self.pad)
        return super().__call__(input_ids, scores, **kwargs)


class TextCandidates:
    """A candidate generator (prompt lookup) that searches the text; everything else is the wrapped one's."""

    def __init__(self, inner: Any, wiring: Wiring, pad: int) -> None:
        """Wrap `inner`."""
        self.inner, self.wiring, self.pad = inner, wiring, pad

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def get_candidates(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Any]:
        """Candidates behind the ids as they are."""
        active = _virtual(self.wiring)
        if active is None:
            return self.inner.get_candidates(input_ids, **kwargs)
        found, logits = self.inner.get_candidates(readable(input_ids, active, self.pad), **kwargs)
        return torch.cat([input_ids, found[:, input_ids.shape[1] :]], dim=1), logits


def install(wiring: Wiring, pad: int) -> None:
    """Let `generate` of a wired model build the readable kinds. These three are the only private names that we use."""

    def lists(kind: Any, make: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(make)
        def build(*args: Any, **kwargs: Any) -> Any:
            active, source = wiring.now, kwargs.get("encoder_input_ids")
            if active is not None and active.bank is not None and source is not None and source.dim() == 2:
                grams = kwargs["generation_config"].encoder_no_repeat_ngram_size
                as_text = grams and grams > 1
                kwargs["encoder_input_ids"] = readable(source, active, pad) if as_text else as_a_set(source, active)
            built = kind(make(*args, **kwargs))
            built.wiring, built.pad = wiring, pad
            return built

        return build

    def candidates(make: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(make)
        def build(*args: Any, **kwargs: Any) -> Any:
            return TextCandidates(make(*args, **kwargs), wiring, pad)

        return build

    model = wiring.model
    wiring.shadow(model, "_get_logits_processor", functools.partial(lists, TextProcessors))
    wiring.shadow(model, "_get_stopping_criteria", functools.partial(lists, TextCriteria))
    wiring.shadow(model, "_get_candidate_generator", candidates)
