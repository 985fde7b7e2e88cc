"""Decoder-only models: what is scored, learnt and written equals the plain model on the text, done by hand.

Knows no method or task.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import handmade as by_hand
import pytest
import torch

import tiny
from promptuary.errors import ConfigError
from promptuary.types import ANSWER, IGNORED, Batch, Candidates, Piece, Prompt

every = pytest.mark.parametrize("kind", by_hand.CAUSAL)
both_prompts = pytest.mark.parametrize("parts", list(by_hand.PROMPTS))


def greedy(raw: Any, embedded: torch.Tensor, count: int, end: int = 2) -> list[int]:
    """A hand-written greedy loop on embeddings, without a cache, up to the end token; padding is not an answer."""
    written: list[int] = []
    with torch.no_grad():
        for _ in range(count):
            token = int(raw(inputs_embeds=embedded).logits[0, -1].argmax())
            if token == end:
                break
            written.append(token)
            embedded = torch.cat([embedded, by_hand.embed(raw, [token])], dim=1)
    return [token for token in written if token != 0]


@every
@both_prompts
def test_words_equal_the_full_logits_at_the_last_token_in_value_and_gradient(kind: str, parts: str) -> None:
    backbone, raw = tiny.backbone(kind), tiny.model(kind)
    given, answers = by_hand.texts(backbone), by_hand.candidates(backbone, "good", "bad", "red", "good")
    ours, theirs = by_hand.PROMPTS[parts](), by_hand.PROMPTS[parts]()
    scores = backbone.score(given, ours, answers)
    plain = torch.stack(
        [
            raw(inputs_embeds=by_hand.prompted(raw, by_hand.tokens(given, row), theirs)).logits[
                0, -1, answers.ids[:, 0]
            ]
            for row in range(3)
        ]
    )
    torch.testing.assert_close(scores, plain, **by_hand.CLOSE)
    target = torch.tensor([0, 2, 1])
    for found in (scores, plain):
        torch.nn.functional.cross_entropy(found, target).backward()
    mine, reference = (prompt.rows if prompt.rows is not None else prompt.offset.left for prompt in (ours, theirs))
    torch.testing.assert_close(mine.grad, reference.grad, **by_hand.CLOSE)
    # the default path against the same wrapped model with its whole head
    placed = backbone.place(given, ours)
    with backbone.running(placed) as inputs:
        full = backbone.model(**inputs, use_cache=False).logits
    at = placed.columns.gather(1, given.slots[ANSWER][:, None])
    assert full.shape[1] == given.input_ids.shape[1] + ours.length
    picked = full[torch.arange(3), at[:, 0]][:, answers.ids[:, 0]]
    torch.testing.assert_close(scores, picked, **by_hand.CLOSE)


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
            taken = torch.log_softmax(by_hand.logits(raw, kind, embedded, phrase, []), dim=-1)
            expected = taken[torch.arange(len(phrase)), torch.tensor(phrase)].mean()
            torch.testing.assert_close(scores[row, column], expected, **by_hand.CLOSE)
    torch.testing.assert_close(backbone.score(by_hand.left(given), prompt, answers), scores, **by_hand.CLOSE)


@every
def test_each_row_with_its_own_answers(kind: str) -> None:
    backbone = tiny.backbone(kind)
    given, prompt = by_hand.texts(backbone), Prompt(by_hand.rows(3), by_hand.offset())
    for choices in ((["good", "bad", "red"], ["no"], ["one", "two"]), (["not good", "bad"], ["a b c"], ["no", "ten"])):
        single = [by_hand.candidates(backbone, *row) for row in choices]
        count, length = max(len(row.ids) for row in single), max(row.ids.shape[1] for row in single)
        ids = torch.zeros(3, count, length, dtype=torch.long)
        mask = torch.zeros(3, count, length, dtype=torch.bool)
        for row, own in enumerate(single):
            ids[row, : len(own.ids), : own.ids.shape[1]] = own.ids
            mask[row, : len(own.ids), : own.ids.shape[1]] = own.mask
        scores = backbone.score(given, prompt, Candidates(ids, mask))
        for row, own in enumerate(single):
            if length > 1:  # on its own a row of one-token answers would be scored by logits
                own = Candidates(ids[row, : len(own.ids)], mask[row, : len(own.ids)])
                extra = Candidates(torch.tensor([[6] * length]), torch.ones(1, length, dtype=torch.bool))
                own = Candidates(torch.cat([own.ids, extra.ids]), torch.cat([own.mask, extra.mask]))
            expected = backbone.score(by_hand.one(given, row), prompt, own)[0, : len(choices[row])]
            torch.testing.assert_close(scores[row, : len(choices[row])], expected, **by_hand.CLOSE)
            assert bool((scores[row, len(choices[row]) :] == -torch.inf).all())


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
    for row, answer in enumerate(answers):
        ids = [*by_hand.tokens(given, row), *answer]
        embedded = by_hand.prompted(raw, ids, theirs, plain=len(answer))
        labels = torch.full((1, embedded.shape[1]), IGNORED)
        labels[0, -len(answer) :] = torch.tensor(answer)
        expected = expected + raw(inputs_embeds=embedded, labels=labels).loss * len(answer)
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
    expected = [greedy(raw, by_hand.prompted(raw, by_hand.tokens(given, row), prompt), 12) for row in range(3)]
    assert backbone.generate(given, prompt, max_new_tokens=12) == expected
    assert backbone.generate(by_hand.left(given), prompt, max_new_tokens=12) == expected
    assert backbone.generate(given, prompt, max_new_tokens=12, use_cache=False) == expected
    for row in range(3):
        assert backbone.generate(by_hand.one(given, row), prompt, max_new_tokens=12) == [expected[row]]
    assert all(token < tiny.SIZE for row in expected for token in row)


@every
def test_other_ways_of_writing_are_exact_too(kind: str) -> None:
    backbone = tiny.backbone(kind)
    alone, prompt = by_hand.one(by_hand.texts(backbone), 0), Prompt(by_hand.rows(3))
    expected = backbone.generate(alone, prompt, max_new_tokens=10)
    options: list[dict[str, Any]] = [{"prefill_chunk_size": 4}, {"prompt_lookup_num_tokens": 2}]
    for option in options:
        assert backbone.generate(alone, prompt, max_new_tokens=10, **option) == expected, option


@every
def test_prompts_of_different_lengths_write_in_one_batch(kind: str) -> None:
    backbone = tiny.backbone(kind)
    prompts = [Prompt(by_hand.rows(2)), Prompt(by_hand.rows(6, seed=4), by_hand.offset()), Prompt()]
    given = by_hand.texts(backbone)
    apart = [backbone.generate(given, prompt, max_new_tokens=6) for prompt in prompts]
    mixed = replace(given, prompt_index=torch.tensor([1, 2, 0]))
    assert backbone.generate(mixed, prompts, max_new_tokens=6) == [apart[1][0], apart[2][1], apart[0][2]]


@every
def test_beams_and_several_answers_per_text(kind: str) -> None:
    backbone = tiny.backbone(kind)
    given, prompt = by_hand.texts(backbone), Prompt(by_hand.rows(3), by_hand.offset())
    together = backbone.generate(given, prompt, max_new_tokens=5, num_beams=3, num_return_sequences=2)
    assert len(together) == 6
    for row in range(3):
        alone = backbone.generate(
            by_hand.one(given, row), prompt, max_new_tokens=5, num_beams=3, num_return_sequences=2
        )
        assert together[2 * row : 2 * row + 2] == alone


@every
@both_prompts
def test_the_first_written_token_is_the_one_that_teacher_forcing_expects(kind: str, parts: str) -> None:
    backbone, prompt = tiny.backbone(kind), by_hand.PROMPTS[parts]()
    given = by_hand.texts(backbone)
    every_word = Candidates(torch.arange(tiny.SIZE)[:, None], torch.ones(tiny.SIZE, 1, dtype=torch.bool))
    best = backbone.score(given, prompt, every_word).argmax(1).tolist()
    written = backbone.generate(given, prompt, max_new_tokens=1)
    assert written == [[token] if token not in (0, 2) else [] for token in best]
    # a second token: nothing of the table is added to what was written
    for row, token in enumerate(best):
        pairs = torch.tensor([[token, word] for word in range(tiny.SIZE)])
        alone = by_hand.one(given, row)
        second = int(backbone.score(alone, prompt, Candidates(pairs, torch.ones_like(pairs).bool())).argmax())
        if token not in (0, 2):
            expected = [token] if second in (0, 2) else [token, second]
            assert backbone.generate(alone, prompt, max_new_tokens=2) == [expected]


@every
def test_rows_between_the_text_and_the_answer(kind: str) -> None:
    """A slot right before the answer: reading, learning and writing all see the prompt there."""
    backbone, raw = tiny.backbone(kind), tiny.model(kind)

    def filled(text: str) -> list[Piece]:
        return [Piece("field", text), Piece("slot", "prompt"), Piece("slot", ANSWER)]

    given = by_hand.batch(backbone, [filled(text) for text in by_hand.TEXTS])
    prompt = Prompt(by_hand.rows(3), placement=(("prompt", 3),))
    words, phrases = by_hand.candidates(backbone), by_hand.candidates(backbone, "good", "not bad")
    written = backbone.generate(given, prompt, max_new_tokens=6)
    for row in range(3):
        sequence = [*by_hand.tokens(given, row), *prompt.rows[0]]
        embedded = by_hand.embed(raw, sequence)
        last = raw(inputs_embeds=embedded).logits[0, -1]
        torch.testing.assert_close(backbone.score(given, prompt, words)[row], last[words.ids[:, 0]], **by_hand.CLOSE)
        assert written[row] == greedy(raw, embedded, 6)
        phrase = phrases.ids[1].tolist()
        taken = torch.log_softmax(by_hand.logits(raw, kind, embedded, phrase, []), dim=-1)
        expected = taken[torch.arange(2), torch.tensor(phrase)]
        for batch in (given, by_hand.left(given)):
            found = backbone.score(batch, prompt, phrases)[row, 1]
            torch.testing.assert_close(found, expected.mean(), **by_hand.CLOSE)
        target = replace(given, target_ids=torch.tensor([phrase] * 3)).rows(torch.tensor([row]))
        torch.testing.assert_close(backbone.answer_losses(target, prompt).sum(), -expected.sum(), **by_hand.CLOSE)


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
    assert len(backbone.generate(given, prompt, max_new_tokens=3)) == 3


def test_without_a_padding_token_no_ordinary_token_is_lost() -> None:
    words = tiny.tokenizer(specials="none")
    words.pad_token = None
    base = tiny.backbone("gpt2")
    raw = tiny.model("gpt2")
    with torch.no_grad():
        raw.transformer.ln_f.weight.zero_()
        raw.transformer.ln_f.bias.copy_(raw.lm_head.weight[0] * 10)  # always writes token 0
    backbone = type(base)(raw, words, base.config)
    assert backbone.pad == words.eos_token_id
    assert backbone.generate(by_hand.texts(base), Prompt(by_hand.rows(2)), max_new_tokens=3) == [[0, 0, 0]] * 3


def test_pooling_reads_text_tokens_only() -> None:
    for pooling in ("mean", "first", "last", "answer"):
        backbone = tiny.backbone("llama", pooling=pooling)
        given, prompt = by_hand.texts(backbone), Prompt(by_hand.rows(3))
        states, mask = backbone.hidden(given, prompt), given.attention_mask
        for row in range(3):
            own = states[row][mask[row].bool()]
            expected = {"mean": own.mean(0), "first": own[0], "last": own[-1], "answer": own[-1]}[pooling]
            torch.testing.assert_close(backbone.pooled(given, prompt)[row], expected, **by_hand.CLOSE)


def test_pooling_at_an_answer_that_is_not_there_is_refused() -> None:
    backbone = tiny.backbone("llama")
    ids = torch.tensor([[5, 6]])
    with pytest.raises(ConfigError, match=r"has no \{mask\}"):
        backbone.pooled(Batch(ids, torch.ones_like(ids), torch.tensor([0])), Prompt())
