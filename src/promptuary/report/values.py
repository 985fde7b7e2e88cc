"""Values of settings as YAML in one line and back, and numbers out of files that may hold anything.

Knows no setting and no file.
"""

from __future__ import annotations

import functools
import json
import math
from typing import Any

import yaml

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Reads plain values and nothing else, in C where there is that."""

_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def written(value: Any) -> str:
    """A value as YAML in one line."""
    try:
        return _written(json.dumps(value, ensure_ascii=False))
    except (TypeError, ValueError):
        return _written(json.dumps(str(value), ensure_ascii=False))


@functools.lru_cache(4096)
def _written(content: str) -> str:
    value = json.loads(content)
    text = _flow(value)
    return text if "\n" not in text else _piecewise(value)


def _flow(value: Any) -> str:
    text = yaml.dump(value, None, _DUMPER, default_flow_style=True, sort_keys=False, allow_unicode=True, width=2**30)
    return str(text).removesuffix("\n").removesuffix("\n...")


def _piecewise(value: Any) -> str:
    """A value with texts of several lines; those are written as in JSON, which is YAML too for texts."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_piecewise(key)}: {_piecewise(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_piecewise, value)) + "]"
    text = _flow([value])[1:-1]
    return json.dumps(value, ensure_ascii=False) if "\n" in text else text


@functools.lru_cache(4096)
def scalar(text: str) -> str:
    """A written value as it is read by people: texts without quotes."""
    try:
        value = yaml.load(text, LOADER)
    except yaml.YAMLError:
        return text
    return value if isinstance(value, str) else text


def number(value: Any) -> float | None:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def whole(value: Any) -> int | None:
    """A whole number from 0 up, of a size that something could have."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63 else None
