"""Contrastive losses against distributions whose information is known, and against values by hand.

Knows no method and no model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from promptuary.prompts.losses import (
    aligned_nce,
    bilinear,
    conditional_nce,
    gaussian_kl,
    information,
    nce,
    reparameterised,
    supervised_contrastive,
    unit,
)

DRAWS = 20_000
TOLERANCE = 0.03
"""Of an estimate from so many draws, in nats."""


def noise(*size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def chunks(scores: Callable[[int, int], Tensor], *, size: int = 2_000) -> Tensor:
    """Scores of all draws, a few at a time: all vectors of all draws would take much memory."""
    return torch.cat([scores(size, seed) for seed in range(DRAWS // size)])


# ---- estimates where the answer is known -------------------------------------------------------------------------

# correlated normal vectors x, y of d numbers: d, rho, information in nats, and what 2, 8, 33, 129 pairs can show of it
CORRELATED = [
    (1, 0.0, 0.0, {2: 0.0, 8: 0.0, 33: 0.0, 129: 0.0}),
    (1, 0.5, 0.144, {2: 0.071, 8: 0.124, 33: 0.137, 129: 0.142}),
    (1, 0.9, 0.830, {2: 0.347, 8: 0.681, 33: 0.782, 129: 0.816}),
    (4, 0.9, 3.321, {2: 0.639, 8: 1.777, 33: 2.593, 129: 3.015}),
    (16, 0.9, 13.286, {2: 0.693, 8: 2.079, 33: 3.496, 129: 4.857}),
]


def log_ratio(x: Tensor, y: Tensor, rho: float) -> Tensor:
    """log p(y | x) - log p(y), up to a constant: the best critic there is."""
    return -((y - rho * x).pow(2) / (1 - rho**2) - y.pow(2)).sum(-1) / 2


@pytest.mark.parametrize(("d", "rho", "true", "known"), CORRELATED)
def test_with_the_log_ratio_as_critic_the_bound_has_its_known_values(
    d: int, rho: float, true: float, known: dict[int, float]
) -> None:
    assert -d / 2 * math.log(1 - rho**2) == pytest.approx(true, abs=1e-3)
    most = max(known)

    def scores(size: int, seed: int) -> Tensor:
        x = noise(size, d, seed=2 * seed, dtype=torch.float32)
        others = noise(size, most, d, seed=2 * seed + 1, dtype=torch.float32)
        y = rho * x + math.sqrt(1 - rho**2) * others[:, 0]
        every = torch.cat([y[:, None], others[:, 1:]], dim=1)
        return log_ratio(x[:, None], every, rho)

    made = chunks(scores)
    found = {pairs: float(information(nce(made[:, 0], made[:, 1:pairs]), pairs - 1).mean()) for pairs in sorted(known)}
    for pairs, value in known.items():
        assert found[pairs] == pytest.approx(value, abs=TOLERANCE)
        assert found[pairs] <= min(math.log(pairs), true + TOLERANCE)
    values = list(found.values())
    assert all(late >= early - TOLERANCE for early, late in itertools.pairwise(values))  # more pairs, more


# N(shift, s^2) against N(0, s0^2) in each of eight numbers: divergence, what the log-ratio shows with 33 and 257 pairs,
# and what a critic that is linear in z can show
SHIFTED = [
    (0.0, 1.0, 1.0, 0.0, {33: (0.0, 0.0), 257: (0.0, 0.0)}),
    (1.0, 1.0, 1.0, 0.5, {33: (0.468, 0.476), 257: (0.488, 0.497)}),
    (2.0, 1.0, 1.0, 2.0, {33: (1.665, 1.680), 257: (1.928, 1.941)}),
    (1.0, 0.5, 1.0, 3.045, {33: (2.523, 0.492), 257: (2.951, 0.497)}),
    (0.0, 0.5, 1.0, 2.545, {33: (2.217, 0.0), 257: (2.501, 0.0)}),
]


@pytest.fixture(scope="module")
def draws() -> tuple[Tensor, Tensor]:
    """One positive and 256 negatives of eight standard normal numbers, 10,000 times."""
    return noise(10_000, 8, dtype=torch.float32), noise(10_000, 256, 8, seed=1, dtype=torch.float32)


@pytest.mark.parametrize(("shift", "s", "s0", "true", "known"), SHIFTED)
def test_a_bilinear_critic_sees_shifts_and_is_blind_for_spread(
    draws: tuple[Tensor, Tensor],
    shift: float,
    s: float,
    s0: float,
    true: float,
    known: dict[int, tuple[float, float]],
) -> None:
    mean = torch.full((8,), shift / math.sqrt(8))  # the table's shift is a length
    stds = (torch.full((8,), math.log(s)), torch.full((8,), math.log(s0)))
    assert float(gaussian_kl(mean, stds[0], torch.zeros_like(mean), stds[1]).sum()) == pytest.approx(true, abs=1e-3)
    positive = reparameterised(mean, stds[0], draws[0])
    negatives = reparameterised(torch.zeros_like(mean), stds[1], draws[1])
    # the best linear critic for two normals of spread s0 is <z, mean> / s0^2; `bilinear` divides by sqrt(8)
    context = (mean * math.sqrt(8) / s0**2)[None]

    def ratio(z: Tensor) -> Tensor:
        return ((z / s0).pow(2) - ((z - mean) / s).pow(2)).sum(-1) / 2

    first, others = ratio(positive), ratio(negatives)
    for pairs, (exact, linear) in known.items():
        best = float(information(nce(first, others[:, : pairs - 1]), pairs - 1).mean())
        blind = float(information(conditional_nce(positive, negatives[:, : pairs - 1], context), pairs - 1).mean())
        assert (best, blind) == pytest.approx((exact, linear), abs=TOLERANCE)
        assert best <= true + TOLERANCE


@pytest.mark.parametrize(("shift", "spread", "at_least", "at_most"), [(0.0, 0.5, -0.01, 0.05), (2.0, 1.0, 1.55, 1.75)])
def test_a_trained_context_finds_a_shift_and_nothing_of_spread(
    draws: tuple[Tensor, Tensor], shift: float, spread: float, at_least: float, at_most: float
) -> None:
    """Of 2.545 nats of spread it finds none, of 2 nats of shift what 33 pairs can show (1.68)."""
    positive, negatives = spread * draws[0][:3000] + shift / math.sqrt(8), draws[1][:3000, :32]
    context = torch.zeros(1, 8, requires_grad=True)
    optimizer = torch.optim.LBFGS([context], max_iter=15, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = conditional_nce(positive, negatives, context).mean()
        found.backward()
        return found

    optimizer.step(loss)
    with torch.no_grad():
        found = float(information(conditional_nce(positive, negatives, context), 32).mean())
    assert at_least < found < at_most


def test_a_prompt_without_influence_has_no_information() -> None:
    states = noise(2_000, 33, 8)
    contexts = noise(2_000, 8, seed=1)
    loss = conditional_nce(states[:, 0], states[:, 1:], contexts)
    # any context that knows nothing of the states costs; none is best, at log(1 + negatives)
    assert float(loss.mean()) > math.log(33)
    silent = conditional_nce(states[:, 0], states[:, 1:], 0 * contexts)
    torch.testing.assert_close(silent, torch.full_like(silent, math.log(33)))
    assert float(information(silent, 32).abs().max()) < 1e-12


# ---- the loss itself ---------------------------------------------------------------------------------------------


def test_nce_is_minus_the_log_share_of_the_positive() -> None:
    positive, negatives = noise(7) * 3, noise(7, 5, seed=1) * 3
    mask = torch.rand(7, 5, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[0] = False
    for row in range(7):
        terms = [math.exp(positive[row]), *(math.exp(x) for x in negatives[row, mask[row]])]
        assert float(nce(positive, negatives, mask)[row]) == pytest.approx(-math.log(terms[0] / sum(terms)), abs=1e-12)


@pytest.mark.parametrize("gap", [-1e4, -200.0, 0.0, 200.0, 1e4])
def test_extreme_scores_stay_finite_with_their_gradients(gap: float) -> None:
    positive = torch.zeros(1, requires_grad=True)
    loss = nce(positive, torch.full((1, 3), gap))
    loss.sum().backward()
    expected = gap + math.log(3) if gap > 0 else (math.log(4) if gap == 0 else 0.0)
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-30)
    assert positive.grad is not None
    assert bool(positive.grad.isfinite().all())


def test_a_row_without_negatives_costs_nothing_and_has_no_gradient() -> None:
    positive = noise(2).requires_grad_()
    negatives = noise(2, 3, seed=1).requires_grad_()
    loss = nce(positive, negatives, torch.tensor([[False] * 3, [True] * 3]))
    loss.sum().backward()
    assert float(loss[0].detach()) == 0
    assert positive.grad is not None
    assert negatives.grad is not None
    assert float(positive.grad[0]) == 0
    assert float(positive.grad[1]) != 0
    assert not bool(negatives.grad[0].any())
    assert not bool(nce(positive, negatives[:, :0]).any())


@pytest.mark.parametrize(("gap", "dead"), [(0.0, True), (1.0, True), (2.0, False)])
def test_a_floor_kills_gradients_of_small_shares(gap: float, dead: bool) -> None:
    """With 32 negatives as in the release: nothing is learnt at equal scores, nor at a gap of one."""
    for floor in (-2.0, None):
        positive = torch.full((1,), gap, dtype=torch.float64, requires_grad=True)
        loss = nce(positive, torch.zeros(1, 32, dtype=torch.float64), floor=floor)
        loss.sum().backward()
        plain = math.log(math.exp(gap) + 32) - gap
        assert loss.item() == pytest.approx(plain if floor is None else min(plain, 2.0))
        assert positive.grad is not None
        assert bool(positive.grad == 0) == (dead and floor is not None)


def test_six_equal_negatives_are_the_most_that_a_floor_of_two_lets_live() -> None:
    for count in (6, 7):
        positive = torch.zeros(1, requires_grad=True)
        nce(positive, torch.zeros(1, count), floor=-2.0).sum().backward()
        assert positive.grad is not None
        assert bool(positive.grad == 0) == (count == 7)


# ---- prompt and head ---------------------------------------------------------------------------------------------


def test_a_head_without_direction_costs_the_log_of_the_count_and_moves_no_prompt() -> None:
    rows = noise(1, 3, 6).requires_grad_()
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    loss = aligned_nce(rows, torch.zeros(6, dtype=torch.float64), noise(2, 5, 6, seed=1), mask)
    assert loss.tolist() == pytest.approx([math.log(6), math.log(3)], abs=1e-12)
    loss.sum().backward()
    assert rows.grad is not None
    assert not bool(rows.grad.any())


def test_a_prompt_far_along_the_direction_costs_nothing_and_padding_does_not_count() -> None:
    direction, tokens = noise(6), noise(2, 5, 6, seed=1)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    costs = [
        float(aligned_nce((k * direction)[None, None], direction, tokens, mask).sum()) for k in (-10, 0, 1, 10, 1000)
    ]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < 1e-12
    junk = tokens.clone()
    junk[1, 3:] = 1e6
    rows = noise(1, 4, 6, seed=2)
    torch.testing.assert_close(
        aligned_nce(rows, direction, tokens, mask), aligned_nce(rows, direction, junk, mask), rtol=0, atol=0
    )


def test_prompts_per_row_equal_rows_alone() -> None:
    rows, direction, tokens = noise(3, 2, 6), noise(6, seed=1), noise(3, 4, 6, seed=2)
    mask = torch.ones(3, 4, dtype=torch.bool)
    together = aligned_nce(rows, direction, tokens, mask)
    alone = [aligned_nce(rows[i : i + 1], direction, tokens[i : i + 1], mask[:1]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone))
    shared = aligned_nce(rows[:1], direction, tokens, mask)
    torch.testing.assert_close(shared[2:], aligned_nce(rows[:1], direction, tokens[2:], mask[:1]))


def test_gradients_reach_prompt_and_direction() -> None:
    rows, direction = noise(1, 2, 6).requires_grad_(), noise(6, seed=1).requires_grad_()
    mask = torch.ones(3, 4, dtype=torch.bool)
    assert torch.autograd.gradcheck(
        lambda p, t: aligned_nce(p, t, noise(3, 4, 6, seed=2), mask), (rows, direction), atol=1e-6
    )


# ---- normal distributions ----------------------------------------------------------------------------------------


def test_the_divergence_of_normals_is_torchs() -> None:
    mean, log_std, other, other_std = (noise(4, 5, seed=seed) for seed in range(4))
    normal = torch.distributions.Normal
    wanted = torch.distributions.kl_divergence(normal(mean, log_std.exp()), normal(other, other_std.exp()))
    torch.testing.assert_close(gaussian_kl(mean, log_std, other, other_std), wanted)
    standard = torch.distributions.kl_divergence(
        normal(mean, log_std.exp()), normal(torch.zeros_like(mean), torch.ones_like(mean))
    )
    torch.testing.assert_close(gaussian_kl(mean, log_std), standard)


def test_nearly_equal_normals_keep_their_small_divergence() -> None:
    tiny = torch.tensor([1e-4])  # in float32 the naive (s^2 - 1) / 2 - log s has no digit left
    assert float(gaussian_kl(torch.zeros(1), tiny)) == pytest.approx(1e-8, rel=1e-2)
    assert float(gaussian_kl(torch.zeros(1), torch.zeros(1))) == 0


def test_samples_have_mean_and_spread_and_let_gradients_through() -> None:
    mean, log_std = torch.tensor([1.0, -2.0], requires_grad=True), torch.tensor([0.5, -1.0], requires_grad=True)
    drawn = reparameterised(mean, log_std, noise(50_000, 2, dtype=torch.float32))
    torch.testing.assert_close(drawn.mean(0), mean, atol=0.03, rtol=0)
    torch.testing.assert_close(drawn.std(0), log_std.exp(), atol=0.03, rtol=0)
    drawn.sum().backward()
    assert mean.grad is not None
    assert mean.grad.tolist() == [50_000, 50_000]


def test_the_critic_is_the_scaled_product() -> None:
    assert float(bilinear(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 0.0, -1.0, 2.0]))) == 3.0


# ---- classes told apart ------------------------------------------------------------------------------------------


def apart(b: int, classes: int = 2) -> tuple[Tensor, Tensor]:
    """Rows of two classes in opposite directions."""
    labels = torch.arange(b) % classes
    features = torch.zeros(b, 4, dtype=torch.float64)
    features[:, 0] = 1.0 - 2.0 * labels
    return features, labels


def test_supervised_contrastive_values_by_hand() -> None:
    same = torch.ones(8, 4, dtype=torch.float64)
    half = torch.arange(8) % 2
    # every share is 1/7: 3 positives of -log(1/7 + 1e-5) over 3 + 1e-3
    assert float(supervised_contrastive(same, half)) == pytest.approx(1.9452, abs=2e-4)
    assert float(supervised_contrastive(*apart(8))) == pytest.approx(1.0999, abs=1.5e-3)
    assert float(supervised_contrastive(same, torch.arange(8))) == 0
    assert float(supervised_contrastive(same[:2], torch.tensor([1, 1]))) == pytest.approx(-1e-5, rel=1e-2)
    assert float(supervised_contrastive(same, 0 * half)) == pytest.approx(1.9456, abs=2e-4)


def test_without_its_epsilons_it_is_the_published_formula() -> None:
    features, labels = noise(9, 5), torch.tensor([0, 1, 2, 0, 1, 0, 3, 0, 1])
    total = 0.0
    for i in range(9):
        alike = [j for j in range(9) if j != i and labels[j] == labels[i]]
        z = torch.nn.functional.normalize(features, dim=-1)
        terms = {k: math.exp(float(z[i] @ z[k]) / 0.1) for k in range(9) if k != i}
        total += sum(-math.log(terms[j] / sum(terms.values())) for j in alike) / max(len(alike), 1)
    found = supervised_contrastive(features, labels, 0.1, share_epsilon=0.0, count_epsilon=0.0)
    assert float(found) == pytest.approx(total / 9, rel=1e-10)


def test_only_directions_and_classes_count() -> None:
    features, labels = noise(8, 5), torch.tensor([0, 1, 2, 0, 1, 0, 1, 2])
    wanted = supervised_contrastive(features, labels)
    scales = torch.tensor([1e-3, 1, 5, 1e6, 2, 3, 0.1, 7], dtype=torch.float64)[:, None]
    torch.testing.assert_close(supervised_contrastive(features * scales, labels), wanted)
    order = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
    torch.testing.assert_close(supervised_contrastive(features[order], labels[order]), wanted)
    torch.testing.assert_close(supervised_contrastive(features, 10 - labels), wanted)


def test_its_gradient_is_the_numerical_one_and_finite_where_directions_end() -> None:
    labels = torch.tensor([0, 1, 0, 1, 0])
    assert torch.autograd.gradcheck(lambda x: supervised_contrastive(x, labels), (noise(5, 3).requires_grad_(),))
    for features in (torch.zeros(5, 3), 1e-30 * torch.ones(5, 3), 1e30 * torch.ones(5, 3)):
        leaf = features.clone().requires_grad_()
        loss = supervised_contrastive(leaf, labels)
        loss.backward()
        assert bool(loss.isfinite())
        assert leaf.grad is not None
        assert bool(leaf.grad.isfinite().all())


def test_a_single_row_has_nothing_to_be_told_from() -> None:
    leaf = noise(1, 3).requires_grad_()
    loss = supervised_contrastive(leaf, torch.tensor([0]))
    loss.backward()
    assert float(loss.detach()) == 0
    assert leaf.grad is not None
    assert not bool(leaf.grad.any())


def test_descending_it_brings_classes_together_and_apart() -> None:
    features = noise(12, 4).requires_grad_()
    labels = torch.arange(12) % 3
    optimizer = torch.optim.Adam([features], lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        supervised_contrastive(features, labels).backward()
        optimizer.step()
    z = unit(features.detach())
    alike, together = labels[:, None] == labels, z @ z.T
    assert float(together[alike].min()) > 0.95
    assert float(together[~alike].max()) < 0.0


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1.0, 1e20, 5e37])
def test_directions_have_length_one_whatever_the_length_was(scale: float) -> None:
    x = torch.tensor([[3.0, -4.0], [0.0, 0.0]]) * scale
    torch.testing.assert_close(unit(x), torch.tensor([[0.6, -0.8], [0.0, 0.0]]))
