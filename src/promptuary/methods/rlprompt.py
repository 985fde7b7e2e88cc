"""RLPrompt (Deng et al. 2022, arXiv 2205.12548): words that a policy writes, learnt from rewards alone.

Knows no model and not how the policy learns; `solvers/policy.py` does that. What is here is the reward. Rebuilt from
the released code, also as it was when the paper was written, and from write-ups, without the paper's full text.

Notation: p the probabilities of the label words, c the right label. gap = p_c - max over the others.
R = lambda_2 gap where the answer is right (gap > 0), lambda_1 gap where it is wrong; the mean over examples counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from promptuary.errors import NotFoldable
from promptuary.methods.base import MethodConfig
from promptuary.methods.words import Draw, PolicyFacts, TextConfig, TextMethod
from promptuary.prompts.losses import label_gap
from promptuary.types import Prompt, Shape, View


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
    policy: PolicyFacts | None = Field(
        None, description="written by a run with `solver.per_input`, whose prompts a policy writes: never set by hand"
    )


class RLPrompt(TextMethod):
    """Words from a policy that soft Q-learning trains."""

    name = "rlprompt"
    title = "RLPrompt"
    paper = "arXiv 2205.12548"
    reconstructed = True
    solver = "policy"
    tiny: ClassVar[Mapping[str, Any]] = {"num_tokens": 2}
    Config = RLPromptConfig

    def build(self) -> None:
        """No tensor, or those of the policy."""
        super().build()
        self.policy = self.settings.policy
        if self.policy is not None:
            self._hold([self.parameter(*size) for size in sizes(self.policy)])

    @property
    def depends(self) -> bool:
        """Where a policy writes the words."""
        return self.policy is not None

    def prompt(self, view: View) -> Prompt:
        """The words.

        Raises:
            NotFoldable: a policy writes them for each input; whoever has the input asks it.
        """
        if self.policy is not None:
            raise NotFoldable(
                "a policy writes this prompt for each input, so there is no single one; it is used by predict and "
                "evaluate alone"
            )
        return super().prompt(view)

    def written_by(self, policy: PolicyFacts, weights: Sequence[nn.Parameter]) -> None:
        """The weights are held as they are, so that what a solver changes in them is changed here."""
        self.config = self.config.model_copy(update={"policy": policy})
        self.policy = policy
        self._hold(weights)

    def _hold(self, weights: Sequence[nn.Parameter]) -> None:
        """The policy's tensors, whose rate is the solver's."""
        self.policy_weights = nn.ParameterList(weights)
        self.groups = {f"policy_weights.{place}": "policy" for place in range(len(self.policy_weights))}  # type: ignore[misc]

    def rate(self, group: str) -> float:
        """That of the solver, which has it in its own settings."""
        return 0.0

    @classmethod
    def count(cls, config: MethodConfig, shape: Shape) -> int:
        """2 m h + m + h of a policy with states of width h and a hidden layer of width m; else none."""
        policy = cast(RLPromptConfig, config).policy
        return 0 if policy is None else sum(math.prod(size) for size in sizes(policy))

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


def sizes(policy: PolicyFacts) -> list[tuple[int, ...]]:
    """Of its weights and biases, in the order in which `policy_net.Policy` has them."""
    m, h = policy.hidden, policy.width
    return [(m, h), (m,), (h, m), (h,)]
