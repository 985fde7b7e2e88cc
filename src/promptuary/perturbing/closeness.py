"""How close two texts are: by their letters, and by their meaning as far as letters tell.

Knows no rule and no model; a better measure of meaning comes in as a function.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

Similarity = Callable[[str, str], float]
"""How alike two texts are in meaning: 1 for the same, 0 or less for nothing in common."""

SURFACE = 0.6
"""What must be exceeded by letters; source: released code of BATprompt (arXiv 2412.18196 v1)."""

MEANING = 0.8
"""What must be exceeded in meaning, a cosine of sentence embeddings; source: as `SURFACE`."""

OVERLAP = 0.6
"""What must be exceeded by `overlap`, where there are no embeddings; our choice and not the paper's."""


def distance(one: str, other: str) -> int:
    """Levenshtein's distance: the fewest letters to insert, delete or replace.

    A column of the table at a time, as the bits of whole numbers: Hyyrö 2003, after Myers 1999.
    """
    if not one or not other:
        return len(one) + len(other)
    everything, last = (1 << len(one)) - 1, 1 << (len(one) - 1)
    where: dict[str, int] = {}
    for place, letter in enumerate(one):
        where[letter] = where.get(letter, 0) | 1 << place
    # bits of `up` (`down`): where a cell is one more (less) than the one above it
    up, down, found = everything, 0, len(one)
    for letter in other:
        same = where.get(letter, 0)
        steady = (((same & up) + up) ^ up) | same | down
        more, less = down | (everything & ~(steady | up)), up & steady
        found += bool(more & last) - bool(less & last)
        more, less = more << 1 | 1, less << 1
        up, down = (less | ~(same | down | more)) & everything, more & (same | down) & everything
    return found


def surface(one: str, other: str) -> float:
    """1 - Levenshtein's distance / length of the longer text; 1 for two empty texts.

    Source: BATprompt (arXiv 2412.18196 v1), its released code.
    """
    longer = max(len(one), len(other))
    return 1 - distance(one, other) / longer if longer else 1.0


def overlap(one: str, other: str) -> float:
    """Cosine of the counts of three letters in a row, whatever the case: a stand-in for meaning that needs no model.

    It sees what words have in common and nothing of what they mean: a paraphrase in other words fails, and a negation
    that is put in passes. Our choice. Two texts without a letter are the same.
    """
    first, second = _counts(one), _counts(other)
    if not first or not second:
        return float(first == second)
    shared = sum(count * second[part] for part, count in first.items())
    squares = [sum(count * count for count in counts.values()) for counts in (first, second)]
    return min(1.0, shared / math.sqrt(squares[0] * squares[1]))


def _counts(text: str) -> Counter[str]:
    words = "".join(f" {word}" for word in text.lower().split())
    padded = f"{words} " if words else ""
    return Counter(padded[start : start + 3] for start in range(len(padded) - 2))
