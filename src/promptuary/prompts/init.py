"""How a prompt starts: rows taken from the frozen vocabulary, from a text, or drawn at random.

Knows no tokenizer and no model: it reads the vocabulary through `Vocabulary`, which a backbone gives it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from promptuary.errors import ConfigError, NotFoldable
from promptuary.types import Prompt

Start = Literal["vocabulary", "text", "random"]

COMMON_TOKENS = 5000
"""Rows are sampled among the first this many ordinary tokens (Lester et al. 2021, section 2.1)."""


@runtime_checkable
class Vocabulary(Protocol):
    """A read-only look at the embedding table of a frozen model."""

    def common(self, limit: int) -> Int[Tensor, " n"]:
        """Ids of the first `limit` ordinary tokens (no special, no unused ones), most common first."""

    def ids(self, text: str) -> Int[Tensor, " n"]:
        """Ids of a text, without special tokens."""

    def embed(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """Their embeddings exactly as the model sees them, in float32."""

    def keys_values(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "1 l 2 k n e"]:
        """Keys and values of a sequence of tokens in every layer of the frozen model, in float32."""

    def rms(self) -> float:
        """Root mean square of the entries of the embeddings of the common tokens."""


@dataclass(frozen=True)
class Saved:
    """An earlier prompt on the same base: where it stands, its method with settings, its tensors, and what it scored.

    `prompt`: its static form, None where it depends on the input.
    """

    name: str
    method: str
    settings: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    prompt: Prompt | None
    metrics: Mapping[str, float]

    def rows(self) -> Float[Tensor, "n d"]:
        """It as a static table of rows; of a context for all classes, its rows.

        Raises:
            NotFoldable: it is none.
        """
        if self.prompt is None:
            raise NotFoldable(
                f"the prompt in {self.name} ({self.method}) depends on the input, so it has no static rows"
            )
        context = self.prompt.context
        if context is not None and context.shape[:3] == (1, 1, 1) and self.prompt.sites == {"context"}:
            return context[0, 0, 0]
        try:
            return self.prompt.as_rows()
        except NotFoldable as error:
            raise NotFoldable(f"{self.name} ({self.method}) cannot be started from: {error}") from None


@runtime_checkable
class Patches(Protocol):
    """Patch tokens of the training images in the frozen model, without any prompt."""

    def tokens(
        self, count: int | None, generator: torch.Generator, *, position: bool, replacement: bool, augmented: bool
    ) -> Iterator[list[Float[Tensor, "b n v"]]]:
        """Batch by batch, the tokens that enter each layer, special tokens left out, float32 on the CPU.

        Args:
            count: of how many images, chosen by chance; None: as many as there are.
            generator: chooses them.
            position: whether those of the first layer have their position added; else they are the patch embeddings.
            replacement: whether an image may be chosen again.
            augmented: in random views, as in training; else in the plain view.
        """


@runtime_checkable
class Classes(Protocol):
    """The text side of a frozen model, and the names of the task's classes."""

    @property
    def names(self) -> Sequence[str]:
        """What the classes are called."""

    def features(self, texts: Sequence[str]) -> Float[Tensor, "n h"]:
        """What the text tower says of whole texts, without any prompt; not normalised, float32 on the CPU."""


@dataclass(frozen=True)
class Starting:
    """Everything a method may read when it fills its tensors.

    `saved`: rows of an earlier prompt; `labels`: token ids of each answer of the task; `sources`: the earlier prompts
    that the method's settings name; of models that see: `patches` of the training images, where there are any,
    `classes` of a task that names them to a text tower, and the `norms` of its blocks as they are, [n, 2, v].
    """

    vocabulary: Vocabulary
    generator: torch.Generator
    saved: Float[Tensor, "n d"] | None = None
    labels: Sequence[Sequence[int]] = ()
    sources: Sequence[Saved] = ()
    patches: Patches | None = None
    classes: Classes | None = None
    norms: Float[Tensor, "n 2 v"] | None = None

    def label_words(self) -> Float[Tensor, "c d"]:
        """The mean embedding of each answer's tokens."""
        return torch.stack([self.vocabulary.embed(torch.tensor(ids)).mean(0) for ids in self.labels])


def starting_ids(
    start: Literal["vocabulary", "text"], count: int, source: Starting, *, text: str | None = None
) -> Int[Tensor, " n"]:
    """`count` token ids: sampled among the common ones without repetition while they last, or of a text, repeated.

    Raises:
        ConfigError: "text" without a text, or a text of no tokens.
    """
    vocabulary = source.vocabulary
    if start == "text":
        ids = vocabulary.ids(text) if text else torch.empty(0, dtype=torch.long)
        if len(ids) == 0:
            raise ConfigError('method.init is "text" but method.init_text is empty: give it a sentence')
        return ids.repeat(-(-count // len(ids)))[:count]
    common = vocabulary.common(COMMON_TOKENS)
    rounds = -(-count // len(common))
    order = torch.cat([torch.randperm(len(common), generator=source.generator) for _ in range(rounds)])
    return common[order[:count]]


def starting_rows(start: Start, count: int, source: Starting, *, text: str | None = None) -> Float[Tensor, "n d"]:
    """`count` rows, [count, d], in float32.

    "vocabulary": embeddings of tokens sampled among the common ones (without repetition while they last);
    "text": embeddings of the tokens of `text`, repeated or cut to `count` (Lester et al. 2021; DePT's code);
    "random": normal with the root mean square of the vocabulary (our choice; N(0, 1) is never used).

    Raises:
        ConfigError: "text" without a text, or a text of no tokens.
    """
    vocabulary, generator = source.vocabulary, source.generator
    if count == 0:
        return vocabulary.embed(torch.zeros(1, dtype=torch.long))[:0]
    if start != "random":
        return vocabulary.embed(starting_ids(start, count, source, text=text))
    width = vocabulary.embed(vocabulary.common(COMMON_TOKENS)[:1]).shape[1]
    return torch.randn(count, width, generator=generator) * vocabulary.rms()


def saved_rows(count: int, width: int, source: Starting) -> Float[Tensor, "n d"]:
    """`count` rows of the earlier prompt that the settings name, repeated or cut.

    Raises:
        ConfigError: there is none, or it has another width.
    """
    if source.saved is None:
        raise ConfigError('method.init is "saved" but method.init_prompt names no prompt folder')
    rows = source.saved
    if rows.shape[1] != width:
        raise ConfigError(f"the saved prompt has width {rows.shape[1]}, the backbone {width}")
    return rows.repeat(-(-count // len(rows)), 1)[:count].clone()


def starting_prefix(
    start: Start | Literal["saved"], count: int, source: Starting, *, text: str | None = None
) -> Float[Tensor, "l 2 k n e"]:
    """Keys and values of `count` positions in every layer, in float32.

    "vocabulary", "text": what the frozen model computes for these words (Li and Liang 2021, section 7.4, advise real
    words); "random": normal at that scale, layer by layer and for keys and values apart (our choice).

    Raises:
        ConfigError: "saved", since rows are no prefix; or as `starting_ids`.
        SiteError: the model has no place for keys and values.
    """
    if start == "saved":
        raise ConfigError("a prefix cannot start from saved rows; choose method.init vocabulary, text or random")
    ids = starting_ids("vocabulary" if start == "random" else start, count, source, text=text)
    real = source.vocabulary.keys_values(ids)[0]
    if start != "random":
        return real
    scale = real.pow(2).mean(dim=(2, 3, 4), keepdim=True).sqrt()
    return torch.randn(real.shape, generator=source.generator) * scale
