"""Which runs are found below a folder, what is known of them, and what happens to damaged and hostile ones.

Knows no page.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import boards
from promptuary.report import found, values


def look(folder: Path) -> found.Found:
    return found.look(folder)


def test_runs_are_found_at_any_depth_in_natural_order_and_not_inside_of_runs(tmp_path: Path) -> None:
    for name in ("runs/s10", "runs/s2", "deep/er/still"):
        boards.write(tmp_path / name)
    boards.write(tmp_path / "runs/s2/checkpoints/step-5")
    boards.write(tmp_path / ".tmp-half/s3")
    boards.write(tmp_path / "trials/t1")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "run.yaml").write_text("method: {name: ept}\n")
    seen = look(tmp_path)
    assert [run.place for run in seen.runs] == ["deep/er/still", "runs/s2", "runs/s10"]
    assert seen.notes == ()


def test_a_folder_that_is_a_run_itself_is_found(tmp_path: Path) -> None:
    boards.write(tmp_path)
    assert [run.place for run in look(tmp_path).runs] == ["."]


def test_what_is_known_of_a_run(tmp_path: Path) -> None:
    boards.write(tmp_path / "a", score=0.75, interval=(0.5, 1.0), curve=(0.1, 0.3), size=321, method__rank=8)
    (run,) = look(tmp_path).runs
    assert (run.method, run.metric, run.score, run.interval, run.validation) == (
        "ept",
        "accuracy",
        0.75,
        (0.5, 1.0),
        0.3,
    )
    assert run.curve == ((0, 0.1), (10, 0.3))
    assert run.bytes == 321
    assert run.examples("test") == 1000
    assert run.count("trainable_parameters") == 1000
    assert run.settings["method.rank"] == "8"
    assert run.settings["task.labels"] == "{positive: good, negative: bad}"
    assert run.settings["solver"] == "null"


def test_an_unfinished_run_is_kept_as_such(tmp_path: Path) -> None:
    boards.write(tmp_path / "a", finished=False, curve=(0.1, 0.3, 0.2))
    with (tmp_path / "a" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 27, "loss": 1.0}\n{"step": 28, "lo')
    (run,) = look(tmp_path).runs
    assert not run.finished
    assert run.score is None
    assert run.steps == 27
    assert run.metric == "accuracy"
    assert run.curve[-1] == (20, 0.2)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("result.json", b"{", "result.json is damaged: it is no JSON"),
        ("result.json", b"[1]", "result.json is damaged: it holds no object"),
        ("result.json", b'{"metrics": {"accuracy": NaN}, "primary_metric": "accuracy"}', "it is no JSON"),
        ("result.json", b"\xff\xfe", "it is no JSON"),
        ("result.json", b"[" * 100_000, "it is no JSON"),
        ("result.json", b'{"metrics": {"f1": 1}, "primary_metric": "accuracy"}', "no score under the name"),
        ("result.json", b'{"metrics": {"f1": 1}, "primary_metric": ["f1"]}', "no score under the name"),
        ("result.json", b"x" * (4 * 2**20 + 1), "4,194,305 bytes, more than belong there"),
        ("run.yaml", b"a: [", "run.yaml is not the YAML"),
        ("run.yaml", b"just words", "run.yaml is not the YAML"),
        ("run.yaml", b"seed: 1\n", "names neither a method nor a baseline"),
        ("run.yaml", b"a: !!python/object:os.system {}\n", "run.yaml is not the YAML"),
        ("run.yaml", None, "run.yaml is missing"),
    ],
)
def test_a_damaged_run_is_named_and_skipped(tmp_path: Path, name: str, content: bytes | None, told: str) -> None:
    boards.write(tmp_path / "good")
    file = boards.write(tmp_path / "bad") / name
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    seen = look(tmp_path)
    assert [run.place for run in seen.runs] == ["good"]
    (note,) = seen.notes
    assert note.startswith("bad was skipped: ")
    assert told in note
    assert str(tmp_path) not in note


def test_a_few_lines_of_yaml_that_would_become_gigabytes_are_refused(tmp_path: Path) -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"] + [
        f"{here}: &{here} [{', '.join([f'*{before}'] * 9)}]"
        for before, here in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    (boards.write(tmp_path / "bomb") / "run.yaml").write_text("\n".join(lines) + "\n")
    assert "not the YAML" in look(tmp_path).notes[0]


def test_links_and_pipes_are_not_followed(tmp_path: Path) -> None:
    outside = boards.write(tmp_path / "outside" / "run")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "linked").symlink_to(outside)
    result = boards.write(inside / "result_is_link") / "result.json"
    result.unlink()
    result.symlink_to(outside / "result.json")
    pipe = boards.write(inside / "settings_are_pipe") / "run.yaml"
    pipe.unlink()
    os.mkfifo(pipe)
    seen = look(inside)
    assert seen.runs == ()
    assert [note.partition(" was skipped: ")[2] for note in seen.notes] == [
        "result.json cannot be read: it is a link",
        "run.yaml cannot be read: it is no ordinary file",
    ]


def test_folders_of_the_machine_are_taken_out_of_settings(tmp_path: Path) -> None:
    boards.write(
        tmp_path / "a",
        backbone__model="/home/somebody/models/bert",
        data__source="~/secret/pets",
        method__start="/home/somebody/start.txt",
        method__paths=["C:\\Users\\somebody\\x.txt", "plain"],
        method__endpoint={"base_url": "http://somebody:1"},
        task__template="{text} / {mask} . // or ./",
        out="/home/somebody/out",
    )
    (run,) = look(tmp_path).runs
    assert "somebody" not in json.dumps(dict(run.settings))
    assert run.settings["backbone.model"] == "bert"
    assert run.settings["data.source"] == "pets"
    assert run.settings["method.start"] == "start.txt"
    assert run.settings["method.paths"] == "[x.txt, plain]"
    assert values.scalar(run.settings["task.template"]) == "{text} / {mask} . // or ./"
    assert {"backbone.model", "data.source", "method.start", "method.paths", "method.endpoint", "out"} == run.hidden


def test_paths_in_sentences_are_reduced() -> None:
    assert found.without_places("see /home/me/x/rows.jsonl: line 3, and ~/a/b") == "see rows.jsonl: line 3, and b"
    assert found.without_places("1/2/3 and https://hub.co/a/b stay") == "1/2/3 and https://hub.co/a/b stay"


def test_several_versions_are_noted(tmp_path: Path) -> None:
    for place, version in enumerate(("0.1.0", "0.1.0", "0.2.0")):
        boards.write(tmp_path / str(place), seed=place, result={"versions": {"promptuary": version, "new": [1]}})
    boards.write(tmp_path / "odd", seed=9, result={"versions": 3})
    assert look(tmp_path).notes == (
        "the runs were made by several versions of promptuary: 0.1.0 (2 runs), 0.2.0 (1 runs)",
    )


@pytest.mark.parametrize("value", [None, "0.9", True, [1], 10**400])
def test_a_score_that_is_no_number_is_none(tmp_path: Path, value: object) -> None:
    boards.write(tmp_path, result={"metrics": {"accuracy": value}, "interval_95": [value, 1], "examples": value})
    (run,) = look(tmp_path).runs
    assert run.finished
    assert run.score is None
    assert run.interval is None
    assert run.examples("test") is None


def test_a_summary_is_read_and_a_damaged_one_is_noted(tmp_path: Path) -> None:
    boards.write(tmp_path / "one" / "runs" / "a")
    (tmp_path / "one" / "summary.json").write_text('{"blocks": []}')
    (tmp_path / "summary.json").write_text("{")
    seen = look(tmp_path)
    assert seen.summaries == ({"blocks": []},)
    assert seen.notes == (".: summary.json is damaged: it is no JSON; its tests are not shown",)
