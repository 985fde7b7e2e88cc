"""Prefix tuning: against the words that it starts from, against PEFT-shaped caches by hand, and in every way of use.

Knows no training loop.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import handmade as by_hand
import pytest
import torch
import transformers

import promptuary
import tiny
from promptuary import attach, look, registry
from promptuary.errors import ConfigError, NotFoldable, SiteError
from promptuary.methods.prefix import Prefix, PrefixConfig
from promptuary.tuned import Tuned
from promptuary.types import Prompt, Shape

CAUSAL, SEQ2SEQ = by_hand.CAUSAL, by_hand.SEQ2SEQ
causal = pytest.mark.parametrize("kind", CAUSAL)
writers = pytest.mark.parametrize("kind", by_hand.WRITERS)
both = pytest.mark.parametrize("reparameterize", [False, True])


def made(kind: str, *, moved: bool = True, **settings: Any) -> Tuned:
    """A prefix on a tiny model, its tensors away from their start."""
    task_class = registry.load("tasks", "classify")
    task = task_class(
        task_class.Config(template="{text} it was {mask}", labels={"positive": "good", "negative": "very bad"})
    )
    backbone = tiny.backbone(kind)
    config = PrefixConfig(**{"num_virtual_tokens": 3, "encoder_hidden_size": 12, **settings})
    tuned = Tuned(backbone, task, Prefix(config, backbone.shape)).initialise(torch.Generator().manual_seed(1))
    source = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for group in tuned.trained() if moved else ():
            group.parameter.add_(0.3 * torch.randn(group.parameter.shape, generator=source))
    return tuned.train(False)


def by_cache(raw: Any, kind: str, prompt: Prompt, ids: list[int], decoder: list[int] | None = None) -> torch.Tensor:
    """Logits of one row: the bare model behind a cache that was filled by hand."""
    cache = transformers.DynamicCache(config=raw.config)
    for layer in range(prompt.kv.shape[1]):
        cache.update(prompt.kv[:, layer, 0], prompt.kv[:, layer, 1], layer)
    if decoder is None:
        return raw(input_ids=torch.tensor([ids]), past_key_values=cache).logits[0]
    pair = transformers.EncoderDecoderCache(cache, transformers.DynamicCache(config=raw.config))
    return raw(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([decoder]), past_key_values=pair).logits[0]


@causal
def test_a_prefix_that_starts_from_words_is_those_words(kind: str) -> None:
    backbone, raw = tiny.backbone(kind), tiny.model(kind)
    words = [7, 8, 9, 10]
    prompt = Prompt(kv=backbone.keys_values(torch.tensor(words)))
    given, answers = by_hand.texts(backbone), by_hand.candidates(backbone)
    scores = backbone.score(given, prompt, answers)
    for row in range(3):
        ids = by_hand.tokens(given, row)
        logits = raw(torch.tensor([[*words, *ids]])).logits[0, -1]
        torch.testing.assert_close(scores[row], logits[answers.ids[:, 0]], **by_hand.CLOSE)
    config = PrefixConfig(init="text", init_text="sky sea sun is", num_virtual_tokens=4)
    started = Tuned(backbone, None, Prefix(config, backbone.shape)).initialise(torch.Generator())
    ids = backbone.vocabulary.ids("sky sea sun is")
    torch.testing.assert_close(started.method.kv[None].detach(), backbone.keys_values(ids))


@causal
@both
def test_scores_and_gradients_equal_a_cache_filled_by_hand(kind: str, reparameterize: bool) -> None:
    tuned, raw = made(kind, reparameterize=reparameterize), tiny.model(kind)
    tuned.train(True)
    given = by_hand.texts(tuned.backbone)
    prompt, answers = tuned.prompt(given), by_hand.candidates(tuned.backbone)
    scores = tuned.backbone.score(given, prompt, answers)
    other = tuned.prompt(given)
    expected = torch.stack(
        [by_cache(raw, kind, other, by_hand.tokens(given, row))[-1][answers.ids[:, 0]] for row in range(3)]
    )
    torch.testing.assert_close(scores, expected, **by_hand.CLOSE)
    weights = torch.randn(scores.shape, generator=torch.Generator().manual_seed(2))
    mine = torch.autograd.grad((scores * weights).sum(), list(tuned.method.parameters()))
    theirs = torch.autograd.grad((expected * weights).sum(), list(tuned.method.parameters()))
    for one, two in zip(mine, theirs, strict=True):
        assert bool((two != 0).any())
        torch.testing.assert_close(one, two, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_of_an_encoder_decoder_it_stands_in_the_decoder(kind: str) -> None:
    tuned, raw = made(kind), tiny.model(kind)
    given, prompt = by_hand.texts(tuned.backbone), tuned.method.fold()
    answers = by_hand.candidates(tuned.backbone, "good", "very bad", "red")
    scores = tuned.backbone.score(given, prompt, answers)
    start = by_hand.start_of(tuned.backbone)
    for row, (number, words) in itertools.product(range(3), enumerate(([19], [26, 20], [6]))):
        own = answers.ids[number][answers.mask[number]].tolist()
        assert len(own) == len(words)
        logits = by_cache(raw, kind, prompt, by_hand.tokens(given, row), [*start, *own[:-1]])[len(start) - 1 :]
        expected = torch.log_softmax(logits, -1)[range(len(own)), own].mean()
        torch.testing.assert_close(scores[row, number], expected, **by_hand.CLOSE)


@writers
def test_rows_keep_to_themselves_whatever_stands_beside_them(kind: str) -> None:
    tuned = made(kind)
    backbone, given = tuned.backbone, by_hand.texts(tuned.backbone)
    answers = by_hand.candidates(backbone, "good", "very bad")
    prompts = [made(kind, num_virtual_tokens=5).method.fold(), tuned.method.fold(), Prompt(by_hand.rows(2)), Prompt()]
    apart = [backbone.score(given, prompt, answers) for prompt in prompts]
    if kind == "bart":  # its decoder counts positions from the longest prefix
        mixed = by_hand.replace(given, prompt_index=torch.tensor([0, 1, 0]))
        with pytest.raises(SiteError, match="put prompts of one length into a batch"):
            backbone.score(mixed, prompts, answers)
        prompts = [made(kind, init="text", init_text="sky").method.fold(), prompts[1]]
        apart = [backbone.score(given, prompt, answers) for prompt in prompts]
    for which in ([0, 1, 2], [3, 0, 1], [1, 3, 2]) if kind != "bart" else ([0, 1, 0], [1, 1, 0]):
        batch = by_hand.replace(given, prompt_index=torch.tensor(which))
        mixed = backbone.score(batch, prompts, answers)
        expected = torch.stack([apart[number][row] for row, number in enumerate(which)])
        torch.testing.assert_close(mixed, expected, **by_hand.CLOSE)
        written = backbone.generate(batch, prompts, max_new_tokens=5)
        alone = [
            backbone.generate(by_hand.one(given, row), prompts[number], max_new_tokens=5)[0]
            for row, number in enumerate(which)
        ]
        assert written == alone
    torch.testing.assert_close(backbone.score(by_hand.left(given), prompts[1], answers), apart[1], **by_hand.CLOSE)


@writers
def test_attached_to_the_hosts_model_it_runs_and_writes_the_same(kind: str) -> None:
    tuned, model, raw = made(kind), tiny.model(kind), tiny.model(kind)
    given, prompt = by_hand.texts(tuned.backbone), tuned.method.fold()
    given = given if kind == "gemma3" else by_hand.left(given)
    inputs = {"input_ids": given.input_ids, "attention_mask": given.attention_mask}
    pair = tiny.FAMILY[kind] == "seq2seq"
    more = {"decoder_input_ids": torch.tensor([[2, 5]] * 3)} if pair else {}
    with torch.no_grad(), tuned.attach(model):
        logits = model(**inputs, **more).logits
        single = by_hand.one(by_hand.texts(tuned.backbone), 0)
        alone = model.generate(single.input_ids, max_new_tokens=6, do_sample=False)
        beams = model.generate(single.input_ids, max_new_tokens=4, num_beams=3, num_return_sequences=2)
        rules = model.generate(single.input_ids, max_new_tokens=6, repetition_penalty=2.0)
        for option in ({"use_cache": False}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}):
            with pytest.raises(SiteError, match=f"leave {next(iter(option))} out"):
                model.generate(single.input_ids, max_new_tokens=2, **option)
    for row in range(3):
        ids = by_hand.tokens(given, row)
        expected = by_cache(raw, kind, prompt, ids, [2, 5] if pair else None)
        own = logits[row] if pair else logits[row][given.attention_mask[row].bool()]
        torch.testing.assert_close(own, expected, **by_hand.CLOSE)
    ids, answer, start = by_hand.tokens(given, 0), list[int](), [0] if kind == "t5" else [2]
    for _ in range(6):
        step = by_cache(raw, kind, prompt, ids if pair else [*ids, *answer], [*start, *answer] if pair else None)
        answer.append(int(step[-1].argmax()))
        if answer[-1] == 2:
            break
    begin = 1 if pair else len(ids)
    assert alone[0, begin:].tolist() == answer
    assert len(beams) == 2
    assert beams.shape[1] <= begin + 4
    assert rules.shape[1] > begin


@causal
def test_a_second_turn_and_chunks_on_a_cache_equal_the_whole(kind: str) -> None:
    tuned, model = made(kind), tiny.model(kind)
    ids = by_hand.one(by_hand.texts(tuned.backbone), 0).input_ids
    with torch.no_grad(), tuned.attach(model):
        whole = model(ids).logits
        mine = transformers.DynamicCache(config=model.config)
        first = model(ids[:, :4], past_key_values=mine)
        assert mine.get_seq_length() == 4 + 3
        second = model(ids[:, 4:], past_key_values=mine)
        turn = model.generate(ids, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True)
        history = torch.cat([turn.sequences, torch.tensor([[11, 12]])], dim=1)
        cached = model.generate(history, past_key_values=turn.past_key_values, max_new_tokens=4)
        fresh = model.generate(history, max_new_tokens=4)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, **by_hand.CLOSE)
    assert torch.equal(cached, fresh)


@causal
def test_in_a_loop_of_the_hosts_own_it_learns_and_checkpointing_is_refused(kind: str) -> None:
    model = tiny.model(kind)
    tuned = promptuary.adapt(model, tiny.tokenizer(), "prefix", num_virtual_tokens=3)
    coded = tiny.tokenizer()(["a red apple", "the sky is blue"], return_tensors="pt", padding=True)
    given = {"input_ids": coded.input_ids, "attention_mask": coded.attention_mask}
    labels = coded.input_ids.masked_fill(coded.attention_mask == 0, -100)
    losses = []
    with tuned.attach(train=True):
        optimizer = torch.optim.Adam(tuned.parameters(), lr=0.1)
        for _ in range(10):
            loss = model(**given, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0]
        model.gradient_checkpointing_enable()
        model.train()
        with pytest.raises(SiteError, match="gradient checkpointing of transformers drops the cache"):
            model(**given, labels=labels)


def test_in_a_sliding_window_texts_of_different_lengths_are_written_one_by_one_or_refused() -> None:
    tuned, model = made("gemma3"), tiny.model("gemma3")
    given = by_hand.left(by_hand.texts(tuned.backbone))
    inputs = {"input_ids": given.input_ids, "attention_mask": given.attention_mask}
    for call in (model, lambda **more: model.generate(**more, max_new_tokens=2)):
        with tuned.attach(model), pytest.raises(SiteError, match="would stand between a prompt of keys and values"):
            call(**inputs)
    with pytest.raises(SiteError, match="the prompt has 9 positions, but the model's sliding window 8"):
        made("gemma3", num_virtual_tokens=9)
    with pytest.raises(SiteError, match="the prompt has 8 positions, but the model's sliding window 8"):
        tuned.backbone.generate(given, Prompt(kv=torch.zeros(1, 2, 2, 2, 8, 8)), max_new_tokens=2)


@both
def test_count_and_budget_are_what_is_there(reparameterize: bool) -> None:
    shape = Shape(32, layers=2, heads=2, head=8)
    config = PrefixConfig(num_virtual_tokens=4, reparameterize=reparameterize, encoder_hidden_size=6)
    built = Prefix(config, shape)
    assert Prefix.count(config, shape) == sum(value.numel() for value in built.parameters())
    matched = Prefix.match_budget(config, 40, shape)
    assert Prefix.count(matched, shape) <= 40 * 32
    more = matched.model_copy(update={"num_virtual_tokens": matched.num_virtual_tokens + 1})
    assert Prefix.count(more, shape) > 40 * 32
    with pytest.raises(ConfigError, match="match_length 1 gives 32 parameters"):
        Prefix.match_budget(config, 1, shape)


@pytest.mark.parametrize("reparameterize", [False, True])
def test_saved_folded_and_loaded_it_predicts_the_same(reparameterize: bool, tmp_path: Path) -> None:
    tuned = made("llama", reparameterize=reparameterize)
    expected = tuned.predict(["a red apple", "the sea is not green"])
    promptuary.save_prompt(tuned, tmp_path / "prompt")
    again = promptuary.load_prompt(tmp_path / "prompt", tiny.backbone("llama"))
    assert again.predict(["a red apple", "the sea is not green"]) == expected
    folded = promptuary.checkpoint.files.read_tensors(tmp_path / "prompt" / "folded.safetensors", None)
    torch.testing.assert_close(folded["kv"][None], tuned.method.fold().kv)
    with pytest.raises(NotFoldable, match="keys and values of every layer"):
        tuned.method.fold().as_rows()


@pytest.mark.parametrize("kind", ["deberta", "modernbert"])
def test_models_without_a_place_for_it_say_so_by_name(kind: str) -> None:
    backbone = tiny.backbone(kind)
    with pytest.raises(SiteError, match=f"kv, for which {type(backbone.model).__name__} .* has no place"):
        Tuned(backbone, None, Prefix(PrefixConfig(), backbone.shape)).initialise(torch.Generator())


@pytest.mark.parametrize("kind", ["bert", "roberta", "minilm"])
@both
def test_in_an_encoder_it_is_computed_once_for_all_rows_and_steers_each(kind: str, reparameterize: bool) -> None:
    """One prefix whatever the batch; every part of it gets a gradient, and each row the scores that it gets alone."""
    tuned = made(kind, reparameterize=reparameterize).train(True)
    given, answers = by_hand.texts(tuned.backbone), by_hand.candidates(tuned.backbone)
    prompt = tuned.prompt(given)
    assert prompt.kv.shape == (1, 2, 2, 4, 3, 8)
    scores = tuned.backbone.score(given, prompt, answers)
    bare = tuned.backbone.score(given, Prompt(), answers)
    for row in range(3):
        alone = tuned.backbone.score(by_hand.one(given, row), prompt, answers)[0]
        torch.testing.assert_close(scores[row], alone, **by_hand.CLOSE)
        assert not torch.allclose(scores[row], bare[row])
    weights = torch.randn(scores.shape, generator=torch.Generator().manual_seed(2))
    gradients = torch.autograd.grad((scores * weights).sum(), list(tuned.method.parameters()))
    assert all(bool((part != 0).any()) for part in gradients)


def test_with_an_mlp_it_starts_as_the_mlp_says_and_folds_to_what_the_mlp_made() -> None:
    """KV = W_2 tanh(W_1 P' + b_1) + b_2, position by position, against torch's own layers."""
    tuned = made("bert", reparameterize=True)
    method, layers = tuned.method, torch.nn.Sequential(
        torch.nn.Linear(32, 12), torch.nn.Tanh(), torch.nn.Linear(12, 2 * 2 * 4 * 8)
    )  # fmt: skip
    with torch.no_grad():
        for layer, weight, bias in ((layers[0], method.w_1, method.b_1), (layers[2], method.w_2, method.b_2)):
            layer.weight.copy_(weight.T)
            layer.bias.copy_(bias)
        wanted = layers(method.tokens).view(3, 2, 2, 4, 8)
    torch.testing.assert_close(method.fold().kv[0], wanted.permute(1, 2, 3, 0, 4))


def test_rows_of_a_saved_prompt_are_no_prefix() -> None:
    backbone = tiny.backbone("llama")
    method = Prefix(PrefixConfig(init="saved"), backbone.shape)
    with pytest.raises(ConfigError, match="cannot start from saved rows"):
        Tuned(backbone, None, method).initialise(torch.Generator())


def test_two_prefixes_by_name_on_one_model() -> None:
    prompts, model = {"a": made("llama"), "b": made("llama", num_virtual_tokens=5)}, tiny.model("llama")
    given = by_hand.left(by_hand.texts(prompts["a"].backbone))
    with torch.no_grad(), attach(prompts, model):
        mixed = model(given.input_ids, attention_mask=given.attention_mask, prompt_names=["b", "a", "b"]).logits
    for row, name in enumerate(["b", "a", "b"]):
        alone = by_hand.one(by_hand.texts(prompts["a"].backbone), row)
        with torch.no_grad(), prompts[name].attach(model):
            own = model(alone.input_ids).logits[0]
        torch.testing.assert_close(mixed[row, -len(own) :], own, **by_hand.CLOSE)


@both
def test_a_look_inside_shows_how_large_keys_and_values_are(reparameterize: bool, tmp_path: Path) -> None:
    tuned = made("llama", reparameterize=reparameterize)
    kv = tuned.method.fold().kv[0]
    told = tuned.method.insight()
    torch.testing.assert_close(told["norms of keys"], kv[:, 0].transpose(1, 2).flatten(2).norm(dim=-1))
    torch.testing.assert_close(told["norms of values"], kv[:, 1].transpose(1, 2).flatten(2).norm(dim=-1))
    assert look.describe(tuned)["rows"] == []
    assert look.picture(tuned, tmp_path / "prefix.png").stat().st_size > 1000
