"""The benchmark of base and new classes: its table is made from rows, and rows are what their command runs.

Knows no score, and trains nothing.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

import base_to_new as bench
import promptuary
from foundation import read

ROOT = Path(__file__).parents[2]
ROWS = read(bench.PATH)
TESTED = [row for row in ROWS if "test" in row]


def cell(row: dict[str, Any]) -> tuple[Any, ...]:
    """Its name."""
    return tuple(row["cell"])


def test_the_readme_has_the_table_as_it_is_printed() -> None:
    assert bench.table() in (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")


def test_every_method_has_the_same_folds_and_seeds() -> None:
    assert len({cell(row) for row in ROWS}) == len(ROWS)
    methods = (*bench.METHODS, bench.ZERO_SHOT)
    found = {method: {cell(row)[1:3] for row in TESTED if cell(row)[0] == method} for method in methods}
    assert found.pop(bench.ZERO_SHOT) == {(fold, 0) for fold in range(bench.FOLDS)}
    assert all(one == set(itertools.product(range(bench.FOLDS), range(bench.SEEDS))) for one in found.values())


@pytest.mark.parametrize("row", ROWS, ids=cell)
def test_a_row_is_what_its_command_runs(row: dict[str, Any]) -> None:
    method, fold, seed, rate = row["cell"]
    virtual = row["run"]["method"].get("virtual_classes", [])
    assert row["run"] == bench.settings(method, fold, seed, rate, virtual, row["pair"])
    assert bool(virtual) == ("virtual" in method)
    assert promptuary.load_run({**row["run"], "out": "out"}).train.steps == bench.TRAIN["steps"]
    assert row["command"] == "python benchmarks/base_to_new.py run --images DIR --pairs PAIRS"


def test_a_rate_is_chosen_without_a_test() -> None:
    trials = {row["cell"][3]: row["validation"]["accuracy"] for row in ROWS if row["cell"][2] == bench.TUNING_SEED}
    assert tuple(trials) == bench.RATES
    assert len(trials) + len(TESTED) == len(ROWS)
    best = max(trials, key=lambda rate: trials[rate])
    assert {row["cell"][3] for row in TESTED} == {0.0, best}


def test_rows_say_where_they_are_from_and_nothing_of_the_machines_folders() -> None:
    assert all(row["machine"] and row["versions"]["torch"] for row in ROWS)
    text = bench.PATH.read_text(encoding="utf-8")
    assert not any(f'"{place}' in text for place in ("/", "~"))
