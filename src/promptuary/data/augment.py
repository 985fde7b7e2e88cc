"""How training examples are varied: words of a text deleted or swapped (Wei & Zou 2019, arXiv 1901.11196).

Knows no example, template, tokenizer or label: a text goes in and a text comes out. How an image is varied is only
set here; `images.py` does it.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field, field_validator

from promptuary.settings import Settings


class AugmentConfig(Settings):
    """How training examples are varied from epoch to epoch; by default not at all."""

    delete: float = Field(0.0, ge=0, lt=1, description="chance of each word to be left out; Wei & Zou 2019: 0.1")
    swap: float = Field(
        0.0, ge=0, le=1, description="exchanges of two words, as a part of the words, at least one; Wei & Zou 2019: 0.1"
    )

    crop: tuple[float, float] | None = Field(
        None, description="least and most area of an image of which a random part is shown; CoOp (2109.01134): 0.08, 1"
    )
    flip: float = Field(0.0, ge=0, le=1, description="chance of an image to be mirrored; CoOp (2109.01134): 0.5")

    @field_validator("crop")
    @classmethod
    def _parts_of_an_image(cls, value: Any) -> Any:
        if value is not None and not 0 < value[0] <= value[1] <= 1:
            raise ValueError(f"expected two parts of the area, 0 < least <= most <= 1, got {list(value)}")
        return value

    @property
    def active(self) -> bool:
        """Whether texts are varied."""
        return self.delete > 0 or self.swap > 0

    @property
    def varies_images(self) -> bool:
        """Whether images are varied."""
        return self.crop is not None or self.flip > 0


def augmented(text: str, config: AugmentConfig, generator: torch.Generator) -> str:
    """One variant of a text: itself, or with words deleted, or with words swapped, each as likely as the others.

    As in the paper, a variant has one kind of change and the text itself stays among what is trained on. The paper's
    two other operations need a dictionary of synonyms and are left out. Words are what stands between white space;
    a text of fewer than two words stays as it is, and at least one word always stays.

    Args:
        text: of a training example.
        config: which operations there are.
        generator: the only source of chance.
    """
    words = text.split()
    operations = [None, *(name for name in ("delete", "swap") if getattr(config, name) > 0)]
    chosen = operations[int(torch.randint(len(operations), (1,), generator=generator))]
    if chosen is None or len(words) < 2:
        return text
    return " ".join(
        deleted(words, config.delete, generator) if chosen == "delete" else swapped(words, config.swap, generator)
    )


def deleted(words: list[str], chance: float, generator: torch.Generator) -> list[str]:
    """The words without those that chance leaves out; if that is all of them, one of them alone."""
    kept = (torch.rand(len(words), generator=generator) >= chance).tolist()
    if not any(kept):
        kept[int(torch.randint(len(words), (1,), generator=generator))] = True
    return [word for word, keep in zip(words, kept, strict=True) if keep]


def swapped(words: list[str], part: float, generator: torch.Generator) -> list[str]:
    """The words after `part` as many exchanges of two places as there are words, at least one; two words or more."""
    mixed = list(words)
    for _ in range(max(1, int(part * len(words)))):
        one, other = torch.randperm(len(words), generator=generator)[:2].tolist()
        mixed[one], mixed[other] = mixed[other], mixed[one]
    return mixed
