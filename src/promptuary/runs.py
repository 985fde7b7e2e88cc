"""The run directory: settings, environment, rows, result, predictions, checkpoints.

Knows no tensors' meaning and no training loop.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor

from promptuary import files
from promptuary.errors import ConfigError, FileFormatError, StorageError
from promptuary.run import AnyRun

KEEP = 2
"""Checkpoints that are kept."""

VERSION = 2
"""Of a checkpoint's format; the first one had neither a number nor a checksum."""

LOCK = ".lock"
"""Held by the process that writes in a run folder; it says which one that is."""

PACKAGES = ("promptuary", "torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "numpy")

FILES = ("run.yaml", "run.json", "environment.json", "metrics.jsonl", "result.json", "predictions.jsonl")
"""Files of a run, beside its folders checkpoints/ and prompt/, prompts/ or weights/."""

LEARNT = ("prompt.json", "weights.json")
"""What a folder with something that was learnt has when it is whole: a prompt, or the weights of a baseline."""


class RunFolder:
    """One run's folder."""

    def __init__(self, path: str | Path, prompts: Sequence[str] = ("prompt",)) -> None:
        """Name it, and its prompts; nothing is read or written yet."""
        self.path = Path(path)
        self.prompts = [self.path / name for name in prompts]
        self.prompt = self.prompts[0]
        self.rows = self.path / "metrics.jsonl"
        self._held = False

    def check(self, run: AnyRun, *, resume: bool, fresh: bool) -> None:
        """Refuse a folder that the run may not use; nothing is written.

        Args:
            run: the settings.
            resume: continue what is there.
            fresh: delete what is there.

        Raises:
            ConfigError: there is a run already and neither was asked for; or another run is there; or the
                holds other things; or another process writes in it.
            StorageError: it cannot be looked at.
        """
        try:
            self._check(run, resume, fresh)
        except OSError as error:
            raise StorageError(f"out: {self.path} cannot be read: {error.strerror}") from error

    def _check(self, run: AnyRun, resume: bool, fresh: bool) -> None:
        note = self.path / "run.json"
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"out: {self.path} is a file; choose a folder")
        if not self._held:
            self._check_free()
        if note.exists():
            if not (fresh or resume):
                raise ConfigError(
                    f"out: {self.path} holds a run already; add --resume to continue it, --fresh to delete it"
                )
            if not fresh and files.read_json(note).get("hash") != run.hash():
                raise ConfigError(
                    f"out: {self.path} holds a run with other settings; choose another folder, or --fresh"
                )
        elif self.path.exists() and any(not item.name.startswith((".tmp-", LOCK)) for item in self.path.iterdir()):
            raise ConfigError(f"out: {self.path} is not empty and holds no run; choose another folder")

    def open(self, run: AnyRun, *, resume: bool, fresh: bool) -> None:
        """`check`, then get the folder ready to be written; what dead processes left half-written is cleared away.

        Raises:
            ConfigError: as `check`.
            StorageError: it cannot be written.
        """
        self.check(run, resume=resume, fresh=fresh)
        note = self.path / "run.json"
        try:
            if note.exists() and fresh:
                for folder in (self.path / "checkpoints", *self.prompts):
                    if folder.exists():
                        shutil.rmtree(folder)
                # the note stays, so that a crash in here leaves a folder that is still known as a run
                for name in FILES:
                    if name != note.name:
                        (self.path / name).unlink(missing_ok=True)
            # first of all, so that a crash from here on leaves a folder that can be resumed
            files.write_json(note, {"hash": run.hash()})
            for folder in (self.path, self.path / "checkpoints"):
                files.sweep(folder, mine=True)
        except OSError as error:
            raise StorageError(f"out: {error.filename or self.path} cannot be changed: {error.strerror}") from error
        files.write_file(self.path / "run.yaml", run.to_yaml().encode())
        files.write_json(self.path / "environment.json", environment())

    @contextlib.contextmanager
    def writing(self, run: AnyRun, *, resume: bool, fresh: bool) -> Iterator[str | None]:
        """`open`, and keep every other process out until the end of the block, also if this one is killed.

        Yields:
            What the user should know: that this file system has no locks; None where it has.

        Raises:
            ConfigError: as `check`.
            StorageError: it cannot be written.
        """
        self.check(run, resume=resume, fresh=fresh)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise StorageError(f"out: {self.path} cannot be written: {error.strerror}") from error
        try:
            note = None
            try:
                self._lock(handle)
            except OSError as error:
                note = f"{self.path} is on a file system without locks ({error.strerror}): start one process there"
            with contextlib.suppress(OSError):  # a full disk: what is written next says so
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"process {os.getpid()} on {platform.node()}".encode(), 0)
            self._held = True
            self.open(run, resume=resume, fresh=fresh)
            yield note
        finally:
            self._held = False
            with contextlib.suppress(OSError):
                os.ftruncate(handle, 0)
            os.close(handle)

    def _lock(self, handle: int) -> None:
        for _ in range(20):
            with contextlib.suppress(BlockingIOError):
                return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # somebody may only be looking whether the folder is free; who writes was met by `check` already
            time.sleep(0.1)
        raise self._taken(handle)

    def _check_free(self) -> None:
        """Refuse a folder in which a process is writing."""
        try:
            handle = os.open(self.path / LOCK, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            return  # nobody ever wrote here, or nothing can be written here, which is told soon
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._taken(handle) from None
        except OSError:
            return  # no locks here; `writing` says so
        finally:
            os.close(handle)

    def _taken(self, handle: int) -> ConfigError:
        for _ in range(10):
            holder = os.pread(handle, 200, 0).decode(errors="replace")
            if holder:
                break
            time.sleep(0.1)  # it has just begun, and says next who it is
        return ConfigError(
            f"out: {holder or 'another process'} is writing in {self.path}; "
            "wait for its end or stop it, or choose another folder"
        )

    def row(self, content: Mapping[str, Any]) -> None:
        """Append a row to metrics.jsonl."""
        files.append_line(self.rows, content)

    def result(self, content: Mapping[str, Any]) -> None:
        """Write result.json."""
        files.write_json(self.path / "result.json", dict(content))

    def finished(self, *, tested: bool = True) -> dict[str, Any] | None:
        """What result.json says, if the run wrote everything: it comes last, but parts may have been deleted since.

        One that is damaged is as none: the end of the run is done again from its last checkpoint.

        Args:
            tested: whether a run that left the test split alone is unfinished.
        """
        whole = all(any((folder / name).is_file() for name in LEARNT) for folder in self.prompts)
        try:
            facts = files.read_json(self.path / "result.json") if whole else {}
        except FileFormatError:
            return None
        untested = facts.get("tested") is False
        if not isinstance(facts.get("metrics"), dict) or (untested and tested):
            return None
        return facts if untested or (self.path / "predictions.jsonl").is_file() else None

    def predictions(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write predictions.jsonl."""
        files.write_file(self.path / "predictions.jsonl", "".join(map(files.to_line, rows)).encode())

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def save_state(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write checkpoints/step-N/ as a whole, then forget all but the newest ones.

        Raises:
            StorageError: it cannot be written; the checkpoints before are still there.
        """
        content = files.tensor_bytes(tensors)
        about = {"version": VERSION, "step": step, "sha256": files.digest(content), "bytes": len(content)}
        body = files.to_json(files.sealed({**facts, **about}))
        folder = self.path / "checkpoints" / f"step-{step}"
        files.write_folder(folder, {"state.safetensors": content, "state.json": body})
        states = self._states()
        # those of a later step are damaged, or the run would have gone on from them
        later = [old for number, old in states if number > step]
        for old in (*later, *[old for number, old in states if number <= step][KEEP:]):
            shutil.rmtree(old, ignore_errors=True)

    def load_state(self) -> tuple[dict[str, Tensor], dict[str, Any], list[str]] | None:
        """The newest checkpoint that is whole, and what was skipped on the way; None if there is none.

        Raises:
            FileFormatError: checkpoints are there, but none is whole.
        """
        skipped: list[str] = []
        for step, folder in self._states():
            try:
                return *self._load(step, folder), skipped
            except FileFormatError as error:
                skipped.append(str(error))
        if skipped:
            raise FileFormatError(f"no checkpoint in {self.path} is whole: {skipped[0]}; --fresh starts again")
        return None

    def _load(self, step: int, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """One checkpoint, if it is whole and belongs to this run."""
        note = folder / "state.json"
        facts = files.read_json(note)
        if "version" in facts or "checksum" in facts:
            files.check_seal(note, facts)
            if facts.get("version") != VERSION:
                raise FileFormatError(f"{note} has format version {facts.get('version')!r}, this release reads 1 and 2")
        if facts.get("step") != step:
            raise FileFormatError(f"{note} is of step {facts.get('step')!r}, not of the step in its folder's name")
        run = files.read_json(self.path / "run.json").get("hash")
        if facts.get("run_hash", run) != run:
            raise FileFormatError(f"{note} belongs to a run with other settings")
        size = facts.get("bytes")
        limit = size if isinstance(size, int) else None
        tensors = files.read_tensors(folder / "state.safetensors", str(facts.get("sha256")), limit=limit)
        return tensors, facts

    def _states(self) -> list[tuple[int, Path]]:
        """Checkpoints, newest first."""
        found = []
        for folder in (self.path / "checkpoints").glob("step-*"):
            number = folder.name.removeprefix("step-")
            if number.isascii() and number.isdecimal() and len(number) < 16:
                found.append((int(number), folder))
        return sorted(found, reverse=True)


def environment() -> dict[str, Any]:
    """Versions and machine, for whoever wants to repeat the run."""
    import torch

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": versions(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def versions() -> dict[str, str]:
    """Installed versions of what matters."""
    found = {name: _version(name) for name in PACKAGES}
    return {name: version for name, version in found.items() if version is not None}


@functools.cache
def _version(package: str) -> str | None:
    """Looked up once: it takes milliseconds."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
