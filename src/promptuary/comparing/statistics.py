"""What scores of several methods on the same examples and seeds show, as pure NumPy functions.

Knows no run, file or method; scipy is the oracle in its tests, never an import.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from promptuary.metrics import DRAWN

Floats = npt.NDArray[np.float64]

ROUNDS = 2000
"""Fewest resamplings of a test (our choice); a corrected p-value needs more where many methods are compared."""

ALPHA = 0.05
"""Chance of at least one false difference among the methods of one task, data size and model; the usual choice."""

SMALL = 200
"""Test sets with fewer examples are marked: there one example is more than half a point (our choice)."""

NEMENYI = (
    1.9600, 2.3437, 2.5690, 2.7278, 2.8497, 2.9483, 3.0309, 3.1017, 3.1637, 3.2187, 3.2680, 3.3127, 3.3536, 3.3912,
    3.4260, 3.4584, 3.4887, 3.5171, 3.5438,
)  # fmt: skip
"""Critical values at 0.05 for 2 to 20 methods: the studentized range with infinitely many degrees of freedom by the
root of 2 (Demšar 2006, JMLR 7, table 5a, which goes to 10; the others were computed in the same way)."""


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (divided by n - 1); None for a single value, whose spread is unknown.

    Raises:
        ValueError: there is no value.
    """
    if not values:
        raise ValueError("expected at least one value, got none")
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return float(np.mean(values)), deviation


def interval(scores: Floats, seed: int = 0, rounds: int = ROUNDS, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean over examples, of the seeds as they are.

    Args:
        scores: a score for each seed and example, [s, n].
        seed: of the resampling.
        rounds: how often the examples are drawn again.
        level: share of the rounds within.

    Returns:
        The lower and the upper end.
    """
    alone = np.asarray(scores, dtype=np.float64).mean(axis=0)[None, None]
    low, high = np.quantile(resampled(alone, seed, rounds), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def rounds_for(tests: int, alpha: float = ALPHA) -> int:
    """Resamplings that so many tests need, so that the smallest p-value, corrected for all, is well below `alpha`."""
    return max(ROUNDS, math.ceil(4 * tests / alpha))


def resampled(scores: Floats, seed: int = 0, rounds: int = ROUNDS) -> Floats:
    """Mean scores of several methods on seeds and examples that are both drawn again, with replacement.

    Each draw is used for all methods: the paired multi-bootstrap. With one seed only the examples are drawn.
    Source: Sellam et al. 2022 (arXiv 2106.16163), algorithm 1 with paired seeds.

    Args:
        scores: by method, seed and example, [k, s, n].
        seed: of the resampling.
        rounds: how often is drawn.

    Returns:
        [rounds, k].

    Raises:
        ValueError: no scores, or another shape.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 3 or scores.size == 0:
        raise ValueError(f"expected scores by method, seed and example, got shape {scores.shape}")
    methods, seeds, count = scores.shape
    chance = np.random.default_rng(seed)
    # [rounds, s]: how often each seed was drawn, as a share
    drawn = chance.multinomial(seeds, np.full(seeds, 1 / seeds), rounds) / seeds
    flat, found = scores.reshape(methods * seeds, count).T, []
    # some rounds at a time: all of them at once would not fit for large test sets
    for begun in range(0, rounds, max(1, DRAWN // count)):
        part = drawn[begun : begun + max(1, DRAWN // count)]
        size = len(part)
        places = chance.integers(0, count, (size, count)) + np.arange(size)[:, None] * count
        often = np.bincount(places.ravel(), minlength=size * count).reshape(size, count) / count
        found.append(np.einsum("rs,rks->rk", part, (often @ flat).reshape(size, methods, seeds)))
    return np.concatenate(found)


@dataclass(frozen=True)
class Paired:
    """A paired comparison: mean difference of one method to another, its 95 % interval, and a two-sided p-value."""

    difference: float
    low: float
    high: float
    p: float


def paired(one: Floats, other: Floats, seed: int = 0, rounds: int = ROUNDS) -> Paired:
    """Whether two methods differ on the same seeds and examples; neither a lucky seed nor an odd example will do.

    Args:
        one: a score for each seed and example, [s, n].
        other: the same of another method, in the same order.
        seed: of the resampling.
        rounds: how often is drawn.

    Raises:
        ValueError: the shapes differ, or are empty.
    """
    if np.shape(one) != np.shape(other):
        raise ValueError(f"expected the same seeds and examples, got {np.shape(one)} and {np.shape(other)}")
    both = np.stack([one, other])
    means = resampled(both, seed, rounds)
    return between(float(np.mean(both[0] - both[1])), means[:, 0], means[:, 1])


def between(difference: float, one: Floats, other: Floats) -> Paired:
    """The comparison of two methods from what was drawn for both.

    p = 2 (1 + the draws on the rarer side of zero) / (1 + all draws), at most 1.

    Args:
        difference: as measured.
        one: resampled means, [rounds].
        other: of the other method, from the same draws.
    """
    drawn = one - other
    low, high = np.quantile(drawn, [0.025, 0.975])
    # last digits of sums are no difference
    side = min(int((drawn <= 1e-12).sum()), int((drawn >= -1e-12).sum()))
    return Paired(difference, float(low), float(high), min(1.0, 2 * (1 + side) / (1 + len(drawn))))


def holm(values: Sequence[float]) -> list[float]:
    """P-values corrected for how many there are (Holm 1979), in the given order.

    The k-th smallest of m is multiplied by m - k + 1, and none becomes smaller than one before it.
    """
    corrected, worst = [0.0] * len(values), 0.0
    for place, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        worst = max(worst, min(1.0, (len(values) - place) * values[index]))
        corrected[index] = worst
    return corrected


def average_ranks(scores: Floats, *, higher_is_better: Sequence[bool]) -> list[float]:
    """Mean rank of each method, 1 for the best; equal scores share the mean of their ranks.

    Args:
        scores: [blocks, k], a block being one task, data size and backbone.
        higher_is_better: for each block.
    """
    signed = np.asarray(scores, dtype=np.float64) * np.where(np.asarray(higher_is_better), -1.0, 1.0)[:, None]
    # rank: how many are better, and half of the others that are equal
    better = (signed[:, None, :] < signed[:, :, None]).sum(axis=2)
    equal = (signed[:, None, :] == signed[:, :, None]).sum(axis=2)
    return [float(rank) for rank in (better + (equal + 1) / 2).mean(axis=0)]


def critical_difference(methods: int, blocks: int) -> float | None:
    """How far two average ranks must be apart to differ at 0.05 (Nemenyi; Demšar 2006, section 3.2.2).

    CD = q sqrt(k (k + 1) / (6 N)); None for one block, from which nothing follows, or for more methods than the table
    has.
    """
    if blocks < 2 or not 2 <= methods < len(NEMENYI) + 2:
        return None
    return NEMENYI[methods - 2] * math.sqrt(methods * (methods + 1) / (6 * blocks))


def verdict(one: str, other: str, difference: float, p: float, *, higher_is_better: bool, alpha: float = ALPHA) -> str:
    """What a corrected p-value says, in words."""
    if p >= alpha or difference == 0:
        return f"no difference shown between {one} and {other}"
    better, worse = (one, other) if (difference > 0) == higher_is_better else (other, one)
    return f"{better} is better than {worse}"
