"""The order of a run over several tasks: how often each comes, that no row is left out, and that any step can be asked.

Knows no task.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from promptuary.data.mixture import BLOCK, Mixture, rates

SIZES = (3, 10, 47)


def made(batch_size: int = 4, **settings: Any) -> Mixture:
    lengths = [[1 + (7 * row + task) % 13 for row in range(size)] for task, size in enumerate(SIZES)]
    return Mixture(lengths, batch_size, **{"seed": 0, **settings})


# ---- rates -------------------------------------------------------------------------------------------------------


def test_rates_follow_their_formulas() -> None:
    sizes = [100, 400, 2500]
    assert rates(sizes, "uniform").tolist() == pytest.approx([1 / 3] * 3)
    assert rates(sizes, "proportional").tolist() == pytest.approx([size / 3000 for size in sizes])
    assert rates(sizes, "temperature", temperature=2).tolist() == pytest.approx([10 / 80, 20 / 80, 50 / 80])
    assert rates(sizes, "temperature", temperature=1).tolist() == pytest.approx(rates(sizes, "proportional").tolist())
    assert rates(sizes, "temperature", temperature=1e9).tolist() == pytest.approx([1 / 3] * 3)
    assert rates(sizes, "proportional", limit=400).tolist() == pytest.approx([100 / 900, 400 / 900, 400 / 900])


def test_cold_mixtures_of_huge_tasks_do_not_overflow() -> None:
    found = rates([10**9, 10**9 // 2], "temperature", temperature=0.01)
    assert found.tolist() == pytest.approx([1.0, 2.0**-100], rel=1e-6)


@pytest.mark.parametrize(
    ("sizes", "settings"), [([], {}), ([3, 0], {}), ([3], {"temperature": 0.0}), ([3], {"limit": 0})]
)
def test_impossible_mixtures_are_refused(sizes: list[int], settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        rates(sizes, "temperature", **settings)


def test_impossible_batches_and_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_size"):
        made(0)
    with pytest.raises(ValueError, match="choose one"):
        made(mixed=True, bucket=True)
    with pytest.raises(ValueError, match="-1"):
        made().at(-1)


# ---- what comes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("strategy", ["uniform", "proportional", "temperature"])
def test_tasks_come_as_often_as_their_rate_says(strategy: Any, mixed: bool) -> None:
    order = made(strategy=strategy, temperature=3.0, mixed=mixed)
    steps = 1500 if mixed else 6000
    draws = steps * (4 if mixed else 1)
    for count, rate in zip(order.taken(steps).tolist(), order.rates.tolist(), strict=True):
        assert abs(count - draws * rate) < 4 * math.sqrt(draws * rate * (1 - rate))


def test_a_batch_has_one_task_or_mixes_them() -> None:
    assert all(len({task for task, _ in made().at(step)}) == 1 for step in range(200))
    kinds = [len({task for task, _ in made(mixed=True).at(step)}) for step in range(200)]
    assert max(kinds) == 3
    assert all(len(made(mixed=True).at(step)) == 4 for step in range(50))


@pytest.mark.parametrize("settings", [{}, {"bucket": True}, {"mixed": True}])
def test_each_pass_over_a_task_takes_every_row_once(settings: dict[str, Any]) -> None:
    order = made(**settings)
    rows: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for step in range(300):
        for task, row in order.at(step):
            rows[task].append(row)
    for task, size in enumerate(SIZES):
        passes = [rows[task][start : start + size] for start in range(0, len(rows[task]) - size + 1, size)]
        assert len(passes) > 1
        assert all(sorted(one) == list(range(size)) for one in passes)
        if size > 3 and "bucket" not in settings:
            assert len({tuple(one) for one in passes}) == len(passes)  # each in another order


def test_buckets_bring_similar_lengths_together() -> None:
    def spread(bucket: bool) -> float:
        order, found = made(bucket=bucket), []
        for step in range(300):
            lengths = [order.lengths[task][row] for task, row in order.at(step)]
            found.append(max(lengths) - min(lengths))
        return sum(found) / len(found)

    assert spread(True) < 0.7 * spread(False)


def test_the_last_batch_of_a_pass_holds_what_is_left() -> None:
    order = made(strategy="proportional")
    sizes = Counter((places[0][0], len(places)) for places in map(order.at, range(400)))
    assert {size for task, size in sizes if task == 0} == {3}
    assert {size for task, size in sizes if task == 1} == {4, 2}
    assert {size for task, size in sizes if task == 2} == {4, 3}


# ---- going on ----------------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 3 * BLOCK), min_size=1, max_size=6),
    st.booleans(),
    st.integers(0, 3),
    st.sampled_from(["uniform", "proportional"]),
)
def test_any_step_can_be_asked_for_by_itself_in_any_order(
    steps: list[int], mixed: bool, seed: int, strategy: Any
) -> None:
    used = made(mixed=mixed, seed=seed, strategy=strategy)
    for step in steps:  # one object that was asked for others before, and a fresh one that was not
        assert used.at(step) == made(mixed=mixed, seed=seed, strategy=strategy).at(step)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_run_that_goes_on_sees_what_the_unbroken_one_sees(mixed: bool) -> None:
    border = BLOCK // (4 if mixed else 1)
    unbroken = made(mixed=mixed)
    wanted = [unbroken.at(step) for step in range(border - 30, border + 30)]
    later = made(mixed=mixed)
    assert [later.at(step) for step in range(border, border + 30)] == wanted[30:]


def test_another_seed_is_another_order_and_the_global_generator_is_untouched() -> None:
    before = torch.random.get_rng_state()
    orders = [[made(seed=seed).at(step) for step in range(50)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_adding_rows_to_one_task_leaves_the_order_of_tasks_alone() -> None:
    longer = Mixture([[1] * 3, [1] * 10, [1] * 90], 4, seed=0)
    assert [longer.at(step)[0][0] for step in range(100)] == [made().at(step)[0][0] for step in range(100)]
