"""The leaderboard as numbers: methods by tasks, means and spreads over seeds, ranks, costs, and what is shown by them.

Knows no page and no file. Every statistic here is a plain one, from the runs alone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from promptuary import metrics
from promptuary.report import variants
from promptuary.report.found import Seen
from promptuary.report.values import number as finite

REFERENCE = "prompt_tuning"
"""The method that times and memory are ratios to; Lester et al. 2021, the simplest there is."""

SHARES = frozenset({"accuracy", "macro_f1", "f1", "exact_match", "token_f1"})
"""Scores from 0 to 1, which are read as points of 100."""

SMALL = 200
"""Test sets up to this many examples are marked; one example is half a point there; our choice."""

_STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""Student's t for 95 % on both sides, by degrees of freedom from 1."""


@dataclass(frozen=True)
class Cell:
    """One method on one task: its runs with a score, one for each seed.

    `spread`: standard deviation over seeds. `interval`: around the mean, wide enough for both the seeds (Student's t)
    and the examples (mean of the runs' bootstrap intervals); None where neither is known.
    """

    runs: tuple[Seen, ...]
    mean: float
    spread: float | None
    interval: tuple[float, float] | None

    @property
    def seeds(self) -> int:
        """How many runs, each with a seed of its own."""
        return len(self.runs)

    def median(self, name: str) -> float | None:
        """Of a number that the results have."""
        found = [value for run in self.runs if (value := _number(run, name)) is not None]
        return statistics.median(found) if found else None


@dataclass
class Column:
    """One task on one model with one size of data. `per_example`: points that one test example is worth."""

    name: str
    metric: str
    higher: bool
    share: bool
    tests: tuple[int, ...] = ()

    @property
    def per_example(self) -> float | None:
        """Points of 100, where the score is a share of examples."""
        return 100 / min(self.tests) if self.metric in ("accuracy", "exact_match") and self.tests else None

    def shown(self, value: float) -> str:
        """A score as it is read."""
        return f"{100 * value:.1f}" if self.share else f"{value:.4g}"


@dataclass
class Row:
    """One method, or one variant of it: a cell for each column where it has scores, and how many runs have not ended.

    `settings`: those that tell variants of this method apart. `time`, `memory`: ratios to `REFERENCE`.
    """

    name: str
    method: str
    settings: Mapping[str, str]
    cells: dict[int, Cell] = field(default_factory=dict)
    pending: int = 0
    rank: float | None = None
    time: float | None = None
    memory: float | None = None

    def range(self, name: str) -> tuple[float, float] | None:
        """Least and largest median over the columns."""
        found = [value for cell in self.cells.values() if (value := cell.median(name)) is not None]
        return (min(found), max(found)) if found else None


@dataclass(frozen=True)
class Standing:
    """The whole table, best average rank first. `shared`: what all columns have in common, by what it is.

    `keys`: of the columns, as `variants.column_of` gives them.
    """

    columns: tuple[Column, ...]
    keys: tuple[tuple[str, ...], ...]
    rows: tuple[Row, ...]
    shared: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    group: Mapping[str, tuple[int, int]]
    """Place of a run -> its row and its column."""


@dataclass(frozen=True)
class Verdict:
    """What the runs show about the best of a column, in words.

    `best`: its row, only if it is above all others; `compares`: whether there is more than one method.
    """

    column: str
    text: str
    best: int | None
    compares: bool = True


def standing(runs: Sequence[Seen]) -> Standing:
    """Put runs into rows and columns.

    Args:
        runs: of any methods and tasks, ended or not.
    """
    notes = list[str]()
    column_of = _columns(runs)
    keys = list(dict.fromkeys(column_of.values()))
    names, shared = variants.column_names(keys) if keys else ([], [])
    columns = [
        Column(name, key[1], _higher(key[1]), _plain(key[1]) in SHARES) for name, key in zip(names, keys, strict=True)
    ]
    places = {key: place for place, key in enumerate(keys)}
    found = _rows(runs, {run: places[key] for run, key in column_of.items()}, notes)
    for place, column in enumerate(columns):
        tests = {one for row, _ in found if place in row.cells for run in row.cells[place].runs if (one := _tests(run))}
        column.tests = tuple(sorted(tests))
        if len(tests) > 1:
            notes.append(f"{column.name}: runs have test sets of different sizes ({_listed(map(str, column.tests))})")
    _rank([row for row, _ in found], columns)
    for name in ("seconds_per_step_median", "peak_memory_bytes"):
        _ratios([row for row, _ in found], len(columns), name)
    found.sort(key=lambda one: _order(one[0], columns))
    group = {run: (place, column) for place, (_, inside) in enumerate(found) for run, column in inside.items()}
    return Standing(tuple(columns), tuple(keys), tuple(row for row, _ in found), tuple(shared), tuple(notes), group)


def _columns(runs: Sequence[Seen]) -> dict[str, tuple[str, ...]]:
    """Each run's column; a run that has not been validated yet goes where others like it stand."""
    found = {run.place: variants.column_of(run) for run in runs}
    named = {(key[0], *key[2:]): key for key in found.values() if key[1]}
    return {place: named.get((key[0], *key[2:]), key) for place, key in found.items()}


def _rows(runs: Sequence[Seen], column_of: Mapping[str, int], notes: list[str]) -> list[tuple[Row, dict[str, int]]]:
    """Rows, each with its runs and their columns."""
    by_method = dict[str, list[Seen]]()
    for run in runs:
        by_method.setdefault(run.method, []).append(run)
    found = list[tuple[Row, dict[str, int]]]()
    for method, own in by_method.items():
        columns = dict[int, list[Mapping[str, str]]]()
        for run in own:
            columns.setdefault(column_of[run.place], []).append(run.settings)
        paths = variants.telling(list(columns.values()))
        groups = dict[tuple[str, ...], list[Seen]]()
        for run in own:
            key = tuple(run.settings.get(path, variants.ABSENT) for path in paths)
            groups.setdefault(key, []).append(run)
        named = variants.smallest(paths, [group[0].settings for group in groups.values()])
        for group in groups.values():
            own_values = {path: group[0].settings.get(path, variants.ABSENT) for path in paths}
            name = variants.variant_name(method, named, own_values)
            same = 1 + sum(row.name.partition(" · ")[0] == name for row, _ in found)
            row = Row(name if same == 1 else f"{name} · {same}", method, own_values)
            inside = {run.place: column_of[run.place] for run in group}
            row.pending = sum(not run.finished for run in group)
            for place in sorted(set(inside.values())):
                cell = _cell([run for run in group if inside[run.place] == place], row.name, notes)
                if cell is not None:
                    row.cells[place] = cell
            found.append((row, inside))
    return found


def _cell(runs: Sequence[Seen], name: str, notes: list[str]) -> Cell | None:
    """The first run of each seed that has a score."""
    by_seed = dict[tuple[str | None, str | None], Seen]()
    again = without = 0
    for run in runs:
        if not run.finished:
            continue
        if run.score is None:
            without += 1
            continue
        key = (run.settings.get("seed"), run.settings.get("data.split_seed"))
        again += key in by_seed
        by_seed.setdefault(key, run)
    if without:
        notes.append(f"{name}: the score of {without:,} runs is no number; they are not counted")
    if again:
        notes.append(f"{name}: {again:,} runs repeat a seed; each seed is counted once")
    if not by_seed:
        return None
    chosen = tuple(by_seed.values())
    scores = [run.score for run in chosen if run.score is not None]
    mean = math.fsum(scores) / len(scores)
    spread = statistics.stdev(scores) if len(scores) > 1 else None
    return Cell(chosen, mean, spread, _interval(chosen, mean, spread))


def _interval(runs: Sequence[Seen], mean: float, spread: float | None) -> tuple[float, float] | None:
    """Wide enough for seeds and for examples."""
    ends = list[float]()
    if spread is not None:
        half = _STUDENT[min(len(runs) - 1, len(_STUDENT)) - 1] * spread / math.sqrt(len(runs))
        ends += [mean - half, mean + half]
    intervals = [run.interval for run in runs if run.interval is not None]
    if len(intervals) == len(runs):
        ends += [math.fsum(one[side] for one in intervals) / len(intervals) for side in (0, 1)]
    return (min(ends), max(ends)) if ends else None


def ranked(means: Mapping[int, float], *, higher: bool) -> dict[int, float]:
    """Rank of each, 1 for the best; equal ones share the mean of their ranks."""
    order = sorted(means, key=lambda one: -means[one] if higher else means[one])
    found = dict[int, float]()
    for one in order:
        equal = [place for place, other in enumerate(order, start=1) if means[other] == means[one]]
        found[one] = sum(equal) / len(equal)
    return found


def _rank(rows: Sequence[Row], columns: Sequence[Column]) -> None:
    ranks = dict[int, list[float]]()
    for place, column in enumerate(columns):
        means = {number: row.cells[place].mean for number, row in enumerate(rows) if place in row.cells}
        for number, rank in ranked(means, higher=column.higher).items():
            ranks.setdefault(number, []).append(rank)
    for number, found in ranks.items():
        rows[number].rank = math.fsum(found) / len(found)


def _ratios(rows: Sequence[Row], columns: int, name: str) -> None:
    """Each row's cost over the reference's in the same column on the same machine; the median of what there is."""
    ratios = dict[int, list[float]]()
    for place in range(columns):
        known = [row.cells[place] for row in rows if row.method == REFERENCE and place in row.cells]
        if not known:
            continue
        cell = max(known, key=lambda one: one.seeds)
        for machine in {run.machine for run in cell.runs if run.machine}:
            base = [value for run in cell.runs if run.machine == machine and (value := _number(run, name))]
            if not base:
                continue
            of = statistics.median(base)
            for number, row in enumerate(rows):
                inside = row.cells[place].runs if place in row.cells else ()
                values = [_number(run, name) for run in inside if run.machine == machine]
                ratios.setdefault(number, []).extend(value / of for value in values if value is not None)
    for number, found in ratios.items():
        if found and name == "seconds_per_step_median":
            rows[number].time = statistics.median(found)
        elif found:
            rows[number].memory = statistics.median(found)


def _order(row: Row, columns: Sequence[Column]) -> tuple[int, float, float, str]:
    """The best first: whole rows, then others, then what has no score."""
    first = next(iter(row.cells), None)
    mean = 0.0 if first is None else row.cells[first].mean * (-1 if columns[first].higher else 1)
    return (len(columns) - len(row.cells), math.inf if row.rank is None else row.rank, mean, row.name)


def verdict(found: Standing, place: int) -> Verdict:
    """What is shown about the best method of a column: two are told apart only if their intervals do not meet."""
    column = found.columns[place]
    cells = {number: row.cells[place] for number, row in enumerate(found.rows) if place in row.cells}
    if not cells:
        return Verdict(column.name, "No run has ended yet.", None, compares=False)
    best = min(cells, key=lambda one: -cells[one].mean if column.higher else cells[one].mean)
    name, top = found.rows[best].name, cells[best]
    if len(cells) == 1:
        text = f"Only {name} has scores here; there is nothing to compare it with."
        return Verdict(column.name, text, None, compares=False)
    alike, single = list[str](), top.seeds == 1
    for number, cell in cells.items():
        if number != best and _meet(top, cell):
            alike.append(found.rows[number].name)
        single = single or cell.seeds == 1
    which = "highest" if column.higher else "lowest"
    text = f"{name} has the {which} mean ({column.shown(top.mean)})."
    if alike:
        rest = len(cells) - 1 - len(alike)
        others = f" It is apart from the {rest} other{'s' if rest > 1 else ''}." if rest else ""
        return Verdict(column.name, f"{text} No difference is shown from {_listed(alike, 6)}.{others}", None)
    if single:
        told = "Its interval meets no other, but some of these have one seed, which says nothing of other seeds."
        return Verdict(column.name, f"{text} {told}", None)
    return Verdict(column.name, f"{text} Its interval meets none of the others.", best)


def _meet(one: Cell, other: Cell) -> bool:
    """Whether two intervals have a point in common; what is not known may be anywhere."""
    if one.interval is None or other.interval is None:
        return True
    return one.interval[0] <= other.interval[1] and other.interval[0] <= one.interval[1]


def _number(run: Seen, name: str) -> float | None:
    if name == "bytes":
        return None if run.bytes is None else float(run.bytes)
    return finite(run.result.get(name))


def _tests(run: Seen) -> int | None:
    return run.examples("test") or None


def _plain(metric: str) -> str:
    """The metric itself; of one task among several it is written as `task/accuracy`."""
    return metric.rpartition("/")[2]


def _higher(metric: str) -> bool:
    known = metrics.METRICS.get(_plain(metric))
    return known is None or known.higher_is_better


def _listed(texts: Iterable[str], most: int = 12) -> str:
    """Some of them, and how many more."""
    found = list(texts)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more
