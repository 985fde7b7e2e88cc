"""What a user has who gets something wrong: models, data, a trained prompt, and ways to hand in a wrong input.

Knows no expected error.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
import yaml

import tiny
from cli.cli_user import Said, examples, write_rows
from promptuary.cli.main import main

RUN: dict[str, Any] = {
    "task": {"name": "classify", "template": "{text} it is {mask}", "labels": {"positive": "good", "negative": "bad"}},
    "method": {"name": "prompt_tuning", "num_virtual_tokens": 3},
    "train": {"steps": 2, "batch_size": 8, "evaluate_every": 1},
}


@dataclass(frozen=True)
class Place:
    """`root` holds models (masked, other, causal, encoder), data/ and trained/; `tmp` is one test's own folder."""

    root: Path
    tmp: Path

    @property
    def settings(self) -> dict[str, Any]:
        """A run that would work."""
        return {
            **RUN,
            "data": {"source": str(self.root / "data"), "max_length": 40},
            "backbone": {"model": str(self.root / "masked"), "device": "cpu"},
            "out": str(self.tmp / "out"),
        }

    def fill(self, text: str) -> str:
        """Put the two folders' names into a text."""
        return text.replace("ROOT", str(self.root)).replace("TMP", str(self.tmp))

    def blank(self, text: str) -> str:
        """Take them out again."""
        return text.replace(str(self.tmp), "TMP").replace(str(self.root), "ROOT")


def make(root: Path) -> Path:
    """Models and data, and a prompt trained on them."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name, kind, seed in (("masked", "masked", 0), ("other", "masked", 1), ("causal", "causal", 0)):
        tiny.save(root / name, kind, seed=seed)
    tiny.save(root / "encoder", "encoder")
    for split, count, seed in (("train", 16, 1), ("validation", 8, 2), ("test", 8, 3)):
        write_rows(root / "data" / f"{split}.jsonl", examples(count, seed))
    place = Place(root, root)
    for family in ("masked", "causal"):
        run = {**place.settings, "backbone": {"model": str(root / family), "device": "cpu"}}
        run["data"] = {**run["data"], "max_length": 400 if family == "causal" else 40}
        (root / "run.yaml").write_text(yaml.safe_dump(run))
        said = say("train", root / "run.yaml", "--out", root / f"trained-{family}")
        assert said.code == 0, said.err
    (root / "run.yaml").write_text(yaml.safe_dump(place.settings))
    (root / "file").write_text("mine")
    return root


def say(*words: object) -> Said:
    """Run a command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    return Said(code, out.getvalue(), err.getvalue())


def snapshot(*roots: Path) -> dict[str, bytes | None]:
    """Every file below some folders with its content."""
    return {
        str(path): path.read_bytes() if path.is_file() else None for root in roots for path in sorted(root.rglob("*"))
    }


Input = Callable[[Place], Sequence[object] | Callable[[], object]]
"""Makes a command line, or a call of the Python API, out of a place."""


def train(*overrides: str) -> Input:
    """`train` with settings changed by --set."""
    return lambda place: _train(place, yaml.safe_dump(place.settings).encode(), *overrides)


def run_file(content: str | bytes, *overrides: str) -> Input:
    """`train` with a run file of this content."""
    return lambda place: _train(place, content.encode() if isinstance(content, str) else content, *overrides)


def _train(place: Place, content: bytes, *overrides: str) -> list[object]:
    (place.tmp / "run.yaml").write_bytes(content)
    sets = [word for one in overrides for word in ("--set", place.fill(one))]
    return ["train", place.tmp / "run.yaml", *sets]


def rows(content: str | bytes, *overrides: str, name: str = "train.csv") -> Input:
    """`train` on a folder whose one file has this content."""

    def made(place: Place) -> list[object]:
        (place.tmp / "data").mkdir()
        (place.tmp / "data" / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return list(train(f"data.source={place.tmp / 'data'}", *overrides)(place))  # type: ignore[arg-type]

    return made


def words(line: str) -> Input:
    """A command line, cut at spaces; _ stands for a space within a word."""
    return lambda place: [place.fill(word).replace("_", " ") for word in line.split()]


def call(function: Callable[[Place], object]) -> Input:
    """A call of the Python API."""
    return lambda place: lambda: function(place)


def jsonl(*objects: Any) -> str:
    """Rows of a .jsonl file."""
    return "".join(json.dumps(one) + "\n" for one in objects)
