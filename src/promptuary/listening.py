"""Talking with a run while it happens: a listener is told, a stop is asked for.

Knows no tensors and no training loop; importing it loads neither torch nor transformers.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any

from promptuary.errors import Interrupted

if TYPE_CHECKING:
    from promptuary.training import Training


class Listener:
    """Is told what happens; does nothing. The command line draws from it."""

    def begun(self, training: Training) -> None:
        """Before anything is written; `training.stop.request()` ends the run cleanly at its next step."""

    def planned(self, plan: Mapping[str, Any]) -> None:
        """Before the first step: what will be trained, where, and what it takes."""

    def stepped(self, row: Mapping[str, Any]) -> None:
        """After each step."""

    def validated(self, row: Mapping[str, Any]) -> None:
        """After each validation."""

    def noted(self, text: str) -> None:
        """Something a person should know."""


class Stop:
    """A request to stop, by signal or by call; the second signal ends the program at once."""

    def __init__(self) -> None:
        """No request yet."""
        self.signal: int | None = None

    def request(self, number: int = signal.SIGINT) -> None:
        """Ask for a stop."""
        self.signal = number

    def check(self) -> None:
        """Raise `Interrupted` if a stop was asked for."""
        if self.signal is not None:
            raise Interrupted("stopped")

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM as requests (main thread only)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def request(number: int, frame: FrameType | None) -> None:
            self.signal = number
            for each, handler in before.items():
                signal.signal(each, handler)

        for number in before:
            signal.signal(number, request)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
