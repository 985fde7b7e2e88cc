"""StablePT: the invariants of the specification, numbered as there; which gradients flow in each preset.

Knows no other method. The contrastive loss itself is tested in test_losses.py (invariant 4).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

import tiny
from promptuary.errors import ConfigError, NotFoldable, SiteError
from promptuary.methods.stablept import StablePT, StablePTConfig
from promptuary.prompts.attention import Block
from promptuary.seeds import seeded
from promptuary.solvers.gradient import GradientSolver
from promptuary.tasks.classify import Classify, ClassifyConfig
from promptuary.testing import case_of
from promptuary.testing.case import padded
from promptuary.tuned import Tuned
from promptuary.types import Shape

FAMILIES = ("causal", "seq2seq", "masked", "encoder")
QUIET = {"dropout": 0.0, "drop_path": 0.0}


def tuned(folder: Path, family: str = "masked", *, train: bool = False, moved: bool = True, **settings: Any) -> Tuned:
    case = case_of(StablePT, family, folder, {**StablePT.tiny, **settings})
    made = case.tuned()
    if not moved:
        with torch.no_grad():
            for parameter in method_of(made).parameters():
                parameter.zero_()
        made.initialise(torch.Generator().manual_seed(0))
    made.moment = (0, 1)
    return made.train(train)


def method_of(made: Tuned) -> StablePT:
    assert isinstance(made.method, StablePT)
    return made.method


def batch_of(made: Tuned, folder: Path) -> Any:
    return made.batch(case_of(StablePT, made.backbone.name, folder).rows(made))


def grown(made: Tuned, of: Tensor) -> dict[str, bool]:
    """Which tensors a value has a gradient in."""
    names, tensors = zip(*method_of(made).named_parameters(), strict=True)
    grads = torch.autograd.grad(of, tensors, allow_unused=True, retain_graph=True)
    return {name: grad is not None and bool(grad.any()) for name, grad in zip(names, grads, strict=True)}


# ---- 1: counts -----------------------------------------------------------------------------------------------------


def test_counts_are_the_published_arithmetic() -> None:
    block = Block(768, 8)
    assert sum(torch.Size(size).numel() for size in block.sizes().values()) == 2_954_112
    shape = Shape(768, hidden=768, classes=2)
    head = 300 * 768 + 900 + 301 * 2
    used = 2 * 2_954_112 + 2 * 768 + 7_680 + head
    assert StablePT.count(StablePTConfig(preset="release"), shape) == used
    # with the whole vocabulary's rows, of which all but the label words' never get a gradient: 21.28 M in the release
    assert used - head + 300 * 768 + 300 + 600 + 301 * 50_265 == 21_278_505
    assert StablePT.count(StablePTConfig(), shape) == used - head + 768 * 768


@pytest.mark.parametrize("preset", ["paper", "release"])
@pytest.mark.parametrize("fusion", [None, True, False])
def test_the_formula_counts_what_is_trained(preset: str, fusion: bool | None) -> None:
    config, shape = StablePTConfig(preset=preset, fusion=fusion, heads=4), Shape(16, hidden=16, classes=3)
    made = StablePT(config, shape)
    assert StablePT.count(config, shape) == sum(value.numel() for value in made.parameters())


# ---- 2: what reaches what ------------------------------------------------------------------------------------------


def test_in_the_release_the_two_losses_train_disjoint_tensors(tmp_path: Path) -> None:
    """Invariant 2: d(classification)/dP = 0, and d(contrastive)/d(semantic encoder) = 0."""
    made = tuned(tmp_path, preset="release", train=True)
    batch = batch_of(made, tmp_path)
    outputs = made.outputs(batch)
    scores = grown(made, cross_entropy(made.decided(outputs), batch.target))
    contrast = grown(made, method_of(made).loss(torch.zeros(()), outputs).total)
    for name in scores:
        semantic = name.startswith(("encoder_", "inner", "words"))
        assert scores[name] == semantic, name
        assert contrast[name] == (not semantic), name


def test_in_our_reading_they_meet_after_the_first_step(tmp_path: Path) -> None:
    """Invariant 2: W_f starts at zero, so at the start only it learns of the prompt; then the prompt does too."""
    made = tuned(tmp_path, train=True, moved=False, **QUIET)
    batch = batch_of(made, tmp_path)
    before = grown(made, cross_entropy(made.scores(batch), batch.target))
    assert before["fusion"]
    assert not before["prompt_rows"]
    with torch.no_grad():
        method_of(made).fusion.add_(0.1 * torch.randn(tiny.WIDTH, tiny.WIDTH, generator=seeded(0)))
    after = grown(made, cross_entropy(made.scores(batch), batch.target))
    assert all(after[name] for name in ("prompt_rows", "decoder_query", "decoder_value", "last"))


def test_at_the_start_both_presets_predict_the_same(tmp_path: Path) -> None:
    paper = tuned(tmp_path / "a", moved=False, head="model")
    release = tuned(tmp_path / "b", moved=False, preset="release", head="model")
    batch = batch_of(paper, tmp_path / "a")
    assert torch.equal(paper.scores(batch), release.scores(batch))


def test_the_context_may_be_let_learn_from_contrast(tmp_path: Path) -> None:
    made = tuned(tmp_path, preset="release", detach_context=False, train=True)
    outputs = made.outputs(batch_of(made, tmp_path))
    assert grown(made, method_of(made).loss(torch.zeros(()), outputs).total)["encoder_value"]


# ---- 3: nothing in the model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_no_soft_vector_enters_the_model(family: str, tmp_path: Path) -> None:
    """Invariant 3: the model's input is the text alone; without contrast and fusion the decoder is never asked."""
    made = tuned(tmp_path, family, train=True, contrastive_weight=0.0, fusion=False)
    batch = batch_of(made, tmp_path)
    placed = made.backbone.place(batch, made.prompt(batch))
    assert torch.equal(placed.input_ids, batch.input_ids)
    assert (made.added_tokens, made.prompt(batch).sites) == (0, frozenset())
    reached = grown(made, made.loss(batch).total)
    assert not any(reached[name] for name in reached if name.startswith(("decoder_", "prompt_rows", "last")))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_never_enter_the_model(family: str, tmp_path: Path) -> None:
    made = tuned(tmp_path, family, train=True)
    made.loss(batch_of(made, tmp_path)).total.backward()
    assert all(parameter.grad is None for parameter in made.backbone.model.parameters())


# ---- the blocks ----------------------------------------------------------------------------------------------------


def test_a_block_is_torchs_own_layer(tmp_path: Path) -> None:
    """The semantic encoder on its own: torch's pre-norm attention and MLP with the same weights, padding masked."""
    made = tuned(tmp_path)
    method, batch = method_of(made), batch_of(made, tmp_path)
    view = made.view(batch)
    own, d = method._of("encoder"), tiny.WIDTH
    attention = nn.MultiheadAttention(d, 4, bias=True, batch_first=True)
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.cat([own[name].T for name in ("query", "key", "value")]))
        attention.in_proj_bias.zero_()
        attention.out_proj.weight.copy_(own["projection"].T)
        attention.out_proj.bias.copy_(own["projection_bias"])
        assert view.states is not None
        normed = nn.functional.layer_norm(view.states, (d,), own["before"], own["before_bias"])
        found = view.states + attention(normed, normed, normed, key_padding_mask=~view.mask)[0]
        inner = nn.functional.layer_norm(found, (d,), own["between"], own["between_bias"])
        inner = nn.functional.gelu(inner @ own["up"] + own["up_bias"]) @ own["down"] + own["down_bias"]
        real = view.mask
        torch.testing.assert_close(
            method.semantic(view, view.states)[real], (found + inner)[real], rtol=1e-4, atol=1e-5
        )


def test_the_answers_state_is_read_as_the_mask_among_its_text(tmp_path: Path) -> None:
    """On a masked model g is the row of G at the mask, so other families' reading of it is the same thing."""
    made = tuned(tmp_path)
    batch = batch_of(made, tmp_path)
    view, method = made.view(batch), method_of(made)
    assert view.states is not None
    assert view.answer is not None
    whole = method.semantic(view, view.states)
    at = batch.slots["mask"]
    alone = method.semantic(view, view.answer[:, None])[:, 0]
    torch.testing.assert_close(alone, whole[torch.arange(len(batch)), at], rtol=1e-4, atol=1e-5)


# ---- 5: the head ---------------------------------------------------------------------------------------------------


def test_rows_of_other_words_have_no_say(tmp_path: Path) -> None:
    """Invariant 5: a head over the whole vocabulary gives the same class probabilities and gradients."""
    made = tuned(tmp_path, preset="release")
    batch = batch_of(made, tmp_path)
    scores = made.scores(batch).requires_grad_()
    others = torch.randn(len(batch), 50, generator=seeded(1), requires_grad=True)
    whole = log_softmax(torch.cat([scores, others], dim=1), dim=1)[:, :3]
    constant = (whole - scores).detach()
    torch.testing.assert_close(constant, constant[:, :1].expand_as(constant))
    own = torch.autograd.grad(cross_entropy(scores, batch.target), scores)[0]
    found, idle = torch.autograd.grad(cross_entropy(whole, batch.target), (scores, others))
    torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-6)
    assert float(idle.abs().max()) < 1e-6


# ---- 6, 7: padding and folding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_neither_prediction_nor_feature(family: str, train: bool, tmp_path: Path) -> None:
    """Invariant 6, also with its noise, which is one draw for all tokens of a row."""
    made = tuned(tmp_path, family, train=train)
    batch = batch_of(made, tmp_path)
    wide = padded(batch, right=3)
    torch.testing.assert_close(made.scores(wide), made.scores(batch), rtol=1e-4, atol=1e-4)
    one, two = (method_of(made).feature(made.view(each)) for each in (wide, batch))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_what_the_release_predicts_needs_neither_prompt_nor_decoder(tmp_path: Path) -> None:
    """Invariant 7."""
    for preset, same in (("release", True), ("paper", False)):
        made = tuned(tmp_path / preset, preset=preset)
        batch = batch_of(made, tmp_path / preset)
        before = made.scores(batch)
        with torch.no_grad():
            for name, value in method_of(made).named_parameters():
                if name.startswith(("decoder_", "prompt_rows", "last")):
                    value.normal_(generator=seeded(3))
        assert torch.equal(made.scores(batch), before) == same
    assert method_of(made).fold().sites == frozenset()
    with pytest.raises(NotFoldable, match="no rows"):
        method_of(made).fold().as_rows()


# ---- 8: stability --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["release", "paper"])
def test_the_prompts_start_has_no_say_in_the_release(preset: str, tmp_path: Path) -> None:
    """Invariant 8: trained from ten starts of the prompt alone, the release predicts the same bit for bit."""
    found = []
    for seed in range(10):
        made = tuned(tmp_path / str(seed), preset=preset, train=True, moved=False)
        with torch.no_grad():
            method_of(made).prompt_rows.normal_(generator=seeded(seed))
        solver = GradientSolver(made.trained(), optimizer="adamw", schedule="constant", steps=4, warmup=0, clip=15.0)
        batch = batch_of(made, tmp_path / str(seed))
        for step in range(4):
            made.moment = (0, step)
            solver.step(made, [batch], len(batch))
        found.append(made.train(False).scores(batch))
    assert all(torch.equal(one, found[0]) for one in found) == (preset == "release")


def test_clipping_ties_the_losses_unless_it_is_wide(tmp_path: Path) -> None:
    """All gradients are clipped together: a prompt with a large gradient would shorten the others' (release: 15)."""
    made = tuned(tmp_path, preset="release", train=True)
    made.loss(batch_of(made, tmp_path)).total.backward()
    norm = sum(float(g.parameter.grad.pow(2).sum()) for g in made.trained() if g.parameter.grad is not None) ** 0.5
    assert norm < 15


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a task with labels"):
        StablePT(StablePTConfig(), Shape(16, hidden=16))
    with pytest.raises(ConfigError, match="do not divide into 8 heads"):
        StablePT(StablePTConfig(), Shape(12, hidden=12, classes=2))
    with pytest.raises(ConfigError, match="never small"):
        StablePT.match_budget(StablePTConfig(), 100, Shape(16, hidden=16, classes=2))
    backbone = tiny.backbone("masked")
    task = Classify(ClassifyConfig(template="{text} {mask}", labels={"a": "very good", "b": "bad"}))
    method = StablePT(StablePTConfig(heads=4), Shape(tiny.WIDTH, hidden=tiny.WIDTH, classes=2))
    made = Tuned(backbone, task, method, max_length=40).initialise(torch.Generator().manual_seed(0))
    rows = made.rows([{"text": "red cat", "label": "a"}], labelled=True)
    with pytest.raises(SiteError, match="label words of one token"):
        made.scores(made.batch(rows))
