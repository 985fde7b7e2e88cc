"""The demo: each method of the packaged run file with equal budgets on one frozen model, beside zero-shot and majority.

Knows no method, model or data set by name (they stand in data/demo/run.yaml), and prints nothing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from promptuary import checkpoint, config, registry
from promptuary.building import open_backbone
from promptuary.data.load import Splits, load
from promptuary.evaluation import evaluate
from promptuary.listening import Listener
from promptuary.metrics import bootstrap_interval, majority_baseline
from promptuary.seeds import seeded
from promptuary.training import train
from promptuary.tuned import Tuned


@dataclass(frozen=True)
class Row:
    """One line of the comparison. `folder` holds the prompt, where there is one."""

    name: str
    accuracy: float
    interval: tuple[float, float] | None
    trainable_parameters: int
    bytes_on_disk: int
    seconds: float
    folder: str | None = None


@dataclass(frozen=True)
class Shown:
    """One answer of the last method's prompt."""

    text: str
    gold: str
    answer: str
    probability: float


@dataclass(frozen=True)
class Demo:
    """What came out: majority, zero-shot, then each method in the order of the run file."""

    rows: list[Row]
    predictions: list[Shown]

    def facts(self) -> dict[str, Any]:
        """The same as plain values."""
        return asdict(self)


def settings() -> dict[str, Any]:
    """The packaged run file: task, data, backbone, train, and `methods`, name -> settings."""
    text = resources.files("promptuary.data").joinpath("demo", "run.yaml").read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def run(
    *,
    model: str | None = None,
    out: str | Path = "out/demo",
    steps: int | None = None,
    seed: int = 0,
    listener: Listener | None = None,
) -> Demo:
    """Train and compare.

    Args:
        model: another frozen model; its family is read from its config.
        out: folder of the runs; earlier runs of the demo in it are replaced.
        steps: optimiser steps of each method.
        seed: the same for every method.
        listener: is told what happens in each run.

    Raises:
        PromptuaryError: one line on what is wrong.
    """
    values = settings()
    methods: Mapping[str, Mapping[str, Any]] = values.pop("methods")
    if model is not None:
        values = config.merge(values, {"backbone": {"model": model, "family": "auto"}})
    if steps is not None:
        values = config.merge(values, {"train": {"steps": steps}})
    runs = [
        config.build({**values, "method": {"name": name, **own}, "seed": seed, "out": str(Path(out) / name)})
        for name, own in methods.items()
    ]
    first = runs[0]
    task_class = registry.load("tasks", first.task.name)
    split_seed = first.data.split_seed if first.data.split_seed is not None else seed
    splits = load(first.data, task_class.required(first.task), seeded(split_seed, 1), task_class.check(first.task))
    backbone = open_backbone(first.backbone)
    zero_shot = Tuned(backbone, task_class(first.task, splits.train), max_length=first.data.max_length)
    rows = [_majority(zero_shot, splits), _zero_shot(zero_shot, splits, first.train.eval_batch_size)]
    for one in runs:
        trained = train(one, fresh=True, listener=listener, backbone=backbone)
        facts = trained.facts
        folder = checkpoint.find_prompt(trained.dir)
        rows.append(
            Row(
                name=one.method.name,
                accuracy=facts["metrics"][facts["primary_metric"]],
                interval=facts["interval_95"],
                trainable_parameters=facts["trainable_parameters"],
                bytes_on_disk=(folder / checkpoint.TENSORS).stat().st_size,
                seconds=facts["train_seconds"],
                folder=str(folder),
            )
        )
    return Demo(rows, _answers(trained.prompt, splits))


def _majority(tuned: Tuned, splits: Splits) -> Row:
    """Always the most frequent label of the training examples."""
    known, asked = ([tuned.task.gold(one) for one in part] for part in (splits.train, splits.test))
    answer, _ = min(Counter(known).items(), key=lambda item: (-item[1], item[0]))
    interval = bootstrap_interval([float(gold == answer) for gold in asked])
    return Row("majority", majority_baseline(known, asked), interval, 0, 0, 0.0)


def _zero_shot(tuned: Tuned, splits: Splits, batch_size: int) -> Row:
    """The frozen model alone."""
    began = time.perf_counter()
    found = evaluate(tuned, splits.test, batch_size=batch_size)
    return Row("zero-shot", found.scores[tuned.task.metrics[0]], found.interval, 0, 0, time.perf_counter() - began)


def _answers(tuned: Tuned, splits: Splits) -> list[Shown]:
    """The first test message of each third, answered."""
    chosen = [splits.test[place * len(splits.test) // 3] for place in range(3)]
    fields = tuned.task.template.fields
    return [
        Shown(
            " | ".join(str(one[name]) for name in fields), tuned.task.gold(one), said.answer, max(said.scores.values())
        )
        for one, said in zip(chosen, tuned.predict(chosen), strict=True)
    ]
