"""BATprompt (arXiv 2412.18196v1/v2): an instruction that still works when the inputs are perturbed.

Knows no model and not how it is found: `solvers/rewrite.py` attacks the inputs and has models rewrite the instruction.
What is here is the instruction. Rebuilt from abstracts, reviews and the released code, without the paper's full text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from promptuary.methods.words import TextConfig, TextMethod


class BATpromptConfig(TextConfig):
    """Settings of BATprompt; those of the search stand under `solver`."""

    name: Literal["batprompt"] = "batprompt"
    init_text: str | None = Field(
        "Read the text and say which label fits it best.",
        description="the instruction to start from; the release: a manual one for each task, ours: one for any labels",
    )


class BATprompt(TextMethod):
    """An instruction that models rewrite under attack."""

    name = "batprompt"
    title = "BATprompt"
    paper = "arXiv 2412.18196v1/v2"
    reconstructed = True
    solver = "rewrite"
    tiny: ClassVar[Mapping[str, Any]] = {"init_text": "was it good"}
    Config = BATpromptConfig
