"""The training loop on Accelerate: steps, validation, early stop, checkpoints, resume, and one result at the end.

Knows no method, family, task or data set by name, and prints nothing: a listener is told what happens.
Slightly longer than most files, so that a run can be read from top to bottom.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import signal
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce as all_reduce
from torch import Tensor

from promptuary import memory, training_facts
from promptuary.backbones.base import Backbone
from promptuary.building import open_backbone
from promptuary.course import open_course
from promptuary.data.collate import Row
from promptuary.errors import ConfigError, Interrupted, OutOfMemory, SpeakerError, TrainingDiverged
from promptuary.evaluation import Evaluation
from promptuary.joint import JointEvaluation
from promptuary.listening import Listener, Stop
from promptuary.run import AnyRun, BaselineRun
from promptuary.runs import RunFolder
from promptuary.seeds import seeded
from promptuary.solvers.base import StepResult
from promptuary.staging import Staging
from promptuary.training_guard import STRIKES, Guard
from promptuary.training_state import Progress, chance, pack, put_back, snapshot, unpack
from promptuary.tuned import Tuned, text_state

TEXTS = 3
"""How many of the best words are tested; RLPrompt averages its scores over three."""

Steps = Generator[list[Row], tuple[StepResult, float], None]

__all__ = ["Listener", "Result", "Stop", "Training", "seeded", "train"]


@dataclass(frozen=True)
class Result:
    """A finished run: its folder, test scores by name, everything in result.json, and its prompts by task."""

    dir: Path
    metrics: dict[str, float]
    facts: dict[str, Any]
    prompts: dict[str, Tuned]

    @property
    def prompt(self) -> Tuned:
        """The prompt of a run on one task.

        Raises:
            ConfigError: there are several.
        """
        if len(self.prompts) > 1:
            raise ConfigError(
                f"this run has several prompts: result.prompts[name], name one of {', '.join(self.prompts)}"
            )
        return next(iter(self.prompts.values()))


def train(
    run: AnyRun,
    *,
    resume: bool = False,
    fresh: bool = False,
    listener: Listener | None = None,
    backbone: Backbone | None = None,
    stop: Stop | None = None,
    tested: bool = True,
) -> Result:
    """Train a prompt and write its run folder.

    Args:
        run: settings.
        resume: continue the run in `run.out` from its newest checkpoint, bit for bit. A finished run stays as it is.
        fresh: delete a run in `run.out` first.
        listener: is told what happens.
        backbone: a loaded base to use instead of loading `run.backbone` (for several runs in one process; not for a
            baseline, which changes its weights).
        stop: asks for a stop from outside. SIGINT, SIGTERM and SIGHUP ask for one in any case (main thread only).
        tested: false leaves the test split unanswered, as choosing settings should: `result.json` says so, its
            `metrics` are empty and there are no predictions. Resuming with true does the test later.

    Raises:
        PromptuaryError: one line on what is wrong; `Interrupted` after a stop, `TrainingDiverged` and `OutOfMemory`
            after a state was saved.
    """
    if not isinstance(run, AnyRun):
        raise ConfigError(f"train takes a run, got {type(run).__name__}; make one with promptuary.load_run(...)")
    if resume and fresh:
        raise ConfigError("resume continues a run and fresh deletes it; choose one")
    if os.environ.get("RANK", "0") == "0":  # one process owns the folder; it hears of trouble before anything is loaded
        RunFolder(run.out).check(run, resume=resume, fresh=fresh)
    stop = stop or Stop()
    with loading(stop):
        training = Training(run, listener or Listener(), backbone, stop, tested=tested)
        stop.loaded()
        return training.run(resume=resume, fresh=fresh)


@contextlib.contextmanager
def loading(stop: Stop) -> Iterator[None]:
    """Signals are requests from here on; one that comes before `stop.loaded` ends the block at once.

    Raises:
        Interrupted: then; nothing was written.
    """
    try:
        with stop.listening():
            yield
    except KeyboardInterrupt:
        if stop.signal is None or stop.polled:
            raise
        raise Interrupted("interrupted while loading; nothing was written", stop.signal) from None


Running = Generator[list[Row], tuple[StepResult, float], "Result"]
"""A run that gives the rows of its next step and wants to know what became of them, and which part of the time that
has passed was its own; it ends with its result."""


class Training:
    """One run while it happens."""

    def __init__(
        self,
        run: AnyRun,
        listener: Listener,
        backbone: Backbone | None = None,
        stop: Stop | None = None,
        *,
        tested: bool = True,
    ) -> None:
        """Load everything; nothing is written yet. With `tested` false the test split is left alone."""
        self.settings, self.listener, self.stop, self.tested = run, listener, stop or Stop(), tested
        if backbone is not None and isinstance(run, BaselineRun):
            raise ConfigError("a baseline trains the weights of a model of its own; leave backbone out, it is loaded")
        if run.train.threads is not None:
            torch.set_num_threads(run.train.threads)
        self.backbone = backbone if backbone is not None else open_backbone(run.backbone)
        self.processes = PartialState(cpu=self.backbone.device.type == "cpu")
        self.course = open_course(run, self.backbone)
        self.staging = Staging(run, self.course, self.processes.num_processes)
        self.tuned, self.feed, self.steps = self.course.learner, self.course.feed, self.staging.steps
        self.solver = self.staging.solver(0)
        self.folder = RunFolder(run.out, self.course.folders)
        self.progress = Progress()
        self.best_state: dict[str, Tensor] = {}
        self.remarks: list[str] = []
        self._saved = -1

    @property
    def notes(self) -> list[str]:
        """What a person should know before the first step."""
        return [*self.course.notes, *self.backbone.notes(), *self.remarks]

    @property
    def evaluate_every(self) -> int:
        """Steps between validations."""
        return self.settings.train.evaluate_every or max(1, self.steps // 10)

    @property
    def save_every(self) -> int:
        """Steps between checkpoints."""
        return self.settings.train.save_every or self.evaluate_every

    @property
    def recompute(self) -> bool:
        """Whether layers run again in the backward pass: as the settings say, or since memory asked for it."""
        return self.settings.train.gradient_checkpointing or self.progress.recompute

    def plan(self) -> dict[str, Any]:
        """What the run will do, before it does."""
        return training_facts.plan(self)

    # ---- the run ----------------------------------------------------------------------------------------------------

    def run(self, *, resume: bool, fresh: bool) -> Result:
        """From opening the folder to result.json."""
        running = self.running(resume=resume, fresh=fresh)
        try:
            rows = next(running)
            while True:
                try:
                    taken = self.step(rows)
                except BaseException as error:
                    running.throw(error)
                    raise
                rows = running.send((taken, 1.0))
        except StopIteration as end:
            result: Result = end.value
            return result

    def running(self, *, resume: bool, fresh: bool) -> Running:
        """The same, with its steps taken by somebody else; what goes wrong there is thrown in here."""
        self.stop.polled = True
        with self.stop.listening():
            self.listener.begun(self)
            opening: contextlib.AbstractContextManager[str | None] = contextlib.nullcontext()
            if self.processes.is_main_process:
                opening = self.folder.writing(self.settings, resume=resume, fresh=fresh)
            with contextlib.closing(self.staging.talking), opening as note:
                if note is not None:
                    self.listener.noted(note)
                self.processes.wait_for_everyone()
                done = self._finished() if resume else None
                if done is None:
                    self.prepare(resume)
                    try:
                        yield from self._train()
                        done = self._finish()
                    except SpeakerError as error:
                        raise self._unanswered(error) from None
        if self.stop.signal is not None:
            text = f"the run is finished and stands in {self.folder.path}; a stop was asked for at its very end"
            raise Interrupted(text, self.stop.signal)
        return done

    def prepare(self, resume: bool) -> None:
        """Make the solver; continue where a checkpoint stands."""
        if not resume or not self._restore():
            self.guard = Guard(self.tuned, self.solver, self.progress)
        self.backbone.ask_through(self.staging.talking.opened)
        for note in self.notes:
            self.listener.noted(note)
        self.listener.planned(self.plan())

    def _next_stage(self) -> None:
        """Go over to the next stage: its own solver, from the tensors as they are or as the method fills them anew."""
        progress = self.progress
        progress.stage += 1
        told, name = dict(self.course.begin(progress.stage)), self.staging.stages[progress.stage].name
        self.solver = self.staging.solver(progress.stage)
        self.guard = Guard(self.tuned, self.solver, progress, begun=progress.step)
        self._row({"step": progress.step, "event": "stage", "stage": name, **told})
        self.listener.noted("; ".join((f"stage {name}", *(f"{key}: {value:.3f}" for key, value in told.items()))))

    def _train(self) -> Steps:
        """All steps, with the state on disk at the end whatever that end is."""
        try:
            self.feed.ready(self.stop.check)
            if self._validation_due():
                self._validate()
            yield from self._loop()
        except Interrupted:
            self._save()
            raise self._stopped() from None
        if self._saved != self.progress.step:
            self._save()
        if self.progress.skipped == self.progress.step:
            raise TrainingDiverged(
                f"not one of {self.progress.step} steps was finite, so nothing was learnt and no prompt is written; "
                f"lower {self.course.rate}, or use backbone.dtype: float32"
            )

    def _stopped(self) -> Interrupted:
        text = f"stopped at step {self.progress.step} of {self.steps}; the state is saved, continue with --resume"
        return Interrupted(text, self.stop.signal or signal.SIGINT)

    def _unanswered(self, error: SpeakerError) -> SpeakerError:
        """The same, with the state on disk: what a model answered until then is not asked again."""
        if self._saved != self.progress.step:
            self._save()
        return type(error)(f"{error}; the state of the run is saved, continue with --resume")

    def _loop(self) -> Steps:
        """Steps until the end, or until validation stops getting better."""
        progress, added = self.progress, self.feed.added
        whole = self.feed.rows["train"] if self.staging.settings.whole else None
        while progress.step < self.steps and not self._exhausted() and not self.solver.done:
            while progress.step >= self.staging.borders[progress.stage + 1]:
                self._next_stage()
            began = time.perf_counter()
            self.guard.before_step()
            rows = self.feed.at(progress.step) if whole is None else whole
            taken, share = yield rows
            elapsed = (time.perf_counter() - began) * share
            progress.took(elapsed)
            progress.calls += taken.calls
            row = {
                "step": progress.step,
                "loss": taken.loss if math.isfinite(taken.loss) else None,
                "grad_norm": taken.grad_norm if math.isfinite(taken.grad_norm) else None,
                "tokens_per_second": round(sum(len(row.encoded.ids) + added for row in rows) / elapsed, 1),
                "seconds": round(progress.seconds, 4),
                **({"parts": taken.parts} if len(taken.parts) > 1 else {}),
                **self.guard.after_step(taken),
            }
            self._row(row)
            if taken.applied:
                self.listener.stepped({**row, "steps": self.steps, "best": progress.best})
            elif self.guard.must_go_back:
                self._go_back()
            if self._validation_due():
                self._validate()
            if progress.step % self.save_every == 0:
                self._save()
        if self.solver.done and progress.validated != progress.step:
            self._validate()

    def step(self, rows: Sequence[Row]) -> StepResult:
        """One optimiser step; in smaller parts of the same rows, as often as memory asks for that."""
        mine = rows[self.processes.process_index :: self.processes.num_processes]
        while True:
            parts = self.feed.parts(mine, self._largest)
            taken = memory.attempt(functools.partial(self._pass, parts, self.feed.weight(rows)))
            if taken is not None:
                return taken
            size = max(map(len, parts))
            if self.course.whole_batches:
                self._save()
                raise OutOfMemory(
                    f"step {self.progress.step + 1} runs out of memory, and the loss of this method compares the rows "
                    "of a batch, so it cannot be cut; lower train.batch_size, or use train.gradient_checkpointing: "
                    "true; the state is saved"
                )
            if size == 1 and self.backbone.recomputes and not self.recompute:
                self.progress.recompute = True
                self._row({"step": self.progress.step, "event": "out of memory, gradient checkpointing switched on"})
                self.listener.noted(
                    "out of memory with single examples: from here on layers run again in the backward pass "
                    "(gradient checkpointing), which takes about 1.3 times as long"
                )
                continue
            if size == 1:
                self._save()
                longest = max(len(row.encoded.ids) for row in mine)
                raise OutOfMemory(
                    f"step {self.progress.step + 1} runs out of memory with single examples (up to {longest} tokens "
                    f"and {self.feed.added} prompt rows); lower data.max_length, shorten the prompt, or use "
                    "backbone.dtype: bfloat16; the state is saved"
                )
            self.progress.micro_batch = math.ceil(size / 2)
            self._less(micro_batch=self.progress.micro_batch)

    def _pass(self, parts: Sequence[Sequence[Row]], weight: float) -> StepResult:
        """Forward and backward over the parts, and the update."""
        self.tuned.train(True)
        self.tuned.moment = self.settings.seed, self.progress.step
        place = (self.progress.step, self.processes.process_index)
        with (
            chance(self.backbone.device, self.settings.seed, 5, *place),
            self.backbone.dropping(),
            self.backbone.recomputing(self.recompute),
            self.precision(),
        ):
            return self.solver.step(
                self.tuned, [self.tuned.batch(part) for part in parts], weight,
                reduce=self._reduce, check=self.stop.check,
            )  # fmt: skip

    @property
    def _largest(self) -> int | None:
        """Most rows in one part of a step."""
        sizes = (self.progress.micro_batch, self.settings.train.batch_size if self.staging.settings.whole else None)
        return min((size for size in sizes if size is not None), default=None)

    def _less(self, **size: int) -> None:
        """Say that something now runs in smaller pieces."""
        ((name, value),) = size.items()
        self._row({"step": self.progress.step, "event": "out of memory, batch halved", name: value})
        what = "training" if name == "micro_batch" else "evaluation"
        same = "; the batch of a step is the same, in more parts" if name == "micro_batch" else ""
        self.listener.noted(f"out of memory in {what}: from here on {value} examples at a time{same}")

    def _validation_due(self) -> bool:
        """At the start, every so often, and at the end; once for each step, also across a stop."""
        step = self.progress.step
        return self.progress.validated != step and (step % self.evaluate_every == 0 or step == self.steps)

    def _exhausted(self) -> bool:
        patience = self.settings.train.patience
        return patience is not None and self.progress.worse >= patience

    def _go_back(self) -> None:
        """Return to the last sound state; give up if that was done too often."""
        if not self.guard.go_back():
            self._save()
            raise TrainingDiverged(
                f"the loss stayed non-finite after {STRIKES} roll-backs at step {self.progress.step}; "
                f"the last good state is saved; lower {self.course.rate}, or use backbone.dtype: float32"
            )
        self._row({"step": self.progress.step, "event": "rolled back, learning rates halved"})
        self.listener.noted(
            f"the loss was not finite {STRIKES} times in a row: rolled back and halved the learning rates"
        )

    def _evaluate(self, split: str, *, interval: bool) -> Evaluation | JointEvaluation:
        """Scores on a split; a batch size that memory could not hold is not tried again."""
        asked = self.progress.eval_batch_size or self.settings.train.eval_batch_size
        found = self.course.evaluate(split, batch_size=asked, interval=interval, check=self.stop.check)
        if found.batch_size < asked:
            self.progress.eval_batch_size = found.batch_size
            self._less(eval_batch_size=found.batch_size)
        return found

    def _validate(self) -> None:
        """Score the validation split; keep the best tensors.

        Of equal scores the first stays the best: what came later took more steps to no gain that was measured.
        """
        progress, primary = self.progress, self.course.primary
        try:
            result = self._evaluate("validation", interval=False)
        except OutOfMemory:
            self._save()
            raise
        score = result.scores[primary]
        sign = 1 if self.course.higher_is_better else -1
        said = self.tuned.text
        if said is not None:
            progress.texts.setdefault(said, score)
        if progress.best is None or sign * score > sign * progress.best or self.solver.chooses:
            # a score that is not finite stands until there is one
            progress.best = score if math.isfinite(score) else None
            progress.best_step, progress.worse = progress.step, 0
            self.best_state = self.tuned.state()
        else:
            progress.worse += 1
        progress.validated = progress.step
        row = {
            "step": progress.step,
            "split": "validation",
            **result.scores,
            **({} if said is None else {"calls": progress.calls, "text": said}),
        }
        self._row(row)
        self.listener.validated({**row, "best": progress.best, "best_step": progress.best_step, "primary": primary})

    # ---- the end ----------------------------------------------------------------------------------------------------

    def _finish(self) -> Result:
        """Best tensors back, test scores, prompt folder, result.json."""
        progress = self.progress
        self.tuned.restore(self.best_state)
        try:
            tested = self._evaluate("test", interval=True) if self.tested else None
        except Interrupted:
            raise self._stopped() from None
        notes = training_facts.verdict(self.progress, None if self.tuned.text is not None else self.course.rate)
        for note in notes:
            self.listener.noted(note)
        facts = training_facts.result(self, tested, notes)
        if self.tuned.text is not None:
            facts |= {"text": self.tuned.text, "texts": self._best_texts(tested), "history": self.solver.history}
        if spent := self.staging.talking.spent():
            facts["spending"] = spent
        if self.processes.is_main_process:
            self.course.save(self.folder.path, tested)
            if tested is not None:
                self.folder.predictions(list(tested.rows()))
            self.folder.result(facts)
        if self.guard.lost:
            raise TrainingDiverged(
                f"the last {progress.idle} steps were not finite; the prompt of step {progress.best_step}, the best "
                f"before them, is written all the same; lower {self.course.rate}, or use backbone.dtype: float32"
            )
        return Result(self.folder.path, facts["metrics"], facts, self.course.prompts)

    def _best_texts(self, tested: Evaluation | JointEvaluation | None) -> list[dict[str, Any]]:
        """The words with the best validation scores, and what they score on the test rows, if those are answered."""
        sign, primary = 1 if self.course.higher_is_better else -1, self.course.primary
        chosen, found = self.tuned.state(), list[dict[str, Any]]()
        order = sorted(self.progress.texts.items(), key=lambda one: -sign * one[1])
        for text, score in order[:TEXTS]:
            if tested is None:
                found.append({"text": text, "validation": {primary: score}})
                continue
            own = tested
            if text != self.tuned.text:
                self.tuned.restore({**chosen, **text_state(text)})
                own = self._evaluate("test", interval=False)
                self.tuned.restore(chosen)
            found.append({"text": text, "validation": {primary: score}, "test": own.scores})
        return found

    def _finished(self) -> Result | None:
        """The result of a run that has one already, just as it was; None if anything is left to do."""
        facts = self.folder.finished(tested=self.tested)
        if facts is None:
            return None
        self.course.reload(self.folder.path)
        self.listener.noted("this run is finished; its result is left as it is")
        return Result(self.folder.path, facts["metrics"], facts, self.course.prompts)

    # ---- processes, precision ---------------------------------------------------------------------------------------

    def _reduce(self, tensor: Tensor) -> Tensor:
        return tensor if self.processes.num_processes == 1 else all_reduce(tensor, "sum")

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast, if the settings ask for it."""
        on = self.settings.train.mixed_precision == "bf16"
        return torch.autocast(self.backbone.device.type, dtype=torch.bfloat16, enabled=on)

    # ---- state ------------------------------------------------------------------------------------------------------

    def _row(self, row: Mapping[str, Any]) -> None:
        if self.processes.is_main_process:
            self.folder.row(row)

    def _save(self) -> None:
        """The whole training state as one checkpoint; a lack of memory is met once by giving back what is unused."""
        if not self.processes.is_main_process:
            return
        if memory.attempt(self._write) is None and memory.attempt(self._write) is None:
            raise OutOfMemory(
                f"the state of step {self.progress.step} cannot be saved: no memory is left; the checkpoint before it "
                "stands, continue from it with --resume on a machine with more"
            )
        self._saved = self.progress.step

    def _write(self) -> Path:
        now = snapshot(self.tuned, self.solver)
        tensors, facts = pack(now, self.guard.sound, self.best_state, self.progress)
        known = {"run_hash": self.settings.hash(), "constants": self.tuned.constants_digest()}
        self.folder.save_state(self.progress.step, tensors, {**known, **facts})
        return self.folder.path

    def _restore(self) -> bool:
        """Continue from the newest checkpoint that is whole; false if there is none yet."""
        found = self.folder.load_state()
        if found is None:
            self.listener.noted("no checkpoint yet: starting from the beginning")
            return False
        for text in found[2]:
            self.listener.noted(f"skipped a checkpoint: {text}")
        if found[1].get("constants", "") != self.tuned.constants_digest():
            raise ConfigError(
                "the prompts that this run starts from are not those that it was begun with; put them back, or begin "
                "anew with --fresh"
            )
        now, sound, self.best_state, self.progress = unpack(found[0], found[1])
        self.solver = self.staging.solver(self.progress.stage)
        put_back(self.tuned, self.solver, now)
        self.guard = Guard(
            self.tuned, self.solver, self.progress, sound, begun=self.staging.borders[self.progress.stage]
        )
        self._row({"step": self.progress.step, "event": "resumed"})
        return True
