"""VPT: how many numbers, where they start, what dropout does, and what stays as it is.

Knows no model: what rows do among patches is for the tests of the families and for the contract suite.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from promptuary import registry
from promptuary.errors import ConfigError, NotFoldable
from promptuary.methods.visual import Visual
from promptuary.methods.vpt import VPT, VPTConfig
from promptuary.prompts.init import Starting
from promptuary.seeds import Chance
from promptuary.testing import tiny
from promptuary.types import Shape, View

BASE = Shape(768, hidden=768, visual=768, depth=12, patch=16, norms=24)
SMALL = Shape(32, hidden=32, visual=32, depth=3, patch=4, norms=6)
SHALLOW = {"deep": False, "num_virtual_tokens": 100}


def made(shape: Shape = SMALL, seed: int = 0, **settings: Any) -> VPT:
    method = VPT(VPTConfig(**settings), shape)
    method.initialise(Starting(tiny.backbone("bert").vocabulary, torch.Generator().manual_seed(seed)))
    return method


def view(*index: int, step: int = 0) -> View:
    """Of a training step."""
    return View(chance=Chance(0, step, torch.tensor(index)))


@pytest.mark.parametrize(
    ("settings", "published"),
    [
        ({}, 184_320),
        (SHALLOW, 76_800),
        ({"frozen": True}, 0),
        ({"project": 8}, 12 * 20 * 8 + 8 * 768 + 768),
    ],
)
def test_the_count_is_the_published_arithmetic(settings: dict[str, Any], published: int) -> None:
    assert VPT.count(VPTConfig(**settings), BASE) == published
    assert sum(value.numel() for value in VPT(VPTConfig(**settings), BASE).parameters()) == published


@pytest.mark.parametrize(("settings", "layers", "rows"), [({}, 12, 20), (SHALLOW, 1, 100)])
def test_rows_start_uniform_with_the_bound_of_the_patch(settings: dict[str, Any], layers: int, rows: int) -> None:
    found = made(BASE, **settings).fold().layers
    assert found is not None
    assert found.shape == (1, layers, rows, 768)
    assert found.abs().max() < 0.0625
    assert found.abs().max() > 0.0624
    assert abs(float(found.std()) - 0.0625 / math.sqrt(3)) < 2e-4
    assert abs(float(found.mean())) < 1e-3


def test_the_bound_follows_patch_and_width() -> None:
    assert made().rows.abs().max() <= math.sqrt(6 / (3 * 16 + 32))
    assert made(project=5).rows.abs().max() <= math.sqrt(6 / (3 * 16 + 5))
    assert made(project=5).rows.abs().max() > math.sqrt(6 / (3 * 16 + 32))


def test_projected_rows_are_rows_times_the_map_in_every_layer() -> None:
    method = made(BASE, project=8)
    assert bool((method.bias == 0).all())
    assert abs(float(method.projection.detach().std()) - math.sqrt(2 / 768)) < 2e-3, "Kaiming by its outputs"
    torch.nn.init.normal_(method.bias)
    found = method.prompt(View()).layers
    for layer in range(12):
        for row in (0, 19):
            expected = method.projection.T @ method.rows[layer, row] + method.bias
            torch.testing.assert_close(found[0, layer, row], expected)
    found.sum().backward()
    assert all(value.grad is not None for value in method.parameters())


def test_dropout_is_of_training_alone_each_image_its_own_and_keeps_the_mean() -> None:
    method = made(dropout=0.25, num_virtual_tokens=40)
    assert torch.equal(method.prompt(View()).layers, method.rows[None])
    found = method.prompt(view(3, 8)).layers
    assert found.shape == (2, 3, 40, 32)
    assert not torch.equal(found[0], found[1])
    for one in found.detach():
        dropped = one == 0
        assert 0.2 < float(dropped.float().mean()) < 0.3
        torch.testing.assert_close(one[~dropped], method.rows[~dropped] / 0.75)
    alone = method.prompt(view(8)).layers
    assert torch.equal(alone[0], found[1]), "an image's noise is its own, whatever else is in the batch"
    assert not torch.equal(method.prompt(view(8, step=1)).layers, alone)


def test_without_dropout_one_prompt_serves_all_images_of_a_training_step() -> None:
    method = made()
    assert torch.equal(method.prompt(view(3, 8)).layers, method.rows[None])


@pytest.mark.parametrize("settings", [{}, {"project": 5}, SHALLOW])
def test_frozen_rows_are_those_that_would_be_trained_and_none_is(settings: dict[str, Any]) -> None:
    frozen, trained = made(frozen=True, **settings), made(**settings)
    assert list(frozen.parameters()) == []
    assert frozen.trained() == []
    assert torch.equal(frozen.prompt(View()).layers, trained.prompt(View()).layers)
    assert set(frozen.constants(drawn=False)) == set(dict(trained.named_parameters()))


def test_one_seed_gives_one_prompt() -> None:
    assert torch.equal(made(seed=3).rows, made(seed=3).rows)
    assert not torch.equal(made(seed=3).rows, made(seed=4).rows)
    rows = made().rows
    assert not torch.equal(rows[0], rows[1])


def test_rates_are_absolute_and_decay_is_on_the_rows() -> None:
    groups = made(project=5, prompt_lr=0.02).trained()
    assert {group.name for group in groups} == {"rows", "projection", "bias"}
    assert {(group.learning_rate, group.weight_decay) for group in groups} == {(0.02, 1e-2)}
    relative = {group.name: group.learning_rate for group in made(lr_unit="relative").trained()}
    assert relative["rows"] == pytest.approx(5e-3 * float(made().rows.detach().pow(2).mean().sqrt()))


@pytest.mark.parametrize("settings", [{}, {"deep": False}, {"project": 5}, {"frozen": True}])
def test_a_budget_gives_the_most_rows_that_fit(settings: dict[str, Any]) -> None:
    for length in (20, 21, 100):
        matched = VPT.match_budget(VPTConfig(**settings), length, SMALL)
        trained = matched.model_copy(update={"frozen": False})
        more = trained.model_copy(update={"num_virtual_tokens": matched.num_virtual_tokens + 1})
        assert VPT.count(trained, SMALL) <= length * 32 < VPT.count(more, SMALL)
    with pytest.raises(ConfigError, match="match_length 11 gives 8448 parameters, but the smallest form has 9216"):
        VPT.match_budget(VPTConfig(), 11, BASE)
    with pytest.raises(ConfigError, match="vpt stands among patches; give the whole shape"):
        VPT.match_budget(VPTConfig(**settings), 11, Shape(768))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"init": "vocabulary"}, "method.init: expected .*random.*, got 'vocabulary'"),
        ({"placement": "end"}, "method.placement: expected .*front.*, got 'end'"),
        ({"init_text": "a cat"}, "method.init_text: input should be None, got 'a cat'"),
        ({"dropout": 1.0}, "method.dropout: input should be less than 1, got 1.0"),
        ({"projct": 3}, 'did you mean "project"'),
    ],
)
def test_settings_of_text_are_refused_in_one_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        VPTConfig.read({"name": "vpt", **settings}, where="method")
    assert "\n" not in str(caught.value)


def test_the_prompt_folds_to_its_rows_and_is_no_table_among_text() -> None:
    method = made(dropout=0.5)
    folded = method.fold()
    assert torch.equal(folded.layers[0], method.rows)
    assert folded.sites == {"layers"}
    with pytest.raises(NotFoldable, match="made for images"):
        folded.as_rows()
    torch.testing.assert_close(method.insight()["norms of rows"], method.rows.detach().norm(dim=-1))


def test_what_methods_share_is_no_method() -> None:
    assert registry.load("methods", "vpt") is VPT
    assert "visual" not in registry.names("methods")
    with pytest.raises(TypeError, match="abstract"):
        Visual(VPTConfig(), SMALL)  # type: ignore[abstract]
