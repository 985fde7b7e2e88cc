"""A prompt on the host's own model: its `forward` and `generate` take and give text positions only.

Knows no training loop; the tuned object is built from its parts.
"""

from __future__ import annotations

from typing import Any

import handmade as by_hand
import pytest
import torch

import tiny
from promptuary import registry
from promptuary.building import build_method
from promptuary.errors import FingerprintError, SiteError
from promptuary.tuned import Tuned
from promptuary.types import ANSWER, Batch

TEMPLATE = "{text} it was {mask}"
METHODS: dict[str, dict[str, Any]] = {
    "prompt_tuning": {"num_virtual_tokens": 3},
    "dept": {"num_virtual_tokens": 3, "rank": 2, "max_tokens": 32},
}
every = pytest.mark.parametrize("kind", by_hand.KINDS)
writers = pytest.mark.parametrize("kind", by_hand.WRITERS)
both_methods = pytest.mark.parametrize("method", list(METHODS))


def tuned(kind: str, method: str = "dept", **settings: Any) -> Tuned:
    """A tuned tiny model whose tensors are all random, not at their starting values."""
    task_class = registry.load("tasks", "classify")
    task = task_class(task_class.Config(template=TEMPLATE, labels={"positive": "good", "negative": "bad"}))
    backbone = tiny.backbone(kind)
    config = registry.load("methods", method).Config(name=method, **{**METHODS[method], **settings})
    made = Tuned(backbone, task, build_method(config, backbone.shape))
    source = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for group in made.trained():
            group.parameter.copy_(torch.randn(group.parameter.shape, generator=source))
    return made.train(False)


def inputs(given: Batch) -> dict[str, torch.Tensor]:
    """What a user gives to a transformers model."""
    return {"input_ids": given.input_ids, "attention_mask": given.attention_mask}


def decoder(kind: str, given: Batch) -> dict[str, torch.Tensor]:
    """Decoder input where one is needed."""
    start = torch.full((len(given), 1), 0 if kind == "t5" else 2)
    return {"decoder_input_ids": start} if tiny.FAMILY[kind] == "seq2seq" else {}


@every
@both_methods
def test_forward_gives_text_positions_that_equal_the_backbones_own(kind: str, method: str) -> None:
    made, model = tuned(kind, method), tiny.model(kind)
    backbone, prompt = made.backbone, made.method.fold()
    given = by_hand.texts(backbone)
    answers = by_hand.candidates(backbone)
    for batch in (given, by_hand.left(given)):
        with torch.no_grad(), made.attach(model) as attached:
            assert attached is model
            output = model(**inputs(batch), **decoder(kind, batch))
        if tiny.FAMILY[kind] == "seq2seq":
            assert output.logits.shape[1] == 1
            if kind == "t5":  # BART's answer begins behind a second start token
                scores = output.logits[:, 0, answers.ids[:, 0]]
                torch.testing.assert_close(scores, backbone.score(batch, prompt, answers).detach(), **by_hand.CLOSE)
            states = backbone.hidden(batch, prompt).detach()
            mask = batch.attention_mask.bool()
            rows = 0 if prompt.rows is None else prompt.length
            assert output.encoder_last_hidden_state.shape[1] == batch.input_ids.shape[1] + rows
            if batch is given:
                torch.testing.assert_close(
                    output.encoder_last_hidden_state[:, rows:][mask], states[mask], **by_hand.CLOSE
                )
            continue
        if tiny.FAMILY[kind] == "encoder":
            mask = batch.attention_mask.bool()
            expected = backbone.hidden(batch, prompt).detach()
            torch.testing.assert_close(output.last_hidden_state[mask], expected[mask], **by_hand.CLOSE)
            continue
        assert output.logits.shape == (*batch.input_ids.shape, tiny.SIZE)
        picked = output.logits[torch.arange(3), batch.slots[ANSWER]][:, answers.ids[:, 0]]
        torch.testing.assert_close(picked, backbone.score(batch, prompt, answers).detach(), **by_hand.CLOSE)


@writers
@both_methods
def test_generate_gives_the_text_and_what_the_backbone_writes(kind: str, method: str) -> None:
    made, model = tuned(kind, method), tiny.model(kind)
    prompt, given = made.method.fold(), by_hand.left(by_hand.texts(made.backbone))
    expected = made.backbone.generate(given, prompt, max_new_tokens=6)
    start = {} if kind != "bart" else {"decoder_input_ids": torch.tensor([[2, 1]] * 3)}
    with made.attach(model):
        written = model.generate(**inputs(given), max_new_tokens=6, do_sample=False, **start)
        first = model.generate(given.input_ids, attention_mask=given.attention_mask, max_new_tokens=6, **start)
        answer = model.generate(**inputs(given), max_new_tokens=6, return_dict_in_generate=True, **start)
        several = model.generate(**inputs(given), max_new_tokens=2, num_beams=3, num_return_sequences=2, **start)
    assert torch.equal(written, first)
    assert torch.equal(written, answer.sequences)
    assert int(written.max()) < tiny.SIZE
    assert len(several) == 6
    begin = 0
    if tiny.FAMILY[kind] == "causal":
        begin = given.input_ids.shape[1]
        assert torch.equal(written[:, :begin], given.input_ids)
        assert torch.equal(several[:, :begin], given.input_ids.repeat_interleave(2, 0))
    skip = {0} if tiny.FAMILY[kind] == "causal" else {0, *by_hand.start_of(made.backbone)}
    for row, words in zip(written.tolist(), expected, strict=True):
        behind = row[begin + len(by_hand.start_of(made.backbone)) :]
        stop = behind.index(2) if 2 in behind else len(behind)
        assert [token for token in behind[:stop] if token not in skip] == words


@pytest.mark.parametrize("kind", by_hand.CAUSAL)
def test_lengths_that_a_user_gives_count_text_and_answer_only(kind: str) -> None:
    made, model = tuned(kind), tiny.model(kind)
    given = by_hand.left(by_hand.texts(made.backbone))
    width = given.input_ids.shape[1]
    with made.attach(model):
        config = model.generation_config
        written = model.generate(**inputs(given), max_length=width + 4, min_length=width + 4)
        again = model.generate(given.input_ids, config, attention_mask=given.attention_mask, max_new_tokens=4)
    assert written.shape == (3, width + 4)
    same = min(written.shape[1], again.shape[1])
    for row in range(3):
        end = (again[row, width:same] == 2).nonzero()
        if len(end) == 0:
            assert torch.equal(written[row, :same], again[row, :same])


@pytest.mark.parametrize("kind", [k for k in by_hand.KINDS if tiny.FAMILY[k] in ("causal", "masked")])
@pytest.mark.parametrize("with_mask", [True, False])
def test_labels_in_the_users_own_loop_give_the_loss_by_hand(kind: str, with_mask: bool) -> None:
    made, model, raw = tuned(kind, "prompt_tuning"), tiny.model(kind), tiny.model(kind)
    prompt, given = made.method.fold(), by_hand.texts(made.backbone)
    given = given if with_mask else by_hand.one(given, 0)
    labels = torch.full_like(given.input_ids, -100)
    for row in range(len(given)):
        labels[row, 1:4] = torch.tensor([7, 8, 9])
    noisy = labels.masked_fill(given.attention_mask == 0, 5)  # a label on padding never counts
    losses, shift = [], int(tiny.FAMILY[kind] == "causal")
    for row in range(len(given)):
        ids = by_hand.tokens(given, row)
        logits = raw(inputs_embeds=by_hand.prompted(raw, ids, prompt)).logits[0, prompt.length :]
        behind = logits[1 - shift : 4 - shift]
        losses.append(torch.nn.functional.cross_entropy(behind, labels[row, 1:4], reduction="sum"))
    expected = torch.stack(losses).sum() / (3 * len(given))
    more = {} if not with_mask else {"attention_mask": given.attention_mask}
    with made.attach(model):
        for written in (labels, noisy):
            output = model(input_ids=given.input_ids, labels=written, **more)
            torch.testing.assert_close(output.loss, expected, **by_hand.CLOSE)
            assert output.logits.shape[1] == given.input_ids.shape[1]


@pytest.mark.parametrize("kind", by_hand.SEQ2SEQ)
def test_labels_of_an_encoder_decoder_are_its_targets(kind: str) -> None:
    made, model, raw = tuned(kind), tiny.model(kind), tiny.model(kind)
    prompt, given = made.method.fold(), by_hand.texts(made.backbone)
    labels = torch.tensor([[7, 8, 2], [9, 2, -100], [10, 11, 2]])
    losses = []
    for row in range(3):
        embedded = by_hand.prompted(raw, by_hand.tokens(given, row), prompt)
        own = labels[row : row + 1][:, labels[row] != -100]
        losses.append(raw(inputs_embeds=embedded, labels=own).loss * own.numel())
    with made.attach(model):
        loss = model(**inputs(given), labels=labels).loss
    torch.testing.assert_close(loss, torch.stack(losses).sum() / 8, **by_hand.CLOSE)


@every
def test_after_the_block_the_model_is_its_own_again(kind: str) -> None:
    made, model = tuned(kind), tiny.model(kind)
    given = by_hand.texts(made.backbone)
    names, modules = dict(model.__dict__), [id(module) for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        output = model(**inputs(given), **decoder(kind, given))[0]
        model.train()
        for _ in range(2):
            with made.attach(model):
                inside = model(**inputs(given), **decoder(kind, given))[0]
        with pytest.raises(RuntimeError, match="on purpose"), made.attach(model):
            raise RuntimeError("on purpose")
        assert model.training
        assert all(parameter.requires_grad for parameter in model.parameters())
        again = model.eval()(**inputs(given), **decoder(kind, given))[0]
    assert torch.equal(again, output)
    assert inside.shape == output.shape
    assert not torch.allclose(inside, output)
    assert set(model.__dict__) == set(names)
    assert "forward" not in model.__dict__
    assert "generate" not in model.__dict__
    assert model.forward.__func__ is type(model).forward
    assert [id(module) for module in model.modules()] == modules
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@every
def test_another_base_is_refused_untouched(kind: str) -> None:
    made, other = tuned(kind), tiny.model(kind, seed=1)
    table = other.get_input_embeddings()
    with pytest.raises(FingerprintError, match=r"embedding, (vectors, )?matrices"), made.attach(other):
        pass
    assert other.get_input_embeddings() is table
    assert "forward" not in other.__dict__
    assert all(parameter.requires_grad for parameter in other.parameters())


def test_a_thread_attaches_one_thing_at_a_time() -> None:
    made, other = tuned("llama"), tuned("llama")
    model = tiny.model("llama")
    with made.attach(model), pytest.raises(SiteError, match="already carries a prompt"), other.attach(model):
        pass
    assert "forward" not in model.__dict__
    assert type(model.get_input_embeddings()) is torch.nn.Embedding


def test_the_prompt_that_is_attached_does_not_follow_further_training() -> None:
    made, model = tuned("bert"), tiny.model("bert")
    given = by_hand.texts(made.backbone)
    with torch.no_grad(), made.attach(model):
        before = model(**inputs(given)).logits
        for group in made.trained():
            group.parameter.mul_(2)
        assert torch.equal(model(**inputs(given)).logits, before)
    with torch.no_grad(), made.attach(model):
        assert not torch.allclose(model(**inputs(given)).logits, before)
