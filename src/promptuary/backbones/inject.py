"""How prompts get in: virtual token ids, and a head that computes only what is read. The only file that wraps a module.

Knows no method, no family and no tokenizer. Longer than most files, so that everything that touches a module or
rewrites positions stands in one place.

A sequence with a prompt is a sequence of token ids. With V rows in the embedding table, R prompt rows in use and
S = V + R: id < V is a token, V <= id < S is prompt row id - V, and id + S * code is a token or row that also gets
row code - 1 of the offset tables. Everything about a position therefore travels in its id, so padding, caches,
chunks and reordering cannot tear a token from its prompt row or its offset.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from promptuary.errors import DataError, SiteError
from promptuary.types import IGNORED, Batch, Prompt


@dataclass(frozen=True)
class Bank:
    """The vectors behind the ids of one batch: prompt rows [R, d], and offsets with a zero row in front [1 + O, d]."""

    vocabulary: int
    rows: Float[Tensor, "n d"] | None
    offsets: Float[Tensor, "o d"] | None

    @property
    def stride(self) -> int:
        """S = V + R."""
        return self.vocabulary + (0 if self.rows is None else len(self.rows))


@dataclass(frozen=True)
class Read:
    """What the output head computes: `columns` [b, n] of the placed sequence, and `words` [w] of the vocabulary."""

    columns: Int[Tensor, "b n"]
    words: Int[Tensor, " w"] | None = None


@dataclass(frozen=True)
class Placed:
    """A batch with its prompts in it.

    `columns` [b, t]: where each text token went; `ahead` [b, t]: the last column before the text token behind it (or
    the last of all), whose output is what a causal model expects next, also when prompt rows stand in between.
    """

    input_ids: Int[Tensor, "b q"]
    attention_mask: Int[Tensor, "b q"]
    segment_ids: Int[Tensor, "b q"] | None
    columns: Int[Tensor, "b t"]
    ahead: Int[Tensor, "b t"]
    bank: Bank


@dataclass(frozen=True)
class _Active:
    bank: Bank | None
    read: Read | None


_ACTIVE: ContextVar[Mapping[int, _Active]] = ContextVar("promptuary_active", default={})  # noqa: B039 (never mutated)


class PromptedEmbedding(nn.Module):
    """A frozen embedding module that also answers virtual ids while a bank is active."""

    base: Any

    def __init__(self, base: nn.Module, key: int) -> None:
        """Wrap `base`; `key` names the model that it belongs to."""
        super().__init__()
        self.base = base
        self.key = key

    @property
    def weight(self) -> Tensor:
        """The table of the wrapped module."""
        return self.base.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embeddings [b, t, d]: rows and offsets are kept in float32 and cast once."""
        active = _ACTIVE.get().get(self.key)
        if active is None or active.bank is None:
            return self.base(input_ids)
        bank = active.bank
        code = torch.div(input_ids, bank.stride, rounding_mode="floor")
        ids = input_ids - code * bank.stride
        is_prompt = ids >= bank.vocabulary
        embedded = self.base(ids.masked_fill(is_prompt, 0))
        exact = embedded
        if bank.rows is not None:
            rows = nn.functional.embedding((ids - bank.vocabulary).clamp(min=0), bank.rows)
            exact = torch.where(is_prompt[..., None], rows, exact)
        if bank.offsets is not None:
            exact = exact + nn.functional.embedding(code, bank.offsets)
        return exact.to(embedded.dtype)


class NarrowHead(nn.Module):
    """A frozen output head that, while a read is active, computes only the positions and words that are asked for."""

    base: Any

    def __init__(self, base: nn.Module, key: int) -> None:
        """Wrap `base`; `key` names the model that it belongs to."""
        super().__init__()
        self.base = base
        self.key = key

    @property
    def weight(self) -> Tensor:
        """The matrix of the wrapped module."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of the wrapped module."""
        return self.base.bias

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [b, n, w], or what the wrapped head gives when nothing special is read."""
        active = _ACTIVE.get().get(self.key)
        if active is None or active.read is None:
            return self.base(hidden)
        columns, words = active.read.columns, active.read.words
        chosen = hidden.gather(1, columns[..., None].expand(-1, -1, hidden.shape[-1]))
        if words is None:
            return self.base(chosen)
        if type(self.base) is nn.Linear:
            bias = None if self.base.bias is None else self.base.bias[words]
            return nn.functional.linear(chosen, self.base.weight[words], bias)
        return self.base(chosen)[..., words]


class Wiring:
    """The wrapped modules of one model, and what is active on them in the current thread or task."""

    def __init__(self, model: Any) -> None:
        """Wrap every embedding module that shares the input table, and the output head where there is one.

        Raises:
            SiteError: the model names no input embedding, or is wired already.
        """
        self.model = model
        self._replaced: list[tuple[nn.Module, str, nn.Module]] = []
        table: Any = model.get_input_embeddings()
        if isinstance(table, PromptedEmbedding):
            raise SiteError("this model already carries a prompt; detach it first")
        if not isinstance(table, nn.Module):
            raise SiteError(f"{type(model).__name__} has no input embedding that takes token ids")
        head = model.get_output_embeddings()
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])
        # T5 and BART keep several embedding modules over one weight: all are wrapped
        shared = [
            module
            for module in model.modules()
            if module is table or (isinstance(module, nn.Embedding) and module.weight is table.weight)
        ]
        for module in shared:
            self._replace(module, PromptedEmbedding(module, id(self)))
        if head is not None:
            self._replace(head, NarrowHead(head, id(self)))

    def _replace(self, old: nn.Module, new: nn.Module) -> None:
        new.train(old.training)
        paths = [path for path, module in self.model.named_modules(remove_duplicate=False) if module is old]
        for path in paths:
            parent_path, _, child = path.rpartition(".")
            parent = self.model.get_submodule(parent_path)
            setattr(parent, child, new)
            self._replaced.append((parent, child, old))

    def remove(self) -> None:
        """Put every wrapped module back."""
        while self._replaced:
            parent, child, old = self._replaced.pop()
            setattr(parent, child, old)

    @property
    def bank(self) -> Bank | None:
        """What is active now, in this thread."""
        active = _ACTIVE.get().get(id(self))
        return None if active is None else active.bank

    @contextmanager
    def active(self, bank: Bank | None = None, read: Read | None = None) -> Iterator[None]:
        """Within the block the model answers the ids of `bank` and computes only `read`, in this thread only."""
        token = _ACTIVE.set({**_ACTIVE.get(), id(self): _Active(bank, read)})
        try:
            yield
        finally:
            _ACTIVE.reset(token)


def place(
    batch: Batch,
    prompts: Sequence[Prompt],
    *,
    vocabulary: int,
    pad: int,
    first_ids: Int[Tensor, " s"],
    side: Literal["left", "right"] = "right",
) -> Placed:
    """Put prompts among the tokens of a batch.

    Padding on either side of the input gives the same result, since real tokens are counted and moved.

    Args:
        batch: text without prompts; `batch.prompt_index` says which prompt a row takes.
        prompts: one or more prompts, of any lengths.
        vocabulary: V.
        pad: id of padding.
        first_ids: special tokens that count as the first one for placement "after_bos".
        side: where the padding of the result stands.

    Raises:
        SiteError: a prompt names a slot that the template does not have.
        DataError: a text is longer than an offset table that refuses this.
    """
    device, size = batch.input_ids.device, len(batch)
    mask = batch.attention_mask.bool()
    rank = mask.long().cumsum(1) - 1
    which = batch.prompt_index if batch.prompt_index is not None else rank.new_zeros(size)
    bank, row_base, offset_base = _bank(prompts, vocabulary, size)

    lengths = torch.tensor([prompt.length for prompt in prompts], device=device)[which]
    longest = max(prompt.length for prompt in prompts)
    width = batch.input_ids.shape[1] + longest
    slot = torch.arange(longest, device=device).expand(size, -1)
    exists = slot < lengths[:, None]
    behind = slot.new_zeros(size, longest)
    for number, prompt in enumerate(prompts):
        if prompt.length and prompt.placement != "front":
            found = _text_before(batch, prompt, mask, first_ids)
            padded = nn.functional.pad(found, (0, longest - prompt.length))
            behind = torch.where((which == number)[:, None], padded, behind)

    # each prompt row stands behind `behind` text tokens; each text token behind the rows that come before it
    order = behind.masked_fill(~exists, torch.iinfo(torch.long).max).contiguous()
    text_column = rank + torch.searchsorted(order, rank.contiguous(), right=True)
    ahead = rank + torch.searchsorted(order, (rank + 1).contiguous(), right=True)
    prompt_column = slot + behind
    if side == "left":
        shift = (width - mask.sum(1) - lengths)[:, None]
        text_column, prompt_column, ahead = text_column + shift, prompt_column + shift, ahead + shift

    instance = torch.arange(size, device=device)
    own = torch.tensor([prompt.rows is not None and len(prompt.rows) > 1 for prompt in prompts], device=device)[which]
    first = torch.tensor(row_base, device=device)[which] + own * instance * lengths
    prompt_ids = vocabulary + first[:, None] + slot
    codes = _offset_codes(batch, prompts, which, rank, offset_base)

    def spread(text: Tensor, rows: Tensor | int, empty: int) -> Tensor:
        out = text.new_full((size, width + 1), empty)
        out.scatter_(1, text_column.masked_fill(~mask, width), text)
        filled = rows if isinstance(rows, Tensor) else slot.new_full(slot.shape, rows).to(text.dtype)
        out.scatter_(1, prompt_column.masked_fill(~exists, width), filled)
        return out[:, :width]

    return Placed(
        input_ids=spread(batch.input_ids + codes * bank.stride, prompt_ids, pad),
        attention_mask=spread(mask.long(), 1, 0),
        segment_ids=None if batch.segment_ids is None else spread(batch.segment_ids, 0, 0),
        columns=text_column.masked_fill(~mask, 0),
        ahead=ahead.masked_fill(~mask, 0),
        bank=bank,
    )


def _bank(prompts: Sequence[Prompt], vocabulary: int, size: int) -> tuple[Bank, list[int], list[int]]:
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
    offsets = torch.cat([tables[0].new_zeros(1, tables[0].shape[1]), *tables]) if tables else None
    return Bank(vocabulary, torch.cat(rows) if rows else None, offsets), row_base, offset_base


def _before(mask: Bool[Tensor, "b t"], at: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
    """How many text tokens stand before column `at`, which may lie behind the last one, [b]."""
    earlier = torch.arange(mask.shape[1], device=mask.device) < at[:, None]
    return (mask & earlier).sum(1)


def _text_before(batch: Batch, prompt: Prompt, mask: Bool[Tensor, "b t"], first_ids: Tensor) -> Int[Tensor, "b p"]:
    """How many text tokens stand before each prompt row, [b, p]."""
    size = len(batch)
    if isinstance(prompt.placement, str):  # "after_bos"; nothing stands before rows in "front"
        start = batch.input_ids.gather(1, mask.long().argmax(1, keepdim=True))
        return torch.isin(start, first_ids).long().expand(size, prompt.length)
    columns = []
    for name, count in prompt.placement:
        if name not in batch.slots:
            raise SiteError(f'the prompt has rows for a slot "{{{name}}}" that the template does not have; add it')
        columns.append(_before(mask, batch.slots[name])[:, None].expand(size, count))
    return torch.cat(columns, dim=1)


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

    def spread(text: Tensor, new: Tensor, empty: int) -> Tensor:
        out = text.new_full((size, width + 1), empty)
        out.scatter_(1, text_column, text)
        out.scatter_(1, new_column.masked_fill(~mask, width), new)
        return out[:, :width]

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
        segment_ids = spread(batch.segment_ids, same, 0)
    grown = replace(
        batch,
        input_ids=spread(batch.input_ids, ids.clamp(min=0), 0),
        attention_mask=spread(real.long(), mask.long(), 0),
        segment_ids=segment_ids,
        plain=spread(old_plain, torch.full_like(mask, plain), 0),
        slots=slots,
    )
    return grown, new_column.clamp(max=width - 1)


@contextmanager
def attached(wiring: Wiring, placer: Any, *, decoder_writes: bool) -> Iterator[None]:
    """Run the host's own model with a prompt: its `forward` and `generate` take and give text positions only.

    Both are shadowed on the instance while the block runs and are found again on the class afterwards.

    Args:
        wiring: of the model.
        placer: puts the prompt into a batch: (batch, side) -> Placed.
        decoder_writes: whether logits come from a decoder, which has no prompt positions.
    """
    model = wiring.model
    run = model.forward

    def placed_from(ids: Tensor, mask: Tensor | None, segments: Tensor | None, side: str) -> Placed:
        mask = torch.ones_like(ids) if mask is None else mask
        return placer(Batch(ids, mask, torch.arange(len(ids), device=ids.device), segment_ids=segments), side)

    def arguments(placed: Placed) -> dict[str, Tensor]:
        named = {"input_ids": placed.input_ids, "attention_mask": placed.attention_mask}
        return named if placed.segment_ids is None else {**named, "token_type_ids": placed.segment_ids}

    @functools.wraps(run)
    def forward(input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        if wiring.bank is not None or kwargs.get("encoder_outputs") is not None:
            return run(input_ids=input_ids, **kwargs)
        names = ("position_ids", "inputs_embeds", "past_key_values", "logits_to_keep")
        refused = [name for name in names if kwargs.get(name) is not None]
        if input_ids is None or refused:
            raise SiteError(
                f"with a prompt attached, forward takes input_ids and not {refused or 'other inputs'}; use generate()"
            )
        mask = kwargs.pop("attention_mask", None)
        placed = placed_from(input_ids, mask, kwargs.pop("token_type_ids", None), "right")
        labels = kwargs.get("labels")
        if labels is not None and labels.shape == input_ids.shape and not decoder_writes:
            moved = labels.new_full(placed.input_ids.shape, IGNORED)
            # padding has no place in the result, so a label on it cannot count
            real = labels != IGNORED if mask is None else (labels != IGNORED) & mask.bool()
            rows, columns = real.nonzero(as_tuple=True)
            kwargs["labels"] = moved.index_put((rows, placed.columns[rows, columns]), labels[rows, columns])
        with wiring.active(placed.bank):
            output = run(**arguments(placed), **kwargs)
        for name in () if decoder_writes else ("logits", "last_hidden_state"):
            if output.get(name) is not None:
                states = output[name]
                output[name] = states.gather(1, placed.columns[..., None].expand(-1, -1, states.shape[-1]))
        return output

    shadows: dict[str, Any] = {"forward": forward}
    if model.can_generate():
        write = model.generate

        @functools.wraps(write)
        def generate(
            inputs: Tensor | None = None,
            generation_config: Any = None,
            *,
            input_ids: Tensor | None = None,
            attention_mask: Tensor | None = None,
            **kwargs: Any,
        ) -> Any:
            input_ids = input_ids if input_ids is not None else inputs
            if input_ids is None:
                raise SiteError("with a prompt attached, generate takes input_ids")
            placed = placed_from(input_ids, attention_mask, None, "right" if decoder_writes else "left")
            if not decoder_writes:  # lengths that count the text must count the prompt too
                longer = placed.input_ids.shape[1] - input_ids.shape[1]
                limits = [name for name in ("max_length", "min_length") if kwargs.get(name)]
                kwargs.update({name: kwargs[name] + longer for name in limits})
            with wiring.active(placed.bank):
                output = write(generation_config=generation_config, **arguments(placed), **kwargs)
            if decoder_writes:
                return output
            written = output if isinstance(output, Tensor) else output.sequences
            copies = len(written) // len(input_ids)
            new = written[:, placed.input_ids.shape[1] :]
            clean = torch.cat([input_ids.repeat_interleave(copies, 0), new], dim=1)
            if isinstance(output, Tensor):
                return clean
            output.sequences = clean
            return output

        shadows["generate"] = generate
    for name, shadow in shadows.items():
        setattr(model, name, shadow)
    try:
        yield
    finally:
        for name in shadows:
            delattr(model, name)
