"""EPT's switches: every one against a derivation by loops, its start, its count and its learning rates.

Knows no other method.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy

import tiny
from promptuary.backbones.base import Backbone, BackboneConfig
from promptuary.building import open_backbone
from promptuary.data.collate import Row, collate, pad_candidates
from promptuary.errors import ConfigError
from promptuary.methods.base import Method
from promptuary.methods.ept import EPT, EPTConfig
from promptuary.prompts.init import Starting
from promptuary.types import Batch, Piece, Prompt, Shape, View

TEXTS = ("a red apple was good", "blue sky", "never cold but always very hot", "six birds eat one plum")
ASKS = (Piece("fixed", " it was "), Piece("slot", "mask"))
KINDS = ("t5", "llama", "bert")
D = tiny.WIDTH
SMALL: Mapping[str, Any] = {
    "num_virtual_tokens": 3, "reference_length": 9, "rank": 2, "max_tokens": 20, "spaces": 3, "space_dim": 2,
}  # fmt: skip
OFF = {"use_fusion": False, "use_spaces": False}

SWITCHES: dict[str, dict[str, Any]] = {
    "1 svd_pad": {"lowrank_init": "svd_pad"},
    "1 dept": {"lowrank_init": "dept"},
    "2 gamma one": {"lowrank_scale": "one"},
    "3 rows of B": {"fusion_kv": "B"},
    "4 difference": {"fusion_residual": "difference"},
    "4 lambda": {"fusion_lambda": True},
    "5 maps": {"fusion_dim": 5},
    "6 linear": {"space_type": "linear"},
    "6 scale": {"space_type": "scale"},
    "6 relu": {"activation": "relu"},
    "7 text gate": {"gate_input": "text"},
    "7 token gate": {"gate_granularity": "token"},
    "8 top one": {"gate_top_k": 1},
    "9 parallel": {"topology": "parallel"},
    "9 residual": {"reconstruct": "residual"},
    "9 concat": {"reconstruct": "concat"},
    "10 detach": {"fusion_detach": True},
    "no fusion": {"use_fusion": False},
    "no spaces": {"use_spaces": False},
    "no low-rank pair": {"use_lowrank": False},
    "several": {"fusion_dim": 4, "fusion_kv": "B", "topology": "parallel", "gate_top_k": 2, "fusion_lambda": True},
}


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


# ---- the derivation -------------------------------------------------------------------------------------------------


def normed(x: np.ndarray) -> np.ndarray:
    return (x - x.mean()) / math.sqrt(x.var() + 1e-5)


def soft(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def derive(method: EPT, text: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """P* and C of section 1.2 by loops, in double precision, for every switch; `text`: mean text embedding."""
    c = method.settings
    t = {name: value.detach().double().numpy() for name, value in method.named_parameters()}
    p, d = t["rows"], D
    table, fused = None, p
    if c.use_lowrank:
        gamma = 1 if c.lowrank_scale == "one" else c.alpha / math.sqrt(c.rank)
        rank, places = range(c.rank), itertools.product(range(c.max_tokens), range(d))
        product = [sum(t["a"][i, r] * t["b"][r, j] for r in rank) for i, j in places]
        table = gamma * np.array(product).reshape(c.max_tokens, d)
        if c.use_fusion:
            source = {"AB": table / gamma, "B": t["b"]}[c.fusion_kv]
            wq, wk = (t[f"w_{x}"] if c.fusion_dim else np.eye(d) for x in "qk")
            fused = np.empty_like(p)
            for row in range(len(p)):
                query = normed(p[row]) @ wq / math.sqrt(wq.shape[1])
                weight = soft(np.array([query @ (normed(k) @ wk) for k in source]))
                delta = sum(w * gamma * value for w, value in zip(weight, source, strict=True))
                added = delta - p[row] if c.fusion_residual == "difference" else delta
                fused[row] = p[row] + (t["fusion_factor"][0] if "fusion_factor" in t else 1) * added
    mixed = fused.copy()
    if c.use_spaces:
        for row in range(len(p)):
            read = {"prompt": fused.mean(0), "token": fused[row]}[c.gate_granularity] if text is None else text
            logits = normed(read) @ t["w_g"] + t["b_g"]
            kept = np.argsort(logits)[-(c.gate_top_k or c.spaces) :]
            gate = dict(zip(kept, soft(logits[kept]), strict=True))
            x = fused[row] if c.topology == "serial" else p[row]
            z = 0
            for i, g in gate.items():
                if c.space_type == "bottleneck":
                    inner = x @ t["down"][i]
                    inner = inner / (1 + np.exp(-inner)) if c.activation == "silu" else np.maximum(inner, 0)
                    z = z + g * (x + inner @ t["up"][i])
                else:
                    z = z + g * (x + (x @ t["up"][i] if c.space_type == "linear" else x * t["up"][i]))
            mixed[row] = z if c.topology == "serial" else fused[row] + (z - x)
    if c.reconstruct == "residual":
        mixed = mixed + p
    if c.reconstruct == "concat":
        mixed = np.concatenate([p, mixed])
    return mixed, table


@pytest.mark.parametrize("switch", [{}, *SWITCHES.values()], ids=["default", *SWITCHES])
def test_the_prompt_is_the_derivation_by_loops(switch: dict[str, Any]) -> None:
    backbone = tiny.backbone("t5")
    method, batch = made(backbone, moved=True, **switch), batch_of(backbone)
    prompt = method.prompt(view_of(backbone, batch))
    assert prompt.rows is not None
    for i, rows in enumerate(prompt.rows.detach()):
        text = None
        if method.needs:
            text = tiny.model("t5").get_input_embeddings().weight[batch.input_ids[i][batch.attention_mask[i].bool()]]
            text = text.detach().double().numpy().mean(0)
        expected, table = derive(method, text)
        np.testing.assert_allclose(rows.numpy(), expected, rtol=1e-3, atol=1e-3)
    if table is None:
        assert prompt.offset is None
    else:
        np.testing.assert_allclose(prompt.offset.table().detach().numpy(), table, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
def test_every_switch_changes_the_result_has_its_count_and_trains(switch: dict[str, Any], kind: str) -> None:
    backbone = tiny.backbone(kind)
    default, batch = made(backbone, moved=True), batch_of(backbone)
    method = made(backbone, moved="lowrank_init" not in switch, **switch)
    total = sum(value.numel() for value in method.parameters())
    assert EPT.count(method.config, backbone.shape) == total
    prompts = [m.prompt(view_of(backbone, batch)) for m in (method, default)]
    assert bool(scores(backbone, prompts[0], batch).isfinite().all())
    parts = [[x.rows.mean(0), *([x.offset.table()] if x.offset else [])] for x in prompts]
    one, two = (torch.cat(part).detach() for part in parts)
    if "fusion_detach" not in switch:  # a difference of gradients, which has its own test
        assert one.shape != two.shape or float((one - two).abs().max()) > 1e-2
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        loss(backbone, method).backward()
        optimizer.step()
    largest = {name: 0.0 if p.grad is None else float(p.grad.abs().max()) for name, p in method.named_parameters()}
    dead = {name for name, value in largest.items() if not value > 0}
    assert dead == ({"w_g", "b_g"} if switch.get("gate_top_k") == 1 else set()), "one gate of weight 1 has no gradient"
    assert all(value.grad is None for value in backbone.model.parameters())


# ---- the start ------------------------------------------------------------------------------------------------------


def start_of(backbone: Backbone, length: int) -> np.ndarray:
    """P0 by hand: sampled rows of the table, in the order that the generator gives."""
    order = torch.randperm(len(tiny.WORDS), generator=torch.Generator().manual_seed(0))[:length] + len(tiny.SPECIAL)
    return tiny.model("t5").get_input_embeddings().weight[order].detach().double().numpy()


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("init", ["svd", "svd_pad"])
def test_the_low_rank_pair_starts_from_the_rest_of_the_decomposed_prompt(rank: int, init: str) -> None:
    backbone = tiny.backbone("t5")
    method, start = made(backbone, rank=rank, lowrank_init=init), start_of(backbone, 9)
    np.testing.assert_array_equal(method.rows.detach().double().numpy(), start[:3])
    u, sigma, vt = np.linalg.svd(start[3:])
    b = method.b.detach().double().numpy()
    np.testing.assert_allclose(b.T @ b, (vt[:rank].T * sigma[:rank]) @ vt[:rank], atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(b, axis=1), np.sqrt(sigma[:rank]), rtol=1e-4)
    product = method.a.detach().double().numpy() @ b
    literal = np.zeros_like(product)
    if init == "svd_pad":
        literal[:6] = (u[:, :rank] * sigma[:rank]) @ vt[:rank]
    np.testing.assert_allclose(product, literal, atol=1e-3)


def test_a_table_shorter_than_the_rest_takes_the_head_of_the_padded_factor() -> None:
    long, short = (made(tiny.backbone("t5"), lowrank_init="svd_pad", max_tokens=size) for size in (20, 4))
    assert torch.equal(short.a, long.a[:4])
    assert torch.equal(short.b, long.b)


def test_the_released_start_is_uniform_and_zero() -> None:
    method = made(tiny.backbone("t5"), lowrank_init="dept", rank=9, max_tokens=400)
    assert 0.99 / 3 < float(method.a.detach().abs().max()) <= 1 / 3
    assert float(method.b.detach().abs().max()) == 0


@pytest.mark.parametrize("settings", [
    {"init": "text", "init_text": "red sky", "rank": 5},
    {"init": "text", "init_text": "red", "rank": 5},
    {"rank": D + 4},
    {"reference_length": 1},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("init", ["svd", "svd_pad"])
def test_every_component_can_train_from_any_start(settings: dict[str, Any], init: str) -> None:
    """A start that spans fewer than r directions leaves no component with A = 0 and B = 0."""
    backbone = tiny.backbone("t5")
    method = made(backbone, lowrank_init=init, **settings)
    norms = method.b.detach().norm(dim=1)
    assert float(norms.min()) > 0.2 * float(norms.max())
    loss(backbone, method).backward()
    assert bool((method.a.grad.abs().amax(0) > 1e-6).all())


def test_what_projects_gates_or_mixes_starts_as_no_change() -> None:
    method = made(tiny.backbone("t5"), fusion_dim=4, fusion_lambda=True)
    assert all(float(getattr(method, name).detach().abs().max()) == 0 for name in ("up", "w_g", "b_g", "fusion_factor"))
    bound = {"down": 1 / math.sqrt(D), "w_q": math.sqrt(6 / (D + 4)), "w_k": math.sqrt(6 / (D + 4))}
    for name, most in bound.items():
        assert 0.9 * most < float(getattr(method, name).detach().abs().max()) <= most
    assert not torch.equal(method.w_q, method.w_k)
    assert len(method.down.detach().unique(dim=0)) == 3, "spaces differ"


# ---- training -------------------------------------------------------------------------------------------------------


def test_a_detached_fusion_trains_the_pair_through_the_text_alone() -> None:
    """Open question 10: the value is the same; A and B get the gradient of the offset path and no other."""
    backbone = tiny.backbone("t5")
    live, cut = made(backbone, moved=True), made(backbone, moved=True, fusion_detach=True)
    for method in (live, cut):
        loss(backbone, method).backward()
    assert torch.equal(live.fold().rows, cut.fold().rows)
    fixed = live.fold()
    a, b = (value.detach().clone().requires_grad_() for value in (live.a, live.b))
    prompt = replace(fixed, offset=replace(fixed.offset, left=8 / math.sqrt(2) * a, right=b))
    cross_entropy(scores(backbone, prompt), batch_of(backbone).target).backward()
    for name, alone in (("a", a), ("b", b)):
        torch.testing.assert_close(getattr(cut, name).grad, alone.grad, rtol=1e-3, atol=1e-5)
        assert float((getattr(live, name).grad - alone.grad).abs().max()) > 1e-3


def test_on_a_four_bit_backbone_it_learns_and_the_weights_keep_their_bytes(tmp_path: Path) -> None:
    """The four-bit part of invariant 6 (test_ept.py has the others)."""
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=tiny.SIZE, **sizes)).save_pretrained(tmp_path)
    tiny.tokenizer(specials="start").save_pretrained(tmp_path)
    backbone = open_backbone(BackboneConfig(model=str(tmp_path), device="cpu", quantization="4bit"))
    assert any(value.dtype == torch.uint8 for value in backbone.model.parameters()), "packed weights"
    before = {name: value.detach().clone() for name, value in backbone.model.named_parameters()}
    method = made(backbone)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        loss(backbone, method).backward()
        optimizer.step()
    assert all(float(value.grad.abs().max()) > 0 for value in method.parameters())
    for name, value in backbone.model.named_parameters():
        assert value.grad is None, name
        assert torch.equal(value, before[name]), name


def test_groups_have_their_own_rates_and_modules_do_not_decay() -> None:
    settings = {"prompt_lr": 0.05, "low_rank_lr": 5e-3, "modules_lr": 2e-3, "weight_decay": 0.01}
    method = made(tiny.backbone("t5"), fusion_dim=4, fusion_lambda=True, **settings)
    groups = {group.name: group for group in method.trained()}
    modules = {"w_q", "w_k", "fusion_factor", "down", "up", "w_g", "b_g"}
    assert groups.keys() == {"rows", "a", "b"} | modules
    scale = float(method.rows.detach().pow(2).mean().sqrt())
    assert groups["rows"].learning_rate == pytest.approx(0.05 * scale)
    assert {groups[name].learning_rate for name in "ab"} == {5e-3}
    assert {groups[name].learning_rate for name in modules} == {2e-3}
    assert {groups[name].weight_decay for name in ("rows", "a", "b")} == {0.01}
    assert {groups[name].weight_decay for name in modules} == {0.0}
    absolute = made(tiny.backbone("t5"), lr_unit="absolute", prompt_lr=0.3).trained()
    assert {group.name: group.learning_rate for group in absolute}["rows"] == 0.3


@pytest.mark.parametrize(
    "settings", [{"gate_input": "text", "gate_granularity": "token"}, {"spaces": 2, "gate_top_k": 4}]
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="gate_"):
        EPTConfig.read(settings, where="method")


@pytest.mark.parametrize("switch", [{}, *SWITCHES.values()], ids=["default", *SWITCHES])
@pytest.mark.parametrize(("length", "width"), [(24, 32), (40, 64), (100, 768)])
def test_a_matched_size_is_within_one_rank_of_the_budget(switch: dict[str, Any], length: int, width: int) -> None:
    settings = {**SMALL, "num_virtual_tokens": 1, "spaces": 2, "fusion_dim": 0, **switch}
    if settings.get("space_type") == "linear":
        settings["use_spaces"] = False  # two d x d maps are above every budget here
    field = "num_virtual_tokens" if settings.get("use_lowrank") is False else "rank"
    config = EPT.match_budget(EPTConfig(**settings), length, Shape(width))
    count = EPT.count(config, Shape(width))
    assert count == sum(value.numel() for value in EPT(config, Shape(width)).parameters()) <= length * width
    assert EPT.count(config.model_copy(update={field: getattr(config, field) + 1}), Shape(width)) > length * width


def test_what_it_shows_a_person_is_what_it_computes() -> None:
    method = made(tiny.backbone("t5"), moved=True, use_spaces=False)
    seen = method.insight()["fusion attention"]
    assert seen.shape == (3, 20)
    expected = method.rows.detach() + seen @ method.fold().offset.table()
    torch.testing.assert_close(method.fold().rows[0], expected, rtol=1e-4, atol=1e-4)
