"""Runs as tidy rows of CSV, and as the files and commands that repeat them.

Knows no page; paths of the machine were taken out before.
"""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from promptuary.report.found import Seen
from promptuary.report.standing import Standing
from promptuary.report.values import scalar

COLUMNS = (
    *("run", "row", "method", "column", "task", "data", "backbone", "seed", "state", "metric", "score", "low", "high"),
    *("validation", "trained", "bytes", "added_tokens", "steps", "best_step", "step_seconds", "seconds", "memory"),
    *("test_examples", "hash"),
)
"""Of the CSV; `low` and `high` are the 95 % bootstrap interval over examples."""

ASKED = ("task", "tasks", "suite", "data", "backbone", "mixture")
"""Parts of a run that say what is asked; the other ones are the method's."""


@dataclass(frozen=True)
class Part:
    """A piece of a run file: its name, its lines, and the settings in it that named a folder of the machine."""

    name: str
    text: str
    hidden: tuple[str, ...]


@dataclass(frozen=True)
class Repeat:
    """Runs that are the same but for their seed.

    `parts`: names of the pieces to join; `command`: for the first run, whose folder is `place`; `missing`: settings
    that are in the pieces and not in these runs; `runs`: seeds and scores.
    """

    parts: tuple[str, str]
    command: str
    missing: str
    place: str
    runs: tuple[tuple[str, str], ...]


def tidy(runs: Sequence[Seen], found: Standing) -> str:
    """All runs, a line each, with a head."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for run in runs:
        row, column = found.group[run.place]
        low, high = run.interval or (None, None)
        result, settings = run.result, run.settings
        writer.writerow(
            map(
                _cell,
                (
                    *(run.place, found.rows[row].name, run.method, found.columns[column].name, found.keys[column][0]),
                    *(scalar(settings.get("data.source", "")), scalar(settings.get("backbone.model", ""))),
                    *(_number(settings.get("seed")), "finished" if run.finished else "unfinished", run.metric),
                    *(run.score, low, high, run.validation),
                    *(run.count("trainable_parameters"), run.bytes, run.count("added_tokens")),
                    *(run.count("steps") if run.finished else run.steps, run.count("best_step")),
                    *(_plain(result.get("seconds_per_step_median")), _plain(result.get("train_seconds"))),
                    *(run.count("peak_memory_bytes"), run.examples("test"), str(result.get("run_hash", ""))[:16]),
                ),
            )
        )
    return file.getvalue()


def _cell(value: Any) -> str:
    """A number with what matters of it; a text that no spreadsheet takes for a formula."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int):
        return str(value)
    text = str(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _plain(value: Any) -> float | None:
    return float(value) if isinstance(value, float) else None


def _number(text: str | None) -> int | str:
    return int(text) if text is not None and text.isascii() and text.isdecimal() and len(text) < 20 else text or ""


def repeats(runs: Sequence[Seen], found: Standing) -> tuple[list[Part], list[Repeat]]:
    """Pieces of run files, each once, and for every group of runs how to put two of them together.

    A run file is a piece that says what is asked (of a column) and a piece that says by which method; what is other in
    a run stands in its command.
    """
    pieces = dict[tuple[str, Any], tuple[str, Mapping[str, str], Part]]()
    groups = dict[tuple[Any, ...], list[Seen]]()
    for run in runs:
        rest = tuple((path, value) for path, value in run.settings.items() if path not in ("seed", "out"))
        groups.setdefault((found.group[run.place], rest), []).append(run)
    order = sorted(groups, key=lambda key: key[0])
    repeated = []
    for key in order:
        first, (_, column) = groups[key][0], key[0]
        # what has another solver or kind of task has other settings altogether
        asked = _piece(pieces, "asked", (column, first.settings.get("task.name")), first)
        by = _piece(pieces, "by", (first.method, first.settings.get("solver.name")), first)
        base = {**asked[1], **by[1]}
        own = {path: value for path, value in first.settings.items() if path not in ("seed", "out")}
        changes = [f"{path}={value}" for path, value in own.items() if base.get(path) != value]
        missing = ", ".join(path for path in base if path not in own and path.partition(".")[0] not in own)
        words = ["promptuary", "train", "run.yaml", "--seed", first.settings.get("seed", "0"), "--out", "again"]
        for change in changes:
            words += ["--set", change]
        shown = found.columns[column].shown
        told = tuple(
            (
                run.settings.get("seed", ""),
                shown(run.score) if run.score is not None else "no score" if run.finished else _reached(run),
            )
            for run in groups[key]
        )
        repeated.append(Repeat((asked[0], by[0]), shlex.join(words), missing, first.place, told))
    return [part for _, _, part in pieces.values()], repeated


def _reached(run: Seen) -> str:
    return f"unfinished, step {run.steps:,} of {scalar(run.settings.get('train.steps', '?'))}"


def _piece(
    pieces: dict[tuple[str, Any], tuple[str, Mapping[str, str], Part]], kind: str, key: Any, run: Seen
) -> tuple[str, Mapping[str, str], Part]:
    """The piece of a column or a method; of the first run that has it."""
    if (kind, key) not in pieces:
        inside = {
            path: value
            for path, value in run.settings.items()
            if (path.partition(".")[0] in ASKED) == (kind == "asked") and path not in ("seed", "out")
        }
        number = 1 + sum(one == kind for one, _ in pieces)
        name = f"{'task' if kind == 'asked' else 'method'}-{number}.yaml"
        hidden = tuple(path for path in inside if path in run.hidden)
        pieces[kind, key] = (name, inside, Part(name, _lines(inside, run.hidden), hidden))
    return pieces[kind, key]


def _lines(settings: Mapping[str, str], hidden: frozenset[str]) -> str:
    """Settings as YAML again, one in a line."""
    lines, before = list[str](), ""
    for path, value in settings.items():
        part, dot, name = path.partition(".")
        if dot and part != before:
            lines.append(f"{part}:")
        before = part if dot else ""
        note = "  # a place on the machine of the run; name yours" if path in hidden else ""
        lines.append(f"{'  ' if dot else ''}{name if dot else part}: {value}{note}")
    return "\n".join(lines) + "\n"
