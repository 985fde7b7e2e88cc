"""Evolution: known optima, real tiny models without any graph, budgets, one batch for all candidates, exact resuming.

Knows no method beyond prompt tuning and prefix tuning, which stand for all.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tiny
import toy
from promptuary.errors import ConfigError, Interrupted, MissingExtra
from promptuary.listening import Listener
from promptuary.methods.base import Group
from promptuary.population import Population
from promptuary.seeds import seeded
from promptuary.solvers.evolution import EvolutionSolver
from promptuary.training import Training
from promptuary.types import Batch, Losses


def step_of(number: int, rows: int = 6) -> Batch:
    """A batch that knows which step it is."""
    inputs = torch.zeros(rows, 1, dtype=torch.long)
    return Batch(inputs, torch.ones_like(inputs), torch.full((rows,), number))


class Bowl:
    """A rotated, stretched bowl around a point; every call is counted, and none may ask for a gradient."""

    def __init__(self, size: int = 10, stretch: float = 1e3, spoilt: Sequence[int] = ()) -> None:
        generator = seeded(0)
        axes = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
        self.map = (axes * torch.logspace(0, math.log10(stretch) / 2, size, dtype=torch.float64)) @ axes.T
        self.goal = torch.randn(size, generator=generator, dtype=torch.float64)
        first = size // 2
        self.values = [nn.Parameter(torch.zeros(first).double()), nn.Parameter(torch.zeros(1, size - first).double())]
        self.groups = [Group(f"part-{n}", value, 0.0, 0.0) for n, value in enumerate(self.values)]
        self.spoilt, self.calls = spoilt, 0

    @property
    def point(self) -> Tensor:
        return torch.cat([value.detach().flatten() for value in self.values])

    def weight(self, batch: Batch) -> int:
        return len(batch)

    def loss(self, batch: Batch) -> Losses:
        assert not torch.is_grad_enabled()
        self.calls += 1
        total = (self.map @ (self.point - self.goal)).pow(2).mean()
        return Losses(total * (math.nan if int(batch.index[0]) in self.spoilt else 1.0))


def search(bowl: Bowl, **settings: Any) -> EvolutionSolver:
    return EvolutionSolver(bowl.groups, **{"sigma": 0.5, "seed": 0, **settings})


def run(solver: EvolutionSolver, bowl: Bowl, steps: int, begin: int = 0) -> list[float]:
    return [solver.step(bowl, [step_of(number)], 6).loss for number in range(begin, begin + steps)]


# ---- what it finds -----------------------------------------------------------------------------------------------


def test_it_finds_the_lowest_point_of_a_stretched_bowl() -> None:
    bowl = Bowl()
    solver = search(bowl)
    run(solver, bowl, 400)
    assert solver.best_loss < 1e-9
    torch.testing.assert_close(bowl.point, bowl.goal, atol=1e-3, rtol=0)  # the tensors hold the best candidate
    torch.testing.assert_close(solver.mean, bowl.goal, atol=1e-3, rtol=0)
    assert torch.equal(bowl.point, solver.best)


def test_the_tensors_hold_the_best_candidate_or_the_mean() -> None:
    for keep in ("best", "mean"):
        bowl = Bowl()
        solver = search(bowl, keep=keep)
        losses = run(solver, bowl, 12)
        assert torch.equal(bowl.point, solver.best if keep == "best" else solver.mean)
        with torch.no_grad():
            held = float(bowl.loss(step_of(0)).total)
        assert (held == pytest.approx(min(losses), rel=1e-6)) == (keep == "best")


def test_candidates_stay_within_bounds_and_the_search_ends_at_them() -> None:
    bowl = Bowl(size=4, stretch=1)
    seen = []
    plain = bowl.loss

    def watched(batch: Batch) -> Losses:
        seen.append(bowl.point)
        return plain(batch)

    bowl.loss = watched  # type: ignore[method-assign]
    solver = search(bowl, bounds=(-0.4, 0.4))
    run(solver, bowl, 80)
    every = torch.stack(seen)
    assert float(every.abs().max()) <= 0.4
    torch.testing.assert_close(bowl.point, bowl.goal.clamp(-0.4, 0.4), atol=0.02, rtol=0)


def test_only_the_order_of_the_losses_counts() -> None:
    points = []
    for change in (lambda x: x, lambda x: torch.log(x) * 1e6 - 1e9):
        bowl = Bowl()
        plain = bowl.loss

        def changed(batch: Batch, plain: Any = plain, change: Any = change) -> Losses:
            return Losses(change(plain(batch).total))

        bowl.loss = changed  # type: ignore[method-assign]
        solver = search(bowl)
        run(solver, bowl, 30)
        points.append(solver.mean)
    # float32 sums may tie what float64 tells apart, but not here
    assert torch.equal(*points)


# ---- real models, no graph ---------------------------------------------------------------------------------------


@contextmanager
def no_graph() -> Iterator[None]:
    """Fails as soon as anything is kept for a backward pass."""

    def kept(tensor: Tensor) -> Any:
        raise AssertionError(f"a tensor {tuple(tensor.shape)} was kept for a backward pass")

    with torch.autograd.graph.saved_tensors_hooks(kept, lambda packed: packed):
        yield


def learner(path: Path, family: str = "causal", task: str = "classify_words", **method: Any) -> Training:
    overrides = [f"method.{name}={value}" for name, value in {"num_virtual_tokens": 2, **method}.items()]
    return Training(toy.run(path, *overrides, family=family, task=task), Listener(), tiny.backbone(family))


@pytest.mark.parametrize(
    ("family", "task"),
    [("causal", "classify_words"), ("masked", "classify_words"), ("seq2seq", "generate"), ("encoder", "classify_head")],
)
@pytest.mark.parametrize("together", [False, True])
def test_a_real_models_loss_falls_without_any_graph(tmp_path: Path, family: str, task: str, together: bool) -> None:
    training = learner(tmp_path, family, task)
    tuned, rows = training.tuned.train(True), training.feed.rows["train"]
    batch, groups = tuned.batch(rows), tuned.trained()
    with torch.no_grad():
        before = float(tuned.loss(batch).total)
    with pytest.raises(AssertionError, match="kept for a backward pass"), no_graph():
        tuned.loss(batch)  # the alarm works
    mixed = Population.of(tuned) if together else None
    solver = EvolutionSolver(groups, sigma=0.3, seed=0, population=12, together=mixed)
    with no_graph():
        for _ in range(24):
            assert solver.step(tuned, [batch], tuned.weight(batch)).applied
    with torch.no_grad():
        after = float(tuned.loss(batch).total)
    assert after < 0.99 * before
    assert after == pytest.approx(solver.best_loss, rel=1e-4)
    assert all(p.grad is None for p in [*tuned.backbone.model.parameters(), *(g.parameter for g in groups)])
    training.backbone.release()


@pytest.mark.parametrize("task", ["classify_words", "classify_head", "choose", "regress_words", "generate"])
@pytest.mark.parametrize("method", ["prompt_tuning", "prefix"])
def test_candidates_in_one_batch_cost_what_they_cost_one_by_one(tmp_path: Path, task: str, method: str) -> None:
    training = learner(tmp_path, "causal", task, name=method)
    tuned = training.tuned.train(True)
    mixed = Population.of(tuned)
    assert mixed is not None
    groups, batch = tuned.trained(), tuned.batch(training.feed.rows["train"])
    candidates = {
        group.name: group.parameter.detach() + 0.3 * torch.randn(5, *group.parameter.shape, generator=seeded(n))
        for n, group in enumerate(groups)
    }
    before = tuned.state()
    found = mixed(batch, candidates)
    assert all(torch.equal(value, before[name]) for name, value in tuned.state().items())
    wanted = []
    for number in range(5):
        tuned.restore({name: values[number] for name, values in candidates.items()})
        with torch.no_grad():
            wanted.append(tuned.loss(batch).total)
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-5, atol=1e-5)
    assert float(found.max() - found.min()) > 1e-3
    training.backbone.release()


def test_a_population_runs_in_as_few_passes_as_fit(tmp_path: Path) -> None:
    training = learner(tmp_path, "masked")
    tuned = training.tuned.train(True)
    sizes: list[int] = []
    hook = tuned.backbone.model.base_model.register_forward_hook(lambda *seen: sizes.append(len(seen[2][0])))
    batch = tuned.batch(training.feed.rows["train"])
    points = []
    for at_once in (None, 5, 1):
        sizes.clear()
        start = tuned.state()
        solver = EvolutionSolver(
            tuned.trained(), sigma=0.3, seed=0, population=12, together=Population.of(tuned), at_once=at_once
        )
        solver.step(tuned, [batch], len(batch))
        # the model is tried out once on a few rows before it is first used
        assert [size // len(batch) for size in sizes if size >= len(batch)] == {None: [12], 5: [5, 5, 2], 1: [1] * 12}[
            at_once
        ]
        points.append(solver.mean)
        tuned.restore(start)
    torch.testing.assert_close(points[0], points[1], rtol=0, atol=1e-9)
    torch.testing.assert_close(points[0], points[2], rtol=0, atol=1e-9)
    hook.remove()
    training.backbone.release()


class Service:
    """A model behind a wire: prompt numbers and texts go in as plain lists, logits come out as plain lists."""

    def __init__(self, path: Path) -> None:
        self.training = learner(path, "causal")
        self.tuned, self.calls = self.training.tuned, 0
        self.rows = self.training.feed.rows["train"]

    @torch.inference_mode()
    def logits(self, prompt: list[float]) -> list[list[float]]:
        self.calls += 1
        before = self.tuned.state()
        self.tuned.restore({"method.rows": torch.tensor(prompt).view(before["method.rows"].shape)})
        found = json.loads(json.dumps(self.tuned.scores(self.tuned.batch(self.rows)).tolist()))
        self.tuned.restore(before)
        return found


class Remote:
    """What a user of such a service can know: the numbers that were sent, the logits, and the right answers."""

    def __init__(self, service: Service, start: Tensor) -> None:
        self.service, self.value = service, nn.Parameter(start.clone())
        self.answers = [int(row.target or 0) for row in service.rows]

    def weight(self, batch: Batch) -> int:
        return len(self.answers)

    def loss(self, batch: Batch) -> Losses:
        costs = []
        for logits, answer in zip(self.service.logits(self.value.tolist()), self.answers, strict=True):
            costs.append(math.log(sum(map(math.exp, logits))) - logits[answer])
        return Losses(torch.tensor(sum(costs) / len(costs)))


def test_a_model_that_only_gives_logits_is_enough(tmp_path: Path) -> None:
    service = Service(tmp_path)
    remote = Remote(service, service.tuned.state()["method.rows"].flatten())
    first = float(remote.loss(step_of(0)).total)
    solver = EvolutionSolver([Group("numbers", remote.value, 0.0, 0.0)], sigma=0.3, seed=0, population=12)
    with no_graph():
        for _ in range(15):
            solver.step(remote, [step_of(0, 11)], 11)
    assert float(remote.loss(step_of(0)).total) < 0.97 * first
    assert service.calls == 12 * 15 + 2
    service.training.backbone.release()


# ---- losses that are none ----------------------------------------------------------------------------------------


def test_a_candidate_without_a_finite_loss_is_the_worst() -> None:
    for bad in (math.nan, math.inf, -math.inf):
        bowl = Bowl(size=4, stretch=1)
        plain = bowl.loss

        def half(batch: Batch, plain: Any = plain, bowl: Bowl = bowl, bad: float = bad) -> Losses:
            # nothing is defined beyond the goal in the first number
            return Losses(plain(batch).total * (bad if bowl.point[0] > bowl.goal[0] else 1.0))

        bowl.loss = half  # type: ignore[method-assign]
        solver = search(bowl)
        results = [solver.step(bowl, [step_of(number)], 6) for number in range(120)]
        assert all(result.applied and math.isfinite(result.loss) for result in results)
        torch.testing.assert_close(bowl.point, bowl.goal, atol=0.02, rtol=0)


def test_a_population_without_any_finite_loss_changes_nothing_and_the_next_is_another() -> None:
    bowl = Bowl(spoilt=(3, 4))
    solver = search(bowl)
    run(solver, bowl, 3)
    point, mean, sigma = bowl.point, solver.mean, solver.rates()
    drawn = solver._drawn().clone()
    result = solver.step(bowl, [step_of(3)], 6)
    assert (result.fault, result.applied) == ("loss", False)
    assert torch.equal(bowl.point, point)
    assert torch.equal(solver.mean, mean)
    assert solver.rates() == sigma
    assert not torch.equal(solver._drawn(), drawn)
    assert all(math.isfinite(loss) for loss in run(solver, bowl, 5, begin=5))


# ---- the same again ----------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bounded": {"bounds": (-2.5, 2.5)},
    "mean": {"keep": "mean"},
    "twenty": {"population": 20},
}


def through_json(state: tuple[dict[str, Tensor], dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return {name: value.clone() for name, value in state[0].items()}, json.loads(json.dumps(state[1], allow_nan=False))


def same(one: EvolutionSolver, two: EvolutionSolver) -> None:
    tensors, numbers = one.state()
    others, more = two.state()
    assert tensors.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in tensors.items())
    assert numbers == more


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("stop", [0, 1, 4, 5, 25])
def test_a_resumed_search_is_the_unbroken_one_bit_for_bit(kind: str, stop: int) -> None:
    """With populations that were not finite (steps 3 and 4) and a smaller step size asked for on the way."""

    def go(solver: EvolutionSolver, bowl: Bowl, begin: int, end: int) -> list[float]:
        losses = []
        for number in range(begin, end):
            if number in (2, 4, 9):
                solver.slow_down(0.5)
            losses += run(solver, bowl, 1, begin=number)
        return losses

    bowl = Bowl(spoilt=(3, 4))
    solver = search(bowl, **KINDS[kind])
    go(solver, bowl, 0, stop)
    state, held = through_json(solver.state()), [value.detach().clone() for value in bowl.values]
    wanted = go(solver, bowl, stop, stop + 15)

    other = Bowl(spoilt=(3, 4))
    resumed = search(other, **KINDS[kind])
    run(resumed, other, 2, begin=100)  # whatever it did before is forgotten
    resumed.restore(*state)
    with torch.no_grad():
        for value, kept in zip(other.values, held, strict=True):
            value.copy_(kept)
    found = go(resumed, other, stop, stop + 15)
    assert found == wanted or all(math.isnan(a) == math.isnan(b) for a, b in zip(found, wanted, strict=True))
    assert [x for x in found if x == x] == [x for x in wanted if x == x]
    same(solver, resumed)
    assert torch.equal(bowl.point, other.point)


def test_a_state_of_other_settings_is_refused_by_name() -> None:
    bowl = Bowl()
    solver = search(bowl)
    run(solver, bowl, 3)
    with pytest.raises(ConfigError, match="another seed"):
        search(Bowl(), seed=1).restore(*solver.state())
    with pytest.raises(ConfigError, match="another sigma, population"):
        search(Bowl(), sigma=0.4, population=30).restore(*solver.state())


def test_a_state_that_plays_back_differently_is_refused() -> None:
    bowl = Bowl()
    solver = search(bowl)
    run(solver, bowl, 3)
    tensors, numbers = solver.state()
    tensors["ranks"] = tensors["ranks"].flip(1)
    with pytest.raises(ConfigError, match="bit for bit"):
        search(Bowl()).restore(tensors, numbers)


def test_the_seed_decides_everything_and_nothing_global_is_touched() -> None:
    before, numpys = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    losses = []
    for seed in (0, 0, 1):
        bowl = Bowl()
        losses.append(run(search(bowl, seed=seed), bowl, 10))
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpys)  # noqa: NPY002


def test_a_stop_within_a_step_changes_nothing_and_the_step_is_taken_again() -> None:
    bowl, whole = Bowl(), Bowl()
    solver, unbroken = search(bowl), search(whole)
    run(solver, bowl, 3)
    run(unbroken, whole, 4)
    point, left = bowl.point, iter([None, None])

    def stop() -> None:
        if next(left, "now") == "now":
            raise Interrupted("asked to", 2)

    with pytest.raises(Interrupted):
        solver.step(bowl, [step_of(3)], 6, check=stop)
    assert torch.equal(bowl.point, point)
    run(solver, bowl, 1, begin=3)
    same(solver, unbroken)
    assert torch.equal(bowl.point, whole.point)


def test_a_batch_in_parts_is_the_whole_batch(tmp_path: Path) -> None:
    training = learner(tmp_path, "masked")
    tuned = training.tuned.train(True)
    rows, start, ends = training.feed.rows["train"], tuned.state(), []
    for size in (len(rows), 4):
        tuned.restore(start)
        solver = EvolutionSolver(tuned.trained(), sigma=0.3, seed=0, population=8)
        parts = [tuned.batch(rows[begin : begin + size]) for begin in range(0, len(rows), size)]
        results = [solver.step(tuned, parts, len(rows)) for _ in range(3)]
        ends.append((results, solver.mean, solver.calls))
    assert [result.loss for result in ends[0][0]] == pytest.approx([result.loss for result in ends[1][0]], rel=1e-5)
    torch.testing.assert_close(ends[0][1], ends[1][1])
    assert ends[0][2] == ends[1][2] == 24  # a call is a candidate on the whole batch
    training.backbone.release()


def test_processes_add_their_parts() -> None:
    bowl, whole = Bowl(), Bowl()
    solver, unbroken = search(bowl), search(whole)
    run(unbroken, whole, 3)
    for number in range(3):  # this process has half of the rows, and the other one the same
        solver.step(bowl, [step_of(number, rows=3)], 6, reduce=lambda tensor: 2 * tensor)
    torch.testing.assert_close(solver.mean, unbroken.mean)


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigma": 0.0}, "sigma"),
        ({"sigma": math.inf}, "sigma"),
        ({"population": 3}, "at least 4 candidates"),
        ({"bounds": (0.1, 1.0)}, "within its bounds"),
        ({"bounds": (1.0, -1.0)}, "within its bounds"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        search(Bowl(), **settings)


@pytest.mark.parametrize("size", [1, 5000])
def test_too_few_or_too_many_numbers_are_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=rf"got {size}"):
        EvolutionSolver([Group("x", nn.Parameter(torch.zeros(size)), 0.0, 0.0)], sigma=1.0, seed=0)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(MissingExtra, match=r"promptuary\[blackbox\]"):
        search(Bowl())
