"""LAMP: the invariants of the specification, numbered as there, and its sizes, rates and start.

Knows no other method but prompt tuning, which it reduces to.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import tiny
from promptuary.backbones.base import Backbone
from promptuary.data.collate import Row, collate, pad_candidates
from promptuary.errors import ConfigError
from promptuary.methods.lamp import LAMP, LAMPConfig, outer_product
from promptuary.methods.prompt_tuning import PromptTuning, PromptTuningConfig
from promptuary.prompts.blocks import pool_rows
from promptuary.prompts.init import Starting
from promptuary.types import Batch, Piece, Prompt, Shape, View

TEXTS = ("a red apple was good", "blue sky", "never cold but always very hot", "six birds eat one plum")
ASKS = (Piece("fixed", " it was "), Piece("slot", "mask"))
KINDS = ("t5", "llama", "bert")
D = tiny.WIDTH


def batch_of(backbone: Backbone) -> Batch:
    rows = [Row(backbone.encode([Piece("field", text), *ASKS], 40), i, target=i % 3) for i, text in enumerate(TEXTS)]
    return collate(rows, backbone.pad, segments=backbone.uses_segments)


def scores(backbone: Backbone, prompt: Prompt) -> Tensor:
    words = pad_candidates([backbone.answer_ids(word) for word in ("good", "bad", "maybe")])
    return backbone.score(batch_of(backbone), prompt, words)


def loss(backbone: Backbone, prompt: Prompt) -> Tensor:
    return cross_entropy(scores(backbone, prompt), batch_of(backbone).target)


def noise(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def from_matrix(start: Tensor, backbone: Backbone | None = None, **settings: object) -> LAMP:
    """LAMP that starts from a given P0."""
    backbone = backbone or tiny.backbone("t5")
    config = LAMPConfig(**{"length": len(start), "init": "saved", **settings})
    return LAMP(config, Shape(D)).initialise(Starting(backbone.vocabulary, torch.Generator(), start))


def made(backbone: Backbone, seed: int = 0, **settings: object) -> LAMP:
    config = LAMPConfig(**{"length": 8, "rank": 3, "pool": 2, **settings})
    return LAMP(config, backbone.shape).initialise(Starting(backbone.vocabulary, torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("width", [8, 32, 768])
@pytest.mark.parametrize(("length", "rank", "pool"), [(8, 1, 1), (8, 8, 2), (20, 5, 5), (100, 8, 5)])
def test_count_is_rank_times_length_plus_width_plus_one(length: int, rank: int, pool: int, width: int) -> None:
    """Invariant 1."""
    config = LAMPConfig(length=length, rank=rank, pool=pool)
    assert LAMP.count(config, Shape(width)) == rank * (length + width + 1)
    assert sum(value.numel() for value in LAMP(config, Shape(width)).parameters()) == rank * (length + width + 1)


def test_count_gives_the_published_arithmetic() -> None:
    """Invariant 1, numbers of the specification for T5-base."""
    sizes = {rank: LAMP.count(LAMPConfig(length=100, rank=rank), Shape(768)) for rank in (4, 8, 10)}
    assert sizes == {4: 3476, 8: 6952, 10: 8690}


@pytest.mark.parametrize("length", [6, D, 40])
def test_full_rank_without_pooling_starts_as_the_decomposed_prompt(length: int) -> None:
    """Invariant 2: C = P0."""
    start = noise(length, D)
    rows = from_matrix(start, rank=min(length, D), pool=1).fold().as_rows()
    assert float((rows - start).abs().max()) < 1e-5


def test_full_rank_without_pooling_trains_as_prompt_tuning_in_other_coordinates() -> None:
    """Invariant 2: same loss, and the gradient of the factors is the chain rule on prompt tuning's gradient."""
    backbone, start = tiny.backbone("t5"), noise(6, D)
    lamp = from_matrix(start, backbone, rank=6, pool=1)
    tuning = PromptTuning(PromptTuningConfig(num_virtual_tokens=6, init="saved"), Shape(D))
    tuning.initialise(Starting(backbone.vocabulary, torch.Generator(), start))
    one, two = loss(backbone, lamp.prompt(View())), loss(backbone, tuning.prompt(View()))
    torch.testing.assert_close(one, two)
    one.backward()
    two.backward()
    g, u, q, v = (t.detach().double() for t in (tuning.rows.grad, lamp.u, lamp.q, lamp.v))
    torch.testing.assert_close(lamp.u.grad.double(), (g @ v.T) * q, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(lamp.q.grad.double(), ((u.T @ g) * v).sum(1), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(lamp.v.grad.double(), (u * q).T @ g, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_what_truncation_loses_is_the_dropped_part_of_the_spectrum(rank: int) -> None:
    """Invariant 3."""
    start = noise(10, D)
    lost = (start - from_matrix(start, rank=rank, pool=1).fold().as_rows()).pow(2).sum()
    dropped = np.linalg.svd(start.double().numpy(), compute_uv=False)[rank:]
    assert float(lost) == pytest.approx(float((dropped**2).sum()), rel=1e-5)


def test_sum_of_outer_products_equals_matrix_product_equals_einsum() -> None:
    """Invariant 4."""
    m, i = noise(7, 4), noise(4, 9, seed=1)
    looped = np.zeros((7, 9))
    for r in range(4):
        looped += np.outer(m[:, r].double().numpy(), i[r].double().numpy())
    np.testing.assert_allclose(outer_product(m, i).numpy(), looped, atol=1e-5)
    torch.testing.assert_close(outer_product(m, i), torch.einsum("lr,rd->ld", m, i))


@pytest.mark.parametrize("length", [8, 10, 11])
@pytest.mark.parametrize("pool", [1, 2, 4, 5])
def test_pooling_the_product_equals_pooling_the_left_factor(length: int, pool: int) -> None:
    """Invariant 5, also where p does not divide l: the last window is short."""
    lamp = from_matrix(noise(length, D), rank=4, pool=pool)
    c = (lamp.u * lamp.q).detach().double().numpy() @ lamp.v.detach().double().numpy()
    expected = np.stack([c[at : at + pool].mean(0) for at in range(0, length, pool)])
    np.testing.assert_allclose(lamp.fold().as_rows().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(("rank", "pool"), [(2, 1), (2, 2), (3, 5), (5, 5), (6, 10), (1, 10)])
def test_rank_of_the_prompt_is_at_most_r_and_at_most_its_rows(rank: int, pool: int) -> None:
    """Invariant 6."""
    lamp = from_matrix(noise(20, D), rank=rank, pool=pool)
    found = np.linalg.matrix_rank(lamp.fold().as_rows().double().numpy(), tol=1e-4)
    assert found == min(rank, 20 // pool), "equal, since the start is generic"


@pytest.mark.parametrize("kind", KINDS)
def test_folding_gives_a_plain_prompt_that_prompt_tuning_runs_the_same(kind: str) -> None:
    """Invariant 7: fully foldable, no input dependence, no offset."""
    backbone = tiny.backbone(kind)
    lamp = made(backbone)
    live, folded = lamp.prompt(View()), lamp.fold()
    assert lamp.needs == frozenset()
    assert folded.sites == {"input"}
    rows = folded.as_rows()
    assert rows.shape == (4, D)
    tuning = PromptTuning(PromptTuningConfig(num_virtual_tokens=4, init="saved"), backbone.shape)
    tuning.initialise(Starting(backbone.vocabulary, torch.Generator(), rows))
    assert torch.equal(scores(backbone, tuning.prompt(View())), scores(backbone, live))
    assert not rows.requires_grad


def test_a_window_of_one_is_the_same_path_as_no_pooling() -> None:
    """Invariant 8."""
    lamp = from_matrix(noise(8, D), rank=3, pool=1)
    unpooled = outer_product(lamp.u * lamp.q, lamp.v)
    assert torch.equal(lamp.prompt(View()).rows[0], unpooled)
    m = noise(5, 2)
    assert pool_rows(m, 1) is m


@pytest.mark.parametrize(("length", "pool"), [(8, 1), (8, 2), (8, 4), (8, 8), (9, 4), (3, 5)])
def test_the_sequence_grows_by_the_pooled_rows_only(length: int, pool: int) -> None:
    """Invariant 9."""
    backbone = tiny.backbone("llama")
    lamp, batch = made(backbone, length=length, rank=2, pool=pool), batch_of(backbone)
    grown = math.ceil(length / pool)
    assert lamp.prompt(View()).length == grown
    assert backbone.place(batch, lamp.prompt(View())).input_ids.shape[1] == batch.input_ids.shape[1] + grown


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("q_power", [1, 2])
def test_gradient_reaches_all_factors_at_the_first_step(kind: str, q_power: int) -> None:
    """Invariant 10: every component of every factor, and nothing of the backbone."""
    backbone = tiny.backbone(kind)
    lamp = made(backbone, q_power=q_power)
    loss(backbone, lamp.prompt(View())).backward()
    assert bool((lamp.u.grad != 0).all())
    assert bool((lamp.q.grad != 0).all())
    assert bool((lamp.v.grad.abs().amax(1) > 0).all())
    assert all(value.grad is None for value in backbone.model.parameters())


@pytest.mark.parametrize("q_power", [1, 2])
def test_permuting_components_or_flipping_signs_changes_nothing(q_power: int) -> None:
    """Invariant 11."""
    backbone = tiny.backbone("t5")
    lamp, order = made(backbone, q_power=q_power), torch.tensor([2, 0, 1])
    before = scores(backbone, lamp.fold())
    with torch.no_grad():
        for tensor, value in ((lamp.u, lamp.u[:, order]), (lamp.q, lamp.q[order]), (lamp.v, lamp.v[order])):
            tensor.copy_(value.clone())
    torch.testing.assert_close(scores(backbone, lamp.fold()), before, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        lamp.u[:, 1] *= -1
        if q_power == 1:
            lamp.q[1] *= -1  # q enters once, so its sign moves to either side
        else:
            lamp.v[1] *= -1
    torch.testing.assert_close(scores(backbone, lamp.fold()), before, rtol=1e-4, atol=1e-4)


def test_with_q_fixed_to_one_it_is_the_plain_two_factor_prompt() -> None:
    """Invariant 12: DPT, P = A B with U(-0.5, 0.5) factors, trained by plain gradient steps side by side."""
    backbone = tiny.backbone("t5")
    generator = torch.Generator().manual_seed(2)
    a = torch.empty(6, 3).uniform_(-0.5, 0.5, generator=generator).requires_grad_()
    b = torch.empty(3, D).uniform_(-0.5, 0.5, generator=generator).requires_grad_()
    lamp = made(backbone, length=6, rank=3, pool=1)
    with torch.no_grad():
        lamp.u.copy_(a)
        lamp.q.fill_(1)
        lamp.v.copy_(b)
    lamp.q.requires_grad_(False)
    one, two = torch.optim.SGD([lamp.u, lamp.v], lr=0.01), torch.optim.SGD([a, b], lr=0.01)
    for _ in range(3):
        left, right = loss(backbone, lamp.prompt(View())), loss(backbone, Prompt(rows=(a @ b)[None]))
        torch.testing.assert_close(left, right)
        for optimizer, value in ((one, left), (two, right)):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    torch.testing.assert_close(lamp.u, a, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lamp.v, b, rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in lamp.parameters() if p.requires_grad) == 3 * (6 + D)


@pytest.mark.parametrize("rank", [2, 5])
def test_both_ways_of_using_q_start_from_the_same_prompt(rank: int) -> None:
    start = noise(8, D)
    once, twice = (from_matrix(start, rank=rank, pool=2, q_power=power) for power in (1, 2))
    torch.testing.assert_close(once.fold().as_rows(), twice.fold().as_rows(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(twice.q.pow(2), once.q)
    with torch.no_grad():
        once.q.mul_(2)
        twice.q.mul_(2)
    torch.testing.assert_close(2 * once.fold().as_rows(), twice.fold().as_rows(), rtol=1e-4, atol=1e-5)


def test_singular_values_start_in_descending_order_and_factors_orthonormal() -> None:
    lamp = made(tiny.backbone("t5"), length=10, rank=5)
    assert torch.equal(lamp.q, lamp.q.sort(descending=True).values)
    for gram in (lamp.u.T @ lamp.u, lamp.v @ lamp.v.T):
        torch.testing.assert_close(gram, torch.eye(5), rtol=0, atol=1e-5)


def test_the_decomposed_prompt_is_made_of_vocabulary_rows() -> None:
    backbone = tiny.backbone("bert")
    rows = made(backbone, length=8, rank=8, pool=1).fold().as_rows()
    weight = tiny.model("bert").get_input_embeddings().weight.detach()
    assert all(float((weight - row).abs().amax(1).min()) < 1e-5 for row in rows)


def test_groups_are_relative_to_each_factor_and_q_has_its_own_rate() -> None:
    lamp = made(tiny.backbone("t5"), prompt_lr=0.05, singular_lr=0.005, weight_decay=0.01)
    groups = {group.name: group for group in lamp.trained()}
    assert set(groups) == {"u", "q", "v"}
    for name, rate in (("u", 0.05), ("q", 0.005), ("v", 0.05)):
        scale = float(getattr(lamp, name).detach().pow(2).mean().sqrt())
        assert groups[name].learning_rate == pytest.approx(rate * scale)
        assert groups[name].weight_decay == 0.01
    absolute = {g.name: g.learning_rate for g in made(tiny.backbone("t5"), prompt_lr=0.3, lr_unit="absolute").trained()}
    assert absolute == {"u": 0.3, "q": 0.005, "v": 0.3}


@pytest.mark.parametrize(("length", "width", "rank"), [(4, 32, 5), (40, 8, 9)])
def test_a_rank_above_length_or_width_is_refused(length: int, width: int, rank: int) -> None:
    with pytest.raises(ConfigError, match=r"method\.rank"):
        LAMP(LAMPConfig(length=length, rank=rank), Shape(width))


@pytest.mark.parametrize(("length", "width"), [(500, 16), (100, 32)])
def test_a_large_budget_stops_at_full_rank(length: int, width: int) -> None:
    config = LAMP.match_budget(LAMPConfig(length=20), length, Shape(width))
    assert config.rank == min(20, width)
    LAMP(config, Shape(width))
