"""The text side of a two-tower model: words of classes and a context of learned vectors in, features of classes out.

Knows no method, task, image or score.

Three kinds. CLIP's is causal: what stands behind the end token changes nothing, so sequences are cut to the longest
(`truncate`), and what stands in front of every class is the same for all and is run once (`share`): the classes stand
behind one another, each with the positions it would have alone, and a mask lets each see what is shared and itself.
Both are exact. SigLIP's looks in both directions, without a mask, and is read at its last position: its padding is
part of the feature, so nothing is cut or shared. BERT's looks in both directions under a mask: padding is cut, and
nothing is shared, since what stands in front looks at the words.
"""

from __future__ import annotations

import abc
import math
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

from promptuary.backbones.layout import Layout, arranged, sides
from promptuary.backbones.text import TextCoder
from promptuary.errors import ConfigError
from promptuary.types import Placement

PAIR_COST = 2.0
"""What a pair of positions costs in attention, in units of its operations relative to those of the linear layers.

Measured on a CPU with masks; the right length of a packed sequence depends on its square root only.
"""


class Tower(abc.ABC):
    """Features of classes from their words, by one text tower.

    `width` d of the token embeddings, `hidden` width h of the features, `layers` of the tower.
    """

    width: int
    hidden: int
    layers: int

    def __init__(self, model: Any, tokenizer: Any, *, truncate: bool = True, share: bool = True) -> None:
        """Of a model; nothing of it is changed.

        Args:
            model: the two-tower model.
            tokenizer: of its text.
            truncate: cut sequences to the longest one, where that changes no feature.
            share: run once what stands in front of all classes, where that changes no feature.
        """
        self.model, self.text, self.tokenizer = model, model.text_model, tokenizer
        self.truncate, self.share = truncate, share
        coder = TextCoder(tokenizer, "none")
        self._specials = (len(coder.prefix), len(coder.suffix))
        pad = tokenizer.pad_token_id
        self._added = [*coder.prefix, *coder.suffix, 0 if pad is None else int(pad)]
        self._table: Any = self.text.get_input_embeddings()
        self.width = int(self._table.weight.shape[1])
        self._stack = self._find_stack()
        self.layers = len(self._stack)

    def ids(self, words: str) -> list[int]:
        """Token ids of the words of a class, without special tokens, [k]."""
        return list(self.tokenizer(words, add_special_tokens=False, verbose=False).input_ids)

    def features(
        self,
        ids: Int[Tensor, "c k"],
        mask: Bool[Tensor, "c k"],
        context: Float[Tensor, "s n l m d"] | None = None,
        placement: Placement = "front",
    ) -> Float[Tensor, "s c h"]:
        """Features of classes, projected and not normalised, in the model's number format.

        What `get_text_features(...).pooler_output` gives for the same words and the same vectors.

        Args:
            ids: words of each class, without special tokens.
            mask: which of them are real.
            context: s sets of m rows for all classes (n = 1) or for each (n = c): the first layer's (of l) among the
                token embeddings, each further one in the place of what became of them, before that layer (as MaPLe
                and PromptSRC do). None is no context, and one set.
            placement: where the context stands, see `layout.sides`.

        Raises:
            ConfigError: words and context have more positions than the model, or other counts than agree.
        """
        sets, each, deep, rows, _ = (1, 1, 0, 0, 0) if context is None else context.shape
        if each not in (1, len(ids)) or deep > self.layers:
            raise ConfigError(
                f"a context for {each} classes and {deep} layers does not fit {len(ids)} classes and a text tower of "
                f"{self.layers} layers"
            )
        layout = self._layout(mask, each, sides(placement, rows))
        order = (~mask).int().argsort(dim=1, stable=True)  # real words first
        table = torch.cat([ids.gather(1, order).flatten(), torch.tensor(self._added, device=ids.device)])
        states = self._table(table[layout.token])[None].expand(sets, -1, -1, -1)
        taken, is_row = layout.row.clamp(min=0), (layout.row >= 0)[..., None]
        if each > 1:
            taken = taken + layout.owner.clamp(min=0) * rows
        if context is not None:
            context = context.to(states.dtype)
            states = _with_rows(states, context[:, :, 0], taken, is_row)
        states = self._embedded(states.flatten(0, 1), layout.position.repeat(sets, 1))
        seen = self._seen(layout, states, sets)
        for number, layer in enumerate(self._stack):
            if context is not None and 0 < number < deep:
                placed = _with_rows(states.unflatten(0, (sets, -1)), context[:, :, number], taken, is_row)
                states = placed.flatten(0, 1)
            states = layer(states, seen, **self._options(seen))
        return self._read(states.unflatten(0, (sets, -1)), layout)

    def _layout(self, mask: Tensor, each: int, rows: tuple[tuple[int, ...], tuple[int, ...]]) -> Layout:
        """Where everything stands."""
        lengths = tuple(int(length) for length in mask.sum(1).tolist())
        before, after = rows
        longest = max(lengths) + len(before) + len(after) + sum(self._specials)
        if longest > self._limit:
            raise ConfigError(
                f"a class has {longest} tokens with its context of {len(before) + len(after)} rows and special tokens, "
                f"and this text tower takes {self._limit}; use fewer rows or shorter class words"
            )
        head, size, room = self._specials[0] + len(before), None if self._cuts else self._limit, None
        if self._shares and before and each == 1 and len(lengths) > 1:
            size, room = None, self._room(head)
        layout = arranged(lengths, mask.shape[1], before, after, self._specials, size=size, room=room)
        parts = (layout.token, layout.row, layout.owner, layout.position, layout.end)
        return Layout(*(part.to(mask.device) for part in parts))

    def _room(self, head: int) -> int:
        """How many tokens to put behind a head of so many, so that a class costs least.

        A token's linear layers take 24 d^2 operations and a pair of positions 4 d: with a = pair / token, G tokens
        cost (head + G + a (head + G)^2) / G each, least at the root below.
        """
        pair = PAIR_COST / (6 * self.width)
        return max(1, round(math.sqrt(head * (1 / pair + head))))

    @property
    def _cuts(self) -> bool:
        """Whether sequences are cut to the longest."""
        return self.truncate

    @property
    def _shares(self) -> bool:
        """Whether what stands in front of all classes is run once."""
        return False

    @property
    @abc.abstractmethod
    def _limit(self) -> int:
        """The most positions of a sequence."""

    @abc.abstractmethod
    def _find_stack(self) -> nn.ModuleList:
        """The layers."""

    @abc.abstractmethod
    def _embedded(self, states: Tensor, position: Tensor) -> Tensor:
        """Token embeddings [b, q, d] with what the model adds to them."""

    @abc.abstractmethod
    def _seen(self, layout: Layout, states: Tensor, sets: int) -> Tensor | None:
        """What the layers take as attention mask."""

    def _options(self, seen: Tensor | None) -> dict[str, Any]:
        """What else the layers take."""
        return {}

    @abc.abstractmethod
    def _read(self, states: Float[Tensor, "s r q d"], layout: Layout) -> Tensor:
        """Features [s, c, h] from the last layer's states."""


@final
class CausalTower(Tower):
    """CLIP: a causal tower that is read at the end token; `truncate` and `share` are exact.

    Sharing needs attention that takes any mask: with others than "sdpa" and "eager" it is left out.
    """

    def __init__(self, model: Any, tokenizer: Any, *, truncate: bool = True, share: bool = True) -> None:
        """See `Tower`.

        Raises:
            ConfigError: the tokenizer puts no end token behind a text.
        """
        super().__init__(model, tokenizer, truncate=truncate, share=share)
        self.hidden = int(model.text_projection.weight.shape[0])
        if not self._specials[1]:
            raise ConfigError("the tokenizer puts no end token behind a text, and CLIP's features are read there")

    @property
    def _shares(self) -> bool:
        return self.share and self.text.config._attn_implementation in ("sdpa", "eager")

    @property
    def _limit(self) -> int:
        return int(self.text.embeddings.position_embedding.weight.shape[0])

    def _find_stack(self) -> nn.ModuleList:
        return self.text.encoder.layers

    def _embedded(self, states: Tensor, position: Tensor) -> Tensor:
        # not by the module: several classes in one sequence are longer than it lets through
        return states + self.text.embeddings.position_embedding(position)

    def _seen(self, layout: Layout, states: Tensor, sets: int) -> Tensor | None:
        if len(layout.end) == len(layout.token):  # a sequence for each class: the model's own mask
            return create_causal_mask(
                config=self.text.config, inputs_embeds=states, attention_mask=None, past_key_values=None
            )
        seen = states.new_zeros(len(layout.token), 1, *layout.token.shape[1:], layout.token.shape[1])
        seen.masked_fill_(~layout.seen[:, None], torch.finfo(states.dtype).min)
        return seen if len(seen) == 1 else seen.repeat(sets, 1, 1, 1)

    def _options(self, seen: Tensor | None) -> dict[str, Any]:
        return {"is_causal": seen is None}

    def _read(self, states: Float[Tensor, "s r q d"], layout: Layout) -> Tensor:
        ends = states.flatten(1, 2).index_select(1, layout.end)
        return self.model.text_projection(self.text.final_layer_norm(ends))


@final
class PaddedTower(Tower):
    """SigLIP: looks in both directions, at its padding behind the words too, and is read at the last of all positions.

    Nothing is cut or shared, whatever `truncate` and `share` say: neither would be exact.
    """

    def __init__(self, model: Any, tokenizer: Any, *, truncate: bool = True, share: bool = True) -> None:
        """See `Tower`."""
        super().__init__(model, tokenizer, truncate=truncate, share=share)
        self.hidden = int(self.text.head.weight.shape[0])

    @property
    def _cuts(self) -> bool:
        return False

    @property
    def _limit(self) -> int:
        return int(self.text.embeddings.position_embedding.weight.shape[0])

    def _find_stack(self) -> nn.ModuleList:
        return self.text.encoder.layers

    def _embedded(self, states: Tensor, position: Tensor) -> Tensor:
        return self.text.embeddings(inputs_embeds=states, position_ids=position)

    def _seen(self, layout: Layout, states: Tensor, sets: int) -> Tensor | None:
        return None

    def _read(self, states: Float[Tensor, "s r q d"], layout: Layout) -> Tensor:
        return self.text.head(self.text.final_layer_norm(states[:, :, -1]))


@final
class MaskedTower(Tower):
    """BERT and its like in a dual encoder: looks in both directions under a mask, is read by its pooler.

    `truncate` is exact; nothing is shared.
    """

    def __init__(self, model: Any, tokenizer: Any, *, truncate: bool = True, share: bool = True) -> None:
        """See `Tower`.

        Raises:
            ConfigError: the text model has no pooler.
        """
        super().__init__(model, tokenizer, truncate=truncate, share=share)
        self.hidden = int(model.text_projection.weight.shape[0])
        if getattr(self.text, "pooler", None) is None:
            raise ConfigError(f"{type(self.text).__name__} has no pooler, so it gives no feature of a text")

    @property
    def _limit(self) -> int:
        table = self.text.embeddings
        # RoBERTa counts positions from behind its padding id
        return int(table.position_embeddings.weight.shape[0]) - (getattr(table, "padding_idx", -1) + 1)

    def _find_stack(self) -> nn.ModuleList:
        stack = getattr(getattr(self.text, "encoder", None), "layer", None)
        if stack is None:
            raise ConfigError(f"{type(self.text).__name__} is no text tower that is known: use a BERT-like one")
        return stack

    def _embedded(self, states: Tensor, position: Tensor) -> Tensor:
        return self.text.embeddings(inputs_embeds=states)

    def _seen(self, layout: Layout, states: Tensor, sets: int) -> Tensor | None:
        real = (layout.owner >= 0).long().repeat(sets, 1)
        return create_bidirectional_mask(config=self.text.config, inputs_embeds=states, attention_mask=real)

    def _read(self, states: Float[Tensor, "s r q d"], layout: Layout) -> Tensor:
        sets = len(states)
        return self.model.text_projection(self.text.pooler(states.flatten(0, 1))).unflatten(0, (sets, -1))


_KINDS: dict[str, type[Tower]] = {
    "clip": CausalTower,
    "siglip": PaddedTower,
    "vision-text-dual-encoder": MaskedTower,
}


def tower_of(model: Any, tokenizer: Any, *, truncate: bool = True, share: bool = True) -> Tower:
    """The text tower of a two-tower model.

    Args:
        model: a CLIP, SigLIP or vision-text dual encoder of transformers. SigLIP 2 of one image size is a SigLIP model;
            the one of any image size is not taken.
        tokenizer: of its text.
        truncate: see `Tower`; off, every sequence is as long as the model's longest.
        share: see `Tower`; off, each class has a sequence of its own.

    Raises:
        ConfigError: the model is none of these.
    """
    kind = _KINDS.get(model.config.model_type)
    if kind is None:
        raise ConfigError(f"{type(model).__name__} is no two-tower model that is known; use {', '.join(_KINDS)}")
    return kind(model, tokenizer, truncate=truncate, share=share)


def _with_rows(
    states: Float[Tensor, "s r q d"],
    context: Float[Tensor, "s n m d"],
    taken: Int[Tensor, "r q"],
    is_row: Bool[Tensor, "r q 1"],
) -> Float[Tensor, "s r q d"]:
    """States with rows of a context in the places where they stand."""
    rows = context.flatten(1, 2).index_select(1, taken.flatten()).unflatten(1, taken.shape)
    return torch.where(is_row, rows, states)
