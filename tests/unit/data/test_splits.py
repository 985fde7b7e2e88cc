"""Choices among rows: seeded, complete, without overlap, and those of the published protocol.

Knows no file.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from promptuary.data.splits import carve, complete, follow_protocol, halve, k_shot, sample, split_hash
from promptuary.errors import DataError

ROWS = [{"text": f"text {number}", "label": "abc"[number % 3]} for number in range(30)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def label(row: dict[str, str]) -> str:
    return row["label"]


def test_k_shot_takes_k_of_each_label_and_gives_back_the_others() -> None:
    chosen, others = k_shot(ROWS, 4, label, seeded())
    assert Counter(map(label, chosen)) == {"a": 4, "b": 4, "c": 4}
    assert sorted([*chosen, *others], key=ROWS.index) == ROWS
    assert chosen == sorted(chosen, key=ROWS.index)


def test_same_generator_state_gives_the_same_rows_and_another_gives_others() -> None:
    assert k_shot(ROWS, 4, label, seeded(1)) == k_shot(ROWS, 4, label, seeded(1)) != k_shot(ROWS, 4, label, seeded(2))
    assert sample(ROWS, 9, seeded(1)) == sample(ROWS, 9, seeded(1)) != sample(ROWS, 9, seeded(2))


def test_every_row_has_the_same_chance() -> None:
    generator = seeded()
    hits = Counter(row["text"] for _ in range(600) for row in k_shot(ROWS, 2, label, generator)[0])
    assert len(hits) == len(ROWS)
    # 600 draws of 2 out of 10: 120 expected, standard deviation below 10
    assert all(80 < count < 160 for count in hits.values())


def test_a_label_with_too_few_rows_is_named() -> None:
    with pytest.raises(DataError, match=r"expected 11 rows of each label, but label 'a' has 10; lower data\.shots"):
        k_shot(ROWS, 11, label, seeded())


def test_an_expected_label_that_is_absent_is_named() -> None:
    with pytest.raises(DataError, match="label 'd' has 0"):
        k_shot(ROWS, 1, label, seeded(), expected="d")


def test_a_sample_larger_than_the_data_is_refused() -> None:
    with pytest.raises(DataError, match="expected 31 rows to choose, but there are 30"):
        sample(ROWS, 31, seeded())
    assert sample(ROWS, 30, seeded()) == (ROWS, [])


@given(st.integers(2, 60), st.data())
def test_the_parts_of_a_cut_hold_every_row_once(size: int, data: st.DataObject) -> None:
    rows, count = list(range(size)), data.draw(st.integers(0, size - 1))
    for first, second in (halve(rows), carve(rows, count), sample(rows, count, seeded(count))):
        assert sorted([*first, *second]) == rows
    assert len(halve(rows)[0]) == size // 2
    assert len(carve(rows, count)[0]) == count


def test_the_protocol_cuts_at_torchs_permutation_of_seed_42() -> None:
    # ATTEMPT, MPT and DePT take the first n // 2 (or 1000) of torch.randperm with seed 42 for validation
    order = torch.randperm(57, generator=seeded(42)).tolist()
    assert halve(list(range(57))) == (order[:28], order[28:])
    assert carve(list(range(57)), 10) == (order[:10], order[10:])


def test_the_protocol_needs_rows_enough() -> None:
    with pytest.raises(DataError, match="at least 2 rows"):
        halve([1])
    with pytest.raises(DataError, match="expected more than 10 rows"):
        carve(list(range(10)), 10)
    with pytest.raises(DataError, match="train: expected more than 1000 rows"):
        follow_protocol("carve_train", {"train": ROWS, "validation": ROWS})


def test_a_protocol_without_validation_names_what_to_set() -> None:
    with pytest.raises(DataError, match=r"halve_validation needs a validation split.*set data\.validation"):
        follow_protocol("halve_validation", {"train": ROWS})


def test_few_shot_without_validation_takes_other_training_rows() -> None:
    splits, notes = complete({"train": ROWS, "test": ROWS[:1]}, 4, label, seeded())
    assert Counter(map(label, splits["validation"])) == {"a": 4, "b": 4, "c": 4}
    assert not [row for row in splits["train"] if row in splits["validation"]]
    assert notes == ["no validation file: its rows were chosen per label among the other training rows"]


def test_few_shot_validation_never_lacks_a_training_label() -> None:
    rows = [*ROWS, {"text": "rare", "label": "d"}]
    with pytest.raises(DataError, match="validation: expected 1 rows of each label, but label 'd' has 0"):
        complete({"train": rows, "test": ROWS}, 1, label, seeded())


def test_a_validation_that_serves_as_test_is_whole_there() -> None:
    splits, notes = complete({"train": ROWS, "validation": ROWS[:9]}, 2, label, seeded())
    assert len(splits["validation"]) == 6
    assert splits["test"] == ROWS[:9]
    assert "test scores are scores on validation" in notes[0]


def test_the_hash_sees_content_order_origin_and_split() -> None:
    first = ("train", 1, {"text": "é", "label": "a"})
    second = ("train", 2, {"text": "b", "label": "a"})
    hashes = [
        split_hash({"train": [first, second], "test": []}),
        split_hash({"train": [second, first], "test": []}),
        split_hash({"train": [first], "test": [second]}),
        split_hash({"train": [first, ("train", 3, second[2])], "test": []}),
        split_hash({"train": [first, ("test", 2, second[2])], "test": []}),
        split_hash({"train": [first, ("train", 2, {"text": "c", "label": "a"})], "test": []}),
    ]
    assert len(set(hashes)) == len(hashes)
    assert {len(name) for name in hashes} == {16}
    assert hashes[0] == split_hash({"train": [("train", 1, {"label": "a", "text": "é"}), second], "test": []})


# ---- VTAB-1k --------------------------------------------------------------------------------------------------------

MANY = [{"text": f"text {number}", "label": "abc"[number % 3]} for number in range(1200)]


def test_vtab_trains_on_800_and_in_the_end_on_the_same_1000() -> None:
    tuning, note = follow_protocol("vtab", {"train": MANY, "test": ROWS})
    final, final_note = follow_protocol("vtab_full", {"train": MANY, "test": ROWS})
    assert [len(tuning[name]) for name in ("train", "validation", "test")] == [800, 200, 30]
    assert len({row["text"] for row in (*tuning["train"], *tuning["validation"])}) == 1000
    assert final["train"] == [*tuning["train"], *tuning["validation"]]
    assert (final["validation"], final["test"]) == (tuning["validation"], ROWS)
    assert note == "800 training and 200 validation rows out of 1200 (seed 42); the official test rows as test"
    assert "scores on these say nothing" in final_note


def test_vtab_takes_the_official_validation_as_test_where_there_is_no_other() -> None:
    found, note = follow_protocol("vtab", {"train": MANY, "validation": ROWS})
    assert found["test"] == ROWS
    assert note.endswith("the official validation rows as test")


def test_vtab_needs_a_thousand_rows_and_a_test_split() -> None:
    with pytest.raises(DataError, match="train: expected at least 1000 rows for data.protocol=vtab, but there are 30"):
        follow_protocol("vtab", {"train": ROWS, "test": ROWS})
    with pytest.raises(DataError, match="needs a test split"):
        follow_protocol("vtab_full", {"train": MANY})


def test_validation_may_have_fewer_shots() -> None:
    found, _ = complete({"train": MANY}, 16, label, seeded(), validation_shots=4)
    assert Counter(map(label, found["train"])) == dict.fromkeys("abc", 16)
    assert Counter(map(label, found["validation"])) == dict.fromkeys("abc", 4)
