# SPDX-License-Identifier: Apache-2.0
"""PyTorch operators ``misa::select`` and ``misa::select_paged``.

Both are opaque to torch.compile and have fake implementations; on CUDA tensors both run on the
current stream without a synchronisation and may be captured into a CUDA graph. misa.select and
misa.select_paged call them for tensors, with the fields of a Config as separate arguments.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ._arrays import cuda_device, dtype_name
from ._call import (
    Selected,
    checked_config,
    device_plan,
    empty_selected,
    run_on_device,
    select_into,
    select_paged_into,
)
from ._config import Config

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""indices, scores, heads and residual; one that is not requested or does not exist is an empty
tensor of one dimension."""

Tensors = Mapping[str, Tensor | None]
"""The tensors of a call by name; None for an optional one that is not given."""


@lru_cache(maxsize=256)
def _config(*fields: Any) -> Config:
    (top_k, router, heads, block, residual, filter_block, filter_blocks, candidates, dense_work,
     ordered, static_heads) = fields  # fmt: skip
    config = Config(
        "dsa", top_k=top_k, router=router, heads=heads, block=block, residual=residual,
        filter_block=filter_block, filter_blocks=filter_blocks, candidates=candidates,
        dense_work=dense_work, ordered=ordered, static_heads=static_heads,
    )  # fmt: skip
    return checked_config(config)


def _fields(config: Config) -> tuple:
    return (
        config.top_k, config.router, config.heads, config.block, config.residual,
        config.filter_block, config.filter_blocks, config.candidates, config.dense_work,
        config.ordered, config.static_heads,
    )  # fmt: skip


def _tensors(q: Tensor, selected: Selected) -> Outputs:
    return tuple(q.new_empty(0) if array is None else array for array in selected)


def _selected(outputs: Outputs) -> Selected:
    return Selected(*(tensor if tensor.dim() == 2 else None for tensor in outputs))


def require_tensors(arguments: Mapping[str, object], optional: Collection[str]) -> None:
    """Raises ValueError unless all arguments are tensors; optional ones may be None."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor) and not (name in optional and value is None):
            raise ValueError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _common_device(tensors: Tensors) -> torch.device:
    devices = [tensor.device for tensor in tensors.values() if tensor is not None]
    return max(devices, key=devices.count)


def require_one_device(tensors: Tensors) -> None:
    """Raises ValueError that names a tensor on another device than most of them."""
    common = _common_device(tensors)
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != common:
            raise ValueError(
                f"{name}: expected a tensor on {common} as the others are, got one on "
                f"{tensor.device}"
            )


@torch.library.custom_op("misa::select", mutates_args=())
def select_op(
    q: Tensor,
    w: Tensor,
    k: Tensor,
    ks: Tensor,
    ke: Tensor,
    k_scale: Tensor | None,
    top_k: int,
    router: str,
    heads: int,
    block: int,
    residual: bool,
    filter_block: int,
    filter_blocks: int,
    candidates: int,
    dense_work: int,
    ordered: bool,
    static_heads: Sequence[int],
    want_scores: bool,
    want_heads: bool,
    want_residual: bool,
    backend: str,
    threads: int,
    workspace_cap: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Like :func:`misa.select`, with the fields of a Config as separate arguments; returns
    :data:`Outputs`."""
    config = _config(
        top_k, router, heads, block, residual, filter_block, filter_blocks, candidates, dense_work,
        ordered, tuple(static_heads),
    )  # fmt: skip
    require_one_device({"q": q, "w": w, "k": k, "ks": ks, "ke": ke, "k_scale": k_scale})
    out = empty_selected(q, config, want_scores, want_heads, want_residual)
    select_into(out, q, w, k, ks, ke, k_scale, config, backend, threads, workspace_cap)
    return _tensors(q, out)


@torch.library.custom_op("misa::select_paged", mutates_args=())
def select_paged_op(
    q: Tensor,
    w: Tensor,
    cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    query_starts: Tensor | None,
    page_sums: Tensor | None,
    largest_scales: Tensor | None,
    next_n: int,
    top_k: int,
    router: str,
    heads: int,
    block: int,
    residual: bool,
    filter_block: int,
    filter_blocks: int,
    candidates: int,
    dense_work: int,
    ordered: bool,
    static_heads: Sequence[int],
    want_scores: bool,
    want_heads: bool,
    want_residual: bool,
    backend: str,
    threads: int,
    workspace_cap: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Like :func:`misa.select_paged`, with the fields of a Config as separate arguments; returns
    :data:`Outputs`."""
    config = _config(
        top_k, router, heads, block, residual, filter_block, filter_blocks, candidates, dense_work,
        ordered, tuple(static_heads),
    )  # fmt: skip
    require_one_device(
        {"q": q, "w": w, "cache": cache, "block_table": block_table, "context_lens": context_lens,
         "query_starts": query_starts, "page_sums": page_sums, "largest_scales": largest_scales}
    )  # fmt: skip
    out = empty_selected(q, config, want_scores, want_heads, want_residual)
    device = cuda_device("q", q)
    if device is None:
        select_paged_into(
            out, q, w, cache, block_table, context_lens, query_starts, page_sums, largest_scales,
            next_n, config, backend, threads, workspace_cap,
        )  # fmt: skip
    else:
        tokens, of_heads, dim = q.shape
        k, k_scale, ks, ke = gather(cache, block_table, context_lens, next_n, query_starts, tokens)
        plan = device_plan(
            config, tokens, of_heads, dim, k.shape[0] // max(len(block_table), 1),
            dtype_name("q", q.dtype), "e4m3", k.shape[0], device, backend, workspace_cap,
        )  # fmt: skip
        run_on_device(plan, q, w, k, ks, ke, k_scale, out, None)
    return _tensors(q, out)


_ELEMENTS = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.uint16)
_FLOAT, _INT, _BYTE = (torch.float32,), (torch.int32,), (torch.uint8,)
# Dtypes and dimensions; equal letters are equal sizes, * is any size.
_RAGGED = {"q": (_ELEMENTS, "THD"), "w": (_FLOAT, "TH"), "k": (_ELEMENTS, "LD"), "ks": (_INT, "T"),
           "ke": (_INT, "T"), "k_scale": (_FLOAT, "L")}  # fmt: skip
_PAGED = {
    "q": (_ELEMENTS, "THD"),
    "w": (_FLOAT, "TH"),
    "cache": (_BYTE, "P**"),
    "block_table": (_INT, "B*"),
    "context_lens": (_INT, "B"),
    "query_starts": (_INT, "*"),
    "page_sums": (_FLOAT, "P*D"),
    "largest_scales": (_FLOAT, "P*"),
}


def _require_layouts(tensors: Tensors, layouts: Mapping[str, tuple]) -> None:
    sizes: dict[str, int] = {}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        dtypes, layout = layouts[name]
        names = " or ".join(map(str, dtypes))
        _require(tensor.dtype in dtypes, f"{name}: expected {names}, got {tensor.dtype}")
        _require(
            tensor.dim() == len(layout),
            f"{name}: expected [{', '.join(layout)}], got {tensor.dim()} dimensions",
        )
        for letter, size in zip(layout, tensor.shape, strict=True):
            if letter == "*":
                continue
            expected = sizes.setdefault(letter, size)
            _require(size == expected, f"{name}: expected {letter} = {expected}, got {size}")


def _fake(
    tensors: Tensors,
    layouts: Mapping[str, tuple],
    top_k: int,
    router: str,
    heads: int,
    residual: bool,
    want_scores: bool,
    want_heads: bool,
    want_residual: bool,
) -> Outputs:
    # With fake tensors nothing is checked: the real run follows and reports every error, while the
    # compiler would wrap an error from here into one of its own.
    if not isinstance(tensors["q"], FakeTensor):
        require_one_device(tensors)
        _require_layouts(tensors, layouts)
        _require(top_k >= 1, f"top_k: expected 1 or more, got {top_k}")
    q: Any = tensors["q"]
    device = _common_device(tensors)
    tokens, dim = q.shape[:1] or (0,), q.shape[2:3]
    routed, linear = want_heads and router != "all", want_residual and residual

    def output(wanted: bool, dtype: torch.dtype, *shape: int) -> Tensor:
        if not wanted:
            return q.new_empty(0, device=device)
        return torch.empty(shape, dtype=dtype, device=device)

    return (
        output(True, torch.int32, *tokens, top_k),
        output(want_scores, torch.float32, *tokens, top_k),
        output(routed, torch.int32, *tokens, heads),
        output(linear, torch.float32, *tokens, *dim),
    )


@select_op.register_fake
def _(q, w, k, ks, ke, k_scale, top_k, router, heads, block, residual, filter_block,
      filter_blocks, candidates, dense_work, ordered, static_heads, want_scores, want_heads,
      want_residual, backend, threads, workspace_cap):  # fmt: skip
    tensors = {"q": q, "w": w, "k": k, "ks": ks, "ke": ke, "k_scale": k_scale}
    wanted = want_scores, want_heads, want_residual
    return _fake(tensors, _RAGGED, top_k, router, heads, residual, *wanted)


@select_paged_op.register_fake
def _(q, w, cache, block_table, context_lens, query_starts, page_sums, largest_scales, next_n,
      top_k, router, heads, block, residual, filter_block, filter_blocks, candidates, dense_work,
      ordered, static_heads, want_scores, want_heads, want_residual, backend, threads,
      workspace_cap):  # fmt: skip
    tensors = {"q": q, "w": w, "cache": cache, "block_table": block_table,
               "context_lens": context_lens, "query_starts": query_starts, "page_sums": page_sums,
               "largest_scales": largest_scales}  # fmt: skip
    layouts = _PAGED | {
        "cache": (_BYTE, "P*" if cache.dim() == 2 else "P**"),
        "context_lens": (_INT, "B*" if context_lens.dim() == 2 else "B"),
    }
    wanted = want_scores, want_heads, want_residual
    return _fake(tensors, layouts, top_k, router, heads, residual, *wanted)


def _no_gradients(ctx, inputs, output):
    ctx.mark_non_differentiable(*output)


for _op in (select_op, select_paged_op):
    # PyTorch needs a backward formula even for an operator without gradients, but never calls it.
    _op.register_autograd(lambda ctx, *gradients: None, setup_context=_no_gradients)


def select(
    q: Tensor,
    w: Tensor,
    k: Tensor,
    ks: Tensor,
    ke: Tensor,
    k_scale: Tensor | None,
    config: Config,
    scores: bool,
    heads: bool,
    residual: bool,
    backend: str,
    threads: int,
    workspace_cap: int,
) -> Selected:
    """:func:`misa.select` on tensors."""
    require_tensors({"w": w, "k": k, "ks": ks, "ke": ke, "k_scale": k_scale}, ("k_scale",))
    outputs = torch.ops.misa.select(
        q, w, k, ks, ke, k_scale, *_fields(config), scores, heads, residual, backend, threads,
        workspace_cap,
    )  # fmt: skip
    return _selected(outputs)


def select_paged(
    q: Tensor,
    w: Tensor,
    cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    query_starts: Tensor | None,
    page_sums: Tensor | None,
    largest_scales: Tensor | None,
    next_n: int,
    config: Config,
    scores: bool,
    heads: bool,
    residual: bool,
    backend: str,
    threads: int,
    workspace_cap: int,
) -> Selected:
    """:func:`misa.select_paged` on tensors."""
    require_tensors(
        {"w": w, "cache": cache, "block_table": block_table, "context_lens": context_lens,
         "query_starts": query_starts, "page_sums": page_sums, "largest_scales": largest_scales},
        ("query_starts", "page_sums", "largest_scales"),
    )  # fmt: skip
    outputs = torch.ops.misa.select_paged(
        q, w, cache, block_table, context_lens, query_starts, page_sums, largest_scales, next_n,
        *_fields(config), scores, heads, residual, backend, threads, workspace_cap,
    )  # fmt: skip
    return _selected(outputs)


_FLAT_PAGES = {size * (dim + 4): (size, dim) for size in (32, 64, 128) for dim in (64, 128)}


def _page_shape(cache: Tensor) -> tuple[int, int]:
    """The page size and D of a cache."""
    if cache.dim() == 3 and cache.shape[1] * cache.shape[2] in _FLAT_PAGES:
        found = _FLAT_PAGES[cache.shape[1] * cache.shape[2]]
        if found[0] == cache.shape[1]:
            return found
    if cache.dim() == 2 and cache.shape[1] in _FLAT_PAGES:
        return _FLAT_PAGES[cache.shape[1]]
    raise ValueError(
        "cache: expected [pages, page_size, D + 4] or [pages, page_size * (D + 4)], page_size 32, "
        f"64 or 128, got {list(cache.shape)}"
    )


def gather(
    cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    next_n: int,
    query_starts: Tensor | None = None,
    tokens: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The keys of a paged cache as contiguous keys, on the tensors' device without a
    synchronisation.

    cache: uint8 [pages, page_size, D + 4] or [pages, page_size * (D + 4)].
    block_table: int32 [B, max_pages]; page numbers out of range are clamped.
    context_lens: int32 [B] or [B, next_n], limited to max_pages * page_size.
    query_starts, tokens: as for :func:`misa.select_paged`, and T; values out of range are clamped.

    Returns k uint8 [L, D], k_scale float32 [L], ks and ke int32 [T], L = B * max_pages * page_size:
    sequence b has the keys from b * max_pages * page_size on. Raises ValueError for a wrong
    argument.
    """
    given = {"cache": cache, "block_table": block_table, "context_lens": context_lens,
             "query_starts": query_starts}  # fmt: skip
    for name, tensor in given.items():
        _require(
            tensor is None or tensor.layout == torch.strided,
            f"{name}: expected a dense tensor, got {getattr(tensor, 'layout', None)}",
        )
    _require(cache.dtype == torch.uint8, f"cache: expected torch.uint8, got {cache.dtype}")
    page_size, dim = _page_shape(cache)
    _require(
        block_table.dtype == torch.int32 and block_table.dim() == 2,
        f"block_table: expected torch.int32 [B, max_pages], got {block_table.dtype} "
        f"{list(block_table.shape)}",
    )
    batch, max_pages = block_table.shape
    _require(next_n >= 1, f"next_n: expected 1 or more, got {next_n}")
    by_row = query_starts is None and context_lens.dim() == 2
    _require(
        context_lens.dtype == torch.int32
        and context_lens.shape == ((batch, next_n) if by_row else (batch,)),
        f"context_lens: expected torch.int32 [{batch}] or, without query_starts, "
        f"[{batch}, {next_n}], got {context_lens.dtype} {list(context_lens.shape)}",
    )
    longest = max_pages * page_size
    _require(
        batch * longest < 2**31,
        f"block_table: expected fewer than 2^31 keys, got {batch} * {longest}",
    )
    pages = cache.flatten(1)
    _require(pages.shape[0] > 0 or batch * max_pages == 0, "cache: expected 1 page or more, got 0")
    chosen = block_table.flatten().long().clamp(0, max(pages.shape[0] - 1, 0))
    k = pages[:, : page_size * dim][chosen].view(-1, dim)
    k_scale = pages[:, page_size * dim :][chosen].view(torch.float32).flatten()

    device = block_table.device
    if query_starts is None:
        first = torch.arange(batch, dtype=torch.int32, device=device)[:, None] * longest
        row = torch.arange(next_n, dtype=torch.int32, device=device)
        length = context_lens if by_row else context_lens[:, None] - next_n + 1 + row
        ks, length = first.repeat(1, next_n).flatten(), length.flatten()
    else:
        _require(next_n == 1, f"next_n: expected 1 with query_starts, got {next_n}")
        _require(
            query_starts.dtype == torch.int32 and query_starts.shape == (batch + 1,),
            f"query_starts: expected torch.int32 [{batch + 1}], got {query_starts.dtype} "
            f"{list(query_starts.shape)}",
        )
        row = torch.arange(tokens if batch > 0 else 0, dtype=torch.int32, device=device)
        sequence = torch.searchsorted(query_starts, row, right=True) - 1
        sequence = sequence.clamp(0, max(batch - 1, 0))
        ks = sequence.int() * longest
        length = context_lens[sequence] - (query_starts[sequence + 1] - 1 - row)
    return k, k_scale, ks, ks + length.clamp(0, longest)
