"""A small trained prompt, and what tests do to its files.

Knows no test.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import tiny
import toy
from promptuary import files, registry
from promptuary.backbones.base import Backbone
from promptuary.building import build_method
from promptuary.checkpoint import load_prompt, save_prompt
from promptuary.config import load_run
from promptuary.errors import PromptuaryError
from promptuary.tuned import Tuned

TEXTS = ("red cat", "blue dog sings", "old apple")
PARTS = ("prompt.json", "prompt.safetensors", "folded.safetensors", "README.md")


@contextmanager
def quick_folder() -> Iterator[Path]:
    """A folder in memory where the system has one: many small files that are synced are slow on a busy disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


def tuned(where: Path, backbone: Backbone, method: str = "dept", task: str = "classify_words", seed: int = 1) -> Tuned:
    """A prompt with values that matter."""
    values = toy.settings(where, "causal", task)
    run = load_run({**values, "method": {"name": method, **registry.load("methods", method).tiny}})
    made = registry.load("tasks", run.task.name)(run.task, toy.rows(4))
    whole = Tuned(backbone, made, build_method(run.method, backbone.shape), max_length=40)
    generator = torch.Generator().manual_seed(seed)
    whole.initialise(generator)
    for group in whole.trained():
        group.parameter.data.copy_(torch.randn(group.parameter.shape, generator=generator) / 4)
    return whole.train(False)


class Saved:
    """A prompt folder that tests damage, and what it answers while it is whole."""

    def __init__(self, where: Path, method: str = "dept", task: str = "classify_words") -> None:
        self.backbone = tiny.backbone("causal")
        self.path = where / "prompt"
        self.tuned = tuned(where, self.backbone, method, task)
        save_prompt(self.tuned, self.path)
        self.content = {path.name: path.read_bytes() for path in self.path.iterdir()}
        self.facts: dict[str, Any] = json.loads(self.content["prompt.json"])
        self.answers = self.ask()

    def ask(self) -> Any:
        """Load and answer."""
        return load_prompt(self.path, self.backbone).predict(TEXTS)

    def restore(self) -> None:
        """The folder as it was."""
        if self.path.is_symlink():
            self.path.unlink()
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir()
        for name, content in self.content.items():
            (self.path / name).write_bytes(content)

    def put(self, name: str, content: bytes) -> None:
        """Other content of a file."""
        (self.path / name).write_bytes(content)

    def sign(self, facts: dict[str, Any]) -> None:
        """Other facts with a checksum that fits, as whoever means harm would write them."""
        rest = {name: value for name, value in facts.items() if name != "checksum"}
        self.put("prompt.json", files.to_json(files.sealed(rest)))

    def sign_tensors(self, content: bytes, name: str = "prompt.safetensors", **facts: Any) -> None:
        """Other tensors with hashes that fit."""
        self.put(name, content)
        hashes = {**self.facts["sha256"], name: files.digest(content)}
        self.sign({**self.facts, "sha256": hashes, **facts})

    def refusal(self) -> str | None:
        """The one line with which it is refused; None if it answers as ever."""
        try:
            found = self.ask()
        except PromptuaryError as error:
            text = str(error)
            assert text
            assert "\n" not in text
            assert len(text) < 1500
            return text
        assert found == self.answers
        return None
