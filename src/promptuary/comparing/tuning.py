"""Which settings a trial tries: one of a grid, random ones, or those that Optuna proposes after the trials before.

Knows no training and no test split; it is told validation scores.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from promptuary.comparing.job import Group, Range, TuningConfig
from promptuary.errors import require

JOURNAL = "optuna.journal"
"""Optuna's file in the folder of a comparison, shared by all processes."""


def propose(group: Group, number: int, tuning: TuningConfig, out: Path) -> tuple[dict[str, Any], int | None]:
    """The settings of a trial; the same whenever it is asked for, after the same trials.

    Args:
        group: what is tuned.
        number: of the trial, from 0.
        tuning: how.
        out: folder of the comparison.

    Returns:
        Path -> value, and Optuna's own number of the trial, if it made it.

    Raises:
        MissingExtra: Optuna is asked for and not installed.
    """
    if tuning.sampler == "grid":
        lists = [one for one in group.space.values() if isinstance(one, list)]
        return dict(zip(group.space, list(itertools.product(*lists))[number], strict=True)), None
    if tuning.sampler == "random":
        chance = random.Random(f"{group.hash()}-{number}")
        return {path: _drawn(one, chance) for path, one in group.space.items()}, None
    optuna = require("optuna", extra="sweep")
    trial = _study(group, out, number).ask({path: _distribution(optuna, one) for path, one in group.space.items()})
    # lists are asked for by place: they may hold what Optuna cannot
    found = {
        path: one[trial.params[path]] if isinstance(one, list) else trial.params[path]
        for path, one in group.space.items()
    }
    return found, trial.number


def tell(group: Group, number: int, score: float | None, out: Path) -> None:
    """Let Optuna know what became of a trial; what it knows already stays.

    Args:
        group: what is tuned.
        number: Optuna's own.
        score: higher is better; None for a trial that failed.
        out: folder of the comparison.
    """
    optuna = require("optuna", extra="sweep")
    study, state = _study(group, out, 0), optuna.trial.TrialState
    if score is None:
        study.tell(number, state=state.FAIL, skip_if_finished=True)
    else:
        study.tell(number, score, skip_if_finished=True)


def best(records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The trial with the best mean validation score, the first of equal ones; None if all failed."""
    sound = [one for one in records if one["score"] is not None]
    return max(sound, key=lambda one: one["score"] if one["higher_is_better"] else -one["score"], default=None)


def _study(group: Group, out: Path, number: int) -> Any:
    """The study of a group; its sampler draws by group and number, so that a trial asked for again is the same."""
    optuna = require("optuna", extra="sweep")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(out / JOURNAL)),
    )
    seed = int(group.hash(number), 16)
    return optuna.create_study(
        storage=storage,
        sampler=optuna.samplers.TPESampler(seed=seed),
        study_name=f"{group.name}--{group.hash()}",
        direction="maximize",
        load_if_exists=True,
    )


def _distribution(optuna: Any, one: Range | list[Any]) -> Any:
    if isinstance(one, list):
        return optuna.distributions.CategoricalDistribution(list(range(len(one))))
    if one.whole:
        return optuna.distributions.IntDistribution(int(one.low), int(one.high))
    return optuna.distributions.FloatDistribution(one.low, one.high, log=one.log)


def _drawn(one: Range | list[Any], chance: random.Random) -> Any:
    if isinstance(one, list):
        return chance.choice(one)
    if one.whole:
        return chance.randint(int(one.low), int(one.high))
    if one.log:
        return math.exp(chance.uniform(math.log(one.low), math.log(one.high)))
    return chance.uniform(one.low, one.high)
