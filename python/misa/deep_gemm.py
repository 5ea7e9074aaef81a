# SPDX-License-Identifier: Apache-2.0
"""Scoring functions with DeepGEMM's signatures for A/B tests, in NumPy.

They materialise the logits, which the indexers of this package never do, and copy their arguments
to the host, so they are for small shapes. The result has the framework and the device of ``q``.
"""

from __future__ import annotations

import numpy as np

from ._arrays import Array, host_array, is_torch
from ._call import PAGE_SIZE
from .reference import values

SPLIT = 256
"""Keys in one key split, the unit of the schedule."""


def _like(q: Array, result: np.ndarray) -> Array:
    if not is_torch(q):
        return result
    import torch

    return torch.from_numpy(result).to(q.device)


_E4M3, _FLOAT, _INT = ("float8_e4m3fn", "uint8"), ("float32",), ("int32",)


def _logits(q: np.ndarray, weights: np.ndarray, k: np.ndarray) -> np.ndarray:
    """float32 [T, L] scores over all heads of q [T, H, D], weights [T, H] and k [L, D], float64."""
    dots = np.maximum(np.einsum("thd,ld->thl", q, k), 0)
    return np.einsum("th,thl->tl", weights.astype(np.float64), dots).astype(np.float32)


def fp8_mqa_logits(
    q: Array,
    kv: tuple[Array, Array],
    weights: Array,
    cu_seq_len_k_start: Array,
    cu_seq_len_k_end: Array,
    clean_logits: bool = True,
    max_seqlen_k: int = 0,
) -> Array:
    """Scores of contiguous keys.

    q: e4m3 [T, H, D].
    kv: k e4m3 [L, D] and its scales float32 [L].
    weights: float32 [T, H].
    cu_seq_len_k_start, cu_seq_len_k_end: int32 [T], the keys that a query sees.
    clean_logits: whether the logits of other keys are -inf; else they are unspecified (here as if
        seen).
    max_seqlen_k: if positive, a row starts at the first key that its query sees.

    Returns float32 [T, L] or [T, max_seqlen_k]. Raises ValueError for a wrong argument.
    """
    queries = values(host_array("q", q, _E4M3, "[T, H, D]"))
    k = host_array("kv[0]", kv[0], _E4M3, "[L, D]")
    scales = host_array("kv[1]", kv[1], _FLOAT, "[L]")
    of_heads = host_array("weights", weights, _FLOAT, "[T, H]")
    starts = host_array("cu_seq_len_k_start", cu_seq_len_k_start, _INT, "[T]")
    ends = host_array("cu_seq_len_k_end", cu_seq_len_k_end, _INT, "[T]")
    keys = values(k) * scales[:, None].astype(np.float64)
    logits = _logits(queries, of_heads, keys)
    position = np.arange(len(keys))
    seen = (position >= starts[:, None]) & (position < ends[:, None])
    if clean_logits:
        logits[~seen] = -np.inf
    if max_seqlen_k > 0:
        longest = int(seen.sum(1).max(initial=0))
        if longest > max_seqlen_k:
            raise ValueError(f"max_seqlen_k: expected {longest} or more, got {max_seqlen_k}")
        moved = np.full((len(logits), max_seqlen_k), -np.inf, np.float32)
        for t, row in enumerate(seen):
            moved[t, : row.sum()] = logits[t, row]
        logits = moved
    return _like(q, logits)


def fp8_paged_mqa_logits(
    q: Array,
    fused_kv_cache: Array,
    weights: Array,
    context_lens: Array,
    block_table: Array,
    schedule_metadata: Array | None,
    max_context_len: int,
    clean_logits: bool = False,
) -> Array:
    """Scores of the keys of a paged cache.

    q: e4m3 [B, next_n, H, D].
    fused_kv_cache: uint8 [pages, 64, 1, D + 4], laid out as docs/formats.md describes.
    weights: float32 [B * next_n, H].
    context_lens: int32 [B]; row i of a sequence sees the first context_len - next_n + 1 + i keys.
    block_table: int32 [B, max_pages].
    schedule_metadata: ignored.
    clean_logits: whether the logits of other keys are -inf; else they are unspecified (here 0).

    Returns float32 [B * next_n, max_context_len]. Raises ValueError for a wrong argument.
    """
    queries = values(host_array("q", q, _E4M3, "[B, next_n, H, D]"))
    cache = host_array("fused_kv_cache", fused_kv_cache, ("uint8",), "[pages, 64, 1, D + 4]")
    of_weights = host_array("weights", weights, _FLOAT, "[B * next_n, H]")
    lengths = host_array("context_lens", context_lens, _INT, "[B]")
    table = host_array("block_table", block_table, _INT, "[B, max_pages]")
    batch, next_n, heads, dim = queries.shape
    pages = cache.reshape(len(cache), PAGE_SIZE * (dim + 4))
    elements = values(pages[:, : PAGE_SIZE * dim]).reshape(-1, PAGE_SIZE, dim)
    scales = np.ascontiguousarray(pages[:, PAGE_SIZE * dim :]).view(np.float32)
    out = np.full((batch, next_n, max_context_len), -np.inf if clean_logits else 0, np.float32)
    for b, length in enumerate(lengths):
        used = table[b, : -(-max(int(length), 0) // PAGE_SIZE)]
        keys = (elements[used] * scales[used, :, None]).reshape(-1, dim)[: max(int(length), 0)]
        rows = _logits(queries[b], of_weights.reshape(batch, next_n, heads)[b], keys)
        for i in range(next_n):
            seen = max(int(length) - next_n + 1 + i, 0)
            out[b, i, :seen] = rows[i, :seen]
    return _like(q, out.reshape(batch * next_n, max_context_len))


def get_paged_mqa_logits_metadata(context_lens: Array, block_kv: int, num_sms: int) -> Array:
    """The schedule: how the key splits of all sequences are distributed over multiprocessors.

    context_lens: int32 [B].
    block_kv: 64.

    Returns int32 [num_sms + 1, 2]: multiprocessor i starts at split [i, 1] of sequence [i, 0] and
    ends where the next one starts. Raises ValueError for another page size or a wrong argument.
    """
    if block_kv != PAGE_SIZE:
        raise ValueError(f"block_kv: expected {PAGE_SIZE}, got {block_kv}")
    lengths = host_array("context_lens", context_lens, _INT, "[B]").astype(np.int64)
    splits = -(-np.maximum(lengths, 0) // SPLIT)
    ends = np.cumsum(splits)
    total = int(splits.sum())
    per_sm, rest = divmod(total, num_sms)
    starts = np.arange(num_sms + 1) * per_sm + np.minimum(np.arange(num_sms + 1), rest)
    sequence = np.searchsorted(ends, starts, side="right")
    before = np.concatenate([[0], ends])[sequence]
    return _like(context_lens, np.stack([sequence, starts - before], 1).astype(np.int32))
