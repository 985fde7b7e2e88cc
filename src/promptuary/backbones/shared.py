"""The body of a decoder-only model on a placed batch, where what rows have in common at their beginning runs once.

Knows no method, task or architecture. Under causal attention the states of a beginning do not depend on what comes
behind it. So a beginning (a prompt; prompt and text of answers that are compared; a text before its prompt) runs by
itself, its keys and values are expanded to the rows, and the rows run without it. Results and gradients are the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor

from promptuary.backbones.cache import Layer, Pair, Prefix
from promptuary.backbones.feed import counted, takes_positions
from promptuary.backbones.inject import Bank
from promptuary.backbones.kept import Kept, Row, stamp_of
from promptuary.backbones.place import Placed

WORTH = 1 / 16
"""Part of a batch's positions that must be saved for a pass of its own to pay; our choice, from benchmarks/speed.py."""


@dataclass(frozen=True)
class Beginning:
    """What groups of rows begin with: `cut` columns of each group, [g].

    `groups`: the group of each row, [b]; `first`: a row of each group, [g]; `keys`: what to keep each under, and whom
    it belongs to; `frozen`: whether nothing in it is trained.
    """

    groups: Int[Tensor, " b"]
    first: Int[Tensor, " g"]
    cut: Int[Tensor, " g"]
    keys: Sequence[tuple[Hashable, Any]] = ()
    frozen: bool = False

    @property
    def saved(self) -> int:
        """Positions that need not run: all that are kept, else all but the first row of each group."""
        rows = torch.bincount(self.groups, minlength=len(self.cut))
        return int(((rows if self.frozen else rows - 1) * self.cut).sum())


class Body:
    """A decoder-only model below its head."""

    def __init__(self, model: Any, layers: int, kept: Kept) -> None:
        """Around a model of so many layers, with a store for what is kept."""
        self.model, self.kept = model, kept
        kinds = model.config.to_dict().get("layer_types") or ["full_attention"] * layers
        self._sliding = [kind == "sliding_attention" for kind in kinds]
        self._positions = takes_positions(model)
        self._weights = list(model.parameters())
        self._shareable: bool | None = None
        self._attends = not model._is_stateful and set(kinds) <= {"full_attention", "sliding_attention"}

    def states(
        self, placed: Placed, read: Int[Tensor, "b n"], *, same: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b n h"]:
        """Last hidden states at columns of the placed batch.

        Args:
            placed: padded on the right.
            read: the columns, [b, n].
            same: rows with the same number come from one text and differ in their answers only.
        """
        states, cut, _ = self._shared(placed, read.min(1).values, same)
        read = read if cut is None else read - cut[:, None]
        return states.gather(1, read[..., None].expand(-1, -1, states.shape[-1]))

    def whole(self, placed: Placed, read: Int[Tensor, "b n"]) -> Float[Tensor, "b n h"]:
        """The same as `states` with nothing shared."""
        states = self._run(placed)[0]
        return states.gather(1, read[..., None].expand(-1, -1, states.shape[-1]))

    def behind_prompts(self, placed: Placed) -> Placed:
        """A placed batch without its prompts, whose keys and values are its prefix; as it is if none can be kept."""
        beginning = self._prompts(placed, placed.attention_mask.sum(1) - 1)
        if beginning is None:
            return placed
        return _behind(placed, beginning.cut[beginning.groups], self._lead(placed, beginning))

    @torch.no_grad()
    def shareable(self, ids: Int[Tensor, " n"]) -> bool:
        """Whether sharing is exact on this model: tried once, on two rows of the given tokens (at least four)."""
        if self.model.training:  # dropout draws for each row and each position
            return False
        if self._shareable is None:
            self._shareable = self._attends and self._tried(ids)
        return self._shareable

    def _tried(self, ids: Tensor) -> bool:
        rows = torch.stack([ids, ids.flip(0)])
        rows[1, : len(ids) - 2] = rows[0, : len(ids) - 2]
        mask = torch.ones_like(rows)
        mask[1, -1] = 0
        at = torch.zeros_like(rows)
        bank = Bank(int(self.model.get_input_embeddings().weight.shape[0]), None, None)
        placed = Placed(rows, mask, None, at, at, bank, 0, which=at[:, 0], prompts=())
        read = mask.sum(1, keepdim=True) - 1
        beginning = common(placed, placed.which, read[:, 0])
        held = self._run(_before(placed, beginning.cut[beginning.groups]), keep=True)[1]
        if held is None or len(held.layers) != len(self._sliding):  # a model that keeps nothing, or not in every layer
            return False
        lead, cut = self._lead(placed, beginning), beginning.cut[beginning.groups]
        states = self._run(_behind(placed, cut, lead))[0]
        found = states.gather(1, (read - cut[:, None])[..., None].expand(-1, -1, states.shape[-1])).float()
        exact = self.whole(placed, read).float()
        # in half precision the order of a sum alone moves states by a few hundredths of their size
        bound = 1e-3 if exact.dtype == self.model.dtype else 0.1
        return bool((found - exact).norm() <= bound * exact.norm())

    # ---- which beginnings -------------------------------------------------------------------------------------------

    def _shared(
        self, placed: Placed, limit: Int[Tensor, " b"], same: Tensor | None = None, *, keep: bool = False
    ) -> tuple[Tensor, Tensor | None, Prefix | None]:
        """States of the rows behind their beginning, how many columns those were, and all keys and values if asked."""
        beginning = None
        if same is not None:
            beginning = _worth(placed, common(placed, same, limit))
        if beginning is None:
            beginning = self._prompts(placed, limit)
        if beginning is None:
            shared = _worth(placed, common(placed, placed.which, limit))
            text = self._text(placed, limit) if shared is None or placed.spoken is not None else None
            # words have beginnings of both kinds: those of a prompt before the texts, and texts before the prompts
            beginning = text if shared is None or (text is not None and text.saved > shared.saved) else shared
        if beginning is None:
            states, keys = self._run(placed, keep)
            return states, None, keys
        cut = beginning.cut[beginning.groups]
        states, keys = self._run(_behind(placed, cut, self._lead(placed, beginning)), keep)
        return states, cut, keys

    def _prompts(self, placed: Placed, limit: Int[Tensor, " b"]) -> Beginning | None:
        """Everything up to the last row of each prompt, to be kept; with gradients, prompts are about to change."""
        parts = [part for prompt in placed.prompts for part in prompt.tensors]
        if torch.is_grad_enabled() or not self.kept.limit or any(part.is_inference() for part in parts):
            return None
        is_prompt = (placed.input_ids % placed.bank.stride >= placed.bank.vocabulary) & placed.attention_mask.bool()
        end = torch.arange(1, is_prompt.shape[1] + 1, device=limit.device).mul(is_prompt).amax(1)
        groups = placed.which
        if placed.prefix is not None:  # rows with keys and values of their own are a group of their own
            groups = groups * (1 + placed.prefix.which.max()) + placed.prefix.which
        found = common(placed, groups, torch.minimum(end, limit))
        # a beginning with more text than prompt is a text, which will not come again
        whole = (found.cut == end[found.first]) & (2 * is_prompt.sum(1)[found.first] >= found.cut)
        cut = found.cut.masked_fill(~whole, 0)
        if not int(cut.max()):
            return None
        stamp, keys = stamp_of(self.model, self._weights), []
        for row, width in zip(found.first.tolist(), cut.tolist(), strict=True):
            prompt = placed.prompts[int(placed.which[row])]
            ids = (placed.input_ids[row, :width] % placed.bank.stride).clamp(max=placed.bank.vocabulary).tolist()
            values = tuple((part.data_ptr(), part._version) for part in prompt.tensors)
            keys.append(((id(prompt), values, *ids, stamp), prompt))
        return replace(found, cut=cut, keys=keys)

    def _text(self, placed: Placed, limit: Int[Tensor, " b"]) -> Beginning | None:
        """Texts before their prompts: nothing in them is trained, so they run without gradients and can be kept.

        Rows with the same text have it in common, as when many prompts are tried on it.
        """
        if (placed.bank.rows is None and placed.spoken is None) or placed.prefix is not None:
            return None
        real = placed.attention_mask.bool()
        plain = (placed.input_ids < placed.bank.vocabulary) & real
        if placed.spoken is not None:
            plain = plain & ~placed.spoken
        if bool((plain == real).all()):  # nothing comes behind the texts
            return None
        cut = torch.minimum(plain.long().cumprod(1).sum(1), limit)
        if not (torch.is_grad_enabled() or self.kept.limit) or int(cut.sum()) < WORTH * placed.input_ids.numel():
            return None
        rows, stamp = torch.arange(len(cut), device=cut.device), stamp_of(self.model, self._weights)
        if not self.kept.limit:
            return Beginning(rows, rows, cut, frozen=True)
        ids, numbers = placed.input_ids.tolist(), dict[tuple[int, ...], int]()
        groups = [
            numbers.setdefault(tuple(row[:width]), len(numbers)) for row, width in zip(ids, cut.tolist(), strict=True)
        ]
        first = torch.tensor([groups.index(number) for number in range(len(numbers))], device=cut.device)
        keys: list[tuple[Hashable, Any]] = [((*text, stamp), None) for text in numbers]
        return Beginning(torch.tensor(groups, device=cut.device), first, cut[first], keys, frozen=True)

    # ---- running ----------------------------------------------------------------------------------------------------

    def _lead(self, placed: Placed, beginning: Beginning) -> Prefix:
        """Keys and values of the beginnings, for each row of the batch: kept ones, and those that run now."""
        cut, device = beginning.cut.tolist(), placed.input_ids.device
        rows = [
            self.kept.get(key, owner) if length else self._nothing(placed, first)
            for (key, owner), length, first in zip(beginning.keys, cut, beginning.first.tolist(), strict=False)
        ]
        missing = [n for n, length in enumerate(cut) if length and not (rows and rows[n])]
        if not beginning.keys:
            at = torch.tensor(missing, device=device)
            keys = self._keys(placed, beginning, at)
            place = torch.zeros_like(beginning.cut).index_copy(0, at, torch.arange(len(at), device=device))
            mask = keys.mask[place] * (beginning.cut > 0)[:, None]
            return Prefix(keys.layers, mask[beginning.groups], place[beginning.groups])
        # texts run one by one: which others are missing in a batch depends on what a run has seen since it began or was
        # resumed, and must have no say in the last digit
        for numbers in [[number] for number in missing] if beginning.frozen else [missing] if missing else []:
            keys = self._keys(placed, beginning, torch.tensor(numbers, device=device))
            for order, number in enumerate(numbers):
                rows[number] = row = keys.row(order)
                key, owner = beginning.keys[number]
                self.kept.put(key, row, owner, push=not beginning.frozen)
        return stacked([row or () for row in rows], beginning.groups)

    def _keys(self, placed: Placed, beginning: Beginning, at: Int[Tensor, " n"]) -> Prefix:
        """Keys and values of some beginnings, from a pass over them."""
        lead = _before(placed.rows(beginning.first[at]), beginning.cut[at])
        with torch.no_grad() if beginning.frozen else contextlib.nullcontext():
            return tight(self._shared(lead, beginning.cut[at] - 1, keep=True)[2])

    @staticmethod
    def _nothing(placed: Placed, row: int) -> Row:
        """Of a row without a beginning: the keys and values that its prompt brings, if any."""
        return () if placed.prefix is None else placed.prefix.row(row)

    def _run(self, placed: Placed, keep: bool = False) -> tuple[Tensor, Prefix | None]:
        """One pass over what is there, and all keys and values if asked."""
        mask, prefix, before = placed.attention_mask, placed.prefix, 0
        pairs: Sequence[Pair | None] = [None] * len(self._sliding)
        if prefix is not None:
            mask, before, pairs = torch.cat([prefix.mask, mask], dim=1), prefix.length, prefix.layers
        which = None if prefix is None or prefix.straight else prefix.which
        layers = [
            Layer(pair, which, sliding=slides, keep=keep) for pair, slides in zip(pairs, self._sliding, strict=True)
        ]
        inputs: dict[str, Any] = {"input_ids": placed.input_ids, "attention_mask": mask}
        if prefix is not None and self._positions:
            inputs["position_ids"] = counted(mask)[:, before:]
        if placed.segment_ids is not None:
            inputs["token_type_ids"] = placed.segment_ids
        if prefix is not None or keep:
            inputs["past_key_values"] = transformers.Cache(layers=layers)
        if self.model.base_model is self.model:  # Llama 4: the body stands under a name that is not the class's
            states = self.model(**inputs, use_cache=False, output_hidden_states=True).hidden_states[-1]
        else:
            states = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        seen = [layer.seen for layer in layers if layer.seen is not None]
        return states, Prefix(seen, mask, torch.arange(len(mask), device=mask.device)) if keep else None


# ---- arithmetic on columns -------------------------------------------------------------------------------------------


def common(placed: Placed, groups: Int[Tensor, " b"], limit: Int[Tensor, " b"]) -> Beginning:
    """How far the rows of each group are the same, up to `limit`."""
    _, inverse = torch.unique(groups, return_inverse=True)
    size, count = len(groups), int(inverse.max()) + 1
    rows = torch.arange(size, device=groups.device)
    first = rows.new_full((count,), size).scatter_reduce(0, inverse, rows, "amin")
    same = (placed.input_ids == placed.input_ids[first][inverse]) & placed.attention_mask.bool()
    if placed.prefix is not None:
        same = same & (placed.prefix.which == placed.prefix.which[first][inverse])[:, None]
    length = torch.minimum(same.long().cumprod(1).sum(1), limit)
    cut = length.new_full((count,), placed.input_ids.shape[1]).scatter_reduce(0, inverse, length, "amin")
    return Beginning(inverse, first, cut)


def _worth(placed: Placed, beginning: Beginning) -> Beginning | None:
    """None if a pass of its own saves too little."""
    rows = torch.bincount(beginning.groups, minlength=len(beginning.cut))
    # a single row has nothing in common with others: what runs before it is no longer than it is for them
    several = beginning.cut.masked_fill(rows == 1, 0)
    saved = int(((rows - 1) * several).sum())
    cut = beginning.cut.clamp(max=int(several.max()))
    # rows without a beginning would lose the keys and values that their prompts bring
    loses = placed.prefix is not None and not int(cut.min())
    return None if loses or saved < WORTH * placed.input_ids.numel() else replace(beginning, cut=cut)


def _before(placed: Placed, cut: Int[Tensor, " b"]) -> Placed:
    """The first `cut` columns of each row."""
    width = int(cut.max())
    mask = placed.attention_mask[:, :width] * (torch.arange(width, device=cut.device) < cut[:, None])
    ids = placed.input_ids[:, :width].masked_fill(mask == 0, placed.pad)
    segments, spoken = _first(placed.segment_ids, width), _first(placed.spoken, width)
    return replace(placed, input_ids=ids, attention_mask=mask, segment_ids=segments, spoken=spoken)


def _first(values: Tensor | None, width: int) -> Tensor | None:
    return None if values is None else values[:, :width]


def _behind(placed: Placed, cut: Int[Tensor, " b"], prefix: Prefix) -> Placed:
    """Each row without its first `cut` columns, behind a prefix; columns of the text count from there."""
    size = placed.attention_mask.sum(1) - cut
    width = int(size.max())
    column = torch.arange(width, device=cut.device)
    at = (column + cut[:, None]).clamp(max=placed.input_ids.shape[1] - 1)
    mask = (column < size[:, None]).long()
    return replace(
        placed,
        input_ids=placed.input_ids.gather(1, at).masked_fill(mask == 0, placed.pad),
        attention_mask=mask,
        segment_ids=None if placed.segment_ids is None else placed.segment_ids.gather(1, at) * mask,
        spoken=None if placed.spoken is None else placed.spoken.gather(1, at) & mask.bool(),
        columns=(placed.columns - cut[:, None]).clamp(min=0),
        ahead=(placed.ahead - cut[:, None]).clamp(min=0),
        prefix=prefix,
    )


def tight(prefix: Prefix | None) -> Prefix:
    """What each row has moved to the end, and no column without any."""
    assert prefix is not None
    mask, width = prefix.mask, prefix.length
    longest = int(mask.sum(1).max())
    if longest == width and bool(mask.all()):
        return prefix
    order = torch.argsort(mask, dim=1, stable=True)[:, width - longest :]

    def move(part: Tensor) -> Tensor:
        return part.gather(2, order[:, None, :, None].expand(-1, part.shape[1], -1, part.shape[3]))

    layers = [(move(keys), move(values)) for keys, values in prefix.layers]
    return replace(prefix, layers=layers, mask=mask.gather(1, order))


def stacked(rows: Sequence[Row], groups: Int[Tensor, " b"]) -> Prefix:
    """Rows of different lengths as one prefix, each row of the batch with its group's."""
    lengths = [row[0][0].shape[1] if row else 0 for row in rows]
    longest = max(lengths)
    # a row without a prefix of its own may come with empty parts
    full = [row for row, length in zip(rows, lengths, strict=True) if length]
    layers = [
        (_stack([row[layer][0] for row in full], longest), _stack([row[layer][1] for row in full], longest))
        for layer in range(len(full[0]))
    ]
    length = torch.tensor(lengths, device=groups.device)
    mask = (torch.arange(longest, device=groups.device) >= longest - length[:, None]).long()
    place = ((length > 0).cumsum(0) - 1).clamp(min=0)[groups]
    straight = len(place) == len(full) and torch.equal(place, torch.arange(len(full), device=place.device))
    return Prefix(layers, mask[groups], place, straight)


def _stack(parts: Sequence[Float[Tensor, "k _ e"]], longest: int) -> Float[Tensor, "n k p e"]:
    """Parts of different lengths, each at the end of its row."""
    if all(part.shape[1] == longest for part in parts):
        return torch.stack(list(parts))
    whole = parts[0].new_zeros(len(parts), parts[0].shape[0], longest, parts[0].shape[2])
    for row, part in zip(whole, parts, strict=True):
        row[:, longest - part.shape[1] :] = part
    return whole
