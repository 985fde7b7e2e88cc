"""Properties of a prompt in use: folding, padding, batches, writing, precision, and a base that stays as it was.

Knows no method by name; what it needs to know of one is in the case.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from promptuary.errors import NotFoldable, SiteError
from promptuary.testing import tiny
from promptuary.testing.case import Case, expect, expect_close, expect_raised, gradient, padded
from promptuary.tuned import Tuned
from promptuary.types import Batch, Prompt


def folded_equals_live(case: Case) -> None:
    """The folded prompt scores as the live one within 1e-5, or a prompt that depends on the input refuses to fold."""
    tuned = case.tuned()
    assert tuned.method is not None
    batch = tuned.batch(case.rows(tuned))
    if tuned.method.depends:
        expect_raised(NotFoldable, tuned.method.fold, "fold of a prompt that depends on the input")
        return
    folded = tuned.scores(batch)
    expect_close(folded, tuned.train(True).scores(batch), "folded and live scores")


def padding_on_either_side_changes_nothing(case: Case) -> None:
    """More padding on the right, and padding on the left, give the same scores."""
    tuned = case.tuned()
    batch = tuned.batch(case.rows(tuned))
    wanted = tuned.scores(batch)
    expect_close(tuned.scores(padded(batch, right=5)), wanted, "scores with padding on the right")
    expect_close(tuned.scores(padded(batch, left=5)), wanted, "scores with padding on the left")


def a_row_of_a_batch_equals_that_row_alone(case: Case) -> None:
    """The other rows of a batch do not matter."""
    tuned = case.tuned()
    rows = case.rows(tuned)
    alone = torch.cat([tuned.scores(tuned.batch([row])) for row in rows])
    expect_close(tuned.scores(tuned.batch(rows)), alone, "scores in a batch and alone")


def row_order_is_irrelevant(case: Case) -> None:
    """A permuted batch gives permuted scores."""
    tuned = case.tuned()
    rows, order = case.rows(tuned), [3, 1, 4, 0, 2]
    permuted = tuned.scores(tuned.batch([rows[place] for place in order]))
    expect_close(permuted, tuned.scores(tuned.batch(rows))[order], "scores of permuted rows")


def rows_with_different_prompts_equal_separate_runs(case: Case) -> None:
    """Two prompts and none at all, mixed in one batch, give what each gives in a batch of its own."""
    backbone = case.backbone()
    one, two = case.tuned(backbone, seed=1), case.tuned(backbone, seed=7)
    batch = one.batch(case.rows(one))
    prompts = [one.prompt(batch), two.prompt(batch), Prompt()]
    which = torch.tensor([0, 1, 2, 1, 0])
    words = one.asking.words

    def read(part: Batch, given: Any) -> Tensor:
        return backbone.pooled(part, given) if words is None else backbone.score(part, given, words)

    mixed = read(replace(batch, prompt_index=which), prompts)
    separate = torch.stack([read(batch, prompts[int(k)])[row] for row, k in enumerate(which)])
    expect_close(mixed, separate, "scores of mixed prompts")


def cached_generation_equals_uncached(case: Case) -> None:
    """The same tokens with and without a cache, and in a padded batch as alone (families that write)."""
    tuned = case.tuned()
    rows = case.rows(tuned)
    batch = tuned.batch(rows)

    def write(part: Batch, **options: Any) -> list[list[int]]:
        return tuned.backbone.generate(part, tuned.prompt(part), max_new_tokens=6, **options)

    cached = write(batch)
    plain = write(batch, use_cache=False)
    expect(cached == plain, f"with a cache {cached} is written, without one {plain}")
    alone = [write(tuned.batch([row]))[0] for row in rows]
    expect(cached == alone, f"in a batch {cached} is written, row by row {alone}")


def second_turn_equals_fresh(case: Case) -> None:
    """A conversation that goes on from a returned cache writes what the whole conversation anew would (causal)."""
    tuned = case.tuned()
    backbone = tuned.backbone
    if backbone.answer_at != "end" or tuned.method is None:
        return  # the cache of an encoder-decoder belongs to one text
    if tuned.method.own_scores or case.spoken:
        expect_raised(
            SiteError, lambda: tuned.attach().__enter__(), "attach of a prompt that is words, or reads answers"
        )
        return
    batch = tuned.batch(case.rows(tuned)[1:2])
    text = batch.input_ids.shape[1]
    with tuned.attach() as model:
        first = model.generate(
            batch.input_ids, max_new_tokens=3, min_new_tokens=3, do_sample=False, return_dict_in_generate=True
        )
        more = backbone.vocabulary.common(9)[-3:][None]
        whole = torch.cat([first.sequences, more], dim=1)

        def go_on() -> Tensor:
            return model.generate(whole, past_key_values=first.past_key_values, max_new_tokens=4, do_sample=False)

        if tuned.method.depends:
            expect_raised(SiteError, go_on, "a second turn of a prompt that depends on the text")
            return
        cached = go_on()[0, whole.shape[1] :].tolist()
    plain = torch.zeros_like(whole, dtype=torch.bool)
    plain[:, text : text + 3] = True  # an answer takes no offset
    anew = Batch(whole, torch.ones_like(whole), batch.index, plain=plain)
    fresh = backbone.generate(anew, tuned.prompt(anew), max_new_tokens=4)[0]
    cached = cached[: len(fresh)]
    expect(cached == fresh, f"on the returned cache {cached} is written, anew {fresh}")


def detaching_restores_the_base(case: Case) -> None:
    """After a step of training, and after `attach`, the model's modules, values and outputs are those of before."""
    kind = tiny.EVERY.get(case.family, case.family)
    model, plain = tiny.model(kind), tiny.model(kind)
    spare = case.backbone()
    backbone = type(spare)(model, tiny.reader(kind), spare.config)
    tuned = case.tuned(backbone).train(True)
    loss = tuned.loss(tuned.batch(case.rows(tuned))).total
    if tuned.trained():
        loss.backward()
    backbone.release()
    _expect_same(model, plain, "after release")
    alone = tuned.method is None or tuned.method.depends or tuned.method.own_scores or case.spoken
    if backbone.reads_words and not alone:
        with case.tuned(spare).attach(model):
            pass
        _expect_same(model, plain, "after attach")


def _expect_same(model: Any, plain: Any, when: str) -> None:
    """Bit for bit, down to what hangs on each module."""
    names = [[name for name, _ in one.named_modules()] for one in (model, plain)]
    expect(names[0] == names[1], f"{when}: the model has other modules")
    for (name, module), other in zip(model.named_modules(), plain.modules(), strict=True):
        left = sorted(vars(module).keys() ^ vars(other).keys())
        expect(not left and type(module) is type(other), f"{when}: {name or 'the model'} keeps {left or type(module)}")
    state, wanted = model.state_dict(), plain.state_dict()
    changed = [name for name, value in wanted.items() if not torch.equal(state[name], value)]
    expect(not changed, f"{when}: {changed} changed")
    expect(all(p.requires_grad for p in model.parameters()), f"{when}: parameters stay frozen")
    inputs = {"input_ids": torch.tensor([[7, 8, 9, 10]])}
    if model.main_input_name == "pixel_values" or "pixel_values" in inspect.signature(type(model).forward).parameters:
        pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        inputs = {
            "pixel_values": pixels,
            **(inputs if "input_ids" in inspect.signature(type(model).forward).parameters else {}),
        }
    if "decoder_start_token_id" in model.config.to_dict() and model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([[1, 7]])
    with torch.no_grad():
        one, two = model(**inputs)[0], plain(**inputs)[0]
    expect(torch.equal(one, two), f"{when}: the outputs differ")


def every_switch_off_gives_the_same(case: Case) -> None:
    """With nothing shared, kept or left out, loss, gradients, scores and written text are the same within 1e-5."""
    quick = case.tuned()
    slow = case.tuned(case.backbone(share_prefix=False, narrow_head=False, kept_mib=0))
    batch = quick.batch(case.rows(quick))
    for _ in range(2):  # the second time from what was kept
        expect_close(quick.scores(batch), slow.scores(batch), "scores with every fast path and with none")
    if "generate" in quick.backbone.abilities:
        one, two = (each.backbone.generate(batch, each.prompt(batch), max_new_tokens=6) for each in (quick, slow))
        expect(one == two, f"with every fast path {one} is written, with none {two}")
    losses = [each.train(True).loss(batch).total for each in (quick, slow)]
    expect_close(losses[0], losses[1], "loss with every fast path and with none")
    for loss in losses if quick.trained() else []:
        loss.backward()
    for one_group, two_group in zip(quick.trained(), slow.trained(), strict=True):
        found, wanted = (gradient(group.parameter, group.name) for group in (one_group, two_group))
        apart = float((found - wanted).norm() / wanted.norm())
        expect(apart <= 1e-4, f"the gradient of {one_group.name} differs by {apart:.1e} of its size")


def changed_tensors_count_at_once(case: Case) -> None:
    """After its tensors change in place, a prompt scores as a new one that starts with those: nothing kept is stale."""
    tuned, other = case.tuned(seed=1), case.tuned(seed=7)
    batch = tuned.batch(case.rows(tuned))
    before = tuned.scores(batch)
    with torch.no_grad():
        for group, wanted in zip(tuned.trained(), other.trained(), strict=True):
            group.parameter.copy_(wanted.parameter)
        for own, value in zip(_constants(tuned), _constants(other), strict=True):
            own.copy_(value)
    if tuned.method is not None:
        tuned.method.text = other.text
    found = tuned.scores(batch)
    expect_close(found, other.scores(batch), "scores after the tensors changed, and of a new prompt with those")
    expect(not torch.equal(found, before), "other tensors give the same scores")


def _constants(tuned: Tuned) -> list[Tensor]:
    return [] if tuned.method is None else list(tuned.method.buffers())


def mixed_precision_is_finite(case: Case) -> None:
    """Under bf16 autocast, and on a bfloat16 backbone, loss and gradients are finite; the prompt stays in float32."""
    for backbone in (case.backbone(), case.backbone(dtype="bfloat16")):
        where = f"on a {backbone.config.dtype} backbone"
        tuned = case.tuned(backbone).train(True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = tuned.loss(tuned.batch(case.rows(tuned))).total
        if tuned.trained():
            loss.backward()
        expect(bool(loss.isfinite()), f"the loss is {float(loss.detach())} {where}")
        for group in tuned.trained():
            expect(group.parameter.dtype == torch.float32, f"{group.name} is {group.parameter.dtype} {where}")
            finite = bool(gradient(group.parameter, group.name).isfinite().all())
            expect(finite, f"the gradient of {group.name} is not finite {where}")
