"""One page of HTML about all runs below a folder: leaderboard, costs, curves, words, settings, rows.

Knows no method or task by name; everything that users write is escaped, the page loads nothing, and what it runs are
the few lines of board.js, which it does as well without.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from promptuary import __version__
from promptuary.report import figures, rows, tested
from promptuary.report.charts import LOOKS
from promptuary.report.found import Found, Seen, without_places
from promptuary.report.samples import said
from promptuary.report.standing import SMALL, Cell, Column, Row, Standing, standing, verdict

MOST = 300_000
"""Bytes that a page stays below; our choice."""


@dataclass(frozen=True)
class Room:
    """How much of everything a page shows; what is left out is counted on it."""

    rows: int
    columns: int
    charts: int
    points: int
    words: int
    text: int
    pieces: int
    piece: int
    groups: int
    runs: int
    csv: int


ROOMS = (
    Room(150, 30, 12, 24, 24, 400, 40, 6_000, 300, 2_000, 80_000),
    Room(120, 24, 8, 16, 16, 300, 30, 5_000, 200, 1_200, 60_000),
    Room(80, 16, 6, 12, 8, 200, 20, 4_000, 120, 800, 60_000),
    Room(40, 10, 4, 10, 6, 120, 10, 3_000, 60, 400, 60_000),
    Room(25, 6, 2, 8, 3, 80, 4, 2_000, 20, 200, 30_000),
)
"""Tried in this order until a page is small enough; our choice."""


@dataclass(frozen=True)
class Shown:
    """A cell of the leaderboard: as it is read, what it is sorted by, whether it is above all others, and in words."""

    score: str
    spread: str
    seeds: int
    key: float
    best: bool
    title: str


@dataclass(frozen=True)
class Line:
    """A row of the leaderboard; numbers stand with what they are sorted by."""

    number: int
    name: str
    cells: tuple[Shown | None, ...]
    rank: tuple[str, str]
    trained: tuple[str, str]
    bytes: tuple[str, str]
    tokens: tuple[str, str]
    time: tuple[str, str]
    memory: tuple[str, str]
    pending: int


@dataclass(frozen=True)
class Words:
    """The words that a run found, the others that it tried, and how they came about."""

    run: str
    row: str
    column: str
    score: str
    text: str
    others: tuple[tuple[str, str], ...]
    history: tuple[tuple[str, str, str], ...]
    more: int


def render(title: str, found: Found) -> bytes:
    """The page, in UTF-8, below `MOST` bytes; the same input gives the same bytes.

    Args:
        title: over it, such as the folder's name.
        found: at least one run.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("promptuary.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("board.html")
    script = resources.files("promptuary.report").joinpath("board.js").read_text(encoding="utf-8")
    table = standing(found.runs)
    pieces, repeats = rows.repeats(found.runs, table)
    whole = _Whole(title, found, table, pieces, repeats, rows.tidy(found.runs, table))
    content = b""
    for room in ROOMS:
        text = template.render(
            **_content(whole, room),
            script=script,
            policy=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            version=__version__,
        )
        # half a pair of surrogates, which JSON may hold, is no text that could be written
        content = text.encode("utf-8", "replace")
        if len(content) < MOST:
            break
    return content


@dataclass(frozen=True)
class _Whole:
    """Everything, before anything is left out."""

    title: str
    found: Found
    table: Standing
    pieces: Sequence[rows.Part]
    repeats: Sequence[rows.Repeat]
    csv: str


def _content(whole: _Whole, room: Room) -> dict[str, Any]:
    """What the template shows."""
    found, table, content = whole.found, whole.table, whole.csv
    runs = {run.place: run for run in found.runs}
    verdicts = [verdict(table, place) for place in range(len(table.columns))]
    words = _words(found.runs, table, room)
    finished = sum(run.finished for run in found.runs)
    return {
        "title": said(whole.title, 120),
        "facts": [
            *table.shared,
            ("Methods", f"{len(table.rows):,}"),
            ("Runs", f"{finished:,} finished" + (f", {len(runs) - finished:,} not" if finished < len(runs) else "")),
        ],
        "notes": [said(without_places(note), 400) for note in (*found.notes, *table.notes)][:40],
        "notes_left": max(0, len(found.notes) + len(table.notes) - 40),
        "columns": table.columns[: room.columns],
        "columns_left": max(0, len(table.columns) - room.columns),
        "lines": [_line(number, row, table, verdicts, room) for number, row in enumerate(table.rows[: room.rows])],
        "rows_left": max(0, len(table.rows) - room.rows),
        "verdicts": [one for one in verdicts[: room.columns] if one.compares],
        "alone": [one.column for one in verdicts[: room.columns] if not one.compares],
        "small": [column for column in table.columns[: room.columns] if _is_small(column)],
        "timed": any(row.time is not None for row in table.rows),
        "pending": any(row.pending for row in table.rows),
        "costs": figures.costs(table, room.charts),
        "curves": figures.curves(table, runs, room.charts, room.points),
        "sizes": figures.sizes(table, room.charts),
        "heat": figures.heat(table, room.rows, room.columns) if min(len(table.columns), len(table.rows)) > 1 else None,
        "sturdy": figures.robust(table)[: room.rows],
        "words": words[: room.words],
        "words_left": max(0, len(words) - room.words),
        "tests": tested.pairs(found.summaries)[: 4 * room.rows],
        "tests_left": max(0, len(tested.pairs(found.summaries)) - 4 * room.rows),
        "test_notes": tested.notes(found.summaries),
        "pieces": [
            (piece, piece.text[: room.piece], len(piece.text) > room.piece) for piece in whole.pieces[: room.pieces]
        ],
        "pieces_left": max(0, len(whole.pieces) - room.pieces),
        "repeats": _few(whole.repeats[: room.groups], room.runs),
        "repeats_left": max(0, len(whole.repeats) - room.groups),
        "looks": LOOKS,
        "warmth": figures.WARMTH,
        "csv": _inside_script(content) if len(content) <= room.csv else None,
        "packed": _packed(content) if len(content) > room.csv else None,
        "count": len(runs),
    }


def _line(number: int, row: Row, table: Standing, verdicts: Sequence[Any], room: Room) -> Line:
    cells = []
    for place, column in enumerate(table.columns[: room.columns]):
        cell = row.cells.get(place)
        cells.append(None if cell is None else _shown(cell, column, best=verdicts[place].best == number))
    many = len(table.columns)
    some = f" ({len(row.cells)} of {many})" if len(row.cells) < many else ""
    rank = ("", "") if row.rank is None else (f"{row.rank:.1f}{some}", f"{row.rank + 1000 * (many - len(row.cells)):g}")
    return Line(
        number + 1,
        row.name,
        tuple(cells),
        rank,
        _range(row.range("trainable_parameters"), "{:,.0f}"),
        _bytes(row.range("bytes")),
        _range(row.range("added_tokens"), "{:,.0f}"),
        _ratio(row.time),
        _ratio(row.memory),
        row.pending,
    )


def _shown(cell: Cell, column: Column, *, best: bool) -> Shown:
    spread = "" if cell.spread is None else column.shown(cell.spread)
    return Shown(column.shown(cell.mean), spread, cell.seeds, round(cell.mean, 6), best, figures.told(cell, column))


def _range(found: tuple[float, float] | None, form: str) -> tuple[str, str]:
    if found is None:
        return "", ""
    low, high = (form.format(value) for value in found)
    return (low if low == high else f"{low} to {high}"), f"{found[0]:g}"


def _bytes(found: tuple[float, float] | None) -> tuple[str, str]:
    if found is None:
        return "", ""
    low, high = (_size(value) for value in found)
    return (low if low == high else f"{low} to {high}"), f"{found[0]:.0f}"


def _size(value: float) -> str:
    return f"{value / 2**20:,.1f} MiB" if value >= 2**20 else f"{value / 1024:,.1f} KiB"


def _ratio(value: float | None) -> tuple[str, str]:
    return ("", "") if value is None else (f"{value:.2f}", f"{value:.4g}")


def _is_small(column: Column) -> bool:
    return column.per_example is not None and min(column.tests) <= SMALL


def _words(runs: Sequence[Seen], table: Standing, room: Room) -> list[Words]:
    """The words of every run that found some, the best runs first."""
    found = []
    for run in runs:
        text = run.result.get("text")
        if not isinstance(text, str):
            continue
        row, place = table.group[run.place]
        column = table.columns[place]
        history = _mappings(run.result.get("history"))
        others = [one for one in _mappings(run.result.get("texts")) if one.get("text") != text]
        found.append(
            (
                (row, place, -(run.score or 0.0)),
                Words(
                    run.place,
                    table.rows[row].name,
                    column.name,
                    "" if run.score is None else column.shown(run.score),
                    said(text, room.text),
                    tuple((said(one.get("text", ""), room.text), _tested(one, column)) for one in others[:4]),
                    tuple(
                        (
                            said(one.get("step", ""), 12),
                            said(one.get("text", ""), room.text),
                            ", ".join(f"{name} {said(one[name], 40)}" for name in ("from", "score") if name in one),
                        )
                        for one in history[:8]
                    ),
                    max(0, len(history) - 8),
                ),
            )
        )
    return [one for _, one in sorted(found, key=lambda pair: pair[0])]


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []


def _tested(one: Mapping[str, Any], column: Column) -> str:
    scores = one.get("test")
    value = scores.get(column.metric) if isinstance(scores, Mapping) else None
    return column.shown(value) if isinstance(value, float) else ""


def _few(repeats: Sequence[rows.Repeat], most: int) -> list[tuple[rows.Repeat, int]]:
    """Groups of runs, and how many runs of each have room."""
    found = []
    for one in repeats:
        count = min(len(one.runs), max(1, most))
        most -= count
        found.append((one, count))
    return found


def _inside_script(content: str) -> str:
    """Text that ends no script and begins none; board.js undoes it. Here Jinja must not do more."""
    from markupsafe import Markup

    return Markup(content.replace("&", "&amp;").replace("<", "&lt;"))


def _packed(content: str) -> str | None:
    """All rows as a compressed file in a data address, unless even that is too large."""
    packed = base64.b64encode(gzip.compress(content.encode("utf-8", "replace"), mtime=0)).decode()
    return packed if len(packed) < MOST // 3 else None
