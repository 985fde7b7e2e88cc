"""Tiny sets of images and runs on them that several test files share.

Knows no test.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from promptuary.config import build
from promptuary.run import Run
from promptuary.testing import tiny_eyes

COLOURS = {"cat": "red", "dog": "blue", "bird": None, "fish": "red", "apple": "blue"}
"""Class -> what its pictures look like."""


def write(folder: Path, labels: Sequence[str] = tuple(COLOURS), **counts: int) -> Path:
    """A folder for each split and class; `counts` of pictures a class, by split."""
    for split, count in (counts or {"train": 6, "validation": 2, "test": 4}).items():
        for place, label in enumerate(labels):
            for number in range(count):
                file = folder / split / label / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                seed = 1000 * place + 100 * len(split) + number
                file.write_bytes(tiny_eyes.picture(seed, colour=COLOURS[label]))
    return folder


def run(folder: Path, out: Path, family: str = "dual", **parts: Any) -> Run:
    """A short run on such a folder; `parts` as a run file has them, on top of the usual ones."""
    reading = {"label_template": "a {} ."} if family == "dual" else {"reading": "head"}
    usual: dict[str, Any] = {
        "task": {"name": "classify", "image": "image", **reading},
        "data": {"source": str(folder)},
        "backbone": {"model": f"tiny-{family}", "family": family},
        "method": {"name": "coop" if family == "dual" else "vpt", "num_virtual_tokens": 3, "prompt_lr": 0.05},
        "train": {"steps": 6, "batch_size": 5, "evaluate_every": 3},
        "out": str(out),
    }
    for name, own in parts.items():
        usual[name] = {**usual[name], **own} if isinstance(usual.get(name), dict) else own
    return build(usual)
