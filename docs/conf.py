"""Sphinx settings, and a check that the tables of settings in these pages are the fields of the code.

Knows no page's text. Build: sphinx-build -W -b html docs docs/_build/html
"""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any

from sphinx.util import logging

import promptuary
from promptuary import registry
from promptuary.config import PARTS
from promptuary.data.augment import AugmentConfig
from promptuary.methods.base import MethodConfig
from promptuary.run import JointTask, Run
from promptuary.settings import Settings
from promptuary.speakers.base import EndpointConfig
from promptuary.tasks.base import TaskConfig

HERE = Path(__file__).parent

project = "Promptuary"
author = "The Promptuary authors"
copyright = "The Promptuary authors; Apache-2.0"
version = release = promptuary.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "methods/_list.md"]
html_theme = "furo"
html_title = f"Promptuary {release}"

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4

# docstrings use single backticks for code
default_role = "literal"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 90


def table(config: Any, inherited: Any = None) -> list[str]:
    """The lines of the table of settings of a configuration class.

    Args:
        config: the class.
        inherited: a base class whose fields stand elsewhere, unless they are changed.
    """
    lines = ["| setting | default | values | meaning and source |", "|---|---|---|---|"]
    for name, field in config.model_fields.items():
        known = inherited.model_fields.get(name) if inherited is not None else None
        changed = known is None or (known.default, known.description) != (field.default, field.description)
        # a group of settings has a table of its own
        if name == "name" or not changed or field.description is None or isinstance(field.default, Settings):
            continue
        meaning = field.description.replace("|", "\\|").replace("<", "\\<")
        lines.append(f"| `{name}` | {_default(field)} | {_values(field)} | {meaning} |")
    return lines


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{list(value)}`" if isinstance(value, tuple) else f"`{value}`"


def _values(field: Any) -> str:
    def named(kind: Any) -> list[str]:
        if typing.get_origin(kind) in (typing.Union, types.UnionType):
            return [text for one in typing.get_args(kind) for text in named(one)]
        if typing.get_origin(kind) is typing.Literal:
            return [f"`{value}`" for value in typing.get_args(kind)]
        simple = {bool: ["`true`", "`false`"], int: ["integer"], float: ["number"], str: ["text"], type(None): []}
        return simple.get(kind) or ([] if kind is type(None) else [_container(kind)])

    bounds = [f"{sign} {getattr(item, key)}" for item in field.metadata for key, sign in BOUNDS if hasattr(item, key)]
    return " ".join([", ".join(dict.fromkeys(named(field.annotation))), *bounds])


BOUNDS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "\\<"))


def _container(kind: Any) -> str:
    if isinstance(kind, type) and issubclass(kind, Settings):
        return "mapping"
    return {dict: "mapping", tuple: "list"}.get(typing.get_origin(kind), "text")


def tables() -> dict[str, list[list[str]]]:
    """Page -> tables of settings that it must hold."""
    whole = [table(config) for config in (Run, *PARTS.values(), AugmentConfig, EndpointConfig, TaskConfig)]
    tasks = [table(registry.load("tasks", name).Config, TaskConfig) for name in registry.names("tasks")]
    solvers = [table(registry.load("solvers", name).Config) for name in registry.names("solvers")]
    joint = table(JointTask)
    pages = {"run-file.md": [*whole, *tasks, *solvers, joint], "methods/index.md": [table(MethodConfig)]}
    pages["baselines.md"] = [table(registry.load("baselines", name).Config) for name in registry.names("baselines")]
    for name in registry.names("methods"):
        found = registry.load("methods", name)
        if found.__module__ == f"promptuary.methods.{name}":
            pages[f"methods/{name}.md"] = [table(found.Config, MethodConfig)]
    return pages


def listing(app: Any) -> None:
    """Write the table of all methods, which their page includes: nobody lists them by hand."""
    lines = ["| name | method | source | places | rebuilt from partial sources |", "|---|---|---|---|---|"]
    for name in registry.names("methods"):
        found = registry.load("methods", name)
        if found.__module__ == f"promptuary.methods.{name}":
            partial = "yes" if found.reconstructed else "no"
            places = ", ".join(f"`{site}`" for site in sorted(found.sites))
            lines.append(f"| [`{name}`]({name}.md) | {found.title} | {found.paper} | {places} | {partial} |")
    (HERE / "methods" / "_list.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def check(app: Any) -> None:
    """Warn about each line of a table that its page lacks, and about each method without a card."""
    log = logging.getLogger(__name__)
    for page, wanted in tables().items():
        if not (HERE / page).is_file():
            log.warning("docs/%s is missing: every method has a card", page)
            continue
        there = set((HERE / page).read_text(encoding="utf-8").splitlines())
        for line in [line for one in wanted for line in one if line not in there]:
            log.warning("docs/%s lacks this line of its table of settings: %s", page, line)


def keep_first_line(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Keep napoleon from taking what stands before a colon in a property's first line for its type."""
    if what == "property":
        lines[:0] = ["..", ""]  # an empty comment


def setup(app: Any) -> None:
    """List the methods and run the check before the pages are read, and the other before napoleon."""
    app.connect("builder-inited", listing)
    app.connect("builder-inited", check)
    app.connect("autodoc-process-docstring", keep_first_line, priority=400)
