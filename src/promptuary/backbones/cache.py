"""Keys and values of prompts as the caches of transformers: the only file that makes or fills one.

Knows no method and no family by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor

from promptuary.errors import SiteError
from promptuary.types import Prompt


@dataclass(frozen=True)
class Prefix:
    """Keys and values for each row of a batch, [b, l, 2, k, p, e], and which of the p positions exist, [b, p].

    Shorter ones stand at the end, right before the text.
    """

    kv: Float[Tensor, "b l 2 k p e"]
    mask: Int[Tensor, "b p"]

    @property
    def length(self) -> int:
        """Positions, those that do not exist in a row included."""
        return int(self.kv.shape[4])

    def repeat(self, times: int) -> Prefix:
        """Each row several times beside each other, as beams and several answers are."""
        if times == 1:
            return self
        return Prefix(self.kv.repeat_interleave(times, 0), self.mask.repeat_interleave(times, 0))

    def rows(self, rows: Int[Tensor, " n"]) -> Prefix:
        """The chosen rows."""
        return Prefix(self.kv[rows], self.mask[rows])

    def fill(self, cache: Any, dtype: torch.dtype) -> Any:
        """Put them into an empty cache of transformers, which is given back."""
        for layer in range(self.kv.shape[1]):
            cache.update(self.kv[:, layer, 0].to(dtype), self.kv[:, layer, 1].to(dtype), layer)
        return cache


def prefix_of(prompts: Sequence[Prompt], which: Int[Tensor, " b"]) -> Prefix | None:
    """The keys and values that each row takes, or None if no prompt has any.

    Raises:
        SiteError: a prompt has them for another number of rows.
    """
    shapes = [prompt.kv for prompt in prompts if prompt.kv is not None]
    if not shapes:
        return None
    size, longest = len(which), max(prompt.prefix_length for prompt in prompts)
    first = shapes[0]
    total = first.new_zeros(size, *first.shape[1:4], longest, first.shape[5])
    mask = which.new_zeros(size, longest)
    for number, prompt in enumerate(prompts):
        if prompt.kv is None:
            continue
        if len(prompt.kv) not in (1, size):
            raise SiteError(f"the prompt has keys and values for {len(prompt.kv)} inputs, the batch has {size}")
        taken, empty = which == number, longest - prompt.prefix_length
        padded = torch.nn.functional.pad(prompt.kv, (0, 0, empty, 0)).expand(size, -1, -1, -1, -1, -1)
        total = torch.where(taken.view(-1, 1, 1, 1, 1, 1), padded, total)
        mask[:, empty:] += taken[:, None].long()
    return Prefix(total, mask)


def decoder_cache(model: Any, prefix: Prefix, cache: Any = None) -> Any:
    """A cache of a decoder-only model that begins with the prefix; `cache`: an empty one to be filled.

    Raises:
        SiteError: the model cannot begin with keys and values, or not with so many.
    """
    check(model, prefix)
    if cache is None:
        cache = transformers.DynamicCache(config=model.config)
    if not isinstance(cache, transformers.DynamicCache):
        raise SiteError(f"a prompt of keys and values fills a DynamicCache, not a {type(cache).__name__}")
    return prefix.fill(cache, model.dtype)


def pair_cache(model: Any, prefix: Prefix) -> Any:
    """A cache of an encoder-decoder whose decoder begins with the prefix."""
    check(model, prefix)
    own = prefix.fill(transformers.DynamicCache(config=model.config), model.dtype)
    return transformers.EncoderDecoderCache(own, transformers.DynamicCache(config=model.config))


def check(model: Any, prefix: Prefix) -> None:
    """Refuse what would lose the prefix without a word."""
    if model.training and getattr(model, "is_gradient_checkpointing", False):
        raise SiteError(
            "gradient checkpointing of transformers drops the cache that carries a prompt of keys and values; "
            "switch it off, or use a method with rows at the input"
        )
    check_window(model, prefix.length)
    facts = model.config.to_dict()
    relative = "relative_attention_num_buckets" in facts
    if model.config.is_encoder_decoder and not relative and not bool(prefix.mask.all()):
        raise SiteError(
            f"the decoder of {type(model).__name__} counts its positions from the longest prompt of keys and values in "
            "a batch; put prompts of one length into a batch"
        )


def check_window(model: Any, length: int) -> None:
    """Refuse a prefix that a sliding window could not hold."""
    window = window_of(model)
    if window is not None and length >= window:
        raise SiteError(f"the prompt has {length} positions, but the model's sliding window {window}")


def window_of(model: Any) -> int | None:
    """Positions of a sliding window, where some layers have one."""
    facts = model.config.to_dict()
    if "sliding_attention" in (facts.get("layer_types") or ()):
        return int(facts["sliding_window"])
    return None


def keys_values(cache: Any, layers: int) -> Float[Tensor, "1 l 2 k p e"]:
    """What a cache holds for its only row."""
    return torch.stack([torch.stack([cache.layers[n].keys[0], cache.layers[n].values[0]]) for n in range(layers)])[None]


def repeat_kv(prompt: Prompt, rows: Int[Tensor, " n"]) -> Prompt:
    """A prompt whose parts for single examples are repeated with their examples."""
    rows_of = prompt.rows if prompt.rows is None or len(prompt.rows) == 1 else prompt.rows[rows]
    kv_of = prompt.kv if prompt.kv is None or len(prompt.kv) == 1 else prompt.kv[rows]
    return replace(prompt, rows=rows_of, kv=kv_of)
