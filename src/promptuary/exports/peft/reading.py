"""A folder that PEFT saved, as a prompt of ours; nothing in it is run.

Knows no method but prompt tuning and prefix tuning, no task and no training.
"""

from __future__ import annotations

import pickle
import struct
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from promptuary import files, registry
from promptuary.backbones.base import Backbone, BackboneConfig
from promptuary.building import build_method, hold_backbone, open_backbone
from promptuary.errors import ConfigError, FileFormatError
from promptuary.exports.peft.layout import COLUMN_FACTORS, CONFIG, FACTS, PICKLED, ROW_FACTORS, ROWS, TENSORS, read_by
from promptuary.tuned import Tuned


@dataclass(frozen=True)
class Adapter:
    """What a PEFT folder holds.

    `rows`: a table [p, d] in float32 for each task that it was trained on, mostly one; of a prefix [p, n], with n
    numbers for each position. `notes`: what was left out, a
    sentence each. `facts`: what `write` noted, where it made the folder.
    """

    kind: str
    task_type: str | None
    base: str | None
    rows: list[Tensor]
    notes: list[str]
    facts: Mapping[str, Any] | None

    def onto(self, backbone: Backbone, task: int = 0) -> Tuned:
        """Prompt tuning or prefix tuning with these numbers on a base, without a task.

        Raises:
            FingerprintError: `write` made the folder for another base.
            FileFormatError: the width is not the base's, or it is for another kind of model.
            ConfigError: there is no such task.
        """
        if not 0 <= task < len(self.rows):
            raise ConfigError(f"there is no task {task}: the adapter holds {len(self.rows)}, counted from 0")
        if self.facts is not None:
            backbone.check_identity(self.facts["identity"], self.base or "another model")
        families = {"CAUSAL_LM": "causal", "SEQ_2_SEQ_LM": "seq2seq"}
        wanted = families.get(self.task_type or "")
        if wanted is not None and wanted != backbone.name:
            raise FileFormatError(
                f'the adapter is for a {wanted} model ({self.task_type}), "{backbone.config.model}" is {backbone.name}'
            )
        rows = self.rows[task]
        if self.kind in PREFIXES:
            return self._prefix(rows, backbone)
        if rows.shape[1] != backbone.shape.width:
            raise FileFormatError(
                f'the adapter has width {rows.shape[1]}, the embeddings of "{backbone.config.model}" '
                f"{backbone.shape.width}; load it with the base it was trained on ({self.base or 'not named in it'})"
            )
        values = {"name": "prompt_tuning", "num_virtual_tokens": len(rows), "init": "saved"}
        config = registry.load("methods", "prompt_tuning").Config.read(values, where="method")
        tuned = Tuned(backbone, None, build_method(config, backbone.shape))
        return tuned.initialise(torch.Generator(), rows)

    def _prefix(self, flat: Tensor, backbone: Backbone) -> Tuned:
        """Keys and values of every layer, [p, l 2 k e]."""
        shape, length = backbone.shape, len(flat)
        each = 2 * shape.layers * shape.heads * shape.head
        if backbone.missing(frozenset({"kv"})):
            raise FileFormatError(
                f"a prefix needs keys and values, for which {type(backbone.model).__name__} has no place"
            )
        if flat.shape[1] != each:
            raise FileFormatError(
                f'the adapter has {flat.shape[1]} numbers for each position, "{backbone.config.model}" needs {each} '
                f"({shape.layers} layers, {shape.heads} heads of {shape.head}); "
                f"load it with the base it was trained on ({self.base or 'not named in it'})"
            )
        values = {"name": "prefix", "num_virtual_tokens": length, "init": "random"}
        config = registry.load("methods", "prefix").Config.read(values, where="method")
        tuned = Tuned(backbone, None, build_method(config, shape)).initialise(torch.Generator().manual_seed(0))
        kv = flat.view(length, shape.layers, 2, shape.heads, shape.head).permute(1, 2, 3, 0, 4)
        kv = kv[read_by(shape.layers)] if backbone.name == "seq2seq" else kv
        tuned.restore({name: kv.to(value.device) for name, value in tuned.state().items()})
        return tuned


def read(
    folder: str | Path,
    model: Any = None,
    tokenizer: Any = None,
    *,
    backbone: Backbone | None = None,
    task: int | None = None,
) -> Tuned:
    """A prompt that PEFT saved, as prompt tuning or prefix tuning; what is left out is told as warnings.

    Args:
        folder: with `adapter_config.json`, and `adapter_model.safetensors` or `adapter_model.bin`.
        model: a transformers model that you hold, or where one is (folder or hub name); default: the one it names.
        tokenizer: of a model that you hold.
        backbone: instead of a model, one that is open already.
        task: which prompt of a MULTITASK_PROMPT_TUNING adapter that was trained on several tasks.

    Raises:
        FileFormatError: missing, damaged, or not what its config says.
        ConfigError: not a prompt, no base, or one of several tasks must be chosen.
        FingerprintError: `write` made the folder for another base.
    """
    adapter = load(folder)
    if task is None and len(adapter.rows) > 1:
        raise ConfigError(f"the adapter holds a prompt for each of {len(adapter.rows)} tasks; say which: task=0, ...")
    if backbone is None and model is not None and not isinstance(model, str | Path):
        if tokenizer is None:
            raise ConfigError("a model that you hold needs its tokenizer too: read(folder, model, tokenizer)")
        backbone = hold_backbone(model, tokenizer)
    elif backbone is None:
        backbone = base_of(adapter, None if model is None else str(model))
    for note in adapter.notes:
        warnings.warn(note, stacklevel=2)
    return adapter.onto(backbone, task or 0)


def base_of(adapter: Adapter, model: str | None = None, device: str | None = None) -> Backbone:
    """The base that an adapter is for, or another place where it is.

    Raises:
        ConfigError: it names none, or there is none.
    """
    if not (model or adapter.base):
        raise ConfigError("the adapter does not name its base model; give it: model=... (--model)")
    values = {"model": model or adapter.base, "device": device or "auto"}
    return open_backbone(BackboneConfig.read(values, where="backbone"))


def load(folder: str | Path) -> Adapter:
    """Read a PEFT folder. Nothing in it is run, also not in a pickle.

    Raises:
        FileFormatError: missing, damaged, or not what its config says.
        ConfigError: not a prompt, or of a kind that cannot be read here.
    """
    path = Path(folder)
    if not (path / CONFIG).is_file():
        inside = sorted(found.parent.name for found in path.glob(f"*/{CONFIG}")) if path.is_dir() else []
        hint = f"; PEFT keeps adapters with names of their own in folders: {', '.join(inside)}" if inside else ""
        raise FileFormatError(f"{path} holds no {CONFIG}, so it is not a PEFT adapter{hint}")
    config = files.read_json(path / CONFIG)
    kind = config.get("peft_type")
    reader = READERS.get(kind) if isinstance(kind, str) else None
    if reader is None or not isinstance(kind, str):
        raise ConfigError(f"{path} holds a {kind} adapter, which is not a prompt; {', '.join(READERS)} are read")
    for name, kinds in (("task_type", str | None), ("base_model_name_or_path", str | None), (FACTS, dict | None)):
        if not isinstance(config.get(name), kinds):
            raise FileFormatError(f"{path / CONFIG}: {name} should be {kinds}, not {config[name]!r}")
    facts = config.get(FACTS)
    if facts is not None and not (isinstance(facts.get("identity"), dict) and isinstance(facts.get("sha256"), str)):
        raise FileFormatError(f"{path / CONFIG}: {FACTS} is incomplete (identity and sha256 are expected)")
    where = path / (TENSORS if (path / TENSORS).exists() or not (path / PICKLED).exists() else PICKLED)
    tensors = (
        files.read_tensors(where, None if facts is None else facts["sha256"])
        if where.name == TENSORS
        else _read_pickle(where)
    )
    notes: list[str] = []
    rows = reader(Content(where, config, tensors), notes)
    left = sorted(set(tensors) - {ROWS, COLUMN_FACTORS, ROW_FACTORS})
    if left:
        notes.append(f"not imported, set them in your model yourself: {', '.join(left)}")
    return Adapter(kind, config.get("task_type"), config.get("base_model_name_or_path"), rows, notes, facts)


@dataclass(frozen=True)
class Content:
    """The files of an adapter, for a reader of its kind."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def tensor(self, name: str, *shape: int | None) -> Tensor:
        """A tensor in float32; None stands for any size.

        Raises:
            FileFormatError: it is missing or of another shape.
        """
        value = self.tensors.get(name)
        if value is None:
            raise FileFormatError(f'{self.path} has no tensor "{name}" (it has: {", ".join(sorted(self.tensors))})')
        fits = value.dim() == len(shape) and all(
            size > 0 and size == (wanted or size) for size, wanted in zip(value.shape, shape, strict=True)
        )
        if not fits or not value.dtype.is_floating_point:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise FileFormatError(
                f'{self.path}: tensor "{name}" is {value.dtype} {list(value.shape)}, but {CONFIG} asks for [{wanted}]'
            )
        return value.float()

    def number(self, name: str, default: int | None = None) -> int:
        """A positive whole number of the config.

        Raises:
            FileFormatError: it is missing or something else.
        """
        value = self.config.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise FileFormatError(f"{self.path.parent / CONFIG}: {name} should be a positive number, not {value!r}")
        return value


def _halves(content: Content) -> tuple[int, int]:
    """Rows in front of the text, and rows in the file: for an encoder-decoder PEFT keeps twice as many."""
    used = content.number("num_virtual_tokens")
    decodes = content.config.get("task_type") == "SEQ_2_SEQ_LM"
    copies = content.number("num_transformer_submodules", default=2 if decodes else 1)
    if copies > (2 if decodes else 1):
        raise FileFormatError(f"{content.path.parent / CONFIG}: num_transformer_submodules {copies} fits no model")
    return used, used * copies


def _plain(content: Content, notes: list[str]) -> list[Tensor]:
    """Folded rows."""
    used, stored = _halves(content)
    if stored > used:
        notes.append(f"the file holds {stored} rows, of which PEFT reads the first {used}; only those are taken")
    return [content.tensor(ROWS, stored, None)[:used].clone()]


def _multitask(content: Content, notes: list[str]) -> list[Tensor]:
    """P * (u @ v) for each task, as PEFT's MultitaskPromptEmbedding computes it (Wang et al. 2023, equation 1)."""
    used, stored = _halves(content)
    if stored > used:
        raise ConfigError(
            f"{content.path.parent} holds rows that stand in the decoder too, which PEFT reads in forward but not in "
            "generate; only adapters trained with num_transformer_submodules=1 can be imported"
        )
    tasks, rank = content.number("num_tasks", default=1), content.number("num_ranks", default=1)
    shared = content.tensor(ROWS, stored, None)
    columns = content.tensor(COLUMN_FACTORS, tasks, stored, rank)
    rows = content.tensor(ROW_FACTORS, tasks, rank, shared.shape[1])
    return [
        (shared[None] * torch.matmul(columns[task : task + 1], rows[task : task + 1]))[0].clone()
        for task in range(tasks)
    ]


def _layers(content: Content, notes: list[str]) -> list[Tensor]:
    """Keys and values for every layer; PEFT saves them folded."""
    return [content.tensor(ROWS, content.number("num_virtual_tokens"), None).clone()]


PREFIXES = frozenset({"PREFIX_TUNING", "CARTRIDGE"})
"""Kinds that are keys and values."""

READERS: Mapping[str, Callable[[Content, list[str]], list[Tensor]]] = {
    "PROMPT_TUNING": _plain,
    "P_TUNING": _plain,
    "CPT": _plain,
    "MULTITASK_PROMPT_TUNING": _multitask,
    "PREFIX_TUNING": _layers,
    "CARTRIDGE": _layers,
}
"""PEFT's kinds of prompts, and what reads them."""


DAMAGED = (
    RuntimeError, ValueError, OSError, EOFError, LookupError, TypeError, AttributeError, AssertionError,
    OverflowError, MemoryError, struct.error,
)  # fmt: skip
"""What torch.load raises on changed bytes, besides pickle.UnpicklingError."""


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """Tensors of an old `adapter_model.bin`, without running anything that it asks for."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise FileFormatError(
            f"{path} is damaged, or a pickle that wants to run code, which is refused; "
            "save it again with PEFT as safetensors"
        ) from None
    except DAMAGED:
        raise FileFormatError(f"{path} is damaged: it is not a file of tensors") from None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise FileFormatError(f"{path} should hold a mapping of names to tensors")
    bad = [name for name, value in found.items() if value.dtype.is_floating_point and not bool(value.isfinite().all())]
    if bad:
        raise FileFormatError(f'{path}: tensor "{bad[0]}" holds values that are not finite')
    return {str(name): value for name, value in found.items()}
