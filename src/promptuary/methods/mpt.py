"""MPT (Wang et al. 2023, arXiv 2303.02861): one prompt for many tasks, times a matrix of rank one for each task.

Knows no backbone and no other task. Rebuilt from descriptions: docs/methods/mpt.md says what of it is our reading.

Notation: P [l, d] the prompt that tasks share; U [l, r] and V [r, d] a task's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, cast

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import log_softmax, mse_loss

from promptuary.errors import ConfigError
from promptuary.methods.base import Method, MethodConfig, SourcedConfig, check_size
from promptuary.prompts.init import Saved, Starting
from promptuary.types import Losses, Outputs, Prompt, Shape, View


class MPTConfig(SourcedConfig):
    """Settings of MPT."""

    name: Literal["mpt"] = "mpt"
    num_virtual_tokens: int = Field(100, ge=1, description="l, rows; the paper has 100")
    rank: int = Field(1, ge=1, description="r of a task's own matrix; the paper has 1")
    factors_lr: float = Field(0.05, gt=0, description="learning rate of U and V, which start at one; our choice")
    teacher: str | None = Field(None, description="a saved prompt of the same task, from which this one learns besides")
    distillation_weight: float = Field(
        0.9, ge=0, description="lambda, of what is learnt from the teacher; from memory of the paper"
    )

    @property
    def origins(self) -> tuple[str, ...]:
        """The sources, and the teacher last."""
        return self.sources if self.teacher is None else (*self.sources, self.teacher)


class MPT(Method):
    """P * (U V), entry by entry."""

    name = "mpt"
    title = "MPT"
    paper = "arXiv 2303.02861"
    reconstructed = True
    shared = frozenset({"rows"})
    tiny: ClassVar = {"num_virtual_tokens": 3, "prompt_lr": 0.3}
    groups: ClassVar = {"rows": "prompt", "u": "factors", "v": "factors"}
    relative = frozenset({"prompt", "factors"})
    Config = MPTConfig
    taught: Tensor

    @property
    def settings(self) -> MPTConfig:
        """The settings with their own type."""
        return cast(MPTConfig, self.config)

    @property
    def studies(self) -> frozenset[str]:  # type: ignore[override]
        """With a teacher, the state of the answer too."""
        return frozenset() if self.settings.teacher is None else frozenset({"answer"})

    def build(self) -> None:
        """P [l, d], U [l, r], V [r, d], and the rows of the teacher [l, d]."""
        c, d = self.settings, self.shape.width
        self.rows = self.parameter(c.num_virtual_tokens, d)
        self.u = self.parameter(c.num_virtual_tokens, c.rank)
        self.v = self.parameter(c.rank, d)
        if c.teacher is not None:
            self.constant(c.num_virtual_tokens, d, name="taught")

    def fill(self, source: Starting) -> None:
        """P as `init` says and U V = 1, or from sources: their P, and the mean of their U and V (our reading).

        Raises:
            ConfigError: a source is of another method or size, or sources do not share one P; or the teacher has
                another number of rows or stands elsewhere.
            NotFoldable: the teacher has no static rows.
        """
        self.rows.copy_(self.first_rows(len(self.rows), source))
        # equal components would get equal gradients and stay one: those behind the first start as random times zero
        self.u.copy_(torch.randn(self.u.shape, generator=source.generator))
        self.u[:, 0] = 1
        self.v.zero_()[0] = 1
        sources = list(source.sources)
        if self.settings.teacher is not None:
            teacher = sources.pop()
            rows = teacher.rows()
            if rows.shape != self.taught.shape or teacher.settings["placement"] != self.settings.placement:
                raise ConfigError(
                    f"mpt learns from a teacher of its own length and placement, {len(self.taught)} at "
                    f"{self.settings.placement}; {teacher.name} has {len(rows)} at {teacher.settings['placement']}"
                )
            self.taught.copy_(rows)
        if not sources:
            return
        for one in sources:
            self._check(one)
        self.rows.copy_(sources[0].tensors["rows"])
        if not all(torch.equal(one.tensors["rows"], self.rows) for one in sources):
            raise ConfigError("these sources do not share one prompt: name tasks of one and the same run")
        for name, own in (("u", self.u), ("v", self.v)):
            own.copy_(torch.stack([one.tensors[name] for one in sources]).mean(0))

    def _check(self, source: Saved) -> None:
        """Refuse a source whose tensors are not those that this one has."""
        if source.method != self.name:
            raise ConfigError(f"mpt goes on from prompts of mpt; {source.name} is of {source.method}")
        rows, rank = source.tensors["u"].shape
        if (rows, rank) != self.u.shape:
            raise ConfigError(
                f"mpt goes on from prompts of its own size, num_virtual_tokens {len(self.u)} and rank {len(self.v)}; "
                f"{source.name} has {rows} and {rank}"
            )

    def prompt(self, view: View) -> Prompt:
        """P * (U V)."""
        return Prompt(rows=(self.rows * (self.u @ self.v))[None], placement=self.settings.placement)

    def teacher(self, view: View) -> Prompt | None:
        """The teacher's rows."""
        c = self.settings
        return None if c.teacher is None else Prompt(rows=self.taught[None], placement=c.placement)

    def loss(self, task_loss: Float[Tensor, ""], outputs: Outputs) -> Losses:
        """L_task + lambda (KL(teacher || student) of the answers + mean squared distance of their states).

        Raises:
            ConfigError: the task has no labels, so that there is nothing to compare.
        """
        taught, parts = outputs.taught, {"task": float(task_loss.detach())}
        if taught is None:
            return Losses(task_loss, parts)
        if outputs.scores is None or taught.scores is None or outputs.answer is None or taught.answer is None:
            raise ConfigError("method.teacher compares scores of labels: it needs a task with label words")
        own, other = log_softmax(outputs.scores, dim=-1), log_softmax(taught.scores, dim=-1)
        # an answer that does not exist for a row scores -inf under both
        logits = (other.exp() * (other - own).masked_fill(other.isinf(), 0)).sum(-1).mean()
        states = mse_loss(outputs.answer, taught.answer)
        parts |= {"teacher's answers": float(logits.detach()), "teacher's states": float(states.detach())}
        return Losses(task_loss + self.settings.distillation_weight * (logits + states), parts)

    def insight(self) -> Mapping[str, Tensor]:
        """The factor of each row and of each feature."""
        return {"rows": self.u.detach(), "features": self.v.detach()}

    @classmethod
    def count(cls, config: MethodConfig, shape: Shape) -> int:
        """L d + r (l + d)."""
        c, d = cast(MPTConfig, config), shape.width
        return c.num_virtual_tokens * d + c.rank * (c.num_virtual_tokens + d)

    @classmethod
    def match_budget(cls, config: MethodConfig, length: int, shape: Shape) -> MethodConfig:
        """The longest prompt that fits."""
        c, d = cast(MPTConfig, config), shape.width
        check_size(cls.count(c.model_copy(update={"num_virtual_tokens": 1}), shape), length * d, length, "lower rank")
        return c.model_copy(update={"num_virtual_tokens": (length - c.rank) * d // (d + c.rank)})
