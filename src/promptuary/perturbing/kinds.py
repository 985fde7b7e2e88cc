"""The nine perturbations as data: their level, how closeness is measured, a rule, and what a model is asked to do.

Knows no prompt, task or model. Source of the nine and of their gates: PromptAttack (Xu et al.) and BATprompt
(arXiv 2412.18196 v1, v2). Words and rules are our own.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from promptuary.errors import ConfigError
from promptuary.perturbing import characters, sentences, words
from promptuary.registry import suggest

Level = Literal["character", "word", "sentence"]

Rule = Callable[[str, random.Random], str]
"""A text and where chance comes from -> the changed text, or the same where nothing can change."""


@dataclass(frozen=True)
class Kind:
    """One perturbation.

    `id`: such as C1; `gate`: whether letters or the meaning must stay close; `instruction`: what a model is asked to
    do, without the text; `rule`: the same by rule.
    """

    id: str
    level: Level
    title: str
    gate: Literal["surface", "meaning"]
    instruction: str
    rule: Rule


KINDS: dict[str, Kind] = {
    kind.id: kind
    for kind in (
        Kind(
            "C1", "character", "typos", "surface",
            "Misspell a few of its words the way a hasty typist would.", characters.typos,
        ),
        Kind(
            "C2", "character", "altered letters", "surface",
            "Replace a handful of single letters by other letters.", characters.altered,
        ),
        Kind(
            "C3", "character", "letters at the end", "surface",
            "Leave it as it is, and put a few letters or signs without meaning behind its end.", characters.appended,
        ),
        Kind(
            "W1", "word", "synonyms", "meaning",
            "Exchange a few of its words for others that mean the same.", words.synonyms,
        ),
        Kind(
            "W2", "word", "fewer words", "meaning",
            "Leave out a few words that its meaning does not hang on. Keep every negation.", words.fewer,
        ),
        Kind(
            "W3", "word", "more words", "meaning",
            "Put in at most four words that are neutral and add nothing.", words.more,
        ),
        Kind(
            "S1", "sentence", "a handle", "surface",
            "Leave it as it is, and put a short random handle without meaning behind its end: an @ and some letters "
            "and digits.", sentences.handle,
        ),
        Kind(
            "S2", "sentence", "paraphrase", "meaning",
            "Say the same in your own words.", sentences.paraphrase,
        ),
        Kind(
            "S3", "sentence", "other syntax", "meaning",
            "Keep its words as far as you can, and build its sentences in another way.", sentences.syntax,
        ),
    )
}  # fmt: skip
"""Id -> perturbation, in the order in which they are told."""


def chosen(names: str) -> tuple[Kind, ...]:
    """Perturbations by name.

    Args:
        names: `all`, or ids with commas between them, such as `C1,W2`; in any case, and told in the order of `KINDS`.

    Raises:
        ConfigError: no name, or an unknown one, with the nearest known one.
    """
    wanted = {name.strip().upper(): name.strip() for name in names.split(",")}
    if "ALL" in wanted:
        return tuple(KINDS.values())
    for name, written in wanted.items():
        if name not in KINDS:
            near = suggest(name, ["ALL", *KINDS]).replace("ALL", "all")
            raise ConfigError(f'no such perturbation: "{written[:40]}"{near} (all, or some of {", ".join(KINDS)})')
    return tuple(kind for kind in KINDS.values() if kind.id in wanted)
