#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes a small random model with a DSA indexer, which an engine loads like a real one.

    checkpoint.py FOLDER v32|glm|glm-shared [--layers N] [--context N] [--drafts N] [--experts]
                  [--rank]

Weights are scaled so that activations are of order 1 and the indexer's scores differ from token to
token: with the engines' own dummy weights attention would not matter. There is no tokenizer;
prompts are token ids below VOCABULARY.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

VOCABULARY = 1024
TOP_K = 2048

KINDS: dict[str, dict[str, Any]] = {
    # 64 indexer heads, and the shapes of DeepSeek-V3.2's attention.
    "v32": {
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "index_n_heads": 64,
    },
    # 32 indexer heads, and the shapes of GLM-5's.
    "glm": {
        "architectures": ["GlmMoeDsaForCausalLM"],
        "model_type": "glm_moe_dsa",
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
        "index_n_heads": 32,
        "indexer_rope_interleave": True,
    },
}
# As GLM-5.2: every second layer has no indexer, and takes the selection of the layer before.
KINDS["glm-shared"] = KINDS["glm"] | {"index_topk_pattern": "FS"}


def config(
    kind: str, layers: int, context: int, drafts: int, experts: bool, rank: bool
) -> dict[str, Any]:
    hidden, heads = 7168 if rank else 1024, 16
    return KINDS[kind] | {
        "num_hidden_layers": layers,
        "num_nextn_predict_layers": drafts,
        "max_position_embeddings": context,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": 1536 if rank else 512,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "index_head_dim": 128,
        "index_topk": TOP_K,
        "vocab_size": VOCABULARY,
        "intermediate_size": 2304 if rank else 2 * hidden,
        # Draft layers alone may have experts, but the classes want their sizes.
        "first_k_dense_replace": layers if experts else layers + drafts,
        "moe_intermediate_size": 512,
        "moe_layer_freq": 1,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "ep_size": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "initializer_range": 0.02,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
        "use_cache": True,
        "torch_dtype": "bfloat16",
    }


class Weights:
    """Random tensors by name."""

    def __init__(self, sizes: dict[str, Any], seed: int) -> None:
        self.sizes = sizes
        self.tensors: dict[str, torch.Tensor] = {}
        self._generator = torch.Generator().manual_seed(seed)

    def matrix(self, name: str, rows: int, columns: int, gain: float = 1.0) -> None:
        """Keeps activations of order `gain`."""
        values = torch.randn(rows, columns, generator=self._generator) * (gain / columns**0.5)
        self.tensors[f"{name}.weight"] = values.to(torch.bfloat16)

    def norm(self, name: str, size: int) -> None:
        self.tensors[f"{name}.weight"] = torch.ones(size, dtype=torch.bfloat16)

    def layer(self, name: str, shared: bool = False, experts: bool = False) -> None:
        """shared: without an indexer; experts: with a router and experts."""
        c = self.sizes
        hidden, heads = c["hidden_size"], c["num_attention_heads"]
        nope, rope, v = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
        attention = f"{name}.self_attn"
        self.norm(f"{name}.input_layernorm", hidden)
        self.norm(f"{name}.post_attention_layernorm", hidden)
        self.norm(f"{attention}.q_a_layernorm", c["q_lora_rank"])
        self.norm(f"{attention}.kv_a_layernorm", c["kv_lora_rank"])
        self.matrix(f"{attention}.q_a_proj", c["q_lora_rank"], hidden)
        self.matrix(f"{attention}.q_b_proj", heads * (nope + rope), c["q_lora_rank"], 1.5)
        self.matrix(f"{attention}.kv_a_proj_with_mqa", c["kv_lora_rank"] + rope, hidden)
        self.matrix(f"{attention}.kv_b_proj", heads * (nope + v), c["kv_lora_rank"], 1.5)
        self.matrix(f"{attention}.o_proj", hidden, heads * v, 4.0)
        if not shared:
            self.indexer(f"{attention}.indexer")
        if experts:
            self.experts(f"{name}.mlp")
        else:
            self.mlp(f"{name}.mlp", c["intermediate_size"])

    def mlp(self, name: str, middle: int) -> None:
        hidden = self.sizes["hidden_size"]
        self.matrix(f"{name}.gate_proj", middle, hidden)
        self.matrix(f"{name}.up_proj", middle, hidden)
        self.matrix(f"{name}.down_proj", hidden, middle)

    def experts(self, name: str) -> None:
        c = self.sizes
        count, middle = c["n_routed_experts"], c["moe_intermediate_size"]
        self.matrix(f"{name}.gate", count, c["hidden_size"])
        self.tensors[f"{name}.gate.e_score_correction_bias"] = torch.zeros(count)
        for i in range(count):
            self.mlp(f"{name}.experts.{i}", middle)
        self.mlp(f"{name}.shared_experts", middle * c["n_shared_experts"])

    def indexer(self, name: str) -> None:
        c = self.sizes
        dim, hidden = c["index_head_dim"], c["hidden_size"]
        self.matrix(f"{name}.wq_b", c["index_n_heads"] * dim, c["q_lora_rank"])
        self.matrix(f"{name}.wk", dim, hidden)
        self.matrix(f"{name}.weights_proj", c["index_n_heads"], hidden)
        self.tensors[f"{name}.k_norm.weight"] = torch.ones(dim)
        self.tensors[f"{name}.k_norm.bias"] = torch.zeros(dim)

    def draft(self, name: str) -> None:
        """A layer that predicts the next token but one."""
        c = self.sizes
        hidden = c["hidden_size"]
        self.layer(name, experts=c["first_k_dense_replace"] == c["num_hidden_layers"])
        self.norm(f"{name}.enorm", hidden)
        self.norm(f"{name}.hnorm", hidden)
        self.norm(f"{name}.shared_head.norm", hidden)
        self.matrix(f"{name}.eh_proj", hidden, 2 * hidden)
        self.matrix(f"{name}.shared_head.head", VOCABULARY, hidden, 4.0)
        self.tensors[f"{name}.embed_tokens.weight"] = self.tensors["model.embed_tokens.weight"]

    def model(self) -> dict[str, torch.Tensor]:
        c = self.sizes
        self.matrix("model.embed_tokens", VOCABULARY, c["hidden_size"], c["hidden_size"] ** 0.5)
        self.norm("model.norm", c["hidden_size"])
        self.matrix("lm_head", VOCABULARY, c["hidden_size"], 4.0)
        for i in range(c["num_hidden_layers"]):
            self.layer(f"model.layers.{i}", c.get("index_topk_pattern", "")[i : i + 1] == "S")
        for i in range(c["num_nextn_predict_layers"]):
            self.draft(f"model.layers.{c['num_hidden_layers'] + i}")
        return self.tensors


def write(
    folder: Path,
    kind: str,
    *,
    layers: int = 2,
    context: int = 16384,
    drafts: int = 0,
    experts: bool = False,
    rank: bool = False,
) -> None:
    """Writes config.json and model.safetensors, unless they are there.

    drafts: layers that predict more tokens. experts: whether these have experts, as SGLang wants.
    rank: with the sizes of one rank of eight of a real model, in place of small ones.
    """
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    sizes = config(kind, layers, context, drafts, experts, rank)
    tensors = {name: tensor.clone() for name, tensor in Weights(sizes, seed=0).model().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(sizes, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--drafts", type=int, default=0)
    parser.add_argument("--experts", action="store_true")
    parser.add_argument("--rank", action="store_true")
    write(**vars(parser.parse_args()))
