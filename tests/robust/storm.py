"""Kills real processes at random moments and looks at what they left; a program that prints one JSON object.

Knows no pytest: it forks, which a test process with threads of its own should not.
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import tiny
import toy
from promptuary import files
from promptuary.building import build_method
from promptuary.checkpoint import load_prompt, save_prompt
from promptuary.errors import ConfigError
from promptuary.listening import Listener
from promptuary.run import Run
from promptuary.runs import RunFolder
from promptuary.tasks.classify import Classify
from promptuary.training import train
from promptuary.tuned import Tuned

SAVE_EVERY = 2


class Board:
    """A few numbers that parent and child both see, also after the child is dead."""

    def __init__(self, count: int = 4) -> None:
        self._memory = mmap.mmap(-1, 8 * count)

    def __getitem__(self, place: int) -> int:
        return struct.unpack_from("q", self._memory, 8 * place)[0]

    def __setitem__(self, place: int, value: int) -> None:
        struct.pack_into("q", self._memory, 8 * place, value)


def child(work: Callable[[], None]) -> int:
    """Do something in a process of its own."""
    process = os.fork()
    if process:
        return process
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(3)
    os._exit(0)


def wait_for(board: Board, place: int, value: int, process: int) -> int | None:
    """Until a number is there; the child's status if it ended before."""
    while board[place] < value:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.0002)
    return None


def kill(process: int) -> int:
    """SIGKILL; the status that the process ended with."""
    os.kill(process, signal.SIGKILL)
    return os.waitpid(process, 0)[1]


def killed(status: int) -> bool:
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


class Reporting(Listener):
    """Writes the step on the board."""

    def __init__(self, board: Board) -> None:
        self.board = board

    def stepped(self, row: Mapping[str, Any]) -> None:
        self.board[1] = row["step"]
        self.board[0] = 1


def in_the_loop(where: Path, kills: int, pick: random.Random) -> dict[str, Any]:
    """Kill training runs; every next process resumes what the one before left."""
    backbone = tiny.backbone("causal")

    def settings(name: str) -> Run:
        quick = {"steps": 60, "save_every": SAVE_EVERY, "evaluate_every": 30}
        return toy.run(where, "method.prompt_lr=0.5", name=name, **quick)

    whole = train(settings("whole"), backbone=tiny.backbone("causal"))
    wanted = (whole.dir / "prompt" / "prompt.safetensors").read_bytes()
    found = {"kills": 0, "finished": 0, "lost_runs": 0, "largest_loss": 0, "other_end": 0}
    run, before = settings("killed"), 0
    folder = RunFolder(run.out)
    while found["kills"] < kills or folder.path.exists():
        board = Board()

        def resume(board: Board = board) -> None:
            train(run, resume=True, listener=Reporting(board), backbone=backbone)

        process = child(resume)
        status = wait_for(board, 0, 1, process)
        if status is None and found["kills"] < kills:
            time.sleep(pick.uniform(0, 0.02))
            status = kill(process)
        elif status is None:
            status = os.waitpid(process, 0)[1]
        if killed(status):
            found["kills"] += 1
            kept = folder.load_state()
            step = 0 if kept is None else kept[1]["progress"]["step"]
            found["largest_loss"] = max(found["largest_loss"], max(board[1], before) - step)
            found["lost_runs"] += kept is not None and bool(kept[2])
            before = step
        elif status == 0:
            found["finished"] += 1
            found["other_end"] += (folder.prompt / "prompt.safetensors").read_bytes() != wanted
            found["leftovers"] = len([item for item in folder.path.rglob(".*") if item.name != ".lock"])
        else:
            found["lost_runs"] += 1
        if not killed(status):
            shutil.rmtree(folder.path)
            before = 0
    return found


def in_a_save(where: Path, kills: int, pick: random.Random) -> dict[str, Any]:
    """Kill processes that do nothing but save checkpoints; only kills inside a save count."""
    run = toy.run(where, name="saves")
    folder = RunFolder(run.out)
    folder.open(run, resume=True, fresh=False)
    found = {"kills": 0, "outside": 0, "wrong": 0, "lost": 0, "leftovers": 0}
    board, last = Board(), 0
    while found["kills"] < kills:
        board[0], board[1] = 0, last

        def save(first: int = last + 1) -> None:
            for step in range(first, first + 10_000):
                # every third step is saved twice: a folder is replaced
                for _ in range(2 if step % 3 == 0 else 1):
                    board[0] = 1
                    folder.save_state(step, {"a": torch.full((500,), float(step))}, {"note": step})
                    board[0] = 0
                board[1] = step

        process = child(save)
        wait_for(board, 0, 1, process)
        time.sleep(pick.uniform(0, 0.01))
        kill(process)
        found["kills" if board[0] else "outside"] += 1
        kept = folder.load_state()
        if kept is None:
            found["lost"] += board[1] > 0
            continue
        tensors, facts, skipped = kept
        step = facts["step"]
        found["wrong"] += bool(skipped) or facts["note"] != step or tensors["a"].tolist() != [float(step)] * 500
        found["lost"] += step < board[1]
        files.sweep(folder.path / "checkpoints", mine=True)
        found["leftovers"] += any(".tmp-" in item.name or ".old-" in item.name for item in folder.path.rglob(".*"))
        last = step
    return found


def prompts(where: Path, count: int) -> list[Tuned]:
    """Prompts that differ in one number."""
    backbone = tiny.backbone("causal")
    run = toy.run(where)
    task = Classify(run.task, toy.rows(4))
    made = []
    for number in range(count):
        tuned = Tuned(backbone, task, build_method(run.method, backbone.shape))
        tuned.initialise(torch.Generator().manual_seed(1))
        tuned.trained()[0].parameter.data.fill_(number + 1)
        made.append(tuned)
    return made


def in_a_prompt(where: Path, kills: int, pick: random.Random, made: list[Tuned]) -> dict[str, Any]:
    """Kill processes that replace a prompt folder again and again: one or the other must always be there."""
    path = where / "prompt"
    save_prompt(made[0], path)
    found, board = {"kills": 0, "lost": 0}, Board()
    while found["kills"] < kills:
        board[0] = 0

        def save() -> None:
            while True:
                for tuned in made:
                    save_prompt(tuned, path)
                    board[0] = 1

        process = child(save)
        wait_for(board, 0, 1, process)
        time.sleep(pick.uniform(0, 0.008))
        kill(process)
        found["kills"] += 1
        found["lost"] += number_in(path, made[0]) is None
    save_prompt(made[0], path)
    found["leftovers"] = len(list(path.parent.glob(".tmp-prompt-*")) + list(path.parent.glob(".old-prompt-*")))
    return found


def number_in(path: Path, made: Tuned) -> int | None:
    """The number of the prompt in a folder, if all of the folder agrees on it."""
    rows = load_prompt(path, made.backbone).state()["method.rows"]
    return int(rows[0, 0]) if len(set(rows.flatten().tolist())) == 1 else None


def read_while_written(where: Path, seconds: float, made: list[Tuned]) -> dict[str, Any]:
    """A reader never meets a folder that is half one prompt and half another."""
    path = where / "prompt"
    save_prompt(made[0], path)

    def save() -> None:
        while True:
            for tuned in made:
                save_prompt(tuned, path)

    process = child(save)
    reads, seen, end = 0, set(), time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            seen.add(number_in(path, made[0]))
            reads += 1
    finally:
        kill(process)
    return {"reads": reads, "seen": sorted(map(str, seen))}


class Waiting(Listener):
    """Holds a run that got the folder until the other process has ended."""

    def __init__(self, board: Board) -> None:
        self.board = board

    def planned(self, plan: Mapping[str, Any]) -> None:
        self.board[1] = os.getpid()
        while not self.board[0]:
            time.sleep(0.001)


def two_at_once(where: Path, rounds: int) -> dict[str, Any]:
    """Two processes start the same run at the same time: one does it, the other is told who does."""
    backbone, found = tiny.backbone("causal"), {"rounds": 0, "won": 0, "refused": 0, "named": 0}
    for number in range(rounds):
        run, board = toy.run(where, name=f"race-{number}"), Board()

        def race(run: Run = run, board: Board = board) -> None:
            try:
                train(run, resume=True, listener=Waiting(board), backbone=backbone)
            except ConfigError as error:
                while not board[1]:
                    time.sleep(0.001)
                board[2] = int(f"process {board[1]} on" in str(error) and "\n" not in str(error))
                board[3] = 1
                board[0] = 1

        both = [child(race), child(race)]
        statuses = [os.waitpid(process, 0)[1] for process in both]
        found["rounds"] += 1
        found["won"] += statuses == [0, 0] and (Path(run.out) / "result.json").exists()
        found["refused"] += board[3]
        found["named"] += board[2]
    return found


def main(where: Path, quick: Path, kills: int) -> None:
    """Where a disk is; where a memory file system is, if there is one: a killed process loses nothing of either."""
    torch.set_num_threads(1)
    pick = random.Random(3)
    made = prompts(where, 3)
    times = {}

    def timed(name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        began = time.perf_counter()
        found = work()
        times[name] = round(time.perf_counter() - began, 1)
        return found

    # a child copies every page that its collector marks
    gc.freeze()
    gc.disable()
    found = {
        "loop": timed("loop", lambda: in_the_loop(quick, kills, pick)),
        "save": timed("save", lambda: in_a_save(quick, kills, pick)),
        "prompt": timed("prompt", lambda: in_a_prompt(where / "one", kills // 8, pick, made)),
        "read": timed("read", lambda: read_while_written(where / "two", 0.5, made)),
        "two": timed("two", lambda: two_at_once(where, 6)),
    }
    # systems that cannot swap two names
    files._exchange = lambda one, other: False
    found["prompt_in_two_steps"] = timed("steps", lambda: in_a_prompt(where / "three", kills // 8, pick, made))
    found["read_in_two_steps"] = timed("read2", lambda: read_while_written(where / "four", 0.5, made))
    print(json.dumps({**found, "seconds": times}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
