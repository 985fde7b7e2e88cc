"""What a solver works on and what it gives back.

Knows nothing about how the loss comes about.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

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
    """One step over a whole batch: its loss, the norm of all gradients before clipping, the parts of the loss.

    `fault`: what was not finite, so that no tensor was changed; None for a step that was taken.
    """

    loss: float
    grad_norm: float
    parts: dict[str, float]
    fault: Literal["loss", "gradient", "update"] | None = None

    @property
    def applied(self) -> bool:
        """Whether the step was taken."""
        return self.fault is None


Reduce = Callable[[Tensor], Tensor]
Batches = Sequence[Batch]
