"""Every system call of a save fails once in every way, or is the last one of its process: the old or the new is whole.

Knows no training; the calls are the real ones up to the one that fails.
"""

from __future__ import annotations

import errno
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
import toy
from artefacts import quick_folder
from promptuary import files
from promptuary.building import build_method
from promptuary.checkpoint import load_prompt, save_prompt
from promptuary.errors import StorageError
from promptuary.runs import RunFolder
from promptuary.tasks.classify import Classify
from promptuary.tuned import Tuned

CALLS = ("open", "write", "fsync", "rename", "replace", "mkdir")
WAYS = ("crash", errno.ENOSPC, errno.EIO, errno.EACCES)
CRASH = 9


class Fault:
    """Counts the library's own calls; at number `at` the process dies or the call fails."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int = 0, way: str | int = "crash") -> None:
        self.at, self.way, self.calls = at, way, 0
        for name in CALLS:
            patch.setattr(os, name, self._wrapped(getattr(os, name)))
        patch.setattr(files, "_exchange", self._wrapped(files._exchange))

    def _wrapped(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            # pathlib passes calls on; what shutil does while clearing away is allowed to fail
            frame = sys._getframe(1)
            if frame.f_code.co_filename.endswith("pathlib.py"):
                frame = frame.f_back or frame
            if frame.f_code.co_filename.endswith("files.py"):
                self.calls += 1
                if self.calls == self.at and self.way == "crash":
                    os._exit(CRASH)
                if self.calls == self.at:
                    raise OSError(self.way, os.strerror(int(self.way)))
            return real(*args, **options)

        return call


def state(number: int) -> dict[str, torch.Tensor]:
    return {"a": torch.full((300,), float(number))}


def prompt(number: float) -> Tuned:
    run = toy.run(Path("/nowhere"))
    tuned = Tuned(BACKBONE, Classify(run.task, toy.rows(4)), build_method(run.method, BACKBONE.shape))
    tuned.trained()[0].parameter.data.fill_(number)
    return tuned.train(False)


BACKBONE = tiny.backbone("causal")


class Place:
    """Something that was saved, and is saved again with other content."""

    def __init__(self, where: Path, what: str) -> None:
        self.what, self.folder = what, RunFolder(where / "run")
        self.folder.path.mkdir(parents=True)
        files.write_json(self.folder.path / "run.json", {"hash": "h"})
        self.write(1)
        if what == "next checkpoint":
            self.folder.save_state(2, state(2), {"note": 2})

    def write(self, number: int) -> None:
        if self.what == "prompt":
            save_prompt(prompt(number), self.folder.prompt)
        elif self.what == "file":
            files.write_json(self.folder.path / "result.json", {"number": number})
        elif self.what == "row":
            self.folder.row({"number": number})
        else:
            self.folder.save_state(3 if number > 1 and self.what == "next checkpoint" else 1, state(number), {})

    def read(self) -> float:
        """The number of what is there; all parts must agree on it."""
        if self.what == "prompt":
            (number,) = set(load_prompt(self.folder.path, BACKBONE).state()["method.rows"].flatten().tolist())
        elif self.what == "file":
            number = files.read_json(self.folder.path / "result.json")["number"]
        elif self.what == "row":
            number = toy.metric_rows(self.folder.path)[-1]["number"]
        else:
            # as opening the run does
            files.sweep(self.folder.path / "checkpoints")
            tensors, _, skipped = self.folder.load_state() or ({}, {}, ["none"])
            assert skipped == []
            (number,) = set(tensors["a"].tolist())
        return number

    def left(self) -> list[str]:
        return [item.name for item in self.folder.path.rglob(".*")]


def one(place: Place, at: int, way: str | int, two_steps: bool) -> bool:
    """The same save again, with a fault; whether it was hit."""
    new = 7
    if way == "crash":
        process = os.fork()
        if not process:
            try:
                with pytest.MonkeyPatch.context() as patch:
                    if two_steps:
                        patch.setattr(files, "_exchange", lambda one, other: False)
                    Fault(patch, at, way)
                    place.write(new)
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        assert status in (0, CRASH)
        return status == CRASH
    caught = None
    with pytest.MonkeyPatch.context() as patch:
        if two_steps:
            patch.setattr(files, "_exchange", lambda one, other: False)
        fault = Fault(patch, at, way)
        try:
            place.write(new)
        except StorageError as error:
            caught = error
    if caught is None:
        # a fault that was hit is never swallowed
        assert fault.calls < at
        return False
    assert str(place.folder.path) in str(caught)
    assert os.strerror(int(way)) in str(caught)
    assert "\n" not in str(caught)
    assert ("bytes are needed" in str(caught)) is (way == errno.ENOSPC)
    assert caught.exit_code == 2
    return True


SAVES = {
    "next checkpoint": (12, False),
    "same checkpoint": (12, False),
    "same checkpoint in two steps": (14, True),
    "prompt": (18, False),
    "prompt in two steps": (20, True),
    "file": (6, False),
    "row": (2, False),
}
"""What is saved -> system calls that may fail, and whether two names cannot be swapped at once."""


@pytest.fixture
def memory() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder


@pytest.mark.parametrize("what", SAVES)
def test_a_save_that_fails_anywhere_is_told_and_loses_nothing(what: str, memory: Path) -> None:
    least, two_steps = SAVES[what]
    faults = dict.fromkeys(WAYS, 0)
    for way in WAYS:
        for at in itertools.count(1):
            place = Place(memory / f"{way}-{at}", what.removesuffix(" in two steps"))
            before = place.read()
            hit = one(place, at, way, two_steps)
            if not hit:
                assert place.read() == 7
                break
            faults[way] += 1
            assert place.read() in (before, 7)
            if way != "crash":
                assert place.left() == []
            # the next save works, and clears away what the dead one left
            place.write(8)
            assert place.read() == 8
            files.sweep(place.folder.path)
            files.sweep(place.folder.path / "checkpoints")
            assert place.left() == []
    print(f"{what}: {faults}")
    assert min(faults.values()) >= least
    assert len(set(faults.values())) == 1
