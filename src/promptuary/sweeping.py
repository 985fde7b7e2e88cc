"""Several runs at once on one frozen model: their rows in common batches, each run with its own prompt and folder.

Knows no method, family or task by name, and no schedule: what a run does between its steps is the run's own.
"""

from __future__ import annotations

import itertools
import math
import os
import signal
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from promptuary import memory
from promptuary.backbones.base import Backbone
from promptuary.building import open_backbone
from promptuary.data.collate import Row
from promptuary.errors import ConfigError, Interrupted, PromptuaryError
from promptuary.listening import Listener, Stop
from promptuary.passes import outputs
from promptuary.run import AnyRun, BaselineRun, Run
from promptuary.runs import RunFolder
from promptuary.solvers.base import StepResult
from promptuary.solvers.gradient import GradientSolver
from promptuary.training import Result, Running, Training, loading
from promptuary.tuned import Tuned
from promptuary.types import Losses

SHARED = ("backbone", "task", "train.mixed_precision", "train.gradient_checkpointing", "train.threads")
"""Settings that the runs of a sweep have in common: they belong to the model and its passes, not to a prompt."""


def sweep(
    runs: Sequence[AnyRun],
    *,
    resume: bool = False,
    fresh: bool = False,
    listener: Callable[[AnyRun], Listener] | None = None,
    backbone: Backbone | None = None,
    stop: Stop | None = None,
    at_once: int | None = None,
) -> list[Result]:
    """Train several prompts on one frozen model at the same time, such as K seeds or learning rates.

    In each step the next batches of all runs go through the model together, each row with the prompt of its run. What
    a run learns, writes and reports is what it would alone, but for the last digits of its sums; its times are its
    share. Runs may differ in everything but `SHARED`, also in method, data and length.

    Args:
        runs: with a folder (`out`) each.
        resume: continue each run from its newest checkpoint; finished runs stay as they are.
        fresh: delete the runs in the folders first.
        listener: makes the one that is told what happens in a run.
        backbone: a loaded base to use instead of loading `run.backbone`.
        stop: asks for a stop from outside; every run saves its state then.
        at_once: most runs whose batches go through the model together; without it all, and fewer where memory is short.

    Returns:
        The results, in the order of the runs.

    Raises:
        ConfigError: the runs cannot share a model, or a folder is taken; nothing is written.
        Interrupted: after a stop; every state is saved.
        PromptuaryError: one of the runs failed, and the message names it; the others went on to their ends.
    """
    _check(runs, at_once)
    for run in runs:
        RunFolder(run.out).check(run, resume=resume, fresh=fresh)
    stop, made = stop or Stop(), listener or (lambda run: Listener())
    with loading(stop):
        base = backbone if backbone is not None else open_backbone(runs[0].backbone)
        trainings = [Training(run, made(run), base, stop) for run in runs]
        _check_tasks(trainings)
        stop.loaded()
        return Sweep(trainings, at_once).run(resume=resume, fresh=fresh)


@dataclass(eq=False)
class Part:
    """A run while it happens; `rows` of its next step, until it has a result or an error."""

    training: Training
    running: Running
    rows: Sequence[Row] | None = None
    result: Result | None = None
    error: PromptuaryError | None = None

    def go_on(self, go: Callable[..., Sequence[Row]], *given: Any) -> None:
        """To its next step, or to its end."""
        self.rows = None
        try:
            self.rows = go(*given)
        except StopIteration as end:
            self.result = end.value
        except PromptuaryError as error:
            self.error = error


class Sweep:
    """The runs of a sweep while they happen."""

    def __init__(self, trainings: Sequence[Training], at_once: int | None = None) -> None:
        """Of loaded runs on one backbone."""
        self.trainings, self.at_once = trainings, at_once or len(trainings)
        others = len(trainings) - 1
        for one in trainings if others else ():
            runs = "another run" if others == 1 else f"{others} other runs"
            one.remarks.append(f"trained together with {runs}: times are its share")

    def run(self, *, resume: bool, fresh: bool) -> list[Result]:
        """All of them, to their ends."""
        parts = [Part(one, one.running(resume=resume, fresh=fresh)) for one in self.trainings]
        try:
            for part in parts:
                part.go_on(next, part.running)
                self._hear(parts)
            while any(part.rows is not None for part in parts):
                self._turn(parts)
        finally:
            for part in parts:
                part.running.close()
        return _results(parts)

    def _turn(self, parts: Sequence[Part]) -> None:
        """One step of each run that has one."""
        active = [part for part in parts if part.rows is not None]
        waiting = list(active)
        while waiting:
            group = self._group(waiting)
            try:
                taken = self._step(group)
            except Interrupted as error:
                self._stop(parts, error)
                return
            except PromptuaryError as error:  # of a run that is alone in its group
                for part in group:
                    part.go_on(part.running.throw, error)
                taken = None
            else:
                if taken is None:
                    continue
            waiting = [part for part in waiting if part not in group]
            for part, result in zip(group, taken or (), strict=bool(taken)):
                part.go_on(part.running.send, (result, 1 / len(active)))
                self._hear(parts)

    def _group(self, waiting: Sequence[Part]) -> list[Part]:
        """Runs that go through the model together: as many as fit, of those whose prompts may stand in one batch."""
        kinds = [self._kind(part.training) for part in waiting]
        return [part for part, kind in zip(waiting, kinds, strict=True) if kind == kinds[0]][: self.at_once]

    @staticmethod
    def _kind(training: Training) -> Hashable:
        return None if training.backbone.mixes_prefixes else _prompt(training).lengths[1]

    def _step(self, group: Sequence[Part]) -> list[StepResult] | None:
        """One step of each; None if memory ran out, and fewer go together from then on."""
        if len(group) == 1:
            assert group[0].rows is not None
            return [group[0].training.step(group[0].rows)]
        taken = memory.attempt(lambda: together(group))
        if taken is None:
            self.at_once = math.ceil(len(group) / 2)
            for part in group:
                part.training.listener.noted(f"out of memory: from here on {self.at_once} runs go together")
        return taken

    def _hear(self, parts: Sequence[Part]) -> None:
        """A run that was stopped stops the others."""
        for part in parts:
            if isinstance(part.error, Interrupted):
                self._stop(parts, part.error)

    @staticmethod
    def _stop(parts: Sequence[Part], error: Interrupted) -> None:
        """Let every run save its state, and end."""
        for part in parts:
            if part.result is None and part.error is None:
                part.go_on(part.running.throw, error)
        done = sum(part.result is not None for part in parts)
        text = f"stopped: {done} of {len(parts)} runs are finished, the others are saved; continue with --resume"
        raise Interrupted(text, parts[0].training.stop.signal or signal.SIGINT)


def together(group: Sequence[Part]) -> list[StepResult]:
    """Forward and backward over the rows of all, and the update of each."""
    trainings = [part.training for part in group]
    first, solvers = trainings[0], [_solver(training) for training in trainings]
    pieces, weights = list[Sequence[Sequence[Row]]](), list[float]()
    for part in group:
        training, rows = part.training, part.rows or []
        training.tuned.train(True)
        training.tuned.moment = training.settings.seed, training.progress.step
        _solver(training).begin()
        pieces.append(training.feed.parts(rows, training.progress.micro_batch))
        weights.append(training.feed.weight(rows))
    with first.backbone.recomputing(any(one.recompute for one in trainings)), first.precision():
        for several in itertools.zip_longest(*pieces):
            first.stop.check()
            there = [place for place, rows in enumerate(several) if rows is not None]
            found = _losses([trainings[place] for place in there], [several[place] for place in there])
            shares = [
                solvers[place].share(losses, weight / weights[place])
                for place, (losses, weight) in zip(there, found, strict=True)
            ]
            # each tensor belongs to one run, whose own rows are all that reaches it
            torch.stack(shares).sum().backward()
    return [solver.update() for solver in solvers]


def _losses(trainings: Sequence[Training], several: Sequence[Sequence[Row]]) -> Iterator[tuple[Losses, int]]:
    """Mean loss of the rows of each run, and what it is taken over, from one pass over all of them."""
    whole = trainings[0].tuned.batch([row for rows in several for row in rows])
    places = torch.arange(len(whole)).split([len(rows) for rows in several])
    shares = [(_prompt(one), at.tolist()) for one, at in zip(trainings, places, strict=True)]
    for (tuned, _), at, said in zip(shares, places, outputs(whole, shares), strict=True):
        batch = whole.rows(at.to(whole.index.device))
        yield tuned.losses(said, batch), tuned.weight(batch)


def _prompt(training: Training) -> Tuned:
    """The prompt of a run; `_check` lets only those of one task in."""
    tuned = training.tuned
    assert isinstance(tuned, Tuned)
    return tuned


def _solver(training: Training) -> GradientSolver:
    """The solver of a run; `_check_tasks` lets no other in."""
    solver = training.solver
    assert isinstance(solver, GradientSolver)
    return solver


def _check(runs: Sequence[AnyRun], at_once: int | None) -> None:
    """Refuse runs that cannot share a model."""
    if not runs:
        raise ConfigError("a sweep needs at least one run")
    for run in runs:
        if isinstance(run, BaselineRun):
            raise ConfigError(
                f"the baseline {run.baseline.name} changes the weights of its model, which the runs of a sweep share; "
                "train it by itself"
            )
        if not isinstance(run, Run):
            raise ConfigError(
                f"sweep takes runs on one task each, got {type(run).__name__}; make them with promptuary.load_run(...)"
            )
    if at_once is not None and (not isinstance(at_once, int) or isinstance(at_once, bool) or at_once < 1):
        raise ConfigError(f"at_once: expected a whole number of at least 1, got {at_once!r}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("a sweep runs in one process; start one sweep per process, with other runs in each")
    folders: dict[str, int] = {}
    for number, run in enumerate(runs, start=1):
        there = folders.setdefault(os.path.abspath(run.out), number)
        if there != number:
            raise ConfigError(f"runs {there} and {number} have the same folder {run.out}; give each its own `out`")
    if len(runs) > 1 and runs[0].backbone.dropout:
        raise ConfigError(
            "backbone.dropout draws noise for a whole batch, so a run in common batches would draw another one; set "
            "backbone.dropout: false, or train the runs one by one"
        )
    for number, run in enumerate(runs[1:], start=2):
        for name, mine, other in _differing(runs[0], run):
            raise ConfigError(
                f"runs 1 and {number} differ in {name} ({mine!r} and {other!r}), which runs of one sweep share; make "
                "it the same, or train them one by one"
            )


def _differing(one: AnyRun, other: AnyRun) -> Iterator[tuple[str, Any, Any]]:
    """Shared settings that are not the same: name, and both values."""
    for name in SHARED:
        mine, theirs = (_value(run, name) for run in (one, other))
        if isinstance(mine, dict) and isinstance(theirs, dict):
            for key in sorted({*mine, *theirs}):
                if mine.get(key) != theirs.get(key):
                    yield f"{name}.{key}", mine.get(key), theirs.get(key)
        elif mine != theirs:
            yield name, mine, theirs


def _value(run: AnyRun, name: str) -> Any:
    value: Any = run.model_dump(mode="json")
    for part in name.split("."):
        value = value[part]
    return value


def _check_tasks(trainings: Sequence[Training]) -> None:
    """What was left open in the task must have been settled in the same way by all data sets."""
    for number, one in enumerate(trainings, start=1):
        if len(trainings) > 1 and not issubclass(one.staging.solver_class, GradientSolver):
            raise ConfigError(
                f"run {number} is solved by {one.staging.solver_class.name}, whose candidates fill the batches; "
                "train it alone"
            )
    for number, one in enumerate(trainings[1:], start=2):
        if _prompt(one).task.settled() != _prompt(trainings[0]).task.settled():
            raise ConfigError(
                f"the data of runs 1 and {number} have other labels, so their rows cannot be scored together; spell "
                "task.labels out, or train them one by one"
            )


def _results(parts: Sequence[Part]) -> list[Result]:
    failed = [part for part in parts if part.error is not None]
    if failed:
        error, folder = failed[0].error, failed[0].training.folder.path
        assert error is not None
        others = f"; {len(failed) - 1} others failed too" if len(failed) > 1 else ""
        raise type(error)(f"{folder}: {error} ({len(parts) - len(failed)} of {len(parts)} runs finished{others})")
    return [part.result for part in parts if part.result is not None]
