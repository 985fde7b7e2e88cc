"""Decoder-only architectures of transformers in tiny, with the attention that each is known for.

Knows no test; what all tests run on is `promptuary.testing.tiny`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as t

import tiny

_IDS = {"vocab_size": tiny.SIZE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BASE = {
    **_IDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 80,
}
_GROUPED = {**_BASE, "num_key_value_heads": 2}
_GPT = {**_IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 80}
_WINDOW = {**_GROUPED, "sliding_window": 4}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_ROUTED = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

SHARING: dict[str, Callable[[], Any]] = {
    "mistral, every layer with a window": lambda: t.MistralForCausalLM(t.MistralConfig(**_WINDOW)),
    "mixtral, experts": lambda: t.MixtralForCausalLM(t.MixtralConfig(**_WINDOW, num_local_experts=4)),
    "qwen2, windows in some layers": lambda: t.Qwen2ForCausalLM(
        t.Qwen2Config(**_WINDOW, use_sliding_window=True, max_window_layers=1)
    ),
    "qwen3 moe": lambda: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**_GROUPED, **_EXPERTS, head_dim=8)),
    "gemma2, caps": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**_WINDOW, head_dim=8)),
    "gpt-neo, local attention": lambda: t.GPTNeoForCausalLM(
        t.GPTNeoConfig(
            **_IDS,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=4,
            max_position_embeddings=80,
        )
    ),
    "gpt-neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**_BASE)),
    "gpt-j": lambda: t.GPTJForCausalLM(t.GPTJConfig(**_GPT, rotary_dim=4)),
    "bigcode, one head for all keys": lambda: t.GPTBigCodeForCausalLM(t.GPTBigCodeConfig(**_GPT)),
    "opt, positions from the mask": lambda: t.OPTForCausalLM(
        t.OPTConfig(
            **_IDS,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=64,
            max_position_embeddings=80,
            word_embed_proj_dim=32,
        )
    ),
    "bloom, slopes from the mask": lambda: t.BloomForCausalLM(
        t.BloomConfig(**_IDS, hidden_size=32, n_layer=2, n_head=4)
    ),
    "falcon, slopes": lambda: t.FalconForCausalLM(
        t.FalconConfig(**_IDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True)
    ),
    "mpt": lambda: t.MptForCausalLM(t.MptConfig(**_IDS, d_model=32, n_layers=2, n_heads=4, max_seq_len=80)),
    "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**_GROUPED)),
    "olmo2": lambda: t.Olmo2ForCausalLM(t.Olmo2Config(**_GROUPED)),
    "cohere": lambda: t.CohereForCausalLM(t.CohereConfig(**_GROUPED)),
    "xglm": lambda: t.XGLMForCausalLM(
        t.XGLMConfig(**_IDS, d_model=32, num_layers=2, attention_heads=4, ffn_dim=64, max_position_embeddings=80)
    ),
    "deepseek, latent attention": lambda: t.DeepseekV3ForCausalLM(
        t.DeepseekV3Config(**_BASE, **_LATENT, **_ROUTED, num_key_value_heads=4, first_k_dense_replace=1)
    ),
    "gpt-oss, sinks": lambda: t.GptOssForCausalLM(t.GptOssConfig(**_WINDOW, head_dim=8, num_local_experts=4)),
    "bert as a decoder": lambda: t.BertLMHeadModel(t.BertConfig(**_BASE, is_decoder=True)),
}
"""Those that can begin with keys and values."""

NOT_SHARING: dict[str, Callable[[], Any]] = {
    "mamba": lambda: t.MambaForCausalLM(t.MambaConfig(**_IDS, hidden_size=32, num_hidden_layers=2, state_size=4)),
    "jamba, states between attention": lambda: t.JambaForCausalLM(
        t.JambaConfig(**_GROUPED, attn_layer_period=2, attn_layer_offset=1, num_experts=2)
    ),
    "recurrent gemma": lambda: t.RecurrentGemmaForCausalLM(
        t.RecurrentGemmaConfig(**_BASE, lru_width=32, attention_window_size=8)
    ),
    "qwen3 next, linear attention": lambda: t.Qwen3NextForCausalLM(
        t.Qwen3NextConfig(**_GROUPED, **_EXPERTS, **_LINEAR, head_dim=8, shared_expert_intermediate_size=16)
    ),
    "llama4, chunks": lambda: t.Llama4ForCausalLM(
        t.Llama4TextConfig(
            **_GROUPED, head_dim=8, attention_chunk_size=4, num_local_experts=2, intermediate_size_mlp=64
        )
    ),
    "the first gpt, no cache": lambda: t.OpenAIGPTLMHeadModel(t.OpenAIGPTConfig(**_GPT)),
}
"""Those that keep something else, or nothing."""


def model(kind: str) -> Any:
    """A random model, with weights large enough that outputs differ."""
    torch.manual_seed(0)
    made = {**SHARING, **NOT_SHARING}[kind]().eval()
    for parameter in made.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3)
    return made
