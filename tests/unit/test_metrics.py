"""The scores against scikit-learn and scipy, and what they say where those say nothing.

Knows no task or model.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from promptuary import metrics
from promptuary.errors import ConfigError

LABELS = ("no", "maybe", "yes")


def pairs(item: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[list[Any], list[Any]]]:
    rows = st.lists(st.tuples(item, item), min_size=1, max_size=30)
    return rows.map(lambda rows: ([gold for gold, _ in rows], [answer for _, answer in rows]))


def numbers() -> st.SearchStrategy[float]:
    return st.integers(-50, 50).map(lambda value: value / 4)


@given(pairs(st.sampled_from(LABELS)))
def test_accuracy_equals_scikit_learn(pair: tuple[list[str], list[str]]) -> None:
    assert metrics.accuracy(*pair) == pytest.approx(sklearn.metrics.accuracy_score(*pair))


@given(pairs(st.sampled_from(LABELS)))
def test_macro_f1_equals_scikit_learn(pair: tuple[list[str], list[str]]) -> None:
    expected = sklearn.metrics.f1_score(*pair, average="macro", zero_division=0)
    assert metrics.macro_f1(*pair) == pytest.approx(expected)


@given(pairs(st.sampled_from((0, 1))), st.sampled_from((0, 1)))
def test_f1_equals_scikit_learn(pair: tuple[list[int], list[int]], positive: int) -> None:
    expected = sklearn.metrics.f1_score(*pair, labels=[positive], average="macro", zero_division=0)
    assert metrics.f1(*pair, positive=positive) == pytest.approx(expected)


@given(pairs(st.sampled_from(LABELS)))
@pytest.mark.filterwarnings("ignore:A single label was found")
def test_matthews_equals_scikit_learn(pair: tuple[list[str], list[str]]) -> None:
    assert metrics.matthews(*pair) == pytest.approx(sklearn.metrics.matthews_corrcoef(*pair), abs=1e-12)


@given(pairs(numbers()))
def test_correlations_and_errors_equal_scipy_and_scikit_learn(pair: tuple[list[float], list[float]]) -> None:
    gold, predicted = pair
    assert metrics.mean_squared_error(*pair) == pytest.approx(sklearn.metrics.mean_squared_error(*pair))
    if len(set(gold)) > 1 and len(set(predicted)) > 1:
        assert metrics.pearson(*pair) == pytest.approx(scipy.stats.pearsonr(*pair).statistic, abs=1e-9)
        assert metrics.spearman(*pair) == pytest.approx(scipy.stats.spearmanr(*pair).statistic, abs=1e-9)
    else:
        assert metrics.pearson(*pair) == metrics.spearman(*pair) == 0.0


def test_long_random_inputs_equal_the_oracles() -> None:
    generator = np.random.default_rng(0)
    gold, noise = generator.normal(size=(2, 2000))
    predicted = np.round(gold + noise, 1)
    assert metrics.spearman(gold.tolist(), predicted.tolist()) == pytest.approx(
        scipy.stats.spearmanr(gold, predicted).statistic
    )
    labels = generator.integers(0, 77, size=(2, 5000))
    assert metrics.macro_f1(*labels.tolist()) == pytest.approx(sklearn.metrics.f1_score(*labels, average="macro"))
    assert metrics.matthews(*labels.tolist()) == pytest.approx(sklearn.metrics.matthews_corrcoef(*labels))


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("abcd")), min_size=1))
def test_confusion_and_accuracy_by_class_equal_scikit_learns(pairs: list[tuple[str, str]]) -> None:
    gold, predicted = map(list, zip(*pairs, strict=True))
    labels = ["d", "b", "unused", "a", "c"]
    table = metrics.confusion(gold, predicted, labels)
    np.testing.assert_array_equal(table, sklearn.metrics.confusion_matrix(gold, predicted, labels=labels))
    expected = sklearn.metrics.recall_score(gold, predicted, labels=labels, average=None, zero_division=np.nan)
    np.testing.assert_allclose(metrics.per_class_accuracy(gold, predicted, labels), expected)
    # weighted by their examples, the classes make the whole
    assert np.nansum(metrics.per_class_accuracy(gold, predicted, labels) * table.sum(1)) / len(gold) == pytest.approx(
        metrics.accuracy(gold, predicted)
    )


@pytest.mark.parametrize(
    ("gold", "predicted", "labels", "message"),
    [
        (["a"], ["c"], ["a", "b"], "among the 2 given ones, got 'c'"),
        (["c"], ["a"], ["a", "b"], "got 'c'"),
        ([1], ["1"], [1], "got '1'"),
        (["a"], ["a"], ["a", "a"], "each label once"),
        (["a"], ["a", "a"], ["a"], "2 answers to 1"),
        ([], [], ["a"], "at least one"),
    ],
)
def test_confusion_refuses_what_it_cannot_count(gold: Any, predicted: Any, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.confusion(gold, predicted, labels)


SHARES = st.just(0.0) | st.floats(1e-6, 1)


@given(SHARES, SHARES)
def test_the_harmonic_mean_is_scipys_and_never_above_twice_the_smaller(base: float, new: float) -> None:
    found = metrics.harmonic_mean(base, new)
    assert found == pytest.approx(scipy.stats.hmean([base, new]) if base and new else 0.0, abs=1e-12)
    assert found == metrics.harmonic_mean(new, base)
    assert found <= 2 * min(base, new) + 1e-12


@pytest.mark.parametrize("pair", [(-0.1, 0.5), (0.5, -0.5), (-1.0, -1.0), (0.0, 0.0)])
def test_the_harmonic_mean_with_a_score_that_is_not_above_zero_is_zero(pair: tuple[float, float]) -> None:
    assert metrics.harmonic_mean(*pair) == 0.0


def test_a_constant_answer_that_is_no_exact_binary_number_has_no_correlation() -> None:
    assert metrics.pearson([1.0, 2.0, 3.0], [0.1, 0.1, 0.1]) == 0.0
    assert metrics.matthews(["a", "b", "a"], ["a", "a", "a"]) == 0.0


def test_labels_of_different_types_are_different() -> None:
    assert metrics.accuracy(["1", "0"], [1, 0]) == 0.0


def test_f1_takes_the_second_of_the_sorted_labels_as_positive() -> None:
    gold, predicted = ["no", "no", "yes"], ["no", "yes", "yes"]
    assert metrics.f1(gold, predicted) == metrics.f1(gold, predicted, positive="yes") == pytest.approx(2 / 3)


def test_f1_does_not_count_an_unreadable_answer_as_a_third_label() -> None:
    assert metrics.f1(["no", "yes"], [None, "yes"]) == 1.0
    assert metrics.f1(["no", "yes"], ["zebra", "yes"]) == 1.0


def test_f1_of_examples_that_are_all_negative_is_zero() -> None:
    assert metrics.f1([0, 0], [0, 1]) == 0.0
    assert metrics.f1(["no", "no"], [None, "yes"]) == 0.0


def test_f1_of_three_labels_is_refused() -> None:
    with pytest.raises(ValueError, match="two labels, got 3; use macro_f1"):
        metrics.f1(["a", "b", "c"], ["a", "b", "c"])


@pytest.mark.parametrize(
    ("gold", "predicted", "same"),
    [
        ("The  Cat!", "cat", True),
        ("a an the", "", True),
        ("U.S.", "us", True),
        ("theatre", "atre", False),
        ("two words", "words two", False),
    ],
)
def test_exact_match_ignores_case_punctuation_articles_and_white_space(gold: str, predicted: str, same: bool) -> None:
    assert metrics.exact_match([gold], [predicted]) == float(same)


def test_token_f1_is_the_mean_over_pairs_of_shared_words() -> None:
    # precision 1/2, recall 1/3; a repeated word counts as often as it stands in both
    assert metrics.token_f1(["one two three"], ["one four"]) == pytest.approx(0.4)
    assert metrics.token_f1(["one one"], ["one one one"]) == pytest.approx(0.8)
    assert metrics.token_f1(["the", "x", "x"], ["", "", "x"]) == pytest.approx(2 / 3)


@given(pairs(st.text("aN .,the", max_size=12)))
def test_an_exact_match_has_full_token_f1(pair: tuple[list[str], list[str]]) -> None:
    assert 0.0 <= metrics.exact_match(*pair) <= metrics.token_f1(*pair) + 1e-12 <= 1.0 + 1e-9


JUDGED = {"reward": 100.0, "content": 100.0, "style": 1.0, "fluency": 1.0}
"""The best that judges can say of an answer."""


@pytest.mark.parametrize("name", metrics.METRICS)
def test_unequal_or_no_examples_are_refused(name: str) -> None:
    function = metrics.METRICS[name].function
    item: Any = {"value": 1.0, "judged": JUDGED}.get(metrics.METRICS[name].kind, "a")
    with pytest.raises(ValueError, match="1 answers to 2 examples"):
        function([item, item], [item])
    with pytest.raises(ValueError, match="at least one example"):
        function([], [])


@pytest.mark.parametrize("name", metrics.METRICS)
def test_right_answers_score_best_and_every_score_is_a_plain_float(name: str) -> None:
    metric = metrics.METRICS[name]
    gold: list[Any] = {"value": [1.0, 2.0, 1.0], "judged": [JUDGED] * 3}.get(metric.kind, ["x", "y", "x"])
    score = metric.function(gold, gold)
    assert type(score) is float
    assert score / (100 if metric.kind == "judged" else 1) == pytest.approx(1.0 if metric.higher_is_better else 0.0)


def test_compute_keeps_the_order_of_the_names() -> None:
    assert list(metrics.compute(["macro_f1", "accuracy"], ["a", "b"], ["a", "b"])) == ["macro_f1", "accuracy"]


def test_an_unknown_metric_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r'no such metric: "acuracy"; did you mean "accuracy"\?'):
        metrics.compute(["acuracy"], ["a"], ["a"])


def test_the_majority_baseline_answers_the_most_frequent_training_label() -> None:
    assert metrics.majority_baseline(["a", "b", "b"], ["b", "a", "b", "c"]) == 0.5
    assert metrics.majority_baseline(["b", "a"], ["a"]) == metrics.majority_baseline(["a", "b"], ["a"]) == 1.0
    with pytest.raises(ValueError, match="at least one training label"):
        metrics.majority_baseline([], ["a"])


def test_the_bootstrap_interval_is_seeded_and_near_the_normal_one() -> None:
    correct = [1.0] * 800 + [0.0] * 200
    low, high = metrics.bootstrap_interval(correct)
    half = 1.96 * math.sqrt(0.8 * 0.2 / 1000)
    assert (low, high) == metrics.bootstrap_interval(correct)
    assert (low, high) != metrics.bootstrap_interval(correct, seed=1)
    assert (low, high) == pytest.approx((0.8 - half, 0.8 + half), abs=0.005)
    assert metrics.bootstrap_interval([1.0, 1.0]) == (1.0, 1.0)
    with pytest.raises(ValueError, match="at least one"):
        metrics.bootstrap_interval([])
