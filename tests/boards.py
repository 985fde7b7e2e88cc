"""Folders of runs as training writes them, made in no time: for tests of pages about many runs.

Knows no test.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

SETTINGS: dict[str, Any] = {
    "backbone": {"model": "acme/small", "family": "auto", "revision": None, "dtype": "float32", "device": "auto"},
    "train": {"steps": 100, "batch_size": 16, "optimizer": "adamw", "warmup": 0.06, "threads": None},
    "solver": None,
    "seed": 0,
    "out": "out/run",
    "task": {"name": "classify", "template": "{text}", "labels": {"positive": "good", "negative": "bad"}},
    "data": {"source": "acme/films", "subset": None, "shots": 16, "train_size": None, "max_length": 64},
    "suite": None,
    "method": {"name": "ept", "num_virtual_tokens": 8, "rank": 4, "prompt_lr": 0.2},
}
MACHINE = {"processor": "one", "platform": "Linux", "cores": 2, "threads": 1, "cuda": None}


def write(
    folder: Path,
    *,
    score: float | None = 0.8,
    interval: Sequence[float] | None = (0.7, 0.9),
    curve: Sequence[float] = (0.5, 0.6, 0.7),
    machine: Mapping[str, Any] = MACHINE,
    result: Mapping[str, Any] | None = None,
    finished: bool = True,
    size: int = 1000,
    **changes: Any,
) -> Path:
    """One run.

    Args:
        folder: of the run.
        score: accuracy on the test split.
        interval: of it.
        curve: accuracies on validation, each ten steps.
        machine: environment.json.
        result: what result.json says besides.
        finished: whether there is a result.json.
        size: bytes of the prompt.
        changes: of the settings, `method__rank=8` or `seed=1`.
    """
    settings = copy.deepcopy(SETTINGS)
    for name, value in changes.items():
        part, _, inner = name.partition("__")
        if inner:
            settings[part][inner] = value
        else:
            settings[part] = value
    folder.mkdir(parents=True, exist_ok=True)
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    content = yaml.dump(settings, None, dumper, sort_keys=False, allow_unicode=True)
    (folder / "run.yaml").write_text(content, encoding="utf-8")
    (folder / "run.json").write_text('{"hash": "0"}')
    (folder / "environment.json").write_text(json.dumps(machine))
    lines = [{"step": 0, "split": "validation", "accuracy": curve[0], "macro_f1": 0.1}] if curve else []
    for place, value in enumerate(curve[1:], start=1):
        lines.append({"step": 10 * place, "loss": 1.0, "seconds": 0.1})
        lines.append({"step": 10 * place, "split": "validation", "accuracy": value, "macro_f1": 0.1})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if not finished:
        return folder
    (folder / "prompt").mkdir(exist_ok=True)
    (folder / "prompt" / "prompt.safetensors").write_bytes(bytes(size))
    by = settings.get("method") or settings.get("baseline")
    told = {
        "method": by["name"], "task": settings["suite"] or settings["task"]["name"], "data": settings["data"]["source"],
        "backbone": settings["backbone"]["model"], "seed": settings["seed"],
        "metrics": {"accuracy": score, "macro_f1": 0.1}, "primary_metric": "accuracy", "interval_95": interval,
        "validation": {"accuracy": max(curve, default=None)},
        "examples": {"train": 32, "validation": 32, "test": 1000},
        "trainable_parameters": 1000, "added_tokens": 8, "steps": 100, "best_step": 90,
        "seconds_per_step_median": 0.5, "train_seconds": 50.0, "peak_memory_bytes": 2**30,
        "versions": {"promptuary": "0.1.0", "torch": "2.13.0"}, "run_hash": "0123456789abcdef",
        **(result or {}),
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(told, indent=2))
    return folder
