"""Several tasks in one run: a prompt for each on one frozen model, the parts that they share, and what a run is fed.

Knows no method, family or task by name, no optimiser and no loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from promptuary.backbones.base import Backbone
from promptuary.data.collate import Row, collate, pad_choices
from promptuary.data.mixture import Mixture
from promptuary.data.splits import SPLITS
from promptuary.errors import ConfigError
from promptuary.evaluation import Evaluation
from promptuary.methods.base import Group
from promptuary.metrics import METRICS
from promptuary.passes import outputs
from promptuary.run import JointRun
from promptuary.training_data import Feed
from promptuary.tuned import Tuned
from promptuary.types import Batch, Losses

SHARED = "shared"
"""What stands before the names of tensors that several tasks have in common, where others have their task's name."""

MEAN = "mean"
"""The score of a run: the mean of the first metric over its tasks."""


class Joint:
    """What a run on several tasks trains: one prompt per task, tied where their method shares tensors."""

    def __init__(self, parts: Mapping[str, Tuned], *, one: bool = False) -> None:
        """Tie the prompts, which are initialised already.

        Args:
            parts: by task, on one backbone.
            one: whether all tasks have one and the same prompt, whatever the method shares.

        Raises:
            ConfigError: a task has the name of what is shared, or tensors that should be shared differ in size.
        """
        if SHARED in parts:
            raise ConfigError(f'tasks: "{SHARED}" is the name of what tasks have in common; choose another')
        self.parts = dict(parts)
        self.several = list(parts.values())
        self.backbone: Backbone = self.several[0].backbone
        self._one = one
        for name, tuned in self.parts.items():
            self._tie(name, tuned)

    def _tie(self, task: str, tuned: Tuned) -> None:
        first, method = self.several[0].method, tuned.method
        if method is None or first is None or method is first:
            return
        every = {**dict(method.named_parameters()), **dict(method.named_buffers())}
        for name in sorted(every) if self._one else sorted(method.shared & every.keys()):
            own = getattr(first, name)
            if own.shape != every[name].shape:
                raise ConfigError(
                    f"tasks.{task}: {name} is shared by all tasks, but has shape {tuple(every[name].shape)} here and "
                    f"{tuple(own.shape)} in {next(iter(self.parts))}; give them the same sizes"
                )
            setattr(method, name, own)
            if name in first.start_scale:
                method.start_scale[name] = first.start_scale[name]

    def train(self, mode: bool = True) -> Joint:
        """Of each prompt."""
        for tuned in self.several:
            tuned.train(mode)
        return self

    @property
    def moment(self) -> tuple[int, int] | None:
        """Seed and step of the run, which noise in training is drawn from."""
        return self.several[0].moment

    @moment.setter
    def moment(self, value: tuple[int, int] | None) -> None:
        for tuned in self.several:
            tuned.moment = value

    # ---- what is trained --------------------------------------------------------------------------------------------

    def trained(self) -> list[Group]:
        """Every trained tensor once, under its task's name or as shared."""
        owners: dict[nn.Parameter, list[tuple[str, Group]]] = {}
        for task, tuned in self.parts.items():
            for group in tuned.trained():
                owners.setdefault(group.parameter, []).append((task, group))
        found = []
        for several in owners.values():
            task, group = several[0]
            found.append(replace(group, name=f"{SHARED if len(several) > 1 else task}/{group.name}"))
        return found

    @property
    def text(self) -> None:
        """Words are looked for on one task alone."""
        return None

    def state(self) -> dict[str, Tensor]:
        """Copies of the trained tensors, on the CPU."""
        return {group.name: group.parameter.detach().cpu().clone() for group in self.trained()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put trained tensors back; names and shapes must be the same."""
        with torch.no_grad():
            for group in self.trained():
                group.parameter.copy_(state[group.name])
        for tuned in self.several:
            tuned.train(tuned.training)

    @property
    def trainable_parameters(self) -> int:
        """How many numbers are trained, what is shared counted once."""
        return sum(group.parameter.numel() for group in self.trained())

    @property
    def added_tokens(self) -> int:
        """Positions that the longest prompt adds to an input."""
        return max(tuned.added_tokens for tuned in self.several)

    def constants_digest(self) -> str:
        """Fingerprints of what the methods hold besides what is trained."""
        return "+".join(found for tuned in self.several if (found := tuned.constants_digest()))

    # ---- forward ----------------------------------------------------------------------------------------------------

    def batch(self, rows: Sequence[Row]) -> Batch:
        """Rows of one task, or of several that are read in the same way, as one padded batch."""
        places = [row.part for row in rows]
        if len(set(places)) == 1:
            return self.several[places[0]].batch(rows)
        answers = [self.several[row.part].asking.answers(row) for row in rows]
        bare = [replace(row, choices=None) for row in rows]
        batch = collate(bare, self.backbone.pad, segments=self.backbone.uses_segments, sight=self.backbone.sight)
        if any(answers):
            batch = replace(batch, candidates=pad_choices(answers))
        return batch.to(self.backbone.device)

    def weight(self, batch: Batch) -> int:
        """What the mean loss of a batch is taken over."""
        owners = self._owners(batch)
        return self.several[owners[0]].weight(batch) if len(owners) == 1 else len(batch)

    def loss(self, batch: Batch) -> Losses:
        """Mean loss over `weight(batch)`, from one pass over the rows of all tasks."""
        owners = self._owners(batch)
        if len(owners) == 1:
            return self.several[owners[0]].loss(batch)
        assert batch.part is not None
        at = [(batch.part == owner).nonzero()[:, 0] for owner in owners]
        shares = [(self.several[owner], rows.tolist()) for owner, rows in zip(owners, at, strict=True)]
        total, parts = torch.zeros((), device=batch.input_ids.device), dict[str, float]()
        names = list(self.parts)
        for owner, rows, said in zip(owners, at, outputs(batch, shares), strict=True):
            found = self.several[owner].losses(said, batch.rows(rows))
            total = total + found.total * (len(rows) / len(batch))
            parts[names[owner]] = float(found.total.detach())
        return Losses(total, parts)

    def _owners(self, batch: Batch) -> list[int]:
        """The tasks of the rows."""
        return [0] if batch.part is None else sorted(set(batch.part.tolist()))


class JointFeed:
    """The rows of a run on several tasks, in the order in which it takes them; see `Feed`."""

    def __init__(self, run: JointRun, feeds: Mapping[str, Feed]) -> None:
        """Of the feeds of its tasks.

        Raises:
            ConfigError: rows of a task that writes shall be mixed with others, or rows of others bucketed.
        """
        self.run, self.feeds, self._several = run, dict(feeds), list(feeds.values())
        settings = run.mixture
        mixed = settings.rows == "mixed"
        for name, feed in feeds.items():
            if mixed and feed.tuned.task.reading == "text":
                raise ConfigError(f"task {name} writes text, whose loss counts tokens; use mixture.rows: task")
        self.rows = {split: self._all(split) for split in SPLITS}
        self._prefixes = [feed.tuned.lengths[1] for feed in self._several]
        self._mixture = Mixture(
            [[len(row.encoded.ids) for row in feed.rows["train"]] for feed in self._several],
            run.train.batch_size,
            seed=run.seed,
            strategy=settings.strategy,
            temperature=settings.temperature,
            limit=settings.limit,
            mixed=mixed,
            bucket=run.train.bucket and not mixed,
        )

    def _all(self, split: str) -> list[Row]:
        return [replace(row, part=part) for part, feed in enumerate(self._several) for row in feed.rows[split]]

    def ready(self, check: Callable[[], None]) -> None:
        """Compute what is to be computed once, of every task; see `Feed`."""
        for feed in self._several:
            feed.ready(check)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps that take as many rows as all tasks have together."""
        return math.ceil(len(self.rows["train"]) / self.run.train.batch_size)

    @property
    def steps(self) -> int:
        """Optimiser steps in all."""
        settings = self.run.train
        return settings.steps if settings.epochs is None else max(1, round(settings.epochs * self.steps_per_epoch))

    @property
    def lengths(self) -> list[int]:
        """Tokens of the training texts, in rising order."""
        return sorted(len(row.encoded.ids) for row in self.rows["train"])

    @property
    def added(self) -> int:
        """Positions that the longest prompt takes."""
        return max(feed.added for feed in self._several)

    def notes(self) -> list[str]:
        """What a person should know about the texts."""
        return [f"{name}: {note}" for name, feed in self.feeds.items() for note in feed.notes()]

    def at(self, step: int) -> list[Row]:
        """The rows of one step, in their order; the same whenever it is asked for."""
        places = self._mixture.at(step)
        return [replace(self._several[part].variant(row, step), part=part) for part, row in places]

    def parts(self, rows: Sequence[Row], largest: int | None = None) -> list[Sequence[Row]]:
        """Rows of one process in parts, each of rows that are read in one pass, and none larger than `largest`."""
        kinds: dict[Hashable, list[Row]] = {}
        for row in rows:
            kinds.setdefault(self._kind(row), []).append(row)
        size = max(1, math.ceil(len(rows) / self.run.train.accumulation))
        size = size if largest is None else min(size, largest)
        return [kind[start : start + size] for kind in kinds.values() for start in range(0, len(kind), size)]

    def weight(self, rows: Sequence[Row]) -> float:
        """What the mean loss of these rows is taken over."""
        owners = {row.part for row in rows}
        return self._several[owners.pop()].weight(rows) if len(owners) == 1 else float(len(rows))

    def _kind(self, row: Row) -> Hashable:
        """What rows of one pass have in common."""
        tuned = self._several[row.part].tuned
        prefix = None if tuned.backbone.mixes_prefixes else self._prefixes[row.part]
        return tuned.task.reading, type(row.target), frozenset(row.encoded.slots), prefix


@dataclass(frozen=True)
class JointEvaluation:
    """Scores of every task, named `task/metric`, and the mean of the first metrics; see `Evaluation`."""

    tasks: Mapping[str, Evaluation]
    primary: Mapping[str, str]

    @property
    def scores(self) -> dict[str, float]:
        """All of them, the mean first."""
        firsts = [one.scores[self.primary[name]] for name, one in self.tasks.items()]
        own = {f"{name}/{key}": score for name, one in self.tasks.items() for key, score in one.scores.items()}
        return {MEAN: sum(firsts) / len(firsts), **own}

    @property
    def interval(self) -> None:
        """None: the mean has none."""
        return None

    @property
    def batch_size(self) -> int:
        """The smallest that was needed."""
        return min(one.batch_size for one in self.tasks.values())

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row per example, with its task."""
        for name, one in self.tasks.items():
            for row in one.rows():
                yield {"task": name, **row}


def check_metrics(primary: Mapping[str, str]) -> None:
    """Refuse a mean of scores that do not point in one direction.

    Raises:
        ConfigError: names the task.
    """
    for name, metric in primary.items():
        if not METRICS[metric].higher_is_better:
            raise ConfigError(
                f"tasks.{name}: {metric} is better when it is lower, so it cannot stand in a mean with others; name "
                "another metric first in its task.metrics"
            )
