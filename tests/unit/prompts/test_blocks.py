"""Blocks against their formulas in NumPy.

Knows no method and no model.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from promptuary.prompts.blocks import (
    attend,
    kaiming_uniform,
    layer_norm,
    masked_mean,
    pool_rows,
    svd_factors,
    xavier_uniform,
)


def noise(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_layer_norm_is_centred_and_scaled_by_row() -> None:
    x = 40 * noise(3, 5, 7) + 9
    a = x.numpy()
    expected = (a - a.mean(-1, keepdims=True)) / np.sqrt(a.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(layer_norm(x).numpy(), expected, atol=1e-12)


def test_layer_norm_of_zero_is_zero_with_finite_gradient() -> None:
    x = torch.zeros(2, 6, requires_grad=True)
    out = layer_norm(x)
    out.mul(noise(2, 6).float()).sum().backward()
    assert torch.equal(out, torch.zeros(2, 6))
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


@pytest.mark.parametrize(("rows", "columns"), [(9, 6), (6, 9), (5, 5)])
def test_factors_of_full_rank_give_the_matrix_back(rows: int, columns: int) -> None:
    matrix = noise(rows, columns)
    u, sigma, vt = svd_factors(matrix, min(rows, columns))
    torch.testing.assert_close((u * sigma) @ vt, matrix)
    eye = torch.eye(min(rows, columns), dtype=torch.float64)
    torch.testing.assert_close(u.T @ u, eye)
    torch.testing.assert_close(vt @ vt.T, eye)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_cut_factors_are_the_nearest_matrix_of_that_rank(rank: int) -> None:
    """Eckart-Young: what is lost is the dropped part of the spectrum, taken from the Gram matrix."""
    matrix = noise(8, 5)
    u, sigma, vt = svd_factors(matrix, rank)
    assert (u.shape, sigma.shape, vt.shape) == ((8, rank), (rank,), (rank, 5))
    spectrum = np.linalg.eigvalsh((matrix.T @ matrix).numpy())[::-1]
    np.testing.assert_allclose(sigma.numpy() ** 2, spectrum[:rank])
    lost = float((matrix - (u * sigma) @ vt).pow(2).sum())
    assert lost == pytest.approx(spectrum[rank:].sum())


def test_signs_of_factors_do_not_depend_on_the_library() -> None:
    """Any SVD of the same matrix, with any signs, is brought to the same one."""
    matrix = noise(7, 4)
    _, _, vt = svd_factors(matrix, 4)
    assert all(float(row[row.abs().argmax()]) > 0 for row in vt)
    u, _, minus = svd_factors(-matrix, 4)
    torch.testing.assert_close(minus, vt)
    torch.testing.assert_close(u, -svd_factors(matrix, 4)[0])


@pytest.mark.parametrize(
    ("draw", "bound"), [(kaiming_uniform, 1 / math.sqrt(30)), (xavier_uniform, math.sqrt(6 / 430))]
)
def test_uniform_starts_fill_their_interval(draw: object, bound: float) -> None:
    assert callable(draw)
    values = draw(400, 30, torch.Generator().manual_seed(0))
    assert values.shape == (400, 30)
    assert float(values.abs().max()) <= bound
    assert float(values.abs().max()) > 0.99 * bound
    assert float(values.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert torch.equal(values, draw(400, 30, torch.Generator().manual_seed(0)))


def test_kaiming_equals_the_call_that_the_released_code_makes() -> None:
    torch.manual_seed(6)
    expected = torch.nn.init.kaiming_uniform_(torch.empty(20, 8), a=math.sqrt(5))
    generator = torch.Generator().manual_seed(6)
    torch.testing.assert_close(kaiming_uniform(20, 8, generator), expected)


def test_no_columns_draw_nothing() -> None:
    assert kaiming_uniform(5, 0, torch.Generator()).shape == (5, 0)


def test_attention_is_a_loop_over_rows() -> None:
    query, key, value = noise(3, 4), noise(6, 4, seed=1), noise(6, 5, seed=2)
    for row, out in zip(query.numpy(), attend(query, key, value).numpy(), strict=True):
        weights = [math.exp(float(row @ k) / math.sqrt(4)) for k in key.numpy()]
        expected = sum(w * v for w, v in zip(weights, value.numpy(), strict=True)) / sum(weights)
        np.testing.assert_allclose(out, expected)


def test_equal_keys_attend_to_the_mean() -> None:
    value = noise(6, 5)
    out = attend(noise(3, 4), torch.zeros(6, 4, dtype=torch.float64), value)
    torch.testing.assert_close(out, value.mean(0).expand(3, 5))


@pytest.mark.parametrize(("rows", "window"), [(6, 1), (6, 2), (6, 3), (6, 6), (7, 3), (5, 2), (2, 5)])
def test_pooling_is_the_mean_of_each_window(rows: int, window: int) -> None:
    x = noise(rows, 3)
    expected = [x.numpy()[start : start + window].mean(0) for start in range(0, rows, window)]
    np.testing.assert_allclose(pool_rows(x, window).numpy(), np.stack(expected))
    assert len(pool_rows(x, window)) == math.ceil(rows / window)


def test_a_full_window_pools_as_torch_does() -> None:
    x = noise(12, 5)
    expected = torch.nn.functional.avg_pool1d(x.T[None], kernel_size=4, stride=4, ceil_mode=True)[0].T
    torch.testing.assert_close(pool_rows(x, 4), expected)


@pytest.mark.parametrize("window", [1, 2, 3, 5, 9])
def test_pooling_commutes_with_a_product_on_the_right(window: int) -> None:
    left, right = noise(9, 4), noise(4, 6, seed=1)
    torch.testing.assert_close(pool_rows(left @ right, window), pool_rows(left, window) @ right)


def test_masked_mean_reads_real_tokens_only() -> None:
    x = noise(3, 5, 2)
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    spoiled = torch.where(mask[..., None], x, torch.full_like(x, 1e6))
    expected = np.stack([x[0, :2].numpy().mean(0), x[1, 2:].numpy().mean(0), np.zeros(2)])
    np.testing.assert_allclose(masked_mean(spoiled, mask).numpy(), expected)
