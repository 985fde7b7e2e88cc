"""Taking a piece of work so that no other process does it too, for as long as this one lives.

Knows no run. The lock belongs to the open file, so the system gives it back when a process dies, however it dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

from promptuary.errors import StorageError


@contextlib.contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Hold a lock until the end of the block.

    Args:
        path: its file, which says who holds it; it stays there, empty.

    Yields:
        Whether it was free.

    Raises:
        StorageError: it cannot be written, or the file system has no locks.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}") from error
    mine = False
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = True
        except BlockingIOError:
            pass
        except OSError as error:
            raise StorageError(
                f"{path.parent} is on a file system without locks ({error.strerror}); give --out on another one"
            ) from error
        if mine:
            with contextlib.suppress(OSError):  # a full disk: what is written next says so
                os.ftruncate(handle, 0)
                text = f"process {os.getpid()} on {platform.node()} since {time.strftime('%F %T')}\n"
                os.pwrite(handle, text.encode(), 0)
        yield mine
    finally:
        if mine:
            with contextlib.suppress(OSError):
                os.ftruncate(handle, 0)
        os.close(handle)
