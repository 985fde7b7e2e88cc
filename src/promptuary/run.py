"""What a run is: a frozen tree of settings, of one task or of several.

Knows no file and no registry: `config` reads it.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

import pydantic
import yaml
from pydantic import Field

from promptuary.backbones.base import BackboneConfig
from promptuary.baselines.base import BaselineConfig
from promptuary.data.load import DataConfig
from promptuary.methods.base import MethodConfig
from promptuary.settings import Settings
from promptuary.solvers.base import SolverConfig
from promptuary.speakers.base import HASHED
from promptuary.tasks.base import TaskConfig


class TrainConfig(Settings):
    """How a prompt is trained."""

    steps: int = Field(500, ge=1, description="optimiser steps; epochs, if given, decides instead")
    epochs: float | None = Field(None, gt=0, description="passes over the training data, instead of steps")
    batch_size: int = Field(16, ge=1, description="examples per optimiser step, whatever accumulation is; DePT: 32")
    accumulation: int = Field(
        1, ge=1, description="parts that a batch is run in, to save memory; the result is the same"
    )
    optimizer: Literal["adamw", "adafactor", "sgd"] = Field(
        "adamw",
        description="AdamW (DePT), Adafactor without parameter scaling (Lester et al. 2021), or SGD with momentum 0.9 "
        "(CoOp)",
    )
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="after warm-up; DePT: linear")
    warmup: float = Field(
        0.06, ge=0, description="steps of warm-up (1 or more) or their part of all steps (below 1); our choice"
    )
    clip: float = Field(1.0, gt=0, description="largest norm of all gradients together; DePT: 1.0")
    mixed_precision: Literal["no", "bf16"] = Field("no", description="bf16 runs the model under autocast")
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: much less memory, about 1.3 times the time"
    )
    bucket: bool = Field(True, description="batches of similar length (seeded, order stays random across buckets)")
    evaluate_every: int | None = Field(None, ge=1, description="steps between validations; without it a tenth of all")
    patience: int | None = Field(None, ge=1, description="stop after this many validations without a better score")
    eval_batch_size: int = Field(32, ge=1, description="examples per batch in evaluation")
    save_every: int | None = Field(None, ge=1, description="steps between checkpoints; without it as evaluate_every")
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads of torch; without it torch's own choice")


class AnyRun(Settings):
    """What every training run has."""

    backbone: BackboneConfig
    train: TrainConfig = TrainConfig()
    solver: pydantic.SerializeAsAny[SolverConfig] | None = None
    seed: int = Field(0, ge=0, description="of data order, few-shot sample and starting values")
    out: str = Field(
        "out/run", min_length=1, description="folder of this run; everything is written there and nowhere else"
    )

    def hash(self) -> str:
        """16 hex digits over all settings but `out`; of a model that is talked to only what its answers depend on."""
        # without a solver of its own a run is what it was before there were several
        excluded = {"out", *(() if self.solver is not None else ("solver",))}
        content = json.dumps(self.model_dump(mode="json", exclude=excluded, context={HASHED: True}), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """The resolved settings; loading them gives this run again."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class OneTask(AnyRun):
    """What every run on one task has."""

    task: pydantic.SerializeAsAny[TaskConfig]
    data: DataConfig
    suite: str | None = Field(None, description="a prepared task and data set, such as glue/sst2")

    @property
    def sources(self) -> dict[str, Any]:
        """What it learns, and from what data, for result.json."""
        return {"task": self.suite or self.task.name, "data": self.data.source}


class Run(OneTask):
    """Everything that a training run on one task is."""

    method: pydantic.SerializeAsAny[MethodConfig]


class BaselineRun(OneTask):
    """A run to compare with: it trains weights of the model, or a head alone, and no prompt."""

    baseline: pydantic.SerializeAsAny[BaselineConfig]


class MixtureConfig(Settings):
    """How the tasks of one run are mixed."""

    strategy: Literal["uniform", "proportional", "temperature"] = Field(
        "uniform", description="how often each task is taken: all alike (MP2), by its rows, or by rows^(1/temperature)"
    )
    temperature: float = Field(
        2.0, gt=0, description="of strategy: temperature; 1 is proportional (Raffel et al. 2020)"
    )
    limit: int | None = Field(None, ge=1, description="rows of a task count as at most this many")
    rows: Literal["task", "mixed"] = Field("task", description="a batch is of one task (MP2), or of rows of any")
    prompt: Literal["each", "one"] = Field(
        "each", description="each task its own prompt, but for the parts that the method shares; or one for all"
    )


class JointTask(Settings):
    """One task of several: what a run on it alone would have, and what of the method is other there."""

    task: pydantic.SerializeAsAny[TaskConfig]
    data: DataConfig
    suite: str | None = Field(None, description="a prepared task and data set, such as glue/sst2")
    method: dict[str, Any] = Field({}, description="settings of the method that are other for this task")


class JointRun(AnyRun):
    """Everything that a training run on several tasks is."""

    method: pydantic.SerializeAsAny[MethodConfig]
    tasks: dict[str, JointTask]
    mixture: MixtureConfig = MixtureConfig()

    @property
    def sources(self) -> dict[str, Any]:
        """What it learns, and from what data, for result.json."""
        return {
            "task": "+".join(self.tasks),
            "data": {name: part.data.source for name, part in self.tasks.items()},
        }
