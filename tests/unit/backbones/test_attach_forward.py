"""`forward` of the host's own model with what users pass: labels of every head, caches, packed texts, vectors.

Knows no task. The reference is the bare model on concatenated embeddings, one row at a time.
"""

from __future__ import annotations

import threading
from typing import Any

import handmade as by_hand
import pytest
import torch
import transformers as t
from test_attach import inputs, tuned
from torch.nn.functional import cross_entropy

import promptuary
import tiny
from promptuary import attach
from promptuary.errors import SiteError
from promptuary.types import Batch

causal = pytest.mark.parametrize("kind", by_hand.CAUSAL)
both_methods = pytest.mark.parametrize("method", ["prompt_tuning", "dept"])
SETTINGS: dict[str, dict[str, Any]] = {
    "prompt_tuning": {"num_virtual_tokens": 3},
    "dept": {"num_virtual_tokens": 3, "rank": 2, "max_tokens": 32},
}


def headed(name: str, **settings: Any) -> Any:
    """A tiny model with a head; the body of the tiny model of its kind."""
    kind = {"Bert": "bert", "Roberta": "roberta", "Llama": "llama", "GPT2": "gpt2", "Bart": "bart"}[
        next(start for start in ("Bert", "Roberta", "Llama", "GPT2", "Bart") if name.startswith(start))
    ]
    config = type(tiny.model(kind).config)(**{**tiny.model(kind).config.to_dict(), **settings})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = getattr(t, name)(config)
    for parameter in made.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3)
    return made.eval()


def adapted(name: str, method: str, **settings: Any) -> tuple[Any, Any, Any]:
    """A prompt on such a model, its tensors moved, and a bare copy."""
    model, raw = headed(name, **settings), headed(name, **settings)
    made = promptuary.adapt(model, tiny.tokenizer(), method, placement="front", **SETTINGS[method])
    source = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for group in made.trained():
            group.parameter.copy_(torch.randn(group.parameter.shape, generator=source))
    return made, model, raw


def texts(made: Any) -> Batch:
    return by_hand.texts(made.backbone)


# ---- heads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "GPT2ForSequenceClassification"])
@both_methods
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_decoder_used_as_a_classifier_ignores_padding(name: str, method: str, side: str) -> None:
    made, model, raw = adapted(name, method, num_labels=4)
    given, prompt = texts(made), made.method.fold()
    given = by_hand.left(given) if side == "left" else given
    labels = torch.tensor([1, 3, 0])
    with torch.no_grad(), made.attach():
        output = model(**inputs(given), labels=labels)
    for row in range(3):
        embedded = by_hand.prompted(raw, by_hand.tokens(given, row), prompt)
        states = raw.base_model(inputs_embeds=embedded).last_hidden_state[:, -1]
        torch.testing.assert_close(output.logits[row : row + 1], raw.score(states), **by_hand.CLOSE)
    torch.testing.assert_close(output.loss, cross_entropy(output.logits, labels))


@pytest.mark.parametrize("name", ["BertForTokenClassification", "RobertaForTokenClassification"])
@both_methods
def test_labels_of_tokens_sit_at_their_tokens(name: str, method: str) -> None:
    made, model, raw = adapted(name, method, num_labels=5)
    given, prompt = texts(made), made.method.fold()
    labels = (given.input_ids % 5).masked_fill(given.attention_mask == 0, -100)
    with torch.no_grad(), made.attach():
        output = model(**inputs(given), labels=labels)
        other_side = model(**inputs(by_hand.left(given)))
    expected, count = torch.tensor(0.0), 0
    for row in range(3):
        ids = by_hand.tokens(given, row)
        alone = raw(inputs_embeds=by_hand.prompted(raw, ids, prompt)).logits[0, prompt.length :]
        torch.testing.assert_close(output.logits[row, : len(ids)], alone, **by_hand.CLOSE)
        torch.testing.assert_close(other_side.logits[row, -len(ids) :], alone, **by_hand.CLOSE)
        expected = expected + cross_entropy(alone, labels[row, : len(ids)], reduction="sum")
        count += len(ids)
    assert output.logits.shape[:2] == given.input_ids.shape
    torch.testing.assert_close(output.loss, expected / count, **by_hand.CLOSE)


@pytest.mark.parametrize("name", ["BertForQuestionAnswering", "LlamaForQuestionAnswering"])
@both_methods
def test_answers_to_questions_are_places_in_the_text(name: str, method: str) -> None:
    made, model, raw = adapted(name, method)
    given, prompt = texts(made), made.method.fold()
    start, end = torch.tensor([2, 1, 3]), torch.tensor([5, 3, 4])
    with torch.no_grad(), made.attach():
        output = model(**inputs(given), start_positions=start, end_positions=end)
    losses = []
    for row in range(3):
        ids = by_hand.tokens(given, row)
        embedded = by_hand.prompted(raw, ids, prompt)
        more = {"token_type_ids": torch.zeros(embedded.shape[:2], dtype=torch.long)} if "Bert" in name else {}
        alone = raw(inputs_embeds=embedded, **more)
        for logits, found, at in (
            (alone.start_logits, output.start_logits, start),
            (alone.end_logits, output.end_logits, end),
        ):
            own = logits[0, prompt.length :]
            torch.testing.assert_close(found[row, : len(ids)], own, **by_hand.CLOSE)
            assert int(found[row].argmax()) == int(own.argmax())
            losses.append(cross_entropy(own[None], at[row : row + 1]))
    assert output.start_logits.shape == given.input_ids.shape
    torch.testing.assert_close(output.loss, torch.stack(losses).mean(), **by_hand.CLOSE)
    assert next(iter(output.keys())) == "loss"


@both_methods
def test_an_encoder_with_a_head_reads_its_first_token_and_not_a_prompt_row(method: str) -> None:
    model, raw = (headed("BertForSequenceClassification", num_labels=8) for _ in range(2))
    made = promptuary.adapt(model, tiny.tokenizer(), method, **SETTINGS[method])
    assert made.method.config.placement == "after_bos"
    given, prompt = texts(made), made.method.fold()
    several = torch.rand(3, 8)  # as wide as a text: labels of a whole text are never moved
    with torch.no_grad(), made.attach():
        output = model(**inputs(given), labels=several)
    for row in range(3):
        ids = by_hand.tokens(given, row)
        embedded = by_hand.prompted(raw, ids, prompt)
        embedded = torch.cat([embedded[:, 3:4], embedded[:, :3], embedded[:, 4:]], dim=1)
        torch.testing.assert_close(output.logits[row], raw(inputs_embeds=embedded).logits[0], **by_hand.CLOSE)
    torch.testing.assert_close(
        output.loss, torch.nn.functional.binary_cross_entropy_with_logits(output.logits, several)
    )


def test_texts_to_choose_among_keep_their_shape() -> None:
    made, model, raw = adapted("BertForMultipleChoice", "prompt_tuning")
    given, prompt = texts(made), made.method.fold()
    ids, mask = given.input_ids[None], given.attention_mask[None]
    with torch.no_grad(), made.attach():
        output = model(input_ids=ids, attention_mask=mask, labels=torch.tensor([1]))
    for row in range(3):
        embedded = by_hand.prompted(raw, by_hand.tokens(given, row), prompt)
        alone = raw.classifier(raw.bert(inputs_embeds=embedded).pooler_output)[0, 0]
        torch.testing.assert_close(output.logits[0, row], alone, **by_hand.CLOSE)
    torch.testing.assert_close(output.loss, cross_entropy(output.logits, torch.tensor([1])))


# ---- arguments ------------------------------------------------------------------------------------------------------


@causal
@both_methods
def test_texts_fed_in_chunks_equal_the_whole(kind: str, method: str) -> None:
    made, model = tuned(kind, method), tiny.model(kind)
    given = by_hand.left(texts(made))
    ids, mask = given.input_ids, given.attention_mask
    width = ids.shape[1]
    with torch.no_grad(), made.attach(model):
        whole = model(**inputs(given)).logits
        cache = t.DynamicCache(config=model.config)
        parts = []
        for begin, end in ((0, width - 3), (width - 3, width - 2), (width - 2, width)):
            part = model(input_ids=ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache)
            parts.append(part.logits)
            cache = part.past_key_values
        assert cache.get_seq_length() == width + 3
        with pytest.raises(SiteError, match=f"attention_mask has 2 columns, but {width} tokens of text are in past"):
            model(input_ids=ids[:, :2], attention_mask=mask[:, :2], past_key_values=cache)
        empty = model(input_ids=ids[:, :4], attention_mask=mask[:, :4], use_cache=True).past_key_values
        with pytest.raises(SiteError, match="a row of its first part held padding only"):
            model(input_ids=ids[:, 4:], attention_mask=mask, past_key_values=empty)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, dim=1)[real], whole[real], **by_hand.CLOSE)


@causal
def test_a_whole_text_without_a_mask_continues_its_cache(kind: str) -> None:
    made, model = tuned(kind, "prompt_tuning"), tiny.model(kind)
    ids = by_hand.one(texts(made), 0).input_ids
    with torch.no_grad(), made.attach(model):
        whole = model(ids).logits
        first = model(ids[:, :5], use_cache=True)
        second = model(ids[:, 5:], past_key_values=first.past_key_values)
        placed = torch.arange(5, ids.shape[1])[None]
        third = model(ids[:, :5], use_cache=True)
        again = model(ids[:, 5:], past_key_values=third.past_key_values, position_ids=placed)
    torch.testing.assert_close(second.logits, whole[:, 5:], **by_hand.CLOSE)
    assert torch.equal(again.logits, second.logits)


@causal
@both_methods
def test_packed_texts_each_take_the_prompt_and_see_only_themselves(kind: str, method: str) -> None:
    made, model, raw = tuned(kind, method), tiny.model(kind), tiny.model(kind)
    prompt = made.method.fold()
    apart = [[7, 8, 9, 10], [11, 12], [13, 14, 15, 16, 17]], [[21, 22, 23], [24, 25, 26, 27, 28, 29], [30, 31]]
    ids = torch.tensor([[token for one in row for token in one] for row in apart])
    positions = torch.tensor([[place for one in row for place in range(len(one))] for row in apart])
    labels = ids.clone()  # the first token of each text is not predicted, as without a prompt
    with torch.no_grad(), made.attach(model):
        output = model(input_ids=ids, position_ids=positions, labels=labels)
        vectors = model.get_input_embeddings()(ids)
        same = model(inputs_embeds=vectors, position_ids=positions)
        with pytest.raises(SiteError, match="packed texts"):
            model(input_ids=ids, position_ids=positions, logits_to_keep=1)
    losses = []
    for row, several in enumerate(apart):
        begin = 0
        for one in several:
            alone = raw(inputs_embeds=by_hand.prompted(raw, one, prompt)).logits[0, prompt.length :]
            torch.testing.assert_close(output.logits[row, begin : begin + len(one)], alone, **by_hand.CLOSE)
            losses.append(cross_entropy(alone[:-1], torch.tensor(one[1:]), reduction="none"))
            begin += len(one)
    torch.testing.assert_close(output.loss, torch.cat(losses).mean(), **by_hand.CLOSE)
    torch.testing.assert_close(same.logits, output.logits, **by_hand.CLOSE)


@causal
def test_positions_that_count_the_text_are_welcome_and_others_refused(kind: str) -> None:
    made, model = tuned(kind, "dept"), tiny.model(kind)
    given = by_hand.left(texts(made))
    counted = (given.attention_mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), made.attach(model):
        expected = model(**inputs(given)).logits
        assert torch.equal(model(**inputs(given), position_ids=counted).logits, expected)
        with pytest.raises(SiteError, match="position_ids do not count the tokens of the text"):
            model(**inputs(given), position_ids=counted + 1)
        with pytest.raises(SiteError, match=r"attention_mask is \[batch, tokens\]"):
            model(input_ids=given.input_ids, attention_mask=given.attention_mask[:, None, None])


@causal
@both_methods
@pytest.mark.parametrize("kept", [1, 3, "chosen"])
def test_logits_to_keep_counts_text(kind: str, method: str, kept: Any) -> None:
    made, model = tuned(kind, method), tiny.model(kind)
    given = by_hand.left(texts(made))
    kept = torch.tensor([4, 7]) if kept == "chosen" else kept
    with torch.no_grad(), made.attach(model):
        whole = model(**inputs(given)).logits
        few = model(**inputs(given), logits_to_keep=kept).logits
        with pytest.raises(SiteError, match="logits_to_keep and labels"):
            model(**inputs(given), logits_to_keep=kept, labels=given.input_ids)
    expected = whole[:, -kept:] if isinstance(kept, int) else whole[:, kept]
    real = (given.attention_mask[:, -kept:] if isinstance(kept, int) else given.attention_mask[:, kept]).bool()
    torch.testing.assert_close(few[real], expected[real], **by_hand.CLOSE)
    assert few.shape == expected.shape


@pytest.mark.parametrize("kind", by_hand.KINDS)
@both_methods
def test_vectors_instead_of_ids_give_the_same_and_get_gradients(kind: str, method: str) -> None:
    made, model = tuned(kind, method), tiny.model(kind)
    given = texts(made)
    more = {"decoder_input_ids": torch.tensor([[2, 5]] * 3)} if tiny.FAMILY[kind] == "seq2seq" else {}
    with made.attach(model):
        expected = model(**inputs(given), **more)[0]
        vectors = model.get_input_embeddings()(given.input_ids).detach().requires_grad_()
        got = model(inputs_embeds=vectors, attention_mask=given.attention_mask, **more)[0]
        real = torch.ones_like(expected[..., 0]).bool() if more else given.attention_mask.bool()
        torch.testing.assert_close(got[real], expected[real], **by_hand.CLOSE)
        (got[real] * torch.randn(got[real].shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        with pytest.raises(SiteError, match="either input_ids or inputs_embeds"):
            model(input_ids=given.input_ids, inputs_embeds=vectors, **more)
        with pytest.raises(SiteError, match="either input_ids or inputs_embeds"):
            model(**more)
    assert bool((vectors.grad[given.attention_mask.bool()] != 0).any())
    assert not bool((vectors.grad[~given.attention_mask.bool()] != 0).any())


def test_vectors_do_not_say_what_the_first_token_is() -> None:
    made, model = tuned("bert", "prompt_tuning", placement="after_bos"), tiny.model("bert")
    with made.attach(model), pytest.raises(SiteError, match="behind the first special token needs input_ids"):
        model(inputs_embeds=torch.zeros(1, 4, tiny.WIDTH))


@pytest.mark.parametrize("kind", ["llama", "bert", "minilm"])
def test_no_output_has_prompt_positions(kind: str) -> None:
    made, model = tuned(kind, "prompt_tuning"), tiny.model(kind)
    given = texts(made)
    with torch.no_grad(), made.attach(model):
        output = model(**inputs(given), output_hidden_states=True)
        as_tuple = model(**inputs(given), return_dict=False)
        positional = model(given.input_ids, given.attention_mask)
    assert all(states.shape[1] == given.input_ids.shape[1] for states in output.hidden_states)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], output[0])
    assert torch.equal(positional[0], output[0])
    assert output[0].shape[:2] == given.input_ids.shape


@pytest.mark.parametrize("kind", by_hand.KINDS)
def test_rows_that_name_their_prompt_get_what_they_would_get_alone(kind: str) -> None:
    prompts = {"a": tuned(kind, "prompt_tuning"), "b": tuned(kind, "dept", num_virtual_tokens=6)}
    model, given = tiny.model(kind), by_hand.left(texts(tuned(kind)))
    more = {"decoder_input_ids": torch.tensor([[2, 5]] * 3)} if tiny.FAMILY[kind] == "seq2seq" else {}
    names = ["b", "a", "b"]
    with torch.no_grad(), attach(prompts, model):
        together = model(**inputs(given), **more, prompt_names=names)[0]
    for row, name in enumerate(names):
        alone = by_hand.one(texts(prompts["a"]), row)
        with torch.no_grad(), prompts[name].attach(model):
            own = model(**inputs(alone), **{key: value[:1] for key, value in more.items()})[0][0]
        torch.testing.assert_close(together[row, -len(own) :], own, **by_hand.CLOSE)


@pytest.mark.parametrize("kind", by_hand.SEQ2SEQ)
def test_states_of_the_encoder_can_be_handed_to_the_decoder(kind: str) -> None:
    made, model = tuned(kind, "dept"), tiny.model(kind)
    given = texts(made)
    start = torch.tensor([[2, 5]] * 3)
    with torch.no_grad(), made.attach(model):
        whole = model(**inputs(given), decoder_input_ids=start)
        states = t.modeling_outputs.BaseModelOutput(last_hidden_state=whole.encoder_last_hidden_state)
        again = model(encoder_outputs=states, attention_mask=given.attention_mask, decoder_input_ids=start)
    torch.testing.assert_close(again.logits, whole.logits, **by_hand.CLOSE)


@pytest.mark.parametrize("kind", list(tiny.FAMILIES.values()))
def test_two_threads_with_two_prompts_never_mix(kind: str) -> None:
    made = [tuned(kind, "prompt_tuning"), tuned(kind, "dept")]
    model, given = tiny.model(kind), texts(made[0])
    more = {"decoder_input_ids": torch.tensor([[2, 5]] * 3)} if tiny.FAMILY[kind] == "seq2seq" else {}
    expected = []
    for one in made:
        with torch.no_grad(), one.attach(model):
            expected.append(model(**inputs(given), **more)[0])
    wrong, barrier = [], threading.Barrier(2)

    def work(number: int) -> None:
        barrier.wait()
        with torch.no_grad():
            for _ in range(10):
                with made[number].attach(model):
                    for _ in range(10):
                        if not torch.equal(model(**inputs(given), **more)[0], expected[number]):
                            wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert "forward" not in model.__dict__
