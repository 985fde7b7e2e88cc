"""Encoder-decoder models: the prompt is in the encoder only; scores, losses and writing equal the plain model.

Knows no method or task.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import handmade as by_hand
import pytest
import torch

import tiny
from promptuary.backbones.seq2seq import Seq2Seq
from promptuary.errors import SiteError
from promptuary.types import IGNORED, Candidates, Prompt

every = pytest.mark.parametrize("kind", by_hand.SEQ2SEQ)
both_prompts = pytest.mark.parametrize("parts", list(by_hand.PROMPTS))


def greedy(raw: Any, embedded: torch.Tensor, start: list[int], count: int) -> list[int]:
    """A hand-written greedy loop, without a cache, up to the end token."""
    decoder = list(start)
    with torch.no_grad():
        for _ in range(count):
            logits = raw(inputs_embeds=embedded, decoder_input_ids=torch.tensor([decoder])).logits
            token = int(logits[0, -1].argmax())
            if token == 2:
                break
            decoder.append(token)
    return [token for token in decoder[len(start) :] if token not in (0, *start)]


@every
@both_prompts
def test_words_equal_the_full_logits_at_the_first_step_in_value_and_gradient(kind: str, parts: str) -> None:
    backbone, raw = tiny.backbone(kind), tiny.model(kind)
    if kind == "bart":  # a bias behind the head must be picked with the words
        for model in (raw, backbone.model):
            model.final_logits_bias.copy_(torch.arange(tiny.SIZE)[None] / 10)
    given, answers = by_hand.texts(backbone), by_hand.candidates(backbone)
    ours, theirs = by_hand.PROMPTS[parts](), by_hand.PROMPTS[parts]()
    scores = backbone.score(given, ours, answers)
    plain = []
    for row in range(3):
        embedded = by_hand.prompted(raw, by_hand.tokens(given, row), theirs)
        first = by_hand.logits(raw, kind, embedded, [0], by_hand.start_of(backbone))[0]
        plain.append(first[answers.ids[:, 0]])
    torch.testing.assert_close(scores, torch.stack(plain), **by_hand.CLOSE)
    target = torch.tensor([0, 2, 1])
    for found in (scores, torch.stack(plain)):
        torch.nn.functional.cross_entropy(found, target).backward()
    mine, reference = (prompt.rows if prompt.rows is not None else prompt.offset.left for prompt in (ours, theirs))
    torch.testing.assert_close(mine.grad, reference.grad, **by_hand.CLOSE)


@every
@both_prompts
def test_phrases_equal_a_plain_loop(kind: str, parts: str) -> None:
    backbone, raw = tiny.backbone(kind), tiny.model(kind)
    given, prompt = by_hand.texts(backbone), by_hand.PROMPTS[parts]()
    answers = by_hand.candidates(backbone, "good", "not bad", "a very big red apple")
    scores = backbone.score(given, prompt, answers)
    for row in range(3):
        embedded = by_hand.prompted(raw, by_hand.tokens(given, row), prompt)
        for column, (ids, mask) in enumerate(zip(answers.ids, answers.mask, strict=True)):
            phrase = ids[mask].tolist()
            taken = torch.log_softmax(by_hand.logits(raw, kind, embedded, phrase, by_hand.start_of(backbone)), dim=-1)
            expected = taken[torch.arange(len(phrase)), torch.tensor(phrase)].mean()
            torch.testing.assert_close(scores[row, column], expected, **by_hand.CLOSE)


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
    one_token = Candidates(torch.tensor([[[7], [9]], [[8], [0]], [[9], [8]]]), torch.ones(3, 2, 1).bool())
    words = Candidates(torch.tensor([[7], [8], [9], [0]]), torch.ones(4, 1).bool())
    full = backbone.score(given, prompt, words)
    own = torch.stack([full[0, [0, 2]], full[1, [1, 3]], full[2, [2, 1]]])
    torch.testing.assert_close(backbone.score(given, prompt, one_token), own, **by_hand.CLOSE)


@every
@pytest.mark.parametrize("parts", ["none", *by_hand.PROMPTS])
def test_answer_loss_equals_the_models_own_loss_with_labels(kind: str, parts: str) -> None:
    backbone, raw = tiny.backbone(kind), tiny.model(kind)
    ours, theirs = (Prompt() if parts == "none" else by_hand.PROMPTS[parts]() for _ in range(2))
    answers = [[7, 8, 2], [9, 2], [10, 11]]
    target = torch.full((3, 3), IGNORED)
    for row, answer in enumerate(answers):
        target[row, : len(answer)] = torch.tensor(answer)
    given = replace(by_hand.texts(backbone), target_ids=target)
    loss, expected = backbone.answer_losses(given, ours).sum(), torch.tensor(0.0)
    start = by_hand.start_of(backbone)
    for row, answer in enumerate(answers):
        embedded = by_hand.prompted(raw, by_hand.tokens(given, row), theirs)
        # the model's own label shift puts its start token in front; BART's labels begin with <s>, which is not counted
        labels = torch.tensor([[*start[1:], *answer]])
        logits = raw(inputs_embeds=embedded, labels=labels).logits[0]
        own = torch.nn.functional.cross_entropy(logits, labels[0], reduction="none")
        if len(start) == 1:
            torch.testing.assert_close(raw(inputs_embeds=embedded, labels=labels).loss, own.mean(), **by_hand.CLOSE)
        expected = expected + own[len(start) - 1 :].sum()
    torch.testing.assert_close(loss, expected, **by_hand.CLOSE)
    torch.testing.assert_close(backbone.answer_losses(by_hand.left(given), ours).sum(), expected, **by_hand.CLOSE)
    if parts == "none":
        return
    loss.backward()
    expected.backward()
    mine, reference = (prompt.rows if prompt.rows is not None else prompt.offset.left for prompt in (ours, theirs))
    torch.testing.assert_close(mine.grad, reference.grad, atol=1e-4, rtol=1e-3)


@every
@both_prompts
def test_writing_equals_a_greedy_loop_by_hand(kind: str, parts: str) -> None:
    backbone, raw = tiny.backbone(kind), tiny.model(kind)
    given, prompt = by_hand.texts(backbone), by_hand.PROMPTS[parts]()
    start = by_hand.start_of(backbone)
    expected = [greedy(raw, by_hand.prompted(raw, by_hand.tokens(given, row), prompt), start, 12) for row in range(3)]
    assert backbone.generate(given, prompt, max_new_tokens=12) == expected
    assert backbone.generate(by_hand.left(given), prompt, max_new_tokens=12) == expected
    assert backbone.generate(given, prompt, max_new_tokens=12, use_cache=False) == expected
    for row in range(3):
        assert backbone.generate(by_hand.one(given, row), prompt, max_new_tokens=12) == [expected[row]]


@every
def test_beams_and_several_answers_per_text(kind: str) -> None:
    backbone = tiny.backbone(kind)
    given, prompt = by_hand.texts(backbone), Prompt(by_hand.rows(3), by_hand.offset())
    options: dict[str, Any] = {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2}
    together = backbone.generate(given, prompt, **options)
    alone = [backbone.generate(by_hand.one(given, row), prompt, **options) for row in range(3)]
    assert together == [answer for row in alone for answer in row]


@every
@both_prompts
def test_the_first_written_token_is_the_one_that_teacher_forcing_expects(kind: str, parts: str) -> None:
    backbone, prompt = tiny.backbone(kind), by_hand.PROMPTS[parts]()
    given = by_hand.texts(backbone)
    every_word = Candidates(torch.arange(tiny.SIZE)[:, None], torch.ones(tiny.SIZE, 1, dtype=torch.bool))
    best = backbone.score(given, prompt, every_word).argmax(1).tolist()
    written = backbone.generate(given, prompt, max_new_tokens=1)
    unwritten = {0, *by_hand.start_of(backbone), 2}
    assert written == [[token] if token not in unwritten else [] for token in best]


@every
def test_the_decoders_input_is_untouched_by_the_prompt(kind: str) -> None:
    backbone = tiny.backbone(kind)
    assert backbone.narrow, "is tried before anything is noted"
    seen: list[torch.Tensor] = []
    decoder = backbone.model.get_decoder()
    handle = decoder.embed_tokens.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    given = replace(by_hand.texts(backbone), target_ids=torch.tensor([[7, 2], [8, 2], [9, 2]]))
    prompt = Prompt(by_hand.rows(3), by_hand.offset())
    backbone.answer_losses(given, prompt).sum()
    backbone.score(given, prompt, by_hand.candidates(backbone, "good", "not bad"))
    written = backbone.generate(given, prompt, max_new_tokens=4)
    handle.remove()
    assert len(seen) > 4
    assert all(int(ids.max()) < tiny.SIZE for ids in seen)
    assert seen[0].tolist() == [[*by_hand.start_of(backbone), first] for first in (7, 8, 9)]
    assert all(token < tiny.SIZE for row in written for token in row)


@every
def test_a_bfloat16_model_trains_a_float32_prompt(kind: str) -> None:
    backbone = tiny.backbone(kind, dtype="bfloat16")
    prompt = Prompt(by_hand.rows(3), by_hand.offset())
    given = replace(by_hand.texts(backbone), target_ids=torch.tensor([[7, 2], [8, 2], [9, 2]]))
    loss = backbone.answer_losses(given, prompt).sum()
    loss.backward()
    for leaf in (prompt.rows, prompt.offset.left, prompt.offset.right):
        assert leaf.grad.dtype == torch.float32
        assert bool(leaf.grad.isfinite().all())
        assert float(leaf.grad.abs().max()) > 0
    exact = tiny.backbone(kind).answer_losses(given, prompt).sum()
    assert float(((loss - exact).abs() / exact).detach()) < 0.05


def test_a_model_without_a_start_token_is_refused_untouched() -> None:
    raw, base = tiny.model("t5"), tiny.backbone("t5")
    raw.config.decoder_start_token_id = raw.generation_config.decoder_start_token_id = None
    raw.config.bos_token_id = raw.generation_config.bos_token_id = None
    table = raw.get_input_embeddings()
    with pytest.raises(SiteError, match="no decoder_start_token_id"):
        Seq2Seq(raw, base.tokenizer, base.config)
    assert raw.get_input_embeddings() is table
    assert all(parameter.requires_grad for parameter in raw.parameters())
