# SPDX-License-Identifier: Apache-2.0
"""Calls for engines: plans that are made once and run often, and a selection from given scores."""

from __future__ import annotations

from typing import Any

from . import _arrays, _core  # type: ignore[attr-defined]  # compiled
from ._arrays import Array
from ._call import (
    WORKSPACE_CAP,
    Selected,
    checked_config,
    checked_execution,
    checked_out,
    checked_shape,
    device_plan,
    empty_selected,
    outputs,
    require_device_build,
    returned,
    run_on_device,
)
from ._config import Config, boolean, integer


class Plan:
    """An indexer for a bounded shape on one backend: made once, run often. A run allocates only the
    outputs and the workspace that are not given to it. On a CUDA device it does not wait for the
    device, and may be captured into a CUDA graph, the first run included: making a plan loads every
    kernel.

    With device "cpu" and a CUDA backend, a run copies its arrays to the device and allocates memory
    there until it ends.

    tokens, heads, dim, max_keys: the most queries T of one run, H, D, and the most keys seen by one
        query.
    q_dtype, k_dtype: dtypes of the framework or "f32", "bf16", "e4m3".
    total_keys: L, the most keys of one run; max_keys if not given. Used on CUDA devices only.
    batch: the most sequences of one run on paged keys, for a plan of :meth:`run_paged`; 0: of
        :meth:`run`. Used on CUDA devices only; plans in host memory run on both.
    max_sms: for how many multiprocessors of a CUDA device the work of a run is cut, so that others
        are left to what runs beside it; 0: all. Results do not depend on it. A kernel with a thread
        block for each row may take more.
    device: "cpu", "cuda:N", or "cuda" for "cuda:0".

    Raises ValueError for a wrong argument, MemoryError if the workspace's cap is too small,
    RuntimeError if no backend can do it.
    """

    def __init__(
        self,
        config: Config,
        *,
        tokens: int,
        heads: int,
        dim: int,
        max_keys: int,
        q_dtype: Any,
        k_dtype: Any,
        total_keys: int | None = None,
        batch: int = 0,
        max_sms: int = 0,
        device: Any = "cpu",
        workspace_cap: int = WORKSPACE_CAP,
        backend: str = "auto",
        threads: int = 0,
    ) -> None:
        self.config = checked_config(config)
        kind, _, index = str(device).partition(":")
        if kind not in ("cpu", "cuda") or not (index or "0").isdecimal():
            raise ValueError(f"device: expected cpu, cuda or cuda:N, got {device}")
        backend, threads, workspace_cap = checked_execution(backend, threads, workspace_cap)
        sizes = {"tokens": tokens, "heads": heads, "dim": dim, "max_keys": max_keys}
        shape = [integer(name, value, 64) for name, value in sizes.items()]
        dtypes = _arrays.dtype_name("q_dtype", q_dtype), _arrays.dtype_name("k_dtype", k_dtype)
        batch, max_sms = integer("batch", batch, 64), integer("max_sms", max_sms)
        self._on_device = kind == "cuda"
        if kind == "cpu":
            self._plan = _core.HostPlan(config, *shape, *dtypes, backend, threads, workspace_cap)
        else:
            if total_keys is None:
                total_keys = 0 if batch > 0 else max_keys
            total = integer("total_keys", total_keys, 64)
            number = integer("device", int(index or 0))
            self._plan = device_plan(
                config, *shape, *dtypes, total, batch, max_sms, number, backend, workspace_cap
            )

    @property
    def workspace_bytes(self) -> int:
        """Bytes that a run needs."""
        return self._plan.workspace_bytes

    @property
    def backend(self) -> str:
        """The name of the plan's backend."""
        return self._plan.backend

    def run(
        self,
        q: Array,
        w: Array,
        k: Array,
        ks: Array,
        ke: Array,
        *,
        k_scale: Array | None = None,
        offsets: Array | None = None,
        out: Selected | None = None,
        workspace: Array | None = None,
        stream: Any = None,
    ) -> Selected:
        """Selects positions for every query; arguments as for :func:`select`.

        out: arrays for the selection; if not given, new ones for the indices alone.
        workspace: uint8 [workspace_bytes or more], aligned to 64 bytes, on CUDA devices to 256.
            Runs on one stream may share it, whatever their plans.
        stream: a stream of PyTorch or CuPy, or a cudaStream_t as an integer; if not given,
            PyTorch's current stream, or CUDA's default stream for CuPy. For CUDA devices only.
        """
        named = {"q": q, "w": w, "k": k, "ks": ks, "ke": ke, "k_scale": k_scale}
        return self._run(self._plan.run, named, offsets, (), (), out, workspace, stream)

    def run_paged(
        self,
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
        out: Selected | None = None,
        workspace: Array | None = None,
        stream: Any = None,
    ) -> Selected:
        """Selects positions for queries of sequences in a paged cache; arguments as for
        :func:`select_paged` and :meth:`run`. A captured run that is replayed sees the lengths, the
        block table and the keys that are in memory then."""
        named = {"q": q, "w": w, "cache": cache, "block_table": block_table,
                 "context_lens": context_lens, "query_starts": query_starts,
                 "page_sums": page_sums, "largest_scales": largest_scales,
                 "sketches": sketches}  # fmt: skip
        before, after = (integer("next_n", next_n),), (boolean("slots", slots),)
        run = self._plan.run_paged
        return self._run(run, named, offsets, before, after, out, workspace, stream)

    def _run(
        self,
        run: Any,
        named: dict[str, Array],
        offsets: Array | None,
        before: tuple,
        after: tuple,
        out: Selected | None,
        workspace: Array | None,
        stream: Any,
    ) -> Selected:
        _arrays.require_one_framework(named | {"offsets": offsets})
        q = named["q"]
        into = empty_selected(q, self.config, False, False, False) if out is None else out
        checked_out(into)
        if self._on_device:
            return run_on_device(
                run, self._plan, named, into, offsets, before, after, workspace, stream
            )
        if stream is not None:
            raise ValueError("stream: expected none for a plan in host memory")
        arrays = [_arrays.readable(name, array) for name, array in named.items()]
        offsets = _arrays.readable("offsets", offsets)
        workspace = _arrays.writable("workspace", workspace)
        run(*arrays, *before, *outputs(into), *after, offsets, workspace)
        return returned(q, into) if out is None else into


def top_k(
    logits: Array,
    top_k: int,
    *,
    lengths: Array | None = None,
    scores: bool = False,
    out: tuple[Array, Array | None] | None = None,
    stream: Any = None,
) -> tuple[Array, Array | None]:
    """The largest scores of every row of an array on a CUDA device, of any origin.

    Ties go to the lower position, NaN ranks below every number, -0 equals +0. A row of no more than
    top_k positions selects all of them.

    logits: float32 [rows, columns]; rows may have a stride.
    top_k: 1 to 16384.
    lengths: int32 [rows], how many columns of each row count; all if not given. Nothing beyond them
        is read; zero or negative is an empty row.
    scores: whether to return the scores too.
    out: indices int32 [rows, top_k], and scores float32 [rows, top_k] or None, to write in place of
        new ones; rows may have strides.
    stream: as for :meth:`Plan.run`; not in compiled code. The call does not wait for it and may be
        captured.

    Returns (indices, scores): positions, ascending, -1 on the right; the scores or None, -inf where
    padded. Raises ValueError for a wrong argument, RuntimeError without a device.
    """
    count = integer("top_k", top_k)
    named = {"logits": logits, "lengths": lengths}
    _arrays.require_one_framework(named)
    rows, _ = checked_shape("logits", logits, "[rows, columns]")
    if out is None:
        shape = rows, max(count, 0)
        made = _arrays.empty(logits, shape, "float32") if boolean("scores", scores) else None
        out = _arrays.empty(logits, shape, "int32"), made
    elif not isinstance(out, tuple) or len(out) != 2:
        raise ValueError(f"out: expected (indices, scores), got {out!r}")
    if _arrays.is_torch(logits) and _arrays.compiling():
        from . import _torch_writes

        if stream is not None:
            raise ValueError("stream: expected none in compiled code, got one")
        _torch_writes.top_k_into(logits, lengths, *out, count)
        return out
    device = _arrays.cuda_device("logits", logits)
    if device is None:
        raise ValueError("logits: expected an array on a CUDA device, got one in host memory")
    require_device_build()
    number = _arrays.stream_of(logits) if stream is None else _arrays.stream_number(stream)
    _core.top_k(
        _arrays.on_stream("logits", logits), count, _arrays.on_stream("lengths", lengths),
        _arrays.writable("indices", out[0]), _arrays.writable("scores", out[1]), device, number,
    )  # fmt: skip
    return out
