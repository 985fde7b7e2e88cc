"""A run as one frozen tree of settings: YAML plus `--set a.b=value` in, a checked `Run` out.

Knows no tensors, files of data or devices; methods' and tasks' own settings are found through the registry.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from promptuary import registry
from promptuary.backbones.base import BackboneConfig
from promptuary.data.load import DataConfig
from promptuary.errors import ConfigError
from promptuary.registry import suggest
from promptuary.run import BaselineRun, JointRun, JointTask, MixtureConfig, Run, TrainConfig
from promptuary.settings import Settings

PARTS: dict[str, type[Settings]] = {
    "data": DataConfig, "backbone": BackboneConfig, "train": TrainConfig, "mixture": MixtureConfig,
}  # fmt: skip
NAMED = {"task": "tasks", "method": "methods", "baseline": "baselines", "solver": "solvers"}


def load_run(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), **changes: Any
) -> Run | BaselineRun | JointRun:
    """Read a run; one with `tasks` is a run on several of them, one with `baseline` trains weights of the model.

    Args:
        source: a YAML file, or the same content as a mapping. `extends: other.yaml` (one level) is read first,
            `suite: glue/sst2` fills task and data beneath both.
        overrides: `a.b=value` texts, the value in YAML.
        changes: top-level fields, such as `seed=1`.

    Raises:
        ConfigError: one line: what is wrong, and the nearest known name.
    """
    if isinstance(overrides, str) or not all(isinstance(one, str) for one in overrides):
        raise ConfigError(f'overrides: expected a list of texts such as ["train.steps=10"], got {overrides!r}')
    if isinstance(source, Mapping):
        values = dict(source)
    elif isinstance(source, str | Path):
        values = _from_file(Path(source))
    else:
        raise ConfigError(f"load_run takes a run file or a mapping of settings, got {source!r}")
    parsed = [parse_override(override) for override in overrides]
    top = {**values, **{path[0]: value for path, value in parsed if len(path) == 1}, **changes}
    if top.get("suite") is not None:
        values = merge(suite(top["suite"]), values)
    whole = merge(override(values, parsed), changes)
    if whole.get("tasks") is not None:
        return build_joint(whole)
    return build(whole) if whole.get("baseline") is None else build_baseline(whole)


def _from_file(path: Path) -> dict[str, Any]:
    """A run file on top of the one that it extends."""
    values = read_yaml(path)
    if "extends" not in values:
        return values
    name = values.pop("extends")
    if not isinstance(name, str):
        raise ConfigError(f"extends: expected the name of one run file, got {name!r}")
    base = read_yaml(path.parent / name)
    if "extends" in base:
        raise ConfigError(f"{path.parent / name} extends another file in turn; only one level is allowed")
    return merge(base, values)


def build(values: Mapping[str, Any]) -> Run:
    """Check a whole tree.

    Raises:
        ConfigError: as `load_run`.
    """
    return Run.read(_checked(values, Run), where="")


def build_baseline(values: Mapping[str, Any]) -> BaselineRun:
    """Check a whole tree that has a baseline in the place of a method.

    Raises:
        ConfigError: as `load_run`.
    """
    if values.get("method") is not None:
        raise ConfigError("a run has either a method or a baseline; take one of them out")
    if values.get("solver") is not None:
        raise ConfigError("a baseline is trained by gradients; take solver out")
    known = {name: value for name, value in values.items() if name != "method"}
    return BaselineRun.read(_checked(known, BaselineRun), where="")


def part_of(run: JointRun, name: str) -> Run:
    """The run on one of several tasks alone."""
    own = run.tasks[name]
    method = _named("method", {**run.method.model_dump(), **own.method})
    same: dict[str, Any] = {key: getattr(run, key) for key in ("backbone", "train", "solver", "seed", "out")}
    return Run(task=own.task, data=own.data, suite=own.suite, method=method, **same)


def build_joint(values: Mapping[str, Any]) -> JointRun:
    """Check a whole tree of several tasks.

    Raises:
        ConfigError: as `load_run`.
    """
    tasks = values["tasks"]
    if not isinstance(tasks, Mapping) or len(tasks) < 2:
        raise ConfigError(f"tasks should be a mapping of at least two names to their task and data, got {tasks!r}")
    if values.get("baseline") is not None:
        raise ConfigError("a baseline is trained on one task: give its run task and data instead of tasks")
    other = next((name for name in ("task", "data", "suite") if values.get(name) is not None), None)
    if other is not None:
        raise ConfigError(f"a run has either tasks or {other}; move {other} into one of the tasks")
    run = JointRun.read(_checked({**values, "tasks": {}}, JointRun), where="")
    parts = {str(name): _joint_task(str(name), one) for name, one in tasks.items()}
    run = run.model_copy(update={"tasks": parts})
    for name in parts:
        part_of(run, name)
    return run


def _checked(values: Mapping[str, Any], kind: type[Settings]) -> dict[str, Any]:
    """A tree whose parts are checked one by one."""
    unknown = [key for key in values if key not in kind.model_fields]
    if unknown:
        raise ConfigError(f'unknown field "{unknown[0]}"{suggest(str(unknown[0]), list(kind.model_fields))}')
    checked = dict(values)
    for part, model in PARTS.items():
        if part in checked:
            checked[part] = model.read(_mapping(checked[part], part), where=part)
    # what is other in the method of one of several tasks is no whole method
    for part in ("task",) if kind is JointTask else NAMED:
        if part not in kind.model_fields or (part == "solver" and checked.get(part) is None):
            continue  # without `solver` the method chooses
        checked[part] = _named(part, checked.get(part))
    return checked


def _named(part: str, value: Any) -> Any:
    """Settings of what is known by its name."""
    kind = NAMED[part]
    if value is None:
        raise ConfigError(f"{part} is required (known: {', '.join(registry.names(kind))})")
    inner = _mapping(value, part)
    if "name" not in inner:
        raise ConfigError(f"{part}.name is required (known: {', '.join(registry.names(kind))})")
    name = inner["name"]
    if not isinstance(name, str):
        raise ConfigError(f"{part}.name: expected text, got {name!r} (known: {', '.join(registry.names(kind))})")
    found = registry.load(kind, name)
    # an outside method is named package.module:Class in the run file and keeps that name there
    settings = found.Config.read({**inner, "name": found.name}, where=part)
    return settings.model_copy(update={"name": name})


def _joint_task(name: str, value: Any) -> JointTask:
    """One of several tasks.

    Raises:
        ConfigError: names the task.
    """
    if not re.fullmatch(r"[\w-][\w.-]{0,79}", name, re.ASCII):
        raise ConfigError(f'tasks: "{name}" names a folder too; use letters, digits, ".", "_" and "-"')
    values = _mapping(value, f"tasks.{name}")
    try:
        if values.get("suite") is not None:
            values = merge(suite(values["suite"]), values)
        return JointTask.read(_checked(values, JointTask), where="")
    except ConfigError as error:
        raise ConfigError(f"tasks.{name}: {error}") from None


def schema() -> dict[str, Any]:
    """The JSON schema of a run on one task, with the settings of every known method, baseline and task."""
    whole = Run.model_json_schema()
    for part, kind in NAMED.items():
        options = [registry.load(kind, name).Config.model_json_schema() for name in registry.names(kind)]
        for option in options:
            whole["$defs"].update(option.pop("$defs", {}))
        whole["properties"][part] = {"oneOf": options}
    whole["required"].remove("method")
    whole["oneOf"] = [{"required": ["method"]}, {"required": ["baseline"]}]
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


def suite(name: Any) -> dict[str, Any]:
    """One prepared task.

    Raises:
        ConfigError: no such suite.
    """
    known = suites()
    if not isinstance(name, str) or name not in known:
        raise ConfigError(f'no suite "{name}"{suggest(str(name), list(known))} (known: {", ".join(known)})')
    return known[name]


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which refuses a name that stands twice in one mapping instead of taking the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As the safe loader does, after a look at the names."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                problem = f'"{key.value}" stands twice in one mapping; keep one of them'
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _parse(text: str) -> Any:
    """YAML as plain values.

    Raises:
        ValueError: one line that says where and what is wrong.
    """
    try:
        # a safe loader: nothing in the text makes code run
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        fix = "; indent with spaces, not tabs" if "'\\t'" in str(error.problem) else ""
        problem = str(error.problem or error.context)
        problem = f"{error.context}, {problem}" if problem.startswith("but ") else problem
        raise ValueError(f"{place}{' '.join(problem.split())}{fix}") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).replace('in "<unicode string>", ', "at ").split())) from None
    except RecursionError:
        raise ValueError("too many brackets within each other") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping.

    Raises:
        ConfigError: missing, not YAML, or not a mapping.
    """
    try:
        content = _parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = suggest(path.name, [item.name for item in path.parent.glob("*.y*ml")]) if path.parent.exists() else ""
        raise ConfigError(f"run file {path} does not exist{near}") from None
    except OSError as error:
        raise ConfigError(f"run file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ConfigError(f"run file {path} holds byte {byte:#04x}, not UTF-8 text; save it as UTF-8") from None
    except ValueError as error:
        raise ConfigError(f"run file {path} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"run file {path} should be a mapping such as 'method: {{name: ept}}'")
    return content


def parse_override(text: str) -> tuple[tuple[str, ...], Any]:
    """`a.b=value` as a path and a value.

    Raises:
        ConfigError: no `=`, an empty step in the path, or the value is not YAML.
    """
    path, equals, value = text.partition("=")
    steps = tuple(step.strip() for step in path.split("."))
    if not equals or not all(steps):
        raise ConfigError(f'--set takes "a.b=value", got "{text}"')
    try:
        return steps, _parse(value)
    except ValueError as error:
        raise ConfigError(f'--set {path}: "{value}" is not YAML ({error})') from None


def override(values: Mapping[str, Any], changes: Sequence[tuple[tuple[str, ...], Any]]) -> dict[str, Any]:
    """Settings with overrides on top; a longer path such as `data.rename.body` changes one entry of a mapping.

    Raises:
        ConfigError: a path leads into something that is no mapping.
    """
    out = dict(values)
    # whole parts and names first: another name clears its part, whatever the order on the command line
    for path, value in sorted(changes, key=lambda one: len(one[0]) > 1 and one[0][1:] != ("name",)):
        if len(path) == 1 or path[1:] == ("name",):
            out = merge(out, {path[0]: value if len(path) == 1 else {"name": value}})
        else:
            out[path[0]] = _changed(out.get(path[0]), path, 1, value)
    return out


def _changed(inside: Any, path: Sequence[str], place: int, value: Any) -> Any:
    """A mapping with the entry at `path[place:]` set."""
    if place == len(path):
        return value
    if isinstance(inside, Settings):
        inside = inside.model_dump()
    if inside is not None and not isinstance(inside, Mapping):
        where = ".".join(path[:place])
        raise ConfigError(f"--set {'.'.join(path)}: {where} is {inside!r} and not a mapping; set {where} itself")
    there = inside or {}
    return {**there, path[place]: _changed(there.get(path[place]), path, place + 1, value)}


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two runs as one, `above` winning setting by setting.

    A setting that is a mapping itself (label words, names of columns) is replaced as a whole: its entries belong
    together. So is a part whose `name` changes.
    """
    out = dict(below)
    for key, value in above.items():
        old = out.get(key)
        if key in (*PARTS, *NAMED) and isinstance(old, Mapping) and isinstance(value, Mapping):
            other = key in NAMED and "name" in value and old.get("name", value["name"]) != value["name"]
            out[key] = dict(value) if other else {**old, **value}
        else:
            out[key] = value
    return out


def _mapping(value: Any, part: str) -> dict[str, Any]:
    if isinstance(value, Settings):
        return value.model_dump()
    if not isinstance(value, Mapping):
        raise ConfigError(f"{part} should be a mapping of settings, got {value!r}")
    return dict(value)
