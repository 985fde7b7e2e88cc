"""DePT: the invariants of the specification, numbered as there, and its groups, start and fold.

Knows no other method but prompt tuning, which it reduces to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

import tiny
from promptuary.backbones.base import Backbone
from promptuary.data.collate import Row, collate, pad_candidates
from promptuary.errors import DataError, NotFoldable
from promptuary.methods.dept import DePT, DePTConfig
from promptuary.methods.prompt_tuning import PromptTuning, PromptTuningConfig
from promptuary.prompts.init import Starting
from promptuary.solvers.gradient import GradientSolver
from promptuary.types import Batch, Candidates, Piece, Prompt, Shape, View

TEXTS = ("a red apple was good", "blue sky", "never cold but always very hot", "six birds eat one plum")
KINDS = ("t5", "llama", "bert")
D, M = tiny.WIDTH, 12
BASE = Shape(768)


def batch_of(backbone: Backbone, **settings: object) -> Batch:
    rows = [
        Row(
            backbone.encode([Piece("field", text), Piece("fixed", " it was "), Piece("slot", "mask")], 40),
            i,
            target=i % 3,
            **settings,
        )
        for i, text in enumerate(TEXTS)
    ]
    return collate(rows, backbone.pad, segments=backbone.uses_segments)


def words(backbone: Backbone) -> Candidates:
    return pad_candidates([backbone.answer_ids(word) for word in ("good", "bad", "maybe")])


def scores(backbone: Backbone, prompt: Prompt, batch: Batch | None = None) -> Tensor:
    return backbone.score(batch_of(backbone) if batch is None else batch, prompt, words(backbone))


def made(backbone: Backbone, *, moved: bool = True, **settings: object) -> DePT:
    """DePT on a backbone; `moved`: B is not zero any more."""
    config = DePTConfig(**{"num_virtual_tokens": 3, "rank": 2, "max_tokens": M, **settings})
    method = DePT(config, backbone.shape)
    method.initialise(Starting(backbone.vocabulary, torch.Generator().manual_seed(0)))
    if moved:
        scale = backbone.vocabulary.rms()
        with torch.no_grad():
            method.b.copy_(scale * torch.randn(method.b.shape, generator=torch.Generator().manual_seed(1)))
    return method


def tuning_like(method: DePT, backbone: Backbone) -> PromptTuning:
    """Prompt tuning with the same short prompt."""
    made = PromptTuning(PromptTuningConfig(num_virtual_tokens=len(method.rows), init="saved"), backbone.shape)
    return made.initialise(Starting(backbone.vocabulary, torch.Generator(), method.rows.detach()))


def table_of(method: DePT) -> np.ndarray:
    """gamma A B by hand."""
    a, b = method.a.detach().double().numpy(), method.b.detach().double().numpy()
    return 8 / math.sqrt(a.shape[1]) * sum(np.outer(a[:, r], b[r]) for r in range(a.shape[1]))


def by_hand(kind: str, batch: Batch, rows: Tensor, table: Tensor, *, answer: Tensor | None = None) -> list[Tensor]:
    """All logits of the bare model on [P_s ; E + C], one unpadded example at a time; an answer gets no offset."""
    model, out = tiny.model(kind), []
    weight = model.get_input_embeddings().weight.detach()
    for i in range(len(batch)):
        ids = batch.input_ids[i, : int(batch.attention_mask[i].sum())]
        text = weight[ids] + pad(table, (0, 0, 0, max(0, len(ids) - len(table))))[: len(ids)]
        if kind == "t5":
            target = torch.tensor([[0]]) if answer is None else torch.cat([torch.tensor([0]), answer[i][:-1]])[None]
            out.append(model(inputs_embeds=torch.cat([rows, text])[None], decoder_input_ids=target).logits[0])
            continue
        parts = [rows, text] if answer is None else [rows, text, weight[answer[i]]]
        out.append(model(inputs_embeds=torch.cat(parts)[None]).logits[0])
    return out


def read(kind: str, batch: Batch, logits: list[Tensor], rows: int) -> Tensor:
    """The logits at the answer place, [b, V]."""
    return torch.stack([x[0 if kind == "t5" else rows + int(batch.slots["mask"][i])] for i, x in enumerate(logits)])


def padded(batch: Batch, left: int = 0, right: int = 0) -> Batch:
    moved = {name: pad(getattr(batch, name), (left, right)) for name in ("input_ids", "attention_mask")}
    segments = None if batch.segment_ids is None else pad(batch.segment_ids, (left, right))
    return replace(batch, **moved, segment_ids=segments, slots={name: at + left for name, at in batch.slots.items()})


def test_the_five_published_sizes_have_the_budget_of_prompt_tuning() -> None:
    """Invariant 1."""
    for s, r in ((80, 15), (60, 30), (40, 45), (20, 60), (0, 75)):
        config = DePTConfig(num_virtual_tokens=s, rank=r, max_tokens=256)
        assert DePT.count(config, BASE) == 76_800 == 100 * 768
        assert sum(value.numel() for value in DePT(config, BASE).parameters()) == 76_800
    assert DePT.count(DePTConfig(num_virtual_tokens=60, rank=30, max_tokens=348), BASE) == 79_560


@pytest.mark.parametrize(("s", "r"), [(80, 15), (60, 30), (40, 45), (20, 60), (0, 75)])
def test_the_published_sizes_are_what_matching_the_budget_finds(s: int, r: int) -> None:
    """Invariant 1, the other way round."""
    assert DePT.match_budget(DePTConfig(num_virtual_tokens=s), 100, BASE).rank == r


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("off", ["r = 0", "B = 0"])
def test_without_a_table_it_is_prompt_tuning_bit_for_bit(kind: str, off: str) -> None:
    """Invariant 2: loss and gradient."""
    backbone = tiny.backbone(kind)
    method = made(backbone, moved=False, rank=0 if off == "r = 0" else 2)
    tuning = tuning_like(method, backbone)
    found = []
    for each in (method, tuning):
        out = scores(backbone, each.prompt(View()))
        cross_entropy(out, batch_of(backbone).target).backward()
        found.append((out, each.rows.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_leave_the_length_and_still_train_the_table(kind: str) -> None:
    """Invariant 3."""
    backbone = tiny.backbone(kind)
    method, batch = made(backbone, num_virtual_tokens=0), batch_of(backbone)
    prompt = method.prompt(View())
    assert backbone.place(batch, prompt).input_ids.shape == batch.input_ids.shape
    out = scores(backbone, prompt)
    table = torch.tensor(table_of(method), dtype=torch.float32)
    expected = read(kind, batch, by_hand(kind, batch, torch.zeros(0, D), table), 0)[:, words(backbone).ids[:, 0]]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    cross_entropy(out, batch.target).backward()
    assert float(method.a.grad.abs().max()) > 0
    assert float(method.b.grad.abs().max()) > 0
    with pytest.raises(NotFoldable):
        method.fold().as_rows()


@pytest.mark.parametrize("kind", KINDS)
def test_first_gradients_reach_the_prompt_and_b_but_not_a(kind: str) -> None:
    """Invariant 4."""
    backbone = tiny.backbone(kind)
    method = made(backbone, moved=False)
    cross_entropy(scores(backbone, method.prompt(View())), batch_of(backbone).target).backward()
    assert bool((method.rows.grad.abs().amax(1) > 0).all())
    assert bool((method.b.grad.abs().amax(1) > 0).all())
    assert float(method.a.grad.abs().max()) == 0
    assert all(value.grad is None for value in backbone.model.parameters())


def test_exactly_two_learning_rates_and_the_schedule_scales_both() -> None:
    """Invariant 5."""
    method = made(tiny.backbone("t5"), prompt_lr=0.3, lr_unit="absolute", low_rank_lr=5e-4, weight_decay=0.01)
    groups = method.trained()
    assert {g.name: g.learning_rate for g in groups} == {"rows": 0.3, "a": 5e-4, "b": 5e-4}
    assert {g.name: g.weight_decay for g in groups} == dict.fromkeys(("rows", "a", "b"), 0.01)
    solver = GradientSolver(groups, optimizer="adamw", schedule="linear", steps=10, warmup=0, clip=1.0)
    for left in (10, 9, 8):
        assert solver.rates() == pytest.approx({"rows": 0.03 * left, "a": 5e-5 * left, "b": 5e-5 * left})
        solver.optimizer.step()
        solver.schedule.step()


def test_only_the_prompt_has_a_rate_in_units_of_its_start() -> None:
    method = made(tiny.backbone("t5"), prompt_lr=0.05, low_rank_lr=5e-3)
    rates = {g.name: g.learning_rate for g in method.trained()}
    assert rates["rows"] == pytest.approx(0.05 * float(method.rows.detach().pow(2).mean().sqrt()))
    assert rates["a"] == rates["b"] == 5e-3


@pytest.mark.parametrize("kind", [*KINDS, "minilm"])
def test_what_is_added_depends_on_the_position_only(kind: str) -> None:
    """Invariant 6: E~ - E is the same m x d table for every example, computed by hand."""
    backbone = tiny.backbone(kind)
    method, batch = made(backbone), batch_of(backbone)
    with torch.no_grad():
        placed = backbone.place(batch, method.prompt(View()))
        with backbone.wiring.active(placed.bank):
            shifted = backbone.model.get_input_embeddings()(placed.input_ids)
        shifted = shifted.gather(1, placed.columns[..., None].expand(-1, -1, D))
        added = shifted - backbone.embeddings(batch)
    table = table_of(method)
    for row, mask in zip(added, batch.attention_mask.bool(), strict=True):
        np.testing.assert_allclose(row[mask].numpy(), table[: int(mask.sum())], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("align", ["token", "slot"])
def test_padding_on_the_right_never_matters_on_the_left_only_when_counting_columns(kind: str, align: str) -> None:
    """Invariant 7."""
    backbone = tiny.backbone(kind)
    prompt, batch = made(backbone, offset_align=align, max_tokens=20).fold(), batch_of(backbone)
    plain = scores(backbone, prompt, batch)
    torch.testing.assert_close(scores(backbone, prompt, padded(batch, right=5)), plain, rtol=1e-4, atol=1e-4)
    change = float((scores(backbone, prompt, padded(batch, left=2)) - plain).abs().max())
    assert change < 1e-4 if align == "token" else change > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_the_static_table_gives_the_same_scores_and_gradient_on_the_bare_model(kind: str) -> None:
    """Invariant 8, and the definition: [P_s ; E + gamma A B], by F.cross_entropy on concatenated embeddings."""
    backbone = tiny.backbone(kind)
    method, batch, ids = made(backbone), batch_of(backbone), words(backbone).ids[:, 0]
    folded = method.fold()
    live = scores(backbone, method.prompt(View()))
    torch.testing.assert_close(scores(backbone, folded), live, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(folded.offset.table().numpy(), table_of(method), rtol=1e-4, atol=1e-5)
    rows = folded.rows[0].clone().requires_grad_()
    a, b = (value.detach().clone().requires_grad_() for value in (method.a, method.b))
    expected = read(kind, batch, by_hand(kind, batch, rows, 8 / math.sqrt(2) * a @ b), 3)[:, ids]
    torch.testing.assert_close(live, expected, rtol=1e-4, atol=1e-4)
    cross_entropy(live, batch.target).backward()
    cross_entropy(expected, batch.target).backward()
    for one, two in ((method.rows, rows), (method.a, a), (method.b, b)):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-4)


def test_folding_into_rows_alone_is_refused_unless_the_table_is_zero() -> None:
    """Invariant 8."""
    method = made(tiny.backbone("t5"))
    with pytest.raises(NotFoldable, match="no prefix can reproduce"):
        method.fold().as_rows()
    with torch.no_grad():
        method.b.zero_()
    assert torch.equal(method.fold().as_rows(), method.rows)
    assert torch.equal(made(tiny.backbone("t5"), rank=0).fold().as_rows(), made(tiny.backbone("t5"), rank=0).rows)


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_generation_and_teacher_forcing_agree_on_the_first_token(kind: str) -> None:
    """Invariant 9: every token of the vocabulary is a candidate, and the bare model agrees."""
    backbone = tiny.backbone(kind)
    method, batch = made(backbone), batch_of(backbone)
    folded = method.fold()
    every = Candidates(torch.arange(tiny.SIZE)[:, None], torch.ones(tiny.SIZE, 1, dtype=torch.bool))
    best = backbone.score(batch, folded, every).argmax(1).tolist()
    hand = read(kind, batch, by_hand(kind, batch, folded.rows[0], folded.offset.table()), 3).argmax(1).tolist()
    silent = {backbone.pad, backbone.tokenizer.eos_token_id}
    expected = [[] if token in silent else [token] for token in best]
    assert backbone.generate(batch, folded, max_new_tokens=1) == expected
    assert best == hand
    assert any(expected), "at least one row writes a token"


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_an_answer_takes_no_offset(kind: str) -> None:
    """Section 3.5, and invariant 10 for the encoder-decoder: token cross-entropy of the answers, by hand."""
    backbone = tiny.backbone(kind)
    method = made(backbone, max_tokens=30)
    answer = torch.tensor(backbone.answer_ids("very good and red"))
    batch = batch_of(backbone, target_ids=tuple(answer.tolist()))
    folded = method.fold()
    logits = by_hand(kind, batch, folded.rows[0], folded.offset.table(), answer=answer.expand(len(batch), -1))
    first = [0 if kind == "t5" else 3 + int(at) for at in batch.slots.get("mask", torch.zeros(len(batch)))]
    expected = sum(
        cross_entropy(x[at : at + len(answer)], answer, reduction="sum") for x, at in zip(logits, first, strict=True)
    )
    torch.testing.assert_close(backbone.answer_losses(batch, folded).sum(), expected, rtol=1e-4, atol=1e-3)


@contextmanager
def recorded(module: torch.nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """What an embedding module was asked and answered."""
    seen: list[tuple[Tensor, Tensor]] = []
    hook = module.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    try:
        yield seen
    finally:
        hook.remove()


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_inputs_of_the_decoder_are_untouched(kind: str) -> None:
    """Invariant 10."""
    backbone = tiny.backbone(kind)
    batch = batch_of(backbone, target_ids=(20, 21, 2))
    decoder = backbone.model.get_decoder()
    weight = tiny.model(kind).get_input_embeddings().weight
    asked = []
    for prompt in (Prompt(), made(backbone).fold()):
        with recorded(decoder.embed_tokens) as seen:
            backbone.answer_losses(batch, prompt).sum()
        ids, out = seen[-1]
        assert torch.equal(out, weight[ids])
        asked.append(ids)
    assert torch.equal(*asked)


@pytest.mark.parametrize(("rule", "beyond"), [("zero", "nothing"), ("clamp", "last row"), ("error", "refused")])
def test_text_beyond_the_table(rule: str, beyond: str) -> None:
    backbone = tiny.backbone("t5")
    short, long = (made(backbone, max_tokens=size, offset_overflow=rule) for size in (4, M))
    with torch.no_grad():
        long.a.copy_(pad(short.a, (0, 0, 0, M - 4)))
        if beyond == "last row":
            long.a[4:] = short.a[3]
        for part in ("b", "rows"):
            getattr(long, part).copy_(getattr(short, part))
    if beyond == "refused":
        with pytest.raises(DataError, match=r"method\.max_tokens"):
            scores(backbone, short.fold())
        return
    with pytest.warns(UserWarning, match="offset table has 4 rows"):
        found = scores(backbone, short.fold())
    torch.testing.assert_close(found, scores(backbone, long.fold()))


@pytest.mark.parametrize("rank", [1, 4, 30])
def test_gamma_is_alpha_over_the_root_of_r_or_one(rank: int) -> None:
    for scale, gamma in (("alpha", 6 / math.sqrt(rank)), ("one", 1.0)):
        method = made(tiny.backbone("t5"), rank=rank, lowrank_scale=scale, alpha=6.0)
        expected = gamma * method.a.detach().double() @ method.b.detach().double()
        torch.testing.assert_close(method.fold().offset.table().double(), expected, rtol=1e-4, atol=1e-4)


def test_the_start_is_the_released_one() -> None:
    """P_s of vocabulary rows, A uniform in +-1/sqrt(r), B zero."""
    backbone = tiny.backbone("bert")
    method = made(backbone, moved=False, rank=9, max_tokens=400)
    weight = tiny.model("bert").get_input_embeddings().weight
    assert all(bool((weight == row).all(1).any()) for row in method.rows)
    assert 0.99 / 3 < float(method.a.detach().abs().max()) <= 1 / 3
    assert float(method.b.detach().abs().max()) == 0
    assert method.fold().offset.is_zero()
