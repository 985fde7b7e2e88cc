"""The charts of a board: score against cost, learning curves, curves over a size, a heat map, robustness.

Knows no page; what is left out for want of room is counted, so that a page can say it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from promptuary.report import variants
from promptuary.report.charts import LOOKS, Chart, Point, Series, chart, thinned
from promptuary.report.found import Seen
from promptuary.report.standing import Cell, Column, Row, Standing
from promptuary.report.values import number

FLAT = 0.1
"""Least range of a share over which a heat map goes from pale to full: small differences stay pale; our choice."""


WARMTH = 10
"""Steps of colour in a heat map."""


@dataclass(frozen=True)
class Charts:
    """Some charts, and how many charts and series had no room."""

    charts: tuple[Chart, ...]
    left_out: int = 0
    series_left_out: int = 0


@dataclass(frozen=True)
class Warm:
    """A square of the heat map: its score as it is read, and how strongly it is coloured, from 0 to `WARMTH`."""

    shown: str
    level: int


def costs(found: Standing, most: int) -> Charts:
    """Score against trained numbers, a chart for each column with at least two methods."""
    charts = []
    for place, column in enumerate(found.columns):
        series = []
        for index, row in enumerate(found.rows):
            cell = row.cells.get(place)
            trained = None if cell is None else cell.median("trainable_parameters")
            if cell is None or trained is None:
                continue
            low, high = _ends(cell)
            title = f"{row.name}: {_brief(cell, column)}, {trained:,.0f} trained"
            series.append(Series(row.name, str(index + 1), index, (Point(trained, cell.mean, low, high, title),)))
        if len(series) > 1:
            charts.append(_chart(column, column.name, series, "trained numbers", log=True, dotted=True))
    return Charts(tuple(charts[:most]), max(0, len(charts) - most))


def curves(found: Standing, runs: Mapping[str, Seen], most: int, points: int) -> Charts:
    """Validation scores by step, mean over seeds, from the lowest to the highest seed.

    A step counts where at least half of the seeds have it: some may have stopped early.
    """
    inside = dict[tuple[int, int], list[Seen]]()
    for name, group in found.group.items():
        if runs[name].curve:
            inside.setdefault(group, []).append(runs[name])
    charts, left_out = [], 0
    for place, column in enumerate(found.columns):
        series = []
        for index, row in enumerate(found.rows):
            own = inside.get((index, place), [])
            scores = dict[int, list[float]]()
            for run in own:
                for step, score in run.curve:
                    scores.setdefault(step, []).append(score)
            steps = thinned(sorted(step for step, all in scores.items() if 2 * len(all) >= len(own)), points)
            line = tuple(Point(step, _mean(scores[step]), min(scores[step]), max(scores[step])) for step in steps)
            if len(line) > 1:
                series.append(Series(row.name, str(index + 1), index, line))
        left_out += max(0, len(series) - LOOKS)
        if series:
            charts.append(_chart(column, column.name, series[:LOOKS], "steps", on=" on validation"))
    return Charts(tuple(charts[:most]), max(0, len(charts) - most), left_out)


def sizes(found: Standing, most: int) -> Charts:
    """Score over a setting that is a whole number, where rows of a method differ in nothing else, or columns do so."""
    charts, left_out = [], 0
    by_name = dict[tuple[str, str], tuple[Column, list[Series]]]()
    for path, place, rows in _one_size(found):
        column = found.columns[place]
        points = [_at(size, found.rows[index], found.rows[index].cells[place], column) for size, index in rows]
        _, lines = by_name.setdefault((path, column.name), (column, []))
        method = found.rows[rows[0][1]].method
        lines.append(Series(method, str(len(lines) + 1), len(lines), tuple(points)))
    for (path, name), (column, lines) in by_name.items():
        left_out += max(0, len(lines) - LOOKS)
        charts.append(_chart(column, f"{path.rpartition('.')[2]}: {name}", lines[:LOOKS], path))
    charts += _shots(found)
    return Charts(tuple(charts[:most]), max(0, len(charts) - most), left_out)


def _chart(
    column: Column,
    title: str,
    series: Sequence[Series],
    across: str,
    *,
    on: str = "",
    log: bool = False,
    dotted: bool = False,
) -> Chart:
    scale = 100.0 if column.share else 1.0
    return chart(title, series, across, column.metric + on, column.shown, log=log, dotted=dotted, scale=scale)


def _at(size: int, row: Row, cell: Cell, column: Column) -> Point:
    low, high = _ends(cell)
    return Point(size, cell.mean, low, high, f"{row.name}: {_brief(cell, column)}")


def _one_size(found: Standing) -> list[tuple[str, int, list[tuple[int, int]]]]:
    """Path, column, and (size, row) by size, of rows that differ in that path alone."""
    result = []
    methods = dict[str, list[int]]()
    for index, row in enumerate(found.rows):
        methods.setdefault(row.method, []).append(index)
    for rows in methods.values():
        paths = variants.telling([[found.rows[index].settings for index in rows]])
        for path in paths:
            if _size(found.rows[rows[0]].settings.get(path)) is None:
                continue
            families = dict[tuple[str, ...], list[tuple[int, int]]]()
            for index in rows:
                settings = found.rows[index].settings
                size = _size(settings.get(path))
                if size is not None:
                    rest = tuple(settings.get(other, "") for other in paths if other != path)
                    families.setdefault(rest, []).append((size, index))
            for family in families.values():
                for place in range(len(found.columns)):
                    there = sorted(one for one in family if place in found.rows[one[1]].cells)
                    if len(there) > 1:
                        result.append((path, place, there))
    return result


def _shots(found: Standing) -> list[Chart]:
    """Score over how many examples of a label were trained on, where columns differ in nothing else."""
    charts = []
    for path in ("data.shots", "data.train_size"):
        families = dict[tuple[str, ...], list[tuple[int, int]]]()
        for place, key in enumerate(found.keys):
            at = 2 + variants.CHOICE.index(path)
            size = _size(key[at])
            if size is not None:
                families.setdefault((*key[:at], *key[at + 1 :]), []).append((size, place))
        for family in families.values():
            series = []
            for index, row in enumerate(found.rows):
                there = [(size, place) for size, place in sorted(family) if place in row.cells]
                if len(there) > 1:
                    points = tuple(_at(size, row, row.cells[place], found.columns[place]) for size, place in there)
                    series.append(Series(row.name, str(index + 1), index, points))
            if series:
                column = found.columns[family[0][1]]
                title = f"{path.rpartition('.')[2]}: {_without_size(column.name)}"
                charts.append(_chart(column, title, series[:LOOKS], path))
    return charts


def _without_size(name: str) -> str:
    return " · ".join(part for part in name.split(" · ") if not part.endswith((" shots", " rows"))) or "all"


def _size(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdecimal() and len(text) < 10 else None


def heat(found: Standing, rows: int, columns: int) -> list[list[Warm | None]]:
    """A line for each row: scores, and where each stands between the lowest and the highest of its column."""
    warm: list[list[Warm | None]] = [[None for _ in found.columns[:columns]] for _ in found.rows[:rows]]
    for place, column in enumerate(found.columns[:columns]):
        means = [row.cells[place].mean for row in found.rows if place in row.cells]
        if not means:
            continue
        low, high = min(means), max(means)
        span = max(high - low, FLAT if column.share else 1e-9)
        for index, row in enumerate(found.rows[:rows]):
            cell = row.cells.get(place)
            if cell is not None:
                part = (cell.mean - low) / span if column.higher else (high - cell.mean) / span
                warm[index][place] = Warm(column.shown(cell.mean), round(WARMTH * part))
    return warm


@dataclass(frozen=True)
class Sturdy:
    """Scores of a row in a column under perturbations, as they are read; `drops`: by the perturbation's name."""

    row: str
    column: str
    clean: str
    mean: str
    worst: str
    under: Mapping[str, str]


def robust(found: Standing) -> list[Sturdy]:
    """Means over the seeds that were tried on perturbed examples."""
    result = []
    for row in found.rows:
        for place, cell in sorted(row.cells.items()):
            column = found.columns[place]
            told = [parts for run in cell.runs if (parts := _tried(run))]
            if not told:
                continue
            kinds = [name for name in told[0] if all(name in parts for parts in told)]
            means = {name: _mean([parts[name] for parts in told]) for name in kinds}
            clean = means.pop("", None)
            if not means:
                continue
            worst = min(means, key=lambda name: means[name] if column.higher else -means[name])
            result.append(
                Sturdy(
                    row.name,
                    column.name,
                    "" if clean is None else column.shown(clean),
                    column.shown(_mean(list(means.values()))),
                    f"{worst} {column.shown(means[worst])}",
                    {name: column.shown(value) for name, value in means.items()},
                )
            )
    return result


def _tried(run: Seen) -> dict[str, float]:
    """Scores by perturbation, and the clean one under no name, as `Robustness.summary` writes them."""
    summary = run.result.get("robustness")
    perturbed = summary.get("perturbed") if isinstance(summary, Mapping) else None
    if not isinstance(summary, Mapping) or not isinstance(perturbed, Mapping):
        return {}
    metric, found = str(summary.get("metric", run.metric)), {}
    for name, one in (("", summary.get("clean")), *perturbed.items()):
        scores = one.get("scores") if isinstance(one, Mapping) else None
        value = number(scores.get(metric)) if isinstance(scores, Mapping) else None
        if value is not None:
            found[str(name)[:12]] = value
    return found


def told(cell: Cell, column: Column) -> str:
    """A cell in words."""
    spread = "" if cell.spread is None else f" ± {column.shown(cell.spread)}"
    seeds = f"{cell.seeds} seed{'s' if cell.seeds > 1 else ''}"
    between = ""
    if cell.interval is not None:
        between = f", interval {column.shown(cell.interval[0])} to {column.shown(cell.interval[1])}"
    return f"{column.shown(cell.mean)}{spread} ({seeds}){between}"


def _brief(cell: Cell, column: Column) -> str:
    return column.shown(cell.mean) + ("" if cell.spread is None else f" ± {column.shown(cell.spread)}")


def _ends(cell: Cell) -> tuple[float, float]:
    spread = cell.spread or 0.0
    return cell.mean - spread, cell.mean + spread


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
