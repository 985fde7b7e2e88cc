"""Tiny data and runs that several test files share: one row has a field for every kind of task.

Knows no test.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tiny
from promptuary.config import load_run
from promptuary.run import Run

TASKS: dict[str, dict[str, Any]] = {
    "classify_words": {
        "name": "classify",
        "template": "{text} it was {mask}",
        "labels": {"positive": "good", "negative": "bad"},
    },
    "classify_head": {"name": "classify", "template": "{text} it was {mask}", "reading": "head"},
    "choose": {"name": "choose", "template": "{text} it was {mask}", "choices": ["options"], "label": "right"},
    "regress_head": {"name": "regress", "template": "{text} it was {mask}", "label": "value"},
    "regress_words": {
        "name": "regress",
        "template": "{text} it was {mask}",
        "label": "value",
        "words": ["bad", "good"],
        "low": 0,
        "high": 5,
    },
    "generate": {"name": "generate", "template": "{text} answer : {mask}", "max_new_tokens": 3},
}
"""Kind of task -> its settings."""

FILLERS = [
    "cat",
    "dog",
    "bird",
    "fish",
    "runs",
    "sleeps",
    "eats",
    "sings",
    "sky",
    "sea",
    "sun",
    "apple",
    "pear",
    "plum",
    "old",
    "new",
    "big",
    "small",
]


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Examples of different lengths in which the first word decides everything."""
    pick = itertools.count(7 * seed)
    made = []
    for number in range(count):
        good = number % 2 == 0
        words = [FILLERS[next(pick) * 5 % len(FILLERS)] for _ in range(2 + (3 * number + seed) % 5)]
        made.append(
            {
                "text": " ".join(["red" if good else "blue", *words]),
                "label": "positive" if good else "negative",
                "value": [4.5, 1.0, 3.5, 0.5][number % 4],
                "options": ["good", "very bad", "not good", "bad"][: 2 + number % 3],
                "right": number % 2,
                "target": "good" if good else "bad dog",
            }
        )
    return made


def jsonl(path: Path, examples: Iterable[Mapping[str, Any]]) -> Path:
    """Write examples, one per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
    return path


def folder(path: Path) -> Path:
    """The data set: 11 rows to train on, 5 to validate, 4 to test."""
    if not path.exists():
        for seed, (split, count) in enumerate({"train": 11, "validation": 5, "test": 4}.items()):
            jsonl(path / f"{split}.jsonl", rows(count, seed))
    return path


def settings(where: Path, family: str = "causal", task: str = "classify_words", name: str = "run") -> dict[str, Any]:
    """A whole run as a mapping: prompt tuning of three rows, a few steps."""
    return {
        "task": dict(TASKS[task]),
        "data": {"source": str(folder(where / "data")), "max_length": 40},
        "backbone": {"model": f"tiny-{family}", "family": tiny.FAMILY[tiny.FAMILIES.get(family, family)]},
        "method": {"name": "prompt_tuning", "num_virtual_tokens": 3},
        "train": {"steps": 3, "batch_size": 4, "evaluate_every": 2},
        "out": str(where / name),
    }


def run(
    where: Path, *overrides: str, family: str = "causal", task: str = "classify_words", name: str = "run", **train: Any
) -> Run:
    """The same as a `Run`; keywords change its `train` settings, texts are `--set` overrides."""
    values = settings(where, family, task, name)
    values["train"].update(train)
    return load_run(values, overrides)


def metric_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, each valid JSON in the strict sense."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]
