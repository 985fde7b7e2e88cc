"""A program that loads the library once and forks a process for each command line that it is asked to run.

On standard input: a JSON list of jobs (the fields of `Job`); on standard output: a JSON list of how each one ended.
A job may be sent a signal at a moment of its phase. Knows no test.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import promptuary
import toy
from promptuary import checkpoint, course, training
from promptuary.cli.main import main
from promptuary.runs import RunFolder
from promptuary.testing import tiny


@dataclass
class Job:
    """A command line. With `signal`, it is sent `delay` seconds after the `skip`-th time that `phase` begins.

    `second`: send it once more after so many seconds; `long`: the phase is a computation of half a minute;
    `ignored`: signals that are ignored from the start, as under nohup; `ranks`: processes that train together.
    """

    args: list[str]
    phase: str | None = None
    signal: int = 0
    delay: float = 0.0
    skip: int = 0
    second: float | None = None
    long: bool = False
    ignored: list[int] = field(default_factory=list)
    ranks: int = 1


PHASES: dict[str, tuple[Any, str]] = {
    "settings": (promptuary, "load_run"),
    "data": (course, "load"),
    "encoding": (course, "Feed"),
    "model": (training, "open_backbone"),
    "training": (training.Training, "step"),
    "evaluation": (course, "evaluate"),
    "save": (RunFolder, "save_state"),
    "finish": (checkpoint, "save_prompt"),
}
"""Phase -> what it begins with."""


def announce(job: Job, pipe: int) -> None:
    """Write a byte when the phase begins."""
    owner, name = PHASES[str(job.phase)]
    real: Callable[..., Any] = getattr(owner, name)
    left = [job.skip]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == -1:
            os.write(pipe, b".")
            if job.long:
                # one call without Python in it; whole numbers have no fast path, so it takes long and little memory
                torch.mm(torch.ones(4000, 4000, dtype=torch.int64), torch.ones(4000, 4000, dtype=torch.int64))
        return real(*args, **kwargs)

    setattr(owner, name, wrapped)


def child(job: Job, pipe: int, log: Path, rank: int, port: int) -> None:
    """Become the command line."""
    with log.open("wb") as file:
        os.dup2(file.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for number in job.ignored:
        signal.signal(number, signal.SIG_IGN)
    if job.ranks > 1:
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job.ranks, "LOCAL_WORLD_SIZE": job.ranks}
        os.environ.update(where, **{name: str(number) for name, number in numbers.items()})
    if job.phase is not None:
        announce(job, pipe)
    code = main(job.args)
    sys.stderr.flush()
    os._exit(code)


def run(job: Job, folder: Path) -> dict[str, Any]:
    """Fork, send what is to be sent, wait."""
    logs = [folder / f"{rank}.log" for rank in range(job.ranks)]
    read, write = os.pipe()
    port, pids = 20_000 + os.getpid() % 20_000, []
    for rank, log in enumerate(logs):
        pid = os.fork()
        if pid == 0:
            os.close(read)
            try:
                child(job, write, log, rank, port)
            finally:
                os._exit(99)
        pids.append(pid)
    os.close(write)
    if job.signal and select.select([read], [], [], 60)[0] and os.read(read, 1):
        time.sleep(job.delay)
        os.kill(pids[0], job.signal)
        if job.second is not None:
            time.sleep(job.second)
            os.kill(pids[0], job.signal)
    sent = time.monotonic()
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    os.close(read)
    return {"codes": codes, "seconds": time.monotonic() - sent, "said": logs[0].read_text(errors="replace")}


def warm_up() -> None:
    """Import what a run imports, without starting a thread."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        training.train(toy.run(Path(folder), family="gpt2"), backbone=tiny.backbone("gpt2"))
    training.PartialState._reset_state()


if __name__ == "__main__":
    jobs = [Job(**fields) for fields in json.load(sys.stdin)]
    warm_up()
    with tempfile.TemporaryDirectory() as made:
        print(json.dumps([run(job, Path(made)) for job in jobs]))
