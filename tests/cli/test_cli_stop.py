"""Stopping a run: the state is saved, the exit code tells how, and what continues ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from cli.cli_user import Place, Said, command, environment

SETTINGS = ("--set", "train.steps=160", "--set", "train.evaluate_every=20", "--set", "train.save_every=60")


def wait_for_rows(run: Path, count: int, still: Callable[[], bool]) -> None:
    """Until the run has taken some steps."""
    rows = run / "metrics.jsonl"
    while still() and not (rows.exists() and rows.read_text().count("\n") >= count):
        time.sleep(0.01)


def test_ctrl_c_saves_and_resume_ends_like_the_unbroken_run(
    place: Place, tmp_path: Path, here: Callable[..., Said]
) -> None:
    out = tmp_path / "stopped"
    process = subprocess.Popen(
        command("train", place.run, "--out", out, *SETTINGS, "--json"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    wait_for_rows(out, 30, lambda: process.poll() is None)
    process.send_signal(signal.SIGINT)
    said, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    last = err.splitlines()[-1]
    assert last.startswith("stopped at step ")
    assert json.loads(said) == {"error": last}
    assert "Traceback" not in err
    assert list((out / "checkpoints").glob("step-*"))
    assert not (out / "result.json").exists()

    # the run folder alone is enough to continue; a stop by SIGTERM on the way has its own exit code
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    killer = threading.Thread(target=_terminate_later, args=(out,))
    killer.start()
    ended = here("train", out, "--resume")
    killer.join()
    signal.signal(signal.SIGTERM, before)
    assert ended.code == 143, ended.err
    assert ended.err.splitlines()[-1].startswith("stopped at step ")

    resumed = here("train", out, "--resume", "--json").json
    unbroken = here("train", place.run, "--out", tmp_path / "unbroken", *SETTINGS, "--json").json
    for name in ("metrics", "interval_95", "validation", "steps", "best_step", "split_hash", "run_hash"):
        assert resumed[name] == unbroken[name]
    assert json.loads((out / "result.json").read_text())["metrics"] == unbroken["metrics"]
    weights = [(folder / "prompt" / "prompt.safetensors").read_bytes() for folder in (out, tmp_path / "unbroken")]
    assert weights[0] == weights[1]


def _terminate_later(out: Path) -> None:
    began = time.monotonic()
    rows = (out / "metrics.jsonl").read_text().count("\n")
    wait_for_rows(out, rows + 20, lambda: time.monotonic() - began < 60)
    os.kill(os.getpid(), signal.SIGTERM)
