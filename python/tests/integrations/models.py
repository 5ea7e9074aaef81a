# SPDX-License-Identifier: Apache-2.0
"""Models with sparse attention, small and random."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    GlmMoeDsaConfig,
    GlmMoeDsaForCausalLM,
)

ARCHITECTURES = {
    "deepseek": (DeepseekV32ForCausalLM, DeepseekV32Config, {}),
    "glm": (
        GlmMoeDsaForCausalLM,
        GlmMoeDsaConfig,
        {"indexer_types": ["full", "shared", "full"]},
    ),
}
HEADS, DIM, TOP_K, VOCABULARY = 32, 64, 16, 97


def build(architecture: str, device: str = "cpu", **changes: Any) -> torch.nn.Module:
    model_class, config_class, own = ARCHITECTURES[architecture]
    torch.manual_seed(7)
    config = config_class(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 64,
            "moe_intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 2,
            "kv_lora_rank": 16,
            "q_lora_rank": 32,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "index_n_heads": HEADS,
            "index_head_dim": DIM,
            "index_topk": TOP_K,
            # Wide enough for attention to depend on what is selected.
            "initializer_range": 0.2,
            "eos_token_id": None,
            "bos_token_id": None,
            **own,
            **changes,
        }
    )
    return model_class(config).to(device).eval()


def tokens_of(device: str, batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(11)
    return torch.randint(0, VOCABULARY, (batch, length), generator=generator).to(device)


def indexers_of(model: torch.nn.Module) -> list[Any]:
    return [each for name, each in model.named_modules() if name.endswith("self_attn.indexer")]
