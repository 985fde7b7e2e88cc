"""What a method may start from on a model that sees: patches of the training images, texts of the classes, its norms.

Knows no method by name and nothing of how the first values are made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from promptuary.asking import Asking
from promptuary.data.augment import AugmentConfig
from promptuary.data.collate import Row, collate, pad_candidates
from promptuary.prompts.init import Starting
from promptuary.types import Prompt

if TYPE_CHECKING:
    from promptuary.backbones.base import Backbone

TOGETHER = 16
"""Images that are looked at in one pass (our choice)."""


@dataclass(frozen=True)
class TrainingPatches:
    """Patch tokens of training images, see `prompts.init.Patches`."""

    backbone: Backbone
    asking: Asking
    examples: Sequence[Mapping[str, Any]]
    augment: AugmentConfig | None

    def tokens(
        self, count: int | None, generator: torch.Generator, *, position: bool, replacement: bool, augmented: bool
    ) -> Iterator[list[Float[Tensor, "b n v"]]]:
        """Batch by batch; images are opened as they are needed."""
        there = len(self.examples)
        wanted = there if count is None else count if replacement else min(count, there)
        if replacement:
            chosen = torch.randint(there, (wanted,), generator=generator).tolist()
        else:
            chosen = torch.randperm(there, generator=generator)[:wanted].tolist()
        seed = int(torch.randint(2**31, (), generator=generator))
        for start in range(0, wanted, TOGETHER):
            rows = [self.asking.row(self.examples[place], place) for place in chosen[start : start + TOGETHER]]
            if augmented:
                rows = [_varied(row, self.augment, (seed, start, number)) for number, row in enumerate(rows)]
            batch = collate(rows, self.backbone.pad, segments=False, sight=self.backbone.sight)
            yield self.backbone.tokens(batch.to(self.backbone.device), position=position)


def _varied(row: Row, augment: AugmentConfig | None, view: tuple[int, ...]) -> Row:
    """The row with a random view of its image, where training has such."""
    return replace(row, encoded=replace(row.encoded, image=replace(row.encoded.image, augment=augment, view=view)))


@dataclass(frozen=True)
class ClassTexts:
    """The text tower, and the names of the task's classes, see `prompts.init.Classes`."""

    backbone: Backbone
    names: Sequence[str]

    @torch.no_grad()
    def features(self, texts: Sequence[str]) -> Float[Tensor, "n h"]:
        """Of whole texts, a few hundred at a time."""
        found = []
        for start in range(0, len(texts), 256):
            ids = [self.backbone.answer_ids(text) for text in texts[start : start + 256]]
            words = pad_candidates(ids).to(self.backbone.device)
            found.append(self.backbone.texts(Prompt(), words)[0].float().cpu())
        return torch.cat(found)


def seen(
    source: Starting,
    backbone: Backbone,
    asking: Asking | None,
    examples: Sequence[Mapping[str, Any]],
    augment: AugmentConfig | None,
) -> Starting:
    """The same with what a model that sees has to offer."""
    patches = TrainingPatches(backbone, asking, examples, augment) if asking is not None and len(examples) else None
    classes = None
    if asking is not None and "texts" in backbone.abilities and asking.task.words:
        classes = ClassTexts(backbone, asking.task.names)
    return replace(source, patches=patches, classes=classes, norms=backbone.norm_values())
