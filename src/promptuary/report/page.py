"""One page of HTML about one prompt on labelled examples: scores, classes, confusions, samples, where it looks.

Knows no method or task by name; everything that users write is escaped, and the page loads nothing and runs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from promptuary import __version__, metrics
from promptuary.errors import SiteError
from promptuary.report import attention, bars, matrix, samples

if TYPE_CHECKING:
    from promptuary.evaluation import Evaluation
    from promptuary.robust import Robustness
    from promptuary.tuned import Tuned

SHOWN = 12
"""Most wrong samples, and most right ones; our choice."""

LOOKED = 4
"""Most images with maps of attention; our choice."""

SHARES = ("accuracy", "macro_f1", "f1", "exact_match", "token_f1")
"""Scores from 0 to 1 that read well as per cent."""

NAMES = {
    "accuracy": "Accuracy", "macro_f1": "Macro F1", "f1": "F1", "matthews": "Matthews correlation",
    "pearson": "Pearson correlation", "spearman": "Spearman correlation", "mean_squared_error": "Mean squared error",
    "exact_match": "Exact match", "token_f1": "Token F1", "reward": "Reward", "content": "Content", "style": "Style",
    "fluency": "Fluency", "joint": "Joint (J)", "geometric_mean": "Geometric mean",
}  # fmt: skip

NEW, HARMONIC = "new_", "harmonic_mean"
"""How the scores on new classes begin, and what stands for both; see `base_to_new`, which loads torch."""


@dataclass(frozen=True)
class Score:
    """A headline: its name, the number as it is read, and its interval: in words, and as two parts of a bar."""

    name: str
    shown: str
    part: float | None
    interval: str
    low: float
    high: float


@dataclass(frozen=True)
class About:
    """What was evaluated on what, for the head of the page: the prompt's name, the data's, and which split."""

    prompt: str
    source: str
    split: str


def render(
    about: About,
    found: Evaluation,
    tuned: Tuned,
    examples: Sequence[Mapping[str, Any]],
    *,
    notes: Sequence[str] = (),
    under: Robustness | None = None,
) -> bytes:
    """The page, in UTF-8; the same input gives the same bytes. At most some 2 MB, however many examples there are.

    Args:
        about: names for the head of the page.
        found: the evaluation.
        tuned: what was evaluated; asked for its task, and where the prompt looks if its model sees.
        examples: that were evaluated, in the same order.
        notes: what should be known about the examples.
        under: the same prompt on perturbed examples, if they were tried.

    Raises:
        DataError: an image can no longer be read.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    task = tuned.task
    wrongness = samples.judged(task, found.gold, found.predictions)
    wrong, right = samples.chosen(wrongness, found.predictions, SHOWN)
    parts = [
        [
            samples.sample(place, examples[place], found.gold[place], found.predictions[place], wrongness[place], task)
            for place in places
        ]
        for places in (wrong, right)
    ]
    labels = samples.classes(task, found.predictions)
    answers = [prediction.answer for prediction in found.predictions]
    looked, unseen = _looked(tuned, examples, [*wrong[: LOOKED // 2], *right], found)
    environment = Environment(
        loader=PackageLoader("promptuary.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    content = environment.get_template("page.html").render(
        about=about,
        facts=_facts(tuned),
        count=len(examples),
        notes=notes,
        scores=headlines(found.scores, task.metrics[0], found.interval),
        compares=NEW + task.metrics[0] in found.scores,
        classes=matrix.by_class(found.gold, answers, labels) if labels else None,
        wrong=parts[0],
        right=parts[1],
        wrong_count=sum(how != 0 for how in wrongness),
        right_count=sum(how == 0 for how in wrongness),
        measures=metrics.METRICS[task.metrics[0]].kind in ("value", "judged"),
        source="Source" if metrics.METRICS[task.metrics[0]].kind == "judged" else "True",
        bars=None if under is None else bars.bars(under, len(examples), NAMES, SHARES),
        looked=looked,
        unseen=unseen,
        version=__version__,
    )
    # half a pair of surrogates, which JSON may hold, is no text that could be written
    return content.encode("utf-8", "replace")


def headlines(scores: Mapping[str, float], primary: str, interval: tuple[float, float] | None) -> list[Score]:
    """Scores as they are read, the first one with its interval; with base and new classes, the harmonic mean too."""
    told, new = dict(scores), NEW + primary
    compares = primary in told and new in told
    if compares:
        told.setdefault(HARMONIC, metrics.harmonic_mean(told[primary], told[new]))
        first = (primary, new, HARMONIC)
        told = {name: told[name] for name in (*first, *(other for other in told if other not in first))}
    found = []
    for name, value in told.items():
        plain = primary if name == HARMONIC else name.removeprefix(NEW)
        where = " on new classes" if name != plain else " on base classes" if NEW + name in told else ""
        called = "Harmonic mean" if name == HARMONIC else NAMES.get(plain, plain) + where
        found.append(_score(called, value, interval if name == primary else None, share=plain in SHARES))
    return found


def _score(called: str, value: float, interval: tuple[float, float] | None, *, share: bool) -> Score:
    share = share and math.isfinite(value)
    low, high = interval or (0.0, 0.0)
    shown = f"{100 * low:.1f} to {100 * high:.1f} %" if share else f"{low:.4f} to {high:.4f}"
    words = "" if interval is None else f"95 % interval: {shown}"
    return Score(called, percent(value) if share else f"{value:.4f}", value if share else None, words, low, high)


def percent(value: float) -> str:
    """A share as it is read."""
    return f"{100 * value:.1f} %"


def _facts(tuned: Tuned) -> list[tuple[str, str]]:
    of = tuned.method or tuned.baseline
    return [
        ("Method", "none: the frozen model alone" if of is None else of.name),
        ("Model", samples.said(tuned.backbone.config.model)),
        ("Trained numbers", f"{tuned.trainable_parameters:,}"),
    ]


def _looked(
    tuned: Tuned, examples: Sequence[Mapping[str, Any]], places: Sequence[int], found: Evaluation
) -> tuple[list[tuple[attention.Looked, str, str]], str]:
    """Maps of attention with the right and the given answer; or why there are none, where there could be."""
    if tuned.backbone.reads_words or tuned.task.config.image is None:
        return [], ""
    places = places[:LOOKED]
    rows = [
        replace(row, index=place)
        for place, row in zip(places, tuned.rows([examples[one] for one in places], labelled=False), strict=True)
    ]
    try:
        maps = attention.looks(tuned, rows)
    except SiteError as error:
        return [], str(error)
    said = [(samples.said(found.gold[place]), samples.said(found.predictions[place].answer)) for place in places]
    return [(one, gold, answer) for one, (gold, answer) in zip(maps, said, strict=True)], ""
