"""Padding keeps every row as it was, and an epoch holds every row once.

Knows no tokenizer.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import speed
from promptuary.data.collate import Row, batches, collate, pad_candidates
from promptuary.types import IGNORED, Encoded

PAD = 7
TOKENS = st.lists(st.integers(0, 50), min_size=1, max_size=9)


def row(ids: list[int], index: int = 0, **learnt: Any) -> Row:
    slots = {"mask": len(ids) - 1, "soft": 0}
    return Row(Encoded(ids, [place % 2 for place in range(len(ids))], slots), index, **learnt)


@given(st.lists(TOKENS, min_size=1, max_size=6))
def test_each_row_of_a_batch_is_itself_and_then_padding(texts: list[list[int]]) -> None:
    batch = collate([row(ids, 10 + place) for place, ids in enumerate(texts)], PAD, segments=True)
    assert batch.input_ids.shape == (len(texts), max(map(len, texts)))
    assert batch.segment_ids is not None
    for place, ids in enumerate(texts):
        assert batch.input_ids[place, : len(ids)].tolist() == ids
        assert batch.segment_ids[place, : len(ids)].tolist() == [column % 2 for column in range(len(ids))]
        assert (batch.input_ids[place, len(ids) :] == PAD).all()
        assert (batch.segment_ids[place, len(ids) :] == 0).all()
        assert batch.attention_mask[place].tolist() == [
            int(column < len(ids)) for column in range(batch.input_ids.shape[1])
        ]
        assert batch.input_ids[place, batch.slots["mask"][place]] == ids[-1]
    assert batch.index.tolist() == list(range(10, 10 + len(texts)))
    assert (batch.target, batch.target_ids, batch.candidates) == (None, None, None)


def test_a_model_without_segments_gets_none() -> None:
    assert collate([row([1])], PAD, segments=False).segment_ids is None


def test_classes_are_long_and_values_are_float() -> None:
    classes = collate([row([1], target=0), row([1], target=2)], PAD, segments=False).target
    values = collate([row([1], target=0), row([1], target=0.5)], PAD, segments=False).target
    assert classes is not None
    assert values is not None
    assert (classes.dtype, classes.tolist()) == (torch.long, [0, 2])
    assert (values.dtype, values.tolist()) == (torch.float32, [0.0, 0.5])


def test_answers_are_padded_with_what_no_loss_counts() -> None:
    batch = collate([row([1], target_ids=(3, 4)), row([1, 2], target_ids=(5,))], PAD, segments=False)
    assert batch.target_ids is not None
    assert batch.target_ids.tolist() == [[3, 4], [5, IGNORED]]


@given(st.lists(st.lists(TOKENS, min_size=1, max_size=4), min_size=1, max_size=4))
def test_every_row_keeps_its_own_choices(choices: list[list[list[int]]]) -> None:
    rows = [row([1], choices=tuple(map(tuple, own))) for own in choices]
    candidates = collate(rows, PAD, segments=False).candidates
    assert candidates is not None
    assert candidates.per_row
    assert candidates.ids.shape == candidates.mask.shape
    for place, own in enumerate(choices):
        real = [ids[mask].tolist() for ids, mask in zip(candidates.ids[place], candidates.mask[place], strict=True)]
        assert real == [*own, *[[]] * (candidates.ids.shape[1] - len(own))]


@given(st.lists(TOKENS, min_size=1, max_size=5))
def test_shared_candidates_are_padded_behind_a_mask(ids: list[list[int]]) -> None:
    candidates = pad_candidates(ids)
    assert not candidates.per_row
    assert [own[mask].tolist() for own, mask in zip(candidates.ids, candidates.mask, strict=True)] == ids


@pytest.mark.parametrize("learnt", [{"target": 1}, {"target_ids": (1,)}, {"choices": ((1,),)}])
def test_a_batch_of_labelled_and_unlabelled_rows_is_refused(learnt: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="every row of a batch or none"):
        collate([row([1], **learnt), row([1])], PAD, segments=False)


def test_rows_of_different_templates_are_refused() -> None:
    with pytest.raises(ValueError, match="same slots"):
        collate([row([1]), Row(Encoded([1], [0], {}), 1)], PAD, segments=False)


def test_nothing_cannot_be_padded() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        collate([], PAD, segments=False)
    with pytest.raises(ValueError, match="at least one candidate"):
        pad_candidates([])


LENGTHS = st.lists(st.integers(1, 40), max_size=80)


@given(LENGTHS, st.integers(1, 9), st.booleans(), st.booleans(), st.integers(1, 4))
def test_an_epoch_holds_every_row_once(
    lengths: list[int], size: int, bucket: bool, shuffled: bool, window: int
) -> None:
    generator = torch.Generator().manual_seed(0) if shuffled else None
    cut = batches(lengths, size, generator=generator, bucket=bucket, window=window)
    assert sorted(place for batch in cut for place in batch) == list(range(len(lengths)))
    assert all(1 <= len(batch) <= size for batch in cut)
    assert sum(len(batch) < size for batch in cut) <= 1
    assert len(cut) == -(-len(lengths) // size)


@given(LENGTHS, st.integers(1, 9))
def test_evaluation_takes_the_longest_rows_first(lengths: list[int], size: int) -> None:
    order = [lengths[place] for batch in batches(lengths, size, generator=None) for place in batch]
    assert order == sorted(lengths, reverse=True)


def test_without_buckets_and_chance_the_order_stands() -> None:
    assert batches([3, 1, 2], 2, generator=None, bucket=False) == [[0, 1], [2]]


def test_an_order_follows_from_the_generator_alone() -> None:
    def order(seed: int) -> list[list[int]]:
        return batches(list(range(1, 101)), 8, generator=torch.Generator().manual_seed(seed))

    assert order(0) == order(0) != order(1)


def test_buckets_save_padding_and_stay_random() -> None:
    lengths = torch.randint(1, 200, (640,), generator=torch.Generator().manual_seed(0)).tolist()

    def padded(bucket: bool) -> int:
        cut = batches(lengths, 16, generator=torch.Generator().manual_seed(0), bucket=bucket)
        return sum(len(batch) * max(lengths[place] for place in batch) for batch in cut)

    assert padded(True) < 0.7 * padded(False)
    firsts = [lengths[batch[0]] for batch in batches(lengths, 16, generator=torch.Generator().manual_seed(0))]
    assert firsts != sorted(firsts)
    assert firsts != sorted(firsts, reverse=True)


@pytest.mark.parametrize("profile", speed.PROFILES)
def test_texts_of_usual_lengths_are_hardly_padded(profile: str) -> None:
    lengths = speed.drawn(profile, 1000, 256)
    rows = [row([1] * length, place) for place, length in enumerate(lengths)]
    prompt, real, run, seen = 100, 0, 0, list[int]()
    for chosen in batches(lengths, 16, generator=torch.Generator().manual_seed(0)):  # buckets are what it does unasked
        batch = collate([rows[place] for place in chosen], PAD, segments=False)
        assert batch.input_ids.shape[1] == max(lengths[place] for place in chosen)
        run += batch.input_ids.numel() + prompt * len(batch)
        real += int(batch.attention_mask.sum()) + prompt * len(batch)
        seen += batch.index.tolist()
    assert sorted(seen) == list(range(1000))
    assert (run - real) / run <= 0.1


def test_a_batch_of_no_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0 and 8"):
        batches([1], 0, generator=None)
