"""GrIPS (Prasad et al. 2022, arXiv 2203.07281): an instruction that gets better by edits of its phrases.

Knows no model and not how edits are chosen: `solvers/edits.py` does that. What is here is the instruction.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from promptuary.methods.words import TextConfig, TextMethod


class GripsConfig(TextConfig):
    """Settings of GrIPS; those of the search stand under `solver`."""

    name: Literal["grips"] = "grips"
    init_text: str | None = Field(
        "Read the text, and then say in one word which of the labels fits it best.",
        description="the instruction to start from; GrIPS: that of Natural Instructions, ours: one for any labels",
    )


class Grips(TextMethod):
    """An instruction whose phrases are deleted, swapped, said otherwise and put back."""

    name = "grips"
    title = "GrIPS"
    paper = "arXiv 2203.07281"
    solver = "edits"
    tiny: ClassVar[Mapping[str, Any]] = {"init_text": "was it good, or was it bad"}
    Config = GripsConfig
