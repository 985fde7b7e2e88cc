"""Gates with the distribution that they claim, weights that add up, and mixtures that fold.

Knows no method and no model.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from promptuary.prompts.routing import log_gates, mixed, mixture_weights
from promptuary.seeds import seeded


def drawn(logit: float, temperature: float = 1.0, count: int = 100_000) -> Tensor:
    return log_gates(torch.full((count,), logit), seeded(0), temperature).exp()


# ---- gates -------------------------------------------------------------------------------------------------------


def test_without_chance_a_gate_is_the_sigmoid_whatever_the_temperature() -> None:
    logits = torch.linspace(-30, 30, 13)
    for temperature in (0.1, 1.0, 5.0):
        torch.testing.assert_close(log_gates(logits, temperature=temperature).exp(), logits.sigmoid())
    assert bool(log_gates(torch.tensor([-200.0])).isfinite())


def test_a_gate_of_logit_zero_is_uniform() -> None:
    gates = drawn(0.0)
    assert float(gates.mean()) == pytest.approx(0.5, abs=0.005)
    assert float(gates.var()) == pytest.approx(1 / 12, abs=0.001)
    shares = torch.histc(gates, bins=10, min=0, max=1) / len(gates)
    assert shares.tolist() == pytest.approx([0.1] * 10, abs=0.005)


def test_a_gate_of_logit_two_is_mostly_open() -> None:
    gates = drawn(2.0)
    assert float(gates.mean()) == pytest.approx(0.794, abs=0.005)
    assert float((gates > 0.5).float().mean()) == pytest.approx(0.881, abs=0.005)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 3.0])
def test_how_often_a_gate_opens_does_not_depend_on_the_temperature(temperature: float) -> None:
    opened = (drawn(1.0, temperature) > 0.5).float().mean()
    assert float(opened) == pytest.approx(1 / (1 + math.exp(-1)), abs=0.005)


def test_cold_gates_are_open_or_shut() -> None:
    gates = drawn(0.5, 0.01)
    assert float(((gates < 0.01) | (gates > 0.99)).float().mean()) > 0.95
    assert float(((drawn(0.5, 1.0) < 0.01) | (drawn(0.5, 1.0) > 0.99)).float().mean()) < 0.05


def test_the_gradient_of_a_drawn_gate_is_that_of_its_formula() -> None:
    logits = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    gates = log_gates(logits, seeded(3), 0.5).exp()
    gates.sum().backward()
    # d sigmoid(x / T) / dx = g (1 - g) / T
    torch.testing.assert_close(logits.grad, (gates * (1 - gates) / 0.5).detach())


def test_the_same_generator_draws_the_same_in_every_precision() -> None:
    logits = torch.linspace(-2, 2, 9)
    wanted = log_gates(logits, seeded(1))
    torch.testing.assert_close(log_gates(logits, seeded(1)), wanted, rtol=0, atol=0)
    torch.testing.assert_close(log_gates(logits.double(), seeded(1)).float(), wanted)
    assert not torch.equal(log_gates(logits, seeded(2)), wanted)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_none_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        log_gates(torch.zeros(2), temperature=temperature)


# ---- weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.0, -25.0, -40.0, -1000.0, 40.0])
def test_weights_are_positive_and_add_up_however_small_the_gates(level: float) -> None:
    weights = mixture_weights(log_gates(torch.tensor([level, level + 1, level - 1])))
    assert float(weights.sum()) == pytest.approx(1, abs=1e-6)
    assert bool((weights > 0).all())


def test_an_epsilon_lets_small_gates_vanish_together() -> None:
    found = [
        float(mixture_weights(log_gates(torch.full((8,), level, dtype=torch.float64)), epsilon=1e-12).sum())
        for level in (0.0, -25.0, -40.0)
    ]
    # sum / (sum + 1e-12), as MP2's release has it
    assert found == pytest.approx([8 * p / (8 * p + 1e-12) for p in (0.5, math.exp(-25), math.exp(-40))], rel=1e-6)
    assert found[1] == pytest.approx(0.99, abs=0.002)
    assert found[2] < 1e-4


def test_equal_gates_give_the_mean_and_one_that_stands_out_takes_nearly_all() -> None:
    assert mixture_weights(log_gates(torch.full((8,), -0.3))).tolist() == pytest.approx([1 / 8] * 8)
    weights = mixture_weights(log_gates(torch.tensor([5.0] + [-5.0] * 7)))
    assert float(weights[0]) == pytest.approx(0.955, abs=1e-3)
    # sigmoid(2) against seven sigmoid(0)
    assert float(mixture_weights(log_gates(torch.tensor([2.0] + [0.0] * 7)))[0]) == pytest.approx(0.201, abs=1e-3)


def test_weights_of_drawn_gates_differ_from_those_of_mean_gates() -> None:
    logits = torch.tensor([2.0] + [0.0] * 7).expand(50_000, 8)
    weights = mixture_weights(log_gates(logits, seeded(0)))
    assert float(weights[:, 0].mean()) == pytest.approx(0.189, abs=2e-3)


def test_hard_weights_are_shares_of_the_open_gates() -> None:
    gates = torch.tensor([[0.9, 0.6, 0.2], [0.1, 0.3, 0.2], [0.4, 0.2, 0.51]]).log()
    found = mixture_weights(gates, hard=True)
    assert torch.equal(found, torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))


def test_hard_weights_have_the_gradient_of_soft_ones() -> None:
    gradients = []
    for hard in (True, False):
        logits = torch.tensor([1.0, -0.5, 0.2], requires_grad=True)
        weights = mixture_weights(log_gates(logits, seeded(4)), hard=hard)
        (weights * torch.tensor([1.0, -2.0, 3.0])).sum().backward()
        assert logits.grad is not None
        gradients.append(logits.grad)
    assert bool(gradients[0].abs().min() > 0)
    assert torch.equal(*gradients)


# ---- mixtures ----------------------------------------------------------------------------------------------------


def test_mixing_and_mapping_commute_so_a_mixture_folds() -> None:
    generator = seeded(0)
    small = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    wide = torch.randn(5, 3 * 4, generator=generator, dtype=torch.float64)
    weights = mixture_weights(log_gates(torch.randn(8, generator=generator, dtype=torch.float64)))
    first_mixed = (mixed(weights, small) @ wide).view(3, 4)
    first_mapped = mixed(weights, (small @ wide).view(8, 3, 4))
    torch.testing.assert_close(first_mixed, first_mapped, rtol=1e-13, atol=1e-13)


def test_equal_modules_give_that_module_for_every_router() -> None:
    module = torch.randn(3, 4, generator=seeded(0))
    for seed in range(5):
        weights = mixture_weights(log_gates(5 * torch.randn(8, generator=seeded(seed))))
        torch.testing.assert_close(mixed(weights, module.expand(8, 3, 4)), module, rtol=0, atol=1e-6)


def test_a_single_module_is_itself_for_every_router() -> None:
    module = torch.randn(1, 3, 4, generator=seeded(0))
    for logit in (-100.0, 0.0, 7.0):
        assert torch.equal(mixed(mixture_weights(log_gates(torch.tensor([logit]))), module), module[0])


def test_each_row_may_have_its_own_router() -> None:
    modules = torch.randn(4, 2, 3, generator=seeded(0))
    weights = mixture_weights(log_gates(torch.randn(5, 4, generator=seeded(1))))
    found = mixed(weights, modules)
    assert found.shape == (5, 2, 3)
    for row in range(5):
        torch.testing.assert_close(found[row], mixed(weights[row], modules))


def test_a_router_recovers_the_modules_that_made_a_prompt() -> None:
    modules = torch.randn(8, 20, 6, generator=seeded(0))
    goal = (modules[2] + modules[5]) / 2
    logits = torch.zeros(8, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for step in range(200):
        optimizer.zero_grad()
        weights = mixture_weights(log_gates(logits, seeded(7, step)))
        (mixed(weights, modules) - goal).pow(2).mean().backward()
        optimizer.step()
    with torch.no_grad():
        found = mixture_weights(log_gates(logits))
    assert float(found[2] + found[5]) > 0.9
