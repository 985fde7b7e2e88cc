"""SMoP: which prompt a text gets, what the router learns through, and that neither batch nor padding matters.

Knows no other method.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from promptuary.errors import ConfigError, NotFoldable
from promptuary.methods.smop import SMoP, SMoPConfig
from promptuary.prompts.init import Starting
from promptuary.seeds import Chance
from promptuary.types import Outputs, Shape, View

D = tiny.WIDTH


def made(seed: int = 0, **settings: Any) -> SMoP:
    method = SMoP(SMoPConfig(**{"num_prompts": 3, "num_virtual_tokens": 2, **settings}), Shape(D))
    method.initialise(Starting(tiny.backbone("bert").vocabulary, torch.Generator().manual_seed(seed)))
    return method


def texts(rows: int = 6, length: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    embeddings = torch.randn(rows, length, D, generator=torch.Generator().manual_seed(seed))
    return embeddings, torch.ones(rows, length, dtype=torch.bool)


def test_count_is_the_published_arithmetic() -> None:
    assert SMoP.count(SMoPConfig(), Shape(768)) == 18_432
    assert SMoP.count(made().config, Shape(D)) == sum(value.numel() for value in made().parameters())


def test_a_text_gets_its_most_probable_prompt_times_its_probability() -> None:
    method = made()
    embeddings, mask = texts()
    found = method.prompt(View(embeddings=embeddings, mask=mask)).rows
    assert found is not None
    for row, text in zip(found, embeddings, strict=True):
        shares = torch.softmax(text.mean(0) @ method.router, dim=0)
        best = int(shares.argmax())
        torch.testing.assert_close(row, shares[best] * method.rows[best])
    assert found.shape == (6, 2, D), "only s positions are added"


def test_padding_and_the_rest_of_the_batch_do_not_matter() -> None:
    method = made()
    embeddings, mask = texts()
    whole = method.prompt(View(embeddings=embeddings, mask=mask)).rows
    wide = torch.cat([embeddings, torch.full((6, 3, D), 1e3)], dim=1)
    padded = method.prompt(View(embeddings=wide, mask=torch.cat([mask, torch.zeros(6, 3).bool()], dim=1))).rows
    torch.testing.assert_close(whole, padded)
    for place in range(6):
        alone = method.prompt(View(embeddings=embeddings[place : place + 1], mask=mask[:1])).rows
        torch.testing.assert_close(alone[0], whole[place])


def test_the_router_starts_orthogonal_and_learns_through_the_probability() -> None:
    method = made()
    torch.testing.assert_close(method.router.T @ method.router, torch.eye(3), rtol=0, atol=1e-5)
    embeddings, mask = texts()
    method.prompt(View(embeddings=embeddings, mask=mask)).rows.pow(2).sum().backward()
    assert bool((method.router.grad != 0).any())


def test_prompts_start_from_different_tokens() -> None:
    rows = made().rows.detach().flatten(0, 1)
    assert len(torch.unique(rows, dim=0)) == 6


def test_noise_multiplies_logits_in_training_alone_and_follows_the_row() -> None:
    method = made()
    embeddings, mask = texts()

    def shares(step: int | None, rows: Tensor) -> Tensor:
        chance = None if step is None else Chance(0, step, rows)
        return method.shares(View(embeddings=embeddings[rows], mask=mask[rows], chance=chance)).detach()

    rows = torch.arange(6)
    assert torch.equal(shares(None, rows), shares(None, rows))
    assert not torch.equal(shares(1, rows), shares(None, rows))
    assert not torch.equal(shares(1, rows), shares(2, rows))
    torch.testing.assert_close(shares(1, rows)[4:], shares(1, rows[4:]))
    noise = Chance(0, 1, rows).normal(3)
    wanted = torch.softmax(embeddings.mean(1) @ method.router.detach() * (1 + noise), dim=-1)
    torch.testing.assert_close(shares(1, rows), wanted)
    quiet = made(router_noise=0.0)
    view = View(embeddings=embeddings, mask=mask, chance=Chance(0, 1, rows))
    assert torch.equal(quiet.shares(view), quiet.shares(View(embeddings=embeddings, mask=mask)))


def test_the_log_says_how_the_texts_are_shared_out() -> None:
    method = made()
    embeddings, mask = texts()
    view = View(embeddings=embeddings, mask=mask)
    losses = method.loss(torch.tensor(1.0), Outputs(view))
    counts = torch.bincount(method.shares(view).argmax(-1), minlength=3)
    assert [losses.parts[f"load of {n}"] for n in range(3)] == pytest.approx((counts / 6).tolist())
    assert float(losses.total) == 1


def test_it_does_not_fold() -> None:
    with pytest.raises(NotFoldable, match="depends on the input"):
        made().fold()


def test_a_budget_is_kept_and_used() -> None:
    config = SMoP.match_budget(SMoPConfig(), 30, Shape(D))
    more = config.model_copy(update={"num_virtual_tokens": config.num_virtual_tokens + 1})
    assert SMoP.count(config, Shape(D)) <= 30 * D < SMoP.count(more, Shape(D))
    with pytest.raises(ConfigError, match=r"lower method\.num_prompts"):
        SMoP.match_budget(SMoPConfig(), 7, Shape(D))
