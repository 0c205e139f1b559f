# SPDX-License-Identifier: Apache-2.0
# Shapes of published models, as their configurations state them: what memory and compute depend on.
# A preset is a transformers configuration in short; what is not said is transformers' default.
"""Models that a plan knows by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any


def _llama(
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    *,
    kv_heads: int | None = None,
    kind: str = "llama",
    vocab: int = 32000,
    positions: int = 4096,
    tied: bool = False,
) -> dict[str, Any]:
    causal = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
    return {
        "model_type": kind,
        "architectures": [causal.get(kind, "MistralForCausalLM")],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads,
        "max_position_embeddings": positions,
        "tie_word_embeddings": tied,
    }


def _gpt2(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
    }


def _opt(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "architectures": ["OPTForCausalLM"],
        "vocab_size": 50272,
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "ffn_dim": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
    }


def _bert(kind: str, hidden: int, layers: int, heads: int) -> dict[str, Any]:
    """Encoders with a classifier of two classes, as they are fine-tuned."""
    roberta = kind == "roberta"
    return {
        "model_type": kind,
        "architectures": [("Roberta" if roberta else "Bert") + "ForSequenceClassification"],
        "vocab_size": 50265 if roberta else 30522,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 514 if roberta else 512,
        "type_vocab_size": 1 if roberta else 2,
        "pad_token_id": 1 if roberta else 0,
    }


_LLAMA2_7B = _llama(4096, 11008, 32, 32)

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "llama-7b": {**_LLAMA2_7B, "max_position_embeddings": 2048},
        "llama2-7b": _LLAMA2_7B,
        "llama2-13b": _llama(5120, 13824, 40, 40),
        "llama3-8b": _llama(4096, 14336, 32, 32, kv_heads=8, vocab=128256, positions=8192),
        "qwen2.5-0.5b": _llama(
            896, 4864, 24, 14, kv_heads=2, kind="qwen2", vocab=151936, positions=32768, tied=True
        ),
        "qwen2.5-1.5b": _llama(
            1536, 8960, 28, 12, kv_heads=2, kind="qwen2", vocab=151936, positions=32768, tied=True
        ),
        "qwen2.5-7b": _llama(
            3584, 18944, 28, 28, kv_heads=4, kind="qwen2", vocab=152064, positions=32768
        ),
        "mistral-7b": {
            **_llama(4096, 14336, 32, 32, kv_heads=8, kind="mistral", positions=32768),
            "sliding_window": None,  # as from version 0.2 on
        },
        "tinyllama-1.1b": _llama(2048, 5632, 22, 32, kv_heads=4, positions=2048),
        "gpt2": _gpt2(768, 12, 12),
        "gpt2-medium": _gpt2(1024, 24, 16),
        "gpt2-large": _gpt2(1280, 36, 20),
        "gpt2-xl": _gpt2(1600, 48, 25),
        "gpt-neo-2.7b": {
            "model_type": "gpt_neo",
            "architectures": ["GPTNeoForCausalLM"],
            "vocab_size": 50257,
            "hidden_size": 2560,
            "num_layers": 32,
            "num_heads": 20,
            "attention_types": [[["global", "local"], 16]],
            "max_position_embeddings": 2048,
        },
        "opt-1.3b": _opt(2048, 24, 32),
        "opt-6.7b": _opt(4096, 32, 32),
        "opt-13b": _opt(5120, 40, 40),
        "bert-base": _bert("bert", 768, 12, 12),
        "bert-large": _bert("bert", 1024, 24, 16),
        "roberta-base": _bert("roberta", 768, 12, 12),
        "roberta-large": _bert("roberta", 1024, 24, 16),
    }
)
"""Configurations by name. The encoders have a classifier, the others a language model's head."""
