"""Parts from their settings: a backbone that is loaded or held, a method, and sizes that fit a budget.

Knows no training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from promptuary import registry
from promptuary.backbones.base import Backbone, BackboneConfig
from promptuary.backbones.load import family_of, guess_family
from promptuary.baselines.base import Baseline, BaselineConfig
from promptuary.errors import ConfigError
from promptuary.methods.base import Method, MethodConfig, SourcedConfig
from promptuary.tasks.base import Task
from promptuary.types import Shape

PROMPTS = "prompts"
"""The folder with the prompts of a run on several tasks."""


def open_backbone(config: BackboneConfig) -> Backbone:
    """Load a backbone; family "auto" is read from the model's config.

    Raises:
        ConfigError: no such model or family.
    """
    family = config.family if config.family != "auto" else guess_family(config.model, config.revision)
    config = config.model_copy(update={"family": family})
    loaded: Backbone = registry.load("backbones", family).load(config)
    return loaded


def hold_backbone(model: Any, tokenizer: Any, *, family: str = "auto", name: str | None = None) -> Backbone:
    """A backbone around a transformers model that you hold already; `release()` gives it back as it came.

    Args:
        model: any text model of transformers, also one with a head for classification, tokens or answers to questions;
            a vision encoder without a head; or a two-tower model.
        tokenizer: its fast tokenizer. Of a vision encoder its image processor, the settings of one as a mapping, or a
            `Sight`; of a two-tower model its processor (with `tokenizer` and `image_processor`), or a pair of a fast
            tokenizer and any of the three.
        family: causal, seq2seq, masked, encoder, vision or dual; auto reads the model's class.
        name: what saved prompts call the base; default: the name that it was loaded by.

    Raises:
        ConfigError: the class of the model belongs to no family.
        SiteError: the model has no place for a prompt.
    """
    family = family if family != "auto" else family_of(model)
    known = name or model.name_or_path or type(model).__name__
    dtype = str(model.dtype).removeprefix("torch.")
    config = BackboneConfig.read({"model": known, "family": family, "dtype": dtype}, where="backbone")
    held: Backbone = registry.load("backbones", family)(model, tokenizer, config)
    return held


def shape_of(backbone: Backbone, task: Task | None) -> Shape:
    """All that a method may know of where it will work."""
    words = 0 if task is None or task.reading != "words" else len(task.words)
    return replace(backbone.shape, classes=words)


def build_method(config: MethodConfig, shape: Shape) -> Method:
    """A method from its settings; `match_length` is resolved first."""
    found = registry.load("methods", config.name)
    if isinstance(config, SourcedConfig):
        config = config.model_copy(update={"sources": _all(config.sources)})
    if config.match_length is not None:
        config = found.match_budget(config, config.match_length, shape)
    made: Method = found(config, shape)
    return made


def prompts_of(folder: Path) -> list[Path]:
    """The prompts of a run on several tasks, given its folder; none for any other."""
    inside = folder / PROMPTS
    return sorted(one for one in inside.iterdir() if one.is_dir()) if inside.is_dir() else []


def _all(sources: Sequence[str]) -> tuple[str, ...]:
    """Sources; for the folder of a run on several tasks, the prompts of all of them."""
    return tuple(one for name in sources for one in [str(path) for path in prompts_of(Path(name))] or [name])


def build_baseline(config: BaselineConfig) -> Baseline:
    """A baseline from its settings."""
    made: Baseline = registry.load("baselines", config.name)(config)
    return made


def match_budget(method: str, length: int, width: int | Shape, /, **settings: Any) -> MethodConfig:
    """Settings of a method with at most as many trained parameters as prompt tuning of `length` rows.

    Args:
        method: its name.
        length: rows of the prompt that is compared with.
        width: width of the backbone's token embeddings, or its whole shape (`backbone.shape`).
        settings: the method's own settings.

    Raises:
        ConfigError: no such method or setting, a size that is none, or even its smallest form is larger.
    """
    whole = width.width if isinstance(width, Shape) else width
    for name, size in (("length", length), ("width", whole)):
        if not isinstance(size, int) or size < 1:
            raise ConfigError(f"{name}: expected a whole number of at least 1, got {size!r}")
    found = registry.load("methods", str(method))
    config: MethodConfig = found.Config.read({"name": method, **settings}, where="method")
    resized: MethodConfig = found.match_budget(config, length, width if isinstance(width, Shape) else Shape(width))
    return resized
