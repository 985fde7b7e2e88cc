"""Who has put what on a model: its `forward` and `generate` ask here, in every thread.

Knows nothing of what an attachment does with a call.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, runtime_checkable

from promptuary.backbones import processors
from promptuary.backbones.inject import Wiring
from promptuary.errors import SiteError

_LOCK = threading.RLock()


@runtime_checkable
class Attachment(Protocol):
    """Takes the calls of a model instead of it; `run` and `write` are the model's own."""

    wiring: Wiring

    def forward(self, run: Callable[..., Any], given: dict[str, Any]) -> Any:
        """A forward pass with these arguments by name."""

    def generate(self, write: Callable[..., Any], given: dict[str, Any]) -> Any:
        """A call of `generate` with these arguments by name."""


_MINE: ContextVar[dict[int, Attachment]] = ContextVar("promptuary_attached", default={})  # noqa: B039 (never mutated)


def hold(model: Any, pad: int, *, words: bool = True) -> Wiring:
    """The wiring of a model, made if it is the first use; `let_go` counts back. `words`: see `Wiring`."""
    with _LOCK:
        wiring = Wiring.on(model)
        if wiring is None:
            wiring = Wiring(model, words=words)
            wiring.shadow(model, "forward", functools.partial(_dispatch, wiring, "forward"))
            if model.can_generate():
                wiring.shadow(model, "generate", functools.partial(_dispatch, wiring, "generate"))
                processors.install(wiring, pad)
        wiring.held += 1
        return wiring


def let_go(wiring: Wiring) -> None:
    """Give the model back as it came once nobody holds it."""
    with _LOCK:
        wiring.held -= 1
        if wiring.held == 0:
            wiring.remove()


def _dispatch(wiring: Wiring, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(run)

    @functools.wraps(run)
    def shadow(*args: Any, **kwargs: Any) -> Any:
        attachment = None if wiring.now is not None else current(wiring)
        if attachment is None:
            return run(*args, **kwargs)
        named = dict(zip(signature.parameters, args, strict=False))
        return getattr(attachment, name)(run, {**named, **kwargs})

    return shadow


def current(wiring: Wiring) -> Attachment | None:
    """What is attached in this thread; else the only one that is attached in any (a streaming thread is not its own).

    Raises:
        SiteError: several threads have attached prompts and this one has none.
    """
    mine = _MINE.get().get(id(wiring))
    if mine is not None or not wiring.attached:
        return mine
    if len(wiring.attached) > 1:
        raise SiteError("several threads have prompts on this model and this thread has none: attach one here")
    return wiring.attached[0]


@contextmanager
def attached(attachment: Attachment) -> Iterator[None]:
    """Within the block the model runs with the attachment, in this thread first of all.

    Raises:
        SiteError: this thread has attached something to the model already.
    """
    wiring = attachment.wiring
    if id(wiring) in _MINE.get():
        raise SiteError("this model already carries a prompt; leave its block first, or attach several by name")
    token = _MINE.set({**_MINE.get(), id(wiring): attachment})
    with _LOCK:
        wiring.attached.append(attachment)
    try:
        yield
    finally:
        with _LOCK:
            wiring.attached.remove(attachment)
        _MINE.reset(token)
