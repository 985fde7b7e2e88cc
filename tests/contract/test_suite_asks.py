"""What the suite asks of a method besides behaviour: its card, its facts, its page; and what it may be asked itself.

Knows no method of the library; the methods here are outside ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from outside import BUILDS, CACHED, COUNT, PADDING, STATES, TRAINS, Sound, changed
from promptuary.errors import ConfigError
from promptuary.methods.base import Method
from promptuary.testing import PROPERTIES, ContractFailure, check_method

ROOT = Path(__file__).parent.parent.parent

# ---- the card -------------------------------------------------------------------------------------------------------

USE = "## Use\n\npromptuary train runs/carded.yaml --set seed=1\n"
RUN = """
task: {name: classify, template: "{text}"}
data: {source: a/data/set/that/is/not/here}
backbone: {model: some/model}
method: {name: outside_carded, init: random}
train: {epochs: 7, optimizer: adafactor}
"""


def carded(folder: Path, text: str, run: str = RUN) -> Path:
    """A card beside the run file that it may name."""
    for name, content in (("runs/carded.yaml", run), ("cards/carded.md", text)):
        (folder / name).parent.mkdir()
        (folder / name).write_text(content, encoding="utf-8")
    return folder / "cards" / "carded.md"


def test_a_card_and_its_run_file_are_checked_without_its_data_and_model(tmp_path: Path) -> None:
    method, card = changed("outside_carded"), carded(tmp_path, USE)
    check_method(method, families=["encoder"], properties=[STATES, TRAINS], card=card)


@pytest.mark.parametrize(
    ("text", "run", "reason"),
    [
        ("## Use\n", RUN, 'carded.md has no line "promptuary train FILE.yaml"'),
        ("promptuary train runs/other.yaml\n", RUN, "runs/other.yaml, which is not beside it"),
        (USE, RUN.replace("init:", "start:"), "unknown field method.start"),
        (USE, RUN.replace("outside_carded", "prompt_tuning"), "carded.yaml trains prompt_tuning, not outside_carded"),
    ],
)
def test_a_run_file_that_does_not_hold_is_told(text: str, run: str, reason: str, tmp_path: Path) -> None:
    method, card = changed("outside_carded"), carded(tmp_path, text, run)
    with pytest.raises(ContractFailure, match=re.escape(reason)):
        check_method(method, families=["encoder"], properties=[TRAINS], card=card)


def test_a_card_that_is_not_there_is_told() -> None:
    with pytest.raises(ContractFailure, match=r"there is no card nowhere\.md") as caught:
        check_method(changed("outside_carded"), families=["encoder"], properties=[STATES, TRAINS], card="nowhere.md")
    assert len(caught.value.failures) == 2


WHY = "the rows hang on the width of the batch"
DECLARED = {PADDING: WHY}


@pytest.mark.parametrize(
    ("declared", "section", "reason"),
    [
        (DECLARED, f"## Exceptions\n\n- `{PADDING}`: the rows hang on\n  the width of the batch\n\n## Cite\n", None),
        ({}, "", None),
        (DECLARED, "", f'the card lacks the line "- `{PADDING}`: {WHY}"'),
        (DECLARED, f"## Else\n- `{PADDING}`: {WHY}\n", "the card lacks the line"),
        (DECLARED, f"## Exceptions\n- `{PADDING}`: because\n", f'the card says "because", not "{WHY}"'),
        ({}, f"## Exceptions\n- `{PADDING}`: {WHY}\n", f'the card states an exception to "{PADDING}", the class'),
    ],
)
def test_card_and_class_agree_about_exceptions(
    declared: Mapping[str, str], section: str, reason: str | None, tmp_path: Path
) -> None:
    method, card = changed("outside_carded", exceptions=declared), carded(tmp_path, section + USE)
    if reason is None:
        check_method(method, families=["encoder"], properties=[STATES], card=card)
        return
    with pytest.raises(ContractFailure, match=re.escape(reason)):
        check_method(method, families=["encoder"], properties=[STATES], card=card)


# ---- what a class must say, and what check_method may be asked ------------------------------------------------------


class Nameless(Method):
    """A method without facts."""

    build = fill = prompt = Sound.build
    count = match_budget = classmethod(lambda cls, *_: 0)


class Unfinished(Method):
    """A method without code."""

    name = "outside_unfinished"


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (7, "check_method takes a subclass of Method, got 7"),
        (Method, "Method does not define build, count, fill, match_budget, prompt"),
        (Unfinished, "Unfinished does not define build, count, fill, match_budget, prompt"),
        (Nameless, 'Nameless does not state its fact `name`: what users type, such as "two_factor"'),
        (changed("outside_a", Config=dict), "OutsideA.Config must be its settings, a subclass of MethodConfig"),
        (changed("outside_b", Config=Sound.Config), "must have the default \"outside_b\", got 'outside_sound'"),
        (changed("outside_c", groups={"rows": "slow"}), 'names the group "slow", but Made has no slow_lr'),
        (changed("outside_d", groups={"other": "prompt"}), 'OutsideD.groups lacks the parameter "rows"'),
        (changed("outside_e", tiny={"lenght": 2}), "unknown field OutsideE.tiny.lenght"),
        (changed("outside_f", exceptions={"row_order": "no"}), 'did you mean "row_order_is_irrelevant"?'),
        (changed("outside_g", exceptions={PADDING: " "}), f'OutsideG.exceptions gives no reason for "{PADDING}"'),
        (changed("outside_h", exceptions={f"{CACHED} on masked": "no"}), f'for {CACHED} the family "masked", which'),
    ],
)
def test_a_class_that_lacks_a_fact_is_refused_in_one_line(method: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(reason)) as caught:
        check_method(method, families=["encoder"], properties=[BUILDS])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"properties": ["row_order"]}, 'did you mean "row_order_is_irrelevant"?'),
        ({"families": ["casual"]}, 'did you mean "causal"?'),
        ({"families": []}, "nothing to check"),
        ({"properties": [TRAINS]}, "properties of the card need card="),
        ({"properties": [CACHED], "families": ["masked"]}, "nothing to check"),
    ],
)
def test_a_request_that_checks_nothing_is_refused(asked: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(reason)):
        check_method(Sound, **asked)


def test_a_family_without_the_methods_sites_is_not_checked() -> None:
    deep = changed("outside_deep", sites=frozenset({"input", "layers"}))
    with pytest.raises(ConfigError, match="nothing to check"):
        check_method(deep)


def test_settings_replace_those_of_the_class() -> None:
    seen = []

    def build(self: Any) -> None:
        seen.append(self.config.init)
        Sound.build(self)

    method = changed("outside_set", build=build, tiny={"init": "text", "init_text": "good"})
    check_method(method, settings={"init": "random"}, families=["encoder"], properties=[COUNT])
    assert set(seen) == {"random"}


# ---- the page -------------------------------------------------------------------------------------------------------


def test_the_page_lists_every_property_with_its_summary() -> None:
    page = (ROOT / "docs" / "how-to" / "add-a-method.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \| (.+?) \|$", page, flags=re.M)
    assert listed == [(one.name, one.summary) for one in PROPERTIES.values()]
