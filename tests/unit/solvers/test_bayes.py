"""Bayesian optimisation: the process against one by hand, known optima, budgets, exact resuming, and faults.

Knows no method and no model: bowls.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import Matern
from torch import Tensor, nn

from promptuary.errors import ConfigError
from promptuary.methods.base import Group
from promptuary.seeds import seeded
from promptuary.solvers.base import Job
from promptuary.solvers.bayes import LENGTHS, BayesConfig, BayesSolver, posterior
from promptuary.types import Batch, Losses

BATCH = Batch(torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1, dtype=torch.long), torch.arange(3))


class Bowl:
    """A bowl over eight numbers in two tensors; no call may ask for a gradient."""

    def __init__(self, spoilt: float | None = None) -> None:
        self.values = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(1, 5))]
        self.goal = torch.tensor([3.0, -2.0, 1.0, 0.5, -4.0, 2.0, 0.0, -1.0])
        self.calls, self.spoilt, self.seen = 0, spoilt, list[Tensor]()

    @property
    def point(self) -> Tensor:
        return torch.cat([value.detach().flatten() for value in self.values])

    def weight(self, batch: Batch) -> int:
        return len(batch)

    def loss(self, batch: Batch) -> Losses:
        assert not torch.is_grad_enabled()
        self.calls += 1
        self.seen.append(self.point)
        total = (self.point - self.goal).square().mean()
        return Losses(total if self.spoilt is None or self.point[0] < 0 else total * self.spoilt)


def search(bowl: Bowl, steps: int = 10, **settings: object) -> BayesSolver:
    groups = [Group(f"part-{place}", value, 0.0, 0.0) for place, value in enumerate(bowl.values)]
    config = BayesConfig.model_validate({"population": 5, "initial": 6, **settings})
    found = BayesSolver.of(config, Job(groups, steps, seed=4))
    assert isinstance(found, BayesSolver)
    return found


def go(solver: BayesSolver, bowl: Bowl, steps: int) -> list[float]:
    return [solver.step(bowl, [BATCH], 3).loss for _ in range(steps)]


def test_the_process_meets_what_it_knows_and_is_unsure_elsewhere() -> None:
    known = torch.rand(12, 2, generator=seeded(1)).double()
    values = (known - 0.4).square().sum(1) * 7 + 3
    mean, deviation = posterior(known, values, known)
    torch.testing.assert_close(mean, values, atol=1e-3, rtol=0)
    assert float(deviation.max()) < 0.01 * float(values.std())
    _, away = posterior(known[:3], values[:3], torch.tensor([[9.0, 9.0]]).double())
    assert float(away) == pytest.approx(float(values[:3].std()), rel=0.01)
    between = torch.rand(50, 2, generator=seeded(2)).double() * 0.6 + 0.2
    guessed, _ = posterior(known, values, between)
    true = (between - 0.4).square().sum(1) * 7 + 3
    assert float((guessed - true).abs().mean()) < 0.25 * float(values.std())


def test_the_process_is_scikit_learns_with_the_likeliest_length() -> None:
    generator = torch.Generator().manual_seed(0)
    known, asked = torch.rand(12, 3, generator=generator).double(), torch.rand(5, 3, generator=generator).double()
    values = torch.sin(3 * known).sum(1)
    wanted = []
    for length in LENGTHS:
        kernel = Matern(length * math.sqrt(3), nu=2.5, length_scale_bounds="fixed")
        theirs = GaussianProcessRegressor(kernel, alpha=1e-6, optimizer=None)
        theirs.fit(known.numpy(), ((values - values.mean()) / values.std()).numpy())
        wanted.append((theirs.log_marginal_likelihood_value_, theirs.predict(asked.numpy(), return_std=True)))
    mean, deviation = max(wanted, key=lambda one: one[0])[1]
    found = posterior(known, values, asked)
    assert torch.allclose(found[0], values.mean() + values.std() * torch.from_numpy(mean), atol=1e-6)
    assert torch.allclose(found[1], values.std() * torch.from_numpy(deviation), atol=1e-6)


def test_it_comes_much_nearer_than_chance_with_the_same_calls() -> None:
    bowl = Bowl()
    found = min(go(search(bowl), bowl, 12))
    draws = torch.rand(60, 8, generator=seeded(3)) * 10 - 5
    chance = float((draws - bowl.goal).square().mean(1).min())
    assert found < 0.5 * chance
    assert found == pytest.approx(float((bowl.point - bowl.goal).square().mean()), rel=1e-5)


def test_every_call_is_counted_and_stays_in_the_box_and_the_start_is_the_first() -> None:
    bowl = Bowl()
    with torch.no_grad():
        bowl.values[0].fill_(0.25)
    start = bowl.point
    solver = search(bowl, bounds=(-1.0, 1.0))
    results = [solver.step(bowl, [BATCH], 3) for _ in range(4)]
    assert [one.calls for one in results] == [5] * 4
    assert bowl.calls == 20
    assert torch.equal(bowl.seen[0], start)
    assert all(float(point.abs().max()) <= 1 for point in bowl.seen)


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_it_goes_on_bit_for_bit(stop: int) -> None:
    whole, parts = Bowl(), Bowl()
    go(search(whole), whole, 6)
    begun = search(parts)
    go(begun, parts, stop)
    tensors, numbers = begun.state()
    other = Bowl()
    with torch.no_grad():
        for value, held in zip(other.values, parts.values, strict=True):
            value.copy_(held)
    resumed = search(other)
    resumed.restore(tensors, json.loads(json.dumps(numbers, allow_nan=False)))
    go(resumed, other, 6 - stop)
    assert torch.equal(whole.point, other.point)
    assert all(torch.equal(one, two) for one, two in zip(whole.seen[5 * stop :], other.seen, strict=True))


def test_a_stop_within_a_step_changes_nothing() -> None:
    bowl, calls = Bowl(), 0
    solver = search(bowl)
    go(solver, bowl, 2)
    before, point = solver.state()[0]["points"], bowl.point

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        solver.step(bowl, [BATCH], 3, check=check)
    assert torch.equal(solver.state()[0]["points"], before)
    assert torch.equal(bowl.point, point)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_never_kept(bad: float) -> None:
    bowl = Bowl(spoilt=bad)
    results = [search(bowl).step(bowl, [BATCH], 3)]
    solver = search(bowl)
    results = [solver.step(bowl, [BATCH], 3) for _ in range(8)]
    assert any(one.applied for one in results)
    assert float(bowl.point[0]) < 0
    assert all(math.isfinite(one.loss) for one in results if one.applied)


def test_the_seed_decides_everything() -> None:
    one, two = Bowl(), Bowl()
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    assert go(search(one), one, 4) == go(search(two), two, 4)
    assert torch.equal(before, torch.random.get_rng_state())


def test_impossible_settings_are_one_line() -> None:
    bowl = Bowl()
    with pytest.raises(ConfigError, match="start within its bounds"):
        search(bowl, bounds=(1.0, 2.0))
    with pytest.raises(ConfigError, match="at most 4000 candidates"):
        search(bowl, steps=801)
    with pytest.raises(ConfigError, match="smaller value first"):
        BayesConfig.read({"name": "bayes", "bounds": [2, 1]}, where="solver")
    with pytest.raises(ConfigError, match="does not hold one step"):
        BayesConfig(budget=3).steps(10)
    assert BayesConfig(budget=105).steps(10) == 5
    huge = [Group("huge", nn.Parameter(torch.zeros(1025)), 0.0, 0.0)]
    with pytest.raises(ConfigError, match="1 to 1024 numbers"):
        BayesSolver(huge, BayesConfig(), 0)
    state = search(bowl).state()
    with pytest.raises(ConfigError, match="another search"):
        search(bowl, kappa=1.0).restore(*state)
