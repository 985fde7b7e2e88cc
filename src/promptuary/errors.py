"""The errors a user can meet, each one line that says what was expected, what came, and what fixes it.

Knows nothing about where they are raised; `exit_code` is the only thing the command line reads.
"""

from __future__ import annotations

import importlib
import signal
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


class HubError(PromptuaryError):
    """The hub cannot be reached, refuses, or does not hold what was asked for."""


class SpeakerError(PromptuaryError):
    """A model that is talked to cannot be reached, refuses, or keeps giving answers that are none."""


class BudgetExceeded(SpeakerError):
    """The next call to a model would exceed what is allowed in calls, tokens or money; nothing was asked."""


class StorageError(PromptuaryError):
    """Something cannot be written: the disk is full or read-only, or permission is missing. What was there stays."""


class NotFoldable(PromptuaryError):
    """A method's result cannot be written in the static form that was asked for; the message gives the reason."""


class MissingExtra(PromptuaryError):
    """An optional package is not installed; the message is the line that installs it."""


class TrainingDiverged(PromptuaryError):
    """Steps were not finite until the end, or after several roll-backs; the last good state is on disk."""

    exit_code = 1


class OutOfMemory(PromptuaryError):
    """Not even a single example fits into memory; the message says what to lower."""

    exit_code = 1


class Interrupted(PromptuaryError):
    """A run was stopped; the message says what is saved. The exit code tells by which signal, as a shell does."""

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        """Say why.

        Args:
            message: what is saved and how to go on.
            number: the signal that asked for the stop: 130 is SIGINT's exit code, 143 SIGTERM's, 129 SIGHUP's.
        """
        super().__init__(message)
        self.exit_code = 128 + number


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
