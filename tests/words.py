"""What a method of class contexts starts from and looks at, without any model: words, names of classes, features.

Knows no method.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from promptuary.prompts.init import Starting
from promptuary.seeds import Chance
from promptuary.types import Outputs, Shape, View

D, H, V, NORMS = 16, 12, 20, 4
"""Widths of words, of features and of patches; layer norms in the blocks."""

NAMES = ("cat", "dog", "old house")
SHAPE = Shape(width=D, hidden=H, visual=V, depth=3, norms=NORMS, classes=len(NAMES))


class Words:
    """A vocabulary with one random row for each of 50 words; a text is its words, separated by spaces."""

    def __init__(self) -> None:
        self.table = torch.randn(50, D, generator=torch.Generator().manual_seed(99))

    def common(self, limit: int) -> Tensor:
        return torch.arange(min(limit, 50))

    def ids(self, text: str) -> Tensor:
        return torch.tensor([zlib.crc32(word.encode()) % 50 for word in text.split()], dtype=torch.long)

    def embed(self, ids: Tensor) -> Tensor:
        return self.table[ids]

    def keys_values(self, ids: Tensor) -> Tensor:
        raise NotImplementedError

    def rms(self) -> float:
        return float(self.table.pow(2).mean().sqrt())


@dataclass
class Named:
    """Names of classes, and a text tower that says something random of each text; it notes what it was asked."""

    names: Sequence[str] = NAMES
    asked: list[str] = field(default_factory=list)

    def features(self, texts: Sequence[str]) -> Tensor:
        self.asked += texts
        return torch.stack([feature(text) for text in texts])


SCALE = 100.0
"""What that model multiplies a cosine by."""


def feature(text: str) -> Tensor:
    """What that tower says of a text, [h]."""
    return 3 * torch.randn(H, generator=torch.Generator().manual_seed(zlib.crc32(text.encode())))


def starting(seed: int = 0, **changes: Any) -> Starting:
    """What a method fills its tensors from."""
    norms = torch.randn(NORMS, 2, V, generator=torch.Generator().manual_seed(98))
    given = {"classes": Named(), "norms": norms, **changes}
    return Starting(Words(), torch.Generator().manual_seed(seed), **given)


def texts(count: int = len(NAMES), sets: int = 1, seed: int = 0) -> Tensor:
    """Text features of some classes, [s, count, h], that want gradients."""
    return torch.randn(sets, count, H, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def said(found: Tensor, *, rows: int = 5, step: int | None = None, seed: int = 1) -> Outputs:
    """What a model says of some images under these text features; with noise of a training step."""
    generator = torch.Generator().manual_seed(seed)
    answer = torch.randn(rows, H, generator=generator).requires_grad_()
    chance = None if step is None else Chance(0, step, torch.arange(rows))
    target = torch.randint(len(NAMES), (rows,), generator=generator)
    return Outputs(View(chance=chance), answer=answer, texts=found, scale=SCALE, target=target)
