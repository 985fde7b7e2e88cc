"""The contract table: every property on every method on every family, or on its families in turn.

Knows no method by name: the registry says which there are. PROMPTUARY_CONTRACT=whole runs every cell; without it each
method meets each property and each of its families, each property each family, and it takes a third of the time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from promptuary import registry
from promptuary.testing import PROPERTIES, case_of, check_property, tiny
from promptuary.testing.facts import check_facts, families_of

CARDS = Path(__file__).parent.parent.parent / "docs" / "methods"
# the family has no say in what a card's run file trains; test_cards.py trains it on the family that it names
ONCE = "the_run_file_of_the_card_trains"
WHOLE = os.environ.get("PROMPTUARY_CONTRACT") == "whole"


def cells() -> Iterator[tuple[str, str, str]]:
    """Method, family and property."""
    for row, method in enumerate(registry.names("methods")):
        families = families_of(found := registry.load("methods", method))
        for column, name in enumerate(PROPERTIES):
            fitting = [family for family in families if PROPERTIES[name].applies(found, family, card=True)]
            if name == ONCE:
                fitting = families[:1]
            elif not WHOLE and len(fitting) > 1:
                fitting = [fitting[(row + column) % len(fitting)]]
            yield from ((method, family, name) for family in fitting)


CELLS = list(cells())


@pytest.mark.parametrize("method", registry.names("methods"))
def test_its_facts_are_what_the_suite_asks_of_an_outside_method(method: str) -> None:
    check_facts(registry.load("methods", method))


@pytest.mark.parametrize(("method", "family", "property_name"), CELLS, ids=lambda value: value)
def test_contract(method: str, family: str, property_name: str, tmp_path: Path) -> None:
    case = case_of(registry.load("methods", method), family, tmp_path, card=CARDS / f"{method}.md")
    check_property(case, property_name)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(
    "property_name",
    [
        "folded_equals_live",
        "padding_on_either_side_changes_nothing",
        "rows_with_different_prompts_equal_separate_runs",
        "detaching_restores_the_base",
    ],
)
def test_a_prompt_that_depends_on_the_text_keeps_the_contract(family: str, property_name: str, tmp_path: Path) -> None:
    method = registry.load("methods", "ept")
    settings = {**method.tiny, "gate_input": "text"}
    check_property(case_of(method, family, tmp_path, settings), property_name)
