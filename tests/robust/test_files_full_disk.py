"""A full or read-only disk: one line that names the file and the bytes, and nothing that was saved is lost.

Knows no file format. The disks are real where the machine lets us mount them; elsewhere `os.write` counts.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import tiny
import toy
from promptuary import files
from promptuary.checkpoint import load_prompt, save_prompt
from promptuary.cli.main import main
from promptuary.errors import StorageError
from promptuary.run import Run
from promptuary.runs import RunFolder
from promptuary.training import Result, train

PAGE = 4096
SIZES = (4, 8, 12, 20, 28, 32, 36, 44)
"""KiB, all less than a whole run needs; each ends it elsewhere."""


@dataclass
class Disk:
    """A place of a limited size."""

    path: Path
    kind: str
    grow: Callable[[], None]
    freeze: Callable[[], None]


def mounted(where: Path, size: int) -> bool:
    """A real file system in memory, if we may."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(where)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@contextmanager
def disk(where: Path, size: int, *, real: bool = True) -> Iterator[Disk]:
    """A disk of `size` KiB."""
    where.mkdir()
    if real and mounted(where, size):

        def again(options: str) -> None:
            subprocess.run(["mount", "-o", f"remount,{options}", str(where)], check=True)

        try:
            yield Disk(where, "tmpfs", lambda: again("size=10m"), lambda: again("ro"))
        finally:
            subprocess.run(["umount", str(where)], check=True)
        return
    with pytest.MonkeyPatch.context() as patch:
        write, real_open, room, frozen = os.write, os.open, [size * 1024], [False]

        def used() -> int:
            return sum(-(-path.stat().st_size // PAGE) * PAGE for path in where.rglob("*") if path.is_file())

        def counted(handle: int, data: bytes) -> int:
            if not os.readlink(f"/proc/self/fd/{handle}").startswith(str(where)):
                return write(handle, data)
            # the rest of the last page is free
            free = room[0] - used() + -os.fstat(handle).st_size % PAGE
            if free <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(handle, bytes(data)[:free])

        def opened(path: object, flags: int, *rest: object, **more: object) -> int:
            if frozen[0] and flags & (os.O_WRONLY | os.O_RDWR) and str(path).startswith(str(where)):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return real_open(path, flags, *rest, **more)  # type: ignore[arg-type]

        patch.setattr(os, "write", counted)
        patch.setattr(os, "open", opened)
        yield Disk(where, "counted", lambda: room.__setitem__(0, 10**7), lambda: frozen.__setitem__(0, True))


def settings(where: Path, out: Path) -> Run:
    return toy.run(where, f"out={out}", steps=6, save_every=1, evaluate_every=3)


def go(where: Path, out: Path) -> Result:
    return train(settings(where, out), resume=True, backbone=tiny.backbone("causal"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The prompt of the run that had room."""
    where = tmp_path_factory.mktemp("whole")
    return (go(where, where / "run").dir / "prompt" / "prompt.safetensors").read_bytes()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("real", [True, False])
def test_a_full_disk_ends_a_run_in_one_line_and_room_continues_it(
    real: bool, size: int, tmp_path: Path, whole: bytes
) -> None:
    with disk(tmp_path / "disk", size, real=real) as place:
        out = place.path / "run"
        with pytest.raises(StorageError) as caught:
            go(tmp_path, out)
        text = str(caught.value)
        print(f"{place.kind} of {size} KiB: {text}")
        assert "\n" not in text
        assert str(out) in text
        assert "No space left on device" in text
        assert "bytes are needed, " in text
        assert "are free" in text
        assert caught.value.exit_code == 2
        # whatever was saved is whole, and nothing half-written lies about
        if (out / "run.json").exists():
            kept = RunFolder(out).load_state()
            assert kept is None or kept[2] == []
            rows = toy.metric_rows(out) if (out / "metrics.jsonl").exists() else []
            trained = max((row["step"] for row in rows if "loss" in row), default=0)
            assert (0 if kept is None else kept[1]["step"]) >= trained - 1
        assert [item for item in out.rglob(".*") if item.name != ".lock"] == []
        place.grow()
        assert (go(tmp_path, out).dir / "prompt" / "prompt.safetensors").read_bytes() == whole


@pytest.mark.parametrize("real", [True, False])
def test_a_full_disk_keeps_the_old_prompt(real: bool, tmp_path: Path) -> None:
    with disk(tmp_path / "disk", 24, real=real) as place:
        made = go(tmp_path, tmp_path / "elsewhere").prompt
        save_prompt(made, place.path / "prompt")
        before = {path.name: path.read_bytes() for path in (place.path / "prompt").iterdir()}
        with pytest.raises(StorageError, match="prompt cannot be written: No space left on device"):
            save_prompt(made, place.path / "prompt")
        assert {path.name: path.read_bytes() for path in (place.path / "prompt").iterdir()} == before
        assert [path.name for path in place.path.iterdir()] == ["prompt"]
        assert load_prompt(place.path / "prompt", made.backbone).predict(["red"]) == made.predict(["red"])


@pytest.mark.parametrize("real", [True, False])
def test_a_read_only_disk_is_told_in_one_line(real: bool, tmp_path: Path) -> None:
    with disk(tmp_path / "disk", 1000, real=real) as place:
        out = place.path / "run"
        made = go(tmp_path, out).prompt
        place.freeze()
        for resume in (True, False):
            run = settings(tmp_path, out if resume else place.path / "new")
            with (
                pytest.raises(StorageError) as caught,
                RunFolder(run.out).writing(run, resume=resume, fresh=not resume),
            ):
                raise AssertionError
            assert "Read-only file system" in str(caught.value)
            assert str(place.path) in str(caught.value)
        for write in (
            lambda: save_prompt(made, out / "prompt"),
            lambda: RunFolder(out).row({"a": 1}),
            lambda: RunFolder(out).result({}),
            lambda: files.write_file(out / "a" / "b", b""),
        ):
            with pytest.raises(StorageError, match="Read-only file system"):
                write()
        assert load_prompt(out, made.backbone).predict(["red"]) == made.predict(["red"])


def test_the_command_line_says_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny.save(tmp_path / "base", "causal")
    with disk(tmp_path / "disk", 20) as place:
        run = toy.run(tmp_path, f"backbone.model={base}", f"out={place.path / 'run'}", steps=6, save_every=1)
        (tmp_path / "run.yaml").write_text(run.to_yaml(), encoding="utf-8")
        assert main(["train", str(tmp_path / "run.yaml")]) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith(f"error: {place.path / 'run'}")
        assert "No space left on device" in last
        assert "fault of promptuary" not in last
