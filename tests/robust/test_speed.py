"""The benchmarks of speed: they run, page and picture are made from their rows, and rows say where they are from.

Knows no time: times are reported, never asserted. What is counted is checked in test_costs.py.
"""

from __future__ import annotations

import xml.etree.ElementTree
from pathlib import Path

import pytest
import torch

import cells
import classes
import clock
import ept_cost
import shapes
import speed
import speed_page

ONE_OF_EACH = ["GPT-2, l=100", "BERT, l=20", "T5, l=100, texts short", "T5, dropout", "GPT-2, bfloat16",
               "GPT-2, checkpointing", "GPT-2, prompt behind the text",
               "T5-small, eight runs"]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "cell",
    [cell for cell in speed.CELLS if cell.name in ONE_OF_EACH]
    + [cell for cell in ept_cost.CELLS if cell.name in ("T5, texts of 64", "EPT's batch")]
    + classes.CELLS[:1],
    ids=lambda cell: cell.name,
)
def test_every_kind_of_cell_runs_and_counts(cell: cells.Cell) -> None:
    rows = cells.measure(cell.shrunk(), rounds=1)
    assert {target.fast for target in cell.targets} | {target.slow for target in cell.targets} <= {
        row["cell"][1] for row in rows
    }
    assert rows[0]["time_ratio"] == 1
    for row in rows:
        assert row["cell"][0] == cell.name
        assert row["flops"] > 0
        assert len(row["seconds"]) == row["rounds"] == 1
        assert (row["saved_bytes"] is None) == cell.whole_pass
    found = {row["cell"][1]: row for row in rows}
    if classes.SHARED in found:
        counted = [found[name]["flops"] for name in (classes.SHARED, classes.CUT, classes.CACHED)]
        assert counted == sorted(counted)
        assert rows[0][f"gradient difference, {classes.SHARED}"] < 1e-5
    if speed.PLAIN in found:  # what is switched off is work; PEFT does all of it
        assert found[speed.DEFAULT]["flops"] < found[speed.PLAIN]["flops"] <= found[speed.PEFT]["flops"]
    if speed.NARROW in found:
        assert found[speed.NARROW]["flops"] < found.get(speed.LORA, rows[0])["flops"]


def test_a_twin_shares_its_weights_and_a_half_does_not() -> None:
    model = shapes.model("gpt2", small=True)
    other, half = shapes.twin(model), speed.halved(model)
    assert all(one is two for one, two in zip(model.parameters(), other.parameters(), strict=True))
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert other.transformer is not model.transformer


def test_names_of_cells_are_unique() -> None:
    names = [cell.name for cell in (*speed.CELLS, *ept_cost.CELLS, *classes.CELLS)]
    assert len(set(names)) == len(names)
    assert set(ONE_OF_EACH) < set(names)


def test_rows_stand_for_every_cell_and_say_where_they_are_from() -> None:
    for known, path in (
        (speed.CELLS, speed.ROWS),
        (ept_cost.CELLS, ept_cost.ROWS),
        (classes.CELLS, classes.ROWS),
    ):
        rows = cells.read(path)
        assert {row["cell"][0] for row in rows} == {cell.name for cell in known}
        for row in rows:
            assert row["machine"]
            assert row["versions"]["peft"]
            assert row["command"].startswith(f"python benchmarks/{path.stem}.py run")
            assert len(row["seconds"]) == row["rounds"]


def test_page_and_picture_are_made_from_the_rows() -> None:
    text, (rows, ept, *others) = speed_page.PAGE.read_text(encoding="utf-8"), speed_page.all_rows()
    assert all((rows, ept, *others))
    assert speed_page.page(text, rows, ept, *others) == text
    assert ept_cost.PICTURE.read_text(encoding="utf-8") == ept_cost.draw(ept)
    other = [{**row, "flops": row["flops"] * (1 + place)} for place, row in enumerate(ept)]
    assert speed_page.page(text, rows, other, *others) != text
    assert ept_cost.draw(other) != ept_cost.draw(ept)
    with pytest.raises(ValueError, match="marks named machine"):
        speed_page.page("# Performance", rows, ept, *others)


def test_the_picture_can_be_read_aloud() -> None:
    root = xml.etree.ElementTree.parse(Path(ept_cost.PICTURE)).getroot()
    space = "{http://www.w3.org/2000/svg}"
    spoken = {name: root.find(f"{space}{name}") for name in ("title", "desc")}
    assert root.get("role") == "img"
    assert root.get("aria-labelledby") == "title desc"
    for name, element in spoken.items():
        assert element is not None, name
        assert element.get("id") == name
        assert element.text


def test_rows_of_a_cell_take_the_place_of_its_older_ones(tmp_path: Path) -> None:
    path = tmp_path / "results" / "rows.jsonl"
    order = ["one", "two"]
    cells.replace_rows(path, [{"cell": ["two", "a"]}, {"cell": ["two", "b"]}], order)
    cells.replace_rows(path, [{"cell": ["one", "a"]}], order)
    cells.replace_rows(path, [{"cell": ["two", "c"]}], order)
    assert [row["cell"] for row in cells.read(path)] == [["one", "a"], ["two", "c"]]


def test_kept_bytes_are_the_most_at_a_time_and_each_storage_counts_once() -> None:
    weight, x = torch.randn(8, 8), torch.randn(5, 8, requires_grad=True)

    def step() -> None:
        for _ in range(3):  # one after the other: never more than one square waits
            hidden = x @ weight
            (hidden * hidden).sum().backward()

    assert clock.saved_bytes(step, [weight]) == 5 * 8 * 4
    assert clock.saved_bytes(step, []) == 5 * 8 * 4 + 8 * 8 * 4
    assert clock.flops(step) == 3 * (2 * 5 * 8 * 8 * 2)


def test_what_takes_turns_runs_as_often_as_asked() -> None:
    seen: list[str] = []
    taken = clock.in_turn({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 3)
    assert seen == ["a", "b"] * 3
    assert [len(seconds) for seconds in taken.values()] == [3, 3]
    assert clock.ratio([1.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == (2.0, 1.0, 3.0)
