"""The training loop on Accelerate: steps, validation, early stop, checkpoints, resume, and one result at the end.

Knows no method, family, task or data set by name, and prints nothing: a listener is told what happens.
Longer than most files, so that a run can be read from top to bottom.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce as all_reduce
from torch import Tensor

from promptuary import checkpoint, registry
from promptuary.backbones.base import Backbone
from promptuary.config import Run
from promptuary.data.collate import Row, batches
from promptuary.data.load import Splits, load
from promptuary.data.splits import SPLITS, naming
from promptuary.errors import ConfigError, Interrupted, TrainingDiverged
from promptuary.evaluation import Evaluation, evaluate
from promptuary.listening import Listener, Stop
from promptuary.metrics import METRICS
from promptuary.runs import RunFolder, versions
from promptuary.solvers.gradient import GradientSolver
from promptuary.tuned import Tuned, build_method, open_backbone
from promptuary.types import Batch

STRIKES = 3
"""Steps in a row without a finite gradient before rolling back, and roll-backs before giving up; our choice."""


@dataclass(frozen=True)
class Result:
    """A finished run: its folder, test scores by name, everything in result.json, and the prompt ready for use."""

    dir: Path
    metrics: dict[str, float]
    facts: dict[str, Any]
    prompt: Tuned


Snapshot = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]
"""Trained tensors, and the optimiser's tensors and numbers."""


@dataclass
class Progress:
    """What changes from step to step, besides tensors."""

    step: int = 0
    best: float | None = None
    best_step: int = 0
    worse: int = 0
    validated: int = -1
    strikes: int = 0
    rollbacks: int = 0
    seconds: float = 0.0


def train(
    run: Run,
    *,
    resume: bool = False,
    fresh: bool = False,
    listener: Listener | None = None,
    backbone: Backbone | None = None,
) -> Result:
    """Train a prompt and write its run folder.

    Args:
        run: settings.
        resume: continue the run in `run.out` from its newest checkpoint, bit for bit.
        fresh: delete a run in `run.out` first.
        listener: is told what happens.
        backbone: a loaded base to use instead of loading `run.backbone` (for several runs in one process).

    Raises:
        PromptuaryError: one line on what is wrong; `Interrupted` after a stop that was saved.
    """
    if os.environ.get("RANK", "0") == "0":  # one process owns the folder; it hears of trouble before anything is loaded
        RunFolder(run.out).check(run, resume=resume, fresh=fresh)
    return Training(run, listener or Listener(), backbone).run(resume=resume, fresh=fresh)


def seeded(seed: int, *parts: int) -> torch.Generator:
    """A generator for one purpose: the same seed and parts give the same numbers."""
    value = seed
    for part in parts:
        value = (value * 1_000_003 + part + 1) % (2**63)
    return torch.Generator().manual_seed(value)


class Training:
    """One run while it happens."""

    def __init__(self, run: Run, listener: Listener, backbone: Backbone | None = None) -> None:
        """Load everything; nothing is written yet."""
        self.settings, self.listener, self.stop = run, listener, Stop()
        if run.train.threads is not None:
            torch.set_num_threads(run.train.threads)
        task_class = registry.load("tasks", run.task.name)
        split_seed = run.data.split_seed if run.data.split_seed is not None else run.seed
        self.splits: Splits = load(run.data, task_class.required(run.task), seeded(split_seed, 1))
        self.task = task_class(run.task, self.splits.train)
        self.backbone = backbone if backbone is not None else open_backbone(run.backbone)
        self.processes = PartialState(cpu=self.backbone.device.type == "cpu")
        self.method = build_method(run.method, self.backbone.shape)
        self.tuned = Tuned(self.backbone, self.task, self.method, max_length=run.data.max_length)
        saved = None
        if run.method.init_prompt is not None:
            saved = checkpoint.load_rows(run.method.init_prompt, self.backbone)
        self.tuned.initialise(seeded(run.seed, 2), saved)
        # the test rows too: what is wrong with them should be known before training, not after it
        self.rows: dict[str, list[Row]] = {}
        for name in SPLITS:
            with naming(name):
                self.rows[name] = self.tuned.rows(getattr(self.splits, name), labelled=True)
        self._check_positions()
        self.folder = RunFolder(run.out)
        self.progress = Progress()
        self.best_state: dict[str, Tensor] = {}
        self._epoch, self._order = -1, list[list[int]]()
        self.sound: Snapshot | None = None

    # ---- lengths ----------------------------------------------------------------------------------------------------

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in one pass."""
        return math.ceil(len(self.rows["train"]) / self.settings.train.batch_size)

    @property
    def steps(self) -> int:
        """Optimiser steps in all."""
        settings = self.settings.train
        return settings.steps if settings.epochs is None else max(1, round(settings.epochs * self.steps_per_epoch))

    @property
    def evaluate_every(self) -> int:
        """Steps between validations."""
        return self.settings.train.evaluate_every or max(1, self.steps // 10)

    @property
    def save_every(self) -> int:
        """Steps between checkpoints."""
        return self.settings.train.save_every or self.evaluate_every

    def _check_positions(self) -> None:
        limit, added = self.backbone.max_positions, self.tuned.added_tokens
        sizes = [
            (len(row.encoded.ids), self.tuned.answer_positions(row)) for rows in self.rows.values() for row in rows
        ]
        text, answer = max(sizes, key=sum)
        if limit is not None and text + answer + added > limit:
            more = f", the answer ({answer} tokens)" if answer else ""
            room = limit - added - answer
            fix = f"lower data.max_length to {room} or shorten the prompt" if room > 0 else "shorten the prompt"
            raise ConfigError(
                f"the longest text ({text} tokens){more} and the prompt ({added} rows) exceed the "
                f"model's {limit} positions; {fix}"
            )

    def _long_texts(self) -> list[str]:
        """A note if texts go beyond the offset table."""
        limit = self.tuned.offset_rows
        longer = sum(len(row.encoded.ids) > limit for row in self.rows["train"]) if limit is not None else 0
        if not longer:
            return []
        return [f"{longer} training texts are longer than the offset table of {limit} rows; raise method.max_tokens"]

    def plan(self) -> dict[str, Any]:
        """What the run will do, before it does."""
        run, trained = self.settings, self.tuned.trainable_parameters
        lengths = sorted(len(row.encoded.ids) for row in self.rows["train"])
        typical = lengths[int(0.95 * (len(lengths) - 1))] + self.tuned.added_tokens
        weights = sum(p.numel() * p.element_size() for p in self.backbone.model.parameters())
        per_part = math.ceil(run.train.batch_size / run.train.accumulation)
        # about 20 saved values of the hidden width per token and layer (measured: 18 on T5-base, 22 on GPT-2)
        saved = 20 * self.backbone.layers * self.backbone.shape.width * typical * per_part
        saved *= 2 if run.backbone.dtype in ("bfloat16", "float16") else 4
        return {
            "method": self.method.name,
            "task": self.task.name,
            "backbone": f"{run.backbone.model} ({self.backbone.name}, {self.backbone.device.type})",
            "examples": {
                "train": len(self.splits.train),
                "validation": len(self.splits.validation),
                "test": len(self.splits.test),
            },
            "split_hash": self.splits.hash,
            "longest_text": lengths[-1],
            "cut_texts": sum(row.encoded.cut > 0 for row in self.rows["train"]),
            "steps": self.steps,
            "batch_size": run.train.batch_size,
            "trainable_parameters": trained,
            "added_tokens": self.tuned.added_tokens,
            "memory_bytes_estimate": weights + saved + trained * 16,
            "prompt_bytes": trained * 4,
            "out": str(self.folder.path),
            "writes": [
                "run.yaml",
                "environment.json",
                "metrics.jsonl",
                "checkpoints/",
                "prompt/",
                "result.json",
                "predictions.jsonl",
            ],
        }

    # ---- the run ----------------------------------------------------------------------------------------------------

    def run(self, *, resume: bool, fresh: bool) -> Result:
        """From opening the folder to result.json."""
        settings = self.settings.train
        self.listener.begun(self)
        if self.processes.is_main_process:
            self.folder.open(self.settings, resume=resume, fresh=fresh)
        self.processes.wait_for_everyone()
        warmup = int(settings.warmup) if settings.warmup >= 1 else round(settings.warmup * self.steps)
        self.solver = GradientSolver(
            self.tuned.trained(),
            optimizer=settings.optimizer,
            schedule=settings.schedule,
            steps=self.steps,
            warmup=warmup,
            clip=settings.clip,
        )
        if resume:
            self._restore()
        for note in (*self.splits.notes, *self._long_texts()):
            self.listener.noted(note)
        self.listener.planned(self.plan())
        self.sound = self.sound or self._snapshot()
        times: list[float] = []
        with self.stop.listening():
            try:
                if self._validation_due():
                    self._validate()
                self._loop(times)
            except Interrupted:
                self._save()
                raise Interrupted(
                    f"stopped at step {self.progress.step} of {self.steps}; the state is saved, continue with --resume"
                ) from None
        return self._finish(times)

    def _loop(self, times: list[float]) -> None:
        """Steps until the end, or until validation stops getting better."""
        progress, added = self.progress, self.tuned.added_tokens
        while progress.step < self.steps and not self._exhausted():
            began = time.perf_counter()
            before = self._snapshot() if progress.validated == progress.step else None
            rows = self._batch_rows(progress.step)
            self.tuned.train(True)
            with self._precision():
                taken = self.solver.step(
                    self.tuned, self._parts(rows), self._weight(rows), reduce=self._reduce, check=self.stop.check
                )
            elapsed = time.perf_counter() - began
            progress.seconds += elapsed
            progress.step += 1
            times.append(elapsed)
            tokens = sum(len(row.encoded.ids) + added for row in rows)
            row = {
                "step": progress.step,
                "loss": taken.loss if math.isfinite(taken.loss) else None,
                "grad_norm": taken.grad_norm if math.isfinite(taken.grad_norm) else None,
                "tokens_per_second": round(tokens / elapsed, 1),
                "seconds": round(progress.seconds, 4),
                **({"parts": taken.parts} if len(taken.parts) > 1 else {}),
            }
            if taken.applied:
                progress.strikes = 0
                self.sound = before or self.sound
                self._row(row)
                self.listener.stepped({**row, "steps": self.steps, "best": progress.best})
            else:
                self._strike(row)
            if self._validation_due():
                self._validate()
            if progress.step % self.save_every == 0:
                self._save()

    def _validation_due(self) -> bool:
        """At the start, every so often, and at the end; once for each step, also across a stop."""
        step = self.progress.step
        return self.progress.validated != step and (step % self.evaluate_every == 0 or step == self.steps)

    def _exhausted(self) -> bool:
        patience = self.settings.train.patience
        return patience is not None and self.progress.worse >= patience

    def _strike(self, row: dict[str, Any]) -> None:
        """A step without a finite gradient changes nothing; its batch is left. Several in a row: go back, slow down."""
        progress = self.progress
        progress.strikes += 1
        self._row({**row, "event": "not finite, step skipped", "strike": progress.strikes})
        if progress.strikes < STRIKES:
            return
        progress.strikes, progress.rollbacks = 0, progress.rollbacks + 1
        assert self.sound is not None
        if progress.rollbacks > STRIKES:
            self.tuned.restore(self.sound[0])
            self._save()
            raise TrainingDiverged(
                f"the loss stayed non-finite after {STRIKES} roll-backs at step {progress.step}; "
                "the last good state is "
                "saved; lower method.prompt_lr, or use backbone.dtype: float32"
            )
        self.tuned.restore(self.sound[0])
        self.solver.restore(self.sound[1], self.sound[2])
        self.solver.slow_down(0.5)
        self.sound = self._snapshot()
        self._row({"step": progress.step, "event": "rolled back, learning rates halved"})
        self.listener.noted("the loss was not finite three times in a row: rolled back and halved the learning rates")

    def _validate(self) -> None:
        """Score the validation split; keep the best tensors."""
        progress = self.progress
        result = evaluate(
            self.tuned,
            self.splits.validation,
            rows=self.rows["validation"],
            batch_size=self.settings.train.eval_batch_size,
            interval=False,
            check=self.stop.check,
        )
        primary = self.task.metrics[0]
        score = result.scores[primary]
        sign = 1 if METRICS[primary].higher_is_better else -1
        if progress.best is None or sign * score > sign * progress.best:
            # a score that is not finite stands until there is one
            progress.best = score if math.isfinite(score) else None
            progress.best_step, progress.worse = progress.step, 0
            self.best_state = self.tuned.state()
        else:
            progress.worse += 1
        progress.validated = progress.step
        row = {"step": progress.step, "split": "validation", **result.scores}
        self._row(row)
        self.listener.validated({**row, "best": progress.best, "best_step": progress.best_step, "primary": primary})

    def _finish(self, times: list[float]) -> Result:
        """Best tensors back, test scores, prompt folder, result.json."""
        self.tuned.restore(self.best_state)
        tested: Evaluation = evaluate(
            self.tuned, self.splits.test, rows=self.rows["test"], batch_size=self.settings.train.eval_batch_size
        )
        run, progress = self.settings, self.progress
        facts = {
            "method": self.method.name,
            "task": run.suite or run.task.name,
            "data": run.data.source,
            "backbone": run.backbone.model,
            "seed": run.seed,
            "metrics": tested.scores,
            "primary_metric": self.task.metrics[0],
            "interval_95": tested.interval,
            "validation": {self.task.metrics[0]: progress.best},
            "examples": {
                "train": len(self.splits.train),
                "validation": len(self.splits.validation),
                "test": len(self.splits.test),
            },
            "split_hash": self.splits.hash,
            "trainable_parameters": self.tuned.trainable_parameters,
            "added_tokens": self.tuned.added_tokens,
            "steps": progress.step,
            "best_step": progress.best_step,
            "seconds_per_step_median": statistics.median(times) if times else None,
            "train_seconds": progress.seconds,
            "peak_memory_bytes": peak_memory(self.backbone.device),
            "rollbacks": progress.rollbacks,
            "versions": versions(),
            "run_hash": run.hash(),
        }
        if self.processes.is_main_process:
            checkpoint.save_prompt(
                self.tuned, self.folder.prompt, metrics={f"test {k}": v for k, v in tested.scores.items()}
            )
            self.folder.predictions(tested.rows())
            self.folder.result(facts)
        return Result(self.folder.path, tested.scores, facts, self.tuned)

    # ---- batches ----------------------------------------------------------------------------------------------------

    def _batch_rows(self, step: int) -> list[Row]:
        """Rows of one step; the order follows from seed and epoch alone, so that a resumed run needs no replay."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._epoch != epoch:
            rows, settings = self.rows["train"], self.settings.train
            self._order = batches(
                [len(row.encoded.ids) for row in rows],
                settings.batch_size,
                generator=seeded(self.settings.seed, 3, epoch),
                bucket=settings.bucket,
            )
            self._epoch = epoch
        return [self.rows["train"][index] for index in self._order[place]]

    def _parts(self, rows: list[Row]) -> list[Batch]:
        """This process's rows, cut into the parts that accumulation asks for."""
        mine = rows[self.processes.process_index :: self.processes.num_processes]
        size = max(1, math.ceil(len(mine) / self.settings.train.accumulation))
        return [self.tuned.batch(mine[start : start + size]) for start in range(0, len(mine), size)]

    def _weight(self, rows: list[Row]) -> float:
        if self.task.reading == "text":
            return float(sum(len(row.target_ids or ()) for row in rows))
        return float(len(rows))

    def _reduce(self, tensor: Tensor) -> Tensor:
        return tensor if self.processes.num_processes == 1 else all_reduce(tensor, "sum")

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        on = self.settings.train.mixed_precision == "bf16"
        return torch.autocast(self.backbone.device.type, dtype=torch.bfloat16, enabled=on)

    # ---- state ------------------------------------------------------------------------------------------------------

    def _row(self, row: Mapping[str, Any]) -> None:
        if self.processes.is_main_process:
            self.folder.row(row)

    def _snapshot(self) -> Snapshot:
        return (self.tuned.state(), *self.solver.state())

    def _save(self) -> None:
        """The whole training state as one checkpoint."""
        if not self.processes.is_main_process:
            return
        trained, optimizer, numbers = self._snapshot()
        assert self.sound is not None
        parts = {"trained": trained, "optimizer": optimizer, "best": self.best_state}
        parts |= {"sound": self.sound[0], "sound-optimizer": self.sound[1]}
        tensors = {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}
        tensors["random/cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["random/cuda"] = torch.cuda.get_rng_state()
        facts = {"run_hash": self.settings.hash(), "progress": vars(self.progress), "solver": numbers}
        facts["sound"] = self.sound[2]
        self.folder.save_state(self.progress.step, tensors, facts)

    def _restore(self) -> None:
        """Continue from the newest checkpoint that is whole, if there is one."""
        found = self.folder.load_state()
        if found is None:
            self.listener.noted("no checkpoint yet: starting from the beginning")
            return
        tensors, facts, skipped = found
        for text in skipped:
            self.listener.noted(f"skipped a checkpoint: {text}")

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        self.tuned.restore(part("trained/"))
        self.best_state = part("best/")
        self.solver.restore(part("optimizer/"), facts["solver"])
        self.sound = (part("sound/"), part("sound-optimizer/"), facts["sound"])
        self.progress = Progress(**facts["progress"])
        torch.set_rng_state(tensors["random/cpu"])
        if torch.cuda.is_available() and "random/cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random/cuda"])
        self._row({"step": self.progress.step, "event": "resumed"})


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: of the accelerator, or of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
