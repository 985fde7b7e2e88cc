"""What a training step takes: CPU seconds in turn with others, operations of matrix products, bytes kept for backward.

Knows no model, library or cell.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

Step = Callable[[], Any]


def in_turn(steps: Mapping[str, Step], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of this process for each step in each round; in a round each runs once, after the others."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            began = time.process_time()
            step()
            taken[name].append(time.process_time() - began)
    return taken


def ratio(one: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Median, smallest and largest of the ratios within the rounds."""
    found = [a / b for a, b in zip(one, other, strict=True)]
    return statistics.median(found), min(found), max(found)


def flops(step: Step) -> int:
    """Operations of the matrix products of a step, two for each multiplication and addition.

    The fused attention of the CPU is not counted by torch: the model must run "eager" attention.
    """
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def saved_bytes(step: Step, weights: Iterable[Tensor]) -> int:
    """Bytes that a step keeps for its backward pass, each storage once, without those of the weights."""
    known = {weight.untyped_storage().data_ptr() for weight in weights}
    seen: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in known:
            # what is kept is not freed before its backward pass, so an address stands for one storage until then
            seen[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        step()
    return sum(seen.values())
