"""Workers that are killed, and workers side by side: nothing is lost or run twice, and the rows are the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import comparisons
from promptuary.comparing.claims import claim

BOTH, ONE = ["prompts", "bitfit"], ["prompts"]
RUNS = 2 + 2
"""Of each method: two trials and two seeds; every run has four steps."""

CROWDS = {
    # name: sampler, steps at which one worker after the other dies, workers that go on, methods
    "alone": ("random", [], 1, BOTH),
    "killed": ("random", [2, 7], 2, BOTH),
    "tpe": ("tpe", [], 1, ONE),
    "tpe-killed": ("tpe", [3, 6], 1, ONE),
}


@pytest.fixture(scope="module")
def crowds() -> dict[str, Any]:
    """How each crowd ended."""
    done = subprocess.run(
        [sys.executable, str(Path(comparisons.__file__)), json.dumps(CROWDS)],
        capture_output=True, text=True, timeout=280, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", CROWDS)
def test_every_run_ends_once_whoever_dies(name: str, crowds: dict[str, Any]) -> None:
    deaths, found = CROWDS[name][1], crowds[name]
    assert found["codes"] == [-9] * len(deaths) + [0] * CROWDS[name][2]
    methods = len(CROWDS[name][3])
    assert len(found["ended"]) == RUNS * methods
    assert max(Counter(found["ended"]).values()) == 1
    summary = found["summary"]
    assert (summary["finished"], summary["left"], summary["failed"]) == (2 * methods, 0, [])


@pytest.mark.parametrize(("name", "like"), [("killed", "alone"), ("tpe-killed", "tpe")])
def test_rows_and_chosen_settings_are_those_of_an_undisturbed_worker(
    name: str, like: str, crowds: dict[str, Any]
) -> None:
    assert comparisons.plain(crowds[name]["rows"]) == comparisons.plain(crowds[like]["rows"])


def test_a_claim_is_exclusive_says_whose_it_is_and_ends_with_its_block(tmp_path: Path) -> None:
    path = tmp_path / "locks" / "one.lock"
    with claim(path) as mine, claim(path) as second:
        assert (mine, second) == (True, False)
        assert f"process {os.getpid()} on " in path.read_text()
    assert path.read_text() == ""
    with claim(path) as again:
        assert again
