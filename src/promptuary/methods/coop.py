"""CoOp (Zhou et al. 2022, arXiv 2109.01134): trained rows among the words of each class, read by a frozen text tower.

Knows no backbone, image or class.

Notation: V [k, m, d], k = 1 context for all C classes, or k = C. The text of class c is [V_c ; words of c].
"""

from __future__ import annotations

from typing import ClassVar, Literal, cast

from pydantic import Field
from torch import nn

from promptuary.methods.base import ContextConfig, Method, MethodConfig, check_size
from promptuary.prompts.contexts import context_placement, context_sets, starting_contexts
from promptuary.prompts.init import Starting
from promptuary.types import Prompt, Shape, View


class CoOpConfig(ContextConfig):
    """Settings of CoOp."""

    name: Literal["coop"] = "coop"
    class_specific: bool = Field(False, description="a context for each class instead of one for all; the paper's CSC")


class CoOp(Method):
    """One context for all classes, or one for each."""

    name = "coop"
    title = "CoOp"
    paper = "arXiv 2109.01134"
    sites = frozenset({"context"})
    modalities = frozenset({"image", "text"})
    tiny: ClassVar = {"num_virtual_tokens": 3, "init": "random", "prompt_lr": 0.05}
    groups: ClassVar = {"context": "prompt"}
    Config = CoOpConfig
    context: nn.Parameter

    @property
    def settings(self) -> CoOpConfig:
        """The settings with their own type."""
        return cast(CoOpConfig, self.config)

    @classmethod
    def size(cls, config: MethodConfig, shape: Shape) -> tuple[int, int, int]:
        """Sets, rows, width.

        Raises:
            ConfigError: a context for each class of a task that has none.
        """
        c = cast(CoOpConfig, config)
        return context_sets(c.class_specific, shape.classes), c.num_virtual_tokens, shape.width

    def build(self) -> None:
        """V [k, m, d]."""
        self.context = self.parameter(*self.size(self.config, self.shape))

    def fill(self, source: Starting) -> None:
        """The words of `init_text`, N(0, 0.02^2), or an earlier prompt, as `init` says."""
        c = self.settings
        self.context.copy_(starting_contexts(c.init, self.size(c, self.shape), source, text=c.init_text))

    def prompt(self, view: View) -> Prompt:
        """V in the text of each class, context [1, k, 1, m, d]."""
        c = self.settings
        place = context_placement(c.placement, c.num_virtual_tokens)
        return Prompt(context=self.context[None, :, None], placement=place)

    @classmethod
    def count(cls, config: MethodConfig, shape: Shape) -> int:
        """K m d."""
        sets, rows, width = cls.size(config, shape)
        return sets * rows * width

    @classmethod
    def match_budget(cls, config: MethodConfig, length: int, shape: Shape) -> MethodConfig:
        """The most rows that fit."""
        sets = cls.size(config, shape)[0]
        check_size(sets * shape.width, length * shape.width, length, "set method.class_specific: false")
        return config.model_copy(update={"num_virtual_tokens": length // sets})
