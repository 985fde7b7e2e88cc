"""Tiny real models of every family, random weights, two layers, about 10 ms each, and a word-level tokenizer.

Knows no method, task or test; nothing here reads a file or the network.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from promptuary import registry
from promptuary.backbones.base import Backbone, BackboneConfig
from promptuary.testing import tiny_eyes

WORDS = [
    "a",
    "red",
    "green",
    "blue",
    "apple",
    "pear",
    "plum",
    "sky",
    "sea",
    "sun",
    "is",
    "was",
    "it",
    "the",
    "good",
    "bad",
    "great",
    "terrible",
    "yes",
    "no",
    "maybe",
    "very",
    "quite",
    "not",
    "never",
    "always",
    "cold",
    "hot",
    "old",
    "new",
    "big",
    "small",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "cat",
    "dog",
    "bird",
    "fish",
    "runs",
    "sleeps",
    "eats",
    "sings",
    ".",
    ",",
    "?",
    "!",
    ":",
    ";",
    "and",
    "or",
    "but",
    "so",
    "then",
    "now",
    "here",
    "there",
    "this",
    "that",
    "which",
    "what",
    "label",
    "text",
    "answer",
    "question",
    "premise",
    "hypothesis",
    "positive",
    "negative",
    "neutral",
    "world",
    "sports",
    "business",
    "technology",
    "cannot",
    "can",
    "will",
    "would",
    "review",
    "topic",
    "feeling",
    "sentence",
    "means",
    "true",
    "false",
    "first",
    "second",
    "third",
    "last",
    "left",
    "right",
    "up",
    "down",
    "in",
    "on",
    "under",
    "over",
    "near",
    "far",
    "fast",
    "slow",
]
SPECIAL = ["<pad>", "<s>", "</s>", "<mask>", "<unk>"]
SIZE = len(SPECIAL) + len(WORDS)
WIDTH = 32


def tokenizer(*, specials: str = "both") -> Any:
    """A word-level tokenizer. `specials`: "both" ends, only the "end" (T5), the "start" (Llama), or "none" (GPT-2)."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    single = {"both": "<s> $A </s>", "end": "$A </s>", "start": "<s> $A", "none": "$A"}[specials]
    raw.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        mask_token="<mask>",
        unk_token="<unk>",
        model_max_length=64,
    )


_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BERT = {
    "vocab_size": SIZE,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 80,
}
_LLAMA = {**_BERT, "num_key_value_heads": 2, **_IDS}


def model(kind: str, seed: int = 0) -> Any:
    """A random model of an architecture, in eval mode, with weights large enough that outputs differ."""
    t = transformers
    if kind in tiny_eyes.KINDS:
        return tiny_eyes.eye(kind, seed)
    if _family(kind) == "dual":
        return _pairs().model(kind, seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = {
            "gpt2": lambda: t.GPT2LMHeadModel(
                t.GPT2Config(vocab_size=SIZE, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=80, **_IDS)
            ),
            "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**_LLAMA)),
            "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**_LLAMA, head_dim=8)),
            "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**_LLAMA, head_dim=8, sliding_window=8)),
            "t5": lambda: t.T5ForConditionalGeneration(
                t.T5Config(
                    vocab_size=SIZE,
                    d_model=WIDTH,
                    d_kv=8,
                    d_ff=64,
                    num_layers=2,
                    num_heads=4,
                    decoder_start_token_id=0,
                    pad_token_id=0,
                    eos_token_id=2,
                )
            ),
            "bart": lambda: t.BartForConditionalGeneration(
                t.BartConfig(
                    vocab_size=SIZE,
                    d_model=WIDTH,
                    encoder_layers=2,
                    decoder_layers=2,
                    encoder_attention_heads=4,
                    decoder_attention_heads=4,
                    encoder_ffn_dim=64,
                    decoder_ffn_dim=64,
                    max_position_embeddings=80,
                    decoder_start_token_id=2,
                    forced_eos_token_id=None,
                    **_IDS,
                )
            ),
            "bert": lambda: t.BertForMaskedLM(t.BertConfig(**_BERT, pad_token_id=0)),
            "roberta": lambda: t.RobertaForMaskedLM(
                t.RobertaConfig(**{**_BERT, "max_position_embeddings": 82}, **_IDS)
            ),
            "deberta": lambda: t.DebertaV2ForMaskedLM(
                t.DebertaV2Config(
                    **_BERT,
                    pad_token_id=0,
                    relative_attention=True,
                    pos_att_type=["p2c", "c2p"],
                    position_biased_input=False,
                )
            ),
            "modernbert": lambda: t.ModernBertForMaskedLM(
                t.ModernBertConfig(**_BERT, **_IDS, cls_token_id=1, sep_token_id=2)
            ),
            "minilm": lambda: t.BertModel(t.BertConfig(**_BERT, pad_token_id=0)),
        }[kind]()
    for name, parameter in made.named_parameters():
        # T5 does not divide the products of its attention: with larger ones float32 alone would be 5e-5 off
        sharp = kind == "t5" and name.endswith((".q.weight", ".k.weight"))
        if parameter.dim() > 1 and not sharp:
            parameter.data.mul_(3)
    made.generation_config = t.GenerationConfig.from_model_config(made.config) if made.can_generate() else None
    return made.eval()


FAMILY = {
    "gpt2": "causal",
    "llama": "causal",
    "qwen3": "causal",
    "gemma3": "causal",
    "t5": "seq2seq",
    "bart": "seq2seq",
    "bert": "masked",
    "roberta": "masked",
    "deberta": "masked",
    "modernbert": "masked",
    "minilm": "encoder",
}
"""Text architecture -> its family."""
EYES = dict.fromkeys(tiny_eyes.KINDS, "vision") | dict.fromkeys(("clip", "siglip", "pair"), "dual")
"""The same of those that see."""
_SPECIALS = {"gpt2": "none", "llama": "start", "gemma3": "start", "qwen3": "none", "t5": "end"}
FAMILIES = {"causal": "llama", "seq2seq": "t5", "masked": "bert", "encoder": "minilm"}
"""One architecture for each text family."""
SEEING = {"vision": "vit", "dual": "clip"}
"""One architecture for each family that sees."""
EVERY = {**FAMILIES, **SEEING}
"""Both."""


def _pairs() -> Any:
    """The module of two-tower models, whose words are those here."""
    from promptuary.testing import tiny_pairs

    return tiny_pairs


def _family(kind: str) -> str:
    return FAMILY[kind] if kind in FAMILY else EYES[kind]


def family_name(kind: str) -> str:
    """The family of an architecture, or of a family's name."""
    return _family(EVERY.get(kind, kind))


def backbone(kind: str, seed: int = 0, **settings: Any) -> Backbone:
    """A wired tiny backbone of an architecture (or of a family's architecture)."""
    kind = EVERY.get(kind, kind)
    family = registry.load("backbones", _family(kind))
    made = model(kind, seed)
    dtype = settings.get("dtype", "float32")
    if dtype != "float32":
        made = made.to(getattr(torch, dtype))
    return family(
        made, reader(kind), BackboneConfig(model=f"tiny-{kind}-{seed}", family=_family(kind), device="cpu", **settings)
    )


def reader(kind: str) -> Any:
    """What prepares the input of an architecture: a tokenizer, how it wants images, or both."""
    if _family(kind) == "vision":
        return tiny_eyes.sight()
    if _family(kind) == "dual":
        return _pairs().tokenizer(kind), tiny_eyes.sight()
    return tokenizer(specials=_SPECIALS.get(kind, "both"))


def save(folder: Any, kind: str, seed: int = 0) -> str:
    """A tiny model and its tokenizer as a local folder, as `from_pretrained` reads it."""
    kind = EVERY.get(kind, kind)
    model(kind, seed).save_pretrained(folder)
    if _family(kind) in SEEING:
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(tiny_eyes.PROCESSOR), encoding="utf-8")
    if _family(kind) != "vision":
        words = _pairs().tokenizer(kind) if _family(kind) == "dual" else reader(kind)
        words.save_pretrained(folder)
    return str(folder)
