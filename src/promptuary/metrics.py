"""Scores of answers against the right ones, as pure NumPy functions, and the table that names them.

Knows no task, model or file; scikit-learn and scipy are the oracles in its tests, never imports.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from promptuary.errors import ConfigError
from promptuary.registry import suggest

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _check(gold: Sequence[Any], predicted: Sequence[Any]) -> None:
    if len(gold) != len(predicted):
        raise ValueError(f"expected one answer per example, got {len(predicted)} answers to {len(gold)} examples")
    if len(gold) == 0:
        raise ValueError("expected at least one example to score, got none")


# ---- labels ---------------------------------------------------------------------------------------------------------


def accuracy(gold: Sequence[Hashable], predicted: Sequence[Hashable]) -> float:
    """Share of examples with the right label. Labels are compared as they are: "1" is not 1."""
    _check(gold, predicted)
    return sum(g == p for g, p in zip(gold, predicted, strict=True)) / len(gold)


def _f1_of(label: Hashable, gold: Sequence[Hashable], predicted: Sequence[Hashable]) -> float:
    right = sum(g == label and p == label for g, p in zip(gold, predicted, strict=True))
    told = sum(g == label for g in gold) + sum(p == label for p in predicted)
    return 2 * right / told if told else 0.0


def macro_f1(gold: Sequence[Hashable], predicted: Sequence[Hashable]) -> float:
    """Mean F1 over every label that is right or was answered somewhere, each counted alike (as scikit-learn does).

    An answer of "" is none: it is wrong, and no label of its own; our choice.
    """
    _check(gold, predicted)
    answered = (answer for answer in predicted if answer != "")
    # dict.fromkeys and not set: the order of a sum must not depend on string hashes
    return float(np.mean([_f1_of(label, gold, predicted) for label in dict.fromkeys((*gold, *answered))]))


def f1(gold: Sequence[Any], predicted: Sequence[Any], positive: Any = None) -> float:
    """F1 of one label against the rest.

    Args:
        gold: right labels.
        predicted: answers, which may hold labels that are never right, and "" where there was no answer.
        positive: the label that counts; without it, the second of the sorted right labels. Where only one label is
            ever right, the answers of the same type tell what the other one is.

    Raises:
        ValueError: unequal lengths, no examples, or more than two labels and no `positive`.
    """
    _check(gold, predicted)
    if positive is None:
        labels = set(gold)
        if len(labels) == 1:
            labels |= {answer for answer in predicted if type(answer) is type(gold[0]) and answer != ""}
        if len(labels) > 2:
            raise ValueError(f"f1 is for two labels, got {len(labels)}; use macro_f1, or say which one is positive")
        positive = max(labels)
    return _f1_of(positive, gold, predicted)


def matthews(gold: Sequence[Hashable], predicted: Sequence[Hashable]) -> float:
    """Matthews' correlation for any number of labels (Gorodkin's R_K); 0.0 if either side is constant."""
    _check(gold, predicted)
    codes = {label: code for code, label in enumerate(dict.fromkeys((*gold, *predicted)))}
    table = np.zeros((len(codes), len(codes)))
    np.add.at(table, ([codes[g] for g in gold], [codes[p] for p in predicted]), 1)
    true, told, total = table.sum(1), table.sum(0), table.sum()
    # R_K = (c s - t.p) / sqrt((s^2 - p.p)(s^2 - t.t))
    below = (total**2 - told @ told) * (total**2 - true @ true)
    return float((np.trace(table) * total - true @ told) / np.sqrt(below)) if below > 0 else 0.0


def confusion(
    gold: Sequence[Hashable], predicted: Sequence[Hashable], labels: Sequence[Hashable]
) -> npt.NDArray[np.int64]:
    """How often each label was answered with each: [c, c], right labels down, answers across, in the order of `labels`.

    Raises:
        ValueError: unequal lengths, no examples, a label that stands twice, or one that is not among `labels`.
    """
    _check(gold, predicted)
    codes = {label: code for code, label in enumerate(labels)}
    if len(codes) < len(labels):
        raise ValueError("expected each label once")
    strange = next((label for label in (*gold, *predicted) if label not in codes), None)
    if strange is not None:
        raise ValueError(f"expected labels among the {len(labels)} given ones, got {strange!r}")
    table = np.zeros((len(labels), len(labels)), dtype=np.int64)
    np.add.at(table, ([codes[g] for g in gold], [codes[p] for p in predicted]), 1)
    return table


def per_class_accuracy(
    gold: Sequence[Hashable], predicted: Sequence[Hashable], labels: Sequence[Hashable]
) -> npt.NDArray[np.float64]:
    """Share of the examples of each label that were answered with it (its recall): [c], NaN for a label without any.

    Raises:
        ValueError: as `confusion`.
    """
    table = confusion(gold, predicted, labels)
    examples = table.sum(1)
    return np.where(examples > 0, np.diag(table) / np.maximum(examples, 1), np.nan)


def harmonic_mean(base: float, new: float) -> float:
    """H = 2 b n / (b + n) of a score on base and on new classes; 0.0 where one of them is not above 0.

    Source: Xian et al. 2017 (arXiv 1703.04394), as CoCoOp (arXiv 2203.05557) and its followers use it.

    Args:
        base: on the classes that were trained on.
        new: the same on the others.
    """
    return 2 * base * new / (base + new) if base > 0 and new > 0 else 0.0


def drop_rate(clean: float, perturbed: float, *, higher_is_better: bool = True) -> float:
    """Share of a score that is lost: 1 - perturbed / clean, of an error perturbed / clean - 1; below 0 where it gains.

    A clean score of 0 has nothing to lose: 0.0, or infinite where it becomes worse still, as an error can. Of a clean
    score below 0, such as a correlation, the share is taken of its size.
    Source: PromptBench (arXiv 2306.04528), performance drop rate; 0, errors and scores below 0 are our choice.
    """
    lost = clean - perturbed if higher_is_better else perturbed - clean
    if clean == 0:
        return math.inf if lost > 0 else 0.0
    return lost / abs(clean)


# ---- values ---------------------------------------------------------------------------------------------------------


def _values(gold: Sequence[float], predicted: Sequence[float]) -> tuple[npt.NDArray[np.float64], ...]:
    _check(gold, predicted)
    return np.asarray(gold, dtype=np.float64), np.asarray(predicted, dtype=np.float64)


def pearson(gold: Sequence[float], predicted: Sequence[float]) -> float:
    """Pearson's correlation; 0.0 if either side is constant, where it is undefined."""
    x, y = _values(gold, predicted)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip((x / np.linalg.norm(x)) @ (y / np.linalg.norm(y)), -1.0, 1.0))


def _ranks(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Ranks from 1, ties averaged: the last rank of a group minus half of its other members."""
    _, group, size = np.unique(x, return_inverse=True, return_counts=True)
    ranks: npt.NDArray[np.float64] = (np.cumsum(size) - (size - 1) / 2)[group]
    return ranks


def spearman(gold: Sequence[float], predicted: Sequence[float]) -> float:
    """Spearman's rank correlation with ties averaged; 0.0 if either side is constant, where it is undefined."""
    x, y = _values(gold, predicted)
    return pearson(_ranks(x).tolist(), _ranks(y).tolist())


def mean_squared_error(gold: Sequence[float], predicted: Sequence[float]) -> float:
    """Mean of the squared differences."""
    x, y = _values(gold, predicted)
    return float(np.mean((x - y) ** 2))


# ---- texts ----------------------------------------------------------------------------------------------------------


def _words(text: str) -> list[str]:
    """SQuAD's normalisation: lower case, no punctuation, no articles, split at white space."""
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def exact_match(gold: Sequence[str], predicted: Sequence[str]) -> float:
    """Share of texts that are equal after SQuAD's normalisation (case, punctuation, articles, white space)."""
    _check(gold, predicted)
    return sum(_words(g) == _words(p) for g, p in zip(gold, predicted, strict=True)) / len(gold)


def _token_f1_of(gold: str, predicted: str) -> float:
    right, told = _words(gold), _words(predicted)
    if not right or not told:
        return float(right == told)
    shared = (Counter(right) & Counter(told)).total()
    return 2 * shared / (len(right) + len(told))


def token_f1(gold: Sequence[str], predicted: Sequence[str]) -> float:
    """Mean F1 over the words of each pair, as SQuAD counts it; two empty texts score 1, one empty text 0."""
    _check(gold, predicted)
    return float(np.mean([_token_f1_of(g, p) for g, p in zip(gold, predicted, strict=True)]))


# ---- judgements ------------------------------------------------------------------------------------------------------


Judgement = Mapping[str, float]
"""What judges say of one answer: `content` and `reward` from 0 to 100, `style` and `fluency` 0 or 1."""


def judged_mean(name: str, gold: Sequence[Any], judged: Sequence[Judgement]) -> float:
    """Mean of one judgement over the answers, from 0 to 100; what is 0 or 1 counts 100."""
    _check(gold, judged)
    return float(np.mean([one[name] for one in judged])) * (100 if name in ("style", "fluency") else 1)


def joint(gold: Sequence[Any], judged: Sequence[Judgement]) -> float:
    """J, the mean over answers of content x style x fluency, 0 to 100 (Krishna et al. 2020, arXiv 2010.05700).

    Without a judge of fluency the mean of content x style.
    """
    _check(gold, judged)
    return float(np.mean([one["content"] * one["style"] * one.get("fluency", 1.0) for one in judged]))


def geometric_mean(gold: Sequence[Any], judged: Sequence[Judgement]) -> float:
    """GM, the geometric mean of the corpus averages of content, style and, where it is judged, fluency; 0 to 100."""
    _check(gold, judged)
    names = [name for name in ("content", "style", "fluency") if all(name in one for one in judged)]
    means = [judged_mean(name, gold, judged) for name in names]
    return float(np.prod(means) ** (1 / len(means)))


# ---- the table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metric:
    """A named score.

    `kind`: what it compares: a "label", one of a "pair" of labels, a "value" (number) or a "text"; or, "judged", what
    judges say of a text.
    """

    name: str
    function: Callable[[Sequence[Any], Sequence[Any]], float]
    higher_is_better: bool
    kind: Literal["label", "pair", "value", "text", "judged"]


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", accuracy, True, "label"),
        Metric("macro_f1", macro_f1, True, "label"),
        Metric("f1", f1, True, "pair"),
        Metric("matthews", matthews, True, "label"),
        Metric("pearson", pearson, True, "value"),
        Metric("spearman", spearman, True, "value"),
        Metric("mean_squared_error", mean_squared_error, False, "value"),
        Metric("exact_match", exact_match, True, "text"),
        Metric("token_f1", token_f1, True, "text"),
        *(Metric(name, partial(judged_mean, name), True, "judged") for name in ("reward", "content")),
        *(Metric(name, partial(judged_mean, name), True, "judged") for name in ("style", "fluency")),
        Metric("joint", joint, True, "judged"),
        Metric("geometric_mean", geometric_mean, True, "judged"),
    )
}


def compute(names: Sequence[str], gold: Sequence[Any], predicted: Sequence[Any]) -> dict[str, float]:
    """Several scores of the same answers, by name, in the order of `names`.

    Raises:
        ConfigError: an unknown name, with the nearest known one.
    """
    for name in names:
        if name not in METRICS:
            known = list(METRICS)
            raise ConfigError(f'no such metric: "{name}"{suggest(name, known)} (known: {", ".join(known)})')
    return {name: METRICS[name].function(gold, predicted) for name in names}


# ---- what a score is worth ------------------------------------------------------------------------------------------


def majority_baseline(train_gold: Sequence[Hashable], test_gold: Sequence[Hashable]) -> float:
    """Accuracy on the test labels of always answering the most frequent training label (ties: first by its text)."""
    if len(train_gold) == 0:
        raise ValueError("expected at least one training label, got none")
    label, _ = min(Counter(train_gold).items(), key=lambda item: (-item[1], str(item[0])))
    return accuracy(test_gold, [label] * len(test_gold))


DRAWN = 2**16
"""Most examples that a bootstrap draws at once: half a MiB of places; our choice."""


def bootstrap_interval(
    correct: Sequence[float], seed: int = 0, rounds: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean over examples.

    Args:
        correct: a score per example, such as 1 for right and 0 for wrong.
        seed: of the resampling.
        rounds: how often the examples are drawn again, with replacement.
        level: share of the rounds that lie within the interval.

    Returns:
        The lower and the upper end.
    """
    scores = np.asarray(correct, dtype=np.float64)
    if scores.size == 0:
        raise ValueError("expected at least one scored example, got none")
    generator = np.random.default_rng(seed)
    # some rounds at a time: all of them at once would not fit for large test sets
    most = max(1, DRAWN // scores.size)
    sizes = [min(most, rounds - begun) for begun in range(0, rounds, most)]
    drawn = (generator.integers(0, scores.size, (size, scores.size)) for size in sizes)
    means = np.concatenate([scores[one].mean(axis=1) for one in drawn])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
