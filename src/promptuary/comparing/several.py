"""Several worker processes on one machine: started, stopped together, and replaced when one dies.

Knows nothing of what they do but the folder that they share.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from promptuary.errors import ConfigError, Interrupted
from promptuary.listening import SIGNALS

REPLACED = 3
"""Dead workers that are replaced before that is taken for a fault of the runs (our choice)."""

PAUSE = 0.1


def work(out: Path, workers: int) -> None:
    """Start workers on a comparison, and wait until they find nothing more to do.

    Args:
        out: folder of the comparison, with its compare.yaml.
        workers: how many.

    Raises:
        Interrupted: a stop was asked for; all workers have saved what they had.
        ConfigError: workers keep dying, or one failed.
    """
    running = [_start(out, workers) for _ in range(workers)]
    dead = 0
    with _asked(running) as asked:
        while running:
            time.sleep(PAUSE)
            for worker in [one for one in running if one.poll() is not None]:
                running.remove(worker)
                code = worker.returncode
                if asked or code == 0:
                    continue
                if code > 0:
                    _end(running)
                    raise ConfigError("a worker failed, so all were stopped; its error stands above")
                dead += 1
                if dead > REPLACED:
                    _end(running)
                    raise ConfigError(
                        f"{dead} workers were killed (the last by signal {-code}), so all were stopped; is there "
                        "enough memory for so many? Lower --workers"
                    )
                running.append(_start(out, workers))
    if asked:
        raise Interrupted("stopped", asked[0])


def _start(out: Path, workers: int) -> subprocess.Popen[bytes]:
    share = max(1, (os.cpu_count() or 1) // workers)
    # workers that each take every core would wait for one another
    environment = {"OMP_NUM_THREADS": str(share), **os.environ}
    command = [
        sys.executable,
        "-m",
        "promptuary",
        "compare",
        str(out),
        "--out",
        str(out),
        "--worker-of",
        str(os.getpid()),
    ]
    # a session of its own: Ctrl-C reaches this process alone, which passes it on once
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)


@contextlib.contextmanager
def _asked(running: list[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Pass signals on to the workers; which ones came."""
    came: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        came.append(number)
        for worker in running:
            worker.send_signal(number)

    known = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: handler for number, handler in known.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, pass_on)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(running: list[subprocess.Popen[bytes]]) -> None:
    for worker in running:
        worker.send_signal(signal.SIGTERM)
    for worker in running:
        worker.wait()
