"""The prompt as a folder: safetensors, JSON and a card; and the full state of a training run.

Knows no command line and no training loop; never loads anything but safetensors and JSON.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import promptuary
from promptuary import card, files, registry
from promptuary.backbones.base import Backbone, BackboneConfig
from promptuary.building import build_method, hold_backbone, open_backbone, prompts_of, shape_of
from promptuary.errors import ConfigError, FileFormatError, HubError, NotFoldable, StorageError
from promptuary.methods.base import Method, MethodConfig
from promptuary.saved import same_sizes, settings_of
from promptuary.tuned import TEXT, Tuned, text_state
from promptuary.types import Prompt, Shape

FORMAT, VERSION = "promptuary-prompt", 3
READABLE = (1, 2, VERSION)
"""Versions that can be read. Version 1 has no `checksum`; before 3 there are no constants."""

TENSORS, CONSTANTS, FOLDED = "prompt.safetensors", "constants.safetensors", "folded.safetensors"
FACTS, CARD = "prompt.json", "README.md"

IDENTITY = ("architecture", "embedding", "vectors", "tokenizer")
"""What every prompt knows of its base; `matrices` is missing where the base was quantised."""

OR_CARRIED, ONLY_WORDS = ", or try its words here: --backbone, or carry=True", "; only words can be carried to another"


def save_prompt(
    tuned: Tuned,
    folder: str | Path,
    *,
    metrics: Mapping[str, float] | None = None,
    data: Mapping[str, Any] | None = None,
) -> Path:
    """Write a prompt folder: everything that is needed to use the prompt on its base again.

    Args:
        tuned: with a method.
        folder: replaced as a whole if there is a prompt in it.
        metrics: scores to state in the card.
        data: what it was trained on, for the card: `source`, and `subset`, `revision` and `examples` where known.

    Raises:
        FileFormatError: a tensor is not finite; nothing is written.
        ConfigError: something else is there already; nothing is written.
        StorageError: it cannot be written; an older prompt is still there.
    """
    there = Path(folder)
    above = next((one for one in there.absolute().parents if one.exists()), there)
    if not above.is_dir():
        raise ConfigError(f"{there} cannot be written: {above} is no folder; choose another place")
    if there.exists() and not (there / FACTS).is_file() and not (there.is_dir() and not any(there.iterdir())):
        raise ConfigError(f"{there} exists and holds no prompt, so it is not replaced; choose another folder")
    _check_room(there)
    method = tuned.method
    if method is None:
        raise NotFoldable("there is no prompt to save: this is the frozen model alone")
    state = {name: value for name, value in tuned.state().items() if name != TEXT}
    constants = {f"method.{name}": value.cpu().clone() for name, value in method.constants(drawn=False).items()}
    bad = [name for name, value in {**state, **constants}.items() if not bool(value.isfinite().all())]
    if bad:
        raise FileFormatError(f"not saved: {bad[0]} holds values that are not finite")
    contents = {TENSORS: files.tensor_bytes(state)}
    if constants:
        contents[CONSTANTS] = files.tensor_bytes(constants)
    drawn = method.constants(drawn=True)
    folded = _folded(tuned)
    if folded is not None:
        contents[FOLDED] = files.tensor_bytes(folded)
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "promptuary": promptuary.__version__,
        "method": method.name,
        "method_config": {**method.config.model_dump(mode="json"), "name": method.name},
        "task": {**tuned.task.settled().model_dump(mode="json"), "name": tuned.task.name} if tuned.has_task else None,
        "backbone": tuned.backbone.config.model_dump(mode="json"),
        "identity": tuned.backbone.identity,
        "width": tuned.backbone.shape.width,
        "max_length": tuned.max_length,
        "sites": sorted(method.sites),
        "added_tokens": tuned.added_tokens,
        **({} if method.text is None else {"text": method.text}),
        "trainable_parameters": tuned.trainable_parameters,
        "constants": sum(value.numel() for value in constants.values()),
        "drawn": {"seed": method.draw_seed, "sha256": files.digest_of(drawn)} if drawn else None,
        "metrics": dict(metrics or {}),
        "data": None if data is None else card.source(data),
        "sha256": {name: files.digest(content) for name, content in contents.items()},
    }
    body = files.to_json(files.sealed(facts))
    if len(body) > files.JSON_LIMIT:
        raise FileFormatError(
            f"not saved: {FACTS} would have {len(body):,} bytes, at most {files.JSON_LIMIT:,} are read"
        )
    files.write_folder(Path(folder), {**contents, FACTS: body, CARD: card.write(tuned, facts).encode()})
    return Path(folder)


def load_prompt(
    folder: str | Path,
    backbone: Backbone | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    device: str | None = None,
    carry: bool = False,
) -> Tuned:
    """Load a prompt onto its base, or carry one of words to another.

    Args:
        folder: a prompt folder, a run folder that holds one, or a hub name: "user/name" or "user/name@revision".
        backbone: a base that is in memory already; without it the base is loaded by the name that was saved.
        model: another place where the same base is (a folder, a hub name), or a transformers model that you hold.
        tokenizer: of a model that you hold.
        device: another device than it was trained on.
        carry: the base may be another one than the prompt was made with, of any family; words alone allow that.

    Raises:
        FileFormatError: missing, damaged or of an unknown version.
        HubError: it is no folder here and cannot be had from the hub.
        FingerprintError: the base is not the one that the prompt was trained on.
        ConfigError: the base cannot be loaded, or the method is not installed.
    """
    path, facts, tensors, constants = _read(folder)
    if backbone is not None and not isinstance(backbone, Backbone):
        kind = type(backbone).__name__
        raise ConfigError(f"backbone should be a loaded Backbone, got {kind}; names and models go into model=")
    if backbone is None and model is not None and not isinstance(model, str | Path):
        if tokenizer is None:
            raise ConfigError("a model that you hold needs its tokenizer too: load_prompt(folder, model=, tokenizer=)")
        backbone = hold_backbone(model, tokenizer, family=facts["backbone"].get("family", "auto"))
    elif backbone is None:
        changes = {
            key: value for key, value in (("model", model and str(model)), ("device", device)) if value is not None
        }
        # whoever made the file does not decide that code of the base is run
        known = {} if carry and "model" in changes and facts.get("text") is not None else facts["backbone"]
        values = {**known, "device": "auto", "trust_remote_code": False, **changes}
        backbone = open_backbone(settings_of(path / FACTS, BackboneConfig, values, "backbone"))
    words = facts.get("text") is not None
    if not (carry and words):
        besides = OR_CARRIED if words else ONLY_WORDS if carry else ""
        backbone.check_identity(facts["identity"], facts["backbone"]["model"], besides)
    task = None
    if facts["task"] is not None:
        task_class = registry.known("tasks", facts["task"]["name"])
        task = task_class(settings_of(path / FACTS, task_class.Config, facts["task"], "task"))
    method_class = registry.known("methods", facts["method"])
    # sizes were settled when it was saved
    values = {**facts["method_config"], "match_length": None}
    config = settings_of(path / FACTS, method_class.Config, values, "method")
    held = sum(value.numel() for name, value in tensors.items() if name.startswith("method."))
    shape = shape_of(backbone, task)
    needed = method_class.count(config, shape)
    # before anything is built, so that a number in a file cannot ask for more memory than the file has
    if needed != held or (facts["width"] != backbone.shape.width and not carry):
        raise FileFormatError(
            f"{path / TENSORS} holds {held} numbers, but method {facts['method']} as {FACTS} describes it needs "
            f"{needed if needed < 2**40 else 'far more'} on embeddings of width {backbone.shape.width}"
        )
    method = _built(path, facts, config, shape, constants)
    tuned = Tuned(backbone, task, method, max_length=facts["max_length"])
    if (method.text is None) != (facts.get("text") is None):
        raise FileFormatError(f"{path / FACTS}: method {facts['method']} and its text do not belong together")
    own = {name: value for name, value in tuned.state().items() if name != TEXT}
    same_sizes(path / TENSORS, f"method {facts['method']}", own, tensors)
    tuned.restore({**tensors, **text_state(facts.get("text"))})
    return tuned


def _built(
    path: Path, facts: Mapping[str, Any], config: MethodConfig, shape: Shape, constants: Mapping[str, Tensor]
) -> Method:
    """The method with its constants, those of the file and those that are drawn again."""
    try:
        with torch.device("meta"):  # sizes without memory
            asked = sum(value.numel() for value in build_method(config, shape).constants(drawn=False).values())
    except ConfigError as error:
        raise FileFormatError(f"{path / FACTS}: {error}") from None
    held = sum(value.numel() for value in constants.values())
    if asked != held:
        raise FileFormatError(
            f"{path / CONSTANTS} holds {held} numbers, but method {facts['method']} as {FACTS} describes it needs "
            f"{asked}"
        )
    method = build_method(config, shape)
    copied = {f"method.{name}": value for name, value in method.constants(drawn=False).items()}
    same_sizes(path / CONSTANTS, f"method {facts['method']}", copied, constants)
    for name, value in copied.items():
        value.copy_(constants[name])
    drawn = facts.get("drawn") or {"seed": 0, "sha256": ""}
    if files.digest_of(method.redraw(drawn["seed"]).constants(drawn=True)) != drawn["sha256"]:
        raise FileFormatError(
            f"{path}: the numbers that are drawn from the prompt's seed are not those that it was trained with; save "
            f"it again where it was trained, with the same release of torch, or use its folded form ({FOLDED})"
        )
    return method


def find_prompt(folder: str | Path) -> Path:
    """The prompt folder itself, given it, the run folder around it, or a hub name; that is pulled into the cache.

    Raises:
        FileFormatError: neither, or what was pulled is damaged.
        HubError: it reads as a hub name and cannot be had from the hub.
    """
    # the hub's files are checked with this module
    from promptuary import hub

    if not isinstance(folder, str | Path):
        raise FileFormatError(f"expected the path of a prompt folder, got {type(folder).__name__}")
    name = Path(folder).as_posix()
    if os.path.exists(folder) or not hub.is_name(name):
        return find_local(folder)
    repo, _, revision = name.partition("@")
    try:
        return hub.pull_prompt(repo, revision=revision or None)
    except HubError as error:
        raise HubError(f"there is no folder {name} here, and {error}") from None


def find_local(folder: str | Path) -> Path:
    """The prompt folder itself, given it or the run folder around it.

    Raises:
        FileFormatError: neither.
    """
    if not isinstance(folder, str | Path):
        raise FileFormatError(f"expected the path of a prompt folder, got {type(folder).__name__}")
    path = Path(folder)
    try:
        for wait in (0.0, 0.002, 0.01, 0.05):
            # the folder may have been moved aside between two looks at it, by a process that is replacing it
            time.sleep(wait)
            found = _standing(path)
            if found is not None:
                return found
    except OSError as error:
        raise FileFormatError(f"{path} cannot be read: {error.strerror}") from None
    several = prompts_of(path)
    if several:
        raise FileFormatError(f"{path} holds the prompts of several tasks; name one: {', '.join(map(str, several))}")
    if any((one / "weights.json").is_file() for one in (path, path / "weights")):
        raise FileFormatError(
            f"{path} holds the weights of a baseline and no prompt: only evaluate and predict take it"
        )
    raise FileFormatError(f"{path} holds no prompt (expected {FACTS} in it or in its folder prompt/)")


def _standing(path: Path) -> Path | None:
    """The prompt folder, or the one in it, as it stands now."""
    inside = path / "prompt"
    for candidate in (path, inside):
        standing = files.standing(candidate)
        if os.path.lexists(standing / FACTS):
            if candidate is inside and standing.is_symlink():
                raise FileFormatError(f"{inside} is a link; name the folder that it leads to")
            return standing
    return None


def _read(folder: str | Path) -> tuple[Path, dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Facts, tensors and constants of one and the same prompt, also while another process is replacing it."""
    while True:
        path = find_prompt(folder)
        mark = _mark(path)
        try:
            facts = read_facts(path)
            held = {TENSORS: facts["trainable_parameters"], CONSTANTS: facts.get("constants", 0)}
            tensors, constants = (
                files.read_tensors(path / name, facts["sha256"][name], limit=4 * numbers + files.TENSOR_ROOM)
                if numbers
                else {}
                for name, numbers in held.items()
            )
            return path, facts, tensors, constants
        except FileFormatError:
            if _mark(find_prompt(folder)) == mark:
                raise


def _mark(path: Path) -> tuple[int, int] | None:
    """What tells a folder from the one that takes its place."""
    try:
        found = path.stat()
    except OSError:
        return None
    # a number may be given again
    return found.st_ino, found.st_ctime_ns


def read_facts(path: Path) -> dict[str, Any]:
    """`prompt.json`, checked.

    Raises:
        FileFormatError: another format, an unknown version, damaged, or a part is missing.
    """
    facts = files.read_json(path / FACTS)
    if facts.get("format") != FORMAT:
        raise FileFormatError(f"{path / FACTS} is not a prompt of this project (format {_short(facts.get('format'))})")
    version = facts.get("version")
    if type(version) is not int or version not in READABLE:
        raise FileFormatError(
            f"{path / FACTS} has format version {_short(version)}, this release reads {READABLE[0]} to {VERSION}; "
            "upgrade promptuary"
        )
    if version > 1 or "checksum" in facts:
        files.check_seal(path / FACTS, facts)
    kinds = {
        "method": str, "method_config": dict, "backbone": dict, "identity": dict, "width": int,
        "max_length": int, "trainable_parameters": int, "sha256": dict,
    }  # fmt: skip
    if version >= 3:
        kinds |= {"constants": int, "drawn": dict} if facts.get("drawn") is not None else {"constants": int}
    # a bool is an int to isinstance
    wrong = [name for name, kind in kinds.items() if type(facts.get(name)) is not kind]
    if "task" not in facts or type(facts["task"]) not in (dict, type(None)):
        wrong.append("task")
    # words have no trained numbers
    least = {"width": 1, "max_length": 1, "trainable_parameters": 0 if "text" in facts else 1}
    wrong += [name for name in least if name not in wrong and not least[name] <= facts[name] < 2**40]
    if not isinstance(facts.get("text", ""), str):
        wrong.append("text")
    if "constants" not in wrong and not 0 <= facts.get("constants", 0) < 2**40:
        wrong.append("constants")
    if "drawn" not in wrong and facts.get("drawn") is not None:
        seed, mark = facts["drawn"].get("seed"), facts["drawn"].get("sha256")
        if type(seed) is not int or not 0 <= seed < 2**63 or not isinstance(mark, str):
            wrong.append("drawn")
    inside = (("task", "name"), ("backbone", "model"), ("sha256", TENSORS), *(("identity", key) for key in IDENTITY))
    if facts.get("constants"):
        inside = (*inside, ("sha256", CONSTANTS))
    if "identity" not in wrong and "matrices" in facts["identity"]:
        inside = (*inside, ("identity", "matrices"))
    wrong += [
        f"{name}.{key}"
        for name, key in inside
        if name not in wrong and facts[name] is not None and not isinstance(facts[name].get(key), str)
    ]
    if wrong:
        raise FileFormatError(f"{path / FACTS} is incomplete: {', '.join(wrong)} missing or of the wrong kind")
    for name in (facts["method"], *(() if facts["task"] is None else (facts["task"]["name"],))):
        if not re.fullmatch(r"[\w.-]{1,80}", name, re.ASCII):
            raise FileFormatError(
                f"{path / FACTS} names a method or task {_short(name)}; a prompt may only hold a name that is known "
                "already, never a module to import"
            )
    return facts


def _check_room(folder: Path) -> None:
    """Refuse to replace a folder that holds more than a prompt."""
    known = {TENSORS, CONSTANTS, FOLDED, FACTS, CARD}
    try:
        names = {item.name for item in folder.iterdir()} if folder.is_dir() else set()
    except OSError as error:
        raise StorageError(f"{folder} cannot be read: {error.strerror}") from error
    other = min(names - known, default=CARD if names == {CARD} else None)
    if other is not None:
        raise ConfigError(f'not saved: {folder} holds other things ("{other}"); choose a folder of the prompt\'s own')


def _short(value: Any) -> str:
    """Anything from a file, in one short line."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _folded(tuned: Tuned) -> dict[str, Tensor] | None:
    """The static form, or None where the prompt depends on the input."""
    assert tuned.method is not None
    try:
        prompt: Prompt = tuned.method.fold()
    except NotFoldable:
        return None
    # there is one set of each for all inputs, but for contexts and norms, which have none for inputs
    whole = {"context": prompt.context, "norms": prompt.norms}
    whole |= {name: getattr(prompt, name)[0] for name in ("rows", "kv", "layers") if getattr(prompt, name) is not None}
    parts = {name: value for name, value in whole.items() if value is not None}
    if prompt.offset is not None:
        parts["offset.left"], parts["offset.right"] = prompt.offset.left, prompt.offset.right
    return {name: value.detach().to("cpu", torch.float32).clone() for name, value in parts.items()}
