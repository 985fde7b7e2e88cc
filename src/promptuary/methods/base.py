"""What a method is: it owns the trained tensors and turns them into a `Prompt`.

Knows no architecture, tokenizer, file, data set or device.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from promptuary.errors import ConfigError, NotFoldable
from promptuary.prompts.init import Start, Starting, saved_rows, starting_rows
from promptuary.settings import Settings
from promptuary.types import Losses, Outputs, Prompt, Shape, View

MOST_DRAWN, MOST_COPIED = 2**28, 2**40
"""Most numbers of one constant: drawn ones are made again when a prompt is loaded, whatever its file has (our choice).
"""


class MethodConfig(Settings):
    """Settings that every method has; a method adds its own."""

    name: str = Field(description="method; `promptuary methods` lists them")
    init: Start | Literal["saved"] = Field(
        "vocabulary",
        description='where the first rows come from: sampled "vocabulary", "text" (init_text), "random" at the '
        'vocabulary\'s scale, or "saved" (init_prompt). Lester et al. 2021, section 3.2: vocabulary beats random',
    )
    init_text: str | None = Field(None, description='the text for init: "text", repeated or cut to length')
    init_prompt: str | None = Field(None, description='a saved prompt folder for init: "saved" (SPoT-style transfer)')
    placement: Literal["front", "after_bos", "end"] = Field(
        "front",
        description="where the rows go: before everything (the papers), behind the first special token, or behind the "
        "text: on causal models the text then runs without gradients and is kept",
    )
    match_length: int | None = Field(
        None,
        ge=1,
        description="choose the size so that the trained parameters equal prompt tuning of this length (at most)",
    )
    prompt_lr: float = Field(
        0.05, gt=0, description="learning rate of the prompt rows, in lr_unit; our choice, measured in benchmarks/"
    )
    lr_unit: Literal["relative", "absolute"] = Field(
        "relative",
        description='"relative": prompt_lr times the root mean square of the tensor at the start, so that one value '
        'fits models of any embedding scale (our choice); "absolute": as is (the papers use 0.3 on T5-base)',
    )
    weight_decay: float = Field(1e-5, ge=0, description="on prompt and low-rank tensors; DePT asks for 1e-5")

    @property
    def origins(self) -> tuple[str, ...]:
        """Folders of earlier prompts that the method starts from, besides `init_prompt`."""
        return ()


class SourcedConfig(MethodConfig):
    """Settings of a method that starts from earlier prompts on the same base."""

    sources: tuple[str, ...] = Field((), description="saved prompt folders (or hub names) on the same base")

    @property
    def origins(self) -> tuple[str, ...]:
        """The sources."""
        return self.sources


class ContextConfig(MethodConfig):
    """Settings of a method whose rows stand among the words of each class, where a text tower reads them."""

    init: Literal["text", "random", "saved"] = Field(
        "text",
        description='what a context starts as: the words of "init_text", "random" numbers N(0, 0.02^2), or "saved" '
        "(init_prompt); Zhou et al. 2022 (CoOp)",
    )
    init_text: str | None = Field(
        "a photo of a", description='the words for init: "text", repeated or cut to m rows; CoOp'
    )
    placement: Literal["front", "middle", "end"] = Field(  # type: ignore[assignment]
        "front",
        description="where a context stands: before the words of the class (CoOp), half on either side, or behind",
    )
    num_virtual_tokens: int = Field(
        4, ge=1, description="m, rows of a context; CoOp: 4 that start as words, or 16 that start at random"
    )
    prompt_lr: float = Field(2e-3, gt=0, description="learning rate of the context; CoOp, with train.optimizer: sgd")
    lr_unit: Literal["relative", "absolute"] = Field(
        "absolute", description='"absolute": prompt_lr as it is (CoOp); "relative": times the scale at the start'
    )
    weight_decay: float = Field(5e-4, ge=0, description="on everything that is trained; CoOp")


@dataclass(frozen=True)
class Group:
    """One trained tensor with its own learning rate and weight decay."""

    name: str
    parameter: nn.Parameter
    learning_rate: float
    weight_decay: float


@dataclass(frozen=True)
class Stage:
    """A part of a run: its share of the steps (or calls), and the parameters that it trains; None is all of them.

    The shares of a method's stages sum to one. Each stage has a solver and a schedule of its own; `advice` goes before
    that of the method. `solver`: by name, another search than that of the run, where the run searches at all.
    """

    name: str
    share: float = 1.0
    parameters: frozenset[str] | None = None
    advice: Mapping[str, Any] = field(default_factory=dict, hash=False)
    solver: str | None = None


class Method(nn.Module, abc.ABC):
    """One published algorithm.

    Facts that a method declares:
        name: file name, class tag, card name, results column.
        title, paper: for tables and cards.
        reconstructed: whether it was rebuilt from partial sources (its card says which).
        sites: places of a backbone that it uses; of an instance, those that its settings use.
        reads: what `scores` looks at: the task's "scores", the state of the "answer", and the "view".
        studies: what `loss` looks at besides; the view it always sees.
        whole_batches: whether its loss compares the rows of a batch, so that a batch cannot be cut into parts.
        groups: parameter name -> learning-rate group; the group's rate is the config field `<group>_lr`.
        undecayed: groups without weight decay.
        relative: groups whose rate is in units of the starting scale when `lr_unit` is "relative".
        solver, advice: the solver that trains it by default, and values for what the solver's settings leave open.
        shared: parameters that all tasks of one run have in common; the others are each task's own.
        tiny: settings for the contract suite's tiny models (width 32, texts of up to 40 tokens).
        tiny_sources: settings of the methods of the earlier prompts that it starts from there.
        text, words_at: of a prompt of words these, and where they go in a template without `{prompt}`; see `words.py`.
        exceptions: property of the contract suite that cannot hold (or "property on family") -> reason, as in its card.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    reconstructed: ClassVar[bool] = False
    sites: frozenset[str] = frozenset({"input"})
    reads: ClassVar[frozenset[str]] = frozenset({"scores"})
    studies: frozenset[str] = frozenset()
    whole_batches: ClassVar[bool] = False
    modalities: ClassVar[frozenset[str]] = frozenset({"text"})
    groups: ClassVar[Mapping[str, str]]
    undecayed: ClassVar[frozenset[str]] = frozenset({"modules"})
    relative: ClassVar[frozenset[str]] = frozenset({"prompt"})
    solver: str = "gradient"
    shared: ClassVar[frozenset[str]] = frozenset()
    text: str | None = None
    words_at: Literal["front", "end"] | None = None
    tiny: ClassVar[Mapping[str, Any]] = {}
    tiny_sources: ClassVar[Sequence[Mapping[str, Any]]] = ()
    exceptions: ClassVar[Mapping[str, str]] = {}
    Config: ClassVar[type[MethodConfig]]

    def __init__(self, config: MethodConfig, shape: Shape) -> None:
        """Build empty tensors from widths alone.

        Args:
            config: an instance of this class's `Config`.
            shape: widths of the backbone.
        """
        super().__init__()
        self.config = config
        self.shape = shape
        self.start_scale: dict[str, float] = {}
        self.draw_seed = 0
        self.drawn: dict[str, bool] = {}
        self.build()

    @property
    def needs(self) -> frozenset[str]:
        """What it must see of a batch: fields of `View` other than `mask` and `chance`, which come with them."""
        return frozenset()

    @property
    def depends(self) -> bool:
        """Whether the prompt depends on the input; if not, there is one for all inputs, and it can be folded."""
        return bool(self.needs)

    @property
    def advice(self) -> Mapping[str, Any]:
        """Values for settings of the solver that are left open, such as `sigma` of a search."""
        return {}

    @property
    def own_scores(self) -> bool:
        """Whether answers are read in a way of its own, so that the prompt alone is not all there is to it."""
        return type(self).scores is not Method.scores

    @abc.abstractmethod
    def build(self) -> None:
        """Create the parameters with `self.parameter(...)`; values come in `fill`."""

    @abc.abstractmethod
    def fill(self, source: Starting) -> None:
        """Give every parameter and constant its first value from `source.vocabulary` and `source.generator`."""

    def draw(self, generator: torch.Generator) -> None:
        """Fill the constants that are drawn, from the generator alone, on the CPU."""

    @abc.abstractmethod
    def prompt(self, view: View) -> Prompt:
        """The prompt now, differentiable. `view` holds what `needs` asked for."""

    def stages(self) -> tuple[Stage, ...]:
        """The parts of a run, one after the other; by default one that trains everything."""
        return (Stage("all"),)

    def begin(self, stage: int, source: Starting) -> Mapping[str, float]:
        """Before the first step of a stage after the first, 1 or more: tensors may be filled anew; by default not.

        Returns:
            What the log should say of it.
        """
        return {}

    def teacher(self, view: View) -> Prompt | None:
        """A frozen prompt under which a batch runs too in training, for `loss` to compare with; none by default."""
        return None

    @classmethod
    @abc.abstractmethod
    def count(cls, config: MethodConfig, shape: Shape) -> int:
        """The number of trained parameters by formula."""

    @classmethod
    @abc.abstractmethod
    def match_budget(cls, config: MethodConfig, length: int, shape: Shape) -> MethodConfig:
        """The same settings, resized to at most `length * width` trained parameters.

        Raises:
            ConfigError: if even the smallest size is larger; the message says what to lower.
        """

    def fold(self) -> Prompt:
        """The result as constants, without the tensors that only training needed.

        Raises:
            NotFoldable: if the prompt depends on the input.
        """
        if self.depends:
            raise NotFoldable(f"the prompt of {self.name} depends on the input, so there is no single static prompt")
        with torch.no_grad():
            found = self.prompt(View())
        # copies: what `prompt` returns may be the trained tensors themselves
        offset = found.offset
        if offset is not None:
            offset = replace(offset, left=offset.left.detach().clone(), right=offset.right.detach().clone())
        whole = {name: getattr(found, name) for name in ("rows", "kv", "layers", "context", "norms")}
        copied: dict[str, Any] = {
            name: None if value is None else value.detach().clone() for name, value in whole.items()
        }
        return replace(found, offset=offset, **copied)

    def classes(self, texts: Float[Tensor, "s c h"]) -> Float[Tensor, "s c h"]:
        """The vector of each class out of its text features, for each set of contexts; by default a unit vector.

        What an image's feature is compared with; those of several sets are averaged, unless each row has its own.
        """
        return nn.functional.normalize(texts, dim=-1)

    @property
    def more_words(self) -> tuple[str, ...]:
        """Names of classes without examples, whose text features `loss` sees behind those of the task; none."""
        return ()

    def scores(self, outputs: Outputs) -> Float[Tensor, "b c"]:
        """The score of each answer; by default as the task reads them."""
        assert outputs.scores is not None
        return outputs.scores

    def loss(self, task_loss: Float[Tensor, ""], outputs: Outputs) -> Losses:
        """What training minimises; by default just the task's loss. What is added is a mean over rows."""
        return Losses(task_loss, {"task": float(task_loss.detach())})

    def insight(self) -> Mapping[str, Tensor]:
        """Small named vectors and matrices that a person may want to look at, such as gate weights."""
        return {}

    def parameter(self, *size: int) -> nn.Parameter:
        """An empty trained tensor."""
        return nn.Parameter(torch.zeros(*size))

    def constant(self, *size: int, name: str, drawn: bool = False) -> None:
        """An empty tensor that is never trained, as the attribute `name`.

        Args:
            size: its shape.
            name: the attribute.
            drawn: it follows from a seed, so a saved prompt holds that and not the tensor; see `draw`.

        Raises:
            ConfigError: it is far too large.
        """
        most = MOST_DRAWN if drawn else MOST_COPIED
        if math.prod(size) > most:
            raise ConfigError(f"{self.name} would hold a constant of size {size}; at most {most:,} numbers are allowed")
        # torch's own word for what belongs to a saved state
        self.register_buffer(name, torch.zeros(*size), persistent=not drawn)
        self.drawn[name] = drawn

    def constants(self, *, drawn: bool) -> dict[str, Tensor]:
        """Tensors that are never trained: those that are drawn from a seed, or the others."""
        return {name: value for name, value in self.named_buffers() if self.drawn.get(name) is drawn}

    def redraw(self, seed: int) -> Method:
        """The drawn constants as this seed makes them."""
        self.draw_seed = seed
        with torch.no_grad():
            self.draw(torch.Generator().manual_seed(seed))
        return self

    def initialise(self, source: Starting) -> Method:
        """Fill the tensors and note their scale, which relative learning rates refer to."""
        if self.constants(drawn=True):
            self.redraw(int(torch.randint(2**53, (), generator=source.generator)))
        with torch.no_grad():
            self.fill(source)
        return self._measured()

    def go_on(self, stage: int, source: Starting) -> Mapping[str, float]:
        """Begin a stage after the first; relative learning rates refer to the tensors' scale then."""
        with torch.no_grad():
            told = self.begin(stage, source)
        self._measured()
        return told

    def _measured(self) -> Method:
        for name, value in self.named_parameters():
            self.start_scale[name] = float(value.detach().pow(2).mean().sqrt()) if value.numel() else 0.0
        return self

    def first_rows(self, count: int, source: Starting) -> Tensor:
        """`count` rows as the settings ask for them, [count, d]."""
        config = self.config
        if config.init != "saved":
            return starting_rows(config.init, count, source, text=config.init_text)
        return saved_rows(count, self.shape.width, source)

    def rate(self, group: str) -> float:
        """The learning rate of a group, before it is made relative: the setting `<group>_lr`."""
        return float(getattr(self.config, f"{group}_lr"))

    def trained(self) -> list[Group]:
        """Every trained tensor with its learning rate; relative rates are resolved by the starting scale."""
        found = []
        for name, parameter in self.named_parameters():
            group = self.groups[name]
            rate = self.rate(group)
            scale = self.start_scale.get(name, 0.0)
            if group in self.relative and self.config.lr_unit == "relative" and scale > 0:
                rate *= scale
            decay = 0.0 if group in self.undecayed else self.config.weight_decay
            found.append(Group(name, parameter, rate, decay))
        return found


def check_size(smallest: int, budget: int, length: int, fix: str) -> None:
    """Refuse a budget that the smallest form exceeds.

    Raises:
        ConfigError: with both numbers and `fix`, what to change.
    """
    if smallest > budget:
        raise ConfigError(
            f"method.match_length {length} gives {budget} parameters, but the smallest form has {smallest}; {fix}"
        )
