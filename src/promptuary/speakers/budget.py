"""What talking costs: a ledger by role, and budgets that no call may exceed.

Knows no model, no endpoint and no answer; only counts.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from promptuary.errors import BudgetExceeded, FileFormatError, StorageError
from promptuary.speakers.base import SpeakerConfig

Counted = Literal["hits", "failed", "empty", "refused", "unparsed"]


@dataclass
class Spent:
    """What was asked and answered: requests, tokens, money; and what became of the answers.

    `calls`: requests, further tries included; `hits`: answers that the cache had; `failed`: requests without an answer;
    `empty`, `refused`, `unparsed`: answers that were none, that declined, or that nobody could read.
    """

    calls: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    money: float = 0.0
    hits: int = 0
    failed: int = 0
    empty: int = 0
    refused: int = 0
    unparsed: int = 0

    def add(self, other: Spent, sign: int = 1) -> None:
        """Put another one on top, or take it off."""
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + sign * getattr(other, one.name))

    def as_dict(self) -> dict[str, int | float]:
        """By name."""
        return {one.name: getattr(self, one.name) for one in fields(self)}


@dataclass
class Purse:
    """What all roles of one model have spent together, and what requests on their way may cost at worst.

    `excess`: tokens by which a question once was longer than estimated; later estimates are raised by as much.
    """

    spent: Spent = field(default_factory=Spent)
    held: Spent = field(default_factory=Spent)
    open: int = 0
    excess: int = 0


@dataclass(frozen=True)
class Ticket:
    """A request that may be made: its number in the journal and its worst case."""

    number: str
    worst: Spent


class Ledger:
    """What every role has spent. Budgets hold for a model at an endpoint, whatever role asks it.

    With a journal they hold over restarts: each request is written down with its worst case before it is made and with
    its cost behind it, so that one which a kill interrupted counts in full.
    """

    def __init__(self, journal: Path | None = None) -> None:
        """Begin, or go on.

        Args:
            journal: file of JSON lines; what it holds was spent already. It never holds a question, answer or key.

        Raises:
            FileFormatError: the file is no journal.
            StorageError: it cannot be read.
        """
        self.journal = journal
        self.changed = threading.Condition()
        self._roles: dict[tuple[str, str], Spent] = {}
        self._purses: dict[str, Purse] = {}
        if journal is not None:
            self._recall(journal)

    def account(self, role: str, config: SpeakerConfig) -> Account:
        """What a role asks a model with."""
        return Account(self, role, config)

    def spent(self, role: str | None = None) -> Spent:
        """The sum over a role, or over all."""
        total = Spent()
        with self.changed:
            for (name, _), one in self._roles.items():
                if role in (None, name):
                    total.add(one)
        return total

    def rows(self) -> list[dict[str, Any]]:
        """One row per role and model, for results."""
        with self.changed:
            return [{"role": role, "model": model, **one.as_dict()} for (role, model), one in self._roles.items()]

    def purse(self, model: str) -> Purse:
        """Of a model; the caller holds `changed`."""
        return self._purses.setdefault(model, Purse())

    def of(self, role: str, model: str) -> Spent:
        """Of a role; the caller holds `changed`."""
        return self._roles.setdefault((role, model), Spent())

    def write(self, **line: Any) -> None:
        """A line of the journal, in one piece, also beside other processes."""
        if self.journal is None:
            return
        try:
            self.journal.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                written = (json.dumps(line) + "\n").encode()
                if os.write(handle, written) < len(written):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(handle)
        except OSError as error:
            raise StorageError(f"{self.journal} cannot be written: {error.strerror}") from None

    def _recall(self, journal: Path) -> None:
        try:
            content = journal.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise StorageError(f"{journal} cannot be read: {error.strerror}") from None
        whole = content.rfind(b"\n") + 1
        if whole < len(content):  # a kill tore the last line: the request behind it was not made
            os.truncate(journal, whole)
        waiting: dict[str, tuple[str, str, Spent]] = {}
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                known = json.loads(line)
                cost = Spent(int(known["calls"]), int(known["in"]), int(known["out"]), float(known["money"]))
                own = known["id"], str(known["role"]), str(known["model"])
            except (ValueError, KeyError, TypeError):
                raise FileFormatError(
                    f"{journal}, line {number}: no entry of a journal of costs; move the file away to forget them"
                ) from None
            if known.get("kind") == "asks":
                waiting[own[0]] = (own[1], own[2], cost)
            else:
                waiting.pop(own[0], None)
                self._book(own[1], own[2], cost)
        for role, model, cost in waiting.values():
            self._book(role, model, cost)

    def _book(self, role: str, model: str, cost: Spent) -> None:
        self.of(role, model).add(cost)
        self.purse(model).spent.add(cost)


class Account:
    """One role's way to ask one model within its budgets."""

    def __init__(self, ledger: Ledger, role: str, config: SpeakerConfig) -> None:
        """See `Ledger.account`."""
        self.ledger, self.role, self.config = ledger, role, config
        self.model = config.model if config.base_url is None else f"{config.model} @ {config.base_url}"

    def price(self, tokens_in: int, tokens_out: int) -> float:
        """Of so many tokens; 0 without prices."""
        return (tokens_in * (self.config.price_in or 0) + tokens_out * (self.config.price_out or 0)) / 1e6

    def reserve(self, tokens_in: int, tokens_out: int) -> Ticket:
        """Before a request: hold back what it costs at worst, and wait for others on their way if that decides.

        Raises:
            BudgetExceeded: it does not fit; nothing is held back.
            StorageError: the journal cannot be written; nothing is held back.
        """
        with self.ledger.changed:
            purse = self.ledger.purse(self.model)
            whole = tokens_in + purse.excess
            worst = Spent(1, whole, tokens_out, self.price(whole, tokens_out))
            while (over := self._over(purse, worst)) is not None:
                if purse.open == 0:
                    raise BudgetExceeded(over)
                self.ledger.changed.wait()
            ticket = Ticket(uuid.uuid4().hex, worst)
            self._write("asks", ticket, worst)
            purse.held.add(worst)
            purse.open += 1
            return ticket

    def settle(self, ticket: Ticket, tokens_in: int | None = None, tokens_out: int | None = None) -> None:
        """Behind a request: book what it cost, which is the worst case for what is not known."""
        with self.ledger.changed:
            purse, worst = self.ledger.purse(self.model), ticket.worst
            taken = worst.tokens_in if tokens_in is None else tokens_in
            given = worst.tokens_out if tokens_out is None else tokens_out
            purse.excess += max(0, taken - worst.tokens_in)
            cost = Spent(1, taken, given, self.price(taken, given))
            self._close(purse, ticket, cost)
            purse.spent.add(cost)
            self.ledger.of(self.role, self.model).add(cost)

    def release(self, ticket: Ticket) -> None:
        """Instead of `settle`: the request never left."""
        with self.ledger.changed:
            self._close(self.ledger.purse(self.model), ticket, Spent())

    def note(self, what: Counted, times: int = 1) -> None:
        """Count what became of answers."""
        with self.ledger.changed:
            own = self.ledger.of(self.role, self.model)
            setattr(own, what, getattr(own, what) + times)

    def _close(self, purse: Purse, ticket: Ticket, cost: Spent) -> None:
        purse.held.add(ticket.worst, -1)
        purse.open -= 1
        self.ledger.changed.notify_all()
        self._write("cost", ticket, cost)

    def _write(self, kind: str, ticket: Ticket, cost: Spent) -> None:
        own = {"calls": cost.calls, "in": cost.tokens_in, "out": cost.tokens_out, "money": cost.money}
        self.ledger.write(kind=kind, id=ticket.number, role=self.role, model=self.model, **own)

    def _over(self, purse: Purse, worst: Spent) -> str | None:
        """Why a request does not fit, in one line; None if it does."""
        now = Spent()
        for one in (purse.spent, purse.held, worst):
            now.add(one)
        limits: Mapping[str, tuple[float | None, float, float]] = {
            "calls": (self.config.budget_calls, now.calls, worst.calls),
            "tokens": (
                self.config.budget_tokens,
                now.tokens_in + now.tokens_out,
                worst.tokens_in + worst.tokens_out,
            ),
            "money": (self.config.budget_money, now.money, worst.money),
        }
        for unit, (limit, total, more) in limits.items():
            if limit is not None and total > limit + 1e-12:
                return (
                    f"{self.role}: the budget of {limit:g} {unit} for {self.model} is used up: {total - more:g} are "
                    f"spent and the next request may take {more:g}; raise budget_{unit} to go on"
                )
        return None
