"""What methods whose prompt is words have in common: a text instead of tensors, where it stands, what counts as good.

Knows no tokenizer, no model and no way of searching; a solver tries texts and says which one is the prompt.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from promptuary.errors import ConfigError
from promptuary.methods.base import Method, MethodConfig
from promptuary.prompts.init import Starting
from promptuary.prompts.losses import label_gap
from promptuary.settings import Settings
from promptuary.types import Prompt, Shape, View

UNUSED = ("init_prompt", "prompt_lr", "lr_unit", "weight_decay")
"""Settings of tensors, which words have none of."""


class TextConfig(MethodConfig):
    """Settings of a method whose prompt is words."""

    init: Literal["text"] = Field("text", description="words start as `init_text` says")
    init_text: str | None = Field(None, description="the words to start from; without it none")
    placement: Literal["front", "end"] = Field(
        "front",
        description="where the words go if the template has no `{prompt}`: before everything, in a line of their own, "
        "or right before the answer",
    )


class PolicyFacts(Settings):
    """What a policy that writes a prompt for each input speaks with, and how; a run writes it, nobody else."""

    model: str = Field(min_length=1, description="hub name or folder of its voice")
    identity: dict[str, str] = Field(description="what tells that model from another")
    width: int = Field(ge=1, le=2**20, description="of its states")
    hidden: int = Field(ge=1, le=2**20, description="of the trained network")
    num_tokens: int = Field(ge=1, le=2**12, description="tokens of a prompt, in the voice's own vocabulary")
    fluent: int | None = Field(None, ge=1, description="as the solver has it")
    no_repeat: bool = Field(False, description="as the solver has it")
    sayable: bool = Field(True, description="as the solver has it")


@dataclass(frozen=True)
class Draw:
    """What a text may be drawn from.

    `examples`: labelled, to learn from; `shown`: an example with its right answer, as the task asks it; `words`: a text
    of so many tokens of the model's vocabulary, drawn from the generator.
    """

    examples: Sequence[Mapping[str, Any]]
    shown: Callable[[Mapping[str, Any]], str]
    words: Callable[[int, torch.Generator], str]
    generator: torch.Generator


class TextMethod(Method):
    """A prompt of words.

    It has no parameters: what searches them is a solver for words (`policy`, `rewrite`, `edits` or `proposals`).
    """

    sites = frozenset({"text"})
    groups: ClassVar[Mapping[str, str]] = {}
    solver = "proposals"
    text: str
    policy: PolicyFacts | None = None
    """Of a prompt that is written for each input: by what."""
    policy_weights: nn.ParameterList
    """The trained tensors of that."""

    @property
    def words(self) -> TextConfig:
        """The settings with the type that all of them have in common."""
        return cast(TextConfig, self.config)

    def build(self) -> None:
        """No tensor: the text is empty until it is started.

        Raises:
            ConfigError: a setting of tensors was given.
        """
        self.text, self.words_at = "", self.words.placement
        fields = type(self.config).model_fields
        for name in UNUSED:
            if getattr(self.config, name) != fields[name].default:
                raise ConfigError(f"method.{name}: {self.name} is words and has no tensors; leave it out")

    def fill(self, source: Starting) -> None:
        """The words of the settings."""
        self.text = (self.config.init_text or "").strip()

    def prompt(self, view: View) -> Prompt:
        """The words."""
        return Prompt(text=self.text)

    @classmethod
    def count(cls, config: MethodConfig, shape: Shape) -> int:
        """None."""
        return 0

    @classmethod
    def match_budget(cls, config: MethodConfig, length: int, shape: Shape) -> MethodConfig:
        """As they are: words have no trained numbers, so any budget holds them."""
        return config

    def saying(self, text: str) -> TextMethod:
        """The same with these words for all inputs."""
        other = copy.copy(self)
        other.text, other.policy = text, None
        return other

    def written_by(self, policy: PolicyFacts, weights: Sequence[nn.Parameter]) -> None:
        """From here on the prompt is what a policy writes for each input.

        Raises:
            ConfigError: this method has one prompt for all.
        """
        raise ConfigError(
            f"solver.per_input: method {self.name} has one prompt for all inputs; use method: {{name: rlprompt}}"
        )

    def proposal(self, number: int, draw: Draw) -> str | None:
        """The text that is tried as number 0, 1, ... of a plain search; None if there is no such one; default: none."""
        return self.text if number == 0 else None

    def reward(self, probabilities: Float[Tensor, "n c"], right: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """How good the answers to n examples are, given the probability of each label and which one is right.

        By default the gap to the best wrong label, -1 to 1.
        """
        return label_gap(probabilities, right)
