# SPDX-License-Identifier: Apache-2.0
"""PyTorch operators: ``misa::select`` and ``misa::select_paged``, the same with outputs that they
write, ``misa::select_out`` and ``misa::select_paged_out``, and the other calls that write their
arrays, ``misa::append``, ``misa::rebuild``, ``misa::copy_pages`` and ``misa::top_k_out``.

All are opaque to torch.compile and have fake implementations; on CUDA tensors all run on the
current stream without a synchronisation and may be captured into a CUDA graph. misa.select and
misa.select_paged call them for tensors, with the fields of a Config as separate arguments;
misa.append, misa.rebuild, misa.copy_pages and misa.top_k do in compiled code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ._arrays import require_writable
from ._call import (
    Selected,
    checked_config,
    checked_out,
    empty_selected,
    select_into,
    select_paged_into,
)
from ._config import Config
from ._torch_writes import (
    Tensors,
    common_device,
    register_fake_writing,
    require,
    require_one_device,
    require_tensors,
)

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""indices, scores, heads and residual; one that is not requested or does not exist is an empty
tensor of one dimension."""


@lru_cache(maxsize=256)
def _config(*fields: Any) -> Config:
    (top_k, router, heads, block, residual, filter_block, filter_blocks, candidates, sketch,
     dense_work, ordered, static_heads) = fields  # fmt: skip
    config = Config(
        "dsa", top_k=top_k, router=router, heads=heads, block=block, residual=residual,
        filter_block=filter_block, filter_blocks=filter_blocks, candidates=candidates,
        sketch=sketch, dense_work=dense_work, ordered=ordered, static_heads=static_heads,
    )  # fmt: skip
    return checked_config(config)


def _fields(config: Config) -> tuple:
    return (
        config.top_k, config.router, config.heads, config.block, config.residual,
        config.filter_block, config.filter_blocks, config.candidates, config.sketch,
        config.dense_work, config.ordered, config.static_heads,
    )  # fmt: skip


def _tensors(q: Tensor, selected: Selected) -> Outputs:
    return tuple(q.new_empty(0) if array is None else array for array in selected)


def _selected(outputs: Outputs) -> Selected:
    return Selected(*(tensor if tensor.dim() == 2 else None for tensor in outputs))


@torch.library.custom_op("misa::select", mutates_args=())
def select_op(
    q: Tensor,
    w: Tensor,
    k: Tensor,
    ks: Tensor,
    ke: Tensor,
    k_scale: Tensor | None,
    offsets: Tensor | None,
    top_k: int,
    router: str,
    heads: int,
    block: int,
    residual: bool,
    filter_block: int,
    filter_blocks: int,
    candidates: int,
    sketch: int,
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
        top_k, router, heads, block, residual, filter_block, filter_blocks, candidates, sketch,
        dense_work, ordered, tuple(static_heads),
    )  # fmt: skip
    require_one_device(
        {"q": q, "w": w, "k": k, "ks": ks, "ke": ke, "k_scale": k_scale, "offsets": offsets}
    )
    out = empty_selected(q, config, want_scores, want_heads, want_residual)
    select_into(out, q, w, k, ks, ke, k_scale, offsets, config, backend, threads, workspace_cap)
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
    sketches: Tensor | None,
    offsets: Tensor | None,
    next_n: int,
    slots: bool,
    top_k: int,
    router: str,
    heads: int,
    block: int,
    residual: bool,
    filter_block: int,
    filter_blocks: int,
    candidates: int,
    sketch: int,
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
        top_k, router, heads, block, residual, filter_block, filter_blocks, candidates, sketch,
        dense_work, ordered, tuple(static_heads),
    )  # fmt: skip
    require_one_device(
        {"q": q, "w": w, "cache": cache, "block_table": block_table, "context_lens": context_lens,
         "query_starts": query_starts, "page_sums": page_sums, "largest_scales": largest_scales,
         "sketches": sketches, "offsets": offsets}
    )  # fmt: skip
    out = empty_selected(q, config, want_scores, want_heads, want_residual)
    select_paged_into(
        out, q, w, cache, block_table, context_lens, query_starts, page_sums, largest_scales,
        sketches, offsets, next_n, slots, config, backend, threads, workspace_cap,
    )  # fmt: skip
    return _tensors(q, out)


_OUTPUTS = ("out_indices", "out_scores", "out_heads", "out_residual")


@torch.library.custom_op("misa::select_out", mutates_args=_OUTPUTS)
def select_out_op(
    q: Tensor,
    w: Tensor,
    k: Tensor,
    ks: Tensor,
    ke: Tensor,
    k_scale: Tensor | None,
    offsets: Tensor | None,
    out_indices: Tensor,
    out_scores: Tensor | None,
    out_heads: Tensor | None,
    out_residual: Tensor | None,
    top_k: int,
    router: str,
    heads: int,
    block: int,
    residual: bool,
    filter_block: int,
    filter_blocks: int,
    candidates: int,
    sketch: int,
    dense_work: int,
    ordered: bool,
    static_heads: Sequence[int],
    backend: str,
    threads: int,
    workspace_cap: int,
) -> None:
    """Like :func:`misa.select` with ``out``, whose arrays are separate arguments."""
    config = _config(
        top_k, router, heads, block, residual, filter_block, filter_blocks, candidates, sketch,
        dense_work, ordered, tuple(static_heads),
    )  # fmt: skip
    out = Selected(out_indices, out_scores, out_heads, out_residual)
    require_one_device(
        {"q": q, "w": w, "k": k, "ks": ks, "ke": ke, "k_scale": k_scale, "offsets": offsets,
         **out._asdict()}
    )  # fmt: skip
    select_into(out, q, w, k, ks, ke, k_scale, offsets, config, backend, threads, workspace_cap)


@torch.library.custom_op("misa::select_paged_out", mutates_args=_OUTPUTS)
def select_paged_out_op(
    q: Tensor,
    w: Tensor,
    cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    query_starts: Tensor | None,
    page_sums: Tensor | None,
    largest_scales: Tensor | None,
    sketches: Tensor | None,
    offsets: Tensor | None,
    out_indices: Tensor,
    out_scores: Tensor | None,
    out_heads: Tensor | None,
    out_residual: Tensor | None,
    next_n: int,
    slots: bool,
    top_k: int,
    router: str,
    heads: int,
    block: int,
    residual: bool,
    filter_block: int,
    filter_blocks: int,
    candidates: int,
    sketch: int,
    dense_work: int,
    ordered: bool,
    static_heads: Sequence[int],
    backend: str,
    threads: int,
    workspace_cap: int,
) -> None:
    """Like :func:`misa.select_paged` with ``out``, whose arrays are separate arguments."""
    config = _config(
        top_k, router, heads, block, residual, filter_block, filter_blocks, candidates, sketch,
        dense_work, ordered, tuple(static_heads),
    )  # fmt: skip
    out = Selected(out_indices, out_scores, out_heads, out_residual)
    require_one_device(
        {"q": q, "w": w, "cache": cache, "block_table": block_table, "context_lens": context_lens,
         "query_starts": query_starts, "page_sums": page_sums, "largest_scales": largest_scales,
         "sketches": sketches, "offsets": offsets, **out._asdict()}
    )  # fmt: skip
    select_paged_into(
        out, q, w, cache, block_table, context_lens, query_starts, page_sums, largest_scales,
        sketches, offsets, next_n, slots, config, backend, threads, workspace_cap,
    )  # fmt: skip


_ELEMENTS = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.uint16)
_FLOAT, _INT, _BYTE = (torch.float32,), (torch.int32,), (torch.uint8,)
# Dtypes and dimensions; equal letters are equal sizes, * is any size.
_RAGGED = {"q": (_ELEMENTS, "THD"), "w": (_FLOAT, "TH"), "k": (_ELEMENTS, "LD"), "ks": (_INT, "T"),
           "ke": (_INT, "T"), "k_scale": (_FLOAT, "L"), "offsets": (_INT, "T")}  # fmt: skip
_PAGED = {
    "q": (_ELEMENTS, "THD"),
    "w": (_FLOAT, "TH"),
    "cache": (_BYTE, "P**"),
    "block_table": (_INT, "B*"),
    "context_lens": (_INT, "B"),
    "query_starts": (_INT, "*"),
    "page_sums": (_FLOAT, "P*D"),
    "largest_scales": (_FLOAT, "P*"),
    "sketches": (_BYTE, "P*"),
    "offsets": (_INT, "T"),
}


def _require_layouts(tensors: Tensors, layouts: Mapping[str, tuple]) -> None:
    sizes: dict[str, int] = {}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        dtypes, layout = layouts[name]
        names = " or ".join(map(str, dtypes))
        require(tensor.dtype in dtypes, f"{name}: expected {names}, got {tensor.dtype}")
        require(
            tensor.dim() == len(layout),
            f"{name}: expected [{', '.join(layout)}], got {tensor.dim()} dimensions",
        )
        for letter, size in zip(layout, tensor.shape, strict=True):
            if letter == "*":
                continue
            expected = sizes.setdefault(letter, size)
            require(size == expected, f"{name}: expected {letter} = {expected}, got {size}")


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
        require(top_k >= 1, f"top_k: expected 1 or more, got {top_k}")
    q: Any = tensors["q"]
    device = common_device(tensors)
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
def _(q, w, k, ks, ke, k_scale, offsets, top_k, router, heads, block, residual, filter_block,
      filter_blocks, candidates, sketch, dense_work, ordered, static_heads, want_scores,
      want_heads, want_residual, backend, threads, workspace_cap):  # fmt: skip
    tensors = {"q": q, "w": w, "k": k, "ks": ks, "ke": ke, "k_scale": k_scale, "offsets": offsets}
    wanted = want_scores, want_heads, want_residual
    return _fake(tensors, _RAGGED, top_k, router, heads, residual, *wanted)


@select_paged_op.register_fake
def _(q, w, cache, block_table, context_lens, query_starts, page_sums, largest_scales, sketches,
      offsets, next_n, slots, top_k, router, heads, block, residual, filter_block, filter_blocks,
      candidates,
      sketch, dense_work, ordered, static_heads, want_scores, want_heads, want_residual, backend,
      threads, workspace_cap):  # fmt: skip
    tensors = {"q": q, "w": w, "cache": cache, "block_table": block_table,
               "context_lens": context_lens, "query_starts": query_starts, "page_sums": page_sums,
               "largest_scales": largest_scales, "sketches": sketches,
               "offsets": offsets}  # fmt: skip
    rows = "B*" if query_starts is None else "T*"
    layouts = _PAGED | {
        "cache": (_BYTE, "P*" if cache.dim() == 2 else "P**"),
        "context_lens": (_INT, rows if context_lens.dim() == 2 else "B"),
    }
    wanted = want_scores, want_heads, want_residual
    return _fake(tensors, layouts, top_k, router, heads, residual, *wanted)


def _checked_outputs(out: Selected) -> tuple:
    """The arrays of ``out``, which are tensors; those but the first may be None."""
    named = checked_out(out)._asdict()
    require_tensors(named, Selected._fields[1:])
    if not torch.compiler.is_compiling():
        for name, tensor in named.items():
            require_writable(name, tensor)
    return tuple(out)


for _op in (select_out_op, select_paged_out_op):
    register_fake_writing(_op)


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
    offsets: Tensor | None,
    out: Selected | None,
    config: Config,
    scores: bool,
    heads: bool,
    residual: bool,
    *execution: Any,
) -> Selected:
    """:func:`misa.select` on tensors."""
    require_tensors(
        {"w": w, "k": k, "ks": ks, "ke": ke, "k_scale": k_scale, "offsets": offsets},
        ("k_scale", "offsets"),
    )
    inputs = q, w, k, ks, ke, k_scale, offsets
    if out is not None:
        torch.ops.misa.select_out(*inputs, *_checked_outputs(out), *_fields(config), *execution)
        return out
    wanted = scores, heads, residual
    return _selected(torch.ops.misa.select(*inputs, *_fields(config), *wanted, *execution))


def select_paged(
    q: Tensor,
    w: Tensor,
    cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    query_starts: Tensor | None,
    page_sums: Tensor | None,
    largest_scales: Tensor | None,
    sketches: Tensor | None,
    offsets: Tensor | None,
    out: Selected | None,
    next_n: int,
    slots: bool,
    config: Config,
    scores: bool,
    heads: bool,
    residual: bool,
    *execution: Any,
) -> Selected:
    """:func:`misa.select_paged` on tensors."""
    require_tensors(
        {"w": w, "cache": cache, "block_table": block_table, "context_lens": context_lens,
         "query_starts": query_starts, "page_sums": page_sums, "largest_scales": largest_scales,
         "sketches": sketches, "offsets": offsets},
        ("query_starts", "page_sums", "largest_scales", "sketches", "offsets"),
    )  # fmt: skip
    inputs = (q, w, cache, block_table, context_lens, query_starts, page_sums, largest_scales,
              sketches, offsets)  # fmt: skip
    form = next_n, slots, *_fields(config)
    if out is not None:
        torch.ops.misa.select_paged_out(*inputs, *_checked_outputs(out), *form, *execution)
        return out
    wanted = scores, heads, residual
    return _selected(torch.ops.misa.select_paged(*inputs, *form, *wanted, *execution))
