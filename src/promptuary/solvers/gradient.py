"""Gradient descent on the trained tensors: AdamW, Adafactor or SGD, a schedule, clipping, a guard against NaN.

Knows no method, family or task; devices, processes and files are the trainer's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import transformers
from torch import Tensor

from promptuary.solvers.base import Batches, Job, Learner, Reduce, Solver, SolverConfig, StepResult, Trained
from promptuary.types import Losses

MOMENTUM = 0.9
"""Of SGD (Zhou et al. 2022, CoOp)."""


class GradientConfig(SolverConfig):
    """Settings of gradient descent: those of `train` (optimizer, schedule, warmup, clip), and no others."""

    name: Literal["gradient"] = "gradient"


class GradientSolver(Solver):
    """An optimiser with a schedule over tensors that each have their own learning rate."""

    name = "gradient"
    uses_gradients = True
    Config = GradientConfig

    @classmethod
    def of(cls, config: SolverConfig, job: Job) -> GradientSolver:
        """As the training settings say."""
        return cls(
            job.tensors,
            optimizer=job.optimizer,
            schedule=job.schedule,
            steps=job.steps,
            warmup=job.warmup,
            clip=job.clip,
        )

    def __init__(
        self,
        tensors: Sequence[Trained],
        *,
        optimizer: str,
        schedule: str,
        steps: int,
        warmup: int,
        clip: float,
    ) -> None:
        """Set up.

        Args:
            tensors: what is trained.
            optimizer: "adamw", "adafactor" or "sgd".
            schedule: "linear", "cosine" or "constant", each after warm-up.
            steps: length of the schedule.
            warmup: steps of linear warm-up.
            clip: largest norm of all gradients together.
        """
        self.tensors = [tensor for tensor in tensors if tensor.parameter.numel()]
        groups = [
            {"params": [tensor.parameter], "lr": tensor.learning_rate, "weight_decay": tensor.weight_decay}
            for tensor in self.tensors
        ]
        if optimizer == "adamw":
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
        elif optimizer == "sgd":
            # CoOp and what is built on it: decay is part of the gradient, no Nesterov
            self.optimizer = torch.optim.SGD(groups, momentum=MOMENTUM)
        else:
            # Lester et al. 2021: no parameter scaling, decay 0.8, the rate is given from outside
            self.optimizer = transformers.optimization.Adafactor(
                groups, scale_parameter=False, relative_step=False, warmup_init=False, decay_rate=-0.8, lr=1.0
            )
        shape = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}[schedule]
        self.schedule = transformers.get_scheduler(shape, self.optimizer, warmup, steps)
        self.clip = clip
        self._memory: dict[tuple[int, str], Tensor] = {}
        self.begin()

    @property
    def parameters(self) -> list[Tensor]:
        """The trained tensors."""
        return [tensor.parameter for tensor in self.tensors]

    def step(
        self,
        learner: Learner,
        batches: Batches,
        total_weight: float,
        *,
        reduce: Reduce | None = None,
        check: Callable[[], None] | None = None,
    ) -> StepResult:
        """One optimiser step over the parts of a batch; the result does not depend on how it is cut.

        Args:
            learner: gives the loss.
            batches: parts of one batch.
            total_weight: sum of the weights of all parts, on all processes.
            reduce: sums a tensor over processes.
            check: called before each part; may raise to stop, with nothing changed.

        Returns:
            The loss of the whole batch. If it, a gradient or what the step makes of a tensor is not finite, no tensor
            is changed. The schedule moves on either way: a rate belongs to a step of the run, whatever became of it.
        """
        self.begin()
        for batch in batches:
            if check is not None:
                check()
            self.share(learner.loss(batch), learner.weight(batch) / total_weight).backward()
        return self.update(reduce)

    def begin(self) -> None:
        """Forget gradients and what was noted of a step; `share` for each part and `update` make a whole one."""
        self.optimizer.zero_grad(set_to_none=True)
        self._loss, self._parts = torch.zeros((), device=self.parameters[0].device), dict[str, float]()

    def share(self, losses: Losses, share: float) -> Tensor:
        """Note a part of the batch.

        Args:
            losses: of the part.
            share: its weight, as a part of the whole batch's.

        Returns:
            What the caller has to run backward, before the next part or later.
        """
        part = losses.total * share
        self._loss += part.detach().float()
        for name, value in losses.parts.items():
            self._parts[name] = self._parts.get(name, 0.0) + value * share
        return part

    def update(self, reduce: Reduce | None = None) -> StepResult:
        """Clip the gradients and step, if all is finite; see `step`.

        A tensor that took no part in the loss (its task is not in the batch) is left alone, with all that the optimiser
        keeps of it.
        """
        loss = self._loss
        if reduce is not None:
            loss = reduce(loss)
            part = reduce(torch.tensor([float(p.grad is not None) for p in self.parameters], device=loss.device))
            for parameter, count in zip(self.parameters, part.tolist(), strict=True):
                if count:  # of processes whose rows it had a part in
                    parameter.grad = reduce(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norms = [torch.linalg.vector_norm(one) for one in gradients] or [torch.zeros((), device=loss.device)]
        total = torch.linalg.vector_norm(torch.stack(norms))
        # one wait for the device, not two
        value, norm = torch.stack([loss, total.to(loss.dtype)]).tolist()
        if not math.isfinite(value):
            fault: Literal["loss", "gradient", "update"] | None = "loss"
        elif not math.isfinite(norm):
            fault = "gradient"
        else:
            if norm > self.clip:
                for gradient in gradients:
                    gradient.mul_(self.clip / (norm + 1e-6))
            fault = None if self._update() else "update"
        self.seek(self.schedule.last_epoch + 1)
        return StepResult(value, norm, self._parts, fault)

    def _update(self) -> bool:
        """Let the optimiser step; put everything back if a tensor is not finite afterwards, or it fails half-way."""
        before = [self._copy((name, ""), value) for name, value in enumerate(self.parameters)]
        slots = {
            parameter: {
                key: self._copy((name, key), value) if isinstance(value, Tensor) else value
                for key, value in self.optimizer.state.get(parameter, {}).items()
            }
            for name, parameter in enumerate(self.parameters)
        }
        taken = False
        try:
            self.optimizer.step()
            taken = all(bool(parameter.isfinite().all()) for parameter in self.parameters)
        except RuntimeError as error:
            # a rate beyond the range of float32
            if "without overflow" not in str(error):
                raise
        finally:
            if not taken:
                with torch.no_grad():
                    for parameter, value in zip(self.parameters, before, strict=True):
                        parameter.copy_(value)
                self.optimizer.state.clear()
                self.optimizer.state.update({parameter: own for parameter, own in slots.items() if own})
                self._memory.clear()  # the optimiser has the copies now
        return taken

    def _copy(self, name: tuple[int, str], value: Tensor) -> Tensor:
        """A copy, in memory that the next step uses again: to get new memory takes longer than to copy."""
        if name not in self._memory:
            self._memory[name] = torch.empty_like(value)
        return self._memory[name].copy_(value.detach())

    def seek(self, step: int) -> None:
        """Set the rates to those of a place in the schedule, in steps of the run."""
        schedule, groups = self.schedule, self.optimizer.param_groups
        schedule.last_epoch = step
        for group, base, shape in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["lr"] = base * shape(step)

    def slow_down(self, factor: float) -> None:
        """Multiply every learning rate, now and for the rest of the schedule."""
        self.schedule.base_lrs = [rate * factor for rate in self.schedule.base_lrs]
        for group in self.optimizer.param_groups:
            group["lr"] *= factor
            group["initial_lr"] *= factor

    def rates(self) -> dict[str, float]:
        """Learning rate of each tensor now."""
        return {t.name: float(g["lr"]) for t, g in zip(self.tensors, self.optimizer.param_groups, strict=True)}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the next step depends on: tensors by name, and numbers."""
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, Any] = {}
        saved = self.optimizer.state_dict()
        for place, slots in saved["state"].items():
            for key, value in slots.items():
                name = f"{self.tensors[place].name}/{key}"
                if isinstance(value, Tensor):
                    tensors[name] = value.detach().cpu().clone()
                else:
                    numbers[name] = value
        rates = [[group["lr"], group["initial_lr"]] for group in saved["param_groups"]]
        return tensors, {"slots": numbers, "rates": rates, "schedule_step": self.schedule.last_epoch}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Put a state back, exactly."""
        places = {tensor.name: place for place, tensor in enumerate(self.tensors)}
        state: dict[int, dict[str, Any]] = {}
        for name, value in [*tensors.items(), *numbers["slots"].items()]:
            owner, _, key = name.rpartition("/")
            state.setdefault(places[owner], {})[key] = value.clone() if isinstance(value, Tensor) else value
        full = self.optimizer.state_dict()
        full["state"] = state
        for group, (rate, first) in zip(full["param_groups"], numbers["rates"], strict=True):
            group["lr"], group["initial_lr"] = rate, first
        self.optimizer.load_state_dict(full)
        self.schedule.last_epoch = numbers["schedule_step"]
        self.schedule.base_lrs = [first for _, first in numbers["rates"]]
