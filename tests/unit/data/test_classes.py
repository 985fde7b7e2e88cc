"""Classes: names from every form of a file, and halves that share no row.

Knows no task and no image.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from promptuary.data.classes import chosen_classes, class_names, in_order
from promptuary.data.load import DataConfig, Splits, load
from promptuary.errors import ConfigError, DataError


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def run(source: Path, **options: Any) -> Splits:
    config = DataConfig.read({"source": str(source), **options}, where="data")
    return load(config, ("text", "label"), torch.Generator().manual_seed(0))


def rows(folder: Path, labels: list[Any], count: int = 8) -> Path:
    for name, more in (("train", count), ("validation", 2), ("test", 3)):
        lines = [json.dumps({"text": f"{name} {n}", "label": label}) for label in labels for n in range(more)]
        write(folder / f"{name}.jsonl", "\n".join(lines))
    return folder


def labels_of(splits: Splits) -> list[set[str]]:
    return [{str(row["label"]) for row in part} for part in (splits.train, splits.validation, splits.test)]


def test_whole_numbers_are_in_order_as_numbers() -> None:
    assert in_order(["10", "9", "9", "1"]) == ["1", "9", "10"]
    assert in_order(["10", "9", "x"]) == ["10", "9", "x"]


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_base_and_new_are_halves_and_base_is_the_larger(count: int) -> None:
    labels = [str(number) for number in range(count)]
    base, new = chosen_classes(labels, "base"), chosen_classes(labels, "new")
    assert base + new == labels == chosen_classes(labels, "all")
    assert len(base) - len(new) == count % 2


# ---- files of names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "labels", "expected"),
    [
        ("a.txt", "giant panda\nred fox\n\n", ["n2", "n1"], {"n1": "giant panda", "n2": "red fox"}),
        ("a.txt", "n1 giant panda\nn2 red fox\n", ["n2"], {"n1": "giant panda", "n2": "red fox"}),
        ("a.txt", "n 1\tgiant panda\nn 2\tred fox\n", ["n 1"], {"n 1": "giant panda", "n 2": "red fox"}),
        ("a.txt", "zero\none\ntwo\n", ["2", "0"], {"0": "zero", "1": "one", "2": "two"}),
        ("a.txt", "cat\ndog\nbird\n", ["dog", "cat"], {"cat": "cat", "dog": "dog", "bird": "bird"}),
        ("a.json", ["giant panda", "red fox"], ["n1", "n2"], {"n1": "giant panda", "n2": "red fox"}),
        ("a.json", {"n1": "giant panda", "n2": "red fox"}, ["n1"], {"n1": "giant panda", "n2": "red fox"}),
    ],
)
def test_names_come_from_any_form(
    tmp_path: Path, name: str, content: Any, labels: list[str], expected: dict[str, str]
) -> None:
    found = class_names(write(tmp_path / name, content), labels)
    assert list(found.items()) == list(expected.items())


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one\ntwo\nthree", "a.txt holds 3 names for 2 labels (n1, n2)"),
        ("a.txt", " \n", "a.txt is empty"),
        ("a.txt", "n1 fox\nn2 fox", "a.txt calls two classes 'fox', 'n1' and 'n2'; change one of them"),
        ("a.json", {"n1": "fox"}, "a.json has no name for the label 'n2' (labels in it: n1)"),
        ("a.json", {"n1": 3}, "a.json: expected a list of names, or a mapping from labels to names"),
        ("a.json", "{", "a.json is not JSON; expected a list of names, or a mapping from labels to names"),
        ("a.json", "3", "a.json: expected a list of names, or a mapping from labels to names"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, name: str, content: Any, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        class_names(write(tmp_path / name, content), ["n1", "n2"])
    assert str(caught.value).startswith(expected)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no.txt; check data.labels_file"):
        run(rows(tmp_path, ["a", "b"]), labels_file="no.txt")


# ---- in a run -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outside", [False, True])
def test_rows_get_the_names_of_the_file(tmp_path: Path, outside: bool) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    file = write((tmp_path if outside else folder) / "names.txt", "n1 red fox\nn2 giant panda\n")
    splits = run(rows(folder, ["n1", "n2"]), labels_file=str(file) if outside else "names.txt")
    assert labels_of(splits) == [{"red fox", "giant panda"}] * 3


def test_base_and_new_have_their_rows_in_every_split(tmp_path: Path) -> None:
    folder = rows(tmp_path, ["e", "a", "d", "b", "c"])
    base, new, everything = (run(folder, classes=which) for which in ("base", "new", "all"))
    assert labels_of(base) == [{"a", "b", "c"}] * 3
    assert labels_of(new) == [{"d", "e"}] * 3
    assert len(base.test) + len(new.test) == len(everything.test) == 15
    assert base.notes == ("data.classes=base: rows of 3 of 5 labels, a to c",)
    assert len({base.hash, new.hash, everything.hash}) == 3


def test_names_of_numbers_are_also_their_order(tmp_path: Path) -> None:
    folder = rows(tmp_path, [0, 1, 2, 3])
    assert labels_of(run(folder, classes="base", label_names=["z", "y", "b", "a"])) == [{"z", "y"}] * 3
    write(tmp_path / "names.txt", "z\ny\nb\na\n")
    assert labels_of(run(folder, classes="new", labels_file="names.txt")) == [{"b", "a"}] * 3
    assert labels_of(run(folder, classes="new")) == [{"2", "3"}] * 3


def test_shots_are_taken_of_the_classes_that_count(tmp_path: Path) -> None:
    splits = run(rows(tmp_path, ["a", "b", "c"]), classes="base", shots=4, validation_shots=1)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (8, 2, 6)


def test_a_wrong_label_is_still_found(tmp_path: Path) -> None:
    folder = rows(tmp_path, [0, 1, 7])
    with pytest.raises(DataError, match="label 7 is neither 0 to 1 nor one of a, b"):
        run(folder, classes="base", label_names=["a", "b"])


def test_one_class_has_no_new_half(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data.classes=new: there is no such class among 1"):
        run(rows(tmp_path, ["a"]), classes="new")


def test_settings_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="both name the labels"):
        run(tmp_path, label_names=["a", "b"], labels_file="a.txt")
    with pytest.raises(ConfigError, match="validation_shots goes with shots"):
        run(tmp_path, validation_shots=2)
