"""Asks the program `warm.py` to run command lines, and a place with a model and data for them.

Knows no test.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

import tiny
import toy

HERE = Path(__file__).parent


def place(root: Path, *, rows: int = 600, **train: Any) -> Path:
    """A saved model, data and a run file; enough rows that loading them takes a while."""
    tiny.save(root / "base", "causal")
    for seed, (split, count) in enumerate({"train": rows, "validation": 40, "test": 40}.items()):
        toy.jsonl(root / "data" / f"{split}.jsonl", toy.rows(count, seed))
    values = {
        "task": toy.TASKS["classify_words"],
        "data": {"source": str(root / "data"), "max_length": 40},
        "backbone": {"model": str(root / "base"), "family": "causal", "device": "cpu"},
        "method": {"name": "prompt_tuning", "num_virtual_tokens": 3, "prompt_lr": 0.5},
        "train": {"steps": 24, "batch_size": 4, "evaluate_every": 4, "save_every": 4, **train},
    }
    path = root / "run.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def ask(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How each of the jobs ended: exit codes (negative: killed by that signal), seconds, standard error."""
    path = os.pathsep.join([str(HERE.parent), *sys.path])
    done = subprocess.run(
        [sys.executable, str(HERE / "warm.py")],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found
