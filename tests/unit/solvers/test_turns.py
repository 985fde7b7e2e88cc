"""Solvers that take turns: what each changes, where they meet, and going on exactly.

Knows no method and no model: a stretched bowl.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from promptuary.errors import ConfigError
from promptuary.methods.base import Group
from promptuary.solvers.base import Job, Solver
from promptuary.solvers.evolution import EvolutionConfig, EvolutionSolver
from promptuary.solvers.turns import Turns
from promptuary.types import Batch, Losses

BATCH = Batch(torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1, dtype=torch.long), torch.arange(3))


class Bowl:
    """A bowl over three tensors of three numbers; no call may ask for a gradient."""

    def __init__(self) -> None:
        self.values = [nn.Parameter(torch.zeros(3).double()) for _ in range(3)]
        self.goals = [torch.tensor([1.0, -2.0, 0.5]).double() * (place + 1) for place in range(3)]
        self.calls = 0

    def weight(self, batch: Batch) -> int:
        return len(batch)

    def loss(self, batch: Batch) -> Losses:
        assert not torch.is_grad_enabled()
        self.calls += 1
        parts = [(value - goal).pow(2).sum() for value, goal in zip(self.values, self.goals, strict=True)]
        return Losses(torch.stack(parts).sum())

    def state(self) -> list[Tensor]:
        return [value.detach().clone() for value in self.values]


def search(bowl: Bowl, apart: bool | None = None, advice: Mapping[str, object] | None = None) -> Solver:
    groups = [Group(f"layer_{place}", value, 0.0, 0.0) for place, value in enumerate(bowl.values)]
    config = EvolutionConfig(population=6, sigma=0.5, apart=apart)
    return EvolutionSolver.of(config, Job(groups, 10, seed=3, advice=advice or {}))


def go(solver: Solver, bowl: Bowl, steps: int) -> None:
    for _ in range(steps):
        solver.step(bowl, [BATCH], 3)


def test_each_step_moves_one_tensor_and_the_next_step_the_next() -> None:
    bowl = Bowl()
    solver = search(bowl, apart=True)
    assert isinstance(solver, Turns)
    seen = set()
    for step in range(12):
        before = bowl.state()
        assert solver.step(bowl, [BATCH], 3).calls == 6
        changed = {place for place in range(3) if not torch.equal(bowl.values[place], before[place])}
        assert changed <= {step % 3}
        seen |= changed
    assert seen == {0, 1, 2}
    assert bowl.calls == 12 * 6


def test_all_of_them_get_where_they_should() -> None:
    bowl = Bowl()
    go(search(bowl, apart=True), bowl, 240)
    for value, goal in zip(bowl.values, bowl.goals, strict=True):
        torch.testing.assert_close(value.detach(), goal, atol=0.02, rtol=0)


def test_the_method_may_ask_for_it_and_the_settings_have_the_last_word() -> None:
    assert isinstance(search(Bowl()), EvolutionSolver)
    assert isinstance(search(Bowl(), True), Turns)
    assert isinstance(search(Bowl(), None, {"apart": True}), Turns)
    assert isinstance(search(Bowl(), False, {"apart": True}), EvolutionSolver)


def test_each_search_draws_its_own() -> None:
    solver = search(Bowl(), apart=True)
    assert isinstance(solver, Turns)
    first, second, _ = (one._drawn() for one in solver.solvers if isinstance(one, EvolutionSolver))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("stop", [0, 1, 4, 9])
def test_it_goes_on_bit_for_bit_with_the_one_whose_turn_it_was(stop: int) -> None:
    whole, parts = Bowl(), Bowl()
    solver = search(whole, apart=True)
    go(solver, whole, 12)
    begun = search(parts, apart=True)
    go(begun, parts, stop)
    tensors, numbers = begun.state()
    resumed = search(parts, apart=True)
    resumed.restore(tensors, json.loads(json.dumps(numbers, allow_nan=False)))
    go(resumed, parts, 12 - stop)
    assert all(torch.equal(one, two) for one, two in zip(whole.values, parts.values, strict=True))


def test_a_state_from_before_the_steps_that_went_wrong_keeps_the_turn_of_the_run() -> None:
    bowl = Bowl()
    solver = search(bowl, apart=True)
    go(solver, bowl, 3)
    state = solver.state()
    go(solver, bowl, 2)
    solver.restore(*state)
    assert isinstance(solver, Turns)
    assert solver.turn == 0
    solver.seek(5)
    assert solver.turn == 2
    before = bowl.state()
    go(solver, bowl, 1)
    assert all(torch.equal(one, two) for one, two in zip(before[:2], bowl.state()[:2], strict=True))


def test_all_of_them_slow_down() -> None:
    bowl = Bowl()
    solver = search(bowl, apart=True)
    solver.slow_down(0.5)
    for _ in range(3):
        assert solver.rates() == {"sigma": 0.25}
        solver.seek(1)


def test_a_state_of_one_search_is_not_one_of_several() -> None:
    one, several = search(Bowl(), apart=False), search(Bowl(), apart=True)
    with pytest.raises(ConfigError, match=r"of 1 searches and these are 3.*solver\.apart"):
        several.restore(*one.state())
