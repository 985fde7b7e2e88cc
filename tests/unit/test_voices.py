"""A causal model as a voice: states as the model has them alone, logits as its head gives them, and who cannot speak.

Knows no policy.
"""

from __future__ import annotations

import pytest
import torch

import tiny
from promptuary.errors import ConfigError
from promptuary.voices import CausalVoice


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_states_and_logits_are_those_of_the_model(kind: str) -> None:
    backbone = tiny.backbone(kind)
    voice = CausalVoice(backbone)
    rows = [voice.ids("it was"), voice.ids("red apple and blue sky"), voice.ids("so")]
    states = voice.states(rows)
    assert states.shape == (3, voice.width)
    plain = tiny.model(kind)
    for ids, state in zip(rows, states, strict=True):
        with torch.no_grad():
            wanted = plain(input_ids=torch.tensor([[*backbone.prefix, *ids]])).logits[0, -1]
        found = voice.logits(state[None])[0]
        assert found.shape == (voice.vocabulary,)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_gradients_go_through_the_head_and_stop_at_the_states() -> None:
    voice = CausalVoice(tiny.backbone("causal"))
    states = voice.states([voice.ids("it was")])
    assert not states.requires_grad
    moved = states.clone().requires_grad_()
    voice.logits(moved).logsumexp(-1).sum().backward()
    assert moved.grad is not None
    assert float(moved.grad.abs().sum()) > 0
    assert all(weight.grad is None for weight in voice.backbone.model.parameters())


def test_text_comes_back() -> None:
    voice = CausalVoice(tiny.backbone("causal"))
    assert voice.text(voice.ids("it was very cold")) == "it was very cold"


@pytest.mark.parametrize("family", ["masked", "seq2seq", "encoder"])
def test_others_do_not_speak(family: str) -> None:
    with pytest.raises(ConfigError, match="a policy speaks with a causal model"):
        CausalVoice(tiny.backbone(family))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
def test_sequences_that_grow_have_the_states_that_they_have_alone(kind: str) -> None:
    backbone = tiny.backbone(kind)
    voice, other = CausalVoice(backbone), CausalVoice(tiny.backbone(kind))
    generator = torch.Generator().manual_seed(0)
    rows = [voice.ids("it was") for _ in range(6)]
    for _ in range(4):
        found = voice.states(rows)
        alone = torch.cat([other.states([row]) for row in rows])
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)
        # rows branch, and some become equal
        rows = [[*rows[place], 10 + int(torch.randint(3, (), generator=generator))] for place in (0, 0, 2, 3, 4, 5)]
    torch.testing.assert_close(voice.states(rows[:2]), other.states(rows[:2]), atol=1e-5, rtol=1e-5)


def test_sequences_of_other_lengths_run_together() -> None:
    voice = CausalVoice(tiny.backbone("causal"))
    rows = [voice.ids("it was"), voice.ids("so")]
    torch.testing.assert_close(voice.states(rows)[1:], voice.states(rows[1:]), atol=1e-5, rtol=1e-5)
