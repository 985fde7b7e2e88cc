"""The bundled demo set is what its card says."""

from __future__ import annotations

import json
import re
from collections import Counter
from importlib import resources

import pytest
import torch

from promptuary.data.load import DataConfig, load

FOLDER = resources.files("promptuary.data").joinpath("demo")


def split(name: str) -> list[dict[str, str]]:
    lines = FOLDER.joinpath(f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower()))


def test_every_intent_has_62_messages_split_32_10_20() -> None:
    for name, count in (("train", 32), ("validation", 10), ("test", 20)):
        counts = Counter(row["label"] for row in split(name))
        assert len(counts) == 16
        assert set(counts.values()) == {count}


@pytest.mark.parametrize(("one", "other"), [("train", "test"), ("train", "validation"), ("validation", "test")])
def test_no_message_of_one_split_resembles_one_of_another(one: str, other: str) -> None:
    others = [words(row["text"]) for row in split(other)]
    for row in split(one):
        mine = words(row["text"])
        assert max(len(mine & theirs) / len(mine | theirs) for theirs in others) <= 0.5, row["text"]


def test_messages_are_varied_and_clean() -> None:
    rows = [row for name in ("train", "validation", "test") for row in split(name)]
    assert len({row["text"].lower() for row in rows}) == len(rows)
    openings = Counter(" ".join(row["text"].lower().split()[:4]) for row in rows if len(row["text"].split()) > 4)
    assert openings.most_common(1)[0][1] <= 5
    assert not [row for row in rows if re.search(r"@|https?:|\d{9}", row["text"])]
    assert all(row["text"] == " ".join(row["text"].split()) for row in rows)


def test_the_demo_loads_by_name_and_the_card_is_in_the_package() -> None:
    splits = load(DataConfig(source="demo"), ("text", "label"), torch.Generator())
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (512, 160, 320)
    assert "CC0" in FOLDER.joinpath("README.md").read_text(encoding="utf-8")
