"""What prompts of a policy are worth when each is scored on one row: who gets which row, and what is compared.

Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from promptuary.errors import ConfigError
from promptuary.solvers import soft_q
from promptuary.solvers.base import Tried
from promptuary.solvers.policy_rewards import Earned, dealt, on_all, on_one

CPU = torch.device("cpu")


class Sampled:
    """Maxima by text and row, out of a table; it notes what it was asked."""

    def __init__(self, maxima: Mapping[tuple[str, str], Sequence[float]], told: bool = True) -> None:
        self.maxima, self.told = maxima, told
        self.calls = list[tuple[tuple[str, ...], tuple[str, ...], int]]()

    def tried(
        self,
        texts: Sequence[str],
        examples: Sequence[Mapping[str, Any]],
        check: Callable[[], None] | None = None,
        draw: int = 0,
    ) -> Tried:
        names = [example["text"] for example in examples]
        self.calls.append((tuple(texts), tuple(names), draw))
        found = torch.tensor([[self.maxima[text, name] for name in names] for text in texts], dtype=torch.float64)
        return Tried(found.mean(-1), found.mean(-1) / 100, found if self.told else None)


def earn(words: Sampled, texts: Sequence[str], *rows: str, reduce: Callable[[Tensor], Tensor] | None = None) -> Earned:
    return on_one(words, texts, [{"text": row} for row in rows], 7, reduce, None, CPU)  # type: ignore[arg-type]


def test_rewards_of_a_row_are_compared_with_all_maxima_of_that_row() -> None:
    words = Sampled({("A", "x"): (80, 70), ("B", "x"): (60, 50)})
    found = earn(words, ["A", "B"], "x")
    assert found.reward.tolist() == [75, 55]
    assert found.score.tolist() == pytest.approx([0.75, 0.55])
    z = found.normalised(torch.tensor([0, 1]), 1e-4)
    # mean 65, deviation 11.1803 of the four maxima, not of the two rewards
    assert z.tolist() == pytest.approx([0.89442, -0.89442], abs=2e-5)
    shaped = soft_q.shaped(z, (-20.0, 80.0))
    assert shaped.tolist() == pytest.approx([69.442, -109.442], abs=2e-3)


def test_each_row_has_its_own_prompts_and_its_own_scale() -> None:
    words = Sampled({("A", "x"): (1, 3), ("B", "x"): (3, 5), ("C", "y"): (100, 300), ("D", "y"): (300, 500)})
    found = earn(words, ["A", "B", "C", "D"], "x", "y")
    assert words.calls == [(("A", "B"), ("x",), 7), (("C", "D"), ("y",), 7)]
    z = found.normalised(torch.arange(4), 1e-9)
    assert z.tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5] * 2, abs=1e-5)


def test_where_rewards_have_no_maxima_they_are_compared_themselves() -> None:
    found = earn(Sampled({("A", "x"): (1, 3), ("B", "x"): (5, 7)}, told=False), ["A", "B"], "x")
    assert found.normalised(torch.tensor([0, 1]), 1e-9).tolist() == pytest.approx([-1, 1], abs=1e-5)


def test_a_prompt_that_was_not_scored_has_no_say_in_the_scale() -> None:
    table = {("A", "x"): (80, 70), ("long", "x"): (-torch.inf, -torch.inf), ("B", "x"): (60, 50)}
    found = earn(Sampled(table), ["A", "long", "B"], "x")
    chosen = found.reward.isfinite().nonzero()[:, 0]
    assert chosen.tolist() == [0, 2]
    assert found.normalised(chosen, 1e-4).tolist() == pytest.approx([0.89442, -0.89442], abs=2e-5)


@pytest.mark.parametrize(
    ("prompts", "rows", "places"),
    [
        (8, 2, [0, 0, 0, 0, 1, 1, 1, 1]),
        (8, 1, [0] * 8),
        (7, 3, [0, 0, 0, 1, 1, 2, 2]),
        (3, 3, [0, 1, 2]),
    ],
)
def test_prompts_are_dealt_out_evenly(prompts: int, rows: int, places: list[int]) -> None:
    assert dealt(prompts, rows) == places


def test_fewer_prompts_than_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"solver.dealt: 2 prompts are fewer than the 3 rows of a batch"):
        dealt(2, 3)


def test_several_processes_are_refused() -> None:
    words = Sampled({("A", "x"): (1, 2)})
    with pytest.raises(ConfigError, match="need one process"):
        earn(words, ["A"], "x", reduce=lambda value: 2 * value)
    assert earn(words, ["A"], "x", reduce=lambda value: value).reward.tolist() == [1.5]


def test_on_all_rows_the_mean_counts_and_prompts_are_compared_among_themselves() -> None:
    words = Sampled({("A", "x"): (1, 1), ("A", "y"): (3, 3), ("B", "x"): (5, 5), ("B", "y"): (7, 7)})
    found = on_all(words, ["A", "B"], [{"text": "x"}, {"text": "y"}], 3, None, None, CPU)  # type: ignore[arg-type]
    assert words.calls == [(("A", "B"), ("x", "y"), 3)]
    assert found.reward.tolist() == [2, 6]
    assert found.normalised(torch.tensor([0, 1]), 1e-9).tolist() == pytest.approx([-1, 1], abs=1e-5)
