"""Tiny two-tower models with random weights, two layers a tower, and their tokenizers.

Knows no method, task or test; nothing here reads a file or the network.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from promptuary.testing.tiny import SIZE, SPECIAL, WIDTH, WORDS
from promptuary.testing.tiny import tokenizer as bert_tokenizer

_TOWER = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = {**_TOWER, "vocab_size": SIZE}
_VISION = {**_TOWER, "image_size": 16, "patch_size": 4}
JOINT = 24
"""Width of the features that both towers of `clip` and `pair` give; that of `siglip` is the towers' own."""

_FIRST, _LAST = SIZE - 2, SIZE - 1


def clip(seed: int = 0) -> Any:
    """A causal text tower of 77 positions; its end token has the highest id, as OpenAI's has."""
    text = {**_TEXT, "max_position_embeddings": 77}
    text |= {"bos_token_id": _FIRST, "eos_token_id": _LAST, "pad_token_id": 0}
    config = transformers.CLIPConfig(text_config=text, vision_config=dict(_VISION), projection_dim=JOINT)
    return _made(transformers.CLIPModel, config, seed)


def siglip(seed: int = 0) -> Any:
    """A text tower of 64 positions that looks in both directions, at its padding too."""
    text = {**_TEXT, "max_position_embeddings": 64, "projection_size": WIDTH}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.SiglipConfig(text_config=text, vision_config=dict(_VISION))
    return _made(transformers.SiglipModel, config, seed)


def pair(seed: int = 0) -> Any:
    """BERT and ViT."""
    text = transformers.BertConfig(**_TEXT, max_position_embeddings=80, pad_token_id=0)
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        transformers.ViTConfig(**_VISION), text, projection_dim=JOINT
    )
    return _made(transformers.VisionTextDualEncoderModel, config, seed)


def model(kind: str, seed: int = 0) -> Any:
    """A random model, "clip", "siglip" or "pair", in eval mode, with weights large enough that outputs differ."""
    return {"clip": clip, "siglip": siglip, "pair": pair}[kind](seed)


def tokenizer(kind: str) -> Any:
    """The word-level tokenizer of a model: both ends for "clip" and "pair", only the end for "siglip"."""
    if kind != "clip":
        return bert_tokenizer(specials="end" if kind == "siglip" else "both")
    # the vocabulary of the others with its ends moved behind the words
    words = [*(word for word in SPECIAL if word not in ("<s>", "</s>")), *WORDS, "<s>", "</s>"]
    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<s>", _FIRST), ("</s>", _LAST)]
    raw.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        mask_token="<mask>",
        unk_token="<unk>",
        model_max_length=77,
    )


def _made(kind: Any, config: Any, seed: int) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = kind(config)
    for parameter in made.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3)
    return made.eval()
