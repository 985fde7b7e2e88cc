"""The contract table: every property on every method on every text family.

Knows no method by name: the registry says which there are.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from promptuary import registry
from promptuary.testing import PROPERTIES, case_of, tiny

CELLS = list(itertools.product(registry.names("methods"), tiny.FAMILIES, PROPERTIES))


@pytest.mark.parametrize(("method", "family", "property_name"), CELLS, ids=lambda value: value)
def test_contract(method: str, family: str, property_name: str, tmp_path: Path) -> None:
    PROPERTIES[property_name](case_of(registry.load("methods", method), family, tmp_path))
