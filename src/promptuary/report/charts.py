"""Charts as coordinates: lines with bands, dots with whiskers, and a heat map, for a template to write as SVG.

Knows no run, method or page; names and numbers come with the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 420, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 16, 18, 40

LOOKS = 8
"""Different colours and dashes; what comes after them is grey."""


@dataclass(frozen=True)
class Point:
    """A value with its ends; both ends are the value where nothing spreads. `title`: what it says when pointed at."""

    x: float
    y: float
    low: float
    high: float
    title: str = ""


@dataclass(frozen=True)
class Series:
    """Points of one thing; `mark` is a short text that stands at them, `look` its colour."""

    name: str
    mark: str
    look: int
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Tick:
    """A place on an axis, and what stands there."""

    at: float
    text: str


@dataclass(frozen=True)
class Drawn:
    """A series in the chart's units: its line and its band as SVG paths, and its dots."""

    name: str
    mark: str
    look: int
    line: str
    band: str
    dots: tuple[Dot, ...]
    end: tuple[float, float]


@dataclass(frozen=True)
class Dot:
    """A point in the chart's units; `whisker`: the ends up and down."""

    x: float
    y: float
    whisker: tuple[float, float] | None
    title: str


@dataclass(frozen=True)
class Chart:
    """A chart in units of its own; `told` says in words what it shows."""

    title: str
    told: str
    series: tuple[Drawn, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    x_name: str
    y_name: str
    dotted: bool
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM


def chart(
    title: str,
    series: Sequence[Series],
    x_name: str,
    y_name: str,
    shown: Callable[[float], str],
    *,
    log: bool = False,
    dotted: bool = False,
    scale: float = 1.0,
) -> Chart:
    """A chart of series, on axes around all of them.

    Args:
        title: over it.
        series: each with at least one point.
        x_name: of the axis below.
        y_name: of the axis at the left.
        shown: how a value on the left axis is read.
        log: whether the axis below is one of powers of ten; what is not above 0 stands at its beginning, at `0`.
        dotted: dots with whiskers instead of lines with bands.
        scale: what values are multiplied with where they stand on the left axis.
    """
    points = [point for one in series for point in one.points]
    across, x_ticks = _across([point.x for point in points], log)
    low, high, steps = _axis(min(point.low for point in points), max(point.high for point in points))
    bottom, top = HEIGHT - _BOTTOM, _TOP

    def up(value: float) -> float:
        return round(bottom - (value - low) / (high - low) * (bottom - top), 1)

    drawn = []
    # a colour belongs to a row everywhere, unless that would leave the few of this chart without any
    own = max(one.look for one in series) < LOOKS
    for place, one in enumerate(series):
        places = [(across(point.x), up(point.y), up(point.low), up(point.high)) for point in one.points]
        dots = tuple(
            Dot(x, y, (a, b) if a != b else None, point.title)
            for (x, y, a, b), point in zip(places, one.points, strict=True)
        )
        line = "" if dotted else _path([(x, y) for x, y, _, _ in places])
        spreads = not dotted and any(a != b for _, _, a, b in places)
        band = [(x, b) for x, _, _, b in places] + [(x, a) for x, _, a, _ in reversed(places)]
        end = (places[-1][0], places[-1][1])
        drawn.append(
            Drawn(one.name, one.mark, one.look if own else place, line, _path(band) + "Z" if spreads else "", dots, end)
        )
    told = "; ".join(f"{one.mark} {one.name}: {_summed(one, shown, dotted)}" for one in series[:LOOKS])
    told += f"; and {len(series) - LOOKS} more" if len(series) > LOOKS else ""
    y_ticks = tuple(Tick(up(value), f"{scale * value:.5g}") for value in steps)
    return Chart(title, told, tuple(drawn), x_ticks, y_ticks, x_name, y_name, dotted)


def _summed(one: Series, shown: Callable[[float], str], dotted: bool) -> str:
    first, last = one.points[0], one.points[-1]
    if dotted or len(one.points) == 1:
        return shown(last.y)
    return f"from {shown(first.y)} at {_short(first.x)} to {shown(last.y)} at {_short(last.x)}"


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in places)


def _across(values: Sequence[float], log: bool) -> tuple[Callable[[float], float], tuple[Tick, ...]]:
    """The axis below: where a value stands, and the ticks."""
    left, right = float(_LEFT), float(WIDTH - _RIGHT)
    if not log:
        low, high = min(values), max(values)
        _, _, steps = _axis(low, high)
        span = (high - low) or 1.0

        def linear(value: float) -> float:
            return round(left + 6 + (value - low) / span * (right - left - 16), 1)

        return linear, tuple(Tick(linear(step), _short(step)) for step in steps if low <= step <= high)
    positive = [math.log10(value) for value in values if value > 0]
    room = 34 if len(positive) < len(values) else 6  # zero has a place of its own
    low, high = (math.floor(min(positive)), math.ceil(max(positive))) if positive else (0, 1)
    high = max(high, low + 1)

    def powers(value: float) -> float:
        if value <= 0:
            return left + 8
        return round(left + room + (math.log10(value) - low) / (high - low) * (right - left - room - 12), 1)

    every = -(-(high - low) // 5)
    ticks = [Tick(powers(10.0**power), _short(10.0**power)) for power in range(low, high + 1, every)]
    return powers, tuple([Tick(left + 8, "0"), *ticks] if room > 6 else ticks)


def _axis(low: float, high: float) -> tuple[float, float, list[float]]:
    """Ends and round ticks around two values."""
    span = (high - low) or abs(high) or 1.0
    if high == low:
        low, high = low - span / 10, high + span / 10
        span = high - low
    raw = span / 4
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * part for part in (1, 2, 2.5, 5, 10) if size * part >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    return first * step, last * step, [number * step for number in range(first, last + 1)]


def _short(value: float) -> str:
    """A number as it stands on an axis."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def thinned(places: Sequence[int], most: int) -> list[int]:
    """At most so many of them, evenly, with the first and the last one."""
    if len(places) <= most:
        return list(places)
    return [places[round(number * (len(places) - 1) / (most - 1))] for number in range(most)]
