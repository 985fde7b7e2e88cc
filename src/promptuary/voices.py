"""A frozen causal model as the voice of a policy: states behind sequences of tokens, and what its head makes of them.

Knows no policy, no prompt and no task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from promptuary.backbones.base import Backbone
from promptuary.errors import ConfigError
from promptuary.types import ANSWER, Batch, Prompt


class CausalVoice:
    """See `solvers.base.Voice`."""

    def __init__(self, backbone: Backbone) -> None:
        """Around a loaded model.

        Raises:
            ConfigError: it is no causal model, or its head does not run apart from its body.
        """
        if backbone.answer_at != "end" or not backbone.differentiable:
            raise ConfigError(
                f"solver.model: a policy speaks with a causal model, and {backbone.config.model} is {backbone.name}; "
                "name one, such as distilgpt2"
            )
        if not backbone.separable:
            raise ConfigError(
                f"solver.model: {type(backbone.model).__name__} does not let its head run apart from its body"
            )
        self.backbone = backbone
        self._before: list[tuple[int, ...]] = []
        self._cache: DynamicCache | None = None

    @property
    def name(self) -> str:
        """As it was loaded."""
        return self.backbone.config.model

    @property
    def identity(self) -> Mapping[str, str]:
        """As saved prompts know it."""
        return self.backbone.identity

    @property
    def width(self) -> int:
        """Of the states."""
        return self.backbone.shape.hidden

    @property
    def vocabulary(self) -> int:
        """Words of the head."""
        return int(self.backbone.model.config.get_text_config().vocab_size)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.backbone.device

    def ids(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        return self.backbone.text.plain_ids(text)

    def text(self, ids: Sequence[int]) -> str:
        """As the tokenizer writes them, special tokens too."""
        return str(self.backbone.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    @torch.no_grad()
    def states(self, sequences: Sequence[Sequence[int]]) -> Float[Tensor, "b h"]:
        """In one pass, behind the special token that texts begin with, if there is one.

        Equal sequences run once: a policy begins all of its prompts behind the same words. Sequences that go on from
        those of the call before by one token run that token alone.
        """
        places = dict[tuple[int, ...], int]()
        which = [places.setdefault((*self.backbone.prefix, *sequence), len(places)) for sequence in sequences]
        if not all(places):
            raise ConfigError("solver.placeholder: a policy needs at least one token to begin behind; give it a word")
        rows = list(places)
        found = self._grown(rows) if len({len(row) for row in rows}) == 1 and self._goes_on else self._padded(rows)
        return found.float()[torch.tensor(which, device=self.device)]

    @cached_property
    def _goes_on(self) -> bool:
        """Whether this model goes on exactly from keys and values: as its backbone found by trying."""
        return bool(getattr(self.backbone, "shares", False))

    def _grown(self, rows: Sequence[tuple[int, ...]]) -> Float[Tensor, "b h"]:
        """States of rows of one length, from keys and values of the rows before where they go on from them."""
        known = {row: place for place, row in enumerate(self._before)}
        parents = [known.get(row[:-1]) for row in rows]
        new, cache = rows, self._cache
        if cache is not None and None not in parents:
            cache.batch_select_indices(torch.tensor(parents, device=self.device))
            new = [row[-1:] for row in rows]
        else:
            cache = DynamicCache()
        ids = torch.tensor(new, device=self.device)
        mask = torch.ones(len(rows), len(rows[0]), dtype=torch.long, device=self.device)
        with self.backbone.wiring.active():
            made = self.backbone.model.base_model(
                input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True
            )
        self._before, self._cache = list(rows), cache
        return made.last_hidden_state[:, -1]

    def _padded(self, rows: Sequence[tuple[int, ...]]) -> Float[Tensor, "b h"]:
        """States of rows of any lengths, padded on the right."""
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *[self.backbone.pad] * (longest - len(row))] for row in rows], device=self.device)
        ends = torch.tensor([len(row) - 1 for row in rows], device=self.device)
        mask = (torch.arange(longest, device=self.device) <= ends[:, None]).long()
        batch = Batch(ids, mask, torch.arange(len(rows), device=self.device), slots={ANSWER: ends})
        return self.backbone.answer(batch, Prompt())

    def logits(self, states: Float[Tensor, "n h"]) -> Float[Tensor, "n v"]:
        """The head alone, in float32."""
        return self.backbone.tail.logits(states.to(self.backbone.model.dtype)).float()
