"""Models in which every token sees all others: keys and values of a prompt stand before those of each layer.

Knows no method, task, data set or architecture: whether a model takes them is tried.
"""

from __future__ import annotations

import inspect
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from promptuary.backbones.base import Backbone
from promptuary.backbones.cache import Pair, passing
from promptuary.backbones.feed import first_position, reads_both_ways
from promptuary.errors import SiteError


class Bidirectional(Backbone):
    """A text encoder, with or without a head."""

    sites = frozenset({"input", "offset", "kv", "text"})

    def missing(self, sites: frozenset[str]) -> frozenset[str]:
        """Some of these models read keys and values before their own, others do not."""
        without = frozenset({"kv"}) if "kv" in sites and not self.takes_prefix else frozenset[str]()
        return super().missing(sites) | without

    @cached_property
    def takes_prefix(self) -> bool:
        """Whether the model goes on exactly from keys and values: tried once, on six of its own tokens.

        False for a model that has no place for them, that would lose them without a word, or that tells positions by
        the distance between tokens of one pass.
        """
        body = self.model.base_model
        if not (reads_both_ways(self.model) and "past_key_values" in inspect.signature(type(body).forward).parameters):
            return False
        ids = self.vocabulary.common(6)[None].to(self.device)
        drops = self.model.training
        self.model.train(False)
        try:
            output, seen = self._pass(body, ids)
            # a head that does not hand them on would lose them
            if len(seen) != self.shape.layers or len(self._pass(self.model, ids)[1]) != self.shape.layers:
                return False
            whole, before = output.last_hidden_state, [(keys[:, :, :3], values[:, :, :3]) for keys, values in seen]
            found = self._pass(body, ids[:, 3:], before)[0].last_hidden_state
        finally:
            self.model.train(drops)
        # in half precision the order of a sum alone moves states by a few hundredths of their size
        bound = 1e-3 if whole.dtype == torch.float32 else 0.1
        wanted = whole[:, 3:].float()
        return bool((found.float() - wanted).norm() <= bound * wanted.norm())

    def keys_values(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "1 l 2 k n e"]:
        """From one run over the tokens.

        Raises:
            SiteError: the model has no place for them.
        """
        if not self.takes_prefix:
            raise SiteError(self.lacks("kv"))
        seen = self._pass(self.model.base_model, ids[None].to(self.device))[1]
        return torch.stack([torch.cat(pair) for pair in seen])[None].float().cpu()

    @torch.no_grad()
    def _pass(self, part: Any, ids: Int[Tensor, "1 n"], before: list[Pair] | None = None) -> tuple[Any, list[Pair]]:
        """What the model or its body makes of a row of tokens behind keys and values, and all keys and values there.

        Those are fewer than layers where some keep none.
        """
        first = 0 if before is None else int(before[0][0].shape[2])
        cache = passing(before or [None] * self.shape.layers, keep=True)
        positions = torch.arange(first, first + ids.shape[1], device=ids.device)[None] + first_position(self.model)
        with self.wiring.active():
            output = part(
                input_ids=ids,
                attention_mask=ids.new_ones(1, first + ids.shape[1]),
                position_ids=positions,
                past_key_values=cache,
            )
        return output, [layer.seen for layer in cache.layers if layer.seen is not None]
