"""What a cell of a benchmark is, how it is measured, and the rows that come of it.

Knows no cell, library or result.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

import shapes
from clock import Step, flops, in_turn, ratio, saved_bytes
from promptuary import runs

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Loop:
    """A step (or a whole pass) that can be run again and again, and the model that it runs."""

    model: Any
    step: Step


@dataclass(frozen=True)
class Target:
    """What a cell should show: at most `bound` times as much for `fast` as for `slow`.

    `what`: seconds, flops or saved_bytes.
    """

    fast: str
    slow: str
    bound: float
    what: str = "seconds"


@dataclass(frozen=True)
class Cell:
    """A situation: `texts` of `tokens` tokens, a prompt of `length` rows, `layers` of each stack (None: all).

    `whole_pass`: what is timed is a pass over the texts in batches of 16, not one step over all of them.
    """

    name: str
    kind: str
    texts: int
    tokens: int
    length: int
    make: Callable[[Cell, Any, Path], dict[str, Loop]]
    targets: Sequence[Target] = ()
    layers: int | None = None
    small: bool = False
    whole_pass: bool = False
    extra: Callable[[Cell, Any, Path], dict[str, Any]] | None = None

    @property
    def method(self) -> dict[str, Any]:
        """Prompt tuning of the cell's length."""
        return {"name": "prompt_tuning", "num_virtual_tokens": self.length}

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text."""
        return [self.tokens] * self.texts

    def shrunk(self) -> Cell:
        """The same on a toy, so that a test runs it in a second or two."""
        size = {"texts": min(self.texts, 4), "tokens": min(self.tokens, 12), "length": 3}
        return replace(self, **size, layers=None, small=True)


def measure(cell: Cell, rounds: int) -> list[dict[str, Any]]:
    """Rows of a cell, one for each variant; the ratios are to the first."""
    model = shapes.model(cell.kind, layers=cell.layers, small=cell.small)
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        loops = cell.make(cell, model, folder / "timed")
        steps = {name: loop.step for name, loop in loops.items()}
        for step in steps.values():  # a warm-up, which for some is the first pass over the texts
            step()
        saved = {
            name: None if cell.whole_pass else saved_bytes(loop.step, loop.model.parameters())
            for name, loop in loops.items()
        }
        taken = in_turn(steps, rounds)
        found = {} if cell.extra is None else cell.extra(cell, model, folder / "extra")
        for loop in loops.values():  # attention as plain matrix products, which can be counted
            loop.model.set_attn_implementation("eager")
        counted = {name: flops(step) for name, step in steps.items()}
    base = next(iter(steps))
    made = []
    for name in steps:
        middle, least, most = ratio(taken[name], taken[base])
        made.append(
            {
                "cell": [cell.name, name],
                "time_ratio": round(middle, 4),
                "time_ratio_min": round(least, 4),
                "time_ratio_max": round(most, 4),
                "seconds": [round(seconds, 5) for seconds in taken[name]],
                "flops": counted[name],
                "saved_bytes": saved[name],
                "rounds": rounds,
                "model": cell.kind,
                "layers": cell.layers or "all",
                "batch_size": cell.texts,
                "tokens": cell.tokens,
                "prompt": cell.length,
                **found,
            }
        )
    del loops, steps, model
    gc.collect()
    return made


def meta(command: str) -> dict[str, Any]:
    """Where a row comes from."""
    versions = {**runs.versions(), "peft": importlib.metadata.version("peft")}
    return {
        "machine": f"{runs.processor()}, {torch.get_num_threads()} thread(s)",
        "clock": "CPU seconds of the process",
        "versions": versions,
        "command": command,
    }


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a file that may not exist yet."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def replace_rows(path: Path, made: Sequence[dict[str, Any]], order: Sequence[str]) -> None:
    """Put rows in the place of those of the same cell, cells in this order."""
    names = {row["cell"][0] for row in made}
    kept = [row for row in read(path) if row["cell"][0] not in names and row["cell"][0] in order]
    rows = sorted([*kept, *made], key=lambda row: order.index(row["cell"][0]))
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def reached(cell: Cell, rows: Sequence[Mapping[str, Any]]) -> list[tuple[Target, float]]:
    """Each target of a cell with what its rows say, as the part that `fast` takes of `slow`."""
    by_name = {row["cell"][1]: row for row in rows if row["cell"][0] == cell.name}
    found = []
    for target in cell.targets:
        if target.fast in by_name:
            fast, slow = by_name[target.fast], by_name[target.slow]
            if target.what == "seconds":
                part = ratio(fast["seconds"], slow["seconds"])[0]
            else:
                part = fast[target.what] / slow[target.what]
            found.append((target, part))
    return found


def show(cell: Cell, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows of a cell, and its targets."""
    for row in rows:
        middle = 1e3 * statistics.median(row["seconds"])
        print(
            f"{cell.name:30} {row['cell'][1]:38} {row['time_ratio']:.3f} "
            f"[{row['time_ratio_min']:.3f}-{row['time_ratio_max']:.3f}] {middle:.0f} ms, "
            f"{row['flops'] / 1e9:.2f} GF, {(row['saved_bytes'] or 0) / 2**20:.1f} MiB",
            flush=True,
        )
    for target, part in reached(cell, rows):
        missed = "" if part <= target.bound else "MISSED"
        what = f"{target.what} of {target.fast} / {target.slow}"
        print(f"{'':30} {what}: {part:.3f}, asked {target.bound:.3f} {missed}", flush=True)


def command_line(doc: str | None, script: str, cells: Sequence[Cell], path: Path, table: Callable[[], str]) -> None:
    """`run` some or all cells and write their rows, or print the `table` of the rows that are there.

    Args:
        doc: what the script says of itself.
        script: its name, for the command in each row.
        cells: all of them.
        path: where their rows are.
        table: makes the table.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--cells", nargs="+", choices=[cell.name for cell in cells], metavar="NAME")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="toy models; nothing is written")
    arguments = parser.parse_args()
    quiet()
    if arguments.what == "table":
        return print(table())
    for cell in [cell for cell in cells if not arguments.cells or cell.name in arguments.cells]:
        made = measure(cell.shrunk() if arguments.small else cell, arguments.rounds)
        command = f'python benchmarks/{script} run --rounds {arguments.rounds} --cells "{cell.name}"'
        made = [{**row, **meta(command)} for row in made]
        show(cell, made)
        if not arguments.small:
            replace_rows(path, made, [one.name for one in cells])
    return None


def quiet() -> None:
    """One thread, and no words from the libraries."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
