"""StablePT: the invariants of the specification, numbered as there; which gradients flow in each preset.

Knows no other method. The contrastive loss itself is tested in test_losses.py (invariant 4).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

import tiny
from promptuary.building import shape_of
from promptuary.config import load_run
from promptuary.errors import ConfigError, NotFoldable, SiteError
from promptuary.methods.stablept import StablePT, StablePTConfig
from promptuary.prompts.attention import Block
from promptuary.seeds import seeded
from promptuary.solvers.gradient import GradientSolver
from promptuary.sweeping import sweep
from promptuary.tasks.regress import Regress, RegressConfig
from promptuary.testing import case_of
from promptuary.testing.case import padded
from promptuary.training import train
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
    made = tuned(tmp_path, preset="release", class_weights=False, train=True)
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
    made = tuned(tmp_path, preset="release", class_weights=False, detach_context=False, train=True)
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
    trained = {name for name, reached in grown(made, made.loss(batch).total).items() if reached}
    assert trained == {f"encoder_{name}" for name in Block.NAMES}
    assert {group.name for group in made.trained()} == {f"method.{name}" for name in trained}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_never_enter_the_model(family: str, tmp_path: Path) -> None:
    made = tuned(tmp_path, family, train=True)
    made.loss(batch_of(made, tmp_path)).total.backward()
    assert all(parameter.grad is None for parameter in made.backbone.model.parameters())


# ---- the blocks ----------------------------------------------------------------------------------------------------


def test_a_block_is_torchs_own_layer(tmp_path: Path) -> None:
    """The semantic encoder on its own: torch's pre-norm attention and MLP with the same weights, padding masked."""
    made = tuned(tmp_path, block_width=None)
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


def whole_head(made: Tuned, batch: Any, pieces: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The release's head over a whole vocabulary, as it says: class scores, and the tensors that it has.

    A class is the mean of the log-probabilities of its tokens, weighed by a softmax; `pieces` tokens each.
    """
    method, view, classes = method_of(made), made.view(batch), method_of(made).words.shape[1]
    noise = torch.randn(40, 300, generator=seeded(1))
    rows, bias = noise.clone(), noise[:, 0].clone()
    weights = torch.softmax(torch.rand(classes, pieces, generator=seeded(2)), dim=-1)
    with torch.no_grad():
        ids = torch.randperm(40, generator=seeded(3))[: classes * pieces].view(classes, pieces)
        # the first token of a class makes up for what the others are
        others = (weights[:, 1:, None] * rows[ids[:, 1:]]).sum(1), (weights[:, 1:] * bias[ids[:, 1:]]).sum(1)
        rows[ids[:, 0]] = (method.words.T - others[0]) / weights[:, :1]
        bias[ids[:, 0]] = (method.words_bias - others[1]) / weights[:, 0]
    rows.requires_grad_()
    state = method.semantic(view, view.answer[:, None])[:, 0]
    inner = nn.functional.gelu(state @ method.inner + method.inner_bias)
    inner = nn.functional.layer_norm(inner, (300,), method.inner_norm, method.inner_norm_bias)
    said = log_softmax(inner @ rows.T + bias, dim=1)
    return (said[:, ids] * weights).sum(-1), {"rows": rows, "ids": ids}


@pytest.mark.parametrize("pieces", [1, 3])
def test_a_head_over_the_whole_vocabulary_says_the_same(pieces: int, tmp_path: Path) -> None:
    """Invariant 5: equal scores but for a constant, equal gradients, and none in the rows of other words.

    With several tokens to a class too: a weighed mean of rows is one row.
    """
    made = tuned(tmp_path, preset="release")
    batch = batch_of(made, tmp_path)
    scores = made.scores(batch)
    whole, tensors = whole_head(made, batch, pieces)
    constant = (whole - scores).detach()
    torch.testing.assert_close(constant, constant[:, :1].expand_as(constant), rtol=1e-4, atol=1e-4)
    assert float(constant.abs().max()) > 0.1
    shared = [value for name, value in method_of(made).named_parameters() if name.startswith(("encoder_", "inner"))]
    own = torch.autograd.grad(cross_entropy(scores, batch.target), shared)
    found = torch.autograd.grad(cross_entropy(whole, batch.target), [*shared, tensors["rows"]])
    for one, two in zip(own, found[:-1], strict=True):
        torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-5)
    idle = torch.ones(40, dtype=torch.bool)
    idle[tensors["ids"].flatten()] = False
    assert float(found[-1][idle].abs().max()) < 1e-6 < float(found[-1][~idle].abs().max())


@pytest.mark.parametrize("family", ["causal", "seq2seq", "masked"])
def test_the_models_own_head_reads_the_state_as_it_reads_its_own(family: str, tmp_path: Path) -> None:
    """Of the state that it made itself it says what it says of the text; of another what its whole vocabulary says."""
    made = tuned(tmp_path, family)
    batch, outputs, words = batch_of(made, tmp_path), made.outputs(batch_of(made, tmp_path)), made.asking.words
    assert outputs.words is not None
    assert outputs.view.answer is not None
    assert words is not None
    plain = made.backbone.score(batch, made.prompt(batch), words)
    torch.testing.assert_close(outputs.words(outputs.view.answer), plain, rtol=1e-4, atol=1e-4)
    state = method_of(made).semantic(outputs.view, outputs.view.answer[:, None])[:, 0]
    state = state + method_of(made).feature(outputs.view) @ method_of(made).fusion
    everything = made.backbone.tail.logits(state)[:, words.ids[:, 0]]
    torch.testing.assert_close(made.scores(batch), everything, rtol=1e-4, atol=1e-4)


# ---- class weights -------------------------------------------------------------------------------------------------


def test_classes_are_weighed_by_what_they_are_not(tmp_path: Path) -> None:
    """The release: one minus the part of the batch; a batch of one class, where that is 0 / 0, has its plain mean."""
    made = tuned(tmp_path, preset="release", contrastive_weight=0.0)
    batch = batch_of(made, tmp_path)
    scores, target = made.scores(batch), batch.target
    each = cross_entropy(scores, target, reduction="none")
    weights = torch.tensor([1 - int((target == one).sum()) / len(target) for one in target.tolist()])
    torch.testing.assert_close(made.loss(batch).total, (weights * each).sum() / weights.sum())
    plain = tuned(tmp_path, preset="release", contrastive_weight=0.0, class_weights=False)
    torch.testing.assert_close(plain.loss(batch).total, each.mean())
    assert not torch.isclose(made.loss(batch).total, each.mean(), atol=1e-4)
    one = replace(batch, target=torch.zeros_like(target))
    torch.testing.assert_close(made.loss(one).total, cross_entropy(scores, one.target))


# ---- noise ---------------------------------------------------------------------------------------------------------


def test_noise_is_of_seed_step_and_row_and_of_training_alone(tmp_path: Path) -> None:
    made = tuned(tmp_path, train=True)
    batch, order = batch_of(made, tmp_path), torch.tensor([3, 1, 4, 0, 2])
    scores = made.scores(batch)
    torch.testing.assert_close(made.scores(batch.rows(order)), scores[order], rtol=1e-4, atol=1e-4)
    assert torch.equal(made.scores(batch), scores)
    for moment in ((0, 2), (1, 1)):
        made.moment = moment
        assert not torch.allclose(made.scores(batch), scores, atol=1e-3)
    quiet = made.train(False).scores(batch)
    assert torch.equal(made.scores(batch), quiet)
    assert not torch.allclose(quiet, scores, atol=1e-3)


def test_the_decoder_skips_and_drops_nothing(tmp_path: Path) -> None:
    """As in the release: what is dropped is dropped in the semantic encoder; rows skip in both, each at its rate."""
    for settings, encoder, decoder in (
        ({"dropout": 0.5, "drop_path": 0.0, "decoder_drop_path": 0.0}, True, False),
        ({"dropout": 0.0, "drop_path": 0.5, "decoder_drop_path": 0.0}, True, False),
        ({"dropout": 0.0, "drop_path": 0.0, "decoder_drop_path": 0.5}, False, True),
    ):
        made = tuned(tmp_path, train=True, **settings)
        method, view = method_of(made), made.view(batch_of(made, tmp_path))
        still = replace(view, chance=None)
        noisy = method.semantic(view, view.states), method.feature(view)
        assert torch.equal(noisy[0], method.semantic(still, still.states)) != encoder
        # the same semantic encoder without noise, so that what is left is the decoder's
        context = method.semantic
        method.semantic = lambda _, asking, context=context, still=still: context(still, asking)
        assert torch.equal(method.feature(view), method.feature(still)) != decoder


# ---- batches are never cut -----------------------------------------------------------------------------------------


def test_runs_of_a_sweep_compare_their_own_rows_alone(tmp_path: Path) -> None:
    """Two runs whose texts share batches learn what each learns by itself, noise and contrast included."""
    case = case_of(StablePT, "masked", tmp_path)
    backbone = case.backbone()
    runs = [case.run(f"together-{seed}", steps=4, seed=seed) for seed in (1, 2)]
    for seed, found in zip((1, 2), sweep(runs, backbone=backbone), strict=True):
        alone = train(case.run(f"alone-{seed}", steps=4, seed=seed), backbone=backbone)
        for name, value in alone.prompt.state().items():
            torch.testing.assert_close(found.prompt.state()[name], value, rtol=2e-3, atol=1e-4)
    with pytest.raises(ConfigError, match=r"accumulation: 1"):
        sweep([case.run("cut", train={"accumulation": 2})], backbone=backbone)
    assert not (tmp_path / "cut").exists()


# ---- 6, 7: padding and folding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_neither_prediction_nor_feature(family: str, train: bool, tmp_path: Path) -> None:
    """Invariant 6, also with its noise, which is one draw for all tokens of a row."""
    made = tuned(tmp_path, family, train=train)
    batch = batch_of(made, tmp_path)
    for wide in (padded(batch, right=3), padded(batch, left=2)):
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
    with pytest.raises(ConfigError, match="width of 12 does not divide into 8 heads; set method.heads"):
        StablePT(StablePTConfig(), Shape(12, hidden=12, classes=2))
    with pytest.raises(ConfigError, match="no small method"):
        StablePT.match_budget(StablePTConfig(), 100, Shape(16, hidden=16, classes=2))


def test_a_budget_takes_the_widest_blocks_that_fit() -> None:
    shape = Shape(768, hidden=768, classes=2)
    config = StablePT.match_budget(StablePTConfig(), 5000, shape)
    width = config.block_width
    wider = config.model_copy(update={"block_width": width + 8})
    assert width % 8 == 0
    assert StablePT.count(config, shape) <= 5000 * 768 < StablePT.count(wider, shape)
    assert StablePT.match_budget(StablePTConfig(), 10**6, shape).block_width == 768
    # states of another width than the embeddings: what is trained has that of the states
    narrow = Shape(128, hidden=768, classes=2)
    assert StablePT.count(StablePTConfig(), narrow) == StablePT.count(StablePTConfig(), shape)


def test_values_are_no_classes(tmp_path: Path) -> None:
    words = {"name": "regress", "template": "{text} it was {mask}", "label": "value", "words": ["bad", "good"]}
    task = Regress(RegressConfig.read({**words, "low": 0, "high": 5}, where="task"))
    for settings, told in (({}, True), ({"contrastive_weight": 0.0}, False), ({"class_weights": True}, True)):
        backbone = tiny.backbone("masked")
        config = StablePTConfig(heads=4, **settings)
        made = Tuned(backbone, task, StablePT(config, shape_of(backbone, task)), max_length=40)
        made.initialise(seeded(0)).train(True)
        batch = made.batch(made.rows([{"text": "red cat", "value": 2.5}, {"text": "dog", "value": 1}], labelled=True))
        with pytest.raises(ConfigError, match="this task has values") if told else nullcontext():
            made.loss(batch)


def test_label_words_of_several_tokens_need_a_head_of_their_own(tmp_path: Path) -> None:
    """Told before a run writes anything."""
    case = case_of(StablePT, "masked", tmp_path)
    values = case.run("long").model_dump()
    values["task"]["labels"] = {"positive": "very good", "negative": "bad"}
    with pytest.raises(SiteError, match="label words of one token; or set method.head: scratch"):
        train(load_run(values), backbone=case.backbone())
    assert not (tmp_path / "long").exists()
    values["method"]["head"], values["train"]["steps"] = "scratch", 2
    assert train(load_run(values), backbone=case.backbone()).facts["steps"] == 2
