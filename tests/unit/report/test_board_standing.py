"""Rows, columns and numbers of a leaderboard, by hand.

Knows no page.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest

import boards
from promptuary.report import figures, found
from promptuary.report.charts import Point, Series, chart, thinned
from promptuary.report.standing import Standing, ranked, standing, verdict


def stood(folder: Path) -> Standing:
    return standing(found.look(folder).runs)


def test_seeds_are_put_together_with_mean_spread_and_interval(tmp_path: Path) -> None:
    for seed, score in enumerate((0.7, 0.8, 0.9)):
        boards.write(tmp_path / f"s{seed}", seed=seed, score=score, interval=(score - 0.05, score + 0.05))
    table = stood(tmp_path)
    assert [row.name for row in table.rows] == ["ept"]
    cell = table.rows[0].cells[0]
    assert cell.seeds == 3
    assert cell.mean == pytest.approx(0.8)
    assert cell.spread == pytest.approx(0.1)
    # Student's t for two degrees of freedom, which is wider than the examples' 0.05
    half = 4.303 * 0.1 / math.sqrt(3)
    assert cell.interval == pytest.approx((0.8 - half, 0.8 + half))


def test_the_interval_is_that_of_the_examples_where_seeds_agree(tmp_path: Path) -> None:
    for seed in range(3):
        boards.write(tmp_path / f"s{seed}", seed=seed, score=0.8, interval=(0.7, 0.85))
    assert stood(tmp_path).rows[0].cells[0].interval == pytest.approx((0.7, 0.85))


def test_a_seed_that_was_run_twice_counts_once_and_is_noted(tmp_path: Path) -> None:
    boards.write(tmp_path / "a", seed=1, score=0.5)
    boards.write(tmp_path / "b", seed=1, score=0.9, train__threads=4)
    table = stood(tmp_path)
    assert table.rows[0].cells[0].seeds == 1
    assert table.rows[0].cells[0].mean == 0.5
    assert table.notes == ("ept: 1 runs repeat a seed; each seed is counted once",)


def test_rows_are_told_apart_by_the_fewest_settings(tmp_path: Path) -> None:
    for rank in (4, 8):
        for rate in (0.1, 0.2):
            # the warm-up goes along with the rate and needs no mention
            boards.write(tmp_path / f"{rank}-{rate}", method__rank=rank, method__prompt_lr=rate, train__warmup=rate)
    boards.write(tmp_path / "other", method={"name": "dept", "rank": 3})
    assert {row.name for row in stood(tmp_path).rows} == {
        "dept",
        "ept (rank 4, prompt_lr 0.1)",
        "ept (rank 4, prompt_lr 0.2)",
        "ept (rank 8, prompt_lr 0.1)",
        "ept (rank 8, prompt_lr 0.2)",
    }


def test_a_setting_that_is_other_in_each_task_makes_no_row(tmp_path: Path) -> None:
    for task, rate in (("sst2", 0.1), ("rte", 0.3)):
        boards.write(tmp_path / task, suite=f"glue/{task}", method__prompt_lr=rate, task__template=f"{{text}} {task}")
    table = stood(tmp_path)
    assert [row.name for row in table.rows] == ["ept"]
    assert [column.name for column in table.columns] == ["glue/rte", "glue/sst2"]
    assert ("Model", "acme/small") in table.shared


def test_names_of_columns_hold_what_differs(tmp_path: Path) -> None:
    for name, changes in {
        "a": {},
        "b": {"data__shots": 4},
        "c": {"data__shots": None},
        "d": {"data__classes": "base"},
    }.items():
        boards.write(tmp_path / name, **changes)
    names = [column.name for column in stood(tmp_path).columns]
    assert len(set(names)) == 4
    assert "4 shots" in names[1]
    assert "all rows" in names[2]
    assert "classes base" in names[3]


def test_ranks_share_places_and_the_average_is_over_tasks(tmp_path: Path) -> None:
    assert ranked({0: 0.9, 1: 0.8, 2: 0.8, 3: 0.1}, higher=True) == {0: 1.0, 1: 2.5, 2: 2.5, 3: 4.0}
    assert ranked({0: 0.9, 1: 0.8}, higher=False) == {0: 2.0, 1: 1.0}
    for method, scores in {"ept": (0.9, 0.5), "dept": (0.8, 0.7), "lamp": (0.7, None)}.items():
        for task, score in zip(("sst2", "rte"), scores, strict=True):
            if score is not None:
                boards.write(tmp_path / f"{method}-{task}", method__name=method, suite=task, score=score)
    rows = {row.name: row for row in stood(tmp_path).rows}
    assert (rows["ept"].rank, rows["dept"].rank, rows["lamp"].rank) == (1.5, 1.5, 3.0)
    # a method that lacks a task comes after those that have all
    assert list(rows)[-1] == "lamp"


def test_a_score_that_is_better_when_it_is_lower(tmp_path: Path) -> None:
    for method, score in (("ept", 2.0), ("dept", 1.0)):
        told = {"metrics": {"mean_squared_error": score}, "primary_metric": "mean_squared_error", "interval_95": None}
        boards.write(tmp_path / method, method__name=method, result=told)
    table = stood(tmp_path)
    assert [row.name for row in table.rows] == ["dept", "ept"]
    assert verdict(table, 0).text == "dept has the lowest mean (1). No difference is shown from ept."


def pair(folder: Path, first: list[float], second: list[float], around: float = 0.001) -> Standing:
    for method, scores in (("ept", first), ("dept", second)):
        for seed, score in enumerate(scores):
            interval = (score - around, score + around)
            boards.write(folder / f"{method}{seed}", method__name=method, seed=seed, score=score, interval=interval)
    return stood(folder)


def test_no_difference_is_said_in_words_and_nobody_is_best(tmp_path: Path) -> None:
    found = verdict(pair(tmp_path, [0.80, 0.84], [0.79, 0.83]), 0)
    assert found.best is None
    assert found.text == "ept has the highest mean (82.0). No difference is shown from dept."


def test_a_method_above_all_others_is_best(tmp_path: Path) -> None:
    table = pair(tmp_path, [0.90, 0.901, 0.902], [0.70, 0.701, 0.702])
    found = verdict(table, 0)
    assert found.best is not None
    assert table.rows[found.best].name == "ept"
    assert found.text == "ept has the highest mean (90.1). Its interval meets none of the others."


def test_examples_count_too_where_seeds_agree(tmp_path: Path) -> None:
    assert verdict(pair(tmp_path, [0.9] * 3, [0.8] * 3, around=0.06), 0).best is None


def test_one_seed_is_no_evidence(tmp_path: Path) -> None:
    found = verdict(pair(tmp_path, [0.9], [0.5]), 0)
    assert found.best is None
    assert "one seed, which says nothing of other seeds" in found.text


def test_costs_are_ratios_to_prompt_tuning_on_the_same_machine_and_task(tmp_path: Path) -> None:
    other = {**boards.MACHINE, "processor": "two"}
    for name, method, seconds, machine in (
        ("a", "prompt_tuning", 0.5, boards.MACHINE),
        ("b", "ept", 1.0, boards.MACHINE),
        ("c", "dept", 9.0, other),
    ):
        told = {"seconds_per_step_median": seconds, "peak_memory_bytes": int(seconds * 2**30)}
        boards.write(tmp_path / name, method__name=method, result=told, machine=machine)
    boards.write(tmp_path / "d", method__name="lamp", suite="elsewhere")
    rows = {row.name: row for row in stood(tmp_path).rows}
    assert (rows["prompt_tuning"].time, rows["ept"].time, rows["ept"].memory) == (1.0, 2.0, 2.0)
    assert rows["dept"].time is None
    assert rows["lamp"].time is None


def test_small_test_sets_are_known(tmp_path: Path) -> None:
    boards.write(tmp_path / "a", result={"examples": {"test": 80}})
    boards.write(tmp_path / "b", seed=1, result={"examples": {"test": 100}})
    table = stood(tmp_path)
    assert table.columns[0].per_example == 1.25
    assert table.notes == ("classify: runs have test sets of different sizes (80, 100)",)


def test_unfinished_runs_stand_in_their_row_without_a_score(tmp_path: Path) -> None:
    boards.write(tmp_path / "a", seed=0)
    boards.write(tmp_path / "b", seed=1, finished=False)
    boards.write(tmp_path / "c", seed=2, finished=False, curve=())
    table = stood(tmp_path)
    assert len(table.columns) == len(table.rows) == 1
    assert table.rows[0].pending == 2
    assert table.rows[0].cells[0].seeds == 1


def test_a_curve_is_the_mean_of_seeds_with_their_ends(tmp_path: Path) -> None:
    boards.write(tmp_path / "a", seed=0, curve=(0.0, 0.2, 0.4))
    boards.write(tmp_path / "b", seed=1, curve=(0.2, 0.4))
    boards.write(tmp_path / "c", seed=2, curve=(0.4, 0.9))
    runs = found.look(tmp_path).runs
    (drawn,) = figures.curves(standing(runs), {run.place: run for run in runs}, 5, 10).charts
    # step 20 is on one of three seeds, fewer than half
    assert drawn.x_ticks[0].text == "0"
    (line,) = drawn.series
    assert line.line.count("L") == 1
    first, second = (float(part.split()[1]) for part in line.line[1:].split("L"))
    span = drawn.bottom - drawn.top
    assert first == pytest.approx(drawn.bottom - 0.2 * span, abs=0.1)
    assert second == pytest.approx(drawn.bottom - 0.5 * span, abs=0.1)
    assert "from 20.0 at 0 to 50.0 at 10" in drawn.told


def test_a_size_has_a_curve_where_nothing_else_differs(tmp_path: Path) -> None:
    for rank, score in ((4, 0.5), (8, 0.6), (16, 0.8)):
        boards.write(tmp_path / str(rank), method__rank=rank, score=score)
    boards.write(tmp_path / "other", method__rank=32, method__prompt_lr=0.9)
    (drawn,) = figures.sizes(stood(tmp_path), 5).charts
    assert drawn.title == "rank: classify"
    assert "from 50.0 at 4 to 80.0 at 16" in drawn.told


def test_shots_have_a_curve_over_columns(tmp_path: Path) -> None:
    for shots, score in ((1, 0.5), (16, 0.9)):
        boards.write(tmp_path / str(shots), data__shots=shots, score=score)
    (drawn,) = figures.sizes(stood(tmp_path), 5).charts
    assert "from 50.0 at 1 to 90.0 at 16" in drawn.told


def test_robustness_is_shown_where_runs_hold_it(tmp_path: Path) -> None:
    for seed, score in enumerate((0.4, 0.6)):
        under = {"C1": {"scores": {"accuracy": score}}, "W1": {"scores": {"accuracy": 0.7}}, "bad": 3}
        told = {"metric": "accuracy", "clean": {"scores": {"accuracy": 0.8}}, "perturbed": under}
        boards.write(tmp_path / str(seed), seed=seed, result={"robustness": told})
    (one,) = figures.robust(stood(tmp_path))
    assert (one.clean, one.mean, one.worst) == ("80.0", "60.0", "C1 50.0")


def test_zero_has_a_place_on_an_axis_of_powers(tmp_path: Path) -> None:
    points = [Series(str(x), "1", 0, (Point(x, 0.5, 0.5, 0.5, "t"),)) for x in (0, 10, 1000)]
    drawn = chart("t", points, "x", "y", str, log=True, dotted=True)
    places = [one.dots[0].x for one in drawn.series]
    assert places == sorted(places)
    assert [tick.text for tick in drawn.x_ticks] == ["0", "10", "100", "1k"]
    assert all(drawn.left <= place <= drawn.right for place in places)


def test_thinned_keeps_the_ends() -> None:
    assert thinned(range(100), 5) == [0, 25, 50, 74, 99]
    assert thinned([1, 2], 5) == [1, 2]
