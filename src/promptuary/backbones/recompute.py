"""Gradient checkpointing of a frozen model: its layers keep their inputs only, and run again in the backward pass.

Knows no method, no family and no prompt. The switch of transformers works in training mode alone, where dropout is at
work as well, and takes every cache away.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from promptuary.backbones.cache import runs_again
from promptuary.backbones.inject import Wiring
from promptuary.errors import SiteError

_WITHIN: ContextVar[frozenset[int]] = ContextVar("promptuary_recomputing", default=frozenset())


def layers(model: nn.Module) -> list[nn.Module]:
    """The outermost layers of a model that can run again."""
    found = [(name, part) for name, part in model.named_modules() if isinstance(part, GradientCheckpointingLayer)]
    names = [name for name, _ in found]
    return [part for name, part in found if not any(name.startswith(f"{other}.") for other in names)]


@contextmanager
def recomputing(wiring: Wiring) -> Iterator[None]:
    """Within the block, and in this thread, the layers of a model keep nothing but their inputs.

    The numbers are the same: dropout draws again what it drew. A layer that writes into a cache of transformers runs as
    always, since it would write twice.

    Raises:
        SiteError: the model has no layers that can run again.
    """
    parts = layers(wiring.model)
    if not parts:
        raise SiteError(
            f"{type(wiring.model).__name__} has no layers that can run again; leave train.gradient_checkpointing out"
        )
    for part in parts:
        wiring.shadow_once(part, "forward", functools.partial(_again, wiring, part))
    token = _WITHIN.set(_WITHIN.get() | {id(wiring)})
    try:
        yield
    finally:
        _WITHIN.reset(token)


def _again(wiring: Wiring, layer: nn.Module, run: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(run)
    def forward(*args: Any, **kwargs: Any) -> Any:
        caches = [one for one in (*args, *kwargs.values()) if isinstance(one, transformers.Cache)]
        if id(wiring) not in _WITHIN.get() or not torch.is_grad_enabled() or not all(map(runs_again, caches)):
            return run(*args, **kwargs)
        # what is active now is active again when the layer runs for the second time, in whatever thread
        again = functools.partial(contextvars.copy_context().run, functools.partial(run, **kwargs))
        return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=layer.training)

    return forward
