"""Statistics that were made beside the runs: paired tests, ranks, and the budget of tuning, as summary.json tells them.

Knows no run and no page. Whatever is missing or of another form is left out; nothing here is computed anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from promptuary.report.samples import said
from promptuary.report.values import number


@dataclass(frozen=True)
class Pair:
    """A paired test of two methods in one block, as it is read."""

    block: str
    one: str
    other: str
    difference: str
    interval: str
    p: str
    verdict: str


def pairs(summaries: Sequence[Mapping[str, Any]]) -> list[Pair]:
    """All paired tests: `blocks`, each with `pairs` of `one` and `other`."""
    found = []
    for summary in summaries:
        for block in _mappings(summary.get("blocks")):
            names = (said(block[name], 60) for name in ("task", "backbone", "budget") if block.get(name))
            name = " · ".join(names)
            for pair in _mappings(block.get("pairs")):
                if "one" in pair and "other" in pair:
                    found.append(_pair(name, pair))
    return found


def _pair(block: str, pair: Mapping[str, Any]) -> Pair:
    ends = pair.get("interval_95")
    numbers = [number(one) for one in ends] if isinstance(ends, list) and len(ends) == 2 else []
    interval = " to ".join(f"{one:.4g}" for one in numbers if one is not None) if None not in numbers else ""
    difference, p = number(pair.get("difference")), number(pair.get("p_corrected", pair.get("p")))
    return Pair(
        block,
        said(pair["one"], 60),
        said(pair["other"], 60),
        "" if difference is None else f"{difference:+.4g}",
        interval,
        "" if p is None else f"{p:.3g}",
        said(pair.get("verdict", ""), 160),
    )


def notes(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """How it was tested and tuned, what ranks show, and what failed; in words."""
    found = list[str]()
    for summary in summaries:
        if isinstance(summary.get("test"), str):
            found.append(f"Test: {said(summary['test'], 200)}.")
        tuning = summary.get("tuning")
        if isinstance(tuning, Mapping):
            told = ", ".join(f"{key} {one}" for key, one in tuning.items())
            found.append(f"Tuning of every method: {said(told, 200)}.")
        ranks = summary.get("ranks")
        if isinstance(ranks, Mapping):
            distance = number(ranks.get("critical_difference"))
            verdicts = ranks.get("verdicts")
            told = ", ".join(said(one, 120) for one in verdicts[:8]) if isinstance(verdicts, list) else ""
            at = "" if distance is None else f" (critical difference {distance:.3g})"
            found.append(f"Average ranks{at}: {told or 'no verdict'}.")
        failed = summary.get("failed")
        if isinstance(failed, list) and failed:
            found.append(f"{len(failed):,} runs failed.")
    return found


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []
