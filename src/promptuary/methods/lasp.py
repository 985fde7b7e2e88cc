"""LASP (Bulat and Tzimiropoulos 2023, arXiv 2210.01115): contexts that must take hand-made sentences for their classes.

Knows no backbone, image or class. The release has one group of rows; several are rebuilt from a description, and
docs/methods/lasp.md says which questions are open.

Notation: V [g, m, d] contexts, t_gc [h] the text feature of class c with V_g, b [h] a bias of all classes,
h_lc that of a hand-made sentence l, s a scale; a hat is a unit vector.
"""

from __future__ import annotations

from typing import ClassVar, Literal, cast

import torch
from jaxtyping import Float
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from promptuary.errors import ConfigError
from promptuary.methods.base import ContextConfig, Method, MethodConfig, check_size
from promptuary.prompts import references
from promptuary.prompts.contexts import context_placement, random_contexts, starting_contexts
from promptuary.prompts.init import Starting
from promptuary.prompts.losses import text_to_text
from promptuary.seeds import Chance
from promptuary.types import Losses, Outputs, Prompt, Shape, View

NOISE = 1
"""Purpose of the noise on the sentences, among the draws of a step."""


class LASPConfig(ContextConfig):
    """Settings of LASP."""

    name: Literal["lasp"] = "lasp"
    num_groups: int = Field(
        1, ge=1, description="g, contexts whose scores are averaged; the release has 1, the paper more"
    )
    templates: Literal["release"] | tuple[str, ...] = Field(
        "release", description="the hand-made sentences, {} for the name; the 35 of the release for every data set"
    )
    assignment: Literal["round_robin", "random"] = Field(
        "round_robin", description="which context has which sentences: in turn, or drawn; our choice"
    )
    text_weight: float = Field(
        5.0, ge=0, description="alpha, of the loss on sentences; the release: 5, or 10 on Caltech101, DTD and UCF101"
    )
    text_scale: float | None = Field(
        None, gt=0, description="s, of the scores of sentences; without it the model's own, as in the release"
    )
    ref_noise_std: float = Field(
        0.0,
        ge=0,
        description="of normal noise on the sentences' unit features in training; the release: 0.05, unmentioned",
    )
    ref_noise_prob: float = Field(0.5, ge=0, le=1, description="chance of a step to have that noise; the release")
    virtual_classes: tuple[str, ...] = Field(
        (), description="names without images, which take part in the loss on sentences (LASP-V); the release has all"
    )
    include_virtual_in_image_loss: bool = Field(
        False, description="whether images are told apart from these names too, at text_scale; the release: no"
    )
    bias: bool = Field(True, description="b, added to every class before it is normalised; the release")
    visual_norms: Literal["none", "blocks"] = Field(
        "none",
        description='"blocks": the layer norms in the blocks of the model that sees are trained too (the release); '
        '"none": image features stay as they are, and can be kept',
    )
    bias_lr: float | None = Field(None, gt=0, description="learning rate of b; without it prompt_lr, as in the release")
    norms_lr: float | None = Field(
        None, gt=0, description="learning rate of layer norms; without it a tenth of prompt_lr, as in the release"
    )

    @field_validator("templates")
    @classmethod
    def _have_places(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value:
            raise ValueError("give at least one template")
        if not isinstance(value, str):
            for template in value:
                references.check_template(template)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> LASPConfig:
        if self.num_groups > len(self.sentences):
            raise ValueError(f"{self.num_groups} groups cannot share {len(self.sentences)} templates; lower num_groups")
        if len(set(self.virtual_classes)) < len(self.virtual_classes):
            raise ValueError("virtual_classes names a class twice; keep one of them")
        if self.include_virtual_in_image_loss and not self.virtual_classes:
            raise ValueError("include_virtual_in_image_loss needs virtual_classes")
        return self

    @property
    def sentences(self) -> tuple[str, ...]:
        """`templates` as they are meant."""
        return references.LASP if isinstance(self.templates, str) else self.templates


class LASP(Method):
    """Groups of contexts, a bias of the classes, and where asked for the layer norms of the model that sees."""

    name = "lasp"
    title = "LASP"
    paper = "arXiv 2210.01115"
    reconstructed = True
    sites = frozenset({"context"})
    modalities = frozenset({"image", "text"})
    undecayed = frozenset()
    tiny: ClassVar = {
        "num_virtual_tokens": 3, "num_groups": 2, "templates": ("a red {}.", "the {} sings.", "{}"), "prompt_lr": 0.05,
        "text_weight": 0.5, "text_scale": 10.0,
    }  # fmt: skip
    groups: ClassVar = {"contexts": "prompt", "bias": "bias", "norms": "norms"}
    Config = LASPConfig
    contexts: nn.Parameter
    bias: nn.Parameter
    norms: nn.Parameter

    @property
    def settings(self) -> LASPConfig:
        """The settings with their own type."""
        return cast(LASPConfig, self.config)

    @property
    def more_words(self) -> tuple[str, ...]:
        """The names without images, where a loss looks at them."""
        return self.settings.virtual_classes if self.studies else ()

    @classmethod
    def sizes(cls, config: MethodConfig, shape: Shape) -> dict[str, tuple[int, ...]]:
        """Tensors by name; only what the settings use.

        Raises:
            ConfigError: layer norms of a model that has none in its blocks.
        """
        c = cast(LASPConfig, config)
        found: dict[str, tuple[int, ...]] = {"contexts": (c.num_groups, c.num_virtual_tokens, shape.width)}
        if c.bias:
            found["bias"] = (shape.hidden or shape.width,)
        if c.visual_norms == "blocks":
            if not shape.norms:
                raise ConfigError("this model has no layer norms in visual blocks; use method.visual_norms: none")
            found["norms"] = (shape.norms, 2, shape.visual)
        return found

    def build(self) -> None:
        """What the settings use; the sentences are of training alone and no part of a saved prompt."""
        c = self.settings
        for name, size in self.sizes(c, self.shape).items():
            setattr(self, name, self.parameter(*size))
        self.references: Tensor | None = None
        self.assigned: list[list[int]] = []
        if c.visual_norms == "blocks":
            self.sites = frozenset({"context", "norms"})
        if c.text_weight or c.include_virtual_in_image_loss:
            self.studies = frozenset({"texts", "answer"} if c.include_virtual_in_image_loss else {"texts"})

    def fill(self, source: Starting) -> None:
        """The first context as `init` says and the others N(0, 0.02^2); b = 0; layer norms as they are; h_lc, once.

        Raises:
            ConfigError: there is no text tower, the task names no classes, or a virtual class is one of them.
        """
        c, (count, *size) = self.settings, self.contexts.shape
        self.contexts[:1] = starting_contexts(c.init, (1, size[0], size[1]), source, text=c.init_text)
        self.contexts[1:] = random_contexts(count - 1, *size, generator=source.generator)
        if c.visual_norms == "blocks":
            if source.norms is None:
                raise ConfigError("this model does not give its layer norms; use method.visual_norms: none")
            self.norms.copy_(source.norms)
        if c.virtual_classes:
            known = set(references.named_classes(source, self.name).names) & set(c.virtual_classes)
            if known:
                raise ConfigError(f"method.virtual_classes: {min(known)!r} is a class of the task; leave it out")
        if c.text_weight:
            classes = references.named_classes(source, self.name)
            found = references.reference_features(classes, c.sentences, (*classes.names, *c.virtual_classes))
            self.references = nn.functional.normalize(found, dim=-1)
            order = list(range(len(found)))
            if c.assignment == "random":
                order = torch.randperm(len(found), generator=source.generator).tolist()
            self.assigned = [order[group::count] for group in range(count)]

    def rate(self, group: str) -> float:
        """As it is meant."""
        c = self.settings
        if group == "norms":
            return 0.1 * c.prompt_lr if c.norms_lr is None else c.norms_lr
        return c.prompt_lr if group == "prompt" or c.bias_lr is None else c.bias_lr

    def prompt(self, view: View) -> Prompt:
        """The contexts [g, 1, 1, m, d] in the text of every class, and the layer norms."""
        c = self.settings
        return Prompt(
            context=self.contexts[:, None, None],
            placement=context_placement(c.placement, c.num_virtual_tokens),
            norms=self.norms if c.visual_norms == "blocks" else None,
        )

    def moved(self, texts: Float[Tensor, "g c h"]) -> Float[Tensor, "g c h"]:
        """Unit vectors of t + b."""
        return nn.functional.normalize(texts + self.bias if self.settings.bias else texts, dim=-1)

    def classes(self, texts: Float[Tensor, "g c h"]) -> Float[Tensor, "1 c h"]:
        """W_c: the mean over groups of unit vectors, itself none, so that its scores are the mean of the cosines."""
        return self.moved(texts).mean(0, keepdim=True)

    def loss(self, task_loss: Float[Tensor, ""], outputs: Outputs) -> Losses:
        """L_image + alpha L_text.

        Raises:
            ConfigError: the prompt was loaded, and has no sentences.
        """
        c, total, parts = self.settings, task_loss, {"task": float(task_loss.detach())}
        if c.include_virtual_in_image_loss:
            total = self.image_loss(outputs)
            parts["image"] = float(total.detach())
        if c.text_weight:
            assert outputs.texts is not None
            found = self.text_loss(outputs.texts, self.scale(outputs), outputs.view.chance)
            total = total + c.text_weight * found
            parts["text"] = float(found.detach())
        return Losses(total, parts)

    def scale(self, outputs: Outputs) -> float:
        """Of the scores of sentences."""
        own = self.settings.text_scale if self.settings.text_scale is not None else outputs.scale
        assert own is not None
        return own

    def text_loss(self, texts: Float[Tensor, "g k h"], scale: float, chance: Chance | None = None) -> Float[Tensor, ""]:
        """L_text = -mean_lc log softmax_i(s <h_lc, t_gi>)_c, i over all classes, g the group of sentence l.

        Every sentence counts alike, whatever the groups are; images have no part in it.

        Args:
            texts: features of all classes under each context, virtual ones behind.
            scale: s.
            chance: of the noise on the sentences; None: there is none.
        """
        learned = self.moved(texts)
        self.references = references.at_hand(self.references, texts, self.name)
        wanted = self.noisy(self.references, chance)
        found = texts.new_zeros(())
        for own, sentences in zip(learned, self.assigned, strict=True):
            share = len(sentences) / len(wanted)
            found = found + share * text_to_text(own, wanted[sentences], scale)
        return found

    def noisy(self, wanted: Float[Tensor, "l k h"], chance: Chance | None) -> Float[Tensor, "l k h"]:
        """The sentences of a step: with noise, by chance; not normalised again, and the next step starts anew."""
        c = self.settings
        if chance is None or not c.ref_noise_std:
            return wanted
        generator = chance.shared(NOISE)
        if float(torch.rand((), generator=generator)) >= c.ref_noise_prob:
            return wanted
        return wanted + c.ref_noise_std * torch.randn(wanted.shape, generator=generator).to(wanted.device)

    def image_loss(self, outputs: Outputs) -> Float[Tensor, ""]:
        """Cross-entropy of the images among all names, virtual ones included, which are never right."""
        assert outputs.answer is not None
        assert outputs.texts is not None
        assert outputs.target is not None
        scores = nn.functional.normalize(outputs.answer, dim=-1) @ self.classes(outputs.texts)[0].T
        return nn.functional.cross_entropy(self.scale(outputs) * scores, outputs.target)

    @classmethod
    def count(cls, config: MethodConfig, shape: Shape) -> int:
        """G m d + h + 2 n v; for CLIP ViT-B/16 2,560 without layer norms, 39,424 with them."""
        return sum(torch.Size(size).numel() for size in cls.sizes(config, shape).values())

    @classmethod
    def match_budget(cls, config: MethodConfig, length: int, shape: Shape) -> MethodConfig:
        """The most rows that fit, the same in each group."""
        budget, groups = length * shape.width, cast(LASPConfig, config).num_groups
        rest = cls.count(config.model_copy(update={"num_virtual_tokens": 0}), shape)
        check_size(rest + groups * shape.width, budget, length, "lower method.num_groups, or leave the layer norms")
        return config.model_copy(update={"num_virtual_tokens": (budget - rest) // (groups * shape.width)})
