"""CoCoOp: what its network does by hand, that images do not mix, counts, and why it does not fold.

Knows no other method but CoOp, which it is without its network.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from promptuary.errors import ConfigError, NotFoldable
from promptuary.methods.cocoop import CoCoOp, CoCoOpConfig
from promptuary.methods.coop import CoOp, CoOpConfig
from promptuary.types import Shape, View
from words import SHAPE, D, H, starting


def made(seed: int = 0, **settings: Any) -> CoCoOp:
    method = CoCoOp(CoCoOpConfig(**{"reduction": 4, **settings}), SHAPE)
    method.initialise(starting(seed))
    return method


def images(rows: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(rows, H, generator=torch.Generator().manual_seed(seed))


def test_every_row_moves_by_what_torchs_own_layers_make_of_the_image() -> None:
    method, features = made(), images()
    net = nn.Sequential(nn.Linear(H, H // 4), nn.ReLU(), nn.Linear(H // 4, D))
    with torch.no_grad():
        for layer, weight, bias in ((net[0], method.down, method.down_bias), (net[2], method.up, method.up_bias)):
            layer.weight.copy_(weight.T)
            layer.bias.copy_(bias)
        found = method.prompt(View(answer=features)).context
        assert found.shape == (5, 1, 1, 4, D)
        for row, feature in zip(found, features, strict=True):
            torch.testing.assert_close(row[0, 0] - method.context, net(feature / feature.norm()).expand(4, D))


def test_the_length_of_a_feature_has_no_say_and_images_do_not_mix() -> None:
    method, features = made(), images()
    whole = method.prompt(View(answer=features)).context
    torch.testing.assert_close(method.prompt(View(answer=7 * features)).context, whole)
    torch.testing.assert_close(method.prompt(View(answer=features[2:3])).context[0], whole[2])
    assert not torch.allclose(whole[0], whole[1])


def test_a_network_of_zeros_leaves_coop_for_every_image() -> None:
    coop, method = CoOp(CoOpConfig(), SHAPE), made()
    coop.initialise(starting())
    with torch.no_grad():
        method.up.zero_()
        method.up_bias.zero_()
    found = method.prompt(View(answer=images())).context
    assert all(torch.equal(one, coop.fold().context[0]) for one in found)


def test_counts_are_the_published_ones() -> None:
    """2,048 of the context and 33,312 of the network for CLIP ViT-B/16."""
    assert CoCoOp.count(CoCoOpConfig(), Shape(512, hidden=512)) == 35_360
    assert CoCoOp.count(made().config, SHAPE) == sum(value.numel() for value in made().parameters())


def test_everything_learns_with_its_rate() -> None:
    method = made(modules_lr=0.25)
    method.prompt(View(answer=images(50))).context.pow(2).sum().backward()
    assert all(bool(value.grad.any()) for value in method.parameters())
    groups = {group.name: group for group in method.trained()}
    assert groups.pop("context").learning_rate == 2e-3
    assert {(group.learning_rate, group.weight_decay) for group in groups.values()} == {(0.25, 5e-4)}


def test_it_depends_on_the_image_and_does_not_fold() -> None:
    assert made().needs == {"answer"}
    with pytest.raises(NotFoldable, match="cocoop depends on the input"):
        made().fold()


def test_half_of_the_rows_can_stand_behind_the_class() -> None:
    assert made(placement="middle").prompt(View(answer=images())).placement == (
        ("before_answer", 2),
        ("after_answer", 2),
    )


def test_a_budget_is_kept_and_used() -> None:
    config = CoCoOp.match_budget(CoCoOpConfig(reduction=4), 12, SHAPE)
    more = config.model_copy(update={"num_virtual_tokens": config.num_virtual_tokens + 1})
    assert CoCoOp.count(config, SHAPE) <= 12 * D < CoCoOp.count(more, SHAPE)
    with pytest.raises(ConfigError, match=r"raise method\.reduction"):
        CoCoOp.match_budget(CoCoOpConfig(reduction=1), 12, SHAPE)
