"""Perturbed examples, each tied to the clean one that it came from.

Knows no prompt, model or score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from promptuary.errors import DataError

Example = Mapping[str, Any]
Examples = Sequence[Example]


@dataclass(frozen=True)
class Record:
    """One example under one kind.

    `example`: its place among the clean ones, whose label it keeps; `field`: the field that is perturbed; `clean`,
    `text`: its text before and after; `passed`: whether some text passed the gate of closeness. Where none did, `text`
    is the clean one.
    """

    example: int
    kind: str
    field: str
    clean: str
    text: str
    passed: bool

    @property
    def changed(self) -> bool:
        """Whether it differs from the clean example."""
        return self.text != self.clean

    def among(self, examples: Examples) -> dict[str, Any]:
        """The perturbed example: all of the clean one, its label too, but for the text.

        Raises:
            DataError: the clean example is another one than the record was made from.
        """
        if not 0 <= self.example < len(examples) or examples[self.example].get(self.field) != self.clean:
            raise DataError(
                f"a perturbed text ({self.kind}) was made from another example {self.example} than these data have; "
                "train anew, or with the data that the run was begun with"
            )
        return {**examples[self.example], self.field: self.text}

    def facts(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def field_of(example: Example, fields: Sequence[str], place: int) -> str:
    """The field that is perturbed: of several the longest text (our choice; the release has one).

    Raises:
        DataError: it is not text.
    """
    found = max(fields, key=lambda name: len(str(example.get(name, ""))))
    if not isinstance(example.get(found), str):
        raise DataError(f"example {place}: a perturbation needs text in {found!r}, got {example.get(found)!r}")
    return found
