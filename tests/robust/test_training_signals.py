"""R10: signals at random moments of real processes, through the command line: state, exit code, line, second signal.

Knows no insides of training but the names of its phases (see warm.py).
"""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest

import toy
from promptuary.runs import RunFolder
from robust.warm import PHASES
from robust.warmed import ask, place

SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}
ROUNDS, STEPS = 3, 10
LOADING = ("settings", "data", "encoding", "model")
LONGEST = {"settings": 0.0005, "data": 0.01, "encoding": 0.05, "model": 0.05, "finish": 0.003}
"""Seconds that a phase takes at least; a signal comes somewhere in it, or where it cannot matter, anywhere after."""


@pytest.fixture(scope="module")
def stormed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], list[dict[str, Any]]]:
    """One unbroken run, a storm of signals, and each run that has a state continued to its end."""
    root = tmp_path_factory.mktemp("signals")
    run, chance = place(root, rows=200, steps=STEPS), random.Random(10)
    jobs: list[dict[str, Any]] = [{"args": ["train", str(run), "--out", str(root / "whole")]}]
    cases = [
        (phase, number)
        for phase in PHASES
        for number in SIGNALS
        for _ in range(ROUNDS if number == signal.SIGTERM else 1)
    ]
    for place_, (phase, number) in enumerate(cases):
        skips = {"training": chance.randrange(8), "evaluation": chance.randrange(4), "save": chance.randrange(3)}
        jobs.append(
            {
                "args": ["train", str(run), "--out", str(root / f"run-{place_}")],
                "phase": phase,
                "signal": int(number),
                "skip": skips.get(phase, 0),
                "delay": chance.uniform(0, LONGEST.get(phase, 0.01)),
            }
        )
    # every fourth one that trained is continued
    for place_ in range(3, len(cases), 4):
        if cases[place_][0] not in LOADING:
            jobs.append({"args": ["train", str(root / f"run-{place_}"), "--resume"]})
    long = {"phase": "training", "skip": 5, "delay": 0.1, "second": 0.2, "long": True}
    for number in SIGNALS:
        args = ["train", str(run), "--out", str(root / f"twice-{number}")]
        jobs.append({"args": args, "signal": int(number), **long})
    hung = {"phase": "training", "signal": int(signal.SIGHUP), "ignored": [int(signal.SIGHUP)]}
    jobs.append({"args": ["train", str(run), "--out", str(root / "nohup")], **hung})
    return root, jobs, ask(jobs)


def once(job: dict[str, Any]) -> bool:
    """Whether it was sent one signal that it may act on."""
    return "signal" in job and not {"second", "ignored"} & job.keys()


def test_every_signal_ends_with_its_code_and_one_line(stormed: Any) -> None:
    _, jobs, ends = stormed
    sent = [(job, end) for job, end in zip(jobs, ends, strict=True) if once(job)]
    lines, counted = set(), 0
    for job, end in sent:
        if end["codes"] == [0]:
            # it came after the end of the run
            assert (Path(job["args"][3]) / "result.json").exists()
            continue
        counted += 1
        assert end["codes"] == [SIGNALS[job["signal"]]], (job, end)
        assert "Traceback" not in end["said"], end
        lines.add(end["said"].splitlines()[-1].split(" at step ")[0].split(" stands in ")[0])
    assert lines <= {
        "interrupted",
        "interrupted while loading; nothing was written",
        "stopped",
        "the run is finished and",
    }
    assert len(lines) >= 3
    assert counted >= 30


def test_what_was_trained_is_saved_and_what_was_not_leaves_nothing(stormed: Any) -> None:
    _, jobs, ends = stormed
    trained = 0
    for job, end in zip(jobs, ends, strict=True):
        if not once(job):
            continue
        folder, last = Path(job["args"][3]), end["said"].splitlines()[-1]
        if last.startswith("interrupted"):
            # before the run, or behind its end
            assert not folder.exists() or (folder / "result.json").exists(), (job, end)
            continue
        found = RunFolder(folder).load_state()
        assert found is not None, (job, end)
        assert not found[2]
        logged = toy.metric_rows(folder) if (folder / "metrics.jsonl").exists() else []
        steps = [row["step"] for row in logged if "loss" in row]
        assert 0 <= max(steps, default=0) - found[1]["progress"]["step"] <= 1
        assert (folder / "result.json").exists() or last.startswith("stopped at step ")
        trained += 1
    assert trained >= 12


def test_what_is_continued_ends_as_the_unbroken_run(stormed: Any) -> None:
    root, jobs, ends = stormed
    continued = [(job, end) for job, end in zip(jobs, ends, strict=True) if "--resume" in job["args"]]
    assert len(continued) >= 4
    whole = (root / "whole" / "prompt" / "prompt.safetensors").read_bytes()
    for job, end in continued:
        assert end["codes"] == [0], end
        assert (Path(job["args"][1]) / "prompt" / "prompt.safetensors").read_bytes() == whole
        facts = json.loads((Path(job["args"][1]) / "result.json").read_text())
        assert facts["seconds_per_step_median"] > 0


def test_a_second_signal_ends_a_long_step_at_once(stormed: Any) -> None:
    _, jobs, ends = stormed
    twice = [(job, end) for job, end in zip(jobs, ends, strict=True) if "second" in job]
    assert len(twice) == len(SIGNALS)
    for job, end in twice:
        # by the signal itself or with its code, which are the same to a shell
        assert end["codes"] in ([-job["signal"]], [128 + job["signal"]]), end
        assert end["seconds"] < 1
        found = RunFolder(job["args"][3]).load_state()
        assert found is not None
        assert found[1]["progress"]["step"] == 4


def test_a_signal_that_is_ignored_from_the_start_stays_so(stormed: Any) -> None:
    _, jobs, ends = stormed
    ((job, end),) = [(job, end) for job, end in zip(jobs, ends, strict=True) if "ignored" in job]
    assert end["codes"] == [0], end
    assert (Path(job["args"][3]) / "result.json").exists()
