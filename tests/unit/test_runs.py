"""The run folder: who may write into it, which checkpoints are kept, and which one is read.

Knows no training.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import toy
from promptuary.config import load_run
from promptuary.errors import ConfigError, FileFormatError, StorageError
from promptuary.runs import KEEP, RunFolder, environment, versions

MINE = ("run.yaml", "run.json", "environment.json")


def opened(tmp_path: Path, *overrides: str, resume: bool = False, fresh: bool = False) -> RunFolder:
    run = toy.run(tmp_path, *overrides)
    folder = RunFolder(run.out)
    folder.open(run, resume=resume, fresh=fresh)
    return folder


def refusal(call: Any, kind: type[Exception] = ConfigError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_opening_writes_the_resolved_run_and_the_environment(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    assert sorted(path.name for path in folder.path.iterdir()) == sorted(MINE)
    assert load_run(folder.path / "run.yaml") == toy.run(tmp_path)
    found = json.loads((folder.path / "environment.json").read_text())
    assert found["packages"]["torch"] == torch.__version__
    assert found["cores"] == os.cpu_count()


def test_a_second_run_is_refused_with_both_ways_out(tmp_path: Path) -> None:
    opened(tmp_path)
    text = refusal(lambda: opened(tmp_path))
    assert "--resume" in text
    assert "--fresh" in text


def test_resuming_keeps_everything_and_fresh_deletes_it(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    folder.row({"step": 1})
    folder.save_state(1, {"a": torch.ones(1)}, {})
    folder.result({})
    folder.predictions([{"index": 0}])
    (folder.path / "prompt").mkdir()
    (folder.path / "mine.txt").write_text("mine")
    before = sorted(path.name for path in folder.path.rglob("*"))
    opened(tmp_path, resume=True)
    assert sorted(path.name for path in folder.path.rglob("*")) == before
    opened(tmp_path, fresh=True)
    assert sorted(path.name for path in folder.path.rglob("*")) == sorted([*MINE, "mine.txt"])


def test_resuming_nothing_is_a_first_run(tmp_path: Path) -> None:
    assert opened(tmp_path, resume=True).load_state() is None


def test_resuming_refuses_other_settings(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    before = (folder.path / "run.yaml").read_bytes()
    text = refusal(lambda: opened(tmp_path, "method.prompt_lr=0.1", resume=True))
    assert "other settings" in text
    assert (folder.path / "run.yaml").read_bytes() == before


def test_a_folder_that_moved_can_be_resumed(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    moved = folder.path.rename(tmp_path / "moved")
    opened(tmp_path, f"out={moved}", resume=True)


@pytest.mark.parametrize(("resume", "fresh"), [(False, False), (True, False), (False, True)])
def test_a_folder_of_other_things_is_never_touched(resume: bool, fresh: bool, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    assert "not empty" in refusal(lambda: opened(tmp_path, resume=resume, fresh=fresh))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_an_empty_folder_is_fine_and_a_file_is_not(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    opened(tmp_path)
    (tmp_path / "file").write_text("x")
    assert "is a file" in refusal(lambda: opened(tmp_path, f"out={tmp_path / 'file'}"))
    below = f"out={tmp_path / 'file' / 'below'}"
    assert "cannot be written" in refusal(lambda: opened(tmp_path, below), StorageError)


def test_a_crash_while_opening_does_not_lock_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.fsync, []

    def fails_later(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(handle)

    monkeypatch.setattr(os, "fsync", fails_later)
    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path)
    monkeypatch.setattr(os, "fsync", real)
    assert opened(tmp_path, resume=True).load_state() is None


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def saved(tmp_path: Path, *steps: int) -> RunFolder:
    folder = opened(tmp_path)
    for step in steps:
        folder.save_state(step, {"a": torch.full((3,), float(step))}, {"note": f"at {step}"})
    return folder


def test_only_the_newest_checkpoints_are_kept_and_the_newest_is_read(tmp_path: Path) -> None:
    folder = saved(tmp_path, 2, 9, 10)
    assert KEEP == 2
    assert sorted(path.name for path in (folder.path / "checkpoints").iterdir()) == ["step-10", "step-9"]
    tensors, facts, skipped = folder.load_state() or ({}, {}, [])
    assert tensors["a"].tolist() == [10.0] * 3
    assert (facts["step"], facts["note"], skipped) == (10, "at 10", [])


def test_a_step_can_be_saved_again(tmp_path: Path) -> None:
    folder = saved(tmp_path, 4, 4)
    folder.save_state(4, {"a": torch.zeros(1)}, {})
    tensors, _, _ = folder.load_state() or ({}, {}, [])
    assert tensors["a"].tolist() == [0.0]


def damage(folder: Path, how: str) -> None:
    if how == "cut":
        (folder / "state.safetensors").write_bytes((folder / "state.safetensors").read_bytes()[:-2])
    elif how == "no tensors":
        (folder / "state.safetensors").unlink()
    elif how == "no facts":
        (folder / "state.json").unlink()
    elif how == "no hash":
        facts = json.loads((folder / "state.json").read_text())
        del facts["sha256"]
        (folder / "state.json").write_text(json.dumps(facts))
    else:
        (folder / "state.json").write_text("{")


@pytest.mark.parametrize("how", ["cut", "no tensors", "no facts", "no hash", "half facts"])
def test_a_damaged_checkpoint_is_skipped_by_name(how: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, 1, 2)
    damage(folder.path / "checkpoints" / "step-2", how)
    tensors, facts, skipped = folder.load_state() or ({}, {}, [])
    assert (tensors["a"].tolist(), facts["step"]) == ([1.0] * 3, 1)
    assert len(skipped) == 1
    assert "step-2" in skipped[0]
    damage(folder.path / "checkpoints" / "step-1", how)
    text = refusal(folder.load_state, FileFormatError)
    assert str(folder.path) in text
    assert "step-2" in text


def test_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    folder = saved(tmp_path, 3)
    for name in ("step-x", "step-", ".tmp-step-9-1"):
        (folder.path / "checkpoints" / name).mkdir()
    _, facts, skipped = folder.load_state() or ({}, {}, [])
    assert (facts["step"], skipped) == (3, [])


def test_rows_and_predictions_are_lines_of_json(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    folder.row({"step": 1, "loss": 0.5})
    folder.row({"step": 2, "loss": float("nan")})
    assert toy.metric_rows(folder.path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}]
    folder.predictions([{"answer": "größer\u2028"}, {"answer": float("inf")}])
    lines = (folder.path / "predictions.jsonl").read_bytes().split(b"\n")
    assert [json.loads(line) for line in lines[:-1]] == [{"answer": "größer\u2028"}, {"answer": None}]


def test_the_environment_is_json_and_names_versions() -> None:
    found = json.loads(json.dumps(environment()))
    assert found["packages"] == versions()
    assert {"torch", "transformers", "numpy"} <= set(versions())
    assert found["threads"] == torch.get_num_threads()
    assert found["processor"]
