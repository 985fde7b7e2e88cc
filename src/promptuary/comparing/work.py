"""Working a comparison off: whatever is not settled and not in the hands of another process is taken and run.

Knows no method, task or family by name, and prints nothing: it tells.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from promptuary import memory
from promptuary.backbones.base import Backbone
from promptuary.building import open_backbone
from promptuary.comparing import tuning
from promptuary.comparing.claims import claim
from promptuary.comparing.ledger import Ledger, Unit
from promptuary.comparing.rows import remember
from promptuary.errors import Interrupted, MissingExtra, PromptuaryError, StorageError
from promptuary.listening import Listener, Stop
from promptuary.metrics import METRICS
from promptuary.run import BaselineRun, Run
from promptuary.training import Result, train

EVERY = 30.0
"""Seconds between two lines on a run that is under way (our choice)."""

PAUSE = 0.2
"""Seconds between looks at what other processes have in hand (our choice)."""


class Watch(Listener):
    """Looks at a run as it goes: says now and then how far it is, and stops it when nobody wants it any more."""

    def __init__(self, name: str, tell: Callable[[str], None], stop: Stop, parent: int | None) -> None:
        """Of one run; `parent` is the process without which it is to stop."""
        self.name, self.tell, self.stop, self.parent = name, tell, stop, parent
        self.told = time.monotonic()

    def stepped(self, row: Mapping[str, Any]) -> None:
        """After each step."""
        if self.parent is not None and os.getppid() != self.parent:
            self.stop.request(signal.SIGTERM)
        if time.monotonic() - self.told > EVERY:
            self.told = time.monotonic()
            self.tell(f"{self.name}: step {row['step']} of {row['steps']}")


class Worker:
    """One process at work on a comparison; any number of them may share its folder."""

    def __init__(self, ledger: Ledger, tell: Callable[[str], None], *, parent: int | None = None) -> None:
        """Nothing is loaded yet.

        Args:
            ledger: of the comparison.
            tell: is given a line for each piece of work that is done.
            parent: stop when this process is no longer the one that started this.
        """
        self.ledger, self.tell, self.parent = ledger, tell, parent
        self.config = ledger.job.config
        self._backbone: tuple[str, Backbone] | None = None

    def work(self) -> None:
        """Until every piece is settled, by this process or another.

        Raises:
            Interrupted: a stop was asked for; what was under way is saved.
            PromptuaryError: the folder cannot be written, or a package is missing.
        """
        left = self.ledger.units
        total = len(left)
        try:
            while left := [unit for unit in left if not self.ledger.settled(unit)]:
                before = len(left)
                for unit in left:
                    # what is behind it in the list may have been settled by others meanwhile
                    if self.ledger.ready(unit) and not self.ledger.settled(unit):
                        before -= self._take(unit, total)
                if before == len(left):
                    self._wait()
        except KeyboardInterrupt:
            raise Interrupted("stopped between two runs") from None

    def _wait(self) -> None:
        if self.parent is not None and os.getppid() != self.parent:
            raise Interrupted("the process that started this worker is gone", signal.SIGTERM)
        time.sleep(PAUSE)

    def _take(self, unit: Unit, total: int) -> bool:
        """Do one piece, unless another process does it; whether it was done here."""
        with claim(self.ledger.lock(unit)) as mine:
            if not mine or self.ledger.settled(unit):
                return False
            began = time.perf_counter()
            said = self._trial(unit) if unit.trial is not None else self._tested(unit)
            self.tell(f"{unit}: {said} ({time.perf_counter() - began:.1f} s)")
            return True

    # ---- one piece --------------------------------------------------------------------------------------------------

    def _trial(self, unit: Unit) -> str:
        """Propose settings, validate them with every tuning seed, and write down what came of it."""
        how, number, ledger = self.config.tuning, unit.trial, self.ledger
        assert how is not None
        assert number is not None
        record = ledger.trial(unit)
        if record is None:
            settings, asked = tuning.propose(unit.group, number, how, ledger.path)
            # before anything is run, so that a trial that is taken over has the settings that it was begun with
            record = {"trial": number, "settings": settings, "optuna": asked, "state": "begun"}
            ledger.write_trial(unit, record)
        scores, metric, error, folders = dict[str, float](), "", None, list[Path]()
        for seed in how.seeds:
            run = unit.group.run(record["settings"], seed=seed)
            folder = ledger.trial_folder(unit.group) / f"trial-{number:03}--seed-{seed}--{run.hash()[:8]}"
            folders.append(folder)
            try:
                facts = self._run(unit, run.model_copy(update={"out": str(folder)}), tested=False).facts
            except (Interrupted, StorageError, MissingExtra):
                raise
            except PromptuaryError as raised:
                error = str(raised)
                break
            metric = facts["primary_metric"]
            found = facts["validation"][metric]
            if found is None or not math.isfinite(found):
                error = f"the validation score of seed {seed} is not finite"
                break
            scores[str(seed)] = found
        score = None if error is not None else sum(scores.values()) / len(scores)
        higher = METRICS[metric].higher_is_better if metric else True
        record |= {"validation": scores, "score": score, "primary_metric": metric, "higher_is_better": higher}
        record |= {"state": "done" if error is None else "failed", **({} if error is None else {"error": error})}
        if record["optuna"] is not None:
            tuning.tell(unit.group, record["optuna"], score if higher or score is None else -score, ledger.path)
        ledger.write_trial(unit, record)
        for folder in folders:
            ledger.clear_trial(folder)
        return f"failed: {error}" if score is None else f"validation {metric} {score:.4f}"

    def _tested(self, unit: Unit) -> str:
        """Train with the chosen settings, and test once."""
        run = self.ledger.run(unit)
        assert run is not None
        try:
            facts = self._run(unit, run).facts
        except (Interrupted, StorageError, MissingExtra):
            raise
        except PromptuaryError as error:
            if self.ledger.result(unit) is not None:
                return f"finished, but {error}"
            self.ledger.fail(unit, str(error), run.hash())
            return f"failed: {error}"
        remember(self.ledger.path, Path(run.out), facts)
        primary = facts["primary_metric"]
        return f"{primary} {facts['metrics'][primary]:.4f}"

    def _run(self, unit: Unit, run: Run | BaselineRun, *, tested: bool = True) -> Result:
        """A run, from where it stands."""
        stop = Stop(hard=True)
        memory.forget_peak(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        base = None if isinstance(run, BaselineRun) else self._base(run)
        watch = Watch(str(unit), self.tell, stop, self.parent)
        return train(run, resume=True, listener=watch, backbone=base, stop=stop, tested=tested)

    def _base(self, run: Run) -> Backbone:
        """The frozen model of a run; the one before stays loaded as long as it is the same."""
        wanted = run.backbone.model_dump_json()
        if self._backbone is None or self._backbone[0] != wanted:
            self._backbone = None
            gc.collect()
            with contextlib.suppress(RuntimeError):  # no accelerator
                torch.cuda.empty_cache()
            self._backbone = wanted, open_backbone(run.backbone)
        return self._backbone[1]
