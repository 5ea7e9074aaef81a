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

from ._call import Selected, checked_config, empty_selected, select_into, select_paged_into
from ._config import Config

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""indices, scores, heads and residual; one that is not requested or does not exist is an empty
tensor of one dimension."""

Tensors = Mapping[str, Tensor | None]
"""The tensors of a call by name; None for an optional one that is not given."""


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
    sketches: Tensor | None,
    next_n: int,
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
         "sketches": sketches}
    )  # fmt: skip
    out = empty_selected(q, config, want_scores, want_heads, want_residual)
    select_paged_into(
        out, q, w, cache, block_table, context_lens, query_starts, page_sums, largest_scales,
        sketches, next_n, config, backend, threads, workspace_cap,
    )  # fmt: skip
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
    "sketches": (_BYTE, "P*"),
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
      filter_blocks, candidates, sketch, dense_work, ordered, static_heads, want_scores,
      want_heads, want_residual, backend, threads, workspace_cap):  # fmt: skip
    tensors = {"q": q, "w": w, "k": k, "ks": ks, "ke": ke, "k_scale": k_scale}
    wanted = want_scores, want_heads, want_residual
    return _fake(tensors, _RAGGED, top_k, router, heads, residual, *wanted)


@select_paged_op.register_fake
def _(q, w, cache, block_table, context_lens, query_starts, page_sums, largest_scales, sketches,
      next_n, top_k, router, heads, block, residual, filter_block, filter_blocks, candidates,
      sketch, dense_work, ordered, static_heads, want_scores, want_heads, want_residual, backend,
      threads, workspace_cap):  # fmt: skip
    tensors = {"q": q, "w": w, "cache": cache, "block_table": block_table,
               "context_lens": context_lens, "query_starts": query_starts, "page_sums": page_sums,
               "largest_scales": largest_scales, "sketches": sketches}  # fmt: skip
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
    sketches: Tensor | None,
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
         "query_starts": query_starts, "page_sums": page_sums, "largest_scales": largest_scales,
         "sketches": sketches},
        ("query_starts", "page_sums", "largest_scales", "sketches"),
    )  # fmt: skip
    outputs = torch.ops.misa.select_paged(
        q, w, cache, block_table, context_lens, query_starts, page_sums, largest_scales, sketches,
        next_n, *_fields(config), scores, heads, residual, backend, threads, workspace_cap,
    )  # fmt: skip
    return _selected(outputs)
