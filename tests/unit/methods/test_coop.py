"""CoOp: where its context starts, its shape, places and counts, and what it refuses.

Knows no other method.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from promptuary.errors import ConfigError, NotFoldable
from promptuary.methods.coop import CoOp, CoOpConfig
from promptuary.prompts.contexts import context_placement
from promptuary.prompts.init import Saved
from promptuary.types import Prompt, Shape, View
from words import NAMES, SHAPE, D, H, Words, starting, texts


def made(seed: int = 0, shape: Shape = SHAPE, **settings: Any) -> CoOp:
    method = CoOp(CoOpConfig(**settings), shape)
    method.initialise(starting(seed))
    return method


def test_it_starts_as_its_words_and_m_is_their_number() -> None:
    words = Words()
    wanted = words.embed(words.ids("a photo of a"))
    assert torch.equal(made().prompt(View()).context, wanted[None, None, None])
    assert torch.equal(made(init_text="one", num_virtual_tokens=2).context[0], words.embed(words.ids("one one")))


def test_at_random_it_is_small_and_follows_the_seed() -> None:
    drawn = made(init="random", num_virtual_tokens=400).context.detach()
    assert float(drawn.std()) == pytest.approx(0.02, rel=0.05)
    assert abs(float(drawn.mean())) < 0.001
    again, other = (made(seed, init="random", num_virtual_tokens=400).context for seed in (0, 1))
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, other)


def test_a_context_for_each_class_starts_alike_from_words_and_apart_at_random() -> None:
    same, apart = made(class_specific=True), made(class_specific=True, init="random")
    assert same.prompt(View()).context.shape == (1, len(NAMES), 1, 4, D)
    assert torch.equal(same.context[0], same.context[2])
    assert not torch.equal(apart.context[0], apart.context[2])
    same.prompt(View()).context[0, 1].sum().backward()
    assert [bool(row.any()) for row in same.context.grad] == [False, True, False]


def test_counts_are_the_published_ones() -> None:
    """2,048 numbers with four rows of CLIP's 512, 8,192 with sixteen; C times that with a context for each class."""
    wide = Shape(512, classes=10)
    assert CoOp.count(CoOpConfig(), wide) == 2_048
    assert CoOp.count(CoOpConfig(num_virtual_tokens=16, init="random"), wide) == 8_192
    assert CoOp.count(CoOpConfig(class_specific=True), wide) == 20_480
    for settings in ({}, {"class_specific": True}):
        method = made(**settings)
        assert CoOp.count(method.config, SHAPE) == sum(value.numel() for value in method.parameters())


@pytest.mark.parametrize(
    ("where", "count", "wanted"),
    [
        ("front", 4, "front"),
        ("end", 4, "end"),
        ("middle", 4, (("before_answer", 2), ("after_answer", 2))),
        ("middle", 5, (("before_answer", 2), ("after_answer", 3))),
        ("middle", 1, (("after_answer", 1),)),
    ],
)
def test_it_stands_before_the_class_around_it_or_behind(where: Any, count: int, wanted: Any) -> None:
    assert context_placement(where, count) == wanted
    assert made(placement=where, num_virtual_tokens=count).prompt(View()).placement == wanted


def test_its_rate_and_decay_are_absolute() -> None:
    (group,) = made().trained()
    assert (group.name, group.learning_rate, group.weight_decay) == ("context", 2e-3, 5e-4)


def test_a_class_is_the_unit_vector_of_its_text() -> None:
    found = texts()
    classes = made().classes(found)
    torch.testing.assert_close(classes * found.norm(dim=-1, keepdim=True), found)
    assert classes.shape == (1, len(NAMES), H)


def test_it_folds_to_its_context_alone() -> None:
    method = made()
    folded = method.fold()
    assert folded.sites == {"context"}
    assert torch.equal(folded.context, method.context[None, :, None].detach())
    with pytest.raises(NotFoldable, match="no table of rows among text"):
        folded.as_rows()


def test_an_earlier_context_is_a_start_and_one_for_each_class_is_not() -> None:
    earlier = made(init="random").fold()
    rows = saved(earlier).rows()
    method = CoOp(CoOpConfig(init="saved", init_prompt="earlier", num_virtual_tokens=6), SHAPE)
    method.initialise(starting(saved=rows))
    assert torch.equal(method.context[0], torch.cat([rows, rows[:2]]))
    with pytest.raises(NotFoldable, match="earlier .coop. cannot be started from"):
        saved(made(class_specific=True).fold()).rows()
    with pytest.raises(ConfigError, match="has width 16, the backbone 8"):
        CoOp(CoOpConfig(init="saved"), Shape(8)).initialise(starting(saved=rows))


def saved(prompt: Prompt) -> Saved:
    return Saved("earlier", "coop", {}, {}, prompt, {})


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"class_specific.*this task has none"):
        CoOp(CoOpConfig(class_specific=True), Shape(D))
    with pytest.raises(ConfigError, match="init_text is empty"):
        made(init_text=None)
    for settings, field in (({"init": "vocabulary"}, "init"), ({"placement": "after_bos"}, "placement")):
        with pytest.raises(ConfigError, match=f"method.{field}: expected"):
            CoOpConfig.read(settings, where="method")


def test_a_budget_is_kept_and_used() -> None:
    assert CoOp.match_budget(CoOpConfig(), 7, SHAPE).num_virtual_tokens == 7
    own = CoOpConfig(class_specific=True)
    assert CoOp.match_budget(own, 7, SHAPE).num_virtual_tokens == 2
    with pytest.raises(ConfigError, match=r"set method\.class_specific: false"):
        CoOp.match_budget(own, 2, SHAPE)
