"""Right labels against given ones: a table by class, the matrix as a heat map, and what is confused most.

Knows no task or model; labels are texts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from promptuary import metrics
from promptuary.report.samples import png, said

FEW = 20
"""Most classes whose names and numbers stand in the matrix; of more they show when pointed at; our choice."""

MOST = 1000
"""Most classes that have a matrix, and lines of the table by class; our choice."""

POINTED = 1200
"""Most cells that can be pointed at, the fullest first; our choice."""

CONFUSIONS = 12
"""How many confusions are listed; our choice."""

UNREAD = "(no label)"
"""What stands for the answers that are none."""

NAME = 60
"""Most characters of a label that are shown; our choice."""

_CELL, _MARGIN, _LETTERS = 34, 118, 16
_RIGHT, _WRONG = (47, 107, 176), (200, 80, 44)


@dataclass(frozen=True)
class Class:
    """A line of the table: examples of a class, how many were right, and what was given most often instead."""

    label: str
    examples: int
    right: int
    accuracy: float
    instead: str
    times: int


@dataclass(frozen=True)
class Confusion:
    """`count` examples of `true` were answered with `given`; `share` of the examples of `true`."""

    true: str
    given: str
    count: int
    share: float


@dataclass(frozen=True)
class Cell:
    """A square of the heat map: its corner, its count, how strongly it is coloured (0 to 1), and what it says."""

    x: float
    y: float
    count: int
    strength: float
    right: bool
    title: str


@dataclass(frozen=True)
class Matrix:
    """The heat map, in units of its own: where it begins, how large a cell and the whole are; names along its sides.

    `image`: the colours as a data address where there are too many cells to draw each one.
    """

    margin: int
    cell: float
    side: float
    names: tuple[str, ...]
    cells: tuple[Cell, ...]
    image: str | None


@dataclass(frozen=True)
class ByClass:
    """Everything about classes; `count` of them.

    `left_out`: lines of the table that are not shown; `without`: classes that no example has.
    """

    table: tuple[Class, ...]
    confusions: tuple[Confusion, ...]
    matrix: Matrix | None
    count: int
    left_out: int
    without: int


def by_class(gold: Sequence[str], answers: Sequence[str], labels: Sequence[str]) -> ByClass:
    """Count right labels against given ones. An answer of "" is no label; where there is one, it has its own column.

    Raises:
        ValueError: as `metrics.confusion`.
    """
    told = labels if "" in labels or "" not in answers else (*labels, "")
    counts = metrics.confusion(gold, answers, told)
    accuracies = metrics.per_class_accuracy(gold, answers, told)
    names = [said(label, NAME) for label in labels] + [UNREAD] * (len(told) - len(labels))
    examples = counts.sum(1)
    there = [place for place in range(len(labels)) if examples[place]]
    # the worst first; among equals those with more examples
    there.sort(key=lambda place: (accuracies[place], -examples[place], place))
    lines = [_line(place, counts[place], float(accuracies[place]), names) for place in there[:MOST]]
    matrix = _matrix(counts, names) if len(labels) <= MOST else None
    return ByClass(
        tuple(lines), _confusions(counts, names), matrix, len(labels), len(there) - len(lines), len(labels) - len(there)
    )


def _line(place: int, row: npt.NDArray[np.int64], accuracy: float, names: Sequence[str]) -> Class:
    others = row.copy()
    others[place] = 0
    most = int(others.argmax())
    times = int(others[most])
    return Class(names[place], int(row.sum()), int(row[place]), accuracy, names[most] if times else "", times)


def _confusions(counts: npt.NDArray[np.int64], names: Sequence[str]) -> tuple[Confusion, ...]:
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    return tuple(
        Confusion(names[true], names[given], int(counts[true, given]), float(counts[true, given] / counts[true].sum()))
        for true, given in _fullest(wrong, CONFUSIONS)
    )


def _fullest(counts: npt.NDArray[np.int64], most: int) -> list[tuple[int, int]]:
    """Places of the largest counts above 0; among equals in their order."""
    order = np.argsort(-counts, axis=None, kind="stable")[:most]
    places = [divmod(int(one), counts.shape[1]) for one in order]
    return [place for place in places if counts[place]]


def _matrix(counts: npt.NDArray[np.int64], names: Sequence[str]) -> Matrix:
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    few = len(names) <= FEW
    margin, cell = (_MARGIN, float(_CELL)) if few else (0, 600 / len(names))
    cells = tuple(
        Cell(
            round(margin + given * cell, 2),
            round(margin + true * cell, 2),
            int(counts[true, given]),
            round(math.sqrt(shares[true, given]), 3),
            true == given,
            f"{names[true]} → {names[given]}: {counts[true, given]} of {counts[true].sum()}",
        )
        for true, given in _fullest(counts, POINTED)
    )
    shown = tuple(said(name, _LETTERS) for name in names) if few else ()
    side = round(margin + cell * len(names), 2)
    return Matrix(margin, round(cell, 3), side, shown, cells, None if few else png(_colours(shares)))


def _colours(shares: npt.NDArray[np.float64]) -> Image.Image:
    """Shares of each row as translucent colours, one pixel for each: what is right in one, what is wrong in another."""
    pixels = np.zeros((*shares.shape, 4), dtype=np.uint8)
    pixels[..., :3] = _WRONG
    np.einsum("iic->ic", pixels)[:, :3] = _RIGHT
    # the square root lets a single example among fifty be seen
    pixels[..., 3] = (np.sqrt(shares) * 255).round()
    return Image.fromarray(pixels, "RGBA")
