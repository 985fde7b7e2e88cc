"""EPT: the invariants of the specification, numbered as there.

Knows no other method but prompt tuning and DePT, which it reduces to.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.numpy import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from torch.utils.flop_counter import FlopCounterMode

import tiny
from promptuary.backbones.base import Backbone
from promptuary.checkpoint import load_prompt, save_prompt
from promptuary.data.collate import Row, collate, pad_candidates
from promptuary.errors import FingerprintError, NotFoldable
from promptuary.methods.base import Method
from promptuary.methods.dept import DePT, DePTConfig
from promptuary.methods.ept import EPT, EPTConfig
from promptuary.methods.prompt_tuning import PromptTuning, PromptTuningConfig
from promptuary.prompts.init import Starting
from promptuary.tasks.classify import Classify, ClassifyConfig
from promptuary.tuned import Tuned
from promptuary.types import Batch, Piece, Prompt, Shape, View

TEXTS = ("a red apple was good", "blue sky", "never cold but always very hot", "six birds eat one plum")
ASKS = (Piece("fixed", " it was "), Piece("slot", "mask"))
KINDS = ("t5", "llama", "bert")
D = tiny.WIDTH
SMALL: Mapping[str, Any] = {
    "num_virtual_tokens": 3, "reference_length": 9, "rank": 2, "max_tokens": 20, "spaces": 3, "space_dim": 2,
}  # fmt: skip
OFF = {"use_fusion": False, "use_spaces": False}


def batch_of(backbone: Backbone) -> Batch:
    rows = [Row(backbone.encode([Piece("field", text), *ASKS], 40), i, target=i % 3) for i, text in enumerate(TEXTS)]
    return collate(rows, backbone.pad, segments=backbone.uses_segments)


def view_of(backbone: Backbone, batch: Batch) -> View:
    return View(embeddings=backbone.embeddings(batch), mask=batch.attention_mask.bool())


def scores(backbone: Backbone, prompt: Prompt, batch: Batch | None = None) -> Tensor:
    words = pad_candidates([backbone.answer_ids(word) for word in ("good", "bad", "maybe")])
    return backbone.score(batch_of(backbone) if batch is None else batch, prompt, words)


def loss(backbone: Backbone, method: Method) -> Tensor:
    batch = batch_of(backbone)
    return cross_entropy(scores(backbone, method.prompt(view_of(backbone, batch)), batch), batch.target)


def made(backbone: Backbone, *, moved: bool = False, **settings: Any) -> EPT:
    """EPT on a backbone; `moved`: every tensor away from its start, each by a draw that its name and size decide."""
    method = EPT(EPTConfig(**{**SMALL, **settings}), backbone.shape)
    method.initialise(Starting(backbone.vocabulary, torch.Generator().manual_seed(0)))
    if moved:
        with torch.no_grad():
            for name, value in method.named_parameters():
                generator = torch.Generator().manual_seed(sum(map(ord, name)))
                value.add_(0.5 * torch.randn(value.shape, generator=generator))
    return method


def like(method: EPT, other: type[Method], config: Any, backbone: Backbone) -> Any:
    """Another method with the same tensors of the same names."""
    twin = other(config, backbone.shape)
    twin.load_state_dict({name: method.state_dict()[name] for name in twin.state_dict()})
    return twin


SIZES = list(itertools.product((2, 60), (1, 30), (24, 256), (1, 4), (1, 4), (0, 8)))


@pytest.mark.parametrize(("s", "r", "m", "n", "k", "h"), SIZES[:: len(SIZES) // 16 - 1])
def test_count_is_the_formula_and_each_switch_removes_its_term(s: int, r: int, m: int, n: int, k: int, h: int) -> None:
    """Invariant 1."""
    settings = {"num_virtual_tokens": s, "rank": r, "max_tokens": m, "spaces": n, "space_dim": k, "fusion_dim": h}
    for d, fusion, spaces, lowrank in itertools.product((16, 64), *[(True, False)] * 3):
        config = EPTConfig(**settings, use_fusion=fusion, use_spaces=spaces, use_lowrank=lowrank)
        expected = s * d + spaces * (n * 2 * d * k + n * (d + 1))
        expected += lowrank * r * (m + d) + (fusion and lowrank) * 2 * d * h
        assert EPT.count(config, Shape(d)) == expected == sum(p.numel() for p in EPT(config, Shape(d)).parameters())


def test_count_gives_the_arithmetic_of_the_specification() -> None:
    """Invariant 1: 76,800 without modules, 75,780 with four spaces of rank 2."""
    assert EPT.count(EPTConfig(num_virtual_tokens=60, rank=30, use_spaces=False), Shape(768)) == 76_800
    config = EPTConfig(num_virtual_tokens=40, spaces=4, space_dim=2)
    assert EPT.count(config.model_copy(update={"rank": 29}), Shape(768)) == 75_780
    assert EPT.match_budget(config, 100, Shape(768)).rank == 29


def both(backbone: Backbone, method: EPT, other: type[Method], config: Any) -> None:
    """Scores and all gradients are bit-identical."""
    twin = like(method, other, config, backbone)
    outs = []
    for each in (method, twin):
        outs.append(scores(backbone, each.prompt(View())))
        cross_entropy(outs[-1], batch_of(backbone).target).backward()
    assert torch.equal(*outs)
    grads = [{name: value.grad for name, value in each.named_parameters()} for each in (method, twin)]
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


@pytest.mark.parametrize("kind", KINDS)
def test_with_everything_off_it_is_prompt_tuning_bit_for_bit(kind: str) -> None:
    """Invariant 2."""
    backbone = tiny.backbone(kind)
    method = made(backbone, moved=True, use_lowrank=False, **OFF)
    both(backbone, method, PromptTuning, PromptTuningConfig(num_virtual_tokens=3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", ["alpha", "one"])
def test_with_fusion_and_spaces_off_it_is_dept_bit_for_bit(kind: str, scale: Any) -> None:
    """Invariant 3."""
    backbone = tiny.backbone(kind)
    method = made(backbone, moved=True, lowrank_scale=scale, **OFF)
    both(backbone, method, DePT, DePTConfig(num_virtual_tokens=3, rank=2, max_tokens=20, lowrank_scale=scale))


STARTS: tuple[dict[str, Any], ...] = (
    {}, {"lowrank_init": "dept"}, {"fusion_dim": 4}, {"topology": "parallel"}, {"fusion_residual": "difference"},
    {"gate_granularity": "token"}, {"space_type": "linear"}, {"space_type": "scale"}, {"gate_top_k": 1},
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", STARTS, ids=str)
def test_at_the_start_it_is_prompt_tuning_exactly(kind: str, settings: dict[str, Any]) -> None:
    """Invariant 4: P* = P_s, E~ = E, and so the loss is prompt tuning's."""
    backbone = tiny.backbone(kind)
    method = made(backbone, **settings)
    folded = method.fold()
    assert torch.equal(folded.as_rows(), method.rows)
    assert float(folded.offset.table().abs().max()) == 0
    twin = like(method, PromptTuning, PromptTuningConfig(num_virtual_tokens=3), backbone)
    assert torch.equal(loss(backbone, method), loss(backbone, twin))


@pytest.mark.parametrize("settings", [{}, {"gate_granularity": "token"}, {"gate_top_k": 2}], ids=str)
def test_gates_sum_to_one(settings: dict[str, Any]) -> None:
    """Invariant 5, at the start and later; of k largest, k are not zero."""
    backbone = tiny.backbone("t5")
    assert torch.allclose(made(backbone, **settings).insight()["gate"].sum(-1), torch.ones(()))
    gate = made(backbone, moved=True, **settings).insight()["gate"]
    assert torch.allclose(gate.sum(-1), torch.ones(()))
    assert bool(((gate > 0).sum(-1) == settings.get("gate_top_k", 3)).all())


def test_a_single_space_makes_the_gate_inert() -> None:
    """Invariant 5."""
    method = made(tiny.backbone("t5"), moved=True, spaces=1)
    before = method.fold().rows
    with torch.no_grad():
        method.w_g.mul_(-7)
        method.b_g.add_(3)
    assert torch.equal(before, method.fold().rows)
    cross_entropy(method.prompt(View()).rows[0], torch.tensor([0, 1, 2])).backward()
    assert float(method.w_g.grad.abs().max()) == 0


@pytest.mark.parametrize("space_type", ["bottleneck", "linear", "scale"])
def test_permuting_spaces_with_their_gates_changes_nothing(space_type: str) -> None:
    """Invariant 5; without their gates it does."""
    method, order = made(tiny.backbone("t5"), moved=True, space_type=space_type), torch.tensor([2, 0, 1])
    before = method.fold().rows
    with torch.no_grad():
        for name in ("up", "down") if space_type == "bottleneck" else ("up",):
            getattr(method, name).copy_(getattr(method, name)[order].clone())
        assert float((method.fold().rows - before).abs().max()) > 1e-2
        method.w_g.copy_(method.w_g[:, order].clone())
        method.b_g.copy_(method.b_g[order].clone())
    torch.testing.assert_close(method.fold().rows, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("h", [0, 4])
def test_gradients_flow_as_derived_first_and_everywhere_from_the_second_pass_on(kind: str, h: int) -> None:
    """Invariant 6."""
    backbone = tiny.backbone(kind)
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    method = made(backbone, fusion_dim=h)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
    loss(backbone, method).backward()
    moved = {name for name, value in method.named_parameters() if float(value.grad.abs().max()) > 0}
    assert moved == {"rows", "a", "up"}
    assert bool((method.a.grad.abs().amax(0) > 0).all()), "every component of A"
    assert bool((method.up.grad.abs().amax((1, 2)) > 0).all()), "every space"
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()
        loss(backbone, method).backward()
        for name, value in method.named_parameters():
            assert bool(value.grad.isfinite().all()), name
            assert float(value.grad.abs().max()) > 0, name
    assert all(value.grad is None for value in backbone.model.parameters())
    assert all(torch.equal(before[name], value) for name, value in backbone.model.state_dict().items())


@pytest.mark.parametrize("settings", [{}, {"fusion_dim": 4}, {"fusion_lambda": True}, {"fusion_detach": True}], ids=str)
def test_without_a_table_fusion_gives_back_the_short_prompt_for_any_attention(settings: dict[str, Any]) -> None:
    """Invariant 7: C = 0 by either factor."""
    for zero in "ab":
        method = made(tiny.backbone("t5"), moved=True, use_spaces=False, **settings)
        with torch.no_grad():
            getattr(method, zero).zero_()
        assert torch.equal(method.fold().as_rows(), method.rows)


def padded(batch: Batch, left: int = 0, right: int = 0) -> Batch:
    moved = {name: pad(getattr(batch, name), (left, right)) for name in ("input_ids", "attention_mask")}
    segments = None if batch.segment_ids is None else pad(batch.segment_ids, (left, right))
    return replace(batch, **moved, segment_ids=segments, slots={name: at + left for name, at in batch.slots.items()})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("align", ["token", "slot"])
def test_padding_changes_nothing_on_the_right_and_on_the_left_only_by_columns(kind: str, align: str) -> None:
    """Invariant 8."""
    backbone = tiny.backbone(kind)
    prompt, batch = made(backbone, moved=True, offset_align=align).fold(), batch_of(backbone)
    plain = scores(backbone, prompt, batch)
    torch.testing.assert_close(scores(backbone, prompt, padded(batch, right=6)), plain, rtol=1e-5, atol=1e-4)
    change = float((scores(backbone, prompt, padded(batch, left=2)) - plain).abs().max())
    assert change < 1e-4 if align == "token" else change > 1e-3


@pytest.mark.parametrize("kind", [*KINDS, "minilm"])
def test_the_prompt_does_not_depend_on_the_batch(kind: str) -> None:
    """Invariant 9: neither on its content nor on its size."""
    backbone = tiny.backbone(kind)
    method, batch = made(backbone, moved=True), batch_of(backbone)
    assert method.needs == frozenset()
    views = [View(), view_of(backbone, batch), view_of(backbone, batch.rows(torch.tensor([1])))]
    prompts = [method.prompt(view) for view in views]
    assert prompts[0].rows.shape == (1, 3, D)
    for prompt in prompts[1:]:
        assert torch.equal(prompt.rows, prompts[0].rows)
        assert torch.equal(prompt.offset.table(), prompts[0].offset.table())
    whole = scores(backbone, method.fold(), batch)
    alone = torch.cat([scores(backbone, method.fold(), batch.rows(torch.tensor([i]))) for i in range(len(batch))])
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_static_export_on_the_bare_model_gives_the_live_scores(kind: str) -> None:
    """Invariant 10: [P* ; E + C] as `inputs_embeds` of a model that this library has never touched."""
    backbone = tiny.backbone(kind)
    method, batch, model = made(backbone, moved=True), batch_of(backbone), tiny.model(kind)
    folded = method.fold()
    rows, table = folded.rows[0], folded.offset.table()
    assert (rows.shape, table.shape) == ((3, D), (20, D))
    words, expected = [backbone.answer_ids(word)[0] for word in ("good", "bad", "maybe")], []
    for i in range(len(batch)):
        ids = batch.input_ids[i][batch.attention_mask[i].bool()]
        x = torch.cat([rows, model.get_input_embeddings().weight[ids] + table[: len(ids)]])[None]
        more = {"decoder_input_ids": torch.tensor([[0]])} if kind == "t5" else {}
        at = 0 if kind == "t5" else 3 + int(batch.slots["mask"][i])
        expected.append(model(inputs_embeds=x, **more).logits[0, at, words])
    torch.testing.assert_close(scores(backbone, method.prompt(View())), torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_export_as_rows_alone_is_refused_unless_the_table_is_zero() -> None:
    """Invariant 10."""
    backbone = tiny.backbone("t5")
    method = made(backbone, moved=True)
    with pytest.raises(NotFoldable, match="no prefix can reproduce"):
        method.fold().as_rows()
    with torch.no_grad():
        method.a.zero_()
    plain = method.fold().as_rows()
    torch.testing.assert_close(scores(backbone, Prompt(rows=plain[None])), scores(backbone, method.prompt(View())))
    without = made(backbone, moved=True, use_lowrank=False)
    assert without.fold().sites == {"input"}
    assert without.fold().as_rows().shape == (3, D)


def test_only_a_prompt_that_ignores_the_text_is_folded() -> None:
    """Invariant 10: with the gate on the text there is no static prompt."""
    backbone = tiny.backbone("t5")
    method, batch = made(backbone, moved=True, gate_input="text"), batch_of(backbone)
    with pytest.raises(NotFoldable, match="gate_input"):
        method.fold()
    rows = method.prompt(view_of(backbone, batch)).rows
    assert rows.shape == (4, 3, D)
    assert len(rows.detach().unique(dim=0)) == 4
    one = batch.rows(torch.tensor([2]))
    torch.testing.assert_close(method.prompt(view_of(backbone, one)).rows, rows[2:3])
    assert made(backbone, gate_input="text", use_spaces=False).fold().rows is not None


def tuned_with(method: Method, backbone: Backbone) -> Tuned:
    labels = {"positive": "good", "negative": "bad", "neutral": "maybe"}
    task = Classify(ClassifyConfig(template="{text} it was {mask}", labels=labels))
    return Tuned(backbone, task, method, max_length=40)


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_prompt_has_the_numbers_and_the_cost_of_dept(kind: str, tmp_path: Path) -> None:
    """Invariant 11: s d + r (m + d) numbers on disk, and the same floating-point operations."""
    backbone = tiny.backbone(kind)
    ept = made(backbone, moved=True, fusion_dim=6)
    dept = like(ept, DePT, DePTConfig(num_virtual_tokens=3, rank=2, max_tokens=20), backbone)
    operations = []
    for name, method in (("ept", ept), ("dept", dept)):
        tuned = tuned_with(method, backbone)
        save_prompt(tuned, tmp_path / name)
        batch = tuned.batch(tuned.rows([{"text": text} for text in TEXTS], labelled=False))
        with torch.no_grad():
            tuned.scores(batch)  # the first pass also asks what the model can do
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            tuned.scores(batch)
        operations.append(counter.get_total_flops())
    assert operations[0] == operations[1] > 0
    numbers = sum(part.size for part in load_file(tmp_path / "ept" / "folded.safetensors").values())
    assert numbers == 3 * D + 2 * (20 + D) < EPT.count(ept.config, backbone.shape)


@pytest.mark.parametrize("settings", [{}, {"gate_input": "text", "fusion_dim": 4, "reconstruct": "concat"}], ids=str)
def test_a_saved_prompt_gives_the_same_scores_and_refuses_another_width(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """Invariant 12."""
    backbone = tiny.backbone("t5")
    tuned = tuned_with(made(backbone, moved=True, **settings), backbone)
    save_prompt(tuned, tmp_path / "prompt")
    again = load_prompt(tmp_path / "prompt", tiny.backbone("t5"))
    batch = tuned.batch(tuned.rows([{"text": text} for text in TEXTS], labelled=False))
    assert torch.equal(tuned.scores(batch), again.scores(batch))
    sizes = {**backbone.model.config.to_dict(), "d_model": 16}
    narrow = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    with pytest.raises(FingerprintError, match="does not fit"):
        load_prompt(tmp_path / "prompt", type(backbone)(narrow, tiny.tokenizer(specials="end"), backbone.config))


def train_on(task: str, method: Method, backbone: Backbone, steps: int = 50) -> float:
    """Mean of the last losses on 32 texts of eight colours; the label is the fourth colour, or chance."""
    red, blue = (backbone.answer_ids(word)[0] for word in ("red", "blue"))
    coin = torch.rand(32, 8, generator=torch.Generator().manual_seed(100)) < 0.5
    label = coin[:, 3].long()
    if task == "chance":
        coin, label = coin[:1].expand(32, -1), (torch.arange(32) % 4 == 0).long()
    ids = pad(torch.where(coin, blue, red), (0, 1), value=2)
    batch = Batch(ids, torch.ones_like(ids), torch.arange(32), slots={"mask": torch.full((32,), 8)}, target=label)
    words = pad_candidates([backbone.answer_ids(word) for word in ("good", "bad")])
    method.initialise(Starting(backbone.vocabulary, torch.Generator().manual_seed(0)))
    groups = [{"params": [g.parameter], "lr": g.learning_rate} for g in method.trained()]
    optimizer, losses = torch.optim.Adam(groups), []
    for _ in range(steps):
        optimizer.zero_grad()
        value = cross_entropy(backbone.score(batch, method.prompt(View()), words), label)
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    return sum(losses[-5:]) / 5


@pytest.mark.parametrize("task", ["position", "chance"])
def test_it_learns_what_depends_on_a_position_and_equals_prompt_tuning_where_nothing_can_help(task: str) -> None:
    """Invariant 13: at equal steps, against prompt tuning of the same budget and of the same length."""
    backbone = tiny.backbone("t5")
    config = EPTConfig(**{**SMALL, "num_virtual_tokens": 4, "rank": 4, "max_tokens": 12, "low_rank_lr": 0.02})
    found = train_on(task, EPT(config, backbone.shape), backbone)
    equal = round(EPT.count(config, backbone.shape) / D)
    for length in (4, equal):
        other = train_on(task, PromptTuning(PromptTuningConfig(num_virtual_tokens=length), backbone.shape), backbone)
        if task == "position":
            assert found < 0.3 * other, (found, other)
        else:
            least = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
            assert found == pytest.approx(least, abs=0.01)
            assert other == pytest.approx(least, abs=0.01)
