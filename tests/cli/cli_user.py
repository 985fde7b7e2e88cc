"""What a user has and does: a folder with models, data and a finished run, and a process that runs a command line.

Knows no verb.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FILLERS = ["a", "the", "cat", "dog", "bird", "sky", "sea", "sun", "apple", "plum", "runs", "sleeps"]
WORDS = {"positive": ("good", "great"), "negative": ("bad", "terrible")}


@dataclass(frozen=True)
class Said:
    """How a command line ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one object on standard output; fails if there is anything else."""
        assert self.out.endswith("\n")
        return json.loads(self.out)


def examples(count: int, seed: int) -> list[dict[str, str]]:
    """Sentences whose label hangs on one word."""
    chance = random.Random(seed)
    found = []
    for number in range(count):
        label = sorted(WORDS)[number % 2]
        words = chance.sample(FILLERS, 5)
        words.insert(chance.randrange(6), chance.choice(WORDS[label]))
        found.append({"text": " ".join(words), "label": label})
    return found


def write_rows(path: Path, rows: list[Any]) -> Path:
    """A JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Place:
    """A folder with two models, data, a run file and a finished run."""

    root: Path
    run: Path
    trained: Path
    result: dict[str, Any]

    def changed(self, path: Path, **parts: Any) -> Path:
        """The run file with other values, written elsewhere."""
        values = yaml.safe_load(self.run.read_text())
        for name, value in parts.items():
            values[name] = {**values[name], **value} if isinstance(value, dict) else value
        path.write_text(yaml.safe_dump(values))
        return path


def as_user(*words: object, text: str | None = None) -> Said:
    """Run the program as a process of its own."""
    done = subprocess.run(command(*words), input=text, capture_output=True, text=True, env=environment(), timeout=240)
    return Said(done.returncode, done.stdout, done.stderr)


def command(*words: object) -> list[str]:
    """The command line of that process."""
    return [sys.executable, "-m", "promptuary", *map(str, words)]


def environment() -> dict[str, str]:
    """This one, with the packages that this process sees."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "100"}
