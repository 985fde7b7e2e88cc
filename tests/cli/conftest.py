"""One trained run on a tiny model, made once, and a command line that runs in this process.

Knows no verb but train.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny
from cli.cli_user import Place, Said, as_user, examples, write_rows
from promptuary.cli.main import main

RUN = {
    "task": {
        "name": "classify",
        "template": "{text} . It is {mask} .",
        "labels": {"positive": "good", "negative": "bad"},
    },
    "method": {
        "name": "ept",
        "num_virtual_tokens": 3,
        "reference_length": 8,
        "rank": 2,
        "max_tokens": 24,
        "spaces": 2,
        "space_dim": 2,
    },
    "train": {"steps": 20, "batch_size": 8, "evaluate_every": 10, "threads": 1},
}


def places(root: Path) -> dict[str, Any]:
    """The settings that name files."""
    return {
        "data": {"source": str(root / "data"), "max_length": 32},
        "backbone": {"model": str(root / "base"), "device": "cpu"},
    }


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Train once, as a user does, with --json."""
    root = tmp_path_factory.mktemp("cli")
    for name, seed in (("base", 0), ("other", 1)):
        tiny.save(root / name, "masked", seed=seed)
    for split, count, seed in (("train", 48, 1), ("validation", 16, 2), ("test", 24, 3)):
        write_rows(root / "data" / f"{split}.jsonl", examples(count, seed))
    run = root / "run.yaml"
    trained = root / "trained"
    run.write_text(yaml.safe_dump({**RUN, **places(root), "out": str(trained)}))
    said = as_user("train", run, "--json")
    assert said.code == 0, said.err
    return Place(root, run, trained, {"said": said.json, "err": said.err})


@pytest.fixture
def here(capfd: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Run a command line in this process, with everything that reaches its two outputs."""

    def run(*words: object) -> Said:
        capfd.readouterr()
        code = main([str(word) for word in words])
        out, err = capfd.readouterr()
        return Said(code, out, err)

    return run
