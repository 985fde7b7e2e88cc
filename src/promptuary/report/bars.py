"""Scores under perturbations as bars with intervals, and an example of each perturbation.

Knows no task, model or rule; names come with what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from promptuary.report.samples import said

if TYPE_CHECKING:
    from promptuary.robust import Changed, Robustness

LONG = 160
"""Most characters of a text beside its perturbed form; our choice."""

_LEFT, _RIGHT, _WIDTH, _STEP, _TICKS = 170, 560, 820, 26, 5


@dataclass(frozen=True)
class Tick:
    """A place on the axis, and the score there."""

    x: float
    shown: str


@dataclass(frozen=True)
class Line:
    """A bar: its name, where it stands, the two ends of its interval, what stands beside it, and all of it in words."""

    name: str
    look: str
    y: int
    x: float
    width: float
    whisker: tuple[float, float] | None
    shown: str
    told: str
    title: str


@dataclass(frozen=True)
class Pair:
    """A perturbation, how many examples it changed, and one of them; of that, the first text that changed."""

    name: str
    changed: str
    clean: str
    perturbed: str


@dataclass(frozen=True)
class Bars:
    """The picture, in units of its own, and what is said of it."""

    metric: str
    seed: int
    made: str
    lines: tuple[Line, ...]
    ticks: tuple[Tick, ...]
    pairs: tuple[Pair, ...]
    clean: float
    mean: str
    mean_drop: str
    worst: str
    whiskers: bool
    height: int
    bottom: int
    width: int = _WIDTH
    left: int = _LEFT
    right: int = _RIGHT


def bars(found: Robustness, count: int, names: Mapping[str, str], shares: Container[str]) -> Bars:
    """Bars from 0 (or, of a score below 0, from there) to 1, or to the largest score.

    Args:
        found: what was measured.
        count: of examples.
        names: what metrics are called.
        shares: metrics that read as per cent.
    """
    scores = [found.clean.scores[found.metric], *(one.evaluation.scores[found.metric] for one in found.under)]
    finite = [score for score in scores if math.isfinite(score)]
    low, high = min([0.0, *finite]), max([1.0, *finite])
    span = _Axis(low, high, found.metric in shares)
    worst = found.worst
    score = span.shown(worst.evaluation.scores[found.metric])
    lines = [_line(0, "clean", "fill", scores[0], found.clean.interval, span, "")]
    for place, one in enumerate(found.under, start=1):
        told = f"{_lost(one.drop)}, {len(one.changed):,} changed"
        name, look = f"{one.kind.id} {one.kind.title}", "worst" if one is worst and one.drop > 0 else "under"
        lines.append(_line(place, name, look, scores[place], one.evaluation.interval, span, told))
    bottom = _STEP * len(lines) + 4
    return Bars(
        names.get(found.metric, found.metric),
        found.seed,
        "by rules" if found.by == "rules" else f"by {found.by}",
        tuple(lines),
        tuple(
            Tick(span.at(value), span.shown(value))
            for value in (low + (high - low) * step / _TICKS for step in range(_TICKS + 1))
        ),
        tuple(_pair(one.kind.id, one.kind.title, one.changed, count) for one in found.under),
        span.at(scores[0]),
        span.shown(found.mean),
        f" ({_lost(found.mean_drop)})",
        f"{worst.kind.id}, {worst.kind.title}: {score} ({_lost(worst.drop)})",
        found.clean.interval is not None,
        bottom + 24,
        bottom,
    )


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    share: bool

    def at(self, value: float) -> float:
        """Where a score stands; of what is no number, at the beginning."""
        part = (value - self.low) / (self.high - self.low) if math.isfinite(value) else 0.0
        return round(_LEFT + part * (_RIGHT - _LEFT), 2)

    def shown(self, value: float) -> str:
        return f"{100 * value:.1f} %" if self.share and math.isfinite(value) else f"{value:.4g}"


def _line(
    place: int, name: str, look: str, score: float, interval: tuple[float, float] | None, axis: _Axis, told: str
) -> Line:
    zero, end = axis.at(0.0), axis.at(score)
    whisker = None if interval is None else (axis.at(interval[0]), axis.at(interval[1]))
    between = "" if interval is None else f", 95 % interval {axis.shown(interval[0])} to {axis.shown(interval[1])}"
    title = f"{name}: {axis.shown(score)}{between}" + (f"; {told}" if told else "")
    width = round(abs(end - zero), 2)
    return Line(name, look, _STEP * place + 4, min(zero, end), width, whisker, axis.shown(score), told, title)


def _lost(drop: float) -> str:
    if not math.isfinite(drop):
        return "lost from nothing"
    return f"{100 * abs(drop):.1f} % {'gained' if drop < 0 else 'lost'}"


def _pair(name: str, title: str, changed: Sequence[Changed], count: int) -> Pair:
    clean, perturbed = next(iter(changed[0].texts.values())) if changed else ("", "")
    return Pair(f"{name} {title}", f"{len(changed):,} of {count:,}", said(clean, LONG), said(perturbed, LONG))
