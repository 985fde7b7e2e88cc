"""Several candidates for what a prompt is trained to, scored in one batch: its rows once under each of them.

Knows no solver, and no method, family or task by name; builds no graph.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from promptuary.joint import Joint
from promptuary.passes import outputs
from promptuary.tuned import Tuned
from promptuary.types import Batch


class Population:
    """Scores candidates for the trained tensors of a prompt, as `solvers.base.Together` asks for it.

    Each candidate is held by a copy of the prompt, which shares everything that is not trained: what a method sees,
    reads, draws and adds to the loss is what it would alone.
    """

    def __init__(self, tuned: Tuned) -> None:
        """Around a prompt, whose own tensors are never touched."""
        self.tuned = tuned
        self._copies = list[Tuned]()

    @classmethod
    def of(cls, tuned: Tuned | Joint) -> Population | None:
        """For a prompt whose candidates can share a batch; None for several tasks, and where dropout is at work."""
        if isinstance(tuned, Joint) or tuned.method is None or tuned.backbone.config.dropout:
            return None
        return cls(tuned)

    @torch.no_grad()
    def __call__(self, batch: Batch, candidates: Mapping[str, Tensor]) -> Float[Tensor, " n"]:
        """Mean loss of the batch under each candidate.

        Args:
            batch: with its targets, b rows; n times as many run at once.
            candidates: names of trained tensors (`Tuned.trained`) -> [n, *size].
        """
        copies, size = self._holding(candidates), len(batch)
        wide = batch.rows(torch.arange(size, device=batch.input_ids.device).repeat(len(copies)))
        said = outputs(wide, [(one, range(n * size, (n + 1) * size)) for n, one in enumerate(copies)])
        return torch.stack([one.losses(own, batch).total for one, own in zip(copies, said, strict=True)])

    def _holding(self, candidates: Mapping[str, Tensor]) -> list[Tuned]:
        """A copy for each candidate, with its values."""
        count = len(next(iter(candidates.values())))
        while len(self._copies) < count:
            self._copies.append(self._copy())
        others = {group.name: group.parameter for group in self.tuned.trained() if group.name not in candidates}
        for number, one in enumerate(self._copies[:count]):
            one.moment = self.tuned.moment
            for group in one.trained():
                value = others.get(group.name)
                group.parameter.copy_(candidates[group.name][number] if value is None else value)
            one.train(self.tuned.training)
        return self._copies[:count]

    def _copy(self) -> Tuned:
        tuned = self.tuned
        # a fixed table of a method can be far larger than what is trained
        shared = [tuned.backbone, tuned.asking, *tuned.buffers()]
        return copy.deepcopy(tuned, {id(one): one for one in shared})
