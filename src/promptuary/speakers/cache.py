"""Answers on disk: what was asked once is not paid again, in this run, a resumed one, or another process.

Knows no endpoint and no budget; keys are hashes, so no question stands in the file, and no key ever comes here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from promptuary.errors import StorageError

_MADE = 0x50724373
"""Marks a file of sqlite as one of ours."""

_TABLE = """CREATE TABLE IF NOT EXISTS answers (
  question TEXT NOT NULL, slot INTEGER NOT NULL, text TEXT NOT NULL, ends TEXT NOT NULL, tops TEXT NOT NULL,
  PRIMARY KEY (question, slot)) WITHOUT ROWID"""

T = TypeVar("T")

Tops = tuple[tuple[str, float], ...]
"""The likeliest first tokens with their log-probabilities."""


@dataclass(frozen=True)
class Reply:
    """An answer as it came: its text, why it `ends` ("stop", "length", "refused", ...), the likeliest first tokens."""

    text: str
    ends: str = "stop"
    tops: Tops = ()


def question_key(**parts: Any) -> str:
    """A hash of everything that an answer depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


class _Damaged(Exception):
    """The file is no sane database."""


class Cache:
    """A file of answers, by question and number of the answer."""

    def __init__(self, path: Path) -> None:
        """Open or make the file; a damaged one is moved aside with a warning of one line.

        Raises:
            StorageError: it cannot be opened or made, or it is a database of something else.
        """
        self.path = path
        self._lock = threading.RLock()
        self._link: sqlite3.Connection | None = None
        self._safely(lambda link: None)

    def get(self, question: str, slot: int) -> Reply | None:
        """A kept answer."""

        def read(link: sqlite3.Connection) -> Reply | None:
            found = link.execute(
                "SELECT text, ends, tops FROM answers WHERE question = ? AND slot = ?", (question, slot)
            ).fetchone()
            return None if found is None else _reply(*found)

        return self._safely(read)

    def keep(self, question: str, replies: Mapping[int, Reply]) -> dict[int, Reply]:
        """Keep answers, all of them or none; what another process has kept meanwhile stands.

        Returns:
            What is kept now, by the same numbers.
        """

        def write(link: sqlite3.Connection) -> dict[int, Reply]:
            rows = [(question, slot, one.text, one.ends, json.dumps(one.tops)) for slot, one in replies.items()]
            with link:
                link.execute("BEGIN IMMEDIATE")
                link.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?)", rows)
            return {slot: self.get(question, slot) or one for slot, one in replies.items()}

        return self._safely(write)

    def __len__(self) -> int:
        return int(self._safely(lambda link: link.execute("SELECT count(*) FROM answers").fetchone()[0]))

    def close(self) -> None:
        """Let go of the file; it opens again when it is used."""
        with self._lock:
            if self._link is not None:
                self._link.close()
                self._link = None

    def _safely(self, use: Callable[[sqlite3.Connection], T]) -> T:
        """Do something with the open file; a damaged one is replaced once."""
        with self._lock:
            for attempt in range(3):
                try:
                    return use(self._opened())
                except (_Damaged, sqlite3.DatabaseError) as error:
                    self.close()
                    # a lock, a full disk or a missing permission is no damage
                    if isinstance(error, sqlite3.OperationalError) or attempt == 2:
                        raise StorageError(f"the cache {self.path} cannot be used: {error}") from None
                    # looked at once more: another process may have replaced it meanwhile
                    if attempt == 1:
                        self._put_aside()
            raise AssertionError("unreachable")

    def _opened(self) -> sqlite3.Connection:
        if self._link is not None:
            return self._link
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"the cache {self.path} cannot be made: {error.strerror}") from None
        # autocommit: transactions are begun by hand; other processes are waited for
        link = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
        try:
            mark, tables = (
                link.execute("PRAGMA application_id").fetchone()[0],
                {name for (name,) in link.execute("SELECT name FROM sqlite_master WHERE type = 'table'")},
            )
            if mark != _MADE and tables:
                raise StorageError(f"{self.path} is a database of something else; name another file for the cache")
            if link.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
                raise _Damaged("damaged")
            if mark != _MADE or "answers" not in tables:
                link.execute("BEGIN IMMEDIATE")
                link.execute(_TABLE)
                link.execute(f"PRAGMA application_id = {_MADE}")
                link.execute("COMMIT")
        except BaseException:
            link.close()
            raise
        self._link = link
        return link

    def _put_aside(self) -> None:
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.damaged-{number}")).exists():
            number += 1
        try:
            self.path.rename(aside)
            for ending in ("-journal", "-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    self.path.with_name(self.path.name + ending).unlink()
        except OSError as error:
            raise StorageError(f"the cache {self.path} is damaged and cannot be moved: {error.strerror}") from None
        warnings.warn(f"the cache {self.path} is damaged; it is now {aside.name}, and a new one begins", stacklevel=4)


def _reply(text: Any, ends: Any, tops: Any) -> Reply:
    try:
        found = tuple((str(token), float(value)) for token, value in json.loads(tops))
    except (ValueError, TypeError):
        raise _Damaged("damaged") from None
    if not isinstance(text, str) or not isinstance(ends, str):
        raise _Damaged("damaged")
    return Reply(text, ends, found)
