"""A run as one frozen tree of settings: YAML plus `--set a.b=value` in, a checked `Run` out.

Knows no tensors, files of data or devices; methods' and tasks' own settings are found through the registry.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml
from pydantic import Field

from promptuary import registry
from promptuary.backbones.base import BackboneConfig
from promptuary.data.load import DataConfig
from promptuary.errors import ConfigError
from promptuary.methods.base import MethodConfig
from promptuary.registry import suggest
from promptuary.settings import Settings
from promptuary.tasks.base import TaskConfig


class TrainConfig(Settings):
    """How a prompt is trained."""

    steps: int = Field(500, ge=1, description="optimiser steps; epochs, if given, decides instead")
    epochs: float | None = Field(None, gt=0, description="passes over the training data, instead of steps")
    batch_size: int = Field(16, ge=1, description="examples per optimiser step, whatever accumulation is; DePT: 32")
    accumulation: int = Field(
        1, ge=1, description="parts that a batch is run in, to save memory; the result is the same"
    )
    optimizer: Literal["adamw", "adafactor"] = Field(
        "adamw", description="AdamW (DePT), or Adafactor without parameter scaling (Lester et al. 2021)"
    )
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="after warm-up; DePT: linear")
    warmup: float = Field(
        0.06, ge=0, description="steps of warm-up (1 or more) or their part of all steps (below 1); our choice"
    )
    clip: float = Field(1.0, gt=0, description="largest norm of all gradients together; DePT: 1.0")
    mixed_precision: Literal["no", "bf16"] = Field("no", description="bf16 runs the model under autocast")
    bucket: bool = Field(True, description="batches of similar length (seeded, order stays random across buckets)")
    evaluate_every: int | None = Field(None, ge=1, description="steps between validations; without it a tenth of all")
    patience: int | None = Field(None, ge=1, description="stop after this many validations without a better score")
    eval_batch_size: int = Field(32, ge=1, description="examples per batch in evaluation")
    save_every: int | None = Field(None, ge=1, description="steps between checkpoints; without it as evaluate_every")
    threads: int | None = Field(None, ge=1, description="CPU threads of torch; without it torch's own choice")


class Run(Settings):
    """Everything that one training run is."""

    task: pydantic.SerializeAsAny[TaskConfig]
    data: DataConfig
    backbone: BackboneConfig
    method: pydantic.SerializeAsAny[MethodConfig]
    train: TrainConfig = TrainConfig()
    seed: int = Field(0, ge=0, description="of data order, few-shot sample and starting values")
    out: str = Field("out/run", description="folder of this run; everything is written there and nowhere else")
    suite: str | None = Field(None, description="a prepared task and data set, such as glue/sst2")

    def hash(self) -> str:
        """16 hex digits over all settings but `out`."""
        content = json.dumps(self.model_dump(mode="json", exclude={"out"}), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """The resolved settings; loading them gives this run again."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


PARTS: dict[str, type[Settings]] = {"data": DataConfig, "backbone": BackboneConfig, "train": TrainConfig}
NAMED = {"task": "tasks", "method": "methods"}


def load_run(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), **changes: Any) -> Run:
    """Read a run.

    Args:
        source: a YAML file, or the same content as a mapping. `extends: other.yaml` (one level) is read first,
            `suite: glue/sst2` fills task and data beneath both.
        overrides: `a.b=value` texts, the value in YAML.
        changes: top-level fields, such as `seed=1`.

    Raises:
        ConfigError: one line: what is wrong, and the nearest known name.
    """
    if isinstance(source, Mapping):
        values = dict(source)
    else:
        path = Path(source)
        values = read_yaml(path)
        if "extends" in values:
            parent = path.parent / str(values.pop("extends"))
            base = read_yaml(parent)
            if "extends" in base:
                raise ConfigError(f"{parent} extends another file in turn; only one level is allowed")
            values = merge(base, values)
    for override in overrides:
        values = merge(values, parse_override(override))
    values = merge(values, changes)
    if values.get("suite") is not None:
        values = merge(suite(str(values["suite"])), values)
    return build(values)


def build(values: Mapping[str, Any]) -> Run:
    """Check a whole tree.

    Raises:
        ConfigError: as `load_run`.
    """
    unknown = [key for key in values if key not in Run.model_fields]
    if unknown:
        raise ConfigError(f'unknown field "{unknown[0]}"{suggest(str(unknown[0]), list(Run.model_fields))}')
    checked = dict(values)
    for part, model in PARTS.items():
        if part in checked:
            checked[part] = model.read(_mapping(checked[part], part), where=part)
    for part, kind in NAMED.items():
        if part not in checked:
            raise ConfigError(f"{part} is required (known: {', '.join(registry.names(kind))})")
        inner = _mapping(checked[part], part)
        if "name" not in inner:
            raise ConfigError(f"{part}.name is required (known: {', '.join(registry.names(kind))})")
        found = registry.load(kind, str(inner["name"]))
        # an outside method is named package.module:Class in the run file and keeps that name there
        settings = found.Config.read({**inner, "name": found.name}, where=part)
        checked[part] = settings.model_copy(update={"name": str(inner["name"])})
    return Run.read(checked, where="")


def schema() -> dict[str, Any]:
    """The JSON schema of a run, with the settings of every known method and task."""
    whole = Run.model_json_schema()
    for part, kind in NAMED.items():
        options = [registry.load(kind, name).Config.model_json_schema() for name in registry.names(kind)]
        for option in options:
            whole["$defs"].update(option.pop("$defs", {}))
        whole["properties"][part] = {"oneOf": options}
    whole["properties"]["extends"] = {"type": "string", "description": "another run file that this one changes"}
    return whole


def suites() -> dict[str, dict[str, Any]]:
    """Every prepared task: `file/name` -> its task and data settings."""
    found = {}
    for file in sorted(resources.files("promptuary.tasks").joinpath("suites").iterdir(), key=lambda item: item.name):
        if file.name.endswith(".yaml"):
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
            found.update({f"{file.name.removesuffix('.yaml')}/{name}": part for name, part in content.items()})
    return found


def suite(name: str) -> dict[str, Any]:
    """One prepared task.

    Raises:
        ConfigError: no such suite.
    """
    known = suites()
    if name not in known:
        raise ConfigError(f'no suite "{name}"{suggest(name, list(known))} (known: {", ".join(known)})')
    return known[name]


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping.

    Raises:
        ConfigError: missing, not YAML, or not a mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = suggest(path.name, [item.name for item in path.parent.glob("*.y*ml")]) if path.parent.exists() else ""
        raise ConfigError(f"run file {path} does not exist{near}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"run file {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"run file {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"run file {path} should be a mapping such as 'method: {{name: ept}}'")
    return content


def parse_override(text: str) -> dict[str, Any]:
    """`a.b=value` as a nested mapping.

    Raises:
        ConfigError: no `=`, or the value is not YAML.
    """
    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        raise ConfigError(f'--set takes "a.b=value", got "{text}"')
    try:
        parsed: Any = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f'--set {path}: "{value}" is not YAML') from None
    for step in reversed(path.strip().split(".")):
        parsed = {step: parsed}
    return dict(parsed)


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings merged, `above` winning. A part whose `name` changes is replaced, not mixed."""
    out = dict(below)
    for key, value in above.items():
        old = out.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            other = key in NAMED and "name" in value and old.get("name", value["name"]) != value["name"]
            out[key] = dict(value) if other else merge(old, value)
        else:
            out[key] = value
    return out


def _mapping(value: Any, part: str) -> dict[str, Any]:
    if isinstance(value, Settings):
        return value.model_dump()
    if not isinstance(value, Mapping):
        raise ConfigError(f"{part} should be a mapping of settings, got {value!r}")
    return dict(value)
