"""Any text a person can write: read, trained on, answered, written and printed without a change or a crash."""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import promptuary
from promptuary import files
from promptuary.data.load import read_examples
from promptuary.errors import DataError
from promptuary.tuned import Tuned
from robust import inputs

TEXTS = {
    "NFC": unicodedata.normalize("NFC", "caf\u00e9 \u00c5ngstr\u00f6m"),
    "NFD": unicodedata.normalize("NFD", "caf\u00e9 \u00c5ngstr\u00f6m"),
    "Arabic": "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645",
    "Hebrew with points": "\u05e9\u05c1\u05b8\u05dc\u05d5\u05b9\u05dd",
    "right-to-left override": "abc \u202e dcb \u202c end",
    "isolates": "a \u2067\u05d0\u2069 b",
    "family emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",
    "skin tone": "\U0001f44d\U0001f3fd ok",
    "flag": "\U0001f1eb\U0001f1f7 vs \U0001f1e9\U0001f1ea",
    "keycap": "1\ufe0f\u20e3 first",
    "tag sequence": "\U0001f3f4\U000e0067\U000e0062\U000e007f",
    "combining x 1000": "a" + "\u0301" * 1000,
    "zalgo": "Z\u0351\u036b\u0343a\u0320l\u0345g\u0317o\u0329",
    "controls": "a\x01\x02\x1b[31mred\x1b[0m\x7f",
    "C1 controls": "a\x80\x85\x9fb",
    "bell and backspace": "a\x07\b\bb",
    "tabs": "a\tb\t\tc",
    "line breaks": "a\nb\r\nc",
    "carriage return": "a\rb",
    "form feed and vertical tab": "a\x0cb\x0bc",
    "line separator": "a\u2028b\u2029c",
    "Chinese": "\u4f60\u597d\uff0c\u4e16\u754c\u3002",
    "Japanese": "\u3053\u3093\u306b\u3061\u306f\u30c6\u30b9\u30c8",
    "Korean syllables": "\uc548\ub155\ud558\uc138\uc694",
    "Korean letters": unicodedata.normalize("NFD", "\uc548\ub155"),
    "Thai": "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "Devanagari": "\u0928\u092e\u0938\u094d\u0924\u0947 \u0915\u094d\u0937",
    "Tamil": "\u0bb5\u0ba3\u0b95\u0bcd\u0b95\u0bae\u0bcd",
    "Turkish i": "I\u0131\u0130i \u0130STANBUL",
    "sharp s": "stra\u00dfe STRA\u1e9eE",
    "Greek final sigma": "\u039f\u0394\u03a5\u03a3\u03a3\u0395\u03a5\u03a3 \u03c3\u03c2",
    "Cyrillic look-alikes": "\u0440\u0430\u0443\u0440\u0430l",
    "full width": "\uff21\uff22\uff23\uff11\uff12",
    "ligatures": "\ufb01nd \ufb03 \u2122 \u00bd",
    "mathematical letters": "\U0001d54b\U0001d556\U0001d569\U0001d565",
    "zero width": "a\u200bb\u200cc\u2060d\ufeffe",
    "soft hyphen": "co\u00adoperate",
    "no-break spaces": "a\u00a0b\u202fc\u3000d",
    "private use": "\ue000\uf8ff\U000f0000",
    "noncharacters": "a\ufdd0\uffff\U0010ffffb",
    "replacement": "a\ufffd\ufffcb",
    "special tokens": "<s> [MASK] <mask> </s> <pad> {text} {mask} %s",
    "quotes": "\"a\" 'b' \u201cc\u201d, \\n, \\",
    "hieroglyphs": "\U00013000\U00013001",
}
HALVES = {
    "high half": "a \ud83d b",
    "low half": "a \udc00",
    "halves the wrong way round": "\udc00\ud83d",
    "half of an emoji": "\U0001f468\u200d\ud83d",
}
"""Texts that no UTF-8 file can hold; JSON can spell them."""


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return inputs.make(tmp_path_factory.mktemp("unicode"))


@pytest.fixture(scope="session")
def tuned(root: Path) -> Tuned:
    return promptuary.load_prompt(root / "trained-masked")


def in_both_formats(folder: Path, rows: list[dict[str, str]]) -> list[Path]:
    """The rows as .jsonl, spelt out and escaped, and as .csv."""
    written = []
    for name, ascii_only in (("spelt", False), ("escaped", True)):
        lines = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
        written.append((folder / f"{name}.jsonl", lines))
    table = io.StringIO(newline="")
    # all quoted, because the csv module of Python 3.11 writes a lone carriage return without quotes
    writer = csv.DictWriter(table, list(rows[0]), quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    written.append((folder / "rows.csv", table.getvalue()))
    for path, text in written:
        path.write_bytes(text.encode())
    return [path for path, _ in written]


def test_there_are_forty_texts() -> None:
    assert len(TEXTS) >= 40


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_comes_back_from_every_file_and_gets_an_answer(name: str, tuned: Tuned, tmp_path: Path) -> None:
    rows = [{"text": TEXTS[name], "label": "positive"}]
    for path in in_both_formats(tmp_path, rows):
        assert read_examples(path) == rows, path.name
    (one,) = tuned.predict([TEXTS[name]])
    assert one.answer in ("positive", "negative")
    assert tuned.predict(["a cat", TEXTS[name]])[1].scores == pytest.approx(one.scores, abs=1e-5)
    assert json.loads(files.to_line({"text": TEXTS[name]}).encode()) == {"text": TEXTS[name]}


def test_all_of_them_are_trained_on_evaluated_and_printed(root: Path, tmp_path: Path) -> None:
    place = inputs.Place(root, tmp_path)
    rows = [{"text": text, "label": ("positive", "negative")[n % 2]} for n, text in enumerate(TEXTS.values())]
    (tmp_path / "data").mkdir()
    for split in ("train", "validation", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text(inputs.jsonl(*rows))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(place.settings))
    said = inputs.say("train", tmp_path / "run.yaml", "--set", f"data.source={tmp_path / 'data'}", "--json")
    assert said.code == 0, said.err
    written = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().split("\n") if line]
    assert [row["gold"] for row in written] == [row["label"] for row in rows]
    said = inputs.say("predict", tmp_path / "out", "--", *TEXTS.values())
    assert said.code == 0, said.err
    # a line for each, whatever line breaks the text has, and its words unchanged
    lines = said.out.split("\n")[:-1]
    assert len(lines) == len(TEXTS)
    assert [line.split("\t")[2] for line in lines] == [" ".join(text.split()) for text in TEXTS.values()]
    said = inputs.say("predict", tmp_path / "out", "--json", "--", *TEXTS.values())
    assert said.out.isascii()
    assert len(said.json["predictions"]) == len(TEXTS)


def test_labels_and_words_may_be_any_text_too(root: Path, tmp_path: Path) -> None:
    place = inputs.Place(root, tmp_path)
    labels = {"\u597d": "good", "cafe\u0301 \U0001f44d\U0001f3fd": "bad"}
    (tmp_path / "train.jsonl").write_text(inputs.jsonl(*({"text": "a cat", "label": label} for label in labels)) * 4)
    values = {**place.settings, "data": {"source": str(tmp_path / "train.jsonl"), "max_length": 40}}
    values["task"] = {**values["task"], "labels": labels, "template": "\u00ab{text}\u00bb \U0001f914 {mask}"}
    result = promptuary.train(promptuary.load_run(values))
    again = promptuary.load_prompt(result.dir)
    assert again.task.settled() == result.prompt.task.settled()
    assert set(again.predict(["a dog"])[0].scores) == set(labels)
    assert promptuary.load_run(result.dir / "run.yaml").task.model_dump()["labels"] == labels


@pytest.mark.parametrize("name", HALVES)
def test_half_a_character_is_refused_and_never_changed(name: str, tuned: Tuned, root: Path, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": HALVES[name]}) + "\n")
    said = inputs.say("predict", root / "trained-masked", "--data", tmp_path / "x.jsonl")
    assert said.code == 2
    assert said.err.startswith("error: x.jsonl line 1: text holds half a character")
    assert said.err.count("\n") == 1
    with pytest.raises(DataError, match="example 1: text holds half a character"):
        tuned.predict([HALVES[name]])


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.text(max_size=60))
def test_any_text_at_all_is_answered_or_refused_in_one_line(text: str, tuned: Tuned) -> None:
    broken = any("\ud800" <= character <= "\udfff" for character in text)
    if text.strip() and not broken:
        assert sum(tuned.predict([text])[0].scores.values()) == pytest.approx(1)
        return
    with pytest.raises(DataError) as caught:
        tuned.predict([text])
    assert str(caught.value).isprintable()


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20), min_size=1, max_size=3)
)
def test_any_text_at_all_comes_back_from_every_file(rows: list[str], tmp_path: Path) -> None:
    expected = [{"text": text, "label": "a"} for text in rows]
    for path in in_both_formats(tmp_path, expected):
        assert read_examples(path) == expected, path.name
