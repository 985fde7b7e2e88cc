"""Statistics of a comparison: by hand, against scipy, and on scores whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from promptuary.comparing import statistics


def test_mean_and_spread_by_hand() -> None:
    assert statistics.spread([0.5, 0.7, 0.9]) == (pytest.approx(0.7), pytest.approx(0.2))
    assert statistics.spread([0.5]) == (0.5, None)
    with pytest.raises(ValueError, match="at least one"):
        statistics.spread([])


def test_holm_by_hand() -> None:
    # 3 x 0.01, 2 x 0.02, 1 x 0.04, and none below the one before it
    assert statistics.holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert statistics.holm([0.5, 0.6]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def test_average_ranks_by_hand_with_ties_and_with_errors_that_should_be_low() -> None:
    scores = np.array([[0.9, 0.8, 0.8], [0.1, 0.2, 0.3]])
    # block 1: 1, 2.5, 2.5; block 2 (lower is better): 1, 2, 3
    assert statistics.average_ranks(scores, higher_is_better=[True, False]) == [1.0, 2.25, 2.75]
    drawn = np.random.default_rng(0).integers(0, 4, (5, 6)).astype(float)
    wanted = scipy.stats.rankdata(-drawn, axis=1).mean(axis=0)
    assert statistics.average_ranks(drawn, higher_is_better=[True] * 5) == pytest.approx(wanted)


@pytest.mark.parametrize("methods", range(2, 21))
def test_the_critical_values_are_those_of_the_studentized_range(methods: int) -> None:
    wanted = scipy.stats.studentized_range.ppf(0.95, methods, math.inf) / math.sqrt(2)
    assert statistics.NEMENYI[methods - 2] == pytest.approx(wanted, abs=1e-3)


def test_the_critical_difference_of_demsars_example() -> None:
    # Demšar 2006, section 3.2.2: 4 classifiers on 14 data sets, q 2.569, CD 1.25
    assert statistics.critical_difference(4, 14) == pytest.approx(1.25, abs=0.005)
    assert statistics.critical_difference(4, 1) is None
    assert statistics.critical_difference(21, 14) is None


def test_the_same_scores_show_no_difference_and_other_scores_do() -> None:
    chance = np.random.default_rng(1)
    one = (chance.random((3, 200)) < 0.8).astype(float)
    same = statistics.paired(one, one)
    assert (same.difference, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)
    other = (chance.random((3, 200)) < 0.6).astype(float)
    found, mirrored = statistics.paired(one, other), statistics.paired(other, one)
    assert found.difference == pytest.approx(one.mean() - other.mean())
    assert found.p < 0.01
    assert found.low > 0
    assert (mirrored.difference, mirrored.low, mirrored.high) == pytest.approx(
        (-found.difference, -found.high, -found.low)
    )
    assert mirrored.p == found.p


def test_with_one_seed_the_p_value_is_that_of_a_paired_t_test_where_examples_are_many() -> None:
    chance = np.random.default_rng(2)
    one, other = chance.random((1, 400)), chance.random((1, 400)) - 0.03
    found = statistics.paired(one, other, rounds=20_000)
    wanted = scipy.stats.ttest_rel(one[0], other[0])
    assert found.p == pytest.approx(wanted.pvalue, abs=0.02)
    low, high = wanted.confidence_interval()
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.005)


def test_a_lucky_seed_is_no_better_method() -> None:
    # one seed of three is right everywhere, the others are as the other method: all of the difference is that seed
    one, other = np.full((3, 300), 0.5), np.full((3, 300), 0.5)
    one[0] = 1.0
    found = statistics.paired(one, other)
    # in (2/3)^3 of the draws that seed is missing
    assert found.p == pytest.approx(2 * (2 / 3) ** 3, abs=0.05)


def test_equal_methods_are_seldom_called_different() -> None:
    chance = np.random.default_rng(3)
    drawn = [statistics.paired(*chance.random((2, 5, 60)), seed=trial, rounds=400).p for trial in range(200)]
    assert sum(p < 0.05 for p in drawn) <= 30  # 10 are expected; few seeds make bootstrap intervals a little narrow


def test_the_interval_of_one_method_is_the_binomial_one() -> None:
    scores = np.tile((np.arange(400) < 300).astype(float), (2, 1))
    low, high = statistics.interval(scores, rounds=8000)
    wanted = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert (low, high) == pytest.approx((0.75 - wanted, 0.75 + wanted), abs=0.005)


def test_draws_follow_from_the_seed_and_large_sets_are_drawn_in_parts() -> None:
    scores = np.random.default_rng(4).random((2, 2, 3000))
    one, other = statistics.resampled(scores, 7, 50), statistics.resampled(scores, 7, 50)
    assert one.shape == (50, 2)
    assert (one == other).all()
    assert (one != statistics.resampled(scores, 8, 50)).any()
    assert one.mean(axis=0) == pytest.approx(scores.mean(axis=(1, 2)), abs=0.01)


@pytest.mark.parametrize("shapes", [((2, 3), (3, 2)), ((0, 3), (0, 3))])
def test_scores_that_do_not_match_are_refused(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        statistics.paired(*[np.zeros(shape) for shape in shapes])


def test_enough_is_drawn_for_the_smallest_corrected_p_value() -> None:
    for tests in (1, 45, 190):
        assert tests * 2 / (1 + statistics.rounds_for(tests)) < statistics.ALPHA


def test_verdicts_are_words() -> None:
    say = statistics.verdict
    assert say("a", "b", 0.02, 0.3, higher_is_better=True) == "no difference shown between a and b"
    assert say("a", "b", 0.02, 0.01, higher_is_better=True) == "a is better than b"
    assert say("a", "b", 0.02, 0.01, higher_is_better=False) == "b is better than a"
