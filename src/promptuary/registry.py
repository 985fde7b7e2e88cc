"""Names to classes. The registry is the folder: a file's name is what the user types.

Knows nothing about what the classes do; importing a name imports just that one file.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from promptuary.errors import ConfigError

KINDS = {
    "methods": "Method", "baselines": "Baseline", "backbones": "Backbone", "tasks": "Task", "solvers": "Solver"
}  # fmt: skip
"""Folder of the package -> the abstract class that its files implement (it stands in base.py)."""

_HELPERS = {
    "attach", "base", "bidirectional", "cache", "feed", "hosts", "inject", "judged", "kept", "layout", "load", "place",
    "policy_net", "policy_rewards", "processors", "recompute", "seeing", "shared", "soft_q", "tail", "template", "text",
    "tower", "translate", "turns", "visual", "vocabulary", "words",
}  # fmt: skip


def suggest(word: str, known: list[str]) -> str:
    """`; did you mean "x"?` for the nearest known word, or an empty string."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f'; did you mean "{near[0]}"?' if near else ""


def _folder(kind: str) -> dict[str, str]:
    path = Path(__file__).parent / kind
    return {
        module.name: f"promptuary.{kind}.{module.name}"
        for module in pkgutil.iter_modules([str(path)])
        if not module.ispkg and module.name not in _HELPERS
    }


def _outside(kind: str) -> dict[str, str]:
    return _points(kind, tuple(sys.path))


@cache
def _points(kind: str, path: tuple[str, ...]) -> dict[str, str]:
    """Entry points of what is installed on a path; looked for once, since it opens a file for every package."""
    return {point.name: point.value for point in entry_points(group=f"promptuary.{kind}")}


_ADDED: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}


def add(kind: str, found: Any) -> None:
    """Make a class known by its `name` in this process, such as one from a notebook or a test.

    Raises:
        ConfigError: the name belongs to somebody else.
    """
    if found.name in {*_folder(kind), *_outside(kind)} and load(kind, found.name) is not found:
        raise ConfigError(f'two owners of the name "{found.name}"; choose another one')
    _ADDED[kind][found.name] = found
    load.cache_clear()


def names(kind: str) -> list[str]:
    """Every known name of a kind, sorted; reads the folder and the entry points, imports nothing.

    Raises:
        ConfigError: if an outside package claims a name that is taken.
    """
    inside, outside = _folder(kind), _outside(kind)
    for name in inside.keys() & outside.keys():
        raise ConfigError(f'two owners of the name "{name}": {inside[name]} and {outside[name]}; uninstall one')
    return sorted({*inside, *outside, *_ADDED[kind]})


@cache
def load(kind: str, name: str) -> Any:
    """The class behind a name, or behind `package.module:Class` or `folder/file.py:Class`, whose code is then run.

    Raises:
        ConfigError: no such name (with the nearest one), or the file does not hold exactly one final class.
    """
    base = getattr(importlib.import_module(f"promptuary.{kind}.base"), KINDS[kind])
    if ":" in name:
        found = _checked(_attribute(name), base, name)
        # from here on its own name is enough, which is what a saved prompt holds
        add(kind, found)
        return found
    known = names(kind)
    if name not in known:
        other = next((other[:-1] for other in KINDS if other != kind and name in names(other)), None)
        hint = suggest(name, known) if other is None else f"; it is a {other}: write `{other}: {{name: {name}}}`"
        raise ConfigError(f'no such {kind[:-1]}: "{name}"{hint} (known: {", ".join(known)})')
    if name in _ADDED[kind]:
        return _checked(_ADDED[kind][name], base, name)
    if name in _outside(kind):
        return _checked(_attribute(_outside(kind)[name]), base, name)
    module = importlib.import_module(_folder(kind)[name])
    final = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, base)
        and not inspect.isabstract(value)
        and value.__module__ == module.__name__
    ]
    if len(final) != 1:
        raise ConfigError(f"{module.__name__} must hold exactly one final {base.__name__}, found {len(final)}")
    return _checked(final[0], base, name)


def known(kind: str, name: str) -> Any:
    """The class behind a name that stood in a file which may be anybody's: no code is run because it says so.

    Raises:
        ConfigError: as `load`, or the name is a place to import from.
    """
    if ":" in name:
        raise ConfigError(
            f'"{name}" would run code that a saved file names; import it yourself and registry.add("{kind}", Class)'
        )
    return load(kind, name)


def _attribute(target: str) -> Any:
    module, _, attribute = target.rpartition(":")
    try:
        return getattr(_file(Path(module)) if module.endswith(".py") else importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f'cannot import "{target}": {error}') from error


def _file(path: Path) -> ModuleType:
    """A file as a module, under a name that no other file has; read once.

    Raises:
        ConfigError: there is no such file, or it is no Python.
    """
    whole = path.resolve()
    name = f"promptuary_file_{hashlib.sha256(str(whole).encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, whole)
    if spec is None or spec.loader is None or not whole.is_file():
        raise ConfigError(f"{path} does not exist; give the file of a class as folder/file.py:Class")
    module = importlib.util.module_from_spec(spec)
    # known before it runs: its own classes are looked up by the name of their module
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, SyntaxError):
            raise ConfigError(f"{path}, line {error.lineno}: {error.msg}; mend the file") from None
        raise
    return module


def _checked(found: Any, base: type, name: str) -> Any:
    if not (inspect.isclass(found) and issubclass(found, base)):
        raise ConfigError(f'"{name}" is not a {base.__name__}')
    if inspect.isabstract(found):
        raise ConfigError(f'"{name}" is an abstract {base.__name__}; name a final class')
    own = str(getattr(found, "name"))  # noqa: B009 (mypy knows only that it is a class)
    if ":" not in name and own != name:
        raise ConfigError(f'{found.__module__}.{found.__name__} calls itself "{own}" but is listed as "{name}"')
    return found
