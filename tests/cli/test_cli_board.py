"""`promptuary report` writes a page about the runs below a folder, or says in one line why it cannot.

Knows no other verb.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import boards
from cli.cli_user import Place, Said

Run = Callable[..., Said]


def test_a_run_that_was_trained_gets_a_page(place: Place, tmp_path: Path, here: Run) -> None:
    shutil.copytree(place.trained, tmp_path / "all" / "one")
    said = here("report", tmp_path / "all", "--json")
    file = tmp_path / "all" / "report.html"
    assert said.code == 0
    assert said.json == {
        "dir": str(tmp_path / "all"),
        "out": str(file),
        "bytes": file.stat().st_size,
        "runs": 1,
        "finished": 1,
        "notes": [],
    }
    content = file.read_text(encoding="utf-8")
    assert content.startswith("<!doctype html>")
    assert "ept" in content
    assert "24 test examples" in content
    # again, with the old page beside the runs
    assert here("report", tmp_path / "all", "--json").json == said.json
    assert sorted(one.name for one in (tmp_path / "all").iterdir()) == ["one", "report.html"]


def test_the_page_may_go_elsewhere(tmp_path: Path, here: Run) -> None:
    boards.write(tmp_path / "runs" / "a")
    boards.write(tmp_path / "runs" / "b", seed=1, finished=False)
    file = tmp_path / "new" / "page.html"
    said = here("report", tmp_path / "runs", "--out", file)
    assert said.code == 0
    assert "1 finished, 1 not" in said.err
    assert [one.name for one in file.parent.iterdir()] == ["page.html"]
    assert not (tmp_path / "runs" / "report.html").exists()


def test_damage_is_a_note_and_no_error(tmp_path: Path, here: Run) -> None:
    boards.write(tmp_path / "a")
    (boards.write(tmp_path / "b") / "result.json").write_text("{")
    said = here("report", tmp_path)
    assert said.code == 0
    assert "note: b was skipped: result.json is damaged: it is no JSON" in said.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("missing",), "missing does not exist; give a folder with runs in it"),
        (("file",), "file is a file; give a folder with runs in it"),
        (("empty",), "empty holds no run that can be read; give a folder with runs of promptuary train"),
        (("damaged",), "damaged holds no run that can be read"),
        (("runs", "--out", "empty"), "--out {}/empty is a folder; give the name of a file"),
        (("runs", "--out", "file/page.html"), "{}/file is no folder; choose another place"),
    ],
)
def test_errors_are_one_line(tmp_path: Path, here: Run, words: tuple[str, ...], told: str) -> None:
    boards.write(tmp_path / "runs" / "a")
    (boards.write(tmp_path / "damaged" / "a") / "run.yaml").write_text("[")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    said = here("report", *(word if word.startswith("--") else tmp_path / word for word in words))
    assert said.code == 2
    assert said.out == ""
    last = said.err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert told.format(tmp_path) in last


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind the administrator")
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, here: Run) -> None:
    boards.write(tmp_path / "a")
    tmp_path.chmod(0o500)
    try:
        said = here("report", tmp_path)
    finally:
        tmp_path.chmod(0o700)
    assert said.code == 2
    assert "cannot be written" in said.err
