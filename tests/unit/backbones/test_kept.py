"""The store of keys and values: its bound, its order, its owners.

Knows no model.
"""

from __future__ import annotations

import gc
import random
import threading

import torch

from promptuary.backbones.kept import Kept, Row
from promptuary.types import Prompt

SIZE = 2 * 2 * 3 * 4 * 4
"""Bytes of `row`."""


def row(value: float = 0.0) -> Row:
    """Two layers' worth would do as well: one layer, 2 heads, 3 positions of width 4, float32."""
    return [(torch.full((2, 3, 4), value), torch.full((2, 3, 4), value))]


def test_keeps_what_was_used_last_within_its_bound() -> None:
    kept = Kept(3 * SIZE)
    for name in "abc":
        kept.put(name, row())
    assert kept.get("a") is not None
    kept.put("d", row())
    assert [name for name in "abcd" if kept.get(name) is not None] == ["a", "c", "d"]
    assert kept.size == 3 * SIZE
    assert (kept.hits, kept.misses) == (4, 1)


def test_what_is_larger_than_the_store_is_not_kept_and_pushes_nothing_out() -> None:
    kept = Kept(2 * SIZE)
    kept.put("a", row())
    kept.put("big", [*row(), *row(), *row()])
    assert kept.get("a") is not None
    assert kept.get("big") is None
    kept.put("a", row(1.0))
    assert kept.size == SIZE


def test_texts_do_not_push_prompts_out() -> None:
    kept = Kept(2 * SIZE)
    kept.put("prompt", row())
    for text in range(5):
        kept.put(text, row(), push=False)
    assert kept.get("prompt") is not None
    assert [text for text in range(5) if kept.get(text) is not None] == [0]


def test_an_entry_lives_no_longer_than_its_owner() -> None:
    kept = Kept(4 * SIZE)
    first, second = Prompt(torch.zeros(1, 1, 2)), Prompt(torch.zeros(1, 1, 2))
    kept.put("key", row(), first)
    assert kept.get("key", first) is not None
    assert kept.get("key", second) is None
    kept.put("key", row(2.0), second)
    del first
    gc.collect()
    found = kept.get("key", second)
    assert found is not None, "the end of an earlier owner must not take away what another one has under the same key"
    assert float(found[0][0].sum()) == 48
    del second
    gc.collect()
    assert len(kept) == 0
    assert kept.size == 0


def test_threads_do_not_lose_count() -> None:
    kept = Kept(5 * SIZE)

    def work(seed: int) -> None:
        chosen = random.Random(seed)
        for _ in range(500):
            name = chosen.randrange(12)
            found = kept.get(name)
            assert found is None or float(found[0][0][0, 0, 0]) == name
            kept.put(name, row(float(name)))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kept.size == len(kept) * SIZE <= 5 * SIZE
    assert kept.hits + kept.misses == 2000
