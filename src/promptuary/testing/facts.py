"""What a method's class must say of itself before any property can be checked, each lack told in one line.

Knows no method by name, model or file.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from promptuary import registry
from promptuary.errors import ConfigError
from promptuary.methods.base import Method, MethodConfig
from promptuary.registry import suggest
from promptuary.testing import tiny
from promptuary.testing.properties import PROPERTIES
from promptuary.types import Shape

FACTS = {
    "name": 'what users type, such as "two_factor"',
    "title": 'for tables and cards, such as "Two-factor prompt"',
    "paper": 'its source, such as "arXiv 2104.08691", or "none"',
    "groups": 'parameter name -> learning-rate group, such as {"rows": "prompt"}',
    "Config": "its settings, a subclass of MethodConfig",
}
"""Facts without a default."""

SHAPE = Shape(width=16, vocabulary=32, classes=3, hidden=16, visual=16, depth=2, patch=4, norms=4)
"""Some widths."""


def check_facts(method: Any, settings: Mapping[str, Any] | None = None) -> None:
    """Refuse a class that does not say what the library must know of it.

    Args:
        method: what should be a final subclass of `Method`.
        settings: settings that fit tiny models; default: `method.tiny`.

    Raises:
        ConfigError: names the first fact that is missing or wrong, and what to write.
    """
    if not (inspect.isclass(method) and issubclass(method, Method)):
        raise ConfigError(f"check_method takes a subclass of Method, got {method!r}")
    own = method.__name__
    open_ones = sorted(method.__abstractmethods__)
    if open_ones:
        raise ConfigError(f"{own} does not define {', '.join(open_ones)}; see promptuary.methods.base.Method")
    there = {fact for kind in method.__mro__ for fact in vars(kind)}
    for fact, meaning in FACTS.items():
        if fact not in there:
            raise ConfigError(f"{own} does not state its fact `{fact}`: {meaning}")
    if not (inspect.isclass(method.Config) and issubclass(method.Config, MethodConfig)):
        raise ConfigError(f"{own}.Config must be {FACTS['Config']}, got {method.Config!r}")
    default = method.Config.model_fields["name"].default
    if default != method.name:
        raise ConfigError(f'{method.Config.__name__}.name must have the default "{method.name}", got {default!r}')
    _check_exceptions(method)
    values = {"name": method.name, **(method.tiny if settings is None else settings)}
    made = method(
        method.Config.read(values, where=f"{own}.tiny" if settings is None else "settings"),
        SHAPE,
    )
    # of the instance: which tensors there are may depend on the settings
    for group in sorted(set(made.groups.values())):
        if f"{group}_lr" not in method.Config.model_fields:
            raise ConfigError(f'{own}.groups names the group "{group}", but {method.Config.__name__} has no {group}_lr')
    for name, _ in made.named_parameters():
        if name not in made.groups:
            raise ConfigError(f'{own}.groups lacks the parameter "{name}": {FACTS["groups"]}')


def _check_exceptions(method: type[Method]) -> None:
    for key, reason in method.exceptions.items():
        name, _, family = key.partition(" on ")
        known(name, list(PROPERTIES), f"{method.__name__}.exceptions names the property")
        if family:
            asked = [kind for kind in tiny.EVERY if PROPERTIES[name].applies(method, kind, card=True)]
            known(family, asked, f"{method.__name__}.exceptions names for {name} the family")
        if not reason.strip():
            raise ConfigError(f'{method.__name__}.exceptions gives no reason for "{key}"')


def known(name: str, names: list[str], what: str) -> None:
    """Refuse a name that is not among the known ones.

    Raises:
        ConfigError: with the nearest one.
    """
    if name not in names:
        raise ConfigError(f'{what} "{name}", which there is not{suggest(name, names)} (known: {", ".join(names)})')


def families_of(method: type[Method]) -> list[str]:
    """Families whose models have every place that the method uses."""
    return [name for name in tiny.EVERY if _has(method, tiny.family_name(name))]


def _has(method: type[Method], family: str) -> bool:
    known = registry.load("backbones", family)
    return method.sites <= known.sites and known.modality in method.modalities
