"""The public contract suite: every property that a method must have on every family that it supports.

Knows no method by name. An outside method gets the same tests as those of the library:

    from promptuary.testing import check_method
    check_method(MyMethod)
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from promptuary.errors import ConfigError
from promptuary.methods.base import Method
from promptuary.testing import tiny
from promptuary.testing.case import Case, case_of, write_toy
from promptuary.testing.facts import check_facts, families_of, known
from promptuary.testing.properties import PROPERTIES, Property, check_property


@dataclass(frozen=True)
class Failure:
    """A property that a method does not have on a family, and the error that says so."""

    method: str
    family: str
    property_name: str
    error: Exception

    def __str__(self) -> str:
        kind = "" if isinstance(self.error, AssertionError) else f"{type(self.error).__name__}: "
        message = kind + " ".join(str(self.error).split())
        return f"{self.method} on {self.family}: {self.property_name}: {message}"


class ContractFailure(AssertionError):
    """A method breaks the contract; `failures` holds every cell that failed, the message one line for each."""

    def __init__(self, failures: Sequence[Failure], checked: int) -> None:
        """Gather.

        Args:
            failures: at least one.
            checked: how many cells were checked.
        """
        self.failures = tuple(failures)
        head = f"{len(failures)} of {checked} checks failed:"
        super().__init__("\n".join([head, *(f"  {failure}" for failure in failures)]))


def check_method(
    method: type[Method],
    *,
    settings: Mapping[str, Any] | None = None,
    families: Sequence[str] | None = None,
    properties: Sequence[str] | None = None,
    card: str | Path | None = None,
) -> None:
    """Run the contract on a method: each property on each family; prints nothing and leaves no file behind.

    What the method declares in `exceptions` must not hold, everything else must. From then on the method is known by
    its name in this process, as after `registry.add`. Some 15 seconds on a CPU for all properties on all families.

    Args:
        method: a final class; it need not be registered.
        settings: settings that fit tiny models (width 32, texts of up to 40 tokens); default: `method.tiny`.
        families: families to check on; default: every one that has the method's sites.
        properties: names of properties to check; default: all.
        card: the method's card, a Markdown file; the properties about it are left out without one.

    Raises:
        ConfigError: the class lacks a fact, or there is no such family or property.
        ContractFailure: an AssertionError with all failures together, each with method, family, property and reason;
            their tracebacks hang on its cause.
    """
    check_facts(method, settings)
    supported = families_of(method)
    for name in properties or ():
        known(name, list(PROPERTIES), "check_method: properties has")
    for family in families or ():
        known(family, supported, f"check_method: families has, for the sites {sorted(method.sites)},")
    path = None if card is None else Path(card)
    cells = [
        (family, name)
        for family in (supported if families is None else families)
        for name in (PROPERTIES if properties is None else properties)
        if PROPERTIES[name].applies(method, family, card=path is not None)
    ]
    if not cells:
        raise ConfigError(
            "check_method: nothing to check: none of these properties applies to these families"
            f"{'' if card else ' (properties of the card need card=)'}"
        )
    gathered = _Gathered([])
    for family, name in cells:
        with tempfile.TemporaryDirectory() as folder, gathered.at(method.name, family, name):
            check_property(case_of(method, family, Path(folder), settings, path), name)
    if gathered.failures:
        errors = [failure.error for failure in gathered.failures]
        raise ContractFailure(gathered.failures, len(cells)) from ExceptionGroup("what failed", errors)


@dataclass
class _Gathered:
    """Keeps the errors of many blocks for one report; what is not an `Exception` (an interrupt) passes through."""

    failures: list[Failure]
    place: tuple[str, str, str] = ("", "", "")

    def at(self, *place: str) -> _Gathered:
        self.place = (place[0], place[1], place[2])
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        if isinstance(error, Exception):
            self.failures.append(Failure(*self.place, error))
            return True
        return False


__all__ = [
    "PROPERTIES",
    "Case",
    "ContractFailure",
    "Failure",
    "Property",
    "case_of",
    "check_method",
    "check_property",
    "tiny",
    "write_toy",
]
