"""The weights that a baseline trained, as a folder: safetensors, JSON and a card; and loading whatever was saved.

Knows no baseline by name, no training loop and no command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import promptuary
from promptuary import checkpoint, files, registry
from promptuary.backbones.base import BackboneConfig
from promptuary.building import open_backbone
from promptuary.errors import ConfigError, FileFormatError
from promptuary.saved import same_sizes, settings_of
from promptuary.tuned import Tuned

FOLDER, FORMAT, VERSION = "weights", "promptuary-weights", 1
TENSORS, FACTS, CARD = "weights.safetensors", "weights.json", "README.md"


def save_weights(tuned: Tuned, folder: str | Path, *, metrics: Mapping[str, float] | None = None) -> Path:
    """Write what a baseline trained, the task's head included.

    Args:
        tuned: with a baseline.
        folder: replaced as a whole.
        metrics: scores to state in the card.

    Raises:
        FileFormatError: a tensor is not finite; nothing is written.
        StorageError: it cannot be written; older weights are still there.
    """
    baseline, task, state = tuned.baseline, tuned.task, tuned.state()
    assert baseline is not None
    bad = next((name for name, value in state.items() if not bool(value.isfinite().all())), None)
    if bad is not None:
        raise FileFormatError(f"not saved: {bad} holds values that are not finite")
    contents = {TENSORS: files.tensor_bytes(state), **baseline.companions()}
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "promptuary": promptuary.__version__,
        "baseline": {**baseline.config.model_dump(mode="json"), "name": baseline.name},
        "task": {**task.settled().model_dump(mode="json"), "name": task.name},
        "backbone": tuned.backbone.config.model_dump(mode="json"),
        "identity": tuned.backbone.identity,
        "max_length": tuned.max_length,
        "trainable_parameters": tuned.trainable_parameters,
        "metrics": dict(metrics or {}),
        "sha256": {name: files.digest(content) for name, content in contents.items()},
    }
    about = {FACTS: files.to_json(files.sealed(facts)), CARD: _card(tuned, facts).encode()}
    files.write_folder(Path(folder), {**contents, **about})
    return Path(folder)


def find_weights(folder: str | Path) -> Path | None:
    """The folder itself, given it or the run folder around it; None where there are no weights of a baseline."""
    around = (Path(folder), Path(folder) / FOLDER)
    return next((one for one in map(files.standing, around) if (one / FACTS).is_file()), None)


def load_baseline(folder: str | Path, *, model: str | Path | None = None, device: str | None = None) -> Tuned:
    """Load the base of a baseline and put its weights into it.

    Args:
        folder: the weights folder, or the run folder around it.
        model: another place where the same base is (a folder, a hub name).
        device: another device than it was trained on.

    Raises:
        FileFormatError: missing, damaged or of an unknown version.
        FingerprintError: the base is not the one that was trained.
        ConfigError: the base cannot be loaded, or the baseline is not installed.
    """
    path = find_weights(folder)
    if path is None:
        raise FileFormatError(f"{folder} holds no weights of a baseline (expected {FACTS} in it or in {FOLDER}/)")
    facts = _facts(path)
    changes = {name: value for name, value in (("model", model and str(model)), ("device", device)) if value}
    # whoever made the file does not decide that code of the base is run
    given = {**facts["backbone"], "device": "auto", "trust_remote_code": False, **changes}
    backbone = open_backbone(settings_of(path / FACTS, BackboneConfig, given, "backbone"))
    backbone.check_identity(facts["identity"], facts["backbone"]["model"])
    task_class, kind = (registry.known(f"{part}s", facts[part]["name"]) for part in ("task", "baseline"))
    task = task_class(settings_of(path / FACTS, task_class.Config, facts["task"], "task"))
    baseline = kind(settings_of(path / FACTS, kind.Config, facts["baseline"], "baseline"))
    tuned = Tuned(backbone, task, baseline=baseline, max_length=facts["max_length"])
    tuned.initialise(torch.Generator().manual_seed(0))
    restore(tuned, path, facts)
    return tuned


def restore(tuned: Tuned, path: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Put saved weights into the baseline that they were trained by.

    Raises:
        FileFormatError: damaged, or they are not its tensors.
    """
    facts = _facts(path) if facts is None else facts
    state = tuned.state()
    most = sum(value.nbytes for value in state.values()) + files.TENSOR_ROOM
    tensors = files.read_tensors(path / TENSORS, facts["sha256"][TENSORS], limit=most)
    assert tuned.baseline is not None
    same_sizes(path / TENSORS, f"baseline {tuned.baseline.name}", state, tensors)
    tuned.restore(tensors)
    tuned.train(False)


def find_saved(folder: str | Path) -> Path:
    """The folder in which stands what a run left behind: a prompt, or the weights of a baseline.

    Raises:
        PromptuaryError: as `find_prompt`.
    """
    return find_weights(folder) or checkpoint.find_prompt(folder)


def load_saved(
    folder: Path, *, model: str | Path | None = None, device: str | None = None, other: str | None = None
) -> Tuned:
    """What stands in such a folder.

    Args:
        folder: as `find_saved` gives it.
        model: another place where the same base is.
        device: another device.
        other: another base, to which a prompt of words is carried.

    Raises:
        PromptuaryError: as `load_prompt` and `load_baseline`.
        ConfigError: both a place of the base and another one are given.
    """
    if other is not None and model is not None:
        raise ConfigError("--model says where the base is, --backbone carries words to another one; give one of them")
    if find_weights(folder) is None:
        return checkpoint.load_prompt(folder, model=other or model, device=device, carry=other is not None)
    return load_baseline(folder, model=other or model, device=device)


def _facts(path: Path) -> dict[str, Any]:
    """`weights.json`, checked."""
    facts = files.read_json(path / FACTS)
    if facts.get("format") != FORMAT or facts.get("version") != VERSION:
        raise FileFormatError(
            f"{path / FACTS} is of format {str(facts.get('format'))[:80]!r}, version {str(facts.get('version'))[:80]}; "
            f"this release reads {FORMAT!r}, version {VERSION}"
        )
    files.check_seal(path / FACTS, facts)
    return facts


def _card(tuned: Tuned, facts: Mapping[str, Any]) -> str:
    baseline = tuned.baseline
    assert baseline is not None
    scores = "\n".join(f"- {metric}: {value:.4f}" for metric, value in facts["metrics"].items())
    others = "".join(f"- `{name}`\n" for name in facts["sha256"] if name != TENSORS)
    peft = f"\nBeside them, as other libraries read it:\n\n{others}" if others else ""
    return f"""# {baseline.title} of {facts["backbone"]["model"]}

{baseline.title} ({baseline.paper}), a baseline: {facts["trainable_parameters"]:,} trained numbers, which fit this base
only.

```python
import promptuary

tuned = promptuary.load_baseline("this/folder")
tuned.predict([...])
```
{peft}
## Scores

{scores or "- none recorded"}
"""
