"""SIGKILL at random moments, and two processes at one folder: nothing that was saved is lost.

Knows no file format; `storm.py` does the killing in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import toy
from artefacts import quick_folder
from promptuary import files
from promptuary.cli.main import main
from promptuary.runs import RunFolder

KILLS = int(os.environ.get("PROMPTUARY_KILLS", "64"))
"""How many processes are killed in a loop, and in a save; more are worth a night, not every change."""


@pytest.fixture(scope="module")
def storm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the dead processes left."""
    where = tmp_path_factory.mktemp("storm")
    with quick_folder() as quick:
        command = [sys.executable, str(Path(__file__).with_name("storm.py")), str(where), str(quick), str(KILLS)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    print(found)
    return found


def test_a_run_that_is_killed_again_and_again_in_its_loop_is_never_lost(storm: dict[str, Any]) -> None:
    found = storm["loop"]
    assert found["kills"] == KILLS
    assert found["lost_runs"] == 0
    # at most the steps since the last save, and at least once some
    assert 1 <= found["largest_loss"] <= 2
    # runs that were killed again and again end, with the same bytes as the unbroken one
    assert found["finished"] >= 1
    assert found["other_end"] == 0
    assert found["leftovers"] == 0


def test_kills_inside_a_save_lose_no_checkpoint(storm: dict[str, Any]) -> None:
    found = storm["save"]
    assert found["kills"] == KILLS
    assert found["lost"] == found["wrong"] == found["leftovers"] == 0


@pytest.mark.parametrize("how", ["prompt", "prompt_in_two_steps"])
def test_a_prompt_is_there_whenever_its_replacement_is_killed(how: str, storm: dict[str, Any]) -> None:
    assert storm[how] == {"kills": KILLS // 8, "lost": 0, "leftovers": 0}


@pytest.mark.parametrize("how", ["read", "read_in_two_steps"])
def test_a_reader_meets_whole_prompts_while_one_is_replaced(how: str, storm: dict[str, Any]) -> None:
    assert storm[how]["reads"] > 20
    assert storm[how]["seen"] == ["1", "2", "3"]


def test_two_processes_cannot_write_the_same_run(storm: dict[str, Any]) -> None:
    assert storm["two"] == {"rounds": 6, "won": 6, "refused": 6, "named": 6}


HOLD = """
import sys, toy
from pathlib import Path
from promptuary.runs import RunFolder

run = toy.run(Path(sys.argv[1]))
with RunFolder(run.out).writing(run, resume=False, fresh=False):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_command_line_names_the_process_that_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = toy.run(tmp_path)
    (tmp_path / "run.yaml").write_text(run.to_yaml(), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        for way in ("--resume", "--fresh"):
            assert main(["train", str(tmp_path / "run.yaml"), way]) == 2
            said = capsys.readouterr().err
            assert said.count("\n") == 1
            assert f"process {other.pid} on" in said
        assert other.stdin is not None
        other.stdin.close()
    # its end frees the folder
    with RunFolder(run.out).writing(run, resume=True, fresh=False) as note:
        assert note is None


def test_only_what_dead_processes_left_is_swept(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        kept = [f".tmp-a-{sleeper.pid}-0123abcd", f".old-b-{sleeper.pid}-0123abcd", ".tmp-thesis", ".git"]
        gone = [f".tmp-a-{dead.pid}-0123abcd", f".tmp-a-{dead.pid}", f".old-c-{dead.pid}-0123abcd"]
        for name in (*kept, *gone, "c", f".old-d-{dead.pid}-0123abcd"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "file").write_text(name)
        files.sweep(tmp_path)
        # the old d, whose new one never got its name, is d again
        assert {path.name for path in tmp_path.iterdir()} == {*kept, "c", "d"}
    finally:
        sleeper.kill()
        sleeper.wait()
