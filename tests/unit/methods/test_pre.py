"""PRE: its encoders against torch's own layers, counts, starts, and what is left when the encoder is gone.

Knows no other method but CoOp, which its folded form is.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from promptuary.errors import ConfigError
from promptuary.methods.coop import CoOp, CoOpConfig
from promptuary.methods.pre import PRE, PREConfig
from promptuary.prompts.reparam import thinned
from promptuary.seeds import Chance
from promptuary.types import Shape, View
from words import NAMES, SHAPE, D, starting

KINDS = ("bilstm", "bilstm2", "mlp", "mlp_shared", "transformer")


def made(seed: int = 0, **settings: Any) -> PRE:
    method = PRE(PREConfig(**settings), SHAPE)
    method.initialise(starting(seed))
    return method


def theta_gone(method: PRE) -> PRE:
    with torch.no_grad():
        for name, value in method.named_parameters():
            if name != "context":
                value.zero_()
    return method


def layers(method: PRE, number: int = 0) -> nn.Module:
    """The encoder out of torch's own layers, with the same weights."""
    own, kind = method.tensors(number), method.settings.encoder
    if kind.startswith("bilstm"):
        count = 2 if kind == "bilstm2" else 1
        found: nn.Module = nn.LSTM(D, D // 2, count, batch_first=True, bidirectional=True)
    elif kind.startswith("mlp"):
        found = nn.Sequential(nn.Linear(D, 64), nn.ReLU(), nn.Linear(64, D))
    else:
        layer = nn.TransformerEncoderLayer(D, 2, 2048, dropout=0.05, batch_first=True)
        found = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        order = ("qkv", "qkv_bias", "out", "out_bias", "down", "down_bias", "up", "up_bias")
        norms = ("norm_1", "norm_1_bias", "norm_2", "norm_2_bias")
        own = {f"{name}_{place}": own[f"{name}_{place}"] for place in (0, 1) for name in order + norms}
    with torch.no_grad():
        for theirs, mine in zip(found.parameters(), own.values(), strict=True):
            theirs.copy_(mine)
    return found.eval()


def applied(encoder: nn.Module, kind: str, x: Tensor) -> Tensor:
    with torch.no_grad():
        found = encoder(x)
        if kind == "mlp_shared":
            found = encoder(found)
        return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_context_is_what_torchs_own_layers_make_of_it(kind: str, residual: bool) -> None:
    method = made(encoder=kind, residual=residual)
    wanted = applied(layers(method), kind, method.context.detach()) + (method.context.detach() if residual else 0)
    torch.testing.assert_close(method.fold().context[0, :, 0], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["bilstm", "mlp", "transformer"])
def test_separate_encoders_read_one_row_each(kind: str) -> None:
    method = made(encoder=kind, separate=True)
    found, rows = method.fold().context[0, 0, 0], method.context.detach()
    for place in range(4):
        row = rows[:, place : place + 1]
        wanted = applied(layers(method, place), kind, row) + row
        torch.testing.assert_close(found[place], wanted[0, 0], rtol=1e-5, atol=1e-5)
    method.prompt(View()).context[0, 0, 0, 1].sum().backward()
    gradients = [[value.grad for value in method.tensors(place).values()] for place in range(4)]
    moved = [any(value is not None and bool(value.any()) for value in own) for own in gradients]
    assert moved == [False, True, False, False], "each is trained, by its own row alone"


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_of_zeros_leaves_coop(kind: str) -> None:
    coop = CoOp(CoOpConfig(), SHAPE)
    coop.initialise(starting())
    assert torch.equal(theta_gone(made(encoder=kind)).fold().context, coop.fold().context)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_it_can_start_as_coop_and_learns_from_there(kind: str, separate: bool) -> None:
    method = made(encoder=kind, separate=separate, zero_init_last=True)
    assert torch.equal(method.fold().context[0, :, 0], method.context.detach())
    first = method.context.detach().clone()
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (method.prompt(View()).context - 1).pow(2).mean().backward()
        optimizer.step()
    assert not torch.equal(method.context.detach(), first)
    assert bool(((method.fold().context[0, :, 0] - method.context.detach()).abs().amax(-1) > 1e-6).all())


def test_with_the_release_start_it_is_far_from_its_words() -> None:
    method = made()
    moved = (method.fold().context[0, :, 0] - method.context.detach()).norm()
    assert float(moved) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_learns_from_the_first_step(kind: str) -> None:
    method = made(encoder=kind)
    aim = torch.randn(1, 1, 1, 4, D, generator=torch.Generator().manual_seed(3))
    (method.prompt(View()).context - aim).pow(2).sum().backward()
    assert all(value.grad is not None and bool(value.grad.any()) for value in method.parameters())


@pytest.mark.parametrize(("kind", "ties"), [("bilstm", True), ("mlp", False), ("mlp_shared", False)])
def test_an_lstm_reads_the_order_of_rows_and_an_mlp_does_not(kind: str, ties: bool) -> None:
    method, order = made(encoder=kind), torch.tensor([2, 0, 3, 1])
    before = method.fold().context[0, 0, 0]
    with torch.no_grad():
        method.context.copy_(method.context[:, order])
    assert torch.allclose(method.fold().context[0, 0, 0], before[order], atol=1e-6) != ties


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_one_row_is_one_row(kind: str, separate: bool) -> None:
    method = made(encoder=kind, separate=separate, num_virtual_tokens=1)
    assert method.fold().context.shape == (1, 1, 1, 1, D)


@pytest.mark.parametrize("kind", KINDS)
def test_contexts_of_classes_are_a_batch_through_one_encoder(kind: str) -> None:
    method = made(encoder=kind, class_specific=True, init="random")
    found = method.fold().context
    assert found.shape == (1, len(NAMES), 1, 4, D)
    for place in range(len(NAMES)):
        alone = applied(layers(method), kind, method.context[place : place + 1].detach())
        torch.testing.assert_close(
            found[0, place, 0], (alone + method.context[place].detach())[0], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("bilstm", 1_576_960),
        ("bilstm2", 3_153_920),
        ("mlp", 66_112),
        ("mlp_shared", 66_112),
        ("transformer", 6_304_768),
    ],
)
def test_counts_are_those_of_the_release(kind: Any, wanted: int) -> None:
    assert PRE.count(PREConfig(encoder=kind), Shape(512)) == wanted + 4 * 512
    assert PRE.count(PREConfig(encoder=kind, separate=True), Shape(512)) == 4 * wanted + 4 * 512
    for separate in (False, True):
        method = made(encoder=kind, separate=separate)
        assert PRE.count(method.config, SHAPE) == sum(value.numel() for value in method.parameters())


def test_everything_is_trained_with_its_rate_and_decay() -> None:
    groups = {group.name: group for group in made(modules_lr=0.25).trained()}
    assert groups.pop("context").learning_rate == 2e-3
    assert {group.learning_rate for group in groups.values()} == {0.25}
    assert {group.weight_decay for group in groups.values()} == {5e-4}


@pytest.mark.parametrize(
    ("kind", "drops"), [("bilstm", False), ("bilstm2", True), ("mlp", False), ("transformer", True)]
)
def test_dropout_is_of_training_and_follows_the_step(kind: str, drops: bool) -> None:
    method = made(encoder=kind, dropout=0.3)

    def context(step: int | None) -> Tensor:
        chance = None if step is None else Chance(0, step, torch.arange(2))
        return method.prompt(View(chance=chance)).context.detach()

    assert torch.equal(context(1), context(1)), "parts of one step have the same"
    assert torch.equal(context(1), context(2)) != drops
    assert torch.equal(context(1), context(None)) != drops
    torch.testing.assert_close(context(None), method.fold().context)


def test_what_is_kept_makes_up_for_what_is_left_out() -> None:
    found = thinned(torch.ones(100, 100), 0.25, torch.Generator().manual_seed(0))
    assert sorted(set(found.unique().tolist())) == [0.0, pytest.approx(4 / 3)]
    assert float((found == 0).float().mean()) == pytest.approx(0.25, abs=0.02)


def test_it_folds_to_a_plain_context_that_coop_can_start_from() -> None:
    folded = made().fold()
    assert folded.sites == {"context"}
    coop = CoOp(CoOpConfig(init="saved"), SHAPE)
    coop.initialise(starting(saved=folded.context[0, 0, 0]))
    assert torch.equal(coop.fold().context, folded.context)


def test_an_odd_width_is_refused_with_a_way_out() -> None:
    with pytest.raises(ConfigError, match=r"even width, not 15; use encoder: mlp"):
        PRE(PREConfig(), Shape(15))
    with pytest.raises(ConfigError, match="2 heads cannot share a width of 15"):
        PRE(PREConfig(encoder="transformer"), Shape(15))
    assert PRE(PREConfig(encoder="mlp"), Shape(15)).context.shape == (1, 4, 15)


@pytest.mark.parametrize(
    ("kind", "field", "fix"), [("mlp", "bottleneck", "num_virtual_tokens"), ("bilstm", "num_virtual_tokens", "encoder")]
)
def test_a_budget_is_kept_and_used(kind: Any, field: str, fix: str) -> None:
    config = PRE.match_budget(PREConfig(encoder=kind), 130, SHAPE)
    more = config.model_copy(update={field: getattr(config, field) + 1})
    assert PRE.count(config, SHAPE) <= 130 * D < PRE.count(more, SHAPE)
    with pytest.raises(ConfigError, match=rf"method\.{fix}"):
        PRE.match_budget(PREConfig(encoder=kind), 4, SHAPE)
