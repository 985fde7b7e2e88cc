"""RLPrompt (Deng et al. 2022, arXiv 2205.12548): words that a policy writes, learnt from rewards alone.

Knows no model and not how the policy learns; `solvers/policy.py` does that. What is here is the reward. Rebuilt from
the released code, also as it was when the paper was written, and from write-ups, without the paper's full text.

Notation: p the probabilities of the label words, c the right label. gap = p_c - max over the others.
R = lambda_2 gap where the answer is right (gap > 0), lambda_1 gap where it is wrong; the mean over examples counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, cast

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from promptuary.methods.words import Draw, TextConfig, TextMethod
from promptuary.prompts.losses import label_gap


class RLPromptConfig(TextConfig):
    """Settings of RLPrompt."""

    name: Literal["rlprompt"] = "rlprompt"
    placement: Literal["front", "end"] = Field(
        "end",
        description="where the words go if the template has no `{prompt}`; the paper: `{text} {prompt} {mask}`, and "
        "`{mask} {prompt} {text}` for AG News, which a template says",
    )
    num_tokens: int = Field(
        5, ge=1, description="T, tokens that the policy writes, in its own vocabulary; the paper: 5, also 2"
    )
    wrong: float = Field(180.0, gt=0, description="lambda_1, weight of the gap where the answer is wrong; release: 180")
    right: float = Field(200.0, gt=0, description="lambda_2, weight of the gap where it is right; release: 200")


class RLPrompt(TextMethod):
    """Words from a policy that soft Q-learning trains."""

    name = "rlprompt"
    title = "RLPrompt"
    paper = "arXiv 2205.12548"
    reconstructed = True
    solver = "policy"
    tiny: ClassVar[Mapping[str, Any]] = {"num_tokens": 2}
    Config = RLPromptConfig

    @property
    def settings(self) -> RLPromptConfig:
        """The settings with their own type."""
        return cast(RLPromptConfig, self.config)

    @property
    def advice(self) -> Mapping[str, Any]:
        """How many tokens the policy writes."""
        return {"num_tokens": self.settings.num_tokens}

    def reward(self, probabilities: Float[Tensor, "n c"], right: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The weighted gap, -lambda_1 to lambda_2; a tie counts as wrong and gives 0."""
        # the release masks every label with the right one's probability, so that a tie gives up to 300 there
        gap = label_gap(probabilities, right)
        return torch.where(gap > 0, self.settings.right * gap, self.settings.wrong * gap)

    def proposal(self, number: int, draw: Draw) -> str | None:
        """Tokens drawn at random, for a search without a policy."""
        return draw.words(self.settings.num_tokens, draw.generator)
