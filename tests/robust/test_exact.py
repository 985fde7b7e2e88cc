"""Fast paths are exact: each one against the plain path, written out here by hand on a model that nobody has touched.

Knows no method's inside. What exists today: reading only the asked positions and words, an answer's loss on its own
positions, batches of similar length, and the folded prompt.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

import tiny
from promptuary import registry
from promptuary.backbones.base import Backbone
from promptuary.building import build_method
from promptuary.data.collate import batches
from promptuary.tasks.classify import Classify, ClassifyConfig
from promptuary.tasks.generate import Generate, GenerateConfig
from promptuary.testing.case import padded
from promptuary.tuned import Tuned
from promptuary.types import ANSWER, Batch, Prompt

KINDS = [kind for kind, family in tiny.FAMILY.items() if family != "encoder"]
WRITERS = [kind for kind, family in tiny.FAMILY.items() if family in ("causal", "seq2seq")]
FILLERS = tiny.WORDS[20:60]
TEXTS = [" ".join(FILLERS[(7 * n + 3 * k) % 40] for k in range(1 + (5 * n) % 11)) for n in range(6)]
WORDS = {"first": "good", "second": "bad", "third": "maybe"}
STARTS = {"t5": [0], "bart": [2, 1]}
"""What a decoder begins with: T5 its padding, BART its end and begin tokens."""


@functools.cache
def backbone(kind: str) -> Backbone:
    """A tiny model, frozen and with a place for prompts."""
    return tiny.backbone(kind)


def tuned(base: Backbone, method: str, task: str, **settings: Any) -> Tuned:
    """A method on label words or on written answers, every tensor moved so that each part matters."""
    found = registry.load("methods", method)
    config = found.Config.read({"name": method, **found.tiny, **settings}, where="method")
    made_task = {
        "words": lambda: Classify(ClassifyConfig(template="{text} it was {mask}", labels=WORDS)),
        "text": lambda: Generate(GenerateConfig(template="{text} answer : {mask}", max_new_tokens=5)),
    }[task]()
    made = Tuned(base, made_task, build_method(config, base.shape), max_length=40)
    made.initialise(torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for group in made.trained():
            group.parameter.add_(0.1 * torch.randn(group.parameter.shape, generator=generator))
    return made.train(True)


def examples(count: int = len(TEXTS)) -> list[dict[str, str]]:
    answers = ["good", "very bad", "not so very good", "sky"]
    return [
        {"text": TEXTS[n % len(TEXTS)], "label": list(WORDS)[n % 3], "target": answers[n % 4]} for n in range(count)
    ]


# ---- the plain path: one row at a time, vectors put together by hand, every logit computed ---------------------------


def plain_logits(kind: str, model: Any, ids: Tensor, prompt: Prompt, answer: Tensor) -> Tensor:
    """All logits over prompt, text and answer (causal), over prompt and text (masked), or over the answer (seq2seq)."""
    embed = model.get_input_embeddings()
    text = embed(ids)
    if prompt.offset is not None:
        text = text + (prompt.offset.left.double() @ prompt.offset.right.double())[: len(ids)]
    assert prompt.rows is not None
    vectors = torch.cat([prompt.rows[0].double(), text])
    if tiny.FAMILY[kind] == "causal":
        return model(inputs_embeds=torch.cat([vectors, embed(answer)])[None]).logits[0]
    if tiny.FAMILY[kind] == "masked":
        return model(inputs_embeds=vectors[None]).logits[0]
    start = torch.tensor(STARTS[kind])
    return model(inputs_embeds=vectors[None], decoder_input_ids=torch.cat([start, answer[:-1]])[None]).logits[0]


def real(batch: Batch, row: int) -> Tensor:
    """The ids of a row without padding."""
    return batch.input_ids[row][batch.attention_mask[row].bool()]


def plain_words(kind: str, made: Tuned, batch: Batch) -> Tensor:
    """Scores of the label words, picked out of all logits, [b, c]."""
    model, prompt = untouched(kind), made.prompt(batch)
    words = torch.tensor([made.backbone.answer_ids(word)[0] for word in WORDS.values()])
    found = []
    for row in range(len(batch)):
        ids = real(batch, row)
        logits = plain_logits(kind, model, ids, prompt, torch.tensor([0]) if kind in STARTS else ids[:0])
        at = {"causal": -1, "seq2seq": -1, "masked": prompt.length + int(batch.slots.get(ANSWER, [0] * 99)[row])}
        found.append(logits[at[tiny.FAMILY[kind]]][words])
    return torch.stack(found)


def plain_answer_loss(kind: str, made: Tuned, batch: Batch) -> Tensor:
    """Mean cross-entropy over all positions and all words, where everything but the answers has no target."""
    assert batch.target_ids is not None
    model, prompt, total = untouched(kind), made.prompt(batch), torch.zeros((), dtype=torch.float64)
    for row in range(len(batch)):
        ids, answer = real(batch, row), batch.target_ids[row][batch.target_ids[row] != -100]
        logits = plain_logits(kind, model, ids, prompt, answer)
        if tiny.FAMILY[kind] == "causal":
            before = torch.full((prompt.length + len(ids) - 1,), -100)
            targets = torch.cat([before, answer, torch.tensor([-100])])
        else:
            targets = torch.cat([torch.full((len(STARTS[kind]) - 1,), -100), answer])
        total = total + cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    return total / int((batch.target_ids != -100).sum())


@functools.cache
def untouched(kind: str) -> Any:
    """The weights of `backbone(kind)`, frozen, where no prompt was ever put in; in float64, so that it is exact."""
    return tiny.model(kind).requires_grad_(False).double()


def gradients(made: Tuned, loss: Tensor) -> dict[str, Tensor]:
    groups = made.trained()
    found = torch.autograd.grad(loss, [group.parameter for group in groups], retain_graph=True)
    return dict(zip([group.name for group in groups], found, strict=True))


def equal(made: Tuned, fast: Tensor, plain: Tensor) -> None:
    """The loss within 1e-5, each tensor's gradient within 1e-5 of its size (or of 1/100 of the whole one's)."""
    assert float((fast - plain).detach().abs()) <= 1e-5
    one, two = gradients(made, fast), gradients(made, plain)
    whole = math.hypot(*(float(wanted.norm()) for wanted in two.values()))
    for name, wanted in two.items():
        size = float(wanted.norm())
        assert size > 0, name
        assert float((one[name] - wanted).norm()) / max(size, whole / 100) <= 1e-5, name


# ---- label words and answers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["prompt_tuning", "ept"])
@pytest.mark.parametrize("kind", KINDS)
def test_label_words_at_one_position_equal_full_logits(kind: str, method: str) -> None:
    made = tuned(backbone(kind), method, "words")
    batch = made.batch(made.rows(examples(), labelled=True))
    fast, plain = made.scores(batch), plain_words(kind, made, batch)
    assert float((fast - plain).detach().abs().max()) <= 1e-5
    assert torch.equal(fast.argmax(-1), plain.argmax(-1))
    assert batch.target is not None
    equal(made, made.loss(batch).total, cross_entropy(plain, batch.target))


@pytest.mark.parametrize("method", ["prompt_tuning", "ept"])
@pytest.mark.parametrize("kind", WRITERS)
def test_loss_on_an_answers_positions_equals_full_cross_entropy(kind: str, method: str) -> None:
    made = tuned(backbone(kind), method, "text")
    batch = made.batch(made.rows(examples(), labelled=True))
    equal(made, made.loss(batch).total, plain_answer_loss(kind, made, batch))


# ---- batches of similar length --------------------------------------------------------------------------------------


def epoch(made: Tuned, task: str, cut: list[list[int]], width: int | None) -> tuple[Tensor, int]:
    """Mean loss of all rows over batches, each as wide as its longest text or as `width`; and the tokens that ran."""
    rows = made.rows(examples(12), labelled=True)
    parts = [made.batch([rows[place] for place in chosen]) for chosen in cut]
    if width is not None:
        parts = [padded(part, right=width - part.input_ids.shape[1]) for part in parts]
    whole = sum(made.weight(part) for part in parts)
    loss = torch.stack([made.loss(part).total * made.weight(part) / whole for part in parts]).sum()
    return loss, sum(part.input_ids.numel() for part in parts)


@pytest.mark.parametrize(("kind", "task"), [(k, "words") for k in tiny.FAMILY] + [(k, "text") for k in WRITERS])
def test_bucketed_batches_equal_static_padding_with_fewer_tokens(kind: str, task: str) -> None:
    made = tuned(backbone(kind), "dept", task)
    lengths = [len(row.encoded.ids) for row in made.rows(examples(12), labelled=True)]
    given = batches(lengths, 4, generator=torch.Generator().manual_seed(0), bucket=False)
    similar = batches(lengths, 4, generator=torch.Generator().manual_seed(0), bucket=True)
    static, most = epoch(made, task, given, width=40)
    dynamic, fewer = epoch(made, task, given, width=None)
    bucketed, fewest = epoch(made, task, similar, width=None)
    assert fewest < fewer < most == 12 * 40
    equal(made, dynamic, static)
    equal(made, bucketed, static)


# ---- folded ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lamp", "ept"])
@pytest.mark.parametrize("kind", list(tiny.FAMILY))
def test_folded_equals_live(kind: str, method: str) -> None:
    made = tuned(backbone(kind), method, "words")
    batch = made.batch(made.rows(examples(), labelled=True))
    live, live_loss = made.scores(batch), made.loss(batch).total
    made.train(False)
    folded, folded_loss = made.scores(batch), made.loss(batch).total
    assert live.requires_grad
    assert not folded.requires_grad
    assert float((folded - live).detach().abs().max()) <= 1e-5
    assert float((folded_loss - live_loss).detach().abs()) <= 1e-5
    assert torch.equal(folded.argmax(-1), live.argmax(-1))


# ---- what it saves: counted, not timed ------------------------------------------------------------------------------


def flops(run: Callable[[], Tensor]) -> tuple[int, int]:
    """Floating-point operations of a forward pass, and of the backward pass behind it."""
    with FlopCounterMode(display=False) as forward:
        result = run()
    with FlopCounterMode(display=False) as backward:
        result.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("kind", KINDS)
def test_the_narrow_head_saves_what_the_formula_says(kind: str) -> None:
    base = backbone(kind)
    alone = type(base)(tiny.model(kind), base.tokenizer, base.config.model_copy(update={"share_prefix": False}))
    made = tuned(alone, "prompt_tuning", "words")
    assert alone.narrow, "is tried before anything is counted"
    rows = made.rows([{"text": "a red apple", "label": "first"}] * 4, labelled=True)
    batch = made.batch(rows)
    prompt = made.prompt(batch)
    assert prompt.rows is not None
    count, text, width = len(batch), batch.input_ids.shape[1], made.backbone.shape.width
    plain_model = untouched(kind)
    words = len(WORDS)

    def full() -> Tensor:
        vectors = torch.cat(
            [prompt.rows.double().expand(count, -1, -1), plain_model.get_input_embeddings()(batch.input_ids)], dim=1
        )
        inputs: dict[str, Any] = {"inputs_embeds": vectors, "attention_mask": torch.ones(vectors.shape[:2])}
        if kind in STARTS:
            inputs["decoder_input_ids"] = torch.tensor([STARTS[kind]] * count)
        return plain_model(**inputs, **({} if tiny.FAMILY[kind] == "masked" else {"use_cache": False})).logits

    narrow = flops(lambda: made.scores(batch))
    plain = flops(full)
    # a head over n positions and w words takes 2 b n d w operations forward, and as many back to its input; frozen, it
    # has no third part. BART has a bias behind its head, so that its words are picked from all logits. In front of a
    # masked model's head stands one more layer of d x d, which runs at the mask only as well
    positions = len(STARTS[kind]) if kind in STARTS else prompt.length + text
    asked = words if made.backbone.words_at_head else tiny.SIZE
    saved = 2 * count * width * (positions * tiny.SIZE - asked)
    if tiny.FAMILY[kind] == "masked":
        saved += 2 * count * width * width * (positions - 1)
    for fast, slow in zip(narrow, plain, strict=True):
        assert math.isclose(slow - fast, saved, rel_tol=0.01)
        assert fast < slow
