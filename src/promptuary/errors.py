"""The errors a user can meet, each one line that says what was expected, what came, and what fixes it.

Knows nothing about where they are raised; `exit_code` is the only thing the command line reads.
"""

from __future__ import annotations

import importlib
from types import ModuleType


class PromptuaryError(Exception):
    """Base of every error that the user can mend. The command line prints it as one line and exits with `exit_code`."""

    exit_code = 2


class ConfigError(PromptuaryError):
    """A run file, an override or an argument is wrong."""


class DataError(PromptuaryError):
    """A data file, a row or a label is wrong."""


class SiteError(PromptuaryError):
    """A method asks for a place that this backbone does not have, or a backbone lacks what the task needs."""


class FingerprintError(PromptuaryError):
    """A prompt is loaded onto another base model, or onto another tokenizer, than the one it was trained on."""


class FileFormatError(PromptuaryError):
    """A saved folder is missing, incomplete, damaged or of an unknown version."""


class NotFoldable(PromptuaryError):
    """A method's result cannot be written in the static form that was asked for; the message gives the reason."""


class MissingExtra(PromptuaryError):
    """An optional package is not installed; the message is the line that installs it."""


class TrainingDiverged(PromptuaryError):
    """The loss stayed non-finite after several roll-backs; the last good state is on disk."""

    exit_code = 1


class Interrupted(PromptuaryError):
    """The user stopped the run; its state was saved first."""

    exit_code = 130


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional package.

    Args:
        module: name to import.
        extra: the extra of this project that installs it.

    Raises:
        MissingExtra: with the line that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtra(
            f"{module} is not installed; run: pip install -c constraints.txt 'promptuary[{extra}]'"
        ) from None
