"""What the models of a rewriting search are asked: one short question per role.

Knows no model, prompt or example. The words are our own; the release's were not taken over. They are short, so that
small models on this machine can follow them.
"""

from __future__ import annotations

from collections.abc import Sequence

from promptuary.speakers.base import Message, user

MOST_PAIRS = 24
"""Pairs that the explainer is shown at most, so that a small model's context holds them; our choice."""


def attack(text: str, instruction: str) -> list[Message]:
    """To the attacker: one text, one way of changing it."""
    return user(
        f"Change a text so that a language model misjudges it, while a person reads it as before. {instruction} "
        f"Answer with the changed text only.\n\nText: {text}\nChanged text:"
    )


def strategy(instruction: str, prompt: str) -> list[Message]:
    """To the strategist: where a change hurts most under the prompt as it is."""
    return user(
        f"A language model follows this prompt:\n{prompt}\n\n"
        f"The texts it is given may be changed in one way only: {instruction}\n"
        "Say in one or two sentences how to make this change so that the model is most likely to go wrong. Begin with "
        "a verb."
    )


def differences(instructions: Sequence[str], pairs: Sequence[tuple[str, str]]) -> list[Message]:
    """To the explainer: clean texts beside what became of them."""
    ways = "\n".join(f"- {one}" for one in instructions)
    shown = "\n\n".join(f"Before: {clean}\nAfter: {changed}" for clean, changed in pairs[:MOST_PAIRS])
    return user(
        f"Texts were changed in ways such as:\n{ways}\n\n{shown}\n\n"
        "List how the texts after the change differ from those before, one short line for each difference. Describe "
        "the kind of change, not what the texts are about."
    )


def summary(found: str, structural: bool) -> list[Message]:
    """To the summariser: one description out of many differences."""
    about = "how the sentences are built" if structural else "how the characters and words look"
    return user(
        f"Differences between texts before and after a change:\n{found}\n\n"
        f"Say in at most two sentences how such texts are changed in general, above all {about}. Quote no text."
    )


def rewriting(prompt: str, direction: str | None, keep: Sequence[str]) -> list[Message]:
    """To the rewriter: the prompt, and why it fails; without a direction it is asked for a clearer prompt."""
    why = (
        "The prompt should be clearer and harder to misunderstand."
        if direction is None
        else f"The prompt fails because the input texts are changed like this:\n{direction}"
    )
    return user(
        f"This prompt tells a language model what to do with an input text:\n<prompt>{prompt}</prompt>\n\n{why}\n\n"
        "Write a better prompt for the same task, with which the model answers correctly all the same. Speak of inputs "
        f"in general, not of single texts.{_kept(keep)} Answer with the new prompt only, as <prompt>...</prompt>."
    )


def paraphrase(prompt: str, keep: Sequence[str]) -> list[Message]:
    """To the paraphraser: the same in other words."""
    return user(
        f"Say this prompt in other words, with the same meaning:\n<prompt>{prompt}</prompt>\n\n"
        f"Leave nothing out.{_kept(keep)} Answer with the new prompt only, as <prompt>...</prompt>."
    )


def piece(text: str, prompt: str) -> list[Message]:
    """To the paraphraser of a search by edits: one piece of a prompt in other words."""
    return user(
        f"Say some words otherwise, with the same meaning and as briefly. They stand in this text: {prompt}\n"
        f"Answer with the new words only.\n\nWords: {text}\nOtherwise:"
    )


def _kept(keep: Sequence[str]) -> str:
    return "" if not keep else " It must contain, word for word: " + "; ".join(f'"{one}"' for one in keep) + "."
