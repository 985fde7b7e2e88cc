"""Invariance: how a batch is padded, put together, ordered or cut changes no score and no written token.

Knows no method's inside: it compares scores of whole prompts, on every architecture of the tiny models.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from promptuary import registry
from promptuary.backbones.base import Backbone
from promptuary.building import build_method
from promptuary.data.collate import Row, pad_candidates
from promptuary.tasks.choose import Choose, ChooseConfig
from promptuary.tasks.classify import Classify, ClassifyConfig
from promptuary.testing.case import padded
from promptuary.tuned import Tuned
from promptuary.types import Batch, Candidates, Prompt

KINDS = list(tiny.FAMILY)
WRITERS = [kind for kind in KINDS if tiny.FAMILY[kind] in ("causal", "seq2seq")]
# rows that depend on the text, behind the first token, and an offset: everything that a prompt may be
SETTINGS: dict[str, dict[str, Any]] = {"ept": {"gate_input": "text", "placement": "after_bos"}}
FILLERS = tiny.WORDS[20:60]
TEXTS = [" ".join(FILLERS[(7 * n + 3 * k) % 40] for k in range(1 + (5 * n) % 11)) for n in range(16)]
WORDS = {"first": "good", "second": "bad", "third": "maybe"}
BAR = 1e-5


@functools.cache
def base(kind: str) -> Backbone:
    """One model for each architecture; prompts are arguments, so nothing of one test stays for another."""
    return tiny.backbone(kind)


def tuned(backbone: Backbone, method: str, seed: int = 0, template: str = "{text} it was {mask}") -> Tuned:
    """A method on a classification task, every tensor moved so that each part of the prompt matters."""
    found = registry.load("methods", method)
    config = found.Config.read({"name": method, **found.tiny, **SETTINGS.get(method, {})}, where="method")
    task = Classify(ClassifyConfig(template=template, labels=WORDS))
    made = Tuned(backbone, task, build_method(config, backbone.shape), max_length=40)
    made.initialise(torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for group in made.trained():
            group.parameter.add_(0.1 * torch.randn(group.parameter.shape, generator=generator))
    return made.train(False)


def rows(of: Tuned) -> list[Row]:
    """Sixteen texts of 1 to 11 words with labels."""
    labels = itertools.cycle(WORDS)
    return of.rows([{"text": text, "label": next(labels)} for text in TEXTS], labelled=True)


def same(found: Tensor, wanted: Tensor) -> None:
    """Equal within the bar, with the same best answer."""
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= BAR
    assert torch.equal(found.argmax(-1), wanted.argmax(-1))


@pytest.fixture(params=KINDS, scope="module")
def whole(request: pytest.FixtureRequest) -> tuple[Tuned, list[Row], Tensor]:
    """A prompt, its texts, and their scores in one batch of sixteen."""
    made = tuned(base(request.param), "ept")
    encoded = rows(made)
    with torch.no_grad():
        scores = made.scores(made.batch(encoded))
    assert float(scores.std(0).min()) > 1e-3, "the texts must differ for this to show anything"
    return made, encoded, scores


Whole = tuple[Tuned, list[Row], Tensor]


@pytest.mark.parametrize(("left", "right"), [(0, 9), (9, 0), (4, 5)])
def test_padding_on_either_side(whole: Whole, left: int, right: int) -> None:
    made, encoded, scores = whole
    with torch.no_grad():
        same(made.scores(padded(made.batch(encoded), left, right)), scores)


def test_left_padding_instead_of_right(whole: Whole) -> None:
    made, encoded, scores = whole
    batch = made.batch(encoded)
    length = batch.attention_mask.sum(1)
    width = batch.input_ids.shape[1]
    back = (torch.arange(width) + length[:, None]) % width  # each row turned until its padding stands in front
    turned = replace(
        batch,
        input_ids=batch.input_ids.gather(1, back),
        attention_mask=batch.attention_mask.gather(1, back),
        segment_ids=None if batch.segment_ids is None else batch.segment_ids.gather(1, back),
        slots={name: at + width - length for name, at in batch.slots.items()},
    )
    assert not bool(turned.attention_mask[length < width, 0].any())
    with torch.no_grad():
        same(made.scores(turned), scores)


@pytest.mark.parametrize("size", [1, 3])
def test_batch_size_against_sixteen(whole: Whole, size: int) -> None:
    made, encoded, scores = whole
    with torch.no_grad():
        cut = [made.scores(made.batch(encoded[start : start + size])) for start in range(0, 16, size)]
    same(torch.cat(cut), scores)


def test_order(whole: Whole) -> None:
    made, encoded, scores = whole
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        same(made.scores(made.batch([encoded[place] for place in order])), scores[order])


def test_company(whole: Whole) -> None:
    made, encoded, scores = whole
    shortest, longest = (pick(range(16), key=lambda n: len(encoded[n].encoded.ids)) for pick in (min, max))
    with torch.no_grad():
        for others in ([longest] * 5, [shortest] * 5, [7, 2]):
            same(made.scores(made.batch([encoded[shortest], *(encoded[n] for n in others)]))[:1], scores[[shortest]])


# ---- several tasks in one batch -------------------------------------------------------------------------------------


def joined(parts: Sequence[Batch], candidates: Sequence[Candidates]) -> Batch:
    """Rows of several tasks as one batch; part k takes prompt k, and each row its own answers."""
    width = max(part.input_ids.shape[1] for part in parts)
    parts = [padded(part, right=width - part.input_ids.shape[1]) for part in parts]
    count = max(len(one.ids) for one in candidates)
    ids, masks = [], []
    for part, one in zip(parts, candidates, strict=True):
        more = (0, 0, 0, count - len(one.ids))
        ids.append(torch.nn.functional.pad(one.ids, more).expand(len(part), -1, -1))
        masks.append(torch.nn.functional.pad(one.mask, more).expand(len(part), -1, -1))
    segments = [part.segment_ids for part in parts]
    which = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(part) for part in parts]))
    return Batch(
        input_ids=torch.cat([part.input_ids for part in parts]),
        attention_mask=torch.cat([part.attention_mask for part in parts]),
        index=torch.arange(len(which)),
        segment_ids=None if segments[0] is None else torch.cat([one for one in segments if one is not None]),
        slots={name: torch.cat([part.slots[name] for part in parts]) for name in parts[0].slots},
        candidates=Candidates(torch.cat(ids), torch.cat(masks)),
        prompt_index=which,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_tasks_equal_each_task_alone(kind: str) -> None:
    backbone = base(kind)
    one = tuned(backbone, "prompt_tuning", 1)
    two = tuned(backbone, "dept", 5, "question : {text} ? answer : {mask}")
    bare = Tuned(backbone, Classify(ClassifyConfig(template="topic : {text} {mask}", labels=WORDS)), max_length=40)
    answers = [[["good"], ["bad"], ["maybe"]], [["yes"], ["no"]], [["sky"], ["sea"], ["sun"]]]
    with torch.no_grad():
        parts = [of.batch(rows(of)[: 3 + n]) for n, of in enumerate((one, two, bare))]
        prompts = [one.prompt(parts[0]), two.prompt(parts[1]), Prompt()]
        words = [pad_candidates([backbone.answer_ids(word) for (word,) in known]) for known in answers]
        batch = joined(parts, words)
        order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(0))
        batch = batch.rows(order)
        mixed = backbone.score(batch, prompts, batch.candidates)
        apart = mixed[torch.argsort(order)].split([len(part) for part in parts])
        for n, (part, mine) in enumerate(zip(parts, apart, strict=True)):
            wanted = backbone.score(part, prompts[n], words[n])
            assert bool((mine[:, wanted.shape[1] :] == -torch.inf).all())
            same(mine[:, : wanted.shape[1]], wanted)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "minilm"])
def test_answers_of_several_tokens_in_a_batch_and_alone(kind: str) -> None:
    backbone = base(kind)
    task = Choose(ChooseConfig(template="{text} it was {mask}", choices=["options"], label="right"))
    found = registry.load("methods", "dept")
    made = Tuned(backbone, task, build_method(found.Config(**found.tiny), backbone.shape), max_length=40)
    made.initialise(torch.Generator().manual_seed(2)).train(False)
    choices = [["good", "very bad", "not so very good"], ["sky", "the sea"], ["no", "yes", "maybe not", "never"]]
    encoded = made.rows(
        [{"text": text, "options": choices[n % 3], "right": 0} for n, text in enumerate(TEXTS)], labelled=True
    )
    with torch.no_grad():
        together = made.scores(made.batch(encoded))
        for place, row in enumerate(encoded):
            alone = made.scores(made.batch([row]))[0]
            same(together[place, : len(alone)], alone)
            assert bool((together[place, len(alone) :] == -torch.inf).all())


# ---- writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WRITERS)
def test_writing_does_not_depend_on_cache_or_batch(kind: str) -> None:
    made = tuned(base(kind), "ept")
    encoded = rows(made)
    # words only; and none twice, since the random BART would repeat one word whatever the text is
    settings: dict[str, Any] = {"max_new_tokens": 6, "suppress_tokens": list(range(len(tiny.SPECIAL)))}
    if kind == "bart":
        settings |= {"max_new_tokens": 20, "no_repeat_ngram_size": 1}

    def write(some: Sequence[Row], **options: Any) -> list[list[int]]:
        batch = made.batch(some)
        with torch.no_grad():
            return made.backbone.generate(batch, made.prompt(batch), **settings, **options)

    written = write(encoded)
    assert len({tuple(tokens) for tokens in written}) > 1, "the texts must differ for this to show anything"
    assert all(token < tiny.SIZE for tokens in written for token in tokens)
    assert write(encoded, use_cache=False) == written
    assert [write([row])[0] for row in encoded] == written
    assert write(encoded[::-1])[::-1] == written
