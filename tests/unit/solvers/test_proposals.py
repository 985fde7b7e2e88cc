"""A plain search: proposals in their order, the best on held-out examples kept, and a state that goes on.

Knows no method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

from promptuary.errors import ConfigError
from promptuary.solvers.base import Job, Tried
from promptuary.solvers.proposals import ProposalsConfig, ProposalsSolver
from promptuary.types import Batch


class Listed:
    """Texts with a reward on training and on held-out examples."""

    def __init__(self, worth: Mapping[str, tuple[float, float]]) -> None:
        self.worth, self.text = worth, ""
        self.examples: Sequence[Mapping[str, Any]] = [{"text": str(n)} for n in range(3)]
        self.held_out: Sequence[Mapping[str, Any]] = [{"text": "held"}]
        self.fields = ("text",)

    def proposal(self, number: int) -> str | None:
        return list(self.worth)[number] if number < len(self.worth) else None

    def tried(
        self, texts: Sequence[str], examples: Sequence[Mapping[str, Any]], check: Callable[[], None] | None = None
    ) -> Tried:
        side = int(examples is self.held_out)
        found = torch.tensor([[self.worth[text][side]] * len(examples) for text in texts])
        return Tried(found, found)


def solver(words: Listed, population: int) -> Any:
    return ProposalsSolver.of(ProposalsConfig(population=population), Job([], 10, 0, words=words))


BATCH = Batch(torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1, dtype=torch.long), torch.arange(3))


def run(one: Any) -> list[Any]:
    found = []
    while not one.done:
        found.append(one.step(None, [BATCH], 3.0))
    return found


def test_the_best_of_a_step_is_judged_on_held_out_examples() -> None:
    words = Listed({"a": (0.5, 0.2), "b": (0.9, 0.1), "c": (0.3, 0.9)})
    run(solver(words, 1))
    assert words.text == "c"
    words = Listed({"a": (0.5, 0.2), "b": (0.9, 0.1), "c": (0.3, 0.9)})
    run(solver(words, 3))
    assert words.text == "b"


def test_of_equals_the_first_stays() -> None:
    words = Listed({"a": (0.5, 0.2), "b": (0.5, 0.2)})
    run(solver(words, 1))
    assert words.text == "a"


def test_it_ends_where_nothing_more_is_proposed_and_counts_what_it_tried() -> None:
    words = Listed({name: (0.1, 0.1) for name in "abcde"})
    taken = run(solver(words, 2))
    assert [one.calls for one in taken] == [2, 2, 1]
    assert all(one.applied for one in taken)


def test_nothing_to_propose_leaves_the_text() -> None:
    words = Listed({})
    words.text = "as it was"
    run(solver(words, 4))
    assert words.text == "as it was"


def test_a_state_goes_on_as_it_would_have() -> None:
    worth = {"a": (0.5, 0.2), "b": (0.9, 0.5), "c": (0.3, 0.1), "d": (0.2, 0.5)}
    whole = Listed(worth)
    run(solver(whole, 1))
    first = solver(Listed(worth), 1)
    first.step(None, [BATCH], 3.0)
    first.step(None, [BATCH], 3.0)
    words = Listed(worth)
    second = solver(words, 1)
    second.restore(*first.state())
    run(second)
    assert words.text == whole.text == "b"


def test_vectors_have_no_words_to_look_for() -> None:
    with pytest.raises(ConfigError, match="looks for words"):
        ProposalsSolver.of(ProposalsConfig(), Job([], 10, 0))
