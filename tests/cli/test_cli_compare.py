"""`promptuary compare` as a user runs it: several workers, Ctrl-C, the same command again, its table and its errors."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import comparisons
from cli.cli_user import Said, command, environment


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A comparison as a file."""
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(comparisons.settings(tmp_path), sort_keys=False), encoding="utf-8")
    return path


def test_two_workers_are_stopped_together_and_the_same_command_goes_on(file: Path, here: Callable[..., Said]) -> None:
    out = file.parent / "out"
    process = subprocess.Popen(
        command("compare", file, "--workers", 2, "--json"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    while process.poll() is None and not list(out.glob("trials/*/*/metrics.jsonl")):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said, err = process.communicate(timeout=200)
    assert process.returncode == 130, err
    last = err.splitlines()[-1]
    assert last.endswith("of 4 runs are finished, the same command goes on")
    assert json.loads(said) == {"error": last}
    assert "Traceback" not in err

    done = here("compare", file, "--json")
    assert done.code == 0, done.err
    assert (done.json["finished"], done.json["left"], done.json["failed"]) == (4, 0, [])
    assert [one["method"] for one in done.json["blocks"][0]["methods"]] == ["prompts", "bitfit"]
    assert "tuning: 2 trials (random) of 1 seed for each method, on validation" in done.err
    assert "(small: one example is 25.0 points)" in done.err
    assert "no difference shown between prompts and bitfit" in done.err
    assert len(comparisons.read(out)) == 4

    # the folder is enough to look again, and nothing is run for it
    again = here("compare", out, "--json")
    assert again.code == 0
    assert again.json["blocks"] == done.json["blocks"]
    assert "seed 0:" not in again.err
    plan = here("compare", file, "--plan", "--json")
    assert plan.json["runs"] == "4, 4 done"


def test_a_plan_writes_nothing(file: Path, here: Callable[..., Said]) -> None:
    said = here("compare", file, "--plan", "--json")
    assert said.code == 0
    assert said.json["trials"] == "4, 0 done"
    assert not (file.parent / "out").exists()


def test_a_run_that_fails_is_named_and_the_exit_code_says_so(file: Path, here: Callable[..., Said]) -> None:
    values = yaml.safe_load(file.read_text())
    values["tasks"]["toy"]["data"]["source"] = str(file.parent / "nowhere")
    del values["tuning"], values["methods"]["bitfit"], values["methods"]["prompts"]["space"]
    file.write_text(yaml.safe_dump(values))
    said = here("compare", file, "--json")
    assert said.code == 1
    assert len(said.json["failed"]) == 2
    last = said.err.splitlines()[-1]
    assert last.startswith("error: 2 of 2 runs failed, first tiny--toy--prompts--all--seed-0: ")
    assert "nowhere" in last
    assert last.endswith("mend it and add --retry-failed")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--set", "methods.prompts.method.name=lora"), "it is a baseline"),
        (("--set", "seeds=[]"), "seeds: expected a list of at least 1"),
        (("--set", "tasks.toy={suite: glue/none}"), 'no suite "glue/none"'),
        (("--set", "train.stps=3"), "unknown field train.stps"),
        (("--set", "seeds.a=3"), "is [0, 1] and not a mapping"),
        (("--workers", "0"), "workers"),
    ],
)
def test_wrong_input_is_one_line(words: tuple[str, ...], reason: str, file: Path, here: Callable[..., Said]) -> None:
    said = here("compare", file, *words)
    assert said.code == 2
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert reason in said.err


def test_no_such_file(tmp_path: Path, here: Callable[..., Said]) -> None:
    said = here("compare", tmp_path / "job.yaml")
    assert said.code == 2
    assert "does not exist" in said.err
