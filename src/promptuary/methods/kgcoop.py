"""KgCoOp (Yao et al. 2023, arXiv 2303.13283): CoOp's context, kept near what a hand-made sentence says of each class.

Knows no backbone, image or class.

Notation: V [m, d] the context; t_c the text feature of class c with it, w_c that of a hand-made sentence.
"""

from __future__ import annotations

from typing import ClassVar, Literal, cast

from jaxtyping import Float
from pydantic import Field, field_validator
from torch import Tensor, nn

from promptuary.methods.base import ContextConfig, Method, MethodConfig
from promptuary.prompts.contexts import context_placement, starting_contexts
from promptuary.prompts.init import Starting
from promptuary.prompts.losses import cosine_distance
from promptuary.prompts.references import at_hand, check_template, named_classes, reference_features
from promptuary.types import Losses, Outputs, Prompt, Shape, View


class KgCoOpConfig(ContextConfig):
    """Settings of KgCoOp."""

    name: Literal["kgcoop"] = "kgcoop"
    template: str = Field(
        "a photo of a {}.",
        description="the hand-made sentence, {} for the name; the release has one for each data set, such as "
        '"a photo of a {}, a type of pet."',
    )
    knowledge_weight: float = Field(
        8.0, ge=0, description="lambda, of 1 - cosine; the release: 8, which is 4 for the paper's squared distance"
    )

    @field_validator("template")
    @classmethod
    def _has_a_place(cls, value: str) -> str:
        return check_template(value)


class KgCoOp(Method):
    """A context with a pull towards hand-made knowledge."""

    name = "kgcoop"
    title = "KgCoOp"
    paper = "arXiv 2303.13283"
    sites = frozenset({"context"})
    modalities = frozenset({"image", "text"})
    tiny: ClassVar = {"num_virtual_tokens": 3, "init": "random", "prompt_lr": 0.05}
    groups: ClassVar = {"context": "prompt"}
    Config = KgCoOpConfig
    context: nn.Parameter

    @property
    def settings(self) -> KgCoOpConfig:
        """The settings with their own type."""
        return cast(KgCoOpConfig, self.config)

    def build(self) -> None:
        """V [m, d]; the w_c are of training alone and no part of a saved prompt."""
        self.context = self.parameter(self.settings.num_virtual_tokens, self.shape.width)
        self.references: Tensor | None = None
        if self.settings.knowledge_weight:
            self.studies = frozenset({"texts"})

    def fill(self, source: Starting) -> None:
        """V as `init` says; w_c once, from the frozen tower.

        Raises:
            ConfigError: the model has no text tower, or the task names no classes.
        """
        c = self.settings
        self.context.copy_(starting_contexts(c.init, (1, *self.context.shape), source, text=c.init_text)[0])
        if c.knowledge_weight:
            classes = named_classes(source, self.name)
            self.references = reference_features(classes, [c.template], classes.names)[0]

    def prompt(self, view: View) -> Prompt:
        """V in the text of every class, context [1, 1, 1, m, d]."""
        c = self.settings
        place = context_placement(c.placement, c.num_virtual_tokens)
        return Prompt(context=self.context[None, None, None], placement=place)

    def loss(self, task_loss: Float[Tensor, ""], outputs: Outputs) -> Losses:
        """L + lambda (1 - mean_c cos(t_c, w_c)).

        Raises:
            ConfigError: the prompt was loaded, and has no w_c.
        """
        weight = self.settings.knowledge_weight
        if not weight:
            return super().loss(task_loss, outputs)
        assert outputs.texts is not None
        found = outputs.texts[0]
        self.references = at_hand(self.references, found, self.name)
        away = cosine_distance(found, self.references)
        parts = {"task": float(task_loss.detach()), "knowledge": float(away.detach())}
        return Losses(task_loss + weight * away, parts)

    @classmethod
    def count(cls, config: MethodConfig, shape: Shape) -> int:
        """M d."""
        return cast(KgCoOpConfig, config).num_virtual_tokens * shape.width

    @classmethod
    def match_budget(cls, config: MethodConfig, length: int, shape: Shape) -> MethodConfig:
        """M = length."""
        return config.model_copy(update={"num_virtual_tokens": length})
