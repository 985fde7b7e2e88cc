"""Methods of an outside package for the tests of the contract suite: a sound one, and it with some parts replaced.

Knows no test.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, create_model

from promptuary.methods.base import Method, MethodConfig
from promptuary.prompts.init import Starting
from promptuary.types import Prompt, Shape, View

PADDING, COUNT, BUILDS, CACHED = (
    "padding_on_either_side_changes_nothing",
    "parameter_count_is_the_stated_formula",
    "builds_from_widths_only",
    "cached_generation_equals_uncached",
)
STATES, TRAINS = "the_card_states_the_exceptions", "the_run_file_of_the_card_trains"


def config_for(name: str, **fields: Any) -> type[MethodConfig]:
    """Settings of an outside method; fields are (type, default)."""
    fields = {field: (kind, Field(default, description="of a test")) for field, (kind, default) in fields.items()}
    return create_model("Made", __base__=MethodConfig, name=(Literal[name], name), **fields)


class Sound(Method):
    """Three rows; nothing is wrong with them."""

    name = "outside_sound"
    title = "Three rows"
    paper = "none"
    groups: ClassVar = {"rows": "prompt"}
    Config = config_for("outside_sound")

    def build(self) -> None:
        self.rows = self.parameter(3, self.shape.width)

    def fill(self, source: Starting) -> None:
        self.rows.copy_(self.first_rows(3, source))

    def prompt(self, view: View) -> Prompt:
        return Prompt(rows=self.rows[None])

    @classmethod
    def count(cls, config: MethodConfig, shape: Shape) -> int:
        return 3 * shape.width

    @classmethod
    def match_budget(cls, config: MethodConfig, length: int, shape: Shape) -> MethodConfig:
        return config


def changed(name: str, **parts: Any) -> type[Sound]:
    """`Sound` under another name with some parts replaced."""
    title = name.title().replace("_", "")
    return type(title, (Sound,), {"name": name, "Config": config_for(name), **parts})
