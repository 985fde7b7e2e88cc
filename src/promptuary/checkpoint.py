"""The prompt as a folder: safetensors, JSON and a card; and the full state of a training run.

Knows no command line and no training loop; never loads anything but safetensors and JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import promptuary
from promptuary import files, registry
from promptuary.backbones.base import Backbone, BackboneConfig
from promptuary.errors import ConfigError, FileFormatError, NotFoldable
from promptuary.settings import Settings
from promptuary.tuned import Tuned, build_method, open_backbone
from promptuary.types import Prompt, Shape

FORMAT, VERSION = "promptuary-prompt", 1
TENSORS, FOLDED, FACTS, CARD = "prompt.safetensors", "folded.safetensors", "prompt.json", "README.md"


def save_prompt(tuned: Tuned, folder: str | Path, *, metrics: Mapping[str, float] | None = None) -> Path:
    """Write a prompt folder: everything that is needed to use the prompt on its base again.

    Args:
        tuned: with a method.
        folder: replaced as a whole if it exists.
        metrics: scores to state in the card.

    Raises:
        FileFormatError: a tensor is not finite; nothing is written.
    """
    method = tuned.method
    if method is None:
        raise NotFoldable("there is no prompt to save: this is the frozen model alone")
    state = tuned.state()
    bad = [name for name, value in state.items() if not bool(value.isfinite().all())]
    if bad:
        raise FileFormatError(f"not saved: {bad[0]} holds values that are not finite")
    contents = {TENSORS: files.tensor_bytes(state)}
    folded = _folded(tuned)
    if folded is not None:
        contents[FOLDED] = files.tensor_bytes(folded)
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "promptuary": promptuary.__version__,
        "method": method.name,
        "method_config": {**method.config.model_dump(mode="json"), "name": method.name},
        "task": {**tuned.task.settled().model_dump(mode="json"), "name": tuned.task.name},
        "backbone": tuned.backbone.config.model_dump(mode="json"),
        "identity": tuned.backbone.identity,
        "width": tuned.backbone.shape.width,
        "max_length": tuned.max_length,
        "sites": sorted(method.sites),
        "added_tokens": tuned.added_tokens,
        "trainable_parameters": tuned.trainable_parameters,
        "metrics": dict(metrics or {}),
        "sha256": {name: files.digest(content) for name, content in contents.items()},
    }
    files.write_folder(Path(folder), {**contents, FACTS: files.to_json(facts), CARD: _card(tuned, facts).encode()})
    return Path(folder)


def load_prompt(
    folder: str | Path, backbone: Backbone | None = None, *, model: str | None = None, device: str | None = None
) -> Tuned:
    """Load a prompt onto its base.

    Args:
        folder: a prompt folder, or a run folder that holds one.
        backbone: a base that is in memory already; without it the base is loaded by the name that was saved.
        model: another place where the same base is (a folder, a hub name).
        device: another device than it was trained on.

    Raises:
        FileFormatError: missing, damaged or of an unknown version.
        FingerprintError: the base is not the one that the prompt was trained on.
        ConfigError: the base cannot be loaded, or the method is not installed.
    """
    path = find_prompt(folder)
    facts = read_facts(path)
    tensors = files.read_tensors(path / TENSORS, facts["sha256"].get(TENSORS))
    if backbone is None:
        changes = {key: value for key, value in (("model", model), ("device", device)) if value is not None}
        # whoever made the file does not decide that code of the base is run
        values = {**facts["backbone"], "device": "auto", "trust_remote_code": False, **changes}
        backbone = open_backbone(_settings(path, BackboneConfig, values, "backbone"))
    backbone.check_identity(facts["identity"], facts["backbone"]["model"])
    task_class = registry.load("tasks", facts["task"]["name"])
    task = task_class(_settings(path, task_class.Config, facts["task"], "task"))
    method_class = registry.load("methods", facts["method"])
    method = build_method(_settings(path, method_class.Config, facts["method_config"], "method"), Shape(facts["width"]))
    tuned = Tuned(backbone, task, method, max_length=facts["max_length"])
    expected = {name: tuple(value.shape) for name, value in tuned.state().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if expected != found:
        raise FileFormatError(f"{path / TENSORS} holds {found}, but method {facts['method']} needs {expected}")
    tuned.restore(tensors)
    return tuned


def load_rows(folder: str | Path, backbone: Backbone) -> Tensor:
    """The folded rows of a saved prompt, [p, d], for starting another one from.

    Raises:
        NotFoldable: it is not a static table of rows.
    """
    tuned = load_prompt(folder, backbone)
    assert tuned.method is not None
    return tuned.method.fold().as_rows().cpu()


def find_prompt(folder: str | Path) -> Path:
    """The prompt folder itself, given it or the run folder around it.

    Raises:
        FileFormatError: neither.
    """
    path = Path(folder)
    for candidate in (path, path / "prompt"):
        if (candidate / FACTS).is_file():
            return candidate
    raise FileFormatError(f"{path} holds no prompt (expected {FACTS} in it or in its folder prompt/)")


def read_facts(path: Path) -> dict[str, Any]:
    """`prompt.json`, checked.

    Raises:
        FileFormatError: another format, an unknown version, or a part is missing.
    """
    facts = files.read_json(path / FACTS)
    if facts.get("format") != FORMAT:
        raise FileFormatError(f"{path / FACTS} is not a prompt of this project (format {facts.get('format')!r})")
    if facts.get("version") != VERSION:
        raise FileFormatError(
            f"{path / FACTS} has format version {facts.get('version')!r}, this release reads {VERSION}; "
            "upgrade promptuary"
        )
    kinds = {
        "method": str, "method_config": dict, "task": dict, "backbone": dict, "identity": dict, "width": int,
        "max_length": int, "sha256": dict,
    }  # fmt: skip
    wrong = [name for name, kind in kinds.items() if not isinstance(facts.get(name), kind)]
    inside = (("task", "name"), ("backbone", "model"), ("sha256", TENSORS))
    wrong += [
        f"{name}.{key}" for name, key in inside if name not in wrong and not isinstance(facts[name].get(key), str)
    ]
    if wrong:
        raise FileFormatError(f"{path / FACTS} is incomplete: {', '.join(wrong)} missing or of the wrong kind")
    for name in (facts["method"], facts["task"]["name"]):
        if ":" in name:
            raise FileFormatError(f'{path / FACTS} names a module to import, "{name}", which a prompt must not')
    return facts


def _settings(path: Path, kind: type[Settings], values: Mapping[str, Any], where: str) -> Any:
    """Settings from `prompt.json`; what is wrong with them is wrong with the file."""
    try:
        return kind.read(values, where=where)
    except ConfigError as error:
        raise FileFormatError(f"{path / FACTS}: {error}; was it saved by a newer promptuary?") from None


def _folded(tuned: Tuned) -> dict[str, Tensor] | None:
    """The static form, or None where the prompt depends on the input."""
    assert tuned.method is not None
    try:
        prompt: Prompt = tuned.method.fold()
    except NotFoldable:
        return None
    parts: dict[str, Tensor] = {}
    if prompt.rows is not None:
        parts["rows"] = prompt.rows[0]
    if prompt.offset is not None:
        parts["offset.left"], parts["offset.right"] = prompt.offset.left, prompt.offset.right
    return {name: value.detach().to("cpu", torch.float32).clone() for name, value in parts.items()}


def _card(tuned: Tuned, facts: Mapping[str, Any]) -> str:
    """A model card in the hub's format."""
    method, base = tuned.method, facts["backbone"]["model"]
    assert method is not None
    scores = "".join(f"- {name}: {value:.4f}\n" for name, value in facts["metrics"].items()) or "- none recorded\n"
    labels = "".join(f"- `{one}`\n" for one in tuned.task.words) or "- none\n"
    note = "\nThe method was reconstructed from partial sources; see its card.\n" if method.reconstructed else ""
    hub = "" if base.startswith(("pip:", "/", ".", "~")) else f"base_model: {base}\n"
    return f"""---
library_name: promptuary
{hub}tags:
- prompt
- {method.name}
---

# {method.title} prompt for {base}

{method.title} ({method.paper}), {facts["trainable_parameters"]:,} trained numbers,
{facts["added_tokens"]} added positions.
The base model is unchanged and is not in this folder.
{note}
Template: `{tuned.task.template.text}`

Answers:

{labels}
Scores:

{scores}
## Use

```python
import promptuary

tuned = promptuary.load_prompt("this/folder")
tuned.predict(["..."])
```

Made with promptuary {facts["promptuary"]}.
"""
