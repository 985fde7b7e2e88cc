"""Where prompt rows go among the tokens of a batch: arithmetic on ids, masks and columns, without any model.

Knows no method, no family and no tokenizer, and wraps nothing; `inject.py` says what the ids mean.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from promptuary.backbones.cache import Prefix, prefix_of
from promptuary.backbones.inject import Bank
from promptuary.errors import DataError, SiteError
from promptuary.types import ANSWER, Batch, Prompt

Side = Literal["left", "right", "keep"]
"""Where the padding of a placed batch stands; "keep" leaves every token and pad where it is, behind the prompt."""


@dataclass(frozen=True)
class Placed:
    """A batch with its prompts in it.

    `columns` [b, t]: where each text token went; `ahead` [b, t]: the last column before the text token behind it (or
    the last of all), whose output is what a causal model expects next, also when prompt rows stand in between.
    `which`: the one of the `prompts` that each row takes; `prefix`: keys and values that stand before all of it.
    `spoken` [b, q]: columns that hold the words of a prompt, where any does.
    """

    input_ids: Int[Tensor, "b q"]
    attention_mask: Int[Tensor, "b q"]
    segment_ids: Int[Tensor, "b q"] | None
    columns: Int[Tensor, "b t"]
    ahead: Int[Tensor, "b t"]
    bank: Bank
    pad: int
    which: Int[Tensor, " b"]
    prompts: Sequence[Prompt]
    prefix: Prefix | None = None
    spoken: Bool[Tensor, "b q"] | None = None

    def rows(self, rows: Int[Tensor, " n"]) -> Placed:
        """The chosen rows."""
        return replace(
            self,
            input_ids=self.input_ids[rows],
            attention_mask=self.attention_mask[rows],
            segment_ids=None if self.segment_ids is None else self.segment_ids[rows],
            columns=self.columns[rows],
            ahead=self.ahead[rows],
            which=self.which[rows],
            prefix=None if self.prefix is None else self.prefix.rows(rows),
            spoken=None if self.spoken is None else self.spoken[rows],
        )

    def padded_left(self) -> Placed:
        """The same with its padding on the left, for writing on, and as little of it as may be."""
        filled = self.attention_mask.sum(1, keepdim=True)
        empty = filled.max() - filled
        column = torch.arange(int(filled.max()), device=empty.device) - empty
        mask = (column >= 0).long()
        return replace(
            self,
            input_ids=self.input_ids.gather(1, column.clamp(min=0)).masked_fill(mask == 0, self.pad),
            attention_mask=mask,
            segment_ids=None if self.segment_ids is None else self.segment_ids.gather(1, column.clamp(min=0)) * mask,
            columns=self.columns + empty,
            ahead=self.ahead + empty,
            spoken=None,
        )

    @property
    def text_mask(self) -> Int[Tensor, "b q"]:
        """Columns that hold rows or text, of the prefix's columns and its own."""
        if self.prefix is None:
            return self.attention_mask
        return torch.cat([torch.zeros_like(self.prefix.mask), self.attention_mask], dim=1)


def place(
    batch: Batch,
    prompts: Sequence[Prompt],
    *,
    vocabulary: int,
    pad: int,
    first_ids: Int[Tensor, " s"],
    side: Side = "right",
    vectors: Float[Tensor, "b t d"] | None = None,
    tight: bool = False,
    masked: bool = False,
) -> Placed:
    """Put prompts among the tokens of a batch.

    Real tokens are counted, so padding on either side of the input gives the same result; unless `side` is "keep",
    padding is moved as well.

    Args:
        batch: text without prompts; `batch.prompt_index` says which prompt a row takes.
        prompts: one or more prompts, of any lengths.
        vocabulary: V.
        pad: id of padding.
        first_ids: special tokens that count as the first one for placement "after_bos".
        side: where the padding of the result stands.
        vectors: embeddings that stand for the text instead of its ids; they become rows of the bank.
        tight: leave out columns of padding alone (on the left).
        masked: whether the answer is read at a token of the text, which then has a before and an after.

    Raises:
        SiteError: a prompt names a slot that the template does not have, or stands behind a first token that
            vectors do not name.
        DataError: a text is longer than an offset table that refuses this.
    """
    device, size = batch.input_ids.device, len(batch)
    mask = batch.attention_mask.bool()
    rank = mask.long().cumsum(1) - 1
    which = batch.prompt_index if batch.prompt_index is not None else rank.new_zeros(size)
    bank, row_base, offset_base = _bank(prompts, vocabulary, size, vectors)
    text_ids = batch.input_ids
    if vectors is not None:
        if any(prompt.placement == "after_bos" for prompt in prompts):
            raise SiteError("a prompt behind the first special token needs input_ids: vectors do not say which it is")
        text_ids = bank.stride - text_ids.numel() + torch.arange(text_ids.numel(), device=device).view_as(text_ids)

    lengths = torch.tensor([prompt.length for prompt in prompts], device=device)[which]
    longest = max(prompt.length for prompt in prompts)
    width = batch.input_ids.shape[1] + longest
    slot = torch.arange(longest, device=device).expand(size, -1)
    exists = slot < lengths[:, None]
    behind = slot.new_zeros(size, longest)
    for number, prompt in enumerate(prompts):
        if prompt.length and prompt.placement != "front":
            found = _text_before(batch, prompt, mask, first_ids, masked)
            padded = nn.functional.pad(found, (0, longest - prompt.length))
            behind = torch.where((which == number)[:, None], padded, behind)

    # each prompt row stands behind `behind` text tokens; each text token behind the rows that come before it
    order = behind.masked_fill(~exists, torch.iinfo(torch.long).max).contiguous()
    turn = slot
    if any(not isinstance(prompt.placement, str) for prompt in prompts):  # several places, named in any order
        order, sources = order.sort(dim=1, stable=True)
        turn = sources.argsort(dim=1)
    text_column = rank + torch.searchsorted(order, rank.contiguous(), right=True)
    ahead = rank + torch.searchsorted(order, (rank + 1).contiguous(), right=True)
    prompt_column = turn + behind
    real = mask.sum(1) + lengths
    if side == "right" or (tight and side == "left"):
        # the longest text and the longest prompt need not meet in one row
        width = int(real.max())
    if side == "left":
        shift = (width - real)[:, None]
        text_column, prompt_column, ahead = text_column + shift, prompt_column + shift, ahead + shift
    if side == "keep":  # rows stand right before the token that they precede; all else is shifted by the longest prompt
        shift = (longest - lengths)[:, None]
        column = torch.arange(mask.shape[1], device=device).expand_as(rank)
        text_column = column + shift + text_column - rank
        ordered = torch.argsort((~mask).long(), dim=1, stable=True)  # columns of the real tokens first, in order
        following = ordered.gather(1, behind.clamp(max=mask.shape[1] - 1))
        past_end = behind >= mask.sum(1, keepdim=True)
        last = ordered.gather(1, (mask.sum(1, keepdim=True) - 1).clamp(min=0)) + 1
        prompt_column = turn + shift + torch.where(past_end, last, following)
        ahead = text_column

    instance = torch.arange(size, device=device)
    own = torch.tensor([prompt.rows is not None and len(prompt.rows) > 1 for prompt in prompts], device=device)[which]
    first = torch.tensor(row_base, device=device)[which] + own * instance * lengths
    prompt_ids = vocabulary + first[:, None] + slot
    spoken = None
    if any(prompt.ids is not None for prompt in prompts):
        words = [torch.full_like(slot[0], -1) if p.ids is None else _filled(p.ids.to(device), longest) for p in prompts]
        words_at = torch.stack(words)[which]
        prompt_ids, spoken = torch.where(words_at < 0, prompt_ids, words_at), (words_at >= 0).long()
    codes = _offset_codes(batch, prompts, which, rank, offset_base)

    at = text_column.masked_fill(~mask, width), prompt_column.masked_fill(~exists, width)
    ones, segments = torch.ones_like(prompt_ids), batch.segment_ids
    return Placed(
        input_ids=_spread(at, (text_ids + codes * bank.stride, prompt_ids), width, pad),
        attention_mask=_spread(at, (mask.long(), ones), width, 0),
        segment_ids=None if segments is None else _spread(at, (segments, torch.zeros_like(ones)), width, 0),
        columns=text_column.masked_fill(~mask, 0),
        ahead=ahead.masked_fill(~mask, 0),
        bank=bank,
        pad=pad,
        which=which,
        prompts=prompts,
        prefix=prefix_of(prompts, which),
        spoken=None if spoken is None else _spread(at, (torch.zeros_like(text_ids), spoken), width, 0).bool(),
    )


def _filled(ids: Int[Tensor, " p"], length: int) -> Int[Tensor, " n"]:
    """Ids, with -1 behind them."""
    return nn.functional.pad(ids, (0, length - len(ids)), value=-1)


def _bank(
    prompts: Sequence[Prompt], vocabulary: int, size: int, vectors: Tensor | None
) -> tuple[Bank, list[int], list[int]]:
    rows, tables, row_base, offset_base = [], [], [], []
    rows_so_far, offsets_so_far = 0, 1
    for prompt in prompts:
        row_base.append(rows_so_far)
        offset_base.append(offsets_so_far)
        if prompt.rows is not None:
            if len(prompt.rows) not in (1, size):
                raise SiteError(f"the prompt has rows for {len(prompt.rows)} inputs, the batch has {size}")
            rows.append(prompt.rows.flatten(0, 1))
            rows_so_far += len(rows[-1])
        if prompt.offset is not None:
            tables.append(prompt.offset.table())
            offsets_so_far += len(tables[-1])
    if vectors is not None:
        rows.append(vectors.flatten(0, 1).float())
    offsets = torch.cat([tables[0].new_zeros(1, tables[0].shape[1]), *tables]) if tables else None
    return Bank(vocabulary, torch.cat(rows) if rows else None, offsets), row_base, offset_base


def _spread(places: Sequence[Tensor], values: Sequence[Tensor], width: int, empty: int) -> Tensor:
    """Values [b, n] at columns [b, n] of a new tensor [b, width]; those for column `width` are nowhere."""
    out = values[0].new_full((len(values[0]), width + 1), empty)
    for place, value in zip(places, values, strict=True):
        out.scatter_(1, place, value)
    return out[:, :width]


def _before(mask: Bool[Tensor, "b t"], at: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
    """How many text tokens stand before column `at`, which may lie behind the last one, [b]."""
    earlier = torch.arange(mask.shape[1], device=mask.device) < at[:, None]
    return (mask & earlier).sum(1)


def _text_before(
    batch: Batch, prompt: Prompt, mask: Bool[Tensor, "b t"], first_ids: Tensor, masked: bool
) -> Int[Tensor, "b p"]:
    """How many text tokens stand before each prompt row, [b, p]."""
    parts = ((prompt.placement, prompt.length),) if isinstance(prompt.placement, str) else prompt.placement
    counts = [_anchor(name, batch, mask, first_ids, masked)[:, None].expand(-1, count) for name, count in parts]
    return torch.cat(counts, dim=1)


def _anchor(name: str, batch: Batch, mask: Bool[Tensor, "b t"], first_ids: Tensor, masked: bool) -> Int[Tensor, " b"]:
    """How many text tokens stand before a place: an anchor that every text has, or a slot of the template."""
    text = mask if batch.plain is None else mask & ~batch.plain
    if name == "front":
        return mask.new_zeros(len(mask), dtype=torch.long)
    if name == "after_bos":
        start = batch.input_ids.gather(1, mask.long().argmax(1, keepdim=True))
        return torch.isin(start, first_ids).long()[:, 0]
    if name == "end" or (name == "before_answer" and not masked):
        return text.sum(1)
    if name in ("before_answer", "after_answer"):
        if not masked:
            raise SiteError("a prompt after the answer needs a model that reads its answer at a mask; leave it out")
        if ANSWER not in batch.slots:
            raise SiteError('the prompt stands beside the answer, and the template has no "{mask}"; add it')
        return _before(mask, batch.slots[ANSWER]) + (name == "after_answer")
    if name not in batch.slots:
        raise SiteError(f'the prompt has rows for a slot "{{{name}}}" that the template does not have; add it')
    return _before(mask, batch.slots[name])


def _offset_codes(
    batch: Batch, prompts: Sequence[Prompt], which: Tensor, rank: Tensor, offset_base: list[int]
) -> Int[Tensor, "b t"]:
    codes = torch.zeros_like(rank)
    for number, prompt in enumerate(prompts):
        if prompt.offset is None:
            continue
        column = torch.arange(rank.shape[1], device=rank.device).expand_as(rank)
        position = rank if prompt.offset.align == "token" else column
        limit = len(prompt.offset.left)
        takes = (which == number)[:, None] & batch.attention_mask.bool()
        if batch.plain is not None:
            takes = takes & ~batch.plain
        if rank.shape[1] > limit and bool((takes & (position >= limit)).any()):
            longest = int(position[takes].max()) + 1
            if prompt.offset.overflow == "error":
                raise DataError(
                    f"a text has {longest} tokens but the offset table {limit} rows; raise method.max_tokens"
                )
            warnings.warn(
                f"a text has {longest} tokens but the offset table has {limit} rows; tokens beyond it get "
                f"{'no offset' if prompt.offset.overflow == 'zero' else 'the last row'}",
                stacklevel=2,
            )
        if prompt.offset.overflow == "zero":
            takes = takes & (position < limit)
        codes = torch.where(takes, offset_base[number] + position.clamp(0, limit - 1), codes)
    return codes


def insert_after(
    batch: Batch, column: Int[Tensor, " b"], ids: Int[Tensor, "b k"], mask: Bool[Tensor, "b k"], *, plain: bool
) -> tuple[Batch, Int[Tensor, "b k"]]:
    """New tokens behind one column of each row (more masks, or an answer); the result is padded on the right.

    Args:
        batch: text without prompts.
        column: the token behind which the new ones go, [b].
        ids: the new tokens, [b, k], real where `mask` is true (real ones first).
        mask: which of them exist.
        plain: whether the new tokens never take an offset.

    Returns:
        The new batch, and the columns of the new tokens in it, [b, k].
    """
    size, added = ids.shape
    real = batch.attention_mask.bool()
    rank = real.long().cumsum(1) - 1
    anchor = rank.gather(1, column[:, None])
    count = mask.sum(1, keepdim=True)
    width = batch.input_ids.shape[1] + added
    text_column = (rank + count * (rank > anchor)).masked_fill(~real, width)
    new_column = anchor + 1 + torch.arange(added, device=ids.device)

    places = text_column, new_column.masked_fill(~mask, width)
    old_plain = batch.plain if batch.plain is not None else torch.zeros_like(real)
    # a slot stands before as many text tokens as it did; right behind the anchor it stands before an answer (plain),
    # so that the answer is written behind the prompt, and behind additional masks
    slots = {}
    for name, at in batch.slots.items():
        before = _before(real, at)
        slots[name] = before + count[:, 0] * (before > anchor[:, 0] + int(plain))
    segment_ids = None
    if batch.segment_ids is not None:
        same = batch.segment_ids.gather(1, column[:, None]).expand(size, added).contiguous()
        segment_ids = _spread(places, (batch.segment_ids, same), width, 0)
    grown = replace(
        batch,
        input_ids=_spread(places, (batch.input_ids, ids.clamp(min=0)), width, 0),
        attention_mask=_spread(places, (real.long(), mask.long()), width, 0),
        segment_ids=segment_ids,
        plain=_spread(places, (old_plain, torch.full_like(mask, plain)), width, 0),
        slots=slots,
    )
    return grown, new_column.clamp(max=width - 1)
