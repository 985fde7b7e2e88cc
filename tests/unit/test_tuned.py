"""A backbone, a method and a task together: what fits, what is refused, and what is learnt is what was meant.

Knows no files.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
import toy
from promptuary import match_budget, registry
from promptuary.building import build_method
from promptuary.config import load_run
from promptuary.errors import ConfigError, DataError, FingerprintError, NotFoldable, SiteError
from promptuary.testing.case import case_of
from promptuary.testing.facts import families_of
from promptuary.tuned import Tuned
from promptuary.types import Prompt

EXAMPLES = toy.rows(6, seed=2)


def tuned(where: Path, family: str, task: str = "classify_words", **changes: Any) -> Tuned:
    values = toy.settings(where, family, task)
    values["task"].update(changes)
    run = load_run(values)
    backbone = tiny.backbone(family)
    made = registry.load("tasks", run.task.name)(run.task, EXAMPLES)
    return Tuned(backbone, made, build_method(run.method, backbone.shape)).initialise(torch.Generator().manual_seed(1))


# ---- what fits ------------------------------------------------------------------------------------------------------

REFUSED = {
    "masked models do not write": ("masked", "generate", {}, "which the masked family cannot do"),
    "encoders do not write": ("encoder", "generate", {}, "which the encoder family cannot do"),
    "text behind the answer": ("causal", "classify_words", {"template": "{text} is {mask} ."}, "answers at the end"),
    "the same for seq2seq": ("seq2seq", "choose", {"template": "{mask} {text}"}, "answers at the end"),
    "no mask": ("masked", "classify_words", {"template": "{text}"}, 'put "{mask}" into task.template'),
    "no mask for choices": ("masked", "choose", {"template": "{text}"}, 'put "{mask}" into task.template'),
    "same tokens": ("causal", "classify_words", {"labels": {"a": "zebra", "b": "yak"}}, "'zebra' and 'yak'"),
    "same tokens in words": ("masked", "regress_words", {"words": ["good", "good"]}, "'good' and 'good'"),
}


@pytest.mark.parametrize(("family", "task", "changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_work_is_refused_in_one_line(
    family: str, task: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        tuned(tmp_path, family, task, **changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_only_masked_models_may_have_text_behind_the_answer(family: str, tmp_path: Path) -> None:
    if family == "masked":
        assert tuned(tmp_path, family, template="{text} is {mask} .").predict(["a cat"])[0].answer
        return
    with pytest.raises(ConfigError, match="answers at the end"):
        tuned(tmp_path, family, template="{text} is {mask} .")


def test_a_head_needs_no_mask(tmp_path: Path) -> None:
    made = tuned(tmp_path, "masked", "classify_head", template="{text}")
    assert made.trainable_parameters == 3 * tiny.WIDTH + 2 * tiny.WIDTH + 2


# ---- what is learnt -------------------------------------------------------------------------------------------------


def plain_scores(made: Tuned, family: str, text: str) -> torch.Tensor:
    """Logits of the whole vocabulary at the answer, from `inputs_embeds` by hand on a model that carries no prompt."""
    backbone, model = made.backbone, tiny.model(tiny.FAMILIES[family])
    assert made.method is not None
    specials = {"causal": "<s> {}", "seq2seq": "{} </s>", "masked": "<s> {} <mask> </s>"}[family]
    words = specials.format(f"{text} it was").split()
    ids = torch.tensor([backbone.tokenizer.convert_tokens_to_ids(words)])
    embedded = model.get_input_embeddings()(ids)
    together = torch.cat([made.method.rows[None], embedded], dim=1)
    if family == "seq2seq":
        return model(inputs_embeds=together, decoder_input_ids=torch.zeros(1, 1, dtype=torch.long)).logits[0, -1]
    return model(inputs_embeds=together).logits[0, {"causal": -1, "masked": -2}[family]]


@pytest.mark.parametrize("family", ["causal", "seq2seq", "masked"])
def test_label_words_equal_the_plain_full_vocabulary_in_loss_and_gradient(family: str, tmp_path: Path) -> None:
    made = tuned(tmp_path, family).train(True)
    assert made.method is not None
    fast = made.loss(made.batch(made.rows(EXAMPLES, labelled=True))).total
    fast.backward()
    gradient = made.method.rows.grad.clone()
    made.method.rows.grad = None
    words = made.backbone.tokenizer.convert_tokens_to_ids(["good", "bad"])
    total = torch.zeros(())
    for example in EXAMPLES:
        logits = plain_scores(made, family, example["text"])[words]
        total = total + torch.nn.functional.cross_entropy(
            logits[None], torch.tensor([example["label"] == "negative"]).long()
        )
    slow = total / len(EXAMPLES)
    slow.backward()
    assert fast.item() == pytest.approx(slow.item(), rel=1e-5)
    assert gradient.abs().max() > 1e-3
    assert torch.allclose(gradient, made.method.rows.grad, atol=1e-5 * float(gradient.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("family", ["causal", "seq2seq"])
def test_written_answers_pay_for_every_token_and_the_end(family: str, tmp_path: Path) -> None:
    made = tuned(tmp_path, family, "generate").train(True)
    rows = made.rows(EXAMPLES, labelled=True)
    tokenizer, end = made.backbone.tokenizer, made.backbone.tokenizer.eos_token_id
    good, *bad_dog = tokenizer.convert_tokens_to_ids(["good", "bad", "dog"])
    assert [row.target_ids for row in rows[:2]] == [(good, end), (*bad_dog, end)]
    batch = made.batch(rows)
    assert made.weight(batch) == 3 * 2 + 3 * 3
    losses = [made.loss(made.batch([row])).total.item() for row in rows]
    weighted = sum(loss * size for loss, size in zip(losses, [2, 3] * 3, strict=True)) / made.weight(batch)
    assert made.loss(batch).total.item() == pytest.approx(weighted, rel=1e-5)


def test_a_long_answer_is_cut_and_still_ends(tmp_path: Path) -> None:
    made = tuned(tmp_path, "seq2seq", "generate")
    row = made.rows([{"text": "a cat", "target": "one two three four five"}], labelled=True)[0]
    assert row.target_ids is not None
    assert len(row.target_ids) == 3 + 1
    assert row.target_ids[-1] == made.backbone.tokenizer.eos_token_id


@pytest.mark.parametrize("family", ["causal", "seq2seq", "masked"])
def test_a_label_of_several_words_scores_its_mean_log_probability(family: str, tmp_path: Path) -> None:
    made = tuned(tmp_path, family, labels={"positive": "very good", "negative": "bad"})
    scores = made.scores(made.batch(made.rows(EXAMPLES, labelled=True)))
    assert scores.shape == (6, 2)
    assert bool(scores.isfinite().all())
    assert bool((scores < 0).all())
    logits = plain_scores(made, family, EXAMPLES[1]["text"])
    bad = made.backbone.tokenizer.convert_tokens_to_ids("bad")
    assert scores[1, 1].item() == pytest.approx(torch.log_softmax(logits, 0)[bad].item(), abs=1e-4)


# ---- examples -------------------------------------------------------------------------------------------------------


def test_plain_texts_are_the_only_field(tmp_path: Path) -> None:
    made = tuned(tmp_path, "encoder")
    assert made.predict(["a red cat"]) == made.predict([{"text": "a red cat"}])
    assert made.predict([]) == []


def test_a_wrong_example_is_named_by_its_row(tmp_path: Path) -> None:
    with pytest.raises(DataError, match='example 2: .*no field "text"') as caught:
        tuned(tmp_path, "causal").predict([{"text": "x"}, {"txt": "y"}])
    assert "\n" not in str(caught.value)


# ---- parts ----------------------------------------------------------------------------------------------------------


def test_without_a_method_it_is_the_frozen_model(tmp_path: Path) -> None:
    made = tuned(tmp_path, "causal")
    zero = Tuned(made.backbone, made.task)
    batch = zero.batch(zero.rows(EXAMPLES, labelled=True))
    assert (zero.trainable_parameters, zero.added_tokens, zero.state()) == (0, 0, {})
    assert made.asking.words is not None
    assert torch.equal(zero.scores(batch), made.backbone.score(batch, Prompt(), made.asking.words))
    assert not torch.equal(zero.scores(batch), made.scores(batch))


def test_restoring_a_state_restores_the_answers(tmp_path: Path) -> None:
    made = tuned(tmp_path, "masked")
    state, before = made.state(), made.predict(EXAMPLES)
    made.initialise(torch.Generator().manual_seed(9))
    assert made.predict(EXAMPLES) != before
    made.restore(state)
    assert made.predict(EXAMPLES) == before


def test_a_state_is_a_copy(tmp_path: Path) -> None:
    made = tuned(tmp_path, "masked", "classify_head")
    state = made.state()
    before = {name: value.clone() for name, value in state.items()}
    with torch.no_grad():
        for group in made.trained():
            group.parameter.add_(1)
    assert all(torch.equal(state[name], value) for name, value in before.items())


@pytest.mark.parametrize("family", ["causal", "seq2seq"])
def test_attaching_to_the_users_own_model_predicts_the_same_and_leaves_it_as_it_was(
    family: str, tmp_path: Path
) -> None:
    made = tuned(tmp_path, family, "generate")
    model = tiny.model(tiny.FAMILIES[family])
    row = made.rows(EXAMPLES[:1], labelled=False)[0]
    ids = torch.tensor([row.encoded.ids])
    plain = model.generate(ids, max_new_tokens=3, do_sample=False)
    with made.attach(model):
        written = model.generate(ids, max_new_tokens=3, do_sample=False)
    ours = made.predict(EXAMPLES[:1])[0].answer
    new = written[0, ids.shape[1] :] if family == "causal" else written[0]
    assert made.backbone.tokenizer.decode(new, skip_special_tokens=True).strip() == ours
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), plain)


def test_attaching_to_another_base_or_twice_is_refused(tmp_path: Path) -> None:
    made = tuned(tmp_path, "causal")
    other = tiny.model("llama", seed=5)
    with pytest.raises(FingerprintError), made.attach(other):
        pass
    with made.attach(made.backbone.model), pytest.raises(SiteError, match="already carries a prompt"), made.attach():
        pass
    with pytest.raises(NotFoldable), Tuned(made.backbone, made.task).attach(tiny.model("llama")):
        pass


@pytest.mark.parametrize(("name", "family"), [("vpt", "vision"), ("coop", "dual")])
def test_a_prompt_for_images_cannot_be_attached(name: str, family: str, tmp_path: Path) -> None:
    made = case_of(registry.load("methods", name), family, tmp_path).tuned()
    with pytest.raises(SiteError, match="use predict"), made.attach():
        pass


@pytest.mark.parametrize("method", registry.names("methods"))
def test_equal_budgets_never_exceed_the_prompt_that_is_compared_with(method: str) -> None:
    found = registry.load("methods", method)
    settings = dict(found.tiny)
    # 300 rows: PRE's LSTM alone is as large as 200
    shape = replace(tiny.backbone(families_of(found)[0]).shape, classes=3)
    config = match_budget(method, 300, shape, **settings)
    made = build_method(config, shape)
    assert (made.text is None) <= sum(parameter.numel() for parameter in made.parameters()) <= 300 * 32
    direct = build_method(type(config).read({"name": method, **settings, "match_length": 300}, where="method"), shape)
    assert [p.shape for p in direct.parameters()] == [p.shape for p in made.parameters()]


def test_a_wrong_setting_of_a_budget_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown field method.rnak"):
        match_budget("lamp", 100, 32, rnak=3)
    with pytest.raises(ConfigError, match="no such method"):
        match_budget("lmap", 100, 32)


@pytest.mark.parametrize("family", ["causal", "seq2seq", "masked", "encoder"])
def test_a_text_runs_once_for_its_states_and_that_of_its_answer(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the answer is read among the text; the state is what it is when it is asked for alone."""
    found, kept = list[Any](), list[int]()
    for needs in ({"answer"}, {"answer", "states"}):
        made = tuned(tmp_path, family)
        monkeypatch.setattr(type(made.method), "needs", frozenset(needs))
        before = len(made.backbone.kept)
        found.append(made.view(made.batch(made.rows(EXAMPLES, labelled=False))).answer)
        kept.append(len(made.backbone.kept) - before)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert kept == [len(EXAMPLES), len(EXAMPLES) * (2 if family == "seq2seq" else 1)]
