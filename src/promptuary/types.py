"""The vocabulary: the few things that cross between methods, backbones, tasks and solvers.

Knows no model, method, data set, file or device; imports torch and the shape annotations only.

Shape letters: b rows of a batch, g one or b, t text tokens, p prompt rows, m rows of an offset table, r rank,
d width of the token embeddings, h width of the hidden states, c candidates, k tokens of a candidate,
a tokens of an answer, n positions that are read, l layers, k heads of keys and values, e width of such a head,
m rows of a context among the words of a class, v width of patch tokens, i and j height and width of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from promptuary.errors import NotFoldable
from promptuary.seeds import Chance

ANSWER = "mask"
"""Name of the slot at which the answer is read: the mask token, or the last token before the answer."""

IGNORED = -100
"""Target id that no loss counts."""

OffsetAlign = Literal["token", "slot"]
OffsetOverflow = Literal["zero", "clamp", "error"]
Placement = Literal["front", "after_bos", "end"] | tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Offset:
    """A low-rank table that is added to the embeddings of the text by position (DePT, EPT).

    `left` [m, r] and `right` [r, d]: row j of `left @ right` is added to the j-th token of the source text.
    `align`: "token" counts real tokens, so padding on either side changes nothing (our choice);
    "slot" counts columns of the padded input (what the official DePT code does).
    `overflow`: what tokens beyond m get: nothing ("zero"), the last row ("clamp"), or an error.
    """

    left: Float[Tensor, "m r"]
    right: Float[Tensor, "r d"]
    align: OffsetAlign = "token"
    overflow: OffsetOverflow = "zero"

    def table(self) -> Float[Tensor, "m d"]:
        """The product, [m, d]."""
        return self.left @ self.right

    def is_zero(self) -> bool:
        """Whether the table is identically zero."""
        return not bool((self.table().detach() != 0).any())


@dataclass(frozen=True)
class Prompt:
    """What a method gives to a backbone. Any part may be absent.

    `rows` [1, p, d] shared by the batch, or [b, p, d] one prompt per row: vectors at prompt positions.
    `offset`: added to the embeddings of the text, never to an answer.
    `kv` [1, l, 2, k, p, e] or [b, ...]: keys and values of positions before everything else, per layer; keys as
    attention reads them, after any rotation.
    `placement`: "front" of the whole sequence; "after_bos", behind the first special token where there is one; "end",
    behind the text and before an answer;
    or several places with the number of rows that each takes, in any order: those three, "before_answer"
    and "after_answer" (a mask; where there is none, the first is "end"), and named slots of the template.
    `layers` [1, l, p, v] or [b, ...]: rows among the patches of an image, in the first l layers of the model that sees.
    Before the first layer they come in between special tokens and patches, without a position; before each later one
    they take the place of what became of the rows before, and behind the l-th they stay.
    `context` [s, c, l, m, d]: rows in the text of each class, where a text tower reads them; s sets of them; c classes,
    or 1 for all; l layers as above. `placement` says where among the words: "front" of
    them, at the "end", or some before and some behind ("before_answer" and "after_answer" with their numbers).
    `by_row`: the sets are one for each row of the batch; without it the class vectors of several sets are averaged.
    `norms` [n, 2, v]: weights and biases of the layer norms in the blocks of the model that sees, instead of its own.
    `text`: words, which stand where the template has its `{prompt}`; `ids` [p]: their tokens in a model's vocabulary.
    """

    rows: Float[Tensor, "g p d"] | None = None
    offset: Offset | None = None
    placement: Placement = "front"
    kv: Float[Tensor, "g l 2 k q e"] | None = None
    layers: Float[Tensor, "g l p v"] | None = None
    context: Float[Tensor, "s c l m d"] | None = None
    norms: Float[Tensor, "n 2 v"] | None = None
    by_row: bool = False
    text: str | None = None
    ids: Int[Tensor, " p"] | None = None

    @property
    def length(self) -> int:
        """How many rows stand among the text or the patches, or in the text of each class."""
        if self.layers is not None:
            return int(self.layers.shape[2])
        if self.context is not None:
            return int(self.context.shape[3])
        if self.ids is not None:
            return len(self.ids)
        return 0 if self.rows is None else int(self.rows.shape[1])

    @property
    def prefix_length(self) -> int:
        """How many positions of keys and values stand before everything."""
        return 0 if self.kv is None else int(self.kv.shape[4])

    @property
    def sites(self) -> frozenset[str]:
        """The places that it uses: "input" for rows, "offset" for the table, and the other parts by their own names."""
        parts = {"input": self.rows, "offset": self.offset, "kv": self.kv}
        parts |= {"layers": self.layers, "context": self.context, "norms": self.norms, "text": self.ids}
        return frozenset(name for name, part in parts.items() if part is not None)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that it consists of."""
        offset = () if self.offset is None else (self.offset.left, self.offset.right)
        parts = (self.rows, self.kv, self.layers, self.context, self.norms, self.ids, *offset)
        return tuple(part for part in parts if part is not None)

    def as_rows(self) -> Float[Tensor, "p d"]:
        """The prompt as one static table of rows, for tools that know nothing else.

        Raises:
            NotFoldable: if rows depend on the input, or if the offset table is not zero: no prefix can
                reproduce an additive change of the other tokens' embeddings.
        """
        if self.offset is not None and not self.offset.is_zero():
            raise NotFoldable(
                "this prompt also adds a position-wise table to the text embeddings, which no prefix can reproduce; "
                "export it in a form that carries the table, or train with the low-rank part switched off"
            )
        if self.text is not None:
            raise NotFoldable("this prompt is words: give them to a model as text, where the template has its {prompt}")
        if self.kv is not None:
            raise NotFoldable("this prompt is keys and values of every layer, which no rows at the input can reproduce")
        for name in ("layers", "context", "norms"):
            if getattr(self, name) is not None:
                raise NotFoldable(f"this prompt is made for images ({name}): it is no table of rows among text tokens")
        if self.rows is None:
            raise NotFoldable("this prompt has no rows")
        if self.rows.shape[0] != 1:
            raise NotFoldable("the rows depend on the input, so there is no single static prompt")
        return self.rows[0]


@dataclass(frozen=True)
class Candidates:
    """Token ids of the possible answers: [c, k] for all rows of a batch, or [b, c, k] for each row its own.

    `mask` is true on real tokens; a candidate without any does not exist for that row and scores -inf.
    """

    ids: Int[Tensor, "*b c k"]
    mask: Bool[Tensor, "*b c k"]

    @property
    def per_row(self) -> bool:
        """Whether each row of the batch has its own answers."""
        return self.ids.dim() == 3

    def to(self, device: torch.device) -> Candidates:
        """The same on another device."""
        return Candidates(self.ids.to(device), self.mask.to(device))


@dataclass(frozen=True)
class Batch:
    """Text as token ids, without any prompt, and what is to be learnt from it.

    `slots`: for each named place of the template the column in `input_ids`, [b].
    `plain`: tokens that never take an offset (answers).
    `target`: class index (long) or value (float), [b]; `target_ids`: answer to be written, padded with -100, [b, a].
    `prompt_index`: which of several prompts each row takes, [b]; absent means the first.
    `index`: place of each row in its data set, so that results can be put back in order.
    `part`: which of the tasks of a run each row belongs to, [b]; absent where there is one.
    `pixels`: the images, prepared as the model wants them; a row then has one token id of no meaning in its text.
    `features`: what the frozen model makes of the images, where that is known already; the pixels may then be absent.
    """

    input_ids: Int[Tensor, "b t"]
    attention_mask: Int[Tensor, "b t"]
    index: Int[Tensor, " b"]
    segment_ids: Int[Tensor, "b t"] | None = None
    plain: Bool[Tensor, "b t"] | None = None
    slots: Mapping[str, Int[Tensor, " b"]] = field(default_factory=dict)
    target: Tensor | None = None
    target_ids: Int[Tensor, "b a"] | None = None
    candidates: Candidates | None = None
    prompt_index: Int[Tensor, " b"] | None = None
    part: Int[Tensor, " b"] | None = None
    pixels: Float[Tensor, "b 3 i j"] | None = None
    features: Float[Tensor, "b h"] | None = None

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        if self.input_ids.device == device:
            return self

        def move(value: Any) -> Any:
            if isinstance(value, Tensor | Candidates):
                return value.to(device)
            if isinstance(value, Mapping):
                return {name: move(item) for name, item in value.items()}
            return value

        return replace(self, **{f.name: move(getattr(self, f.name)) for f in fields(self)})

    def rows(self, rows: Int[Tensor, " n"]) -> Batch:
        """The chosen rows, in the given order; a row may be repeated."""
        return replace(self, **{f.name: _picked(getattr(self, f.name), rows) for f in fields(self)})


@dataclass(frozen=True)
class Piece:
    """A part of a filled template.

    "fixed" text, a "field" of the example (may be cut), a "slot" (a named place), or an "image" (a `Picture`).
    """

    role: Literal["fixed", "field", "slot", "image"]
    value: Any


@dataclass(frozen=True)
class Encoded:
    """One example as token ids, special tokens included.

    `segments`: 0 before the first separator, 1 after it; `slots`: named place -> column;
    `cut`: how many tokens of the fields were left out to make it fit.
    `image`: what the example shows, a `data.images.Picture`; `features`: what the frozen model makes of it, where
    that is known.
    """

    ids: list[int]
    segments: list[int]
    slots: Mapping[str, int]
    cut: int = 0
    image: Any = None
    features: Float[Tensor, " h"] | None = None


@dataclass(frozen=True)
class Sight:
    """How a model wants its images: resized, cut to their middle, scaled to 0..1, and normalised per channel.

    `size`: height and width in pixels; `resize`: of the shorter side before the middle is cut out, or height and width
    to which the whole image is resized; `resample`: Pillow's number of a filter (2 bilinear, 3 bicubic).
    """

    size: tuple[int, int]
    resize: int | tuple[int, int]
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    resample: int = 3


@dataclass(frozen=True)
class View:
    """What a method may look at; holds only what the method declared in `needs`, and `mask` where that is anything.

    `mask` [b, t]: which tokens of the text are real; `content`: which of them are neither special nor an answer.
    `ids`, `embeddings`: the text as token ids, and as frozen embeddings.
    `states`: the frozen model's last hidden states of the text without any prompt, zero at padding; `at` [b]: the
    answer's column among them, None where a family reads it elsewhere; `answer`: the state that it is read from.
    `chance`: what noise is drawn from, in training; None in evaluation.
    """

    mask: Bool[Tensor, "b t"] | None = None
    content: Bool[Tensor, "b t"] | None = None
    ids: Int[Tensor, "b t"] | None = None
    embeddings: Float[Tensor, "b t d"] | None = None
    states: Float[Tensor, "b t h"] | None = None
    at: Int[Tensor, " b"] | None = None
    answer: Float[Tensor, "b h"] | None = None
    chance: Chance | None = None

    def rows(self, rows: Int[Tensor, " n"]) -> View:
        """The chosen rows, in the given order."""
        return View(**{f.name: _picked(getattr(self, f.name), rows) for f in fields(self)})


@dataclass(frozen=True)
class Outputs:
    """What a model says of a batch under a prompt; holds what the method declared in `reads`.

    `view`: what the prompt was made from.
    `scores` [b, c]: of each answer, as the task reads them; `costs` [b]: of a task that writes, minus the
    log-probability of the right answer.
    `answer` [b, h]: the state that they are read from; `words`: scores [b, c] of the task's answers from such states.
    `texts` [s, c, h]: what a text tower says of each class under each set of contexts, not normalised; the task's
    classes first, then those of the method's `more_words`; `scale`: what that model multiplies a cosine by.
    `target` [b]: the right answers, class index or value; absent outside training.
    `taught`: what the same model says under the method's teacher, without gradients; of training alone.
    """

    view: View = field(default_factory=View)
    scores: Float[Tensor, "b c"] | None = None
    costs: Float[Tensor, " b"] | None = None
    answer: Float[Tensor, "b h"] | None = None
    words: Callable[[Float[Tensor, "n h"]], Float[Tensor, "n c"]] | None = None
    texts: Float[Tensor, "s k h"] | None = None
    scale: float | None = None
    target: Tensor | None = None
    taught: Outputs | None = None

    def rows(self, rows: Int[Tensor, " n"]) -> Outputs:
        """The chosen rows, in the given order."""
        return replace(self, **{f.name: _picked(getattr(self, f.name), rows) for f in fields(self)})


def _picked(value: Any, rows: Int[Tensor, " n"]) -> Any:
    if isinstance(value, Tensor):
        return value[rows]
    if isinstance(value, Candidates):
        return Candidates(value.ids[rows], value.mask[rows]) if value.per_row else value
    if isinstance(value, View | Outputs | Chance):
        return value.rows(rows)
    if isinstance(value, Mapping):
        return {name: _picked(item, rows) for name, item in value.items()}
    return value


@dataclass(frozen=True)
class Shape:
    """All that a method may know of a backbone when it is built.

    `width` of the token embeddings and of the `hidden` states behind the model; for keys and values the `layers` that
    have them, their `heads` and `head` width; `vocabulary`: ids of tokens; `classes` that the task tells apart, 0 where
    it has none. Of a model that sees: `visual` width of its patch tokens, `depth` its layers, `patch` the side of a
    patch in pixels, `norms` the layer norms in its blocks.
    """

    width: int
    layers: int = 1
    heads: int = 1
    head: int = 8
    hidden: int = 0
    vocabulary: int = 0
    classes: int = 0
    visual: int = 0
    depth: int = 0
    patch: int = 0
    norms: int = 0


@dataclass(frozen=True)
class Losses:
    """What a solver minimises. `total` is differentiable; `parts` are for the log."""

    total: Float[Tensor, ""]
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Prediction:
    """An answer to one example: `answer` is a label, a number or a text; `scores` per label where there are labels.

    Of a judged answer `scores` are what the judges say of it. `prompt`: the words that asked, where they were written
    for this example.
    """

    answer: Any
    scores: Mapping[str, float] = field(default_factory=dict)
    prompt: str | None = None
