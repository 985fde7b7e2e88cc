"""KgCoOp: its loss by hand, where the hand-made side comes from, and that nothing but the context learns.

Knows no other method but CoOp, which it is without its loss.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from promptuary.errors import ConfigError
from promptuary.methods.coop import CoOp, CoOpConfig
from promptuary.methods.kgcoop import KgCoOp, KgCoOpConfig
from promptuary.prompts.losses import cosine_distance
from promptuary.types import Losses, Shape, View
from words import NAMES, SHAPE, D, H, Named, feature, said, starting, texts


def made(seed: int = 0, **settings: Any) -> KgCoOp:
    method = KgCoOp(KgCoOpConfig(**settings), SHAPE)
    method.initialise(starting(seed))
    return method


def test_its_loss_is_eight_times_how_far_the_texts_are_from_the_sentences() -> None:
    found = texts()
    wanted = torch.stack([feature(f"a photo of a {name}.") for name in NAMES])
    away = 1 - torch.nn.functional.cosine_similarity(found[0], wanted).mean()
    losses = made().loss(torch.tensor(0.5), said(found))
    torch.testing.assert_close(losses.total, 0.5 + 8 * away)
    assert losses.parts == {"task": 0.5, "knowledge": pytest.approx(float(away.detach()))}
    losses.total.backward()
    assert bool((found.grad != 0).any())


def test_it_is_half_of_the_papers_squared_distance() -> None:
    one, other = (torch.nn.functional.normalize(texts(seed=seed)[0].detach(), dim=-1) for seed in (0, 1))
    squared = (one - other).pow(2).sum(-1).mean()
    torch.testing.assert_close(2 * cosine_distance(3 * one, 5 * other), squared)
    torch.testing.assert_close(cosine_distance(one, 2 * one), torch.tensor(0.0), rtol=0, atol=1e-6)


def test_the_tower_is_asked_once_and_its_answer_never_changes() -> None:
    asked = Named()
    method = KgCoOp(KgCoOpConfig(template="{}, a type of {}."), SHAPE)
    method.initialise(starting(classes=asked))
    assert asked.asked == [f"{name}, a type of {name}." for name in NAMES]
    before = method.references.clone()
    optimizer = torch.optim.SGD(method.parameters(), lr=1.0, weight_decay=0.1)
    for _ in range(3):
        method.loss(method.prompt(View()).context.sum(), said(texts())).total.backward()
        optimizer.step()
    assert torch.equal(method.references, before)
    assert not method.references.requires_grad
    assert len(asked.asked) == len(NAMES)


def test_what_is_saved_is_the_context_and_a_loaded_prompt_says_why_it_cannot_learn() -> None:
    assert list(made().state_dict()) == ["context"]
    loaded = KgCoOp(KgCoOpConfig(), SHAPE)
    with pytest.raises(ConfigError, match="kgcoop was loaded, and the sentences .* are not saved"):
        loaded.loss(torch.tensor(0.5), said(texts()))


def test_without_its_weight_it_is_coop_and_asks_for_nothing() -> None:
    plain = KgCoOp(KgCoOpConfig(knowledge_weight=0), SHAPE)
    plain.initialise(starting(classes=None))
    assert plain.studies == frozenset()
    assert plain.loss(torch.tensor(0.5), said(texts())) == Losses(torch.tensor(0.5), {"task": 0.5})
    coop = CoOp(CoOpConfig(), SHAPE)
    coop.initialise(starting())
    assert torch.equal(made().fold().context, coop.fold().context)
    assert made().studies == {"texts"}


def test_what_it_lacks_is_told() -> None:
    with pytest.raises(ConfigError, match="needs backbone.family: dual"):
        KgCoOp(KgCoOpConfig(), SHAPE).initialise(starting(classes=None))
    with pytest.raises(ConfigError, match=r"method\.template: the template \"a photo\" has no \{\}"):
        KgCoOpConfig.read({"template": "a photo"}, where="method")


def test_only_the_context_is_trained() -> None:
    (group,) = made().trained()
    assert (group.name, group.parameter.shape) == ("context", (4, D))
    assert KgCoOp.count(KgCoOpConfig(), Shape(512)) == 2_048
    assert KgCoOp.match_budget(KgCoOpConfig(), 9, SHAPE).num_virtual_tokens == 9
    assert made().classes(texts()).shape == (1, len(NAMES), H)
