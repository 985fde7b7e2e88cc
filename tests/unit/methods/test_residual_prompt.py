"""Residual prompt tuning: its equation, counts, start, and what is left of it when it is folded.

Knows no other method but prompt tuning, which its folded form is.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from promptuary.errors import ConfigError
from promptuary.methods.residual_prompt import ResidualPrompt, ResidualPromptConfig
from promptuary.prompts.init import Starting
from promptuary.types import Shape, View

D = tiny.WIDTH


def made(seed: int = 0, **settings: Any) -> ResidualPrompt:
    config = ResidualPromptConfig(**{"num_virtual_tokens": 4, "bottleneck": 6, **settings})
    method = ResidualPrompt(config, Shape(D))
    method.initialise(Starting(tiny.backbone("bert").vocabulary, torch.Generator().manual_seed(seed)))
    return method


def reference(method: ResidualPrompt, row: int, network: int) -> Tensor:
    """P + f(P) of one row with torch's own layers."""
    width = method.settings.bottleneck
    down, up, norm = nn.Linear(D, width), nn.Linear(width, D), nn.LayerNorm(D)
    with torch.no_grad():
        down.weight.copy_(method.down[network].T)
        down.bias.copy_(method.down_bias[network])
        up.weight.copy_(method.up[network].T)
        up.bias.copy_(method.up_bias[network])
        if method.settings.layer_norm:
            norm.weight.copy_(method.norm[network])
            norm.bias.copy_(method.norm_bias[network])
        inner = up(torch.relu(down(method.rows[row])))
        return method.rows[row] + (norm(inner) if method.settings.layer_norm else inner)


@pytest.mark.parametrize("network", ["shared", "each"])
@pytest.mark.parametrize("layer_norm", [True, False])
def test_it_is_the_rows_plus_a_network_of_them(network: str, layer_norm: bool) -> None:
    method = made(network=network, layer_norm=layer_norm)
    with torch.no_grad():
        for value in method.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
    rows = method.fold().as_rows()
    for row in range(4):
        wanted = reference(method, row, row if network == "each" else 0)
        torch.testing.assert_close(rows[row], wanted, rtol=1e-4, atol=1e-5)


def test_counts_are_the_published_ones() -> None:
    """T5-large with 100 rows and a bottleneck of 400: 925,072, quoted as 925K."""
    config = ResidualPromptConfig(num_virtual_tokens=100, bottleneck=400)
    assert ResidualPrompt.count(config, Shape(1024)) == 925_072


@pytest.mark.parametrize("network", ["shared", "each"])
@pytest.mark.parametrize("layer_norm", [True, False])
def test_the_formula_counts_what_is_trained(network: str, layer_norm: bool) -> None:
    method = made(network=network, layer_norm=layer_norm)
    assert ResidualPrompt.count(method.config, Shape(D)) == sum(value.numel() for value in method.parameters())


def test_the_residual_is_never_zero_at_the_start_and_as_large_as_asked() -> None:
    """LayerNorm sees to it; its scale is the vocabulary's, or one as in the paper."""
    rms = tiny.backbone("bert").vocabulary.rms()
    for start, wanted in (("vocabulary", rms), ("one", 1.0)):
        residual = made(norm_start=start).residual().detach()
        assert float(residual.pow(2).mean().sqrt()) == pytest.approx(wanted, rel=0.05)


def test_it_folds_to_a_table_and_the_network_is_gone() -> None:
    method = made()
    folded = method.fold()
    assert folded.sites == {"input"}
    assert folded.as_rows().shape == (4, D)
    assert torch.equal(folded.as_rows(), method.prompt(View()).rows[0].detach())


def test_every_tensor_learns() -> None:
    method = made()
    target = torch.randn(1, 4, D, generator=torch.Generator().manual_seed(2))
    (method.prompt(View()).rows - target).pow(2).sum().backward()
    assert all(bool((value.grad != 0).any()) for value in method.parameters())
    rates = {group.name: group.learning_rate for group in made(modules_lr=0.25, lr_unit="absolute").trained()}
    assert rates.pop("rows") == 0.05
    assert set(rates.values()) == {0.25}


@pytest.mark.parametrize("network", ["shared", "each"])
def test_a_budget_is_kept_and_used(network: str) -> None:
    config = ResidualPrompt.match_budget(ResidualPromptConfig(num_virtual_tokens=4, network=network), 60, Shape(D))
    more = config.model_copy(update={"bottleneck": config.bottleneck + 1})
    assert ResidualPrompt.count(config, Shape(D)) <= 60 * D < ResidualPrompt.count(more, Shape(D))
    with pytest.raises(ConfigError, match=r"lower method\.num_virtual_tokens"):
        ResidualPrompt.match_budget(ResidualPromptConfig(num_virtual_tokens=4), 4, Shape(D))
