"""What a solver works on and what it gives back.

Knows nothing about how the loss comes about.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from promptuary.types import Batch, Losses


class Learner(Protocol):
    """Something with a loss."""

    def loss(self, batch: Batch) -> Losses:
        """Mean loss of a batch."""

    def weight(self, batch: Batch) -> int:
        """What that mean is taken over."""


class Trained(Protocol):
    """A trained tensor with its learning rate (`methods.base.Group` is one)."""

    @property
    def name(self) -> str:
        """Its name in the saved state."""

    @property
    def parameter(self) -> torch.nn.Parameter:
        """The tensor."""

    @property
    def learning_rate(self) -> float:
        """Its own learning rate."""

    @property
    def weight_decay(self) -> float:
        """Its own weight decay."""


@dataclass(frozen=True)
class StepResult:
    """One step. `applied` is false when the loss or a gradient was not finite and nothing was changed."""

    loss: float
    grad_norm: float
    parts: dict[str, float]
    applied: bool


Reduce = Callable[[Tensor], Tensor]
Batches = Sequence[Batch]
