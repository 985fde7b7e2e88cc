"""`generate` of the host's own model in every mode, against a loop over the bare model on concatenated embeddings.

Knows no task; each mode is one row of a table.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import handmade as by_hand
import pytest
import torch
import transformers
from test_attach import tuned
from transformers import LogitsProcessorList

import tiny
from promptuary import attach
from promptuary.errors import ConfigError, SiteError
from promptuary.types import Batch, Prompt

NEW = 9
METHODS = ("prompt_tuning", "dept")
causal = pytest.mark.parametrize("kind", by_hand.CAUSAL)
writers = pytest.mark.parametrize("kind", by_hand.WRITERS)
both_methods = pytest.mark.parametrize("method", METHODS)
LONG = "red red blue red red green a cat a dog a cat red red"


def written(
    kind: str,
    raw: Any,
    prompt: Prompt,
    ids: list[int],
    steps: int = NEW,
    processors: LogitsProcessorList | None = None,
    plain: int = 0,
) -> list[int]:
    """Greedy, the whole sequence anew for each token; processors see text and answer; no offset on the last `plain`."""
    with torch.no_grad():
        embedded, answer = by_hand.prompted(raw, ids, prompt, plain), list[int]()
        start = [0] if kind == "t5" else [2]
        for _ in range(steps):
            if tiny.FAMILY[kind] == "seq2seq":
                decoder = torch.tensor([[*start, *answer]])
                logits = raw(inputs_embeds=embedded, decoder_input_ids=decoder).logits[:, -1]
                seen = decoder
            else:
                behind = [embedded] + ([by_hand.embed(raw, list(answer))] if answer else [])
                logits = raw(inputs_embeds=torch.cat(behind, dim=1)).logits[:, -1]
                seen = torch.tensor([[*ids, *answer]])
            if processors is not None:
                logits = processors(seen, logits.float())
            token = int(logits.argmax())
            answer.append(token)
            if token == 2:
                break
    return answer


def answers(kind: str, given: Batch, sequences: torch.Tensor) -> list[list[int]]:
    """What was written, up to the end token, of each row."""
    begin = given.input_ids.shape[1] if tiny.FAMILY[kind] == "causal" else 1
    found = []
    for row in sequences[:, begin:].tolist():
        stop = row.index(2) + 1 if 2 in row else len(row)
        found.append(row[:stop])
    return found


def given_texts(made: Any, *texts: str) -> Batch:
    """A batch of texts alone, padded on the left."""
    rows = [by_hand.pieces(text) for text in texts or by_hand.TEXTS]
    return by_hand.left(by_hand.batch(made.backbone, rows))


def inputs(given: Batch) -> dict[str, torch.Tensor]:
    return {"input_ids": given.input_ids, "attention_mask": given.attention_mask}


GREEDY_MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "chunked prefill": {"prefill_chunk_size": 4},
    "dynamic cache of the caller": {"past_key_values": lambda model: transformers.DynamicCache(config=model.config)},
}


@causal
@both_methods
@pytest.mark.parametrize("mode", list(GREEDY_MODES))
def test_every_greedy_mode_with_left_padding_writes_what_each_row_alone_would(
    kind: str, method: str, mode: str
) -> None:
    made, raw, model = tuned(kind, method), tiny.model(kind), tiny.model(kind)
    given = given_texts(made)
    expected = [written(kind, raw, made.method.fold(), by_hand.tokens(given, row)) for row in range(3)]
    options = {k: v(model) if isinstance(v, Callable) else v for k, v in GREEDY_MODES[mode].items()}
    with made.attach(model):
        got = model.generate(**inputs(given), max_new_tokens=NEW, do_sample=False, **options)
    assert torch.equal(got[:, : given.input_ids.shape[1]], given.input_ids)
    assert answers(kind, given, got) == expected


@pytest.mark.parametrize("kind", by_hand.SEQ2SEQ)
@both_methods
@pytest.mark.parametrize("mode", ["plain", "static cache", "no cache"])
def test_every_greedy_mode_of_an_encoder_decoder(kind: str, method: str, mode: str) -> None:
    made, raw, model = tuned(kind, method), tiny.model(kind), tiny.model(kind)
    given = given_texts(made)
    expected = [written(kind, raw, made.method.fold(), by_hand.tokens(given, row)) for row in range(3)]
    with made.attach(model):
        got = model.generate(**inputs(given), max_new_tokens=NEW, do_sample=False, **GREEDY_MODES[mode])
    assert answers(kind, given, got) == expected


@writers
@both_methods
def test_right_padding_writes_the_same(kind: str, method: str) -> None:
    made, model = tuned(kind, method), tiny.model(kind)
    given = given_texts(made)
    right = by_hand.texts(made.backbone)
    with made.attach(model):
        expected = answers(kind, given, model.generate(**inputs(given), max_new_tokens=NEW))
        assert answers(kind, right, model.generate(**inputs(right), max_new_tokens=NEW)) == expected


@writers
@both_methods
@pytest.mark.parametrize("more", [{}, {"length_penalty": 0.5, "num_return_sequences": 3}])
def test_beams_of_a_padded_batch_equal_each_row_alone(kind: str, method: str, more: dict[str, Any]) -> None:
    made, model, raw = tuned(kind, method), tiny.model(kind), tiny.model(kind)
    given, prompt = given_texts(made), made.method.fold()
    options = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, **more}
    expected = []
    for row in range(3):
        embedded = by_hand.prompted(raw, by_hand.tokens(given, row), prompt).detach()
        mask = torch.ones(embedded.shape[:2], dtype=torch.long)
        alone = raw.generate(inputs_embeds=embedded, attention_mask=mask, **options)
        begin = 0 if tiny.FAMILY[kind] == "causal" else 1
        expected += [[t for t in one[begin:] if t != 0] for one in alone.tolist()]
    with made.attach(model):
        got = model.generate(**inputs(given), **options)
    found = [[t for t in one if t != 0] for one in answers(kind, given, got)]
    assert found == [one[: one.index(2) + 1] if 2 in one else one for one in expected]


@writers
@both_methods
def test_sampling_draws_what_the_bare_model_draws_from_the_same_generator(kind: str, method: str) -> None:
    made, model, raw = tuned(kind, method), tiny.model(kind), tiny.model(kind)
    given, prompt = by_hand.one(by_hand.texts(made.backbone), 0), made.method.fold()
    options = {"do_sample": True, "top_k": 20, "top_p": 0.95, "temperature": 1.5, "max_new_tokens": NEW}
    embedded = by_hand.prompted(raw, by_hand.tokens(given, 0), prompt).detach()
    for several in (1, 4):
        torch.manual_seed(3)
        mask = torch.ones(embedded.shape[:2], dtype=torch.long)
        expected = raw.generate(
            inputs_embeds=embedded, attention_mask=mask, num_return_sequences=several, **options
        ).tolist()
        torch.manual_seed(3)
        with made.attach(model):
            got = model.generate(**inputs(given), num_return_sequences=several, **options)
        begin = given.input_ids.shape[1] if tiny.FAMILY[kind] == "causal" else 0
        assert got[:, begin:].tolist() == expected
        assert len(got) == several


@writers
@both_methods
@pytest.mark.parametrize(
    ("options", "processor"),
    [
        ({"repetition_penalty": 3.0}, lambda: transformers.RepetitionPenaltyLogitsProcessor(3.0)),
        ({"no_repeat_ngram_size": 1}, lambda: transformers.NoRepeatNGramLogitsProcessor(1)),
        ({"no_repeat_ngram_size": 2}, lambda: transformers.NoRepeatNGramLogitsProcessor(2)),
        ({"bad_words_ids": [[7], [9, 11]]}, lambda: transformers.NoBadWordsLogitsProcessor([[7], [9, 11]], 2)),
    ],
    ids=["repetition penalty", "token ban", "n-gram ban", "bad words"],
)
def test_processors_see_the_text_and_never_the_prompt(
    kind: str, method: str, options: dict[str, Any], processor: Any
) -> None:
    made, raw, model = tuned(kind, method), tiny.model(kind), tiny.model(kind)
    given = given_texts(made, LONG, "a cat", "the sea")
    prompt, rule = made.method.fold(), LogitsProcessorList([processor()])
    expected = [written(kind, raw, prompt, by_hand.tokens(given, row), processors=rule) for row in range(3)]
    bare = [written(kind, raw, prompt, by_hand.tokens(given, row)) for row in range(3)]
    with made.attach(model):
        got = answers(kind, given, model.generate(**inputs(given), max_new_tokens=NEW, do_sample=False, **options))
    assert got == expected
    if options.get("repetition_penalty") or options.get("no_repeat_ngram_size") == 1:
        assert got != bare  # the rule mattered


@pytest.mark.parametrize("kind", by_hand.WRITERS)
@both_methods
def test_rules_on_the_source_see_the_source(kind: str, method: str) -> None:
    made, raw, model = tuned(kind, method), tiny.model(kind), tiny.model(kind)
    given = given_texts(made, LONG, "a cat", "the sea")
    prompt, got = made.method.fold(), []
    rules = ({"encoder_repetition_penalty": 1.9}, {"encoder_no_repeat_ngram_size": 1})
    with made.attach(model):
        for options in rules:
            got.append(answers(kind, given, model.generate(**inputs(given), max_new_tokens=4, **options)))
    for row in range(3):
        ids = by_hand.tokens(given, row)
        source = torch.tensor([ids])
        for number, one in enumerate(
            (
                transformers.EncoderRepetitionPenaltyLogitsProcessor(1.9, source),
                transformers.EncoderNoRepeatNGramLogitsProcessor(1, source),
            )
        ):
            assert got[number][row] == written(kind, raw, prompt, ids, 4, LogitsProcessorList([one]))


@causal
@both_methods
def test_prompt_lookup_finds_n_grams_of_the_text_and_writes_the_same(kind: str, method: str) -> None:
    made, raw, model = tuned(kind, method), tiny.model(kind), tiny.model(kind)
    given = given_texts(made, LONG)
    expected = written(kind, raw, made.method.fold(), by_hand.tokens(given, 0), 20)
    looked: list[int] = []
    with made.attach(model):
        make = model._get_candidate_generator

        def watched(*args: Any, **kwargs: Any) -> Any:
            found = make(*args, **kwargs)
            inner = found.inner.get_candidates

            def search(ids: torch.Tensor, **more: Any) -> Any:
                looked.append(int(ids.max()))
                return inner(ids, **more)

            found.inner.get_candidates = search
            return found

        model._get_candidate_generator = watched
        got = model.generate(**inputs(given), max_new_tokens=20, prompt_lookup_num_tokens=4)
    assert answers(kind, given, got) == [expected]
    assert looked
    assert max(looked) < tiny.SIZE


@causal
@both_methods
def test_a_second_turn_on_a_returned_cache_equals_the_fresh_run(kind: str, method: str) -> None:
    made, raw, model = tuned(kind, method), tiny.model(kind), tiny.model(kind)
    given, prompt = given_texts(made), made.method.fold()
    more = torch.tensor([[11, 12, 13], [14, 15, 16], [17, 18, 19]])
    with made.attach(model):
        first = model.generate(
            **inputs(given), max_new_tokens=4, min_new_tokens=4, return_dict_in_generate=True, do_sample=False
        )
        history = torch.cat([first.sequences, more], dim=1)
        mask = torch.cat([given.attention_mask, torch.ones(3, history.shape[1] - given.input_ids.shape[1])], 1).long()
        second = model.generate(
            history, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=5, do_sample=False
        )
    for row in range(3):
        ids, answer = by_hand.tokens(given, row), first.sequences[row, given.input_ids.shape[1] :].tolist()
        # the answer of the first turn was written without an offset; text behind it counts on
        embedded = by_hand.prompted(raw, [*ids, *answer, *more[row].tolist()], prompt).detach()
        if prompt.offset is not None:
            begin = prompt.length + len(ids)
            embedded[0, begin : begin + 4] = by_hand.embed(raw, list(answer)).detach()
        out: list[int] = []
        for _ in range(5):
            tail = [embedded] + ([by_hand.embed(raw, list(out))] if out else [])
            out.append(int(raw(inputs_embeds=torch.cat(tail, dim=1)).logits[0, -1].argmax()))
            if out[-1] == 2:
                break
        got = second[row, history.shape[1] :].tolist()
        assert got[: len(out)] == out


@writers
def test_vectors_instead_of_ids_write_the_same(kind: str) -> None:
    for method in METHODS:
        made, model = tuned(kind, method), tiny.model(kind)
        given = given_texts(made)
        with made.attach(model):
            expected = answers(kind, given, model.generate(**inputs(given), max_new_tokens=NEW))
            vectors = model.get_input_embeddings()(given.input_ids)
            got = model.generate(inputs_embeds=vectors, attention_mask=given.attention_mask, max_new_tokens=NEW)
        begin = 0 if tiny.FAMILY[kind] == "causal" else 1
        rows = [row[begin:] for row in got.tolist()]
        assert [row[: row.index(2) + 1] if 2 in row else row for row in rows] == expected


@causal
def test_a_streamer_and_a_stopping_criterion_see_the_text(kind: str) -> None:
    made, model = tuned(kind, "dept"), tiny.model(kind)
    given = by_hand.one(by_hand.texts(made.backbone), 0)
    text, told, seen = given.input_ids[0].tolist(), list[list[int]](), list[list[int]]()

    class Streamer:
        def put(self, value: torch.Tensor) -> None:
            told.append(value.flatten().tolist())

        def end(self) -> None:
            told.append([-1])

    class Enough(transformers.StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            seen.append(input_ids[0].tolist())
            return torch.tensor([len(seen) == 3])

    with made.attach(model):
        whole = model.generate(**inputs(given), max_new_tokens=NEW, streamer=Streamer())[0].tolist()
        stopped = model.generate(**inputs(given), max_new_tokens=NEW, stopping_criteria=[Enough()])[0].tolist()
    assert told[0] == text
    assert [token for part in told[1:-1] for token in part] == whole[len(text) :]
    assert told[-1] == [-1]
    assert stopped == whole[: len(text) + 3]
    assert [ids[-len(text) - number :] for number, ids in enumerate(seen, start=1)] == [
        whole[: len(text) + number] for number in (1, 2, 3)
    ]


@writers
def test_rows_that_name_their_prompt_get_what_they_would_get_alone(kind: str) -> None:
    longer = {"num_virtual_tokens": 5, "rank": 1}
    prompts = {"a": tuned(kind, "prompt_tuning"), "b": tuned(kind, "dept", **longer)}
    model = tiny.model(kind)
    given = given_texts(prompts["a"])
    names = ["b", "a", "b"]
    with attach(prompts, model):
        together = answers(kind, given, model.generate(**inputs(given), prompt_names=names, max_new_tokens=NEW))
        with pytest.raises(ConfigError, match="prompt_names needs one of a, b for each of the 3 rows"):
            model.generate(**inputs(given))
        with pytest.raises(ConfigError, match="prompt_names needs one of a, b"):
            model.generate(**inputs(given), prompt_names=["a", "c", "b"])
    for row, name in enumerate(names):
        alone = by_hand.one(given, 0) if row < 0 else by_hand.one(by_hand.texts(prompts["a"].backbone), row)
        with prompts[name].attach(model):
            got = answers(kind, alone, model.generate(**inputs(alone), max_new_tokens=NEW))
            with pytest.raises(ConfigError, match="prompt_names is for several prompts"):
                model.generate(**inputs(alone), prompt_names=["a"])
        assert got == [together[row]]


@writers
def test_two_threads_with_two_prompts_never_mix(kind: str) -> None:
    made = [tuned(kind, "prompt_tuning"), tuned(kind, "dept")]
    model = tiny.model(kind)
    given = given_texts(made[0])
    expected = []
    for one in made:
        with one.attach(model):
            expected.append(model.generate(**inputs(given), max_new_tokens=4))
    wrong: list[int] = []
    barrier = threading.Barrier(2)

    def work(number: int) -> None:
        barrier.wait()
        for _ in range(15):
            with made[number].attach(model):
                got = model.generate(**inputs(given), max_new_tokens=4)
            if got.shape != expected[number].shape or not torch.equal(got, expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert "generate" not in model.__dict__
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_thread_of_the_block_streams_with_the_prompt_of_the_block() -> None:
    made, model = tuned("llama", "dept"), tiny.model("llama")
    given = by_hand.one(by_hand.texts(made.backbone), 0)
    got: list[Any] = []

    def work() -> None:
        try:
            got.append(model.generate(**inputs(given), max_new_tokens=4))
        except SiteError as error:
            got.append(error)

    def in_thread() -> None:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    with made.attach(model):
        expected = model.generate(**inputs(given), max_new_tokens=4)
        in_thread()
        ready, leave = threading.Event(), threading.Event()

        def hold() -> None:
            with tuned("llama", "prompt_tuning").attach(model):
                ready.set()
                leave.wait(20)

        other = threading.Thread(target=hold)
        other.start()
        ready.wait(20)
        in_thread()
        leave.set()
        other.join()
    assert torch.equal(got[0], expected)
    assert "several threads have prompts on this model and this thread has none" in str(got[1])


def test_what_cannot_be_right_is_refused_by_name() -> None:
    made, model = tuned("llama", "dept"), tiny.model("llama")
    given = given_texts(made)
    refused = {
        "assistant_model": tiny.model("llama"),
        "negative_prompt_ids": given.input_ids,
        "guidance_scale": 1.5,
        "custom_generate": "somebody/code",
    }
    with made.attach(model):
        for name, value in refused.items():
            with pytest.raises(SiteError, match=f"{name} cannot be right"):
                model.generate(**inputs(given), **{name: value})
        with pytest.raises(SiteError, match="leave position_ids out"):
            model.generate(**inputs(given), position_ids=given.input_ids)
        right = by_hand.texts(made.backbone)
        first = model.generate(**inputs(right), max_new_tokens=2, return_dict_in_generate=True)
        with pytest.raises(SiteError, match="cannot be continued: it was filled from right-padded text"):
            model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=2)
