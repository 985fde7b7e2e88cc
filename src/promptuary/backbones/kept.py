"""Keys and values that are kept for later use, within a bound of memory; the longest unused go first.

Knows no model: what an entry belongs to, and when it has become wrong, is part of its key and of its owner.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from promptuary.types import Batch

Row = Sequence[Sequence[Tensor]]
"""What is kept under one key: keys and values of one row, for each layer a pair of [k, n, e]; or a vector."""


@dataclass(frozen=True)
class _Entry:
    owner: weakref.ref[Any] | None
    row: Row
    size: int


class Kept:
    """A store of rows by key; safe to be used from several threads."""

    def __init__(self, limit: int) -> None:
        """Empty.

        Args:
            limit: most bytes of all rows together; 0 keeps nothing.
        """
        self.limit, self.size = limit, 0
        self.hits = self.misses = 0
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable, owner: Any = None) -> Row | None:
        """The row that was kept under this key for this very owner."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or (entry.owner is not None and entry.owner() is not owner):
                self.misses += 1
                return None
            self.hits += 1
            self._entries.move_to_end(key)
            return entry.row

    def put(self, key: Hashable, row: Row, owner: Any = None, *, push: bool = True) -> None:
        """Keep a row; with an owner, no longer than the owner lives.

        Args:
            key: everything that the row depends on, by value.
            row: is not copied.
            owner: what else it depends on, by identity.
            push: whether others may be dropped to make room. Things that come by in a circle, such as the texts of an
                epoch, should not push: a circle larger than the store would push out everything before its next use.
        """
        size = sum(part.nbytes for pair in row for part in pair)
        with self._lock:
            self.drop(key)
            if size > self.limit or (not push and self.size + size > self.limit):
                return
            while self.size + size > self.limit:
                self.drop(next(iter(self._entries)))
            gone = None if owner is None else weakref.ref(owner, lambda _: self.drop(key))
            self._entries[key] = _Entry(gone, row, size)
            self.size += size

    def drop(self, key: Hashable) -> None:
        """Forget one row."""
        with self._lock:
            entry = self._entries.pop(key, None)
            self.size -= 0 if entry is None else entry.size


def stamp_of(model: Any, weights: Sequence[Tensor] = ()) -> Hashable:
    """What is computed with a model depends on: its weights as they are, and the precision.

    Args:
        model: a module.
        weights: its parameters, where they are at hand.
    """
    held = list(weights or model.parameters())
    device = held[0].device
    cast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    values = hash(tuple((weight.data_ptr(), weight._version) for weight in held))
    return values, held[0].dtype, device, cast


@torch.no_grad()
def bare(
    run: Callable[[Batch], Tensor], batch: Batch, what: Literal["states", "answer"], model: Any, kept: Kept
) -> Tensor:
    """What a frozen model says of texts alone, each of which runs once and is kept.

    Args:
        run: gives states of rows of the batch, [n, t, h], or the state of the answer of each, [n, h].
        batch: text on either side of its padding.
        what: which of the two.
        model: it depends on.
        kept: the store.
    """
    mask = batch.attention_mask.bool()
    if (
        model.training or not kept.limit
    ):  # its dropout is at work, so that no two passes are the same; or nothing is kept
        return run(batch)
    parts = (batch.input_ids,) if batch.segment_ids is None else (batch.input_ids, batch.segment_ids)
    told = [tuple(tuple(part[row][mask[row]].tolist()) for part in parts) for row in range(len(batch))]
    # places count from the text's first token
    first = mask.long().argmax(1)
    slots = sorted((name, (at - first).tolist()) for name, at in batch.slots.items())
    stamp = stamp_of(model)
    keys = [(what, text, tuple((name, at[row]) for name, at in slots), stamp) for row, text in enumerate(told)]
    known: dict[Hashable, Tensor] = {}
    for key in dict.fromkeys(keys):
        there = kept.get(key)
        if there is not None:
            known[key] = there[0][0]
    for row, key in enumerate(keys):
        if key in known:
            continue
        # by itself: what else is missing depends on what was seen since the run began or was resumed
        found = run(batch.rows(torch.tensor([row], device=mask.device)))[0]
        known[key] = own = (found[mask[row]] if what == "states" else found).clone()
        kept.put(key, [(own,)], push=False)
    rows = [known[key] for key in keys]
    if what == "answer":
        return torch.stack(rows)
    states = rows[0].new_zeros(*mask.shape, rows[0].shape[-1])
    states[mask] = torch.cat(rows)
    return states
