# SPDX-License-Identifier: Apache-2.0
"""The public functions and classes: a thin layer over misa._core, which checks every argument."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np

from . import _arrays, _core  # type: ignore[attr-defined]  # compiled
from ._arrays import Array
from ._call import (
    PAGE_SIZE,
    WORKSPACE_CAP,
    Selected,
    checked_config,
    checked_execution,
    checked_out,
    checked_shape,
    empty_selected,
    require_device_build,
    returned,
    run_from_means,
    select_into,
    select_paged_into,
)
from ._config import Config, boolean, integer, text


def _checked_wanted(scores: bool, heads: bool, residual: bool) -> tuple[bool, bool, bool]:
    return boolean("scores", scores), boolean("heads", heads), boolean("residual", residual)


def _from_means(
    call: str, arrays: dict[str, Array], width: int, backend: str, threads: int
) -> Array:
    """Calls the function of _core named `call` on block means; returns [T, width]."""
    backend, threads, _ = checked_execution(backend, threads, 0)
    _arrays.require_one_framework(arrays)
    q = arrays["q"]
    if _arrays.is_torch(q):
        from .torch_ops import require_one_device

        require_one_device(arrays)
    tokens, _, _ = checked_shape("q", q, "[T, H, D]")
    out = _arrays.empty(q, (tokens, max(width, 0)), "int32")
    run_from_means(call, arrays, width, out, backend, threads)
    return _arrays.returned(q, out)


def select(
    q: Array,
    w: Array,
    k: Array,
    ks: Array,
    ke: Array,
    *,
    k_scale: Array | None = None,
    offsets: Array | None = None,
    config: Config = Config(),  # noqa: B008 (immutable)
    scores: bool = False,
    heads: bool = False,
    residual: bool = False,
    out: Selected | None = None,
    backend: str = "auto",
    threads: int = 0,
    workspace_cap: int = WORKSPACE_CAP,
) -> Selected:
    """Selects positions for every query of one or more packed sequences with contiguous keys.

    q: [T, H, D] float32, bfloat16 or float8_e4m3fn (also as its bits, uint8); D is 64 or 128.
    w: [T, H] float32, every scale folded in.
    k: [L, D], one of the dtypes of q.
    ks, ke: [T] int32; query t sees the keys s with ks[t] <= s < ke[t].
    k_scale: [L] float32, with float8_e4m3fn keys only.
    offsets: [T] int32, added to the positions of each query, modulo 2^32; ``ks`` gives the indices
        of keys in ``k``.
    scores, heads, residual: whether to return these optional outputs, see :class:`Selected`.
    out: arrays to write and return in place of new ones; those that it has are the outputs,
        whatever the three above say. Rows of its indices and scores may have strides.
    backend: "auto", "cpu", "cuda" or a name from :func:`backends`. Every backend accepts arrays in
        host memory; CUDA tensors need "cuda" or one of its backends. "auto" is the backend that the
        environment variable MISA_BACKEND names, otherwise the best one that the machine can run.
    threads: CPU threads, 0 for as many as the process may use.
    workspace_cap: limit of the workspace, in bytes.

    All arrays are of one framework and on one device. The last dimension is contiguous; other
    strides need no copy. On CUDA tensors the call runs on PyTorch's current stream and does not
    wait for it, and entries of ks and ke out of range are clamped instead of refused.

    Raises ValueError for a wrong argument, MemoryError if the workspace's cap is too small,
    RuntimeError if no backend can do it.
    """
    checked_config(config)
    wanted = _checked_wanted(scores, heads, residual)
    execution = checked_execution(backend, threads, workspace_cap)
    if _arrays.is_torch(q):
        from . import torch_ops

        return torch_ops.select(q, w, k, ks, ke, k_scale, offsets, out, config, *wanted, *execution)
    _arrays.require_one_framework(
        {"q": q, "w": w, "k": k, "ks": ks, "ke": ke, "k_scale": k_scale, "offsets": offsets}
    )
    into = empty_selected(q, config, *wanted) if out is None else checked_out(out)
    select_into(into, q, w, k, ks, ke, k_scale, offsets, config, *execution)
    return returned(q, into) if out is None else out


def select_paged(
    q: Array,
    w: Array,
    cache: Array,
    block_table: Array,
    context_lens: Array,
    *,
    next_n: int = 1,
    query_starts: Array | None = None,
    page_sums: Array | None = None,
    largest_scales: Array | None = None,
    sketches: Array | None = None,
    slots: bool = False,
    offsets: Array | None = None,
    config: Config = Config(),  # noqa: B008 (immutable)
    scores: bool = False,
    heads: bool = False,
    residual: bool = False,
    out: Selected | None = None,
    backend: str = "auto",
    threads: int = 0,
    workspace_cap: int = WORKSPACE_CAP,
) -> Selected:
    """Selects positions for the last queries of a batch of sequences in a paged key cache.

    q: [T, H, D], T = B * next_n; row i of sequence b is query b * next_n + i and sees the first
        context_lens[b] - next_n + 1 + i keys.
    w: [T, H] float32.
    cache: uint8 [pages, page_size, D + 4] or [pages, page_size * (D + 4)] (docs/formats.md), where
        page_size is 32, 64 or 128; pages may be padded.
    block_table: int32 [B, max_pages] page numbers.
    context_lens: int32 [B] keys of each sequence; zero or negative is an empty sequence. Or keys
        that each row sees, in any order: [B, next_n], or [T, 1] with query_starts.
    query_starts: int32 [B + 1], ascending from 0 to T; queries query_starts[b] to
        query_starts[b + 1] - 1 belong to sequence b, in place of next_n, which is then 1.
    page_sums, largest_scales: float32 [pages, page_size / 64, D] and [pages, page_size / 64], see
        :func:`append`; computed from the cache if not given, with the same result.
    sketches: uint8 [pages, bytes], see :func:`append`; read on CUDA devices by a config with a
        sketch of as many bits. Otherwise computed from the cache, with the same results; the
        backend cuda-sm90 does not compute them and raises ValueError.
    slots: whether indices are slots of the cache, page * page_size + offset, as ``slots`` of
        :func:`append` are, in place of positions. On CUDA tensors, the slot of a position whose
        page number is out of range is -1.
    offsets: [T] int32, as for :func:`select`; not with slots.

    Other arguments and errors are as for :func:`select`. On CUDA tensors the cache is aligned to 16
    bytes, and so are its pages and their sums; lengths beyond the block table are clamped; a page
    number out of range stands for keys of score NaN; a query that query_starts gives to no sequence
    is an empty row.
    """
    checked_config(config)
    wanted = _checked_wanted(scores, heads, residual)
    execution = checked_execution(backend, threads, workspace_cap)
    form = integer("next_n", next_n), boolean("slots", slots)
    arrays = (q, w, cache, block_table, context_lens, query_starts, page_sums, largest_scales,
              sketches, offsets)  # fmt: skip
    if _arrays.is_torch(q):
        from . import torch_ops

        return torch_ops.select_paged(*arrays, out, *form, config, *wanted, *execution)
    _arrays.require_one_framework(
        {"q": q, "w": w, "cache": cache, "block_table": block_table, "context_lens": context_lens,
         "query_starts": query_starts, "page_sums": page_sums, "largest_scales": largest_scales,
         "sketches": sketches, "offsets": offsets}
    )  # fmt: skip
    into = empty_selected(q, config, *wanted) if out is None else checked_out(out)
    rest: tuple[Any, ...] = (*form, config, *execution)
    select_paged_into(into, *arrays, *rest)
    return returned(q, into) if out is None else out


def route_from_means(
    q: Array,
    w: Array,
    means: Array,
    starts: Array,
    ends: Array,
    *,
    partial: Array | None = None,
    heads: int,
    backend: str = "auto",
    threads: int = 0,
) -> Array:
    """The heads that the router "pooled" chooses, computed from block means instead of keys.

    For callers that have the means but not all keys in one place, for example with sharded keys.
    ``misa.select`` does the same with the means of its keys (docs/spec.md, MISA).

    q, w, backend, threads: as for :func:`select`.
    means: float32 [M, D], one row per block; M is below 2^30. A block may have any number of keys.
    starts, ends: [T] int32, 0 to M; query t sees the whole blocks of rows starts[t] to ends[t] - 1,
        none if ends[t] <= starts[t].
    partial: [T] int32; if query t also sees a part of the next block, the row that is the mean of
        that part, otherwise -1. None: no query has a partial block.
    heads: h, 0 to H.

    Returns int32 [T, h], ascending; -1 for a query that sees no block. Arrays and errors are as for
    :func:`select`; on CUDA tensors starts and ends out of range are clamped, and an entry of
    partial out of range counts as -1.
    """
    named = {"q": q, "w": w, "means": means, "starts": starts, "ends": ends, "partial": partial}
    return _from_means("route_from_means", named, integer("heads", heads), backend, threads)


def keep_blocks_from_means(
    q: Array,
    w: Array,
    means: Array,
    starts: Array,
    ends: Array,
    *,
    partial: Array | None = None,
    filter_blocks: int,
    backend: str = "auto",
    threads: int = 0,
) -> Array:
    """The blocks that the block filter keeps, computed from block means instead of keys.

    ``misa.select`` does the same with the means of its keys (docs/spec.md, HISA).

    filter_blocks: blocks kept per query, 2 or more: the first, the last, and the best others.

    Other arguments and errors are as for :func:`route_from_means`.

    Returns int32 [T, filter_blocks], for each query the numbers of its blocks, counted from 0,
    ascending; -1 on the right if it has fewer.
    """
    named = {"q": q, "w": w, "means": means, "starts": starts, "ends": ends, "partial": partial}
    count = integer("filter_blocks", filter_blocks)
    return _from_means("keep_blocks_from_means", named, count, backend, threads)


def append(
    cache: Array,
    k: Array | None,
    slots: Array,
    *,
    scale_format: str = "f32",
    page_sums: Array | None = None,
    largest_scales: Array | None = None,
    sketches: Array | None = None,
) -> None:
    """Quantises keys into a paged cache and updates what is derived from them.

    cache: uint8, as for :func:`select_paged`; written.
    k: [N, D] float32 or bfloat16; None if an engine has written the keys' bytes and scales into the
        slots, so that only what is derived from them is left to do.
    slots: int64 [N], page * page_size + offset, each at most once; -1 skips the key.
    scale_format: "f32": a key's scale is max(amax, 1e-4) / 448; "ue8m0": that rounded up to a power
        of two.
    page_sums: float32 [pages, page_size / 64, D], the sum of the dequantised keys of each aligned
        group of 64 tokens; written. None for pages of 32 tokens.
    largest_scales: float32 [pages, page_size / 64], the largest absolute scale of each group;
        written. Only with page_sums.
    sketches: uint8 [pages, bytes], the sketch of each page (docs/formats.md): page_size * (D/4 + 2)
        bytes of 2 bits an element, or page_size * (D/2 + D/32) of 4 bits; written. On a CUDA device
        it is aligned to 16 bytes, and so are its rows.

    A group's content then ends with the last key appended to it. Sums made in host memory are for
    selections there, and those made on a device for selections there: after a copy to the other,
    :func:`rebuild` makes them again. Raises ValueError for a wrong argument.

    All arrays are in host memory or on one CUDA device, where the call runs on PyTorch's current
    stream and does not wait for it; slots out of range are skipped there, and of equal slots the
    last one counts. In code that torch.compile compiles, the call is an operator; its arrays are
    tensors there. So are :func:`rebuild` and :func:`copy_pages`.
    """
    if _arrays.is_torch(cache) and _arrays.compiling():
        from . import _torch_writes

        _torch_writes.append(cache, k, slots, scale_format, page_sums, largest_scales, sketches)
        return
    _write_cache(
        "append",
        cache,
        {"cache": cache, "k": k, "slots": slots},
        {"page_sums": page_sums, "largest_scales": largest_scales, "sketches": sketches},
        text("scale_format", scale_format),
    )


def _write_cache(
    call: str, like: Array, inputs: dict[str, Array], derived: dict[str, Array], *options: Any
) -> None:
    """Calls the function of _core named `call` in host memory or on the cache's device."""
    device = _arrays.cuda_device("cache", like)
    read = _arrays.readable if device is None else _arrays.on_stream
    arrays = [
        _arrays.writable(name, array) if name in ("cache", "page_sums") else read(name, array)
        for name, array in inputs.items()
    ]
    written = [_arrays.writable(name, array) for name, array in derived.items()]
    if device is None:
        getattr(_core, call)(*arrays, *options, *written)
    else:
        require_device_build()
        on_device = getattr(_core, f"{call}_on_device")
        on_device(*arrays, *options, *written, device, _arrays.stream_of(like))


def rebuild(
    cache: Array,
    page_sums: Array | None,
    pages: Array,
    filled: Array | None = None,
    *,
    largest_scales: Array | None = None,
    sketches: Array | None = None,
) -> None:
    """Rebuilds what is derived from some pages from their bytes.

    cache, page_sums, largest_scales, sketches: as for :func:`append`; the last three are written.
    pages: int32 [N] page numbers, each at most once on a CUDA device.
    filled: int32 [N], how many tokens of each page count; all if not given.

    Raises ValueError for a wrong argument. All arrays are in host memory or on one CUDA device, as
    for :func:`append`; there pages out of range are skipped, and filled is clamped.
    """
    if _arrays.is_torch(cache) and _arrays.compiling():
        from . import _torch_writes

        _torch_writes.rebuild(cache, page_sums, pages, filled, largest_scales, sketches)
        return
    inputs = {"cache": cache, "page_sums": page_sums, "pages": pages, "filled": filled}
    derived = {"largest_scales": largest_scales, "sketches": sketches}
    _write_cache("rebuild", cache, inputs, derived)


def copy_pages(
    cache: Array,
    from_: Array,
    to: Array,
    *,
    page_sums: Array | None = None,
    largest_scales: Array | None = None,
    sketches: Array | None = None,
) -> None:
    """Copies whole pages inside a cache, with what is derived from them.

    cache, page_sums, largest_scales, sketches: as for :func:`append`; all are written.
    from_, to: int32 [N] page numbers; page from_[i] is copied to page to[i]. No page is in to twice
        or in both.

    Raises ValueError for a wrong argument. All arrays are in host memory or on one CUDA device, as
    for :func:`append`; there pairs with a page out of range are skipped.
    """
    if _arrays.is_torch(cache) and _arrays.compiling():
        from . import _torch_writes

        _torch_writes.copy_pages(cache, from_, to, page_sums, largest_scales, sketches)
        return
    _write_cache(
        "copy_pages",
        cache,
        {"cache": cache, "from_": from_, "to": to},
        {"page_sums": page_sums, "largest_scales": largest_scales, "sketches": sketches},
    )


class PageTail(NamedTuple):
    """Where a page that carries its derived data has them, in bytes from its start; each begins on
    a multiple of 128.

    page_sums: float32 [page_size / 64, D].
    largest_scales: float32 [page_size / 64].
    sketch: the page's codes, then its scales.
    page_stride: the least page stride, a multiple of 128.
    """

    page_sums: int
    largest_scales: int
    sketch: int
    page_stride: int


def page_tail(dim: int, page_size: int = PAGE_SIZE, sketch_bits: int = 0) -> PageTail:
    """The layout of a page that carries its derived data in its tail (docs/formats.md).

    dim: D, 64 or 128.
    page_size: 32, 64 or 128.
    sketch_bits: of an element of its sketch, 2 or 4; 0 without one.

    Views of such a page are arrays with the page stride: with ``data`` uint8 [pages, page_stride],
    the cache is ``data[:, : page_size * (dim + 4)]`` and the page sums are
    ``data[:, tail.page_sums :][:, : groups * dim * 4].view("f4").reshape(-1, groups, dim)``, where
    groups is page_size / 64. Raises ValueError for a wrong argument.
    """
    sizes = integer("dim", dim, 64), integer("page_size", page_size, 64)
    return PageTail(*_core.page_tail(*sizes, integer("sketch_bits", sketch_bits)))


class Cache:
    """A paged key cache in NumPy arrays.

    data: uint8 [pages, page_size, dim + 4].
    page_sums: float32 [pages, page_size / 64, dim]; None for pages of 32 tokens.
    largest_scales: float32 [pages, page_size / 64]; None for pages of 32 tokens.
    """

    def __init__(
        self, pages: int, dim: int = 128, *, page_size: int = PAGE_SIZE, scale_format: str = "f32"
    ) -> None:
        """An empty cache of zeros; dim is 64 or 128, page_size 32, 64 or 128, scale_format as for
        :func:`append`."""
        pages = integer("pages", pages, 64)
        if pages < 0:
            raise ValueError(f"pages: expected 0 or more, got {pages}")
        page_tail(dim, page_size)  # validates only
        groups = page_size // 64
        self.data = np.zeros((pages, page_size, dim + 4), np.uint8)
        self.page_sums = np.zeros((pages, groups, dim), np.float32) if groups else None
        self.largest_scales = np.zeros((pages, groups), np.float32) if groups else None
        self.scale_format = scale_format
        self.append(np.empty((0, dim), np.float32), np.empty(0, np.int64))  # validates only

    def append(self, k: Array, slots: Array) -> None:
        """Quantises keys k [N, dim] into slots [N]; see :func:`append`."""
        append(
            self.data, k, slots, scale_format=self.scale_format, page_sums=self.page_sums,
            largest_scales=self.largest_scales,
        )  # fmt: skip

    def select(
        self, q: Array, w: Array, block_table: Array, context_lens: Array, **options: Any
    ) -> Selected:
        """:func:`select_paged` over this cache; the options are the same, but for the cache's own
        ``page_sums`` and ``largest_scales``."""
        for name in ("page_sums", "largest_scales"):
            if name in options:
                raise ValueError(f"{name}: expected none, for the cache has its own, got one")
        return select_paged(
            q, w, self.data, block_table, context_lens, page_sums=self.page_sums,
            largest_scales=self.largest_scales, **options,
        )  # fmt: skip


def compare(
    q: Array,
    w: Array,
    k: Array,
    ks: Array,
    ke: Array,
    *,
    k_scale: Array | None = None,
    configs: Sequence[Config],
    baseline: Config = Config("dsa"),  # noqa: B008 (immutable)
    scores: bool = False,
    backend: str = "auto",
) -> list[dict[str, Any]]:
    """How much of a baseline's selection each config finds; arrays of NumPy or PyTorch.

    Arguments are as for :func:`select`. What is compared are the rows that see more than top_k
    keys: in any other row every config selects everything. ``misa compare`` counts the same rows.

    Returns a dict per config: its fields, by name; ``rows``, how many rows were compared;
    ``recall_mean`` and ``recall_min``, the share of the baseline's positions that it selects; with
    ``scores`` also ``score_mass``, the sum of the baseline's scores at the positions found, as a
    share of the sum of all its scores. The shares are NaN if no row was compared.

    Raises ValueError for a config with another top_k than the baseline's.
    """
    for i, config in enumerate(configs):
        if checked_config(config).top_k != checked_config(baseline).top_k:
            raise ValueError(
                f"configs[{i}].top_k: expected {baseline.top_k}, the baseline's, got {config.top_k}"
            )
    call: dict[str, Any] = {"k_scale": k_scale, "backend": backend}
    wanted = select(q, w, k, ks, ke, config=baseline, scores=scores, **call)
    positions = _arrays.to_numpy("q", wanted.indices)
    # Out of range on a CUDA device, bounds are clamped.
    first, last = (np.clip(_arrays.to_numpy("ks", x), 0, len(k)).astype(int) for x in (ks, ke))
    rows = last - first > baseline.top_k
    positions = positions[rows]
    there = positions >= 0
    weights = np.where(there, _arrays.to_numpy("q", wanted.scores)[rows], 0) if scores else None
    results = []
    for config in configs:
        got = _arrays.to_numpy("q", select(q, w, k, ks, ke, config=config, **call).indices)[rows]
        found = there & np.array(
            [np.isin(p, g) for p, g in zip(positions, got, strict=True)], bool
        ).reshape(positions.shape)
        recall = found.sum(1) / there.sum(1)
        result = {field.name: getattr(config, field.name) for field in fields(Config)}
        result["rows"] = len(recall)
        result["recall_mean"] = float(recall.mean()) if len(recall) else float("nan")
        result["recall_min"] = float(recall.min()) if len(recall) else float("nan")
        if weights is not None:
            total = weights.sum(dtype=np.float64)
            kept = weights[found].sum(dtype=np.float64)
            result["score_mass"] = float(kept / total) if total else float("nan")
        results.append(result)
    return results
