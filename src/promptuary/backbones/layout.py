"""Where the words of classes, the rows of a context and special tokens stand in the sequences of a text tower.

Knows no model, tokenizer or vector: only counts and indices.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from promptuary.errors import ConfigError
from promptuary.types import Placement

SHARED, PADDING = -1, -2
"""Owners of a position that are no class: all classes of its sequence, and nobody."""


@dataclass(frozen=True)
class Layout:
    """Sequences [r, q] for some classes: one each, or several behind a head that they share.

    `token`: index into the words of all classes [c * k], the special tokens in front, those behind, and padding, in
    this order; `row`: which row of the context stands there instead, -1 for none; `owner`: the class, `SHARED` or
    `PADDING`; `position`: of the position table; `end` [c]: index into r * q of the first special token behind a class.
    """

    token: Int[Tensor, "r q"]
    row: Int[Tensor, "r q"]
    owner: Int[Tensor, "r q"]
    position: Int[Tensor, "r q"]
    end: Int[Tensor, " c"]

    @property
    def seen(self) -> Bool[Tensor, "r q q"]:
        """Which position (second) each one (first) looks at: what is shared, and its own class, not behind itself."""
        one, other = self.owner[:, :, None], self.owner[:, None, :]
        behind = self.position[:, None, :] > self.position[:, :, None]
        return ((one == other) | ((other == SHARED) & (one != PADDING))) & ~behind


def sides(placement: Placement, rows: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which rows of a context of so many stand before the words of a class, and which behind.

    Args:
        placement: "front", "end", or places and counts: (("before_answer", n), ("after_answer", m)).
        rows: rows of the context.

    Raises:
        ConfigError: the placement is none of these, or its counts are not those of the context.
    """
    whole = {"front": (("before_answer", rows),), "end": (("after_answer", rows),)}
    places = whole.get(placement, ()) if isinstance(placement, str) else placement
    found: dict[str, list[int]] = {"before_answer": [], "after_answer": []}
    at = 0
    for name, count in places:
        if name not in found:
            raise ConfigError(f"a context has no place {name!r}; name before_answer or after_answer")
        found[name].extend(range(at, at + count))
        at += count
    if at != rows or (isinstance(placement, str) and placement not in whole):
        raise ConfigError(
            f"a context of {rows} rows does not fit placement {placement!r}; use front, end or its counts"
        )
    return tuple(found["before_answer"]), tuple(found["after_answer"])


@functools.lru_cache(maxsize=8)
def arranged(
    lengths: tuple[int, ...],
    words: int,
    before: tuple[int, ...],
    after: tuple[int, ...],
    specials: tuple[int, int],
    *,
    size: int | None = None,
    room: int | None = None,
) -> Layout:
    """Sequences of classes: special tokens, rows, words, rows, special tokens.

    Args:
        lengths: words of each class, [c].
        words: k, the width of the table [c, k] of words.
        before: which rows of the context stand in front of the words.
        after: which stand behind them.
        specials: how many special tokens stand in front and behind.
        size: pad every sequence to this length; None pads to the longest.
        room: how many tokens behind a shared head go into one sequence (at least one class does); None gives each
            class its own sequence.
    """
    front, back = specials
    first = len(lengths) * words  # in the table of tokens
    padding = first + front + back
    head = [(first + number, -1) for number in range(front)] + [(padding, row) for row in before]
    tails = [
        [(number * words + word, -1) for word in range(length)]
        + [(padding, row) for row in after]
        + [(first + front + behind, -1) for behind in range(back)]
        for number, length in enumerate(lengths)
    ]
    groups = _grouped([len(tail) for tail in tails], room)
    full = max(len(head) + sum(len(tails[number]) for number in group) for group in groups)
    full = full if size is None else size
    cells, ends = list[list[tuple[int, int, int, int]]](), list[int]()
    for line, group in enumerate(groups):
        owner = SHARED if room is not None else group[0]
        cell = [(token, row, owner, position) for position, (token, row) in enumerate(head)]
        for number in group:
            for position, (token, row) in enumerate(tails[number], start=len(head)):
                cell.append((token, row, number, position))
            ends.append(line * full + len(cell) - back)
        spare = itertools.repeat(0) if room is not None else itertools.count(len(cell))
        cell.extend((padding, -1, PADDING, position) for position in itertools.islice(spare, full - len(cell)))
        cells.append(cell)
    tokens, in_context, owners, places = torch.tensor(cells).unbind(-1)
    return Layout(tokens, in_context, owners, places, torch.tensor(ends))


def _grouped(lengths: Sequence[int], room: int | None) -> list[list[int]]:
    """Neighbours that go into one sequence, with about as many tokens in each."""
    if room is None:
        return [[number] for number in range(len(lengths))]
    share = sum(lengths) / max(1, math.ceil(sum(lengths) / room))
    groups: list[list[int]] = []
    total = 0
    for number, length in enumerate(lengths):
        if not groups or (total + length / 2) // share >= len(groups):
            groups.append([])
        groups[-1].append(number)
        total += length
    return groups
