# SPDX-License-Identifier: Apache-2.0
"""Tensors of PyTorch: the operators, torch.compile, and the device where there is one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import misa
from inputs import PACK, Inputs, random_inputs, trace_inputs, traces

torch = pytest.importorskip("torch")
from misa import _torch_writes, torch_ops  # noqa: E402

CONFIG = misa.Config("misa-r", top_k=16, heads=2)
TORCH = {"bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn}
BITS = {"bfloat16": np.int16, "float8_e4m3fn": np.uint8}
devices = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
        ),
    ],
)


def tensor(array: np.ndarray | None, device: str = "cpu") -> torch.Tensor | None:
    if array is None:
        return None
    name = array.dtype.name
    bits = array.view(BITS[name]) if name in TORCH else array
    # PyTorch's own memory is aligned to 64 bytes, as a workspace has to be.
    own = torch.from_numpy(bits.copy()).clone()
    return (own.view(TORCH[name]) if name in TORCH else own).to(device)


def tensors(inputs: Inputs, device: str = "cpu") -> dict[str, torch.Tensor | None]:
    return {name: tensor(array, device) for name, array in inputs.arguments().items()}


@pytest.mark.parametrize("dtype", ["f32", "bf16", "e4m3"])
def test_equals_numpy(dtype: str) -> None:
    inputs = random_inputs(PACK, dtype=dtype)
    options = {"config": CONFIG, "scores": True, "heads": True, "residual": True}
    want = misa.select(**inputs.arguments(), **options)
    got = misa.select(**tensors(inputs), **options)
    for a, b in zip(got, want, strict=True):
        assert np.array_equal(a.numpy(), b)
    if dtype == "e4m3":
        narrow = misa.Config("dsa", top_k=16, candidates=16)
        sketched = replace(narrow, sketch=2)
        want, exact = (
            misa.select(**inputs.arguments(), config=c).indices for c in (sketched, narrow)
        )
        assert np.array_equal(misa.select(**tensors(inputs), config=sketched).indices.numpy(), want)
        assert not np.array_equal(want, exact)
    dense = misa.select(**tensors(inputs), config=misa.Config("dsa", top_k=9), heads=True)
    assert dense.scores is None and dense.heads is None and dense.residual is None


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda q: q.double(), "q: expected float32, .*, got float64"),
        ("w", lambda w: w.bfloat16(), "w: expected float32, got bfloat16"),
        ("ks", lambda ks: ks.long(), "ks: expected int32, got int64"),
        ("q", lambda q: q[:1].expand(q.shape), "q: expected a stride above 0"),
        ("k", lambda k: k.t().contiguous().t(), "k: expected a contiguous last dimension"),
        ("w", lambda w: w.numpy(), "w: expected a torch.Tensor, got ndarray"),
        ("ks", lambda ks: None, "ks: expected a torch.Tensor, got NoneType"),
    ],
)
def test_refuses(name: str, change: Callable, message: str) -> None:
    arguments = tensors(random_inputs(PACK))
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=message):
        misa.select(**arguments, config=CONFIG)


@pytest.mark.parametrize("dtype", ["f32", "e4m3"])
def test_operator(dtype: str) -> None:
    """Schema, fake implementation and dispatch agree with what the operator does."""
    a = tensors(random_inputs(PACK, dtype=dtype))
    if dtype == "e4m3":  # the check multiplies its arguments, which PyTorch's e4m3 cannot
        a["q"], a["k"] = a["q"].view(torch.uint8), a["k"].view(torch.uint8)
    tensors_ = (a["q"], a["w"], a["k"], a["ks"], a["ke"], a["k_scale"], a["ks"].clone())
    fields, last = torch_ops._fields(CONFIG), ("auto", 0, 1 << 28)
    torch.library.opcheck(torch_ops.select_op, (*tensors_, *fields, True, True, True, *last))
    tokens = len(a["q"])
    out = (torch.empty(tokens, 16, dtype=torch.int32), torch.empty(tokens, 24)[:, :16],
           torch.empty(tokens, 2, dtype=torch.int32), None)  # fmt: skip
    torch.library.opcheck(torch_ops.select_out_op, (*tensors_, *out, *fields, *last))
    dense = torch_ops._fields(misa.Config("dsa", top_k=5))
    call = (*tensors_[:6], None, *dense, False, True, True, *last)
    torch.library.opcheck(torch_ops.select_op, call)
    if dtype == "f32":
        a["q"].requires_grad_()
        torch.library.opcheck(torch_ops.select_op, (a["q"], *call[1:]))
    cache, table, lengths = paged()
    rest = (*fields, True, True, True, *last)
    starts = torch.tensor([0, 1, len(a["q"])], dtype=torch.int32)
    for form in ((lengths, None, 2), (torch.stack([lengths, lengths], 1), None, 2),
                 (lengths, starts, 1),
                 (torch.full((len(a["q"]), 1), 9, dtype=torch.int32), starts, 1)):  # fmt: skip
        call = (a["q"], a["w"], cache, table, *form[:2], None, None, None, None)
        torch.library.opcheck(torch_ops.select_paged_op, (*call, form[2], True, *rest))
        form = form[2], False, *fields, *last
        torch.library.opcheck(torch_ops.select_paged_out_op, (*call, *out, *form))
    written = torch.zeros(2, 64, 68, dtype=torch.uint8), torch.zeros(2, 1, 64), torch.zeros(2, 1)
    keys, slots = torch.randn(9, 64), torch.arange(60, 69)
    call = (written[0], keys, slots, "f32", *written[1:], None)
    torch.library.opcheck(_torch_writes.append_op, call)
    call = (written[0], None, slots, "f32", None, None, None)
    torch.library.opcheck(_torch_writes.append_op, call)
    page, filled = torch.zeros(1, dtype=torch.int32), torch.full((1,), 9, dtype=torch.int32)
    call = (written[0], written[1], page, filled, written[2], None)
    torch.library.opcheck(_torch_writes.rebuild_op, call)
    call = (written[0], page, page + 1, *written[1:], None)
    torch.library.opcheck(_torch_writes.copy_pages_op, call)


@devices
def test_compile(device: str) -> None:
    arguments = tensors(random_inputs(PACK, dtype="bf16"), device)

    def step(q: torch.Tensor, **rest: torch.Tensor) -> torch.Tensor:
        selected = misa.select(q * 1, **rest, config=CONFIG, scores=True)
        return torch.where(selected.indices >= 0, selected.scores, 0).sum(1)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**arguments), step(**arguments))


@devices
def test_compiled_decode_step(device: str) -> None:
    """Keys are appended, and the slots that they are selected from written into a given buffer."""
    held, table, lengths = paged(device)
    q, w = torch.randn(2, 8, 64, device=device), torch.randn(2, 8, device=device)
    keys, at = torch.randn(2, 64, device=device), torch.tensor([610, 69], device=device)
    config = misa.Config("dsa", top_k=16)

    def step(cache: torch.Tensor, buffer: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        misa.append(cache, k * 1, at)
        out = misa.Selected(buffer[:, :16])
        misa.select_paged(q, w, cache, table, lengths, slots=True, config=config, out=out)
        return buffer + 0

    results = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        cache = held.clone()
        buffer = torch.full((2, 24), -77, dtype=torch.int32, device=device)
        assert torch.equal(call(cache, buffer, keys), buffer)
        results.append((cache, buffer))
    (eager_cache, eager), (cache, buffer) = results
    assert torch.equal(cache, eager_cache) and torch.equal(buffer, eager)
    assert not torch.equal(cache, held) and (buffer[:, 16:] == -77).all()
    pages = buffer[:, :16].cpu() // 64
    assert all(
        set(row.tolist()) <= set(t.tolist()) for row, t in zip(pages, table.cpu(), strict=True)
    )


@devices
def test_compiled_writes(device: str) -> None:
    """Pages are copied and what is derived from them made again."""
    held, _, _ = paged(device)
    pages = torch.tensor([7, 1], dtype=torch.int32, device=device)
    filled = torch.tensor([64, 9], dtype=torch.int32, device=device)

    def step(cache: torch.Tensor, sums: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
        derived = {"page_sums": sums, "largest_scales": largest}
        misa.rebuild(cache, sums, pages, filled, largest_scales=largest)
        misa.copy_pages(cache, pages, pages - 1, **derived)
        return sums + 0

    results = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        given = (
            held.clone(),
            torch.zeros(10, 1, 64, device=device),
            torch.zeros(10, 1, device=device),
        )
        assert torch.equal(call(*given), given[1])
        results.append(given)
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(compiled, eager)
    cache, sums, largest = results[0]
    for array in (cache, sums, largest):
        assert torch.equal(array[[6, 0]], array[[7, 1]])
    assert (largest[[7, 1]] > 0).all() and not torch.equal(cache, held)


def paged(
    device: str = "cpu", page_size: int = 64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A cache of 64-dimensional keys whose pages are padded, a block table and lengths."""
    cache = misa.Cache(10, 64, page_size=page_size)
    keys = np.random.default_rng(0).standard_normal((10 * page_size, 64)).astype(np.float32)
    cache.append(keys, np.arange(10 * page_size))
    data = torch.full((10, page_size * 68 + 64), 0x7F, dtype=torch.uint8)
    data[:, : page_size * 68] = tensor(cache.data).flatten(1)
    table = torch.tensor([[7, 1, 2, 9], [4, 5, -1, -1]], dtype=torch.int32)
    lengths = torch.tensor([4 * page_size - 6, page_size + 6], dtype=torch.int32)
    return data.to(device)[:, : page_size * 68], table.to(device), lengths.to(device)


def forms(lengths: torch.Tensor) -> list[tuple[torch.Tensor, int, torch.Tensor | None, int]]:
    """Every form of lengths: context_lens, next_n, query_starts, T."""
    longer, shorter = lengths.tolist()
    by_row = torch.tensor([[3, longer // 2], [shorter, -1]], dtype=torch.int32)
    starts = torch.tensor([0, 3, 4], dtype=torch.int32)
    by_row, starts = by_row.to(lengths.device), starts.to(lengths.device)
    return [(lengths, 1, None, 2), (lengths, 2, None, 4), (by_row, 2, None, 4),
            (lengths, 1, starts, 4), (by_row.view(4, 1), 1, starts, 4)]  # fmt: skip


def test_paged_layouts() -> None:
    """Pages may be flat or not."""
    cache, table, lengths = paged()
    q, w = torch.randn(2, 8, 64), torch.randn(2, 8)
    want = misa.select_paged(q, w, cache, table, lengths, config=CONFIG)
    shaped = cache.contiguous().view(10, 64, 68)
    again = misa.select_paged(q, w, shaped, table, lengths, config=CONFIG)
    assert torch.equal(again.indices, want.indices)


def test_plan() -> None:
    inputs = random_inputs(PACK, dtype="e4m3")
    want = misa.select(**inputs.arguments(), config=CONFIG)
    plan = misa.Plan(CONFIG, tokens=4, heads=8, dim=64, max_keys=400, q_dtype=torch.float8_e4m3fn,
                     k_dtype="e4m3")  # fmt: skip
    out = misa.Selected(torch.full((4, 16), -77, dtype=torch.int32))
    plan.run(**tensors(inputs), out=out)
    assert np.array_equal(out.indices.numpy(), want.indices)


def test_append() -> None:
    keys = torch.randn(100, 64)
    cache, sums = torch.zeros(2, 64, 68, dtype=torch.uint8), torch.zeros(2, 1, 64)
    misa.append(cache, keys.bfloat16(), torch.arange(100), page_sums=sums)
    held = misa.Cache(2, 64)
    held.append(keys.bfloat16().float().numpy(), np.arange(100))
    assert np.array_equal(cache.numpy(), held.data)
    assert np.array_equal(sums.numpy(), held.page_sums)
    sums.fill_(-1)  # as if an engine had written the bytes
    misa.append(cache, None, torch.arange(100), page_sums=sums)
    assert np.array_equal(sums.numpy(), held.page_sums)


cuda = pytest.mark.skipif(
    not torch.cuda.is_available() or not hasattr(misa._core, "DevicePlan"),
    reason="no CUDA device, or a build without CUDA",
)


def means_call(dtype: str) -> dict[str, np.ndarray]:
    inputs = random_inputs([(0, 1)] * 6, dtype=dtype)
    rows = np.array([[0, 0, 3, 9, 40, 7], [40, 39, 9, 3, 40, 30], [-1, 4, 39, 0, -1, 8]], np.int32)
    means = random_inputs([(0, 40)], seed=4).k
    starts, ends, partial = (row.copy() for row in rows)
    return {"q": inputs.q, "w": inputs.w, "means": means, "starts": starts, "ends": ends,
            "partial": partial}  # fmt: skip


@pytest.mark.parametrize("dtype", ["f32", "bf16", "e4m3"])
@devices
def test_means_equal_numpy(device: str, dtype: str) -> None:
    given = means_call(dtype)
    moved = {name: tensor(array, device) for name, array in given.items()}
    heads = misa.route_from_means(**moved, heads=3)
    kept = misa.keep_blocks_from_means(**moved, filter_blocks=6)
    assert heads.device.type == kept.device.type == device
    backend = "auto" if device == "cpu" else device
    assert np.array_equal(heads.cpu(), misa.route_from_means(**given, heads=3, backend=backend))
    wanted = misa.keep_blocks_from_means(**given, filter_blocks=6, backend=backend)
    assert np.array_equal(kept.cpu(), wanted)
    with pytest.raises(ValueError, match="means: expected a tensor on .* as the others are"):
        misa.route_from_means(**moved | {"means": torch.empty(40, 64, device="meta")}, heads=3)


@cuda
@pytest.mark.parametrize("indexer", ["dsa", "misa", "misa-dagger", "misa-r", "hisa"])
@pytest.mark.parametrize("path", list(traces()))
def test_device(path: Path, indexer: str) -> None:
    """The device's selection through host memory and through tensors is the same, bit for bit."""
    inputs = trace_inputs(path, 32)
    config = misa.Config(indexer, top_k=512)
    want = misa.select(**inputs.arguments(), config=config, backend="cuda", scores=True)
    got = misa.select(**tensors(inputs, "cuda"), config=config, scores=True)
    assert got.indices.is_cuda
    assert np.array_equal(np.sort(got.indices.cpu(), 1), np.sort(want.indices, 1))
    assert np.array_equal(np.sort(got.scores.cpu(), 1), np.sort(want.scores, 1))


@cuda
def test_device_graph() -> None:
    """A captured call follows its inputs when it is replayed."""
    arguments = tensors(random_inputs(PACK, dtype="bf16"), "cuda")
    misa.select(**arguments, config=CONFIG)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = misa.select(**arguments, config=CONFIG).indices
    other = tensors(random_inputs(PACK, dtype="bf16", seed=9), "cuda")
    for name in ("q", "w", "k"):
        arguments[name].copy_(other[name])
    captured.fill_(-77)
    graph.replay()
    assert torch.equal(captured, misa.select(**other, config=CONFIG).indices)


@cuda
@pytest.mark.parametrize("page_size", [32, 64, 128])
def test_device_paged(page_size: int) -> None:
    """Every form of lengths, and pages that are flat or not, without waiting for the device."""
    flat, table, lengths = paged("cuda", page_size)
    shaped = flat.contiguous().view(10, page_size, 68)
    q, w = torch.randn(4, 8, 64, device="cuda"), torch.randn(4, 8, device="cuda")
    config = misa.Config("dsa", top_k=16)
    for lens, next_n, starts, tokens in forms(lengths):
        options = {"next_n": next_n, "config": config}
        for cache in (flat, shaped):
            call = q[:tokens], w[:tokens], cache, table, lens
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                got = misa.select_paged(*call, query_starts=starts, **options)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            there = None if starts is None else starts.cpu()
            host = [tensor_.cpu() for tensor_ in call]
            want = misa.select_paged(*host, query_starts=there, backend="cuda", **options)
            assert torch.equal(got.indices.cpu(), want.indices)


@cuda
def test_device_paged_replays() -> None:
    """A graph sees the lengths and the block table of its replay; entries that name no page are
    keys that rank last."""
    cache, table, lengths = paged("cuda")
    config = misa.Config("dsa", top_k=16)
    q, w = torch.randn(2, 8, 64, device="cuda"), torch.randn(2, 8, device="cuda")
    misa.select_paged(q, w, cache, table, lengths, config=config)  # loads the modules
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = misa.select_paged(q, w, cache, table, lengths, config=config).indices
    lengths.copy_(torch.tensor([180, 100], dtype=torch.int32))
    table[:, :2] = torch.tensor([[3, 8], [-5, 6]], dtype=torch.int32)
    graph.replay()
    assert torch.equal(
        captured, misa.select_paged(q, w, cache, table, lengths, config=config).indices
    )
    assert captured[1].min() >= 64


@cuda
@pytest.mark.parametrize("indexer", ["dsa", "misa", "misa-r"])
def test_device_plan_is_captured_first(indexer: str) -> None:
    """A plan's first run is captured, with every array given; replays follow what is in memory, on
    fewer multiprocessors with the same bits. Nothing is allocated."""
    cache, table, lengths = paged("cuda")
    config = misa.Config(indexer, top_k=16)
    q = torch.randn(2, 8, 64, device="cuda").to(torch.float8_e4m3fn)
    w = torch.randn(2, 8, device="cuda")
    results = []
    for max_sms in (0, 1):
        plan = misa.Plan(config, tokens=2, heads=8, dim=64, max_keys=256, q_dtype="e4m3",
                         k_dtype="e4m3", batch=2, max_sms=max_sms, device="cuda")  # fmt: skip
        workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device="cuda")
        buffers = (
            torch.full((2, 24), -77, dtype=torch.int32, device="cuda"),
            torch.empty(2, 16, device="cuda"),
        )
        out = misa.Selected(buffers[0][:, :16], buffers[1])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            before = torch.cuda.memory_allocated()
            plan.run_paged(q, w, cache, table, lengths, slots=True, out=out, workspace=workspace)
            assert torch.cuda.memory_allocated() == before
        for length in (5, 200):
            lengths[0] = length
            graph.replay()
            want = misa.select_paged(q, w, cache, table, lengths, slots=True, config=config,
                                     scores=True)  # fmt: skip
            assert torch.equal(out.indices, want.indices)
            assert torch.equal(out.scores, want.scores)
            assert (buffers[0][:, 16:] == -77).all()
            results.append(want)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    buffers[0].fill_(-77)
    torch.cuda.synchronize()
    plan.run_paged(q, w, cache, table, lengths, slots=True, out=out, workspace=workspace,
                   stream=stream)  # fmt: skip
    stream.synchronize()
    assert torch.equal(out.indices, results[-1].indices)


@cuda
def test_device_forms() -> None:
    """Offsets and slots on tensors are those of arrays in host memory, and -1 for a page that does
    not exist."""
    arguments = tensors(random_inputs(PACK, dtype="bf16"), "cuda")
    plain = misa.select(**arguments, config=CONFIG).indices
    moved = torch.where(plain >= 0, plain + arguments["ks"][:, None], -1)
    assert torch.equal(
        misa.select(**arguments, config=CONFIG, offsets=arguments["ks"]).indices, moved
    )
    cache, table, lengths = paged("cuda")
    q, w = torch.randn(2, 8, 64, device="cuda"), torch.randn(2, 8, device="cuda")
    config = misa.Config("dsa", top_k=128)
    table[1, 1] = 10
    plain = misa.select_paged(q, w, cache, table, lengths, config=config).indices.long()
    slots = misa.select_paged(q, w, cache, table, lengths, config=config, slots=True).indices
    page = table.gather(1, plain.clamp(0) // 64)
    want = torch.where((plain >= 0) & (page < 10), page * 64 + plain % 64, -1)
    assert torch.equal(slots.long(), want) and (want[1, :64] >= 0).all() and (want[1, 64] == -1)


@cuda
def test_device_top_k() -> None:
    logits = torch.randn(5, 30000, device="cuda")[:, :20000]
    lengths = torch.tensor([20000, 7, 0, -3, 1 << 30], dtype=torch.int32, device="cuda")
    indices, scores = misa.top_k(logits, 100, lengths=lengths, scores=True)
    buffers = (
        torch.empty(5, 128, dtype=torch.int32, device="cuda"),
        torch.empty(5, 101, device="cuda"),
    )
    out = buffers[0][:, :100], buffers[1][:, :100]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert misa.top_k(logits, 100, lengths=lengths, out=out) is out
    graph.replay()
    assert torch.equal(out[0], indices) and torch.equal(out[1], scores)
    for row, length in enumerate((20000, 7, 0, 0, 20000)):
        count = min(length, 100)
        best = logits[row, :length].topk(count).indices.sort().values
        assert torch.equal(indices[row, :count].long(), best)
        assert torch.equal(scores[row, :count], logits[row, best])
        assert (indices[row, count:] == -1).all() and (scores[row, count:] == -torch.inf).all()
    assert misa.top_k(logits, 3)[1] is None
    with pytest.raises(ValueError, match="top_k: expected 1 to 16384, got 0"):
        misa.top_k(logits, 0)
    with pytest.raises(ValueError, match=r"indices: expected \[5, 3\], got \[5, 100\]"):
        misa.top_k(logits, 3, out=(out[0], None))


@pytest.mark.parametrize("scores", [False, True])
def test_top_k_needs_a_device(scores: bool) -> None:
    """Also when it runs in compiled code, where the shapes are known beforehand."""

    def step(logits: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        return misa.top_k(logits * 1, 3, scores=scores, **options)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for call in (step, compiled):
        with pytest.raises(ValueError, match="^logits: expected an array on a CUDA device"):
            call(torch.randn(2, 9))
    with pytest.raises(Exception, match="stream: expected none in compiled code, got one"):
        compiled(torch.randn(2, 9), stream=0)


@cuda
def test_device_compiled_top_k() -> None:
    logits = torch.randn(3, 900, device="cuda")
    lengths = torch.tensor([900, 5, 0], dtype=torch.int32, device="cuda")

    def step(x: torch.Tensor, buffer: torch.Tensor) -> tuple[torch.Tensor, ...]:
        made = misa.top_k(x * 1, 20, lengths=lengths, scores=True)
        misa.top_k(x * 1, 20, out=(buffer, None))
        return *made, buffer + 0

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        compiled(logits, torch.empty(3, 20, dtype=torch.int32, device="cuda")),
        step(logits, torch.empty(3, 20, dtype=torch.int32, device="cuda")),
        strict=True,
    ):
        assert torch.equal(got, want)
    call = (logits, lengths, torch.empty(3, 20, dtype=torch.int32, device="cuda"), None, 20)
    torch.library.opcheck(_torch_writes.top_k_out_op, call)


@cuda
def test_device_refuses() -> None:
    arguments = tensors(random_inputs(PACK), "cuda")
    with pytest.raises(ValueError, match="k: expected a tensor on cuda:0 .*, got one on cpu"):
        misa.select(**(arguments | {"k": arguments["k"].cpu()}), config=CONFIG)
    with pytest.raises(ValueError, match="slots: expected an array in CUDA device 0"):
        misa.append(paged("cuda")[0], arguments["k"], torch.arange(400))
    with pytest.raises(ValueError, match="k: expected an array in host memory"):
        misa.append(paged()[0], arguments["k"], torch.arange(400))


@cuda
@pytest.mark.parametrize("scale_format", ["f32", "ue8m0"])
@pytest.mark.parametrize("page_size", [32, 64, 128])
def test_device_append(page_size: int, scale_format: str) -> None:
    """A cache on the device gets the bits of one in host memory, in a captured graph too; sums do
    if their products are exact, with scales that are powers of two."""
    held = misa.Cache(512 // page_size, 128, page_size=page_size, scale_format=scale_format)
    there = [tensor(array, "cuda") for array in (held.data, held.page_sums, held.largest_scales)]
    derived = {"page_sums": there[1], "largest_scales": there[2]}
    keys, slots = torch.randn(100, 128), torch.randperm(512)[:100]

    def same() -> None:
        assert np.array_equal(there[0].cpu().numpy(), held.data)
        if page_size > 32:
            assert np.array_equal(there[2].cpu().numpy(), held.largest_scales)
            if scale_format == "ue8m0":
                assert np.array_equal(there[1].cpu().numpy(), held.page_sums)

    for _ in range(2):  # the second time over the first one's keys
        held.append(keys.numpy(), slots.numpy())
        misa.append(there[0], keys.cuda(), slots.cuda(), scale_format=scale_format, **derived)
        same()
        keys, slots = torch.randn(100, 128), torch.randperm(512)[:100]
    given = keys.cuda().bfloat16(), slots.cuda()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        misa.append(there[0], *given, scale_format=scale_format, **derived)
    graph.replay()
    held.append(given[0].float().cpu().numpy(), slots.numpy())
    same()
    if page_size > 32:
        for array in derived.values():
            array.fill_(-1)
        pages = torch.arange(512 // page_size, dtype=torch.int32)
        misa.rebuild(there[0], there[1], pages.cuda(), largest_scales=there[2])
        misa.rebuild(held.data, held.page_sums, pages.numpy(), largest_scales=held.largest_scales)
        same()
        half = len(pages) // 2
        misa.copy_pages(there[0], pages[:half].cuda(), pages[half:].cuda(), **derived)
        misa.copy_pages(held.data, pages[:half].numpy(), pages[half:].numpy(),
                        page_sums=held.page_sums, largest_scales=held.largest_scales)  # fmt: skip
        same()


@cuda
@pytest.mark.parametrize("row", [34, 68])
def test_device_sketches(row: int) -> None:
    """Sketches that a device appends or rebuilds have the bytes of those in host memory."""
    held = misa.Cache(4, 128)
    sketches = np.zeros((4, 64 * row), np.uint8)
    cache, there = tensor(held.data, "cuda"), tensor(sketches, "cuda")
    keys, slots = torch.randn(256, 128), torch.randperm(256)
    misa.append(held.data, keys.numpy(), slots.numpy(), sketches=sketches)
    misa.append(cache, keys.cuda(), slots.cuda(), sketches=there)
    assert np.array_equal(there.cpu().numpy(), sketches)
    there.fill_(0)
    misa.rebuild(cache, None, torch.arange(4, dtype=torch.int32).cuda(), sketches=there)
    assert np.array_equal(there.cpu().numpy(), sketches)


@cuda
def test_device_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of backends mean for CUDA tensors what they mean for host arrays, and the variable is
    heeded or refused, also once plans are cached."""
    arguments = tensors(random_inputs(PACK, dtype="bf16"), "cuda")
    want = misa.select(**arguments, config=CONFIG, scores=True)
    names = [each.name for each in misa.backends() if each.available]
    for name in ["cuda", *(each for each in names if each.startswith("cuda"))]:
        got = misa.select(**arguments, config=CONFIG, scores=True, backend=name)
        assert torch.equal(got.indices, want.indices)
        monkeypatch.setenv("MISA_BACKEND", name)
        assert torch.equal(misa.select(**arguments, config=CONFIG).indices, want.indices)
    for name in ("cpu", "reference", "abacus"):
        monkeypatch.delenv("MISA_BACKEND", raising=False)
        expected = f"expected auto, cuda, .* for arrays in device memory, got '{name}'"
        with pytest.raises(RuntimeError, match=f"^backend: {expected}"):
            misa.select(**arguments, config=CONFIG, backend=name)
        monkeypatch.setenv("MISA_BACKEND", name)
        with pytest.raises(RuntimeError, match=f"^MISA_BACKEND: {expected}"):
            misa.select(**arguments, config=CONFIG)
        misa.select(**arguments, config=CONFIG, backend="cuda")
    monkeypatch.setenv("MISA_BACKEND", "cuda")
    plan = misa.Plan(CONFIG, tokens=4, heads=8, dim=64, max_keys=400, q_dtype="f32", k_dtype="f32",
                     device="cuda")  # fmt: skip
    assert plan.backend.startswith("cuda-")


@cuda
def test_device_head_major() -> None:
    arguments = tensors(random_inputs(PACK, dtype="bf16"), "cuda")
    want = misa.select(**arguments, config=CONFIG, scores=True)
    arguments["q"] = arguments["q"].transpose(0, 1).contiguous().transpose(0, 1)
    got = misa.select(**arguments, config=CONFIG, scores=True)
    assert torch.equal(got.indices, want.indices) and torch.equal(got.scores, want.scores)
