"""The benchmark of VPT and SPT: its table is made from rows, rows are what their command runs, all compare alike.

Knows no score, and trains nothing.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

import promptuary
import vision
from foundation import read

ROOT = Path(__file__).parents[2]
ROWS = read(vision.PATH)
TESTED = [row for row in ROWS if "tuning" in row]


def cell(row: dict[str, Any]) -> tuple[Any, ...]:
    """Its name."""
    return tuple(row["cell"])


def test_the_readme_has_the_table_as_it_is_printed() -> None:
    assert vision.table() in (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")


def test_every_row_has_its_own_cell_and_vpt_is_there_for_every_seed() -> None:
    assert len({cell(row) for row in ROWS}) == len(ROWS)
    for name in {row["cell"][1] for row in TESTED}:
        seeds = {row["cell"][2] for row in TESTED if row["cell"][1] == name}
        rivals = {row["cell"][2] for row in TESTED if row["cell"][1] == vision.CONTENDERS[name].rival}
        assert seeds <= rivals == set(range(vision.SEEDS))


@pytest.mark.parametrize("row", ROWS, ids=cell)
def test_a_row_is_what_its_command_runs(row: dict[str, Any]) -> None:
    _, name, seed, *rates = row["cell"]
    values = vision.settings(name, seed, (rates[0], rates[1]), Path("LISTS") / str(seed), Path("MODEL"))
    run = promptuary.load_run({**values, "out": "out"})
    assert run.model_dump(mode="json", exclude={"out"}) == row["run"]
    assert row["command"] == vision.command_of(1)
    assert len(row["losses"]) == row["steps"] == vision.EPOCHS * vision.EPOCH
    assert [epoch for epoch, _ in row["curve"]] == list(range(vision.EPOCHS + 1))


def test_rows_say_where_they_are_from_and_nothing_of_the_machines_folders() -> None:
    for row in ROWS:
        assert row["machine"]
        assert row["versions"]["torch"]
    text = vision.PATH.read_text(encoding="utf-8")
    assert not any(f'"{place}' in text for place in ("/", "~"))


def test_rates_are_the_best_of_vpt_on_a_seed_that_is_never_tested() -> None:
    tried = {cell(row)[3:]: row["validation"]["accuracy"] for row in ROWS if "tuning" not in row}
    assert set(tried) == set(vision.GRID)
    for row in ROWS:
        assert ("test" in row) == ("tuning" in row) == (row["cell"][2] != vision.TUNING_SEED)
    assert {cell(row)[1] for row in ROWS if "tuning" not in row} == {vision.TUNED}
    assert {cell(row)[3:] for row in TESTED} == {max(vision.GRID, key=tried.__getitem__)}


def test_all_methods_of_a_seed_see_the_same_images_and_seeds_differ() -> None:
    hashes = {seed: {row["split_hash"] for row in ROWS if row["cell"][2] == seed} for seed in range(vision.SEEDS)}
    assert all(len(found) == 1 for found in hashes.values())
    assert len(set.union(*hashes.values())) == vision.SEEDS


def test_lists_have_as_many_images_of_each_class_as_they_say_and_no_image_twice(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(sum(vision.SIZES.values()) + 2):
            (tmp_path / "images" / name / f"{number}.png").touch()
    first, again, other = (
        vision.lists(tmp_path / "images", tmp_path / place, seed) for place, seed in (("x", 0), ("y", 0), ("z", 1))
    )
    seen = list[str]()
    for split, count in vision.SIZES.items():
        rows = list(csv.DictReader((first / f"{split}.csv").read_text(encoding="utf-8").splitlines()))
        assert [row["label"] for row in rows] == ["a"] * count + ["b"] * count
        assert all(Path(row["image"]).parent.name == row["label"] for row in rows)
        seen += [row["image"] for row in rows]
        assert (first / f"{split}.csv").read_bytes() == (again / f"{split}.csv").read_bytes()
    assert len(set(seen)) == len(seen)
    assert (first / "train.csv").read_bytes() != (other / "train.csv").read_bytes()


def test_too_few_images_are_said(tmp_path: Path) -> None:
    (tmp_path / "images/a").mkdir(parents=True)
    with pytest.raises(SystemExit, match="holds 0 images; 46 are needed"):
        vision.lists(tmp_path / "images", tmp_path, 0)


def test_the_epoch_is_the_first_one_that_reaches_the_score() -> None:
    curve = [[0, 0.1], [1, 0.4], [2, 0.3], [3, 0.5]]
    assert [vision.epoch_of(curve, score) for score in (0.1, 0.35, 0.5, 0.6)] == [0, 1, 3, float("inf")]
