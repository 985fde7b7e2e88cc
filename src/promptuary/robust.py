"""Scores of a prompt on perturbed examples beside the clean ones: what of each perturbation, the mean and the worst.

Knows no training, no command line, no rule of a perturbation, and no method, task or family by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from promptuary import evaluation, metrics
from promptuary.data.check import as_text
from promptuary.errors import ConfigError
from promptuary.evaluation import Evaluation
from promptuary.perturbing.closeness import Similarity
from promptuary.perturbing.kinds import Kind, chosen
from promptuary.perturbing.perturb import perturbed
from promptuary.speakers.base import Speaker
from promptuary.tuned import Tuned


@dataclass(frozen=True)
class Changed:
    """One perturbed example: its place among the examples, from 0, and the texts that changed, clean and perturbed."""

    index: int
    texts: dict[str, tuple[str, str]]


@dataclass(frozen=True)
class Under:
    """One perturbation of all examples.

    `examples`: as they were asked, in the order of the clean ones, with their own labels. `changed`: those that differ
    from the clean ones; the others could not be changed, or came too far from them, and stayed clean. `closeness`: mean
    over the changed texts. `drop`: see `metrics.drop_rate`. `lost`: 95 % bootstrap interval of the clean score less
    this one, by example (the same examples are drawn for both), where the score is a share of examples.
    """

    kind: Kind
    evaluation: Evaluation
    examples: list[Mapping[str, Any]]
    changed: tuple[Changed, ...]
    closeness: float | None
    drop: float
    lost: tuple[float, float] | None


@dataclass(frozen=True)
class Robustness:
    """A prompt on clean and on perturbed examples.

    `metric`: what drops, means and the worst are of. `by`: what made the perturbations: "rules", or a model's name.
    """

    metric: str
    higher_is_better: bool
    clean: Evaluation
    under: tuple[Under, ...]
    seed: int
    by: str

    @property
    def mean(self) -> float:
        """Mean score over the perturbations."""
        return math.fsum(one.evaluation.scores[self.metric] for one in self.under) / len(self.under)

    @property
    def mean_drop(self) -> float:
        """Drop of the mean score."""
        clean = self.clean.scores[self.metric]
        return metrics.drop_rate(clean, self.mean, higher_is_better=self.higher_is_better)

    @property
    def worst(self) -> Under:
        """The perturbation with the worst score; among equals the first."""
        sign = 1 if self.higher_is_better else -1
        return min(self.under, key=lambda one: sign * one.evaluation.scores[self.metric])

    def summary(self) -> dict[str, Any]:
        """Everything but texts and answers, as it is written into JSON."""
        worst = self.worst
        return {
            "metric": self.metric,
            "seed": self.seed,
            "by": self.by,
            "clean": {"scores": self.clean.scores, "interval_95": self.clean.interval},
            "perturbed": {one.kind.id: _told(one) for one in self.under},
            "mean": {"score": self.mean, "drop": self.mean_drop},
            "worst": {"kind": worst.kind.id, "score": worst.evaluation.scores[self.metric], "drop": worst.drop},
        }


def _told(one: Under) -> dict[str, Any]:
    return {
        "title": one.kind.title,
        "level": one.kind.level,
        "scores": one.evaluation.scores,
        "interval_95": one.evaluation.interval,
        "drop": one.drop,
        "lost_interval_95": one.lost,
        "changed": len(one.changed),
        "closeness": one.closeness,
    }


def robustness(
    tuned: Tuned,
    examples: Sequence[Mapping[str, Any]],
    kinds: str | Sequence[Kind] = "all",
    *,
    seed: int = 0,
    similarity: Similarity | None = None,
    attacker: Speaker | None = None,
    clean: Evaluation | None = None,
    batch_size: int = 32,
    check: Callable[[], None] | None = None,
    told: Callable[[Under, Robustness], None] | None = None,
) -> Robustness:
    """Score a prompt on labelled examples, clean and under perturbations of their texts.

    The fields that the template shows are perturbed, each by itself; labels and choices stay. Only examples that
    changed are answered anew: the others have their clean answers.

    Args:
        tuned: a prompt, a baseline or a model alone, with a task on texts.
        examples: with labels.
        kinds: `all`, or ids with commas between them, such as `C1,W2`; see `perturbing.kinds`.
        seed: of the perturbations, which follow from it, the kind and each text alone.
        similarity: see `perturbing.perturb.perturbed`; of sentence embeddings, where there are some.
        attacker: a model that makes the perturbations; without one our own rules do.
        clean: the evaluation of the same examples, if it is there already.
        batch_size: examples per batch.
        check: called before each batch, and before each perturbation; may raise to stop.
        told: called after each perturbation, with what there is so far.

    Raises:
        ConfigError: the prompt is for images, or an unknown perturbation.
        DataError: as `evaluate`.
        OutOfMemory: as `evaluate`.
        SpeakerError: the attacker cannot be asked.
    """
    wanted = chosen(kinds) if isinstance(kinds, str) else tuple(kinds)
    if not wanted:
        raise ConfigError("there is no perturbation to try; name some, such as C1, or all")
    check_texts(tuned)
    if clean is None:
        clean = evaluation.evaluate(tuned, examples, batch_size=batch_size, check=check)
    metric = tuned.task.metrics[0]
    by = "rules" if attacker is None else attacker.name
    found = Robustness(metric, metrics.METRICS[metric].higher_is_better, clean, (), seed, by)
    for kind in wanted:
        if check is not None:
            check()
        made = [_perturbed(tuned, one, kind, seed, similarity, attacker) for one in examples]
        under = _under(tuned, examples, kind, made, found, batch_size, check)
        found = Robustness(metric, found.higher_is_better, clean, (*found.under, under), seed, by)
        if told is not None:
            told(under, found)
    return found


def check_texts(tuned: Tuned) -> None:
    """Refuse what shows no text that could be perturbed.

    Raises:
        ConfigError: the prompt is for images, or has no task.
    """
    image = tuned.task.config.image
    if image is not None:
        raise ConfigError(f"perturbations are for texts, and this prompt is asked with images (task.image: {image})")


Texts = dict[str, tuple[str, str]]
"""Fields that changed: clean and perturbed."""


def _perturbed(
    tuned: Tuned,
    example: Mapping[str, Any],
    kind: Kind,
    seed: int,
    similarity: Similarity | None,
    attacker: Speaker | None,
) -> tuple[Texts, list[float]]:
    """What changed of one example, and how close each text stayed."""
    texts, close = Texts(), []
    for name in dict.fromkeys(tuned.task.template.fields):
        text = as_text(example[name], name)
        new = perturbed(text, kind, seed=seed, similarity=similarity, attacker=attacker)
        if new.changed:
            texts[name] = (text, new.text)
            close.append(new.closeness)
    return texts, close


def _under(
    tuned: Tuned,
    examples: Sequence[Mapping[str, Any]],
    kind: Kind,
    made: Sequence[tuple[Texts, list[float]]],
    so_far: Robustness,
    batch_size: int,
    check: Callable[[], None] | None,
) -> Under:
    """Score the examples of which some changed."""
    asked: list[Mapping[str, Any]] = [
        {**example, **{name: new for name, (_, new) in texts.items()}}
        for example, (texts, _) in zip(examples, made, strict=True)
    ]
    changed = tuple(Changed(index, texts) for index, (texts, _) in enumerate(made) if texts)
    clean, predictions = so_far.clean, list(so_far.clean.predictions)
    size = clean.batch_size
    if changed:
        anew = evaluation.evaluate(
            tuned, [asked[one.index] for one in changed], batch_size=batch_size, interval=False, check=check
        )
        size = anew.batch_size
        for one, prediction in zip(changed, anew.predictions, strict=True):
            predictions[one.index] = prediction
    found = evaluation.scored(tuned.task, clean.gold, predictions, interval=True, batch_size=size)
    close = [value for _, values in made for value in values]
    return Under(
        kind,
        found,
        asked,
        changed,
        math.fsum(close) / len(close) if close else None,
        metrics.drop_rate(
            clean.scores[so_far.metric], found.scores[so_far.metric], higher_is_better=so_far.higher_is_better
        ),
        _lost(tuned, clean, found),
    )


def _lost(tuned: Tuned, clean: Evaluation, found: Evaluation) -> tuple[float, float] | None:
    """Paired interval of what is lost: the same examples are drawn from both."""
    if not evaluation.by_example(tuned.task):
        return None
    before, after = (
        evaluation.rightness(tuned.task, one.gold, [tuned.task.measured(prediction) for prediction in one.predictions])
        for one in (clean, found)
    )
    return metrics.bootstrap_interval([b - a for b, a in zip(before, after, strict=True)])
