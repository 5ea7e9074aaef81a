# SPDX-License-Identifier: Apache-2.0
"""The attention of DeepSeek-V3.2 and GLM-5 layers before anything is selected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as deepseek
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as glm

_ATTENTIONS = (deepseek.DeepseekV32Attention, glm.GlmMoeDsaAttention)
# Bytes of scores that are in memory at once; heads are taken in groups of as many as fit.
_GROUP_BYTES = 1 << 28
TRACED_ROWS = 32  # of attn_last32


def spread(count: int, rows: int | None) -> torch.Tensor:
    """int64: `rows` of the numbers below `count`, spread evenly; all if rows is None or more."""
    if rows is None or rows >= count:
        return torch.arange(count)
    return torch.linspace(0, count - 1, rows, dtype=torch.float64).round().long()


def attentions(model: torch.nn.Module) -> dict[int, Any]:
    """The attention modules of `model` by layer; without those of other classes."""
    return {each.layer_idx: each for each in model.modules() if isinstance(each, _ATTENTIONS)}


def on_call(module: Any, record: Callable[[Any, dict[str, Any]], None]) -> Any:
    """Has every call of an attention module end with `record(module, its arguments by name)`.

    By then the cache has the keys of the call. Returns the handle that ends it.
    """
    names = ("hidden_states", "position_embeddings", "attention_mask", "cache")

    @torch.compiler.disable
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        record(module, {**dict(zip(names, args, strict=False)), **kwargs})

    return module.register_forward_hook(hook, with_kwargs=True)


@torch.no_grad()
def dense_attention(
    module: Any, sequence: int, rows: torch.Tensor, call: dict[str, Any]
) -> torch.Tensor:
    """float32 [R, T]: how queries attend to all T keys that they see, averaged over the heads.

    sequence: the place in the batch.
    rows: int64 [R], the queries of that sequence among the new tokens.
    call: the arguments of a finished call of the attention module, by name.

    Takes the keys and values of all heads, as the module itself did, and 256 MiB of scores or
    those of one head.
    """
    hidden, cache = call["hidden_states"][sequence, None], call.get("cache")
    cos, sin = (
        x.expand(len(call["hidden_states"]), -1, -1)[sequence, None]
        for x in call["position_embeddings"]
    )
    mask = call["attention_mask"]
    mask = mask.expand(len(call["hidden_states"]), -1, -1, -1)[sequence, 0, rows]
    seen = mask if mask.dtype == torch.bool else mask == 0
    heads, nope, rope = module.num_heads, module.qk_nope_head_dim, module.qk_rope_head_dim
    rotate = deepseek.apply_rotary_pos_emb_interleave

    q = module.q_b_proj(module.q_a_layernorm(module.q_a_proj(hidden[:, rows])))
    q_pass, q_rot = q.view(1, len(rows), heads, nope + rope).transpose(1, 2).split([nope, rope], -1)
    q_rot, _ = rotate(q_rot, q_rot, cos[:, rows], sin[:, rows])
    if cache is None:
        latents = module.kv_a_proj_with_mqa(hidden)
        k_pass, k_rot = latents[:, None].split([module.kv_lora_rank, rope], -1)
        k_pass = module.kv_a_layernorm(k_pass)
        k_rot, _ = rotate(k_rot, k_rot, cos, sin)
    else:
        layer = cache.layers[module.layer_idx]
        k_pass, k_rot = layer.keys[sequence, None], layer.values[sequence, None]
    q = torch.cat([q_pass, q_rot], -1)[0]
    k = module.expand_kv(k_pass, k_rot)[0][0]
    group = max(_GROUP_BYTES // max(4 * len(rows) * k.shape[1], 1), 1)
    total = torch.zeros(seen.shape, dtype=torch.float32, device=q.device)
    for some_q, some_k in zip(q.split(group), k.split(group), strict=True):
        scores = (some_q @ some_k.transpose(1, 2)).float() * module.scaling
        total += scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num().sum(0)
    return total / heads


def traced_attention(
    module: Any, queries: torch.Tensor, total: int, call: dict[str, Any]
) -> torch.Tensor:
    """bfloat16 [Q, total]: dense attention of `queries` of a flattened batch to all its keys."""
    batch, length = call["hidden_states"].shape[:2]
    keys = total // batch
    result = torch.zeros(len(queries), total, dtype=torch.bfloat16)
    for sequence in (queries // length).unique().tolist():
        mine = queries // length == sequence
        rows = (queries[mine] % length).to(call["hidden_states"].device)
        part = dense_attention(module, sequence, rows, call)
        result[mine, sequence * keys : (sequence + 1) * keys] = part.cpu().bfloat16()
    return result
