"""Keys and values that are kept for later use, within a bound of memory; the longest unused go first.

Knows no model: what an entry belongs to, and when it has become wrong, is part of its key and of its owner.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
