"""Augmentation: words are left out or change places, never more, never all; the same generator state, the same text.

Knows no model; what a run makes of it is at the end.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
import toy
from promptuary.config import load_run
from promptuary.data.augment import AugmentConfig, augmented, deleted, swapped
from promptuary.errors import ConfigError
from promptuary.listening import Listener
from promptuary.seeds import seeded
from promptuary.training import Training

BOTH = AugmentConfig(delete=0.3, swap=0.3)
TEXTS = st.lists(st.sampled_from(["a", "red", "sky", "über", "犬"]), max_size=12).map("  ".join)


@given(TEXTS, st.integers(0, 500))
def test_a_variant_holds_words_of_the_text_and_never_none(text: str, seed: int) -> None:
    found = augmented(text, BOTH, seeded(seed))
    assert not Counter(found.split()) - Counter(text.split())
    assert bool(found.split()) == bool(text.split())
    assert found == augmented(text, BOTH, seeded(seed))


@given(st.integers(1, 12), st.integers(0, 200), st.floats(0.9, 0.999))
def test_deleting_nearly_everything_keeps_a_word(count: int, seed: int, chance: float) -> None:
    words = [str(number) for number in range(count)]
    kept = deleted(words, chance, seeded(seed))
    assert kept
    assert kept == sorted(kept, key=int)


def test_words_are_deleted_as_often_as_asked() -> None:
    kept = sum(len(deleted(["w"] * 50, 0.1, seeded(seed))) for seed in range(200))
    assert kept / (200 * 50) == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize(("part", "moved"), [(0.01, 2), (0.2, 4)])
def test_swapping_moves_two_places_at_a_time(part: float, moved: int) -> None:
    words = [str(number) for number in range(10)]
    for seed in range(50):
        mixed = swapped(words, part, seeded(seed))
        assert sorted(mixed, key=int) == words
        assert 2 <= sum(one != other for one, other in zip(words, mixed, strict=True)) <= moved or part > 0.1


def test_the_text_itself_and_each_operation_are_equally_likely() -> None:
    text = " ".join(str(number) for number in range(40))
    kinds = Counter()
    for seed in range(900):
        found = augmented(text, BOTH, seeded(seed)).split()
        kinds["same" if found == text.split() else "swap" if len(found) == 40 else "delete"] += 1
    assert all(250 < kinds[name] < 350 for name in ("same", "swap", "delete"))


def test_off_is_the_default_and_values_out_of_range_are_refused(tmp_path: Path) -> None:
    assert not AugmentConfig().active
    with pytest.raises(ConfigError, match=r"data.augment.delete: .* less than 1"):
        load_run({**toy.settings(tmp_path), "data": {"source": "demo", "augment": {"delete": 1}}})
    with pytest.raises(ConfigError, match='unknown field data.augment.delte; did you mean "delete"'):
        load_run({**toy.settings(tmp_path), "data": {"source": "demo", "augment": {"delte": 0.1}}})


def training(where: Path, *overrides: str, family: str = "causal", task: str = "classify_words") -> Training:
    run = toy.run(where, *overrides, family=family, task=task, batch_size=4)
    return Training(run, Listener(), tiny.backbone(family))


ON = ("data.augment.delete=0.4", "data.augment.swap=0.4")


@pytest.mark.parametrize(
    ("family", "task"),
    [("causal", "classify_words"), ("masked", "regress_words"), ("masked", "choose"), ("seq2seq", "generate")],
)
def test_only_texts_of_the_training_split_change_and_each_epoch_anew(family: str, task: str, tmp_path: Path) -> None:
    plain, made = (training(tmp_path, *more, family=family, task=task) for more in ((), ON))
    assert made.feed.rows == plain.feed.rows
    tokenizer, changed, variants = made.backbone.tokenizer, 0, set[str]()
    for step in range(12):
        before, rows = plain.feed.at(step), made.feed.at(step)
        # the same examples in the same order, with the same answers, and a mask where there was one
        for one, row in zip(before, rows, strict=True):
            assert (row.index, row.target, row.target_ids, row.choices) == (
                one.index, one.target, one.target_ids, one.choices,
            )  # fmt: skip
            assert row.encoded.slots.keys() == one.encoded.slots.keys()
            assert not Counter(row.encoded.ids) - Counter(one.encoded.ids)
            changed += row.encoded.ids != one.encoded.ids
            if row.index == 0:
                variants.add(tokenizer.decode(row.encoded.ids))
    assert changed > 12
    assert len(variants) > 1


def test_fixed_words_of_the_template_and_label_words_stay(tmp_path: Path) -> None:
    made = training(tmp_path, "task.template='it was {text} so it was {mask}'", *ON)
    first, last = (made.backbone.text.plain_ids(words) for words in ("it was", "so it was"))
    for step in range(9):
        for row in made.feed.at(step):
            assert row.encoded.ids[: len(first) + 1][-len(first) :] == first or row.encoded.ids[: len(first)] == first
            assert row.encoded.ids[-len(last) :] == last


def test_a_step_is_the_same_whenever_it_is_asked_for_and_another_seed_differs(tmp_path: Path) -> None:
    made, other = training(tmp_path, *ON), training(tmp_path, *ON, "seed=1")
    torch.manual_seed(0)
    there = [made.feed.at(step) for step in range(7)]
    torch.manual_seed(1)
    back: list[Any] = [made.feed.at(step) for step in reversed(range(7))]
    assert there == back[::-1]
    texts = [{row.index: row.encoded.ids for step in range(3) for row in one.feed.at(step)} for one in (made, other)]
    assert texts[0] != texts[1]
