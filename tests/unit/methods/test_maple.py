"""MaPLe: that both towers hang on one tensor, where its layers start, counts, and what it refuses.

Knows no other method.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from promptuary.errors import ConfigError
from promptuary.methods.maple import MaPLe, MaPLeConfig
from promptuary.types import Shape, View
from words import SHAPE, D, V, Words, starting


def made(seed: int = 0, **settings: Any) -> MaPLe:
    method = MaPLe(MaPLeConfig(**{"depth": 3, **settings}), SHAPE)
    method.initialise(starting(seed))
    return method


def test_the_rows_that_are_seen_are_torchs_linear_maps_of_the_words() -> None:
    method = made()
    with torch.no_grad():
        found = method.prompt(View())
        assert found.context.shape == (1, 1, 3, 2, D)
        assert found.layers.shape == (1, 3, 2, V)
        for layer in range(3):
            linear = nn.Linear(D, V)
            linear.weight.copy_(method.maps[layer].T)
            linear.bias.copy_(method.map_biases[layer])
            torch.testing.assert_close(found.layers[0, layer], linear(found.context[0, 0, layer]))


def test_what_is_seen_teaches_the_words_of_its_own_layer() -> None:
    method = made()
    method.prompt(View()).layers[0, 1].pow(2).sum().backward()
    for value in method.parameters():
        assert [bool(own.any()) for own in value.grad] == [False, True, False]


def test_the_first_layer_starts_as_words_and_the_others_at_random() -> None:
    words, method = Words(), made(num_virtual_tokens=2)
    assert torch.equal(method.contexts[0], words.embed(words.ids("a photo")))
    rest = made(num_virtual_tokens=400).contexts[1:].detach()
    assert float(rest.std()) == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(rest[0], rest[1])
    again, other = made(), made(seed=1)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(method.parameters(), again.parameters(), strict=True))
    assert not torch.equal(method.maps, other.maps)


def test_counts_are_the_published_ones() -> None:
    """3,555,072 for nine layers of two rows in CLIP ViT-B/16."""
    clip = Shape(512, hidden=512, visual=768, depth=12)
    assert MaPLe.count(MaPLeConfig(), clip) == 3_555_072
    assert MaPLe.count(made().config, SHAPE) == sum(value.numel() for value in made().parameters())


def test_everything_is_trained_with_the_rate_and_decay_of_the_release() -> None:
    groups = made().trained()
    assert {(group.learning_rate, group.weight_decay) for group in groups} == {(3.5e-3, 5e-4)}
    own = {group.name: group.learning_rate for group in made(modules_lr=0.25).trained()}
    assert own == {"contexts": 3.5e-3, "maps": 0.25, "map_biases": 0.25}


def test_it_folds_to_rows_of_both_towers_without_the_maps() -> None:
    method = made()
    folded = method.fold()
    assert folded.sites == {"context", "layers"}
    torch.testing.assert_close(folded.layers[0], method.seen())


def test_more_layers_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.depth is 9, and this model has 3 layers that see"):
        MaPLe(MaPLeConfig(), SHAPE)


def test_a_budget_is_kept_and_used() -> None:
    config = MaPLe.match_budget(MaPLeConfig(), 60, SHAPE)
    assert config.depth == 2
    assert MaPLe.count(config, SHAPE) <= 60 * D < MaPLe.count(config.model_copy(update={"depth": 3}), SHAPE)
    assert MaPLe.match_budget(MaPLeConfig(), 1000, SHAPE).depth == 3
    with pytest.raises(ConfigError, match="a single layer with its map is that large"):
        MaPLe.match_budget(MaPLeConfig(), 20, SHAPE)
