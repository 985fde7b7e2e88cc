"""The run directory: settings, environment, rows, result, predictions, checkpoints.

Knows no tensors' meaning and no training loop.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor

from promptuary import files
from promptuary.config import Run
from promptuary.errors import ConfigError, FileFormatError

KEEP = 2
"""Checkpoints that are kept."""

PACKAGES = ("promptuary", "torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "numpy")

FILES = ("run.yaml", "run.json", "environment.json", "metrics.jsonl", "result.json", "predictions.jsonl")
"""Files of a run, beside its folders checkpoints/ and prompt/."""


class RunFolder:
    """One run's folder."""

    def __init__(self, path: str | Path) -> None:
        """Name it; nothing is read or written yet."""
        self.path = Path(path)
        self.prompt = self.path / "prompt"
        self.rows = self.path / "metrics.jsonl"

    def check(self, run: Run, *, resume: bool, fresh: bool) -> None:
        """Refuse a folder that the run may not use; nothing is written.

        Args:
            run: the settings.
            resume: continue what is there.
            fresh: delete what is there.

        Raises:
            ConfigError: there is a run already and neither was asked for; or another run is there; or the
                folder holds other things.
        """
        note = self.path / "run.json"
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"out: {self.path} is a file; choose a folder")
        if note.exists():
            if not (fresh or resume):
                raise ConfigError(
                    f"out: {self.path} holds a run already; add --resume to continue it, --fresh to delete it"
                )
            if not fresh and files.read_json(note).get("hash") != run.hash():
                raise ConfigError(
                    f"out: {self.path} holds a run with other settings; choose another folder, or --fresh"
                )
        elif self.path.exists() and any(not item.name.startswith(".tmp-") for item in self.path.iterdir()):
            raise ConfigError(f"out: {self.path} is not empty and holds no run; choose another folder")

    def open(self, run: Run, *, resume: bool, fresh: bool) -> None:
        """`check`, then get the folder ready to be written.

        Raises:
            ConfigError: as `check`, or it cannot be written.
        """
        self.check(run, resume=resume, fresh=fresh)
        note = self.path / "run.json"
        if note.exists() and fresh:
            for name in ("checkpoints", "prompt"):
                shutil.rmtree(self.path / name, ignore_errors=True)
            for name in FILES:
                (self.path / name).unlink(missing_ok=True)
        try:
            # first of all, so that a crash from here on leaves a folder that can be resumed
            files.write_json(note, {"hash": run.hash()})
            files.write_file(self.path / "run.yaml", run.to_yaml().encode())
            files.write_json(self.path / "environment.json", environment())
        except OSError as error:
            raise ConfigError(f"out: {self.path} cannot be written: {error.strerror}") from None

    def row(self, content: Mapping[str, Any]) -> None:
        """Append a row to metrics.jsonl."""
        files.append_line(self.rows, content)

    def result(self, content: Mapping[str, Any]) -> None:
        """Write result.json."""
        files.write_json(self.path / "result.json", dict(content))

    def predictions(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write predictions.jsonl."""
        files.write_file(self.path / "predictions.jsonl", "".join(map(files.to_line, rows)).encode())

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def save_state(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write checkpoints/step-N/ as a whole, then forget all but the newest ones."""
        content = files.tensor_bytes(tensors)
        body = {**facts, "step": step, "sha256": files.digest(content)}
        folder = self.path / "checkpoints" / f"step-{step}"
        files.write_folder(folder, {"state.safetensors": content, "state.json": files.to_json(body)})
        for _, old in self._states()[KEEP:]:
            shutil.rmtree(old, ignore_errors=True)

    def load_state(self) -> tuple[dict[str, Tensor], dict[str, Any], list[str]] | None:
        """The newest checkpoint that is whole, and what was skipped on the way; None if there is none.

        Raises:
            FileFormatError: checkpoints are there, but none is whole.
        """
        skipped: list[str] = []
        for _, folder in self._states():
            try:
                facts = files.read_json(folder / "state.json")
                return files.read_tensors(folder / "state.safetensors", facts.get("sha256", "")), facts, skipped
            except FileFormatError as error:
                skipped.append(str(error))
        if skipped:
            raise FileFormatError(f"no checkpoint in {self.path} is whole: {skipped[0]}")
        return None

    def _states(self) -> list[tuple[int, Path]]:
        """Checkpoints, newest first."""
        found = []
        for folder in (self.path / "checkpoints").glob("step-*"):
            number = folder.name.removeprefix("step-")
            if number.isdecimal():
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
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
