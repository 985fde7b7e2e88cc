"""What is compared when something saved is loaded, whatever it is: its settings, and its tensors with those expected.

Knows no format, method or baseline.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from promptuary.errors import ConfigError, FileFormatError
from promptuary.settings import Settings


def same_sizes(path: Path, whose: str, asked: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> None:
    """Refuse a file whose tensors are not those that its owner has.

    Raises:
        FileFormatError: names the first one that differs.
    """
    expected = {name: (tuple(value.shape), value.dtype) for name, value in asked.items()}
    found = {name: (tuple(value.shape), value.dtype) for name, value in held.items()}
    if expected != found:
        name = min(name for name in {*expected, *found} if expected.get(name) != found.get(name))
        raise FileFormatError(
            f"{path}: tensor {name[:80]!r} is {_kind(found.get(name))}, but {whose} needs {_kind(expected.get(name))}"
        )


def settings_of(path: Path, kind: type[Settings], values: Mapping[str, Any], where: str) -> Any:
    """Settings from a file of facts; what is wrong with them is wrong with the file.

    Raises:
        FileFormatError: with what is wrong.
    """
    try:
        return kind.read(values, where=where)
    except ConfigError as error:
        reason = " ".join(str(error).split())
        reason = reason if len(reason) <= 300 else f"{reason[:300]}..."
        raise FileFormatError(f"{path}: {reason}; was it saved by a newer promptuary?") from None


def _kind(found: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "missing" if found is None else f"{found[1]} of shape {found[0]}"
