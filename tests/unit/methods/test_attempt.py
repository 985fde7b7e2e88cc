"""ATTEMPT: its equations against a small computation of our own, its sizes, what it reduces to, and what it refuses.

Knows no other method but prompt tuning, which its sources are and which it reduces to.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from promptuary.backbones.base import Backbone
from promptuary.errors import ConfigError, NotFoldable
from promptuary.methods.attempt import Attempt, AttemptConfig
from promptuary.methods.prompt_tuning import PromptTuning, PromptTuningConfig
from promptuary.prompts.init import Saved, Starting
from promptuary.tasks.classify import Classify, ClassifyConfig
from promptuary.testing.case import TEXTS, padded
from promptuary.tuned import Tuned
from promptuary.types import Batch, Prompt, Shape, View

D, L, INNER = tiny.WIDTH, 4, 5
TASK = ClassifyConfig(template="{text} it was {mask}", labels={"yes": "good", "no": "bad", "else": "maybe"})


def noise(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def saved(rows: Tensor, number: int = 0) -> Saved:
    return Saved(f"out/source-{number}", "prompt_tuning", {}, {"rows": rows}, Prompt(rows=rows[None]), {})


def made(backbone: Backbone, sources: int = 2, seed: int = 0, **settings: Any) -> Attempt:
    """ATTEMPT from so many sources of noise, with maps and LayerNorm that matter."""
    names = tuple(f"out/source-{number}" for number in range(sources))
    config = AttemptConfig(
        **{"num_virtual_tokens": L, "inner": INNER, "temperature": 1.0, "sources": names, **settings}
    )
    found = tuple(saved(noise(L, D, seed=number), number) for number in range(sources))
    method = Attempt(config, backbone.shape)
    method.initialise(Starting(backbone.vocabulary, torch.Generator().manual_seed(seed), sources=found))
    with torch.no_grad():
        method.norm.add_(0.3 * noise(D, seed=90))
        method.norm_bias.add_(0.3 * noise(D, seed=91))
    return method


def tuned(backbone: Backbone, method: Any) -> tuple[Tuned, Batch]:
    whole = Tuned(backbone, Classify(TASK), method, max_length=40)
    return whole, whole.batch(whole.rows([{"text": text, "label": "yes"} for text in TEXTS], labelled=True))


def seen(texts: Tensor, mask: Tensor | None = None) -> View:
    return View(mask=torch.ones(texts.shape[:2], dtype=torch.bool) if mask is None else mask, embeddings=texts)


# ---- sizes ----------------------------------------------------------------------------------------------------------


def test_count_gives_the_published_numbers() -> None:
    """231,936 for T5-base, the paper's 232k; 96,192 for each of eight tasks that share maps and LayerNorm, its 96k."""
    config = AttemptConfig(num_virtual_tokens=100, inner=100, sources=("a",) * 6)
    assert Attempt.count(config, Shape(768)) == 231_936
    with torch.device("meta"):
        sizes = {name: value.numel() for name, value in Attempt(config, Shape(768)).named_parameters()}
    assert sum(sizes.values()) == 231_936
    shared = sum(sizes[name] for name in Attempt.shared)
    assert shared / 8 + sum(sizes.values()) - shared == 96_192


@pytest.mark.parametrize("sources", [0, 1, 6])
def test_sources_are_not_trained(sources: int) -> None:
    backbone = tiny.backbone("bert")
    method = made(backbone, sources)
    assert sum(value.numel() for value in method.parameters()) == L * D + 2 * D * INNER + 2 * D
    assert method.constants(drawn=False)["sources"].shape == (sources, L, D)
    whole, batch = tuned(backbone, method)
    before = method.sources.clone()
    whole.train(True).loss(batch).total.backward()
    assert not method.sources.requires_grad
    torch.optim.SGD(method.parameters(), lr=1.0).step()
    assert torch.equal(method.sources, before)


def test_a_budget_is_spent_on_the_inner_width() -> None:
    config = Attempt.match_budget(AttemptConfig(num_virtual_tokens=20), 40, Shape(384))
    assert config.inner == 9
    assert Attempt.count(config, Shape(384)) == 40 * 384
    with pytest.raises(ConfigError, match=r"sources and lower method\.num_virtual_tokens"):
        Attempt.match_budget(AttemptConfig(num_virtual_tokens=100), 100, Shape(384))


# ---- equations ------------------------------------------------------------------------------------------------------


def by_hand(method: Attempt, texts: Tensor, mask: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Attention and rows of each text, one number after the other, in float64."""
    p0, down, up, scale, shift = (
        value.detach().double().numpy()
        for value in (method.rows, method.down, method.up, method.norm, method.norm_bias)
    )
    prompts = [p0, *method.sources.double().numpy()]
    heat = method.settings.temperature or D * math.e
    weights, rows = [], []
    for text, real in zip(texts.double().numpy(), mask.numpy(), strict=True):
        pooled = text[real].max(0)
        inner = pooled @ down
        asked = (inner / (1 + np.exp(-inner))) @ up
        asked = (asked - asked.mean()) / np.sqrt(asked.var() + 1e-5) * scale + shift
        logits = np.array([prompt.max(0) @ asked / heat for prompt in prompts])
        a = np.exp(logits - logits.max())
        a /= a.sum()
        weights.append(a)
        rows.append(p0 + sum(one * prompt for one, prompt in zip(a, prompts, strict=True)))
    return np.stack(weights), np.stack(rows)


@pytest.mark.parametrize("temperature", [None, 1.0, 20.0])
@pytest.mark.parametrize("sources", [0, 1, 3])
def test_prompt_is_the_published_mixture(sources: int, temperature: float | None) -> None:
    method = made(tiny.backbone("bert"), sources, temperature=temperature)
    texts, mask = noise(3, 6, D, seed=5), torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [0] + [1] * 2 + [0] * 3]).bool()
    weights, rows = by_hand(method, texts, mask)
    view = seen(texts, mask)
    np.testing.assert_allclose(method.weights(view).detach().numpy(), weights, atol=1e-5)
    np.testing.assert_allclose(method.prompt(view).rows.detach().numpy(), rows, atol=1e-5)


def test_the_texts_ask_for_different_prompts_and_a_high_temperature_makes_them_equal() -> None:
    texts, mask = noise(3, 6, D, seed=5), torch.ones(3, 6, dtype=torch.bool)
    sharp, flat = (made(tiny.backbone("bert"), 2, temperature=heat).weights(seen(texts, mask)) for heat in (1.0, 1e6))
    assert float((sharp[0] - sharp[1]).detach().abs().max()) > 0.01
    torch.testing.assert_close(flat, torch.full((3, 3), 1 / 3), rtol=0, atol=1e-4)


def test_the_default_temperature_is_width_times_e() -> None:
    one, two = (made(tiny.backbone("bert"), temperature=heat) for heat in (None, D * math.e))
    view = seen(noise(2, 6, D))
    assert torch.equal(one.weights(view), two.weights(view))


# ---- what it reduces to ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["t5", "llama", "bert", "minilm"])
def test_without_sources_it_is_prompt_tuning_of_twice_the_rows_values(kind: str) -> None:
    backbone = tiny.backbone(kind)
    method = made(backbone, 0)
    tuning = PromptTuning(PromptTuningConfig(num_virtual_tokens=L), backbone.shape)
    with torch.no_grad():
        tuning.rows.copy_(2 * method.rows)
    (one, batch), (two, _) = tuned(backbone, method), tuned(backbone, tuning)
    torch.testing.assert_close(one.scores(batch), two.scores(batch), rtol=1e-5, atol=1e-5)
    one.train(True).loss(batch).total.backward()
    two.train(True).loss(batch).total.backward()
    torch.testing.assert_close(method.rows.grad, 2 * tuning.rows.grad, rtol=1e-4, atol=1e-6)
    for name in ("down", "up", "norm", "norm_bias"):  # there is nothing to choose between
        assert float(getattr(method, name).grad.abs().max()) < 1e-6


def test_equal_sources_make_the_attention_irrelevant() -> None:
    """a sums to one: with P_j = P_0 for all j every text gets 2 P_0."""
    method = made(tiny.backbone("bert"), 3)
    method.sources.copy_(method.rows.detach().expand(3, L, D))
    rows = method.prompt(seen(noise(2, 6, D))).rows
    torch.testing.assert_close(rows, (2 * method.rows).expand(2, L, D), rtol=1e-5, atol=1e-5)


def test_the_order_of_the_sources_does_not_matter() -> None:
    method, view = made(tiny.backbone("bert"), 3), seen(noise(2, 6, D))
    before = method.prompt(view).rows
    method.sources.copy_(method.sources.flip(0))
    torch.testing.assert_close(method.prompt(view).rows, before, rtol=1e-5, atol=1e-5)


# ---- what a batch may not change ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["t5", "llama", "bert", "minilm"])
def test_padding_and_other_rows_do_not_change_a_prompt(kind: str) -> None:
    """The release pools padding too; here only real tokens count."""
    whole, batch = tuned(tiny.backbone(kind), made(tiny.backbone(kind)))
    wanted = whole.prompt(batch).rows
    for left, right in ((0, 7), (7, 0), (3, 2)):
        assert torch.equal(whole.prompt(padded(batch, left, right)).rows, wanted)
    for place in range(len(batch)):
        alone = whole.prompt(batch.rows(torch.tensor([place]))).rows
        torch.testing.assert_close(alone[0], wanted[place], rtol=1e-5, atol=1e-6)


def test_what_stands_under_padding_does_not_matter() -> None:
    method, texts = made(tiny.backbone("bert")), noise(2, 6, D)
    mask = torch.tensor([[1] * 6, [1] * 3 + [0] * 3]).bool()
    view = seen(texts, mask)
    junk = replace(view, embeddings=torch.where(mask[..., None], texts, torch.full_like(texts, 1e6)))
    assert torch.equal(method.weights(view), method.weights(junk))


def test_it_cannot_be_folded() -> None:
    with pytest.raises(NotFoldable, match="attempt"):
        made(tiny.backbone("bert")).fold()


# ---- start, rates, insight, errors ----------------------------------------------------------------------------------


def test_it_starts_from_the_vocabulary_and_from_the_sources_as_they_are() -> None:
    backbone = tiny.backbone("bert")
    method = made(backbone, 2)
    weight = tiny.model("bert").get_input_embeddings().weight.detach()
    assert all(float((weight - row).abs().amax(1).min()) < 1e-6 for row in method.rows.detach())
    assert torch.equal(method.sources, torch.stack([noise(L, D, seed=0), noise(L, D, seed=1)]))
    for weights, entries in ((method.down, D), (method.up, INNER)):
        bound = 1 / math.sqrt(entries)
        assert 0.8 * bound < float(weights.detach().abs().max()) <= bound


def test_rates_are_relative_for_the_rows_alone() -> None:
    method = made(tiny.backbone("bert"), prompt_lr=0.05, modules_lr=0.002, weight_decay=0.01)
    groups = {group.name: group for group in method.trained()}
    assert set(groups) == {"rows", "down", "up", "norm", "norm_bias"}
    scale = float(method.rows.detach().pow(2).mean().sqrt())
    assert groups["rows"].learning_rate == pytest.approx(0.05 * scale)
    assert groups["rows"].weight_decay == 0.01
    for name in ("down", "up", "norm", "norm_bias"):
        assert (groups[name].learning_rate, groups[name].weight_decay) == (0.002, 0.0)


def test_insight_tells_which_prompts_are_alike() -> None:
    method = made(tiny.backbone("bert"), 3)
    method.sources[1] = 2 * method.sources[0]
    found = method.insight()["similarity"]
    assert found.shape == (4, 4)
    torch.testing.assert_close(found.diagonal(), torch.ones(4))
    torch.testing.assert_close(found[1, 2], torch.tensor(1.0))
    mean = [value.mean(0) for value in (method.rows.detach(), method.sources[0])]
    torch.testing.assert_close(found[0, 1], torch.cosine_similarity(*mean, dim=0))


@pytest.mark.parametrize("rows", [L - 1, L + 1])
def test_a_source_of_another_length_is_refused(rows: int) -> None:
    backbone = tiny.backbone("bert")
    method = Attempt(AttemptConfig(num_virtual_tokens=L, sources=("a",)), backbone.shape)
    with pytest.raises(ConfigError, match=rf"out/source-0 has {rows} rows.*num_virtual_tokens is {L}"):
        method.initialise(
            Starting(backbone.vocabulary, torch.Generator().manual_seed(0), sources=(saved(noise(rows, D)),))
        )
