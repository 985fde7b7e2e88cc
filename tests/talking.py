"""What tests of searches for words share: a victim that is a function, and speakers that follow a script.

Knows no solver.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from promptuary.errors import BudgetExceeded
from promptuary.solvers.base import Tried
from promptuary.speakers.base import Message

CLEAN = (
    "a gripping and funny film", "the plot is dull and lifeless", "wonderful actors in every scene",
    "nothing here is worth watching", "charming from start to finish", "tedious dialogue without an end",
    "an honest and moving portrait", "cheap effects and worse jokes", "smart writing with great timing",
    "painfully slow and predictable", "beautiful pictures of the coast", "a messy and confused thriller",
)  # fmt: skip
"""Every word of every one is spelt right."""

KNOWN = {word for text in CLEAN for word in text.split()}


def has_typo(text: str) -> bool:
    """Whether a word is none of those of the clean texts."""
    return any(word not in KNOWN for word in text.split())


Victim = Callable[[str, Mapping[str, Any]], float]


class Wordy:
    """A prompt of words whose model is a function of prompt and example; `asked` counts what was not remembered."""

    fields = ("text",)

    def __init__(self, victim: Victim, text: str = "Say whether the review is good.", held_out: int = 6) -> None:
        self.text, self.victim = text, victim
        self.examples = [{"text": one, "label": ("yes", "no")[place % 2]} for place, one in enumerate(CLEAN)]
        self.held_out = [{"text": one, "label": ("yes", "no")[place % 2]} for place, one in enumerate(CLEAN[:held_out])]
        self.known: dict[tuple[str, str], float] = {}
        self.asked = 0

    def proposal(self, number: int) -> str | None:
        return None

    def tried(
        self,
        texts: Sequence[str],
        examples: Sequence[Mapping[str, Any]],
        check: Callable[[], None] | None = None,
        draw: int = 0,
    ) -> Tried:
        if check is not None:
            check()
        found = torch.tensor([[self._value(text, one) for one in examples] for text in texts])
        found = found.reshape(len(texts), len(examples))
        return Tried(found, (found > 0).float())

    def _value(self, text: str, example: Mapping[str, Any]) -> float:
        key = text, repr(sorted(example.items()))
        if key not in self.known:
            self.asked += 1
            self.known[key] = self.victim(text, example)
        return self.known[key]


class Script:
    """A speaker whose answers are a function of the question and of a number that counts up; refuses above a budget."""

    name = "script"

    def __init__(self, answer: Callable[[str, int], str], budget: int | None = None) -> None:
        self.answer, self.budget, self.calls = answer, budget, 0
        self.questions: list[str] = []
        self.seeds: list[int | None] = []
        self.counts: Counter[int] = Counter()

    def generate(
        self,
        messages: Sequence[Message],
        *,
        n: int = 1,
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_tokens: int = 256,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> list[str]:
        if self.budget is not None and self.calls >= self.budget:
            raise BudgetExceeded("the next call would exceed the budget")
        self.calls += 1
        self.counts[n] += 1
        self.questions.append(messages[-1]["content"])
        self.seeds.append(seed)
        return [text for place in range(n) if (text := self.answer(messages[-1]["content"], place).strip())]


START = "Say whether the review is good."
BEWARE = "Beware of typos."
ROLES = ("attacker", "strategist", "explainer", "summariser", "rewriter", "paraphraser")


def victim(prompt: str, example: Mapping[str, Any]) -> float:
    """Right unless the text has a typo of which the prompt does not warn."""
    return 1.0 if BEWARE in prompt or not has_typo(example["text"]) else -1.0


def fragile(prompt: str, example: Mapping[str, Any]) -> float:
    return -1.0 if has_typo(example["text"]) else 1.0


def clean_of(question: str) -> str:
    return re.findall(r"Text: (.*)\nChanged text:", question)[0]


def typo(text: str) -> str:
    """The first two letters of the longest word change places."""
    word = max(text.split(), key=len)
    return text.replace(word, word[1] + word[0] + word[2:], 1)


def four_copies_and_a_typo(question: str, place: int) -> str:
    text = clean_of(question)
    return typo(text) if place == 3 else text


def differs(question: str, place: int) -> str:
    """Speaks of typos only where it is shown a pair with one."""
    pairs = re.findall(r"Before: (.*)\nAfter: (.*)", question)
    return "words are misspelt: typos" if any(has_typo(after) for _, after in pairs) else "no difference"


def warns(question: str, place: int) -> str:
    """Speaks of typos only where it is told of them."""
    told = question.split("</prompt>")[1]
    if place == 2 and "typos" in told:
        return f"<prompt>{START} {BEWARE}</prompt>"
    return f"<prompt>Variant {place} of no use.</prompt>"


def cast(**changes: Callable[[str, int], str]) -> dict[str, Script]:
    answers: dict[str, Callable[[str, int], str]] = {
        "attacker": four_copies_and_a_typo,
        "strategist": lambda question, place: "Misspell the longest word.",
        "explainer": differs,
        "summariser": lambda question, place: "typos" if "typos" in question else "nothing",
        "rewriter": warns,
        "paraphraser": lambda question, place: f"Paraphrase {place} of no use.",
        **changes,
    }
    return {role: Script(answer) for role, answer in answers.items()}
