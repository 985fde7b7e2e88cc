"""Earlier prompts that another one starts from.

Knows no method by name and no training.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from torch import Tensor

from promptuary.backbones.base import Backbone
from promptuary.checkpoint import find_prompt, load_prompt, read_facts
from promptuary.errors import NotFoldable
from promptuary.methods.base import MethodConfig
from promptuary.prompts.init import Saved


def load_source(folder: str | Path, backbone: Backbone) -> Saved:
    """A saved prompt for starting another one from.

    Raises:
        PromptuaryError: as `load_prompt`.
    """
    tuned = load_prompt(folder, backbone)
    method = tuned.method
    assert method is not None
    prompt = None
    with contextlib.suppress(NotFoldable):
        prompt = method.cpu().fold()
    tensors = {name: value.detach().cpu().clone() for name, value in method.state_dict().items()}
    metrics = read_facts(find_prompt(folder)).get("metrics", {})
    return Saved(str(folder), method.name, method.config.model_dump(mode="json"), tensors, prompt, metrics)


def load_start(config: MethodConfig, backbone: Backbone) -> tuple[Tensor | None, tuple[Saved, ...]]:
    """What a method's settings let it start from: rows of `init_prompt`, and its sources.

    Raises:
        PromptuaryError: as `load_prompt`.
        NotFoldable: `init_prompt` is no static table of rows.
    """
    rows = None if config.init_prompt is None else load_source(config.init_prompt, backbone).rows()
    return rows, tuple(load_source(name, backbone) for name in config.origins)
