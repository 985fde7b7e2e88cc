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


class _Counted:
    """Bytes of the storages that saved tensors hold now, and the most so far."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self.weights = {weight.untyped_storage().data_ptr() for weight in weights}
        self.times: dict[int, int] = {}
        self.now = self.most = 0

    def change(self, tensor: Tensor, by: int) -> None:
        storage = tensor.untyped_storage()
        place = storage.data_ptr()  # what is held is not freed, so an address stands for one storage
        if place in self.weights:
            return
        before = self.times.get(place, 0)
        self.times[place] = before + by
        self.now += storage.nbytes() * ((before + by > 0) - (before > 0))
        self.most = max(self.most, self.now)


class _Held:
    """A saved tensor, until its node of the graph is gone."""

    def __init__(self, tensor: Tensor, counted: _Counted) -> None:
        # detached: a node whose own result is saved would else hold itself
        self.tensor, self.counted = tensor.detach(), counted
        counted.change(tensor, 1)

    def __del__(self) -> None:
        self.counted.change(self.tensor, -1)


def saved_bytes(step: Step, weights: Iterable[Tensor]) -> int:
    """The most bytes that wait for the backward pass at a time, each storage once, without those of the weights.

    What gradient checkpointing computes again is not among them: it is gone a layer later.
    """
    counted = _Counted(weights)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Held(tensor, counted), lambda held: held.tensor):
        step()
    return counted.most
