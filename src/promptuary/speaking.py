"""A prompt of words that a policy writes for each input: its words for examples, and the policy of a saved prompt.

Knows no reward, no solver and no method by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from promptuary.backbones.base import BackboneConfig
from promptuary.building import open_backbone
from promptuary.data.check import as_text
from promptuary.methods.words import TextMethod
from promptuary.seeds import seeded
from promptuary.solvers.policy_net import Policy, Speech
from promptuary.voices import CausalVoice

if TYPE_CHECKING:
    from promptuary.tuned import Tuned

AT_ONCE = 64
"""Inputs that prompts are written for in one batch; our choice."""


class Speaking:
    """What writes the words for an input: always the likeliest ones."""

    def __init__(self, policy: Policy, field: str) -> None:
        """Around a policy, which may go on learning.

        Args:
            policy: over tokens.
            field: of an example, with the text that it is conditioned on.
        """
        self.policy, self.field = policy, field

    @classmethod
    def of(cls, tuned: Tuned) -> Speaking:
        """That of a saved prompt; its voice is opened, unless it is the model that the prompt is on.

        Raises:
            FingerprintError: the voice is not the one that the policy learnt with.
            ConfigError: no such model.
        """
        method, own = tuned.method, tuned.backbone
        assert isinstance(method, TextMethod)
        assert method.policy is not None
        facts = method.policy
        backbone = own
        if facts.model != own.config.model:
            device, dtype = str(own.device), own.config.dtype
            backbone = open_backbone(BackboneConfig(model=facts.model, family="causal", device=device, dtype=dtype))
        backbone.check_identity(dict(facts.identity), facts.model)
        speech = Speech(facts.num_tokens, fluent=facts.fluent, no_repeat=facts.no_repeat)
        policy = Policy(CausalVoice(backbone), facts.hidden, speech, seeded(0), facts.sayable)
        policy.weights = list(method.policy_weights)
        return cls(policy, tuned.task.asked(tuned.task.config)[0])

    @torch.no_grad()
    def texts(self, examples: Sequence[Mapping[str, Any]]) -> list[str]:
        """The words for each example.

        Raises:
            DataError: the field is missing, blank or no text.
        """
        found = list[str]()
        for begin in range(0, len(examples), AT_ONCE):
            inputs = [as_text(one.get(self.field), self.field) for one in examples[begin : begin + AT_ONCE]]
            spoken = self.policy.speak([self.policy.context(text) for text in inputs])
            found += [self.policy.text(ids) for ids in spoken.ids.tolist()]
        return found
