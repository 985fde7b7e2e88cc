"""The shapes and types in signatures, checked at run time by one wrapper of beartype's for each function.

Knows no test and no module of the library. The checks are those of `jaxtyping.jaxtyped(typechecker=beartype.beartype)`,
which looks at every argument twice, binds a signature in every call and builds nested functions' wrappers anew in every
call of the function around them; that took a quarter of the time of a tiny run.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import beartype

# a scope of its own for the names of dimensions; it keeps nothing in itself, so one serves all calls
SCOPE = jaxtyping.jaxtyped("context")
THOROUGH = jaxtyping.jaxtyped
DONE = "__shapes_are_checked__"

_Made = tuple[Callable[..., Any] | None, bool]
# what was built for a function's code, whose nested functions come again and again: beartype's wrapper, and its scope
_BUILT: dict[tuple[types.CodeType, str, tuple[tuple[str, Any], ...]], _Made] = {}


def install(packages: list[str]) -> None:
    """Check every function, method and data class of the packages that are imported from now on."""
    jaxtyping.jaxtyped = checked
    jaxtyping.install_import_hook(packages, "beartype.beartype")


def checked(made: Any = None, *, typechecker: Any = beartype) -> Any:
    """A function or a data class that refuses arguments and answers of another type or shape; a decorator as well."""
    if made is None:
        return functools.partial(checked, typechecker=typechecker)
    if isinstance(made, type):
        start = vars(made).get("__init__")
        if dataclasses.is_dataclass(made) and inspect.isfunction(start) and not hasattr(start, DONE):
            made.__init__ = checked(start)
        return made
    if not inspect.isfunction(made) or inspect.iscoroutinefunction(made) or inspect.isasyncgenfunction(made):
        return THOROUGH(made, typechecker=beartype)
    key = made.__code__, made.__module__, tuple(made.__annotations__.items())
    if key not in _BUILT:
        _BUILT[key] = _build(made)
    inner, scoped = _BUILT[key]
    if inner is None:
        return made
    if scoped and inspect.isgeneratorfunction(made):  # its body runs when the scope is gone
        return THOROUGH(made, typechecker=beartype)
    return _wrapped(made, _around(inner, made), scoped)


def _wrapped(made: Callable[..., Any], inner: Callable[..., Any], scoped: bool) -> Callable[..., Any]:
    call = inner
    if scoped:

        def call(*args: Any, **kwargs: Any) -> Any:
            __tracebackhide__ = True
            with SCOPE:
                return inner(*args, **kwargs)

    call = functools.wraps(made)(call)
    setattr(call, DONE, True)
    return call


def _build(made: Callable[..., Any]) -> _Made:
    """Beartype's wrapper, or None where there is nothing to check; and whether a hint names dimensions."""
    hints = {}
    for name, hint in made.__annotations__.items():
        stub = types.SimpleNamespace(__annotations__={name: hint})
        try:
            hints[name] = typing.get_type_hints(stub, made.__globals__, include_extras=True)[name]
        except (NameError, AttributeError, TypeError):
            continue  # of a class that is not there yet, or imported for a type checker only
    copy = types.FunctionType(made.__code__, made.__globals__, made.__name__, made.__defaults__, made.__closure__)
    copy.__kwdefaults__, copy.__module__, copy.__qualname__ = made.__kwdefaults__, made.__module__, made.__qualname__
    copy.__annotations__ = hints
    inner = beartype(copy)
    return (None if inner is copy else inner), any(map(_names_dimensions, hints.values()))


def _around(inner: Callable[..., Any], made: Callable[..., Any]) -> Callable[..., Any]:
    """The same wrapper around another function of the same code; it holds what it calls among its own defaults."""
    if "__beartype_func" not in (inner.__kwdefaults__ or {}) or inner.__closure__ or inner.__defaults__:
        return _build(made)[0] or made
    around = types.FunctionType(
        inner.__code__, inner.__globals__, inner.__name__, inner.__defaults__, inner.__closure__
    )
    around.__kwdefaults__ = {**inner.__kwdefaults__, "__beartype_func": made}
    return around


def _names_dimensions(hint: Any) -> bool:
    if isinstance(hint, list):
        return any(map(_names_dimensions, hint))
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(map(_names_dimensions, typing.get_args(hint)))
