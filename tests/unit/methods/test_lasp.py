"""LASP: the direction of its loss, sentences and groups, noise, virtual classes, bias, layer norms and counts.

Knows no other method but CoOp, which it is without its additions.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from promptuary.errors import ConfigError
from promptuary.methods.coop import CoOp, CoOpConfig
from promptuary.methods.lasp import LASP, LASPConfig
from promptuary.prompts.losses import text_to_text
from promptuary.prompts.references import LASP as SENTENCES
from promptuary.seeds import Chance
from promptuary.types import Losses, Shape, View
from words import NAMES, NORMS, SHAPE, D, H, Named, V, Words, feature, said, starting, texts

FOUR = ("a {}.", "the {}.", "one {}.", "no {}.")


def made(seed: int = 0, start: dict[str, Any] | None = None, **settings: Any) -> LASP:
    method = LASP(LASPConfig(**{"templates": FOUR, **settings}), SHAPE)
    method.initialise(starting(seed, **(start or {})))
    return method


def sentences(*templates: str, names: tuple[str, ...] = NAMES) -> Tensor:
    """Unit features of the sentences, [l, c, h]."""
    found = [[feature(template.replace("{}", name)) for name in names] for template in templates]
    return normalize(torch.stack([torch.stack(row) for row in found]), dim=-1)


# ---- the loss on sentences ---------------------------------------------------------------------------------------


def test_the_softmax_runs_over_the_learnt_classes() -> None:
    """Each sentence is classified, equation of the released code; the other direction is another number."""
    learned, wanted, scale = normalize(texts()[0].detach(), dim=-1), sentences(*FOUR), 7.0
    total, other = 0.0, 0.0
    for sentence in wanted:
        for right in range(len(NAMES)):
            scores = torch.stack([scale * sentence[right] @ learned[i] for i in range(len(NAMES))])
            total -= float(torch.log(scores[right].exp() / scores.exp().sum()))
            scores = torch.stack([scale * sentence[c] @ learned[right] for c in range(len(NAMES))])
            other -= float(torch.log(scores[right].exp() / scores.exp().sum()))
    found = float(text_to_text(learned, wanted, scale))
    assert found == pytest.approx(total / (len(FOUR) * len(NAMES)), rel=1e-4)
    assert found != pytest.approx(other / (len(FOUR) * len(NAMES)), rel=1e-2)


def test_a_class_that_is_its_sentence_costs_what_the_others_leave() -> None:
    """The slice of a sentence that equals the learnt text is mean_c log sum_i exp(s (cos_ic - 1))."""
    words = sentences("a {}.")[0]
    found = made(templates=("a {}.",)).text_loss(3 * words[None], 5.0)
    wanted = torch.logsumexp(5 * (words @ words.T - 1), dim=0).mean()
    torch.testing.assert_close(found, wanted)


def test_its_loss_is_the_tasks_and_alpha_times_that_of_all_sentences() -> None:
    method, found = made(text_weight=3.0, text_scale=7.0), texts()
    wanted = text_to_text(normalize(found[0], dim=-1), sentences(*FOUR), 7.0)
    losses = method.loss(torch.tensor(0.5), said(found))
    torch.testing.assert_close(losses.total, 0.5 + 3 * wanted)
    assert losses.parts == {"task": 0.5, "text": pytest.approx(float(wanted.detach()))}


def test_images_have_no_part_in_it() -> None:
    method, outputs = made(virtual_classes=("bird",)), said(texts(len(NAMES) + 1))
    losses = method.loss(torch.tensor(0.5), outputs)
    losses.total.backward()
    assert outputs.answer.grad is None
    assert outputs.texts.grad is not None


def test_the_sentences_are_asked_for_once_and_never_change() -> None:
    asked = Named()
    method = made(start={"classes": asked}, virtual_classes=("bird",), ref_noise_std=0.5, ref_noise_prob=1.0)
    everyone = (*NAMES, "bird")
    assert asked.asked == [template.replace("{}", name) for template in FOUR for name in everyone]
    assert method.references.shape == (4, 4, H)
    torch.testing.assert_close(method.references, sentences(*FOUR, names=everyone))
    before, optimizer = method.references.clone(), torch.optim.SGD(method.parameters(), lr=0.1)
    for step in range(3):
        method.loss(method.contexts.sum(), said(texts(4) + method.bias, step=step)).total.backward()
        optimizer.step()
    assert torch.equal(method.references, before)
    assert not method.references.requires_grad
    assert len(asked.asked) == 16


def test_noise_is_of_some_steps_and_of_training_alone() -> None:
    method = made(ref_noise_std=0.05)
    noisy, clean = [], method.references
    for step in range(200):
        found = method.noisy(clean, Chance(0, step, torch.arange(2)))
        assert torch.equal(found, method.noisy(clean, Chance(0, step, torch.arange(5)))), "one draw for all rows"
        if not torch.equal(found, clean):
            noisy.append(found - clean)
    assert 70 < len(noisy) < 130
    assert float(torch.stack(noisy).std()) == pytest.approx(0.05, rel=0.03)
    assert method.noisy(clean, None) is clean
    assert made().noisy(clean, Chance(0, 0, torch.arange(2))) is clean
    one, other = (float(method.loss(torch.tensor(0.0), said(texts(), step=step)).total.detach()) for step in (None, 1))
    quiet = float(made().loss(torch.tensor(0.0), said(texts(), step=1)).total.detach())
    assert one == quiet
    assert torch.equal(method.noisy(clean, Chance(0, 1, torch.arange(5))), clean) == (other == quiet)


def test_the_release_has_35_sentences_of_which_one_counts_twice() -> None:
    assert len(SENTENCES) == 35
    assert sorted(one for one in set(SENTENCES) if SENTENCES.count(one) > 1) == ["a bad photo of the {}."]
    assert len(made(templates="release").references) == 35


# ---- groups --------------------------------------------------------------------------------------------------------


def test_sentences_are_shared_out_in_turn_or_by_chance() -> None:
    assert made(num_groups=3).assigned == [[0, 3], [1], [2]]
    drawn = made(num_groups=3, templates="release", assignment="random").assigned
    assert sorted(one for own in drawn for one in own) == list(range(35))
    assert drawn != made(num_groups=3, templates="release").assigned


def test_each_group_learns_its_own_sentences_and_every_sentence_counts_alike() -> None:
    method, found = made(num_groups=3, text_scale=7.0), texts(sets=3)
    learned, wanted = normalize(found.detach(), dim=-1), sentences(*FOUR)
    each = [text_to_text(learned[g], wanted[place : place + 1], 7.0) for place, g in enumerate((0, 1, 2, 0))]
    loss = method.text_loss(found, 7.0)
    torch.testing.assert_close(loss, torch.stack(each).mean())
    (moved,) = torch.autograd.grad(loss, found)
    assert all(bool(own.any()) for own in moved)


def test_the_first_context_starts_as_words_and_the_others_at_random() -> None:
    words = Words()
    method = made(num_groups=3)
    assert torch.equal(method.contexts[0], words.embed(words.ids("a photo of a")))
    rest = method.contexts[1:].detach()
    assert float(rest.abs().max()) < 0.1
    assert not torch.equal(rest[0], rest[1])


def test_scores_are_the_mean_of_the_cosines_of_the_groups() -> None:
    method, found = made(num_groups=3), texts(sets=3)
    with torch.no_grad():
        method.bias.normal_(generator=torch.Generator().manual_seed(5))
    image = normalize(torch.randn(H, generator=torch.Generator().manual_seed(6)), dim=-1)
    wanted = torch.stack([normalize(own + method.bias, dim=-1) @ image for own in found]).mean(0)
    classes = method.classes(found)
    assert classes.shape == (1, len(NAMES), H)
    torch.testing.assert_close(classes[0] @ image, wanted)


def test_it_folds_to_all_its_contexts() -> None:
    folded = made(num_groups=2).fold()
    assert folded.context.shape == (2, 1, 1, 4, D)
    assert folded.sites == {"context"}


# ---- what it is without its additions ----------------------------------------------------------------------------


def test_without_its_additions_it_is_coop() -> None:
    coop = CoOp(CoOpConfig(), SHAPE)
    coop.initialise(starting())
    plain = LASP(LASPConfig(text_weight=0, bias=False), SHAPE)
    plain.initialise(starting(classes=None))
    assert torch.equal(plain.fold().context, coop.fold().context)
    assert torch.equal(plain.classes(texts()), coop.classes(texts()))
    assert plain.loss(torch.tensor(0.5), said(texts())) == Losses(torch.tensor(0.5), {"task": 0.5})
    assert (plain.studies, plain.sites, plain.more_words) == (frozenset(), {"context"}, ())


def test_the_bias_starts_at_zero_and_changes_scores_when_it_moves() -> None:
    method, found = made(), texts()
    before = method.classes(found)
    assert torch.equal(before, normalize(found, dim=-1))
    with torch.no_grad():
        method.bias.add_(torch.randn(H, generator=torch.Generator().manual_seed(5)))
    image = torch.randn(H, generator=torch.Generator().manual_seed(6))
    change = (method.classes(found) - before)[0] @ image
    # the same number for every class would cancel in a softmax
    assert float(change.detach().std()) > 0.05


# ---- virtual classes -----------------------------------------------------------------------------------------------


def test_virtual_classes_change_the_loss_on_sentences_alone() -> None:
    plain, more, found = made(), made(virtual_classes=("bird", "tree")), texts(5)
    assert more.more_words == ("bird", "tree")
    own = found[:, : len(NAMES)]
    with_names, without = more.loss(torch.tensor(0.5), said(found)), plain.loss(torch.tensor(0.5), said(own))
    assert with_names.parts["task"] == without.parts["task"]
    assert with_names.parts["text"] != pytest.approx(without.parts["text"])
    assert torch.equal(more.classes(own), plain.classes(own))


def test_they_can_be_columns_of_the_image_loss_that_are_never_right() -> None:
    method = made(virtual_classes=("bird",), include_virtual_in_image_loss=True, text_weight=0, text_scale=7.0)
    outputs = said(texts(4))
    scores = 7 * normalize(outputs.answer, dim=-1) @ normalize(outputs.texts[0], dim=-1).T
    wanted = cross_entropy(scores, outputs.target)
    losses = method.loss(torch.tensor(0.5), outputs)
    torch.testing.assert_close(losses.total, wanted)
    assert losses.total > cross_entropy(scores[:, :3], outputs.target)
    assert losses.parts == {"task": 0.5, "image": pytest.approx(float(wanted.detach()))}
    assert method.studies == {"texts", "answer"}


# ---- layer norms, counts, refusals -------------------------------------------------------------------------------


def test_layer_norms_start_as_they_are_and_learn_ten_times_slower() -> None:
    start = starting()
    method = made(visual_norms="blocks")
    assert torch.equal(method.prompt(View()).norms, start.norms)
    assert method.sites == {"context", "norms"}
    assert made().sites == {"context"}
    rates = {group.name: (group.learning_rate, group.weight_decay) for group in method.trained()}
    wanted = {"contexts": (2e-3, 5e-4), "bias": (2e-3, 5e-4), "norms": (pytest.approx(2e-4), 5e-4)}
    assert rates == wanted
    own = {
        group.name: group.learning_rate for group in made(visual_norms="blocks", norms_lr=0.5, bias_lr=0.25).trained()
    }
    assert own == {"contexts": 2e-3, "bias": 0.25, "norms": 0.5}
    folded = method.fold()
    assert folded.norms.shape == (NORMS, 2, V)


def test_counts_are_those_of_the_release() -> None:
    """2,048 + 512, and 36,864 numbers of layer norms, for CLIP ViT-B/16."""
    clip = Shape(512, hidden=512, visual=768, depth=12, norms=24)
    assert LASP.count(LASPConfig(), clip) == 2_560
    assert LASP.count(LASPConfig(visual_norms="blocks"), clip) == 39_424
    for settings in ({}, {"num_groups": 3, "visual_norms": "blocks"}, {"bias": False}):
        method = made(**settings)
        assert LASP.count(method.config, SHAPE) == sum(value.numel() for value in method.parameters())


def test_what_is_saved_has_no_sentences_and_a_loaded_prompt_says_so() -> None:
    assert set(made().state_dict()) == {"contexts", "bias"}
    with pytest.raises(ConfigError, match="lasp was loaded, and the sentences .* are not saved"):
        LASP(LASPConfig(), SHAPE).loss(torch.tensor(0.5), said(texts()))


WRONG = [
    ({"num_groups": 5, "templates": FOUR}, "5 groups cannot share 4 templates"),
    ({"templates": ("a photo",)}, r'the template "a photo" has no \{\}'),
    ({"templates": ()}, "give at least one template"),
    ({"virtual_classes": ("bird", "bird")}, "names a class twice"),
    ({"include_virtual_in_image_loss": True}, "needs virtual_classes"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LASPConfig.read(settings, where="method")


def test_what_it_lacks_is_told() -> None:
    with pytest.raises(ConfigError, match="needs backbone.family: dual"):
        made(start={"classes": None})
    with pytest.raises(ConfigError, match=r"virtual_classes: 'dog' is a class of the task"):
        made(virtual_classes=("dog",))
    with pytest.raises(ConfigError, match="no layer norms in visual blocks"):
        LASP(LASPConfig(visual_norms="blocks"), Shape(D))
    with pytest.raises(ConfigError, match="does not give its layer norms"):
        made(visual_norms="blocks", start={"norms": None})


def test_a_budget_is_kept_and_used() -> None:
    own = LASPConfig(num_groups=3)
    config = LASP.match_budget(own, 20, SHAPE)
    more = config.model_copy(update={"num_virtual_tokens": config.num_virtual_tokens + 1})
    assert LASP.count(config, SHAPE) <= 20 * D < LASP.count(more, SHAPE)
    with pytest.raises(ConfigError, match=r"lower method\.num_groups"):
        LASP.match_budget(own, 3, SHAPE)
