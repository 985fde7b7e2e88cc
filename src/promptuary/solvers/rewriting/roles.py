"""The roles that models play in a rewriting search, and the ledger of one round of it.

Knows no question and no prompt.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

from promptuary.errors import BudgetExceeded
from promptuary.seeds import seeded
from promptuary.speakers.base import Message, Speaker

Role = Literal["attacker", "strategist", "explainer", "summariser", "rewriter", "paraphraser"]
ROLES: tuple[Role, ...] = get_args(Role)

Check = Callable[[], None] | None


def drawn(seed: int, *parts: int) -> random.Random:
    """A generator for choices among texts, for one purpose: the same seed and parts choose the same."""
    return random.Random(seeded(seed, *parts).initial_seed())


class Ledger:
    """What one round asks its models for, and how often; a round that is stopped in the middle throws it away.

    `asked`: requests by role, with those for the set that prompts are chosen with under `pool`; `answers`: texts that
    came back; `exhausted`: a budget is spent, so that from here on nobody is asked and every answer is empty.
    """

    def __init__(
        self,
        speakers: Mapping[Role, Speaker],
        seed: int,
        step: int,
        *,
        temperature: float = 1.0,
        top_p: float = 0.95,
        max_tokens: int = 300,
        check: Check = None,
    ) -> None:
        """Of a round.

        Args:
            speakers: who plays which role.
            seed: of the run.
            step: of the round; a request's own seed follows from both and from its place in the round.
            temperature: of all roles.
            top_p: mass of the likeliest tokens that are drawn from.
            max_tokens: most tokens of an answer.
            check: called before each request; may raise to stop.
        """
        self.speakers, self.seed, self.step, self.check = speakers, seed, step, check
        self.temperature, self.top_p, self.max_tokens = temperature, top_p, max_tokens
        self.asked: Counter[str] = Counter()
        self.answers: Counter[str] = Counter()
        self.exhausted = False

    def ask(self, role: Role, messages: Sequence[Message], *, n: int = 1, account: str = "") -> list[str]:
        """Answers of one role, possibly fewer than `n`; none once a budget is spent.

        Raises:
            SpeakerError: the model cannot be reached or refuses.
        """
        if self.exhausted:
            return []
        if self.check is not None:
            self.check()
        place = sum(self.asked.values())
        try:
            found = self.speakers[role].generate(
                messages,
                n=n,
                temperature=self.temperature,
                top_p=self.top_p,
                max_tokens=self.max_tokens,
                seed=seeded(self.seed, self.step, place).initial_seed() % 2**31,
            )
        except BudgetExceeded:
            self.exhausted = True
            return []
        self.asked[account or role] += 1
        self.answers[account or role] += len(found)
        return found
