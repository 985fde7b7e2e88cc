"""Quantised backbones through bitsandbytes' CPU backend: a float32 prompt is trained and used on top.

Knows no method or task.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import handmade as by_hand
import pytest
import torch
import transformers

import tiny
from promptuary.backbones.base import Backbone, BackboneConfig
from promptuary.building import open_backbone
from promptuary.types import Offset, Prompt

WIDTH = 64
Bits = Literal["4bit", "8bit"]
both = pytest.mark.parametrize("bits", ["4bit", "8bit"])
dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama of width 64 on disk, in float32."""
    where: Path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = by_hand.llama_config(hidden_size=WIDTH, intermediate_size=2 * WIDTH)
    transformers.LlamaForCausalLM(config).save_pretrained(where)
    tiny.tokenizer(specials="start").save_pretrained(where)
    return str(where)


def opened(folder: str, bits: Bits | None, dtype: str = "float32") -> Backbone:
    """The model, quantised or not."""
    return open_backbone(BackboneConfig(model=folder, device="cpu", quantization=bits, dtype=dtype))


def prompt() -> Prompt:
    """Rows and a table of the width of this model."""
    source = torch.Generator().manual_seed(1)
    parts = [torch.randn(*size, generator=source).requires_grad_() for size in ((1, 3, WIDTH), (32, 2), (2, WIDTH))]
    return Prompt(parts[0], Offset(parts[1], parts[2]))


def quiet(call: Any, *arguments: Any, **options: Any) -> Any:
    """bitsandbytes warns that int8 products are computed in float16."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="MatMul8bitLt")
        return call(*arguments, **options)


@both
@dtypes
def test_a_prompt_is_trained_and_used_on_a_quantised_model(folder: str, bits: Bits, dtype: str) -> None:
    backbone, plain = opened(folder, bits, dtype), opened(folder, None)
    names = {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}
    assert type(backbone.model.model.layers[1].mlp.up_proj).__name__ == names[bits]
    given = replace(by_hand.texts(plain), target_ids=torch.tensor([[7, 2], [8, 2], [9, 2]]))
    ours, exact = prompt(), prompt()
    frozen = {name: value.detach().clone() for name, value in backbone.model.named_parameters()}
    loss, expected = quiet(backbone.answer_losses, given, ours).sum(), plain.answer_losses(given, exact).sum()
    loss.backward()
    expected.backward()
    assert abs(loss.item() - expected.item()) < 0.05 * expected.item()
    pairs = ((ours.rows, exact.rows), (ours.offset.left, exact.offset.left), (ours.offset.right, exact.offset.right))
    for leaf, reference in pairs:
        assert leaf.grad.dtype == torch.float32
        assert bool(leaf.grad.isfinite().all())
        assert float(torch.cosine_similarity(leaf.grad.flatten(), reference.grad.flatten(), dim=0)) > 0.9
    for name, value in backbone.model.named_parameters():
        assert value.grad is None
        assert not value.requires_grad
        assert torch.equal(value, frozen[name]), name


@both
def test_scores_and_writing_on_a_quantised_model(folder: str, bits: Bits) -> None:
    backbone = opened(folder, bits)
    given, made, answers = by_hand.texts(backbone), prompt(), by_hand.candidates(backbone)
    with torch.no_grad():
        scores = quiet(backbone.score, given, made, answers)
        exact = opened(folder, None).score(given, made, answers)
        assert scores.shape == (3, 3)
        assert float((scores - exact).abs().max()) < 0.25 * float(exact.std()) + 0.1
        for row in range(3):
            alone = quiet(backbone.score, by_hand.one(given, row), made, answers)
            torch.testing.assert_close(alone[0], scores[row], atol=5e-3, rtol=0)
    written = quiet(backbone.generate, given, made, max_new_tokens=4)
    assert len(written) == 3
    assert all(token < tiny.SIZE for row in written for token in row)


@both
@dtypes
def test_training_goes_on_after_an_evaluation(folder: str, bits: Bits, dtype: str) -> None:
    """bitsandbytes packs 4-bit weights on some CPUs in the first run without gradients, and then gives none."""
    backbone = opened(folder, bits, dtype)
    given = replace(by_hand.texts(backbone), target_ids=torch.tensor([[7, 2], [8, 2], [9, 2]]))
    before, after = prompt(), prompt()
    quiet(backbone.answer_losses, given, before).sum().backward()
    frozen = {name: value.detach().clone() for name, value in backbone.model.named_parameters()}
    written = quiet(backbone.generate, given, before, max_new_tokens=2)
    with torch.no_grad():
        quiet(backbone.answer_losses, given, before).sum()
    quiet(backbone.answer_losses, given, after).sum().backward()
    assert float(after.rows.grad.abs().max()) > 0
    assert torch.equal(after.rows.grad, before.rows.grad)
    assert torch.equal(after.offset.left.grad, before.offset.left.grad)
    assert all(torch.equal(value, frozen[name]) for name, value in backbone.model.named_parameters())
    assert quiet(backbone.generate, given, before, max_new_tokens=2) == written


def test_a_width_below_one_block_of_four_bits_works(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path, "llama")
    backbone = opened(folder, "4bit")
    made = Prompt(by_hand.rows(3))
    given = replace(by_hand.texts(backbone), target_ids=torch.tensor([[7, 2], [8, 2], [9, 2]]))
    written = backbone.generate(given, made, max_new_tokens=2)
    backbone.answer_losses(given, made).sum().backward()
    assert len(written) == 3
    assert float(made.rows.grad.abs().max()) > 0


@both
def test_a_prompt_fits_its_base_quantised_or_not(folder: str, bits: Bits) -> None:
    plain, quantised = opened(folder, None), opened(folder, bits)
    quantised.check_identity(plain.identity, "the plain model")
    plain.check_identity(quantised.identity, "the quantised model")
    assert "matrices" in plain.identity
    assert "matrices" not in quantised.identity


@both
def test_releasing_gives_the_quantised_model_back(folder: str, bits: Bits) -> None:
    backbone = opened(folder, bits)
    kinds = [type(module) for module in backbone.model.modules() if "Linear" in type(module).__name__]
    raw = backbone.release()
    assert type(raw.lm_head) is torch.nn.Linear
    assert type(raw.get_input_embeddings()) is torch.nn.Embedding
    assert [type(module) for module in raw.modules() if "Linear" in type(module).__name__] == kinds
