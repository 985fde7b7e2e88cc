"""Talking with a run while it happens: a listener is told, a stop is asked for.

Knows no tensors and no training loop; importing it loads neither torch nor transformers.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any

from promptuary.errors import Interrupted

if TYPE_CHECKING:
    from promptuary.training import Training

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What asks for a stop: Ctrl-C, a scheduler, a terminal that was closed."""


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
    """A request to stop, by signal or by call; the second signal ends the program at once.

    `signal` is the one that asked, if any. `polled` says that somebody calls `check` from time to time: until then
    (data and model are loading, nothing is written yet) a signal raises KeyboardInterrupt on the spot.
    """

    def __init__(self, *, hard: bool = False) -> None:
        """No request yet.

        Args:
            hard: the second signal ends the process, also in the middle of a long computation; without it the handlers
                from before get it, as suits a program around this library.
        """
        self.signal: int | None = None
        self.hard, self.polled = hard, False
        self._listens = False

    def request(self, number: int = signal.SIGINT) -> None:
        """Ask for a stop."""
        self.signal = number

    def check(self) -> None:
        """Raise `Interrupted` if a stop was asked for."""
        if self.signal is not None:
            raise Interrupted("stopped", self.signal)

    def loaded(self) -> None:
        """From here on somebody polls. A signal that a library underneath swallowed while loading counts now."""
        if self.signal is not None:
            raise KeyboardInterrupt
        self.polled = True

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals as requests (main thread only). What is ignored, as SIGHUP is under nohup, stays ignored."""
        if self._listens or threading.current_thread() is not threading.main_thread():
            yield
            return
        known = {number: signal.getsignal(number) for number in SIGNALS}
        # None is a handler that was not installed from Python and could not be put back
        before = {number: handler for number, handler in known.items() if handler not in (signal.SIG_IGN, None)}

        def request(number: int, frame: FrameType | None) -> None:
            self.signal = number
            for each, handler in before.items():
                signal.signal(each, signal.SIG_DFL if self.hard else handler)
            if not self.polled:
                raise KeyboardInterrupt

        for number in before:
            signal.signal(number, request)
        self._listens = True
        try:
            with _watching(frozenset(before)) if self.hard else contextlib.nullcontext():
                yield
        finally:
            self._listens = False
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _watching(numbers: frozenset[int]) -> Iterator[None]:
    """End the process at the second of these signals, even if both come during one long call into compiled code.

    Python runs its handlers between two of its own instructions only. The number of a signal is written to the wake-up
    descriptor at once, and a thread can read it while torch computes.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)

    def watch() -> None:
        seen = 0
        while content := os.read(read, 16):
            for number in content:
                seen += number in numbers
                if seen == 2:
                    os._exit(128 + number)

    thread = threading.Thread(target=watch, daemon=True, name="promptuary-stop")
    thread.start()
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(write)
        thread.join()
        os.close(read)
