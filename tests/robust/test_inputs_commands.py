"""Every command, when a flag, a file, a permission, the user's patience or the disk fails: a documented exit code and
one line, and a traceback only where --debug asks for it."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import promptuary.cli.doctor
import promptuary.demo
import promptuary.exports.peft
import promptuary.hub
import promptuary.report.board
from cli.cli_user import Said, command, environment
from promptuary import checkpoint, config, registry
from promptuary.cli.main import main
from robust import inputs

WORKS = {
    "demo": ["demo", "--model", "ROOT/masked", "--out", "TMP/out", "--steps", "1"],
    "train": ["train", "ROOT/run.yaml", "--out", "TMP/out"],
    "evaluate": ["evaluate", "ROOT/trained-masked", "--predictions", "TMP/rows.jsonl"],
    "predict": ["predict", "ROOT/trained-masked", "a cat"],
    "report": ["report", "ROOT/trained-masked", "--out", "TMP/page.html"],
    "inspect": ["inspect", "ROOT/trained-masked", "--picture", "TMP/picture.png"],
    "export": ["export", "ROOT/trained-masked", "--to", "peft", "--out", "TMP/export"],
    "import": ["import", "ROOT/exported", "--model", "ROOT/masked", "--out", "TMP/import"],
    "push": ["push", "ROOT/trained-masked", "ann/films"],
    "pull": ["pull", "ann/films", "--out", "TMP/pulled"],
    "methods": ["methods"],
    "schema": ["schema", "--out", "TMP/schema.json"],
    "doctor": ["doctor"],
}
"""Verb -> a command line that works."""

MISSING = {
    "demo": ["demo", "--model", "./nowhere", "--out", "TMP/out"],
    "train": ["train", "TMP/run.yaml"],
    "evaluate": ["evaluate", "TMP/prompt"],
    "predict": ["predict", "TMP/prompt", "a cat"],
    "report": ["report", "TMP/prompt"],
    "inspect": ["inspect", "TMP/prompt"],
    "export": ["export", "TMP/prompt", "--to", "peft", "--out", "TMP/export"],
    "import": ["import", "TMP/peft", "--model", "ROOT/masked", "--out", "TMP/import"],
    "push": ["push", "TMP/prompt", "ann/films"],
    "pull": ["pull", "films", "--out", "TMP/pulled"],
    "methods": ["methods", "TMP/file"],
    "schema": ["schema", "--out", "ROOT/file/schema.json"],
    "doctor": ["doctor", "TMP/file"],
}
"""The same with a file that is not there (or that no such verb takes)."""

CALLED: dict[str, tuple[Any, str]] = {
    "demo": (promptuary.demo, "run"),
    "train": (config, "build"),
    "evaluate": (checkpoint, "load_prompt"),
    "predict": (checkpoint, "load_prompt"),
    "report": (promptuary.report.board, "render"),
    "inspect": (checkpoint, "load_prompt"),
    "export": (checkpoint, "load_prompt"),
    "import": (promptuary.exports.peft, "load"),
    "push": (promptuary.hub, "push_prompt"),
    "pull": (promptuary.hub, "pull_prompt"),
    "methods": (registry, "names"),
    "schema": (config, "schema"),
    "doctor": (promptuary.cli.doctor, "_memory"),
}
"""Verb -> a function that it calls before it writes anything."""

READS = {
    "train": "run.yaml",
    "evaluate": "trained-masked/prompt/prompt.json",
    "predict": "trained-masked/prompt/prompt.safetensors",
    "inspect": "trained-masked/prompt/prompt.json",
    "export": "trained-masked/prompt/prompt.json",
    "import": "exported/adapter_config.json",
}
WRITES = ("train", "evaluate", "report", "inspect", "export", "import", "schema")


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = inputs.make(tmp_path_factory.mktemp("commands"))
    assert inputs.say("export", made / "trained-masked", "--to", "peft", "--out", made / "exported").code == 0
    return made


@pytest.fixture
def place(root: Path, tmp_path: Path) -> inputs.Place:
    return inputs.Place(root, tmp_path)


def given(place: inputs.Place, line: list[str]) -> list[str]:
    return [place.fill(word) for word in line]


def one_line(said: Said, code: int, prefix: str = "error: ") -> str:
    """The last line; the plan of a run may stand before it, a traceback may not."""
    assert said.code == code, said
    assert "Traceback" not in said.err
    *_, last = said.err.removesuffix("\n").split("\n")
    assert last.startswith(prefix), said.err
    return last


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("verb", WORKS)
def test_a_bad_flag(verb: str, place: inputs.Place) -> None:
    said = inputs.say(*given(place, WORKS[verb]), "--nope")
    assert one_line(said, 2).startswith("error: no such option: --nope")
    assert said.err.count("\n") == 1
    assert tree(place.tmp) == []


@pytest.mark.parametrize("verb", MISSING)
def test_a_missing_file(verb: str, place: inputs.Place) -> None:
    said = inputs.say(*given(place, MISSING[verb]))
    last = one_line(said, 2)
    assert said.err.count("\n") == 1
    assert any(part in last for part in ("nowhere", "run.yaml", "prompt", "peft", "films", "file")), last
    assert tree(place.tmp) == []


@pytest.mark.parametrize("verb", CALLED)
def test_ctrl_c(verb: str, place: inputs.Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(*CALLED[verb], stop)
    said = inputs.say(*given(place, WORKS[verb]))
    assert (said.code, said.out, said.err) == (130, "", "interrupted\n")
    assert tree(place.tmp) == []


# ---- permissions: root may do everything, so the system's answer is put into open() and mkdir() ----------------------


@pytest.fixture
def forbid(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, bool], None]:
    """Let every access below a folder fail; with `writing`, only those that write."""

    def install(folder: Path, writing: bool) -> None:
        real_open, real_mkdir, real_low = io.open, os.mkdir, os.open

        def guarded_open(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            if _below(file, folder) and (not writing or set(mode) & set("wax+")):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
            return real_open(file, mode, *args, **options)

        def guarded_low(path: Any, flags: int, *args: Any, **options: Any) -> int:
            if _below(path, folder) and (not writing or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return real_low(path, flags, *args, **options)

        def guarded_mkdir(path: Any, *args: Any, **options: Any) -> None:
            if _below(path, folder):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            real_mkdir(path, *args, **options)

        monkeypatch.setattr(io, "open", guarded_open)
        monkeypatch.setattr("builtins.open", guarded_open)
        monkeypatch.setattr(os, "mkdir", guarded_mkdir)
        monkeypatch.setattr(os, "open", guarded_low)

    return install


def _below(file: Any, folder: Path) -> bool:
    return isinstance(file, str | os.PathLike) and str(Path(file).absolute()).startswith(str(folder))


@pytest.mark.parametrize("verb", READS)
def test_no_permission_to_read(verb: str, place: inputs.Place, forbid: Callable[[Path, bool], None]) -> None:
    forbid(place.root / READS[verb], False)
    said = inputs.say(*given(place, WORKS[verb]))
    last = one_line(said, 2)
    assert READS[verb].split("/")[-1] in last
    assert "ermission denied" in last
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("verb", WRITES)
def test_no_permission_to_write(verb: str, place: inputs.Place, forbid: Callable[[Path, bool], None]) -> None:
    forbid(place.tmp, True)
    said = inputs.say(*given(place, WORKS[verb]))
    last = one_line(said, 2)
    assert "ermission denied" in last
    assert str(place.tmp) in last
    assert tree(place.tmp) == []


@pytest.mark.parametrize("verb", ["evaluate", "train"])
def test_no_permission_to_read_the_data(verb: str, place: inputs.Place, forbid: Callable[[Path, bool], None]) -> None:
    forbid(place.root / "data" / "train.jsonl", False)
    assert "data/train.jsonl cannot be read: Permission denied" in one_line(inputs.say(*given(place, WORKS[verb])), 2)


# ---- a full disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", [verb for verb in WORKS if verb not in ("demo", "push", "pull")])
def test_a_full_disk_under_the_output(verb: str, place: inputs.Place) -> None:
    """/dev/full is a real full disk."""
    line = given(place, WORKS[verb])
    words = (
        [*line, "--json"]
        if "--out" not in line or verb in ("train", "report", "export", "import")
        else [*line[:1], "--json"]
    )
    with open("/dev/full", "w") as full, contextlib.redirect_stdout(full), _quiet() as err:
        code = main(words)
    assert code == 1
    *_, last = err.getvalue().removesuffix("\n").split("\n")
    assert last == "error: no space left on device (make room; a run goes on with --resume)"
    assert "Traceback" not in err.getvalue()


@contextlib.contextmanager
def _quiet() -> Iterator[io.StringIO]:
    with contextlib.redirect_stderr(io.StringIO()) as err:
        yield err


@pytest.mark.parametrize("verb", ["train", "evaluate", "schema"])
@pytest.mark.parametrize("room", [0, 4])
def test_a_full_disk_under_the_files(
    verb: str, room: int, place: inputs.Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = os.fsync, [room]

    def fsync(handle: int) -> None:
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= 1
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    said = inputs.say(*given(place, WORKS[verb]))
    if room and verb != "train":
        assert said.code == 0
        return
    assert said.code in (1, 2)
    assert "o space left on device" in one_line(said, said.code).replace("No", "no")
    assert not [name for name in tree(place.tmp) if ".tmp-" in name]
    monkeypatch.undo()
    again = [*given(place, WORKS[verb]), *(["--resume"] if verb == "train" and (place.tmp / "out").exists() else [])]
    assert inputs.say(*again).code == 0


def test_debug_shows_where_the_disk_was_full(place: inputs.Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(handle: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "here")

    monkeypatch.setattr(registry, "names", fsync)
    said = inputs.say("methods", "--debug")
    assert said.code == 1
    assert "Traceback" in said.err
    assert said.err.endswith("error: input/output error: here (--debug shows the traceback)\n")


# ---- as real processes ----------------------------------------------------------------------------------------------


def test_real_processes_end_like_that() -> None:
    with open("/dev/full", "w") as full:
        line = command("methods", "--json")
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, env=environment())
    assert done.returncode == 1
    assert done.stderr.endswith("\nerror: no space left on device (make room; a run goes on with --resume)\n")
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_a_reader_that_leaves_early_is_no_fault() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command("schema"), stdout=write, stderr=subprocess.PIPE, text=True, env=environment())
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")
