"""Text encoders: pooled vectors against prototypes of the answers.

Knows no method or task.
"""

from __future__ import annotations

import handmade as by_hand
import pytest
import torch

import tiny
from promptuary.errors import SiteError
from promptuary.types import Candidates, Prompt


def unit(raw: torch.nn.Module, embedded: torch.Tensor, skip: int = 0) -> torch.Tensor:
    """Mean of the states of the text, of length 1."""
    states = raw(inputs_embeds=embedded).last_hidden_state[0, skip:]
    return torch.nn.functional.normalize(states.mean(0), dim=0)


@pytest.mark.parametrize("parts", ["none", *by_hand.PROMPTS])
def test_scores_are_cosines_to_the_answers_as_texts_over_the_temperature(parts: str) -> None:
    backbone, raw = tiny.backbone("minilm", temperature=0.1), tiny.model("minilm")
    prompt = Prompt() if parts == "none" else by_hand.PROMPTS[parts]()
    given, answers = by_hand.texts(backbone), by_hand.candidates(backbone, "good", "not bad", "a red cat")
    prototypes = [
        unit(raw, by_hand.embed(raw, [1, *ids[mask].tolist(), 2]))
        for ids, mask in zip(answers.ids, answers.mask, strict=True)
    ]
    scores = backbone.score(given, prompt, answers)
    for row in range(3):
        vector = unit(raw, by_hand.prompted(raw, by_hand.tokens(given, row), prompt), skip=prompt.length)
        expected = torch.stack([vector @ prototype for prototype in prototypes]) / 0.1
        torch.testing.assert_close(scores[row], expected, atol=1e-4, rtol=1e-4)


def test_prototypes_never_see_the_prompt_and_carry_no_gradient() -> None:
    backbone, answers = tiny.backbone("minilm"), by_hand.candidates(tiny.backbone("minilm"))
    before = backbone.prototypes(answers).clone()
    prompt = Prompt(by_hand.rows(3), by_hand.offset())
    backbone.score(by_hand.texts(backbone), prompt, answers).sum().backward()
    assert torch.equal(backbone.prototypes(answers), before)
    assert not backbone.prototypes(answers).requires_grad
    assert float(prompt.rows.grad.abs().max()) > 0


def test_answers_with_the_same_ids_and_other_masks_are_other_answers() -> None:
    backbone = tiny.backbone("minilm")
    ids = torch.tensor([[7, 0]])
    short = backbone.prototypes(Candidates(ids, torch.tensor([[True, False]])))
    long = backbone.prototypes(Candidates(ids, torch.tensor([[True, True]])))
    fresh = tiny.backbone("minilm").prototypes(Candidates(ids, torch.tensor([[True, True]])))
    assert not torch.allclose(short, long)
    assert torch.equal(long, fresh)


def test_a_prototype_depends_on_its_answer_alone() -> None:
    """Bit for bit: not on the answers beside it, nor on dropout that is at work when it is first asked for."""
    ids = torch.tensor([[7, 8, 9], [10, 0, 0], [11, 12, 0]])
    mask = ids > 0
    wanted = tiny.backbone("minilm").prototypes(Candidates(ids, mask))
    other = tiny.backbone("minilm", dropout=True)
    with other.dropping():
        alone = [other.prototypes(Candidates(ids[row : row + 1], mask[row : row + 1])) for row in (2, 0, 1)]
        assert other.model.training
    assert torch.equal(torch.cat(alone), wanted[[2, 0, 1]])


def test_each_row_with_its_own_answers() -> None:
    backbone = tiny.backbone("minilm")
    given, prompt = by_hand.texts(backbone), Prompt(by_hand.rows(3))
    ids = torch.tensor([[[7, 8], [9, 0]], [[10, 0], [0, 0]], [[9, 0], [7, 8]]])
    mask = torch.tensor([[[1, 1], [1, 0]], [[1, 0], [0, 0]], [[1, 0], [1, 1]]]).bool()
    scores = backbone.score(given, prompt, Candidates(ids, mask))
    shared = Candidates(torch.tensor([[7, 8], [9, 0], [10, 0]]), torch.tensor([[1, 1], [1, 0], [1, 0]]).bool())
    full = backbone.score(given, prompt, shared)
    absent = torch.tensor(-torch.inf)
    expected = torch.stack([full[0, :2], torch.stack([full[1, 2], absent]), full[2, [1, 0]]])
    torch.testing.assert_close(scores, expected, **by_hand.CLOSE)


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_pooling_reads_text_tokens_only(pooling: str) -> None:
    backbone, raw = tiny.backbone("minilm", pooling=pooling), tiny.model("minilm")
    given, prompt = by_hand.texts(backbone), Prompt(by_hand.rows(3), by_hand.offset())
    for row in range(3):
        own = by_hand.states(raw, "minilm", by_hand.prompted(raw, by_hand.tokens(given, row), prompt))[0, 3:]
        expected = {"mean": own.mean(0), "first": own[0], "last": own[-1]}[pooling]
        for batch in (given, by_hand.left(given)):
            torch.testing.assert_close(backbone.pooled(batch, prompt)[row], expected, **by_hand.CLOSE)


def test_an_encoder_does_not_write() -> None:
    backbone = tiny.backbone("minilm")
    with pytest.raises(SiteError, match="does not write text"):
        backbone.generate(by_hand.texts(backbone), Prompt(), max_new_tokens=2)


def test_a_bfloat16_model_trains_a_float32_prompt() -> None:
    backbone = tiny.backbone("minilm", dtype="bfloat16")
    prompt = Prompt(by_hand.rows(3), by_hand.offset())
    scores = backbone.score(by_hand.texts(backbone), prompt, by_hand.candidates(backbone))
    torch.nn.functional.cross_entropy(scores, torch.tensor([0, 1, 2])).backward()
    assert bool(scores.isfinite().all())
    for leaf in (prompt.rows, prompt.offset.left, prompt.offset.right):
        assert leaf.grad.dtype == torch.float32
        assert bool(leaf.grad.isfinite().all())
        assert float(leaf.grad.abs().max()) > 0
