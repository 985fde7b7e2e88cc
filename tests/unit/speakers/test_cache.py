from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from promptuary.errors import StorageError
from promptuary.speakers.cache import Cache, Reply, question_key


def kept(path: Path) -> Cache:
    cache = Cache(path)
    cache.keep("question", {0: Reply("one", "length", (("o", -0.5),)), 1: Reply("")})
    return cache


def test_what_is_kept_comes_back_also_from_the_file(tmp_path: Path) -> None:
    cache = kept(tmp_path / "deep" / "answers.sqlite")
    cache.close()
    for again in (cache, Cache(cache.path)):
        assert again.get("question", 0) == Reply("one", "length", (("o", -0.5),))
        assert again.get("question", 1) == Reply("")
        assert again.get("question", 2) is None
        assert again.get("other", 0) is None
        again.close()


def test_what_was_kept_first_stands(tmp_path: Path) -> None:
    cache = kept(tmp_path / "answers.sqlite")
    assert cache.keep("question", {0: Reply("other"), 5: Reply("new")})[0].text == "one"
    assert len(cache) == 3
    cache.close()


@pytest.mark.parametrize("where", ["all", "head", "middle", "rows"])
def test_a_damaged_file_is_moved_aside_in_one_line(tmp_path: Path, where: str) -> None:
    path = tmp_path / "answers.sqlite"
    cache = kept(path)
    cache.keep("long", {number: Reply("x" * 100) for number in range(300)})
    cache.close()
    if where == "rows":
        with sqlite3.connect(path) as link:
            link.execute("UPDATE answers SET tops = 'no list'")
        link.close()
    else:
        content = bytearray(path.read_bytes())
        span = {"all": (0, len(content)), "head": (0, 40), "middle": (4096, 20000)}[where]
        content[slice(*span)] = os.urandom(span[1] - span[0])
        path.write_bytes(content)
    damaged = Cache(path) if where == "rows" else None
    with pytest.warns(
        UserWarning, match="is damaged; it is now answers.sqlite.damaged-1, and a new one begins"
    ) as all_:
        found = (damaged or Cache(path)).get("question", 0)
    assert found is None
    assert len(all_) == 1
    assert (tmp_path / "answers.sqlite.damaged-1").exists()
    fresh = kept(path)
    assert fresh.get("question", 0) is not None
    fresh.close()
    if damaged is not None:
        damaged.close()


def test_a_torn_file_does_not_end_a_run(tmp_path: Path) -> None:
    cache = kept(tmp_path / "answers.sqlite")
    cache.close()
    content = cache.path.read_bytes()
    cache.path.write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match="is damaged"):
        assert cache.get("question", 0) is None
    cache.close()


def test_another_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "accounts.db"
    with sqlite3.connect(path) as link:
        link.execute("CREATE TABLE accounts (name TEXT)")
    link.close()
    before = path.read_bytes()
    with pytest.raises(StorageError, match="is a database of something else; name another file"):
        Cache(path)
    assert path.read_bytes() == before


def test_a_place_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot be made"):
        Cache(tmp_path / "file" / "answers.sqlite")
    with pytest.raises(StorageError, match="cannot be used"):
        Cache(tmp_path)


WRITER = """
import sys
from pathlib import Path
from promptuary.speakers.cache import Cache, Reply
cache = Cache(Path(sys.argv[1]))
for number in range(60):
    said = cache.keep(f"question {number}", {0: Reply(sys.argv[2])})[0].text
    print(said)
cache.close()
"""


def test_processes_share_a_file_and_agree(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    started = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), name], stdout=subprocess.PIPE, text=True)
        for name in ("a", "b")
    ]
    said = [one.communicate(timeout=120)[0].split() for one in started]
    assert [one.returncode for one in started] == [0, 0]
    assert said[0] == said[1]
    cache = Cache(path)
    assert len(cache) == 60
    assert [reply.text for n in range(60) if (reply := cache.get(f"question {n}", 0))] == said[0]
    cache.close()


def test_keys_do_not_depend_on_the_order_of_their_parts() -> None:
    assert question_key(a=1, b="ü") == question_key(b="ü", a=1) != question_key(a=1, b="u")
