"""What of a comparison is done, told by its folder alone: trials, chosen settings, finished and failed runs.

Knows no training; any process may look at any time, and nothing is remembered that another one could change.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from promptuary import files
from promptuary.comparing import tuning
from promptuary.comparing.job import FILE, Group, Job
from promptuary.errors import ConfigError, FileFormatError, StorageError
from promptuary.run import BaselineRun, Run
from promptuary.runs import RunFolder
from promptuary.weights import FOLDER as WEIGHTS

RUNS, TRIALS, FAILED, LOCKS = "runs", "trials", "failed", ".locks"
"""Folders of a comparison: tested runs, trials, what failed, and who is at work on what."""

NOT_A_TRIALS = ("checkpoints", "prompt", WEIGHTS)
"""What is deleted from the runs of a finished trial: their scores are all that is used."""


@dataclass(frozen=True)
class Unit:
    """One piece of work: a trial of a group by its number, or a tested run of it by its seed."""

    group: Group
    trial: int | None = None
    seed: int | None = None

    @property
    def name(self) -> str:
        """Of its lock and of its failure."""
        kind = f"trial-{self.trial:03}" if self.trial is not None else f"seed-{self.seed}"
        return f"{self.group.name}--{kind}"

    def __str__(self) -> str:
        """As people read it."""
        kind = f"trial {self.trial}" if self.trial is not None else f"seed {self.seed}"
        return f"{self.group.method} on {self.group.task} ({self.group.backbone}, {self.group.budget}), {kind}"


class Ledger:
    """The folder of one comparison."""

    def __init__(self, job: Job) -> None:
        """Nothing is read yet."""
        self.job, self.path = job, job.out
        self._chosen: dict[Group, Mapping[str, Any]] = {}
        self._done: dict[Unit, dict[str, Any]] = {}

    def open(self) -> None:
        """Make the folder and write the resolved comparison into it.

        Raises:
            ConfigError: it holds other things.
            StorageError: it cannot be written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"out: {self.path} is a file; choose a folder")
        try:
            held = {one.name for one in self.path.iterdir()} if self.path.exists() else set()
        except OSError as error:
            raise StorageError(f"out: {self.path} cannot be read: {error.strerror}") from error
        if FILE not in held and any(not name.startswith(".tmp-") for name in held):
            raise ConfigError(f"out: {self.path} is not empty and holds no comparison; choose another folder")
        files.write_file(self.path / FILE, self.job.config.to_yaml().encode())

    @property
    def units(self) -> list[Unit]:
        """All work, in an order in which one process can do it."""
        found = []
        for group in self.job.groups:
            found += [Unit(group, trial=number) for number in range(group.trials)]
            found += [Unit(group, seed=seed) for seed in self.job.config.seeds]
        return found

    # ---- trials -----------------------------------------------------------------------------------------------------

    def trial_folder(self, group: Group) -> Path:
        """Where the trials of a group stand; another space, or other common settings, have another folder."""
        assert self.job.config.tuning is not None
        how = self.job.config.tuning
        return self.path / TRIALS / f"{group.name}--{group.hash(how.sampler, how.seeds)}"

    def trial(self, unit: Unit) -> dict[str, Any] | None:
        """The record of a trial, which may be under way; None before it has begun, or if it is damaged."""
        try:
            return files.read_json(self.trial_folder(unit.group) / f"trial-{unit.trial:03}.json")
        except FileFormatError:
            return None

    def write_trial(self, unit: Unit, record: Mapping[str, Any]) -> None:
        """Write the record of a trial."""
        files.write_json(self.trial_folder(unit.group) / f"trial-{unit.trial:03}.json", record)

    def clear_trial(self, folder: Path) -> None:
        """Delete what is large and unused in the run of a trial."""
        for name in NOT_A_TRIALS:
            shutil.rmtree(folder / name, ignore_errors=True)

    def chosen(self, group: Group) -> Mapping[str, Any] | None:
        """The best trial of a group; one without `settings` if all failed; None while there are some to do."""
        if not group.trials:
            return {"settings": {}}
        if group not in self._chosen:
            records = [self.trial(Unit(group, trial=number)) for number in range(group.trials)]
            done = [one for one in records if one is not None and one["state"] != "begun"]
            if len(done) < group.trials:
                return None
            self._chosen[group] = tuning.best(done) or {"error": f"no trial gave a score: {done[-1].get('error')}"}
        return self._chosen[group]

    # ---- tested runs ------------------------------------------------------------------------------------------------

    def run(self, unit: Unit) -> Run | BaselineRun | None:
        """The tested run of a unit with the chosen settings; None while they are not known."""
        chosen = self.chosen(unit.group)
        if chosen is None or "settings" not in chosen or unit.seed is None:
            return None
        run = unit.group.run(chosen["settings"], seed=unit.seed)
        folder = self.path / RUNS / f"{unit.group.name}--seed-{unit.seed}--{run.hash()[:8]}"
        return run.model_copy(update={"out": str(folder)})

    def result(self, unit: Unit) -> dict[str, Any] | None:
        """result.json of a tested run that is finished."""
        if unit not in self._done:
            run = self.run(unit)
            if run is None:
                return None
            facts = RunFolder(run.out, (WEIGHTS if isinstance(run, BaselineRun) else "prompt",)).finished()
            if facts is None or facts.get("run_hash") != run.hash():
                return None
            self._done[unit] = facts
        return self._done[unit]

    # ---- states -----------------------------------------------------------------------------------------------------

    def failed(self, unit: Unit) -> str | None:
        """Why a tested run failed."""
        chosen = self.chosen(unit.group)
        if unit.trial is not None or chosen is None:
            return None
        if "settings" not in chosen:
            return str(chosen["error"])
        try:
            found = files.read_json(self._failure(unit))
        except FileFormatError:
            return None
        run = self.run(unit)
        return str(found["error"]) if run is not None and found.get("run_hash") == run.hash() else None

    def fail(self, unit: Unit, error: str, run_hash: str) -> None:
        """Remember it."""
        files.write_json(self._failure(unit), {"unit": unit.name, "error": error, "run_hash": run_hash})

    def forget_failures(self) -> None:
        """Let what failed be tried again, trials too."""
        shutil.rmtree(self.path / FAILED, ignore_errors=True)
        for record in (self.path / TRIALS).glob("*/trial-*.json"):
            if files.read_json(record).get("state") == "failed":
                record.unlink()

    def _failure(self, unit: Unit) -> Path:
        return self.path / FAILED / f"{unit.name}.json"

    def lock(self, unit: Unit) -> Path:
        """Its lock."""
        return self.path / LOCKS / f"{unit.name}.lock"

    def settled(self, unit: Unit) -> bool:
        """Whether nothing is left to do for it."""
        if unit.trial is not None:
            record = self.trial(unit)
            return record is not None and record["state"] != "begun"
        return self.result(unit) is not None or self.failed(unit) is not None

    def ready(self, unit: Unit) -> bool:
        """Whether it can be begun: a tested run waits for the trials of its group."""
        return unit.trial is not None or self.chosen(unit.group) is not None
