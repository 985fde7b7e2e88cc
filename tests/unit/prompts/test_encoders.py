"""Encoders against torch's own layers, their sizes by formula, and rows that do not feel each other.

Knows no method and no model.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from promptuary.prompts.encoders import ENCODERS, Averaging, Convolutional, Encoder, Recurrent
from promptuary.seeds import seeded

NAMES = sorted(ENCODERS)
each = pytest.mark.parametrize("name", NAMES)


def filled(encoder: Encoder, seed: int = 0) -> dict[str, Tensor]:
    tensors = {name: torch.full(size, torch.nan) for name, size in encoder.sizes().items()}
    encoder.fill(tensors, seeded(seed))
    return tensors


def texts(many: int = 4, length: int = 7, width: int = 6) -> Tensor:
    return torch.randn(many, length, width, generator=seeded(1))


# ---- sizes ----------------------------------------------------------------------------------------------------------


def test_counts_are_those_of_the_published_networks() -> None:
    d, n, classes = 1024, 100, 13
    cnn, rnn, mlp = Convolutional(n, d), Recurrent(n, d), Averaging(n, d)
    # the published totals hold a classifier of 13 classes for the pre-training besides
    assert cnn.count() + classes * 3 + classes == 421_943 == 12 * d + 3 + 3 * n * d + n * d + 52
    core = rnn.count() - (128 * n * d + n * d)
    assert (core, rnn.count() - core) == (657_408, 13_209_600)
    assert mlp.count() + (n * d * d + d) + (d * classes + classes) == 209_831_949


@each
def test_count_is_what_is_there_and_everything_is_filled_within_its_bound(name: str) -> None:
    encoder = ENCODERS[name](7, 6)
    tensors = filled(encoder)
    assert encoder.count() == sum(value.numel() for value in tensors.values())
    for key, value in tensors.items():
        bound = 1 / math.sqrt(encoder.summary) if key.startswith("out_") else encoder.bound(key)
        assert 0.3 * bound < float(value.abs().max()) <= bound or value.numel() == 1
    again, other = filled(encoder), filled(encoder, seed=1)
    assert all(torch.equal(value, again[key]) for key, value in tensors.items())
    assert not any(torch.equal(value, other[key]) for key, value in tensors.items())


# ---- against torch's own layers -------------------------------------------------------------------------------------


def test_the_lstm_is_torchs_lstm() -> None:
    encoder, x = Recurrent(7, 6, hidden=4), texts()
    tensors = filled(encoder)
    layer = nn.LSTM(6, 4, num_layers=2, bidirectional=True, batch_first=True)
    with torch.no_grad():
        for parameter, key in zip(layer.parameters(), encoder.inner(), strict=True):
            parameter.copy_(tensors[key])
        _, (final, _) = layer(x)
    both = torch.cat([final[-2], final[-1]], dim=-1)
    wanted = nn.functional.linear(both, tensors["out_weight"], tensors["out_bias"]).view(4, 7, 6)
    torch.testing.assert_close(encoder(tensors, x), wanted)


@pytest.mark.parametrize("length", [3, 9])
def test_the_convolutions_are_two_dimensional_ones_over_the_whole_width(length: int) -> None:
    encoder, x = Convolutional(length, 6), texts(length=length)
    tensors, found = filled(encoder), []
    longer = torch.cat([x, x.new_zeros(4, max(0, 5 - length), 6)], dim=1)
    for span in (3, 4, 5):  # one channel in and out
        answers = nn.functional.conv2d(
            longer[:, None], tensors[f"filter_{span}"][None, None], tensors[f"filter_bias_{span}"]
        )
        found.append(torch.relu(answers).amax(dim=(2, 3)))
    wanted = nn.functional.linear(torch.cat(found, 1), tensors["out_weight"], tensors["out_bias"])
    torch.testing.assert_close(encoder(tensors, x), wanted.view(4, length, 6))


def test_averaging_is_the_rectified_map_of_the_mean() -> None:
    encoder, x = Averaging(7, 6), texts()
    tensors = filled(encoder)
    wanted = torch.relu(x.mean(1) @ tensors["out_weight"].T + tensors["out_bias"])
    torch.testing.assert_close(encoder(tensors, x), wanted.view(4, 7, 6))


# ---- rows by themselves ---------------------------------------------------------------------------------------------


@each
def test_a_row_of_a_batch_gets_what_it_gets_alone(name: str) -> None:
    encoder, x = ENCODERS[name](7, 6), texts()
    tensors, noise = filled(encoder), torch.rand(4, 42, generator=seeded(3))
    for drawn in (None, noise):
        found = encoder(tensors, x, drawn)
        assert not torch.allclose(found[0], found[1])
        for row in range(4):
            own = None if drawn is None else drawn[row : row + 1]
            torch.testing.assert_close(found[row], encoder(tensors, x[row : row + 1], own)[0])


@each
def test_every_token_counts_and_every_tensor_gets_a_gradient(name: str) -> None:
    encoder, x = ENCODERS[name](7, 6), texts(1)
    # positive numbers pass rectifiers, and would fill an LSTM's gates
    tensors = filled(encoder) if name == "rnn" else {key: value.abs() for key, value in filled(encoder).items()}
    tensors = {key: value.requires_grad_() for key, value in tensors.items()}
    before = encoder(tensors, x.abs())
    for token in range(7):
        moved = x.abs()
        moved[0, token] += 10
        assert not torch.allclose(encoder(tensors, moved), before)
    (before * torch.randn(before.shape, generator=seeded(5))).sum().backward()
    assert all(value.grad is not None and bool(value.grad.any()) for value in tensors.values())


# ---- training -------------------------------------------------------------------------------------------------------


def test_averaging_leaves_out_half_and_keeps_the_mean_the_others_leave_out_nothing() -> None:
    noise = torch.rand(4, 42, generator=seeded(3))
    for name in NAMES:
        encoder, x = ENCODERS[name](7, 6), texts()
        tensors = {key: value.abs() for key, value in filled(encoder).items()}
        found, whole = encoder(tensors, x.abs(), noise), encoder(tensors, x.abs())
        if name == "mlp":
            kept = (noise >= 0.5).view(4, 7, 6)
            assert 0.4 < float(kept.float().mean()) < 0.6
            torch.testing.assert_close(found, torch.where(kept, 2 * whole, 0))
        else:
            assert torch.equal(found, whole)
