"""Prompts among tokens: virtual ids against concatenated embeddings, padding, mixed prompts, placements and offsets.

Knows no method or task.
"""

from __future__ import annotations

import threading
import warnings
from dataclasses import replace
from typing import Any

import handmade as by_hand
import pytest
import torch

import tiny
from promptuary.backbones.inject import Wiring
from promptuary.errors import DataError, SiteError
from promptuary.types import ANSWER, Piece, Prompt

KINDS = by_hand.KINDS
both_prompts = pytest.mark.parametrize("parts", list(by_hand.PROMPTS))
every = pytest.mark.parametrize("kind", KINDS)


def leaves(prompt: Prompt) -> list[torch.Tensor]:
    """The trained tensors of a prompt."""
    table = [] if prompt.offset is None else [prompt.offset.left, prompt.offset.right]
    return ([] if prompt.rows is None else [prompt.rows]) + table


@every
@both_prompts
def test_virtual_ids_equal_concatenated_embeddings_and_so_do_gradients(kind: str, parts: str) -> None:
    backbone, raw = tiny.backbone(kind), tiny.model(kind)
    ours, theirs = by_hand.PROMPTS[parts](), by_hand.PROMPTS[parts]()
    given = by_hand.texts(backbone)
    found = backbone.hidden(given, ours)
    assert found.shape == (*given.input_ids.shape, tiny.WIDTH)  # text positions only
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(3))
    loss, expected = (found * weights)[given.attention_mask.bool()].sum(), torch.tensor(0.0)
    for row in range(len(given)):
        ids = by_hand.tokens(given, row)
        alone = by_hand.states(raw, kind, by_hand.prompted(raw, ids, theirs))[0, theirs.length :]
        torch.testing.assert_close(found[row, : len(ids)], alone, **by_hand.CLOSE)
        expected = expected + (alone * weights[row, : len(ids)]).sum()
    loss.backward()
    expected.backward()
    for mine, reference in zip(leaves(ours), leaves(theirs), strict=True):
        assert reference.grad.abs().max() > 0
        torch.testing.assert_close(mine.grad, reference.grad, atol=2e-4, rtol=1e-3)


@every
def test_without_a_prompt_the_model_is_itself(kind: str) -> None:
    backbone, raw = tiny.backbone(kind), tiny.model(kind)
    given = by_hand.texts(backbone)
    for row in range(len(given)):
        ids = by_hand.tokens(given, row)
        alone = by_hand.states(raw, kind, by_hand.embed(raw, list(ids)))[0]
        torch.testing.assert_close(backbone.hidden(given, Prompt())[row, : len(ids)], alone, **by_hand.CLOSE)


@every
@both_prompts
def test_left_and_right_padding_give_the_same_scores(kind: str, parts: str) -> None:
    backbone, prompt = tiny.backbone(kind), by_hand.PROMPTS[parts]()
    given, answers = by_hand.texts(backbone), by_hand.candidates(backbone)
    right = backbone.score(given, prompt, answers)
    torch.testing.assert_close(backbone.score(by_hand.left(given), prompt, answers), right, **by_hand.CLOSE)
    pooled = backbone.pooled(given, prompt)
    torch.testing.assert_close(backbone.pooled(by_hand.left(given), prompt), pooled, **by_hand.CLOSE)


@every
@both_prompts
def test_a_row_of_a_batch_equals_that_row_alone_and_order_is_irrelevant(kind: str, parts: str) -> None:
    backbone, prompt = tiny.backbone(kind), by_hand.PROMPTS[parts]()
    given, answers = by_hand.texts(backbone), by_hand.candidates(backbone)
    scores = backbone.score(given, prompt, answers)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(backbone.score(given.rows(order), prompt, answers), scores[order], **by_hand.CLOSE)
    for row in range(len(given)):
        alone = backbone.score(by_hand.one(given, row), prompt, answers)
        torch.testing.assert_close(alone[0], scores[row], **by_hand.CLOSE)


@every
def test_mixed_prompts_in_one_batch_equal_separate_runs(kind: str) -> None:
    backbone = tiny.backbone(kind)
    prompts = [
        Prompt(by_hand.rows(2)),
        Prompt(by_hand.rows(5, seed=4), by_hand.offset()),
        Prompt(),
        Prompt(offset=by_hand.offset(7, seed=8, overflow="clamp")),
        Prompt(by_hand.rows(1, seed=6), placement="after_bos"),
        Prompt(by_hand.rows(5, seed=9, many=5)),
    ]
    given, answers = by_hand.texts(backbone, [*by_hand.TEXTS, "one two", "no"]), by_hand.candidates(backbone)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        apart = torch.stack([backbone.score(given, prompt, answers) for prompt in prompts])
        for which in ([0, 1, 2, 3, 4], [5, 4, 3, 2, 1], [1, 1, 5, 5, 0]):
            mixed = replace(given, prompt_index=torch.tensor(which))
            found = backbone.score(mixed, prompts, answers)
            torch.testing.assert_close(found, apart[which, torch.arange(5)], **by_hand.CLOSE)
            phrases = by_hand.candidates(backbone, "good", "not bad", "very very red")
            separate = torch.stack([backbone.score(given, prompt, phrases) for prompt in prompts])
            found = backbone.score(by_hand.left(mixed), prompts, phrases)
            torch.testing.assert_close(found, separate[which, torch.arange(5)], **by_hand.CLOSE)


@every
def test_rows_per_example_equal_single_runs(kind: str) -> None:
    backbone = tiny.backbone(kind)
    given, own = by_hand.texts(backbone), by_hand.rows(4, many=3)
    for answers in (by_hand.candidates(backbone), by_hand.candidates(backbone, "good", "not bad")):
        scores = backbone.score(given, Prompt(own), answers)
        for row in range(3):
            alone = backbone.score(by_hand.one(given, row), Prompt(own[row : row + 1]), answers)
            torch.testing.assert_close(alone[0], scores[row], **by_hand.CLOSE)


def test_rows_for_another_number_of_examples_are_refused() -> None:
    backbone = tiny.backbone("llama")
    with pytest.raises(SiteError, match="rows for 2 inputs, the batch has 3"):
        backbone.hidden(by_hand.texts(backbone), Prompt(by_hand.rows(1, many=2)))


SLOTTED = [
    Piece("fixed", "the "),
    Piece("slot", "prompt_a"),
    Piece("field", "red apple"),
    Piece("slot", "prompt_b"),
    Piece("slot", ANSWER),
]


@every
@pytest.mark.parametrize("side", ["left", "right"])
def test_placements_equal_a_hand_built_sequence(kind: str, side: Any) -> None:
    backbone, raw = tiny.backbone(kind), tiny.model(kind)
    longer = [replace(piece, value="a big old blue plum") if piece.role == "field" else piece for piece in SLOTTED]
    given, vectors = by_hand.batch(backbone, [SLOTTED, longer]), by_hand.rows(3)
    first = len(backbone.prefix)
    for row, fruit in enumerate((2, 5)):
        ids = by_hand.tokens(given, row)
        text_end = first + 1 + fruit
        cuts = {
            "front": [0, 0, 0],
            "after_bos": [first, first, first],
            (("prompt_a", 1), ("prompt_b", 2)): [first + 1, text_end, text_end],
        }
        for placement, before in cuts.items():
            sequence: list[Any] = list(ids)
            for number in (2, 1, 0):
                sequence.insert(before[number], vectors[0, number])
            expected = by_hand.states(raw, kind, by_hand.embed(raw, sequence))[0]
            texts = [column for column, item in enumerate(sequence) if isinstance(item, int)]
            prompt = Prompt(vectors, placement=placement)
            for batch in (given, by_hand.left(given)):
                found = backbone.hidden(batch, prompt)[row][batch.attention_mask[row].bool()]
                torch.testing.assert_close(found, expected[texts], **by_hand.CLOSE)
            placed = backbone.place(given, prompt, side)
            real = placed.input_ids[row][placed.attention_mask[row].bool()].tolist()
            virtual = [tiny.SIZE + number for number in range(3)]
            by_id = list(ids)
            for number in (2, 1, 0):
                by_id.insert(before[number], virtual[number])
            assert real == by_id
            assert bool(placed.attention_mask[:, 0 if side == "right" else -1].all())


@every
@pytest.mark.parametrize("side", ["left", "right", "keep"])
def test_places_may_be_named_in_any_order(kind: str, side: Any) -> None:
    backbone, vectors = tiny.backbone(kind), by_hand.rows(4)
    longer = [replace(piece, value="a big old blue plum") if piece.role == "field" else piece for piece in SLOTTED]
    given = by_hand.batch(backbone, [SLOTTED, longer])
    mixed = Prompt(vectors, placement=(("prompt_b", 2), ("front", 1), ("prompt_a", 1)))
    ordered = Prompt(vectors[:, [2, 3, 0, 1]], placement=(("front", 1), ("prompt_a", 1), ("prompt_b", 2)))
    found, wanted = backbone.hidden(given, mixed), backbone.hidden(given, ordered)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    one, two = (backbone.place(given, prompt, side) for prompt in (mixed, ordered))
    same_row = torch.cat([torch.arange(tiny.SIZE), tiny.SIZE + torch.tensor([2, 3, 0, 1])])
    assert torch.equal(one.input_ids, same_row[two.input_ids])
    for name in ("attention_mask", "columns", "ahead"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name


def test_a_slot_that_the_template_lacks_is_refused() -> None:
    backbone = tiny.backbone("llama")
    prompt = Prompt(by_hand.rows(2), placement=(("prompt", 2),))
    with pytest.raises(SiteError, match=r'slot "\{prompt\}" that the template does not have'):
        backbone.hidden(by_hand.texts(backbone), prompt)


@every
def test_offset_beyond_the_table(kind: str) -> None:
    backbone, raw = tiny.backbone(kind), tiny.model(kind)
    given = by_hand.texts(backbone)
    ids = by_hand.tokens(given, 0)
    table = by_hand.offset(4).table()
    last = {"zero": torch.zeros(1, tiny.WIDTH), "clamp": table[3:]}
    for overflow, beyond in last.items():
        added = torch.cat([table, beyond.expand(len(ids) - 4, -1)])
        expected = by_hand.states(raw, kind, by_hand.embed(raw, list(ids)) + added)[0]
        with pytest.warns(UserWarning, match="the offset table has 4 rows") as caught:
            found = backbone.hidden(given, Prompt(offset=by_hand.offset(4, overflow=overflow)))
        assert len(caught) == 1
        torch.testing.assert_close(found[0, : len(ids)], expected, **by_hand.CLOSE)
    with pytest.raises(DataError, match=f"a text has {len(ids)} tokens but the offset table 4 rows"):
        backbone.hidden(given, Prompt(offset=by_hand.offset(4, overflow="error")))


def test_a_text_that_fits_the_table_is_silent_although_its_batch_is_wider() -> None:
    backbone = tiny.backbone("bert")
    given = by_hand.texts(backbone)
    wide = replace(
        given,
        input_ids=torch.cat([torch.zeros(3, 20, dtype=torch.long), given.input_ids], dim=1),
        attention_mask=torch.cat([torch.zeros(3, 20, dtype=torch.long), given.attention_mask], dim=1),
        segment_ids=None,
        slots={name: at + 20 for name, at in given.slots.items()},
    )
    prompt = Prompt(offset=by_hand.offset(given.input_ids.shape[1], overflow="error"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = backbone.score(wide, prompt, by_hand.candidates(backbone))
    torch.testing.assert_close(scores, backbone.score(given, prompt, by_hand.candidates(backbone)), **by_hand.CLOSE)


@every
def test_offsets_by_slot_count_columns_and_by_token_count_tokens(kind: str) -> None:
    backbone, raw = tiny.backbone(kind), tiny.model(kind)
    given = by_hand.texts(backbone)
    padded = by_hand.left(given)
    ids = by_hand.tokens(given, 1)
    table, skipped = by_hand.offset().table(), given.input_ids.shape[1] - len(ids)
    assert skipped > 0
    for align, first in (("token", 0), ("slot", skipped)):
        added = table[first : first + len(ids)]
        expected = by_hand.states(raw, kind, by_hand.embed(raw, list(ids)) + added)[0]
        found = backbone.hidden(padded, Prompt(offset=by_hand.offset(align=align)))[1][-len(ids) :]
        torch.testing.assert_close(found, expected, **by_hand.CLOSE)


@every
def test_plain_tokens_never_get_an_offset(kind: str) -> None:
    backbone, raw = tiny.backbone(kind), tiny.model(kind)
    given = by_hand.one(by_hand.texts(backbone), 0)
    ids = by_hand.tokens(given, 0)
    plain = torch.zeros_like(given.attention_mask, dtype=torch.bool)
    plain[0, -2:] = True
    prompt = Prompt(by_hand.rows(2), by_hand.offset())
    expected = by_hand.states(raw, kind, by_hand.prompted(raw, ids, prompt, plain=2))[0, 2:]
    torch.testing.assert_close(backbone.hidden(replace(given, plain=plain), prompt)[0], expected, **by_hand.CLOSE)


@every
def test_releasing_restores_the_model_exactly(kind: str) -> None:
    raw = tiny.model(kind)
    names = [name for name, _ in raw.named_parameters()]
    raw.get_parameter(names[0]).requires_grad_(False)
    raw.train()
    raw.base_model.eval()
    given = torch.tensor([[5, 6, 7, 8]])
    more = {"decoder_input_ids": given} if tiny.FAMILY[kind] == "seq2seq" else {}

    def facts() -> tuple[Any, ...]:
        modules = {name: id(module) for name, module in raw.named_modules(remove_duplicate=False)}
        trained = {name: parameter.requires_grad for name, parameter in raw.named_parameters()}
        return modules, trained, {name: module.training for name, module in raw.named_modules()}, list(raw.state_dict())

    before, bytes_before = facts(), {name: value.clone() for name, value in raw.state_dict().items()}
    with torch.no_grad():
        raw_mode = {module: module.training for module in raw.modules()}
        output = raw.eval()(given, **more)[0]
        for module, training in raw_mode.items():
            module.training = training
    backbone = type(tiny.backbone(kind))(raw, tiny.backbone(kind).tokenizer, tiny.backbone(kind).config)
    assert Wiring.on(raw) is backbone.wiring
    assert not any(parameter.requires_grad for parameter in raw.parameters())
    prompt = Prompt(by_hand.rows(3), by_hand.offset())
    scores = backbone.score(by_hand.texts(backbone), prompt, by_hand.candidates(backbone))
    scores.sum().backward()
    assert backbone.release() is raw
    assert facts() == before
    assert all(torch.equal(value, bytes_before[name]) for name, value in raw.state_dict().items())
    assert all(parameter.grad is None for parameter in raw.parameters())
    with torch.no_grad():
        assert torch.equal(raw.eval()(given, **more)[0], output)


@every
def test_two_backbones_share_a_model_and_the_last_gives_it_back(kind: str) -> None:
    one, raw = tiny.backbone(kind), tiny.model(kind)
    first, second = (type(one)(raw, one.tokenizer, one.config) for _ in range(2))
    assert first.wiring is second.wiring
    given, answers = by_hand.texts(one), by_hand.candidates(one)
    prompts = [Prompt(by_hand.rows(2)), Prompt(by_hand.rows(4, seed=5), by_hand.offset())]
    expected = [one.score(given, prompt, answers) for prompt in prompts]
    for release in (lambda: None, first.release, first.release):
        release()
        assert torch.equal(second.score(given, prompts[1], answers), expected[1])
        assert not any(parameter.requires_grad for parameter in raw.parameters())
    second.release()
    assert Wiring.on(raw) is None
    assert all(parameter.requires_grad for parameter in raw.parameters())
    assert "forward" not in raw.__dict__


@pytest.mark.parametrize("kind", list(tiny.FAMILIES.values()))
def test_threads_with_their_own_prompts_never_mix(kind: str) -> None:
    backbone = tiny.backbone(kind)
    given, answers = by_hand.texts(backbone), by_hand.candidates(backbone)
    prompts = [Prompt(by_hand.rows(2)), Prompt(by_hand.rows(4, seed=5), by_hand.offset()), Prompt()]
    with torch.no_grad():
        expected = [backbone.score(given, prompt, answers) for prompt in prompts]
    wrong: list[int] = []

    def work(number: int) -> None:
        with torch.no_grad():
            for _ in range(40):
                if not torch.equal(backbone.score(given, prompts[number], answers), expected[number]):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert backbone.wiring.now is None


def test_two_models_at_once_keep_their_own_prompts() -> None:
    one, two = tiny.backbone("llama"), tiny.backbone("gpt2")
    placed = [one.place(by_hand.texts(one), Prompt(by_hand.rows(2))), two.place(by_hand.texts(two), Prompt())]
    with one.running(placed[0]) as inputs:
        expected = one.model(**inputs).logits
    with one.running(placed[0]) as inputs, two.running(placed[1]):
        assert torch.equal(one.model(**inputs).logits, expected)


def test_an_error_inside_leaves_nothing_active() -> None:
    backbone = tiny.backbone("llama")
    placed = backbone.place(by_hand.texts(backbone), Prompt(by_hand.rows(2)))
    with pytest.raises(RuntimeError, match="on purpose"), backbone.running(placed):
        raise RuntimeError("on purpose")
    assert backbone.wiring.now is None


def test_a_head_that_is_not_linear_is_run_as_it_is() -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(hidden)

    raw = tiny.model("llama")
    plain = tiny.backbone("llama")
    doubled = Doubled(tiny.WIDTH, tiny.SIZE, bias=False)
    doubled.weight = raw.lm_head.weight
    raw.lm_head = doubled
    backbone = type(plain)(raw, plain.tokenizer, plain.config)
    assert "forward" in doubled.__dict__
    given, prompt, answers = by_hand.texts(plain), Prompt(by_hand.rows(2)), by_hand.candidates(plain)
    expected = 2 * plain.score(given, prompt, answers)
    torch.testing.assert_close(backbone.score(given, prompt, answers), expected, **by_hand.CLOSE)
    assert backbone.release().lm_head is doubled
