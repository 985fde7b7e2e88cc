"""Blocks that more than one method is built from: low-rank factors, normalisation, attention fusion, pooling.

Knows no method's name, model or file; every function is pure.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def layer_norm(x: Float[Tensor, "... d"], eps: float = 1e-5) -> Float[Tensor, "... d"]:
    """LayerNorm over the last axis without any affine part; LN(0) = 0."""
    return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps)


def svd_factors(
    matrix: Float[Tensor, "n d"], rank: int
) -> tuple[Float[Tensor, "n r"], Float[Tensor, " r"], Float[Tensor, "r d"]]:
    """Thin SVD cut to `rank`: U_r [n, r], singular values [r], V_r^T [r, d]. Needs rank <= min(n, d).

    The sign of each component is fixed (largest entry of its right vector positive), so that the
    result does not depend on the linear-algebra library.
    """
    u, sigma, vt = torch.linalg.svd(matrix, full_matrices=False)
    u, sigma, vt = u[:, :rank], sigma[:rank], vt[:rank]
    largest = vt.gather(1, vt.abs().argmax(dim=1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(vt.dtype)
    return u * sign.T, sigma, vt * sign


def kaiming_uniform(rows: int, columns: int, generator: torch.Generator) -> Float[Tensor, "rows columns"]:
    """U(-1/sqrt(columns), 1/sqrt(columns)): Kaiming-uniform with a = sqrt(5), as DePT's code draws A."""
    bound = 1 / math.sqrt(max(columns, 1))
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)


def linear_start(weight: Float[Tensor, "n m"], bias: Float[Tensor, " m"], generator: torch.Generator) -> None:
    """Fill x @ weight + bias as torch starts a linear layer: uniform within 1 / sqrt(n)."""
    bound = 1 / math.sqrt(weight.shape[0])
    weight.uniform_(-bound, bound, generator=generator)
    bias.uniform_(-bound, bound, generator=generator)


def xavier_uniform(rows: int, columns: int, generator: torch.Generator) -> Float[Tensor, "rows columns"]:
    """Glorot-uniform."""
    bound = math.sqrt(6 / (rows + columns))
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)


def attend(query: Float[Tensor, "s h"], key: Float[Tensor, "n h"], value: Float[Tensor, "n d"]) -> Float[Tensor, "s d"]:
    """softmax(query key^T / sqrt(h)) value: one head, no batch."""
    weights = torch.softmax(query @ key.T / math.sqrt(query.shape[-1]), dim=-1)
    return weights @ value


def pool_rows(rows: Float[Tensor, "n d"], window: int) -> Float[Tensor, "q d"]:
    """Mean over consecutive windows of rows; the last window may be short (its mean is over what it has)."""
    if window == 1:
        return rows
    full = rows.shape[0] // window * window
    pooled = rows[:full].reshape(-1, window, rows.shape[1]).mean(dim=1)
    if full == rows.shape[0]:
        return pooled
    return torch.cat([pooled, rows[full:].mean(dim=0, keepdim=True)])


def masked_mean(x: Float[Tensor, "b t d"], mask: Tensor) -> Float[Tensor, "b d"]:
    """Mean over the real tokens of each row, [b, d]."""
    weight = mask.to(x.dtype)[..., None]
    return (x * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
