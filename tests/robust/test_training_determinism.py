"""R23: the same seed gives the same bytes; one thread or two, one process or two, give the same numbers to 1e-6.

Knows no insides of training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import toy
from robust.warmed import ask, place

NAMES = ("one", "again", "threads", "ranks")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same run in four ways, each in processes of its own."""
    root = tmp_path_factory.mktemp("determinism")
    # batches large enough for torch to share the work among threads
    run = place(root, rows=256, batch_size=256, steps=4, accumulation=2)
    changes: dict[str, dict[str, Any]] = {"ranks": {"ranks": 2}}
    jobs = [
        {
            "args": ["train", str(run), "--out", str(root / name), "--set", f"train.threads={1 + (name == 'threads')}"],
            **changes.get(name, {}),
        }
        for name in NAMES
    ]
    for job, end in zip(jobs, ask(jobs), strict=True):
        assert set(end["codes"]) == {0}, (job, end)
    return {name: root / name for name in NAMES}


def state(folder: Path) -> dict[str, torch.Tensor]:
    found = safetensors.torch.load_file(folder / "checkpoints" / "step-4" / "state.safetensors")
    return found | safetensors.torch.load_file(folder / "prompt" / "prompt.safetensors")


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in toy.metric_rows(folder) if "loss" in row]


def test_the_same_seed_gives_the_same_bytes(runs: dict[str, Path]) -> None:
    one, again = (state(runs[name]) for name in ("one", "again"))
    assert one.keys() == again.keys()
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert losses(runs["one"]) == losses(runs["again"])
    assert not torch.equal(one["trained/method.rows"], one["best/method.rows"] * 0)


@pytest.mark.parametrize("other", ["threads", "ranks"])
def test_threads_and_processes_change_nothing_beyond_rounding(other: str, runs: dict[str, Path]) -> None:
    one, two = state(runs["one"]), state(runs[other])
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.allclose(value, two[name], atol=1e-6, rtol=0), (name, float((value - two[name]).abs().max()))
    assert losses(runs[other]) == pytest.approx(losses(runs["one"]), abs=1e-6)
    assert len(losses(runs[other])) == 4
    threads = json.loads((runs["threads"] / "environment.json").read_text())["threads"]
    assert threads == 2
