"""What a model expects, computed only where it is read: equal to the model's own whole pass, and really less.

Knows no method: prompts are made by hand.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import architectures
import handmade as by_hand
import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from promptuary.backbones import tail
from promptuary.backbones.base import Backbone, BackboneConfig
from promptuary.backbones.causal import Causal
from promptuary.backbones.masked import Masked
from promptuary.types import Batch, Candidates, Prompt

LONG = ("very good indeed", "bad", "not so red")
every = pytest.mark.parametrize("kind", by_hand.WORDY)
writers = pytest.mark.parametrize("kind", by_hand.WRITERS)


def plain(of: Backbone) -> Backbone:
    """The same model, which computes everything everywhere."""
    return type(of)(of.model, of.tokenizer, of.config.model_copy(update={"narrow_head": False}))


def prompt() -> Prompt:
    """Rows and an offset that can be trained."""
    return Prompt(by_hand.rows(4), by_hand.offset())


def losses(of: Backbone, what: str, given: Prompt) -> Tensor:
    """Scores of answers, or losses of answers, as one vector."""
    batch = by_hand.texts(of)
    if what == "losses":
        targets = torch.tensor([[7, 9, 2], [8, 2, -100], [9, 11, 2]])
        return of.answer_losses(replace(batch, target_ids=targets), given)
    answers = {"words": ("good", "bad", "red"), "phrases": LONG}[what]
    return of.score(batch, given, by_hand.candidates(of, *answers)).flatten()


def same(one: Tensor, other: Tensor, bound: float = 1e-5) -> None:
    """Within so much of its size."""
    assert float((one - other).detach().norm()) <= bound * float(other.detach().norm())


def compare(of: Backbone, what: str, bound: float = 1e-5) -> None:
    """Values and gradients of the narrow and of the plain way."""
    assert of.narrow
    assert not plain(of).narrow
    quick, slow = prompt(), prompt()
    found, wanted = losses(of, what, quick), losses(plain(of), what, slow)
    same(found, wanted, bound)
    weights = torch.linspace(-1, 1, len(found))
    for each, given in ((found, quick), (wanted, slow)):
        (each * weights).sum().backward()
        assert all(leaf.grad is not None for leaf in given.tensors)
    for one, other in zip(quick.tensors, slow.tensors, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        same(one.grad, other.grad, 10 * bound)


@pytest.mark.parametrize("what", ["words", "phrases"])
@every
def test_scores_and_gradients_equal_the_whole_pass(kind: str, what: str) -> None:
    compare(tiny.backbone(kind), what)


@writers
def test_losses_and_gradients_equal_the_whole_pass(kind: str) -> None:
    compare(tiny.backbone(kind), "losses")


@writers
def test_chunks_of_one_position_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "LOGITS", 1)
    compare(tiny.backbone(kind), "losses")
    compare(tiny.backbone(kind), "phrases")


@pytest.mark.parametrize("kind", [kind for kind in architectures.SHARING if kind != "bert as a decoder"])
def test_other_architectures_keep_their_scales_and_caps(kind: str) -> None:
    of = Causal(architectures.model(kind), tiny.tokenizer(), BackboneConfig(model="tiny", family="causal"))
    compare(of, "words", 5e-5)
    compare(of, "losses", 5e-5)


def test_caps_and_scales_are_there_to_be_kept() -> None:
    gemma, cohere = architectures.model("gemma2, caps"), architectures.model("cohere")
    assert gemma.config.final_logit_softcapping == 30
    assert cohere.config.logit_scale != 1


@pytest.mark.parametrize("what", ["words", "losses"])
@writers
def test_half_precision_stays_within_its_rounding(kind: str, what: str) -> None:
    of = tiny.backbone(kind, dtype="bfloat16")
    assert of.narrow
    exact = losses(tiny.backbone(kind), what, prompt())
    given = prompt()
    found = losses(of, what, given)
    assert found.dtype == torch.float32
    assert float((found - exact).detach().norm()) <= 0.1 * float(exact.detach().norm())
    found.sum().backward()
    assert all(leaf.grad is not None and leaf.grad.dtype == torch.float32 for leaf in given.tensors)


class Largest(TorchDispatchMode):
    """Notes the most numbers that any new tensor over the vocabulary of 4,000 has."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.is_view:
            return found
        for value in found if isinstance(found, tuple | list) else (found,):
            if isinstance(value, Tensor) and value.dtype.is_floating_point and 4000 in value.shape:
                self.most = max(self.most, value.numel())
        return found


def wide(kind: str) -> Backbone:
    """A tiny model with a vocabulary of 4,000, far wider than anything else in it."""
    of = tiny.model(kind)
    of.resize_token_embeddings(4000, mean_resizing=False)
    made = tiny.backbone(kind)
    return type(made)(of, made.tokenizer, made.config)


@pytest.mark.parametrize("kind", ["gpt2", "gemma3", "t5"])
def test_the_vocabulary_never_stands_whole_in_memory(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "LOGITS", 8000)
    of = wide(kind)
    answers = torch.randint(5, 50, (8, 10), generator=torch.Generator().manual_seed(0))
    batch = replace(by_hand.texts(of, by_hand.TEXTS * 2 + by_hand.TEXTS[:2]), target_ids=answers)
    assert of.narrow
    most = {}
    for name, each in (("narrow", of), ("plain", plain(of))):
        with Largest() as seen:
            each.answer_losses(batch, prompt()).sum().backward()
        most[name] = seen.most
    assert most["narrow"] == 2 * 4000
    assert most["plain"] >= 80 * 4000


@every
def test_words_are_scored_without_the_vocabulary(kind: str) -> None:
    of = wide(kind)
    given = by_hand.texts(of)
    words = by_hand.candidates(of, "good", "bad")
    assert of.narrow
    with torch.no_grad(), Largest() as seen:
        of.score(given, Prompt(by_hand.rows(2).detach()), words)
    # BART's bias stands behind the head, over the whole vocabulary
    assert seen.most == (3 * 4000 if kind == "bart" else 0)


@every
def test_what_answers_have_in_common_runs_once(kind: str) -> None:
    of = tiny.backbone(kind)
    assert of.narrow
    assert not isinstance(of, Causal) or of.shares
    answers = by_hand.candidates(of, *LONG)
    ran = list[int]()
    handle = of.table.register_forward_pre_hook(lambda _, args: ran.append(args[0].numel()))
    given = by_hand.texts(of)
    of.score(given, Prompt(by_hand.rows(4)), answers)
    handle.remove()
    texts = given.input_ids.numel() + 4 * len(given)
    count, length = answers.ids.shape
    limit = {
        "causal": texts + len(given) * count * length,  # the texts, and all answers of each
        "seq2seq": texts + len(given) * count * (length + 1),
        "masked": 2 * (texts + len(given) * length),  # one pass for each length that there is
    }[tiny.FAMILY[kind]]
    assert sum(ran) <= limit


# ---- models without such a tail -------------------------------------------------------------------------------------


def masked(model: Any) -> Masked:
    """Wired, with weights large enough that outputs differ."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3)
    return Masked(model.eval(), tiny.tokenizer(), BackboneConfig(model="tiny", family="masked"))


def mobile() -> Masked:
    """A head whose rows are put together with others at each pass: it never runs as a module."""
    torch.manual_seed(0)
    config = transformers.MobileBertConfig(
        vocab_size=tiny.SIZE,
        hidden_size=48,
        embedding_size=32,
        intra_bottleneck_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=80,
    )
    return masked(transformers.MobileBertForMaskedLM(config))


class Halved(transformers.BertForMaskedLM):
    """Does something between body and head that depends on every position."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = self.bert(*args, **kwargs)
        states = found.last_hidden_state - found.last_hidden_state.mean(1, keepdim=True)
        return transformers.modeling_outputs.MaskedLMOutput(logits=self.cls(states))


def halved() -> Masked:
    torch.manual_seed(0)
    return masked(Halved(tiny.model("bert").config))


@pytest.mark.parametrize("made", [mobile, halved], ids=["mobile", "halved"])
def test_a_model_whose_head_cannot_run_apart_runs_whole(made: Any) -> None:
    of = made()
    assert not of.narrow
    assert "does not let its head run apart" in of.notes()[0]
    assert not plain(of).notes() or "head" not in plain(of).notes()[0]
    for what in ("words", "phrases"):
        same(losses(of, what, prompt()), losses(plain(of), what, prompt()))


def test_a_body_is_found_under_another_name_than_the_model_gives() -> None:
    """Llama 4 names a body that it does not have."""
    of = Causal(architectures.model("llama4, chunks"), tiny.tokenizer(), BackboneConfig(model="tiny", family="causal"))
    assert of.model.base_model is of.model
    assert of.narrow
    for what in ("words", "phrases"):
        same(losses(of, what, prompt()), losses(plain(of), what, prompt()))


# ---- the arithmetic -------------------------------------------------------------------------------------------------


def test_chunks_equal_cross_entropy_and_refuse_a_second_derivative() -> None:
    of = tiny.backbone("gpt2")
    assert of.narrow
    states = torch.randn(2, 3, tiny.WIDTH, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets = torch.tensor([[5, 6, 7], [8, 9, 10]])
    found = tail.Narrow(states, of.tail).log_probabilities(targets)
    logits = states @ of.model.get_output_embeddings().weight.T
    wanted = -torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 3)
    torch.testing.assert_close(found, wanted)
    (one,) = torch.autograd.grad(found.pow(2).sum(), states, create_graph=True)
    (other,) = torch.autograd.grad(wanted.pow(2).sum(), states)
    torch.testing.assert_close(one, other)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        one.sum().backward()


def test_without_gradients_none_are_computed() -> None:
    of = tiny.backbone("gpt2")
    assert of.narrow
    with torch.no_grad():
        found = tail.Narrow(torch.randn(1, 2, tiny.WIDTH), of.tail).log_probabilities(torch.tensor([[5, 6]]))
    assert not found.requires_grad
    assert found.shape == (1, 2)


def test_answers_of_each_row_s_own_are_read_apart() -> None:
    of = tiny.backbone("llama")
    batch: Batch = by_hand.texts(of)
    own = torch.tensor([[[5, 6], [7, 0]], [[8, 0], [9, 10]], [[11, 12], [13, 14]]])
    answers = Candidates(own, own != 0)
    found = of.score(batch, prompt(), answers)
    same(found, plain(of).score(batch, prompt(), answers))
