"""A placed batch as the arguments of a transformers model, for a forward pass and for `generate`.

Knows no method and no task; a prefix of keys and values becomes the beginning of a cache.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from promptuary.backbones.cache import Prefix, decoder_cache, encoder_cache, pair_cache
from promptuary.backbones.place import Placed
from promptuary.errors import SiteError


def reading(
    model: Any, placed: Placed, *, cache: Any = None, counting: bool = False, new: int | None = None
) -> dict[str, Any]:
    """Arguments of a forward pass over a placed batch.

    Args:
        model: a decoder-only model, or one whose encoder reads the batch (its prefix belongs to the decoder).
        placed: the batch.
        cache: an empty one of the caller's, to be filled with the prefix.
        counting: tell the model its positions, so that padding may stand anywhere.
        new: only the last so many columns run, behind a cache that holds all before them.

    Raises:
        SiteError: the model would lose a prefix.
    """
    mask, first, begin = placed.attention_mask, 0, 0
    inputs: dict[str, Any] = {}
    if placed.prefix is not None and not model.config.is_encoder_decoder:
        mask, first = torch.cat([placed.prefix.mask, mask], dim=1), placed.prefix.length
        counting = True
        if reads_both_ways(model):
            begin = first_position(model)
            inputs["past_key_values"] = encoder_cache(model, placed.prefix)
        elif new is None:
            inputs["past_key_values"] = decoder_cache(model, placed.prefix, cache)
    columns = {"input_ids": placed.input_ids, "token_type_ids": placed.segment_ids}
    if counting and takes_positions(model):
        columns["position_ids"] = counted(mask)[:, first:] + begin
    for name, value in columns.items():
        if value is not None:
            inputs[name] = value if new is None else value[:, -new:]
    return {**inputs, "attention_mask": mask}


def writing(model: Any, placed: Placed, options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `generate` over a placed batch: a prefix takes columns of its own, which its cache has already.

    Raises:
        SiteError: an option that would lose the prefix.
    """
    inputs: dict[str, Any] = {"input_ids": placed.input_ids, "attention_mask": placed.attention_mask}
    if placed.prefix is None:
        return inputs
    _keep_cache(model, options)
    empty = torch.full_like(placed.prefix.mask, placed.pad)
    return {
        "input_ids": torch.cat([empty, placed.input_ids], dim=1),
        "attention_mask": torch.cat([placed.prefix.mask, placed.attention_mask], dim=1),
        "past_key_values": decoder_cache(model, placed.prefix.repeat(_times(options))),
    }


def decoding(model: Any, prefix: Prefix | None, ids: Int[Tensor, "b a"], mask: Tensor | None = None) -> dict[str, Any]:
    """What the decoder of an encoder-decoder takes besides `ids`, so that it begins with the prefix."""
    if prefix is None:
        return {} if mask is None else {"decoder_attention_mask": mask}
    own = torch.ones_like(ids) if mask is None else mask
    return {
        "past_key_values": pair_cache(model, prefix),
        "decoder_attention_mask": torch.cat([prefix.mask, own], dim=1),
    }


def decoder_writing(
    model: Any, placed: Placed, start: Int[Tensor, "b a"], options: dict[str, Any]
) -> tuple[dict[str, Any], int]:
    """Arguments of an encoder-decoder's `generate`, and how many columns of its sequences are the prefix's.

    Raises:
        SiteError: an option that would lose the prefix.
    """
    inputs = {
        "input_ids": placed.input_ids, "attention_mask": placed.attention_mask, "decoder_input_ids": start
    }  # fmt: skip
    if placed.prefix is None:
        return inputs, 0
    _keep_cache(model, options)
    # `generate` puts a start token in front of a decoder's input that does not begin with one
    whole = torch.cat([start[:, :1].expand(-1, placed.prefix.length), start], dim=1)
    inputs |= {
        "decoder_input_ids": whole,
        "decoder_attention_mask": torch.cat([placed.prefix.mask, torch.ones_like(start)], dim=1),
        "past_key_values": pair_cache(model, placed.prefix.repeat(_times(options))),
    }
    return inputs, placed.prefix.length


def _times(options: dict[str, Any]) -> int:
    return max(options.get("num_beams") or 1, options.get("num_return_sequences") or 1)


def loses_prefix(model: Any, options: dict[str, Any]) -> list[str]:
    """Options of `generate`, or settings of the model's own, with which it would not go on from a given cache."""
    config = options.get("generation_config") or model.generation_config
    asked = {name: options.get(name, getattr(config, name, None)) for name in _FROM_THE_START}
    lost = [name for name, value in asked.items() if value is not None and value is not False]
    return lost + (["use_cache"] if options.get("use_cache", config.use_cache) is False else [])


# assisted writing runs the whole input once more, behind what the cache holds
_FROM_THE_START = (
    "cache_implementation", "prefill_chunk_size",
    "prompt_lookup_num_tokens", "assistant_early_exit", "assistant_model", "use_mtp",
)  # fmt: skip


def _keep_cache(model: Any, options: dict[str, Any]) -> None:
    lost = loses_prefix(model, options)
    if lost:
        raise SiteError(f"a prompt of keys and values lives in the model's own cache; leave {lost[0]} out")


def counted(mask: Int[Tensor, "b q"]) -> Int[Tensor, "b q"]:
    """Positions that count what is real."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def reads_both_ways(model: Any) -> bool:
    """Whether every token of a model without a decoder sees all others."""
    config = model.config
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.to_dict().get("is_decoder")


def first_position(model: Any) -> int:
    """What a model with a table of positions calls the first: RoBERTa counts from behind the number of its padding."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


def takes_positions(model: Any) -> bool:
    """Whether a model's forward pass takes position_ids."""
    return "position_ids" in inspect.signature(type(model).forward).parameters
