"""The vocabulary: what a prompt refuses to be, and what choosing rows of a batch keeps together.

Knows no model.
"""

from __future__ import annotations

import pytest
import torch

from promptuary.errors import NotFoldable
from promptuary.types import Batch, Candidates, Offset, Prompt

ROWS = torch.arange(6.0).view(1, 2, 3)
ZERO = Offset(torch.zeros(4, 2), torch.ones(2, 3))
TABLE = Offset(torch.ones(4, 2), torch.ones(2, 3))


def test_a_static_prompt_is_its_rows() -> None:
    assert torch.equal(Prompt(rows=ROWS).as_rows(), ROWS[0])
    assert torch.equal(Prompt(rows=ROWS, offset=ZERO).as_rows(), ROWS[0])


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        (Prompt(rows=ROWS, offset=TABLE), "position-wise table"),
        (Prompt(), "no rows"),
        (Prompt(offset=ZERO), "no rows"),
        (Prompt(rows=ROWS.expand(3, -1, -1)), "depend on the input"),
    ],
    ids=["offset", "nothing", "zero offset alone", "per example"],
)
def test_what_is_not_a_static_prompt_is_refused_with_the_reason(prompt: Prompt, reason: str) -> None:
    with pytest.raises(NotFoldable, match=reason):
        prompt.as_rows()


def test_length_and_sites_say_what_is_there() -> None:
    assert (Prompt().length, Prompt().sites) == (0, frozenset())
    assert (Prompt(rows=ROWS).length, Prompt(rows=ROWS).sites) == (2, {"input"})
    assert (Prompt(offset=TABLE).length, Prompt(rows=ROWS, offset=TABLE).sites) == (0, {"input", "offset"})


def test_an_offset_is_zero_only_if_its_product_is() -> None:
    assert ZERO.is_zero()
    assert Offset(torch.ones(4, 2), torch.zeros(2, 3)).is_zero()
    assert not TABLE.is_zero()
    assert torch.equal(TABLE.table(), torch.full((4, 3), 2.0))
    # 1 - 1: neither factor is zero, the table is
    assert Offset(torch.ones(4, 2), torch.tensor([[1.0] * 3, [-1.0] * 3])).is_zero()
    small = torch.zeros(4, 2)
    small[3, 1] = -1e-30
    assert not Offset(small, torch.ones(2, 3)).is_zero()


def test_a_table_that_is_not_finite_is_not_zero() -> None:
    assert not Offset(torch.full((4, 2), torch.nan), torch.ones(2, 3)).is_zero()


def batch() -> Batch:
    each = torch.arange(3)
    return Batch(
        input_ids=each[:, None] + torch.arange(4) * 10,
        attention_mask=torch.ones(3, 4, dtype=torch.long),
        index=each + 100,
        segment_ids=each[:, None].expand(3, 4),
        plain=(each == 1)[:, None].expand(3, 4),
        slots={"mask": each + 1, "prompt": each},
        target=each.float(),
        target_ids=each[:, None] * torch.ones(3, 2, dtype=torch.long),
        candidates=Candidates(each[:, None, None].expand(3, 2, 1), torch.ones(3, 2, 1, dtype=torch.bool)),
        prompt_index=each,
    )


def test_rows_of_a_batch_stay_together_in_the_given_order_and_may_repeat() -> None:
    chosen = torch.tensor([2, 0, 2, 1])
    whole, picked = batch(), batch().rows(chosen)
    assert len(picked) == 4
    for name in (
        "input_ids",
        "attention_mask",
        "index",
        "segment_ids",
        "plain",
        "target",
        "target_ids",
        "prompt_index",
    ):
        assert torch.equal(getattr(picked, name), getattr(whole, name)[chosen]), name
    assert {name: value.tolist() for name, value in picked.slots.items()} == {
        "mask": [3, 1, 3, 2],
        "prompt": [2, 0, 2, 1],
    }
    assert picked.candidates is not None
    assert picked.candidates.ids[:, 0, 0].tolist() == [2, 0, 2, 1]


def test_shared_candidates_are_not_cut_by_rows() -> None:
    shared = Candidates(torch.tensor([[5], [6], [7]]), torch.ones(3, 1, dtype=torch.bool))
    picked = Batch(torch.ones(2, 1), torch.ones(2, 1), torch.arange(2), candidates=shared).rows(torch.tensor([1]))
    assert not shared.per_row
    assert picked.candidates is shared
    assert picked.target is None
    assert batch().candidates.per_row


def test_moving_a_batch_moves_everything_in_it() -> None:
    moved = batch().to(torch.device("meta"))
    assert moved.candidates is not None
    assert moved.target is not None
    devices = {moved.input_ids.device, moved.index.device, moved.slots["mask"].device, moved.candidates.ids.device}
    assert devices == {torch.device("meta")} == {moved.candidates.mask.device, moved.target.device}
