"""The policy's network: what it says at first, which tokens it may say, and that it says what it thinks.

Knows no reward and no loss.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from promptuary.errors import ConfigError
from promptuary.seeds import seeded
from promptuary.solvers import soft_q
from promptuary.solvers.policy_net import Policy, Speech
from talk import TinyVoice

VOICE = TinyVoice()


def policy(speech: Speech, voice: TinyVoice = VOICE, loud: float = 0.0, **settings: Any) -> Policy:
    """A fresh one that learns nothing; `loud` makes it one that has."""
    made = Policy(voice, 64, speech, seeded(3), **settings)
    for weight in made.weights:
        weight.requires_grad_(False)
        weight += loud * torch.randn(weight.shape, generator=seeded(5, len(weight)))
    return made


def test_it_begins_uniform_whatever_the_voice_prefers() -> None:
    made = policy(Speech(4, bias=-10.0))
    spoken = made.speak([[1, 2], [3], [4, 5, 6]], seeded(0))
    assert spoken.ids.shape == (3, 4)
    assert float((soft_q.entropy(spoken.logits) - math.log(200)).abs().max()) < 1e-3
    assert float((spoken.logits.logsumexp(-1) - math.log(200) + 10).abs().max()) < 1e-2
    plain = VOICE.logits(VOICE.states([[1, 2]]))
    assert float(soft_q.entropy(plain)) < math.log(200) - 0.3


def test_its_numbers_are_those_of_the_paper() -> None:
    made = Policy(TinyVoice(size=4, width=768), 2048, Speech(1), seeded(0))
    assert sum(weight.numel() for weight in made.weights) == 3_148_544
    w1, b1, w2, b2 = made.weights
    for weight in (w1, w2):
        bound = 1e-4 * math.sqrt(6 / (768 + 2048))
        assert 0.99 * bound < float(weight.detach().abs().max()) <= bound
    assert bool(torch.cat([b1, b2]).eq(-1e-4).all())


def test_greedy_is_deterministic_and_does_not_depend_on_the_others() -> None:
    made = policy(Speech(5, no_repeat=True), loud=0.1)
    contexts = [[place, place + 1] for place in range(0, 40, 2)]
    together = made.speak(contexts).ids
    assert torch.equal(together, made.speak(contexts).ids)
    assert torch.equal(together, torch.cat([made.speak([one]).ids for one in contexts]))
    mixed = made.speak(contexts, seeded(2), greedy=3).ids
    assert torch.equal(mixed[-3:], together[-3:])
    assert not torch.equal(mixed[:-3], together[:-3])


def test_what_it_says_depends_on_the_context() -> None:
    found = policy(Speech(3), loud=0.1).speak([[place] for place in range(30)]).ids
    assert len({tuple(ids) for ids in found.tolist()}) > 3


def test_only_the_likeliest_are_drawn_and_the_whole_policy_is_kept() -> None:
    made = policy(Speech(4, top_k=5), loud=0.03)
    spoken = made.speak([[1]] * 400, seeded(0))
    assert bool(spoken.logits.isfinite().all())
    places = (spoken.logits > spoken.logits.gather(2, spoken.ids[..., None])).sum(-1)
    assert int(places.max()) == 4
    nucleus = policy(Speech(2, top_p=0.1), loud=0.03).speak([[1]] * 400, seeded(0))
    chance = nucleus.logits.softmax(-1)
    taken = chance.gather(2, nucleus.ids[..., None])
    assert float(chance.masked_fill(chance <= taken, 0).sum(-1).max()) < 0.1
    assert len(nucleus.ids[:, 0].unique()) > 1


def test_of_one_token_the_draw_is_the_likeliest() -> None:
    made = policy(Speech(5, top_k=1), loud=0.1)
    contexts = [[place] for place in range(10)]
    assert torch.equal(made.speak(contexts, seeded(9)).ids, made.speak(contexts).ids)


def test_draws_have_the_frequencies_of_the_policy() -> None:
    made = policy(Speech(1), TinyVoice(size=6), loud=0.08)
    spoken = made.speak([[1]] * 6000, seeded(4))
    found = torch.bincount(spoken.ids[:, 0], minlength=6) / 6000
    wanted = spoken.logits[0, 0].softmax(-1)
    assert float((found - wanted).abs().max()) < 0.025
    assert float(wanted.max()) > 0.3


def test_a_fluent_policy_never_leaves_the_likeliest_of_the_voice_alone() -> None:
    made = policy(Speech(3, fluent=20), loud=0.1)
    spoken = made.speak([[place] for place in range(60)], seeded(1))
    for place in range(3):
        plain = VOICE.logits(spoken.states[:, place])
        allowed = torch.zeros_like(plain, dtype=torch.bool).scatter_(1, plain.topk(20, dim=1).indices, True)
        assert bool(allowed.gather(1, spoken.ids[:, place : place + 1]).all())
        assert torch.equal(spoken.logits[:, place] > -math.inf, allowed)


def test_no_token_is_said_twice_if_that_is_forbidden() -> None:
    contexts = [[1]] * 50
    free = policy(Speech(6, top_k=5), loud=0.1).speak(contexts, seeded(1)).ids.tolist()
    once = policy(Speech(6, top_k=5, no_repeat=True), loud=0.1).speak(contexts, seeded(1)).ids.tolist()
    assert any(len(set(ids)) < 6 for ids in free)
    assert all(len(set(ids)) == 6 for ids in once)


def test_tokens_that_do_not_come_back_from_text_are_not_said() -> None:
    broken = range(0, 200, 2)
    voice = TinyVoice(broken=broken)
    assert bool((policy(Speech(2), voice).speak([[1]] * 200, seeded(1)).ids % 2 == 0).any())
    spoken = policy(Speech(2), voice, sayable=True).speak([[1]] * 200, seeded(1))
    assert bool((spoken.ids % 2 == 1).all())
    assert float((soft_q.entropy(spoken.logits) - math.log(100)).abs().max()) < 1e-3
    fluent = policy(Speech(2, fluent=3), voice, sayable=True).speak([[1]] * 200, seeded(1)).ids
    assert bool((fluent % 2 == 1).all())
    with pytest.raises(ConfigError, match="1 tokens that may be said, and a prompt needs 2"):
        policy(Speech(2, no_repeat=True), TinyVoice(size=2, broken=[0]), sayable=True).speak([[1]], seeded(1))


@pytest.mark.parametrize("speech", [Speech(5, top_k=50), Speech(5, fluent=9), Speech(5, no_repeat=True, bias=3.0)])
def test_teacher_forcing_gives_the_log_probabilities_of_the_draw(speech: Speech) -> None:
    made = policy(speech, loud=0.05)
    contexts = [[place, 7] for place in range(8)]
    spoken = made.speak(contexts, seeded(6))
    drawn = soft_q.along(spoken.logits, spoken.ids).a
    for place in range(5):
        sequences = [[*context, *ids[:place]] for context, ids in zip(contexts, spoken.ids.tolist(), strict=True)]
        again = made.logits(VOICE.states(sequences)).masked_fill(spoken.logits[:, place] == -math.inf, -math.inf)
        taken = again.log_softmax(-1).gather(1, spoken.ids[:, place : place + 1])[:, 0]
        assert float((taken - drawn[:, place]).abs().max()) < 1e-5
    assert torch.allclose(made.likewise(spoken, made.weights), spoken.logits, atol=1e-5)


def test_the_same_seed_says_the_same_and_no_state_runs_twice() -> None:
    voice = TinyVoice()
    made = policy(Speech(4), voice)
    one, two = (made.speak([[1]] * 10, seeded(8)).ids for _ in range(2))
    other = made.speak([[1]] * 10, seeded(9))
    assert torch.equal(one, two)
    assert not torch.equal(one, other.ids)
    before = voice.ran
    made.likewise(other, made.weights)
    assert before == voice.ran == 3 * 4 * 10
