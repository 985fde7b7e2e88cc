"""The tables of docs/performance.md, from the rows of speed.py, ept_cost.py, overhead.py and serving.py.

Knows no number: what stands between the marks of the page is made here, the rest is written by hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ept_cost
import overhead
import serving
import speed
from cells import Cell, read
from clock import ratio
from shapes import TITLE

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
Row = Mapping[str, Any]


def page(text: str, rows: Sequence[Row], ept: Sequence[Row], fixed: Sequence[Row], served: Sequence[Row]) -> str:
    """The page with its tables made anew.

    Args:
        text: as it is.
        rows: of speed.py.
        ept: of ept_cost.py.
        fixed: of overhead.py.
        served: of serving.py.

    Raises:
        ValueError: the page lacks a mark.
    """
    made = {"machine": machine([*rows, *ept]), "peft": against(rows), "switches": switches(rows),
            "lengths": lengths(ept), "ept": modules(ept), "fixed": fixed_costs(fixed),
            "serving": serving.table(served)}  # fmt: skip
    for name, table in made.items():
        text, found = re.subn(
            rf"(<!-- {name}: made by benchmarks/speed.py page -->\n).*?(<!-- end -->)",
            lambda mark, table=table: f"{mark[1]}\n{table}\n\n{mark[2]}",
            text,
            flags=re.DOTALL,
        )
        if found != 1:
            raise ValueError(f"docs/performance.md has {found} marks named {name}, expected one")
    return text


def write_page() -> None:
    """Make the page's tables from the rows that are there."""
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(page(text, *all_rows()), encoding="utf-8")


def all_rows() -> list[list[dict[str, Any]]]:
    """What `page` takes."""
    return [read(path) for path in (speed.ROWS, ept_cost.ROWS, overhead.ROWS, serving.RESULTS)]


def machine(rows: Sequence[Row]) -> str:
    """Where, with what and how often."""
    places = sorted({row["machine"] for row in rows})
    packages = ("torch", "transformers", "peft")
    versions = sorted({", ".join(f"{name} {row['versions'][name].split('+')[0]}" for name in packages) for row in rows})
    rounds = sorted({row["rounds"] for row in rows})
    times = f"{rounds[0]}" if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
    return f"{'; '.join(places)}; {'; '.join(versions)}; {times} rounds."


def times(fast: Row, slow: Row) -> str:
    """Median of the ratios within the rounds, and their range."""
    middle, least, most = ratio(fast["seconds"], slow["seconds"])
    digits = 2 if middle >= 0.1 else 3
    return f"{middle:.{digits}f} ({least:.{digits}f} to {most:.{digits}f})"


def parts(what: str) -> Callable[[Row, Row], str]:
    """A counted number as a part of another row's."""

    def part(one: Row, other: Row) -> str:
        return "-" if one[what] is None else f"{one[what] / other[what]:.3f}"

    return part


def named(rows: Sequence[Row], cell: str) -> dict[str, Row]:
    """Variant -> row, of one cell."""
    return {row["cell"][1]: row for row in rows if row["cell"][0] == cell}


def grid(lines: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    head, *rest = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rest))


def setting(row: Row) -> str:
    """What ran."""
    stacks = "" if row["layers"] == "all" else f", {row['layers']} of 12 layers"
    return f"{TITLE[row['model']]}{stacks}, {row['batch_size']} texts of {row['tokens']}, l={row['prompt']}"


def against(rows: Sequence[Row]) -> str:
    """Everybody on the same step, in units of PEFT's prompt tuning."""
    columns = (speed.PEFT, speed.HAND, speed.LORA, speed.NARROW, speed.PLAIN, speed.DEFAULT)
    tables = []
    for title, show in (("Time", times), ("Operations", parts("flops")), ("Kept bytes", parts("saved_bytes"))):
        lines = [[title, *columns]]
        for cell in speed.CELLS:
            found = named(rows, cell.name)
            if speed.PLAIN in found:
                base = found[speed.PEFT]
                cells = [show(found[name], base) if name in found else "-" for name in columns]
                lines.append([setting(base), *("1" if name == speed.PEFT else cell for name, cell in
                                               zip(columns, cells, strict=True))])  # fmt: skip
        tables.append(grid(lines))
    return "\n\n".join(tables)


def switches(rows: Sequence[Row]) -> str:
    """Each of the other cells: what is measured against what."""
    lines = [["what", "against", "on", "time", "operations", "kept bytes", "besides"]]
    for cell in speed.CELLS:
        found = named(rows, cell.name)
        if not found or speed.PLAIN in found:
            continue
        fast = cell.targets[0].fast
        for name, row in found.items():
            if name != fast:
                lines.append([fast, name, setting_of(cell, row), times(found[fast], row),
                              parts("flops")(found[fast], row), parts("saved_bytes")(found[fast], row),
                              besides(row)])  # fmt: skip
    return grid(lines)


def setting_of(cell: Cell, row: Row) -> str:
    """What ran, with the profile of lengths where texts differ."""
    if not cell.whole_pass:
        return setting(row)
    profile = cell.name.rpartition(" ")[2]
    stacks = f"{TITLE[row['model']]}, {row['layers']} of 12 layers"
    return f"{stacks}, {profile} texts (mean {speed.PROFILES[profile][0]}), batches of 16, l={row['prompt']}"


def besides(row: Row) -> str:
    """What else a cell says."""
    if "gradient_cosine" in row:
        return f"cosine of the gradients {row['gradient_cosine']:.4f}"
    return f"padding {100 * row['padding_waste']:.1f} % of positions" if "padding_waste" in row else ""


def lengths(rows: Sequence[Row]) -> str:
    """Prompt length against LoRA on the same texts."""
    lines = [["setting", *(f"l={length}" for length in ept_cost.LENGTHS), ept_cost.EPT]]
    for cell in ept_cost.CELLS:
        found = named(rows, cell.name)
        if speed.NARROW not in found:
            continue
        for suffix in ("", ept_cost.OFF):
            names = [f"prompt tuning l={length}{suffix}" for length in ept_cost.LENGTHS]
            if names[0] in found:
                base, chosen = found[speed.NARROW], [*names, *([ept_cost.EPT] if not suffix else [])]
                where = setting(base).rpartition(", ")[0] + suffix
                for title, show in (("time", times), ("operations", parts("flops"))):
                    cells = [show(found[name], base) if name in found else "-" for name in chosen]
                    lines.append([f"{where}, {title}", *cells, *["-"] * (len(lines[0]) - len(cells) - 1)])
    return grid(lines)


def fixed_costs(rows: Sequence[Row]) -> str:
    """What a step takes besides the model's arithmetic."""
    lines = [["two layers of width 32", "a step of ours, ms", "the minimal loop, ms", "difference, ms"]]
    for row in rows:
        more = f"{row['fixed_cost_ms']:.1f} ({row['fixed_cost_ms_min']:.1f} to {row['fixed_cost_ms_max']:.1f})"
        lines.append([row["cell"][0], f"{row['ours_ms']:.1f}", f"{row['minimal_ms']:.1f}", more])
    return grid(lines)


def modules(rows: Sequence[Row]) -> str:
    """EPT against the prompt that it replaces, and what its own modules take."""
    lines = [["EPT s=60", "time", "operations", "kept bytes"]]
    for cell in ept_cost.CELLS:
        found = named(rows, cell.name)
        for fast, slow in pairs(found):
            one, two = found[fast], found[slow]
            where = setting(one).rpartition(", ")[0]
            if "batch" in fast:  # the size stands in the names
                where = where.replace(f"{one['batch_size']} texts", "texts")
            where = f"{where}: {fast} against {slow}"
            lines.append([where, times(one, two), parts("flops")(one, two), parts("saved_bytes")(one, two)])
    return grid(lines)


def pairs(found: Mapping[str, Row]) -> list[tuple[str, str]]:
    """What is set against what in a cell of ept_cost.py."""
    if ept_cost.EPT in found:
        return [(ept_cost.EPT, ept_cost.LONG), (ept_cost.SHORT, ept_cost.LONG), (ept_cost.EPT, ept_cost.SHORT)]
    named_by = {"own modules, ": ("step, ", "EPT, ")}
    return [
        (name, step + name.removeprefix(mark))
        for mark, steps in named_by.items()
        for name in found
        if name.startswith(mark)
        for step in steps
        if step + name.removeprefix(mark) in found
    ] + [(f"EPT, batch {size}", f"prompt tuning l=100, batch {size}") for size in ept_cost.BATCHES
         if f"EPT, batch {size}" in found]  # fmt: skip
