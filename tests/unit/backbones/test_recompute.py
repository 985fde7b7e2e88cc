"""Gradient checkpointing: the same numbers with a fraction of what a step keeps.

Knows no method: prompts are made by hand.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import handmade as by_hand
import pytest
import torch
import transformers
from torch import Tensor

import tiny
from promptuary.backbones.base import Backbone, BackboneConfig
from promptuary.backbones.causal import Causal
from promptuary.backbones.masked import Masked
from promptuary.errors import SiteError
from promptuary.types import Prompt


def prompts(of: Backbone) -> list[Prompt]:
    """Rows and an offset; keys and values as well, where the model has a place for them."""
    several = [Prompt(by_hand.rows(4), by_hand.offset()), Prompt(by_hand.rows(3, seed=5))]
    if not of.missing(frozenset({"kv"})):
        shape = of.shape
        kv = torch.randn(1, shape.layers, 2, shape.heads, 3, shape.head, generator=torch.Generator().manual_seed(1))
        several[1] = Prompt(kv=kv.requires_grad_())
    return several


def loss(of: Backbone, several: list[Prompt]) -> Tensor:
    """A number that every prompt changes."""
    batch = replace(by_hand.texts(of), prompt_index=torch.tensor([0, 1, 0] if len(several) > 1 else [0, 0, 0]))
    if "words" in of.abilities:
        scores = of.score(batch, several, by_hand.candidates(of, "good", "bad", "red"))
        return torch.nn.functional.cross_entropy(scores, torch.tensor([0, 1, 2]))
    return of.pooled(batch, several).pow(2).sum()


def gradients(of: Backbone, several: list[Prompt], *, recompute: bool) -> list[Tensor]:
    """Of the loss, where the backward pass runs after the block."""
    with of.recomputing(recompute):
        value = loss(of, several)
    leaves = [leaf for prompt in several for leaf in prompt.tensors]
    return list(torch.autograd.grad(value, leaves))


def same(one: list[Tensor], other: list[Tensor]) -> None:
    for found, wanted in zip(one, other, strict=True):
        assert float((found - wanted).norm()) <= 1e-5 * float(wanted.norm())


@pytest.mark.parametrize("kind", by_hand.KINDS)
def test_gradients_are_the_same_on_every_architecture(kind: str) -> None:
    of = tiny.backbone(kind)
    several = prompts(of)[:1] if kind == "bart" else prompts(of)  # BART wants prefixes of one length in a batch
    wanted = gradients(of, several, recompute=False)
    same(gradients(of, several, recompute=True), wanted)
    same(gradients(of, several, recompute=False), wanted)


@pytest.mark.parametrize("kind", by_hand.WRITERS)
def test_losses_of_written_answers_too(kind: str) -> None:
    of, prompt = tiny.backbone(kind), Prompt(by_hand.rows(4), by_hand.offset())
    batch = replace(by_hand.texts(of), target_ids=torch.tensor([[7, 9, 2], [8, 2, -100], [9, 11, 2]]))
    found = []
    for wanted in (False, True):
        with of.recomputing(wanted):
            value = of.answer_losses(batch, prompt).sum()
        found.append(list(torch.autograd.grad(value, prompt.tensors)))
    same(found[1], found[0])


def test_only_the_asked_for_passes_run_again() -> None:
    of = tiny.backbone("llama")
    several = [Prompt(by_hand.rows(4))]
    ran = list[int]()
    handle = of.model.model.layers[1].mlp.register_forward_pre_hook(lambda _, args: ran.append(1))
    loss(of, several)  # whatever is tried once is tried now
    for recompute, times in ((False, 2), (True, 4)):  # the prompt, and the rows behind it
        ran.clear()
        gradients(of, several, recompute=recompute)
        assert len(ran) == times
    ran.clear()
    with torch.no_grad(), of.recomputing():
        loss(of, several)
    handle.remove()
    assert len(ran) == 2


def test_dropout_draws_again_what_it_drew() -> None:
    config = tiny.model("bert").config
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.3
    of = Masked(
        transformers.BertForMaskedLM(config).eval(),
        tiny.tokenizer(),
        BackboneConfig(model="tiny", family="masked", dropout=True),
    )
    several, found = prompts(of), []
    for recompute in (False, True):
        torch.manual_seed(3)
        with of.dropping():
            found.append(gradients(of, several, recompute=recompute))
    same(found[1], found[0])
    assert not torch.equal(found[0][0], gradients(of, several, recompute=False)[0])


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Bytes of all storages that a forward pass keeps for its backward pass, parameters left out."""

    def __init__(self, model: Any) -> None:
        self.bytes = 0
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        seen = list[Any]()

        def pack(value: Tensor) -> Tensor:
            storage = value.untyped_storage()
            if storage.data_ptr() not in own and all(storage.data_ptr() != one.data_ptr() for one in seen):
                seen.append(storage)
                self.bytes += storage.nbytes()
            return value

        super().__init__(pack, lambda value: value)


@pytest.mark.parametrize("share", [True, False])
def test_a_deep_model_keeps_a_fraction(share: bool) -> None:
    shape = {"vocab_size": tiny.SIZE, "n_embd": 32, "n_layer": 12, "n_head": 4, "n_positions": 80}
    of = Causal(
        transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, eos_token_id=2)).eval(),
        tiny.tokenizer(),
        BackboneConfig(model="tiny", family="causal", share_prefix=share),
    )
    several, kept = [Prompt(by_hand.rows(20))], {}
    loss(of, several)
    for recompute in (False, True):
        seen = Kept(of.model)
        with seen, of.recomputing(recompute):
            loss(of, several)
        kept[recompute] = seen.bytes
    assert kept[True] <= 0.2 * kept[False]


def test_threads_keep_to_themselves() -> None:
    of = tiny.backbone("gpt2")
    ran, inside, done = list[int](), threading.Event(), threading.Event()
    several = [Prompt(by_hand.rows(4))]
    loss(of, several)

    def other() -> None:
        with of.recomputing():
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(10)
    handle = of.model.transformer.h[1].mlp.register_forward_pre_hook(lambda _, args: ran.append(1))
    gradients(of, several, recompute=False)
    handle.remove()
    done.set()
    thread.join()
    assert len(ran) == 2


def test_the_model_is_given_back_as_it_came() -> None:
    of = tiny.backbone("llama")
    gradients(of, [Prompt(by_hand.rows(4))], recompute=True)
    model = of.model
    of.release()
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_model_without_such_layers_is_refused_by_name() -> None:
    of = tiny.backbone("bert")
    for layer in of.model.bert.encoder.layer:
        layer.__class__ = type("Plain", (torch.nn.Module,), {"forward": type(layer).forward})
    assert not of.recomputes
    with pytest.raises(SiteError, match="BertForMaskedLM has no layers that can run again; leave train.gradient_ch"):
        of.recomputing().__enter__()
