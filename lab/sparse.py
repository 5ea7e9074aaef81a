# SPDX-License-Identifier: Apache-2.0
"""A model whose layers attend only to what an indexer selects.

chosen = sparse.choice("misa-r:h=3:m=4k", top_k=512)
with sparse.attending(model, indexers, chosen):
    logits = model(ids[None]).logits
    text = model.generate(ids[None], max_new_tokens=32, do_sample=False)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import repeat_kv

import misa
from misa.integrations._evaluate import parse
from misa.integrations._evaluate_measures import mask_of

from . import base
from .indexer import DIM

RECENCY, RANDOM = "recency", "random"
ROWS = 1024  # queries in a block


class Choice(NamedTuple):
    """How each query's positions are chosen.

    label: what `choice` was given.
    config: None for recency and random.
    fp8: whether keys and queries are rounded to e4m3 first.
    """

    label: str
    top_k: int
    config: misa.Config | None
    fp8: bool


def choice(label: str, top_k: int) -> Choice:
    """An indexer in the notation of `misa compare`, such as dsa or misa-r:h=3:m=4k:sketch=2, or
    `recency` (the last top_k positions), or `random`. `:fp8` at the end rounds keys and queries to
    e4m3; a sketch needs it. Raises ValueError for anything else."""
    if label in (RECENCY, RANDOM):
        return Choice(label, top_k, None, False)
    config = parse(label.removesuffix(":fp8"), top_k)
    fp8 = label.endswith(":fp8")
    if config.sketch and not fp8:
        raise ValueError(f"{label}: expected :fp8 at the end, as a sketch is of e4m3 keys")
    return Choice(label, top_k, config, fp8)


def rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 [..., D] and the scale of each vector."""
    scale = x.float().abs().amax(-1).clamp_min(1e-4) / 448
    return (x.float() / scale[..., None]).to(torch.float8_e4m3fn), scale


def positions(
    chosen: Choice,
    q: torch.Tensor,
    w: torch.Tensor,
    k: torch.Tensor,
    rows: torch.Tensor,
    seed: int = 0,
) -> torch.Tensor:
    """What the queries at positions `rows` [R] select of the keys up to their own: int64 [R, top_k]
    at most, -1 where a row sees fewer.

    q [R, H, 128], w [R, H], k [L, 128], as an Indexer gives them. seed: of random positions.
    """
    if chosen.label == RECENCY:
        back = torch.arange(chosen.top_k, device=rows.device)
        return (rows[:, None] - back).clamp_(min=-1)
    if chosen.label == RANDOM:
        draws = torch.Generator(rows.device).manual_seed(seed)
        order = torch.rand(len(rows), len(k), generator=draws, device=rows.device)
        order.masked_fill_(torch.arange(len(k), device=rows.device) > rows[:, None], -1)
        value, found = order.topk(min(chosen.top_k, len(k)), dim=1)
        return found.masked_fill_(value < 0, -1)
    bounds = torch.zeros_like(rows).int(), (rows + 1).int()
    if chosen.fp8:
        (q, q_scale), (k, k_scale) = rounded(q), rounded(k)
        got = misa.select(q, w * q_scale, k, *bounds, k_scale=k_scale, config=chosen.config)
    else:
        got = misa.select(q.bfloat16(), w, k.bfloat16(), *bounds, config=chosen.config)
    return got.indices.long()


# What a block of queries selected: the layer's number, the queries' positions int64 [R], and what
# `positions` returned for them.
Selected = Callable[[int, torch.Tensor, torch.Tensor], None]


@contextmanager
def attending(
    model: Any, indexers: Any, chosen: Choice | None, selected: Selected | None = None
) -> Iterator[None]:
    """Inside, every layer attends to what `chosen` selects by that layer's indexer, and to nothing
    else; to everything, as ever, where `chosen` is None.

    model: as lab.base opens it, or any whose layers are `model.model.layers` with `self_attn` and
    rotary positions, and whose attention transformers' AttentionInterface can replace. A call has
    one sequence without padding. With a cache it may come in pieces, and `model.generate` works;
    the indexers' keys are kept from one piece to the next, and the piece at position 0 begins anew.
    selected: called for every block of ROWS queries or fewer.

    Memory beside the dense model's, L keys: 512 L bytes of the indexer's keys a layer; of one block
    at a time, its indexer queries (32 KiB a query with 64 heads), a mask (3 ROWS L bytes) and what
    attention with a mask needs: nothing more on CUDA devices, at most 4 ROWS L bytes a head
    elsewhere. With 9 heads that is below 0.5 GiB at 8192 tokens and 1.5 GiB at 32768.
    """
    if chosen is None:
        yield
        return
    seen: dict[int, tuple[torch.Tensor, ...]] = {}
    keys: dict[int, torch.Tensor] = {}

    def before(i: int, module: Any, *inputs: torch.Tensor) -> None:
        seen[i] = inputs

    def attend(i: int, q: Any, k: Any, v: Any, scaling: float) -> torch.Tensor:
        """q [1, heads, N, D] of the new tokens, k and v [1, kv heads, L, D] of all; returns
        [1, N, heads, D]."""
        hidden, cos, sin = (x.float() for x in seen.pop(i))
        batch, heads, new, _ = q.shape
        past = k.shape[2] - new
        if batch != 1:
            raise ValueError(f"expected one sequence a call, got {batch}")
        if past == 0:
            keys[i] = hidden.new_empty(0, DIM)
        if len(keys[i]) != past:
            raise ValueError(f"expected a cache of {len(keys[i])} tokens, got one of {past}")
        keys[i] = torch.cat([keys[i], hidden.new_empty(new, DIM)])
        k, v = repeat_kv(k, heads // k.shape[1]), repeat_kv(v, heads // v.shape[1])
        out = torch.empty_like(q)
        for first in range(0, new, ROWS):
            block = slice(first, min(first + ROWS, new))
            own = torch.arange(block.stop - first, device=q.device)
            index_q, w, keys[i][past + first : past + block.stop] = indexers[i](
                hidden[block], cos[block], sin[block], own
            )
            rows, end = own + past + first, past + block.stop
            seed = i * 1_000_003 + past + first
            got = positions(chosen, index_q, w, keys[i][:end], rows, seed)
            if selected is not None:
                selected(i, rows, got)
            out[:, :, block] = scaled_dot_product_attention(
                q[:, :, block],
                k[:, :, :end],
                v[:, :, :end],
                attn_mask=mask_of(got, end),
                scale=scaling,
            )
        return out.transpose(1, 2)

    modules = [layer.self_attn for layer in model.model.layers]
    own = model.config._attn_implementation
    for i, module in enumerate(modules):
        module.attends = lambda *call, i=i: attend(i, *call)
    model.set_attn_implementation(_NAME)
    try:
        with torch.no_grad(), base.watched(model, before):
            yield
    finally:
        model.set_attn_implementation(own)
        for module in modules:
            del module.attends


_NAME = "lab_sparse"


def _forward(
    module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **_: Any
) -> tuple[torch.Tensor, None]:
    return module.attends(q, k, v, scaling), None


AttentionInterface.register(_NAME, _forward)
