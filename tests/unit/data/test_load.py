"""Reading: what is right comes through unchanged, what is wrong is named with file and row.

Knows no task. The hub is tried with a folder, which the same library reads without a network.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from promptuary.data import load as module
from promptuary.data.load import DataConfig, Splits, load, read_examples
from promptuary.errors import ConfigError, DataError

FIELDS = ("text", "label")
ROWS = [{"text": f"text {number}", "label": "ab"[number % 2]} for number in range(40)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(source: Path | str, seed: int = 0, required: tuple[str, ...] = FIELDS, **options: Any) -> Splits:
    config = DataConfig.read({"source": str(source), **options}, where="data")
    return load(config, required, torch.Generator().manual_seed(seed))


def message(source: Path, **options: Any) -> str:
    with pytest.raises((DataError, ConfigError)) as caught:
        run(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "validation.jsonl", ROWS[:12])
    write(tmp_path / "test.jsonl", ROWS[:7])
    return tmp_path


# ---- formats --------------------------------------------------------------------------------------------------------

NASTY = [
    {"text": 'quotes " and, commas', "label": "a"},
    {"text": "two\nlines\tand a tab", "label": "b"},
    {"text": "Grüße \u2028 日本 🙂", "label": "c"},
]


def in_every_format(
    folder: Path, rows: list[dict[str, Any]], newline: str = "\n", bom: str = "", quoting: Any = csv.QUOTE_MINIMAL
) -> list[Path]:
    paths = []
    for ending, delimiter in ((".csv", ","), (".tsv", "\t")):
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, lineterminator=newline, quoting=quoting)
        writer.writeheader()
        writer.writerows(rows)
        paths.append(folder / f"rows{ending}")
        paths[-1].write_bytes((bom + text.getvalue()).encode())
    for ending, text_of in (
        (".jsonl", newline.join(json.dumps(row, ensure_ascii=False) for row in rows)),
        (".json", json.dumps(rows, ensure_ascii=False)),
    ):
        paths.append(folder / f"rows{ending}")
        paths[-1].write_bytes((bom + text_of).encode())
    paths.append(folder / "rows.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), paths[-1])
    return paths


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_every_format_holds_the_same_rows(tmp_path: Path, newline: str, bom: str) -> None:
    for path in in_every_format(tmp_path, NASTY, newline, bom):
        assert read_examples(path) == NASTY, path.name


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(
    st.lists(st.fixed_dictionaries({"x": st.text(st.characters(codec="utf-8", exclude_characters="\0"))}), min_size=1)
)
def test_any_text_survives_every_format(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    rows = [{"label": "a", **row} for row in rows]
    # all quoted, because the csv module of Python 3.11 writes a lone carriage return without quotes
    for path in in_every_format(tmp_path, rows, quoting=csv.QUOTE_ALL):
        assert read_examples(path) == rows, path.name


def test_a_field_longer_than_the_csv_limit_is_read(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\n" + "x" * 200_000 + ",a\n")
    assert len(read_examples(tmp_path / "train.csv")[0]["text"]) == 200_000


def test_blank_lines_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('\n{"text": "x"}\n\n  \n{"text": "y"}\n\n')
    (tmp_path / "train.csv").write_text("\ntext,label\n\nx,a\n\n")
    assert len(read_examples(tmp_path / "train.jsonl")) == 2
    assert read_examples(tmp_path / "train.csv") == [{"text": "x", "label": "a"}]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("train.csv", b"", "train.csv is empty"),
        ("train.jsonl", b" \n\n", "train.jsonl is empty"),
        ("train.csv", b"text,label\n", "train.csv holds no examples; expected at least one (below the header"),
        ("train.json", b"[]", "train.json holds no examples"),
        ("train.csv", b"text,label\nx,a\ny\nz,b,c\n", "train.csv line 3: 1 values for 2 columns; line 4: 3 values"),
        ("train.csv", b'text,label\n"x\ny",a\nz\n', "train.csv line 4: 1 values for 2 columns"),
        ("train.csv", b"text,text\nx,a\n", 'train.csv: two columns are called "text"; rename one'),
        ("train.csv", b'text,label\nx,a\n"y,b\nz,c\n', "train.csv: a quote is out of place in the row of line 3"),
        ("train.tsv", b'text\tlabel\n"x" said he\ta\n', "train.tsv: a quote is out of place in the row of line 2"),
        ("train.jsonl", b'{"text": "x", "label": "a"}\n{"text":\n', "train.jsonl line 2: not JSON; mend them"),
        ("train.jsonl", b'{"text": "x", "label": "a"}\n[1]\n', "train.jsonl line 2: not an object but a list"),
        ("train.jsonl", b'"just a text"\n', "train.jsonl line 1: not an object but a str; no usable row is left"),
        ("train.json", b'{"text": "x"}\n{"text": "y"}', "one object per line is called .jsonl"),
        ("train.json", b'{"rows": []}', "train.json: expected a list of objects, got a dict"),
        ("train.json", b"[{}, 3]", "not an object but a int"),
        ("train.csv", b"text,label\nx,a\ncaf\xe9,b\n", "train.csv line 3: holds byte 0xe9, not UTF-8 text"),
        ("train.jsonl", '{"text": "x"}'.encode("utf-16"), "train.jsonl line 1 holds byte 0xff, not UTF-8 text"),
        ("train.csv", b"text,label\nx,a\ny\0,b\n", "train.csv line 3: holds byte 0x00"),
        ("train.parquet", b"PAR1 no", "train.parquet cannot be read as parquet"),
    ],
)
def test_a_damaged_file_is_named_with_its_place(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert expected in message(tmp_path)


def test_a_missing_file_is_named_with_the_nearest_one_and_the_folder(folder: Path) -> None:
    text = message(folder, train="trian.jsonl")
    assert 'did you mean "train.jsonl"?' in text
    assert "test.jsonl, train.jsonl, validation.jsonl" in text
    assert 'did you mean "train.jsonl"?' in message(folder / "trai.jsonl")


def test_an_unknown_ending_is_named_with_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "train.xlsx").write_bytes(b"x")
    assert 'unknown file ending ".xlsx"; expected one of .jsonl, .json, .csv' in message(tmp_path / "train.xlsx")


def test_a_folder_without_training_file_is_listed(tmp_path: Path) -> None:
    write(tmp_path / "a.train.jsonl", ROWS)
    assert (
        "nothing named train (.jsonl, .json, .csv, .tsv, .parquet); set data.train (it holds a.train.jsonl)"
        in message(tmp_path)
    )
    assert "nor the folder" in message(tmp_path / "no" / "such.csv")


def test_two_files_for_one_split_are_both_named(folder: Path) -> None:
    write(folder / "dev.jsonl", ROWS)
    assert "holds dev.jsonl and validation.jsonl; say which one with data.validation" in message(folder)
    assert len(run(folder, validation="dev.jsonl").validation) == len(ROWS)


# ---- rows -----------------------------------------------------------------------------------------------------------


def test_a_blank_text_is_named_with_its_row(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", [ROWS[0], {"text": " \t", "label": "a"}, *ROWS[1:9]])
    assert message(path) == ("train.jsonl line 2: text is missing or blank; mend them or set data.on_bad_row=skip")


@pytest.mark.parametrize("value", [None, "", "  ", float("nan")])
def test_a_missing_label_is_a_bad_row(tmp_path: Path, value: Any) -> None:
    path = write(tmp_path / "train.jsonl", [*ROWS, {"text": "x", "label": value}])
    assert "line 41: label is missing or blank" in message(path)
    assert len(run(path, on_bad_row="skip").train) == 36


def test_a_label_of_zero_or_false_is_there(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", [{"text": "x", "label": value} for value in (0, 0.0, False)])
    assert len(run(path).train) == 2


def test_an_absent_key_is_a_bad_row_and_an_absent_column_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", [*ROWS, {"label": "a"}])
    assert "line 41: text is missing or blank" in message(path)
    assert 'train.jsonl has no column "txt"; did you mean "text"? (columns: text, label)' in message(
        path, required=("txt",)
    )


def test_bad_rows_are_counted_and_the_first_five_named(tmp_path: Path) -> None:
    rows = [{"text": "" if number % 2 else "x", "label": "a"} for number in range(20)]
    path = write(tmp_path / "train.jsonl", rows)
    assert "lines 2, 4, 6, 8, 10: text is missing or blank (and 5 more bad rows)" in message(path)
    assert run(path, on_bad_row="skip").notes[0] == "10 bad rows skipped: train.jsonl lines 2, 4, 6, 8, 10 and 5 more"


def test_skipped_rows_are_noted_with_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\na,x\nb,x\n,x\nc,x\nd\n")
    splits = run(tmp_path, on_bad_row="skip")
    assert splits.notes[0] == "2 bad rows skipped: train.csv lines 4, 6"
    assert len(splits.train) + len(splits.validation) == 3


def test_a_file_of_bad_rows_alone_is_refused_even_when_skipping(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", [{"text": "", "label": "a"}])
    assert "no usable row is left" in message(path, on_bad_row="skip")


@pytest.mark.parametrize("values", [(0, 1), ("0", "1"), (False, True), (0.0, 1.0), ("no", "yes"), (0, "yes")])
def test_integer_labels_become_their_names(tmp_path: Path, values: tuple[Any, Any]) -> None:
    write(tmp_path / "train.jsonl", [{"text": "x", "label": value} for value in values])
    write(tmp_path / "dev.jsonl", ROWS[:1])
    splits = run(tmp_path, label_names=("no", "yes"), validation="train.jsonl")
    assert [row["label"] for row in splits.train] == ["no", "yes"]


@pytest.mark.parametrize("value", [2, -1, 0.5, "maybe", [0], float("inf")])
def test_a_label_without_a_name_is_a_bad_row(tmp_path: Path, value: Any) -> None:
    path = write(tmp_path / "train.jsonl", [{"text": "x", "label": value}])
    text = message(path, label_names=("no", "yes"))
    assert "line 1: label" in text
    assert "neither 0 to 1 nor one of no, yes" in text
    assert ("-1 hides an answer" in text) == (value == -1)


def test_columns_are_renamed_before_they_are_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", [{"sentence": "x", "y": "a", "text": "old"}] * 2)
    splits = run(path, rename={"sentence": "text", "y": "label", "text": "other"})
    assert splits.train == [{"text": "x", "label": "a", "other": "old"}]


def test_a_misspelt_rename_is_named(folder: Path) -> None:
    assert 'no column "txet"; did you mean "text"?' in message(folder, rename={"txet": "label2"})
    assert 'no column "txet"' in message(folder, rename={"txet": "text"})


def test_renaming_two_columns_into_one_is_refused(folder: Path) -> None:
    assert 'makes two columns "label" of train.jsonl' in message(folder, rename={"text": "label"})


def test_a_split_that_has_the_new_name_already_needs_no_renaming(folder: Path) -> None:
    # RLPrompt's 16-shot AG News: "text" in train and dev, "sentence" in test
    write(folder / "test.jsonl", [{"sentence": "x", "label": "a"}])
    assert run(folder, rename={"sentence": "text"}).test == [{"text": "x", "label": "a"}]


# ---- splits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["validation", "valid", "dev", "val"])
def test_splits_are_found_by_their_usual_names(tmp_path: Path, name: str) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / f"{name}.jsonl", ROWS[:3])
    write(tmp_path / "test.jsonl", ROWS[:2])
    (tmp_path / "SOURCE.txt").write_text("not data")
    splits = run(tmp_path)
    assert (splits.train, splits.validation, splits.test, splits.notes) == (ROWS, ROWS[:3], ROWS[:2], ())


def test_a_file_outside_the_folder_can_be_the_test_split(folder: Path) -> None:
    (folder / "16-13").mkdir()
    write(folder / "16-13" / "train.jsonl", ROWS[:4])
    write(folder / "16-13" / "dev.jsonl", ROWS[:4])
    assert len(run(folder / "16-13", test="../test.jsonl").test) == 7


def test_without_validation_a_tenth_is_set_aside_and_noted(tmp_path: Path) -> None:
    splits = run(write(tmp_path / "rows.jsonl", ROWS))
    assert (len(splits.train), len(splits.validation)) == (36, 4)
    assert sorted([*splits.train, *splits.validation], key=ROWS.index) == ROWS
    assert splits.test == splits.validation
    assert splits.notes == (
        "no validation file: 10 % of the training rows (4) were set aside",
        "no test file: the validation rows serve as test, so test scores are scores on validation",
    )


def test_a_single_row_cannot_be_split(tmp_path: Path) -> None:
    assert "a single training row" in message(write(tmp_path / "rows.jsonl", ROWS[:1]))


def test_a_file_is_the_training_split_and_nothing_beside_it_is_taken(folder: Path) -> None:
    assert len(run(folder / "train.jsonl").test) == 4
    assert len(run(folder / "train.jsonl", test="test.jsonl").test) == 7
    assert "data.source is the training file itself" in message(folder / "train.jsonl", train="test.jsonl")


def test_shots_take_k_per_label_of_train_and_validation_and_leave_test_alone(folder: Path) -> None:
    splits = run(folder, shots=3)
    for rows in (splits.train, splits.validation):
        assert Counter(row["label"] for row in rows) == {"a": 3, "b": 3}
    assert splits.test == ROWS[:7]
    assert "validation: expected 7 rows of each label, but label 'a' has 6" in message(folder, shots=7)


def test_sizes_are_sampled_by_seed(folder: Path) -> None:
    splits = run(folder, train_size=10, validation_size=5)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (10, 5, 7)
    assert "validation: expected 13 rows to choose, but there are 12" in message(folder, validation_size=13)


def test_shots_and_sizes_exclude_each_other(folder: Path) -> None:
    assert "shots already sets the sizes" in message(folder, shots=1, train_size=5)


def test_same_seed_same_rows_same_hash(folder: Path) -> None:
    first, again, other = (run(folder, seed, shots=3) for seed in (1, 1, 2))
    assert first == again
    assert first.hash != other.hash
    assert first.train != other.train


def test_the_hash_follows_the_content_and_not_the_format_or_the_line_ends(tmp_path: Path) -> None:
    hashes = set()
    for newline in ("\n", "\r\n"):
        (tmp_path / "train.csv").write_bytes(newline.join(["text,label", "x,a", "y,b", ""]).encode())
        hashes.add(run(tmp_path).hash)
    (tmp_path / "train.csv").write_text("text,label\nx,a\nz,b\n")
    assert len(hashes) == 1
    assert run(tmp_path).hash not in hashes


def test_halved_validation_is_the_same_for_every_seed_and_leaves_the_official_test_unread(folder: Path) -> None:
    (folder / "test.jsonl").write_text("answers are hidden")
    first, second = (run(folder, seed, protocol="halve_validation") for seed in (1, 2))
    assert first == second
    order = torch.randperm(12, generator=torch.Generator().manual_seed(42)).tolist()
    assert first.validation == [ROWS[place] for place in order[:6]]
    assert first.test == [ROWS[place] for place in order[6:]]
    assert first.train == ROWS
    assert "6 validation and 6 test rows" in first.notes[0]


def test_carved_training_rows_are_validation_and_the_official_validation_is_test(folder: Path) -> None:
    many = [{"text": f"text {number}", "label": "a"} for number in range(1100)]
    write(folder / "train.jsonl", many)
    splits = run(folder, protocol="carve_train")
    order = torch.randperm(1100, generator=torch.Generator().manual_seed(42)).tolist()
    assert splits.validation == [many[place] for place in order[:1000]]
    assert len(splits.train) == 100
    assert splits.test == ROWS[:12]


def test_the_demo_is_read_from_the_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "demo").mkdir()
    for name in ("train", "validation", "test"):
        (folder / f"{name}.jsonl").rename(folder / "demo" / f"{name}.jsonl")
    monkeypatch.setattr(module, "files", lambda _: folder)
    assert run("demo").train == ROWS


def test_a_hub_data_set_is_read_like_a_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    config = DataConfig.read({"source": str(folder)}, where="data")
    hub = module._from_hub(config, {"train": None, "validation": None, "test": "test"})
    assert {split: list(table.rows.values()) for split, table in hub.items()} == {
        "train": ROWS,
        "validation": ROWS[:12],
        "test": ROWS[:7],
    }
    with pytest.raises(DataError, match=r'has no split "tset"; did you mean "test"\?'):
        module._from_hub(config, {"train": None, "test": "tset"})


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    text = message(Path("nobody/nothing"))
    assert text.startswith('"nobody/nothing" is no file or folder, and as a hub data set: ')
    assert text.endswith("check data.source, data.subset and the network")


@pytest.mark.parametrize("source", ["./nothing", "/nowhere/at/all", "a/b/c", "nothing.csv", "..."])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="there is no file"):
        run(source)


def test_an_unknown_setting_is_refused_with_the_nearest_name(folder: Path) -> None:
    assert 'unknown field data.shot; did you mean "shots"?' in message(folder, shot=3)


def test_every_setting_is_described() -> None:
    assert [name for name, field in DataConfig.model_fields.items() if not field.description] == []
