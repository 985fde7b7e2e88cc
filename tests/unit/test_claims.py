"""The benchmarks of the methods' own claims: tables are made from rows, and rows are what their command runs.

Knows no score, and trains nothing.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

import claims
import promptuary
from foundation import read

ROOT = Path(__file__).parents[2]
ROWS = read(claims.PATH)


def cell(row: dict[str, Any]) -> tuple[Any, ...]:
    """Its name."""
    return tuple(row["cell"])


def test_the_readme_has_the_tables_as_they_are_printed() -> None:
    text = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    for found in claims.tables().values():
        assert found in text


def test_every_claim_has_rows_and_every_row_its_own_cell() -> None:
    assert {cell(row)[0] for row in ROWS} == set(claims.CLAIMS)
    assert len({cell(row) for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", [row for row in ROWS if row["cell"][2] != claims.EARLIER], ids=cell)
def test_a_row_is_what_its_command_runs(row: dict[str, Any]) -> None:
    name, task, method, seed, trial = row["cell"]
    claim = claims.CLAIMS[name]
    values = claims.settings(claim, claim.contenders[method], task, seed, trial, Path("DIR"), Path("KEEP"))
    run = promptuary.load_run({**values, "out": "out"})
    # read again, so that settings which came after the row have their defaults, as they had in effect
    assert run.model_dump(mode="json") == promptuary.load_run({**row["run"], "out": "out"}).model_dump(mode="json")
    assert row["command"] == f"python benchmarks/claims.py {name} --data DIR"


def test_rows_say_where_they_are_from_and_nothing_of_the_machines_folders() -> None:
    for row in ROWS:
        assert row["machine"]
        assert row["versions"]["torch"]
    text = claims.PATH.read_text(encoding="utf-8")
    assert not any(f'"{place}' in text for place in ("/", "~"))


def test_the_effort_is_the_same_and_tuning_never_sees_a_test() -> None:
    for row in ROWS:
        name, _, method, seed, _ = row["cell"]
        if method == claims.EARLIER:
            continue
        claim = claims.CLAIMS[name]
        assert (seed in claim.tuned_with) == ("test" not in row)
        if "test" in row:
            assert seed in range(claim.seeds)
            assert row["tuning"]["seeds"] == list(claim.tuned_with)
            assert row["cell"][4] == max(zip(row["tuning"]["validation"], _falling(row), strict=True))[1] * -1


def _falling(row: dict[str, Any]) -> list[float]:
    """The trials, so that the first one of equals is the largest."""
    return [-trial for trial in row["tuning"]["trials"]]


def test_contenders_of_one_comparison_have_equal_steps_trials_and_seeds() -> None:
    tested = sorted((row for row in ROWS if "tuning" in row), key=lambda row: (row["cell"][0], row["cell"][1]))
    for (name, _), group in groupby(tested, key=lambda row: row["cell"][:2]):
        rows = list(group)
        methods = {row["cell"][2] for row in rows}
        for spent in {bool(row.get("forward_calls")) for row in rows}:
            own = [row for row in rows if bool(row.get("forward_calls")) == spent]
            assert len({(row["steps"], row.get("forward_calls"), len(row["tuning"]["trials"])) for row in own}) == 1
        assert len(rows) == len(methods) * claims.CLAIMS[name].seeds
