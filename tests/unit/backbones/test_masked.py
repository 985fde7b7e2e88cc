"""Masked models: the answer is read at the mask, answers of several tokens at several masks.

Knows no method or task.
"""

from __future__ import annotations

from dataclasses import replace

import handmade as by_hand
import pytest
import torch

import tiny
from promptuary.backbones.masked import Masked
from promptuary.errors import DataError, SiteError
from promptuary.types import ANSWER, Batch, Candidates, Piece, Prompt

every = pytest.mark.parametrize("kind", by_hand.MASKED)
both_prompts = pytest.mark.parametrize("parts", list(by_hand.PROMPTS))
MASK = 3


def filled(text: str) -> list[Piece]:
    """TEXT it was {mask} . : the answer in the middle."""
    return [*by_hand.pieces(text), Piece("fixed", " now ."), Piece("slot", "sep"), Piece("fixed", "a cat")]


@every
@both_prompts
def test_words_equal_the_full_logits_at_the_mask_in_value_and_gradient(kind: str, parts: str) -> None:
    backbone, raw = tiny.backbone(kind), tiny.model(kind)
    given = by_hand.batch(backbone, [filled(text) for text in by_hand.TEXTS])
    answers = by_hand.candidates(backbone)
    ours, theirs = by_hand.PROMPTS[parts](), by_hand.PROMPTS[parts]()
    scores = backbone.score(given, ours, answers)
    plain = []
    for row in range(3):
        ids = by_hand.tokens(given, row)
        full = raw(inputs_embeds=by_hand.prompted(raw, ids, theirs)).logits[0]
        plain.append(full[theirs.length + ids.index(MASK), answers.ids[:, 0]])
    torch.testing.assert_close(scores, torch.stack(plain), **by_hand.CLOSE)
    target = torch.tensor([0, 2, 1])
    for found in (scores, torch.stack(plain)):
        torch.nn.functional.cross_entropy(found, target).backward()
    mine, reference = (prompt.rows if prompt.rows is not None else prompt.offset.left for prompt in (ours, theirs))
    torch.testing.assert_close(mine.grad, reference.grad, **by_hand.CLOSE)


@every
@both_prompts
def test_phrases_equal_a_plain_loop_with_as_many_masks(kind: str, parts: str) -> None:
    backbone, raw = tiny.backbone(kind), tiny.model(kind)
    given, prompt = by_hand.batch(backbone, [filled(text) for text in by_hand.TEXTS]), by_hand.PROMPTS[parts]()
    answers = by_hand.candidates(backbone, "good", "not bad", "a very big red apple")
    scores = backbone.score(given, prompt, answers)
    for row in range(3):
        ids = by_hand.tokens(given, row)
        at = ids.index(MASK)
        for column, (words, mask) in enumerate(zip(answers.ids, answers.mask, strict=True)):
            phrase = words[mask]
            grown = [*ids[:at], *[MASK] * len(phrase), *ids[at + 1 :]]
            full = raw(inputs_embeds=by_hand.prompted(raw, grown, prompt)).logits[0, prompt.length + at :]
            taken = torch.log_softmax(full[: len(phrase)], dim=-1)
            expected = taken[torch.arange(len(phrase)), phrase].mean()
            torch.testing.assert_close(scores[row, column], expected, **by_hand.CLOSE)
    torch.testing.assert_close(backbone.score(by_hand.left(given), prompt, answers), scores, **by_hand.CLOSE)


@every
def test_named_slots_keep_their_places_when_masks_are_added(kind: str) -> None:
    backbone, raw = tiny.backbone(kind), tiny.model(kind)
    parts = [Piece("slot", "prompt_a"), Piece("slot", ANSWER), Piece("slot", "prompt_b"), Piece("field", "red cat")]
    given = by_hand.batch(backbone, [parts, [*parts[:3], Piece("field", "a big old blue cat")]])
    vectors = by_hand.rows(3)
    prompt = Prompt(vectors, placement=(("prompt_a", 1), ("prompt_b", 2)))
    phrases = by_hand.candidates(backbone, "good", "not bad")
    scores = backbone.score(given, prompt, phrases)
    for row in range(2):
        ids = by_hand.tokens(given, row)
        sequence = [ids[0], vectors[0, 0], MASK, MASK, vectors[0, 1], vectors[0, 2], *ids[2:]]
        taken = torch.log_softmax(raw(inputs_embeds=by_hand.embed(raw, sequence)).logits[0, 2:4], dim=-1)
        expected = taken[torch.arange(2), phrases.ids[1]].mean()
        torch.testing.assert_close(scores[row, 1], expected, **by_hand.CLOSE)


@every
def test_each_row_with_its_own_answers(kind: str) -> None:
    backbone = tiny.backbone(kind)
    given, prompt = by_hand.texts(backbone), Prompt(by_hand.rows(3), by_hand.offset())
    ids = torch.tensor([[[7, 8], [9, 0]], [[10, 0], [0, 0]], [[0, 0], [0, 0]]])
    mask = torch.tensor([[[1, 1], [1, 0]], [[1, 0], [0, 0]], [[0, 0], [0, 0]]]).bool()
    scores = backbone.score(given, prompt, Candidates(ids, mask))
    shared = Candidates(torch.tensor([[7, 8], [9, 0], [10, 0]]), torch.tensor([[1, 1], [1, 0], [1, 0]]).bool())
    expected = backbone.score(given, prompt, shared)
    torch.testing.assert_close(scores[0], expected[0, :2], **by_hand.CLOSE)
    torch.testing.assert_close(scores[1, 0], expected[1, 2], **by_hand.CLOSE)
    assert scores.isinf().tolist() == [[False, False], [False, True], [True, True]]
    one_token = Candidates(torch.tensor([[[7], [9]], [[8], [4]], [[9], [8]]]), torch.ones(3, 2, 1).bool())
    words = Candidates(torch.tensor([[4], [7], [8], [9]]), torch.ones(4, 1).bool())
    full = backbone.score(given, prompt, words)
    own = torch.stack([full[0, [1, 3]], full[1, [2, 0]], full[2, [3, 2]]])
    torch.testing.assert_close(backbone.score(given, prompt, one_token), own, **by_hand.CLOSE)


@every
def test_the_loss_of_the_model_itself_at_the_mask(kind: str) -> None:
    backbone, raw = tiny.backbone(kind), tiny.model(kind)
    given = by_hand.batch(backbone, [filled(text) for text in by_hand.TEXTS])
    every_word = Candidates(torch.arange(tiny.SIZE)[:, None], torch.ones(tiny.SIZE, 1, dtype=torch.bool))
    target = torch.tensor([7, 8, 9])
    ours = torch.nn.functional.cross_entropy(backbone.score(given, Prompt(), every_word), target)
    labels = torch.full_like(given.input_ids, -100)
    labels[torch.arange(3), given.slots[ANSWER]] = target
    segments = {} if given.segment_ids is None else {"token_type_ids": given.segment_ids}
    theirs = raw(given.input_ids, attention_mask=given.attention_mask, labels=labels, **segments).loss
    torch.testing.assert_close(ours, theirs, **by_hand.CLOSE)


@every
def test_segments_reach_the_text_and_prompts_belong_to_the_first(kind: str) -> None:
    backbone, raw = tiny.backbone(kind), tiny.model(kind)
    given = by_hand.batch(backbone, [filled(text) for text in by_hand.TEXTS])
    after = (given.input_ids == 2).long().cumsum(1) - (given.input_ids == 2).long() > 0
    with_segments = replace(given, segment_ids=(after & given.attention_mask.bool()).long())
    prompt = Prompt(by_hand.rows(3))
    if kind == "modernbert" or kind == "deberta":  # these have no segments
        return
    found = backbone.hidden(with_segments, prompt)
    for row in range(3):
        ids = by_hand.tokens(given, row)
        kinds = torch.tensor([[0, 0, 0, *with_segments.segment_ids[row, : len(ids)].tolist()]])
        expected = raw.base_model(inputs_embeds=by_hand.prompted(raw, ids, prompt), token_type_ids=kinds)
        torch.testing.assert_close(found[row, : len(ids)], expected.last_hidden_state[0, 3:], **by_hand.CLOSE)
    torch.testing.assert_close(
        backbone.pooled(by_hand.left(with_segments), prompt), backbone.pooled(with_segments, prompt), **by_hand.CLOSE
    )


@every
def test_a_bfloat16_model_trains_a_float32_prompt(kind: str) -> None:
    backbone = tiny.backbone(kind, dtype="bfloat16")
    given, prompt = by_hand.texts(backbone), Prompt(by_hand.rows(3), by_hand.offset())
    scores = backbone.score(given, prompt, by_hand.candidates(backbone))
    assert bool(scores.isfinite().all())
    torch.nn.functional.cross_entropy(scores, torch.tensor([0, 1, 2])).backward()
    for leaf in (prompt.rows, prompt.offset.left, prompt.offset.right):
        assert leaf.grad.dtype == torch.float32
        assert bool(leaf.grad.isfinite().all())
        assert float(leaf.grad.abs().max()) > 0


def test_without_a_mask_in_the_text_there_is_nothing_to_read() -> None:
    backbone = tiny.backbone("bert")
    ids = torch.tensor([[1, 6, 7, 2]])
    with pytest.raises(DataError, match=r'put "\{mask\}" into task\.template'):
        backbone.score(Batch(ids, torch.ones_like(ids), torch.tensor([0])), Prompt(), by_hand.candidates(backbone))


def test_a_tokenizer_without_a_mask_token_is_refused_untouched() -> None:
    raw, base = tiny.model("bert"), tiny.backbone("bert")
    words = tiny.tokenizer()
    words.mask_token = None
    table = raw.get_input_embeddings()
    with pytest.raises(SiteError, match="no mask token"):
        Masked(raw, words, base.config)
    assert raw.get_input_embeddings() is table
    assert all(parameter.requires_grad for parameter in raw.parameters())


def test_a_masked_model_does_not_write() -> None:
    backbone = tiny.backbone("bert")
    with pytest.raises(SiteError, match="does not write text"):
        backbone.generate(by_hand.texts(backbone), Prompt(), max_new_tokens=2)
    with pytest.raises(SiteError, match="does not write text"):
        backbone.answer_losses(by_hand.texts(backbone), Prompt()).sum()
