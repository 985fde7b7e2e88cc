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
from transformers.cache_utils import CacheLayerMixin

from promptuary.errors import SiteError
from promptuary.types import Prompt

Pair = tuple[Float[Tensor, "_ _ _ _"], Float[Tensor, "_ _ _ _"]]
"""Keys and values of a layer, [g, k, p, e] each."""


@dataclass(frozen=True)
class Prefix:
    """Keys and values before the rows of a batch, and which of the p positions exist for each row, [b, p].

    `layers`: keys and values [g, k, p, e] of each layer; `which`: the one of the g that a row takes, [b]. Where rows
    have fewer than p, what they have stands at the end, right before the text. `straight`: `which` is known to be
    0, 1, 2, ... so that rows need not be picked.
    """

    layers: Sequence[Pair]
    mask: Int[Tensor, "b p"]
    which: Int[Tensor, " b"]
    straight: bool = False

    @property
    def length(self) -> int:
        """Positions, those that do not exist in a row included."""
        return int(self.mask.shape[1])

    def repeat(self, times: int) -> Prefix:
        """Each row several times beside each other, as beams and several answers are."""
        if times == 1:
            return self
        mask, which = self.mask.repeat_interleave(times, 0), self.which.repeat_interleave(times, 0)
        return replace(self, mask=mask, which=which, straight=False)

    def rows(self, rows: Int[Tensor, " n"]) -> Prefix:
        """The chosen rows."""
        return replace(self, mask=self.mask[rows], which=self.which[rows], straight=False)

    def row(self, place: int) -> list[tuple[Tensor, Tensor]]:
        """One row's own copy: keys and values [k, n, e] of each layer, of the positions that exist."""
        start, group = self.length - int(self.mask[place].sum()), int(self.which[place])
        return [(keys[group, :, start:].clone(), values[group, :, start:].clone()) for keys, values in self.layers]

    def fill(self, cache: Any, dtype: torch.dtype) -> Any:
        """Put them into an empty cache of transformers, which is given back."""
        for number, pair in enumerate(self.layers):
            keys, values = (spread(part.to(dtype), None if self.straight else self.which) for part in pair)
            cache.update(keys, values, number)
        return cache


def spread(part: Float[Tensor, "g k p e"], which: Int[Tensor, " b"] | None) -> Float[Tensor, "b k p e"]:
    """Each row's own, or all as they are; a single one is expanded without a copy."""
    if which is None:
        return part
    return part.expand(len(which), -1, -1, -1) if len(part) == 1 else part.index_select(0, which)


def prefix_of(prompts: Sequence[Prompt], which: Int[Tensor, " b"]) -> Prefix | None:
    """The keys and values that each row takes, or None if no prompt has any.

    Raises:
        SiteError: a prompt has them for another number of rows.
    """
    shapes = [prompt.kv for prompt in prompts if prompt.kv is not None]
    if not shapes:
        return None
    size, longest = len(which), max(prompt.prefix_length for prompt in prompts)
    parts, taken, mask = [], torch.zeros_like(which), which.new_zeros(size, longest)
    instance, filled = torch.arange(size, device=which.device), 0
    for number, prompt in enumerate(prompts):
        if prompt.kv is None:
            continue
        if len(prompt.kv) not in (1, size):
            raise SiteError(f"the prompt has keys and values for {len(prompt.kv)} inputs, the batch has {size}")
        mine, empty = which == number, longest - prompt.prefix_length
        parts.append(torch.nn.functional.pad(prompt.kv, (0, 0, empty, 0)))
        taken = torch.where(mine, filled + instance * int(len(prompt.kv) > 1), taken)
        mask[:, empty:] += mine[:, None].long()
        filled += len(prompt.kv)
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    return Prefix([(layer[:, 0], layer[:, 1]) for layer in whole.unbind(1)], mask, taken)


class Layer(CacheLayerMixin):
    """Keys and values before those of one pass. The pass changes nothing here, so that any part of it can run again."""

    def __init__(self, past: Pair | None, which: Tensor | None, *, sliding: bool, keep: bool) -> None:
        """With nothing before, or with `past` for each row, or of which each takes one; `keep`: the first result."""
        super().__init__()
        self.past, self.which, self.is_sliding, self.keep = past, which, sliding, keep
        self.seen: Pair | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Pair:
        """All keys and values of the layer: those before, and the new ones."""
        whole = (key_states, value_states)
        if self.past is not None:
            keys, values = (spread(part.to(new.dtype), self.which) for part, new in zip(self.past, whole, strict=True))
            whole = (torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2))
        if self.keep and self.seen is None:
            self.seen = whole
        return whole

    def get_seq_length(self) -> int:
        """Positions before those of the pass, also while it runs."""
        return 0 if self.past is None else int(self.past[0].shape[-2])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Everything stays, also where a window slides over it."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """None."""
        return -1


def passing(layers: Sequence[Pair | None], which: Tensor | None = None, *, keep: bool = False) -> transformers.Cache:
    """A cache of what stands before one pass of a model that reads in both directions; the pass leaves it as it is."""
    return transformers.Cache(layers=[Layer(pair, which, sliding=False, keep=keep) for pair in layers])


def encoder_cache(model: Any, prefix: Prefix) -> transformers.Cache:
    """The prefix for each layer of a model that reads in both directions.

    Raises:
        SiteError: the model would lose it.
    """
    check(model, prefix)
    return passing(prefix.layers, None if prefix.straight else prefix.which)


def runs_again(cache: transformers.Cache) -> bool:
    """Whether a pass leaves a cache as it was, so that any part of it may run twice."""
    return not isinstance(cache, transformers.EncoderDecoderCache) and all(isinstance(n, Layer) for n in cache.layers)


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
    if counts_prefix(model) and not bool(prefix.mask.all()):
        raise SiteError(
            f"the decoder of {type(model).__name__} counts its positions from the longest prompt of keys and values in "
            "a batch; put prompts of one length into a batch"
        )


def counts_prefix(model: Any) -> bool:
    """Whether a decoder counts its positions from the first column of a prefix, real or not."""
    return model.config.is_encoder_decoder and "relative_attention_num_buckets" not in model.config.to_dict()


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
    parts = {name: getattr(prompt, name) for name in ("rows", "kv", "layers")}
    if prompt.by_row:
        parts["context"] = prompt.context
    own = {name: value[rows] for name, value in parts.items() if value is not None and len(value) > 1}
    # itself where there are none, so that what is kept for it is found
    return replace(prompt, **own) if own else prompt
