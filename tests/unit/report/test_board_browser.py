"""The page about many runs in a real browser: it is drawn, sorts, gives its rows, complains of nothing, fits a phone.

Knows no command line. Skipped where there is no Chromium.
"""

from __future__ import annotations

import csv
import io
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest

import boards
from browsing import Tab, browser, chromium
from promptuary.report import board, found

pytestmark = pytest.mark.skipif(chromium() is None, reason="needs Chromium: apt-get install chromium, or CHROMIUM=path")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("board")
    for place, (method, score) in enumerate((("prompt_tuning", 0.7), ("ept", 0.9), ("dept", 0.8))):
        for task in ("sst2", "rte"):
            for seed in range(2):
                told = {"trainable_parameters": (900, 5000, 10)[place]}
                boards.write(
                    folder / f"{method}-{task}-{seed}",
                    method__name=method,
                    suite=task,
                    seed=seed,
                    score=score,
                    result=told,
                )
    boards.write(folder / "elsewhere", method__name="<b>&lt;", suite="sst2", data__source="a<b & c", score=0.1)
    file = folder / "report.html"
    file.write_bytes(board.render("runs", found.look(folder)))
    return file


@pytest.fixture(scope="module")
def tab(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    path = chromium()
    assert path is not None
    with browser(path, tmp_path_factory.mktemp("profile")) as found:
        found.open(page)
        yield found


ORDER = "[...document.querySelectorAll('.board tbody tr')].map((row) => row.cells[1].textContent).join()"


def press(tab: Tab, head: str) -> str:
    tab.run(
        f"[...document.querySelectorAll('.board th button')].find((b) => b.textContent.startsWith('{head}')).click()"
    )
    return str(tab.run(ORDER))


def test_columns_sort_both_ways_and_say_so(tab: Tab) -> None:
    assert tab.run(ORDER) == "ept,dept,prompt_tuning,<b>&lt;"
    assert press(tab, "Trained") == "dept,prompt_tuning,<b>&lt;,ept"
    assert tab.run("document.querySelectorAll('.board th[aria-sort]').length") == 1
    assert press(tab, "Trained") == "ept,<b>&lt;,prompt_tuning,dept"
    # what has no value stays last, whichever way
    assert press(tab, "rte") == "ept,dept,prompt_tuning,<b>&lt;"
    assert press(tab, "rte") == "prompt_tuning,dept,ept,<b>&lt;"
    assert press(tab, "Method").startswith("<b>")


def test_the_rows_can_be_downloaded(tab: Tab) -> None:
    assert tab.run("document.getElementById('download').hidden") is False
    address = str(tab.run("document.getElementById('download').href"))
    head, _, content = address.partition(",")
    assert head == "data:text/csv;charset=utf-8"
    rows = list(csv.DictReader(io.StringIO(urllib.parse.unquote(content))))
    assert len(rows) == 13
    assert {row["method"] for row in rows} == {"prompt_tuning", "ept", "dept", "<b>&lt;"}
    assert {row["data"] for row in rows} == {"acme/films", "a<b & c"}


def test_charts_are_drawn(tab: Tab) -> None:
    boxes = tab.run("[...document.querySelectorAll('svg[role=img]')].map((s) => s.getBoundingClientRect().height)")
    assert len(boxes) == 5
    assert min(boxes) > 100


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_in_light_and_dark(tab: Tab, width: int, scheme: str) -> None:
    tab.ask("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500)
    tab.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    assert tab.run("document.documentElement.scrollWidth") <= width
    paper = tab.run("getComputedStyle(document.body).backgroundColor")
    ink = tab.run("getComputedStyle(document.body).color")
    sums = [sum(int(part) for part in text[4:-1].split(",")) for text in (paper, ink)]
    assert (sums[0] > sums[1]) == (scheme == "light")


def test_it_prints_whole_tables(tab: Tab) -> None:
    tab.ask("Emulation.setEmulatedMedia", media="print")
    assert tab.run("getComputedStyle(document.querySelector('.scroll')).maxHeight") == "none"
    tab.ask("Emulation.setEmulatedMedia", media="")


def test_it_complains_of_nothing_and_loads_nothing(tab: Tab, page: Path) -> None:
    assert tab.said == []
    assert set(tab.seen) <= {page.absolute().as_uri()}
