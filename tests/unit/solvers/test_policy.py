"""The policy solver: what a step changes, what it finds, exact resuming, and faults.

Knows no method: a tiny random voice, and words that are rewarded by a table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from promptuary import registry
from promptuary.errors import ConfigError, Interrupted
from promptuary.seeds import seeded
from promptuary.solvers import soft_q
from promptuary.solvers.base import Job, StepResult
from promptuary.solvers.policy import PolicyConfig, PolicySolver
from promptuary.types import Batch, Losses
from talk import Rewarded, TinyVoice

VOICE = TinyVoice()


def batch(*index: int) -> Batch:
    ones = torch.ones(len(index), 1, dtype=torch.long)
    return Batch(ones, ones, torch.tensor(index))


class Nothing:
    """A learner that must not be asked."""

    def loss(self, batch: Batch) -> Losses:
        raise AssertionError("asked for a loss")

    def weight(self, batch: Batch) -> int:
        raise AssertionError("asked for a weight")


def length_of(text: str, example: Mapping[str, Any]) -> float:
    """The sum of the token numbers, and a little for the example."""
    return sum(int(word[1:]) for word in text.split()) + 0.5 * example["place"]


def solver(words: Rewarded, voice: TinyVoice = VOICE, seed: int = 1, **settings: Any) -> PolicySolver:
    plain = {"num_tokens": 3, "hidden": 64, "prompts": 6, "learning_rate": 1e-3}
    config = PolicyConfig.model_validate({**plain, **settings})
    found = PolicySolver.of(config, Job([], 10, seed, words=words, voice=lambda name: voice))
    assert isinstance(found, PolicySolver)
    return found


def go(made: PolicySolver, steps: int, *batches: Batch) -> list[StepResult]:
    return [made.step(Nothing(), batches or [batch(0, 1, 2)], 3.0) for _ in range(steps)]


# ---- a step ---------------------------------------------------------------------------------------------------------


def test_a_step_moves_the_policy_alone_and_no_gradient_reaches_anything_else() -> None:
    words, voice = Rewarded(length_of), TinyVoice()
    frozen = {name: value.clone() for name, value in voice.state_dict().items()}
    made = solver(words, voice)
    first = [weight.detach().clone() for weight in made.policy.weights]
    results = go(made, 3)
    assert all(one.applied and math.isfinite(one.loss) and one.grad_norm > 0 for one in results)
    assert all(torch.equal(value, frozen[name]) for name, value in voice.state_dict().items())
    assert all(parameter.grad is None for parameter in voice.parameters())
    assert not any(one.requires_grad for one in made.target)
    assert all(not torch.equal(old, new) for old, new in zip(first, made.policy.weights, strict=True))


def test_the_target_follows_before_the_loss_by_exactly_its_part() -> None:
    made = solver(Rewarded(length_of), rho=0.25)
    for _ in range(3):
        old, new = made.target, [weight.detach().clone() for weight in made.policy.weights]
        go(made, 1)
        for found, one, other in zip(made.target, old, new, strict=True):
            assert torch.equal(found, 0.75 * one + 0.25 * other)


def test_a_target_may_follow_by_copies() -> None:
    made = solver(Rewarded(length_of), target="copy", copy_every=2)
    for step in range(5):
        old, new = made.target, [weight.detach().clone() for weight in made.policy.weights]
        go(made, 1)
        wanted = new if step % 2 == 0 else old
        assert all(torch.equal(found, one) for found, one in zip(made.target, wanted, strict=True))


@pytest.mark.parametrize("settings", [{}, {"coefficient": 0.5}, {"loss": "v1"}, {"loss": "v3"}, {"normalise": False}])
def test_the_loss_of_a_step_is_that_of_its_prompts(settings: dict[str, Any]) -> None:
    words = Rewarded(length_of)
    made = solver(words, shape=(-1.0, 3.0), **settings)
    (result,) = go(made, 1)
    fresh = solver(words, shape=(-1.0, 3.0), **settings)
    spoken = fresh.policy.speak([fresh.context] * 7, seeded(1, 1, 0), greedy=1)
    assert [fresh.policy.text(ids) for ids in spoken.ids.tolist()] == words.asked[0]
    net = soft_q.along(spoken.logits[:6].detach(), spoken.ids[:6])
    rewards = torch.tensor([length_of(text, {"place": 1}) for text in words.asked[0][:6]])
    if settings.get("normalise", True):
        rewards = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-4)
    name = settings.get("loss", "v2_v2r_v3_v3r")
    # both networks are still the same
    wanted = soft_q.losses(name, settings.get("coefficient"), net, net, -1 + 4 * rewards).mean()
    assert result.loss == pytest.approx(float(wanted), rel=1e-4)


def test_all_prompts_are_scored_at_once_on_the_examples_of_the_batch() -> None:
    words = Rewarded(length_of, examples=5)
    (result,) = go(solver(words), 1, batch(3, 0), batch(4))
    assert words.rows == [[3, 0, 4]]
    assert result.calls == len(words.asked[0]) == 7
    texts = words.asked[0][:6]
    rewards = [sum(length_of(text, {"place": place}) for place in (3, 0, 4)) / 3 for text in texts]
    assert result.parts["reward"] == pytest.approx(sum(rewards) / 6, rel=1e-5)
    assert result.parts["reward_max"] == pytest.approx(max(rewards), rel=1e-5)
    assert result.parts["score"] == result.parts["score_max"] == 1
    assert result.parts["entropy"] == pytest.approx(math.log(200), abs=1e-3)
    assert result.parts["value"] == pytest.approx(math.log(200), abs=1e-2)
    tokens = [len(set(text.split())) for text in texts]
    assert result.parts["distinct_tokens"] == pytest.approx(sum(tokens) / 6)
    assert result.parts["distinct_prompts"] == len(set(texts))


def test_processes_with_parts_of_the_rows_learn_what_one_does() -> None:
    alone, halves = solver(Rewarded(length_of, 4)), solver(Rewarded(length_of, 4))
    (whole,) = go(alone, 1, batch(0, 1, 2, 3))

    def reduce(value: Tensor) -> Tensor:
        # what the other process adds: the same texts on rows 2 and 3
        if value.ndim == 0:
            return value + 2
        texts = halves.words.asked[-1]  # type: ignore[attr-defined]
        more = torch.tensor([[2 * length_of(text, {"place": 2.5}) for text in texts], [2.0] * len(texts)])
        return value + more

    part = halves.step(Nothing(), [batch(0, 1)], 4.0, reduce=reduce)
    assert part.loss == pytest.approx(whole.loss, rel=1e-4)
    assert part.parts["reward"] == pytest.approx(whole.parts["reward"], rel=1e-5)


def test_the_best_text_is_kept_and_of_equal_ones_the_earlier() -> None:
    words = Rewarded(length_of)
    made = solver(words, top=4)
    for _ in range(6):
        go(made, 1)
        tried = list(dict.fromkeys(text for texts in words.asked for text in texts))
        ordered = sorted(tried, key=lambda text: -length_of(text, {"place": 0}))
        assert words.text == ordered[0]
        assert [one.text for one in made.found] == ordered[:4]
    equal = Rewarded(lambda text, example: 1.0)
    even = solver(equal)
    go(even, 4)
    assert equal.text == equal.asked[0][0]
    assert even.best is not None
    assert even.best.step == 0


def test_the_greedy_text_is_scored_among_the_others_or_is_the_prompt_itself() -> None:
    words = Rewarded(length_of)
    made = solver(words, no_repeat=True)
    likeliest = made.likeliest()
    go(made, 1)
    assert words.asked[0][-1] == likeliest
    paper = Rewarded(length_of)
    other = solver(paper, keep="greedy")
    (result,) = go(other, 1)
    assert result.calls == len(paper.asked[0]) == 6
    assert paper.text == other.likeliest()


def table(seed: int) -> Tensor:
    """Rewards of all prompts of two tokens: how good each is first and second, and how well they go together."""
    generator = seeded(seed)
    first, second = torch.randn(200, 1, generator=generator), torch.randn(1, 200, generator=generator)
    return 20 * first + 20 * second + 10 * torch.randn(200, 200, generator=generator)


@pytest.mark.parametrize(("seed", "coefficient", "steps", "sampled"), [(1, None, 400, 0.5), (1, 0.5, 250, 0.2)])
def test_it_finds_most_of_the_best_reward_of_all_prompts(
    seed: int, coefficient: float | None, steps: int, sampled: float
) -> None:
    # of six seeds, the likeliest prompts of 500 steps reach 68, 72, 78, 99, 100 and 100 % without a coefficient, which
    # may settle too early, and 87 to 100 % with 0.5; a random prompt has 0 on average
    rewards = table(seed)
    best = float(rewards.max())

    def reward(text: str, example: Mapping[str, Any]) -> float:
        first, second = text.split()
        return float(rewards[int(first[1:]), int(second[1:])])

    words = Rewarded(reward, 1)
    made = solver(words, TinyVoice(seed=seed), seed, num_tokens=2, hidden=256, prompts=16, coefficient=coefficient)
    results = go(made, steps, batch(0))
    greedy = max(reward(texts[-1], {}) for texts in words.asked)
    assert greedy >= 0.7 * best
    assert reward(words.text, {}) >= 0.8 * best
    assert reward(words.text, {}) == max(reward(text, {}) for texts in words.asked for text in texts)
    late = sum(one.parts["reward"] for one in results[-50:]) / 50
    assert late > sampled * best
    # the release's loss settles on few prompts, the whole one goes on looking
    assert (results[-1].parts["entropy"] < 2) is (coefficient is None)


# ---- state, faults, settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [0, 1, 4])
@pytest.mark.parametrize("settings", [{}, {"keep": "greedy", "target": "copy", "copy_every": 3}])
def test_it_goes_on_bit_for_bit(stop: int, settings: dict[str, Any]) -> None:
    whole, parts = Rewarded(length_of), Rewarded(length_of)
    straight = solver(whole, **settings)
    wanted = go(straight, 7)
    begun = solver(parts, **settings)
    found = go(begun, stop)
    tensors, numbers = begun.state()
    kept = {name: value.clone() for name, value in tensors.items()}
    numbers = json.loads(json.dumps(numbers))
    go(begun, 1)  # what was saved does not change with it
    parts.asked.pop()
    again = solver(parts, **settings)
    again.restore(kept, numbers)
    found += go(again, 7 - stop)
    assert [one.loss for one in found] == [one.loss for one in wanted]
    assert [one.parts for one in found] == [one.parts for one in wanted]
    assert parts.asked == whole.asked
    assert parts.text == whole.text
    assert again.found == straight.found
    for name, value in straight.state()[0].items():
        assert torch.equal(value, again.state()[0][name]), name
    assert straight.state()[1] == again.state()[1]


def test_a_state_of_other_settings_is_refused() -> None:
    words = Rewarded(length_of)
    state = solver(words).state()
    for other in (solver(words, hidden=32), solver(words, seed=2), solver(words, top_k=3)):
        with pytest.raises(ConfigError, match="belongs to another policy"):
            other.restore(*state)
    solver(words, budget=700, top=9).restore(*state)


def test_rewards_that_are_no_numbers_change_nothing_and_other_prompts_follow() -> None:
    words = Rewarded(lambda text, example: math.nan)
    made = solver(words)
    before = {name: value.clone() for name, value in made.state()[0].items()}
    (result,) = go(made, 1)
    assert result.fault == "loss"
    assert not result.applied
    assert result.calls == 7
    assert all(torch.equal(value, made.state()[0][name]) for name, value in before.items())
    assert words.text == "as it was"
    assert not made.found
    go(made, 1)
    assert words.asked[0] != words.asked[1]


def test_a_prompt_without_a_finite_reward_takes_no_part() -> None:
    spoilt = Rewarded(lambda text, example: math.nan if int(text.split()[0][1:]) % 2 else length_of(text, example))
    made = solver(spoilt, prompts=20)
    (result,) = go(made, 1)
    odd = [text for text in spoilt.asked[0][:20] if int(text.split()[0][1:]) % 2]
    assert result.applied
    assert result.parts["unscored"] == len(odd) > 0
    assert all(bool(weight.isfinite().all()) for weight in made.policy.weights)
    assert int(spoilt.text.split()[0][1:]) % 2 == 0


def test_a_rate_beyond_all_measure_is_put_back() -> None:
    words = Rewarded(length_of)
    made = solver(words, learning_rate=1e38)
    first = {name: value.clone() for name, value in made.state()[0].items()}
    results = go(made, 4)
    faults = [one for one in results if not one.applied]
    assert faults
    if results[0].fault:
        assert all(torch.equal(value, first[name]) for name, value in made.state()[0].items() if name in first)
    assert all(bool(weight.isfinite().all()) for weight in made.policy.weights)


def test_a_stop_in_the_middle_of_a_step_changes_nothing() -> None:
    words = Rewarded(length_of)
    made = solver(words)
    go(made, 2)
    before, asked, calls = made.state(), list(words.asked), [0]

    def check() -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise Interrupted("stop")

    with pytest.raises(Interrupted):
        made.step(Nothing(), [batch(0, 1, 2)], 3.0, check=check)
    assert calls == [2]
    assert words.asked == asked
    after = made.state()
    assert after[1] == before[1]
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())


def test_rates_and_places_can_be_set_from_outside() -> None:
    words = Rewarded(length_of)
    made = solver(words)
    assert made.rates() == {"policy": 1e-3}
    made.slow_down(0.5)
    assert made.rates() == {"policy": 5e-4}
    go(made, 3)
    late, place = Rewarded(length_of), 2
    other = solver(late)
    other.seek(place)
    go(other, 1)
    # both policies are still close to uniform, so the same draws give the same prompts, but for a few
    assert sum(a == b for a, b in zip(late.asked[0], words.asked[place], strict=True)) >= 3
    assert late.asked[0] != words.asked[0]


def test_a_budget_counts_every_prompt_that_is_scored() -> None:
    config = PolicyConfig(prompts=16, budget=100)
    assert config.scored == 17
    assert config.steps(999) == 5
    assert PolicyConfig(prompts=16, budget=100, keep="greedy").steps(999) == 6
    assert PolicyConfig().steps(999) == 999
    with pytest.raises(ConfigError, match="a budget of 10 does not hold one step of 17 prompts"):
        PolicyConfig(budget=10).steps(1)


def test_settings_that_cannot_be_are_refused_in_one_line() -> None:
    cases = {
        "loss v1 has one": {"loss": "v1", "coefficient": 0.5},
        "keep: best compares": {"rows": "batch", "keep": "best"},
        "smaller value first": {"shape": [5, 0]},
        "at least 2": {"prompts": 1},
    }
    for message, settings in cases.items():
        with pytest.raises(ConfigError, match=message) as caught:
            PolicyConfig.read({"name": "policy", **settings}, where="solver")
        assert "\n" not in str(caught.value)
    batches = PolicyConfig(rows="batch")
    assert not batches.whole
    assert not batches.keeps_best
    assert PolicyConfig().whole
    assert PolicyConfig().keeps_best


def test_what_it_needs_is_asked_for_in_one_line() -> None:
    words, opened = Rewarded(length_of), list[str | None]()

    def voice(name: str | None) -> TinyVoice:
        opened.append(name)
        return VOICE

    with pytest.raises(ConfigError, match="this method holds none"):
        PolicySolver.of(PolicyConfig(), Job([], 1, 0, voice=voice))
    with pytest.raises(ConfigError, match="none can be opened here"):
        PolicySolver.of(PolicyConfig(), Job([], 1, 0, words=words))
    with pytest.raises(ConfigError, match='placeholder " " has no tokens'):
        PolicySolver.of(PolicyConfig(placeholder=" "), Job([], 1, 0, words=words, voice=voice))
    PolicySolver.of(PolicyConfig(model="distilgpt2"), Job([], 1, 0, words=words, voice=voice))
    assert opened == [None, "distilgpt2"]


def test_it_is_known_by_its_name_and_its_helpers_are_no_solvers() -> None:
    assert registry.load("solvers", "policy") is PolicySolver
    assert not {"policy_net", "soft_q"} & set(registry.names("solvers"))


# ---- prompts for single rows ----------------------------------------------------------------------------------------


def by_row(words: Rewarded, **settings: Any) -> PolicySolver:
    return solver(words, **{"rows": "batch", "dealt": True, "prompts": 4, **settings})


def test_prompts_are_dealt_out_to_the_rows_of_a_batch() -> None:
    words = Rewarded(length_of, examples=5)
    made = by_row(words)
    (result,) = go(made, 1, batch(3, 0))
    assert words.rows == [[3], [0]]
    assert [len(texts) for texts in words.asked] == [2, 2]
    assert result.calls == 4
    assert made.words.text == made.likeliest()
    # rewards on different rows do not compare, so none is the best
    assert made.found == []
    assert "best" not in result.parts


def test_the_loss_of_dealt_prompts_compares_those_of_a_row() -> None:
    words = Rewarded(lambda text, example: length_of(text, example) + 1e4 * example["place"])
    made = by_row(words)
    (result,) = go(made, 1, batch(0, 1))
    fresh = by_row(Rewarded(length_of))
    spoken = fresh.policy.speak([fresh.context] * 4, seeded(1, 1, 0))
    texts = [fresh.policy.text(ids) for ids in spoken.ids.tolist()]
    net = soft_q.along(spoken.logits.detach(), spoken.ids)
    rewards = torch.tensor([length_of(text, {"place": 0}) for text in texts]).view(2, 2)
    z = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, correction=0, keepdim=True) + 1e-4)
    wanted = soft_q.losses("v2_v2r_v3_v3r", None, net, net, 5 * z.flatten()).mean()
    assert result.loss == pytest.approx(float(wanted), rel=1e-3)


def test_a_policy_may_write_for_each_row() -> None:
    words = Rewarded(length_of, examples=5)
    words.examples = [{"text": f"w{place} w{place + 7}", "place": place} for place in range(5)]
    made = by_row(words, per_input=True)
    assert words.policy is made.policy
    contexts = list[list[list[int]]]()
    speak = made.policy.speak

    def noted(given: Any, *more: Any, **options: Any) -> Any:
        contexts.append([list(one) for one in given])
        return speak(given, *more, **options)

    made.policy.speak = noted  # type: ignore[method-assign]
    before = words.text
    go(made, 1, batch(2, 4))
    assert contexts == [[[2, 9], [2, 9], [4, 11], [4, 11]]]
    assert words.text == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dealt": True}, "dealt: prompts are dealt out to the rows of a batch; use rows: batch"),
        ({"per_input": True}, "per_input: a prompt for one row is scored on that row; use dealt: true"),
    ],
)
def test_rows_of_their_own_go_with_batches(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PolicyConfig.read(settings, where="solver")
