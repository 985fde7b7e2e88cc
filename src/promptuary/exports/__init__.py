"""Prompts in other tools' formats: one file per tool, each with `write` (and `read` where the tool's files come back).

Knows no method by name; a prompt that a format cannot carry is refused with a typed error.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promptuary.errors import ConfigError
from promptuary.registry import suggest

if TYPE_CHECKING:
    from promptuary.tuned import Tuned


def names() -> list[str]:
    """Every format, sorted: the files of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Any:
    """The module of a format; its `write(tuned, folder)` writes a folder as a whole.

    A format whose requests can be written beforehand takes them as `examples`.

    Raises:
        ConfigError: no such format.
    """
    if name not in names():
        raise ConfigError(f'no such format: "{name}"{suggest(name, names())} (known: {", ".join(names())})')
    return importlib.import_module(f"{__name__}.{name}")


def check(name: str, folder: Path, *, examples: bool, overwrite: bool) -> None:
    """Refuse what could not be written, before a model is loaded.

    Raises:
        ConfigError: no such format, it takes no examples, or the folder is not empty.
    """
    target = load(name)
    if examples and "examples" not in inspect.signature(target.write).parameters:
        raise ConfigError(f"the format {name} takes no texts; leave them out")
    if folder.is_file():
        raise ConfigError(f"{folder} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ConfigError(f"{folder} is not empty; choose another folder, or overwrite it (--overwrite)")


def write(
    name: str,
    tuned: Tuned,
    folder: str | Path,
    examples: Sequence[str | Mapping[str, Any]] = (),
    *,
    overwrite: bool = False,
) -> Path:
    """Write a prompt in another tool's format; a reader finds the old folder or the new one, never a half.

    Args:
        name: of the format.
        tuned: with a method.
        folder: new or empty, or an older export that is to be overwritten.
        examples: requests to be written too, where the format has them.
        overwrite: replace an older export.

    Raises:
        ConfigError: no such format, or the folder holds files that the export would not write again.
        NotFoldable: the format cannot carry this prompt; the message says why.
    """
    folder = Path(folder)
    check(name, folder, examples=bool(examples), overwrite=overwrite)
    target = load(name)
    more = {"examples": examples} if examples else {}
    staging = folder.with_name(f".tmp-{name}-{folder.name}-{os.getpid()}")
    old = folder.with_name(f".old-{name}-{folder.name}-{os.getpid()}")
    try:
        target.write(tuned, staging, **more)
        if folder.is_dir():
            foreign = sorted({path.name for path in folder.iterdir()} - {path.name for path in staging.iterdir()})
            if foreign:
                raise ConfigError(f'{folder} also holds "{foreign[0]}", which would be lost; choose another folder')
            folder.rename(old)
        staging.rename(folder)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}") from None
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return folder
