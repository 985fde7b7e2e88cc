"""A look inside prompts: static ones by their rows, those that depend on the text by what their method tells.

Knows no real model: tiny ones.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from promptuary import look, registry
from promptuary.errors import NotFoldable
from promptuary.testing import case_of
from promptuary.testing.facts import families_of
from promptuary.tuned import Tuned


def tuned(name: str, folder: Path) -> Tuned:
    method = registry.load("methods", name)
    family = "masked" if "masked" in families_of(method) else families_of(method)[0]
    return case_of(method, family, folder).tuned()


@pytest.mark.parametrize("name", registry.names("methods"))
def test_every_method_can_be_looked_into(name: str, tmp_path: Path) -> None:
    whole = tuned(name, tmp_path)
    assert whole.method is not None
    found = json.loads(json.dumps(look.describe(whole, 2), allow_nan=False))
    assert found["method"] == name
    assert found["depends_on_input"] == whole.method.depends
    assert set(found["insight"]) == set(whole.method.insight())
    if whole.method.depends:
        assert found["rows"] == []


@pytest.mark.parametrize("name", ["smop", "attempt"])
def test_a_picture_of_one_that_depends_on_the_text_shows_its_insights(name: str, tmp_path: Path) -> None:
    assert look.picture(tuned(name, tmp_path), tmp_path / "p.svg").stat().st_size > 1000


def test_the_bare_model_has_nothing_to_look_at(tmp_path: Path) -> None:
    whole = tuned("prompt_tuning", tmp_path)
    with pytest.raises(NotFoldable, match="frozen model alone"):
        look.describe(Tuned(whole.backbone, whole.task, None, max_length=40))
