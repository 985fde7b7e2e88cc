"""The benchmark of prompts of words: its tables are made from rows, and rows are what their command runs.

Knows no score, and trains nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import discrete as bench
import promptuary
import rewards
from foundation import read

ROOT = Path(__file__).parents[2]
ROWS = read(bench.PATH)


def cell(row: dict[str, Any]) -> tuple[Any, ...]:
    """Its name."""
    return tuple(row["cell"])


@pytest.mark.parametrize("table", [bench.table, bench.robust_table, rewards.table], ids=["words", "robust", "rewards"])
def test_the_readme_has_the_table_as_it_is_printed(table: Any) -> None:
    assert table() in (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")


def test_every_method_of_a_set_has_the_same_splits() -> None:
    assert len({cell(row) for row in ROWS}) == len(ROWS)
    for task in bench.SETS:
        found = {cell(row)[1]: set() for row in ROWS if cell(row)[0] == task}  # type: ignore[var-annotated]
        for row in ROWS:
            if cell(row)[0] == task:
                found[cell(row)[1]].add(cell(row)[2])
        assert len({frozenset(splits) for splits in found.values()}) == 1


@pytest.mark.parametrize("row", ROWS, ids=cell)
def test_a_row_is_what_its_command_runs(row: dict[str, Any]) -> None:
    task, name, seed = row["cell"]
    rate = row.get("tuning", {}).get("chosen")
    run = promptuary.load_run({**bench.settings(name, task, seed, rate, Path("DIR")), "out": "out"})
    # settings that came later stand at their defaults there
    again = promptuary.load_run({**row["run"], "out": "out"})
    assert again == run
    assert row["test"]["accuracy"] * bench.TEST_ROWS == pytest.approx(round(row["test"]["accuracy"] * bench.TEST_ROWS))
    if "solver" in bench.METHODS[name]:
        assert row["forward_calls"] <= bench.SCORED
    command = f'python benchmarks/discrete.py run --data DIR --methods "{name}" --sets {task} --seeds {seed}'
    assert row["command"] == command


@pytest.mark.parametrize("name", [*bench.METHODS, *bench.ROBUST])
def test_every_method_of_the_benchmark_is_a_run(name: str) -> None:
    promptuary.load_run({**bench.settings(name, "cr", 13, None, Path("DIR")), "out": "out"})


def test_rows_say_where_they_are_from_and_nothing_of_the_machines_folders() -> None:
    assert all(row["machine"] and row["versions"]["torch"] for row in ROWS)
    text = bench.PATH.read_text(encoding="utf-8")
    assert not any(place in text for place in ("/home/", "/tmp/", "/root/", "/work/"))
