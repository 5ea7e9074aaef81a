# SPDX-License-Identifier: Apache-2.0
"""Selection over keys that are sharded across the ranks of a torch.distributed group.

Every rank has a contiguous part of the keys and all queries. The ranks agree on the heads and the
residual row of each query, each rank selects the best of its own keys, and these are merged. The
result on every rank is that of one rank with all keys. What is computed where:

- Block means (pooled router, block filter): each rank sums its own keys in double precision, and
  the sums are added in the order of the ranks. The library chooses heads and blocks from the means
  (`misa.route_from_means`, `misa.keep_blocks_from_means`).
- The other routers read at most 128 keys per query (spec, MISA-R), which every rank receives.
- Scores are those of `misa.select` on the keys of a rank, bit for bit, except for the residual row
  with bfloat16 keys, which some instruction sets add in one part and others in three.

Heads or blocks whose values differ by less than the rounding of single precision may rank
differently than on one rank, as between two backends (docs/numerics.md, Routing).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import misa

from . import _core  # type: ignore[attr-defined]  # compiled
from ._arrays import cuda_device
from ._call import WORKSPACE_CAP
from ._ranks import Peers, Steps, run
from .torch_ops import require_one_device, require_tensors

_CHUNK_BYTES = 256 << 20  # limit of the memory of one chunk of queries
_LOW = 0xFFFFFFFF  # the low 32 bits of an entry
_PADDING = torch.iinfo(torch.int64).min  # below every entry


def select(
    q: torch.Tensor,
    w: torch.Tensor,
    k_local: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    k_scale: torch.Tensor | None = None,
    config: misa.Config = misa.Config(),  # noqa: B008 (immutable)
    scores: bool = False,
    heads: bool = False,
    residual: bool = False,
    backend: str = "auto",
    threads: int = 0,
    workspace_cap: int = WORKSPACE_CAP,
) -> misa.Selected:
    """`misa.select` on the keys of all ranks, concatenated in the order of the ranks.

    A collective: every rank of `group` (None: the default group) calls it with the same arguments,
    except for its keys. All tensors are on one device for which the group has a backend.

    q: [T, H, D] float32, bfloat16, or float8_e4m3fn (or its bytes as uint8).
    w: [T, H] float32.
    k_local: [L_rank, D] in one of the dtypes of q; L_rank may differ and may be 0.
    k_scale: [L_rank] float32, with e4m3 keys only.
    ks, ke: [T] int32; query t sees the keys s with ks[t] <= s < ke[t] of all L keys, where L is the
        sum of L_rank.

    Returns what `misa.select` returns, the same on every rank. If an argument or a step fails on
    one rank, every rank raises: that rank the error itself (ValueError for an argument), the others
    a RuntimeError that names the rank and its error. A config with a sketch is a RuntimeError.
    """
    peers = Peers(group)
    options = {"backend": backend, "threads": threads, "workspace_cap": workspace_cap}
    steps = _select(peers, q, w, k_local, ks, ke, k_scale, config, options)
    selected = run(peers, steps)
    return selected._replace(
        scores=selected.scores if scores else None,
        heads=selected.heads if heads else None,
        residual=selected.residual if residual else None,
    )


@dataclass(frozen=True)
class _Call:
    """Checked arguments of a rank."""

    peers: Peers
    q: torch.Tensor  # [T, H, D]; e4m3 as uint8
    w: torch.Tensor  # [T, H]
    k: torch.Tensor  # [L_rank, D]; e4m3 as uint8
    k_scale: torch.Tensor | None
    ks: torch.Tensor  # [T] int64
    n: torch.Tensor  # [T] int64, the number of keys that a query sees
    offset: int  # position of this rank's first key among all keys
    longest: int  # the largest number of keys on one rank
    config: misa.Config
    options: dict[str, Any]

    def restricted(self, rows: torch.Tensor, config: misa.Config) -> _Call:
        """The call restricted to the queries of a mask [T], with another indexer."""
        return replace(
            self, q=self.q[rows], w=self.w[rows], ks=self.ks[rows], n=self.n[rows], config=config
        )

    def run(
        self,
        q: torch.Tensor,
        w: torch.Tensor,
        keys: tuple[torch.Tensor, torch.Tensor | None],
        spans: tuple[torch.Tensor, torch.Tensor],
        config: misa.Config,
        **wanted: Any,
    ) -> misa.Selected:
        """`misa.select` on this rank; keys are (k, k_scale), spans are (ks, ke)."""
        (k, k_scale), (ks, ke) = keys, (span.int() for span in spans)
        return misa.select(
            q, w, k, ks, ke, k_scale=k_scale, config=config, **wanted, **self.options
        )

    def on_means(self, means: _BlockMeans) -> dict[str, Any]:
        """Arguments of `misa.route_from_means` and `keep_blocks_from_means`, except the count."""
        options = {name: self.options[name] for name in ("backend", "threads")}
        return {"q": self.q, "w": self.w, **means._asdict(), **options}

    def fetch(self, positions: torch.Tensor) -> Steps[tuple[torch.Tensor, torch.Tensor | None]]:
        """Keys [N, D] at positions [N] among the keys of all ranks; their scales [N] or None."""
        local = positions - self.offset
        here = ((local >= 0) & (local < len(self.k))).nonzero()[:, 0]
        arrays = [self.k] if self.k_scale is None else [self.k, self.k_scale[:, None]]
        raw = [array[local[here]].view(torch.uint8) for array in arrays]
        # Each key is on one rank; the other ranks add zeros.
        packed = raw[0].new_zeros(len(positions), sum(array.shape[1] for array in raw))
        packed[here] = torch.cat(raw, dim=1)
        received = yield partial(self.peers.add, packed)
        width = raw[0].shape[1]
        k = received[:, :width].contiguous().view(self.k.dtype)
        if self.k_scale is None:
            return k, None
        return k, received[:, width:].contiguous().view(torch.float32)[:, 0]


def _select(
    peers: Peers,
    q: torch.Tensor,
    w: torch.Tensor,
    k: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
    k_scale: torch.Tensor | None,
    config: misa.Config,
    options: dict[str, Any],
) -> Steps[misa.Selected]:
    call = yield from _checked(peers, q, w, k, ks, ke, k_scale, config, options)
    dense_keys = _core.dense_keys(config, q.shape[1])
    if dense_keys == 0:
        return (yield from _selected(call))
    dense = call.n <= dense_keys
    # Dense rows use DSA, the others the config. Dense rows keep the heads and the residual of an
    # empty row.
    heads = call.n.new_full((len(q), config.heads), -1).int() if config.router != "all" else None
    residual = torch.zeros_like(q[:, 0], dtype=torch.float32) if config.residual else None
    every_head = misa.Config("dsa", top_k=config.top_k, ordered=config.ordered)
    of_dense = yield from _selected(call.restricted(dense, every_head))
    of_others = yield from _selected(call.restricted(~dense, config))
    selected = misa.Selected(
        indices=call.n.new_empty(len(q), config.top_k).int(),
        scores=w.new_empty(len(q), config.top_k),
        heads=heads,
        residual=residual,
    )
    for rows, part in ((dense, of_dense), (~dense, of_others)):
        for output, values in zip(selected, part, strict=True):
            if values is not None:
                output[rows] = values
    return selected


def _selected(call: _Call) -> Steps[misa.Selected]:
    """The selection by one indexer for every query."""
    q, config = call.q, call.config
    effective = _core.effective_config(config, q.shape[1])
    if effective["router"] != config.router:
        unrouted = misa.Config("dsa", top_k=config.top_k, **effective)
        return (yield from _every_head_routed(call, unrouted))
    heads, residual = yield from _route(call)
    rows = _rows(call, heads, residual)
    kept = None
    if config.filter_block:
        kept = yield from _kept_blocks(call)

    first = config.candidates or config.top_k
    read = max(config.candidates, config.filter_blocks * config.filter_block)
    row_bytes = max(8 * call.peers.size * min(first, call.longest), read * (8 + _row_bytes(call.k)))
    step = max(1, _CHUNK_BYTES // max(1, row_bytes))
    best = []
    for at in range(0, len(q), step):
        part = slice(at, at + step)
        positions = None if kept is None else _positions(call, kept[part], part)
        top = yield from _top(call, rows, part, first, positions)
        if config.candidates:
            top = yield from _top(call, (call.q, call.w), part, config.top_k, _decoded(top)[0])
        best.append(top)
    entries = torch.cat(best) if best else call.ks.new_empty(0, config.top_k)
    indices, scores = _decoded(entries)
    if config.ordered:
        last = torch.iinfo(torch.int32).max
        order = torch.where(indices < 0, last, indices).argsort(dim=1)
        indices, scores = indices.gather(1, order), scores.gather(1, order)
    return misa.Selected(indices=indices, scores=scores, heads=heads, residual=residual)


def _every_head_routed(call: _Call, unrouted: misa.Config) -> Steps[misa.Selected]:
    """The selection if every head is routed: by the config without routing; reports all heads."""
    q, config = call.q, call.config
    selected = yield from _selected(replace(call, config=unrouted))
    heads = torch.arange(config.heads, dtype=torch.int32, device=q.device)
    return selected._replace(
        heads=torch.where(call.n[:, None] > 0, heads, -1).int(),
        residual=torch.zeros_like(q[:, 0], dtype=torch.float32) if config.residual else None,
    )


def _checked(
    peers: Peers,
    q: torch.Tensor,
    w: torch.Tensor,
    k: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
    k_scale: torch.Tensor | None,
    config: misa.Config,
    options: dict[str, Any],
) -> Steps[_Call]:
    given = {"q": q, "w": w, "k_local": k, "ks": ks, "ke": ke, "k_scale": k_scale}
    require_tensors(given, ("k_scale",))
    require_one_device(given)
    cuda_device("q", q)  # refuses any device but the CPU and CUDA devices
    if q.ndim != 3:
        raise ValueError(f"q: expected [T, H, D], got {q.ndim} dimensions")
    for name, span in (("ks", ks), ("ke", ke)):
        if span.dtype != torch.int32 or span.shape != q.shape[:1]:
            raise ValueError(
                f"{name}: expected int32 [{q.shape[0]}], got {span.dtype} {list(span.shape)}"
            )
    if k.ndim != 2 or k.shape[1] != q.shape[-1]:
        raise ValueError(f"k_local: expected [L, {q.shape[-1]}], got {list(k.shape)}")
    # Without queries, the call only validates.
    misa.select(
        q[:0], w[:0], k, ks[:0], ke[:0], k_scale=k_scale, config=config, backend=options["backend"]
    )
    if config.sketch:
        raise RuntimeError(f"sketch: expected 0 (none) in misa.distributed, got {config.sketch}")
    if w.shape != q.shape[:2]:
        raise ValueError(f"w: expected {list(q.shape[:2])}, got {list(w.shape)}")

    # Checksums of what must be the same on every rank, and this rank's number of keys.
    spans = torch.stack([ks, ke]).cpu().numpy().tobytes()
    same = f"{config} {q.shape} {q.dtype} {k.dtype} {q.device.type}".encode()
    header = torch.tensor([zlib.crc32(same), zlib.crc32(spans), len(k)], device=peers.device)
    headers = yield partial(peers.gather, header)
    agreed = ("config and the shapes of q: expected the same", "ks, ke: expected the same")
    for column, what in enumerate(agreed):
        others = (headers[:, column] != headers[0, column]).nonzero()[:, 0].tolist()
        if others:
            raise ValueError(f"{what} on every rank, got others than rank 0's on ranks {others}")
    lengths = headers[:, 2].tolist()
    total = sum(lengths)
    if total >= 2**31:
        raise ValueError(f"k_local: expected fewer than 2^31 keys on all ranks, got {total}")
    for name, span in (("ks", ks), ("ke", ke)):
        wrong = ((span < 0) | (span > total)).nonzero()[:, 0].tolist()
        if wrong:
            got = span[wrong[0]].item()
            raise ValueError(f"{name}[{wrong[0]}]: expected 0 to L = {total}, got {got}")
    starts = ks.long()
    return _Call(
        peers=peers,
        q=_raw(q),
        w=w,
        k=_raw(k),
        k_scale=k_scale,
        ks=starts,
        n=(ke.long() - starts).clamp(min=0),
        offset=sum(lengths[: peers.rank]),
        longest=max(lengths),
        config=config,
        options=options,
    )


# Routing


def _route(call: _Call) -> Steps[tuple[torch.Tensor | None, torch.Tensor | None]]:
    """Active heads [T, h] int32, ascending, and the residual row [T, D], as `misa.select` returns
    them; None if the config has none.

    They are those of the first rank, so that every rank has the same.
    """
    config = call.config
    if config.router == "all":
        return None, None
    residual = None
    keys = _core.router_keys(config.router)
    if keys in ("block means", "last"):
        heads = yield from (_pooled if keys == "block means" else _self)(call)
        if config.residual:
            # The residual row is that of the other heads: the routed ones are 0 in q and w.
            at = heads.clamp(min=0).long()
            w = call.w.scatter(1, at, 0)
            q = call.q.scatter(1, at[..., None].expand(-1, -1, call.q.shape[2]), 0)
            every = misa.Config("misa-r", top_k=1, heads=0)
            residual = (yield from _sampled(call, q, w, every)).residual
    else:
        chosen = misa.Config(
            "misa-r",
            top_k=1,
            router=config.router,
            heads=config.heads,
            residual=config.residual,
            static_heads=config.static_heads,
        )
        routed = yield from _sampled(call, call.q, call.w, chosen)
        heads, residual = routed.heads, routed.residual
    heads = yield partial(call.peers.first, heads)
    if residual is not None:
        residual = yield partial(call.peers.first, residual)
    return heads, residual


def _sampled(
    call: _Call, q: torch.Tensor, w: torch.Tensor, config: misa.Config
) -> Steps[misa.Selected]:
    """Routes with the sample S(t) of each query in place of its keys (spec, MISA-R).

    A sample of at most 128 keys is its own sample, so the result is that of routing with all keys.
    """
    stride = call.n.new_tensor([_core.sample_stride(n) for n in call.n.tolist()])
    count = (call.n + stride - 1) // stride
    # Queries with equal start and stride share one grid; each reads it up to its last visible key.
    grids, grid = torch.unique(torch.stack([call.ks, stride], 1), dim=0, return_inverse=True)
    counts = count.new_zeros(len(grids)).scatter_reduce(0, grid, count, "amax")
    begins = counts.cumsum(0) - counts
    of = torch.repeat_interleave(counts)
    step = torch.arange(len(of), device=q.device) - begins[of]
    keys = yield from call.fetch(grids[of, 0] + step * grids[of, 1])
    begin = begins[grid]
    spans = begin, begin + count
    return call.run(q, w, keys, spans, config, heads=True, residual=config.residual)


def _self(call: _Call) -> Steps[torch.Tensor]:
    keys = yield from call.fetch(call.ks + call.n - 1)
    at = torch.arange(len(call.n), device=call.n.device)
    config = misa.Config("misa", top_k=1, router="self", heads=call.config.heads)
    return call.run(call.q, call.w, keys, (at, at + (call.n > 0)), config, heads=True).heads


def _pooled(call: _Call) -> Steps[torch.Tensor]:
    means = yield from _block_means(call, call.config.block)
    return misa.route_from_means(heads=call.config.heads, **call.on_means(means))


class _BlockMeans(NamedTuple):
    """Block means in the form of the arguments of `misa.route_from_means`."""

    means: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor
    partial: torch.Tensor


def _block_means(call: _Call, block: int) -> Steps[_BlockMeans]:
    starts, sequence = torch.unique(call.ks, return_inverse=True)
    whole, rest = call.n // block, call.n % block
    rows = [(sequence == i).nonzero()[:, 0] for i in range(len(starts))]
    full = [int(whole[queries].max()) for queries in rows]
    # The whole blocks of every sequence, then one row per query for its partial block.
    sums = call.q.new_zeros(sum(full) + len(call.n), call.q.shape[2], dtype=torch.float64)
    firsts = torch.zeros_like(call.n)
    base = 0
    for start, queries, blocks in zip(starts.tolist(), rows, full, strict=True):
        begin = max(start, call.offset)
        end = min(start + int(call.n[queries].max()), call.offset + len(call.k))
        stop = -(-(end - start) // block) if begin < end else 0
        for b in range((begin - start) // block, stop):
            low = max(start + b * block, begin)
            high = min(start + (b + 1) * block, end)
            local = slice(low - call.offset, high - call.offset)
            scale = None if call.k_scale is None else call.k_scale[local]
            prefix = _values(call.k[local], scale).cumsum(0)
            if b < blocks:
                sums[base + b] = prefix[-1]
            last = queries[(whole[queries] == b) & (rest[queries] > 0)]
            seen = (call.ks[last] + call.n[last] - low).clamp(max=high - low)
            last, seen = last[seen > 0], seen[seen > 0]
            sums[sum(full) + last] = prefix[seen - 1]
        firsts[queries] = base
        base += blocks
    gathered = yield partial(call.peers.gather, sums)
    total = gathered[0]
    for rank_sums in gathered[1:]:
        total = total + rank_sums
    counts = torch.cat([rest.new_full((base,), block), rest.clamp(min=1)])
    partial_rows = base + torch.arange(len(rest), device=rest.device)
    return _BlockMeans(
        means=(total / counts[:, None]).float(),
        starts=firsts.int(),
        ends=(firsts + whole).int(),
        partial=torch.where(rest > 0, partial_rows, -1).int(),
    )


def _kept_blocks(call: _Call) -> Steps[torch.Tensor]:
    """Blocks [T, filter_blocks] that the block filter keeps (HISA), -1 on the right if fewer."""
    means = yield from _block_means(call, call.config.filter_block)
    kept = misa.keep_blocks_from_means(
        filter_blocks=call.config.filter_blocks, **call.on_means(means)
    )
    return (yield partial(call.peers.first, kept))


def _positions(call: _Call, blocks: torch.Tensor, part: slice) -> torch.Tensor:
    """Positions [queries, blocks * block] of the kept blocks; -1 if the query cannot see them."""
    block = call.config.filter_block
    inside = torch.arange(block, device=blocks.device)
    positions = (blocks[..., None] * block + inside).flatten(1)
    hidden = (positions < 0) | (positions >= call.n[part, None])
    return positions.masked_fill(hidden, -1)


# Scoring and merging


def _rows(
    call: _Call, heads: torch.Tensor | None, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [T, R, D] and weights [T, R] whose score over all R rows equals the routed score."""
    if heads is None:
        return call.q, call.w
    at = heads.clamp(min=0).long()
    w = call.w.gather(1, at)
    q = call.q.gather(1, at[..., None].expand(-1, -1, call.q.shape[2]))
    if residual is None:
        return q, w
    scale = residual.new_ones(len(residual), 1)
    parts = [residual]
    if call.k.dtype == torch.uint8:
        scale = residual.abs().amax(1, keepdim=True) / 448
        parts = [_e4m3(torch.where(scale == 0, 0, residual / scale)).float()]
    elif call.q.dtype == call.k.dtype == torch.bfloat16:
        # Three bfloat16 rows whose sum is the float32 row: each has the leading 8 bits of the rest.
        rest, parts = residual, []
        for _ in range(3):
            parts.append((rest.view(torch.int32) & -(2**16)).view(torch.float32))
            rest = torch.where(rest.isfinite(), rest - parts[-1], 0)
    else:
        q = _values(q).float()
    # A linear row as two ReLU rows: x = max(0, x) - max(0, -x), where adding the zero is exact.
    linear = torch.stack([row for part in parts for row in (part, -part)], dim=1)
    linear = _raw(_e4m3(linear)) if q.dtype == torch.uint8 else linear.to(q.dtype)
    signed = torch.cat([scale, -scale], 1).repeat(1, len(parts))
    return torch.cat([q, linear], 1), torch.cat([w, signed], 1)


def _top(
    call: _Call,
    rows: tuple[torch.Tensor, torch.Tensor],
    part: slice,
    k: int,
    positions: torch.Tensor | None,
) -> Steps[torch.Tensor]:
    """Entries [queries, k] of the k best positions of all ranks, descending, padded on the right.

    positions [queries, m]: the candidates, -1 for none; None: all positions.
    """
    ks, n, length = call.ks[part], call.n[part], len(call.k)
    keys = call.k, call.k_scale
    if positions is None:
        begin = (ks - call.offset).clamp(0, length)
        end = (ks + n - call.offset).clamp(0, length)
        first = (begin + call.offset - ks)[:, None]
    else:
        local = positions + ks[:, None] - call.offset
        here = (positions >= 0) & (local >= 0) & (local < length)
        count = here.sum(1)
        # Sorted by position, so that ties go to the lower one.
        local = torch.where(here, local, length).sort(1).values
        used = local[local < length]
        keys = call.k[used], None if call.k_scale is None else call.k_scale[used]
        end = count.cumsum(0)
        begin = end - count
    width = max(1, min(k, call.longest))
    config = misa.Config("dsa", top_k=width)
    local_top = call.run(rows[0][part], rows[1][part], keys, (begin, end), config, scores=True)
    index = local_top.indices.long()
    if positions is None:
        at = index + first
    else:
        at = local.gather(1, index.clamp(min=0)) + call.offset - ks[:, None]
    entries = _entries(local_top.scores, at).masked_fill(index < 0, _PADDING)
    gathered = yield partial(call.peers.gather, entries)
    merged = gathered.transpose(0, 1).flatten(1)
    best = merged.topk(min(k, merged.shape[1]), dim=1).values
    return torch.nn.functional.pad(best, (0, k - best.shape[1]), value=_PADDING)


def _entries(scores: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """int64 entries in the order of selection (docs/numerics.md): by score, then lower position.

    NaN is below every number, -0 equals +0.
    """
    bits = (scores + 0.0).view(torch.int32).long()
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = torch.where(scores.isnan(), 1 - 2**31, order)
    return (order << 32) | (_LOW - positions)


def _decoded(entries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions int32 and scores float32 of entries; -1 and -inf for padding."""
    padding = entries == _PADDING
    order = entries >> 32
    scores = torch.where(order < 0, order ^ 0x7FFFFFFF, order).int().view(torch.float32)
    positions = (_LOW - (entries & _LOW)).masked_fill(padding, -1)
    return positions.int(), scores.masked_fill(padding, -torch.inf)


# Elements


def _raw(x: torch.Tensor) -> torch.Tensor:
    """x with e4m3 as bytes, which every torch operation supports."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def _values(x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """Rows of elements, times their scales, in double precision."""
    x = x.view(torch.float8_e4m3fn).float() if x.dtype == torch.uint8 else x
    return x.double() if scale is None else x.double() * scale.double()[:, None]


def _e4m3(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float8_e4m3fn)


def _row_bytes(x: torch.Tensor) -> int:
    return x.shape[1] * x.element_size()
