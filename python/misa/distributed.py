# SPDX-License-Identifier: Apache-2.0
"""Selection over keys that are sharded across the ranks of a torch.distributed group.

Every rank holds a contiguous part of the keys and all queries. The ranks agree on each query's
heads and on its residual row, each ranks the keys it holds, and the best of all are merged, so the
result on every rank is that of one rank that holds all keys. What is computed where:

- Block means (pooled router, block filter) are sums of what each rank holds, in double precision,
  added in the order of the ranks; what they make of heads and blocks the library says
  (`misa.route_from_means`, `misa.keep_blocks_from_means`).
- The other routers read at most 128 keys a query (spec, MISA-R), which every rank gets.
- Scores are those of `misa.select` on the keys that a rank holds, bit for bit but for the residual
  row of bfloat16 keys, which some instruction sets add in one part and others in three.

Heads or blocks whose values differ by less than single precision rounds may rank differently than
on one rank, as between two backends (docs/numerics.md, Routing).
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

_CHUNK_BYTES = 256 << 20  # bytes that a step over queries may take; more queries take more steps
_LOW = 0xFFFFFFFF  # low half of an entry
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
    """`misa.select` on the keys of all ranks, laid one after the other in the order of the ranks.

    A collective: every rank of `group` (None: the default one) calls it with the same arguments but
    for its keys. All tensors are on one device, which the group has a backend for.

    q: [T, H, D] float32, bfloat16, or float8_e4m3fn (or its bytes as uint8).
    w: [T, H] float32.
    k_local: [L_rank, D] in a dtype of q; L_rank may differ and may be 0. k_scale: [L_rank] float32
        with e4m3 keys.
    ks, ke: [T] int32, query t sees the keys s with ks[t] <= s < ke[t] of all L = sum of L_rank.

    Returns what `misa.select` returns, the same on every rank. Raises on every rank if an argument
    or a step fails on one: there the error itself (ValueError for an argument), elsewhere a
    RuntimeError that names the rank and its error.
    """
    peers = Peers(group)
    options = {"backend": backend, "threads": threads, "workspace_cap": workspace_cap}
    steps = _select(peers, q, w, k_local, ks, ke, k_scale, config, options)
    found = run(peers, steps)
    return found._replace(
        scores=found.scores if scores else None,
        heads=found.heads if heads else None,
        residual=found.residual if residual else None,
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
    n: torch.Tensor  # [T] int64, keys that a query sees
    offset: int  # of this rank's first key
    longest: int  # keys of the rank that has most
    config: misa.Config
    options: dict[str, Any]

    def part(self, rows: torch.Tensor, config: misa.Config) -> _Call:
        """The queries of a mask [T] alone, with an indexer of their own."""
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
        """`misa.select` on this rank, for keys and their scales and for ks and ke."""
        (k, k_scale), (ks, ke) = keys, (span.int() for span in spans)
        return misa.select(
            q, w, k, ks, ke, k_scale=k_scale, config=config, **wanted, **self.options
        )

    def on_means(self, means: _BlockMeans) -> dict[str, Any]:
        """Arguments of `misa.route_from_means` and `misa.keep_blocks_from_means` but the count."""
        options = {name: self.options[name] for name in ("backend", "threads")}
        return {"q": self.q, "w": self.w, **means._asdict(), **options}

    def fetch(self, positions: torch.Tensor) -> Steps[tuple[torch.Tensor, torch.Tensor | None]]:
        """Keys [N, D] at positions [N] of all ranks' keys, and their scales [N] or None."""
        own = positions - self.offset
        held = ((own >= 0) & (own < len(self.k))).nonzero()[:, 0]
        parts = [self.k] if self.k_scale is None else [self.k, self.k_scale[:, None]]
        raw = [part[own[held]].view(torch.uint8) for part in parts]
        # One rank holds a key and the others add zeros.
        packed = raw[0].new_zeros(len(positions), sum(part.shape[1] for part in raw))
        packed[held] = torch.cat(raw, dim=1)
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
    # Queries that DSA selects for, and the others; what neither reports stays an empty row's.
    heads = call.n.new_full((len(q), config.heads), -1).int() if config.router != "all" else None
    residual = torch.zeros_like(q[:, 0], dtype=torch.float32) if config.residual else None
    every_head = misa.Config("dsa", top_k=config.top_k, ordered=config.ordered)
    of_dense = yield from _selected(call.part(dense, every_head))
    of_others = yield from _selected(call.part(~dense, config))
    found = misa.Selected(
        indices=call.n.new_empty(len(q), config.top_k).int(),
        scores=w.new_empty(len(q), config.top_k),
        heads=heads,
        residual=residual,
    )
    for rows, part in ((dense, of_dense), (~dense, of_others)):
        for whole, some in zip(found, part, strict=True):
            if some is not None:
                whole[rows] = some
    return found


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
        found = yield from _top(call, rows, part, first, positions)
        if config.candidates:
            found = yield from _top(call, (call.q, call.w), part, config.top_k, _decoded(found)[0])
        best.append(found)
    entries = torch.cat(best) if best else call.ks.new_empty(0, config.top_k)
    indices, scores = _decoded(entries)
    if config.ordered:
        last = torch.iinfo(torch.int32).max
        order = torch.where(indices < 0, last, indices).argsort(dim=1)
        indices, scores = indices.gather(1, order), scores.gather(1, order)
    return misa.Selected(indices=indices, scores=scores, heads=heads, residual=residual)


def _every_head_routed(call: _Call, unrouted: misa.Config) -> Steps[misa.Selected]:
    """The selection of the config that is left where every head is routed, and what it reports."""
    q, config = call.q, call.config
    found = yield from _selected(replace(call, config=unrouted))
    heads = torch.arange(config.heads, dtype=torch.int32, device=q.device)
    return found._replace(
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
    require_tensors(given, "k_scale")
    require_one_device(given)
    cuda_device("q", q)  # on neither the CPU nor a CUDA device there is nothing to exchange
    if q.ndim != 3:
        raise ValueError(f"q: expected [T, H, D], got {q.ndim} dimensions")
    for name, each in (("ks", ks), ("ke", ke)):
        if each.dtype != torch.int32 or each.shape != q.shape[:1]:
            raise ValueError(
                f"{name}: expected int32 [{q.shape[0]}], got {each.dtype} {list(each.shape)}"
            )
    if k.ndim != 2 or k.shape[1] != q.shape[-1]:
        raise ValueError(f"k_local: expected [L, {q.shape[-1]}], got {list(k.shape)}")
    # No query: it only validates.
    misa.select(
        q[:0], w[:0], k, ks[:0], ke[:0], k_scale=k_scale, config=config, backend=options["backend"]
    )
    if w.shape != q.shape[:2]:
        raise ValueError(f"w: expected {list(q.shape[:2])}, got {list(w.shape)}")

    # What has to be the same on every rank, and the one number that may differ.
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
    for name, each in (("ks", ks), ("ke", ke)):
        wrong = ((each < 0) | (each > total)).nonzero()[:, 0].tolist()
        if wrong:
            got = each[wrong[0]].item()
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
    """Active heads [T, h] int32, ascending, and the residual row [T, D]; None where there is none.

    As `misa.select` returns them; the first rank's, so that every rank has the same.
    """
    config = call.config
    if config.router == "all":
        return None, None
    residual = None
    keys = _core.router_keys(config.router)
    if keys in ("block means", "last"):
        heads = yield from (_pooled if keys == "block means" else _self)(call)
        if config.residual:
            # With nothing of the routed heads in q and w, the row is made of the others.
            routed = heads.clamp(min=0).long()
            w = call.w.scatter(1, routed, 0)
            q = call.q.scatter(1, routed[..., None].expand(-1, -1, call.q.shape[2]), 0)
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
        found = yield from _sampled(call, call.q, call.w, chosen)
        heads, residual = found.heads, found.residual
    heads = yield partial(call.peers.first, heads)
    if residual is not None:
        residual = yield partial(call.peers.first, residual)
    return heads, residual


def _sampled(
    call: _Call, q: torch.Tensor, w: torch.Tensor, config: misa.Config
) -> Steps[misa.Selected]:
    """Routes with the sample S(t) of each query in place of its keys (spec, MISA-R).

    The sample of at most 128 keys is its own sample, so this is the routing of all keys.
    """
    stride = call.n.new_tensor([_core.sample_stride(n) for n in call.n.tolist()])
    count = (call.n + stride - 1) // stride
    # Queries of one start and stride read one grid, each as far as it sees.
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
    """Block means as `misa.route_from_means` takes them."""

    means: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor
    partial: torch.Tensor


def _block_means(call: _Call, block: int) -> Steps[_BlockMeans]:
    starts, sequence = torch.unique(call.ks, return_inverse=True)
    whole, rest = call.n // block, call.n % block
    rows = [(sequence == i).nonzero()[:, 0] for i in range(len(starts))]
    full = [int(whole[each].max()) for each in rows]
    # Every sequence's whole blocks, then a row for each query's partial one.
    sums = call.q.new_zeros(sum(full) + len(call.n), call.q.shape[2], dtype=torch.float64)
    firsts = torch.zeros_like(call.n)
    base = 0
    for start, each, blocks in zip(starts.tolist(), rows, full, strict=True):
        begin = max(start, call.offset)
        end = min(start + int(call.n[each].max()), call.offset + len(call.k))
        stop = -(-(end - start) // block) if begin < end else 0
        for b in range((begin - start) // block, stop):
            low = max(start + b * block, begin)
            high = min(start + (b + 1) * block, end)
            held = slice(low - call.offset, high - call.offset)
            scale = None if call.k_scale is None else call.k_scale[held]
            prefix = _values(call.k[held], scale).cumsum(0)
            if b < blocks:
                sums[base + b] = prefix[-1]
            last = each[(whole[each] == b) & (rest[each] > 0)]
            seen = (call.ks[last] + call.n[last] - low).clamp(max=high - low)
            last, seen = last[seen > 0], seen[seen > 0]
            sums[sum(full) + last] = prefix[seen - 1]
        firsts[each] = base
        base += blocks
    gathered = yield partial(call.peers.gather, sums)
    total = gathered[0]
    for each in gathered[1:]:
        total = total + each
    counts = torch.cat([rest.new_full((base,), block), rest.clamp(min=1)])
    own = base + torch.arange(len(rest), device=rest.device)
    return _BlockMeans(
        means=(total / counts[:, None]).float(),
        starts=firsts.int(),
        ends=(firsts + whole).int(),
        partial=torch.where(rest > 0, own, -1).int(),
    )


def _kept_blocks(call: _Call) -> Steps[torch.Tensor]:
    """Blocks [T, filter_blocks] that the block filter keeps, -1 where there are fewer (HISA)."""
    means = yield from _block_means(call, call.config.filter_block)
    kept = misa.keep_blocks_from_means(
        filter_blocks=call.config.filter_blocks, **call.on_means(means)
    )
    return (yield partial(call.peers.first, kept))


def _positions(call: _Call, blocks: torch.Tensor, part: slice) -> torch.Tensor:
    """Positions [queries, blocks * block] that queries see in their kept blocks, else -1."""
    block = call.config.filter_block
    inside = torch.arange(block, device=blocks.device)
    positions = (blocks[..., None] * block + inside).flatten(1)
    hidden = (positions < 0) | (positions >= call.n[part, None])
    return positions.masked_fill(hidden, -1)


# Scoring and merging


def _rows(
    call: _Call, heads: torch.Tensor | None, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [T, R, D] and weights [T, R] whose score over all R rows is the routed one."""
    if heads is None:
        return call.q, call.w
    at = heads.clamp(min=0).long()
    w = call.w.gather(1, at)
    q = call.q.gather(1, at[..., None].expand(-1, -1, call.q.shape[2]))
    # With every head routed there is nothing left for a residual row to stand for.
    if residual is None or heads.shape[1] == call.q.shape[1]:
        return q, w
    scale = residual.new_ones(len(residual), 1)
    parts = [residual]
    if call.k.dtype == torch.uint8:
        scale = residual.abs().amax(1, keepdim=True) / 448
        parts = [_e4m3(torch.where(scale == 0, 0, residual / scale)).float()]
    elif call.q.dtype == call.k.dtype == torch.bfloat16:
        # Three rows whose sum is the float32 row: each takes the leading 8 bits of what is left.
        rest, parts = residual, []
        for _ in range(3):
            parts.append((rest.view(torch.int32) & -(2**16)).view(torch.float32))
            rest = torch.where(rest.isfinite(), rest - parts[-1], 0)
    else:
        q = _values(q).float()
    # x = max(0, x) - max(0, -x), and adding a zero is exact.
    linear = torch.stack([row for each in parts for row in (each, -each)], dim=1)
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
    """Entries [queries, k] of the k best positions of all ranks, falling; padding on the right.

    positions [queries, m]: the only ones that count, -1 where there are fewer; None: all.
    """
    ks, n, length = call.ks[part], call.n[part], len(call.k)
    keys = call.k, call.k_scale
    if positions is None:
        begin = (ks - call.offset).clamp(0, length)
        end = (ks + n - call.offset).clamp(0, length)
        first = (begin + call.offset - ks)[:, None]
    else:
        own = positions + ks[:, None] - call.offset
        held = (positions >= 0) & (own >= 0) & (own < length)
        count = held.sum(1)
        # In order of position, so that ties go to the lower one.
        own = torch.where(held, own, length).sort(1).values
        taken = own[own < length]
        keys = call.k[taken], None if call.k_scale is None else call.k_scale[taken]
        end = count.cumsum(0)
        begin = end - count
    width = max(1, min(k, call.longest))
    config = misa.Config("dsa", top_k=width)
    found = call.run(rows[0][part], rows[1][part], keys, (begin, end), config, scores=True)
    index = found.indices.long()
    if positions is None:
        at = index + first
    else:
        at = own.gather(1, index.clamp(min=0)) + call.offset - ks[:, None]
    entries = _entries(found.scores, at).masked_fill(index < 0, _PADDING)
    gathered = yield partial(call.peers.gather, entries)
    merged = gathered.transpose(0, 1).flatten(1)
    best = merged.topk(min(k, merged.shape[1]), dim=1).values
    return torch.nn.functional.pad(best, (0, k - best.shape[1]), value=_PADDING)


def _entries(scores: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """int64 in the order of selection (docs/numerics.md): float32 score first, lower position next.

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
    """x with e4m3 as bytes, which every torch operation can move."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def _values(x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """What rows of elements stand for, in double precision."""
    x = x.view(torch.float8_e4m3fn).float() if x.dtype == torch.uint8 else x
    return x.double() if scale is None else x.double() * scale.double()[:, None]


def _e4m3(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float8_e4m3fn)


def _row_bytes(x: torch.Tensor) -> int:
    return x.shape[1] * x.element_size()
