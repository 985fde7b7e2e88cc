"""The page about many runs: what it says, that nothing in it is run or loaded, how large and how slow it may become.

Knows no command line.
"""

from __future__ import annotations

import base64
import csv
import gzip
import hashlib
import html
import io
import itertools
import json
import re
import shlex
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

import boards
from promptuary.config import override, parse_override
from promptuary.report import board, found

VOID = {"meta", "br"}
EVIL = "</script><script>alert(1)</script>"


class Reader(HTMLParser):
    """Every tag and attribute, the text between, and whether all that is opened is closed."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = self.script = ""
        self.rows: str | None = None
        self.feed(content.decode())
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            if self.tags[-1][1].get("type") == "text/csv":
                self.rows = (self.rows or "") + data
            else:
                self.script += data
        elif self.open[-1:] != ["style"]:
            self.text += " " + data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def words(self) -> str:
        return " ".join(self.text.split())

    def csv(self) -> list[dict[str, str]]:
        assert self.rows is not None
        return list(csv.DictReader(io.StringIO(html.unescape(self.rows.lstrip()))))


def read(folder: Path, title: str = "runs") -> Reader:
    return Reader(board.render(title, found.look(folder)))


def some(folder: Path) -> None:
    """Two methods on two tasks with two seeds, one variant more, one run that has not ended, one of words."""
    for task in ("sst2", "rte"):
        for method, score in (("prompt_tuning", 0.7), ("ept", 0.8)):
            for seed in range(2):
                name = f"{method}-{task}-{seed}"
                boards.write(folder / name, method__name=method, suite=task, seed=seed, score=score + seed / 100)
    boards.write(folder / "more", suite="sst2", method__rank=16, score=0.85)
    boards.write(folder / "open", suite="sst2", seed=7, finished=False)
    history = [{"step": 3, "from": "an edit", "text": "Say good.", "score": 0.4}]
    texts = [{"text": "Say good or bad.", "test": {"accuracy": 0.6}}, {"text": "", "test": {"accuracy": 0.5}}]
    told = {"text": "Say good or bad.", "texts": texts, "history": history, "trainable_parameters": 0}
    boards.write(folder / "words", suite="sst2", method={"name": "grips"}, result=told)


def test_everything_is_on_the_page(tmp_path: Path) -> None:
    some(tmp_path)
    words = read(tmp_path, "my comparison").words
    for part in (
        "my comparison",
        "Runs 10 finished, 1 not",
        "Model acme/small",
        "ept (rank 4) 80.5 ± 0.7 n 2 80.5 ± 0.7 n 2",
        "ept (rank 16) 85.0 n 1",
        "sst2 ept (rank 16) has the highest mean (85.0). No difference is shown from",
        "Score against cost",
        "Learning curves",
        "sst2: accuracy over trained numbers",
        "rank: sst2",
        "Task by task",
        "Say good or bad.",
        "How they came about step 3 Say good. from an edit, score 0.4",
        "no words 50.0",
        "cat task-1.yaml method-1.yaml > run.yaml promptuary train run.yaml --seed 0 --out again",
        "One row for each of 11 runs",
        "seed 7 unfinished, step 20 of 100",
    ):
        assert part in words, part


def test_sections_that_have_nothing_to_show_are_not_there(tmp_path: Path) -> None:
    boards.write(tmp_path / "a", curve=())
    words = read(tmp_path).words
    for part in ("Score against cost", "Learning curves", "Sizes", "Task by task", "Robustness", "Paired tests"):
        assert part not in words, part
    assert "Fewer than two methods have scores, so nothing is compared: classify" in words


def test_the_same_runs_give_the_same_page(tmp_path: Path) -> None:
    some(tmp_path)
    assert board.render("t", found.look(tmp_path)) == board.render("t", found.look(tmp_path))


def test_only_a_method_above_all_others_is_bold(tmp_path: Path) -> None:
    for method, score in (("ept", 0.9), ("dept", 0.5), ("lamp", 0.5)):
        for seed in range(3):
            interval = (score - 0.01, score + 0.01)
            boards.write(tmp_path / f"{method}{seed}", method__name=method, seed=seed, score=score, interval=interval)
    assert re.findall(rb"<td[^>]*><b>([^<]*)", board.render("t", found.look(tmp_path))) == [b"90.0"]
    boards.write(tmp_path / "close", method__name="vpt", score=0.895, interval=(0.8, 0.95))
    assert not re.findall(rb"<td[^>]*><b>", board.render("t", found.look(tmp_path)))


def test_a_run_file_from_the_page_is_the_run(tmp_path: Path) -> None:
    """Joining two pieces and setting what the command says gives every setting of the run but its seed and place."""
    some(tmp_path)
    odd = "two\nlines: 'quoted' \"twice\" # {mask} \u00e9 \\"
    boards.write(tmp_path / "odd", suite="sst2", method__rank=16, task__template=odd, method__texts=[odd, "", 1e-05])
    boards.write(tmp_path / "first", suite="mrpc", method={"name": "aaa", "texts": [odd]}, task__labels={odd: "yes"})
    seen = found.look(tmp_path)
    content = board.render("t", seen).decode()
    pieces = dict(re.findall(r"<code>([\w-]+\.yaml)</code></summary><pre>(.*?)</pre>", content, re.DOTALL))
    shown = r'<pre class="command">cat (\S+) (\S+) &gt; run.yaml\n(.*?)</pre>.*?<bdi>(.*?)</bdi>'
    commands = re.findall(shown, content, re.DOTALL)
    assert len(commands) == 8
    for one, other, command, place in commands:
        settings = yaml.safe_load(html.unescape(pieces[one] + pieces[other]))
        words = shlex.split(html.unescape(command))
        sets = [parse_override(word) for before, word in itertools.pairwise(words) if before == "--set"]
        made = override(settings, sets)
        wanted = yaml.safe_load((tmp_path / place / "run.yaml").read_text())
        assert int(words[words.index("--seed") + 1]) == wanted.pop("seed")
        del wanted["out"]
        assert made == wanted


def test_the_rows_are_tidy(tmp_path: Path) -> None:
    some(tmp_path)
    rows = {row["run"]: row for row in read(tmp_path).csv()}
    assert len(rows) == 11
    first = rows["ept-rte-1"]
    assert (first["row"], first["column"], first["score"], first["low"], first["high"]) == (
        "ept (rank 4)",
        "rte",
        "0.81",
        "0.7",
        "0.9",
    )
    assert (first["trained"], first["bytes"], first["seed"], first["state"]) == ("1000", "1000", "1", "finished")
    assert rows["open"]["state"] == "unfinished"
    assert rows["open"]["score"] == ""


def test_no_cell_is_a_formula(tmp_path: Path) -> None:
    boards.write(tmp_path / "=a", data__source="@SUM(1+1)", score=-0.5)
    (row,) = read(tmp_path).csv()
    assert (row["run"], row["data"], row["score"]) == ("'=a", "'@SUM(1+1)", "-0.5")


def test_what_users_write_is_never_markup(tmp_path: Path) -> None:
    quotes = "' onload='alert(2)' \" onload=\"alert(3)"
    folder = tmp_path / "<img src=x onerror=alert(4)>"
    told = {
        "text": EVIL,
        "texts": [{"text": EVIL + quotes}],
        "history": [{"step": EVIL, "text": EVIL, "from": quotes}],
        "primary_metric": EVIL,
        "metrics": {EVIL: 0.5},
        "run_hash": EVIL,
        "versions": {"torch": EVIL},
        "robustness": {"metric": EVIL, "clean": {"scores": {EVIL: 1}}, "perturbed": {EVIL: {"scores": {EVIL: 1}}}},
    }
    for place in range(2):
        method = {"name": EVIL + quotes, "size": place, EVIL: quotes, "half": "\u202e{{ 7 * 7 }}"}
        boards.write(folder / str(place), method=method, suite=EVIL + quotes, backbone__model=EVIL, result=told)
    boards.write(folder / "plain")
    pairs = [
        {"one": EVIL, "other": quotes, "verdict": EVIL, "p_corrected": 0.1, "difference": 1, "interval_95": [0, 1]}
    ]
    summary = {
        "test": EVIL,
        "blocks": [{"task": EVIL, "pairs": pairs}],
        "tuning": {EVIL: EVIL},
        "ranks": {"verdicts": [EVIL]},
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    page = read(tmp_path, EVIL)
    assert {tag for tag, _ in page.tags}.isdisjoint(
        {"iframe", "object", "embed", "link", "foreignobject", "img", "base"}
    )
    assert len(page.of("script")) == 2
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert EVIL in page.words
    assert "alert" not in page.script
    assert {row["task"] for row in page.csv()} == {EVIL + quotes, "classify"}
    assert any(row["backbone"] == EVIL for row in page.csv())


def test_half_characters_do_not_stop_it(tmp_path: Path) -> None:
    boards.write(tmp_path / "a", result={"text": "half \ud800"})
    assert "half ?" in read(tmp_path).words


def test_nothing_is_loaded_and_only_our_lines_are_run(tmp_path: Path) -> None:
    some(tmp_path)
    content = board.render("t", found.look(tmp_path))
    page = Reader(content)
    for _, attrs in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action", "poster"):
            assert (attrs.get(name) or "#").startswith(("data:", "#"))
    assert not re.search(rb"url\(|@import|https?:", content)
    policy = next(one for one in page.of("meta") if one.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    assert "default-src 'none'" in str(policy["content"])
    assert f"script-src 'sha256-{digest}'" in str(policy["content"])


def test_charts_speak_to_those_who_do_not_see(tmp_path: Path) -> None:
    some(tmp_path)
    page = read(tmp_path)
    ids = {attrs["id"] for _, attrs in page.tags if attrs.get("id")}
    pictures = [one for one in page.of("svg") if one.get("role") == "img"]
    assert len(pictures) == 5
    for one in pictures:
        assert set(str(one["aria-labelledby"]).split()) <= ids
    assert all(one.get("aria-hidden") == "true" for one in page.of("svg") if one.get("role") != "img")


def test_coordinates_stay_inside_of_their_charts(tmp_path: Path) -> None:
    some(tmp_path)
    content = board.render("t", found.look(tmp_path)).decode()
    dots = re.findall(r'<circle cx="([\d.-]+)" cy="([\d.-]+)"', content)
    assert len(dots) > 5
    assert all(40 <= float(x) <= 410 and 10 <= float(y) <= 205 for x, y in dots)
    for path in re.findall(r'class="(?:line|band[^"]*)" d="M([^"]*?)Z?"', content):
        for x, y in (part.split() for part in path.split("L") if "H" not in path):
            assert 40 <= float(x) <= 410
            assert 10 <= float(y) <= 205


def test_damage_is_told_on_the_page(tmp_path: Path) -> None:
    some(tmp_path)
    (tmp_path / "more" / "result.json").write_text("{")
    words = read(tmp_path).words
    assert "more was skipped: result.json is damaged: it is no JSON" in words


def test_places_of_the_machine_are_not_shown(tmp_path: Path) -> None:
    for seed in range(2):
        boards.write(
            tmp_path / str(seed),
            seed=seed,
            backbone__model=str(tmp_path / "base"),
            out=str(tmp_path / str(seed)),
            data__source=str(tmp_path / "data"),
            result={"notes": [f"see {tmp_path}/x"], "data": str(tmp_path)},
        )
    content = board.render("t", found.look(tmp_path)).decode()
    assert str(tmp_path) not in content
    assert tmp_path.name not in content
    assert "model: base  # a place on the machine of the run; name yours" in content


def test_paired_tests_are_taken_from_a_summary(tmp_path: Path) -> None:
    some(tmp_path)
    pair = {
        "one": "ept",
        "other": "dept",
        "difference": 0.0123,
        "interval_95": [-0.01, 0.03],
        "p_corrected": 0.4,
        "verdict": "no difference shown between ept and dept",
    }
    summary = {
        "test": "paired bootstrap",
        "tuning": {"trials": 8},
        "failed": [{}],
        "blocks": [{"task": "sst2", "pairs": [pair, 3]}, 4],
        "ranks": {"critical_difference": 1.5, "verdicts": ["no difference in rank is shown"]},
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    words = read(tmp_path).words
    for part in (
        "sst2 ept dept +0.0123 -0.01 to 0.03 0.4 no difference shown between ept and dept",
        "Test: paired bootstrap.",
        "Tuning of every method: trials 8.",
        "critical difference 1.5): no difference in rank is shown",
        "1 runs failed",
    ):
        assert part in words, part


@pytest.mark.parametrize(
    "summary", [{"blocks": 3}, {"blocks": [{"pairs": [{"one": 1, "other": None}]}]}, {"ranks": []}]
)
def test_a_summary_of_another_form_stops_nothing(tmp_path: Path, summary: Any) -> None:
    boards.write(tmp_path / "a")
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    read(tmp_path)


def test_a_thousand_runs_are_fast_and_the_page_small(tmp_path: Path) -> None:
    for number in range(1000):
        method, task, rank, seed = number // 200, number // 20 % 10, number // 4 % 5, number % 4
        curve = [0.5 + step * (method + rank) / 3000 for step in range(40)]
        name = f"method_number_{method}-glue-task{task}-small-rank{rank}--seed-{seed}--0123abcd"
        boards.write(
            tmp_path / "runs" / name,
            method__name=f"method_number_{method}",
            method__rank=rank,
            suite=f"glue/task{task}",
            seed=seed,
            score=0.6 + (number * 37 % 100) / 400,
            curve=curve,
            out=str(tmp_path / name),
            task__template=f"{{text}} of task {task} " * 5,
            result={"trainable_parameters": 10 ** (rank + 2)},
        )
    began = time.process_time()
    content = board.render("t", found.look(tmp_path))
    assert time.process_time() - began < 5
    assert 50_000 < len(content) < 300_000
    page = Reader(content)
    assert "Runs 1,000 finished" in page.words
    packed = next(one for one in page.of("a") if one.get("download") == "runs.csv.gz")
    rows = gzip.decompress(base64.b64decode(str(packed["href"]).partition(",")[2])).decode()
    assert len(list(csv.DictReader(io.StringIO(rows)))) == 1000
    assert "left out" in page.words


def test_the_page_stays_small_whatever_is_in_it(tmp_path: Path) -> None:
    long = "word " * 1000
    for number in range(100):
        told = {"text": long, "texts": [{"text": long + str(n)} for n in range(9)], "history": [{"text": long}] * 50}
        method = {"name": f"m{number % 50}" * 30, "words": long + str(number)}
        labels = {f"label {place} {long[:200]}": long[:200] for place in range(50)}
        boards.write(
            tmp_path / (f"{number}-" + "x" * 200),
            method=method,
            suite=f"task {number % 40} " * 40,
            task__labels=labels,
            curve=[0.5] * 300,
            result=told,
        )
    content = board.render("t", found.look(tmp_path))
    assert len(content) < 300_000
    Reader(content)


def test_torch_is_not_loaded() -> None:
    code = "import sys; from promptuary.report import board, found; import promptuary.cli.report"
    code += "; print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"
