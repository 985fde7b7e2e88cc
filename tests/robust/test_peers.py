"""Everyday situations of benchmarks/, each by name: ours is what the bare model gives by hand.

Knows nothing of what another library gives: that stands in the committed rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import correctness
from libraries import LIBRARIES, Host, Ours
from measure import LOGITS, LOSS, TOKENS, Situation
from situations import SITUATIONS

# models are copied, trained and saved by transformers here, which warns of many things
pytestmark = pytest.mark.filterwarnings("ignore")


def cases(situations: list[Situation]) -> Any:
    """Each situation on each of its models."""
    several = [(one, kind) for one in situations for kind in one.kinds]
    names = [f"{one.group}: {one.name}, {kind}" for one, kind in several]
    return pytest.mark.parametrize(("situation", "kind"), several, ids=names)


@cases(SITUATIONS)
def test_ours_is_right(situation: Situation, kind: str) -> None:
    assert situation.measure(LIBRARIES["promptuary"], kind) <= situation.limit


class OtherPrompt(Ours):
    """A library that runs, but with other vectors than it was given."""

    @contextmanager
    def on(self, base: Any, prompt: torch.Tensor, *others: torch.Tensor, train: bool = False) -> Iterator[Host]:
        with super().on(base, -prompt, *(-other for other in others), train=train) as host:
            yield host


COMPARED = [one for one in SITUATIONS if one.unit in (LOGITS, LOSS, TOKENS) and one.name != "prompt switched off"]


@cases([one for one in COMPARED if one.group in ("forward", "generate") and "threads" not in one.name])
def test_another_prompt_is_found_wrong(situation: Situation, kind: str) -> None:
    assert situation.measure(OtherPrompt(), kind) > situation.limit


def test_the_rows_cover_every_situation_in_both_libraries_and_ours_is_right() -> None:
    rows = correctness.read()
    found = [(row["situation"], row["group"], row["model"], row["library"], row["unit"]) for row in rows]
    assert found == [
        (one.name, one.group, kind, library, one.unit)
        for one in SITUATIONS
        for kind in one.kinds
        for library in LIBRARIES
    ]
    assert [row for row in rows if row["library"] == "promptuary" and row["outcome"] != "right"] == []
    for row in rows:
        assert (row["message"] is not None) == (row["outcome"] == "error")
        if row["outcome"] == "right":
            assert row["number"] <= row["limit"]


def test_the_page_is_made_from_the_rows() -> None:
    assert correctness.PAGE.read_text(encoding="utf-8") == correctness.page(correctness.read())
