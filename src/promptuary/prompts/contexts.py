"""Contexts: trained rows among the words of a class; how they start, how many there are, and where they stand.

Knows no method, tokenizer or model.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from promptuary.errors import ConfigError
from promptuary.prompts.init import Starting, saved_rows, starting_ids
from promptuary.types import Placement

SPREAD = 0.02
"""Standard deviation of a context that starts at random (Zhou et al. 2022, CoOp's code)."""


def context_sets(class_specific: bool, classes: int) -> int:
    """How many contexts there are: one for all classes, or one for each.

    Raises:
        ConfigError: one for each is asked for, and the task has no classes.
    """
    if not class_specific:
        return 1
    if not classes:
        raise ConfigError("method.class_specific has a context for each class, and this task has none; set it to false")
    return classes


def random_contexts(*size: int, generator: torch.Generator) -> Float[Tensor, "*n"]:
    """Rows drawn from N(0, 0.02^2)."""
    return torch.randn(size, generator=generator) * SPREAD


def starting_contexts(
    start: Literal["text", "random", "saved"],
    size: tuple[int, int, int],
    source: Starting,
    *,
    text: str | None,
) -> Float[Tensor, "k m d"]:
    """Contexts as a method begins with them, in float32.

    Args:
        start: "text": the words of `text`, repeated or cut to m rows, the same for every set (with CoOp's "a photo of
            a" m = 4); "saved": rows of an earlier prompt, likewise; "random": N(0, 0.02^2), each set its own.
        size: sets k, rows m of each, width d of the token embeddings.
        source: of words, chance and earlier prompts.
        text: the words.

    Raises:
        ConfigError: there is no text, or no saved prompt of this width.
    """
    sets, count, width = size
    if start == "random":
        return random_contexts(*size, generator=source.generator)
    if start == "saved":
        rows = saved_rows(count, width, source)
    else:
        rows = source.vocabulary.embed(starting_ids("text", count, source, text=text))
    return rows.expand(sets, -1, -1)


def context_placement(where: Literal["front", "middle", "end"], count: int) -> Placement:
    """The place of `count` rows among the words of a class.

    "front": before them (CoOp's default, the class at the end); "end": behind them; "middle": the smaller half
    before and the rest behind (CoOp's code).
    """
    if where != "middle":
        return where
    before = count // 2
    return tuple((place, rows) for place, rows in (("before_answer", before), ("after_answer", count - before)) if rows)
