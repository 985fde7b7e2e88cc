"""A small comparison for tests: a tiny saved model, two methods, trials and seeds; and a program that is killed in it.

Run as a program: imports the library once and forks a process for each worker, so that dying is cheap. Knows no test.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tiny
import toy

BOTH = ["prompts", "bitfit"]
OTHER = ("seconds_per_step_median", "train_seconds", "peak_memory_bytes", "command")
"""What differs between two runs that are the same."""


def settings(where: Path, out: str = "out", sampler: str = "random", **changes: Any) -> dict[str, Any]:
    """Two methods, two trials, two seeds."""
    base = where / "base"
    if not base.exists():
        tiny.save(base, "masked", seed=0)
    return {
        "backbones": {"tiny": {"model": str(base), "device": "cpu"}},
        "tasks": {
            "toy": {
                "task": dict(toy.TASKS["classify_words"]),
                "data": {"source": str(toy.folder(where / "data")), "max_length": 32},
            }
        },
        "methods": {
            "prompts": {
                "method": {"name": "prompt_tuning", "num_virtual_tokens": 3},
                "space": {"method.prompt_lr": {"low": 0.01, "high": 0.5, "log": True}},
            },
            "bitfit": {"baseline": {"name": "bitfit"}, "space": {"baseline.learning_rate": [0.01, 0.1]}},
        },
        "seeds": [0, 1],
        "train": {"steps": 4, "batch_size": 4, "evaluate_every": 2, "threads": 1},
        "tuning": {"trials": 2, "sampler": sampler, "seeds": [100]},
        "out": str(where / out),
        **changes,
    }


def plain(rows: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows without times."""
    return [{key: value for key, value in row.items() if key not in OTHER} for row in rows]


def read(out: Path) -> list[dict[str, Any]]:
    """The rows of a finished comparison."""
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


# ---- the program ----------------------------------------------------------------------------------------------------


def _worker(values: Mapping[str, Any], log: Path, dies_at: int | None) -> int:
    """A forked process at work, which dies by SIGKILL in a step; its process."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        from promptuary import training
        from promptuary.comparing import work
        from promptuary.comparing.job import load_job
        from promptuary.comparing.ledger import Ledger

        real, steps = training.Training._finish, [0]

        def finish(self: Any) -> Any:
            done = real(self)
            with log.open("a") as file:
                file.write(Path(self.settings.out).name + "\n")
            return done

        def stepped(self: Any, row: Any) -> None:
            steps[0] += 1
            if steps[0] == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)

        training.Training._finish = finish  # type: ignore[method-assign]
        work.Watch.stepped = stepped  # type: ignore[method-assign]
        ledger = Ledger(load_job(values))
        ledger.open()
        work.Worker(ledger, lambda text: None).work()
        code = 0
    finally:
        os._exit(code)


def _crowd(where: Path, out: str, sampler: str, deaths: list[int], workers: int, methods: list[str]) -> dict[str, Any]:
    """Workers that die one after the other, then as many at once as are asked for."""
    from promptuary.comparing.job import load_job
    from promptuary.comparing.ledger import Ledger
    from promptuary.comparing.summary import summarise

    values, log = settings(where, out, sampler), where / f"{out}.log"
    values["methods"] = {name: values["methods"][name] for name in methods}
    if not workers:  # in this process, so that those that are forked find everything imported
        from accelerate import PartialState

        from promptuary.comparing import work

        ledger = Ledger(load_job({**values, "seeds": [0], "tuning": {**values["tuning"], "trials": 1}}))
        ledger.open()
        work.Worker(ledger, lambda text: None).work()
        PartialState._reset_state()
        return {}
    codes = [os.waitstatus_to_exitcode(os.waitpid(_worker(values, log, at), 0)[1]) for at in deaths]
    pids = [_worker(values, log, None) for _ in range(workers)]
    codes += [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    summary = summarise(Ledger(load_job(values)))
    return {"codes": codes, "ended": log.read_text().splitlines(), "rows": read(where / out), "summary": summary}


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        _crowd(root, "warm", "tpe", [], 0, BOTH)
        asked: dict[str, list[Any]] = json.loads(sys.argv[1])
        print(json.dumps({name: _crowd(root, name, *one) for name, one in asked.items()}))
