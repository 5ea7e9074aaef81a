# SPDX-License-Identifier: Apache-2.0
"""Selection with checked options into given arrays: what the public functions and the PyTorch
operators share."""

from __future__ import annotations

import atexit
import os
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

from . import _arrays, _core  # type: ignore[attr-defined]  # compiled
from ._arrays import Array
from ._config import Config, integer, text

PAGE_SIZE = 64
"""Tokens in one page of the key cache by default."""

WORKSPACE_CAP: int = _core.DEFAULT_WORKSPACE_CAP
"""Default limit of a plan's workspace, in bytes."""


class Selected(NamedTuple):
    """A selection; arrays of the framework and on the device of the queries.

    indices: int32 [T, top_k], positions relative to the query's sequence, -1 on the right; with
        ``offsets`` or ``slots`` of a call, what these say.
    scores: float32 [T, top_k], the scores that ranked them, -inf where padded; or None.
    heads: int32 [T, h], active heads, ascending, -1 for empty rows; None unless requested and the
        config routes heads.
    residual: float32 [T, D], the residual row before rounding, 0 for empty rows; None unless
        requested and the config has one.
    """

    indices: Array
    scores: Array | None = None
    heads: Array | None = None
    residual: Array | None = None


def empty_selected(
    like: Array, config: Config, scores: bool, heads: bool, residual: bool
) -> Selected:
    """Uninitialised outputs for the queries ``like`` [T, H, D]."""
    tokens, _, dim = checked_shape("q", like, "[T, H, D]")
    return Selected(
        _arrays.empty(like, (tokens, config.top_k), "int32"),
        _arrays.empty(like, (tokens, config.top_k), "float32") if scores else None,
        _arrays.empty(like, (tokens, config.heads), "int32")
        if heads and config.router != "all"
        else None,
        _arrays.empty(like, (tokens, dim), "float32") if residual and config.residual else None,
    )


def checked_shape(name: str, array: Array, layout: str) -> tuple[int, ...]:
    shape = _arrays.checked(name, array).shape
    if len(shape) != layout.count(",") + 1:
        raise ValueError(f"{name}: expected {layout}, got {len(shape)} dimensions")
    return shape


def checked_out(out: Selected) -> Selected:
    if not isinstance(out, Selected):
        raise ValueError(f"out: expected a misa.Selected, got {type(out).__name__}")
    return out


def checked_config(config: Config) -> Config:
    if not isinstance(config, Config):
        raise ValueError(f"config: expected a misa.Config, got {config!r}")
    if config.top_k < 1:
        raise ValueError(f"top_k: expected 1 or more, got {config.top_k}")
    if config.router != "all" and config.heads < 0:
        raise ValueError(f"heads: expected 0 or more, got {config.heads}")
    return config


def checked_execution(backend: str, threads: int, workspace_cap: int) -> tuple[str, int, int]:
    return (
        text("backend", backend),
        integer("threads", threads),
        integer("workspace_cap", workspace_cap, 64),
    )


def returned(like: Array, out: Selected) -> Selected:
    return Selected(*(_arrays.returned(like, array) for array in out))


def select_into(
    out: Selected,
    q: Array,
    w: Array,
    k: Array,
    ks: Array,
    ke: Array,
    k_scale: Array | None,
    offsets: Array | None,
    config: Config,
    backend: str,
    threads: int,
    workspace_cap: int,
) -> Selected:
    """Like :func:`misa.select`, but writes into ``out`` and returns it."""
    device = _arrays.cuda_device("q", q)
    named = {"q": q, "w": w, "k": k, "ks": ks, "ke": ke, "k_scale": k_scale}
    if device is None:
        inputs = [_arrays.readable(name, array) for name, array in named.items()]
        offsets = _arrays.readable("offsets", offsets)
        _core.select(config, *inputs, *outputs(out), offsets, backend, threads, workspace_cap)
        return out
    tokens, heads, dim = q.shape
    keys, _ = checked_shape("k", k, "[L, D]")
    dtypes = _arrays.dtype_name("q", q.dtype), _arrays.dtype_name("k", k.dtype)
    plan = device_plan(
        config, tokens, heads, dim, keys, *dtypes, keys, 0, 0, device, backend, workspace_cap
    )
    return run_on_device(plan.run, plan, named, out, offsets)


def select_paged_into(
    out: Selected,
    q: Array,
    w: Array,
    cache: Array,
    block_table: Array,
    context_lens: Array,
    query_starts: Array | None,
    page_sums: Array | None,
    largest_scales: Array | None,
    sketches: Array | None,
    offsets: Array | None,
    next_n: int,
    slots: bool,
    config: Config,
    backend: str,
    threads: int,
    workspace_cap: int,
) -> Selected:
    """Like :func:`misa.select_paged`, but writes into ``out`` and returns it."""
    named = {"q": q, "w": w, "cache": cache, "block_table": block_table,
             "context_lens": context_lens, "query_starts": query_starts, "page_sums": page_sums,
             "largest_scales": largest_scales, "sketches": sketches}  # fmt: skip
    device = _arrays.cuda_device("q", q)
    if device is None:
        inputs = [_arrays.readable(name, array) for name, array in named.items()]
        offsets = _arrays.readable("offsets", offsets)
        _core.select_paged(config, *inputs, next_n, *outputs(out), slots, offsets, backend, threads,
                           workspace_cap)  # fmt: skip
        return out
    tokens, heads, dim = q.shape
    batch, max_pages = checked_shape("block_table", block_table, "[B, max_pages]")
    page_size = prod(_arrays.checked("cache", cache).shape[1:]) // (dim + 4)
    plan = device_plan(
        config, tokens, heads, dim, max_pages * page_size, _arrays.dtype_name("q", q.dtype), "e4m3",
        0, max(batch, 1), 0, device, backend, workspace_cap,
    )  # fmt: skip
    return run_on_device(plan.run_paged, plan, named, out, offsets, (next_n,), (slots,))


def run_from_means(
    call: str, arrays: dict[str, Array], width: int, out: Array, backend: str, threads: int
) -> None:
    """Calls the function of _core named `call` on block means; writes into ``out``."""
    q = arrays["q"]
    device = _arrays.cuda_device("q", q)
    if device is None:
        inputs = [_arrays.readable(name, array) for name, array in arrays.items()]
        getattr(_core, call)(*inputs, width, _arrays.writable("out", out), backend, threads)
        return
    require_device_build()
    count, _ = checked_shape("means", arrays["means"], "[M, D]")
    workspace = _arrays.empty(q, (_core.means_workspace_bytes(*q.shape[::2], count),), "uint8")
    inputs = [_arrays.on_stream(name, array) for name, array in arrays.items()]
    getattr(_core, f"{call}_on_device")(
        *inputs, width, _arrays.writable("out", out), _arrays.writable("workspace", workspace),
        device, backend, _arrays.stream_of(q),
    )  # fmt: skip


def outputs(out: Selected) -> list[Array]:
    return [_arrays.writable(name, array) for name, array in out._asdict().items()]


def require_device_build() -> None:
    if not hasattr(_core, "DevicePlan"):
        raise RuntimeError("device: this build of misa has no CUDA backends")


def device_plan(*arguments: Any) -> _core.DevicePlan:
    require_device_build()
    # The plan of the backend "auto" depends on this variable.
    return _cached_plan(os.environ.get("MISA_BACKEND", ""), *arguments)


@lru_cache(maxsize=256)
def _cached_plan(_variable: str, *arguments: Any) -> _core.DevicePlan:
    return _core.DevicePlan(*arguments)


# nanobind would report plans that outlive the interpreter as leaks.
atexit.register(_cached_plan.cache_clear)


def run_on_device(
    run: Any,
    plan: Any,
    named: dict[str, Array],
    out: Selected,
    offsets: Array | None,
    before: tuple = (),
    after: tuple = (),
    workspace: Array | None = None,
    stream: Any = None,
) -> Selected:
    """Calls a plan's method ``run``, with the arguments ``before`` and ``after`` the outputs."""
    q = named["q"]
    if workspace is None:
        workspace = _arrays.empty(q, (plan.workspace_bytes,), "uint8")
    inputs = [_arrays.on_stream(name, array) for name, array in named.items()]
    offsets = _arrays.on_stream("offsets", offsets)
    workspace = _arrays.writable("workspace", workspace)
    number = _arrays.stream_of(q) if stream is None else _arrays.stream_number(stream)
    run(*inputs, *before, *outputs(out), *after, offsets, workspace, number)
    return out
