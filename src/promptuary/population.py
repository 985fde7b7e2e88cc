"""Several candidates for what a prompt is trained to, scored in one batch: its rows once under each of them.

Knows no solver, and no method, family or task by name; builds no graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from promptuary.joint import Joint
from promptuary.methods.base import Method
from promptuary.tuned import Tuned
from promptuary.types import Batch, Outputs, Prompt


class Population:
    """Scores candidates for the trained tensors of a prompt, as `solvers.evolution.Together` asks for it."""

    def __init__(self, tuned: Tuned) -> None:
        """Around a prompt, whose tensors are as they were after each call."""
        self.tuned = tuned

    @classmethod
    def of(cls, tuned: Tuned | Joint) -> Population | None:
        """For a prompt whose candidates can share a batch; None where they go one by one.

        That is where the prompt depends on the input, the method reads answers or losses in a way of its own, or there
        are several tasks.
        """
        if isinstance(tuned, Joint) or tuned.method is None:
            return None
        kind = type(tuned.method)
        own = tuned.method.own_scores or kind.loss is not Method.loss
        return None if tuned.method.depends or own else cls(tuned)

    @torch.no_grad()
    def __call__(self, batch: Batch, candidates: Mapping[str, Tensor]) -> Float[Tensor, " n"]:
        """Mean loss of the batch under each candidate.

        Args:
            batch: with its targets, b rows; n times as many run at once.
            candidates: names of trained tensors (`Tuned.trained`) -> [n, *size].
        """
        tuned = self.tuned
        prompts, heads = self._made(candidates)
        size, count = len(batch), len(prompts)
        place = torch.arange(size, device=batch.input_ids.device).repeat(count)
        which = torch.arange(count, device=place.device).repeat_interleave(size)
        wide = replace(batch.rows(place), prompt_index=which)
        said: list[Outputs]
        if tuned.task.reading == "text":
            said = [Outputs(costs=one) for one in tuned.backbone.answer_losses(wide, prompts).split(size)]
        elif heads:
            pooled = tuned.backbone.pooled(wide, prompts).float().split(size)
            said = [
                Outputs(scores=torch.nn.functional.linear(rows, *head))
                for rows, head in zip(pooled, heads, strict=True)
            ]
        else:
            words = wide.candidates if wide.candidates is not None else tuned.asking.words
            assert words is not None
            said = [Outputs(scores=one) for one in tuned.backbone.score(wide, prompts, words).split(size)]
        return torch.stack([tuned.losses(one, batch).total for one in said])

    def _made(self, candidates: Mapping[str, Tensor]) -> tuple[list[Prompt], list[tuple[Tensor, Tensor]]]:
        """The prompt of each candidate, and weight and bias of its head where there is one."""
        tuned, method = self.tuned, self.tuned.method
        assert method is not None
        there = {group.name: group.parameter for group in tuned.trained()}
        before = {name: there[name].clone() for name in candidates}
        prompts, heads = list[Prompt](), list[tuple[Tensor, Tensor]]()
        try:
            for number in range(len(next(iter(candidates.values())))):
                for name, values in candidates.items():
                    there[name].copy_(values[number])
                prompts.append(method.fold())
                if tuned.head is not None:
                    heads.append((tuned.head.weight.clone(), tuned.head.bias.clone()))
        finally:
            for name, value in before.items():
                there[name].copy_(value)
        return prompts, heads
