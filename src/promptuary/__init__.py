"""Promptuary: learns prompts for frozen pretrained models. The public names, each imported when first used.

Knows nothing itself; importing it loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "load_run": "promptuary.config",
    "Run": "promptuary.run",
    "BaselineRun": "promptuary.run",
    "load_baseline": "promptuary.weights",
    "train": "promptuary.training",
    "Result": "promptuary.training",
    "sweep": "promptuary.sweeping",
    "evaluate": "promptuary.evaluation",
    "robustness": "promptuary.robust",
    "load_prompt": "promptuary.checkpoint",
    "save_prompt": "promptuary.checkpoint",
    "push_prompt": "promptuary.hub",
    "pull_prompt": "promptuary.hub",
    "Tuned": "promptuary.tuned",
    "Engine": "promptuary.serve.engine",
    "adapt": "promptuary.hosting",
    "attach": "promptuary.attaching",
    "match_budget": "promptuary.building",
    "Prompt": "promptuary.types",
    "Offset": "promptuary.types",
    "Batch": "promptuary.types",
    "Method": "promptuary.methods.base",
    "MethodConfig": "promptuary.methods.base",
    "Backbone": "promptuary.backbones.base",
    "PromptuaryError": "promptuary.errors",
}

if TYPE_CHECKING:
    from promptuary.attaching import attach
    from promptuary.backbones.base import Backbone
    from promptuary.building import match_budget
    from promptuary.checkpoint import load_prompt, save_prompt
    from promptuary.config import load_run
    from promptuary.errors import PromptuaryError
    from promptuary.evaluation import evaluate
    from promptuary.hosting import adapt
    from promptuary.hub import pull_prompt, push_prompt
    from promptuary.methods.base import Method, MethodConfig
    from promptuary.robust import robustness
    from promptuary.run import BaselineRun, Run
    from promptuary.serve.engine import Engine
    from promptuary.sweeping import sweep
    from promptuary.training import Result, train
    from promptuary.tuned import Tuned
    from promptuary.types import Batch, Offset, Prompt
    from promptuary.weights import load_baseline

__all__ = [
    "Backbone",
    "BaselineRun",
    "Batch",
    "Engine",
    "Method",
    "MethodConfig",
    "Offset",
    "Prompt",
    "PromptuaryError",
    "Result",
    "Run",
    "Tuned",
    "adapt",
    "attach",
    "evaluate",
    "load_baseline",
    "load_prompt",
    "load_run",
    "match_budget",
    "pull_prompt",
    "push_prompt",
    "robustness",
    "save_prompt",
    "sweep",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'promptuary' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
