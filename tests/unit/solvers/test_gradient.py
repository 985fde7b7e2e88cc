"""Gradient descent: rates by formula, clipping, cutting a batch in parts, the guard against NaN, and exact resuming.

Knows no backbone: what is learnt is a small least-squares problem.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from promptuary.errors import Interrupted
from promptuary.methods.base import Group
from promptuary.solvers.gradient import GradientSolver
from promptuary.types import Batch, Losses


class Squares:
    """Mean squared distance of `inputs @ matrix + bias` from the sum of the inputs."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.parameters = (nn.Parameter(torch.randn(4, 3, generator=generator)), nn.Parameter(torch.zeros(3)))
        self.groups = [Group("weight", self.parameters[0], 0.1, 0.01), Group("bias", self.parameters[1], 0.02, 0.0)]

    def weight(self, batch: Batch) -> int:
        return len(batch)

    def loss(self, batch: Batch) -> Losses:
        assert batch.target is not None
        error = batch.input_ids.float() @ self.parameters[0] + self.parameters[1] - batch.target[:, None]
        total = error.pow(2).mean(1).mean()
        return Losses(total, {"fit": float(total.detach())})


def batch(count: int = 7, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 4, generator=generator)
    return Batch(inputs, torch.ones(count, 4), torch.arange(count), target=inputs.sum(1))


def solver(made: Squares, **settings: Any) -> GradientSolver:
    plain = {"optimizer": "adamw", "schedule": "constant", "steps": 20, "warmup": 0, "clip": 1.0}
    return GradientSolver(made.groups, **{**plain, **settings})


def cut(whole: Batch, size: int) -> list[Batch]:
    return [whole.rows(torch.arange(start, min(start + size, len(whole)))) for start in range(0, len(whole), size)]


FORMULAS: dict[str, Callable[[float], float]] = {
    "linear": lambda part: 1 - part,
    "cosine": lambda part: (1 + math.cos(math.pi * part)) / 2,
    "constant": lambda part: 1.0,
}


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("schedule", FORMULAS)
def test_rates_follow_the_formula_of_the_schedule(schedule: str, warmup: int) -> None:
    made = Squares()
    solving = solver(made, schedule=schedule, warmup=warmup)
    for step in range(20):
        part = step / warmup if step < warmup else FORMULAS[schedule]((step - warmup) / (20 - warmup))
        assert solving.rates() == {"weight": pytest.approx(0.1 * part), "bias": pytest.approx(0.02 * part)}
        assert solving.step(made, [batch(seed=step)], 7).applied
    assert solving.rates()["weight"] == pytest.approx(0.1 if schedule == "constant" else 0, abs=1e-12)


def test_the_first_step_of_adamw_is_the_rate_against_the_sign_and_decay_shrinks() -> None:
    made = Squares()
    before = [parameter.detach().clone() for parameter in made.parameters]
    solver(made, clip=1e9).step(made, [batch()], 7)
    (weight, bias), (was, zero) = made.parameters, before
    # the gradients are still there: b1 and b2 are corrected away, so g / |g|
    assert torch.allclose(bias, zero - 0.02 * bias.grad.sign(), atol=1e-6)
    assert torch.allclose(weight, was * (1 - 0.1 * 0.01) - 0.1 * weight.grad.sign(), atol=1e-5)


def test_sgd_moves_by_the_gradient_with_its_decay_and_nine_tenths_of_the_move_before() -> None:
    made = Squares()
    solving, moves = solver(made, optimizer="sgd", clip=1e9), [torch.zeros(()), torch.zeros(())]
    rates = ((0.1, 0.01), (0.02, 0.0))
    for seed in range(3):
        before = [parameter.detach().clone() for parameter in made.parameters]
        solving.step(made, [batch(seed=seed)], 7)
        # the gradients are still there
        for place, (was, now, (rate, decay)) in enumerate(zip(before, made.parameters, rates, strict=True)):
            moves[place] = 0.9 * moves[place] + now.grad + decay * was
            torch.testing.assert_close(now.detach(), was - rate * moves[place], rtol=0, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "sgd"])
def test_training_reaches_the_optimum(optimizer: str) -> None:
    made = Squares()
    solving = solver(made, optimizer=optimizer, schedule="linear", steps=400)
    losses = [solving.step(made, [batch(30)], 30).loss for _ in range(400)]
    assert losses[-1] < 0.01 * losses[0]


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_parts_of_any_size_give_the_step_of_the_whole_batch(size: int) -> None:
    whole, parts = Squares(), Squares()
    one = solver(whole).step(whole, [batch()], 7)
    other = solver(parts).step(parts, cut(batch(), size), 7)
    assert other.loss == pytest.approx(one.loss, rel=1e-6)
    assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)
    assert other.parts == pytest.approx(one.parts, rel=1e-6)
    for mine, theirs in zip(whole.parameters, parts.parameters, strict=True):
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-4, atol=1e-7)


def test_the_norm_of_all_gradients_together_is_clipped_and_reported_before() -> None:
    made, free = Squares(), Squares()
    taken = solver(made, clip=0.25).step(made, [batch()], 7)
    loose = solver(free, clip=1e9).step(free, [batch()], 7)
    norm = torch.sqrt(sum(parameter.grad.pow(2).sum() for parameter in free.parameters))
    assert taken.grad_norm == pytest.approx(float(norm), rel=1e-5)
    assert loose.grad_norm == taken.grad_norm > 0.25
    clipped = torch.sqrt(sum(parameter.grad.pow(2).sum() for parameter in made.parameters))
    assert float(clipped) == pytest.approx(0.25, rel=1e-4)


def test_processes_are_summed() -> None:
    made, whole = Squares(), Squares()
    halves = cut(batch(6), 3)
    other = Squares()
    # what a second process with the other half would add
    (other.loss(halves[1]).total * 0.5).backward()
    grads = [parameter.grad for parameter in other.parameters]
    extra = iter([other.loss(halves[1]).total.detach() * 0.5, torch.ones(len(grads)), *grads])

    def reduce(value: Tensor) -> Tensor:
        return value + next(extra)

    taken = solver(made).step(made, halves[:1], 6, reduce=reduce)
    assert taken.loss == pytest.approx(solver(whole).step(whole, [batch(6)], 6).loss, rel=1e-6)
    for mine, theirs in zip(made.parameters, whole.parameters, strict=True):
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(where: str) -> None:
    made = Squares()
    solving = solver(made, schedule="linear")
    solving.step(made, [batch()], 7)
    before = [parameter.detach().clone() for parameter in made.parameters]
    state = solving.state()
    wrong = batch()
    if where == "loss":
        wrong = replace(wrong, input_ids=wrong.input_ids * torch.nan)
    else:
        made.parameters[0].register_hook(lambda gradient: gradient * torch.inf)
    taken = solving.step(made, [batch(), wrong], 14)
    assert (taken.applied, taken.fault) == (False, where)
    assert all(torch.equal(was, now) for was, now in zip(before, made.parameters, strict=True))
    # a rate belongs to a step of the run, also if nothing came of that step
    assert solving.rates() == {"weight": pytest.approx(0.1 * 18 / 20), "bias": pytest.approx(0.02 * 18 / 20)}
    again = solving.state()
    assert again[1]["slots"] == state[1]["slots"]
    assert all(torch.equal(again[0][name], value) for name, value in state[0].items())


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "sgd"])
def test_an_update_that_overflows_is_taken_back_with_its_moments(optimizer: str) -> None:
    made = Squares()
    solving = solver(made, optimizer=optimizer)
    solving.step(made, [batch()], 7)
    before, state = [parameter.detach().clone() for parameter in made.parameters], solving.state()
    solving.slow_down(1e40)
    assert solving.step(made, [batch()], 7).fault == "update"
    assert all(torch.equal(was, now) for was, now in zip(before, made.parameters, strict=True))
    again = solving.state()
    assert again[1]["slots"] == state[1]["slots"]
    assert again[0].keys() == state[0].keys()
    assert all(torch.equal(again[0][name], value) for name, value in state[0].items())


def test_after_a_skipped_step_training_goes_on_as_if_nothing_had_been() -> None:
    made, other = Squares(), Squares()
    one, two = solver(made), solver(other)
    wrong = batch()
    one.step(made, [replace(wrong, input_ids=wrong.input_ids * torch.nan)], 7)
    for seed in range(3):
        one.step(made, [batch(seed=seed)], 7)
        two.step(other, [batch(seed=seed)], 7)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(made.parameters, other.parameters, strict=True))


def test_a_stop_between_parts_changes_nothing() -> None:
    made = Squares()
    solving = solver(made)
    solving.step(made, [batch()], 7)
    before = [parameter.detach().clone() for parameter in made.parameters]
    calls: list[int] = []

    def check() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise Interrupted("stopped")

    state = solving.state()
    with pytest.raises(Interrupted):
        solving.step(made, cut(batch(), 3), 7, check=check)
    assert all(torch.equal(was, now) for was, now in zip(before, made.parameters, strict=True))
    assert solving.state()[1] == state[1]


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "sgd"])
@pytest.mark.parametrize("schedule", FORMULAS)
def test_a_restored_solver_goes_on_bit_for_bit(optimizer: str, schedule: str) -> None:
    settings = {"optimizer": optimizer, "schedule": schedule, "warmup": 3}
    made = Squares()
    solving = solver(made, **settings)
    for seed in range(5):
        solving.step(made, [batch(seed=seed)], 7)
    solving.slow_down(0.5)
    kept = [parameter.detach().clone() for parameter in made.parameters]
    tensors, numbers = solving.state()
    for seed in range(5, 9):
        solving.step(made, [batch(seed=seed)], 7)
    other = Squares()
    again = solver(other, **settings)
    with torch.no_grad():
        for parameter, value in zip(other.parameters, kept, strict=True):
            parameter.copy_(value)
    again.restore(tensors, numbers)
    for seed in range(5, 9):
        again.step(other, [batch(seed=seed)], 7)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(made.parameters, other.parameters, strict=True))
    assert again.rates() == solving.rates()


def test_a_restored_solver_goes_back_to_its_rates() -> None:
    made = Squares()
    solving = solver(made, schedule="linear")
    solving.step(made, [batch()], 7)
    tensors, numbers = solving.state()
    rates = solving.rates()
    solving.slow_down(0.5)
    solving.step(made, [batch()], 7)
    solving.restore(tensors, numbers)
    assert solving.rates() == rates


def test_slowing_down_holds_for_the_rest_of_the_schedule() -> None:
    made, other = Squares(), Squares()
    slow, plain = solver(made, schedule="cosine"), solver(other, schedule="cosine")
    slow.slow_down(0.5)
    for _ in range(5):
        assert slow.rates() == {name: pytest.approx(rate / 2) for name, rate in plain.rates().items()}
        slow.step(made, [batch()], 7)
        plain.step(other, [batch()], 7)


def test_a_tensor_that_the_loss_does_not_touch_stays() -> None:
    made = Squares()
    alone = nn.Parameter(torch.ones(2))
    empty = nn.Parameter(torch.ones(0))
    made.groups = [*made.groups, Group("alone", alone, 0.1, 0.0), Group("empty", empty, 0.1, 0.0)]
    assert solver(made).step(made, [batch()], 7).applied
    assert alone.tolist() == [1.0, 1.0]
