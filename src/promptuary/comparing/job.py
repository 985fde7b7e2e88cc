"""A comparison as settings: methods x tasks x backbones x data sizes x seeds, checked as a whole before anything runs.

Knows no training, and no file but its own.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, model_validator

from promptuary import config
from promptuary.errors import ConfigError
from promptuary.run import BaselineRun, JointRun, Run
from promptuary.settings import Settings

REFERENCE = "prompt_tuning"
"""The method whose cost is 1 where the settings name none: the plainest one."""

FILE = "compare.yaml"
"""The resolved comparison in its own folder."""

ALL = "all"
"""The data size of a comparison that has none."""

SEARCHED = ("method", "baseline", "solver", "train", "task")
"""Parts of a run in which settings may be searched; data, seed and model are what methods have in common."""

_NAME = re.compile(r"[\w][\w.+-]{0,59}", re.ASCII)


class Range(Settings):
    """Where a setting is searched, if not in a list."""

    low: float = Field(description="smallest value")
    high: float = Field(description="largest value")
    log: bool = Field(False, description="even in its logarithm, as learning rates should be; low is above 0 then")

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low should be below high, got {self.low:g} and {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs low above 0, got {self.low:g}")
        return self

    @property
    def whole(self) -> bool:
        """Whether its values are whole numbers, as both its ends are, and even."""
        return not self.log and self.low.is_integer() and self.high.is_integer() and self.high - self.low > 1


class Entry(Settings):
    """One method as it is compared."""

    method: dict[str, Any] | None = Field(None, description="as in a run file")
    baseline: dict[str, Any] | None = Field(None, description="as in a run file, instead of a method")
    solver: dict[str, Any] | None = Field(None, description="as in a run file")
    train: dict[str, Any] = Field({}, description="what is other than in the common `train`")
    task: dict[str, Any] = Field({}, description="what is other than in the common task, such as head_lr")
    space: dict[str, Range | list[Any]] | None = Field(
        None, description="setting -> the values that are tried, a list or {low, high, log}; {}: nothing is searched"
    )


class TuningConfig(Settings):
    """How settings are chosen: the same number of trials for every method, by validation scores alone."""

    trials: int | None = Field(None, ge=1, description="for each method; of a grid its size, which all must share")
    sampler: Literal["tpe", "random", "grid"] = Field(
        "tpe", description="tpe: Optuna's tree-structured Parzen estimator (Bergstra et al. 2011); grid: all of lists"
    )
    seeds: tuple[int, ...] = Field(
        (1000,), min_length=1, description="each trial runs with these, and its mean validation score counts; no seed "
        "of the comparison may be among them (our choice)",
    )  # fmt: skip


class CompareConfig(Settings):
    """Everything that a comparison is."""

    backbones: dict[str, dict[str, Any]] = Field(min_length=1, description="label -> backbone, as in a run file")
    tasks: dict[str, dict[str, Any]] = Field(min_length=1, description="label -> {task, data} or {suite}")
    methods: dict[str, Entry] = Field(min_length=1, description="label -> method or baseline, with its own settings")
    seeds: tuple[int, ...] = Field(min_length=1, description="of the runs that are tested")
    budgets: dict[str, tuple[int, ...]] = Field(
        {}, description="sizes of the data: shots, train_size -> the sizes that are compared; none: as in the tasks"
    )
    train: dict[str, Any] = Field({}, description="as in a run file, for all")
    tuning: TuningConfig | None = Field(None, description="without it every method runs with its settings as given")
    reference: str | None = Field(
        None, description="the method whose time and memory are 1; without it the first prompt tuning, if there is one"
    )
    out: str = Field("out/compare", min_length=1, description="folder of the comparison; everything is written there")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        for part in ("backbones", "tasks", "methods"):
            odd = next((name for name in getattr(self, part) if not _NAME.fullmatch(name) or "--" in name), None)
            if odd is not None:
                raise ValueError(f'{part}: "{odd}" names a folder too; use letters, digits, ".", "_" and single "-"')
        for what, seeds in (("seeds", self.seeds), ("tuning.seeds", self.tuning.seeds if self.tuning else ())):
            if len(set(seeds)) < len(seeds) or any(seed < 0 for seed in seeds):
                raise ValueError(f"{what}: expected different whole numbers of at least 0, got {list(seeds)}")
        both = sorted(set(self.seeds) & set(self.tuning.seeds)) if self.tuning else []
        if both:
            raise ValueError(f"seed {both[0]} is among seeds and tuning.seeds; what was tuned on is not tested on")
        if self.reference is not None and self.reference not in self.methods:
            raise ValueError(f"reference: no method is called {self.reference} (known: {', '.join(self.methods)})")
        for name, sizes in self.budgets.items():
            if name not in ("shots", "train_size") or not sizes or min(sizes) < 1 or len(set(sizes)) < len(sizes):
                raise ValueError(
                    f"budgets: expected shots or train_size and different sizes, got {name}: {list(sizes)}"
                )
        for label, entry in self.methods.items():
            if self.tuning is not None and entry.space is None:
                raise ValueError(
                    f"methods.{label}: no space; every method is tuned alike: name the settings that are searched, or "
                    "say space: {} where there is nothing to search"
                )
            if self.tuning is None and entry.space:
                raise ValueError(
                    f"methods.{label}: space is searched by trials; say tuning: {{trials: 8}}, or leave it out"
                )
        return self

    def to_yaml(self) -> str:
        """The same as a file."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


@dataclass(frozen=True)
class Group:
    """One method on one task, data size and backbone: what is tuned together, and tested with every seed."""

    backbone: str
    task: str
    method: str
    budget: str
    values: Mapping[str, Any] = field(repr=False, hash=False, compare=False)
    space: Mapping[str, Range | list[Any]] = field(repr=False, hash=False, compare=False)
    trials: int

    @property
    def block(self) -> tuple[str, str, str]:
        """What methods are compared within: backbone, task and data size."""
        return self.backbone, self.task, self.budget

    @property
    def name(self) -> str:
        """The beginning of the names of its folders."""
        return "--".join((self.backbone, self.task, self.method, self.budget))

    def run(
        self, settings: Mapping[str, Any] | None = None, *, seed: int = 0, out: str = "out/run"
    ) -> Run | BaselineRun:
        """A run of it.

        Args:
            settings: what was chosen, path -> value.
            seed: of this run.
            out: its folder.

        Raises:
            ConfigError: names the method and the task.
        """
        text = json.dumps(settings or {}, sort_keys=True)
        if text not in self._known:
            self._known[text] = _built(self, settings or {})
        return self._known[text].model_copy(update={"seed": seed, "out": out})

    def hash(self, *more: Any) -> str:
        """8 hex digits over what is searched from where."""
        space = {path: one.model_dump() if isinstance(one, Range) else one for path, one in self.space.items()}
        content = json.dumps([self._base_hash, space, *more], sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()[:8]

    @functools.cached_property
    def _base_hash(self) -> str:
        return self.run().hash()

    @functools.cached_property
    def _known(self) -> dict[str, Run | BaselineRun]:
        """Runs by their settings as text, which those with other seeds share."""
        return {}


def _built(group: Group, chosen: Mapping[str, Any]) -> Run | BaselineRun:
    """A run with chosen settings.

    Raises:
        ConfigError: names the method and the task.
    """
    where = f"methods.{group.method} on tasks.{group.task} and backbones.{group.backbone}"
    values = group.values
    try:
        values = config.override(values, [(tuple(path.split(".")), value) for path, value in chosen.items()])
        run = config.load_run(values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    if isinstance(run, JointRun):
        raise ConfigError(f"{where}: several tasks in one run cannot be compared; give each a name of its own in tasks")
    return run


@dataclass(frozen=True)
class Job:
    """A comparison whose every run can be built."""

    config: CompareConfig
    groups: list[Group]

    @property
    def out(self) -> Path:
        """Its folder."""
        return Path(self.config.out)

    @property
    def reference(self) -> str | None:
        """The method whose cost is 1."""
        if self.config.reference is not None:
            return self.config.reference
        found = (name for name, one in self.config.methods.items() if (one.method or {}).get("name") == REFERENCE)
        return next(found, None)


def load_job(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), **changes: Any) -> Job:
    """Read a comparison and check every run of it, without data or models.

    Args:
        source: a YAML file, a folder that a comparison has written, or the content as a mapping.
        overrides: `a.b=value` texts, the value in YAML, such as `train.steps=10`.
        changes: top-level fields.

    Raises:
        ConfigError: one line on what is wrong.
    """
    if isinstance(source, Mapping):
        values = dict(source)
    else:
        path = Path(source)
        values = config.read_yaml(path / FILE if path.is_dir() else path)
    for path_, value in (config.parse_override(one) for one in overrides):
        values[path_[0]] = _put(values.get(path_[0]), path_[1:], value)
    compare: CompareConfig = CompareConfig.read({**values, **changes}, where="")
    groups = [
        _group(compare, backbone, task, method, budget)
        for backbone in compare.backbones
        for task in compare.tasks
        for budget in _budgets(compare)
        for method in compare.methods
    ]
    return Job(compare, groups)


def _put(inside: Any, path: Sequence[str], value: Any) -> Any:
    if not path:
        return value
    if inside is not None and not isinstance(inside, Mapping):
        raise ConfigError(f"--set {'.'.join(path)}: what it leads into is {inside!r} and not a mapping")
    there = dict(inside or {})
    return {**there, path[0]: _put(there.get(path[0]), path[1:], value)}


def _budgets(compare: CompareConfig) -> list[tuple[str, int] | None]:
    return [(name, size) for name, sizes in compare.budgets.items() for size in sizes] or [None]


def _group(compare: CompareConfig, backbone: str, task: str, method: str, budget: tuple[str, int] | None) -> Group:
    """One group, with every value that may be searched tried out in a run.

    Raises:
        ConfigError: as `load_job`.
    """
    entry = compare.methods[method]
    own = {part: value for part in ("method", "baseline", "solver") if (value := getattr(entry, part)) is not None}
    given = compare.tasks[task]
    where = f"tasks.{task}"
    unknown = next((key for key in given if key not in ("suite", "task", "data")), None)
    if unknown is not None:
        raise ConfigError(f"{where}: a task has suite, task and data, and not {unknown}")
    try:
        below = config.merge(config.suite(given["suite"]), given) if given.get("suite") is not None else dict(given)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    values = config.merge(below, {"backbone": compare.backbones[backbone], "train": {**compare.train, **entry.train}})
    values = config.merge(values, {**own, **({"task": entry.task} if entry.task else {})})
    if budget is not None:
        values = config.merge(values, {"data": {budget[0]: budget[1]}})
    label = ALL if budget is None else f"{budget[0]}={budget[1]}"
    space = entry.space or {}
    group = Group(backbone, task, method, label, values, space, _trials(compare, method, space))
    group.run()
    for path, one in space.items():
        if path.partition(".")[0] not in SEARCHED or "." not in path or path.endswith(".name"):
            known = ", ".join(f"{part}.*" for part in SEARCHED)
            raise ConfigError(f"methods.{method}.space: {path} cannot be searched; settings in {known} can")
        if isinstance(one, list) and not one:
            raise ConfigError(f"methods.{method}.space.{path}: expected a list of at least one value")
        ends = one if isinstance(one, list) else [int(end) if one.whole else end for end in (one.low, one.high)]
        for value in ends:
            group.run({path: value})
    return group


def _trials(compare: CompareConfig, method: str, space: Mapping[str, Range | list[Any]]) -> int:
    """How many trials a method gets: all the same, or none where nothing is searched.

    Raises:
        ConfigError: there is no number, or a grid has another size.
    """
    tuning = compare.tuning
    if tuning is None or not space:
        return 0
    if tuning.sampler != "grid":
        if tuning.trials is None:
            raise ConfigError("tuning.trials is required: how many settings of every method are tried")
        return tuning.trials
    ranges = next((path for path, one in space.items() if isinstance(one, Range)), None)
    if ranges is not None:
        raise ConfigError(f"methods.{method}.space.{ranges}: a grid takes lists; list its values, or say sampler: tpe")
    sizes = {
        label: functools.reduce(lambda size, one: size * (len(one) if isinstance(one, list) else 0), own.values(), 1)
        for label, entry in compare.methods.items()
        if (own := entry.space)
    }
    wanted = tuning.trials if tuning.trials is not None else next(iter(sizes.values()))
    if sizes[method] != wanted:
        raise ConfigError(
            f"methods.{method}.space: its grid has {sizes[method]} settings and not {wanted}, and every method gets "
            "the same number of trials; change its lists, or say sampler: tpe"
        )
    return wanted


def repeat_command(folder: Path) -> str:
    """The command that repeats a run."""
    return f"promptuary train {shlex.quote(str(folder / 'run.yaml'))} --out out/repeated"


__all__ = [
    "ALL",
    "FILE",
    "CompareConfig",
    "Entry",
    "Group",
    "Job",
    "Range",
    "TuningConfig",
    "load_job",
    "repeat_command",
]
