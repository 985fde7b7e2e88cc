"""Models of known shapes with random weights, texts of a known number of tokens, and runs on them.

Knows no clock and no result. Speed depends on shapes, not on weights, so nothing is downloaded.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import promptuary
from promptuary import registry
from promptuary.backbones.base import Backbone, BackboneConfig
from promptuary.run import Run
from promptuary.testing import tiny, tiny_pairs

LABELS = {"positive": "good", "negative": "bad"}
TEMPLATE = "{text} {mask}"
FAMILY = {"gpt2": "causal", "smollm2": "causal", "bert": "masked", "t5": "seq2seq", "t5-small": "seq2seq"}
TITLE = {
    "gpt2": "GPT-2 (124M)",
    "smollm2": "SmolLM2-135M",
    "bert": "BERT-base",
    "t5": "T5-base",
    "t5-small": "T5-small",
}
_SPECIALS = {"gpt2": "none", "smollm2": "none", "t5": "end", "t5-small": "end", "bert": "both"}


def model(kind: str, *, layers: int | None = None, small: bool = False) -> Any:
    """A model of the shape, in eval mode; `layers` of each stack instead of all; `small`: a toy of the same kind."""
    t = transformers
    width, inner, heads, deep = (32, 64, 4, 2) if small else (768, 3072, 12, 12)
    if kind == "smollm2" and not small:
        width, inner, heads, deep = 576, 1536, 9, 30
    if kind == "t5-small" and not small:
        width, inner, heads, deep = 512, 2048, 8, 6
    deep = layers or deep
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "gpt2":
            vocabulary = tiny.SIZE if small else 50257
            ids = {"bos_token_id": 1, "eos_token_id": 2}
            made: Any = t.GPT2LMHeadModel(
                t.GPT2Config(vocab_size=vocabulary, n_embd=width, n_layer=deep, n_head=heads, n_positions=1024, **ids)
            )
        elif kind == "smollm2":
            made = t.LlamaForCausalLM(
                t.LlamaConfig(
                    vocab_size=tiny.SIZE if small else 49152,
                    hidden_size=width,
                    intermediate_size=inner,
                    num_hidden_layers=deep,
                    num_attention_heads=heads,
                    num_key_value_heads=2 if small else 3,
                    tie_word_embeddings=True,
                    max_position_embeddings=2048,
                    pad_token_id=0,
                )
            )
        elif kind == "bert":
            made = t.BertForMaskedLM(
                t.BertConfig(
                    vocab_size=tiny.SIZE if small else 30522,
                    hidden_size=width,
                    intermediate_size=inner,
                    num_hidden_layers=deep,
                    num_attention_heads=heads,
                )
            )
        elif kind == "clip":
            made = tiny_pairs.clip() if small else _clip(deep)
        else:
            made = t.T5ForConditionalGeneration(
                t.T5Config(
                    vocab_size=tiny.SIZE if small else 32128,
                    d_model=width,
                    d_ff=inner,
                    d_kv=width // heads,
                    num_layers=deep,
                    num_heads=heads,
                    dropout_rate=0.1,
                    decoder_start_token_id=0,
                    pad_token_id=0,
                    eos_token_id=2,
                )
            )
    return made.requires_grad_(False).eval()


def _clip(layers: int) -> Any:
    """ViT-B/16 and its text tower, with the end token of the tiny tokenizer."""
    tower = {"num_hidden_layers": layers, "max_position_embeddings": 77, "patch_size": 16}
    ends = {"bos_token_id": tiny.SIZE - 2, "eos_token_id": tiny.SIZE - 1, "pad_token_id": 0}
    text = {**tower, **ends, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
    vision = {**tower, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=512)
    return transformers.CLIPModel(config)


def twin(of: Any) -> Any:
    """Another model over the same weights: what a library does to its modules does not reach the others."""
    shared = {id(tensor): tensor for tensor in (*of.parameters(), *of.buffers())}
    return copy.deepcopy(of, shared)


def hold(kind: str, of: Any, **settings: Any) -> Backbone:
    """A backbone of ours around a model."""
    words = tiny.tokenizer(specials=_SPECIALS[kind])
    words.model_max_length = 10**9
    config = BackboneConfig(model=f"random-{kind}", family=FAMILY[kind], device="cpu", **settings)
    made: Backbone = registry.load("backbones", FAMILY[kind])(of, words, config)
    return made


def examples(kind: str, lengths: Sequence[int], seed: int = 0) -> list[dict[str, str]]:
    """Texts of so many tokens as the model reads them, special tokens and mask included."""
    pick = random.Random(seed)
    fixed = {"gpt2": 0, "smollm2": 0, "t5": 1, "t5-small": 1, "bert": 3}[kind]
    return [
        {"text": " ".join(pick.choices(tiny.WORDS, k=length - fixed)), "label": pick.choice(list(LABELS))}
        for length in lengths
    ]


def run(folder: Path, rows: Sequence[Mapping[str, str]], backbone: Backbone, method: Mapping[str, Any],
        **train: Any) -> Run:  # fmt: skip
    """A run over the rows."""
    folder.mkdir(parents=True)
    for split, part in {"train": rows, "validation": rows[:1], "test": rows[:1]}.items():
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return promptuary.load_run(
        {
            "task": {"name": "classify", "template": TEMPLATE, "labels": LABELS, "metrics": ["accuracy"]},
            "data": {"source": str(folder), "max_length": 1024},
            "backbone": backbone.config.model_dump(),
            "method": dict(method),
            "train": train,
            "out": str(folder / "run"),
        }
    )
