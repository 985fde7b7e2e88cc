"""What rows begin with in common runs once: equal to the plain pass, on every architecture, and really once.

Knows no method: prompts are made by hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import architectures
import handmade as by_hand
import pytest
import torch
from torch import Tensor

import tiny
from promptuary.backbones.base import BackboneConfig
from promptuary.backbones.causal import Causal
from promptuary.types import ANSWER, Batch, Prompt

SHAPES = ["front", "offset", "after the first token", "two", "keys and values beside rows", "end", "instances"]


def backbone(kind: str) -> Causal:
    """A tiny model, wired: one of the usual, or one of all the architectures."""
    if kind in by_hand.CAUSAL:
        made = tiny.backbone(kind)
        assert isinstance(made, Causal)
        return made
    return Causal(architectures.model(kind), tiny.tokenizer(), BackboneConfig(model="tiny", family="causal"))


def plain(of: Causal) -> Causal:
    """The same model with nothing shared and nothing kept."""
    return Causal(of.model, of.tokenizer, of.config.model_copy(update={"share_prefix": False, "kept_mib": 0}))


def prompts(of: Causal, shape: str) -> list[Prompt]:
    """Prompts whose tensors can be trained; even rows of a batch take the first and odd ones the last."""
    generator = torch.Generator().manual_seed(3)
    shape_of = of.shape
    kv = torch.randn(1, shape_of.layers, 2, shape_of.heads, 4, shape_of.head, generator=generator)
    first, second = by_hand.rows(7), by_hand.rows(3, seed=4)
    return {
        "front": lambda: [Prompt(first)],
        "offset": lambda: [Prompt(first, by_hand.offset())],
        "after the first token": lambda: [Prompt(first, placement="after_bos")],
        "two": lambda: [Prompt(first), Prompt(second, by_hand.offset())],
        "keys and values beside rows": lambda: [Prompt(kv=kv.requires_grad_()), Prompt(second)],
        "end": lambda: [Prompt(first, placement="end")],
        "instances": lambda: [Prompt(by_hand.rows(2, many=5))],
    }[shape]()


def given(of: Causal, several: list[Prompt]) -> Batch:
    """Five texts, some with a common beginning."""
    texts = ["the sky is blue", "the sky is green and the sea is blue", "a cat", "the sky is not", "a dog sleeps here"]
    batch = by_hand.texts(of, texts)
    return batch if len(several) == 1 else replace(batch, prompt_index=torch.tensor([0, 1, 0, 1, 0]))


def found(of: Causal, batch: Batch, several: list[Prompt]) -> tuple[Tensor, list[Tensor]]:
    """States behind the text, and the gradient of every tensor."""
    states = of.states(batch, several, batch.slots[ANSWER][:, None])
    parts = [part for prompt in several for part in prompt.tensors if part.requires_grad]
    return states, list(torch.autograd.grad(states.pow(2).sum() + states[..., :3].sum(), parts))


def close(one: Tensor, other: Tensor, bound: float = 1e-5) -> None:
    """Within so much of its size."""
    assert float((one - other).detach().norm()) <= bound * float(other.detach().norm())


@contextmanager
def positions(of: Causal) -> Iterator[list[int]]:
    """How many positions ran, padding included, one number for each pass."""
    ran = list[int]()
    layer = next(module for name, module in of.model.named_modules() if name.endswith((".h.0", ".layers.0")))
    handle = layer.register_forward_pre_hook(lambda _, args: ran.append(args[0].shape[0] * args[0].shape[1]))
    yield ran
    handle.remove()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", by_hand.CAUSAL)
def test_states_and_gradients_equal_the_plain_pass(kind: str, shape: str) -> None:
    of = backbone(kind)
    several = prompts(of, shape)
    batch = given(of, several)
    expected, wanted = found(plain(of), batch, several)
    for padded in (batch, by_hand.left(batch)):
        states, gradients = found(of, padded, several)
        close(states, expected)
        for one, other in zip(gradients, wanted, strict=True):
            close(one, other)
    with torch.no_grad():
        for _ in range(2):  # the second time from what was kept
            close(of.states(batch, several, batch.slots[ANSWER][:, None]), expected)
        real = batch.attention_mask.bool()
        close(of.hidden(batch, several)[real], plain(of).hidden(batch, several)[real])


@pytest.mark.parametrize("kind", architectures.SHARING)
def test_other_architectures_share_too(kind: str) -> None:
    of = backbone(kind)
    several = prompts(of, "two")
    batch = given(of, several)
    assert of.shares
    expected, wanted = found(plain(of), batch, several)
    states, gradients = found(of, batch, several)
    close(states, expected)
    for one, other in zip(gradients, wanted, strict=True):
        close(one, other, 5e-5)
    with torch.no_grad():
        for _ in range(2):
            close(of.states(batch, several, batch.slots[ANSWER][:, None]), expected)
    assert of.body.kept.hits == 2
    assert not of.notes()


@pytest.mark.parametrize("kind", architectures.NOT_SHARING)
def test_what_cannot_begin_with_keys_and_values_runs_plainly(kind: str) -> None:
    of = backbone(kind)
    several = prompts(of, "two")
    batch = given(of, several)
    assert not of.shares
    expected, wanted = found(plain(of), batch, several)
    states, gradients = found(of, batch, several)
    assert len(of.notes()) == 1
    assert not plain(of).notes()
    assert torch.equal(states, expected)
    assert all(map(torch.equal, gradients, wanted))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_prompt_runs_once_for_all_rows(kind: str) -> None:
    of = backbone(kind)
    several = [Prompt(by_hand.rows(7))]
    batch = replace(given(of, several), prompt_index=None)
    assert of.shares
    rows, width = batch.input_ids.shape
    with positions(of) as ran:
        found(of, batch, several)
    # llama's texts begin with the same special token, which stands behind the prompt and is shared as well
    first = 0 if kind == "gpt2" else 1
    assert ran == [7 + first, rows * (width - first)]
    with positions(plain(of)) as ran:
        found(plain(of), batch, several)
    assert ran == [rows * (7 + width)]
    with torch.no_grad(), positions(of) as ran:
        of.states(batch, several, batch.slots[ANSWER][:, None])
        of.states(batch, several, batch.slots[ANSWER][:, None])
    assert ran == [7, rows * width, rows * width], "what was kept does not run again"


def test_a_prompt_that_little_would_be_saved_by_runs_with_its_rows() -> None:
    of = backbone("gpt2")
    several = [Prompt(by_hand.rows(1))]
    batch = by_hand.texts(of)
    assert of.shares
    with positions(of) as ran:
        found(of, batch.rows(torch.arange(1)), several)
    assert len(ran) == 1


def test_frozen_text_before_a_suffix_prompt_runs_once_for_all_epochs() -> None:
    of = backbone("gpt2")
    several = prompts(of, "end")
    batch = by_hand.texts(of)
    assert of.shares
    texts, rows = batch.attention_mask.sum(1).tolist(), len(batch)
    with positions(of) as ran:
        found(of, batch, several)
        with torch.no_grad():
            several[0].rows.add_(0.1)  # type: ignore[union-attr]
        found(of, batch, several)
    assert ran == [*texts, rows * 7, rows * 7], "each text by itself, once"
    found_again, expected = found(of, batch, several), found(plain(of), batch, several)
    close(found_again[0], expected[0])


def test_what_is_kept_is_never_used_after_a_change() -> None:
    of = backbone("llama")
    rows = by_hand.rows(7).detach()
    batch = by_hand.texts(of)

    def check(prompt: Prompt) -> None:
        for _ in range(2):
            at = batch.slots[ANSWER][:, None]
            close(of.states(batch, prompt, at), plain(of).states(batch, prompt, at))

    with torch.no_grad():
        prompt = Prompt(rows)
        check(prompt)
        rows.mul_(0.5)  # the same object with other numbers
        check(prompt)
        check(Prompt(rows.clone() * 2))
        next(of.model.parameters()).mul_(1.1)  # another model
        check(prompt)
        weight = of.model.model.layers[0].self_attn.k_proj.weight
        weight.data = weight.data * 0.5
        check(prompt)
        with torch.autocast("cpu", torch.bfloat16):
            half = of.states(batch, prompt, batch.slots[ANSWER][:, None])
        whole = of.states(batch, prompt, batch.slots[ANSWER][:, None])
    assert 1e-4 < float((half.float() - whole).norm() / whole.norm()) < 0.1


def test_what_is_kept_stays_within_its_bound_and_right_beyond_it() -> None:
    of = backbone("llama")
    one = 2 * of.shape.layers * of.shape.heads * of.shape.head * 7 * 4
    of.body.kept.limit = 3 * one
    batch = by_hand.texts(of)
    at = batch.slots[ANSWER][:, None]
    several = [Prompt(by_hand.rows(7, seed=seed).detach()) for seed in range(6)]
    with torch.no_grad():
        for prompt in [*several, *several]:
            close(of.states(batch, prompt, at), plain(of).states(batch, prompt, at))
            assert of.body.kept.size <= 3 * one
        of.states(batch, several[-1], at)
    assert of.body.kept.hits == 1, "six prompts in a circle never meet their own in a store of three"
    assert len(of.body.kept) == 3
    del several, prompt
    assert len(of.body.kept) == 0, "what belonged to prompts goes with them"


def test_with_dropout_every_row_runs_by_itself() -> None:
    of = backbone("gpt2")
    several = [Prompt(by_hand.rows(7))]
    batch = by_hand.texts(of)
    of.model.train()
    with positions(of) as ran:
        found(of, batch, several)
    of.model.eval()
    assert ran == [len(batch) * (7 + batch.input_ids.shape[1])]


@pytest.mark.parametrize("kind", by_hand.CAUSAL)
def test_bfloat16_stays_within_its_own_rounding(kind: str) -> None:
    of = tiny.backbone(kind, dtype="bfloat16")
    assert isinstance(of, Causal)
    several = prompts(of, "two")
    batch = given(of, several)
    assert of.shares
    expected, wanted = found(plain(backbone(kind)), batch, several)
    for one in (found(of, batch, several), found(plain(of), batch, several)):
        close(one[0].float(), expected, 0.1)
        for gradient, other in zip(one[1], wanted, strict=True):
            assert float(torch.cosine_similarity(gradient.flatten(), other.flatten(), dim=0)) > 0.97


@pytest.mark.parametrize("kind", by_hand.CAUSAL)
def test_writing_goes_on_from_what_is_kept(kind: str) -> None:
    of = backbone(kind)
    several = prompts(of, "two")
    batch = given(of, several)
    options: list[dict[str, Any]] = [
        {}, {"use_cache": False}, {"num_beams": 3, "num_return_sequences": 2}, {"repetition_penalty": 2.0}
    ]  # fmt: skip
    for option in options:
        expected = plain(of).generate(batch, several, max_new_tokens=8, **option)
        for _ in range(2):
            assert of.generate(batch, several, max_new_tokens=8, **option) == expected
    if kind != "gemma3":  # whose window holds no padding between a prompt and its text
        assert of.body.kept.hits
