"""Twenty kinds of rows times both policies: bad ones are named by file and number, none is dropped silently."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from promptuary import registry
from promptuary.data.load import DataConfig, Splits, load
from promptuary.errors import DataError
from promptuary.tasks.classify import Classify, ClassifyConfig
from robust import inputs

LABELS = {"positive": "good", "negative": "bad"}
CSV = "text,label\n" + "".join(f"a {word} cat,{('positive', 'negative')[n % 2]}\n" for n, word in enumerate("abcdefgh"))
JSONL = [{"text": f"a {word} cat", "label": ("positive", "negative")[n % 2]} for n, word in enumerate("abcdefgh")]
"""Eight good rows: lines 2 to 9 of the table, 1 to 8 of the other."""


@dataclass(frozen=True)
class Kind:
    """`bad`: numbers of the rows that cannot be used, and why; `refused`: why the file as a whole cannot be;
    `note`: what is told where every row can be used."""

    name: str
    content: bytes | str
    bad: dict[int, str]
    refused: str = ""
    note: str = ""
    labels: dict[str, str] | None = None


def json_rows(*more: str) -> str:
    return inputs.jsonl(*JSONL) + "".join(line + "\n" for line in more)


def csv(name: str, more: bytes | str, bad: dict[int, str] | None = None, **told: str) -> Kind:
    return Kind(name, CSV.encode() + (more.encode() if isinstance(more, str) else more), bad or {}, **told)  # type: ignore[arg-type]


HUGE = "x " * 5_000_000

KINDS = {
    "missing label": csv("train.csv", "a cat,\n", {10: "label is missing or blank"}),
    "unknown label": csv("train.csv", "a cat,neutral\n", {10: 'unknown label "neutral" (labels: positive, negative; '}),
    "empty text": csv("train.csv", ",positive\n", {10: "text is missing or blank"}),
    "white space": csv("train.csv", " \t\u3000,positive\n", {10: "text is missing or blank"}),
    "over-long": csv("train.csv", "x " * 5000 + ",positive\n"),
    "duplicate": csv("train.csv", "a b cat,positive\na a cat,positive\n",
                     note="2 training rows have the same input as an earlier one, "
                     "1 of them with another answer: train.csv lines 10, 11"),
    "wrong type": Kind("train.jsonl", json_rows('{"text": ["a"], "label": "positive"}', '{"text": "a", "label": {}}'),
                       {9: "text should be text, got list", 10: "label should be text, got dict"}),
    "null": Kind("train.jsonl", json_rows('{"text": null, "label": "positive"}', '{"text": "a", "label": NaN}', "null"),
                 {9: "text is missing or blank", 10: "label is missing or blank", 11: "not an object but a NoneType"}),
    "byte order mark": Kind("train.csv", b"\xef\xbb\xbf" + CSV.encode(), {}),
    "CRLF": Kind("train.csv", CSV.replace("\n", "\r\n"), {}),
    "NUL": csv("train.csv", b"a\0cat,positive\n", {10: "holds byte 0x00, not UTF-8 text (save the file as UTF-8)"}),
    "bad UTF-8": csv("train.csv", b"caf\xe9,positive\nok,positive\n\xff,negative\n",
                     {10: "holds byte 0xe9, not UTF-8 text", 12: "holds byte 0xff, not UTF-8 text"}),
    "quoted line break": csv("train.csv", '"a\n\nb",positive\nc\n', {13: "1 values for 2 columns"}),
    "10 MB row": csv("train.csv", HUGE + ",positive\n"),
    "ragged": csv("train.csv", "a\nb,positive,c\n", {10: "1 values for 2 columns", 11: "3 values for 2 columns"}),
    "empty file": Kind("train.csv", "\n \n", {}, refused="train.csv is empty; expected examples"),
    "header alone": Kind("train.csv", "text,label\n", {}, refused="train.csv holds no examples; expected at least one"),
    "label leak": csv("train.csv", "", note="2 of 2 test rows: the same input as a training row, "
                      "so their scores flatter: test.csv lines 2, 3"),
    "wrong column": Kind("train.csv", CSV.replace("text", "body"), {}, refused='train.csv has no column "text"'),
    "one class": Kind("train.csv", CSV.replace("negative", "positive"), {},
                      note="no training row has the label negative"),
    "huge label set": Kind("train.csv", "text,label\n" + "".join(f"text {n},label {n}\n" for n in range(3000)), {},
                           note="3000 labels among 3000 training rows: is 'label' the right column?"),
    "half a character": Kind("train.jsonl", json_rows('{"text": "a \\ud83d b", "label": "positive"}'),
                             {9: "text holds half a character (a lone surrogate, 'a \\ud83d b'); write it anew"}),
    "names twice": Kind("train.jsonl", json_rows('{"text": "a", "label": "positive", "text": "b"}'),
                        {9: '"text" stands twice'}),
    "too deep": Kind("train.jsonl", json_rows('{"text": ' + "[" * 100_000), {9: "not JSON"}),
}  # fmt: skip
"""Kind -> a training file of that kind."""


def read(folder: Path, policy: str, labels: dict[str, str] | None) -> Splits:
    config = DataConfig.read({"source": str(folder), "on_bad_row": policy}, where="data")
    task = ClassifyConfig(template="{text} {mask}", labels=labels)
    return load(config, Classify.required(task), torch.Generator().manual_seed(0), Classify.check(task))


def write(kind: Kind, folder: Path) -> None:
    content = kind.content if isinstance(kind.content, bytes) else kind.content.encode()
    (folder / kind.name).write_bytes(content)
    for split in ("validation", "test"):
        text = "a a cat" if split == "test" and "test rows" in kind.note else f"a {split} dog"
        labels = ("label 0", "label 1") if "labels among" in kind.note else ("positive", "negative")
        (folder / f"{split}.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for label in labels))


def test_there_are_at_least_twenty_kinds() -> None:
    assert len(KINDS) >= 20


@pytest.mark.parametrize("policy", ["error", "skip"])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_row_under_both_policies(name: str, policy: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    write(kind, tmp_path)
    labels = None if "labels among" in kind.note else LABELS
    if kind.refused or (policy == "error" and kind.bad):
        with pytest.raises(DataError) as caught:
            read(tmp_path, policy, labels)
        told = str(caught.value)
        assert "\n" not in told
        assert len(told) < 600
        assert told.startswith(kind.refused)
        unit = "line"
        for number, reason in kind.bad.items():
            assert f"{unit} {number}: {reason}" in told
            assert told.startswith(kind.name)
        assert ("mend them or set data.on_bad_row=skip" in told) == bool(kind.bad)
        return
    splits = read(tmp_path, policy, labels)
    assert splits.skipped == ({kind.name: tuple(kind.bad)} if kind.bad else {})
    told = "; ".join(splits.notes)
    if kind.bad:
        numbers = ", ".join(map(str, kind.bad))
        rows, unit = ("1 bad row", "line") if len(kind.bad) == 1 else (f"{len(kind.bad)} bad rows", "lines")
        assert f"{rows} skipped: {kind.name} {unit} {numbers}" in told
    else:
        assert kind.note in told
        assert bool(told) == bool(kind.note)
    every = {"over-long": 9, "10 MB row": 9, "quoted line break": 9, "duplicate": 10, "huge label set": 3000}
    assert len(splits.train) == every.get(name, 9 if name == "bad UTF-8" else 8)


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    write(KINDS["quoted line break"], tmp_path)
    assert read(tmp_path, "skip", LABELS).train[-1] == {"text": "a\n\nb", "label": "positive"}
    for name in ("byte order mark", "CRLF"):
        write(KINDS[name], tmp_path)
        assert [row["text"] for row in read(tmp_path, "error", LABELS).train] == [row["text"] for row in JSONL]


def test_labels_that_only_another_split_has_are_bad_rows_there(tmp_path: Path) -> None:
    write(KINDS["CRLF"], tmp_path)
    (tmp_path / "test.csv").write_text("text,label\nx,positive\ny,neutral\n")
    with pytest.raises(DataError, match=r'test.csv line 3: unknown label "neutral" .*they come from the training data'):
        read(tmp_path, "error", None)
    assert read(tmp_path, "skip", None).skipped == {"test.csv": (3,)}


OTHERS = {
    "regress": (
        {"name": "regress", "template": "{text} {mask}"},
        [{"text": "a", "label": 1}, {"text": "b", "label": "2.5"}],
        [({"text": "c", "label": "much"}, "field 'label' should be a number, got 'much'"),
         ({"text": "d", "label": float("inf")}, "field 'label' should be a finite number, got inf")],
    ),
    "generate": (
        {"name": "generate", "template": "{text} {mask}"},
        [{"text": "a", "target": "b"}, {"text": "c", "target": 5}],
        [({"text": "d", "target": ["x"]}, "target should be text, got list")],
    ),
    "choose": (
        {"name": "choose", "template": "{text} {mask}"},
        [{"text": "a", "choices": ["x", "y"], "label": 0}, {"text": "b", "choices": ["x", "y"], "label": "y"}],
        [({"text": "c", "choices": ["x", "y"], "label": 2}, "label 2 is neither a choice nor a place from 0 to 1"),
         ({"text": "d", "choices": ["x"], "label": 0}, "task.choices gives 1 choice(s)"),
         ({"text": "e", "choices": ["x", None], "label": 0}, "choice 1 is missing or blank")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_tasks_name_the_line_too(name: str, tmp_path: Path) -> None:
    settings, good, bad = OTHERS[name]
    task = registry.load("tasks", name)
    config = task.Config.read(settings, where="task")
    path = tmp_path / "train.jsonl"
    path.write_text(inputs.jsonl(*good, *(row for row, _ in bad)))
    for policy in ("error", "skip"):
        data = DataConfig.read({"source": str(path), "on_bad_row": policy}, where="data")
        generator = torch.Generator().manual_seed(0)
        if policy == "error":
            with pytest.raises(DataError) as caught:
                load(data, task.required(config), generator, task.check(config))
            for number, (_, reason) in enumerate(bad, start=len(good) + 1):
                assert f"line {number}: {reason}" in str(caught.value)
        else:
            splits = load(data, task.required(config), generator, task.check(config))
            assert splits.skipped == {"train.jsonl": tuple(range(len(good) + 1, len(good) + len(bad) + 1))}


# ---- through the command line ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return inputs.make(tmp_path_factory.mktemp("rows"))


def test_skipped_cut_and_odd_rows_stand_in_the_notes_and_in_the_result(root: Path, tmp_path: Path) -> None:
    place = inputs.Place(root, tmp_path)
    (tmp_path / "data").mkdir()
    long = "the cat " * 60 + ",positive\n"
    (tmp_path / "data" / "train.csv").write_text(CSV + "a cat,\na a cat,positive\nx\n" + long)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(place.settings))
    given = ["train", tmp_path / "run.yaml", "--set", f"data.source={tmp_path / 'data'}"]
    refused = inputs.say(*given)
    assert refused.code == 2
    assert "train.csv line 10: label is missing or blank; line 12: 1 values for 2 columns" in refused.err
    said = inputs.say(*given, "--set", "data.on_bad_row=skip", "--json")
    assert said.code == 0, said.err
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["skipped_rows"] == {"train.csv": [10, 12]}
    for note in (
        "2 bad rows skipped: train.csv lines 10, 12",
        "no validation file: 10 % of the training rows (1) were set aside",
        "the same input as a",
        "texts cut to data.max_length=40: 1 train",
    ):
        assert any(note in one for one in result["notes"]), (note, result["notes"])
        assert note in said.err
    assert sum(result["examples"][split] for split in ("train", "validation")) == 10


def test_predict_and_evaluate_name_lines_of_the_file(root: Path, tmp_path: Path) -> None:
    prompt = root / "trained-masked"
    (tmp_path / "x.csv").write_text('text,label\na cat,positive\n" ",negative\na dog,neutral\n')
    said = inputs.say("predict", prompt, "--data", tmp_path / "x.csv")
    assert (said.code, said.out, said.err) == (2, "", "error: x.csv line 3: text is missing or blank; mend them\n")
    said = inputs.say("evaluate", prompt, "--data", tmp_path / "x.csv")
    assert said.code == 2
    assert "x.csv line 3: text is missing or blank; line 4: unknown label" in said.err
    said = inputs.say("evaluate", prompt, "--data", tmp_path / "x.csv", "--set", "data.on_bad_row=skip", "--json")
    assert said.code == 0, said.err
    assert (said.json["examples"], said.json["skipped_rows"]) == (1, {"x.csv": [3, 4]})
    assert "2 bad rows skipped: x.csv lines 3, 4" in said.err
    # the file is not what the prompt was trained on, so nothing is said about training rows
    assert "training row" not in said.err
    (tmp_path / "y.csv").write_text("txt\na cat\n")
    said = inputs.say("predict", prompt, "--data", tmp_path / "y.csv")
    assert said.err == 'error: y.csv has no column "text"; did you mean "txt"? (columns: txt)\n'


def test_a_row_of_a_hundred_kilobytes_is_cut_and_answered(root: Path, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(f"text\n{HUGE[:100_000]}\n")
    said = inputs.say("predict", root / "trained-masked", "--data", tmp_path / "x.csv", "--json")
    assert said.code == 0, said.err
    assert len(said.json["predictions"]) == 1
