"""A prompt as a folder that PEFT loads.

Knows no method by name: rows become PROMPT_TUNING, keys and values PREFIX_TUNING.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

import promptuary
from promptuary import files
from promptuary.backbones.base import Backbone
from promptuary.errors import ConfigError, FileFormatError, NotFoldable
from promptuary.exports.peft.layout import CONFIG, FACTS, PEFT_VERSION, ROWS, TENSORS, read_by
from promptuary.tuned import Tuned
from promptuary.types import Prompt


def write(tuned: Tuned, folder: str | Path) -> Path:
    """Write a prompt as a folder that `peft.PeftModel.from_pretrained(model, folder)` loads.

    Rows become PROMPT_TUNING, keys and values PREFIX_TUNING.

    Args:
        tuned: with a method that folds to static rows in front of the text, or to keys and values.
        folder: must be new, empty, or an earlier export.

    Raises:
        NotFoldable: PEFT has no place for the prompt; the message says for which part of it.
        FileFormatError: a value is not finite.
        ConfigError: the folder holds something else.
    """
    path = Path(folder)
    prompt, kind = _static(tuned), _task_type(tuned.backbone)
    if prompt.kv is None:
        rows = prompt.as_rows().detach().to("cpu", torch.float32).contiguous()
    else:
        # [1, l, 2, k, p, e] as PEFT lays it out: positions first, then layers, keys and values, heads
        kv = prompt.kv[0].detach().to("cpu", torch.float32)
        kv = _as_peft_reads(kv) if tuned.backbone.name == "seq2seq" else kv
        rows = kv.permute(3, 0, 1, 2, 4).flatten(1).contiguous()
    if not bool(rows.isfinite().all()):
        raise FileFormatError("not written: the prompt holds values that are not finite")
    _check_replaceable(path)
    content = safetensors.torch.save({ROWS: rows}, metadata={"format": "pt"})
    config = {**_config(tuned, rows, kind, files.digest(content)), **_prefix_config(tuned, prompt)}
    card = _card(tuned, prompt, kind).encode()
    files.write_folder(path, {CONFIG: files.to_json(config), TENSORS: content, "README.md": card})
    return path


def _as_peft_reads(kv: Tensor) -> Tensor:
    """Layers stored so that each layer of the decoder gets its own.

    Raises:
        NotFoldable: PEFT would give the same to two layers that differ, as it does where their number is even.
    """
    stored, filled = torch.zeros_like(kv), set[int]()
    for layer, place in enumerate(read_by(len(kv))):
        if place in filled and not torch.equal(stored[place], kv[layer]):
            raise NotFoldable(
                f"PEFT gives layer i of a decoder behind an encoder the keys and values of layer 2i mod {len(kv)}, so "
                f"with {len(kv)} layers it cannot hold a prefix whose layers differ; use prompt_tuning for PEFT"
            )
        stored[place] = kv[layer]
        filled.add(place)
    return stored


def _prefix_config(tuned: Tuned, prompt: Prompt) -> dict[str, Any]:
    """What a PREFIX_TUNING folder says otherwise."""
    if prompt.kv is None:
        return {}
    _, layers, _, heads, length, head = prompt.kv.shape
    return {
        "peft_type": "PREFIX_TUNING",
        "num_layers": layers,
        "num_attention_heads": heads,
        "token_dim": heads * head,
        "num_virtual_tokens": length,
        # PEFT doubles the tensor for an encoder-decoder and lets the decoder's self-attention take the first half
        "num_transformer_submodules": 2 if tuned.backbone.name == "seq2seq" else 1,
        "encoder_hidden_size": heads * head,
        "prefix_projection": False,
    }


def _static(tuned: Tuned) -> Prompt:
    """The prompt as PEFT can hold it."""
    method = tuned.method
    if method is None:
        raise NotFoldable("there is no prompt to export: this is the frozen model alone")
    if method.depends:
        raise NotFoldable(f"a prompt of {method.name} depends on the text, and PEFT keeps one table of rows only")
    if method.own_scores:
        raise NotFoldable(f"a prompt of {method.name} reads answers by itself, for which PEFT has no place")
    if tuned.head is not None:
        raise NotFoldable(
            f"the prompt comes with a trained head of {tuned.head.out_features} outputs; PEFT keeps only heads that "
            "are modules of the base model (modules_to_save), which this one is not: use task.reading: words, or "
            "train the base model's own head with adapt()"
        )
    prompt: Prompt = method.fold()
    if prompt.offset is not None and not prompt.offset.is_zero():
        raise NotFoldable(
            f"a prompt of {method.name} also adds a table to the text embeddings by position, for which PEFT has no "
            "place; it can be exported only while that table is zero"
        )
    if prompt.kv is not None and prompt.sites != {"kv"}:
        raise NotFoldable("the prompt has keys and values and rows as well, and PEFT keeps one kind in a folder")
    if prompt.placement != "front":
        raise NotFoldable(
            f"the prompt stands at {prompt.placement!r}, and PEFT always puts rows in front of everything; "
            'train with method.placement: "front"'
        )
    return prompt


def _task_type(backbone: Backbone) -> str:
    """Which of PEFT's model classes runs the base as it is.

    FEATURE_EXTRACTION hands everything on to the base model, so it serves masked models and heads of any kind too.
    """
    writes = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}
    if backbone.model.can_generate() and backbone.name in writes:
        return writes[backbone.name]
    if backbone.name in ("causal", "masked", "encoder"):
        return "FEATURE_EXTRACTION"
    raise NotFoldable(f"PEFT runs no prompt on {type(backbone.model).__name__} ({backbone.name} family)")


def _check_replaceable(path: Path) -> None:
    """Only an earlier export of ours may be replaced."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path / CONFIG).is_file() or FACTS not in files.read_json(path / CONFIG):
        raise ConfigError(f"{path} exists and is not an earlier export; choose a new folder")


def _config(tuned: Tuned, rows: Tensor, kind: str, digest: str) -> dict[str, Any]:
    backbone, method = tuned.backbone, tuned.method
    assert method is not None
    facts = backbone.model.config.to_dict()
    heads = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads")
    return {
        "auto_mapping": None,
        "base_model_name_or_path": backbone.config.model,
        "inference_mode": True,
        "modules_to_save": None,
        # PEFT guesses these three by the names in the model's config, which fails for some families
        "num_attention_heads": next((int(facts[name]) for name in heads if facts.get(name)), 1),
        "num_layers": backbone.layers,
        "token_dim": rows.shape[1],
        # an encoder-decoder has its prompt in the encoder only; PEFT's default keeps a second half that it never reads
        "num_transformer_submodules": 1,
        "num_virtual_tokens": rows.shape[0],
        "peft_type": "PROMPT_TUNING",
        "peft_version": PEFT_VERSION,
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "revision": backbone.config.revision,
        "task_type": kind,
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
        FACTS: {
            "version": promptuary.__version__,
            "method": method.name,
            "method_config": {**method.config.model_dump(mode="json"), "name": method.name},
            "task": {**tuned.task.settled().model_dump(mode="json"), "name": tuned.task.name}
            if tuned.has_task
            else None,
            "identity": backbone.identity,
            "sha256": digest,
        },
    }


def _card(tuned: Tuned, prompt: Prompt, kind: str) -> str:
    what = f"{prompt.prefix_length} keys and values per layer"
    if prompt.rows is not None:
        what = f"{prompt.length} rows of width {prompt.rows.shape[-1]}"
    base, method = tuned.backbone.config.model, tuned.method
    assert method is not None
    hub = "" if base.startswith(("pip:", "/", ".", "~")) else f"base_model: {base}\n"
    template = f"\nTemplate of the texts it was trained on: `{tuned.task.template.text}`\n" if tuned.has_task else ""
    return f"""---
library_name: peft
{hub}tags:
- prompt-tuning
- promptuary
---

# {method.title} prompt for {base}

{what}, trained with promptuary {promptuary.__version__} ({method.title},
{method.paper}) and folded; task type {kind}. The base model is unchanged and is not in this folder.
{template}
```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this/folder")
```

PEFT moves the padding of a batch between prompt and text; run one text at a time there, or read the folder back with
`promptuary import` and run batches with `tuned.attach(model)`.
"""
