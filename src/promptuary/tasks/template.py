"""Templates: text with `{field}` places, one of which may be an image, filled from an example into pieces.

Knows no tokenizer: what a mask or a separator is, a backbone decides.

Places: `{name}` a field of the example; `{mask}` where the answer goes; `{sep}` the model's separator;
`{prompt}` or `{prompt_NAME}` where rows of a prompt go when a method asks for named slots.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

from promptuary.data.check import as_text
from promptuary.data.images import Picture, picture_of
from promptuary.errors import ConfigError, DataError
from promptuary.registry import suggest
from promptuary.types import ANSWER, Piece


class Template:
    """A parsed template."""

    def __init__(self, text: str, image: str | None = None) -> None:
        """Parse.

        Args:
            text: as in the settings.
            image: the field that holds an image.

        Raises:
            ConfigError: unbalanced braces, an empty or a numbered place, two masks, or no place, or several, for the
                image.
        """
        self.text, self.image = text, image
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ConfigError(f"task.template {shown(text)}: {error}; write {{{{ for a literal brace") from None
        if any(spec or conversion for _, _, spec, conversion in parts):
            raise ConfigError(f"task.template {shown(text)}: a place is a name alone and takes no ! or :")
        self.parts: list[tuple[str, str | None]] = [(fixed, name) for fixed, name, _, _ in parts]
        names = [name for _, name in self.parts if name is not None]
        if any(not name.isidentifier() for name in names):
            raise ConfigError(f"task.template {shown(text)}: every place needs a name, such as {{text}}")
        if names.count(ANSWER) > 1:
            raise ConfigError(f"task.template {shown(text)} has more than one {{mask}}")
        self.slots = [name for name in names if is_slot(name)]
        self.fields = [name for name in names if not is_slot(name)]
        if image is not None and self.fields.count(image) != 1:
            raise ConfigError(f"task.template {shown(text)} should show the image once: put {{{image[:80]}}} into it")

    @property
    def asks_at_end(self) -> bool:
        """Whether nothing stands behind the answer."""
        return ANSWER not in self.slots or (self.parts[-1][1] == ANSWER)

    @property
    def glue(self) -> str:
        """What joins text and answer: a line break, a space, or (as written) nothing but a space is assumed."""
        before = "".join(fixed for fixed, name in self.parts if name == ANSWER)
        if ANSWER not in self.slots:
            before = self.parts[-1][0] if self.parts and self.parts[-1][1] is None else ""
        return before[len(before.rstrip()) :].replace(" ", "") or " "

    def fill(self, example: Mapping[str, Any], more: Mapping[str, str] | None = None) -> list[Piece]:
        """The pieces of one example.

        Args:
            example: field -> value.
            more: fields that are not data, such as the choice that is being scored.

        Raises:
            DataError: the example has no such field, or what it holds is no text, or no image that can be read.
        """
        pieces = []
        for fixed, name in self.parts:
            if fixed:
                pieces.append(Piece("fixed", fixed))
            if name is None:
                continue
            if is_slot(name):
                pieces.append(Piece("slot", name))
                continue
            source = more if more is not None and name in more else example
            if name not in source:
                there = [str(field) for field in example]
                raise DataError(
                    f'task.template uses "{{{name}}}" but the data has no field "{name}"{suggest(name, there)} '
                    f"(fields: {', '.join(there)}; data.rename can rename them)"
                )
            if name == self.image:
                pieces.append(Piece("image", checked(source[name], name)))
                continue
            pieces.append(Piece("field", as_text(source[name], name)))
        return pieces


def checked(value: Any, name: str) -> Picture:
    """The image in a field, looked at as a whole.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    picture = picture_of(value, name)
    picture.digest  # noqa: B018 (asking is what checks)
    return picture


def shown(text: str) -> str:
    """A template in a message: quoted, and no longer than a line or two."""
    return repr(text if len(text) <= 200 else f"{text[:200]}...")


def is_slot(name: str) -> bool:
    """Whether a place takes no field."""
    return name in (ANSWER, "sep") or name == "prompt" or name.startswith("prompt_")


def default_template(fields: Sequence[str]) -> str:
    """The fields in their order, with separators between them."""
    return "{sep}".join(f"{{{name}}}" for name in fields)
